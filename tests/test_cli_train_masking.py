"""``captum-robust train masking``, on drawn images and a classifier of random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchvision.utils import save_image

from captum_robust._contexts import seeded
from captum_robust.data.classes import imagenet_names, imagenet_wnids
from captum_robust.models import load_classifier, save_classifier
from captum_robust.nn import load_masking_network
from captum_robust.training.masking_recipe import open_for_masking
from captum_robust.training.settings import MASKING_RECIPES, MaskingSettings

Run = Callable[..., tuple[int, str, str]]
NAMES = ("red", "green", "blue")


@pytest.fixture
def run(run: Run) -> Run:
    return lambda *arguments: run("train", "masking", *arguments, "--device", "cpu")


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[str, ...]:
    """Options that name a small classifier of three colours."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_classifier("small_resnet", None, class_names=NAMES, input_size=32)
    save_classifier(model, tmp_path / "model.safetensors")
    return "--model", "small_resnet", "--weights", str(tmp_path / "model.safetensors")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    generator = torch.Generator().manual_seed(0)
    for c, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            image = 0.4 * torch.rand(3, 40, 48, generator=generator)
            image[c, 8:28, 8:28] = 0.9
            save_image(image, folder / name / f"{i}.png")
    return folder


SHORT = ("--epochs", "2", "--batch-size", "4", "--held-out", "0.25", "--warm-up-steps", "5")


def test_it_writes_a_network_and_goes_on(
    run: Run, classifier: tuple[str, ...], photographs: Path, tmp_path: Path
) -> None:
    given = ("--images", photographs, *classifier, *SHORT, "--out", "run")
    code, out, err = run(*given)
    assert code == 0, err
    assert "9 images to train on, 3 to look at, 12 of 12 with a class" in out
    assert "saliency metric" in out
    file = tmp_path / "run/masking.safetensors"
    model = load_classifier("small_resnet", classifier[3])
    network = load_masking_network(file, model)
    masks = network(torch.rand(2, 3, 32, 32), torch.tensor([0, 2]))
    assert masks.shape == (2, 1, 32, 32)
    with safe_open(file, "pt") as opened:
        card = json.loads(opened.metadata()["card"])
        assert opened.get_tensor("scale").dtype == torch.float16
    assert card["classifier"] == "small_resnet"
    assert card["training_images"] == 9
    assert "saliency_metric" in card["validation"]

    written = file.read_bytes()
    code, out, _ = run(*given)
    assert (code, "went on from step 4 of 4" in out) == (0, True)
    assert file.read_bytes() == written

    code, _, err = run(*given, "--learning-rate", "0.01")
    assert code == 2
    assert "learning_rate" in err


def test_images_without_classes_are_labelled_by_the_classifier(
    run: Run, classifier: tuple[str, ...], photographs: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(photographs.rglob("*.png"))):
        file.rename(flat / f"{i}.png")
    (flat / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    code, out, err = run(
        "--images", flat, *classifier, *SHORT, "--validation", flat, "--objective", "code",
        "--fakes", "swapped", "--weight", "area=4", "--patience", "1", "--tensorboard",
    )  # fmt: skip
    assert code == 0, err
    assert "0 of 12 with a class" in out
    assert "13 images: 1 could not be used" in err
    assert "broken.jpg" in err
    assert list((tmp_path / "captum-robust-masking/tensorboard").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "nowhere"), "nowhere: no such folder"),
        (("--images", "empty"), "empty: no images"),
        (("--images", "photographs", "--out", "photographs/run"), "lies inside"),
        (("--images", "photographs", "--objective", "papers"), "did you mean 'paper'"),
        (("--images", "photographs", "--weight", "area"), "expected NAME=NUMBER"),
        (("--images", "photographs", "--weight", "areas=1"), "did you mean 'area'"),
        (("--images", "photographs", "--weight", "area=-1"), "area: expected a number from 0"),
        (("--images", "photographs", "--removal", "blurred"), "scheme: expected"),
        (("--images", "photographs", "--labels", "none"), "labels: expected"),
        (("--images", "photographs", "--fake-probability", "1"), "--fake-probability"),
        (("--images", "photographs", "--start", "model.pt"), "pickle"),
        (("--images", "photographs", "--start", "model.safetensors"), "holds no masking network"),
        (("--images", "photographs", "--held-out", "0", "--patience", "2"), "--patience: there"),
        (("--images", "photographs", "--evaluation-images", "-1"), "--evaluation-images"),
        (("--images", "nowhere", "--crop", "-1"), "--crop: expected a number from 0"),
        (("--images", "nowhere", "--limit", "0"), "--limit: expected a whole number from 1"),
        (("--images", "photographs", "--held-out", "1"), "--held-out: expected a number in [0, 1)"),
        (("--images", "photographs", "--validation", "nowhere"), "nowhere: no such folder"),
        (("--images", "photographs", "--out", "model.safetensors"), "is a file; give a folder"),
    ],
)
def test_wrong_arguments_are_named(
    run: Run,
    classifier: tuple[str, ...],
    photographs: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = run(*classifier, *SHORT, *options)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def tiny_imagenet(folder: Path) -> list[str]:
    """Its training part with two classes in a drawn order, and their ids."""
    wnids = ["n02123045", "n01443537"]
    (folder / "train").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(wnids))
    generator = torch.Generator().manual_seed(0)
    for wnid in wnids:
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(3):
            name = f"{wnid}_{i}.JPEG"
            save_image(
                torch.rand(3, 64, 64, generator=generator),
                folder / "train" / wnid / "images" / name,
                format="jpeg",
            )
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(
            "".join(f"{wnid}_{i}.JPEG\t1\t2\t30\t40\n" for i in range(3))
        )
    return wnids


