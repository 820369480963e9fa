import pickle
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from captum_robust.data import DataError, load_dataset
from captum_robust.data.folder import ImageFolder

HEADER = "file,x0,y0,x1,y1\n"


def draw_mask(path, box, size=(40, 30), value=255):
    mask = np.zeros(size[::-1], dtype=np.uint8)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def test_a_plain_folder_gives_images_without_boxes_or_class(tmp_path, draw):
    draw(tmp_path / "b.jpg")
    draw(tmp_path / "a.png")
    dataset = load_dataset("folder", tmp_path)
    assert dataset.ids == ["a.png", "b.jpg"]
    assert (dataset[0].label, dataset[0].boxes.shape, dataset[0].mask) == (None, (0, 4), None)


@pytest.mark.parametrize(
    "table",
    [
        "file,x0,y0,x1,y1,label\na.png,1,2,3,4,tench\na.png,0,0,40,30,tench\n",
        "label,file,xmin,ymin,xmax,ymax\n0,a.png,1,2,3,4\n0,./a.png,0,0,40,30\n",
        "\ufeffFile; x0; y0; x1; y1; label\r\na.png;1;2;3;4;n01440764\r\n\r\na.png;0;0;40;30;\r\n",
    ],
)
def test_a_table_gives_boxes_as_they_are_and_labels(tmp_path, draw, write, table):
    draw(tmp_path / "a.png")
    sample = ImageFolder(tmp_path, boxes=write(tmp_path / "t.csv", table))[0]
    assert sample.boxes.tolist() == [[1, 2, 3, 4], [0, 0, 40, 30]]
    assert sample.label == 0


def test_boxes_csv_masks_and_images_are_found_by_their_names(tmp_path, draw, write):
    draw(tmp_path / "images/x/a.png")
    write(tmp_path / "boxes.csv", HEADER + "x/a.png,1,2,3,4\n")
    draw_mask(tmp_path / "masks/x/a.png", (5, 6, 20, 30))
    sample = ImageFolder(tmp_path)[0]
    assert (sample.id, sample.boxes.tolist()) == ("x/a.png", [[1, 2, 3, 4]])
    assert sample.mask.sum() == 15 * 24


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_gives_its_box_whatever_the_suffix(tmp_path, draw, value):
    draw(tmp_path / "images/a.jpg")
    draw_mask(tmp_path / "masks/a.png", (5, 6, 20, 30), value=value)
    (sample,) = ImageFolder(tmp_path / "images", masks=tmp_path / "masks")
    assert sample.boxes.tolist() == [[5, 6, 20, 30]]
    assert sample.mask.dtype == torch.bool


def test_an_empty_mask_gives_no_box_and_one_of_another_size_raises(tmp_path, draw):
    for stem in ("a", "b"):
        draw(tmp_path / f"{stem}.png")
    draw_mask(tmp_path / "masks/a.png", (0, 0, 0, 0))
    draw_mask(tmp_path / "masks/b.png", (0, 0, 4, 4), size=(30, 40))
    dataset = ImageFolder(tmp_path)
    assert dataset.ids == ["a.png", "b.png"]  # the masks aren't images
    assert dataset[0].boxes.shape == (0, 4)
    with pytest.raises(DataError, match=r"masks.b\.png: the mask has 30×40 .* its image 40×30"):
        dataset[1]


@pytest.mark.parametrize(
    ("folders", "options", "labels"),
    [
        (["n01440764", "n01443537"], {}, [0, 1]),
        (["0007", "12"], {}, [7, 12]),
        (["goldfish", "great_white_shark"], {}, [1, 2]),
        (["cat", "dog"], {"class_names": ["dog", "cat"]}, [1, 0]),
        (["holiday", "work"], {}, [None, None]),
        (["holiday", "work"], {"labels": "sorted"}, [0, 1]),
        (["0007", "12"], {"labels": None}, [None, None]),
    ],
)
def test_class_folders(tmp_path, draw, folders, options, labels):
    for name in folders:
        draw(tmp_path / name / "same.png")
    dataset = ImageFolder(tmp_path, **options)
    assert dataset.ids == [f"{name}/same.png" for name in folders]
    assert [sample.label for sample in dataset] == labels


