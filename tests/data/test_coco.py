import json
from contextlib import suppress

import numpy as np
import pytest
import torch

from captum_robust.data import DataError, coco_mask, load_dataset
from captum_robust.data.coco import Coco

CAT, DOG = {"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}
SQUARE = [[5, 6, 15, 6, 15, 26, 5, 26]]


def annotation(id, image_id, category_id, bbox, segmentation=None, iscrowd=0):
    return {
        "id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox,
        "segmentation": segmentation or [], "iscrowd": iscrowd,
    }  # fmt: skip


@pytest.fixture
def content():
    """Three images of 40×30: two cats and a dog; a dog in a crowd; nothing."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2, 3)
        ],
        "annotations": [
            annotation(10, 1, 17, [5, 6, 10, 20], SQUARE),
            annotation(11, 1, 17, [20, 0, 20.5, 5.5], [[20, 0, 40, 0, 40, 5, 20, 5]]),
            annotation(12, 1, 18, [0, 0, 40, 30]),
            annotation(13, 2, 18, [0, 0, 4, 4]),
            annotation(14, 2, 18, [0, 0, 40, 30], iscrowd=1),
        ],
        "categories": [CAT, DOG],
    }


@pytest.fixture
def root(tmp_path, draw, content):
    for image in content["images"]:
        draw(tmp_path / "val2017" / image["file_name"])
    (tmp_path / "annotations").mkdir()
    save(tmp_path, content)
    return tmp_path


def runs(counts):
    return {"size": [30, 40], "counts": counts}


def save(root, content):
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content, indent=0))


def test_a_sample_is_an_image_and_a_category(root):
    dataset = load_dataset("coco", root)
    assert dataset.ids == ["1.png#cat", "1.png#dog", "2.png#dog", "3.png"]
    cats, dog, _, nothing = dataset
    assert cats.boxes.tolist() == [[5, 6, 15, 26], [20, 0, 40, 5.5]]
    assert dog.boxes.tolist() == [[0, 0, 40, 30]]
    assert (nothing.boxes.shape, nothing.label, nothing.mask) == ((0, 4), None, None)


def test_crowds_are_left_out(root):
    assert Coco(root)[2].boxes.tolist() == [[0, 0, 4, 4]]


def test_the_mask_is_the_union_of_the_objects(root):
    cats, dog, *_ = Coco(root)
    expected = torch.zeros(30, 40, dtype=torch.bool)
    expected[6:26, 5:15] = True
    expected[0:5, 20:40] = True
    assert cats.mask.equal(expected)
    assert dog.mask is None  # its segmentation is empty


def test_runs_go_down_the_columns_and_begin_with_background():
    # Columns of 4: two background, three object, and so on to 4×3 pixels.
    runs = {"size": [4, 3], "counts": [2, 3, 7]}
    expected = [[0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert coco_mask.union_mask([runs], (4, 3)).int().tolist() == expected
    # The same compressed: a character a run, 48 and the number.
    compressed = {"size": [4, 3], "counts": "237"}
    assert coco_mask.union_mask([compressed], (4, 3)).int().tolist() == expected


def test_masks_are_those_of_pycocotools():
    library = pytest.importorskip("pycocotools.mask")
    draw = np.random.default_rng(0)
    for _ in range(300):
        height, width, corners = (int(n) for n in draw.integers(3, 40, size=3))
        outline = draw.uniform(-20, 60, size=2 * corners).round(draw.integers(0, 3)).tolist()
        filled = library.frPyObjects([outline], height, width)
        code = {"size": [height, width], "counts": filled[0]["counts"].decode()}
        expected = torch.from_numpy(library.decode(filled)[..., 0]).bool()
        assert coco_mask.union_mask([[outline]], (height, width)).equal(expected), outline
        assert coco_mask.union_mask([code], (height, width)).equal(expected)


@pytest.mark.parametrize("far", [1e9, 1e300])
def test_of_a_polygon_that_reaches_far_beyond_the_image_the_part_inside_counts(far):
    # A library in C lost the process here.
    triangle = [0, 0, far, 0, 0, far]
    assert coco_mask.union_mask([[triangle]], (5, 6)).all()
    right = [3, -far, far, -far, far, far, 3, far]
    mask = coco_mask.union_mask([[right]], (5, 6))
    assert mask.sum(dim=0).tolist() == [0, 0, 0, 5, 5, 5]
    outside = [far, 0, far, 5, 2 * far, 5]
    assert not coco_mask.union_mask([[outside]], (5, 6)).any()


def test_compressed_runs_are_decoded(root, content):
    mask_api = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((30, 40), dtype=np.uint8, order="F")
    mask[3:9, 4:11] = 1
    code = mask_api.encode(mask)
    content["annotations"][3]["segmentation"] = {**code, "counts": code["counts"].decode()}
    save(root, content)
    assert Coco(root)[2].mask.equal(torch.from_numpy(mask.astype(bool)))


@pytest.mark.parametrize(
    "segmentation",
    [
        *(
            [["a", "b"]],
            {"size": [1, 1], "counts": [1]},
            {"counts": [1]},
            [[1]],
            {"size": [30, 40]},
        ),
        *([[1, 1]], [[1, 1, 3, 3]], [SQUARE[0], [1, 1, 3, 3]], [[1, 1, 3, 3], SQUARE[0]]),
        *([[1, 1, 3, 1, 3, 3, 1]], [SQUARE[0] + [7]], [["a"] * 6], [[[1]] * 6], "polygon", 7),
        *([[0, 0, 5, 0, 5, float("inf")]], [[0, 0, 5, 0, 5, float("nan")]], [[10**400] * 6]),
        *(runs([1]), runs([600, 601]), runs([-1, 1201]), runs([1199.5, 0.5]), runs(["1200"])),
        *(runs("1"), runs("X"), runs("o" * 9), runs("é"), runs([]), runs({}), runs([True] * 1200)),
    ],
)
def test_a_broken_segmentation_is_a_data_error_naming_the_annotation(root, content, segmentation):
    content["annotations"][3]["segmentation"] = segmentation
    save(root, content)
    with pytest.raises(DataError, match=r"instances_val2017\.json: segmentation of annotation 13"):
        Coco(root)[2]


def test_labels_come_from_the_mapping_then_from_the_names(root):
    assert Coco(root)[0].label is None
    dataset = Coco(root, category_to_class={"dog": 207}, class_names=["bird", "cat"])
    assert [sample.label for sample in dataset] == [1, 207, 207, None]


def test_categories_select_samples(root):
    assert Coco(root, categories=["cat"]).ids == ["1.png#cat"]
    with pytest.raises(ValueError, match=r"category of COCO: .*got 'cta'; did you mean 'cat'"):
        Coco(root, categories=["cta"])


def test_a_json_file_takes_the_images_beside_it_or_where_told(root):
    path = root / "annotations/instances_val2017.json"
    assert len(Coco(path, images=root / "val2017")[0].boxes) == 2
    path.rename(root / "val2017/mine.json")
    assert len(Coco(root / "val2017/mine.json")[0].boxes) == 2
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        Coco(root / "val2017/mine.json", images=root / "nowhere")


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ([0, 0, 0, 5], "no area"),
        ([0, 0, 50, 5], "outside the image"),
        ([0.1, 0.2, 0.4, 0.7], "expected pixels, got fractions of the image"),
        ([0, 0, float("nan"), 5], "not finite"),
        ([0, 0, 5], "expected bbox"),
        (None, "expected bbox"),
    ],
)
def test_a_bad_box_is_a_data_error_naming_the_annotation(root, content, bbox, reason):
    content["annotations"][3]["bbox"] = bbox
    save(root, content)
    with pytest.raises(DataError, match=rf"instances_val2017\.json: annotation 13: .*{reason}"):
        Coco(root)[2]


def test_an_annotation_without_image_is_listed_and_raises(root, content):
    content["annotations"].append(annotation(15, 99, 17, [0, 0, 5, 5]))
    save(root, content)
    (root / "val2017/2.png").unlink()
    dataset = Coco(root)
    assert dataset.ids[-1] == "image_id=99#cat"
    with pytest.raises(DataError, match="annotation 15: no image with id 99"):
        dataset[4]
    with pytest.raises(DataError, match=r"2\.png: No such file"):
        dataset[2]
    assert Coco(root, skip_missing=True).ids == ["1.png#cat", "1.png#dog", "3.png"]


def test_boxes_drawn_on_another_size_are_refused(root, content):
    content["images"][0]["width"] = 640
    save(root, content)
    with pytest.raises(DataError, match="image 1: annotates an image of 640×30"):
        Coco(root)[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{\n{", "json:2: not JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": {}}', "no list 'annotations'"),
        ('{"images": [{}], "annotations": [], "categories": []}', "every item of 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "no images"),
    ],
)
def test_a_file_of_another_form_is_refused_at_once(root, write, text, reason):
    write(root / "annotations/instances_val2017.json", text)
    with pytest.raises(ValueError, match=reason):
        Coco(root)


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_an_id_of_two_is_refused_because_it_would_swap_boxes_or_classes(root, content, kind):
    same = dict(content[kind][0])
    content[kind].append(same)  # the same once more, as in files that were merged
    save(root, content)
    assert len(Coco(root)) == 4
    same.update(file_name="2.png", name="bird")
    save(root, content)
    with pytest.raises(ValueError, match=rf"gives the id 17? to two of its {kind}"):
        Coco(root)


@pytest.mark.parametrize("written", [0, "0", False, "false", "0.0", None])
def test_what_is_written_as_no_crowd_is_none(root, content, written):
    content["annotations"][3]["iscrowd"] = written
    save(root, content)
    assert Coco(root)[2].boxes.tolist() == [[0, 0, 4, 4]]


@pytest.mark.parametrize("written", [1, "1", True, "True", "1.0"])
def test_what_is_written_as_a_crowd_is_left_out(root, content, written):
    content["annotations"][3]["iscrowd"] = written
    save(root, content)
    assert Coco(root).ids == ["1.png#cat", "1.png#dog", "3.png"]


@pytest.mark.parametrize("written", [2, "maybe", [0], {}])
def test_another_mark_of_a_crowd_is_the_error_of_its_sample(root, content, written):
    content["annotations"][3]["iscrowd"] = written
    save(root, content)
    with pytest.raises(DataError, match="annotation 13: expected iscrowd 0 or 1, got"):
        Coco(root)[2]


def test_sizes_may_be_text_or_missing(root, content):
    content["images"][0] |= {"height": "30", "width": 40.0}
    content["images"][1] |= {"height": None, "width": ""}
    content["images"][2] |= {"height": "tall"}
    save(root, content)
    dataset = Coco(root)
    assert len(dataset[0].boxes) == 2
    assert len(dataset[2].boxes) == 1
    with pytest.raises(DataError, match="image 3: expected a number of pixels, got 'tall'"):
        dataset[3]


def test_an_image_may_be_named_by_its_url_alone(root, content):
    del content["images"][0]["file_name"]
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/val2017/1.png?size=full"
    save(root, content)
    assert Coco(root)[0].id == "1.png#cat"


ODD = ["\ud800.png", "a\0.png", "[.png", 7, None, [], {}, [[[[]]]], "/dev/zero"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("key", ["file_name", "coco_url"])
def test_an_odd_file_name_is_the_error_of_its_sample(root, content, name, key):
    del content["images"][0]["file_name"]
    content["images"][0][key] = name
    save(root, content)
    for skip_missing in (False, True):
        dataset = Coco(root, skip_missing=skip_missing)
        "".join(dataset.ids).encode()
        assert [len(dataset[i].boxes) for i in (-2, -1)] == [1, 0]
    with pytest.raises(DataError):
        Coco(root)[0]


def test_bytes_of_a_file_name_are_those_on_the_disk(root, content):
    content["images"][0]["file_name"] = "caf.png"
    save(root, content)
    path = root / "annotations/instances_val2017.json"
    path.write_bytes(path.read_bytes().replace(b"caf", b"caf\xe9"))
    (root / "val2017/1.png").rename(root / "val2017/caf\udce9.png")
    dataset = Coco(root)
    assert dataset.ids[0] == r"caf\xe9.png#cat"
    assert len(dataset[0].boxes) == 2


@pytest.mark.parametrize("odd", [[], {}, None, [[[[[1]]]]], "\ud800", 10**400, 1.5])
@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "bbox", "segmentation"])
def test_an_odd_annotation_leaves_the_other_samples(root, content, key, odd):
    content["annotations"][3][key] = odd
    save(root, content)
    dataset = Coco(root)
    "".join(dataset.ids).encode()
    usable = 0
    for i in range(len(dataset)):
        with suppress(DataError):
            usable += dataset[i].id in ("1.png#cat", "1.png#dog", "3.png")
    assert usable == 3


@pytest.mark.parametrize("depth", [70, 900, 10**5])
def test_a_deep_annotation_is_the_error_of_its_sample(root, content, depth):
    content["annotations"][3]["segmentation"] = "DEEP"
    content["annotations"][0]["note"] = 'brackets [[[ and \\" {{{ in text'
    save(root, content)
    path = root / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace('"DEEP"', "[" * depth + "]" * depth))
    dataset = Coco(root)
    with pytest.raises(DataError, match="segmentation of annotation 13"):
        dataset[2]
    assert [len(dataset[i].boxes) for i in (0, 1, 3)] == [2, 1, 0]


def test_deep_json_that_never_ends_is_refused_at_once(root, write):
    for text in ("[" * 10**6, '{"images": ' + '\\"[' * 10**6):
        write(root / "annotations/instances_val2017.json", text)
        with pytest.raises(ValueError, match=r"json"):
            Coco(root)


def test_an_image_listed_twice_is_refused_because_ids_must_be_unique(root, content):
    content["images"].append({"id": 4, "file_name": "3.png"})
    save(root, content)
    with pytest.raises(ValueError, match=r"'3\.png' more than once"):
        Coco(root)


def test_a_missing_file_is_raised_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json: no such file"):
        Coco(tmp_path, "train2017")


def test_ids_as_text_are_those_of_the_numbers(root, content):
    expected = [(s.id, s.label, s.boxes.tolist()) for s in Coco(root, class_names=["cat", "dog"])]
    for each in content["annotations"]:
        each["category_id"], each["image_id"] = str(each["category_id"]), str(each["image_id"])
    save(root, content)
    found = [(s.id, s.label, s.boxes.tolist()) for s in Coco(root, class_names=["cat", "dog"])]
    assert found == expected
    assert {label for _, label, _ in found} == {0, 1, None}


def test_a_category_that_is_not_listed_is_the_error_of_its_sample(root, content):
    content["annotations"][3]["category_id"] = 77
    save(root, content)
    dataset = Coco(root)
    (id,) = (id for id in dataset.ids if id.endswith("#category 77"))
    with pytest.raises(DataError, match="annotation 13: category_id 77 is none of the file's"):
        dataset[dataset.ids.index(id)]


def test_two_categories_of_one_name_are_refused(root, content):
    content["categories"].append({"id": 99, "name": content["categories"][0]["name"]})
    save(root, content)
    with pytest.raises(ValueError, match=r"its categories \d+ and 99 are both called"):
        Coco(root)


@pytest.mark.parametrize("nothing", [[[]], [[], []]])
def test_polygons_of_no_point_are_no_mask_and_leave_the_box(root, content, nothing):
    content["annotations"][3]["segmentation"] = nothing
    save(root, content)
    sample = Coco(root)[2]
    assert sample.mask is None
    assert len(sample.boxes) == 1


def test_whole_run_lengths_may_be_written_as_floats(root, content):
    content["annotations"][3]["segmentation"] = {"size": [30.0, 40.0], "counts": [60.0, 30.0, 1110]}
    save(root, content)
    mask = Coco(root)[2].mask
    assert mask.sum() == 30
    assert mask[:, 2].all()  # the runs go down the columns of 30


@pytest.mark.parametrize(
    "name", ["../own.png", "../../{0}/own.png", "a/../../own.png", "/{1}/own.png", ".."]
)
@pytest.mark.parametrize("skip_missing", [False, True])
def test_a_file_outside_of_the_folder_of_images_is_not_read(
    root, draw, content, name, skip_missing
):
    draw(root / "own.png")
    content["images"][0]["file_name"] = name.format(root.name, root)
    save(root, content)
    first, *others = range(len(dataset := Coco(root, skip_missing=skip_missing)))
    with pytest.raises(DataError, match=r"expected a file_name in the folder of images, got"):
        dataset[first]
    assert dataset.ids[-1] == "3.png"
    assert dataset[others[-1]].image.shape == (3, 30, 40)


def test_dots_that_stay_in_the_folder_are_part_of_a_name(root, draw, content):
    draw(root / "val2017" / "a" / "..b.png")
    content["images"][0]["file_name"] = "x/../a/..b.png"
    save(root, content)
    (root / "val2017" / "x").mkdir()
    assert Coco(root)[0].image.shape == (3, 30, 40)


def test_an_outline_that_would_take_minutes_to_draw_is_refused():
    corners = [(x, y) for _ in range(100_000) for x, y in ((-1e9, -1e9), (1e9, 1e9), (-1e9, 1e9))]
    with pytest.raises(ValueError, match="polygon: expected outlines of at most 3355443 pixels"):
        coco_mask.union_mask([[np.ravel(corners).tolist()]], (480, 640))
    # A thousand of them do not fit together, though each does.
    with pytest.raises(ValueError, match="outlines of at most"):
        coco_mask.union_mask([[np.ravel(corners[:6]).tolist()]] * 1000, (480, 640))


def test_a_file_name_that_no_file_system_has_is_an_image_that_is_missing(root, content):
    content["images"][2]["file_name"] = "k" * 300 + ".png"
    save(root, content)
    assert Coco(root, skip_missing=True).ids == ["1.png#cat", "1.png#dog", "2.png#dog"]
    assert len(Coco(root)) == 4
    with pytest.raises(DataError, match=r"kkk.*too long"):
        Coco(root)[3]


def test_ids_of_millions_of_letters_are_refused_in_a_line(root, content):
    content["categories"][0]["name"] = content["categories"][1]["name"] = "k" * 3_000_000
    save(root, content)
    with pytest.raises(ValueError, match="are both called 'kkk") as caught:
        Coco(root)
    assert len(str(caught.value)) <= 2000
