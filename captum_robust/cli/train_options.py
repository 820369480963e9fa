"""What the commands of ``captum-robust train`` share: options, images, and what they print."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_robust._checks import printable, unknown_name

if TYPE_CHECKING:
    from captum_robust.data import LocalizationDataset
    from captum_robust.training import (
        CroppedImages,
        LabelledImages,
        TrainingResult,
        TrainingSettings,
    )

Kind = Annotated[str, typer.Option(help="folder, tiny-imagenet (its training part) or imagenet.")]
Epochs = Annotated[int, typer.Option(help="Passes over the images.")]
BatchSize = Annotated[int, typer.Option(help="Images a step, of all processes together.")]
LearningRate = Annotated[float, typer.Option(help="The highest of the schedule.")]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16.")]
CheckpointEvery = Annotated[float, typer.Option(help="Seconds between two checkpoints.")]
Workers = Annotated[int, typer.Option(help="Processes that load images.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]
TrainingDevice = Annotated[str, typer.Option(help="auto, or cpu.")]


def settings_of(options: Mapping[str, Any]) -> TrainingSettings:
    """The settings of a command, from those of its options that have the same names.

    A command gives all of its options: its ``locals()``.

    Raises:
        ValueError: a value out of range.
        ImportError: a package that training needs is missing; names the pip command.
    """
    from captum_robust.training import TrainingSettings
    from captum_robust.training.loop import training_device

    known = {setting.name for setting in fields(TrainingSettings)}
    settings = TrainingSettings(**{k: v for k, v in options.items() if k in known})
    training_device(settings)  # so that a package that is missing is known at once
    return settings


def open_images(kind: str, path: Path, out: Path) -> LocalizationDataset:
    """The data set of a kind, all of whose images have a class."""
    from captum_robust.data import load_dataset

    options: dict[str, dict[str, Any]] = {
        "folder": {"labels": "sorted"},
        "tiny-imagenet": {"split": "train", "labels": "wnids"},
        "imagenet": {"split": "train"},
    }
    if kind not in options:
        raise unknown_name("kind of data set", kind, options)
    check_out(out, path)
    return load_dataset(kind, path, **options[kind])


def names_of(dataset: LocalizationDataset, path: Path, classes: int | None) -> list[str]:
    """Of the data set's classes, or of the first so many of them.

    Raises:
        ValueError: there are fewer, or fewer than two.
    """
    names = list(dataset.class_names or [])
    if len(names) < 2:
        raise ValueError(f"{path}: expected at least two classes, found {len(names)}")
    if classes is not None and not 2 <= classes <= len(names):
        raise ValueError(f"classes: expected a number from 2 to {len(names)}, got {classes}")
    return names[:classes]


def check_out(out: Path, images: Path) -> None:
    """Raise ``ValueError`` unless ``out`` is, or can be, a folder outside of the images'."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if images.is_dir() and out.resolve().is_relative_to(images.resolve()):
        raise ValueError(
            f"--out {out} lies inside {images}, the images' folder; give another --out"
        )


def shuffled(numbers: Sequence[int], seed: int) -> list[int]:
    """The numbers in an order that is drawn."""
    import torch

    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return [numbers[i] for i in order.tolist()]


def is_first() -> bool:
    """Whether this is the process that prints and writes, of those that share the batches."""
    return int(os.environ.get("RANK", "0")) == 0


def say_unusable(images: LabelledImages | CroppedImages) -> None:
    """How many images could not be used, and of the first of them why."""
    if images.unusable:
        total = len(images) + len(images.unusable)
        typer.echo(f"{total} images: {len(images.unusable)} could not be used", err=True)
        for why in list(images.unusable.values())[:5]:
            typer.echo(f"  {printable(why)}", err=True)


def say_resumed(result: TrainingResult) -> None:
    """Where a run went on, if it did."""
    if result.resumed_from:
        typer.echo(f"went on from step {result.resumed_from} of {result.steps}")
