"""The command ``captum-robust``: its commands, and what becomes of an error."""

from __future__ import annotations

import sqlite3
import sys
import warnings

import typer

from captum_robust._checks import printable
from captum_robust.cli import train_command as cli_train
from captum_robust.cli.attack_command import attack
from captum_robust.cli.compare_command import compare
from captum_robust.cli.demo_command import demo
from captum_robust.cli.explain_command import explain
from captum_robust.cli.methods_command import methods
from captum_robust.cli.printing import warn
from captum_robust.cli.video_command import video

app = typer.Typer(
    name="captum-robust",
    help="Where does a classifier look, and how well does that place the object?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_train.app, name="train")
for command in (demo, compare, explain, attack, video, methods):
    app.command()(command)


def main() -> None:
    """Run the command; what a user got wrong is one line on standard error and exit code 2.

    A warning is a line on standard error too, once.
    """
    said: set[str] = set()

    def say(message: Warning | str, *_: object) -> None:
        if str(message) not in said:
            said.add(str(message))
            warn(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = say  # type: ignore[assignment]
        _run()


def _run() -> None:
    expected = (ValueError, TypeError, OSError, ImportError, sqlite3.Error)
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        is_parsers = type(error).__module__.split(".")[0] in {"click", "typer"}
        if not (is_parsers or isinstance(error, expected)):
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if is_parsers and type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(message)
            code = 0
        else:
            typer.echo(f"captum-robust: error: {printable(message)}", err=True)
            code = 2
    if code == 130:  # Ctrl-C, which typer itself may already have turned into this code
        typer.echo("captum-robust: stopped", err=True)
    sys.exit(code if isinstance(code, int) else 0)
