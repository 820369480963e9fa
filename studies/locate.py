"""How well does ``locate`` place several objects, and what does each stage cost?

Written down before the numbers: collages of two, three and four photographs in a row, a column or
a square, drawn from one half of the images at a time, so that what is chosen on the collages of
fold 0 (the confidence of a class and of a part) is scored on those of fold 1. Every method has the
same rule and its own shipped threshold. Mean average precision is COCO's (IoU .5 to .95, and .5),
over the classes that occur, of labels and boxes; ``agnostic`` is that of the boxes alone.

``python studies/locate.py several imagenet-val-400`` the collages; ``... cost`` passes and ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import harness
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from captum_robust.data import Sample
from captum_robust.metrics.functional import center_box, split_folds
from captum_robust.models import Classifier
from captum_robust.show.locate import Located, locate

GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
"""Rows and columns of photographs."""


def collages(samples: list[Sample], count: int, seed: int) -> Iterator[tuple[Tensor, Located]]:
    """Images 3×H×W and the labels and boxes of all objects in them."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        rows, columns = GRIDS[number % len(GRIDS)]
        chosen = torch.randperm(len(samples), generator=generator)[: rows * columns].tolist()
        height, width = samples[0].image.shape[1:]
        image = torch.zeros(3, rows * height, columns * width)
        boxes, labels = [], []
        for place, index in enumerate(chosen):
            y, x = place // columns * height, place % columns * width
            sample = samples[index]
            image[:, y : y + height, x : x + width] = sample.image
            boxes.append(sample.boxes + torch.tensor([x, y, x, y]))
            labels += [sample.label] * len(sample.boxes)
        yield image, {"boxes": torch.cat(boxes).float(), "labels": torch.tensor(labels)}


def precision(found: list[Located], truth: list[Located], *, agnostic: bool = False) -> list[float]:
    """COCO's mean average precision, and at IoU .5."""
    metric = MeanAveragePrecision()
    given = [{k: one[k] for k in ("boxes", "labels", "scores")} for one in found]
    if agnostic:
        given = [one | {"labels": torch.zeros_like(one["labels"])} for one in given]
        truth = [one | {"labels": torch.zeros_like(one["labels"])} for one in truth]
    metric.update(given, truth)
    result = metric.compute()
    return [float(result["map"]), float(result["map_50"])]


def centred(model: Classifier, images: list[Tensor], confidence: float) -> list[Located]:
    """The centre box under the classes that are seen."""
    results = locate(model, images, method="center_box", confidence=confidence)
    for image, one in zip(images, results, strict=True):
        box = center_box((image.shape[1], image.shape[2]))
        one["boxes"] = box.expand(len(one["labels"]), 4).float()
    return results


def several(
    data: Path, *, count: int = 200, confidences: tuple[float, ...] = (0.05, 0.1, 0.2)
) -> None:
    """Mean average precision of collages, beside other methods with the same rule."""
    model = harness.classifier()
    photographs = harness.photographs(data)
    samples = [photographs[index] for index in range(len(photographs))]
    folds = split_folds([sample.id for sample in samples], 0)
    print(
        f"{'fold':>4} {'method':20}{'confidence':>11}"
        f"{'mAP':>8}{'at .5':>8}{'agnostic':>10}{'at .5':>8}"
    )
    for fold in (0, 1):
        mine = [s for s, f in zip(samples, folds.tolist(), strict=True) if f == fold]
        images, truth = zip(*collages(mine, count, fold), strict=True)
        for method in ("best", "fast", "grad_cam", "robust_cam", "center_box"):
            for confidence in confidences:
                found = locate(model, list(images), method=method, confidence=confidence)
                numbers = precision(found, list(truth)) + precision(
                    found, list(truth), agnostic=True
                )
                line = "".join(f"{n:{w}.3f}" for n, w in zip(numbers, (8, 8, 10, 8), strict=True))
                print(f"{fold:>4} {method:20}{confidence:11.2f}{line}", flush=True)


if __name__ == "__main__":
    harness.study(__doc__, several)
