"""Every reader of files, on damaged ones: a right value or a named error, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from captum_robust.data.annotations import check_size, checked_boxes
from captum_robust.data.coco import _corners
from captum_robust.data.coco_mask import union_mask
from captum_robust.data.images import FORMATS, load_image, load_mask
from captum_robust.data.voc_xml import parse_voc_xml

from . import data_sets
from .damage import damaged, damaged_text, damaged_value, read, tries_in_child
from .data_sets import SIZE, image_file

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

    try_often("VOC XML, parsed", tries_in_child(one, 2000), quick=1, long=250)


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

    try_often("COCO run-length codes", tries_in_child(one, 4000), quick=1, long=200)


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

    try_often("COCO polygons", tries_in_child(one, 2000), quick=1, long=200)


def test_boxes(try_often: TryOften) -> None:
    def one(rng: random.Random) -> None:
        annotation = damaged_value({"bbox": [1, 2, 8, 9]}, rng)
        box = read(lambda: _corners(annotation, "a.json: annotation 1"), "a.json")
        if box is not None:
            check_boxes(read(lambda: checked_boxes([(box, "a.json")], SIZE), "a.json"))

    try_often("COCO boxes", tries_in_child(one, 4000), quick=1, long=100)


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

    try_often(f"images: {format}", tries_in_child(one, 500), quick=1, long=100)
