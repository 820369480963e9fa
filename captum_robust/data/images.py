"""The one place that decodes image files."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from captum_robust._checks import check
from captum_robust._orientation import orientation_of, turned, turned_back
from captum_robust.data.files import limit, read_bytes
from captum_robust.data.sample import DataError

_PNG = b"\x89PNG\r\n\x1a\n"
_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
"""Formats that do not give back the values that were saved, or need not."""
_MEGAPIXELS = 64
"""That an image may have; decoding takes about 35 bytes for each pixel."""
_VOC_VOID = [224, 224, 192]
"""The colour of index 255 in the palette of Pascal VOC's masks: the outline of its objects."""
_VOC_STEPS = np.array([32, 32, 64], dtype=np.uint8)
"""Its colours have these steps in their channels."""
FORMATS = (
    *("JPEG", "MPO", "JPEG2000", "PNG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "TGA", "PPM"),
)
"""The formats that are read, by Pillow's names. Of others Pillow starts a program, such as
Ghostscript for PostScript, whatever the file is called."""


def load_image(
    source: str | Path | bytes, *, name: str | None = None, exif_orientation: bool = True
) -> Tensor:
    """Decode an image to 3×H×W float32 RGB in [0, 1], upright.

    Grey images are repeated over the channels, palettes and CMYK converted, the first frame of
    several is taken, and transparent pixels are laid over white. 16-bit and floating-point grey is
    scaled by the range of the type that its file states (12, 16 or 32 bits, with or without a sign;
    integers of an image of Pillow that has no file are 16-bit ones; floats must lie in [0, 1]).
    Pillow gives 16-bit colour as 8.

    Args:
        source: path, or the file's bytes.
        name: what to call the image in errors; the path by default.
        exif_orientation: turn the image upright as its EXIF tag says, as viewers do; False leaves
            the pixels as they are stored.

    Raises:
        DataError: missing, empty, truncated or undecodable file, or one of none of
            ``captum_robust.data.images.FORMATS``; more than 64 megapixels, or as many as the
            environment variable ``CAPTUM_ROBUST_MAX_MEGAPIXELS`` states, or than
            ``PIL.Image.MAX_IMAGE_PIXELS`` where that is less; more bytes than
            ``captum_robust.data.files.largest``.
    """
    image, orientation = load_oriented(source, name=name)
    return image if exif_orientation else turned_back(image, orientation)


def load_oriented(source: str | Path | bytes, *, name: str | None = None) -> tuple[Tensor, int]:
    """:func:`load_image`, and the EXIF orientation, from 1 to 8, that the pixels are stored in."""
    with _decoded(source, name) as (image, stored, left):
        pixels = _unit_range(image)
    return turned(torch.from_numpy(pixels).permute(2, 0, 1), left), stored


def load_mask(
    source: str | Path | bytes,
    *,
    name: str | None = None,
    exif_orientation: bool = True,
    void: int | None = None,
) -> Tensor:
    """Decode a mask to H×W bool: every pixel that isn't 0 (palette index or any colour) is object.

    In formats that lose detail, such as JPEG, it is every pixel lighter than half of the lightest.
    With a palette that has black elsewhere than at index 0, it is every pixel that isn't black.
    Transparent pixels are background; where all others are black, these are the object.

    Args:
        source, name, exif_orientation: as for :func:`load_image`.
        void: the value of pixels that belong to neither object nor background, which are left out
            of the object. By default 255 in a mask with the palette of Pascal VOC, and its colour
            in one of Pascal VOC's colours; else none.

    Raises:
        DataError: as :func:`load_image`; or a mask in such a format that isn't mostly black and one
            bright colour, as one of class numbers; or a palette of greys without black of which
            index 0 isn't the darkest.
    """
    with _decoded(source, name) as (image, stored, left):
        mask = _object_of(image, void)
    upright = turned(torch.from_numpy(mask), left)
    return upright if exif_orientation else turned_back(upright, stored)


def load_numbers(source: str | Path | bytes, *, name: str | None = None) -> Tensor:
    """Decode an image whose pixels are numbers, such as those of classes, to H×W int64.

    They are the indices of a palette, grey values, or R + 256·G + 65536·B, as they are stored.

    Raises:
        DataError: as :func:`load_image`, or a format that loses detail.
    """
    with _decoded(source, name) as (image, stored, left):
        kind = f"expected a format that keeps numbers, such as PNG, got {image.format}"
        check(image.format not in _LOSSY, kind, DataError)
        is_number = image.mode in ("P", "L") or image.mode.startswith("I")
        values = np.asarray(image if is_number else image.convert("RGB")).astype(np.int64)
    if values.ndim == 3:
        values = values @ np.array([1, 256, 65536])
    return turned_back(turned(torch.from_numpy(values), left), stored)


@contextmanager
def _decoded(
    source: str | Path | bytes, name: str | None
) -> Iterator[tuple[Image.Image, int, int]]:
    """The image, the EXIF orientation of its file, and the one that is left to be heeded.

    The two differ for TIFF, which Pillow turns upright itself.
    """
    data = source if isinstance(source, bytes) else read_bytes(Path(source), name)
    name = name or ("image" if isinstance(source, bytes) else os.fspath(source))
    check(data, f"{name}: the file is empty (0 bytes)", DataError)
    _check_png(data, name)
    try:
        with without_pillow_notes(), opened(io.BytesIO(data)) as image:
            _check_pixels(image)
            stored = orientation_of(image)
            image.load()
            yield image, stored, orientation_of(image)
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image that Pillow can read ({len(data)} bytes)") from None
    except DataError as error:  # of what was decoded
        raise DataError(f"{name}: {error}") from None
    # On a damaged file Pillow's decoders raise almost anything, from SyntaxError to struct.error.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: cannot decode the image: {reason}") from None


@contextmanager
def without_pillow_notes() -> Iterator[None]:
    """Ignore Pillow's warnings of odd files, if this is the main thread.

    The filters belong to the process: threads that put them back in another order than they
    changed them would leave them changed for good.
    """
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module="PIL", category=UserWarning)
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def opened(file: BinaryIO | Path) -> Image.Image:
    """The image, not yet decoded, if it is of one of :data:`FORMATS`."""
    return Image.open(file, formats=[f for f in FORMATS if f in _known_formats()])


