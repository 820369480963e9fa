"""Objects in image files: read in batches, said in words, in JSON and in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_robust._files import write_whole
from captum_robust._progress import counted
from captum_robust.data import DataError, load_image
from captum_robust.show.locate import Located, Locator


@dataclass(frozen=True)
class LocatedFile:
    """What is in an image file, or why that is not known."""

    name: str
    file: Path
    size: tuple[int, int] = (0, 0)
    """(H, W) in pixels."""
    located: Located | None = None
    error: str = ""

    def objects(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """What JSON holds of each object."""
        if self.located is None:
            return []
        boxes, labels, scores = (self.located[k].tolist() for k in ("boxes", "labels", "scores"))
        return [
            {"class": label, "name": name_of(names, label), "score": score, "box": box}
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]


def name_of(names: Sequence[str], label: int) -> str:
    """The name of a class; its number where the model has no names."""
    return names[label] if label < len(names) else str(label)


def located_files(
    locator: Locator,
    files: Mapping[str, Path],
    *,
    target: int | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Iterator[LocatedFile]:
    """What is in each file, in their order; one that cannot be read has an error.

    Args:
        locator: see :func:`captum_robust.locate`.
        files: by name.
        target: the class to place; None: those that are seen.
        batch_size: how many are read and placed at once.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.
    """
    waiting = iter(counted(files.items(), "image", progress, "locate"))
    while some := list(islice(waiting, batch_size)):
        images, errors = {}, {}
        for name, file in some:
            try:
                images[name] = load_image(file)
            except DataError as error:
                errors[name] = str(error)
        asked = None if target is None else torch.full((len(images),), target)
        found = locator(list(images.values()), asked) if images else []
        located = dict(zip(images, found, strict=True))
        for name, file in some:
            if name in errors:
                yield LocatedFile(name, file, error=errors[name])
            else:
                height, width = images[name].shape[1:]
                yield LocatedFile(name, file, (height, width), located[name])


class CocoFile:
    """A COCO file in the making: ``add`` each image, then ``write``.

    The annotations are also results, as pycocotools' ``loadRes`` takes them: each has a ``score``.

    Args:
        names: of the classes; the category of a class has its number.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, one: LocatedFile) -> None:
        """An image and its objects; the id of an image is its place, from 1."""
        if one.located is None:
            return
        image_id = len(self._images) + 1
        height, width = one.size
        self._images.append(
            {"id": image_id, "file_name": one.name, "height": height, "width": width}
        )
        for each, mask in zip(one.objects(self.names), one.located["masks"], strict=True):
            x0, y0, x1, y1 = each["box"]
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image_id,
                    "category_id": each["class"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "score": each["score"],
                    "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
                }
            )

    def write(self, path: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        used = sorted({each["category_id"] for each in self._annotations})
        categories = [{"id": label, "name": name_of(self.names, label)} for label in used]
        content = {"images": self._images, "annotations": self._annotations}
        write_whole(path, json.dumps(content | {"categories": categories}) + "\n")


def run_lengths(mask: Tensor) -> list[int]:
    """COCO's plain run-length code of a Boolean mask H×W: down the columns, background first.

    >>> run_lengths(torch.tensor([[False, True], [True, True]]))
    [1, 3]
    """
    pixels = mask.T.flatten().numpy()
    ends = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff([0, *ends.tolist(), len(pixels)]).tolist()
    return [0, *runs] if pixels[0] else runs
