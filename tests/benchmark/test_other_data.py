"""A folder holds another run where its data set's labels, boxes or files are others."""

from __future__ import annotations

import json
import os
import sqlite3
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder as TorchImageFolder

from captum_robust.attacks import FGSM
from captum_robust.benchmark import attack_images, compare
from captum_robust.data import Sample, load_dataset
from captum_robust.models import Classifier
from captum_robust.runs.store import RunStore
from tests.benchmark.conftest import make_classifier

PIXELS = torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))
BOX = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
MASK = torch.zeros(40, 48, dtype=torch.bool)
MASK[4:20, 4:20] = True
SAMPLES = [Sample(x, i, BOX, f"{i}", MASK) for i, x in enumerate(PIXELS)]


class Lazy(Dataset[Sample]):
    """Samples with boxes of its own, read when they are asked for."""

    def __init__(self, boxes: list[list[float]]) -> None:
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, i: int) -> Sample:
        return Sample(PIXELS[i], 0, torch.tensor([self.boxes[i]]), str(i))


def pictures(shade: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((40, 48, 3), shade, dtype=np.uint8))] * 2


def turned(labels: list[int]) -> DataLoader[Any]:
    def collate(batch: list[Any]) -> Any:
        images, old = zip(*batch, strict=True)
        return torch.stack(images), torch.tensor([labels[y] for y in old])

    return DataLoader(TensorDataset(PIXELS, torch.tensor([0, 1, 2])), collate_fn=collate)


MOVED = replace(SAMPLES[0], boxes=BOX + 4)
CHANGED = {
    "labels of pairs": ([(x, 0) for x in PIXELS], [(x, 1) for x in PIXELS], "labels"),
    "pixels of pairs": ([(x, 0) for x in PIXELS], [(1 - x, 0) for x in PIXELS], "images"),
    "pictures": (pictures(20), pictures(200), "images"),
    "a tensor": (PIXELS, 1 - PIXELS, "images"),
    "boxes": (SAMPLES, [MOVED, *SAMPLES[1:]], "boxes"),
    "masks": (SAMPLES, [replace(SAMPLES[0], mask=~MASK), *SAMPLES[1:]], "masks"),
    "labels of samples": (SAMPLES, [replace(s, label=3) for s in SAMPLES], "labels"),
    "tensors": (
        TensorDataset(PIXELS, torch.tensor([0, 1, 2])),
        TensorDataset(PIXELS, torch.tensor([0, 1, 1])),
        "labels",
    ),
    "a part": (
        Subset(TensorDataset(PIXELS, torch.tensor([0, 1, 2])), [0, 2]),
        Subset(TensorDataset(PIXELS, torch.tensor([0, 1, 1])), [0, 2]),
        "labels",
    ),
    "own data set": (Lazy([[4.0, 4, 20, 20]] * 2), Lazy([[4.0, 4, 20, 21]] * 2), "boxes"),
    "collate_fn": (turned([0, 1, 2]), turned([2, 1, 0]), "collate"),
}


def refuses(model: Classifier, first: Any, second: Any, out: Path, word: str) -> None:
    """Both kinds of run refuse the second data set and go on with the first."""
    runs: tuple[Callable[[Any], Any], ...] = (
        lambda data: compare(model, data, ["center_box"], out=out / "a", progress=False),
        lambda data: attack_images(model, data, {"fgsm": FGSM(model)}, out / "b", progress=False),
    )
    for run in runs:
        run(first)
        run(first)
        with pytest.raises(ValueError, match=rf"holds another run \(.*checksums\.{word}"):
            run(second)


@pytest.mark.parametrize("kind", CHANGED)
def test_other_data_in_memory_are_another_run(kind: str, tmp_path: Path) -> None:
    first, second, word = CHANGED[kind]
    refuses(make_classifier(), first, second, tmp_path, word)


def draw(path: Path, shade: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (40, 30), (shade,) * 3 if mode == "RGB" else shade).save(path)


def later(path: Path) -> None:
    """As written a second later; the clock of a file system may be coarse."""
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 1))


XML = "<annotation><object><name>ray</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>{}</xmax>"
XML += "<ymax>9</ymax></bndbox></object></annotation>"


def folder(root: Path) -> Callable[[], Any]:
    draw(root / "images/ray/a.png", 100)
    draw(root / "masks/ray/a.png", 1, "L")
    return lambda: load_dataset("folder", root, class_names=make_classifier().class_names)


def voc(root: Path) -> Callable[[], Any]:
    draw(root / "JPEGImages/a.jpg", 100)
    (root / "Annotations").mkdir()
    (root / "Annotations/a.xml").write_text(XML.format(9))
    return lambda: load_dataset("voc", root, split=None, class_names=make_classifier().class_names)


def torchs(root: Path) -> Callable[[], Any]:
    draw(root / "ray/a.png", 100)
    return lambda: TorchImageFolder(str(root))


def several(root: Path) -> Callable[[], Any]:
    draw(root / "ray/a.png", 100)
    return lambda: ConcatDataset([TorchImageFolder(str(root)), TorchImageFolder(str(root))])


