"""Super-pixels of images, computed once and kept in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_robust._checks import (
    check,
    check_count,
    check_finite,
    check_floating,
    check_number,
    printable,
)
from captum_robust._facts import Form, listed, number, whole
from captum_robust._files import checksum, read_facts, write_facts
from captum_robust._progress import counted

_FACTS = "captum_robust.superpixels"
_FORM: Form = {
    "n_segments": whole(1),
    "compactness": number(0, open_low=True),
    "size": listed(whole(1), 2, 2),
    "checksum": whole(0, 2**32 - 1),
}
_LEAST_PIXELS = 4
"""A super-pixel has at least these: fewer are not much of a region."""
_SECONDS = 30.0
"""Time between two states of the file: a killed run loses at most that much."""

_REMEDY = "delete the file, or give another"


def superpixels(images: Tensor, n_segments: int = 100, *, compactness: float = 10.0) -> Tensor:
    """N×H×W int64: the number of each pixel's super-pixel, from 0 to S-1 without gaps.

    SLIC of scikit-image (Achanta et al., https://doi.org/10.1109/TPAMI.2012.120), on the CPU, one
    image after another: some 4 ms for 64×64 pixels, 70 ms for 224×224. S differs between images.

    Args:
        images: N×C×H×W with pixels in [0, 1], of one channel or three, on any device.
        n_segments: about how many an image has, at most a quarter of its pixels.
        compactness: weight of nearness against likeness of colour.

    Raises:
        TypeError: images that are not floating point.
        ValueError: images of another shape, an empty batch, pixels outside of [0, 1] or NaN, a
            number of segments below 1 or too large for the images, a compactness that is not
            positive.
    """
    check_count("n_segments", n_segments, 1)
    compactness = check_number("compactness", compactness, 0, open_low=True)
    check_floating("images", images)
    shape = tuple(images.shape)
    fits = len(shape) == 4 and shape[1] in (1, 3) and images.numel() > 0
    check(fits, f"images: expected N×1×H×W or N×3×H×W, not empty, got {shape}")
    height, width = images.shape[2:]
    most = height * width // _LEAST_PIXELS
    few = f"{height}×{width} pixels are too few for {n_segments} super-pixels"
    check(n_segments <= most, f"images: {few}; take at most n_segments={most}")
    check_finite(images, "images")
    pixels = images.detach().float().cpu()
    lowest, highest = (float(v) for v in pixels.aminmax())
    inside = lowest >= 0 and highest <= 1
    check(inside, f"images: expected pixels in [0, 1], got {lowest:.4g} to {highest:.4g}")
    from skimage.segmentation import slic

    # Grey as colour, whose lightness goes to 100: beside the distance in pixels, grey that goes to
    # 1 counts for nothing.
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    options = {"n_segments": n_segments, "compactness": compactness, "start_label": 0}
    each = [torch.from_numpy(slic(image, **options)).long() for image in pixels.numpy()]
    return torch.stack(each).to(images.device)


def superpixel_path(root: str | Path, n_segments: int, size: tuple[int, int], part: str) -> Path:
    """Where the super-pixels of a data set are looked for: beside it.

    Args:
        root: the data set's folder or archive.
        n_segments: about how many an image has.
        size: (H, W) of the images.
        part: which images of the data set: ``"train"``, say.

    >>> superpixel_path("data/tiny.tar", 100, (64, 64), "train").name
    'tiny.tar.train-64x64-100.superpixels.safetensors'
    """
    root = Path(root).absolute()
    name, end = root.name, f".{part}-{size[0]}x{size[1]}-{n_segments}.superpixels.safetensors"
    while len(os.fsencode(name + end)) > 255:  # as long as the name of a file can be
        name = name[:-1]
    return root.with_name(name + end)


def cached_superpixels(
    images: Dataset[Any] | Sequence[Any],
    path: str | Path | None,
    n_segments: int = 100,
    *,
    compactness: float = 10.0,
    progress: bool | None = None,
) -> Tensor:
    """N×H×W: the super-pixels of each image of a data set, from the file or computed and put there.

    The file holds a checksum of each image, and is read only for those. It is written again and
    again, each time whole: a killed run goes on where it was. Of processes that share a file, let
    one be first.

    Args:
        images: N of one size: C×H×W with pixels in [0, 1], or tuples that begin with one.
        path: of a ``.safetensors`` file; None: nothing is read or kept.
        n_segments, compactness: see :func:`superpixels`.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Returns:
        Integers, of the smallest type that holds all of them.

    Raises:
        ValueError: no images, or images of different sizes, or what :func:`superpixels` refuses;
            a file that is torn or no such file, or one of other images, or of another size or
            number of segments.
        TypeError: items that are no images.
        OSError: the file cannot be written.
    """
    check_count("n_segments", n_segments, 1)
    compactness = check_number("compactness", compactness, 0, open_low=True)
    count = len(images)  # type: ignore[arg-type]
    check(count, "images: there are none")
    file = None if path is None else Path(path)
    if file is not None:
        named = file.suffix == ".safetensors"
        check(named, f"path: expected a name that ends in .safetensors, got {file.name}")
    size = _image(images, 0).shape[1:]
    facts = {"n_segments": n_segments, "compactness": compactness, "size": list(size)}
    segments = torch.zeros(count, *size, dtype=torch.uint8)
    sums: list[int] = []
    if file is not None and file.exists():
        try:
            known, sums = _read(file, facts, count)
        except ValueError as error:
            raise ValueError(f"{error}; {_REMEDY}") from None
        segments = _wide(segments, known)
        segments[: len(known)] = known
    known_count, written = len(sums), time.monotonic()
    for i in counted(range(count), "image", progress, "super-pixels"):
        image = _image(images, i)
        got = tuple(image.shape[1:])
        check(got == size, f"images: expected all of {tuple(size)} pixels, got {got} at {i}")
        own = checksum([image])
        if i < known_count:
            other = f"number {i} is not the one that it was made of; {_REMEDY}"
            check(own == sums[i], f"{file} is of other images: {other}")
            continue
        numbers = superpixels(image[None], n_segments, compactness=compactness)[0]
        segments = _wide(segments, numbers)
        segments[i] = numbers
        sums.append(own)
        # The first at once: whether there can be a file is known before the work is done.
        due = i in (0, count - 1) or time.monotonic() - written > _SECONDS
        if file is not None and due:
            _write(file, facts, segments[: i + 1], sums)
            written = time.monotonic()
    return segments


def _image(images: Any, index: int) -> Tensor:
    item = images[index]
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(image, Tensor) or image.ndim != 3:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"images: expected C×H×W, or tuples that begin with one, got {got}")
    return image


def _wide(segments: Tensor, numbers: Tensor) -> Tensor:
    """The segments in a type that also holds the numbers."""
    largest = int(numbers.max())
    if largest <= torch.iinfo(segments.dtype).max:
        return segments
    return segments.to(torch.int16 if largest < 2**15 else torch.int32)


def _write(file: Path, facts: dict[str, Any], segments: Tensor, sums: list[int]) -> None:
    tensors = {"segments": segments, "checksums": torch.tensor(sums)}
    write_facts(file, tensors, _FACTS, {**facts, "checksum": checksum([segments])})


def _read(file: Path, facts: dict[str, Any], count: int) -> tuple[Tensor, list[int]]:
    """The segments and the checksums of the images that the file holds."""
    name = printable(str(file))
    tensors, theirs = read_facts(file, _FACTS, "super-pixels", _FORM)
    own = theirs.pop("checksum")
    check({"segments", "checksums"} <= tensors.keys(), f"{name} holds no super-pixels")
    segments, sums = tensors["segments"], tensors["checksums"]
    check(theirs == facts, f"{name} is of {_described(theirs)}, not of {_described(facts)}")
    is_whole = (
        segments.dtype in (torch.uint8, torch.int16, torch.int32)
        and sums.dtype == torch.int64
        and sums.ndim == 1
        and len(sums) > 0
        and segments.shape == (len(sums), *facts["size"])
        and checksum([segments]) == own
        and 0 <= int(segments.min()) <= int(segments.max()) < segments[0].numel()
    )
    check(is_whole, f"{name} is damaged")
    other = f"it holds {len(sums)}, the data set {count}"
    check(len(sums) <= count, f"{name} is of other images: {other}")
    return segments, sums.tolist()


def _described(facts: dict[str, Any]) -> str:
    size, compactness = "×".join(map(str, facts["size"])), facts["compactness"]
    return f"{facts['n_segments']} super-pixels of compactness {compactness} for {size} pixels"
