"""Models of others by name: a function of the user's, and timm's."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from captum_robust.attr import AdversarialLocalization, RobustCAM
from captum_robust.benchmark import compare
from captum_robust.data import Sample, load_dataset
from captum_robust.models import Classifier, load_classifier, save_classifier
from captum_robust.nn import (
    CorruptionNetwork,
    LocalizationNetwork,
    SimpleConvNet,
    save_localization_network,
)

MODULE = """
import torch
from torch import nn
from captum_robust.models import Classifier
import beside

class Net(nn.Sequential):
    def __init__(self, classes=3):
        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, classes)

def seeded(classes=3):
    torch.manual_seed(beside.SEED)
    return Net(classes)

def at_fault():
    raise RuntimeError("of two\\nlines")

def quits():
    raise SystemExit("bye")

def with_facts():
    names = ["cat", "dog", "eft"]
    return Classifier(seeded(), (0.5,) * 3, (0.25,) * 3, 32, names, cam_layer="0")

class Reversed(Classifier):
    def forward(self, x):
        return super().forward(1 - x)

def reversed_():
    return Reversed(seeded(), (0.5,) * 3, (0.25,) * 3, 32)

def of_thousand():
    return seeded(1000)

def one_score():
    return seeded(1)

def of_two_names():
    return Classifier(seeded(), input_size=32, class_names=["cat", "dog"])

def of_two():
    return seeded(2)

def only_small():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))

def needs(size):
    return Net()

def nothing():
    return 7

class OfDictionary(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}

def of_dictionary():
    return OfDictionary()

def of_red():
    conv, head = nn.Conv2d(3, 1, 1, bias=False), nn.Linear(1, 2, bias=False)
    conv.weight.data = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    head.weight.data = torch.tensor([[2.0], [-2.0]])
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return Classifier(net, input_size=(40, 80), class_names=["red", "other"])

def of_two_scales():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    return Classifier(net, input_size=32, class_names=["cat", "dog"])

def detached():
    import nowhere_at_all
"""

STOPPING = """
import os, signal
from own.nets import seeded, Net

class Stopping(Net):
    def forward(self, x):
        # The fifth step of the first run is stopped by Ctrl-C.
        if self.training and torch.is_grad_enabled() and not os.path.exists("was_stopped"):
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 5:
                open("was_stopped", "w").close()
                signal.raise_signal(signal.SIGINT)
        return super().forward(x)

import torch

def stopping():
    torch.manual_seed(0)
    return Stopping(2)
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory with a package ``own`` that has a module ``nets``, and two images."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "nets.py").write_text(MODULE)
    (tmp_path / "own" / "unfinished.py").write_text("def net(:\n")
    (tmp_path / "own" / "script.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "beside.py").write_text("SEED = 1\n")
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = torch.rand(40, 40, 3, generator=torch.Generator().manual_seed(i)) * 255
            picture = Image.fromarray(pixels.byte().numpy())
            picture.save(tmp_path / "images" / name / f"{name}{i}.png")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    for name in ("own", "own.nets", "own.stopping", "beside"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(run: Run, here: Path) -> Run:
    return run


def net(here: Path) -> Any:
    """The user's network, loaded by Python alone."""
    space: dict[str, Any] = {}
    sys.path.insert(0, str(here))
    try:
        exec(compile(MODULE, "nets.py", "exec"), space)
    finally:
        sys.path.remove(str(here))
    return space["seeded"]().eval()


def test_a_function_of_the_current_directory_is_a_model(here: Path) -> None:
    x = torch.rand(2, 3, 32, 32)
    plain = load_classifier("own.nets:seeded")
    assert torch.equal(plain(x), net(here)(x))  # without a mean the pixels as they are
    assert plain.name == "own.nets:seeded"
    assert plain.class_names == ["0", "1", "2"]
    given = load_classifier(
        "own.nets:Net", mean=[0.1, 0.2, 0.3], std=[0.5, 1, 1], input_size=48, cam_layer="1"
    )
    given.load_state_dict(plain.state_dict())
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1, 1])
    moved = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(given(x), net(here)(moved))
    assert (given.input_size, given.cam_layer) == ((48, 48), given.module[1])
    names = load_classifier("own.nets:of_thousand").class_names or []
    assert (names[0], len(names)) == ("tench", 1000)


