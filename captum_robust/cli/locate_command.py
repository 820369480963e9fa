"""The command ``captum-robust locate``: parsing and printing only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from captum_robust._checks import check, known_name, printable
from captum_robust._plurals import amount
from captum_robust.cli.model_options import ModelOptions, class_number
from captum_robust.cli.options import argument, command_of, option
from captum_robust.cli.printing import echo, warn
from captum_robust.cli.shared_options import MASKING, model_for, read_network, with_network


@dataclass(frozen=True, kw_only=True)
class LocateOptions(ModelOptions):
    """The options of the command."""

    paths: list[Path] = field(metadata=argument())
    """Images, and folders of images."""
    method: str = "best"
    """best, fast (at most three passes an image of one object), or a name of captum-robust
    methods."""
    network: Path | None = None
    target: str | None = None
    """The class to place, by name or number; else those that are seen."""
    threshold: float | None = None
    """The boxes hold parts above this share of the map's range. By default what places the boxes of
    the method best, as it ships, or else 0.2."""
    confidence: float = 0.2
    """The least probability of a class; the first is placed in any case."""
    rounds: int | None = field(default=None, metadata=option(min=1))
    """How often the image is looked at: what was found is painted over for the next look. By
    default up to 4, with fast 1."""
    batch_size: int = field(default=16, metadata=option(min=1))
    """Images that the classifier gets at once."""
    json: bool = field(default=False, metadata=option("--json"))
    """Print one JSON object a line for each image instead: its boxes (x0, y0, x1, y1) in pixels of
    the image, each with class and score."""
    coco: Path | None = None
    """Also write a COCO file of all images: boxes, scores, and masks as run-length codes. The
    category of a class has its number."""


@command_of(LocateOptions)
def locate(options: LocateOptions) -> None:
    """Place what a classifier sees in boxes, in photographs and folders of them."""
    from captum_robust.catalog.box_vote import VOTES
    from captum_robust.catalog.methods import METHODS, voting
    from captum_robust.data import DataError
    from captum_robust.data.image_lists import images_at
    from captum_robust.nn import load_masking_network
    from captum_robust.show.locate import USUAL, Locator
    from captum_robust.show.located_files import CocoFile, located_files

    files = images_at(options.paths, without=Path("captum-robust-locate"))
    if options.coco is not None:
        is_image = options.coco.resolve() in {file.resolve() for file in files.values()}
        check(not is_image, f"--coco: {options.coco} is one of the images; give another name")
    method: Any = known_name("method", options.method, [*USUAL, *METHODS])
    named = USUAL.get(method, method)
    votes = VOTES.get(named)
    file = read_network(options.network, [named if votes is None else MASKING])
    model = model_for(file, options)
    if file is not None and votes is not None:
        method = voting(model, votes, load_masking_network(file, model))
    elif file is not None:
        method = with_network(model, [named], file)[named]
    rounds = 1 if options.rounds is None and method == "fast" else options.rounds
    locator = Locator(
        model,
        method,
        threshold=options.threshold,
        confidence=options.confidence,
        rounds=rounds,
    )
    target = class_number(model, options.target, "target")
    names = list(model.class_names or ())
    coco, failed = CocoFile(names), 0
    shown = len(files) > 1 or None
    located = located_files(
        locator, files, target=target, batch_size=options.batch_size, progress=shown
    )
    for one in located:
        check(not one.error or len(files) > 1, one.error, DataError)
        failed += bool(one.error)
        objects = one.objects(names)
        if one.error:
            warn(one.error)
        elif options.json:
            height, width = one.size
            facts = {"image": str(one.file), "width": width, "height": height, "objects": objects}
            echo(json.dumps(facts))
        else:
            echo(printable(str(one.file)))
            for each in objects:
                box = ", ".join(f"{side:.0f}" for side in each["box"])
                echo(f"  {each['score']:6.1%}  {printable(each['name'])}  [{box}]")
        if options.coco is not None:
            coco.add(one)
    if options.coco is not None:
        coco.write(options.coco)
        echo(printable(f"-> {options.coco}"), err=options.json)
    if failed:
        echo(f"{amount(len(files), 'image')}: {failed} could not be used", err=options.json)
    if failed == len(files):
        raise typer.Exit(2)
