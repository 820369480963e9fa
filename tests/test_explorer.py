"""The explorer without its page: classes, maps, boxes, attacks, and what is exported."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou

from captum_robust import RealTimeMasking, RobustCAM
from captum_robust.attr import Defended
from captum_robust.catalog.methods import build_methods, heat_map
from captum_robust.catalog.thresholds import shipped_threshold
from captum_robust.catalog.words import words_of
from captum_robust.data import DataError
from captum_robust.defenses import default_transforms
from captum_robust.draw import as_rgb, encode_png
from captum_robust.models import Classifier
from captum_robust.nn import MaskingNetwork
from captum_robust.show.explain import explain_image
from captum_robust.show.exploration import ATTACKS, Explorer, Photograph, Question, defended
from tests.networks import Counted, classifier_of, drawn

METHODS = ["grad_cam", "robust_cam", "saliency", "perceptual_ball"]


@pytest.fixture
def explorer() -> Explorer:
    return Explorer(classifier_of(), METHODS)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A photograph in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("a photo.png").write_bytes(encode_png(as_rgb(drawn(1, 3, 80, 120)[0])))
    return Path("a photo.png")


@pytest.fixture
def photograph(explorer: Explorer, file: Path) -> Photograph:
    return explorer.photograph(file.read_bytes(), str(file))


def boxes_by(lines: str, **names: Any) -> dict[str, list[float]]:
    exec(lines, names)
    return names["boxes"]


def test_boxes_are_those_of_explain(explorer: Explorer, photograph: Photograph, file: Path) -> None:
    told = explain_image(explorer.model, file, explorer.methods, Path("out.png"))
    seen = explorer.explore(photograph, Question()).clean
    assert seen.boxes == told.boxes
    assert [(name, share) for _, name, share in seen.classes] == told.classes


@pytest.mark.parametrize("target", [None, 2])
@pytest.mark.parametrize("is_defended", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_python_lines_give_the_same_boxes(
    explorer: Explorer, photograph: Photograph, attack: str, is_defended: bool, target: int | None
) -> None:
    question = Question(target, attack, 8, is_defended)
    found = explorer.explore(photograph, question)
    lines = explorer.python(photograph, question)
    last = found.clean if found.attacked is None else found.attacked
    assert boxes_by(lines, model=explorer.model) == last.boxes
    if attack != "none":
        assert found.attacked is not None
        assert not torch.equal(found.attacked.x, found.clean.x)


@pytest.mark.parametrize("attack", ATTACKS)
def test_one_method_is_one_overlap(attack: str, file: Path) -> None:
    explorer = Explorer(classifier_of(), ["grad_cam"])
    photograph = explorer.photograph(file.read_bytes(), file.name)
    sentence = explorer.explore(photograph, Question(attack=attack, levels=8)).sentence()
    assert sentence.count("(Grad-CAM)") == (attack != "none")


def test_another_class_of_the_same_name_is_another_class(file: Path) -> None:
    model = classifier_of()
    explorer = Explorer(model, METHODS)
    photograph = explorer.photograph(file.read_bytes(), file.name)
    found = explorer.explore(photograph, Question(attack="deepfool", levels=255))
    assert found.attacked is not None
    assert found.attacked.classes[0][0] != found.clean.classes[0][0]
    for seen in (found.clean, found.attacked):
        seen.classes[:] = [(number, "crane", share) for number, _, share in seen.classes]
    assert "sees crane instead of crane" in found.sentence()


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a captum_robust.models.Classifier, got"):
        Explorer(nn.Flatten())  # type: ignore[arg-type]


def test_a_grey_network_gets_grey_images(file: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Classifier(net, input_size=(24, 32))
    explorer = Explorer(model, ["grad_cam"])
    photograph = explorer.photograph(file.read_bytes(), file.name)
    found = explorer.explore(photograph, Question(attack="pgd"))
    assert found.clean.x.shape == (1, 1, 24, 32)
    assert found.attacked is not None
    assert found.png()
    assert boxes_by(explorer.python(photograph, Question(attack="pgd")), model=model) == (
        found.attacked.boxes
    )


def test_nothing_is_computed_twice(photograph: Photograph) -> None:
    model = classifier_of()
    counted = Counted(model.module)
    model.module = counted
    explorer = Explorer(model, ["saliency"])

    def passes(question: Question) -> int:
        before = len(counted.calls)
        explorer.explore(photograph, question)
        return len(counted.calls) - before

    assert passes(Question()) == 2  # the scores, and a map
    assert passes(Question()) == 0
    assert passes(Question(target=0)) + passes(Question(target=1)) + passes(Question(target=2)) == 2
    first = passes(Question(attack="pgd"))
    assert first > 10
    assert passes(Question(attack="pgd")) == 0
    assert passes(Question(target=2, attack="pgd")) == 1
    assert passes(Question(attack="pgd", levels=3)) > 10
    assert passes(Question(attack="deepfool")) > 1
    assert passes(Question(attack="deepfool", levels=3)) == 0  # it takes what it needs


@pytest.mark.parametrize("attack", ["pgd", "explanation"])
def test_an_attack_without_strength_changes_nothing(
    explorer: Explorer, photograph: Photograph, attack: str
) -> None:
    found = explorer.explore(photograph, Question(attack=attack, levels=0))
    assert found.strength == 0
    assert set(found.overlaps().values()) == {1.0}


@pytest.mark.parametrize("levels", [1, 5])
def test_the_attack_stays_within_its_strength(
    explorer: Explorer, photograph: Photograph, levels: int
) -> None:
    found = explorer.explore(photograph, Question(attack="pgd", levels=levels))
    assert 0 < found.strength <= levels + 1e-3
    assert f"No pixel changes by more than {levels} of 255 levels" in found.sentence()


def test_the_explanation_attack_moves_the_map_and_keeps_the_class(
    explorer: Explorer, photograph: Photograph
) -> None:
    assert explorer.moved == "grad_cam"
    found = explorer.explore(photograph, Question(attack="explanation", levels=8))
    assert found.attacked is not None
    assert found.attacked.classes[0][0] == found.clean.classes[0][0]
    assert not torch.equal(found.attacked.maps["grad_cam"], found.clean.maps["grad_cam"])


def test_overlaps_are_those_of_torchvision(explorer: Explorer, photograph: Photograph) -> None:
    found = explorer.explore(photograph, Question(attack="deepfool"))
    assert found.attacked is not None
    for name, share in found.overlaps().items():
        before, after = found.clean.boxes[name], found.attacked.boxes[name]
        expected = box_iou(torch.tensor([before]), torch.tensor([after])).item()
        assert share == pytest.approx(expected)


class Threshold(nn.Module):
    """Of two classes the second one, where many pixels are far from their neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        rough = (x[..., 1:] - x[..., :-1]).abs().mean(dim=(1, 2, 3))
        return torch.stack([torch.full_like(rough, 0.01), rough], dim=1)


