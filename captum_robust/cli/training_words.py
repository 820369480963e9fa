"""What the commands of ``captum-robust train`` print alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from captum_robust._checks import printable

if TYPE_CHECKING:
    from captum_robust.training import CroppedImages, LabelledImages, TrainingResult


def say_unusable(images: LabelledImages | CroppedImages) -> None:
    """How many images could not be used, and why the first of them."""
    if images.unusable:
        total = len(images) + len(images.unusable)
        typer.echo(f"{total} images: {len(images.unusable)} could not be used", err=True)
        for why in list(images.unusable.values())[:5]:
            typer.echo(f"  {printable(why)}", err=True)


def say_resumed(result: TrainingResult) -> None:
    """Where a run went on, if it did."""
    if result.resumed_from:
        typer.echo(f"went on from step {result.resumed_from} of {result.steps}")
