"""Photographs that are stored turned or mirrored, as their EXIF tag says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from captum_robust.cli.shared_options import open_dataset
from captum_robust.data import DataError, load_dataset, load_image
from captum_robust.draw import overlay
from tests.networks import classifier_of

SIZE = (50, 30)  # W×H, upright
TURNS = {  # what was done to the upright pixels before they were stored, in Pillow's words
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored_of(upright, orientation):
    turn = TURNS[orientation]
    return upright if turn is None else upright.transpose(turn)


def tag(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def photograph():
    """Black, with a white object off its centre."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pixels[4:12, 8:20] = 255
    return Image.fromarray(pixels)


def units(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def around(white):
    """The half-open box (x0, y0, x1, y1) around the white pixels of H×W."""
    ys, xs = np.nonzero(np.asarray(white))
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("png", {}),
        ("tif", {}),
        ("webp", {"lossless": True}),
        ("jpg", {"quality": 95, "subsampling": 0}),
    ],
)
def test_a_photograph_is_turned_upright(tmp_path, suffix, options, orientation):
    noise = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    upright = Image.fromarray(noise)
    stored, path = stored_of(upright, orientation), tmp_path / f"a.{suffix}"
    stored.save(path, exif=tag(orientation), **options)
    with Image.open(path) as image:
        by_pillow = ImageOps.exif_transpose(image)
    assert by_pillow.size == upright.size
    close = {"atol": 0.06 if suffix == "jpg" else 0, "rtol": 0}
    assert load_image(path).equal(units(by_pillow))
    torch.testing.assert_close(load_image(path), units(upright), **close)
    as_stored = load_image(path, exif_orientation=False)
    torch.testing.assert_close(as_stored, units(stored), **close)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0not TIFF", b"Exif\0\0MM\0*\0\0\0\x08\xff"]
)
def test_a_tag_that_cannot_be_read_leaves_the_pixels_as_they_are(tmp_path, exif):
    photograph().save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").equal(units(photograph()))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_is_not_heeded(tmp_path, value):
    photograph().save(tmp_path / "a.png", exif=tag(value))
    assert load_image(tmp_path / "a.png").equal(units(photograph()))


def xml(drawn, shift):
    x0, y0, x1, y1 = around(drawn)
    box = f"<xmin>{x0 + shift}</xmin><ymin>{y0 + shift}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
    size = f"<size><width>{drawn.width}</width><height>{drawn.height}</height></size>"
    thing = f"<object><name>n01440764</name><bndbox>{box}</bndbox></object>"
    return f"<annotation>{size}{thing}</annotation>"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, Image.Image):
        content.save(path)
    else:
        path.write_bytes(content)


def dataset_of(kind, root, data, drawn, **options):
    """A data set of the file's bytes, annotated on what was drawn."""
    x0, y0, x1, y1 = (int(v) for v in around(drawn))
    if kind == "coco":
        put(root / "images/a.jpg", data)
        polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
        box = [x0, y0, x1 - x0, y1 - y0]
        thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "segmentation": [polygon]}
        image = {"id": 1, "file_name": "a.jpg", "width": drawn.width, "height": drawn.height}
        names = [{"id": 1, "name": "thing"}]
        content = {"images": [image], "annotations": [thing], "categories": names}
        put(root / "annotations/instances_val2017.json", json.dumps(content))
    elif kind == "voc":
        put(root / "JPEGImages/a.jpg", data)
        put(root / "Annotations/a.xml", xml(drawn, 1))
        options["split"] = None
    elif kind == "imagenet":
        put(root / "ILSVRC/Data/CLS-LOC/val/a.JPEG", data)
        put(root / "ILSVRC/Annotations/CLS-LOC/val/a.xml", xml(drawn, 0))
    elif kind == "tiny-imagenet":
        put(root / "wnids.txt", "n01440764")
        put(root / "val/images/a.JPEG", data)
        put(root / "val/val_annotations.txt", f"a.JPEG n01440764 {x0} {y0} {x1 - 1} {y1 - 1}")
    elif kind == "folder with masks":
        put(root / "images/a.jpg", data)
        put(root / "masks/a.png", drawn)
    else:
        put(root / "a.jpg", data)
        put(root / "boxes.csv", f"file,x0,y0,x1,y1\na.jpg,{x0},{y0},{x1},{y1}\n")
    return load_dataset(kind.split()[0], root, **options)


