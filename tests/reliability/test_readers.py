"""Every reader of files, on damaged ones: a right value or a named error, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from captum_robust.cli.model_options import class_names
from captum_robust.data.annotations import check_size, checked_boxes, parse_box
from captum_robust.data.classes import ClassIndex
from captum_robust.data.coco import corners
from captum_robust.data.coco_mask import union_mask
from captum_robust.data.folder import _read_table
from captum_robust.data.imagenet import _parse_solution, _read_solution
from captum_robust.data.images import FORMATS, load_image, load_mask
from captum_robust.data.voc_xml import parse_voc_xml
from captum_robust.show.video_files import VideoSource

from . import data_sets
from .damage import damaged, damaged_text, damaged_value, read, tries_in_child
from .data_sets import SIZE, WNIDS, image_file

TryOften = Callable[..., None]
XML = data_sets.XML.format("cat", "dog")
ENCODINGS = (
    *("utf-7", "idna", "punycode", "rot13", "hex", "zlib", "utf-16", "utf-32", "latin-1", "gbk"),
    *("unicode_escape", "raw_unicode_escape", "cp037", "shift_jis", "../x", "mbcs", "undefined"),
)


def odd_xml(rng: random.Random) -> bytes:
    """XML that declares another encoding, nests, or has entities; or is damaged as text is."""
    kind = rng.randrange(12)
    if kind == 0:
        return XML.replace("utf-8", rng.choice(ENCODINGS)).encode()
    if kind == 1:
        encoding = rng.choice(ENCODINGS[6:10])
        return XML.replace("utf-8", encoding).encode(encoding, "replace")
    if kind == 2:
        depth = rng.choice((10, 63, 64, 65, 3000))
        return XML.replace("<object>", "<a>" * depth + "</a>" * depth + "<object>", 1).encode()
    if kind == 3:
        entity = '<!DOCTYPE a [<!ENTITY x SYSTEM "/etc/passwd"><!ENTITY y "&x;&x;">]><annotation>'
        return XML.replace("<annotation>", entity).replace("café", "&y;").encode()
    return damaged_text(XML, rng)


def test_voc_xml(try_often: TryOften) -> None:
    def one(rng: random.Random) -> None:
        annotation = read(lambda: parse_voc_xml(odd_xml(rng), "a.xml"), "a.xml")
        if annotation is not None:
            boxes = [(each.box, each.where) for each in annotation.objects]
            read(lambda: check_size(annotation.size, SIZE, "a.xml"), "a.xml")
            check_boxes(read(lambda: checked_boxes(boxes, SIZE), "a.xml:"))

    try_often("VOC XML, parsed", tries_in_child(one, 2000), quick=1, long=300)


def check_boxes(boxes: torch.Tensor | None) -> None:
    """Inside the image, with an area."""
    for x0, y0, x1, y1 in [] if boxes is None else boxes.tolist():
        assert 0 <= x0 < x1 <= SIZE[1]
        assert 0 <= y0 < y1 <= SIZE[0]


def test_run_length_codes(try_often: TryOften) -> None:
    """What is accepted is what pycocotools makes of it."""
    coco = pytest.importorskip("pycocotools.mask")
    masks = np.random.default_rng(0).random((50, *SIZE)) < 0.5
    texts = [coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"] for mask in masks]
    lists = [[int(n) for n in np.diff(changes(mask))] for mask in masks]

    def one(rng: random.Random) -> None:
        counts: Any = rng.choice(lists)
        if rng.random() < 0.6:
            counts = damaged(rng.choice(texts), rng).decode("latin-1")
        elif rng.random() < 0.9:
            counts = damaged_value(counts, rng)
        code = {"size": list(SIZE), "counts": counts}
        if rng.random() < 0.05:
            code = damaged_value(code, rng)
        mask = read(lambda: union_mask([code], SIZE), "run length", "run-length", "polygon")
        if mask is None:
            return
        counts = code["counts"]
        if isinstance(counts, list):
            counts = coco.frPyObjects({"size": list(SIZE), "counts": [*map(int, counts)]}, *SIZE)
            counts = counts["counts"].decode()
        theirs = coco.decode({"size": list(SIZE), "counts": counts.encode()})
        assert mask.equal(torch.from_numpy(theirs).bool()), code

    try_often("COCO run-length codes", tries_in_child(one, 4000), quick=1, long=375)


def changes(mask: np.ndarray[Any, Any]) -> list[int]:
    """Where the runs of a mask begin, down its columns, and where the last one ends."""
    flat = mask.T.ravel()
    inner = (np.flatnonzero(np.diff(flat)) + 1).tolist()
    return [0, *([0] if flat[0] else []), *inner, flat.size]


def test_polygons(try_often: TryOften) -> None:
    """What is accepted is what pycocotools makes of it, where that does not crash of it."""
    coco = pytest.importorskip("pycocotools.mask")

    def one(rng: random.Random) -> None:
        points: Any = [rng.uniform(-4, 20) for _ in range(rng.choice((6, 8, 12, 40)))]
        far = rng.choice((1e3, 1e5, 1e9, 1e300))
        odd = rng.random() < 0.5
        if odd:
            points = damaged_value(points, rng) if rng.random() < 0.5 else [far * p for p in points]
        mask = read(lambda: union_mask([[points]], SIZE), "polygon")
        assert mask is None or mask.shape == SIZE
        if not odd:
            theirs = coco.decode(coco.merge(coco.frPyObjects([points], *SIZE)))
            assert mask is not None
            assert mask.equal(torch.from_numpy(theirs).bool()), points

    try_often("COCO polygons", tries_in_child(one, 2000), quick=1, long=50)


def test_boxes(try_often: TryOften) -> None:
    def one(rng: random.Random) -> None:
        annotation = damaged_value({"bbox": [1, 2, 8, 9]}, rng)
        box = read(lambda: corners(annotation, "a.json: annotation 1"), "a.json")
        if box is not None:
            check_boxes(read(lambda: checked_boxes([(box, "a.json")], SIZE), "a.json"))

    try_often("COCO boxes", tries_in_child(one, 4000), quick=1, long=100)


def test_box_tables(try_often: TryOften, in_memory: Path) -> None:
    """CSV files of boxes in a folder of images."""
    path = in_memory / "boxes.csv"

    def one(rng: random.Random) -> None:
        path.write_bytes(damaged_text(data_sets.CSV, rng))
        for row in read(lambda: _read_table(path), str(path)) or []:
            box = read(lambda row=row: parse_box(row.corners, row.where), str(path))
            if box is not None:
                check_boxes(read(lambda box=box: checked_boxes([(box, "a:1")], SIZE), "a:1"))

    try_often("CSV files of boxes", tries_in_child(one, 2000), quick=1, long=75)


def test_solutions(try_often: TryOften, in_memory: Path) -> None:
    """LOC_val_solution.csv of ImageNet."""
    path = in_memory / "LOC_val_solution.csv"
    lines = [f"{name},{WNIDS[0]} 2 3 9 11 {WNIDS[1]} 0 0 16 12\n" for name in "abc"]
    text = f"ImageId,PredictionString\n{''.join(lines)}"

    def one(rng: random.Random) -> None:
        path.write_bytes(damaged_text(text, rng))
        for line, where in (read(lambda: _read_solution(path), str(path)) or {}).values():
            objects = read(lambda line=line, at=where: _parse_solution(line, at), str(path))
            boxes = [(each.box, where) for each in objects or []]
            check_boxes(read(lambda boxes=boxes: checked_boxes(boxes, SIZE), str(path)))

    try_often("LOC CSV files", tries_in_child(one, 2000), quick=1, long=150)


def test_lists_of_classes(try_often: TryOften, in_memory: Path) -> None:
    """What ``--classes`` names: no name is lost to a separator in another."""
    path = in_memory / "names.txt"
    names = ["tabby cat", "dog", "caf\u00e9", "a\u2028b", "c\x85d"]

    def one(rng: random.Random) -> None:
        path.write_bytes(damaged_text("\n".join(names), rng))
        found = read(lambda: class_names(str(path)), str(path))
        index = None if found is None else read(lambda: ClassIndex(found)("dog"), "class")
        assert index is None or found[index].strip().casefold() == "dog"

    try_often("lists of classes", tries_in_child(one, 2000), quick=1, long=200)


LARGE = {
    "digits": lambda n: XML.replace("<xmin>2<", f"<xmin>{'9' * n}<").encode(),
    "a name": lambda n: XML.replace("cat", "c" * n).encode(),
    "an encoding": lambda n: XML.replace("utf-8", "u" * n).encode(),
    "levels": lambda n: XML.replace("<object>", "<a>" * (n // 3), 1).encode(),
    "parts": lambda n: XML.replace("<object>", "<part/>" * (n // 7) + "<object>", 1).encode(),
    "an entity": lambda n: f"<!DOCTYPE a [<!ENTITY {'e' * n} 'x'>]>{XML[38:]}".encode(),
}


@pytest.mark.parametrize("what", LARGE)
def test_large_xml(what: str, try_often: TryOften) -> None:
    def one(rng: random.Random) -> None:
        data = LARGE[what](rng.randrange(3_000_000))
        annotation = read(lambda: parse_voc_xml(data, "a.xml"), "a.xml")
        for each in annotation.objects if annotation else []:
            check_boxes(read(lambda each=each: checked_boxes([(each.box, "a:1")], SIZE), "a:1"))

    try_often(f"large XML: {what}", tries_in_child(one, 1), quick=1, long=10)


def test_large_segmentations(try_often: TryOften) -> None:
    def one(rng: random.Random) -> None:
        n = rng.randrange(1, 500_000)
        numbers = [rng.choice((0, 1, -1e9, 1e9, 7.5, 3)) for _ in range(n)]
        odd = [[numbers], [numbers[:8]] * (n // 200), {"size": [12, 16], "counts": numbers}]
        odd += [{"size": [12, 16], "counts": "0" * n + rng.choice("0o?")}]
        mask = read(lambda: union_mask([rng.choice(odd)], SIZE), "polygon", "run length")
        assert mask is None or mask.shape == SIZE

    try_often("large segmentations", tries_in_child(one, 2), quick=1, long=20)


def test_videos(try_often: TryOften, in_memory: Path) -> None:
    path = in_memory / "own.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 24))
    for i in range(5):
        writer.write(np.full((24, 32, 3), 40 * i, dtype=np.uint8))
    writer.release()
    data = path.read_bytes()

    def one(rng: random.Random) -> None:
        path.write_bytes(damaged(data, rng))
        source = read(lambda: VideoSource(path, 10), str(path))
        for frame in source.read((16, 16)) if source else []:
            assert frame.image.shape == (16, 16, 3)
            assert 0 <= frame.seconds < 1e6

    try_often("videos", tries_in_child(one, 20), quick=1, long=50)


@pytest.mark.parametrize("format", FORMATS)
def test_images(format: str, try_often: TryOften) -> None:
    modes = ("RGB", "L") if format not in ("MPO", "AVIF") else ("RGB",)
    files = [image_file(format, mode) for mode in modes]

    def one(rng: random.Random) -> None:
        data = damaged(rng.choice(files), rng)
        load = rng.choice((load_image, load_mask))
        pixels = read(lambda: load(data, name=f"a.{format}"), f"a.{format}")
        if pixels is not None and load is load_image:
            assert pixels.dtype == torch.float32
            assert 0 <= pixels.min() <= pixels.max() <= 1

    try_often(f"images: {format}", tries_in_child(one, 500), quick=1, long=60)
