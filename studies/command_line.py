"""The command line of a study, made from the signatures of its stages; machine and versions."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch


def study(
    doc: str | None,
    *stages: Callable[..., int | None],
    threads: int | None = None,
    packages: Sequence[str] = (),
) -> None:
    """Run the stage that the command line asks for, and leave with the code that it returns.

    The command line follows from the signature of a stage. Its parameters are arguments in their
    order, those behind ``*`` are options; a parameter whose type is a dataclass stands for its
    fields. ``tuple[int, ...]`` takes several values, ``bool`` is a flag, ``Literal`` gives the
    choices. Of ``Annotated[type, …]`` a text is the help and a function parses the value.

    Args:
        doc: the docstring of the script.
        stages: one function, or several of which the first argument names one.
        threads: of torch, unless ``--threads`` says otherwise; None: as many as torch takes.
        packages: whose versions are printed besides.
    """
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=doc, **shape)
    if len(stages) == 1:
        commands = {stages[0]: parser}
    else:
        choice = parser.add_subparsers(required=True, metavar="stage")
        commands = {
            stage: choice.add_parser(
                stage.__name__,
                help=(stage.__doc__ or "").splitlines()[0].replace("%", "%%"),
                description=stage.__doc__,
                **shape,
            )
            for stage in stages
        }
    for stage, command in commands.items():
        command.set_defaults(call=_declared(command, stage))
        command.add_argument("--threads", type=int, default=threads, help="of torch")
    given = vars(parser.parse_args())
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    print(machine(given.get("device", "cpu"), packages), flush=True)
    if given.get("device") == "cpu":
        print("NO GPU WAS MEASURED: these are numbers of a CPU (--device cuda)", flush=True)
    sys.exit(given["call"](given))


def _declared(
    parser: argparse.ArgumentParser, function: Callable[..., Any]
) -> Callable[[Mapping[str, Any]], Any]:
    """Add an argument for each parameter; return what calls the function with their values."""
    hints = get_type_hints(function, include_extras=True)
    values: dict[str, Callable[[Mapping[str, Any]], Any]] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint):
            values[parameter.name] = _declared(parser, hint)
        else:
            _declare(parser, parameter, hint)
            values[parameter.name] = lambda given, name=parameter.name: given[name]
    return lambda given: function(**{name: value(given) for name, value in values.items()})


def _declare(parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: Any) -> None:
    """Add the argument of one parameter."""
    settings: dict[str, Any] = {}
    extras: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
    hint = next((a for a in get_args(hint) if type(None) in get_args(hint)), hint)
    if get_origin(hint) is tuple:
        hint, settings["nargs"] = get_args(hint)[0], "*"
    if get_origin(hint) is Literal:
        settings["choices"] = get_args(hint)
        hint = type(settings["choices"][0])
    settings["type"] = hint
    for extra in extras:
        if isinstance(extra, str):
            settings["help"] = extra.replace("%", "%%")
        else:
            settings["type"] = extra
            settings.pop("nargs", None)
    missing = parameter.default is parameter.empty
    if hint is bool:
        settings = {"action": "store_true", "help": settings.get("help")}
    if not missing:
        settings["default"] = parameter.default
    if parameter.kind is not parameter.KEYWORD_ONLY:
        parser.add_argument(parameter.name, **settings, **({} if missing else {"nargs": "?"}))
    else:
        flag = f"--{parameter.name.replace('_', '-')}"
        parser.add_argument(flag, required=missing, **settings)


def listed(
    known: Collection[str] | None = None, separator: str = ","
) -> Callable[[str], tuple[str, ...]]:
    """Return what parses names with a separator between them, each of which must be known."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name for name in map(str.strip, text.split(separator)) if name)
        for name in names:
            if known is not None and name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; known: {', '.join(known)}")
        return names

    return parse


def numbered(text: str) -> tuple[int, ...]:
    """Parse whole numbers with commas between them."""
    return tuple(map(int, text.split(",")))


def machine(device: str = "cpu", packages: Sequence[str] = ()) -> str:
    """Return date, device, threads and versions; a GPU is told not to round to TF32."""
    where = "CPU"
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        where = torch.cuda.get_device_name(device)
    versions = [f"{p} {version(p)}" for p in ("torch", "captum", *packages, "captum-robust")]
    return (
        f"{datetime.date.today()}, {where}, {platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch thread(s); Python "
        f"{platform.python_version()}, {', '.join(versions)}"
    )


def version(package: str) -> str:
    """Return the installed version, or "–"."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "–"


def installed(module: str) -> bool:
    """Whether a peer is there to compare with."""
    return importlib.util.find_spec(module) is not None
