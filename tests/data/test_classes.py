import pytest

from captum_robust.data import load_dataset
from captum_robust.data.classes import ClassIndex, category_labels
from captum_robust.data.voc import PascalVOC


@pytest.mark.parametrize("text", ["missile", "Missile", " missile "])
def test_the_name_of_two_classes_is_refused(text):
    find = ClassIndex(["missile", "x", "missile"])
    with pytest.raises(ValueError, match=r"got '[mM]issile', the name of several \(0, 2\)"):
        find(text)
    assert (find("x"), find("2"), find("y")) == (1, 2, None)


def test_an_exact_spelling_comes_first():
    find = ClassIndex(["Crane", "crane", "traffic_light", "traffic light"])
    assert [find(name) for name in ("Crane", "crane", "traffic_light")] == [0, 1, 2]
    for name in ("CRANE", "Traffic Light"):
        with pytest.raises(ValueError, match="the name of several"):
            find(name)


def test_a_number_of_thousands_of_digits_is_no_class():
    assert ClassIndex()("9" * 5000) is None


def test_the_mapping_decides_where_the_names_cannot():
    names = ["missile", "x", "missile"]
    assert category_labels(["missile", "x"], {"missile": 2}, names) == {"missile": 2, "x": 1}
    with pytest.raises(ValueError, match="the name of several"):
        category_labels(["missile"], None, names)


def test_data_sets_refuse_the_name_of_two_classes(tmp_path, draw, write, voc_xml):
    draw(tmp_path / "JPEGImages/1.jpg")
    write(tmp_path / "Annotations/1.xml", voc_xml(("crane", 1, 1, 9, 9)))
    names = ["crane", "x", "crane"]
    with pytest.raises(ValueError, match=r"got 'crane', the name of several \(0, 2\)"):
        PascalVOC(tmp_path, None, class_names=names)
    assert (
        PascalVOC(tmp_path, None, class_names=names, category_to_class={"crane": 2})[0].label == 2
    )
    draw(tmp_path / "folder/crane/1.png")
    with pytest.raises(ValueError, match="the name of several"):
        load_dataset("folder", tmp_path / "folder", class_names=names)


def test_a_category_that_is_called_2_is_not_the_class_of_that_number():
    assert category_labels(["2", "b"], None, ["a", "b", "c"]) == {"2": None, "b": 1}
    assert category_labels(["2"], None, ["a", "2"]) == {"2": 1}


def test_letters_with_accents_are_the_same_in_one_character_or_two():
    one, two = "caf\u00e9", "cafe\u0301"
    assert ClassIndex(["tea", one])(two) == ClassIndex(["tea", two])(one) == 1
