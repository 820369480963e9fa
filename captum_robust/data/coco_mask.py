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
    decode = _with_pycocotools if find_spec("pycocotools") else _without
    mask = np.zeros(size, dtype=bool)
    for each in segmentations:
        own = size if isinstance(each, list) else tuple(each["size"])
        check(own == size, f"run-length code: expected one of size {size}, got {own}")
        mask |= decode(each, size)
    return torch.from_numpy(mask)


def _with_pycocotools(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    from pycocotools import mask as coco

    code = segmentation
    if isinstance(segmentation, list):
        code = coco.merge(coco.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        code = coco.frPyObjects(segmentation, *size)
    return np.asarray(coco.decode(code), dtype=bool)


def _without(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    if isinstance(segmentation, list):
        return _filled(segmentation, size)
    counts = segmentation["counts"]
    is_plain = isinstance(counts, list)
    check(is_plain, "a compressed run-length code needs `pip install pycocotools`")
    height, width = size
    total = sum(counts)
    check(total == height * width, f"run lengths: expected {height * width} pixels, got {total}")
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)  # the first run is background
    return values.reshape(width, height).T  # runs go down the columns


def _filled(polygons: list[list[float]], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    from skimage.draw import polygon2mask

    mask = np.zeros(size, dtype=bool)
    for corners in polygons:
        # COCO's coordinates are x, y of pixel corners, scikit-image's y, x of pixel centres.
        points = np.asarray(corners, dtype=np.float64).reshape(-1, 2)[:, ::-1] - 0.5
        mask |= polygon2mask(size, points)  # type: ignore[no-untyped-call]
    return mask
