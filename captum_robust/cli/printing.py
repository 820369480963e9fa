"""What several commands print alike."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any

import typer

from captum_robust._checks import printable, printable_lines
from captum_robust._plurals import amount

if TYPE_CHECKING:
    from captum_robust.training import CroppedImages, LabelledImages, TrainingResult


class Verbosity:
    """What was asked of the command that runs in this process."""

    quiet = verbose = False


def echo(text: str, *, err: bool = False) -> None:
    """Print it, with what a terminal would obey written out, such as in the name of a file."""
    _print(printable_lines(text), err)


def _print(text: str, err: bool) -> None:
    """Print a text; progress bars are cleared before and drawn again behind it."""
    bars = sys.modules.get("tqdm")
    with nullcontext() if bars is None else bars.tqdm.external_write_mode():
        typer.echo(text, err=err)


def print_json(value: Any) -> None:
    """Print it as one line of JSON; a number that is not finite is null, a path its text."""
    _print(json.dumps(_plain(value), allow_nan=False), err=False)


def _plain(value: Any) -> Any:
    """The value in types of JSON; a data frame is a list of its rows."""
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict("records"))
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):  # a number of NumPy
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def say(text: str, *, err: bool = False) -> None:
    """Print it once, where several processes share the batches."""
    from captum_robust._processes import is_first

    if is_first():
        echo(text, err=err)


def warn(text: str) -> None:
    """Print it on standard error, on one line."""
    _print(f"captum-robust: {printable(text)}", err=True)


def say_unusable(images: LabelledImages | CroppedImages) -> None:
    """How many images could not be used, and why the first of them."""
    if images.unusable:
        total = len(images) + len(images.unusable)
        say(f"{amount(total, 'image')}: {len(images.unusable)} could not be used", err=True)
        for why in list(images.unusable.values())[:5]:
            say(f"  {printable(why)}", err=True)


def say_none_held_out(images: Sequence[int], share: float, per_class: bool = True) -> None:
    """Where there are too few images to hold some out, how many are needed."""
    if not images and share > 0:
        needed = next(n for n in count(1) if int(share * n))
        of = " of a class" if per_class else ""
        say(
            f"nothing is measured: to hold out {share:g} of the images takes {needed}{of}; give "
            "more images, or a larger --held-out"
        )


def say_resumed(result: TrainingResult) -> None:
    """Where a run went on, if it did."""
    if result.resumed_from:
        say(f"went on from step {result.resumed_from} of {result.steps}")
