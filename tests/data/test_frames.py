"""Images with boxes that users have at hand: triples, loaders of them, and data frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from captum_robust.benchmark import compare
from captum_robust.data import DataError, Sample
from captum_robust.data.frames import boxes_of
from captum_robust.data.given import sample_source
from captum_robust.models import Classifier

NAMES = ["ant", "bee", "cat"]
BOXES = [[[1.0, 2, 9, 12]], [[0.0, 0, 4, 4], [3, 3, 8, 8]], []]
LABELS = [2, 0, 1]


def pixels(n: int = 3) -> Tensor:
    """Images of whole levels, which PNG keeps."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 16, 12), generator=generator) / 255


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A file of each image, in a folder of its class."""
    paths = []
    for i, image in enumerate(pixels()):
        folder = tmp_path / NAMES[LABELS[i]]
        folder.mkdir()
        array = (image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{i}.png")
        paths.append(str(folder / f"{i}.png"))
    return paths


class Triples(Dataset[Any]):
    """A torch data set of (image, label, boxes)."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return pixels()[index], LABELS[index], torch.tensor(BOXES[index]).reshape(-1, 4)


def as_lists(items: list[Any]) -> Any:
    """A detector's ``collate_fn``: boxes of several numbers cannot be stacked."""
    images, labels, boxes = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), list(boxes)


def triples(form: Callable[[Tensor], Any]) -> list[Any]:
    return [(form(x), label, boxes) for x, label, boxes in Triples()]  # type: ignore[attr-defined]


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())


GIVEN: dict[str, Callable[[], Any]] = {
    "tensors": lambda: triples(lambda x: x),
    "PIL": lambda: triples(as_pil),
    "arrays": lambda: triples(lambda x: np.asarray(as_pil(x))),
    "lists of numbers": lambda: [
        (x, label, BOXES[i]) for i, (x, label) in enumerate(zip(pixels(), LABELS, strict=True))
    ],
    "data set": Triples,
    "subset": lambda: Subset(Triples(), [0, 1, 2]),
    "loader": lambda: DataLoader(Triples(), batch_size=1),
    "loader of lists": lambda: DataLoader(Triples(), batch_size=2, collate_fn=as_lists),
    "batches": lambda: [as_lists([Triples()[i] for i in some]) for some in ([0, 1], [2])],
}


def check_source(source: Any) -> None:
    assert len(source) == 3
    for i in range(3):
        sample = source[i]
        assert isinstance(sample, Sample)
        torch.testing.assert_close(sample.image, pixels()[i])
        assert sample.label == LABELS[i]
        assert sample.boxes.tolist() == BOXES[i]


@pytest.mark.parametrize("form", GIVEN)
def test_boxes_behind_the_label_are_the_samples(form: str) -> None:
    check_source(sample_source(GIVEN[form](), NAMES, lambda: 3))


def test_a_single_box_may_be_four_numbers() -> None:
    items = [(pixels()[0], 0, [1, 2, 9, 12]), (pixels()[1], 0, None)]
    source = sample_source(items, NAMES, lambda: 3)
    assert source[0].boxes.tolist() == [[1, 2, 9, 12]]
    assert source[1].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("third", "error"),
    [
        ([1, 2, 3], DataError),
        ([[1, 2, 3]], DataError),
        ([[5, 5, 5, 9]], DataError),  # without an area
        ([[0, 0, 50, 50]], DataError),  # beyond the image
        (torch.zeros(2, 4, 4), DataError),
        (7, TypeError),
        ("cat.png", TypeError),
    ],
)
def test_what_is_no_box_is_named(third: Any, error: type[Exception]) -> None:
    items = [(pixels()[0], 0, third)]
    with pytest.raises(error, match=r"0: box|dataset: expected samples"):
        sample_source(items, NAMES, lambda: 3)[0]


def frame_of(files: list[str], labels: list[Any], form: str) -> pd.DataFrame:
    if form == "boxes":
        return pd.DataFrame({"path": files, "label": labels, "boxes": BOXES})
    rows = [
        (file, label, *box)
        for file, label, boxes in zip(files, labels, BOXES, strict=True)
        for box in boxes or [[None] * 4]
    ]
    return pd.DataFrame(rows, columns=["file", "label", "x0", "y0", "x1", "y1"])


@pytest.mark.parametrize("form", ["boxes", "sides"])
@pytest.mark.parametrize("labels", [LABELS, [NAMES[label] for label in LABELS]])
@pytest.mark.filterwarnings("error")
def test_a_frame_gives_images_labels_and_boxes(
    files: list[str], form: str, labels: list[Any]
) -> None:
    check_source(sample_source(frame_of(files, labels, form), NAMES, lambda: 3))


def test_a_frame_of_paths_alone_has_no_labels(files: list[str]) -> None:
    source = sample_source(pd.DataFrame({"path": files}), NAMES, lambda: 3)
    assert [source[i].label for i in range(3)] == [None] * 3
    missing = pd.DataFrame({"path": files, "label": [2, np.nan, 1]})  # floats, as pandas has them
    source = sample_source(missing, NAMES, lambda: 3)
    assert [source[i].label for i in range(3)] == [2, None, 1]


