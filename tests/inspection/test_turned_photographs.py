"""Masks of photographs that are stored turned or mirrored, as their EXIF tag says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from captum_robust.data import DataError, Sample, load_dataset
from captum_robust.inspection import dissect
from captum_robust.inspection.segmentations import concepts_of
from tests.inspection.nets import colour_net

Pixels = npt.NDArray[np.uint8]
UPRIGHT = np.zeros((30, 50), dtype=np.uint8)
UPRIGHT[4:12, 8:20] = 1
TURNS: dict[int, Callable[[Pixels], Pixels]] = {  # from upright pixels to stored ones
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: np.transpose,
    6: np.rot90,
    7: lambda x: np.rot90(x, 2).T,
    8: lambda x: np.rot90(x, 3),
}
SAID = "Photographs have EXIF orientations that the size of a mask does not tell"


def photograph(folder: Path, orientation: int, upright: Pixels = UPRIGHT) -> Sample:
    """The only one of a data set, stored so; white where its object is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder.mkdir(parents=True)
    stored = np.ascontiguousarray(TURNS[orientation](255 * upright))
    Image.fromarray(stored).convert("RGB").save(folder / "a.png", exif=exif)
    sample: Sample = load_dataset("folder", folder)[0]
    assert sample.image[0].bool().equal(torch.from_numpy(upright > 0))
    return sample


def png(path: Path, pixels: npt.NDArray[np.int64] | Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels).astype(np.uint8)).save(path)


def coco(root: Path, drawn: Pixels, **facts: object) -> Path:
    height, width = drawn.shape
    image = {"id": 1, "file_name": "a.png", "height": height, "width": width}
    content = {
        "images": [image],
        "categories": [{"id": 3, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, **facts}],
    }
    root.mkdir(exist_ok=True)
    (root / "panoptic.json").write_text(json.dumps(content), encoding="utf-8")
    return root / "panoptic.json"


def around(drawn: Pixels) -> list[int]:
    ys, xs = np.nonzero(drawn)
    return [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]


def coco_polygons(root: Path, drawn: Pixels) -> Path:
    x, y, w, h = around(drawn)
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return coco(root, drawn, bbox=[x, y, w, h], segmentation=[polygon], iscrowd=0)


def coco_boxes(root: Path, drawn: Pixels) -> Path:
    return coco(root, drawn, bbox=around(drawn))


def coco_panoptic(root: Path, drawn: Pixels) -> Path:
    png(root / "panoptic" / "a.png", np.stack([drawn, 2 * drawn, 0 * drawn], axis=2))
    return coco(root, drawn, file_name="a.png", segments_info=[{"id": 513, "category_id": 3}])


def voc(root: Path, drawn: Pixels) -> Path:
    png(root / "SegmentationClass" / "a.png", 15 * drawn)
    return root


def ade_scenes(root: Path, drawn: Pixels) -> Path:
    png(root / "annotations" / "a.png", 2 * drawn)
    (root / "objectInfo150.txt").write_text("Idx\tName\n2\tthing", encoding="utf-8")
    return root


def ade_full(root: Path, drawn: Pixels) -> Path:
    png(root / "a_seg.png", np.stack([0 * drawn, 7 * drawn, drawn], axis=2))
    objects = {"annotation": {"object": [{"name": "thing", "name_ndx": 7}]}}
    (root / "a.json").write_text(json.dumps(objects), encoding="utf-8")
    return root


def broden(root: Path, drawn: Pixels) -> Path:
    height, width = drawn.shape
    png(root / "images" / "a_object.png", np.stack([9 * drawn, 0 * drawn, 0 * drawn], axis=2))
    sides = f"{height},{width},{height},{width}"
    row = f"image,split,ih,iw,sh,sw,object\r\na.png,train,{sides},a_object.png\r\n"
    (root / "index.csv").write_text(row, encoding="utf-8")
    (root / "label.csv").write_text("number,name,category\r\n9,thing,object(1)\r\n", "utf-8")
    return root


