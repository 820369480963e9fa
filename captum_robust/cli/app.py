"""The command ``captum-robust``: its commands, and what becomes of an error."""

from __future__ import annotations

import signal
import sqlite3
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from captum_robust import __version__
from captum_robust._checks import printable, printable_lines
from captum_robust.cli import train_command as cli_train
from captum_robust.cli.app_command import app as explorer
from captum_robust.cli.attack_command import attack
from captum_robust.cli.compare_command import compare
from captum_robust.cli.demo_command import demo
from captum_robust.cli.doctor_command import doctor
from captum_robust.cli.exit_codes import exit_codes_text
from captum_robust.cli.explain_command import explain
from captum_robust.cli.inspect_command import inspect
from captum_robust.cli.locate_command import locate
from captum_robust.cli.methods_command import methods
from captum_robust.cli.printing import Verbosity, warn
from captum_robust.cli.verbosity import with_verbosity
from captum_robust.cli.video_command import video

_CTRL_C = 128 + signal.SIGINT

app = typer.Typer(
    name="captum-robust",
    help="Where does a classifier look, and how well does that place the object?",
    epilog=exit_codes_text(),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_train.app, name="train")
for command in (demo, compare, explain, locate, inspect, attack, video, explorer, methods, doctor):
    app.command()(command)
for group in (app, cli_train.app):
    for one in group.registered_commands:
        assert one.callback is not None
        one.callback = with_verbosity(one.callback)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"captum-robust {__version__}")
        raise typer.Exit


@app.callback()
def _of_all_commands(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; what a user got wrong is one line on standard error and exit code 2.

    A warning is a line on standard error too, once.
    """
    Verbosity.quiet = Verbosity.verbose = False
    said: set[str] = set()

    def say(message: Warning | str, *_: object) -> None:
        if str(message) not in said and not Verbosity.quiet:
            said.add(str(message))
            warn(str(message))

    with warnings.catch_warnings(), _as_ctrl_c():
        warnings.showwarning = say  # type: ignore[assignment]
        _run()


@contextmanager
def _as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP stop the command as Ctrl-C does, with exit codes of their own."""
    received = signal.SIGINT

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        ctrl_c = signal.getsignal(signal.SIGINT)  # that of a training lets the step end
        if not callable(ctrl_c):  # in the background a shell has it ignored
            raise KeyboardInterrupt
        ctrl_c(number, frame)

    is_main = threading.current_thread() is threading.main_thread()
    names = [name for name in ("SIGTERM", "SIGHUP") if is_main and hasattr(signal, name)]
    numbers = [signal.Signals[name] for name in names]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    except SystemExit as end:
        if end.code == _CTRL_C:
            raise SystemExit(128 + received) from None
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _run() -> None:
    expected = (ValueError, TypeError, OSError, ImportError, sqlite3.Error)
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _CTRL_C
    except Exception as error:
        is_parsers = type(error).__module__.split(".")[0] in {"click", "typer"}
        if not (is_parsers or isinstance(error, expected) or _is_out_of_memory(error)):
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message = message or type(error).__name__  # a MemoryError says nothing
        if is_parsers and type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(message)
            code = 0
        else:
            if Verbosity.verbose:
                typer.echo(printable_lines("".join(traceback.format_exception(error))), err=True)
            typer.echo(f"captum-robust: error: {printable(message)}", err=True)
            code = 2
    if code == _CTRL_C:  # Ctrl-C, which typer itself may already have turned into this code
        typer.echo("captum-robust: stopped", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _is_out_of_memory(error: Exception) -> bool:
    from captum_robust.runs.machine import is_out_of_memory

    return is_out_of_memory(error)
