"""Images with classes and boxes from what users have on disk.

Every data set is a :class:`LocalizationDataset` whose items are :class:`Sample`; a problem with one
sample is a :class:`DataError`, one with the whole set is raised when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from captum_robust._checks import check, check_choice
from captum_robust.data.dataset import LocalizationDataset
from captum_robust.data.fit import FITS, fitted, resize, resize_and_center_crop
from captum_robust.data.images import load_image
from captum_robust.data.sample import DataError, Sample
from captum_robust.data.superpixels import cached_superpixels, superpixel_path, superpixels

__all__ = [
    "FITS",
    "KINDS",
    "DataError",
    "LocalizationDataset",
    "Sample",
    "cached_superpixels",
    "fitted",
    "load_dataset",
    "load_image",
    "resize",
    "resize_and_center_crop",
    "superpixel_path",
    "superpixels",
]

KINDS = {
    "imagenet": ("imagenet", "ImageNet"),
    "tiny-imagenet": ("tiny_imagenet", "TinyImageNet"),
    "coco": ("coco", "Coco"),
    "voc": ("voc", "PascalVOC"),
    "folder": ("folder", "ImageFolder"),
    "webdataset": ("webdataset", "WebDataset"),
    "samples": ("samples", "SampleSet"),
}
"""Kind of data set → its module in this package, and its class."""


def load_dataset(kind: str, path: str | Path | None = None, **options: Any) -> LocalizationDataset:
    """Open a data set by the name of its layout.

    Args:
        kind: ``"imagenet"``, ``"tiny-imagenet"``, ``"coco"``, ``"voc"``, ``"folder"``,
            ``"webdataset"``, or ``"samples"``, the photographs that come with installed packages.
        path: the data set's folder or archive; None for ``"samples"``.
        options: the arguments of the data set's class.

    Raises:
        ValueError: an unknown kind, a path where none is taken or none where one is needed, or
            a data set without images.
        FileNotFoundError: a folder or file of the data set is missing.
    """
    check_choice("kind of data set", kind, KINDS)
    module, name = KINDS[kind]
    dataset: Callable[..., LocalizationDataset] = getattr(
        import_module(f"captum_robust.data.{module}"), name
    )
    if kind == "samples":
        given = f"the sample set comes with its packages and takes no path, got {path}"
        check(path is None, f"path: {given}")
        return dataset(**options)
    check(path is not None, f"path: a data set of kind {kind!r} needs the path of its files")
    return dataset(path, **options)
