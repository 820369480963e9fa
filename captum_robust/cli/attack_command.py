"""The command ``captum-robust attack``: parsing and printing only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from captum_robust._checks import check
from captum_robust.cli.model_options import RunOptions, class_number, load_model
from captum_robust.cli.options import argument, command_of, option
from captum_robust.cli.printing import echo, print_json, warn
from captum_robust.cli.shared_options import (
    attack_names,
    attacks_of,
    given_data_options,
    open_dataset,
)

if TYPE_CHECKING:
    from captum_robust.benchmark import AttackRun
    from captum_robust.data import LocalizationDataset
    from captum_robust.models import Classifier

SHOWN_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class AttackCommandOptions(RunOptions):
    """The options of the command."""

    paths: list[Path] | None = field(default=None, metadata=argument())
    """Images, a folder of images, or the data set that --kind names."""
    kind: str | None = None
    """imagenet, tiny-imagenet, coco, voc, folder, webdataset or samples (which takes no path). By
    default one folder is of kind folder; other images, also of several folders, have no labels."""
    out: Path = Path("captum-robust-attack")
    """Folder of the run: images, table and curves."""
    attack: str = "pgd"
    target: str | None = None
    """The class to move towards, by name or number; else away from the label."""
    keep_all: bool = field(default=False, metadata=option("--all"))
    """Also write the images that do not fool the model."""
    json: bool = field(default=False, metadata=option("--json"))
    """Print one JSON object instead: the table, a row for each image and attack, and where the
    files are."""


@command_of(AttackCommandOptions, resumes=True)
def attack(options: AttackCommandOptions) -> None:
    """Write images that fool the model, and say how many do at each strength.

    Each is a PNG at the size of the model's input that still fools when it is read back.
    An image without a label is measured against the model's own prediction. Images
    that are misclassified to begin with are not attacked, and counted apart. Started
    again with the same arguments, a stopped run goes on.
    """
    from captum_robust._processes import is_first
    from captum_robust.benchmark import AttackOptions, attack_images
    from captum_robust.catalog.attacks import ATTACKS, SWEPT_EPSILONS

    model = load_model(options)
    dataset = _open_images(options, model)
    of_attacks = AttackOptions(options.steps, options.seed, options.universal)
    names, epsilon = options.attack, options.epsilon
    attacks = attacks_of(model, names, epsilon, SWEPT_EPSILONS, of_attacks, whole=True)
    target = class_number(model, options.target, "target")
    for name in attack_names(names) or []:
        can_aim = target is None or ATTACKS[name].can_aim
        check(can_aim, f"target: {name} cannot move towards a given class")
    result = attack_images(
        model,
        dataset,
        attacks,
        options.out,
        target=target,
        limit=options.limit,
        batch_size=options.batch_size,
        fit=options.fit,
        seed=options.seed,
        retry=not options.no_retry,
        workers=options.workers,
        keep_all=options.keep_all,
    )
    if is_first():
        _finish_attack(result, options.json)


def _open_images(options: AttackCommandOptions, model: Classifier) -> LocalizationDataset:
    """Open the data set to attack, by its kind, or what is at the path."""
    kind, paths = options.kind, options.paths or []
    there = paths or kind is not None
    check(there, "give an image, a folder of images, or --kind samples")
    is_one = len(paths) == 1 and paths[0].is_dir()
    if kind is None and not is_one:
        from captum_robust.benchmark.attack_images import Photographs

        given = ", ".join(f"--{name}" for name in given_data_options(vars(options)))
        what = "a single image does" if len(paths) == 1 else "several images do"
        check(not given, f"{what} not take: {given}")
        return Photographs(paths, without=options.out)
    check(len(paths) < 2, f"--kind {kind}: expected one path, got {len(paths)}")
    path = paths[0] if paths else None
    return open_dataset("folder" if kind is None else kind, path, vars(options), model)


def _finish_attack(result: AttackRun, as_json: bool) -> None:
    """Write table and curves, and print what became of the images."""
    from captum_robust.report.outcomes import NOTHING_TO_ATTACK

    table, counts = result.write_csv(), result.table()
    curves: Path | None = None
    try:
        curves = result.write_curves()
        said = f", curves: {curves}"
    except ImportError as missing:
        said = f" (no curves: {missing})"
    if as_json:
        facts = {"attacks": counts, "images": result.to_dataframe(), "table": table}
        print_json(facts | {"curves": curves, "summary": result.summary()})
    else:
        if rows := result.to_text(SHOWN_ROWS):
            echo("\n" + rows)
        echo("\n" + result.table_text())
        echo("\n" + result.summary())
    failures = result.failures()
    for image, why in failures[:5]:
        warn(why if image in why else f"{image}: {why}")
    if len(failures) > 5:
        echo(f"  and {len(failures) - 5} more, all in the table", err=as_json)
    if not as_json:
        echo(f"\ntable: {table}{said}")
    if not result.used():
        raise typer.Exit(2)
    is_any_right = not counts["n"].any() or counts["n_right"].any()
    check(is_any_right, NOTHING_TO_ATTACK.format(counts["n"].max()))