ANNOTATED = ["coco", "voc", "imagenet", "folder", "folder with masks", "tiny-imagenet"]


def file_of(tmp_path, orientation):
    stored_of(photograph(), orientation).save(
        tmp_path / "made.jpg", exif=tag(orientation), quality=95
    )
    return (tmp_path / "made.jpg").read_bytes()


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ANNOTATED)
def test_annotations_on_the_stored_pixels_are_turned_with_the_image(tmp_path, kind, orientation):
    drawn = stored_of(photograph().convert("L"), orientation)
    data = file_of(tmp_path, orientation)
    (sample,) = dataset_of(kind, tmp_path / "set", data, drawn)
    assert sample.size == sample.original_size == SIZE[::-1]
    white = sample.image.mean(0) > 0.5
    assert white.sum() == 8 * 12
    assert sample.boxes.tolist() == [[8, 4, 20, 12]] == [around(white)]
    if kind in ("coco", "folder with masks"):
        assert sample.mask.equal(white)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ANNOTATED)
def test_annotations_on_upright_images_stay_on_request(tmp_path, kind, orientation):
    drawn, data = photograph().convert("L"), file_of(tmp_path, orientation)
    (sample,) = dataset_of(kind, tmp_path / "set", data, drawn, exif_orientation=True)
    assert sample.size == SIZE[::-1]
    assert sample.boxes.tolist() == [[8, 4, 20, 12]]
    if kind in ("coco", "folder with masks"):
        assert sample.mask.equal(sample.image.mean(0) > 0.5)


@pytest.mark.parametrize("kind", ["coco", "voc", "imagenet", "folder with masks"])
def test_sizes_that_fit_the_other_way_only_are_an_error(tmp_path, kind):
    data = file_of(tmp_path, 6)
    dataset = dataset_of(kind, tmp_path / "set", data, photograph().convert("L"))
    with pytest.raises(DataError, match=r"50×30.*30×50.*see exif_orientation"):
        dataset[0]


def test_the_command_line_says_what_annotations_were_drawn_on(tmp_path):
    data, upright = file_of(tmp_path, 6), photograph().convert("L")
    for is_upright, drawn in ((True, upright), (False, stored_of(upright, 6))):
        root = dataset_of("folder", tmp_path / "set", data, drawn).root
        options = {"exif_orientation": is_upright, "split": None}
        (sample,) = open_dataset("folder", root, options, classifier_of())
        assert sample.boxes.tolist() == [[8, 4, 20, 12]]
    with pytest.raises(ValueError, match=r"'samples' does not take all of: --exif-orientation"):
        open_dataset("samples", None, {"exif_orientation": True}, classifier_of())


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_map_lies_over_the_upright_photograph(tmp_path, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    stored_of(photograph(), orientation).save(path, exif=tag(orientation))
    heat = torch.arange(6.0).view(2, 3)
    with Image.open(path) as image:
        np.testing.assert_array_equal(overlay(image, heat), overlay(load_image(path), heat))


def test_a_map_lies_over_white_where_the_image_is_transparent(tmp_path):
    pixels = np.zeros((4, 6, 4), dtype=np.uint8)
    pixels[:2, :, 3] = 255  # black above, transparent below
    Image.fromarray(pixels).save(path := tmp_path / "a.png")
    with Image.open(path) as image:
        drawn = overlay(image, torch.ones(1, 1), alpha=0)
    assert drawn[:2].max() == 0
    assert drawn[2:].min() == 255