@cache
def _known_formats() -> frozenset[str]:
    """Those that this Pillow has a reader for."""
    Image.init()
    return frozenset(Image.OPEN)


def _check_pixels(image: Image.Image) -> None:
    most = limit("CAPTUM_ROBUST_MAX_MEGAPIXELS", _MEGAPIXELS) * 1e6
    if "CAPTUM_ROBUST_MAX_MEGAPIXELS" not in os.environ:
        most = min(most, Image.MAX_IMAGE_PIXELS or most)
    pixels = image.width * image.height
    got = f"expected at most {most / 1e6:g} megapixels, got {pixels / 1e6:g}"
    option = "CAPTUM_ROBUST_MAX_MEGAPIXELS sets the limit"
    check(pixels <= most, f"{got}, which may be a decompression bomb; {option}", DataError)
    if image.format == "TIFF":
        _check_strips(image)


def _check_strips(image: Image.Image) -> None:
    """Refuse a TIFF whose strips or tiles leave pixels out, which Pillow makes black."""
    pixels = image.width * image.height
    parts = {extents for _, extents, *_ in getattr(image, "tile", ())}  # none: decoded already
    there = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in parts)
    message = f"its pixels are damaged: it holds {there} of {pixels}"
    check(not parts or there >= pixels, message, DataError)


def _check_png(data: bytes, name: str) -> None:
    """Refuse a PNG whose pixels don't have the checksum of their chunk, which Pillow ignores."""
    if not data.startswith(_PNG):
        return
    view, start = memoryview(data), len(_PNG)
    while start + 12 <= len(data):  # length, kind, content, checksum
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        chunk, stated = view[start + 4 : end], view[end : end + 4]
        if bytes(chunk[:4]) == b"IDAT":
            damaged = f"{name}: damaged: its pixels don't have the checksum that the PNG states"
            check(zlib.crc32(chunk) == int.from_bytes(stated, "big"), damaged, DataError)
        start = end + 4


def pixels_of(image: Image.Image) -> Tensor:
    """The pixels of an image of Pillow as :func:`load_image` gives them, upright by its EXIF tag.

    Raises:
        DataError: what Pillow cannot decode, or an image without pixels.
    """
    is_program = image.format == "EPS"  # PostScript, which Ghostscript would run
    check(not is_program, "pixels: expected an image, got a program in PostScript", DataError)
    check(min(image.size) > 0, "pixels: expected an image, got one without pixels", DataError)
    if image.format == "TIFF":
        _check_strips(image)
    try:
        image.load()  # opened before, decoded only now
        pixels = _unit_range(image)
    except (OSError, SyntaxError, struct.error) as error:
        raise DataError(f"cannot decode the image: {error}") from None
    upright = turned(torch.from_numpy(pixels).permute(2, 0, 1), orientation_of(image))
    return upright.contiguous()


def _unit_range(image: Image.Image) -> npt.NDArray[np.float32]:
    """H×W×3 float32 in [0, 1]."""
    if image.mode.startswith(("I", "F")):  # one channel, wider than 8 bits
        return np.repeat(_wide_grey(image)[:, :, None], 3, axis=2)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        above = image.convert("RGBA")
        white = Image.new("RGBA", above.size, "white")
        image = Image.alpha_composite(white, above)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)