def test_a_folder_that_is_no_class_beside_one_that_is_is_refused(tmp_path, draw):
    for name in ("goldfish", "tenhc"):
        draw(tmp_path / name / "a.png")
    with pytest.raises(ValueError, match=r"class folder: .*got 'tenhc'; did you mean .*'tench'"):
        ImageFolder(tmp_path)


def test_a_name_of_two_classes_counts_only_as_it_is_written(tmp_path, draw, write):
    draw(tmp_path / "a.png")
    rows = {"Cardigan": 264, "cardigan": 474}
    for label, index in rows.items():
        write(tmp_path / "boxes.csv", f"file,x0,y0,x1,y1,label\na.png,1,1,2,2,{label}\n")
        assert ImageFolder(tmp_path)[0].label == index
    write(tmp_path / "boxes.csv", "file,x0,y0,x1,y1,label\na.png,1,1,2,2,CARDIGAN\n")
    with pytest.raises(DataError, match=r"boxes\.csv:2: label: .*got 'CARDIGAN'"):
        ImageFolder(tmp_path)[0]


@pytest.mark.parametrize(
    "odd", ['"x.png,1,2,3,4', "y" * 200_000 + ",1,2,3,4", "caf\udce9.png,1,2,3,4"]
)
def test_one_odd_row_is_the_error_of_its_own_sample(tmp_path, draw, odd):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    text = f"{HEADER}a.png,1,1,2,2\n{odd}\nb.png,1,1,9,9\n"
    (tmp_path / "boxes.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    dataset = ImageFolder(tmp_path)
    boxes = {id: dataset[i].boxes.tolist() for i, id in enumerate(dataset.ids) if len(id) == 5}
    assert boxes == {"a.png": [[1, 1, 2, 2]], "b.png": [[1, 1, 9, 9]]}
    (other,) = (i for i, id in enumerate(dataset.ids) if len(id) != 5)
    with pytest.raises(DataError, match=r"boxes\.csv:3: annotates"):
        dataset[other]


def test_a_cell_may_go_on_in_the_next_line(tmp_path, draw, write):
    draw(tmp_path / "a.png")
    table = 'file,x0,y0,x1,y1,caption\na.png,1,1,2,2,"two\nlines"\na.png,3,3,9,9,\n'
    write(tmp_path / "boxes.csv", table)
    assert ImageFolder(tmp_path)[0].boxes.tolist() == [[1, 1, 2, 2], [3, 3, 9, 9]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.png,1,2,3", "four numbers"),
        ("a.png,1,2,3,four", "four numbers"),
        ("a.png,1,2,,4", "four numbers"),
        ("a.png,1,2,1,4", "no area"),
        ("a.png,1,2,nan,4", "not finite"),
        ("a.png,1,2,1e400,4", "not finite"),
        ("a.png,.1,.2,.5,.9", "expected pixels, got fractions of the image"),
        ("a.png,1,2,44,4", "outside the image of 40×30"),
        ("a.png,1,2,3,4,tenhc", r"label: .*got 'tenhc'"),
        ("a.png,1,2,3,4,1000", r"label: .*got '1000'"),
        ("a.png,1,2,3,4,-1", r"label: .*got '-1'"),
        ("a.png,1,2,3,4,goldfish", "but 'tench' on an earlier line"),
    ],
)
def test_a_bad_row_is_the_data_error_of_its_image_naming_the_line(
    tmp_path, draw, write, row, reason
):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    first = "a.png,1,1,5,5,tench\n" if "earlier" in reason else "a.png,1,1,5,5,\n"
    table = "file,x0,y0,x1,y1,label\n" + first + "b.png,1,1,5,5,tench\n" + row + "\n"
    write(tmp_path / "boxes.csv", table)
    dataset = ImageFolder(tmp_path)
    with pytest.raises(DataError, match=rf"boxes\.csv:4: .*{reason}") as caught:
        dataset[0]
    assert "\n" not in str(caught.value)
    assert dataset[1].label == 0


def test_a_row_without_numbers_states_an_image_without_box(tmp_path, draw, write):
    draw(tmp_path / "a.png")
    write(tmp_path / "boxes.csv", "file,x0,y0,x1,y1,label\na.png,,,,,goldfish\n")
    sample = ImageFolder(tmp_path)[0]
    assert (sample.label, sample.boxes.shape) == (1, (0, 4))