def folders(root: Path, drawn: Pixels) -> Path:
    png(root / "thing" / "a.png", 255 * drawn)
    return root


LAYOUTS = (coco_polygons, coco_boxes, coco_panoptic, voc, ade_scenes, ade_full, broden, folders)


def read(write: Callable[[Path, Pixels], Path], root: Path, drawn: Pixels, photo: Sample):
    source = concepts_of(write(root, np.ascontiguousarray(drawn)), None)
    masks = source.read(photo)
    assert masks is not None
    (mask,) = masks.values()
    return mask, source.note


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("write", LAYOUTS)
def test_masks_of_the_stored_pixels_are_turned_with_their_photograph(
    tmp_path: Path, write: Callable[[Path, Pixels], Path], orientation: int
) -> None:
    photo = photograph(tmp_path / "photos", orientation)
    mask, note = read(write, tmp_path / "masks", TURNS[orientation](UPRIGHT), photo)
    assert mask.equal(torch.from_numpy(UPRIGHT > 0))
    assert (SAID in note) == (orientation in (2, 3, 4))


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("write", LAYOUTS)
def test_masks_as_large_as_the_upright_photograph_alone_stay_as_they_are(
    tmp_path: Path, write: Callable[[Path, Pixels], Path], orientation: int
) -> None:
    photo = photograph(tmp_path / "photos", orientation)
    mask, note = read(write, tmp_path / "masks", UPRIGHT, photo)
    assert mask.equal(torch.from_numpy(UPRIGHT > 0))
    assert SAID not in note


def test_of_a_square_the_masks_are_of_the_stored_pixels_and_it_is_said(tmp_path: Path) -> None:
    square = np.zeros((30, 30), dtype=np.uint8)
    square[4:12, 8:20] = 1
    photo = photograph(tmp_path / "photos", 6, square)
    source = folders(tmp_path / "masks", TURNS[6](square))
    mask, note = read(folders, tmp_path / "masks", TURNS[6](square), photo)
    assert mask.equal(torch.from_numpy(square > 0))
    assert SAID in note
    result = dissect(colour_net(), "units", [photo], source, size=16)
    assert sum(SAID in one for one in result.notes) == 1
    told = dissect(colour_net(), "units", tmp_path / "photos", source, size=16)
    assert told.iou.equal(result.iou)


def test_pictures_of_pillow_say_how_they_are_stored(tmp_path: Path) -> None:
    photograph(tmp_path / "photos", 6)
    source = folders(tmp_path / "masks", np.ascontiguousarray(TURNS[6](UPRIGHT)))
    (source / "thing" / "a.png").rename(source / "thing" / "0.png")
    with Image.open(tmp_path / "photos" / "a.png") as picture:
        result = dissect(colour_net(), "units", [picture], source, size=16)
    assert not result.unusable


@pytest.mark.parametrize("write", LAYOUTS)
def test_masks_of_another_size_are_an_error_of_their_image(
    tmp_path: Path, write: Callable[[Path, Pixels], Path]
) -> None:
    photo = photograph(tmp_path / "photos", 6)
    with pytest.raises(DataError, match="40×20 pixels, its image 50×30"):
        read(write, tmp_path / "masks", UPRIGHT[:20, :40], photo)


def test_a_mask_with_the_tag_of_its_photograph_is_turned_once(tmp_path: Path) -> None:
    photo = photograph(tmp_path / "photos", 3)
    mask = tmp_path / "masks" / "thing" / "a.png"
    folders(tmp_path / "masks", TURNS[3](UPRIGHT))
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(mask) as image:
        image.load()
    image.save(mask, exif=exif)
    masks = concepts_of(tmp_path / "masks", None).read(photo)
    assert masks["thing"].equal(torch.from_numpy(UPRIGHT > 0))
