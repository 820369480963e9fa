"""COCO's segmentations as masks: polygons and run lengths."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_robust._checks import check


def union_mask(segmentations: list[Any], size: tuple[int, int]) -> Tensor:
    """H×W bool: the pixels of any of the objects.

    Each segmentation is a list of polygons [x0, y0, x1, y1, …] or a run-length code.

    Raises:
        ValueError: a run-length code of another size, or a compressed one without pycocotools.
    """
    mask = np.zeros(size, dtype=bool)
    for each in segmentations:
        mask |= _with_pycocotools(each, size) if find_spec("pycocotools") else _without(each, size)
    return torch.from_numpy(mask)


def _with_pycocotools(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    from pycocotools import mask as coco

    code = segmentation
    if isinstance(segmentation, list):
        code = coco.merge(coco.frPyObjects(segmentation, *size))
    else:
        _check_code(segmentation, size)
        if isinstance(segmentation["counts"], list):
            code = coco.frPyObjects(segmentation, *size)
    return np.asarray(coco.decode(code), dtype=bool)


def _without(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    if isinstance(segmentation, list):
        return _fill(segmentation, size)
    _check_code(segmentation, size)
    counts = segmentation["counts"]
    is_plain = isinstance(counts, list)
    check(is_plain, "a compressed run-length code needs `pip install pycocotools`")
    height, width = size
    total = sum(counts)
    check(total == height * width, f"run lengths: expected {height * width} pixels, got {total}")
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)  # the first run is background
    return values.reshape(width, height).T  # runs go down the columns


def _check_code(code: Any, size: tuple[int, int]) -> None:
    fits = tuple(code["size"]) == size
    check(fits, f"run-length code: expected one of size {list(size)}, got {code['size']}")


def _fill(polygons: list[list[float]], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    import skimage.draw

    mask = np.zeros(size, dtype=bool)
    for corners in polygons:
        # COCO's coordinates are pixel corners, scikit-image's are pixel centres.
        xs, ys = np.asarray(corners, dtype=np.float64).reshape(-1, 2).T - 0.5
        mask[skimage.draw.polygon(ys, xs, size)] = True  # type: ignore[no-untyped-call]
    return mask
