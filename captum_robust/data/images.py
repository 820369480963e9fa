"""The one place that decodes image files."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from captum_robust._checks import check
from captum_robust.data.files import read_bytes
from captum_robust.data.sample import DataError

_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jp2", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Suffixes of the files that a folder listing takes for images, in lower case."""


def load_image(
    source: str | Path | bytes, *, name: str | None = None, exif_orientation: bool = False
) -> Tensor:
    """Decode an image to 3×H×W float32 RGB in [0, 1].

    Grey images are repeated over the channels, palettes and CMYK converted, the first frame of
    several is taken, and transparent pixels are laid over white. 16-bit and floating-point grey is
    scaled by the range of its type (floats must lie in [0, 1]); Pillow gives 16-bit colour as 8.

    Args:
        source: path, or the file's bytes.
        name: what to call the image in errors; the path by default.
        exif_orientation: turn the image upright as its EXIF tag says. Off by default, because
            boxes refer to the stored pixels; torchvision's ``ImageFolder`` does the same.

    Raises:
        DataError: missing, empty, truncated or undecodable file, or more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    with _decoded(source, name) as image:
        upright = ImageOps.exif_transpose(image) if exif_orientation else image
        pixels = _unit_range(upright)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_mask(source: str | Path | bytes, *, name: str | None = None) -> Tensor:
    """Decode a mask to H×W bool: every pixel that isn't 0 (palette index or any colour) is object.

    Raises:
        DataError: as :func:`load_image`.
    """
    with _decoded(source, name) as image:
        if image.mode in _WITH_ALPHA:
            image = image.convert("L" if image.mode in ("LA", "La") else "RGB")
        values = np.asarray(image)
        mask = (values != 0) if values.ndim == 2 else (values != 0).any(axis=2)
    return torch.from_numpy(mask)


@contextmanager
def _decoded(source: str | Path | bytes, name: str | None) -> Iterator[Image.Image]:
    data = source if isinstance(source, bytes) else read_bytes(Path(source), name)
    name = name or ("image" if isinstance(source, bytes) else os.fspath(source))
    check(data, f"{name}: the file is empty (0 bytes)", DataError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", module="PIL", category=UserWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                yield image
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image that Pillow can read ({len(data)} bytes)") from None
    # On a damaged file Pillow's decoders raise almost anything, from SyntaxError to struct.error.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: cannot decode the image: {reason}") from None


def _unit_range(image: Image.Image) -> npt.NDArray[np.float32]:
    """H×W×3 float32 in [0, 1]."""
    if image.mode.startswith(("I", "F")):  # one channel, wider than 8 bits
        return np.repeat(_wide_grey(image)[:, :, None], 3, axis=2)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        above = image.convert("RGBA")
        white = Image.new("RGBA", above.size, "white")
        image = Image.alpha_composite(white, above)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)


def _wide_grey(image: Image.Image) -> npt.NDArray[np.float32]:
    """H×W float32 in [0, 1]."""
    values = np.asarray(image)
    if image.mode == "F":
        inside = np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
        check(inside, "pixels: expected floating-point ones in [0, 1], got others")
        return values.astype(np.float32)
    # Pillow holds 16-bit grey in 32-bit integers too, so the type alone doesn't tell the range.
    top = 65535 if image.mode != "I" or values.max() <= 65535 else 2**31 - 1
    check(values.min() >= 0, "pixels: expected none below 0, got some")
    return (values.astype(np.float64) / top).astype(np.float32)


def list_images(root: Path, *, without: Path | None = None) -> dict[str, Path]:
    """Every image file under ``root`` by its path relative to it (with ``/``), sorted.

    The folder ``without`` is left out. In the names bytes that aren't UTF-8 are written as
    ``\\xNN``.

    Links to folders are followed, each real folder once; names that start with a dot are passed
    over (macOS leaves ``._*.jpg`` files in archives), as are folders below ``root`` that a run of
    this package wrote.
    """
    images: dict[str, Path] = {}
    seen = set() if without is None else {os.path.realpath(without)}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or (_is_run(files) and Path(folder) != root):
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS:
                path = Path(folder, file)
                images[_name_below(root, path)] = path
    return dict(sorted(images.items()))


def images_at(paths: Sequence[Path], *, without: Path) -> dict[str, Path]:
    """The image files among the paths and in the folders among them, as of :func:`list_images`.

    One file has its own name; several are named by their paths below the folder that holds all.
    What lies in the folder ``without`` is left out, and of several paths the folders of runs.

    Raises:
        FileNotFoundError: there is no such image or folder.
        ValueError: there are no images in one of the folders, or in none.
    """
    files: list[Path] = []
    own = Path(os.path.realpath(without))
    for path in paths:
        if path.is_dir():
            is_own = Path(os.path.realpath(path)).is_relative_to(own) or _is_run(os.listdir(path))
            if is_own and len(paths) > 1:  # a pattern such as * named it
                continue
            inside = list_images(path, without=without).values()
            check(inside, f"{path}: no images in it")
            files += inside
        else:
            check(path.is_file(), f"{path}: no such image or folder", FileNotFoundError)
            files.append(path)
    if len(paths) == 1 and paths[0].is_dir():
        return {_name_below(paths[0], file): file for file in files}
    check(files, f"{paths[0]}: no images but those that a run wrote")
    absolute = [Path(os.path.abspath(file)) for file in files]
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    return {_name_below(root, at): file for at, file in zip(absolute, files, strict=True)}


def _is_run(files: Sequence[str]) -> bool:
    """Whether a folder with these files is that of a run of this package."""
    return {"run.json", "rows.sqlite"} <= set(files)


def _name_below(root: Path, path: Path) -> str:
    relative = os.fsencode(path.relative_to(root).as_posix())
    return relative.decode("utf-8", "backslashreplace")  # valid Unicode


def some_images(root: Path, expected: str, *, without: Path | None = None) -> dict[str, Path]:
    """:func:`list_images`, or ``ValueError`` if there are none."""
    images = list_images(root, without=without)
    check(images, f"{root}: no images; expected {expected}")
    return images