def test_annotations_without_an_image_are_listed_and_raise(tmp_path, draw, write):
    draw(tmp_path / "a.png")
    draw_mask(tmp_path / "masks/lone.png", (0, 0, 4, 4))
    write(tmp_path / "boxes.csv", HEADER + "a.png,1,1,2,2\n../gone.png,1,1,2,2\n,1,1,2,2\n")
    dataset = ImageFolder(tmp_path)
    assert dataset.ids == ["../gone.png", "a.png", "boxes.csv:4", "lone"]
    for index, name in [(0, "boxes.csv:3"), (2, "boxes.csv:4"), (3, "lone.png")]:
        with pytest.raises(DataError, match=f"{name}: annotates"):
            dataset[index]
    assert dataset[1].boxes.tolist() == [[1, 1, 2, 2]]
    assert ImageFolder(tmp_path, skip_missing=True).ids == ["a.png"]


@pytest.mark.parametrize(
    "header", ["", "file,x0,y0,x1\n", "name,x0,y0,x1,y1\n", "a.png,1,2,3,4\n", "\x00\n"]
)
def test_a_table_without_the_columns_is_refused_at_once(tmp_path, draw, write, header):
    draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"t\.csv:1: expected a header"):
        ImageFolder(tmp_path, boxes=write(tmp_path / "t.csv", header))


def test_a_table_that_is_no_text_is_refused_at_once(tmp_path, draw):
    image = draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: not a text file"):
        ImageFolder(tmp_path, boxes=image)


