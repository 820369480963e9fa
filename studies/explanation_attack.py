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

import argparse
import datetime
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import captum
import torch
from captum.attr import IntegratedGradients, LayerGradCam
from robust_cam import version
from torch import Tensor

from captum_robust import PerceptualBallPerturbation, RobustCAM
from captum_robust.attacks import ExplanationAttack
from captum_robust.attr import BallSettings
from captum_robust.data import load_dataset, resize
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
    bootstrap_interval,
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


@dataclass
class Measured:
    """Columns of one row of the table, one tensor of values a batch."""

    columns: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        """Append the values of a batch."""
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value.double())

    def line(self) -> str:
        """Return means and intervals."""
        shown = []
        for values in self.columns.values():
            interval = bootstrap_interval(torch.cat(values))
            text = f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
            shown.append(f"{text:>24}")
        return "".join(shown)


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the positive part of maps N×1×h×w as N×H×W."""
    positive = maps.clamp(min=0)
    return torch.nn.functional.interpolate(positive, size, mode="bilinear", align_corners=False)[
        :, 0
    ]


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
            lambda x, y: enlarged(cam.attribute(x, y).detach(), size),
            ExplanationAttack(cam, epsilon, steps, k=SHARE, beta=None),
            n,
        ),
        "robust_cam": Method(
            lambda x, y: enlarged(robust.attribute(x, y, k=5), size),
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


def images_of(model: Classifier, data: str, n: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the first n images that are classified correctly, their labels and boxes."""
    images, labels, boxes = [], [], []
    dataset = load_dataset("imagenet", data)
    for i in range(len(dataset)):
        sample = resize(dataset[i], model.input_size)
        with torch.no_grad():
            is_right = int(model(sample.image[None]).argmax()) == sample.label
        if is_right:
            images.append(sample.image)
            labels.append(sample.label)
            boxes.append(sample.boxes)
        if len(images) == n:
            break
    return torch.stack(images), torch.tensor(labels), boxes


def main() -> int:
    """Print the table; return 1 if a label was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="an ImageNet validation folder")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--epsilon", type=float, default=2, help="in 255ths")
    parser.add_argument("--region", action="store_true", help="move out of the annotated boxes")
    parser.add_argument("--methods", nargs="*", help="some of them only")
    parser.add_argument("--picture", help="where to save the maps of one image")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_classifier("efficientnet_lite0")
    images, labels, truth = images_of(model, options.data, options.images)
    epsilon = options.epsilon / 255
    methods = methods_of(model, epsilon, options.steps, len(images))
    methods = {m: methods[m] for m in options.methods or methods}
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread used; "
        f"Python {platform.python_version()}, torch {torch.__version__}, Captum "
        f"{captum.__version__}, captum_robust {version('captum-robust')}"
    )
    print(
        f"EfficientNet-Lite0, {tuple(model.input_size)} pixels, epsilon {options.epsilon:g}/255, "
        f"{options.steps} steps, out of the {'boxes' if options.region else 'top positions'}"
    )
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, images[:1].shape, generator=generator) * 2 - 1
    noisy = (images + epsilon * signs).clamp(0, 1)
    shown: dict[str, list[RGB]] = {}
    is_header = True
    for name, method in methods.items():
        n = method.images
        table = {"clean": Measured(), "noise": Measured(), "attacked": Measured()}
        seconds = 0.0
        for at in torch.arange(n).split(method.batch):
            x, y, boxes = images[at], labels[at], [truth[int(i)] for i in at]
            clean = measured_maps(method, x, y)
            start = time.process_time()
            region = None
            if options.region:
                masks = [boxes_to_mask(b, model.input_size) for b in boxes]
                region = torch.stack(masks).float()
            attacked, details = method.attack.perturb(x, y, region=region, return_details=True)
            seconds += time.process_time() - start
            with torch.no_grad():
                still = model(noisy[at]).argmax(dim=1) == y
            certain = torch.ones_like(still)
            for row, moved, kept in (
                ("clean", x, certain),
                ("noise", noisy[at], still),
                ("attacked", attacked, details.label_kept),
            ):
                table[row].add(**compared(method, clean, moved, y, kept, boxes))
            if int(at[0]) == 0:
                shown[name] = pictures(method, x, attacked, y)
            print(f"  {name}: {int(at[-1]) + 1} of {n}", file=sys.stderr, flush=True)
        if is_header:
            columns = "".join(f"{c:>24}" for c in table["clean"].columns)
            print(f"{'':32}{columns}")
            is_header = False
        for row, measured in table.items():
            print(f"{name:22}{row:10}{measured.line()}")
        print(f"  n={n}, {seconds / n:.1f} CPU seconds an image", flush=True)
        if not all(bool(c.all()) for c in table["attacked"].columns["label_kept"]):
            return 1
        if options.picture:
            columns = list(shown.values())
            captions = [f"{name}, {row}" for row in ("clean", "attacked") for name in shown]
            save_png(
                options.picture,
                panel([c[row] for row in (0, 1) for c in columns], captions, len(columns)),
            )
    return 0


def pictures(method: Method, x: Tensor, attacked: Tensor, y: Tensor) -> list[RGB]:
    """Return the map of the first image over it, clean and attacked, with the boxes."""
    shown = []
    for image in (x[:1], attacked[:1]):
        maps = (method.maps if method.box_maps is None else method.box_maps)(image, y[:1])
        shown.append(draw_boxes(overlay(image[0], maps[0]), box_of(maps), PREDICTED_COLOR))
    return shown


if __name__ == "__main__":
    sys.exit(main())
