"""Segmentations of public data sets as concepts: COCO, Pascal VOC, ADE20K, Broden."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, valid_unicode
from captum_robust._orientation import turned
from captum_robust.data import DataError, Sample
from captum_robust.data.annotations import parse_side, table_rows
from captum_robust.data.coco import (
    by_id,
    coco_id,
    corners,
    file_name_of,
    leads_out,
    outlines,
    read_coco,
)
from captum_robust.data.coco_mask import union_mask
from captum_robust.data.files import existing, files_below, lines_of, read_text, stem_of
from captum_robust.data.image_lists import list_images, without_suffix
from captum_robust.data.images import load_numbers
from captum_robust.data.sample import checked_box
from captum_robust.inspection.concepts import (
    BOXES_AS_MASKS,
    Colours,
    Concepts,
    MaskFolders,
    Objects,
    ReadMasks,
    Textures,
    filled,
    stored_size,
    turn_of,
    upright,
)

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
"""Pascal VOC's, whose numbers begin at 1."""
_VOC_VOID = 255
_SEG = "_seg"
"""The end of the name of a segmentation of ADE20K."""
_ADE_MASK = re.compile(r"^instance_\d+_.*\.png$|_(seg|parts_\d+)\.png$")
"""Files of ADE20K that lie beside the images."""
Masks = dict[str, Tensor]


class Segmentations(ReadMasks):
    """Concepts whose masks are read from the annotation of each image.

    An image has the annotation of its path below the folder of images, without the suffix; or else
    that of its file's name, if there is one only. Masks are turned upright with their image by
    :func:`captum_robust.inspection.concepts.turn_of`.

    Args:
        annotations: paths of images without their suffix, and what is known of each.
        masks_of: what makes masks of it, by the names of their concepts, and of the sample.
        names: all concepts, as far as they are known before.
        categories: the category of each name, where there are several.
        is_mask: whether a file is a segmentation itself, which in some sets lie among the images.
    """

    def __init__(
        self,
        annotations: Iterable[tuple[str, Any]],
        masks_of: Callable[[Any, Sample], Masks],
        names: Sequence[str] = (),
        categories: Mapping[str, str] | None = None,
        is_mask: Callable[[Path], bool] = lambda _: False,
    ) -> None:
        self.names, self.categories = names, categories or {}
        self._is_mask = is_mask
        self._masks_of = masks_of
        self._by_path: dict[str, list[tuple[str, Any]]] = {}
        self._by_name: dict[str, list[tuple[str, Any]]] = {}
        for path, own in annotations:
            self._by_path.setdefault(path, []).append((path, own))
            self._by_name.setdefault(path.rpartition("/")[2], []).append((path, own))

    def read(self, sample: Sample) -> Masks | None:
        """The masks of the image; None where it has no annotation."""
        is_image = not sample.source or not self._is_mask(Path(os.path.realpath(sample.source)))
        check(is_image, f"{sample.source}: a segmentation, not an image", DataError)
        path = without_suffix(sample.id)
        found = self._by_path.get(path) or self._by_name.get(path.rpartition("/")[2], [])
        paths = ", ".join(path for path, _ in found[:3])
        several = f"{sample.id}: several annotations have its name: {paths}"
        check(len(found) < 2, several, DataError)
        if not found:
            return None
        self.say_of_turned(sample)
        return self._masks_of(found[0][1], sample)


def _within(*folders: Path) -> Callable[[Path], bool]:
    """Whether a file, without links, lies in one of the folders."""
    real = [Path(os.path.realpath(folder)) for folder in folders]
    return lambda file: any(folder in file.parents for folder in real)


def _add(masks: Masks, name: str, mask: Tensor) -> None:
    """Put the mask to those of its name."""
    masks[name] = masks[name] | mask if name in masks else mask


def _inside(folder: Path, name: str, where: str) -> Path:
    """The file of a name in the folder; ``DataError`` where it leads out of it."""
    expected = f"{where}: expected a file in {folder}, got {name!r}"
    check(name and not leads_out(name), expected, DataError)
    return folder / name


