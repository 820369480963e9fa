"""Labels of a data set that names its classes are those of the model, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder as TorchImageFolder
from torchvision.transforms.functional import to_tensor

from captum_robust.attacks import FGSM
from captum_robust.benchmark import Comparison, attack_images, compare, robust_accuracy
from captum_robust.data import Sample, load_dataset
from captum_robust.data.classes import imagenet_names
from captum_robust.data.folder import ImageFolder
from captum_robust.data.imagenet import ImageNet
from captum_robust.data.voc import PascalVOC
from captum_robust.models import Classifier

NAMES = ["red", "green", "blue"]


class Strongest(nn.Module):
    """The class is the strongest channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.conv.weight.data = torch.eye(3)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return 10 * torch.relu(self.conv(x)).mean((2, 3))


def colours(names: Sequence[str] | None = NAMES) -> Classifier:
    return Classifier(Strongest().eval(), [0] * 3, [1] * 3, 32, class_names=names)


def draw(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), colour if colour != "green" else "lime").save(path)


def folder(root: Path, names: Sequence[str] = NAMES) -> Path:
    for colour, name in zip(NAMES, names, strict=True):
        draw(root / name / f"{colour}.png", colour)
    return root


def labels(result: Comparison) -> dict[str, int | None]:
    """Colour -> label."""
    rows = result.select("SELECT image, label FROM images WHERE error IS NULL")
    return {next(n for n in NAMES if n in row["image"]): row["label"] for row in rows}


def run(data: Any, model: Classifier | None = None) -> Comparison:
    return compare(model or colours(), data, ["center_box"], progress=False)


def voc(root: Path) -> Any:
    for colour in NAMES:
        draw(root / f"JPEGImages/{colour}.jpg", colour)
        xml = root / f"Annotations/{colour}.xml"
        xml.parent.mkdir(exist_ok=True)
        xml.write_text(
            f"<annotation><object><name>{colour}</name><bndbox><xmin>2</xmin><ymin>2</ymin>"
            "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
        )
    return PascalVOC(root, None, class_names=NAMES[::-1])


def imagenet(root: Path) -> Any:
    wnids = {"blue": "n00000001", "green": "n00000002", "red": "n00000003"}
    lines = [f"{wnid} {name}, a colour" for name, wnid in wnids.items()]
    root.mkdir()
    (root / "LOC_synset_mapping.txt").write_text("\n".join(lines))
    rows = [f"{name},{wnid} 2 2 9 9" for name, wnid in wnids.items()]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    for colour in NAMES:
        draw(root / f"ILSVRC/Data/CLS-LOC/val/{colour}.JPEG", colour)
    return ImageNet(root)


class Own(Dataset[Sample]):
    """Samples of one's own that count the names the other way round."""

    class_names = NAMES[::-1]
    ids = NAMES

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Sample:
        image = torch.zeros(3, 40, 40)
        image[i] = 1
        return Sample(image, 2 - i, torch.zeros(0, 4), NAMES[i])


DATA: dict[str, Callable[[Path], Any]] = {
    "sorted folder": lambda p: ImageFolder(folder(p), labels="sorted"),
    "folder": lambda p: load_dataset("folder", folder(p), class_names=NAMES[::-1]),
    "voc": voc,
    "imagenet": imagenet,
    "own": lambda _: Own(),
    "part": lambda p: Subset(ImageFolder(folder(p), labels="sorted"), [0, 1, 2]),
    "joined": lambda p: ConcatDataset([ImageFolder(folder(p), labels="sorted"), Own()]),
    "loader": lambda p: DataLoader(ImageFolder(folder(p), labels="sorted"), collate_fn=list),
}


@pytest.mark.filterwarnings("ignore::captum_robust.benchmark.compare.RunWarning")
@pytest.mark.parametrize("kind", DATA)
def test_labels_are_the_models_by_name_in_whatever_order(kind: str, tmp_path: Path) -> None:
    data = DATA[kind](tmp_path / "data")
    result = run(data)
    assert labels(result) == {"red": 0, "green": 1, "blue": 2}
    assert result.failures().empty
    model = colours()
    data = data.dataset if isinstance(data, DataLoader) else data
    assert robust_accuracy(model, FGSM(model), data, [0.0])["clean_accuracy"].tolist() == [1.0]


@pytest.mark.filterwarnings("ignore::captum_robust.benchmark.compare.RunWarning")
def test_a_class_that_the_model_lacks_is_its_images_error(tmp_path: Path) -> None:
    data = ImageFolder(folder(tmp_path), labels="sorted")
    result = run(data, colours(["blue", "red", "pink"]))
    assert labels(result) == {"red": 1, "blue": 0}
    (error,) = set(result.failures()["error"])
    assert "class 'green' is not known to be one of the model's 3" in error


@pytest.mark.filterwarnings("ignore::captum_robust.benchmark.compare.RunWarning")
def test_names_in_the_same_places_of_which_some_are_spelled_otherwise_are_the_same(
    tmp_path: Path,
) -> None:
    data = ImageFolder(folder(tmp_path, ["z", "y", "x"]), labels="sorted")  # x y z
    assert labels(run(data, colours(["x", "why", "z"]))) == {"blue": 0, "green": 1, "red": 2}
    assert labels(run(data, colours(["0", "1", "2"]))) == {"blue": 0, "green": 1, "red": 2}
    assert labels(run(data, colours(None))) == {"blue": 0, "green": 1, "red": 2}


