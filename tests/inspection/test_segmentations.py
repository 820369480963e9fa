"""Readers of the segmentations of public data sets, on three images of which all is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from captum_robust.data import DataError, Sample
from captum_robust.inspection import Dissection, dissect
from captum_robust.inspection.concepts import Textures
from captum_robust.inspection.segmentations import concepts_of
from captum_robust.inspection.streaming import Batch
from tests.inspection.nets import BLUE, RED, block, colour_net

PLACES = {"a/0": (RED, 2, 3), "a/1": (RED, 8, 0), "b/2": (BLUE, 4, 4)}
"""Colour, y and x of the only object, which is 4×5, on each image of 16×16."""


def photographs() -> list[Sample]:
    return [
        Sample(block(color, y, x, 4, 5), None, torch.zeros(0, 4), f"{name}.jpg")
        for name, (color, y, x) in PLACES.items()
    ]


def numbered(name: str, red: int, blue: int, rest: int = 0) -> np.ndarray[Any, Any]:
    """16×16: the number of each pixel's class."""
    color, y, x = PLACES[name]
    numbers = np.full((16, 16), rest)
    numbers[y : y + 4, x : x + 5] = red if color == RED else blue
    return numbers


def save(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def palette(path: Path, numbers: np.ndarray[Any, Any]) -> None:
    """A PNG whose indices are the numbers, in colours that are not in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(path)


def coded(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """R + 256·G + 65536·B."""
    return np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=2)


CATEGORIES = [{"id": 90, "name": "car"}, {"id": 17, "name": "dog-merged"}]
COCO_IMAGES = [
    {"id": i, "file_name": f"{name}.jpg", "height": 16, "width": 16}
    for i, name in enumerate(PLACES)
]


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def coco_instances(root: Path, *, boxes_only: bool = False) -> Path:
    annotations = []
    for i, (color, y, x) in enumerate(PLACES.values()):
        polygon = [x, y, x + 5, y, x + 5, y + 4, x, y + 4]
        category = 90 if color == RED else 17
        own = {"id": i, "image_id": i, "category_id": category, "bbox": [x, y, 5, 4]}
        annotations.append(own if boxes_only else own | {"segmentation": [polygon]})
    # The second is a crowd, whose run lengths go down the columns: 8 rows, then 4 of 16 each.
    if not boxes_only:
        counts = [8, *([4, 12] * 4), 4, 256 - 8 - 16 * 4 - 4]
        annotations[1] |= {"segmentation": {"size": [16, 16], "counts": counts}, "iscrowd": 1}
    content = {"images": COCO_IMAGES, "annotations": annotations, "categories": CATEGORIES}
    return write_json(root / "annotations" / "instances_val.json", content)


def coco_panoptic(root: Path) -> Path:
    # Numbers of segments, which need all three channels; two segments are of one category.
    segments = [{"id": 70_000, "category_id": 90}, {"id": 300, "category_id": 17}]
    annotations = []
    for i, name in enumerate(PLACES):
        file = f"{i:012d}.png"
        save(root / "panoptic_val" / file, coded(numbered(name, 70_000, 300)))
        own = [s for s in segments if (s["id"] == 300) == name.startswith("b")]
        annotations.append({"image_id": i, "file_name": file, "segments_info": own})
    content = {"images": COCO_IMAGES, "annotations": annotations, "categories": CATEGORIES}
    return write_json(root / "panoptic_val.json", content)


def voc(root: Path) -> Path:
    for name in PLACES:
        numbers = numbered(name, 7, 12)
        numbers[15] = 255
        palette(root / "SegmentationClass" / f"{name[2:]}.png", numbers)
    return root


def ade_scenes(root: Path) -> Path:
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t.2\t9\t9\tcar, auto\t", "150\t.1\t9\t9\tdog"]
    root.mkdir(exist_ok=True)
    (root / "objectInfo150.txt").write_text("\n".join(rows), encoding="utf-8")
    for name in PLACES:
        save(root / "annotations" / "training" / f"{name[2:]}.png", numbered(name, 1, 150))
    return root


def ade_pixels(name: str) -> np.ndarray[Any, Any]:
    """Classes 300 and 3, as R // 10 · 256 + G; R beyond tens and B say other things."""
    numbers = numbered(name, 300, 3)
    return np.stack([numbers // 256 * 10 + 4, numbers % 256, 5 + 0 * numbers], axis=2)


def ade_with_index(root: Path) -> Path:
    names = np.array([f"thing {i}, x" for i in range(1, 400)], dtype=object)
    names[299], names[2] = "car, auto", "dog"
    for name in PLACES:
        save(root / "images" / f"{name}_seg.png", ade_pixels(name))
    savemat(root / "index_ade20k.mat", {"index": {"objectnames": names}})
    return root / "images"


def ade_with_json(root: Path) -> Path:
    for name in PLACES:
        save(root / f"{name}_seg.png", ade_pixels(name))
        objects = [{"name": "car, auto", "name_ndx": 300}, {"name": "dog", "name_ndx": 3}]
        write_json(root / f"{name}.json", {"annotation": {"object": objects}})
    return root


LAYOUTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "coco instances": (coco_instances, ["car", "dog-merged"]),
    "coco panoptic": (coco_panoptic, ["car", "dog-merged"]),
    "voc": (voc, ["car", "dog"]),
    "ade20k, 150 classes": (ade_scenes, ["car", "dog"]),
    "ade20k with its index": (ade_with_index, ["car", "dog"]),
    "ade20k with files of each image": (ade_with_json, ["car", "dog"]),
}


def dissected(given: Any, images: list[Sample] | None = None) -> Dissection:
    return dissect(colour_net(), "units", images or photographs(), given, size=16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_known_detector_has_an_overlap_of_one(tmp_path: Path, layout: str) -> None:
    write, names = LAYOUTS[layout]
    result = dissected(str(write(tmp_path / "set")))
    assert not result.unusable
    order = [result.concepts.index(name) for name in names]
    assert len(result.concepts) == 2
    assert result.iou[:2, order].tolist() == [[1, 0], [0, 1]]
    assert result.images == 3


def test_coco_fills_boxes_and_says_so(tmp_path: Path) -> None:
    result = dissected(coco_instances(tmp_path, boxes_only=True))
    assert result.iou[:2].tolist() == [[1, 0], [0, 1]]
    assert result.notes == ["Where an object has a box only, it is its mask."]


def write_broden(root: Path) -> Path:
    """Maps of half the size; the third image has no object, and a texture of its own."""
    labels = ["number,name,category,frequency,coverage", "300,car,object(3),3,1"]
    labels += ["5,fabric,object(1);part(2),3,1", "9,striped,texture(1),1,1"]
    rows = ["image,split,ih,iw,sh,sw,object,part,texture"]
    for name, (color, y, x) in PLACES.items():
        half = np.zeros((8, 8), dtype=int)
        half[y // 2 : y // 2 + 2, x // 2 : x // 2 + 2] = 300 if color == RED else 5
        save(root / "images" / f"{name}_o.png", coded(half))
        save(root / "images" / f"{name}_p.png", coded(half * 0 + 5))
        cells = {"a/0": f"{name}_o.png;5,,", "a/1": f"{name}_o.png,{name}_p.png,", "b/2": ",,9"}
        rows.append(f"{name}.jpg,train,16,16,8,8,{cells[name]}")
    (root / "label.csv").write_text("\n".join(labels), encoding="utf-8")
    (root / "index.csv").write_text("\n".join(rows), encoding="utf-8")
    return root


def test_broden_counts_for_each_category_the_images_that_have_it(tmp_path: Path) -> None:
    source = concepts_of(write_broden(tmp_path), None)
    assert list(source.names) == ["car", "fabric (object)", "fabric (part)", "striped"]
    read = [source.read(sample) for sample in photographs()]
    there = [sorted(masks or ()) for masks in read]
    assert there == [["car", "fabric (object)"], ["car", "fabric (part)"], ["striped"]]
    assert read[0] is not None
    assert read[0]["fabric (object)"].all()
    assert read[0]["car"].shape == (8, 8)
    batch = Batch(
        torch.zeros(3, 3, 16, 16), torch.zeros(0), [], torch.arange(3), [[r] for r in read]
    )
    known = {name: own.tolist() for name, own in source.known(batch, 0).items()}
    assert known["object"] == [True, True, False]
    assert known["part"] == [False, True, False]
    assert known["texture"] == [False, False, True]
    assert source.masks(batch, 0, (16, 16))["car"][0].sum() == 16
    # By hand, at 8×8 where a unit is active at all of the 2×2 that the mask has and more around.
    result = dissected(tmp_path)
    column = result.concepts.index("striped")
    # The texture is all over its image, 256 pixels, of which the unit of blue has 4·5; those of
    # the red images do not count.
    assert float(result.iou[1, column]) == pytest.approx(20 / 256)
    assert float(result.iou[0, column]) == 0
    part = result.concepts.index("fabric (part)")
    assert float(result.iou[0, part]) == pytest.approx(20 / 256)


def test_an_image_without_annotation_does_not_count(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "SegmentationClass" / "1.png").unlink()
    result = dissected(tmp_path)
    assert result.images == 2
    assert result.iou[:2].tolist() == [[1, 0], [0, 1]]
    assert "aeroplane, bicycle" in result.notes[0]
    assert result.notes[1] == "Without annotation, for the thresholds only: 1 image."


def test_damaged_annotations_are_errors_of_their_images(tmp_path: Path) -> None:
    panoptic = coco_panoptic(tmp_path / "panoptic")
    pngs = tmp_path / "panoptic" / "panoptic_val"
    save(pngs / "000000000000.png", np.zeros((4, 5, 3)))
    save(pngs / "000000000001.png", np.full((16, 16, 3), 9))
    (pngs / "000000000002.png").unlink()
    source, images = concepts_of(panoptic, None), photographs()
    for image, said in zip(
        images,
        (
            "000000000000.png: the mask has 5×4 pixels, its image 16×16",
            "000000000001.png: segment 592137 is not listed in panoptic_val.json",
            "000000000002.png: No such file",
        ),
        strict=True,
    ):
        with pytest.raises(DataError, match=said):
            source.read(image)
    content = json.loads(panoptic.read_text("utf-8"))
    content["annotations"][0]["file_name"] = "../a.png"
    content["annotations"][1]["segments_info"] = [7]
    write_json(panoptic, content)
    save(pngs / "000000000001.png", np.zeros((16, 16, 3)))
    source = concepts_of(panoptic, None)
    with pytest.raises(DataError, match=r"expected a file in .*panoptic_val, got '../a.png'"):
        source.read(images[0])
    with pytest.raises(DataError, match=r"image a/1.jpg: expected a list of segments"):
        source.read(images[1])
    voc(tmp_path / "voc")
    palette(tmp_path / "voc" / "SegmentationClass" / "0.png", np.full((16, 16), 33))
    Image.new("RGB", (16, 16)).save(tmp_path / "voc" / "SegmentationClass" / "1.png", "JPEG")
    source = concepts_of(tmp_path / "voc", None)
    with pytest.raises(DataError, match=r"0\.png: expected class numbers up to 20, got 33"):
        source.read(images[0])
    with pytest.raises(DataError, match="expected a format that keeps numbers, such as PNG"):
        source.read(images[1])
    ade = ade_with_json(tmp_path / "ade")
    (ade / "a" / "0.json").unlink()
    with pytest.raises(DataError, match="expected it for the names of classes, or index_ade20k"):
        concepts_of(ade, None).read(images[0])
    broden = write_broden(tmp_path / "ade")
    save(broden / "images" / "a" / "0_o.png", np.zeros((16, 16, 3)))
    with pytest.raises(DataError, match=r"index.csv:2: a/0_o.png has 16×16 pixels, expected 8×8"):
        concepts_of(broden, None).read(images[0])


def test_two_annotations_of_one_name_are_an_error_of_their_image(tmp_path: Path) -> None:
    for folder in ("training", "validation"):
        palette(tmp_path / "SegmentationClass" / folder / "0.png", numbered("a/0", 7, 12))
    with pytest.raises(DataError, match="several annotations have its name: training/0, valid"):
        concepts_of(tmp_path, None).read(photographs()[0])


def test_one_path_annotated_twice_is_an_error_of_its_image(tmp_path: Path) -> None:
    content = json.loads(coco_instances(tmp_path / "coco").read_text("utf-8"))
    images = [*content["images"], COCO_IMAGES[0] | {"id": 9, "file_name": "a/0.png"}]
    coco = write_json(tmp_path / "a.json", content | {"images": images})
    for suffix in ("png", "tif"):
        palette(tmp_path / "voc" / "SegmentationClass" / f"0.{suffix}", numbered("a/0", 7, 12))
    broden = write_broden(tmp_path / "broden")
    with (broden / "index.csv").open("a", encoding="utf-8") as file:
        file.write("\na/0.jpg,val,16,16,8,8,,,9")
    for given in (coco, tmp_path / "voc", broden):
        with pytest.raises(DataError, match=r"a/0\.jpg: several annotations have its name"):
            concepts_of(given, None).read(photographs()[0])


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_a_coco_id_of_two_is_refused(tmp_path: Path, kind: str) -> None:
    content = json.loads(coco_instances(tmp_path).read_text("utf-8"))
    content[kind].append(content[kind][0] | {"file_name": "other.jpg", "name": "other"})
    with pytest.raises(ValueError, match=f"gives the id [0-9]+ to two of its {kind}"):
        concepts_of(write_json(tmp_path / "a.json", content), None)


def test_class_numbers_in_colours_are_said(tmp_path: Path) -> None:
    save(tmp_path / "SegmentationClass" / "0.png", numbered("a/0", 7, 12)[..., None].repeat(3, 2))
    with pytest.raises(DataError, match=r"got 460551; is it in colours"):  # 7 · 65793
        concepts_of(tmp_path, None).read(photographs()[0])


def test_a_number_of_two_labels_of_broden_is_refused(tmp_path: Path) -> None:
    labels = write_broden(tmp_path) / "label.csv"
    for row, said in (("300,bus,object(1),1,1", "300 of object to another"), ("²,x,y,1,1", "'²'")):
        text = labels.read_text("utf-8")
        labels.write_text(f"{text}\n{row}", encoding="utf-8")
        with pytest.raises(ValueError, match=rf"label\.csv:5: .*{said}"):
            concepts_of(tmp_path, None)
        labels.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("box", [[float("nan"), 2, 5, 4], [-9, 2, 5, 4], [3, 2, 0, 4]])
def test_a_box_that_has_no_pixels_is_an_error_of_its_image(tmp_path: Path, box: list[int]) -> None:
    content = json.loads(coco_instances(tmp_path, boxes_only=True).read_text("utf-8"))
    content["annotations"][0]["bbox"] = box
    with pytest.raises(DataError, match="annotation 0: box"):
        concepts_of(write_json(tmp_path / "a.json", content), None).read(photographs()[0])


@pytest.mark.parametrize(
    ("write", "error", "said"),
    [
        ({"a.json": "[1"}, ValueError, "not JSON"),
        ({"a.json": '{"images": []}'}, ValueError, "expected COCO's instances format"),
        ({"objectInfo150.txt": "Idx,Name\n1,wall"}, ValueError, "the columns Idx and Name"),
        ({"objectInfo150.txt": ""}, ValueError, "the columns Idx and Name"),
        ({"objectInfo150.txt": "Idx\tName\n1\twall"}, FileNotFoundError, "annotations of ADE20K"),
        ({"index.csv": "image\n", "label.csv": "number\n"}, ValueError, "expected the columns"),
        ({"a.mat": ""}, ValueError, "has no sub-folders"),
    ],
)
def test_sets_that_are_none_are_refused(
    tmp_path: Path, write: dict[str, str], error: type[Exception], said: str
) -> None:
    for name, content in write.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    json_file = tmp_path / "a.json"
    with pytest.raises(error, match=said):
        concepts_of(json_file if json_file.exists() else tmp_path, None)


def test_panoptic_pngs_that_are_missing_are_named(tmp_path: Path) -> None:
    path = coco_panoptic(tmp_path)
    (tmp_path / "panoptic_val").rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"expected the PNGs of panoptic_val.json"):
        concepts_of(path, None)


def stripes(angle: float, size: int = 64) -> torch.Tensor:
    """3×size×size: waves that run along an angle (degrees, counter-clockwise from the right)."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    turned = torch.deg2rad(torch.tensor(angle))
    across = x * torch.sin(turned) + y * torch.cos(turned)
    return (0.5 + 0.4 * torch.sin(across * 2 * torch.pi / 8)).expand(3, -1, -1)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (stripes(0), "horizontal lines"),
        (stripes(45), "rising lines"),
        (stripes(90), "vertical lines"),
        (stripes(135), "falling lines"),
        (torch.full((3, 64, 64), 0.3), "flat"),
        (torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), "irregular"),
    ],
)
def test_textures_by_their_gradients(image: torch.Tensor, name: str) -> None:
    batch = Batch(image[None], image[None], [], torch.zeros(1), [[None]])
    masks = Textures().masks(batch, 0, (64, 64))
    assert masks[name][0, 8:-8, 8:-8].float().mean() > 0.95
