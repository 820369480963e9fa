"""The command ``captum-robust``: its commands, and what becomes of an error."""

from __future__ import annotations

import sqlite3
import sys

import typer

from captum_robust._checks import printable
from captum_robust.cli import train_command as cli_train
from captum_robust.cli.attack_command import attack
from captum_robust.cli.compare_command import compare
from captum_robust.cli.demo_command import demo
from captum_robust.cli.explain_command import explain
from captum_robust.cli.methods_command import methods
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
    """Run the command; what a user got wrong is one line on standard error and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except (ValueError, TypeError, OSError, ImportError, sqlite3.Error) as error:
        code = _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if type(error).__module__.split(".")[0] not in {"click", "typer"}:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(_message(error))
            code = 0
        else:
            code = _fail(error)
    if code == 130:  # Ctrl-C, which typer itself may already have turned into this code
        typer.echo("captum-robust: stopped; the same command goes on from here", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception) -> int:
    typer.echo(f"captum-robust: error: {printable(_message(error))}", err=True)
    return 2


def _message(error: Exception) -> str:
    """Of an error of the command line's parser, or of any other."""
    own = getattr(error, "format_message", None)
    return str(own() if own else error)