def test_a_classifier_keeps_what_it_says_of_itself_but_for_what_is_given(here: Path) -> None:
    x = torch.rand(2, 3, 32, 32)
    own = load_classifier("own.nets:with_facts")
    assert torch.allclose(own(x), net(here)((x - 0.5) / 0.25))
    assert (own.class_names, own.input_size) == (["cat", "dog", "eft"], (32, 32))
    assert own.cam_layer is own.module[0]
    given = load_classifier("own.nets:with_facts", mean=[0.1] * 3, cam_layer="1", input_size=20)
    assert torch.allclose(given(x), net(here)((x - 0.1) / 0.25))
    assert (given.cam_layer, given.input_size) == (given.module[1], (20, 20))
    backwards = load_classifier("own.nets:reversed_", mean=[0.1] * 3)  # its forward pass stays
    assert torch.allclose(backwards(x), net(here)((1 - x - 0.1) / 0.25))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}])
def test_weights_of_torch_save_are_read_without_running_code(here: Path, wrap: Any) -> None:
    weights = load_classifier("own.nets:Net").module.state_dict()
    torch.save(wrap({f"module.{n}": t for n, t in weights.items()}), "parallel.pth.tar")
    torch.save(wrap(weights), "plain.pt")
    for file in ("parallel.pth.tar", "plain.pt"):
        loaded = load_classifier("own.nets:seeded", file).module.state_dict()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)


