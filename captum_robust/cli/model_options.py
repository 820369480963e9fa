"""What the commands' options name: a classifier, one of its classes, and a device."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from captum_robust._checks import check, unknown_name
from captum_robust._progress import stage
from captum_robust.cli.options import USUAL_MODEL, option

if TYPE_CHECKING:
    from captum_robust.models import Classifier


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which classifier, and where it runs."""

    model: str = USUAL_MODEL
    weights: str = "DEFAULT"
    layer: str | None = None
    mean: str | None = None
    std: str | None = None
    size: int | None = None
    """Side of the network's images in pixels; else the model's own."""
    classes: str | None = None
    """The model's class names in order, where it does not know them: separated by commas, or a text
    file with one a line."""
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions):
    """What the runs over a data set have in common."""

    limit: int | None = None
    """Only the first so many images."""
    batch_size: int = 16
    """Images that a method or an attack gets at once."""
    fit: str = "squash"
    split: str | None = None
    boxes: Path | None = None
    """folder: CSV of boxes, or with a column label."""
    images: Path | None = None
    exif_orientation: bool = field(default=False, metadata=option("--exif-orientation"))
    epsilon: str | None = None
    """Strengths of the attacks, separated by commas, in levels of an 8-bit image: 8, or
    8/255, is 8/255 of the pixels' range. By default 8, of attack 1,2,4,8."""
    steps: int = field(default=10, metadata=option(min=1))
    universal: Path | None = None
    seed: int = 0
    """For methods and attacks that draw."""
    no_retry: bool = field(default=False, metadata=option("--no-retry"))
    """Keep the rows with errors of a run that goes on; else they are made again."""
    workers: int = field(default=0, metadata=option(min=0))
    """Processes that read images ahead of the model; 0: threads of this one do."""


def load_model(options: ModelOptions) -> Classifier:
    """Load the classifier onto its device."""
    from captum_robust._contexts import seeded
    from captum_robust.models.zoo import named_classifier, published_weights

    names, weights = class_names(options.classes), options.weights
    # Published weights would lose their last layer for another number of classes.
    is_of_any = published_weights(weights) is None or Path(weights).is_file()
    # Weights that are random are the same when the command goes on.
    with stage(f"loading {options.model}"), seeded(0, None):
        model = named_classifier(
            *(options.model, weights, options.size, options.mean, options.std, options.layer),
            class_names=names if is_of_any else None,
        )
    if names is not None:
        count = len(model.class_names or ())
        check(
            len(names) == count, f"--classes: expected {count}, as of the model, got {len(names)}"
        )
        model.class_names = names
    return model.to(chosen_device(options.device))


def class_names(given: str | None) -> list[str] | None:
    """The names between the commas, or on the lines of the file of this name."""
    if given is None:
        return None
    from captum_robust.data.files import lines_of, read_text

    is_file = os.path.isfile(given)  # names may be longer than a path can be
    parts = lines_of(read_text(Path(given))) if is_file else given.split(",")
    return [name.strip() for name in parts if name.strip()]


def chosen_device(device: str) -> str:
    """The device, or what is there for ``auto``.

    Raises:
        ValueError: it is not available.
    """
    import torch

    if device == "auto":
        local = os.environ.get("LOCAL_RANK", "0")
        mps = torch.backends.mps.is_available()
        device = f"cuda:{local}" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter without CUDA
        first = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is not available here: {first}") from None
    return device


def class_number(model: Classifier, target: str | None, option: str) -> int | None:
    """The number of a class of the model, from its name or number; None: none was given.

    Raises:
        ValueError: there is no such class.
    """
    if target is None:
        return None
    from captum_robust.data.classes import ClassIndex

    names = model.class_names or []
    number = ClassIndex(names)(target, option)
    is_number = number is None and target.isdecimal()
    last = len(names) - 1
    check(not is_number, f"{option}: the model has the classes 0 to {last}, not {target}")
    if number is None:
        raise unknown_name(option, target, names)
    return number
