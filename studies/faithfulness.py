"""Do the methods rank pixels as the classifier uses them, and what does it cost to find out?

``python studies/faithfulness.py areas imagenet-val-400 out`` measures the areas under the curves of
deletion (lower is better) and insertion (higher is better) of EfficientNet-Lite0, and the
infidelity (lower is better), beside a random map and the centre box, with the difference of each
method to Grad-CAM on the same images. A run that was stopped goes on.

``... times imagenet-val-400`` times deletion beside Quantus' ``PixelFlipping``, if that is
installed, on the same images, maps and batches, 48 steps each. Quantus flattens the channels, and
no step of whole pixels divides 224×224 there: it flips 3,136 single values a step, as many passes.
Beside them deletion as ``compare --precision bfloat16`` runs it.

``... passes imagenet-val-400`` times what ``compare --faithfulness`` does with each image and map
beside as many bare passes of the classifier, in batches as there and in batches of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import harness
import torch
from torch import Tensor

from captum_robust._contexts import autocast
from captum_robust.benchmark import compare
from captum_robust.data import load_dataset
from captum_robust.metrics.functional import REMOVAL_STEPS, deletion_curve, removal_curves
from captum_robust.metrics.functional.faithfulness import images_at_once
from captum_robust.models import Classifier

AREAS = ("deletion", "insertion", "infidelity")
LISTED = (
    "grad_cam",
    "robust_cam",
    "saliency",
    "integrated_gradients",
    "occlusion",
    "perceptual_ball_cam",
    "real_time_masking",
    "random",
    "center_box",
)
BASELINE = "grad_cam"
STEPS = 48


def areas(
    data: Path,
    out: Path,
    *,
    methods: Annotated[tuple[str, ...], "names, separated by commas", harness.listed()] = LISTED,
    target: Annotated[str, "label or prediction"] = "label",
    limit: Annotated[int | None, "only the first so many images"] = None,
    precision: Annotated[str, "float32 or bfloat16"] = "float32",
) -> None:
    """Print the numbers of each method with their intervals."""
    result = compare(
        harness.classifier(),
        load_dataset("imagenet", data),
        methods,
        out=out,
        batch_size=harness.BATCH,
        target=target,
        limit=limit,
        faithfulness=True,
        precision=precision,
    )
    every = result.to_dataframe().set_index("image")
    columns = {
        method: {name: torch.tensor(rows[name].to_numpy(float)) for name in AREAS}
        for method, rows in every.groupby("method", sort=False)
    }
    print(f"{'':22s} {' '.join(f'{a:22s}' for a in AREAS)}; less {BASELINE}: {'; '.join(AREAS)}")
    for method in methods:
        own = columns[method]
        text = " ".join(f"{harness.mean(own[name]):22s}" for name in own)
        if method != BASELINE and BASELINE in columns:
            less = (harness.difference(own[name], columns[BASELINE][name]) for name in own)
            text += f"; {'; '.join(less)}"
        print(f"{method:22s} {text} n={len(own['deletion'])}")


def scores_in(model: Classifier, precision: str) -> Callable[[Tensor], Tensor]:
    """Return the classifier in a precision, as ``compare`` runs it."""

    def scores(x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(x.device, precision):
            own: Tensor = model(x)
        return own

    return scores


def times(data: Path, *, images: int = 8, rounds: int = 3) -> None:
    """Print seconds an image of each contender, and how many times longer Quantus takes."""
    model = harness.classifier()
    shown = harness.photographs(data, images, model.input_size)
    maps = harness.grad_cams(model, shown.images, shown.labels)
    work = (model, shown.images, maps, shown.labels)
    size: dict[str, Any] = {"steps": STEPS, "batch_size": images}
    contenders = {
        "deletion": lambda: deletion_curve(*work, **size).area,
        "deletion and insertion": lambda: removal_curves(*work, **size)[0].area,
        "deletion in bfloat16": lambda: (
            deletion_curve(scores_in(model, "bfloat16"), *work[1:], steps=STEPS).area
        ),
    }
    if harness.installed("quantus"):
        import quantus

        values = shown.images.numel() // images
        flipping = quantus.PixelFlipping(
            features_in_step=values // STEPS, perturb_baseline=0.5, disable_warnings=True
        )
        arrays = {
            "x_batch": shown.images.numpy(),
            "y_batch": shown.labels.numpy(),
            "a_batch": maps[:, None].numpy(),
        }
        contenders["PixelFlipping of Quantus"] = lambda: torch.tensor(
            flipping(model=model, softmax=True, batch_size=images, **arrays)
        ).mean(dim=1)
    laps = harness.race(contenders, rounds)
    for name, lap in laps.items():
        ratio = harness.ratio(lap.wall, laps["deletion"].wall)
        print(f"{name:26s} {lap.median / images:7.3f} s an image; times deletion: {ratio}")


def passes(
    data: Path,
    *,
    images: int = 4,
    rounds: int = 3,
    precision: Annotated[str, "float32 or bfloat16"] = "bfloat16",
) -> None:
    """Print passes a second of the metric and of the bare classifier, on the clock and the core."""
    model = harness.classifier().eval()
    shown = harness.photographs(data, images, model.input_size)
    maps = harness.grad_cams(model, shown.images, shown.labels)
    count = images * (2 * REMOVAL_STEPS + 1)
    stack = shown.images.repeat_interleave(2 * REMOVAL_STEPS + 1, dim=0)
    scores = scores_in(model, precision)

    def bare(size: int) -> Tensor:
        return torch.cat([scores(part) for part in stack.split(size)])

    at_once = images_at_once(stack, None)
    contenders = {
        "deletion and insertion": lambda: removal_curves(scores, shown.images, maps, shown.labels),
        f"bare, {at_once} at once": lambda: bare(at_once),
        "bare, 64 at once": lambda: bare(64),
    }
    laps = harness.race(contenders, rounds, warm_up=False)
    first = laps["deletion and insertion"]
    for name, lap in laps.items():
        core = count / min(lap.cpu)
        print(
            f"{name:24s} {count / lap.median:7.1f} passes a second, {core:7.1f} of a core's; "
            f"takes {harness.ratio(lap.cpu, first.cpu)} times the metric's time on the core"
        )


if __name__ == "__main__":
    harness.study(__doc__, areas, times, passes, packages=("quantus",))