def coco(path: str | Path) -> Segmentations:
    """The categories of COCO's instances, or of its panoptic segmentation.

    Of instances crowds count too, and where one has no segmentation its box is filled. The PNGs of
    a panoptic segmentation, whose pixels are R + 256·G + 65536·B, are in the folder that has the
    name of the file, beside it or beside the folder that it is in; 0 is no segment.

    Raises:
        FileNotFoundError: there is no such file, or no such folder.
        ValueError: it is not in COCO's format.
    """
    path = existing(path, "file", "COCO's annotations")
    content = read_coco(path)
    categories = by_id(content, "categories", path)
    names = {id: valid_unicode(str(each["name"])) for id, each in categories.items()}
    images = by_id(content, "images", path)
    is_panoptic = any("segments_info" in each for each in content["annotations"])
    places = [path.with_suffix(""), path.absolute().parent.with_name(path.stem)]
    folder = next((place for place in places if place.is_dir()), places[0])
    if is_panoptic:
        existing(folder, "folder", f"the PNGs of {path.name}")
    # An image without an object is annotated too: it has none.
    grouped: dict[Any, list[dict[str, Any]]] = {} if is_panoptic else {id: [] for id in images}
    for each in content["annotations"]:
        grouped.setdefault(coco_id(each.get("image_id")), []).append(each)
    annotations = [
        (valid_unicode(without_suffix(file_name_of(images[id]))), (images[id], own))
        for id, own in grouped.items()
        if id in images
    ]
    source: Segmentations

    def name_of(each: Mapping[str, Any], where: str) -> str:
        id = coco_id(each.get("category_id"))
        check(id in names, f"{where}: category_id {id!r} is none of the file's", DataError)
        return names[id]

    def instances(given: Any, sample: Sample) -> Masks:
        image, own = given
        at = f"{path}: image {sample.id}"
        size = parse_side(image.get("height"), at), parse_side(image.get("width"), at)
        size = size if all(size) else stored_size(sample)
        turn = turn_of(size, sample, at, "annotates an image of")
        masks: Masks = {}
        for each in own:
            where = f"{path}: annotation {coco_id(each.get('id'))}"
            name, outline = name_of(each, where), outlines(each.get("segmentation"))
            if outline:
                try:
                    _add(masks, name, union_mask([outline], size))
                except ValueError as error:
                    raise DataError(f"{where}: segmentation: {error}") from None
            else:
                box = checked_box(corners(each, where), size, f"{where}: box")
                _add(masks, name, filled([box], size))
                source.say(BOXES_AS_MASKS)
        return {name: turned(mask, turn) for name, mask in masks.items()}

    def panoptic(given: Any, sample: Sample) -> Masks:
        _, own = given
        masks: Masks = {}
        for each in own:
            file = _inside(folder, file_name_of(each), str(path))
            numbers = upright(load_numbers(file), sample, file)
            listed = each.get("segments_info")
            is_list = isinstance(listed, list) and all(isinstance(s, dict) for s in listed)
            check(is_list, f"{path}: image {sample.id}: expected a list of segments", DataError)
            segments = {coco_id(s.get("id")): s for s in listed or ()}
            for number in torch.unique(numbers).tolist():
                if number == 0:
                    continue
                known = f"{file}: segment {number} is not listed in {path.name}"
                check(number in segments, known, DataError)
                name = name_of(segments[number], f"{path}: segment {number}")
                _add(masks, name, numbers == number)
        return masks

    every = list(dict.fromkeys(names.values()))
    if is_panoptic:
        source = Segmentations(annotations, panoptic, every, is_mask=_within(folder))
    else:
        source = Segmentations(annotations, instances, every)
    return source


def voc(root: str | Path) -> Segmentations:
    """The 20 classes of Pascal VOC's ``SegmentationClass``, whose index 255 is no object."""
    folder = existing(Path(root) / "SegmentationClass", "folder", "Pascal VOC's segmentations")
    names = dict(enumerate(VOC_CLASSES, start=1))
    others = folder.with_name("SegmentationObject")
    return _numbered(folder, names, (0, _VOC_VOID), _within(folder, others))


def ade_scenes(root: str | Path) -> Segmentations:
    """The 150 classes of ADE20K's scene parsing: ``objectInfo150.txt`` and ``annotations``.

    A class is called by the first of its names, or by all where two begin alike. 0 is none.
    """
    table = existing(Path(root) / "objectInfo150.txt", "file", "the names of ADE20K's classes")
    rows = [line.split("\t") for line in lines_of(read_text(table)) if line.strip()]
    columns = [cell.strip().casefold() for cell in next(iter(rows), [])]
    check({"idx", "name"} <= set(columns), f"{table}:1: expected the columns Idx and Name")
    number, name = columns.index("idx"), columns.index("name")
    names = {}
    for line, cells in enumerate(rows[1:], start=2):
        is_row = len(cells) > max(number, name) and cells[number].strip().isdecimal()
        check(is_row, f"{table}:{line}: expected a number and a name, separated by tabs")
        names[int(cells[number])] = cells[name].strip()
    folder = existing(Path(root) / "annotations", "folder", "the annotations of ADE20K")
    return _numbered(folder, _first_names(names), (0,), _within(folder))


