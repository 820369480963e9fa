"""How far do maps move under ExplanationAttack while the label stays?

    python studies/explanation_attack.py --data IMAGENET [--images 32] [--region]

EfficientNet-Lite0 with its published weights, the first images of an ImageNet validation folder
(Kaggle's layout) that it classifies correctly, objective "top_k" with 10 % of the map, for the
labelled class. With `--region` the mass moves out of the annotated boxes instead of off the top
positions.

- Grad-CAM (Captum's) and RobustCAM (k=5), both at the network's own activations (`beta=None`): its
  head is linear, so that no second derivative is needed.
- Integrated gradients, 10 points of the path; the steps are made on 3 points with smooth
  activations (`surrogate_arguments`), judged are the 10. Its second derivatives are slow: it gets
  a share of the images and half of the steps.
- The perceptual ball (8 iterations, blurred by 8 px). No gradient flows through its optimiser, so
  Grad-CAM's map is moved in its stead, and three iterates are judged by the ball itself.

Beside each the same images with random signs times the same epsilon. Top-k intersection, Spearman's
correlation and centre shift compare the map with the clean one, at the size of the image; the box
is that of the largest component above .2 of the map's range (of integrated gradients after a blur
of 8 px), its error the share of boxes with an overlap of at most .5 with every annotated box. Means
and 95 % bootstrap intervals.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import harness
import torch
from captum.attr import IntegratedGradients, LayerGradCam
from torch import Tensor

from captum_robust import PerceptualBallPerturbation, RobustCAM
from captum_robust.attacks import ExplanationAttack
from captum_robust.attr import BallSettings
from captum_robust.draw import (
    PREDICTED_COLOR,
    RGB,
    draw_boxes,
    overlay,
    panel,
    save_png,
)
from captum_robust.metrics.functional import (
    best_iou,
    box_iou,
    boxes_to_mask,
    largest_component,
    mask_to_box,
    spearman_correlation,
    threshold,
    top_k_intersection,
)
from captum_robust.models import Classifier, load_classifier

SHARE = 0.1
BLUR = 8.0
BOX_THRESHOLD = 0.2
MapsOf = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Method:
    """How a map is computed, and attacked."""

    maps: MapsOf
    """Images and classes -> maps N×224×224 to compare."""
    attack: ExplanationAttack
    images: int
    box_maps: MapsOf | None = None
    """Those that boxes are made of, where they differ."""
    batch: int = 8


def methods_of(model: Classifier, epsilon: float, steps: int, n: int) -> dict[str, Method]:
    """Return what is attacked, by name."""
    size = model.input_size
    cam, robust = LayerGradCam(model, model.cam_layer), RobustCAM(model, model.cam_layer)
    path = IntegratedGradients(model)
    ball = PerceptualBallPerturbation(
        model, model.perceptual_layers, settings=BallSettings(max_iterations=8)
    )

    def pixels(x: Tensor, y: Tensor) -> Tensor:
        return path.attribute(x, target=y, n_steps=10).detach()

    def of_ball(x: Tensor, target: Tensor) -> Tensor:
        return ball.saliency(ball.attribute(x.detach(), target), BLUR)

    return {
        "grad_cam": Method(
            lambda x, y: harness.grad_cams(model, x, y),
            ExplanationAttack(cam, epsilon, steps, k=SHARE, beta=None),
            n,
        ),
        "robust_cam": Method(
            lambda x, y: harness.enlarged(robust.attribute(x, y, k=5).clamp(min=0), size),
            ExplanationAttack(robust, epsilon, steps, k=SHARE, beta=None),
            n,
        ),
        "perceptual_ball": Method(
            of_ball,
            ExplanationAttack(
                of_ball,
                epsilon,
                steps,
                k=SHARE,
                forward_func=model,
                surrogate=cam,
                beta=None,
                judge_every=max(1, steps // 2),
            ),
            n,
        ),
        "integrated_gradients": Method(
            lambda x, y: pixels(x, y).abs().sum(dim=1),
            ExplanationAttack(
                path,
                epsilon,
                max(1, steps // 2),
                epsilon / 5,
                k=SHARE,
                surrogate=path,
                attribution_arguments={"n_steps": 10},
                surrogate_arguments={"n_steps": 3},
                judge_every=max(1, steps // 4),
            ),
            max(1, n // 4),
            lambda x, y: ball.saliency(pixels(x, y), BLUR),
            batch=2,
        ),
    }


def center(maps: Tensor) -> Tensor:
    """Return N×2, the centres of mass in pixels; the middle for a map of zeros."""
    maps = maps.double() + 1e-30
    total = maps.sum(dim=(1, 2))
    y, x = (torch.arange(s, dtype=torch.float64) for s in maps.shape[1:])
    along = ((maps.sum(dim=2) * y).sum(dim=1), (maps.sum(dim=1) * x).sum(dim=1))
    return torch.stack(along, dim=1) / total[:, None]


def box_of(maps: Tensor) -> Tensor:
    """Return N×4, the box of the largest component above the threshold."""
    return mask_to_box(largest_component(threshold(maps, "value", BOX_THRESHOLD)))


def compared(
    method: Method,
    clean: tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    kept: Tensor,
    truth: list[Tensor],
) -> dict[str, Tensor]:
    """Return the columns of images x, whose clean maps and boxes are given."""
    maps, box = measured_maps(method, x, y)
    before, clean_box = clean
    diagonal = math.hypot(*maps.shape[1:])
    return {
        "top_k": top_k_intersection(before, maps, SHARE),
        "spearman": spearman_correlation(before, maps),
        "centre_shift": (center(maps) - center(before)).norm(dim=1) / diagonal,
        "box_iou": box_iou(clean_box, box),
        "error": (best_iou(box[:, None], truth)[:, 0] <= 0.5),
        "label_kept": kept,
    }


def measured_maps(method: Method, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps and the boxes of images."""
    maps = method.maps(x, y)
    return maps, box_of(maps if method.box_maps is None else method.box_maps(x, y))


