"""Data sets as they are on disk where they come from their makers, images and masks together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captum_robust.inspection import Dissection, dissect
from tests.inspection.nets import BLUE, RED, block, colour_net

pytestmark = pytest.mark.filterwarnings("ignore:dataset. its classes")
PLACES = {"0": (RED, 2, 3), "1": (RED, 8, 0), "2": (BLUE, 4, 4)}


def photograph(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = block(*PLACES[name], 4, 5)
    array = (255 * pixels).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path, quality=100, subsampling=0)


def numbers(name: str, red: int, blue: int) -> Any:
    color, y, x = PLACES[name]
    values = np.zeros((16, 16), dtype=np.int64)
    values[y : y + 4, x : x + 5] = red if color == RED else blue
    return values


def png(path: Path, *channels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stack = [channels[0] * 0 + c for c in channels]
    Image.fromarray(np.stack(stack, axis=2).astype(np.uint8)).save(path)


def dissected(concepts: Path, images: Path) -> Dissection:
    return dissect(colour_net(), "units", images, concepts, size=16)


def assert_found(result: Dissection, red: str, blue: str) -> None:
    """Three images were used, and the units of the two colours have a concept each."""
    assert result.images == 3
    assert all(note.startswith("Concepts that never occur") for note in result.notes)
    order = [result.concepts.index(red), result.concepts.index(blue)]
    torch.testing.assert_close(result.iou[:2, order], torch.eye(2), atol=0.35, rtol=0)


def test_pascal_voc_as_it_is_unpacked(tmp_path: Path) -> None:
    """``VOC2012``: palettes of bits, 255 around objects, and another folder of objects."""
    colours = [
        [sum(((i >> (3 * j + c)) & 1) << (7 - j) for j in range(3)) for c in range(3)]
        for i in range(256)
    ]
    for name in PLACES:
        photograph(tmp_path / "JPEGImages" / f"2007_00000{name}.jpg", name)
        classes = numbers(name, 7, 12)
        border = np.pad(classes > 0, 1)
        wide = border | np.roll(border, 1, 0) | np.roll(border, -1, 0)
        classes[wide[1:-1, 1:-1] & (classes == 0)] = 255
        for folder in ("SegmentationClass", "SegmentationObject"):
            image = Image.fromarray(np.minimum(classes, 255).astype(np.uint8), "P")
            image.putpalette([c for colour in colours for c in colour])
            (tmp_path / folder).mkdir(exist_ok=True)
            image.save(tmp_path / folder / f"2007_00000{name}.png")
    assert colours[1:3] == [[128, 0, 0], [0, 128, 0]]
    assert colours[255] == [224, 224, 192]
    assert_found(dissected(tmp_path, tmp_path / "JPEGImages"), "car", "dog")
    whole = dissected(tmp_path, tmp_path)
    assert_found(whole, "car", "dog")
    assert len(whole.unusable) == 6
    assert whole.unusable["SegmentationClass/2007_000000.png"].endswith("not an image")


def write_panoptic(path: Path, pngs: Path) -> None:
    """As panopticapi writes it: a segment's id is R + 256 G + 65536 B, 0 is void."""
    images, annotations = [], []
    for name in PLACES:
        number = 139_000 + int(name)
        file = f"{number:012d}"
        segment = numbers(name, 3_937_500, 4_260_062)
        png(pngs / f"{file}.png", segment % 256, segment // 256 % 256, segment // 65536)
        images.append({"license": 2, "file_name": f"{file}.jpg", "height": 16, "width": 16})
        images[-1] |= {"coco_url": f"http://images/val2017/{file}.jpg", "id": number}
        info = {"id": int(segment.max()), "category_id": 3 if PLACES[name][0] == RED else 184}
        info |= {"iscrowd": 0, "bbox": [0, 0, 5, 4], "area": 20}
        annotations.append(
            {"segments_info": [info], "file_name": f"{file}.png", "image_id": number}
        )
    categories = [
        {"supercategory": "vehicle", "isthing": 1, "id": 3, "name": "car"},
        {"supercategory": "plant", "isthing": 0, "id": 184, "name": "tree-merged"},
    ]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"categories": categories}), encoding="utf-8")