def test_defended_maps_are_of_the_class_of_the_averaged_scores() -> None:
    model = Classifier(Threshold(), input_size=16, class_names=["smooth", "rough"])
    image = torch.full((3, 16, 16), 0.5)
    transformed = torch.cat([t(image[None]) for t in default_transforms()])
    expected = int(model(transformed).mean(dim=0).argmax())
    assert (expected, int(model(image[None]).argmax())) == (1, 0)  # the noise is rough
    explorer = Explorer(model, {"own": lambda x, target: x * target.view(-1, 1, 1, 1)})
    found = explorer.explore(explorer.photograph(image, "grey.png"), Question(defended=True))
    assert found.clean.explained == (1, "rough")
    assert found.clean.classes[0][:2] == (1, "rough")
    assert "copies the network sees rough" in found.sentence()


def test_the_catalogue_has_the_defended_form(photograph: Photograph) -> None:
    model = classifier_of()
    method = defended(model, ["robust_cam"])["robust_cam"]
    target = torch.tensor([1])
    own = Defended(RobustCAM(model, model.cam_layer), default_transforms())
    expected = heat_map(own.attribute(photograph.x, target, upsample=True), (64, 64))
    assert torch.equal(method.explain(photograph.x, target).maps, expected)
    assert method.threshold == shipped_threshold("defended_robust_cam")


