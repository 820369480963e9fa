"""The command ``captum-robust train``: its options are the fields of the trainings' settings."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from captum_robust.cli.localization_command import localization
from captum_robust.cli.masking_command import masking
from captum_robust.cli.robust_command import robust
from captum_robust.training.settings import (
    LocalizationSettings,
    MaskingSettings,
    RobustSettings,
    TrainingSettings,
)

S = TypeVar("S")

app = typer.Typer(
    help="Train networks; a run that was stopped goes on when it is started again.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def train() -> None:
    """Train networks; a run that was stopped goes on when it is started again."""


def command_of(settings: type[S], run: Callable[[S], None]) -> Callable[..., None]:
    """The function of a command whose options are the fields of a dataclass.

    Args:
        settings: a frozen dataclass; what stands below a field is its help, and ``"options"`` in
            its metadata are other names than its own.
        run: what the command does with them; its docstring is that of the command.
    """
    helps, types = help_of(settings), get_type_hints(settings)

    def command(**options: Any) -> None:
        run(settings(**options))

    command.__name__, command.__doc__ = run.__name__, run.__doc__
    parameters = []
    for one in _in_order(settings):
        option = typer.Option(*one.metadata.get("options", ()), help=helps[one.name])
        default = inspect.Parameter.empty if one.default is MISSING else one.default
        parameters.append(
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[types[one.name], option],
            )
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def help_of(settings: type) -> dict[str, str]:
    """Field of a dataclass -> the string below it, its own or that of a base."""
    helps: dict[str, str] = {}
    for base in reversed(settings.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for one, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(one, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(one.target, ast.Name)
                helps[one.target.id] = " ".join(ast.literal_eval(below.value).split())
    return helps


def _in_order(settings: Any) -> list[Field[Any]]:
    """What to train on first, how long and how last."""
    last = [one.name for one in fields(TrainingSettings)]
    return sorted(fields(settings), key=lambda one: one.name in last)


app.command()(command_of(RobustSettings, robust))
app.command()(command_of(MaskingSettings, masking))
app.command()(command_of(LocalizationSettings, localization))