def classified_right(model: Classifier, data: Path, n: int) -> harness.Photographs:
    """Return the first n images that are classified correctly."""
    every = harness.photographs(data, None, model.input_size)
    right = (harness.predicted(model, every.images) == every.labels).nonzero()[:n, 0].tolist()
    boxes, ids = ([column[i] for i in right] for column in (every.boxes, every.ids))
    return harness.Photographs(every.images[right], every.labels[right], boxes, ids)


def measure(
    model: Classifier, method: Method, shown: harness.Photographs, noisy: Tensor, region: bool
) -> tuple[dict[str, list[dict[str, Tensor]]], float, Tensor]:
    """Return the rows of one method, processor seconds, and the first batch as attacked."""
    rows: dict[str, list[dict[str, Tensor]]] = {"clean": [], "noise": [], "attacked": []}
    seconds, first = 0.0, torch.empty(0)
    for at in torch.arange(method.images).split(method.batch):
        x, y, boxes = shown.images[at], shown.labels[at], [shown.boxes[int(i)] for i in at]
        clean = measured_maps(method, x, y)
        inside = torch.stack([boxes_to_mask(b, model.input_size) for b in boxes]).float()
        start = time.process_time()
        attacked, details = method.attack.perturb(
            x, y, region=inside if region else None, return_details=True
        )
        seconds += time.process_time() - start
        still = harness.predicted(model, noisy[at]) == y
        for row, moved, kept in (
            ("clean", x, torch.ones_like(still)),
            ("noise", noisy[at], still),
            ("attacked", attacked, details.label_kept),
        ):
            rows[row].append(compared(method, clean, moved, y, kept, boxes))
        first = first if len(first) else attacked
        print(f"  {int(at[-1]) + 1} of {method.images}", file=sys.stderr, flush=True)
    return rows, seconds, first


def explanation_attack(
    *,
    data: Annotated[Path, "an ImageNet validation folder"],
    images: int = 32,
    steps: int = 20,
    epsilon: Annotated[float, "in 255ths"] = 2,
    region: Annotated[bool, "move out of the annotated boxes"] = False,
    methods: Annotated[tuple[str, ...], "some of them only"] = (),
    picture: Annotated[str | None, "where to save the maps of one image"] = None,
) -> int:
    """Print the table; return 1 if a label was lost."""
    model = load_classifier("efficientnet_lite0")
    shown = classified_right(model, data, images)
    every = methods_of(model, epsilon / 255, steps, len(shown))
    print(
        f"EfficientNet-Lite0, {tuple(model.input_size)} pixels, epsilon {epsilon:g}/255, "
        f"{steps} steps, out of the {'boxes' if region else 'top positions'}"
    )
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, shown.images[:1].shape, generator=generator) * 2 - 1
    noisy = (shown.images + epsilon / 255 * signs).clamp(0, 1)
    panels: dict[str, list[RGB]] = {}
    for name in methods or every:
        method = every[name]
        rows, seconds, attacked = measure(model, method, shown, noisy, region)
        if not panels:
            print(f"{'':32}" + "".join(f"{column:>24}" for column in rows["clean"][0]))
        for row, batches in rows.items():
            values = harness.gathered(batches).values()
            print(f"{name:22}{row:10}" + "".join(f"{harness.mean(v):>24}" for v in values))
        print(
            f"  n={method.images}, {seconds / method.images:.1f} CPU seconds an image", flush=True
        )
        if not all(bool(batch["label_kept"].all()) for batch in rows["attacked"]):
            return 1
        panels[name] = pictures(method, shown.images, attacked, shown.labels)
        if picture:
            captions = [f"{name}, {row}" for row in ("clean", "attacked") for name in panels]
            cells = [column[row] for row in (0, 1) for column in panels.values()]
            save_png(picture, panel(cells, captions, len(panels)))
    return 0


def pictures(method: Method, x: Tensor, attacked: Tensor, y: Tensor) -> list[RGB]:
    """Return the map of the first image over it, clean and attacked, with the boxes."""
    shown = []
    for image in (x[:1], attacked[:1]):
        maps = (method.maps if method.box_maps is None else method.box_maps)(image, y[:1])
        shown.append(draw_boxes(overlay(image[0], maps[0]), box_of(maps), PREDICTED_COLOR))
    return shown


if __name__ == "__main__":
    harness.study(__doc__, explanation_attack, threads=1)
