"""What a run takes for a data set beside samples, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision import transforms
from torchvision.datasets import ImageFolder

from captum_robust.attacks import FGSM
from captum_robust.benchmark import Comparison, attack_images, compare, robust_accuracy
from captum_robust.data import Sample
from captum_robust.models import Classifier

RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(6)]
PIXELS = torch.stack([torch.from_numpy(np.array(p)) for p in PICTURES]).permute(0, 3, 1, 2) / 255
ARRAYS = np.stack([np.array(picture) for picture in PICTURES])
LABELS = [0, 0, 0, 1, 1, 1]


def classifier(names: list[str] | None = None, classes: int = 2) -> Classifier:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )
    return Classifier(net, (0.5,) * 3, (0.5,) * 3, 32, class_names=names).eval()


def tree(root: Path, names: tuple[str, ...] = ("a", "b")) -> Path:
    for k, picture in enumerate(PICTURES):
        folder = root / names[k * len(names) // len(PICTURES)]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{k}.png")
    return root


def run(data: Any, model: Classifier | None = None, **options: Any) -> Comparison:
    return compare(model or classifier(), data, ["robust_cam"], progress=False, **options)


def labels(result: Comparison) -> list[int | None]:
    assert result.failures().empty
    return [row["label"] for row in result.select("SELECT label FROM images ORDER BY position")]


def kinds(root: Path) -> dict[str, tuple[Any, list[int] | None]]:
    """Name -> what is given, and the labels that it says."""
    folder = ImageFolder(root)
    tensors = ImageFolder(root, transforms.ToTensor())
    pairs = list(zip(PIXELS, LABELS, strict=True))
    batches = [(PIXELS[:4], torch.tensor(LABELS[:4])), [PIXELS[4:], torch.tensor(LABELS[4:])]]
    return {
        "ImageFolder of PIL": (folder, LABELS),
        "ImageFolder of tensors": (tensors, LABELS),
        "loader": (DataLoader(tensors, batch_size=4), LABELS),
        "shuffled loader": (DataLoader(tensors, batch_size=4, shuffle=True), LABELS),
        "loader of PIL": (DataLoader(folder, collate_fn=list), LABELS),
        "loader of columns": (
            DataLoader(folder, collate_fn=lambda b: tuple(zip(*b, strict=True))),
            LABELS,
        ),
        "loader of tensors": (DataLoader(TensorDataset(PIXELS, torch.tensor(LABELS))), LABELS),
        "loader without labels": (DataLoader(PIXELS, batch_size=4), None),
        "list of PIL": (PICTURES, None),
        "pairs": (pairs, LABELS),
        "pairs of PIL": ([list(pair) for pair in zip(PICTURES, LABELS, strict=True)], LABELS),
        "bytes": ([((x * 255).round().byte(), y) for x, y in pairs], LABELS),
        "double": ([(x.double(), np.int64(y)) for x, y in pairs], LABELS),
        "batches": (batches, LABELS),
        "batches without labels": ([PIXELS[:4], PIXELS[4:]], None),
        "tensor": (PIXELS, None),
        "path": (root, LABELS),
        "path as text": (str(root), LABELS),
        "all of it": (Subset(folder, range(6)), LABELS),
        "joined": (ConcatDataset([Subset(folder, [0, 1, 2]), Subset(folder, [3, 4, 5])]), LABELS),
        "paths": (sorted(root.rglob("*.png")), None),
        "paths and labels": ([(str(path), label) for path, label in folder.samples], LABELS),
        "rows": ([{"image": p, "label": y} for p, y in zip(PICTURES, LABELS, strict=True)], LABELS),
        "rows of data set": (Rows(), LABELS),
        "loader of rows": (DataLoader(Rows(), batch_size=4), LABELS),
        "rows without labels": ([{"id": k, "img": x} for k, x in enumerate(PIXELS)], None),
        "arrays": (list(map(np.array, PICTURES)), None),
        "array": (ARRAYS, None),
        "arrays and labels": (list(zip(ARRAYS, LABELS, strict=True)), LABELS),
        "tensors alone": (TensorDataset(PIXELS), None),
        "tensor, labels": ((PIXELS, torch.tensor(LABELS)), LABELS),
        "batch of a loader": (next(iter(DataLoader(tensors, batch_size=6))), LABELS),
        "pictures, labels": ((PICTURES, LABELS), LABELS),
        "array, labels": ((ARRAYS, np.array(LABELS)), LABELS),
    }


class Rows(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": PICTURES[index], "label": LABELS[index]}


KINDS = [
    *("ImageFolder of PIL", "ImageFolder of tensors", "loader", "shuffled loader"),
    *("loader of PIL", "loader of columns", "loader of tensors", "loader without labels"),
    *("list of PIL", "pairs", "pairs of PIL", "bytes", "double", "batches"),
    *("batches without labels", "tensor", "path", "path as text", "all of it", "joined"),
    *("paths", "paths and labels", "rows", "rows of data set", "loader of rows"),
    *("rows without labels", "arrays", "array", "arrays and labels", "tensors alone"),
    *("tensor, labels", "batch of a loader", "pictures, labels", "array, labels"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_the_same_images(kind: str, tmp_path: Path) -> None:
    every = kinds(tree(tmp_path))
    assert list(every) == KINDS
    data, expected = every[kind]
    model = classifier()
    result = run(data, model)
    assert labels(result) == (expected or [None] * 6)
    with torch.no_grad():
        confidence = model(PIXELS).softmax(dim=1).amax(dim=1)
    rows = result.select("SELECT confidence FROM results ORDER BY position")
    torch.testing.assert_close(torch.tensor([r["confidence"] for r in rows]), confidence)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        ({"a": PICTURES[0]}, "got dict"),
        ((picture for picture in PICTURES), "got generator"),
        (["a.png", PICTURES[0]], "got list of str"),
        (list(ARRAYS / 255), r"got list of an array \(.*\) of float64"),
        (list(ARRAYS.transpose(0, 3, 1, 2)), r"got list of an array \(3, .*\) of uint8"),
        ([{"image": PICTURES[0], "fine_label": 0}], "got list of dict"),
        ([{"picture": PICTURES[0], "label": 0}], "got list of dict"),
        ([(PICTURES[0], 0, "a.png")], "got list of tuple .Image, int, str."),
        ([(PICTURES[0], {"boxes": []})], "labels: expected class indices, got dict"),
        ([(PICTURES[0], "cat")], "labels: expected class indices, got str"),
        ([(PIXELS[0], torch.tensor([0.0, 1.0]))], "labels: expected class indices"),
        (PIXELS[0], "got Tensor of a tensor .32, 32."),
        (42, "got int"),
        (None, "got NoneType"),
    ],
)
def test_all_else_is_refused_with_how_to_wrap_it(data: Any, got: str) -> None:
    with pytest.raises(TypeError, match=got) as refused:
        run(data)
    assert "Sample(image, label, boxes, id)" in str(refused.value)


def test_the_classes_that_rows_count_are_found_by_name() -> None:
    class Label:
        names = ("b", "a")

    data = Rows()
    data.features = {"label": Label()}  # type: ignore[attr-defined]
    assert labels(run(data, classifier(["a", "b"]))) == [1, 1, 1, 0, 0, 0]


def test_an_image_without_pixels_is_its_own_error() -> None:
    result = run([torch.zeros(3, 0, 9), PIXELS[0]])
    (error,) = result.failures()["error"]
    assert "expected 1×H×W or 3×H×W, float or uint8, got 3×0×9" in error


def test_a_path_that_is_no_image_is_its_own_error(tmp_path: Path) -> None:
    tree(tmp_path)
    result = run([tmp_path / "a" / "0.png", tmp_path / "a" / "none.png"])
    (error,) = result.failures()["error"]
    assert "none.png: No such file" in error


def test_a_loader_without_fixed_items_is_refused() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(PIXELS)

    for loader in (
        DataLoader(Stream()),
        DataLoader(PIXELS, sampler=WeightedRandomSampler([1.0] * 6, 6)),  # type: ignore[arg-type]
        DataLoader(PIXELS, batch_size=None),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"a DataLoader with .* has no fixed items"):
            run(loader)


def test_a_loader_gives_the_subset_that_it_draws_from(tmp_path: Path) -> None:
    folder = ImageFolder(tree(tmp_path))
    for data in (
        Subset(folder, [1, 4]),
        DataLoader(folder, sampler=SubsetRandomSampler([4, 1])),
        DataLoader(Subset(folder, [1, 4]), shuffle=True),
    ):
        result = run(data)
        assert labels(result) == [0, 1]
        images = [row["image"] for row in result.select("SELECT image FROM images")]
        assert images == ["a/1.png", "b/4.png"]


def test_a_folder_that_is_not_there_is_said() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder.*load_dataset"):
        run("nowhere")


@pytest.mark.parametrize(
    ("folders", "names", "expected"),
    [
        # By name, whatever the order and the spelling.
        (("cat", "dog"), ["dog", "cat"], [1, 1, 1, 0, 0, 0]),
        (("Sea_Lion", "dog"), ["dog", "fish", "sea lion"], [2, 2, 2, 0, 0, 0]),
        (("n01440764", "n01443537"), "imagenet", [0, 0, 0, 1, 1, 1]),
        (("tench", "goldfish"), "imagenet", [0, 0, 0, 1, 1, 1]),
        # Without names: as many, in order; or numbers.
        (("a", "b"), 2, LABELS),
        (("3", "7"), 10, [3, 3, 3, 7, 7, 7]),
        (("n01440764", "n01443537"), 1000, [0, 0, 0, 1, 1, 1]),
    ],
)
def test_labels_of_folders_are_the_models_classes(
    folders: tuple[str, str], names: list[str] | str | int, expected: list[int], tmp_path: Path
) -> None:
    if isinstance(names, int):
        model = classifier(None, names)
    else:
        from captum_robust.data.classes import imagenet_names

        own = list(imagenet_names()) if isinstance(names, str) else names
        model = classifier(own, len(own))
    root = tree(tmp_path, folders)
    by_folder = dict(zip(folders, (expected[0], expected[-1]), strict=True))
    wanted = [by_folder[name] for name in sorted(folders) for _ in range(3)]
    assert labels(run(ImageFolder(root), model)) == wanted
    assert labels(run(root, model)) == wanted


@pytest.mark.parametrize(
    ("folders", "model"),
    [
        (("cats", "dogs"), classifier(["cat", "dog"])),  # none of its names
        (("a", "b"), classifier(None, 10)),  # of ten without names
        (("1", "x"), classifier(None, 2)),  # "1" is the first of them, as "10" before "2"
    ],
)
def test_labels_that_may_not_be_the_models_are_none_and_it_is_said(
    folders: tuple[str, str], model: Classifier, tmp_path: Path
) -> None:
    root = tree(tmp_path, folders)
    with pytest.warns(UserWarning, match="are not known to be the model's"):
        result = run(ImageFolder(root), model)
    assert labels(result) == [None] * 6


def test_a_folder_of_which_some_classes_are_the_models_is_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, ("cat", "horse"))
    for data in (ImageFolder(root), root):
        with pytest.raises(ValueError, match=r"horse.*"):
            run(data, classifier(["cat", "dog"]))


def test_parts_that_count_other_classes_are_refused(tmp_path: Path) -> None:
    one, other = tree(tmp_path / "one"), tree(tmp_path / "other", ("b", "c"))
    joined = ConcatDataset([ImageFolder(one), ImageFolder(other)])
    with pytest.raises(ValueError, match="its parts count different classes"):
        run(joined)


def test_labels_that_a_transform_makes_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = ImageFolder(tree(tmp_path), target_transform=lambda label: 7 - label)
    assert labels(run(folder, classifier(["x"] * 10, 10))) == [7, 7, 7, 6, 6, 6]


def test_normalised_pixels_are_each_images_error() -> None:
    with pytest.warns(UserWarning, match="the normalisation belongs into the Classifier"):
        result = run(list((PIXELS - 0.5) / 0.5))
    assert result.failures()["error"].str.contains("expected pixels in .0, 1., got -1 to 1").all()


def test_grey_tensors_and_pictures_of_other_modes_are_read() -> None:
    grey = PICTURES[0].convert("L")
    values = torch.from_numpy(np.array(grey))[None]
    given = [grey, values, values / 255, PICTURES[0].convert("RGBA"), grey.convert("P")]
    result = run(given)
    rows = result.select("SELECT confidence, error FROM results ORDER BY position")
    assert [row["error"] for row in rows] == [None] * 5
    assert rows[0]["confidence"] == rows[1]["confidence"] == rows[2]["confidence"]


def test_a_photograph_is_upright(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:8] = 255  # above; as stored, on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    stored = Image.fromarray(np.rot90(pixels).copy())
    stored.save(tmp_path / "turned.png", exif=exif)
    seen: list[Tensor] = []

    def watch(images: Tensor, _: Tensor) -> Tensor:
        seen.append(images.clone())
        return images.mean(dim=1)

    with Image.open(tmp_path / "turned.png") as picture:
        compare(classifier(), [picture], {"watch": watch}, progress=False)
    torch.testing.assert_close(seen[0][0].permute(1, 2, 0) * 255, torch.from_numpy(pixels).float())


def test_broken_first_images_do_not_hide_the_kind(tmp_path: Path) -> None:
    root = tree(tmp_path)
    (root / "a" / "0.png").write_bytes(b"torn")
    result = run(ImageFolder(root))
    assert list(result.failures()["image"]) == ["a/0.png"]
    assert "cannot identify image file" in result.failures()["error"][0]


def test_a_run_over_a_folder_goes_on_and_knows_another(tmp_path: Path) -> None:
    root, out = tree(tmp_path / "ds"), tmp_path / "run"
    folder = ImageFolder(root, transforms.Compose([transforms.ToTensor()]))
    run(folder, out=out, limit=6)
    assert labels(run(folder, out=out)) == LABELS
    described = json.loads((out / "run.json").read_text(encoding="utf-8"))["dataset"]
    assert described["kind"] == "ImageFolder"
    with pytest.raises(ValueError, match="transform"):
        run(ImageFolder(root, transforms.Resize(16)), out=out)


def test_attacks_take_them_too(tmp_path: Path) -> None:
    model = classifier()
    data = DataLoader(ImageFolder(tree(tmp_path / "ds"), transforms.ToTensor()), batch_size=4)
    result = attack_images(
        model, data, {"fgsm 8/255": FGSM(model, 8 / 255)}, tmp_path / "run", progress=False
    )
    with torch.no_grad():
        right = int((model(PIXELS).argmax(dim=1) == torch.tensor(LABELS)).sum())
    assert result.table()["n_right"].tolist() == [right]


def test_robust_accuracy_takes_folders(tmp_path: Path) -> None:
    model = classifier(["b", "a"])  # in the other order
    root = tree(tmp_path)
    with torch.no_grad():
        right = float((model(PIXELS).argmax(dim=1) == 1 - torch.tensor(LABELS)).double().mean())
    for data in (ImageFolder(root), root, str(root), Subset(ImageFolder(root), range(6))):
        frame = robust_accuracy(model, FGSM(model), data, [0.0])
        assert frame["clean_accuracy"].tolist() == [right]


def test_samples_are_taken_as_before() -> None:
    samples = [
        Sample(x, y, torch.zeros(0, 4), str(i))
        for i, (x, y) in enumerate(zip(PIXELS, LABELS, strict=True))
    ]
    assert labels(run(samples)) == LABELS
    assert labels(run(DataLoader(samples, batch_size=2, collate_fn=list))) == LABELS  # type: ignore[arg-type]
    assert labels(run([samples[:4], samples[4:]])) == LABELS


def test_probabilities_of_a_model_are_not_made_flatter_by_another_softmax() -> None:
    net = classifier(classes=3)
    ended = Classifier(nn.Sequential(net, nn.Softmax(1)), None, None, 32).eval()
    columns = "SELECT confidence FROM results ORDER BY position"
    expected, found = (run(PICTURES, model).select(columns) for model in (net, ended))
    assert [row["confidence"] for row in found] == pytest.approx(
        [row["confidence"] for row in expected], abs=1e-5
    )
