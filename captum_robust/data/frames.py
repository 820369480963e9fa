"""Images, labels and boxes of a data frame of pandas."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from captum_robust._checks import check, check_type, printable
from captum_robust._orientation import turned_boxes
from captum_robust.data.images import load_oriented
from captum_robust.data.sample import DataError

_PATHS = ("path", "file")
_SIDES = ("x0", "y0", "x1", "y1")
_LABELS = ("label", "labels", "class", "class_id", "category", "target", "targets")
_BOXES = re.compile(
    r".*bbox.*|.*bounding_?box.*|(?!n_|num_)(.*_)?box(es)?(_xy..)?|.*x_?min|left|x_?tl|x0"
)
_SETS_OF_SIDES = (
    *(("x", "y", "w", "h"), ("x", "y", "width", "height"), ("x1", "y1", "x2", "y2")),
    *(("cx", "cy", "w", "h"), ("x_center", "y_center", "width", "height")),
)
"""Names in small letters under which others have labels, or boxes."""
BOX_FORM = "boxes (x0, y0, x1, y1 in pixels)"


def is_frame(data: object) -> bool:
    """Whether it is a data frame, without loading pandas for what is none."""
    kind = type(data)
    return kind.__name__ == "DataFrame" and kind.__module__.partition(".")[0] == "pandas"


class FrameImages(Dataset[Any]):
    """The images of a frame, each with its label and boxes; named as torchvision's data sets.

    Several rows of one path are several boxes of one image. Boxes are turned with the pixels of a
    photograph that its EXIF tag turns upright.

    Args:
        frame: with the column ``path`` (or ``file``) and any of: ``label``, a class index or a name
            of a class; ``boxes``, M×4 numbers (x0, y0, x1, y1) in pixels as the file stores them,
            or four of one box; or the columns ``x0``, ``y0``, ``x1`` and ``y1``. An empty cell is
            no label, or no box.

    Raises:
        ValueError: no or two such columns of paths, some of the sides of a box only, boxes in both
            forms, labels or boxes under another usual name, two columns of one name, labels that
            are neither, or two labels of one image; names the row.
        TypeError: a path that is no text.
    """

    labels_are_names = False
    """Whether ``classes`` came from the labels themselves."""

    def __init__(self, frame: Any) -> None:
        columns = [str(name) for name in frame.columns]
        paths = [name for name in _PATHS if name in columns]
        listed = ", ".join(columns[:9])
        expected = "frame: expected one column path (or file) of image files"
        check(len(paths) == 1, f"{expected}, got the columns {listed}")
        _check_columns(columns)
        sides = [name for name in _SIDES if name in columns]
        absent = ", ".join(name for name in _SIDES if name not in sides)
        check(len(sides) in (0, 4), f"frame: expected x0, y0, x1 and y1, got no {absent}")
        twice = "frame: expected boxes or x0, y0, x1 and y1, got both"
        check(not (sides and "boxes" in columns), twice)
        labels = list(frame["label"]) if "label" in columns else [None] * len(frame)
        of_path: dict[str, tuple[Any, list[Tensor]]] = {}
        for row, (path, label) in enumerate(zip(frame[paths[0]], labels, strict=True)):
            where = f"frame, row {row}"
            check_type(f"{where}, {paths[0]}", path, str | os.PathLike, "a path")
            label = None if _is_empty(label) else label
            known, boxes = of_path.setdefault(os.path.abspath(path), (label, []))
            both = f"{label!r} and {known!r} of {printable(str(path))}"
            check(label == known, f"{where}, label: expected one an image, got {both}")
            cell = frame["boxes"].iloc[row] if "boxes" in columns else None
            if sides:
                corners = [frame[side].iloc[row] for side in _SIDES]
                cell = None if all(map(_is_empty, corners)) else corners
            boxes.append(boxes_of(cell, f"{where}, boxes"))
        given = [label for label, _ in of_path.values()]
        self.labels_are_names = any(isinstance(label, str) for label in given)
        names = {str(label) for label in given if label is not None}
        self.classes = sorted(names) if self.labels_are_names else []
        self.targets = [self._index(label) for label in given]
        self.samples = list(zip(of_path, self.targets, strict=True))
        self.boxes = [torch.cat(boxes) for _, boxes in of_path.values()]
        self.root = os.path.commonpath([os.path.dirname(p) for p in of_path]) if of_path else "."

    def _index(self, label: Any) -> int | None:
        if label is None:
            return None
        if self.labels_are_names:
            check(isinstance(label, str), f"frame, label: expected names only, got {label!r}")
            return self.classes.index(label)
        try:
            number = int(label)
        except (TypeError, ValueError):
            number = None
        expected = "frame, label: expected class indices or names"
        check(number is not None and number == label, f"{expected}, got {label!r}")
        return number

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None, Tensor]:
        path, label = self.samples[index]
        image, orientation = load_oriented(path)
        height, width = image.shape[1:]
        return image, label, turned_boxes(self.boxes[index], orientation, (height, width))


def _check_columns(columns: Sequence[str]) -> None:
    """Each name once, and none that means a column which is there under no known name."""
    known = ("label", "boxes", *_SIDES)
    for name in columns:
        twice = f"frame: expected each column once, got {name!r} twice"
        check(name not in known or columns.count(name) == 1, twice)
    labels = [c for c in columns if c.strip().lower() in _LABELS and "label" not in columns]
    check(not labels, f"frame: expected the column label, got {', '.join(labels)}; rename it")
    boxes = [] if {"boxes", _SIDES[0]} & {*columns} else names_of_boxes(columns)
    form = f"{BOX_FORM}, or x0, y0, x1 and y1"
    check(not boxes, f"frame: expected the column {form}, got {', '.join(boxes)}; rename it")


def names_of_boxes(names: Iterable[str]) -> list[str]:
    """Those of the names that boxes usually have, in whatever form these are.

    >>> names_of_boxes(["image", "Bbox", "width", "height"]), names_of_boxes("xywh")
    (['Bbox'], ['x', 'y', 'w', 'h'])
    """
    own = {name.strip().lower(): name for name in names}
    sides = next((sides for sides in _SETS_OF_SIDES if own.keys() >= {*sides}), ())
    return [own[name] for name in own if name in sides or _BOXES.fullmatch(name)]


def boxes_of(boxes: Any, where: str) -> Tensor:
    """Boxes M×4 float32 of such numbers in any form, of one box, or of nothing.

    Raises:
        DataError: anything else, or no number above 1, as of shares of the image; begins with
            ``where``.

    >>> boxes_of([1, 2, 3, 4], "boxes")
    tensor([[1., 2., 3., 4.]])
    """
    if _is_empty(boxes):
        return torch.zeros(0, 4)
    try:
        if isinstance(boxes, Sequence) and boxes and isinstance(boxes[0], Tensor):
            numbers = torch.stack(list(boxes)).float()
        else:
            array = boxes.detach().cpu() if isinstance(boxes, Tensor) else np.asarray(boxes)
            numbers = torch.as_tensor(array, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.zeros(())
    if numbers.numel() == 0 and numbers.ndim > 0:
        return torch.zeros(0, 4)
    numbers = numbers[None] if numbers.ndim == 1 else numbers
    fits = numbers.ndim == 2 and numbers.shape[1] == 4
    expected = "expected M×4 numbers (x0, y0, x1, y1)"
    check(fits, f"{where}: {expected}, got {repr(boxes)[:80]}", DataError)
    are_pixels = not bool(numbers.max() <= 1)
    shares = f"expected pixels, got {str(boxes)[:80]}, which may be shares of the image"
    check(are_pixels, f"{where}: {shares}; multiply them by its width and height", DataError)
    return numbers


def _is_empty(cell: Any) -> bool:
    """Whether a cell holds nothing: None, or what pandas has in its place."""
    is_one = not isinstance(cell, (Tensor, np.ndarray, Sequence, Image.Image)) or cell is None
    # pandas' NA is no truth value, also compared with itself.
    return cell is None or (is_one and (type(cell).__name__ == "NAType" or bool(cell != cell)))


def are_boxes(part: object) -> bool:
    """Whether it may be the boxes of an image: numbers in a list, a tensor or an array; or None."""
    is_list = isinstance(part, (list, tuple)) and all(
        isinstance(one, (int, float, list, tuple, Tensor, np.ndarray)) for one in part
    )
    return part is None or is_list or isinstance(part, (Tensor, np.ndarray))
