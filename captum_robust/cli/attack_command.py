"""The command ``captum-robust attack``: parsing and printing only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_robust._checks import check, printable
from captum_robust.cli.model_options import Device, Model, Weights, class_number, load_model
from captum_robust.cli.shared_options import (
    EPSILON_HELP,
    USUAL_MODEL,
    Fit,
    Images,
    Split,
    Steps,
    Universal,
    attacks_of,
    given_options,
    listed,
    open_dataset,
)

if TYPE_CHECKING:
    from captum_robust.benchmark import AttackRun
    from captum_robust.data import LocalizationDataset
    from captum_robust.models import Classifier

SHOWN_ROWS = 40


def attack(
    path: Annotated[
        Path | None,
        typer.Argument(help="An image, a folder of images, or the data set that --kind names."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="imagenet, tiny-imagenet, coco, voc, folder or samples (which takes no path). "
            "By default an image file is one image, and a folder is of kind folder."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run: images, table and curves.")] = Path(
        "captum-robust-attack"
    ),
    attack: Annotated[
        str,
        typer.Option(help="Names of attacks, separated by commas. See captum-robust methods."),
    ] = "pgd",
    epsilon: Annotated[str | None, typer.Option(help=f"{EPSILON_HELP} 1,2,4,8 by default.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The class to move towards, by name or number; else away from the label."
        ),
    ] = None,
    steps: Steps = 10,
    universal: Universal = None,
    keep_all: Annotated[
        bool, typer.Option("--all", help="Also write the images that do not fool the model.")
    ] = False,
    model: Model = USUAL_MODEL,
    weights: Weights = "DEFAULT",
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images that are attacked at once.")] = 16,
    fit: Fit = "squash",
    split: Split = None,
    boxes: Annotated[Path | None, typer.Option(help="folder: CSV with a column label.")] = None,
    images: Images = None,
    seed: Annotated[int, typer.Option(help="For attacks that draw.")] = 0,
    device: Device = "auto",
) -> None:
    """Write images that fool the model, and say how many do at each strength.

    Each is a PNG at the size of the model's input that still fools when it is read back.
    An image without a label is measured against the model's own prediction. Images
    that are misclassified to begin with are not attacked, and counted apart. Started
    again with the same arguments, a stopped run goes on.
    """
    from captum_robust.benchmark import AttackOptions, attack_images
    from captum_robust.catalog.attacks import ATTACKS, SWEPT_EPSILONS

    given = {"split": split, "boxes": boxes, "images": images}
    classifier = load_model(model, weights, device)
    dataset = _open_images(kind, path, out, given, classifier)
    options = AttackOptions(steps, seed, universal)
    built = attacks_of(classifier, attack, epsilon, SWEPT_EPSILONS, options, whole=True)
    aimed = None if target is None else class_number(classifier, target, "target")
    for name in listed(attack) or []:
        can_aim = aimed is None or ATTACKS[name].can_aim
        check(can_aim, f"target: {name} cannot move towards a given class")
    result = attack_images(
        classifier,
        dataset,
        built,
        out,
        target=aimed,
        limit=limit,
        batch_size=batch_size,
        fit=fit,
        seed=seed,
        keep_all=keep_all,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        _finish_attack(result)


def _open_images(
    kind: str | None, path: Path | None, out: Path, options: dict[str, Any], model: Classifier
) -> LocalizationDataset:
    """Open the data set to attack, by its kind, or what is at the path."""
    there = path is not None or kind is not None
    check(there, "give an image, a folder of images, or --kind samples")
    is_inside = path and path.is_dir() and out.resolve().is_relative_to(path.resolve())
    where = f"--out {out} lies inside {path}, the images' folder"
    check(not is_inside, f"{where}; give another --out")
    if kind is None and path is not None and not path.is_dir():
        from captum_robust.benchmark.attack_images import Photograph

        given = ", ".join(f"--{name}" for name in given_options(options))
        check(not given, f"a single image does not take: {given}")
        return Photograph(path)
    return open_dataset("folder" if kind is None else kind, path, options, model)


def _finish_attack(result: AttackRun) -> None:
    """Write table and curves, and print what became of the images."""
    table = result.write_csv()
    try:
        curves = f", curves: {result.write_curves()}"
    except ImportError as missing:
        curves = f" (no curves: {missing})"
    if rows := result.to_text(SHOWN_ROWS):
        typer.echo("\n" + rows)
    typer.echo("\n" + result.table_text())
    typer.echo("\n" + result.summary())
    failures = result.failures()
    for image, why in failures[:5]:
        text = why if image in why else f"{image}: {why}"
        typer.echo(f"captum-robust: {printable(text)}", err=True)
    if len(failures) > 5:
        typer.echo(f"  and {len(failures) - 5} more, all in the table")
    typer.echo(f"\ntable: {table}{curves}")
    if not result.used():
        raise typer.Exit(2)
    counts = result.table()
    check(
        not counts["n"].any() or counts["n_right"].any(),
        f"the model classifies none of the {counts['n'].max()} images right, so there is nothing "
        "to attack; do the labels count the model's classes?",
    )
