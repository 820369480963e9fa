import pytest

from captum_robust.data import DataError, load_dataset
from captum_robust.data.voc import PascalVOC


@pytest.fixture
def root(tmp_path, draw, write, voc_xml):
    for stem in ("000001", "000002", "000003"):
        draw(tmp_path / "JPEGImages" / f"{stem}.jpg")
    two_dogs = [("dog", 1, 1, 40, 30), ("dog", 3, 4, 3, 4), ("cat", 5, 5, 9, 9, 1)]
    write(tmp_path / "Annotations/000001.xml", voc_xml(*two_dogs))
    write(tmp_path / "Annotations/000002.xml", voc_xml(("cat", 2, 2, 9, 9), ("cat", 1, 1, 3, 3, 1)))
    write(tmp_path / "Annotations/000003.xml", voc_xml(("dog", 2, 2, 9, 9)))
    write(tmp_path / "ImageSets/Main/val.txt", "000001\n000002\n")
    return tmp_path


def test_one_based_inclusive_boxes_become_half_open(root):
    dataset = load_dataset("voc", root)
    assert dataset.ids == ["000001#dog", "000002#cat"]
    # The whole image of 40×30, and a single pixel.
    assert dataset[0].boxes.tolist() == [[0, 0, 40, 30], [2, 3, 3, 4]]


def test_difficult_objects_count_only_on_request(root):
    assert PascalVOC(root)[1].boxes.tolist() == [[1, 1, 9, 9]]
    dataset = PascalVOC(root, difficult=True)
    assert dataset.ids == ["000001#cat", "000001#dog", "000002#cat"]
    assert dataset[2].boxes.tolist() == [[1, 1, 9, 9], [0, 0, 3, 3]]


def test_the_split_is_a_list_or_every_image(root):
    assert PascalVOC(root, None).ids == ["000001#dog", "000002#cat", "000003#dog"]
    with pytest.raises(FileNotFoundError, match=r"test\.txt: no such file"):
        PascalVOC(root, "test")


def test_labels_come_from_the_mapping_then_from_the_names(root):
    assert PascalVOC(root)[0].label is None
    dataset = PascalVOC(root, category_to_class={"dog": 207}, class_names=["bird", "Cat", "dog"])
    assert [sample.label for sample in dataset] == [207, 1]


def test_an_image_without_annotation_or_objects_has_no_boxes(root, write, voc_xml):
    (root / "Annotations/000001.xml").unlink()
    write(root / "Annotations/000002.xml", voc_xml())
    dataset = PascalVOC(root)
    assert dataset.ids == ["000001", "000002"]
    assert all(sample.label is None and sample.boxes.shape == (0, 4) for sample in dataset)


def test_a_missing_image_is_listed_and_raises(root):
    (root / "JPEGImages/000001.jpg").unlink()
    dataset = PascalVOC(root)
    with pytest.raises(DataError, match=r"000001\.jpg: no such image"):
        dataset[0]
    assert len(dataset[1].boxes) == 1
    assert PascalVOC(root, skip_missing=True).ids == ["000002#cat"]


def test_broken_xml_is_the_error_of_its_own_sample(root, write):
    write(root / "Annotations/000001.xml", "<annotation>\n<object>\n")
    dataset = PascalVOC(root)
    with pytest.raises(DataError, match=r"000001\.xml:3: not well-formed XML"):
        dataset[0]
    assert len(dataset[1].boxes) == 1


def test_a_zero_based_box_is_one_pixel_out_and_clipped_a_negative_one_refused(root, write, voc_xml):
    write(root / "Annotations/000001.xml", voc_xml(("dog", 0, 0, 10, 10)))
    assert PascalVOC(root)[0].boxes.tolist() == [[0, 0, 10, 10]]
    write(root / "Annotations/000001.xml", voc_xml(("dog", -1, 1, 10, 10)))
    with pytest.raises(DataError, match=r"000001\.xml:8: .*outside"):
        PascalVOC(root)[0]


@pytest.mark.parametrize("folder", ["JPEGImages", "Annotations"])
def test_a_missing_folder_is_raised_at_once(root, folder):
    (root / folder).rename(root / "away")
    with pytest.raises(FileNotFoundError, match=f"{folder}: no such folder"):
        PascalVOC(root)