def test_other_methods_are_averaged_over_the_transforms(photograph: Photograph) -> None:
    model, target = classifier_of(), torch.tensor([1])
    plain = build_methods(model, ["saliency"])["saliency"]
    maps = [plain.explain(t(photograph.x), target).maps for t in default_transforms()]
    method = defended(model, ["saliency"])["saliency"]
    expected = torch.stack(maps).mean(dim=0)
    torch.testing.assert_close(method.explain(photograph.x, target).maps, expected)
    assert method.threshold == shipped_threshold("saliency")
    (box,) = build_methods(model, ["center_box"]).values()
    kept = defended(model, ["center_box", "defended_robust_cam"])
    assert kept["center_box"].box is not None
    assert kept["center_box"].box((8, 8)).equal(box.box((8, 8)))  # type: ignore[misc]
    assert kept["defended_robust_cam"].transforms


def test_what_is_exported(explorer: Explorer, photograph: Photograph) -> None:
    question = Question(attack="pgd", levels=8)
    found = explorer.explore(photograph, question)
    picture = Image.open(io.BytesIO(found.png()))
    one = Image.open(io.BytesIO(explorer.explore(photograph, Question()).png()))
    assert picture.width > one.width  # two of each method
    facts = json.loads(json.dumps(found.facts()))
    assert facts["photograph"] == "a photo.png"
    assert (facts["attack"], facts["levels"], facts["defended"]) == ("pgd", 8, False)
    assert found.attacked is not None
    assert facts["attacked"]["boxes"] == found.attacked.boxes
    assert set(facts["clean"]["boxes"]) == set(METHODS)
    titles = [title for title, _ in found.panels()]
    assert titles == ["The photograph", *(words_of(name) for name in METHODS)]
    change = found.panels()[0][1][2][1]
    assert change.startswith("the change, ×")


def test_what_cannot_be_answered_is_one_line(explorer: Explorer, photograph: Photograph) -> None:
    with pytest.raises(DataError, match=r"^broken.png: not an image"):
        explorer.photograph(b"no image at all", "folder/broken.png")
    for question, message in (
        (Question(attack="magic"), "attack: expected one of"),
        (Question(attack="pgd", levels=300), "epsilon: expected"),
        (Question(target=3), "target: the model has no class 3"),
    ):
        with pytest.raises(ValueError, match=message):
            explorer.explore(photograph, question)
    without = Explorer(explorer.model, ["saliency"])
    assert without.moved == ""
    with pytest.raises(ValueError, match="none of the methods"):
        without.explore(photograph, Question(attack="explanation"))


@pytest.mark.parametrize("methods", [None, ["saliency"]])
def test_a_frame_of_a_camera_keeps_its_size_and_shows_a_map(methods: Any) -> None:
    explorer = Explorer(classifier_of(), methods)
    frame = as_rgb(drawn(1, 3, 60, 80)[0])
    painted = explorer.frame(frame)
    assert painted.shape == frame.shape
    assert (painted != frame).any()


def test_a_masking_network_gives_the_masks_of_the_camera() -> None:
    model = classifier_of()
    torch.manual_seed(0)
    network = MaskingNetwork(model).eval()
    explorer = Explorer(model, {"real_time_masking": RealTimeMasking(network)})
    explorer.frame(as_rgb(drawn(1, 3, 60, 80)[0]))
    assert explorer._painter.network is network
