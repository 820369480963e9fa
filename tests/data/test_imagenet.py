import pytest

from captum_robust.data import DataError, load_dataset
from captum_robust.data.imagenet import ImageNet, imagenet_names, imagenet_wnids

TENCH, GOLDFISH = "n01440764", "n01443537"
IMAGES = "ILSVRC/Data/CLS-LOC/val"
XMLS = "ILSVRC/Annotations/CLS-LOC/val"


@pytest.fixture
def root(tmp_path, draw, write, voc_xml):
    """Two images of 40×30: a goldfish with two boxes and a tench's, and a tench."""
    for name in ("val_1", "val_2"):
        draw(tmp_path / IMAGES / f"{name}.JPEG")
    goldfish = [(GOLDFISH, 4, 6, 20, 30), (GOLDFISH, 0, 0, 40, 10), (TENCH, 1, 1, 9, 9)]
    write(tmp_path / XMLS / "val_1.xml", voc_xml(*goldfish))
    write(tmp_path / XMLS / "val_2.xml", voc_xml((TENCH, 5, 5, 15, 15)))
    write(
        tmp_path / "LOC_val_solution.csv",
        "ImageId,PredictionString\n"
        f"val_1,{GOLDFISH} 4 6 20 30 {GOLDFISH} 0 0 40 10 {TENCH} 1 1 9 9 \n"
        f"val_2,{TENCH} 5 5 15 15 \n",
    )
    return tmp_path


def test_boxes_are_taken_as_they_are_and_only_of_the_images_class(root):
    dataset = load_dataset("imagenet", root)
    assert dataset.ids == ["val_1", "val_2"]
    assert dataset[0].label == imagenet_wnids()[GOLDFISH] == 1
    assert dataset[0].boxes.tolist() == [[4, 6, 20, 30], [0, 0, 40, 10]]
    assert dataset[1].label == 0


def test_xml_alone_and_csv_alone_give_the_same_samples(root):
    both = list(ImageNet(root))
    (root / "LOC_val_solution.csv").rename(root / "away.csv")
    xml_alone = list(ImageNet(root))
    (root / "away.csv").rename(root / "LOC_val_solution.csv")
    for path in (root / XMLS).iterdir():
        path.unlink()
    (root / XMLS).rmdir()
    csv_alone = list(ImageNet(root))
    for other in (xml_alone, csv_alone):
        for ours, theirs in zip(both, other, strict=True):
            assert (ours.id, ours.label) == (theirs.id, theirs.label)
            assert ours.boxes.equal(theirs.boxes)
            assert ours.image.equal(theirs.image)


def test_classes_are_counted_in_the_order_of_the_mapping_file(root, write):
    write(root / "LOC_synset_mapping.txt", f"{GOLDFISH} goldfish, carp\n{TENCH} tench\n")
    dataset = ImageNet(root)
    assert [sample.label for sample in dataset] == [0, 1]
    assert list(dataset.class_names) == ["goldfish", "tench"]


def test_the_packaged_classes_are_a_thousand_in_wnid_order():
    wnids = list(imagenet_wnids())
    assert len(wnids) == len(imagenet_names()) == 1000
    assert wnids == sorted(wnids)


def test_training_images_take_their_class_from_the_folder(tmp_path, draw, write, voc_xml):
    draw(tmp_path / "ILSVRC/Data/CLS-LOC/train" / GOLDFISH / "a.JPEG")
    draw(tmp_path / "ILSVRC/Data/CLS-LOC/train" / TENCH / "b.JPEG")
    boxed = tmp_path / "ILSVRC/Annotations/CLS-LOC/train" / GOLDFISH / "a.xml"
    write(boxed, voc_xml((GOLDFISH, 1, 2, 3, 4)))
    first, second = ImageNet(tmp_path, "train")
    assert (first.label, first.boxes.tolist()) == (1, [[1, 2, 3, 4]])
    assert (second.label, second.boxes.shape) == (0, (0, 4))


def test_an_image_without_annotation_has_no_boxes_and_no_class(root, draw):
    draw(root / IMAGES / "val_3.JPEG")
    sample = ImageNet(root)[2]
    assert (sample.id, sample.label, sample.boxes.shape) == ("val_3", None, (0, 4))


def test_an_annotation_without_image_is_listed_and_raises(root):
    (root / IMAGES / "val_1.JPEG").unlink()
    dataset = ImageNet(root)
    assert dataset.ids == ["val_1", "val_2"]
    with pytest.raises(DataError, match=r"val_1\.xml"):
        dataset[0]
    assert dataset[1].label == 0
    assert ImageNet(root, skip_missing=True).ids == ["val_2"]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((4, 6, 4, 30), "no area"),
        ((20, 6, 4, 30), "no area"),
        ((4, 6, 42, 30), "outside the image of 40×30"),
        ((-3, 6, 20, 30), "outside the image"),
        ((4, 6, "nan", 30), "not finite"),
        ((4, 6, "inf", 30), "not finite"),
        ((4, 6, "wide", 30), "four numbers"),
        ((40, 6, 41, 30), "outside the image"),  # all of it lies in the tolerance
    ],
)
def test_a_bad_box_is_a_data_error_naming_file_and_line(root, write, voc_xml, box, reason):
    write(root / XMLS / "val_1.xml", voc_xml((GOLDFISH, 1, 1, 5, 5), (GOLDFISH, *box)))
    with pytest.raises(DataError, match=rf"val_1\.xml:15: .*{reason}") as caught:
        ImageNet(root)[0]
    assert "\n" not in str(caught.value)