def test_a_file_that_is_not_there_is_an_error_of_its_row(files: list[str]) -> None:
    source = sample_source(pd.DataFrame({"path": [files[0], "nowhere.png"]}), NAMES, lambda: 3)
    assert source[0].id.endswith("0.png")
    with pytest.raises(DataError, match=r"nowhere.png"):
        source[1]


WRONG = [
    ({"image": ["a.png"]}, "expected one column path .*got the columns image"),
    ({"path": ["a.png"], "file": ["a.png"]}, "expected one column path"),
    ({"path": ["a.png"], "x0": [1], "y1": [2]}, "expected x0, y0, x1 and y1, got no y0, x1"),
    (
        {"path": ["a"], "boxes": [[1, 2, 3, 4]], "x0": [1], "y0": [1], "x1": [2], "y1": [2]},
        "got both",
    ),
    ({"path": ["a.png", "a.png"], "label": [1, 2]}, "row 1, label: expected one an image, got 2"),
    ({"path": ["a.png", "b.png"], "label": ["ant", 2]}, "label: expected names only, got 2"),
    ({"path": ["a.png"], "label": [1.5]}, "label: expected class indices or names, got 1.5"),
    ({"path": ["a.png"], "boxes": [[1, 2, 3]]}, "row 0, boxes: expected M×4 numbers"),
    ({"path": ["a.png"], "boxes": ["1 2 3 4"]}, "row 0, boxes: expected M×4 numbers"),
]


