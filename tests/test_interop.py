"""Attributions in the hands of other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, NoiseTunnel, Saliency
from torch import nn

from captum_robust.attr import PerceptualBallPerturbation, RobustCAM
from captum_robust.interop import quantus_explain_func
from captum_robust.metrics import functional as F
from tests.networks import PixelNet, drawn

X, Y = drawn(2), np.array([1, 4], dtype=np.int32)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def net() -> PixelNet:
    torch.manual_seed(0)
    return PixelNet().eval()


def test_an_attribution_is_its_own_map_as_an_array(net: PixelNet) -> None:
    target = torch.tensor([1, 4])
    found = quantus_explain_func(Saliency(net))(net, X.numpy(), Y)
    np.testing.assert_array_equal(found, Saliency(net).attribute(X, target).numpy())
    cam = RobustCAM(net, net.conv2)
    found = quantus_explain_func(cam, upsample=True)(net, X.numpy(), Y, k=2)
    expected = cam.attribute(X, target, upsample=True, k=2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.numpy())


def test_maps_of_a_layer_are_enlarged(net: PixelNet) -> None:
    found = quantus_explain_func(LayerGradCam(net, net.conv2))(net, X.double().numpy(), Y)
    maps = LayerGradCam(net, net.conv2).attribute(X, torch.tensor([1, 4])).detach()
    expected = nn.functional.interpolate(maps, X.shape[2:], mode="bilinear", align_corners=False)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: RobustCAM(net, net.conv2),
        lambda net: PerceptualBallPerturbation(net, [net.conv1]),
        lambda net: NoiseTunnel(Saliency(net)),
    ],
    ids=["RobustCAM", "PerceptualBallPerturbation", "NoiseTunnel"],
)
def test_quantus_measures_attributions(net: PixelNet, make) -> None:
    quantus = pytest.importorskip("quantus")
    flipping = quantus.PixelFlipping(features_in_step=187, disable_warnings=True)
    explain = quantus_explain_func(make)
    batch = {"x_batch": X.numpy(), "y_batch": Y}
    scores = flipping(model=net, explain_func=explain, a_batch=None, **batch)
    assert np.isfinite(scores).all()


def test_quantus_randomises_a_model_whose_attribution_is_made_anew(net: PixelNet) -> None:
    """Its stages are ours: both find the map of each randomised model, from the head on.

    Quantus seeds every layer alike, so the weights, and the numbers, are others.
    """
    quantus = pytest.importorskip("quantus")
    check = quantus.MPRT(layer_order="top_down", disable_warnings=True, display_progressbar=False)
    explain = quantus_explain_func(lambda model: Saliency(model))
    batch = {"x_batch": X.numpy(), "y_batch": Y, "a_batch": None}
    scores = check(model=net, explain_func=explain, **batch)
    assert tuple(k for k in scores if k != "original") == F.layers_with_weights(net)
    bound = quantus_explain_func(Saliency(net))
    with pytest.raises(ValueError, match="model: expected that of the attribution, got another"):
        check(model=net, explain_func=bound, **batch)


def test_wrong_arguments_are_named(net: PixelNet) -> None:
    with pytest.raises(TypeError, match="attribution: expected an attribution or a function"):
        quantus_explain_func("saliency")
    with pytest.raises(ValueError, match="model: expected that of the attribution"):
        quantus_explain_func(Saliency(net))(PixelNet(), X.numpy(), Y)
    whole = quantus_explain_func(lambda model: LayerActivationLike(model))
    with pytest.raises(ValueError, match=r"attribution: expected maps 2×1×h×w or 2×3×h×w"):
        whole(net, X.numpy(), Y)


class LayerActivationLike(Saliency):
    def attribute(self, inputs, target=None):
        return inputs.repeat(1, 4, 1, 1)


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (X, np.eye(5)[[1, 4]], r"targets: expected 2 class indices, got \(2, 5\)"),
        (X, [1], r"targets: expected 2 class indices, got \(1,\)"),
        (X, [0.2, 1.7], "targets: expected 2 class indices"),
        (X * np.nan, Y, "inputs: NaN or infinity in sample 0"),
        (X[0], Y[:1], "inputs: expected N×C×H×W, got 3×22×17"),
        (X.flatten(1), Y, "inputs: expected N×C×H×W"),
        (X[:0], [], "inputs: expected at least one"),
    ],
)
def test_inputs_and_targets_that_do_not_fit_are_named(
    net: PixelNet, inputs: torch.Tensor, targets: object, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        quantus_explain_func(Saliency)(net, inputs.numpy(), targets)


def test_a_model_of_half_precision_gets_inputs_of_its_own(net: PixelNet) -> None:
    found = quantus_explain_func(Saliency)(net.bfloat16(), X.numpy(), Y)
    expected = Saliency(net).attribute(X.bfloat16(), torch.tensor([1, 4]))
    np.testing.assert_array_equal(found, expected.float().numpy())
