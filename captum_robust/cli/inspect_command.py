"""The command ``captum-robust inspect``: parsing and printing only."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captum_robust._checks import check, printable
from captum_robust._plurals import amount
from captum_robust._progress import stage
from captum_robust.cli.model_options import ModelOptions, load_model
from captum_robust.cli.options import argument, command_of, option
from captum_robust.cli.printing import echo, print_json, warn
from captum_robust.cli.shared_options import attacks_of, listed

_SAID_FAILURES = 5


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions):
    """The options of the command."""

    model: str = field(metadata=argument())
    images: Path
    """Folder of images, of any number; sub-folders may be classes. It may have boxes.csv or
    masks/, see --concepts objects."""
    out: Path = Path("captum-robust-inspect")
    """Folder for the page, index.html. Until that is written, the state is in unfinished/, from
    which the same command goes on after a stop."""
    layers: str | None = None
    """Dotted names of layers that give maps, separated by commas; else the last of each scale."""
    concepts: str | None = None
    """Beside colours and textures: the JSON file of COCO's instances or panoptic segmentation; the
    folder of Pascal VOC, ADE20K or Broden; a folder with a sub-folder of masks for each concept,
    one file an image with the image's name; or objects, the masks or boxes of --images by their
    classes."""
    units: int = field(default=48, metadata=option(min=1))
    """How many units of each layer are looked at, evenly spread."""
    top: int = field(default=9, metadata=option(min=1))
    """Patches of each unit."""
    points: int = field(default=400, metadata=option(min=1))
    """How many images are compared and embedded, evenly spread."""
    attack: str | None = None
    """The name of an attack, such as pgd: eight images are attacked, and their neighbours and
    points shown."""
    epsilon: str | None = None
    """Its strength in levels of an 8-bit image; 8 by default."""
    batch_size: int = field(default=16, metadata=option(min=1))
    """Images that the classifier gets at once."""
    json: bool = field(default=False, metadata=option("--json"))
    """Print one JSON object instead: the page, and each layer with its dead units."""


@command_of(InspectOptions)
def inspect(options: InspectOptions) -> None:
    """Show what a classifier has learned, layer by layer, as one page: a tour from the pixels on.

    First filters, the patches that units answer to most, activations of a photograph, colours and
    concepts that units stand for, nearest neighbours and embeddings, from one pass over the images.
    """
    from captum_robust._files import check_folder
    from captum_robust.catalog.attacks import COMPARED_EPSILONS, AttackOptions
    from captum_robust.data.files import existing
    from captum_robust.draw import blank_figure
    from captum_robust.inspection import tour
    from captum_robust.inspection.neighbours import check_scikit_learn
    from captum_robust.report.inspection_page import write_tour

    check_folder(options.out)
    existing(options.images, "folder", "a folder of images")
    blank_figure()  # before the pass, where matplotlib is missing
    check_scikit_learn()
    layers: Any = listed(options.layers)
    state = options.out / "unfinished"
    model = load_model(options)
    attacks = attacks_of(model, options.attack, options.epsilon, COMPARED_EPSILONS, AttackOptions())
    check(len(attacks) < 2, "attack: expected one attack of one strength")
    found = tour(
        model,
        options.images,
        layers,
        concepts=options.concepts,
        units=options.units,
        top=options.top,
        points=options.points,
        batch_size=options.batch_size,
        attack=next(iter(attacks.values()), None),
        folder=state,
        progress=True,
    )
    with stage("writing the page"):
        page = write_tour(found, options.out / "index.html")
    shutil.rmtree(state, ignore_errors=True)
    if options.json:
        each = [{"name": s.name, "dead_units": s.patches.dead} for s in found.stops]
        print_json({"page": page, "images": found.images, "layers": each})
    else:
        for stop in found.stops:
            echo(
                f"{stop.patches.field or stop.name}; {amount(len(stop.patches.dead), 'dead unit')}"
            )
        echo(printable(f"{amount(found.images, 'image')} -> {page}"))
    for why in list(found.unusable.values())[:_SAID_FAILURES]:
        warn(why)
    if found.unusable:
        echo(f"{amount(len(found.unusable), 'image')} could not be used", err=True)