def _numbered(
    folder: Path,
    names: Mapping[int, str],
    ignored: Sequence[int],
    is_mask: Callable[[Path], bool],
) -> Segmentations:
    """A folder of pictures whose pixels are the numbers of classes."""
    files = [(without_suffix(name), path) for name, path in list_images(folder).items()]
    check(files, f"concepts: {folder} has no segmentations")

    def masks_of(path: Path, sample: Sample) -> Masks:
        numbers = upright(load_numbers(path), sample, path)
        masks = {}
        for number in torch.unique(numbers).tolist():
            if number not in ignored:
                known = f"{path}: expected class numbers up to {max(names)}, got {number}"
                hint = "; is it in colours, not in grey or with a palette?" if number > 255 else ""
                check(number in names, known + hint, DataError)
                masks[names[number]] = numbers == number
        return masks

    return Segmentations(files, masks_of, list(names.values()), is_mask=is_mask)


def _first_names(names: Mapping[int, str]) -> dict[int, str]:
    """The first of the names, separated by commas, that each class has, where no other has it."""
    first = {number: name.partition(",")[0].strip() for number, name in names.items()}
    counts = Counter(first.values())
    return {n: name if counts[name] == 1 else names[n] for n, name in first.items()}


def ade_full(root: str | Path) -> Segmentations:
    """The objects of the full ADE20K, of 2016 to 2021, whose files end in ``_seg.png``.

    The class of a pixel is R // 10 · 256 + G, and its name that of ``index_ade20k.mat`` in the
    folder or one above it, or else that of the JSON file beside the image.

    Raises:
        ImportError: there is an ``index_ade20k.mat``, but SciPy is missing.
        ValueError: there are no segmentations.
    """
    root = existing(root, "folder", "ADE20K")
    files = [
        (valid_unicode(path.relative_to(root).with_suffix("").as_posix().removesuffix(_SEG)), path)
        for path in files_below(root)
        if path.stem.endswith(_SEG) and path.suffix.lower() == ".png"
    ]
    check(files, f"concepts: {root} has no files that end in {_SEG}.png")
    is_inside = _within(root)
    places = [root, *root.absolute().parents][:4]
    index = next(
        (p / "index_ade20k.mat" for p in places if (p / "index_ade20k.mat").is_file()), None
    )
    known = {} if index is None else _mat_names(index)

    def masks_of(path: Path, sample: Sample) -> Masks:
        channels = upright(load_numbers(path), sample, path)
        numbers = channels % 256 // 10 * 256 + channels // 256 % 256
        names = known or _json_names(path.with_name(f"{path.stem.removesuffix(_SEG)}.json"))
        masks: Masks = {}
        for number in torch.unique(numbers).tolist():
            if number:
                check(number in names, f"{path}: class {number} has no name", DataError)
                _add(masks, names[number], numbers == number)
        return masks

    names = list(dict.fromkeys(known.values()))
    is_mask = lambda file: bool(_ADE_MASK.search(file.name)) and is_inside(file)  # noqa: E731
    return Segmentations(files, masks_of, names, is_mask=is_mask)


