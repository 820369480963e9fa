"""Do the methods rank pixels as the classifier uses them, and what does it cost to find out?

``python studies/faithfulness.py areas imagenet-val-400 out`` measures the areas under the curves of
deletion (lower is better) and insertion (higher is better) of EfficientNet-Lite0, beside a random
map and the centre box, with the difference of each method to Grad-CAM on the same images. A run
that was stopped goes on.

``... times imagenet-val-400`` times deletion beside Quantus' ``PixelFlipping``, if that is
installed, on the same images, maps and batches, 48 steps each. Quantus flattens the channels, and
no step of whole pixels divides 224×224 there: it flips 3,136 single values a step, as many passes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import harness
import torch

from captum_robust.benchmark import compare
from captum_robust.data import load_dataset
from captum_robust.metrics.functional import deletion_curve, removal_curves

AREAS = ("deletion", "insertion")
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
) -> None:
    """Print both areas of each method with their intervals."""
    result = compare(
        harness.classifier(),
        load_dataset("imagenet", data),
        methods,
        out=out,
        batch_size=harness.BATCH,
        target=target,
        limit=limit,
        faithfulness=True,
    )
    every = result.to_dataframe().set_index("image")
    columns = {
        method: {name: torch.tensor(rows[name].to_numpy(float)) for name in AREAS}
        for method, rows in every.groupby("method", sort=False)
    }
    print(f"{'':22s} {'deletion':22s} {'insertion':22s}; less {BASELINE}: deletion; insertion")
    for method in methods:
        own = columns[method]
        text = " ".join(f"{harness.mean(own[name]):22s}" for name in own)
        if method != BASELINE and BASELINE in columns:
            less = (harness.difference(own[name], columns[BASELINE][name]) for name in own)
            text += f"; {'; '.join(less)}"
        print(f"{method:22s} {text} n={len(own['deletion'])}")


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


if __name__ == "__main__":
    harness.study(__doc__, areas, times, packages=("quantus",))
