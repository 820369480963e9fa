"""How much a command says: ``-q`` and ``-v`` of every command."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import import_module
from typing import Annotated, Any

import typer

from captum_robust._checks import check
from captum_robust._progress import stage, without_bars
from captum_robust.catalog.installation import versions_text
from captum_robust.cli.printing import Verbosity, warn

_QUIET = "Say nothing but the result and errors: no progress bars, no warnings."
_VERBOSE = "Also say what runs, how long it took, and where an error came from."
_OPTIONS = [
    inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option(f"--{name}", f"-{name[0]}", help=text)],
    )
    for name, text in (("quiet", _QUIET), ("verbose", _VERBOSE))
]


def with_verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options ``-q`` and ``-v`` behind its own."""
    own = inspect.signature(command)

    def spoken(**options: Any) -> Any:
        quiet, verbose = options.pop("quiet"), options.pop("verbose")
        check(not (quiet and verbose), "--quiet and --verbose: give one of them")
        Verbosity.quiet, Verbosity.verbose = quiet, verbose
        began = time.monotonic()
        with without_bars() if quiet else nullcontext():
            if sys.stderr.isatty():  # the command says itself what does not work
                with stage("loading PyTorch"), suppress(Exception):
                    import_module("torch")
            if verbose:
                warn(versions_text())
            try:
                return command(**options)
            finally:
                if verbose:
                    warn(f"{command.__name__}: {time.monotonic() - began:.1f} s")

    spoken.__name__, spoken.__doc__ = command.__name__, command.__doc__
    parameters = [*own.parameters.values(), *_OPTIONS]
    spoken.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    spoken.__annotations__ = {one.name: one.annotation for one in parameters}
    return spoken
