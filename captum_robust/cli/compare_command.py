"""The command ``captum-robust compare``: parsing and printing only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from captum_robust.cli.model_options import Device, Model, Weights
from captum_robust.cli.shared_options import (
    EPSILON_HELP,
    USUAL_MODEL,
    Adaptive,
    AllSteps,
    Attacks,
    Fit,
    Images,
    Layer,
    Methods,
    Network,
    Split,
    Steps,
    Universal,
    attacks_of,
    check_attack,
    listed,
    model_for,
    open_dataset,
    print_comparison,
    read_network,
    with_network,
)


def compare(
    kind: Annotated[
        str, typer.Argument(help="imagenet, tiny-imagenet, coco, voc, folder or samples.")
    ],
    path: Annotated[
        Path | None, typer.Argument(help="Folder or archive of the data set; none for samples.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run and its report.")] = Path(
        "captum-robust-compare"
    ),
    model: Model = USUAL_MODEL,
    weights: Weights = "DEFAULT",
    layer: Layer = None,
    methods: Methods = None,
    network: Network = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images that a method gets at once.")] = 16,
    target: Annotated[str, typer.Option(help="The class to explain: label or prediction.")] = (
        "label"
    ),
    fit: Fit = "squash",
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Tune thresholds on the reported images.")
    ] = False,
    split: Split = None,
    boxes: Annotated[Path | None, typer.Option(help="folder: CSV of boxes.")] = None,
    masks: Annotated[Path | None, typer.Option(help="folder: parallel folder of masks.")] = None,
    images: Images = None,
    attack: Attacks = None,
    epsilon: Annotated[str | None, typer.Option(help=f"{EPSILON_HELP} 8 by default.")] = None,
    steps: Steps = 10,
    universal: Universal = None,
    all_steps: AllSteps = False,
    adaptive: Adaptive = False,
    saliency_metric: Annotated[
        bool,
        typer.Option(
            "--saliency-metric",
            help="Also measure how small a crop around each map the class survives: up to 18 "
            "classifier passes more an image and method.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="For methods and attacks that draw.")] = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Run attribution methods over a data set: a table with intervals, and a report.

    The centre box and the whole image are always among the methods. With --attack every
    method also runs on the images under each attack at each strength. --adaptive adds the
    attacker who knows how a method defends itself. Started again with the same
    arguments, a stopped run goes on. Under torchrun (python -m captum_robust) the
    processes share the images.
    """
    from captum_robust.benchmark import AttackOptions
    from captum_robust.benchmark import compare as run
    from captum_robust.catalog.attacks import COMPARED_EPSILONS
    from captum_robust.catalog.methods import FIXED_BOXES

    check_attack(
        attack, epsilon=epsilon, universal=universal, adaptive=adaptive, all_steps=all_steps
    )
    chosen = listed(methods)
    if chosen:  # every table has the baselines; they cost no classifier pass
        chosen += [name for name in FIXED_BOXES if name not in chosen]
    file = read_network(network, chosen)
    classifier = model_for(file, model, weights, device, layer)
    given = {"split": split, "boxes": boxes, "masks": masks, "images": images}
    dataset = open_dataset(kind, path, given, classifier)
    options = AttackOptions(steps, seed, universal, all_steps)
    result = run(
        classifier,
        dataset,
        with_network(classifier, chosen, file),
        attacks_of(classifier, attack, epsilon, COMPARED_EPSILONS, options),
        out=out,
        limit=limit,
        batch_size=batch_size,
        target=target,
        fit=fit,
        precision=precision,
        seed=seed,
        adaptive=adaptive,
        saliency_metric=saliency_metric,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        print_comparison(result, out / "report.html", oracle=oracle)
