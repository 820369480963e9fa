"""How small a crop does the class survive, and does it hold the object?

    python studies/saliency.py run DATA OUT [--limit N] [--methods a,b] [--targets label]
    python studies/saliency.py regions DATA OUT [--limit N] [--methods a,b] [--targets label]
    python studies/saliency.py table OUT [--protocol whi2020]

The table of Dabkowski & Gal (2017), section 5: the saliency metric and the localization error of
attribution methods beside a centre box of half the image, the whole image, and the annotated box.
EfficientNet-Lite0 with its published weights; DATA is an ImageNet validation folder (Kaggle's
layout); the true class is explained, and the predicted one. Both thresholds are chosen on one half
of the images and reported on the other, both ways. The localization error boxes the largest
component, the saliency metric all pixels above its threshold.

`run` keeps each method in a folder of its own under OUT, as a run of ``compare``; stopped at any
moment, the same command goes on (with another --limit, give another OUT). `regions` is how much of
an image, its most salient pixels first, keeps the class alone (everything else blurred), and how
much must be blurred for the class to go. Files given by --networks (of ``captum-robust train
masking``) are methods by the name of the file. `table` prints what is there: methods that ran on
fewer images stand beside others, so read n; differences to Grad-CAM are on the images of both.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import harness
import numpy as np
import torch
from harness import difference, interval, mean
from safetensors.torch import load_file
from torch import Tensor

from captum_robust.attr import RealTimeMasking
from captum_robust.benchmark import Comparison, compare
from captum_robust.catalog.methods import build_methods
from captum_robust.data import load_dataset
from captum_robust.metrics.functional import (
    bootstrap_interval,
    smallest_destroying_region,
    smallest_sufficient_region,
)
from captum_robust.metrics.functional.saliency import SALIENCY_THRESHOLDS, saliency_of
from captum_robust.models import Classifier, load_classifier
from captum_robust.report.scoring import TRUE_BOX
from captum_robust.runs.store import unpack

LISTED = (
    "grad_cam",
    "robust_cam",
    "integrated_gradients",
    "occlusion",
    "perceptual_ball",
    "perceptual_ball_cam",
    "iterative_mask",
    "real_time_masking",
    "center_box",
    "whole_image",
)
TARGETS = ("label", "prediction")
BASELINE = "grad_cam"
REGIONS = ", regions.safetensors"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is explained, how, and for which class."""

    methods: Annotated[tuple[str, ...], "names, separated by commas", harness.listed()] = LISTED
    networks: Annotated[tuple[Path, ...], "masking networks"] = ()
    device: str = "cpu"
    targets: Annotated[tuple[str, ...], "label, prediction", harness.listed(TARGETS)] = TARGETS
    limit: Annotated[int | None, "only the first so many images"] = None
    model: str = "efficientnet_lite0"

    def load(self) -> tuple[Classifier, dict[str, Any]]:
        """Return the classifier, and what ``compare`` takes by the name of the method."""
        model = load_classifier(self.model).to(self.device)
        methods: dict[str, Any] = {name: name for name in self.methods}
        for file in self.networks:
            methods[file.stem] = RealTimeMasking(harness.masking_network(file, model))
        return model, methods


def run(
    data: Path,
    out: Path,
    options: Options,
    *,
    precision: Annotated[str, "float32 or bfloat16"] = "float32",
) -> None:
    """Compare the methods, in one folder a method and target."""
    model, methods = options.load()
    dataset = load_dataset("imagenet", data)
    for name, method in methods.items():
        for target in options.targets:
            print(f"{name}, {target}", file=sys.stderr, flush=True)
            compare(
                model,
                dataset,
                {name: method},
                out=out / target / name,
                target=target,
                batch_size=harness.BATCH,
                saliency_metric=True,
                limit=options.limit,
                precision=precision,
            )


def regions(data: Path, out: Path, options: Options) -> None:
    """Find the smallest regions that keep the class, and that take it; one file a method."""
    model, methods = options.load()
    shown = harness.photographs(data, options.limit, model.input_size)
    for name, method in methods.items():
        (built,) = build_methods(model, {name: method}).values()
        for target in options.targets:
            harness.kept(
                out / target / f"{name}{REGIONS}",
                lambda built=built, target=target: regions_of(model, shown, built, target),
                len(shown),
                of="sufficient",
            )


