"""The one place that decodes image files."""

from __future__ import annotations

import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from captum_robust._checks import check, printable, valid_unicode
from captum_robust._files import special_file
from captum_robust.data.files import files_below, is_run, limit, read_bytes
from captum_robust.data.orientation import turned, turned_back
from captum_robust.data.sample import DataError

_DAMAGED_EXIF = (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error)
"""What Pillow raises on EXIF data that cannot be read; the pixels may be whole all the same."""
_PNG = b"\x89PNG\r\n\x1a\n"
_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".jpx", ".png", ".apng", ".gif", ".webp"),
    *(".avif", ".bmp", ".dib", ".tif", ".tiff", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Suffixes of the files that a folder listing takes for images, in lower case. Files of another
name are images if Pillow knows them by their first bytes."""
COMPANIONS = (
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf"),
    *(".npy", ".npz", ".mat", ".db", ".sqlite", ".ini", ".log", ".py", ".zip", ".gz", ".tar"),
    *(".safetensors", ".pt", ".pth"),
)
"""Suffixes of files that lie beside images and are none, in lower case."""
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
"""Formats that do not give back the values that were saved, or need not."""
_MEGAPIXELS = 64
"""That an image may have; decoding takes about 35 bytes for each pixel."""
_LONGEST = 180
"""Bytes of the name of a file to write; most file systems take 255, of which some add a suffix."""
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
        DataError: missing, empty, truncated or undecodable file, or one of none of :data:`FORMATS`;
            more than 64 megapixels, or as many as the environment variable
            ``CAPTUM_ROBUST_MAX_MEGAPIXELS`` states, or than ``PIL.Image.MAX_IMAGE_PIXELS`` where
            that is less; more bytes than :func:`captum_robust.data.files.largest`.
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
        with without_pillow_notes(), _opened(io.BytesIO(data)) as image:
            _check_pixels(image)
            stored = _orientation(image)
            image.load()
            yield image, stored, _orientation(image)
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


def _opened(file: BinaryIO | Path) -> Image.Image:
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
        DataError: what Pillow cannot decode.
    """
    is_program = image.format == "EPS"  # PostScript, which Ghostscript would run
    check(not is_program, "pixels: expected an image, got a program in PostScript", DataError)
    try:
        image.load()  # opened before, decoded only now
        pixels = _unit_range(image)
    except (OSError, SyntaxError, struct.error) as error:
        raise DataError(f"cannot decode the image: {error}") from None
    upright = turned(torch.from_numpy(pixels).permute(2, 0, 1), _orientation(image))
    return upright.contiguous()


def _orientation(image: Image.Image) -> int:
    """EXIF's, from 1 to 8; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED_EXIF:
        return 1
    return int(value) if value in range(1, 9) else 1


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


def list_images(root: Path, *, without: Path | None = None) -> dict[str, Path]:
    """Every image file under ``root`` by its path relative to it (with ``/``), sorted.

    Files are those of :func:`captum_robust.data.files.files_below`. A warning counts those that are
    neither images nor :data:`COMPANIONS` by their suffix. The names are
    :func:`captum_robust._checks.valid_unicode`.
    """
    images: dict[str, Path] = {}
    others: Counter[str] = Counter()
    for path in files_below(root, without=without):
        if _is_image(path):
            images[_name_below(root, path)] = path
        elif path.suffix.lower() not in COMPANIONS:
            others[path.suffix.lower() or "without suffix"] += 1
    if others:
        counts = [f"{count} {suffix}" for suffix, count in others.most_common()]
        more = ["…"] if len(counts) > 5 else []
        kinds = ", ".join(counts[:5] + more)
        left_out = f"{root}: files left out, as Pillow sees no image in them: {kinds}"
        warnings.warn(printable(left_out), stacklevel=2)
    return dict(sorted(images.items()))


def _is_image(path: Path) -> bool:
    """By its suffix, or else by its first bytes."""
    suffix = path.suffix.lower()
    if suffix in EXTENSIONS or suffix in COMPANIONS:
        return suffix in EXTENSIONS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not path.is_file():  # a pipe would be waited for
                return False
            with _opened(path):
                return True
    except Image.DecompressionBombError:  # which is said when it is loaded
        return True
    except (OSError, ValueError):
        return False


def without_suffix(name: str) -> str:
    """The path without the suffix of an image file; others belong to the name.

    >>> without_suffix("a/1.jpg"), without_suffix("a/frame.0001")
    ('a/1', 'a/frame.0001')
    """
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    is_known = suffix in EXTENSIONS or suffix in Image.registered_extensions()
    return str(path.with_suffix("")) if is_known else name


def png_names(ids: Sequence[str]) -> list[str]:
    """File names for the images, each once also where case does not count, inside their folder.

    >>> png_names(["a/1.jpg", "a/1.png", "b.JPEG", "../../etc/x"])
    ['a/1.jpg.png', 'a/1.png.png', 'b.png', 'etc/x.png']
    """
    safe = [safe_name(name) for name in ids]
    stems = [without_suffix(name) for name in safe]
    times = Counter(stem.casefold() for stem in stems)
    pairs = zip(stems, safe, strict=True)
    for names in [s if times[s.casefold()] == 1 else name for s, name in pairs], safe:
        taken = {name.casefold() for name in names}
        above = {str(folder).casefold() for n in names for folder in PurePosixPath(n).parents}
        if above & {f"{name}.png" for name in taken}:
            break
        if len(taken) == len(names):
            return [f"{name}.png" for name in names]
    return [f"{i}-{PurePosixPath(name).name}.png" for i, name in enumerate(safe)]


def safe_name(name: str) -> str:
    """A relative path without anything that leads elsewhere or that a file system refuses.

    Folders end in "/"; a backslash is part of a name, as in that of a file that is not UTF-8.
    """
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    kept = []
    for part in parts:
        part = re.sub(r'[\x00-\x1f\x7f<>:"|?*\\]', "_", part)
        part = re.sub(r"^\.|[. ]$", "_", part)
        if len(part.encode("utf-8", "replace")) > _LONGEST:
            part = part.encode("utf-8", "replace")[:_LONGEST].decode("utf-8", "ignore")
        kept.append(part)
    return "/".join(kept) or "image"


def images_at(paths: Sequence[Path], *, without: Path) -> dict[str, Path]:
    """The image files among the paths and in the folders among them, as of :func:`list_images`.

    One file has its own name; several are named by their paths below the folder that holds all.
    What lies in the folder ``without`` is left out, and of several paths the folders of runs.

    Raises:
        FileNotFoundError: there is no such image or folder.
        ValueError: there are no images in one of the folders, or in none; the only folder is
            ``without``.
    """
    files: list[Path] = []
    own = Path(os.path.realpath(without))
    for path in paths:
        if path.is_dir():
            is_own = Path(os.path.realpath(path)).is_relative_to(own) or is_run(os.listdir(path))
            if is_own and len(paths) > 1:  # a pattern such as * named it
                continue
            inside = list_images(path, without=without).values()
            is_out = not inside and is_own and bool(list_images(path))
            own_images = f"out: {path} is the folder of the images, of which results would be some"
            check(not is_out, f"{own_images}; give another")
            check(inside, f"{path}: no images in it")
            files += inside
        else:
            what = special_file(path) or "no such image or folder"
            check(path.is_file(), f"{path}: {what}", FileNotFoundError)
            files.append(path)
    if len(paths) == 1 and paths[0].is_dir():
        return {_name_below(paths[0], file): file for file in files}
    check(files, f"{paths[0]}: no images but those that a run wrote or in {without}")
    absolute = [Path(os.path.abspath(file)) for file in files]
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    return {_name_below(root, at): file for at, file in zip(absolute, files, strict=True)}


def _name_below(root: Path, path: Path) -> str:
    return valid_unicode(path.relative_to(root).as_posix())


def some_images(root: Path, expected: str, *, without: Path | None = None) -> dict[str, Path]:
    """:func:`list_images`, or ``ValueError`` if there are none."""
    images = list_images(root, without=without)
    check(images, f"{root}: no images; expected {expected}")
    return images