def _mat_names(path: Path) -> dict[int, str]:
    """The names of ADE20K's classes, from 1 on."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        index = loadmat(path, squeeze_me=True, variable_names=["index"])["index"]
        names = [str(name) for name in index["objectnames"].item()]
    except (KeyError, ValueError, TypeError, NotImplementedError, MatReadError, OSError) as error:
        raise ValueError(f"{path}: expected ADE20K's index with objectnames ({error})") from None
    return _first_names(dict(enumerate(names, start=1)))


def _json_names(path: Path) -> dict[int, str]:
    """The names of the classes in an image, by the file that ADE20K has of it since 2020."""
    try:
        # Some of its texts are in Latin-1.
        objects = json.loads(read_text(path, "replace"))["annotation"]["object"]
        return {int(each["name_ndx"]): str(each["name"]).partition(",")[0] for each in objects}
    except FileNotFoundError:
        expected = "no such file; expected it for the names of classes, or index_ade20k.mat"
        raise DataError(f"{path}: {expected}") from None
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: expected the objects of ADE20K, with name_ndx ({error})"
        ) from None


def broden(root: str | Path) -> Segmentations:
    """The concepts of Broden, the set of Network Dissection: ``index.csv`` and ``label.csv``.

    Each category, such as colour or texture, has maps of labels, R + 256·G, or labels of the whole
    image; several are separated by semicolons. For the concepts of a category those images count
    that have one of it, as in the paper. Where a label is in several categories, its name says
    which one it is. The maps are as large as ``index.csv`` says (sh, sw), which may be less than
    the image (ih, iw).
    """
    root = Path(root)
    labels = _table(root / "label.csv", ("number", "name", "category"))
    index = _table(root / "index.csv", ("image", "ih", "iw", "sh", "sw"))
    fixed = ("image", "split", "ih", "iw", "sh", "sw")
    kinds = [column for column in index[0][1] if column and column not in fixed]
    named: dict[tuple[str, int], str] = {}
    for where, row in labels:
        check(row["number"].isdecimal(), f"{where}: expected a number, got {row['number']!r}")
        own = [part.partition("(")[0] for part in row["category"].split(";")]
        for kind in own:
            name = row["name"] if len(own) == 1 else f"{row['name']} ({kind})"
            is_new = named.setdefault((kind, int(row["number"])), name) == name
            check(is_new, f"{where}: gives the number {row['number']} of {kind} to another label")
    double = Counter(named.values())
    named = {key: n if double[n] == 1 else f"{n} ({key[0]}, {key[1]})" for key, n in named.items()}

    def masks_of(given: tuple[str, dict[str, str]], sample: Sample) -> Masks:
        where, row = given
        image, size = ((parse_side(row[a], where), parse_side(row[b], where)) for a, b in _SIDES)
        turn = turn_of(image, sample, where, "annotates an image of")
        check(all(size), f"{where}: expected the size of its maps in sh and sw", DataError)
        masks: Masks = {}
        for kind in kinds:
            for part in filter(None, row[kind].split(";")):
                for number, mask in _broden_part(root, part, size, where).items():
                    is_known = (kind, number) in named
                    check(is_known, f"{where}: label {number} is none of {kind}", DataError)
                    _add(masks, named[kind, number], mask)
        return {name: turned(mask, turn) for name, mask in masks.items()}

    annotations = [(without_suffix(row["image"]), (where, row)) for where, row in index]
    categories = {name: kind for (kind, _), name in named.items() if kind in kinds}
    folder = Path(os.path.realpath(root / "images"))
    maps = {
        str(folder / part) for _, row in index for kind in kinds for part in row[kind].split(";")
    }
    is_mask = lambda file: str(file) in maps  # noqa: E731
    return Segmentations(annotations, masks_of, list(categories), categories, is_mask)


_SIDES = (("ih", "iw"), ("sh", "sw"))


def _broden_part(root: Path, part: str, size: tuple[int, int], where: str) -> dict[int, Tensor]:
    """The masks of labels, by one cell's part: a number for the whole image, or a file."""
    if part.isdecimal():
        return {int(part): torch.ones(size, dtype=torch.bool)}
    file = _inside(root / "images", part, where)
    numbers = load_numbers(file) % 2**16
    sides = f"{where}: {part} has {numbers.shape[1]}×{numbers.shape[0]} pixels"
    check(tuple(numbers.shape) == size, f"{sides}, expected {size[1]}×{size[0]}", DataError)
    return {n: numbers == n for n in torch.unique(numbers).tolist() if n}


def _table(path: Path, needed: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file with their places, file:line."""
    lines = lines_of(read_text(existing(path, "file", "Broden's table")), with_ends=True)
    (_, header), *rows = table_rows(lines) or [(1, [])]
    missing = [name for name in needed if name not in header]
    check(not missing, f"{path}:1: expected the columns {', '.join(needed)}")
    padded = [(n, cells + [""] * (len(header) - len(cells))) for n, cells in rows if any(cells)]
    check(padded, f"{path}: no rows")
    return [(f"{path}:{n}", dict(zip(header, cells, strict=False))) for n, cells in padded]


def _folder_of(path: Path) -> Concepts:
    """The concepts of a folder, by what lies in it."""
    if (path / "index.csv").is_file() and (path / "label.csv").is_file():
        return broden(path)
    if (path / "SegmentationClass").is_dir():
        return voc(path)
    if (path / "objectInfo150.txt").is_file():
        return ade_scenes(path)
    if any(stem_of(file.name).endswith(_SEG) for file in files_below(path)):
        return ade_full(path)
    return MaskFolders(path)


_NAMED: dict[str, Callable[[], Concepts]] = {"colours": Colours, "textures": Textures}


def concepts_of(given: Any, class_names: Sequence[str] | None) -> Concepts:
    """The concepts of a name (``"colours"``, ``"textures"``, ``"objects"``) or of files.

    Raises:
        ValueError: another name, or files that are none of those of :func:`dissect`.
        FileNotFoundError: a file or folder is missing.
        TypeError: what is neither.
    """
    if isinstance(given, Mapping):
        return MaskFolders(given)
    if isinstance(given, str) and given in _NAMED:
        return _NAMED[given]()
    if isinstance(given, str) and given == "objects":
        return Objects(class_names)
    if isinstance(given, (str, Path)):
        path = Path(given)
        if path.suffix.lower() == ".json":
            return coco(path)
        known = "concepts: expected one of colours, textures, objects, or a file or folder of masks"
        check(isinstance(given, Path) or path.is_dir(), f"{known}, got {str(given)!r}")
        return _folder_of(existing(path, "folder", "a folder of masks"))
    is_one = hasattr(given, "masks") and hasattr(given, "read")
    expected = "concepts: expected 'colours', 'textures', 'objects' or files of masks"
    check(is_one, f"{expected}, got {type(given).__name__}", TypeError)
    return given  # type: ignore[no-any-return]