@pytest.mark.parametrize("place", ["annotations/panoptic_val2017", "panoptic_val2017"])
def test_panoptic_pngs_lie_beside_the_file_or_beside_its_folder(tmp_path: Path, place: str) -> None:
    """The first is how COCO's archives unpack, the second what Detectron2 and others ask for."""
    for name in PLACES:
        photograph(tmp_path / "val2017" / f"{139_000 + int(name):012d}.jpg", name)
    write_panoptic(tmp_path / "annotations" / "panoptic_val2017.json", tmp_path / place)
    result = dissected(tmp_path / "annotations" / "panoptic_val2017.json", tmp_path / "val2017")
    assert_found(result, "car", "tree-merged")


def test_ade20k_has_its_masks_beside_the_images(tmp_path: Path) -> None:
    """That of 2021: ``_seg.png``, ``_parts_1.png``, a PNG an object, and JSON not all in UTF-8."""
    for i, name in enumerate(PLACES):
        file = tmp_path / "ADE" / "training" / "urban" / "street" / f"ADE_train_0001686{i}.jpg"
        photograph(file, name)
        classes = numbers(name, 401, 2855)
        png(file.with_name(f"{file.stem}_seg.png"), classes // 256 * 10 + 4, classes % 256, classes)
        png(file.with_name(f"{file.stem}_parts_1.png"), classes * 0, 0, 0)
        png(file.with_suffix("") / f"instance_000_{file.stem}.png", 255 * (classes > 0), 0, 0)
        car = {"id": 0, "name": "car, auto, automobile", "name_ndx": 401, "raw_name": "café"}
        tree = {"id": 1, "name": "tree", "name_ndx": 2855, "parts": {"hasparts": []}}
        objects = {"annotation": {"filename": file.name, "object": [car, tree]}}
        encoding = "latin-1" if i else "utf-8"
        text = json.dumps(objects, ensure_ascii=False)
        file.with_suffix(".json").write_text(text, encoding=encoding)
    result = dissected(tmp_path, tmp_path)
    assert_found(result, "car", "tree")
    assert len(result.unusable) == 9
    assert all(why.endswith("a segmentation, not an image") for why in result.unusable.values())


def test_broden_has_its_maps_beside_the_images(tmp_path: Path) -> None:
    """As ``joinseg.py`` writes it: lines end in CRLF, label 0 and empty cells are nothing."""
    rows = ["image,split,ih,iw,sh,sw,color,object,material,part,scene,texture"]
    for name in PLACES:
        own = f"ade20k/ADE_train_{name}"
        photograph(tmp_path / "images" / f"{own}.jpg", name)
        object = numbers(name, 300, 21)
        png(tmp_path / "images" / f"{own}_object.png", object % 256, object // 256, 0)
        for part in (1, 2):
            png(tmp_path / "images" / f"{own}_part_{part}.png", object * 0, 0, 0)
        cells = f"{own}_object.png,,{own}_part_1.png;{own}_part_2.png,7,"
        rows.append(f"{own}.jpg,train,16,16,16,16,,{cells}")
    labels = ["number,name,category,frequency,coverage,syns"]
    labels += ["7,street-s,scene(3),3,3.0,", "10,red-c,color(289),289,9.140027,"]
    labels += [
        "21,fabric,material(36);object(3),39,4.225474,cloth",
        '300,car,object(3),3,1.5,"auto;x"',
    ]
    categories = "name,first,last,count,frequency\r\nobject,12,1138,529,208688\r\n"
    for file, lines in (("index.csv", rows), ("label.csv", labels)):
        (tmp_path / file).write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    (tmp_path / "category.csv").write_bytes(categories.encode())
    result = dissected(tmp_path, tmp_path / "images")
    assert result.concepts == ["street-s", "fabric (object)", "car"]
    assert_found(result, "car", "fabric (object)")
    assert len(result.unusable) == 9