def test_what_is_missing_as_a_whole_is_raised_at_once(tmp_path, draw):
    with pytest.raises(ValueError, match="no images"):
        ImageFolder(tmp_path)
    draw(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        ImageFolder(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"t\.csv: .* expected a CSV"):
        ImageFolder(tmp_path, boxes=tmp_path / "t.csv")
    with pytest.raises(FileNotFoundError, match="expected a folder of masks"):
        ImageFolder(tmp_path, masks=tmp_path / "m")
    with pytest.raises(ValueError, match="meaning of labels: expected"):
        ImageFolder(tmp_path, labels="sort")


def test_a_broken_image_is_the_error_of_its_own_sample(tmp_path, draw):
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    draw(tmp_path / "c.png", (1, 1))
    dataset = pickle.loads(pickle.dumps(ImageFolder(tmp_path)))
    assert dataset[0].size == (30, 40)
    with pytest.raises(DataError, match=r"b\.png: the file is empty"):
        dataset[1]
    assert dataset[2].size == (1, 1)
    assert dataset[-1].id == "c.png"
    with pytest.raises(IndexError, match="3 samples"):
        dataset[3]


def test_what_the_loader_reads_is_listed_whatever_its_suffix(tmp_path):
    image = Image.new("RGB", (6, 4), (255, 0, 0))
    kinds = {
        "jfif": "JPEG",
        "jp2": "JPEG2000",
        "tga": "TGA",
        "avif": "AVIF",
        "0001": "PNG",
        "": "GIF",
    }
    kinds = {suffix: kind for suffix, kind in kinds.items() if kind in Image.SAVE}
    for suffix, kind in kinds.items():
        image.save(tmp_path / f"a.{suffix}".rstrip("."), kind)
    (tmp_path / "notes").write_text("no image")
    for name in ("scan.heic", "photo.HEIC"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (tmp_path / "readme.txt").write_text("which is usual beside images")
    with pytest.warns(
        UserWarning, match=r"files left out, .* no image in them: 2 \.heic, 1 without suffix"
    ):
        dataset = ImageFolder(tmp_path)
    assert dataset.ids == sorted(f"a.{suffix}".rstrip(".") for suffix in kinds)
    for sample in dataset:
        torch.testing.assert_close(
            sample.image[:, 1, 1], torch.tensor([1.0, 0, 0]), atol=0.02, rtol=0
        )


def test_classes_are_the_folders_whatever_is_in_them(tmp_path, draw):
    for name in ("cat/1.png", "emu/1.png", "@eaDir/1.png", ".thumbs/1.png", "masks/cat/1.png"):
        draw(tmp_path / name)
    (tmp_path / "ant").mkdir()
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog/1.heic").write_bytes(b"of a kind that Pillow does not read")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match="left out|without an image") as caught:
        dataset = ImageFolder(tmp_path, labels="sorted")
    assert dataset.class_names == ["ant", "cat", "dog", "emu"]
    assert [(sample.id, sample.label) for sample in dataset] == [("cat/1.png", 1), ("emu/1.png", 3)]
    words = " ".join(str(warning.message) for warning in caught)
    assert "no image in them: 1 .heic" in words
    assert "classes without an image: ant, dog" in words


def test_class_numbers_are_those_of_torchvision(tmp_path, draw):
    for name in ("b/1.png", "B/1.png", "10/1.png", "9/1.png", "é/1.png", "a/deep/1.png"):
        draw(tmp_path / name)
    (tmp_path / "aa").mkdir()
    theirs = datasets.ImageFolder(tmp_path, allow_empty=True)
    with pytest.warns(UserWarning, match="classes without an image: aa"):
        ours = ImageFolder(tmp_path, labels="sorted")
    assert ours.class_names == theirs.classes
    assert [str(tmp_path / id) for id in ours.ids] == [path for path, _ in theirs.samples]
    assert [sample.label for sample in ours] == theirs.targets


def test_two_masks_of_one_name_are_refused(tmp_path, draw):
    draw(tmp_path / "a.png")
    draw_mask(tmp_path / "masks/a.png", (0, 0, 4, 4))
    draw_mask(tmp_path / "masks/a.bmp", (0, 0, 9, 9))
    with pytest.raises(
        ValueError, match=r"masks: expected one file of a name, got a\.bmp and a\.png"
    ):
        ImageFolder(tmp_path)


def test_a_mask_belongs_to_the_whole_name_of_its_image(tmp_path, draw):
    for number in (1, 2):
        draw(tmp_path / "frame.png").rename(tmp_path / f"frame.000{number}")
        draw_mask(tmp_path / f"masks/frame.000{number}.png", (number, 0, 9, 9))
    boxes = [sample.boxes.tolist() for sample in ImageFolder(tmp_path)]
    assert boxes == [[[1, 0, 9, 9]], [[2, 0, 9, 9]]]


@pytest.mark.parametrize(
    "name", ["a\u2028b.png", "a\x85b.png", "\u2028a.png", "a\x1cb.png", '"a\nb.png"']
)
def test_a_name_with_what_some_take_for_the_end_of_a_line_keeps_its_box(tmp_path, draw, name):
    image = name.strip('"')
    draw(tmp_path / image)
    text = f"file,x0,y0,x1,y1\r\n{name},1,2,3,4\r\n"
    (tmp_path / "boxes.csv").write_bytes(text.encode())
    dataset = ImageFolder(tmp_path)
    assert dataset.ids == [image]
    assert dataset[0].boxes.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(("disk", "table"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_letters_with_accents_are_the_same_in_one_character_or_two(tmp_path, draw, disk, table):
    on_disk, written = (normalize(form, "caf\u00e9") for form in (disk, table))
    draw(tmp_path / f"images/{on_disk}.png")
    (tmp_path / "boxes.csv").write_text(f"file,x0,y0,x1,y1\n{written}.png,1,2,3,4\n")
    (tmp_path / "masks").mkdir()
    Image.new("L", (40, 30), 1).save(tmp_path / f"masks/{written}.png")
    (sample,) = ImageFolder(tmp_path)
    assert sample.id == f"{on_disk}.png"
    assert sample.boxes.tolist() == [[1, 2, 3, 4]]
    assert sample.mask.all()


def test_a_label_that_pandas_wrote_as_a_float_is_the_class_of_that_number(tmp_path, draw):
    for name in "ab":
        draw(tmp_path / f"{name}.png")
    table = "file,x0,y0,x1,y1,label\na.png,1,2,3,4,2.0\nb.png,1,2,3,4,2.5\n"
    (tmp_path / "boxes.csv").write_text(table)
    dataset = ImageFolder(tmp_path)
    assert dataset[0].label == 2
    with pytest.raises(DataError, match="label: expected"):
        dataset[1]
    assert ImageFolder(tmp_path, class_names=["2.0", "2.5", "x"])[0].label == 0


@pytest.mark.parametrize("far", ["9.0000000001", "9.0000001"])
def test_a_box_thinner_than_single_precision_is_the_error_of_its_line(tmp_path, draw, far):
    draw(tmp_path / "a.png")
    (tmp_path / "boxes.csv").write_text(f"file,x0,y0,x1,y1\na.png,9,1,{far},4\n")
    with pytest.raises(DataError, match=r"boxes\.csv:2: box .* has no area"):
        ImageFolder(tmp_path)[0]
