"""A command's options are the fields of a dataclass: what stands below a field is its help."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from captum_robust._checks import check_choice
from captum_robust.cli.printing import warn

S = TypeVar("S")

USUAL_MODEL = "efficientnet_lite0"
CERTIFY_SAMPLES = 100
CERTIFIED_RADII = "0.1,0.25,0.5"


def argument(**facts: Any) -> dict[str, Any]:
    """Metadata of a field that is an argument of its command, not an option.

    ``facts`` are those of ``typer.Argument``.
    """
    return {"kind": typer.Argument, "facts": facts}


def option(*names: str, **facts: Any) -> dict[str, Any]:
    """Metadata of a field whose option has these names instead of its own, or facts as ``min=1``.

    ``facts`` are those of ``typer.Option``.
    """
    return {"options": names, "facts": facts}


@dataclass(frozen=True)
class SharedOptions:
    """The options that several commands have, for their help."""

    model: str
    """efficientnet_lite0, …1, …2, a torchvision classification model, timm:NAME, or an own one as
    package.module:function, which is called without arguments and returns a module or a
    Classifier."""
    weights: str
    """DEFAULT, a member of torchvision's weights enum, none for random ones (always the same), or
    the file of a state dict, .safetensors or of torch.save. Without a file an own model has those
    of its function."""
    layer: str
    """Layer for class activation maps, by its dotted name; else the last map."""
    mean: str
    """Means of the channels that the network was trained with, separated by commas, for pixels in
    [0, 1]; else the model's own."""
    std: str
    """Standard deviations of the channels, as for --mean."""
    network: Path
    """For real_time_masking or adversarial_localization: file of a network for the model, from
    captum-robust train masking or train localization, which holds the small classifier that it was
    trained against too; else the one that comes with the package."""
    attack: str
    """Names of attacks, separated by commas. See captum-robust methods."""
    steps: int
    """Steps of attacks that take several."""
    universal: Path
    """File of the universal perturbation, for --attack universal."""
    fit: str
    """squash the whole image to the model's size, or crop its centre."""
    split: str
    """Split of the data set."""
    images: Path
    """coco: folder of the images."""
    exif_orientation: bool
    """Boxes and masks were drawn on upright images, as most viewers show them. Without it, on the
    pixels as they are stored. Images are upright either way."""
    certify_samples: int
    """Noisy copies of each image, for --certify. The farther the radius beside the noise, the more
    it takes: 33 at .4 of it, 79 at all of it, 590 at twice as much."""
    certify_radii: str
    """How far an attacker may go, for --certify: lengths of the change in L2 over the image, with
    pixels in [0, 1], separated by commas."""
    certify_denoiser: bool
    """For --certify: take the noise out of each copy with the denoiser that comes with the package,
    which lets the classifier recognise more of them."""
    device: str
    """auto, cpu, cuda, cuda:1, mps, …"""
    precision: str
    """float32 or bfloat16."""


def command_of(
    settings: type[S],
    *,
    resumes: bool = False,
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Callable[[S], None]], Callable[..., None]]:
    """Make a command of a function that takes a dataclass: its options are the fields.

    Args:
        settings: a frozen dataclass. What stands below a field is its help, else what stands below
            that of :class:`SharedOptions`. The fields of the first of its bases come last. The
            metadata of a field are those of :func:`argument` and :func:`option`.
        resumes: whether the same command goes on from where Ctrl-C stopped it, which is then said.
        recipes: name -> values of fields; --recipe takes these for all that is not given.

    Returns:
        A decorator; the docstring of the function is that of the command.
    """
    helps, types = help_of(SharedOptions) | help_of(settings), get_type_hints(settings)
    general = [one.name for one in fields(settings.__mro__[-2])]
    parameters = []
    words = _words_of(settings)
    every: list[Field[Any]] = list(fields(settings))  # type: ignore[arg-type]
    for one in sorted(every, key=lambda one: one.name in general):
        facts = {"help": helps[one.name], **one.metadata.get("facts", {})}
        kind = one.metadata.get("kind", typer.Option)
        parameters.append(
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if one.default is MISSING else one.default,
                annotation=Annotated[
                    types[one.name], kind(*one.metadata.get("options", ()), **facts)
                ],
            )
        )

    if recipes:
        parameters[:0] = _recipe_parameters(recipes)

    def decorated(run: Callable[[S], None]) -> Callable[..., None]:
        def command(**options: Any) -> None:
            try:
                if recipes:
                    options |= _of_recipe(recipes, options.pop("recipe"), options.pop("context"))
                run(settings(**options))
            except (ValueError, TypeError, FileNotFoundError) as error:
                name = re.match(r"\w*(?= of [^:]*:|:)", text := str(error))
                is_own = type(error) in (ValueError, TypeError, FileNotFoundError)
                if not (is_own and name and name[0] in words):
                    raise
                raise type(error)(words[name[0]] + text[name.end() :]) from None
            except KeyboardInterrupt:
                if not resumes:
                    raise
                warn("stopped; the same command goes on from here")
                raise SystemExit(130) from None

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorated


def _recipe_parameters(recipes: Mapping[str, Mapping[str, Any]]) -> list[inspect.Parameter]:
    """Return the option --recipe, whose help says what each is, and what tells which were typed."""
    each = (
        f"{name}: {', '.join(f'{k} {v}' for k, v in values.items()).replace('_', '-')}"
        for name, values in recipes.items()
    )
    named = typer.Option("--recipe", help=f"Others for the defaults below. {'; '.join(each)}.")
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("context", kind, annotation=typer.Context),
        inspect.Parameter("recipe", kind, default=None, annotation=Annotated[str | None, named]),
    ]


def _of_recipe(
    recipes: Mapping[str, Mapping[str, Any]], name: str | None, context: typer.Context
) -> dict[str, Any]:
    """Return what the recipe says of options that were not typed."""
    if name is None:
        return {}
    check_choice("--recipe", name, recipes)
    sources = {option: context.get_parameter_source(option) for option in recipes[name]}
    typed = {option for option, source in sources.items() if source and source.name != "DEFAULT"}
    return {option: value for option, value in recipes[name].items() if option not in typed}


_OTHER_WORDS = {"size": "input_size", "lr": "learning_rate"}
"""What the package calls the argument that an option is for, where it does not share its name."""


def _words_of(settings: type) -> dict[str, str]:
    """The name of an argument that an error begins with -> the option that it came by."""
    words: dict[str, str] = {}
    for one in fields(settings):
        if one.metadata.get("kind", typer.Option) is typer.Option:
            named = one.metadata.get("options") or (f"--{one.name.replace('_', '-')}",)
            words |= dict.fromkeys((one.name, _OTHER_WORDS.get(one.name, one.name)), named[0])
    return words


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
