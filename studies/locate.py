"""How well does ``locate`` place several objects, and what does each stage cost?

Written down before the numbers: collages of two, three and four photographs in a row, a column or
a square, drawn from one half of the images at a time, so that what is chosen on the collages of
fold 0 (the confidence of a class and of a part) is scored on those of fold 1. Every method has the
same rule and its own shipped threshold. Mean average precision is COCO's (IoU .5 to .95, and .5),
over the classes that occur, of labels and boxes; ``agnostic`` is that of the boxes alone.

``python studies/locate.py several imagenet-val-400`` the collages; ``... cost`` passes and ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import harness
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from captum_robust.benchmark.passes import count_passes
from captum_robust.data import Sample, load_dataset
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


def placed(
    model: Classifier, images: list[Tensor], method: str, confidence: float, rounds: int
) -> list[Located]:
    """What ``locate`` finds; of the centre box, one under each class that is seen."""
    found = locate(model, images, method=method, confidence=confidence, rounds=rounds)
    if method == "center_box":
        for image, one in zip(images, found, strict=True):
            box = center_box((image.shape[1], image.shape[2]))
            one["boxes"] = box.expand(len(one["labels"]), 4).float()
    return found


def several(
    data: Path,
    *,
    count: int = 150,
    confidences: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2),
    rounds: tuple[int, ...] = (1, 4),
    with_best: bool = False,
    model: str = "efficientnet_lite0",
) -> None:
    """Mean average precision of collages, beside other methods with the same rule."""
    classifier = harness.classifier(model)
    dataset = load_dataset("imagenet", data)
    samples = [dataset[index] for index in range(len(dataset))]
    folds = split_folds([sample.id for sample in samples], 0).tolist()
    heads = ("mAP", "at .5", "agnostic", "at .5", "boxes")
    print(
        f"{'half':>4} {'method':14}{'rounds':>7}{'confidence':>11}"
        + "".join(f"{h:>10}" for h in heads)
    )
    for fold in (0, 1):
        mine = [s for s, f in zip(samples, folds, strict=True) if f == fold]
        images, truth = map(list, zip(*collages(mine, count, fold), strict=True))
        for method in ("fast", "grad_cam", "center_box", *(["best"] if with_best else [])):
            for looks, confidence in product(rounds, confidences):
                found = placed(classifier, images, method, confidence, looks)
                numbers = precision(found, truth) + precision(found, truth, agnostic=True)
                numbers.append(sum(len(one["boxes"]) for one in found) / count)
                line = "".join(f"{number:10.3f}" for number in numbers)
                print(f"{fold:>4} {method:14}{looks:>7}{confidence:11.2f}{line}", flush=True)


def cost(data: Path, *, images: int = 32, model: str = "efficientnet_lite0") -> None:
    """Passes and milliseconds an image, and what each stage takes of them."""
    classifier = harness.classifier(model)
    photographs = harness.photographs(data, images)
    calls: dict[str, Callable[[], object]] = {
        "scores": lambda: harness.in_batches(classifier, photographs.images),
        **{
            name: partial(locate, classifier, photographs.images, method=name)
            for name in ("fast", "best", "grad_cam", "real_time_masking")
        },
    }
    print(f"n={images}, {torch.get_num_threads()} threads\n{'':20}forward backward  ms/image")
    for name, call in calls.items():
        with count_passes(classifier) as passes:
            call()
        began = time.perf_counter()
        call()
        ms = 1000 * (time.perf_counter() - began) / images
        per = (passes.forward / images, passes.backward / images)
        print(f"{name:20}{per[0]:7.2f}{per[1]:9.2f}{ms:10.1f}", flush=True)


if __name__ == "__main__":
    harness.study(__doc__, several, cost)
