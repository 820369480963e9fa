"""Which files of a folder are images, and the names of those that are written for them."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from captum_robust._checks import check, printable, valid_unicode
from captum_robust._files import special_file
from captum_robust.data.files import files_below, is_run
from captum_robust.data.images import opened

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
_LONGEST = 180
"""Bytes of the name of a file to write; most file systems take 255, of which some add a suffix."""


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
            with opened(path):
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
