"""The command ``captum-robust explain``: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from captum_robust._checks import check_number, printable
from captum_robust.cli.model_options import Device, Model, Weights, class_number
from captum_robust.cli.shared_options import (
    USUAL_MODEL,
    Layer,
    Network,
    listed,
    model_for,
    read_network,
    with_network,
)

if TYPE_CHECKING:
    from captum_robust.show.explain import ExplainedImage


def explain(
    path: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path(
        "captum-robust-explain"
    ),
    model: Model = USUAL_MODEL,
    weights: Weights = "DEFAULT",
    layer: Layer = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names, separated by commas; see captum-robust methods. robust_cam by default, "
            "or, with --counterfactual, perceptual_ball."
        ),
    ] = None,
    network: Network = None,
    target: Annotated[
        str | None,
        typer.Option(help="The class to explain, by name or number; else the prediction."),
    ] = None,
    counterfactual: Annotated[
        str | None,
        typer.Option(
            help="What would make it this class, by name or number? For methods that perturb the "
            "image, such as perceptual_ball."
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="How many classes to print.", min=1)] = 5,
    threshold: Annotated[
        float,
        typer.Option(help="The box holds the largest part above this share of the map's range."),
    ] = 0.2,
    device: Device = "auto",
) -> None:
    """Draw where the classifier looks: one PNG an image, the top classes in the terminal."""
    from captum_robust.catalog.methods import build_methods
    from captum_robust.data import DataError
    from captum_robust.show.explain import explain_image, pictures_of

    check_number("threshold", threshold, 0, 1)
    usual = "robust_cam" if counterfactual is None else "perceptual_ball"
    named = listed(usual if methods is None else methods)
    trained = read_network(network, named)
    pictures = pictures_of(path, out)
    classifier = model_for(trained, model, weights, device, layer)
    chosen = build_methods(classifier, with_network(classifier, named, trained))
    number = None if target is None else class_number(classifier, target, "target")
    towards = None
    if counterfactual is not None:
        towards = class_number(classifier, counterfactual, "counterfactual")
    failed = 0
    for picture, file in pictures:
        try:
            explained = explain_image(
                classifier,
                file,
                chosen,
                picture,
                target=number,
                counterfactual=towards,
                threshold=threshold,
                top=top,
            )
        except DataError as error:
            if len(pictures) == 1:
                raise
            failed += 1
            typer.echo(f"captum-robust: {printable(str(error))}", err=True)
        else:
            _say_explained(file, explained)
    if failed:
        typer.echo(f"{len(pictures)} images: {failed} could not be used")
    if failed == len(pictures):
        raise typer.Exit(2)


def _say_explained(file: Path, explained: ExplainedImage) -> None:
    """Print what was drawn of an image file, its classes, and what methods made of it."""
    typer.echo(printable(f"{file} -> {explained.picture}"))
    for label, probability in explained.classes:
        typer.echo(f"  {probability:6.1%}  {label}")
    for method, verdict in explained.verdicts.items():
        typer.echo(f"  {method}: {verdict}")