def regions_of(
    model: Classifier, shown: harness.Photographs, method: Any, target: str
) -> dict[str, Tensor]:
    """Return shares of the images, NaN where no share is enough."""
    device = next(model.parameters()).device

    def regions(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        classes = labels if target == "label" else harness.predicted(model, images)
        maps = method.explain(images, classes).maps.detach()
        return {
            "sufficient": smallest_sufficient_region(model, images, maps, classes).cpu(),
            "destroying": smallest_destroying_region(model, images, maps, classes).cpu(),
        }

    batches = harness.parts(shown.images.to(device), shown.labels.to(device))
    return harness.gathered(regions(*batch) for batch in batches)


def table(out: Path, *, protocol: Annotated[str, "which boxes are correct"] = "fong2017") -> None:
    """Print everything that has run."""
    for target in TARGETS:
        folders = [folder.parent for folder in (out / target).glob("*/run.json")]
        names = sorted((f.name for f in folders), key=in_order)
        there = {m: Comparison(out / target / m) for m in names}
        if not there:
            continue
        print(f"{target} explained; mean [95 % interval]; error by {protocol}")
        print(
            f"{'':22s} {'n':>4s} {'saliency metric':24s} {'area':>6s} {'p':>6s} {'error':22s} "
            "thresholds of the metric; of the error"
        )
        frames = {m: c.to_dataframe(protocol=protocol).set_index("image") for m, c in there.items()}
        for method, comparison in there.items():
            print(line(method, comparison, protocol))
        # The annotated boxes are the same in every run: those of the one with most images.
        print(line(TRUE_BOX, max(there.values(), key=len), protocol))
        if BASELINE in frames:
            print(f"less {BASELINE} on the same images: saliency metric; error")
            for method in there:
                if method != BASELINE:
                    print(f"{method:22s} {differences(frames[method], frames[BASELINE])}")
        print("saliency metric at half of the map's maximum, nothing chosen")
        for method, comparison in there.items():
            if len(found := at_half(comparison, method)):
                print(f"{method:22s} {mean(found)} n={len(found)}")
        print_regions(out / target)
        print()


def at_half(comparison: Comparison, method: str) -> Tensor:
    """Return the saliency metric of each image at the threshold .5 of the largest value."""
    column = SALIENCY_THRESHOLDS["value"].index(0.5)
    rows = comparison.select(
        "SELECT crops FROM results WHERE method = ? AND attack = 'clean' AND crops IS NOT NULL "
        "ORDER BY position",
        (method,),
    )
    crops = [unpack(row["crops"]).reshape(2, -1) for row in rows]
    packed = [c[:, column if c.shape[1] > 1 else 0] for c in crops]  # a box has one only
    found = torch.from_numpy(np.stack(packed)) if packed else torch.empty(0, 2)
    return saliency_of(found[:, 0], found[:, 1]).double()


def in_order(method: str) -> tuple[int, str]:
    """Return the place of a method as they are listed, networks of the user's after their like."""
    place = LISTED.index(method if method in LISTED else "real_time_masking")
    return place, method


def line(method: str, comparison: Comparison, protocol: str) -> str:
    """Return one row of the table; the annotated box misses nothing by definition."""
    row = comparison.saliency_table().set_index("method").loc[method]
    metric = f"{row['saliency']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    error, chosen = "0", "-"
    if method != TRUE_BOX:
        of = comparison.table(protocol=protocol).set_index("method").loc[method]
        error = f"{of['error']:.4f} [{of['error_low']:.3f}, {of['error_high']:.3f}]"
        chosen = of["threshold"]
    return (
        f"{method:22s} {row['n']:4d} {metric:24s} {row['area']:6.3f} {row['probability']:6.3f} "
        f"{error:22s} {row['threshold']}; {chosen}"
    )


def differences(ours, theirs) -> str:
    """Return the paired differences of the metric and of the error."""
    both = ours.merge(theirs, left_index=True, right_index=True, suffixes=("", "_theirs"))
    columns = []
    for column in ("saliency", "localized"):
        known = both[[column, f"{column}_theirs"]].dropna()
        mine, other = (torch.tensor(known[c].to_numpy(float)) for c in known)
        if column == "localized":
            mine, other = 1 - mine, 1 - other
        columns.append(f"{difference(mine, other)} (n={len(mine)})")
    return "; ".join(columns)


def print_regions(folder: Path) -> None:
    """Print mean shares; an image that no share is enough for counts as the whole of it."""
    names = [file.name.removesuffix(REGIONS) for file in folder.glob(f"*{REGIONS}")]
    if names:
        print("smallest sufficient region; smallest destroying region (of those with one)")
    for method in sorted(names, key=in_order):
        held = load_file(folder / f"{method}{REGIONS}")
        enough = bootstrap_interval(held["sufficient"].nan_to_num(1.0))
        gone = bootstrap_interval(held["destroying"])
        print(f"{method:22s} {interval(enough)} n={enough.n}; {interval(gone)} n={gone.n}")


if __name__ == "__main__":
    harness.study(__doc__, run, regions, table)