def test_a_box_one_pixel_beyond_the_image_is_clipped(root, write, voc_xml):
    write(root / XMLS / "val_1.xml", voc_xml((GOLDFISH, -1, -0.5, 41, 31)))
    assert ImageNet(root)[0].boxes.tolist() == [[0, 0, 40, 30]]


def test_boxes_drawn_on_another_size_are_refused(root, write, voc_xml):
    write(root / XMLS / "val_1.xml", voc_xml((GOLDFISH, 1, 1, 5, 5), size=(500, 375)))
    with pytest.raises(DataError, match=r"val_1\.xml: .*500×375.*40×30"):
        ImageNet(root)[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<annotation>\n<object>\n</annotation>", r"val_1\.xml:3: not well-formed"),
        ("", r"val_1\.xml:1: not well-formed"),
        ("<annotation>\n<object><bndbox/></object></annotation>", r"val_1\.xml:2: .*no <name>"),
        ('<!DOCTYPE a [\n<!ENTITY b "c">]><annotation/>', r"val_1\.xml:2: declares the entity"),
        ("<annotation><size><width>wide</width></size></annotation>", "number of pixels"),
    ],
)
def test_broken_xml_is_a_data_error_naming_the_line(root, write, text, reason):
    write(root / XMLS / "val_1.xml", text)
    with pytest.raises(DataError, match=reason):
        ImageNet(root)[0]


@pytest.mark.parametrize(
    "words", [f"{GOLDFISH} 1 2 3", f"{GOLDFISH} 1 2 3 four", f"{GOLDFISH} 5 5 1 1", "n0 1 1 5 5"]
)
def test_a_bad_line_of_the_csv_is_a_data_error_naming_it(root, write, words):
    (root / XMLS / "val_2.xml").unlink()
    write(root / "LOC_val_solution.csv", f"ImageId,PredictionString\n\nval_2,{words}\n")
    with pytest.raises(DataError, match=r"LOC_val_solution\.csv:3|none of the 1000") as caught:
        ImageNet(root)[1]
    assert "val_2" in str(caught.value) or "csv:3" in str(caught.value)


def test_what_is_missing_as_a_whole_is_raised_at_once(tmp_path, root, write):
    with pytest.raises(FileNotFoundError, match=r"CLS-LOC.val: no such folder"):
        ImageNet(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"split of ImageNet: .*got 'vall'; did you mean 'val'"):
        ImageNet(root, "vall")
    write(root / "LOC_val_solution.csv", "id,text\n")
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv:1: expected the header"):
        ImageNet(root)
    (root / "LOC_val_solution.csv").unlink()
    (root / XMLS).rename(root / "away")
    with pytest.raises(FileNotFoundError, match=r"nor LOC_val_solution\.csv"):
        ImageNet(root)
    for image in (root / IMAGES).iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="no images"):
        ImageNet(root)


@pytest.mark.data
def test_the_real_validation_images_all_load(real_data):
    dataset = ImageNet(real_data / "imagenet-val-400")
    samples = list(dataset)
    assert len(samples) == len(set(dataset.ids)) == 400
    assert all(sample.size == (227, 227) and len(sample.boxes) for sample in samples)
    first = samples[dataset.ids.index("ILSVRC2012_val_00000361")]
    # Read by hand in LOC_val_solution.csv: n02165105 38 53 190 202.
    assert first.boxes.tolist() == [[38, 53, 190, 202]]
    assert first.label == imagenet_wnids()["n02165105"]


def test_names_that_are_no_utf_8_are_read(root):
    images = root / "ILSVRC/Data/CLS-LOC/val"
    (images / "val_1.JPEG").rename(images / "caf\udce9.JPEG")
    (root / XMLS / "val_1.xml").rename(root / XMLS / "caf\udce9.xml")
    dataset = ImageNet(root, skip_missing=True)
    assert dataset.ids[0] == r"caf\xe9"
    assert dataset[0].boxes.tolist() == [[4, 6, 20, 30], [0, 0, 40, 10]]


def test_a_class_listed_twice_is_refused_because_it_would_shift_the_others(root, write):
    write(root / "LOC_synset_mapping.txt", f"{GOLDFISH} a\n{GOLDFISH} b\n{TENCH} c\n")
    with pytest.raises(ValueError, match=rf"mapping\.txt: names '{GOLDFISH}' more than once"):
        ImageNet(root)


def test_an_image_that_the_csv_names_twice_is_refused_unless_both_lines_say_the_same(root):
    with open(root / "LOC_val_solution.csv", "a") as file:
        file.write(f"val_2,{TENCH} 5 5 15 15\n")
    assert ImageNet(root)[1].label == 0
    with open(root / "LOC_val_solution.csv", "a") as file:
        file.write(f"val_2,{GOLDFISH} 5 5 15 15\n")
    with pytest.raises(ValueError, match=r"csv:5: names 'val_2' again, .* than .*csv:3"):
        ImageNet(root)


def test_two_xml_files_of_one_image_are_refused(root, write, voc_xml):
    write(root / XMLS / "more/val_2.xml", voc_xml((GOLDFISH, 5, 5, 15, 15)))
    with pytest.raises(ValueError, match=r"expected one file of a name, got .*val_2\.xml and"):
        ImageNet(root)
