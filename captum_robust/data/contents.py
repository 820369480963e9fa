"""Checksums of what a data set holds: a run is another one where its labels or boxes are."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from captum_robust._files import checksum
from captum_robust.data.files import FileTree
from captum_robust.data.sample import Sample

_PLURALS = {"image": "images", "label": "labels", "mask": "masks"}
_ELSEWHERE = {"ids", "root", "samples", "imgs"}
"""Attributes that a run describes in another place, or whose paths follow its working folder."""


class _Away(Exception):
    """A file of the data set is not there now."""


def checksums_of(data: Any, count: int) -> dict[str, int | None]:
    """The CRC-32 of each part of the first ``count`` samples, by its name.

    What is in memory counts by its values: images, labels, boxes and masks of a list, else each
    attribute of the data set. A file counts by its size and the time of its last change. What is
    of another kind, such as an open file, does not count. None: a file is not there now, so that
    nothing can be said of the part.
    """
    parts = _parts_of(data, count)
    # None is what an attribute holds before it is first used.
    return {name: _crc32(value) for name, value in sorted(parts.items()) if value is not None}


def _parts_of(data: Any, count: int) -> dict[str, Any]:
    if isinstance(data, (list, tuple)):
        rows = [_item_parts(item) for item in data[:count]]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}
    if isinstance(data, TensorDataset):
        return {"images": data.tensors[0][:count], "labels": [t[:count] for t in data.tensors[1:]]}
    if not hasattr(data, "__dict__") or isinstance(data, Tensor):
        return {"images": data[:count]} if isinstance(data, Tensor) else {}
    parts: dict[str, Any] = {}
    for name, value in vars(data).items():
        if name == "_items":
            parts |= _parts_of(value, count)
        elif isinstance(value, Dataset):
            # Of a part, such as that of a subset, the first samples are not the first ones here.
            parts |= _parts_of(value, len(value))  # type: ignore[arg-type]
        elif name not in _ELSEWHERE:
            parts[name.lstrip("_")] = _first(value, data, count)
    return parts


def _item_parts(item: Any) -> dict[str, Any]:
    """The parts of a sample, an image, or an image with its label, or label and boxes."""
    if isinstance(item, Sample):
        parts = {_PLURALS.get(name, name): value for name, value in vars(item).items()}
        return {name: value for name, value in parts.items() if name != "source"}
    if isinstance(item, (list, tuple)) and len(item) in (2, 3):
        return dict(zip(("images", "labels", "boxes"), item, strict=False))
    return {"images": item}


def _first(value: Any, data: Any, count: int) -> Any:
    """What an attribute that has an entry for each sample says of the first ``count``."""
    ids = getattr(data, "ids", None)
    if isinstance(value, Mapping) and ids is not None and not value.keys().isdisjoint(ids):
        return {id: value[id] for id in ids[:count] if id in value}
    is_list = isinstance(value, (list, tuple)) and hasattr(data, "__len__")
    return value[:count] if is_list and len(value) == len(data) else value


def _crc32(value: Any) -> int | None:
    try:
        text = json.dumps(value, default=_plain, skipkeys=True)
    except ValueError:  # it holds itself
        return 0
    except _Away:
        return None
    return zlib.crc32(text.encode())


def _plain(value: Any) -> Any:
    """What JSON can hold of a value; None where nothing is known of its kind."""
    if isinstance(value, Tensor):
        return [*value.shape, str(value.dtype), checksum([value])]
    if isinstance(value, Image.Image):
        return _image(value)
    if isinstance(value, Path):
        return _stamp(value)
    if isinstance(value, FileTree) and not value.path.is_file():  # an archive is a file
        return [_stamp(value.path / name) for name in value.names]
    if isinstance(value, FunctionType):  # such as one that maps labels
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        code = value.__code__
        return [zlib.crc32(code.co_code), code.co_names, code.co_consts, cells]
    if hasattr(value, "to_numpy"):  # of pandas
        value = value.to_numpy()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [*value.shape, str(value.dtype), zlib.crc32(value.tobytes())]
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (range, bytes)):
        return repr(value)
    if isinstance(value, Dataset) or is_dataclass(value):
        facts = vars(value) if hasattr(value, "__dict__") else {}
        return [type(value).__qualname__, facts, _stamps(facts.get("samples"))]
    return None


def _image(image: Image.Image) -> Any:
    """By its file where it has one: its pixels may not be read yet, or not be readable."""
    name = getattr(image, "filename", "")
    if name and isinstance(name, (str, Path)):
        return _stamp(Path(name))
    try:
        return [image.mode, *image.size, image.getpalette(), zlib.crc32(image.tobytes())]
    except (OSError, SyntaxError, ValueError):  # damaged, as its row will say
        return [image.mode, *image.size]


def _stamps(samples: Any) -> list[Sequence[int] | None]:
    """Of the files of torchvision's folders: pairs of a path, which is a text, and a class."""
    pairs = samples if isinstance(samples, list) else []
    return [_stamp(Path(str(pair[0]))) for pair in pairs if isinstance(pair, tuple)]


def _stamp(path: Path) -> Sequence[int] | None:
    """The size of a file and the time of its last change in nanoseconds; None of a folder."""
    try:
        found = path.stat()
    except OSError:
        raise _Away from None
    except ValueError:  # no name of a file
        return None
    return [found.st_size, found.st_mtime_ns] if path.is_file() else None