@pytest.mark.parametrize(("columns", "message"), WRONG)
def test_a_wrong_frame_is_named(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_source(pd.DataFrame(columns), NAMES, lambda: 3)


def test_paths_that_are_none_are_named() -> None:
    with pytest.raises(TypeError, match="frame, row 0, path: expected a path, got int"):
        sample_source(pd.DataFrame({"path": [3]}), NAMES, lambda: 3)


def test_a_class_that_the_model_does_not_have_is_named(files: list[str]) -> None:
    frame = pd.DataFrame({"path": files, "label": ["ant", "bee", "catt"]})
    with pytest.raises(ValueError, match=r"class of the dataset: .*'catt'; did you mean 'cat'"):
        sample_source(frame, NAMES, lambda: 3)


def test_boxes_are_read_in_any_form() -> None:
    expected = torch.tensor([[1.0, 2, 3, 4]])
    for given in ([1, 2, 3, 4], [[1, 2, 3, 4]], np.array([1, 2, 3, 4]), expected, [expected[0]]):
        assert torch.equal(boxes_of(given, "boxes"), expected)
    for given in (None, [], np.zeros((0, 4)), torch.zeros(0, 4), float("nan")):
        assert boxes_of(given, "boxes").shape == (0, 4)


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(nn.Sequential(*parts), input_size=16, class_names=NAMES).eval()


@pytest.mark.parametrize("form", ["frame", "folder", "data set", "loader", "PIL"])
def test_compare_takes_them(form: str, files: list[str], model: Classifier, tmp_path: Path) -> None:
    given: dict[str, Callable[[], Any]] = {
        "frame": lambda: frame_of(files, LABELS, "boxes"),
        "folder": lambda: ImageFolder(str(tmp_path)),
        "data set": Triples,
        "loader": lambda: DataLoader(Triples(), batch_size=1),
        "PIL": lambda: [as_pil(x) for x in pixels()],
    }
    out = tmp_path.parent / f"{tmp_path.name}.run"
    result = compare(model, given[form](), ["Grad-CAM", "center_box"], out=out, progress=False)
    has_boxes = form not in ("folder", "PIL")
    table = result.table()
    assert set(table["n"]) == {2 if has_boxes else 0}
    labels = [row["label"] for row in result.select("SELECT label FROM images ORDER BY position")]
    expected = {"folder": [0, 1, 2], "PIL": [None] * 3}
    assert labels == expected.get(form, LABELS)


def test_other_labels_or_boxes_are_another_run(
    files: list[str], model: Classifier, tmp_path: Path
) -> None:
    out, frame = tmp_path / "run", frame_of(files, LABELS, "boxes")
    compare(model, frame, ["center_box"], out=out, progress=False)
    compare(model, frame.copy(), ["center_box"], out=out, progress=False)
    for column, value in (("label", [0, 0, 0]), ("boxes", [[[0, 0, 2, 2]], [], []])):
        with pytest.raises(ValueError, match="dataset"):
            compare(model, frame.assign(**{column: value}), ["center_box"], out=out, progress=False)


@pytest.mark.parametrize("form", ["pil", "path", "row", "frame"])
def test_boxes_turn_with_a_sideways_photograph(form: str, tmp_path: Path) -> None:
    stored = np.zeros((20, 40, 3), dtype=np.uint8)
    stored[2:6, 1:9] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    path = str(tmp_path / "sideways.png")
    Image.fromarray(stored).save(path, exif=exif)
    box = [[1.0, 2, 9, 6]]
    data: Any = {
        "pil": lambda: [(Image.open(path), 0, box)],
        "path": lambda: [(path, 0, box)],
        "row": lambda: [{"image": Image.open(path), "label": 0, "boxes": box}],
        "frame": lambda: pd.DataFrame({"path": [path], "label": [0], "boxes": [box]}),
    }[form]()
    sample = sample_source(data, NAMES, lambda: 3)[0]
    assert sample.size == (40, 20)
    rows, columns = (sample.image[0] == 1).nonzero(as_tuple=True)
    lit = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert sample.boxes.tolist() == [list(map(float, lit))]


@pytest.mark.parametrize("name", ["labels", "Label", "class", "bbox", "Boxes", "xmin", "X0"])
def test_columns_under_other_names_are_not_left_out(name: str, files: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"frame: expected the column .*, got {name}; rename it"):
        sample_source(pd.DataFrame({"path": files, name: [1, 1, 1]}), NAMES, lambda: 3)


BOXED = {
    "x, y, w, h": ["x", "y", "w", "h"],
    "x, y, width, height": ["x", "y", "width", "height"],
    "x1, y1, x2, y2": ["x1", "y1", "x2", "y2"],
    "X_Center, Y_Center, Width, Height": ["X_Center", "Y_Center", "Width", "Height"],
    "bbox_x, bbox_y": ["bbox_x", "bbox_y"],
    "bounding_box": ["bounding_box"],
    "boxes_xywh": ["boxes_xywh"],
    "xmin": ["xmin", "ymin", "xmax", "ymax"],
}


@pytest.mark.parametrize("named", BOXED)
def test_boxes_in_another_form_are_refused_not_left_out(named: str, files: list[str]) -> None:
    row = {"path": files[0]} | dict.fromkeys(BOXED[named], 1)
    with pytest.raises(ValueError, match=rf"frame: expected the column boxes .*, got {named}; "):
        sample_source(pd.DataFrame([row]), NAMES, lambda: 3)


def test_columns_that_hold_no_boxes_are_left_out(files: list[str]) -> None:
    row = {"path": files[0], "width": 40, "height": 20, "x": 1, "num_boxes": 2, "mailbox": 3}
    assert sample_source(pd.DataFrame([row]), NAMES, lambda: 3)[0].boxes.shape == (0, 4)
    row |= {"boxes": [[1, 2, 3, 4]], "bbox": [1, 2, 2, 2]}  # the form that is asked for is there
    boxes = sample_source(pd.DataFrame([row]), NAMES, lambda: 3)[0].boxes
    assert boxes.tolist() == [[1, 2, 3, 4]]


ROWS: dict[str, dict[str, Any]] = {
    "bbox": {"bbox": [1, 2, 3, 4]},
    "x0": {"x0": 1, "y0": 2, "x1": 3, "y1": 4},
    "x, y, w, h": dict.fromkeys("xywh", 1),
    "objects.bbox": {"objects": {"id": [1], "bbox": [[1, 2, 3, 4]]}},  # as of Hugging Face
    "annotations.bbox": {"annotations": [{"id": 1, "bbox": [1, 2, 3, 4]}]},
}


@pytest.mark.parametrize("named", ROWS)
@pytest.mark.parametrize("position", [0, 1])
def test_boxes_of_rows_are_never_left_out(named: str, position: int) -> None:
    rows: list[dict[str, Any]] = [{"image": torch.rand(3, 20, 40)} for _ in range(2)]
    rows[position] |= ROWS[named]
    with pytest.raises(ValueError, match=rf"row: expected the key boxes .*, got {named}; "):
        sample_source(rows, NAMES, lambda: 3)[position]


def test_column_twice(files: list[str]) -> None:
    frame = pd.DataFrame([[files[0], 0, 1]], columns=["path", "label", "label"])
    with pytest.raises(ValueError, match="frame: expected each column once, got 'label' twice"):
        sample_source(frame, NAMES, lambda: 3)


@pytest.mark.parametrize(
    "labels", [pd.array([2, None, 1], dtype="Int64"), pd.array(["cat", None, "bee"], "string")]
)
def test_missing_value_of_a_pandas_type_is_no_label(labels: Any, files: list[str]) -> None:
    source = sample_source(pd.DataFrame({"path": files, "label": labels}), NAMES, lambda: 3)
    assert [source[i].label for i in range(3)] == [2, None, 1]


def test_boxes_that_are_shares_of_the_image() -> None:
    with pytest.raises(DataError, match="which may be shares of the image"):
        boxes_of([[0.1, 0.2, 0.5, 1.0]], "boxes")


def test_image_without_pixels() -> None:
    source = sample_source([as_pil(pixels()[0]), Image.new("RGB", (0, 5))], None, lambda: 3)
    with pytest.raises(DataError, match="expected an image, got one without pixels"):
        source[1]


def test_boxes_as_text_are_shown_as_text() -> None:
    with pytest.raises(DataError, match=r"expected M×4 numbers .*, got '\[1, 2, 3, 4\]'"):
        boxes_of("[1, 2, 3, 4]", "boxes")
