"""The command ``captum-robust explain``: parsing and printing only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from captum_robust._checks import check_number, printable
from captum_robust._plurals import amount
from captum_robust.cli.model_options import ModelOptions, class_number
from captum_robust.cli.options import (
    CERTIFIED_RADII,
    CERTIFY_SAMPLES,
    argument,
    command_of,
    option,
)
from captum_robust.cli.printing import echo, warn
from captum_robust.cli.shared_options import (
    certification_of,
    method_names,
    model_for,
    read_network,
    with_network,
)

if TYPE_CHECKING:
    from captum_robust.show.explain import ExplainedImage


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(ModelOptions):
    """The options of the command."""

    paths: list[Path] = field(metadata=argument())
    """Images, and folders of images."""
    out: Path = Path("captum-robust-explain")
    """Folder for the pictures."""
    methods: str | None = None
    """Names, separated by commas; see captum-robust methods. robust_cam by default, or, with
    --counterfactual, perceptual_ball."""
    network: Path | None = None
    target: str | None = None
    """The class to explain, by name or number; else the prediction."""
    counterfactual: str | None = None
    """What would make it this class, by name or number? For methods that perturb the image, such
    as perceptual_ball."""
    top: int = field(default=5, metadata=option(min=1))
    """How many classes to print."""
    threshold: float | None = None
    """The box holds the largest part above this share of the map's range. By default what places
    the boxes of the method best, as it ships, or else 0.2."""
    certify: float | None = None
    """Also show what of each map and box no attacker can move, by copies with noise of this
    standard deviation, such as 0.25 for pixels in [0, 1]: as many times the method's own passes as
    there are samples."""
    certify_samples: int = field(default=CERTIFY_SAMPLES, metadata=option(min=1))
    certify_radii: str = CERTIFIED_RADII
    certify_denoiser: bool = field(default=False, metadata=option("--certify-denoiser"))
    save_maps: bool = field(default=False, metadata=option("--save-maps"))
    """Also write each map as NAME.METHOD.npy beside the picture: float32, h×w as the method gives
    it. With --certify also NAME.METHOD.certified.npy, of each radius: 1 in, 0 out, .5 abstains."""
    json: bool = field(default=False, metadata=option("--json"))
    """Print one JSON object a line for each image instead: its classes with probabilities and
    scores, the box of each method in pixels of the image, and what is certified of it."""


@command_of(ExplainOptions, resumes=True)
def explain(options: ExplainOptions) -> None:
    """Draw where the classifier looks: one PNG an image, the top classes in the terminal.

    Started again with the same arguments, a stopped run goes on: what was written with the same
    settings, of an image that is the same, is not made again.
    """
    from captum_robust._files import remove_parts
    from captum_robust._progress import counted
    from captum_robust.catalog.description import describe_run
    from captum_robust.catalog.methods import build_methods
    from captum_robust.data import DataError
    from captum_robust.show.explain import explain_image, explained_before, pictures_of

    if options.threshold is not None:
        check_number("threshold", options.threshold, 0, 1)
    certification = certification_of(
        options.certify, options.certify_samples, options.certify_radii, options.certify_denoiser
    )
    usual = "robust_cam" if options.counterfactual is None else "perceptual_ball"
    named = method_names(usual if options.methods is None else options.methods)
    file = read_network(options.network, named)
    pictures = pictures_of(options.paths, options.out)
    classifier = model_for(file, options)
    given = with_network(classifier, named, file)
    chosen = build_methods(classifier, given)
    target = class_number(classifier, options.target, "target")
    towards = class_number(classifier, options.counterfactual, "counterfactual")
    how: dict[str, Any] = {"target": target, "counterfactual": towards}
    how |= {"threshold": options.threshold, "top": options.top}
    kept = {name: str(method.threshold) for name, method in chosen.items()}
    depends = how | {"kept": kept}
    if certification is not None:
        depends["certificates"] = certification.facts()
    methods = given if isinstance(given, dict) else {name: name for name in given}
    settings = json.dumps(describe_run(classifier, (), 0, methods, {}, depends))
    for folder in {picture.parent for picture, _ in pictures}:
        remove_parts(folder, shared=True)
    failed = 0
    for picture, image in counted(pictures, "image", len(pictures) > 1 or None, "explain"):
        try:
            explained = explained_before(image, picture, settings, with_maps=options.save_maps)
            if explained is None:
                how |= {"certification": certification, "show_progress": len(pictures) == 1}
                explained = explain_image(
                    classifier, image, chosen, picture, settings=settings, **how
                )
        except DataError as error:
            if len(pictures) == 1:
                raise
            failed += 1
            warn(str(error))
        else:
            _say_explained(image, explained, options)
    if failed:
        echo(f"{amount(len(pictures), 'image')}: {failed} could not be used", err=options.json)
    if failed == len(pictures):
        raise typer.Exit(2)


def _say_explained(file: Path, explained: ExplainedImage, options: ExplainOptions) -> None:
    """Print what was drawn of an image file, its classes, and what methods made of it."""
    maps = explained.save_maps() if options.save_maps else {}
    if options.json:
        written = {"maps": {method: str(path) for method, path in maps.items()}} if maps else {}
        echo(json.dumps({"image": str(file), **explained.facts(), **written}))
        return
    echo(printable(f"{file} -> {explained.picture}"))
    for label, probability in explained.classes:
        echo(f"  {probability:6.1%}  {printable(label)}")
    for method, verdict in explained.verdicts.items():
        echo(f"  {method}: {printable(verdict)}")
    for method, proof in explained.certificates.items():
        for one in proof["radii"]:
            few = proof["samples"] < one["least_samples"] and one["certified_share"] == 0
            lacking = f"; it takes at least {amount(one['least_samples'], 'sample')}" if few else ""
            echo(f"  {method} within {one['radius']:g}: {_said_of(one)}{lacking}")
    for path in maps.values():
        echo(printable(f"  map: {path}"))


def _said_of(proven: Mapping[str, Any]) -> str:
    """What is proven within a radius, in words; boxes in whole pixels of the image."""
    boxes = [proven["inner_box"], proven["outer_box"]]
    inner, outer = (box and ", ".join(f"{side:.0f}" for side in box) for box in boxes)
    box = "no box is proven"
    if inner and outer:
        box = f"the box between [{inner}] and [{outer}]"
    elif outer:
        box = f"the box within [{outer}]"
    return f"{proven['certified_share']:.0%} of the pixels are certified; {box}"
