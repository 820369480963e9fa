"""``captum-robust train localization``, on drawn images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image
from safetensors import safe_open
from torchvision.utils import save_image

from captum_robust.attr import AdversarialLocalization
from captum_robust.cli.localization_command import say_result
from captum_robust.data.superpixels import superpixel_path
from captum_robust.models import load_classifier, save_classifier
from captum_robust.training import LocalizationRecipe, LocalizationSettings, TrainingResult

Run = Callable[..., tuple[int, str, str]]
NAMES = ("blue", "green", "red")
SHORT = (
    "--epochs", "2", "--pretraining-epochs", "2", "--batch-size", "4", "--held-out", "0.25",
    "--size", "32", "--width", "2", "--segments", "16",
)  # fmt: skip


@pytest.fixture
def run(run: Run) -> Run:
    return lambda *arguments: run("train", "localization", *arguments, "--device", "cpu")


def draw(file: Path, channel: int, generator: torch.Generator) -> None:
    image = 0.4 * torch.rand(3, 40, 48, generator=generator)
    image[2 - channel, 8:28, 8:28] = 0.9
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(image, file)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Four of each of three classes, without boxes."""
    generator = torch.Generator().manual_seed(0)
    for c, name in enumerate(NAMES):
        for i in range(4):
            draw(tmp_path / "photographs" / name / f"{i}.png", c, generator)
    return tmp_path / "photographs"


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """Its training part with two classes of four images, a box each."""
    folder = tmp_path / "tiny"
    generator = torch.Generator().manual_seed(0)
    wnids = ["n02123045", "n01443537"]
    for c, wnid in enumerate(wnids):
        for i in range(4):
            draw(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", c, generator)
        lines = "".join(f"{wnid}_{i}.JPEG\t8\t8\t27\t27\n" for i in range(4))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(lines)
    (folder / "wnids.txt").write_text("\n".join(wnids))
    return folder


def test_images_without_boxes_are_trained_on_and_it_says_that_it_cannot_score(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    given = ("--images", photographs, *SHORT, "--out", "run")
    code, out, err = run(*given)
    assert code == 0, err
    assert "9 images to train on, 3 to measure with, 3 classes" in out
    assert "no boxes are known" in out
    assert "not scored" in out
    assert "box right" not in out
    assert superpixel_path(photographs, 16, (32, 32), "train-squash").is_file()
    file = tmp_path / "run/localization.safetensors"
    maps = AdversarialLocalization.from_file(file).attribute(torch.rand(2, 3, 32, 32))
    assert maps.shape == (2, 3, 32, 32)
    with safe_open(file, "pt") as opened:
        card = json.loads(opened.metadata()["card"])
    assert (card["classifier"], card["training_images"]) == ("simple_convnet", 9)
    assert "box_accuracy" not in card["held_out"]


def test_a_finished_run_goes_on_to_the_same_file_in_both_phases(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    given = ("--images", photographs, *SHORT, "--out", "run")
    run(*given)
    file = tmp_path / "run/localization.safetensors"
    written = file.read_bytes()
    code, out, _ = run(*given)
    assert code == 0
    assert out.count("went on from step 4 of 4") == 2
    assert file.read_bytes() == written
    code, _, err = run(*given, "--area", "2")
    assert code == 2
    assert "area" in err
    code, _, err = run(*given, "--pretraining-rate", "0.01")
    assert code == 2
    assert "learning_rate" in err


def test_a_run_that_stops_between_the_phases_ends_the_same(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_robust.training import localization_recipe

    given = ("--images", photographs, *SHORT)
    run(*given, "--out", "whole")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(localization_recipe, "localization_training", stop)
        code, _, _ = run(*given, "--out", "cut")
        assert code != 0
    assert not (tmp_path / "cut/localization.safetensors").exists()
    code, _, err = run(*given, "--out", "cut")
    assert code == 0, err
    files = [tmp_path / name / "localization.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_boxes_are_scored_with_the_spelling_of_a_data_set_and_its_root(
    run: Run, tiny_imagenet: Path, tmp_path: Path
) -> None:
    code, out, err = run(
        "--dataset", "tiny-imagenet", "--root", tiny_imagenet, *SHORT, "--held-out", "0.5",
        "--superpixel-file", "maps.safetensors", "--trainable-layers", "2", "--half",
    )  # fmt: skip
    assert code == 0, err
    assert "box right" in out
    assert "no boxes" not in out
    assert (tmp_path / "maps.safetensors").is_file()
    assert (tmp_path / "captum-robust-localization/classifier/log.jsonl").is_file()


@pytest.mark.parametrize("kind", ["folder", "tiny-imagenet"])
def test_boxes_drawn_on_upright_images_are_taken_as_such_on_request(
    photographs: Path, tiny_imagenet: Path, tmp_path: Path, kind: str
) -> None:
    root, suffix = {"folder": (photographs, "png"), "tiny-imagenet": (tiny_imagenet, "JPEG")}[kind]
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = 6  # of 40×48 stored pixels, upright 48×40
    for file in root.rglob(f"*.{suffix}"):
        Image.open(file).save(file, exif=tag)
    (root / "boxes.csv").write_text("file,x0,y0,x1,y1\nred/0.png,10,30,20,47\n")
    lines = "n02123045_0.JPEG 10 30 19 46\n"
    (tiny_imagenet / "train/n02123045/n02123045_boxes.txt").write_text(lines)
    given: dict[str, Any] = {"images": root, "kind": kind, "size": 48, "superpixels": False}
    given |= {"out": tmp_path / "run", "device": "cpu"}
    of_stored = LocalizationRecipe(LocalizationSettings(**given)).images
    assert len(of_stored.unusable) == 1  # y1 = 47 of 40
    images = LocalizationRecipe(LocalizationSettings(**given, exif_orientation=True)).images
    assert not images.unusable
    assert [[12, 30, 24, 47]] in [boxes.tolist() for boxes in images.boxes]  # 40 wide, now 48


def test_pixels_need_no_super_pixels(run: Run, photographs: Path, tmp_path: Path) -> None:
    code, _, err = run(
        "--images", photographs, *SHORT, "--no-superpixels", "--pretraining-epochs", "0",
        "--literal", "--form", "literal", "--steps-of-classifier", "2", "--held-out", "0",
    )  # fmt: skip
    assert code == 0, err
    assert not list(tmp_path.rglob("*.superpixels.safetensors"))
    assert not (tmp_path / "captum-robust-localization/classifier").exists()


@pytest.fixture
def trunk_file(tmp_path: Path) -> Path:
    """Weights of a small_resnet of two classes."""
    torch.manual_seed(3)
    trunk = load_classifier("small_resnet", None, class_names=["day", "night"])
    save_classifier(trunk, tmp_path / "trunk.safetensors")
    return tmp_path / "trunk.safetensors"


def test_a_trunk_with_weights_stays_as_it_is_and_is_in_the_file(
    run: Run, photographs: Path, trunk_file: Path, tmp_path: Path
) -> None:
    given = (
        "--images", photographs, *SHORT, "--pretraining-epochs", "0", "--no-superpixels",
        "--trunk", "small_resnet", "--trunk-weights", trunk_file, "--trunk-size", "48",
        "--area-target", "0.3", "--area-gain", "0.1",
    )  # fmt: skip
    code, out, err = run(*given)
    assert code == 0, err
    assert "trunk: small_resnet, frozen" in out
    file = tmp_path / "captum-robust-localization/localization.safetensors"
    network = AdversarialLocalization.from_file(file).network
    assert network.corruption.trunk_size == 48
    trained = network.corruption.trunk.state_dict()
    start = load_classifier("small_resnet", trunk_file).state_dict()
    assert all(torch.equal(t, start[n]) for n, t in trained.items())
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["card"])["trunk"] == [
            "small_resnet", str(trunk_file), False,
        ]  # fmt: skip
    written = file.read_bytes()
    assert run(*given)[0] == 0
    assert file.read_bytes() == written
    code, _, err = run(*given, "--train-trunk")
    assert code == 2
    assert "trunk" in err
    code, out, _ = run(*given, "--train-trunk", "--out", "other")
    assert code == 0
    assert "trunk: small_resnet, trained" in out
    file = tmp_path / "other/localization.safetensors"
    trained = AdversarialLocalization.from_file(file).network.corruption.trunk.state_dict()
    changed = {n for n, t in trained.items() if not torch.equal(t, start[n])}
    assert changed >= {n for n in start if "conv" in n}
    assert not any("fc" in n or "classifier" in n for n in changed)


def test_a_trunk_of_random_weights_is_trained(run: Run, photographs: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "--images", photographs, *SHORT, "--no-superpixels", "--trunk", "simple_convnet"
    )
    assert code == 0, err
    assert "trunk: simple_convnet, trained" in out
    file = tmp_path / "captum-robust-localization/localization.safetensors"
    network = AdversarialLocalization.from_file(file).network
    assert network.corruption.trunk.class_names == list(NAMES)


def test_the_trunk_may_be_a_copy_of_the_classifier_behind_its_own_training(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    code, out, err = run(
        "--images", photographs, *SHORT, "--no-superpixels", "--trunk", "classifier",
        "--trainable-layers", "0",
    )  # fmt: skip
    assert code == 0, err
    assert "trunk: classifier, frozen" in out
    file = tmp_path / "captum-robust-localization/localization.safetensors"
    network = AdversarialLocalization.from_file(file).network
    # Which is not trained further here: both are as the first phase left them.
    of_classifier = network.classifier.state_dict()
    of_trunk = network.corruption.trunk.state_dict()
    assert all(torch.equal(t, of_classifier[n]) for n, t in of_trunk.items())
    assert any(int(t) > 0 for n, t in of_trunk.items() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize(("restarts", "times"), [(0, None), (1, "once"), (2, "2 times")])
def test_it_says_how_often_the_masks_collapsed(
    restarts: int, times: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    result = TrainingResult(1, [{"step": 1, "loss": 0.5, "restarts": float(restarts)}], 0)
    say_result(result, Path("n.safetensors"))
    out = capsys.readouterr().out
    assert ("collapsed" in out) == (times is not None)
    assert times is None or f"the masks collapsed {times}, and" in out


def test_super_pixels_of_other_images_are_refused(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    given = ("--images", photographs, *SHORT, "--superpixel-file", "maps.safetensors")
    run(*given)
    draw(photographs / "red" / "0.png", 1, torch.Generator().manual_seed(9))
    code, _, err = run(*given, "--out", "other")
    assert code == 2
    assert "is of other images" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "nowhere"), "nowhere: no such folder"),
        (("--images", "photographs", "--kind", "tiny"), "kind of data set: expected"),
        (("--images", "photographs", "--out", "photographs/run"), "lies inside"),
        (("--images", "photographs", "--form", "bound"), "did you mean 'bounded'"),
        (("--images", "photographs", "--area", "-1"), "weight: expected a number from 0"),
        (("--images", "photographs", "--area-rise", "2"), "rise: expected a number in [0, 1]"),
        (("--images", "photographs", "--trainable-layers", "5"), "has 4 layers, got 5"),
        (
            ("--images", "photographs", "--clean-share", "2"),
            "--clean-share: expected a number in [0, 1]",
        ),
        (("--images", "photographs", "--steps-of-classifier", "0"), "--steps-of-classifier"),
        (("--images", "photographs", "--pretraining-epochs", "-1"), "--pretraining-epochs"),
        (("--images", "photographs", "--evaluation-images", "-1"), "--evaluation-images"),
        (("--images", "photographs", "--held-out", "1"), "--held-out: expected a number in [0, 1)"),
        (("--images", "photographs", "--classes", "4"), "classes: expected a number from 2 to 3"),
        (("--images", "photographs", "--segments", "1000"), "too few for 1000 super-pixels"),
        (("--images", "photographs", "--model", "simple_convnets"), "did you mean"),
        (("--images", "photographs", "--width", "0"), "width: expected"),
        (("--images", "photographs", "--area-target", "2"), "target: expected a number in (0, 1)"),
        (("--images", "photographs", "--area-gain", "-1"), "gain: expected a number from 0"),
        (("--images", "photographs", "--freeze-trunk"), "give --trunk too"),
        (("--images", "photographs", "--trunk-weights", "DEFAULT"), "give --trunk too"),
        (
            ("--images", "photographs", "--trunk", "classifier", "--trunk-weights", "DEFAULT"),
            "is a copy of the classifier",
        ),
        (("--images", "photographs", "--trunk", "resnet18", "--freeze-trunk"), "are random"),
        (("--images", "photographs", "--trunk", "small_resnets"), "did you mean 'small_resnet'"),
        (("--images", "photographs", "--trunk", "vit_b_32"), "such as 224"),
        (
            ("--images", "photographs", "--trunk", "simple_convnet", "--trunk-weights", "DEFAULT"),
            "simple_convnet has no published ones",
        ),
        (("--images", "photographs", "--trunk-size", "0"), "--trunk-size: expected"),
        (("--images", "one"), "expected at least two classes, found 1"),
    ],
)
def test_wrong_arguments_are_named(
    run: Run, photographs: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    draw(tmp_path / "one" / "red" / "0.png", 0, torch.Generator().manual_seed(0))
    code, _, err = run(*SHORT, *options)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert len(list(photographs.rglob("*.png"))) == 12
