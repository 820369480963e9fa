"""The command ``captum-robust explain``: parsing and printing only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from captum_robust._checks import printable
from captum_robust.cli.model_options import Device, Model, Weights, class_number
from captum_robust.cli.shared_options import (
    USUAL_MODEL,
    Layer,
    Network,
    check_network,
    listed,
    model_for,
    with_network,
)


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
    from captum_robust.show.explain import explain_image

    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
    usual = "robust_cam" if counterfactual is None else "perceptual_ball"
    named = listed(usual if methods is None else methods)
    check_network(network, named)
    sources = list(_image_files(path, out))
    originals = {file.resolve() for _, file in sources}
    for name, _ in sources:
        if (out / name).resolve() in originals:
            raise ValueError(f"{out / name}: would overwrite the image itself; give another --out")
    classifier = model_for(network, model, weights, device, layer)
    chosen = build_methods(classifier, with_network(classifier, named, network))
    number = None if target is None else class_number(classifier, target, "target")
    towards = None
    if counterfactual is not None:
        towards = class_number(classifier, counterfactual, "counterfactual")
    failed = 0
    for name, file in sources:
        try:
            explained = explain_image(
                classifier,
                file,
                chosen,
                out / name,
                target=number,
                counterfactual=towards,
                threshold=threshold,
                top=top,
            )
        except DataError as error:
            if len(sources) == 1:
                raise
            failed += 1
            typer.echo(f"captum-robust: {printable(str(error))}", err=True)
            continue
        typer.echo(printable(f"{file} -> {explained.picture}"))
        for label, probability in explained.classes:
            typer.echo(f"  {probability:6.1%}  {label}")
        for method, verdict in explained.verdicts.items():
            typer.echo(f"  {method}: {verdict}")
    if failed:
        typer.echo(f"{len(sources)} images: {failed} could not be used")
    if failed == len(sources):
        raise typer.Exit(2)


def _image_files(path: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """Name of the picture and file of each image; the pictures of an earlier call are none."""
    from captum_robust.data.images import list_images

    if path.is_dir():
        found = list_images(path, without=out)
        if not found:
            raise ValueError(f"{path}: no images in it")
        times = Counter(str(Path(name).with_suffix("")) for name in found)
        for name, file in found.items():
            stem = str(Path(name).with_suffix(""))
            yield f"{stem if times[stem] == 1 else name}.png", file
    elif path.is_file():
        yield f"{path.stem}.png", path
    else:
        raise FileNotFoundError(f"{path}: no such image or folder")
