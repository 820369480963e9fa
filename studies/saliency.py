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

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from captum_robust.attr import RealTimeMasking
from captum_robust.benchmark import Comparison, compare
from captum_robust.catalog.methods import build_methods
from captum_robust.data import LocalizationDataset, load_dataset, resize
from captum_robust.metrics.functional import (
    bootstrap_difference,
    bootstrap_interval,
    smallest_destroying_region,
    smallest_sufficient_region,
)
from captum_robust.metrics.functional.saliency import SALIENCY_THRESHOLDS, saliency_of
from captum_robust.models import Classifier, load_classifier
from captum_robust.nn import load_masking_network
from captum_robust.report.scoring import TRUE_BOX
from captum_robust.runs.store import unpack

BATCH = 16
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


def run(
    model: Classifier,
    dataset: LocalizationDataset,
    out: Path,
    methods: dict[str, Any],
    targets: list[str],
    options: dict[str, Any],
) -> None:
    """One folder a method and target."""
    for name, method in methods.items():
        for target in targets:
            print(f"{name}, {target}", file=sys.stderr, flush=True)
            compare(
                model,
                dataset,
                {name: method},
                out=out / target / name,
                target=target,
                batch_size=BATCH,
                saliency_metric=True,
                **options,
            )


def regions(
    model: Classifier,
    dataset: LocalizationDataset,
    out: Path,
    methods: dict[str, Any],
    targets: list[str],
    limit: int | None,
) -> None:
    """A file a method and target."""
    count = min(limit or len(dataset), len(dataset))
    for name, method in methods.items():
        for target in targets:
            file = out / target / f"{name}, regions.safetensors"
            if file.exists() and len(load_file(file)["sufficient"]) >= count:
                continue
            print(f"{name}, {target}: regions", file=sys.stderr, flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            found = regions_of(model, dataset, {name: method}, target, count)
            save_file(found, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)


def regions_of(
    model: Classifier,
    dataset: LocalizationDataset,
    method: dict[str, Any],
    target: str,
    count: int,
) -> dict[str, Tensor]:
    """Shares of the images, NaN where no share is enough."""
    (built,) = build_methods(model, method).values()
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {"sufficient": [], "destroying": []}
    for start in range(0, count, BATCH):
        samples = [
            resize(dataset[i], model.input_size) for i in range(start, min(start + BATCH, count))
        ]
        images = torch.stack([s.image for s in samples]).to(device)
        with torch.no_grad():
            classes = model(images).argmax(dim=1)
        if target == "label":
            classes = torch.tensor([s.label for s in samples], device=device)
        maps = built.explain(images, classes).maps.detach()
        sufficient = smallest_sufficient_region(model, images, maps, classes)
        destroying = smallest_destroying_region(model, images, maps, classes)
        found["sufficient"].append(sufficient.cpu())
        found["destroying"].append(destroying.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def print_table(out: Path, protocol: str) -> None:
    """Everything that has run."""
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
        longest = max(there.values(), key=len)
        print(line(TRUE_BOX, longest, protocol))
        if BASELINE in frames:
            print(f"less {BASELINE} on the same images: saliency metric; error")
            for method in there:
                if method != BASELINE:
                    print(f"{method:22s} {differences(frames[method], frames[BASELINE])}")
        print("saliency metric at half of the map's maximum, nothing chosen")
        for method, comparison in there.items():
            if len(found := at_half(comparison, method)):
                of = bootstrap_interval(found)
                print(f"{method:22s} {of.mean:.3f} [{of.low:.3f}, {of.high:.3f}] n={of.n}")
        print_regions(out / target)
        print()


def at_half(comparison: Comparison, method: str) -> Tensor:
    """The saliency metric of each image at the threshold .5 of the largest value."""
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
    """As they are listed, networks of the user's after their like."""
    place = LISTED.index(method if method in LISTED else "real_time_masking")
    return place, method


def line(method: str, comparison: Comparison, protocol: str) -> str:
    """One row of the table; the annotated box misses nothing by definition."""
    row = comparison.saliency_table().set_index("method").loc[method]
    interval = f"{row['saliency']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    error, chosen = "0", "-"
    if method != TRUE_BOX:
        of = comparison.table(protocol=protocol).set_index("method").loc[method]
        error = f"{of['error']:.4f} [{of['error_low']:.3f}, {of['error_high']:.3f}]"
        chosen = of["threshold"]
    return (
        f"{method:22s} {row['n']:4d} {interval:24s} {row['area']:6.3f} {row['probability']:6.3f} "
        f"{error:22s} {row['threshold']}; {chosen}"
    )


def differences(ours, theirs) -> str:
    """Of the metric and of the error, paired."""
    both = ours.merge(theirs, left_index=True, right_index=True, suffixes=("", "_theirs"))
    parts = []
    for column in ("saliency", "localized"):
        known = both[[column, f"{column}_theirs"]].dropna()
        mine, other = (torch.tensor(known[c].to_numpy(float)) for c in known)
        if column == "localized":
            mine, other = 1 - mine, 1 - other
        found = bootstrap_difference(mine, other)
        parts.append(f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}] (n={found.n})")
    return "; ".join(parts)


def print_regions(folder: Path) -> None:
    """Mean shares; an image that no share is enough for counts as the whole of it."""
    ending = ", regions.safetensors"
    names = [file.name.removesuffix(ending) for file in folder.glob(f"*{ending}")]
    files = {m: folder / f"{m}{ending}" for m in sorted(names, key=in_order)}
    if not files:
        return
    print("smallest sufficient region; smallest destroying region (of images it can be destroyed)")
    for method, file in files.items():
        held = load_file(file)
        enough = bootstrap_interval(held["sufficient"].nan_to_num(1.0))
        gone = bootstrap_interval(held["destroying"])
        print(
            f"{method:22s} {enough.mean:.3f} [{enough.low:.3f}, {enough.high:.3f}] n={enough.n}; "
            f"{gone.mean:.3f} [{gone.low:.3f}, {gone.high:.3f}] n={gone.n}"
        )


def main() -> None:
    """One stage."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["run", "regions", "table"])
    parser.add_argument("paths", nargs="+", type=Path, help="DATA OUT, or OUT")
    parser.add_argument("--methods", default=",".join(LISTED), help="names, separated by commas")
    parser.add_argument("--networks", type=Path, nargs="*", default=[], help="masking networks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--targets", default=",".join(TARGETS), help="label, prediction")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--precision", default="float32", help="float32 or bfloat16")
    parser.add_argument("--protocol", default="fong2017", help="which boxes are correct")
    arguments = parser.parse_args()
    if len(arguments.paths) != (1 if arguments.stage == "table" else 2):
        parser.error(
            f"{arguments.stage}: expected {'OUT' if arguments.stage == 'table' else 'DATA OUT'}"
        )
    out = arguments.paths[-1]
    if arguments.stage == "table":
        print_table(out, arguments.protocol)
        return
    model = load_classifier("efficientnet_lite0").to(arguments.device)
    dataset = load_dataset("imagenet", arguments.paths[0])
    methods: dict[str, Any] = {name: name for name in arguments.methods.split(",") if name}
    for file in arguments.networks:
        methods[file.stem] = RealTimeMasking(load_masking_network(file, model))
    targets = arguments.targets.split(",")
    if arguments.stage == "run":
        options = {"limit": arguments.limit, "precision": arguments.precision}
        run(model, dataset, out, methods, targets, options)
    else:
        regions(model, dataset, out, methods, targets, arguments.limit)


if __name__ == "__main__":
    main()