def test_labels_of_tiny_imagenet_count_the_classes_of_the_classifier(tmp_path: Path) -> None:
    wnids = tiny_imagenet(tmp_path / "tiny")
    known = imagenet_wnids()

    def labels_of(names: Sequence[str]) -> set[int | None]:
        found = open_for_masking("tiny-imagenet", tmp_path / "tiny", Path("run"), names, "folder")
        return {found[i].label for i in range(len(found))}

    assert labels_of(imagenet_names()) == {known[wnid] for wnid in wnids}
    assert labels_of([imagenet_names()[known[wnid]] for wnid in wnids]) == {0, 1}
    with pytest.raises(ValueError, match="--kind tiny-imagenet: its classes are not those"):
        labels_of(NAMES)


def test_a_network_of_other_classes_is_refused(
    run: Run, classifier: tuple[str, ...], photographs: Path, tmp_path: Path
) -> None:
    run("--images", photographs, *classifier, *SHORT, "--out", "run")
    other = load_classifier("small_resnet", None, class_names=("a", "b"), input_size=32)
    save_classifier(other, tmp_path / "other.safetensors")
    code, _, err = run(
        "--images", photographs, "--model", "small_resnet", "--weights", "other.safetensors",
        "--start", "run/masking.safetensors", *SHORT, "--out", "run2",
    )  # fmt: skip
    assert code == 2
    assert "3 classes" in err


def imagenet(folder: Path, classes: int = 4, each: int = 3) -> None:
    """The training part of ImageNet's archive with a few drawn images."""
    generator = torch.Generator().manual_seed(0)
    data, boxes = (folder / "ILSVRC" / part / "CLS-LOC/train" for part in ("Data", "Annotations"))
    boxes.mkdir(parents=True)
    for wnid in list(imagenet_wnids())[:classes]:
        (data / wnid).mkdir(parents=True)
        for i in range(each):
            image = torch.rand(3, 40, 48, generator=generator)
            save_image(image, data / wnid / f"{wnid}_{i}.JPEG", format="jpeg")


def test_the_recipe_of_imagenet_runs_on_its_archive(run: Run, tmp_path: Path) -> None:
    imagenet(tmp_path / "imagenet")
    given = (
        "--recipe", "imagenet", "--images", "imagenet", "--weights", "none", "--size", "32",
        "--limit", "11", "--batch-size", "5", "--epochs", "1", "--held-out", "0.1", "--workers",
        "1", "--warm-up-steps", "2", "--out", "run",
    )  # fmt: skip
    code, out, err = run(*given)
    assert code == 0, err
    assert "10 images to train on, 1 to look at, 11 of 11 with a class" in out
    text = json.dumps(json.loads((tmp_path / "run/run.json").read_text()))
    assert '"model": "resnet50"' in text  # of the recipe
    assert '"learning_rate": 0.003' in text
    assert '"batch_size": 5' in text  # typed
    assert (tmp_path / "run/masking.safetensors").stat().st_size < 4e6
    with seeded(0, None):
        model = load_classifier("resnet50", None, input_size=32)
    network = load_masking_network(tmp_path / "run/masking.safetensors", model)
    assert network(torch.rand(1, 3, 32, 32), torch.tensor([999])).shape == (1, 1, 32, 32)
    code, out, err = run(*given)
    assert (code, "went on from step 2 of 2" in out) == (0, True)


def test_what_is_typed_goes_before_the_recipe_even_where_it_is_the_default(
    run: Run, photographs: Path, classifier: tuple[str, ...], tmp_path: Path
) -> None:
    given = ("--images", photographs, *classifier, *SHORT, "--kind", "folder", "--out", "run")
    code, _, err = run("--recipe", "imagenet", *given, "--workers", "0", "--precision", "float32")
    assert code == 0, err
    text = (tmp_path / "run/run.json").read_text()
    assert '"precision": "float32"' in text
    code, _, err = run("--recipe", "imagenets", *given)
    assert code == 2
    assert "did you mean 'imagenet'" in err


def test_the_settings_of_a_recipe_are_settings() -> None:
    for values in MASKING_RECIPES.values():
        assert MaskingSettings(images=Path("i"), **values).model == values["model"]
