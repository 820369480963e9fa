import os
import pickle

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


@pytest.mark.parametrize("other", ["000001.png", "small/000001.jpg"])
def test_two_images_of_one_name_are_refused(root, draw, other):
    draw(root / "JPEGImages" / other, (20, 15))
    with pytest.raises(ValueError, match=r"one file of a name, got 000001\..* and .*000001\."):
        PascalVOC(root)


@pytest.mark.parametrize("folder", ["JPEGImages", "Annotations"])
def test_a_missing_folder_is_raised_at_once(root, folder):
    (root / folder).rename(root / "away")
    with pytest.raises(FileNotFoundError, match=f"{folder}: no such folder"):
        PascalVOC(root)


def one_cat(name, encoding, declared, voc_xml):
    text = f'<?xml version="1.0" encoding="{declared}"?>' + voc_xml((name, 2, 2, 9, 9))
    return text.encode(encoding)


@pytest.mark.parametrize(
    ("name", "encoding", "declared"),
    [
        *(("猫", "gb2312", "GB2312"), ("猫", "gbk", "gbk"), ("㐀", "gb18030", "gb18030")),
        *(("镕", "gbk", "gb2312"), ("貓", "big5", "Big5"), ("①猫", "cp932", "Shift_JIS")),
        *(("裏", "cp950", "big5"), ("똠", "cp949", "ks_c_5601-1987"), ("①", "cp932", "sjis")),
        *(("고양이", "euc-kr", "EUC-KR"), ("猫", "euc-jp", "euc-jp"), ("кот", "koi8-r", "KOI8-R")),
        *(
            ("çat", "latin-1", "ISO-8859-1"),
            ("č", "cp1250", "windows-1250"),
            ("猫", "utf-8", "utf8"),
        ),
        *(("猫", "utf-16", "utf-16"), ("猫", "utf-16-be", "utf-16"), ("猫", "utf-8-sig", "gbk")),
    ],
)
def test_xml_in_the_encodings_of_the_world_is_read(root, voc_xml, name, encoding, declared):
    (root / "Annotations/000001.xml").write_bytes(one_cat(name, encoding, declared, voc_xml))
    dataset = PascalVOC(root, category_to_class={name: 7})
    assert dataset.ids[0] == f"000001#{name}"
    assert (dataset[0].label, dataset[0].boxes.tolist()) == (7, [[1, 1, 9, 9]])


@pytest.mark.parametrize(
    "declared",
    [
        *("utf-7", "idna", "punycode", "unicode_escape", "raw_unicode_escape", "hz", "base64"),
        *("rot13", "undefined", "utf-16", "utf-32", "cp037", "aliases", "x" * 5000, "no-such"),
    ],
)
def test_another_encoding_is_the_error_of_its_own_sample(root, voc_xml, declared):
    path = root / "Annotations/000001.xml"
    for text in (
        one_cat("cat", "ascii", declared, voc_xml),
        one_cat("é", "utf-8", declared, voc_xml),
    ):
        path.write_bytes(text)
        dataset = PascalVOC(root)
        with pytest.raises(DataError, match=r"000001\.xml:1: unknown encoding"):
            dataset[0]
        assert len(dataset[1].boxes) == 1


def test_bytes_that_the_encoding_lacks_are_named_with_their_line(root, voc_xml):
    text = one_cat("dog", "ascii", "euc-kr", voc_xml).replace(b"dog", b"d\xffg")
    (root / "Annotations/000001.xml").write_bytes(text)
    with pytest.raises(DataError, match=r"000001\.xml:4: .*no text in cp949"):
        PascalVOC(root)[0]


@pytest.mark.parametrize("mark", ["true", "True", " 1 ", "1.0", "yes"])
def test_a_mark_may_be_written_in_words(root, write, voc_xml, mark):
    write(root / "Annotations/000001.xml", voc_xml(("dog", 1, 1, 9, 9), ("dog", 1, 1, 5, 5, mark)))
    assert PascalVOC(root)[0].boxes.tolist() == [[0, 0, 9, 9]]
    assert len(PascalVOC(root, difficult=True)[0].boxes) == 2


@pytest.mark.parametrize("mark", ["false", "0.0", "no", ""])
def test_a_mark_that_is_not_set_may_be_written_in_words(root, write, voc_xml, mark):
    write(root / "Annotations/000001.xml", voc_xml(("dog", 1, 1, 9, 9, mark)))
    assert PascalVOC(root)[0].boxes.tolist() == [[0, 0, 9, 9]]


def test_another_mark_is_the_error_of_its_own_sample(root, write, voc_xml):
    write(root / "Annotations/000001.xml", voc_xml(("dog", 1, 1, 9, 9, "maybe")))
    with pytest.raises(DataError, match=r"000001\.xml:8: expected <difficult> 0 or 1, got 'maybe'"):
        PascalVOC(root)[0]