@pytest.mark.filterwarnings("ignore::captum_robust.benchmark.compare.RunWarning")
def test_a_model_of_wordnet_ids_finds_the_names(tmp_path: Path) -> None:
    data = load_dataset("folder", folder(tmp_path, ["tench", "goldfish", "hen"]))
    assert data.class_names == imagenet_names()
    ids = ["n01443537", "n01440764", "n01514859"]  # goldfish, tench, hen
    assert labels(run(data, colours(ids))) == {"red": 1, "green": 0, "blue": 2}


def loader(root: Path, becomes: Sequence[int]) -> DataLoader[Any]:
    """A loader over the folders blue, green, red whose collate_fn writes the labels anew."""

    def collate(batch: list[Any]) -> tuple[Tensor, Tensor]:
        images, old = zip(*batch, strict=True)
        return torch.stack([to_tensor(x) for x in images]), torch.tensor([becomes[y] for y in old])

    data = TorchImageFolder(str(folder(root)))
    assert data.classes == NAMES[::-1]
    return DataLoader(data, batch_size=3, collate_fn=collate)


@pytest.mark.filterwarnings("ignore::captum_robust.benchmark.compare.RunWarning")
@pytest.mark.parametrize("becomes", [[2, 1, 0], [0, 1, 2]])
def test_labels_are_found_once_whether_or_not_a_collate_fn_did_it(
    becomes: list[int], tmp_path: Path
) -> None:
    assert labels(run(loader(tmp_path, becomes))) == {"red": 0, "green": 1, "blue": 2}


@pytest.mark.filterwarnings("ignore::captum_robust.benchmark.compare.RunWarning")
def test_a_label_that_only_a_late_item_shows_to_be_another_is_its_error(tmp_path: Path) -> None:
    data = TorchImageFolder(str(folder(tmp_path)))
    rare = 1  # of the many items only this one's label is changed
    items = Subset(data, [*[0] * 21, rare, *[0] * 19])

    def collate(batch: list[Any]) -> tuple[Tensor, Tensor]:
        ((image, label),) = batch
        return to_tensor(image)[None], torch.tensor([2 if label == rare else label])

    failures = run(DataLoader(items, batch_size=1, collate_fn=collate)).failures()
    assert list(failures["image"]) == ["green/green.png"]
    assert "collate_fn made the label 1 2" in failures["error"][0]


class Wrapped(Dataset[Any]):
    """A folder of torchvision's whose labels are the model's already."""

    def __init__(self, data: Any) -> None:
        self.data, self.classes = data, data.classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        return self.data[i][0], 2 - self.data[i][1]


def test_labels_that_are_found_by_the_names_of_an_own_data_set_are_said(tmp_path: Path) -> None:
    data = TorchImageFolder(str(folder(tmp_path)))
    said = r"its labels count its classes \(blue, green, red\), .* target_transform"
    with pytest.warns(UserWarning, match=said):
        run(Wrapped(data))


@pytest.mark.filterwarnings("ignore::captum_robust.benchmark.compare.RunWarning")
@pytest.mark.parametrize("joined", [False, True])
def test_many_broken_images_leave_the_others_usable(joined: bool, tmp_path: Path) -> None:
    root = folder(tmp_path)
    for i in range(17):
        (root / f"blue/{i}.png").touch()
    data: Any = TorchImageFolder(str(root))
    result = run(ConcatDataset([data]) if joined else data)
    rows = result.select("SELECT label FROM images WHERE error IS NULL ORDER BY position")
    assert [row["label"] for row in rows] == [2, 1, 0]  # blue, green, red
    assert len(result.failures()) == 17


@pytest.mark.filterwarnings("ignore::captum_robust.benchmark.compare.RunWarning")
def test_nothing_and_an_image_are_an_error_and_an_image() -> None:
    image = torch.zeros(3, 40, 40)
    result = run([None, image])
    assert list(result.failures()["image"]) == ["0"]
    assert "got NoneType" in result.failures()["error"][0]


@pytest.mark.filterwarnings("ignore::captum_robust.benchmark.compare.RunWarning")
def test_a_data_set_of_broken_images_only_says_why_of_each(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    failures = run(TorchImageFolder(str(tmp_path))).failures()
    assert failures["error"].str.contains("cannot identify image file").tolist() == [True] * 3


@pytest.mark.parametrize("names", [["red", "green"], [*NAMES, "white"]])
def test_a_model_of_more_or_fewer_names_than_scores_is_refused(
    names: list[str], tmp_path: Path
) -> None:
    model, data = colours(names), [(torch.zeros(3, 40, 40), 2)]
    said = f"class_names: expected one for each of 3 scores, got {len(names)}"
    with pytest.raises(ValueError, match=said):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=said):
        run(data, model)
    with pytest.raises(ValueError, match=said):
        attack_images(model, data, {"fgsm": FGSM(model)}, tmp_path, progress=False)
    with pytest.raises(ValueError, match=said):
        robust_accuracy(model, FGSM(model), [(torch.zeros(1, 3, 32, 32), torch.tensor([2]))], [0])
