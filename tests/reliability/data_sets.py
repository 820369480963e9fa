"""Small whole data sets of each kind, as a user has them on disk."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from captum_robust.data import LocalizationDataset, Sample, load_dataset

SIZE = (12, 16)
"""(H, W) of all images."""
CLASSES = ("cat", "dog", "cow")
WNIDS = ("n01440764", "n01443537", "n01484850")
CSV = 'file,x0,y0,x1,y1,label\na.png,1,2,9,11,cat\nb.png,0,0,16,12,"dog"\nsub/c.png,2,3,4,5,cow\n'
SECRET = (255, 0, 254)
"""The colour of an image that no data set holds; it lies beside each of them."""
COCO = {
    "images": [
        {"id": i, "file_name": f"{name}.png", "width": 16, "height": 12}
        for i, name in enumerate("abc", 1)
    ],
    "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 9], "iscrowd": 0}
        | {"segmentation": [[1, 2, 9, 2, 9, 11, 1, 11]], "area": 72},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [0.5, 0, 15, 12], "iscrowd": 0}
        | {"segmentation": {"size": [12, 16], "counts": [20, 100, 72]}},
        {"id": 3, "image_id": 3, "category_id": 3, "bbox": [2, 3, 2, 2], "iscrowd": 1},
    ],
}
XML = """<?xml version="1.0" encoding="utf-8"?>
<annotation><filename>café.jpg</filename><size><width>16</width><height>12</height></size>
<object><name>{0}</name><difficult>0</difficult><part><name>head</name><bndbox><xmin>1</xmin>
<ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part><bndbox><xmin>2</xmin><ymin>3</ymin>
<xmax>9</xmax><ymax>11</ymax></bndbox></object><object><name>{1}</name><bndbox><xmin>1</xmin>
<ymin>1</ymin><xmax>16</xmax><ymax>12</ymax></bndbox></object></annotation>"""


def image_file(format: str = "PNG", mode: str = "RGB", seed: int = 0) -> bytes:
    """An image of noise, with an orientation in its EXIF data where the format has some."""
    noise = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("JPEG", "MPO", "WEBP", "AVIF", "TIFF") else {}
    Image.fromarray(noise).convert(mode).save(file, format, **options)
    return file.getvalue()


def _mask(index: int) -> bytes:
    mask, file = np.zeros(SIZE, dtype=np.uint8), io.BytesIO()
    mask[2:11, 1 + index : 9] = 1
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def _folder() -> dict[str, bytes | str]:
    images = {f"images/{n}.png": image_file(seed=i) for i, n in enumerate(("a", "b", "sub/c"))}
    masks = {f"masks/{n}.png": _mask(i) for i, n in enumerate(("a", "sub/c"))}
    return {**images, **masks, "boxes.csv": CSV}


def _coco() -> dict[str, bytes | str]:
    images = {f"val2017/{n}.png": image_file(seed=i) for i, n in enumerate("abc")}
    return {**images, "annotations/instances_val2017.json": json.dumps(COCO)}


def _voc() -> dict[str, bytes | str]:
    images = {f"JPEGImages/{n}.jpg": image_file("PNG", seed=i) for i, n in enumerate("abc")}
    xml = {f"Annotations/{n}.xml": XML.format("cat", "dog") for n in "abc"}
    return {**images, **xml, "ImageSets/Main/val.txt": "a\nb 1\nc -1\n"}


def _imagenet() -> dict[str, bytes | str]:
    place = "ILSVRC/{}/CLS-LOC/val/{}"
    images = {place.format("Data", f"{n}.JPEG"): image_file(seed=i) for i, n in enumerate("abc")}
    xml = {place.format("Annotations", f"{n}.xml"): XML.format(*WNIDS) for n in "ab"}
    solution = "".join(f"{n},{WNIDS[0]} 2 3 9 11 {WNIDS[1]} 0 0 16 12\n" for n in "abc")
    mapping = "".join(f"{wnid} name of {wnid}, other name\n" for wnid in WNIDS)
    lists = {
        "LOC_val_solution.csv": f"ImageId,PredictionString\n{solution}",
        "LOC_synset_mapping.txt": mapping,
    }
    return {**images, **xml, **lists}


def _tiny_imagenet() -> dict[str, bytes | str]:
    images = {f"val/images/val_{i}.JPEG": image_file(seed=i) for i in range(3)}
    lines = "".join(f"val_{i}.JPEG\t{WNIDS[i]}\t1\t2\t8\t10\n" for i in range(3))
    return {**images, "wnids.txt": "\n".join(WNIDS), "val/val_annotations.txt": lines}


KINDS = {
    "folder": (_folder, {"class_names": CLASSES}),
    "coco": (_coco, {"class_names": CLASSES}),
    "voc": (_voc, {"class_names": CLASSES}),
    "imagenet": (_imagenet, {}),
    "tiny-imagenet": (_tiny_imagenet, {"labels": "wnids"}),
}
"""The files of each kind of data set, and the options that it is opened with."""


def write_set(kind: str, root: Path) -> None:
    """Write a data set anew, and the secret beside it."""
    shutil.rmtree(root, ignore_errors=True)
    for name, content in KINDS[kind][0]().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    Image.new("RGB", SIZE[::-1], SECRET).save(root.parent / "x.png")


def open_set(kind: str, path: Path) -> LocalizationDataset:
    """Open it as its kind."""
    return load_dataset(kind, path, **KINDS[kind][1])


def content_of(sample: Sample) -> tuple[object, ...]:
    """What tells one sample from another."""
    mask = None if sample.mask is None else sample.mask.sum().item()
    return sample.label, sample.boxes.tolist(), mask, sample.image.sum().item()