def test_deep_xml_is_the_error_of_its_own_sample(root, write):
    write(root / "Annotations/000001.xml", "<annotation>\n" + "<object>" * 10**6)
    dataset = PascalVOC(root)
    with pytest.raises(DataError, match=r"000001\.xml:2: more than 64 levels"):
        dataset[0]
    assert len(dataset[1].boxes) == 1


@pytest.mark.parametrize("split", ["val", None])
def test_names_that_are_no_utf_8_are_read(root, voc_xml, split):
    listing = root / "ImageSets/Main/val.txt"
    listing.write_bytes(b"caf\xe9\n" + listing.read_bytes())
    (root / "JPEGImages/000003.jpg").rename(root / "JPEGImages/caf\udce9.jpg")
    (root / "Annotations/000003.xml").rename(root / "Annotations/caf\udce9.xml")
    samples = {sample.id: sample for sample in PascalVOC(root, split)}
    assert set(samples) == {r"caf\xe9#dog", "000001#dog", "000002#cat"}
    assert samples[r"caf\xe9#dog"].boxes.tolist() == [[1, 1, 9, 9]]


def test_what_is_no_regular_file_is_the_error_of_its_own_sample(root):
    (root / "Annotations/000001.xml").unlink()
    os.mkfifo(root / "Annotations/000001.xml")
    dataset = PascalVOC(root)
    with pytest.raises(DataError, match=r"000001\.xml: a pipe, no file"):
        dataset[0]
    assert len(dataset[1].boxes) == 1
    (root / "Annotations/000001.xml").unlink()
    (root / "Annotations/000001.xml").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"000001\.xml: a device, no file"):
        PascalVOC(root)[0]


ONE = "<xmin>6</xmin><ymin>7</ymin><xmax>15</xmax><ymax>16</ymax>"


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (f"<name>dog</name><bndbox>{ONE}</bndbox><bndbox>{ONE}</bndbox>", "<bndbox> <xmin>"),
        (f"<name>red</name><name>blue</name><bndbox>{ONE}</bndbox>", "<name>"),
        (f"<name>dog</name><bndbox><xmin>1</xmin>{ONE}</bndbox>", "<bndbox> <xmin>"),
        (
            f"<name>a</name><difficult>0</difficult><difficult>1</difficult><bndbox>{ONE}</bndbox>",
            "<difficult>",
        ),
    ],
)
def test_two_of_what_an_object_has_once_are_its_samples_error(root, inner, said):
    file = root / "Annotations/000001.xml"
    file.write_text(f"<annotation>\n<object>{inner}</object></annotation>")
    dataset = PascalVOC(root)
    error = rf"000001\.xml:2: expected one {said} here, got 2"
    with pytest.raises(DataError, match=error):
        dataset[dataset.ids.index("000001")]


@pytest.mark.parametrize(
    "text",
    [
        "<annotations>\n<annotation><object>{}</object></annotation></annotations>",
        "<annotation>\n<objects><object>{}</object></objects></annotation>",
        "<annotation>\n<Object>{}</Object></annotation>",
        "<annotation>\n<item>{}</item></annotation>",
        "<annotation><object>{}</object>\n<OBJECT>{}</OBJECT></annotation>",
    ],
)
def test_objects_that_are_not_read_are_said(root, text):
    inner = f"<name>dog</name><bndbox>{ONE}</bndbox>"
    (root / "Annotations/000001.xml").write_text(text.format(inner, inner))
    dataset = PascalVOC(root)
    with pytest.raises(DataError, match=r"000001\.xml:2: a <\w+> that is none; expected <annot"):
        dataset[dataset.ids.index("000001")]


def test_the_message_of_a_huge_annotation_is_short(root):
    path = root / "Annotations/000001.xml"
    content, numbers = path.read_text(), "1 " * 300_000
    for element in "xmin", "name":
        start = content.index(f"<{element}>") + len(f"<{element}>")
        odd = numbers + content[start:] if element == "xmin" else content[start:]
        path.write_text(content[:start] + odd.replace("</difficult>", numbers + "</difficult>"))
        with pytest.raises(DataError) as caught:
            PascalVOC(root)[0]
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 2010
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("name", ["a\u2028b", "a\x85b", "\u2028ab", "a\u3000b"])
def test_a_name_in_the_list_may_hold_what_some_take_for_a_space(root, draw, write, voc_xml, name):
    draw(root / f"JPEGImages/{name}.jpg")
    write(root / f"Annotations/{name}.xml", voc_xml(("cat", 1, 1, 9, 9)))
    write(root / "ImageSets/Main/val.txt", f"{name}  1\n")
    (sample,) = load_dataset("voc", root)
    assert sample.id == f"{name}#cat"