@pytest.mark.parametrize(
    ("make", "file", "word"),
    [
        (folder, "masks/ray/a.png", "masks"),
        (folder, "images/ray/a.png", "images"),
        (voc, "Annotations/a.xml", "xml"),
        (voc, "JPEGImages/a.jpg", "images"),
        (torchs, "ray/a.png", "files"),
        (several, "ray/a.png", "datasets"),
    ],
)
def test_a_file_that_was_written_again_makes_another_run(
    make: Callable[[Path], Callable[[], Any]], file: str, word: str, tmp_path: Path
) -> None:
    opened = make(tmp_path / "data")
    first = opened()
    compare(make_classifier(), first, ["center_box"], out=tmp_path / "o", progress=False)
    later(tmp_path / "data" / file)
    with pytest.raises(ValueError, match=rf"another run \(.*checksums\.{word}"):
        compare(make_classifier(), opened(), ["center_box"], out=tmp_path / "o", progress=False)


def test_the_boxes_of_an_xml_file_that_was_edited_in_place_make_another_run(tmp_path: Path) -> None:
    opened, file = voc(tmp_path / "data"), tmp_path / "data/Annotations/a.xml"
    compare(make_classifier(), opened(), ["center_box"], out=tmp_path / "o", progress=False)
    before = file.stat()
    file.write_text(XML.format(8))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"checksums\.entries"):
        compare(make_classifier(), opened(), ["center_box"], out=tmp_path / "o", progress=False)


def test_other_class_names_of_the_data_set_are_another_run(tmp_path: Path) -> None:
    draw(tmp_path / "data/a.png", 100)
    options: dict[str, Any] = {"out": tmp_path / "o", "progress": False}
    names = list(make_classifier().class_names or ())
    data = [load_dataset("folder", tmp_path / "data", class_names=n) for n in (names, names[::-1])]
    compare(make_classifier(), data[0], ["center_box"], **options)
    with pytest.raises(ValueError, match=r"checksums\.class_names"):
        compare(make_classifier(), data[1], ["center_box"], **options)


def test_rows_of_another_number_of_threads_come_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = make_classifier(), {"out": tmp_path, "progress": False}
    here = torch.get_num_threads()
    compare(model, SAMPLES, {"a": "center_box"}, **options)
    assert json.loads((tmp_path / "run.json").read_text())["threads"] == here
    monkeypatch.setattr(torch, "get_num_threads", lambda: here + 3)
    with warnings.catch_warnings():  # nothing is made
        warnings.simplefilter("error")
        compare(model, SAMPLES, {"a": "center_box"}, **options)
    with sqlite3.connect(tmp_path / "rows.sqlite") as rows:
        rows.execute("DELETE FROM results WHERE position = 0")
    rows.close()
    with pytest.warns(UserWarning, match=f"{here} threads, here are {here + 3}: .*={here}$"):
        compare(model, SAMPLES, {"a": "center_box"}, **options)
    assert json.loads((tmp_path / "run.json").read_text())["threads"] == here


def test_more_images_behind_the_limit_are_the_same_run(tmp_path: Path) -> None:
    draw(tmp_path / "data/ray/a.png", 100)
    model, options = make_classifier(), {"out": tmp_path / "o", "progress": False, "limit": 1}
    compare(model, tmp_path / "data", ["center_box"], **options)
    draw(tmp_path / "data/ray/b.png", 100)
    compare(model, tmp_path / "data", ["center_box"], **options)
    compare(model, [(x, 0) for x in PIXELS], ["center_box"], **options | {"out": tmp_path / "p"})
    more = [(PIXELS[0], 0), (PIXELS[1], 2)]
    compare(model, more, ["center_box"], **options | {"out": tmp_path / "p"})


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    compare(make_classifier(), SAMPLES, ["center_box"], out=tmp_path, progress=False)
    described = json.loads((tmp_path / "run.json").read_text())
    del described["dataset"]["checksums"]
    (tmp_path / "run.json").write_text(json.dumps(described))
    compare(make_classifier(), SAMPLES, ["center_box"], out=tmp_path, progress=False)


def test_a_run_whose_folder_was_away_at_its_start_goes_on_when_it_is_back(tmp_path: Path) -> None:
    (data := tmp_path / "data").mkdir()
    for name in ("a", "b"):
        draw(data / f"ray/{name}.png", 100)
    model = make_classifier()
    listed = load_dataset("folder", data, class_names=model.class_names)
    runs: tuple[Callable[[Path], Any], ...] = (
        lambda out: compare(model, listed, ["center_box"], out=out, progress=False),
        lambda out: attack_images(model, listed, {"fgsm": FGSM(model)}, out, progress=False),
    )
    for number, run in enumerate(runs):
        data.rename(tmp_path / "away")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(tmp_path / str(number))
        (tmp_path / "away").rename(data)
        run(tmp_path / str(number))
        rows = RunStore(tmp_path / str(number)).select("SELECT error FROM images")
        assert [row["error"] for row in rows] == [None, None]
        draw(data / "ray/b.png", number)  # which is known from then on
        with pytest.raises(ValueError, match=r"checksums"):
            run(tmp_path / str(number))
