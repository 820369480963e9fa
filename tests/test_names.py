"""Names of methods, attacks and models are taken as users write them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_robust import ClassActivationMap, RealTimeMasking, locate
from captum_robust._checks import known_name, letters
from captum_robust.attr.real_time_masking import pretrained
from captum_robust.benchmark import ATTACKS, METHODS, build_attacks, compare
from captum_robust.catalog.methods import named_methods
from captum_robust.data import Sample
from captum_robust.models import Classifier, load_classifier
from captum_robust.models.zoo import model_name


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Grad-CAM", "grad_cam"),
        ("gradcam", "grad_cam"),
        ("GRAD CAM", "grad_cam"),
        ("GradCAM++", "grad_cam_plus_plus"),
        ("Grad-CAM++", "grad_cam_plus_plus"),
        ("RobustCAM", "robust_cam"),
        ("Integrated Gradients", "integrated_gradients"),
        ("IntegratedGradients", "integrated_gradients"),
        ("SmoothGrad", "smooth_grad"),
        ("Input × Gradient", "input_x_gradient"),
        ("InputXGradient", "input_x_gradient"),
        ("perceptual ball × CAM", "perceptual_ball_cam"),
        ("RISE", "rise"),
        ("centre box", None),
        ("", None),
        ("++", None),
    ],
)
def test_a_method_is_what_its_letters_say(written: str, meant: str | None) -> None:
    if meant is None:
        with pytest.raises(ValueError, match="method: expected one of"):
            known_name("method", written, METHODS)
    else:
        assert known_name("method", written, METHODS) == meant


def test_no_two_methods_or_attacks_have_the_same_letters() -> None:
    for names in (METHODS, ATTACKS):
        assert len({letters(name) for name in names}) == len(names)


def test_a_name_that_may_be_several_is_refused_with_them() -> None:
    with pytest.raises(ValueError, match="'RegNetY-16GF' may be 'regnet_y_16gf' or 'regnet_y_1_6"):
        model_name("RegNetY-16GF")
    assert model_name("regnet_y_16gf") == "regnet_y_16gf"  # as it is written


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="thing: expected one of a, b, got 3"):
        known_name("thing", 3, ["a", "b"])


def test_a_near_miss_in_capitals_is_told_what_it_may_be() -> None:
    with pytest.raises(ValueError, match="did you mean 'grad_cam'"):
        known_name("method", "GRAD-CAN", ["grad_cam", "rise", "saliency"])


def test_one_method_by_two_of_its_names_is_refused() -> None:
    with pytest.raises(ValueError, match="each name once"):
        named_methods(["grad_cam", "Grad-CAM"])
    own = named_methods({"mine": "Grad-CAM", "theirs": "gradcam"})
    assert own == {"mine": "grad_cam", "theirs": "grad_cam"}


@pytest.fixture
def tiny() -> Classifier:
    parts = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(nn.Sequential(*parts), input_size=16).eval()


def test_rows_have_the_name_of_the_catalogue(tiny: Classifier) -> None:
    samples = [Sample(torch.rand(3, 16, 16), 0, torch.tensor([[2.0, 2, 9, 9]]), "a")]
    result = compare(tiny, samples, ["Grad-CAM", "Center Box"], progress=False)
    assert set(result.methods) == {"grad_cam", "center_box"}


def test_attacks_and_kinds_too(tiny: Classifier) -> None:
    assert set(build_attacks(tiny, ["PGD", "DeepFool"], [8])) == {"pgd 8/255", "deepfool"}
    with pytest.raises(ValueError, match="each once"):
        build_attacks(tiny, ["PGD", "pgd"], [8])
    assert ClassActivationMap(tiny, tiny.cam_layer, "Grad-CAM++").kind == "grad_cam_plus_plus"
    with pytest.raises(ValueError, match="kind: expected one of"):
        ClassActivationMap(tiny, tiny.cam_layer, "Grad-CAM+")


def test_locate_takes_the_same_names(tiny: Classifier) -> None:
    images = torch.rand(1, 3, 16, 16)
    same = [locate(tiny, images, method=m)[0]["boxes"] for m in ("Grad-CAM", "grad_cam")]
    assert torch.equal(*same)
    with pytest.raises(ValueError, match="method: expected one of"):
        locate(tiny, images, method="grand")


def test_models_too() -> None:
    assert load_classifier("ResNet-18", None).name == "resnet18"
    assert load_classifier("Small ResNet", None).name == "small_resnet"
    with pytest.raises(ValueError, match=r"model: .*'resnet18'"):
        load_classifier("ResNet-1", None)
    if "efficientnet_lite0" in pretrained():
        assert RealTimeMasking.from_pretrained("EfficientNet-Lite0").network is not None
    with pytest.raises(ValueError, match="train one with"):
        RealTimeMasking.from_pretrained("EfficientNet-Lite7")