def _object_of(image: Image.Image, void: int | None) -> npt.NDArray[np.bool_]:
    """H×W: the object of a mask."""
    format = image.format
    if void is None and _transparent_indices(image).any():  # one that isn't 0, the background
        image = image.convert("RGBA")
    if image.mode in _WITH_ALPHA:
        least = 127 if format in _LOSSY else 0
        seen = np.asarray(image.getchannel(len(image.getbands()) - 1)) > least
        image = image.convert("L" if image.mode in ("LA", "La") else "RGB")
        if seen.any() and not seen.all():  # what is transparent is background, whatever its colour
            image.paste(0, mask=Image.fromarray(~seen))
            if not np.asarray(image).any():
                return np.asarray(seen)
    if format in _LOSSY:
        return _bright_object(image, format)
    if image.mode == "P":
        return _palette_object(image, void)
    is_wide = image.mode.startswith(("I", "F"))
    if not is_wide and image.mode not in ("1", "L"):  # of CMYK 0 would be white
        image = image.convert("RGB")
    values: npt.NDArray[Any] = np.asarray(image)
    if _is_white_zero(image):
        values = _wide_grey(image)
    is_object = (values != 0) if void is None else (values != 0) & (values != void)
    if values.ndim == 2:
        return np.asarray(is_object)
    is_object = is_object.any(axis=2)
    return np.asarray(is_object & ~_voc_void(values) if void is None else is_object)


def _transparent_indices(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Those indices of a palette whose pixels are transparent."""
    if image.mode != "P" or "transparency" not in image.info:
        return np.zeros(0, dtype=np.uint8)
    transparent = np.asarray(image.convert("RGBA"))[:, :, 3] == 0
    return np.unique(np.asarray(image)[transparent])


def _bright_object(image: Image.Image, format: str) -> npt.NDArray[np.bool_]:
    """H×W: the object of a mask in a format that loses detail."""
    pixels = _unit_range(image)
    # Of a colour JPEG keeps the luminance of each pixel, the rest of four together.
    light = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    light /= max(light.max(), 1e-6)
    is_object, unclear = light > 0.5, (light > 0.25) & (light < 0.75)
    noise = 1 / 255 if format == "WEBP" else 0  # which it makes of plain black
    is_clear = pixels.max() > 0.5 and 2 * unclear.sum() <= is_object.sum()
    if pixels.max() <= noise:
        return np.zeros(light.shape, dtype=np.bool_)
    expected = f"mask: expected an object of one bright colour on black in a {format} file"
    check(is_clear, f"{expected}, which blurs other values; save it as PNG", DataError)
    return np.asarray(is_object)


def _palette_object(image: Image.Image, void: int | None) -> npt.NDArray[np.bool_]:
    """H×W: the object of a mask with a palette, whose colours may be in any order."""
    indices = np.asarray(image)
    palette = np.asarray(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    if void is None and palette[255:].tolist() == [_VOC_VOID]:
        void = 255
    is_object = (indices != 0) if void is None else (indices != 0) & (indices != void)
    if indices.max() >= len(palette):  # no colours, but numbers
        return np.asarray(is_object)
    colours = palette[indices]
    is_black = ~colours.any(axis=2)
    is_first = 0 in _transparent_indices(image)
    if palette[0].any() and is_black.any() and not is_first:  # programs put colours in any order
        is_object = ~is_black
    used = palette[np.unique(indices)]
    is_grey = (used == used[:, :1]).all()
    expected = "mask: expected black, or index 0 of the palette, for the background"
    is_clear = is_first or is_black.any() or not is_grey or palette[0].max() <= used.min()
    check(is_clear, f"{expected}, got greys of which index 0 isn't the darkest", DataError)
    return np.asarray(is_object & ~_voc_void(colours) if void is None else is_object)


def _voc_void(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """H×W: the outlines of objects, where colours H×W×3 are those of Pascal VOC's masks."""
    void = (colours == _VOC_VOID).all(axis=2)
    is_voc = void.any() and not (colours % _VOC_STEPS).any()
    return np.asarray(void & bool(is_voc and colours[~void].any()))


def _is_white_zero(image: Image.Image) -> bool:
    """Whether 0 stands for white in pixels wider than 8 bits, for which Pillow doesn't turn it."""
    tags = getattr(image, "tag_v2", {})
    is_wide = image.mode.startswith(("I", "F"))
    return is_wide and tags.get(ExifTags.Base.PhotometricInterpretation) == 0


def _wide_grey(image: Image.Image) -> npt.NDArray[np.float32]:
    """H×W float32 in [0, 1]."""
    values = np.asarray(image)
    if image.mode == "F":
        inside = np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
        check(inside, "pixels: expected floating-point ones in [0, 1], got others", DataError)
        light = values.astype(np.float32)
    else:
        bits, is_signed = _integer_type(image)
        if bits == 32 and not is_signed:
            values = values.view(np.uint32)  # Pillow has none
        top = 2 ** (bits - is_signed) - 1
        low, high = int(values.min()), int(values.max())
        expected = f"pixels: expected {bits}-bit ones from 0 to {top}, got {low} to {high}"
        check(low >= 0 and high <= top, expected, DataError)
        light = (values.astype(np.float64) / top).astype(np.float32)
    if _is_white_zero(image):
        light = 1 - light
    if "transparency" in image.info:  # which Pillow heeds for 8 bits only
        light[values == image.info["transparency"]] = 1
    return light


def _integer_type(image: Image.Image) -> tuple[int, bool]:
    """The bits of a grey pixel wider than 8, and whether they have a sign.

    A TIFF says it. All else that Pillow holds in 32-bit integers is 16-bit grey.
    """
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    return bits, tags.get(ExifTags.Base.SampleFormat, (1,))[0] == 2