class _Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", [_Harm(), {"0.weight": _Harm()}, nn.Linear(2, 2), [1], {}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_no_code(here: Path, content: Any, zipped: bool) -> None:
    torch.save(content, "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"weights: file\.pt"):
        load_classifier("own.nets:seeded", "file.pt")
    assert not Path("harm").exists()
    Path("torn.pt").write_bytes(Path("file.pt").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"weights: torn\.pt"):
        load_classifier("own.nets:seeded", "torn.pt")


def test_a_saved_classifier_comes_back_with_its_normalisation(here: Path) -> None:
    own = load_classifier("own.nets:seeded", mean=[0.4] * 3, std=[0.2] * 3, input_size=32)
    save_classifier(own, "own.safetensors")
    x = torch.rand(1, 3, 32, 32)
    back = load_classifier("own.nets:seeded", "own.safetensors")
    assert torch.equal(back(x), own(x))
    assert back.input_size == (32, 32)


def test_a_file_does_not_say_which_code_to_run(here: Path) -> None:
    own = load_classifier("own.nets:with_facts")
    network = LocalizationNetwork(CorruptionNetwork(width=2), own, n_segments=4)
    save_localization_network(network, "network.safetensors")
    with pytest.raises(ValueError, match=r"its classifier is own\.nets:with_facts; give it as"):
        AdversarialLocalization.from_file("network.safetensors")
    AdversarialLocalization.from_file("network.safetensors", model=own)


WRONG = {
    "own.nets:seded": "function of own.nets: expected .*did you mean 'seeded'",
    "own.nests:seeded": r"there is no module own\.nests for own\.nests:seeded",
    "nowhere.nets:seeded": r"there is no module nowhere for nowhere\.nets:seeded",
    "own/nets.py:seeded": "expected a name, timm:NAME or package.module:function, got",
    "own.nets:": "expected a name, timm:NAME or package.module:function, got",
    "own.nets:needs": "expected a function that is called without arguments, got own.nets:needs",
    "own.nets:nothing": "expected a torch.nn.Module or a captum_robust.models.Classifier; .* int",
    "own.nets:detached": "No module named 'nowhere_at_all'",
    "own.nets:at_fault": "own.nets:at_fault failed: RuntimeError: of two lines",
    "own.nets:quits": "model: own.nets:quits failed: SystemExit: bye",
    "own.script:net": "model: module own.script failed: SystemExit: 3",
    "own.unfinished:net": "module own.unfinished failed: SyntaxError: ",
    "own.nets:of_two_names": "own.nets:of_two_names has 3 classes and 2 names",
    "own.nets:of_dictionary": r"of_dictionary: expected a tensor .*model\(x\)\['logits'\]$",
    "own.nets:only_small": "does not run on an image of 3×224×224: .*; give another size",
}


def test_a_model_of_one_logit_has_two_classes(run: Run) -> None:
    assert load_classifier("own.nets:one_score")(torch.rand(2, 3, 32, 32)).shape == (2, 2)
    code, out, _ = run("explain", "images", "--model", "own.nets:one_score", "--json")
    assert code == 0
    classes = json.loads(out.splitlines()[0])["classes"]
    assert sum(c["probability"] for c in classes) == pytest.approx(1)
    assert len(classes) == 2


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_model_is_refused_by_name(run: Run, name: str) -> None:
    with pytest.raises((ValueError, TypeError, ImportError), match=WRONG[name]):
        load_classifier(name)
    code, _, err = run("explain", "images", "--model", name)
    assert code == 2
    assert len(err.splitlines()) == 1


def test_explain_attack_compare_and_video_take_an_own_model(run: Run, here: Path) -> None:
    own = ("--model", "own.nets:with_facts", "--layer", "1")
    code, out, err = run("explain", "images", *own, "--top", 3)
    assert code == 0, err
    assert out.count("  cat") == out.count("  dog") == 8
    code, out, err = run("attack", "images", *own, "--epsilon", "8/255", "--steps", 2, "--all")
    assert code == 0, err
    assert "without a label" not in out  # cat and dog are classes of the model
    given = ("compare", "folder", "images", *own, "--methods", "grad_cam", "--seed", 1)
    assert run(*given, "--size", 32)[0] == 0
    with open("captum-robust-compare/run.json") as file:
        model = json.load(file)["model"]
    assert (model["name"], model["cam_layer"]) == ("own.nets:with_facts", "1")
    film = cv2.VideoWriter("film.avi", cv2.VideoWriter_fourcc(*"MJPG"), 5, (32, 32))  # type: ignore[attr-defined]
    film.write(np.full((32, 32, 3), 90, dtype=np.uint8))
    film.release()
    code, out, err = run("video", "film.avi", "out.avi", *own, "--method", "grad_cam")
    assert code == 0, err
    assert "out.avi: 1 frame of" in out


def labels_of(run: Run, *arguments: object) -> tuple[dict[str, str], str]:
    """The label of the first image of each folder in the table of ``attack``, and what it said."""
    shutil.rmtree("run", ignore_errors=True)
    given = ("--attack", "fgsm", "--epsilon", 2, "--size", 32, "--out", "run")
    _, out, err = run("attack", "images", "--model", "own.nets:seeded", *given, *arguments)
    with open("run/attacked.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["image"].endswith("0.png")]
    return {row["image"].split("/")[0]: row["label"] for row in rows}, out + err


def test_folders_of_a_model_without_class_names_never_count_imagenets(run: Run, here: Path) -> None:
    Path("images/cat").rename("images/tench")  # ImageNet's class 0
    _, said = labels_of(run)
    assert "without a label: 8" in said
    assert "\ncaptum-robust: dataset: its classes (dog, tench) are not known to be" in f"\n{said}"
    assert "give the model their names (class_names, --classes)\n" in said
    assert labels_of(run, "--classes", "dog,eft,tench")[0] == {"dog": "0", "tench": "2"}
    Path("names.txt").write_text("tench\neft\ndog\n")
    assert labels_of(run, "--classes", "names.txt")[0] == {"dog": "2", "tench": "0"}
    code, _, err = run("explain", "images", "--model", "own.nets:seeded", "--classes", "a,b")
    assert code == 2
    assert "own.nets:seeded" not in err
    assert "--classes: expected 3, as of the model, got 2" in err
    code, _, err = run("explain", "images", "--weights", "none", "--classes", "a,b", "--top", 9)
    assert code == 0, err  # random weights are of as many classes
    shutil.copytree("images/dog", "images/apple")
    assert labels_of(run)[0] == {"apple": "0", "dog": "1", "tench": "2"}  # in their order


def boxed(kind: str) -> None:
    """The four images of "cat" as a data set of boxes around dogs (three) and yaks (one)."""
    names = ["dog", "dog", "dog", "yak"]
    if kind == "coco":
        images = [{"id": i, "file_name": f"cat{i}.png"} for i in range(4)]
        objects = [
            {"id": i, "image_id": i, "category_id": int(name == "yak"), "bbox": [2, 2, 9, 9]}
            for i, name in enumerate(names)
        ]
        content = {
            "images": images,
            "annotations": objects,
            "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "yak"}],
        }
        Path("data").mkdir()
        Path("data/boxes.json").write_text(json.dumps(content))
        for i in range(4):
            shutil.copy(f"images/cat/cat{i}.png", "data")
        return
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        Path("data", part).mkdir(parents=True)
    Path("data/ImageSets/Main/val.txt").write_text("\n".join(f"cat{i}" for i in range(4)))
    for i, name in enumerate(names):
        with Image.open(f"images/cat/cat{i}.png") as picture:
            picture.save(f"data/JPEGImages/cat{i}.jpg")
        Path(f"data/Annotations/cat{i}.xml").write_text(
            f"<annotation><object><name>{name}</name><bndbox><xmin>2</xmin><ymin>2</ymin>"
            "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
        )


@pytest.mark.parametrize(("kind", "path"), [("coco", "data/boxes.json"), ("voc", "data")])
def test_categories_that_are_called_as_the_models_classes_are_these(
    run: Run, kind: str, path: str
) -> None:
    boxed(kind)
    own = ("--model", "own.nets:with_facts")  # its names: cat, dog, eft
    few = ("--attack", "fgsm", "--epsilon", 2)
    code, out, err = run("attack", path, "--kind", kind, *own, *few)
    assert code == 0, err
    assert "without a label: 1; " in out
    with open("captum-robust-attack/attacked.csv") as file:
        rows = [(row["image"].partition("#")[2], row["label_name"]) for row in csv.DictReader(file)]
    assert rows[:3] == [("dog", "dog")] * 3
    code, out, err = run("compare", kind, path, *own, "--methods", "center_box")
    assert code == 0, err
    assert "4 images: 0 could not be used, 0 without a box; 1 without a label: there the" in out
    page = Path("captum-robust-compare/report.html").read_text()
    assert "1 without label (there the prediction is explained)" in page


def test_labels_that_count_other_classes_than_the_models_are_refused(here: Path) -> None:
    Path("images/cat").rename("images/tench")
    Path("images/dog").rename("images/goldfish")
    model = Classifier(load_classifier("own.nets:seeded").module, input_size=32)
    result = compare(model, load_dataset("folder", "images"), ["grad_cam"], progress=False)
    assert result.table()["failed"].max() == 8
    assert "class 1 of the 1000, but the model has 3 classes" in result.to_text()


def test_a_file_of_other_classes_without_names_has_numbers(here: Path) -> None:
    torch.manual_seed(0)
    own = Classifier(SimpleConvNet(7), input_size=64, name="simple_convnet")
    save_classifier(own, "seven.safetensors")
    torch.save(own.module.state_dict(), "seven.pt")
    for file in ("seven.safetensors", "seven.pt"):
        assert load_classifier("simple_convnet", file).class_names == list("0123456")


def test_a_masking_network_is_trained_for_an_own_model(run: Run) -> None:
    own = ("--model", "own.nets:of_two_scales", "--size", 48)
    given = ("train", "masking", "--images", "images", *own, "--epochs", 1, "--batch-size", 4)
    code, _, err = run(*given, "--warm-up-steps", 1, "--out", "run")
    assert code == 0, err
    network = ("--methods", "real_time_masking", "--network", "run/masking.safetensors")
    code, _, err = run("explain", "images/cat/cat0.png", *own, *network)
    assert code == 0, err


def test_a_run_goes_on_with_the_same_model_only(run: Run, here: Path) -> None:
    own = ("--model", "own.nets:seeded", "--size", 32, "--mean", "0.5", "--std", "0.5")
    given = ("attack", "images/cat", "--epsilon", 2, "--attack", "fgsm", *own)
    assert run(*given)[0] == 0
    assert run(*given)[0] == 0
    own = ("--model", "own.nets:Net", "--size", 32, "--mean", "0.5", "--std", "0.5")
    torch.save(load_classifier("own.nets:Net").module.state_dict(), "w.pt")
    for other, differs in (
        ((*given, "--mean", "0.4"), "model.weights_crc32"),
        ((*given, "--weights", "w.pt"), "model.weights_crc32"),
        ((*given, "--model", "own.nets:with_facts"), "model.name: own.nets:seeded there"),
        ((*given, "--size", 40), "model.input_size"),
    ):
        code, _, err = run(*other)
        assert code == 2
        assert "holds another run" in err
        assert differs in err
    with open("own/nets.py", "a") as file:  # the weights are the same, the network may not be
        file.write("\n")
    code, _, err = run(*given)
    assert code == 2
    assert "model.source_crc32" in err


def test_a_training_that_is_stopped_goes_on(run: Run, here: Path) -> None:
    given = ("train", "robust", "--images", "images", "--size", 32, "--epochs", 4)
    given = (*given, "--batch-size", 2, "--steps", 1, "--epsilon", "4/255", "--held-out", 0.25)
    (here / "own" / "stopping.py").write_text(STOPPING)
    code, _, err = run(*given, "--model", "own.stopping:stopping", "--out", "stopped")
    assert code == 130
    assert "captum-robust: stopped; the same command goes on from here" in err
    assert not Path("stopped/model.safetensors").exists()
    code, out, err = run(*given, "--model", "own.stopping:stopping", "--out", "stopped")
    assert code == 0, err
    assert "went on from step 5 of" in out
    assert "clean and under PGD at 4/255" in out
    assert run(*given, "--model", "own.stopping:stopping", "--out", "whole")[0] == 0
    ends = [Path(out, "model.safetensors").read_bytes() for out in ("stopped", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("command", ["robust", "localization"])
def test_an_own_model_is_trained_and_comes_back(run: Run, here: Path, command: str) -> None:
    shutil.copytree("images/cat", "images/eft")
    given = ("train", command, "--images", "images", "--model", "own.nets:Net", "--size", 32)
    given = (*given, "--mean", "0.4,0.5,0.6", "--std", "0.2", "--epochs", 1, "--batch-size", 4)
    if command == "robust":
        given = (*given, "--steps", 1)
    else:
        given = (*given, "--pretraining-epochs", 1, "--width", 2, "--segments", 4)
    code, _, err = run(*given, "--out", "run")
    assert code == 2  # one mean a channel, as of a standard deviation
    assert "mean and std: expected one value a channel each" in err
    given = (*given, "--std", "0.2,0.2,0.2", "--out", "run")
    code, out, err = run(*given)
    assert code == 0, err
    code, _, err = run(*given, "--mean", "0.4,0.5,0.5")
    assert code == 2
    assert "holds another run (mean: 0.4,0.5,0.6 there, 0.4,0.5,0.5 here)" in err
    if command == "robust":
        assert "--model own.nets:Net --weights" in out
        back = load_classifier("own.nets:Net", "run/model.safetensors")
        assert back.class_names == ["cat", "dog", "eft"]
        assert back.mean is not None
        assert back.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize("command", ["robust", "localization", "masking"])
def test_too_few_images_to_hold_some_out_say_how_many_it_takes(run: Run, command: str) -> None:
    shutil.rmtree("images/cat")
    shutil.copytree("images/dog", "images/cat")  # four of a class
    of = {"robust": "--steps", "localization": "--pretraining-epochs", "masking": "--warm-up-steps"}
    name = "of_two_scales" if command == "masking" else "of_two"
    own = ("--model", f"own.nets:{name}", "--size", 32, "--epochs", 1, "--batch-size", 4)
    given = ("train", command, "--images", "images", *own, of[command], 1)
    code, out, err = run(*given, "--held-out", 0.11, "--out", "run")  # .11 × 10 = 1.1
    assert code == 0, err
    of_a_class = "" if command == "masking" else " of a class"
    assert f"to hold out 0.11 of the images takes 10{of_a_class}; give more" in out
    assert "to hold out" not in run(*given, "--held-out", 0.25, "--out", "other")[1]


def test_classes_that_an_own_model_does_not_have_are_refused(run: Run) -> None:
    code, _, err = run("train", "robust", "--images", "images", "--model", "own.nets:Net")
    assert code == 2
    assert "own.nets:Net has 3 classes; expected 2" in err


@pytest.mark.parametrize("mean", ["123.7,116.3,103.5", "0.5;0.5;0.5", "-0.1"])
def test_a_mean_that_is_for_other_pixels_is_refused(run: Run, mean: str) -> None:
    code, _, err = run("explain", "images", "--mean", mean)
    assert code == 2
    assert "--mean: expected numbers in [0, 1], separated by commas, for pixels in [0, 1]" in err


def test_a_size_that_a_network_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size: vit_b_16 does not take images of 96×96; .* 224"):
        load_classifier("vit_b_16", None, input_size=96)


def test_explain_writes_maps_and_prints_json(run: Run, here: Path) -> None:
    pixels = np.zeros((80, 160, 3), dtype=np.uint8)
    pixels[20:60, 40:120, 0] = 255  # a quarter of the image is red: scores .5 and -.5
    Image.fromarray(pixels).save("red.png")
    given = ("--model", "own.nets:of_red", "--methods", "grad_cam", "--save-maps")
    given = (*given, "--threshold", "0.2")  # what ships is for maps with a slope
    code, out, err = run("explain", "red.png", *given, "--json", "--top", 2, "--out", "out")
    assert code == 0, err
    (line,) = out.splitlines()
    said = json.loads(line)
    assert said["image"] == "red.png"
    assert said["picture"] == "out/red.png"
    assert said["explained"] == 0
    assert [row["class"] for row in said["classes"]] == [0, 1]
    assert [row["name"] for row in said["classes"]] == ["red", "other"]
    assert [row["score"] for row in said["classes"]] == pytest.approx([0.5, -0.5])
    # softmax: 1 / (1 + exp(-1)) = .731059
    shares = [row["probability"] for row in said["classes"]]
    assert shares == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert said["boxes"] == {"grad_cam": [40, 20, 120, 60]}
    assert said["maps"] == {"grad_cam": "out/red.grad_cam.npy"}
    heat = np.load("out/red.grad_cam.npy")
    assert (heat.shape, heat.dtype) == ((40, 80), np.float32)
    assert np.array_equal(heat > heat.max() / 2, pixels[::2, ::2, 0] > 0)
    code, plain, _ = run("explain", "red.png", *given, "--out", "out")
    assert "73.1%  red" in plain
    assert "map: out/red.grad_cam.npy" in plain
    Path("torn.png").write_bytes(b"torn")
    code, out, err = run("explain", "red.png", "torn.png", *given, "--json")
    assert (code, len(out.splitlines())) == (0, 1)  # nothing but JSON
    assert "2 images: 1 could not be used" in err


def test_a_stopped_explain_goes_on_and_never_mixes_settings(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_robust.show import explain as shown

    explain_image, calls, stop_at = shown.explain_image, list[str](), 3

    def stopped(model: Any, file: Path, *arguments: Any, **options: Any) -> Any:
        calls.append(file.name)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return explain_image(model, file, *arguments, **options)

    def made(*options: object) -> list[str]:
        calls.clear()
        code, out, err = run(*given, *options)
        assert code == 0, err
        assert out.count(" -> ") == 8
        return list(calls)

    monkeypatch.setattr(shown, "explain_image", stopped)
    given = ("explain", "images", "--model", "own.nets:with_facts", "--save-maps", "--out", "out")
    given = (*given, "--methods", "grad_cam")
    code, out, err = run(*given)
    assert code == 130
    assert err.endswith("captum-robust: stopped; the same command goes on from here\n")
    before, stop_at = out, -1
    assert made() == ["cat2.png", "cat3.png", *(f"dog{i}.png" for i in range(4))]
    assert run(*given)[1].startswith(before)  # what was said of the first two is said again
    files = {file: file.read_bytes() for file in Path("out").rglob("*.*")}
    assert len(files) == 16
    whole = run(*given[:-4], "--out", "whole", *given[-2:])
    assert whole[0] == 0
    assert all(Path("whole", *f.parts[1:]).read_bytes() == data for f, data in files.items())
    Path("out/cat/cat0.grad_cam.npy").unlink()
    Path("out/dog/dog1.grad_cam.npy").write_bytes(b"of other settings")
    Path("out/dog/dog2.png").write_bytes(b"torn")
    shutil.copy("images/cat/cat0.png", "images/cat/cat3.png")
    assert made() == ["cat0.png", "cat3.png", "dog1.png", "dog2.png"]
    for other in ("--threshold", 0.5), ("--target", "dog"), ("--mean", "0.4,0.4,0.4"), ("--top", 1):
        assert len(made(*other)) == 8
    assert len(made()) == 8  # the others have been written over


def test_a_model_of_timm_has_its_own_normalisation_and_size() -> None:
    timm = pytest.importorskip("timm")
    model = load_classifier("timm:test_vit", None)
    assert model.input_size == (160, 160)
    assert (model.class_names or [])[0] == "tench"
    torch.manual_seed(0)
    plain = timm.create_model("test_vit").eval()
    model.module.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 160, 160)
    assert torch.allclose(model(x), plain((x - 0.5) / 0.5), atol=1e-6)  # as its card says
    given = load_classifier("timm:test_resnet", None, class_names=["a", "b"], mean=[0.1, 0.2, 0.3])
    assert given(x).shape == (1, 2)
    assert given.mean is not None
    assert given.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert isinstance(given, Classifier)


def test_explain_takes_a_model_of_timm(run: Run) -> None:
    pytest.importorskip("timm")
    own = ("--model", "timm:test_vit", "--weights", "none")
    code, out, err = run("explain", "images/cat/cat0.png", *own)
    assert code == 0, err
    assert "cat0.png" in out
    for name, message in {
        "test_vitt": "did you mean 'test_vit'",
        "test_vit.nosuch": "Invalid pretrained tag (nosuch)",
    }.items():
        code, _, err = run("explain", "images", "--model", f"timm:{name}", "--weights", "none")
        assert code == 2
        assert message in err


class ScoresInADictionary(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(x)}


def plain_network() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(
        conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["scripted", "traced", "exported"])
def test_models_that_hide_their_layers_are_explained_without_or_refused(kind: str) -> None:
    network, x = plain_network(), torch.rand(2, 3, 16, 16)
    batch = {0: torch.export.Dim("batch")}
    hidden: nn.Module = {
        "scripted": lambda: torch.jit.script(network),
        "traced": lambda: torch.jit.trace(network, x),
        "exported": lambda: torch.export.export(network, (x,), dynamic_shapes=[batch]).module(),
    }[kind]()
    model = Classifier(hidden, input_size=16)
    boxes = torch.tensor([[2.0, 2, 12, 12]])
    data = [Sample(image, i, boxes, str(i)) for i, image in enumerate(x)]
    results = compare(model, data, ["saliency"], progress=False)
    assert {row.failed for row in results.table().itertuples()} == {0}
    remedy = "give the nn.Module that it was made of"
    with pytest.raises(ValueError, match=f"cam_layer: none found.*{remedy}"):
        _ = model.cam_layer
    with pytest.raises(ValueError, match=f"perceptual_layers: none found.*{remedy}"):
        _ = model.perceptual_layers
    layer = next(m for m in hidden.modules() if m is not hidden)
    for explained in (hidden, model):
        with pytest.raises(ValueError, match=f"layer: .*{remedy}"):
            RobustCAM(explained, layer).attribute(x)


def test_a_classifier_of_dictionaries_says_how_to_pick_the_scores() -> None:
    model = Classifier(ScoresInADictionary(plain_network()), input_size=16)
    with pytest.raises(TypeError, match=r"module: expected a tensor of scores, got dict.*logits"):
        model.eval()(torch.rand(1, 3, 16, 16))
    sample = Sample(torch.rand(3, 16, 16), 0, torch.tensor([[2.0, 2, 12, 12]]), "0")
    with pytest.raises(TypeError, match=r"module: expected a tensor of scores.*logits"):
        compare(model, [sample], ["saliency"], progress=False)
