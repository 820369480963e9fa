"""How small a crop does the class survive, and does it hold the object?

    python benchmarks/saliency.py run DATA OUT [--limit N] [--methods a,b] [--targets label]
    python benchmarks/saliency.py regions DATA OUT [--limit N] [--methods a,b] [--targets label]
    python benchmarks/saliency.py table OUT [--protocol whi2020]

The table of Dabkowski & Gal (2017), section 5: the saliency metric and the localization error of
attribution methods beside a centre box of half the image, the whole image, and the annotated box.
EfficientNet-Lite0 with its published weights; DATA is an ImageNet validation folder (Kaggle's
layout); the true class is explained, and the predicted one. Both thresholds are chosen on one half
of the images and reported on the other, both ways. The localization error boxes the largest
component, the saliency metric all pixels above its threshold.

`run` keeps each method in a folder of its own under OUT, as a run of ``compare``; stopped at any
moment, the same command goes on. `regions` is how much of an image, its most salient pixels first,
keeps the class alone (everything else blurred), and how much must be blurred for the class to go.
`table` prints what is there: of methods that ran on fewer images the others' values on the same
images are not shown, so read n; differences to Grad-CAM are on the images of both.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from captum_robust.benchmark import Comparison, compare
from captum_robust.benchmark.comparison import TRUE_BOX
from captum_robust.benchmark.methods import METHODS
from captum_robust.data import LocalizationDataset, load_dataset, resize
from captum_robust.metrics.functional import (
    bootstrap_difference,
    bootstrap_interval,
    smallest_destroying_region,
    smallest_sufficient_region,
)
from captum_robust.models import Classifier, load_classifier

BATCH = 16
FIXED = ("center_box", "whole_image")
LISTED = (
    "grad_cam",
    "robust_cam",
    "integrated_gradients",
    "occlusion",
    "perceptual_ball",
    "perceptual_ball_cam",
    "iterative_mask",
    "real_time_masking",
    *FIXED,
)
TARGETS = ("label", "prediction")
BASELINE = "grad_cam"


def run(data: Path, out: Path, methods: list[str], targets: list[str], options: dict) -> None:
    """One folder a method and target."""
    model, dataset = load_classifier("efficientnet_lite0"), load_dataset("imagenet", data)
    for method in methods:
        for target in targets:
            print(f"{method}, {target}", file=sys.stderr, flush=True)
            compare(
                model,
                dataset,
                [method],
                out=out / target / method,
                target=target,
                batch_size=BATCH,
                saliency_metric=True,
                **options,
            )


def regions(
    data: Path, out: Path, methods: list[str], targets: list[str], limit: int | None
) -> None:
    """A file a method and target."""
    model, dataset = load_classifier("efficientnet_lite0"), load_dataset("imagenet", data)
    count = min(limit or len(dataset), len(dataset))
    for method in methods:
        for target in targets:
            file = out / target / f"{method}, regions.safetensors"
            if file.exists() and len(load_file(file)["sufficient"]) >= count:
                continue
            print(f"{method}, {target}: regions", file=sys.stderr, flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(regions_of(model, dataset, method, target, count), file)


def regions_of(
    model: Classifier, dataset: LocalizationDataset, method: str, target: str, count: int
) -> dict[str, Tensor]:
    """Shares of the images, NaN where no share is enough."""
    built = METHODS[method](model)
    found: dict[str, list[Tensor]] = {"sufficient": [], "destroying": []}
    for start in range(0, count, BATCH):
        samples = [
            resize(dataset[i], model.input_size) for i in range(start, min(start + BATCH, count))
        ]
        images = torch.stack([s.image for s in samples])
        with torch.no_grad():
            classes = model(images).argmax(dim=1)
        if target == "label":
            classes = torch.tensor([s.label for s in samples])
        maps = built.explain(images, classes).maps.detach()
        found["sufficient"].append(smallest_sufficient_region(model, images, maps, classes))
        found["destroying"].append(smallest_destroying_region(model, images, maps, classes))
    return {name: torch.cat(parts) for name, parts in found.items()}


def print_table(out: Path, protocol: str) -> None:
    """Everything that has run."""
    for target in TARGETS:
        runs = {m: out / target / m for m in LISTED}
        there = {m: Comparison(folder) for m, folder in runs.items() if folder.is_dir()}
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
        print_regions(out / target)
        print()


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
    files = {m: folder / f"{m}, regions.safetensors" for m in LISTED}
    files = {m: file for m, file in files.items() if file.exists()}
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
    parser.add_argument("--targets", default=",".join(TARGETS), help="label, prediction")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--precision", default="float32", help="float32 or bfloat16")
    parser.add_argument("--protocol", default="fong2017", help="which boxes are correct")
    arguments = parser.parse_args()
    if len(arguments.paths) != (1 if arguments.stage == "table" else 2):
        parser.error(
            f"{arguments.stage}: expected {'OUT' if arguments.stage == 'table' else 'DATA OUT'}"
        )
    data, out = arguments.paths[0], arguments.paths[-1]
    methods, targets = arguments.methods.split(","), arguments.targets.split(",")
    if arguments.stage == "run":
        options = {"limit": arguments.limit, "precision": arguments.precision}
        run(data, out, methods, targets, options)
    elif arguments.stage == "regions":
        regions(data, out, methods, targets, arguments.limit)
    else:
        print_table(out, arguments.protocol)


if __name__ == "__main__":
    main()
