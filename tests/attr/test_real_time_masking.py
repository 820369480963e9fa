from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_robust import RealTimeMasking
from captum_robust.attr import real_time_masking
from captum_robust.benchmark.passes import count_passes
from captum_robust.models import Classifier, load_classifier
from captum_robust.nn import MaskingNetwork, load_masking_network, save_masking_network


def classifier(classes: int = 5, name: str = "small") -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        )
    return Classifier(net, input_size=32, name=name).eval()


def network(model: Classifier) -> MaskingNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MaskingNetwork(model)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_mask_costs_one_pass_of_the_classifier(x: Tensor) -> None:
    model = classifier()
    method = RealTimeMasking(network(model))
    with count_passes(model) as passes:
        method.attribute(x)
    assert (passes.forward, passes.backward) == (len(x), 0)


def test_without_training_it_is_the_gate_of_the_class_activation_map(x: Tensor) -> None:
    model = classifier()
    method = RealTimeMasking(network(model))
    weight, bias = model.module[6].weight, model.module[6].bias
    features = model.module[:4](x)
    target = torch.tensor([0, 1, 2, 3])
    cam = torch.einsum("nchw,nc->nhw", features, weight[target]) + bias[target][:, None, None]
    odds = (0.5 * cam - 2)[:, None]  # scale and shift that nothing has trained
    half = F.interpolate(4 * torch.tanh(odds / 4), scale_factor=2, mode="bilinear") / 2
    expected = half.exp() / (half.exp() + (-half).exp() + 1e-4)
    expected = F.interpolate(expected, scale_factor=2, mode="bilinear")
    found = method.attribute(x, target)
    torch.testing.assert_close(found, expected.expand_as(x))


def test_confidence_hides_what_is_not_surely_of_the_class(x: Tensor) -> None:
    method = RealTimeMasking(network(classifier()))
    sure = method.attribute(x, 1, confidence=6)
    assert (sure < method.attribute(x, 1)).all()
    own = RealTimeMasking(method.network, confidence=6)
    assert torch.equal(own.attribute(x, 1), sure)


def test_the_decoder_is_put_in_evaluation_mode_for_the_call(x: Tensor) -> None:
    net = network(classifier())
    expected = RealTimeMasking(net.eval()).attribute(x, 1)
    statistics = {n: t.clone() for n, t in net.decoder.state_dict().items()}
    net.train()
    assert torch.equal(RealTimeMasking(net).attribute(x, 1), expected)
    assert net.decoder.training
    assert all(torch.equal(t, statistics[n]) for n, t in net.decoder.state_dict().items())


def test_masks_of_other_classes_than_the_encoders_need_a_target(x: Tensor) -> None:
    model = classifier()
    method = RealTimeMasking(MaskingNetwork(model, num_classes=9))
    assert method.attribute(x, 8).shape == x.shape
    with pytest.raises(ValueError, match="target: the masks are of 9 classes"):
        method.attribute(x)
    with pytest.raises(ValueError, match=r"target: expected a class, .* got a function"):
        method.attribute(x, lambda scores: scores[:, 1])


def test_it_works_at_half_precision(x: Tensor) -> None:
    method = RealTimeMasking(network(classifier()).eval())
    expected = method.attribute(x, 2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(method.attribute(x, 2), expected, atol=0.05, rtol=0)
    method.network.to(torch.bfloat16)
    found = method.attribute(x.bfloat16(), 2)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0)


def test_what_is_no_masking_network_is_refused() -> None:
    with pytest.raises(TypeError, match=r"network: expected a captum_robust\.nn\.MaskingNetwork"):
        RealTimeMasking(classifier())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="confidence"):
        RealTimeMasking(network(classifier()), confidence=float("nan"))


def test_pretrained_networks_are_found_by_the_name_of_the_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    model = classifier(name="small")
    net = network(model)
    save_masking_network(net, tmp_path / "weights/real_time_masking_small.safetensors")
    monkeypatch.setattr(real_time_masking, "files", lambda package: tmp_path)
    method = RealTimeMasking.from_pretrained("small", model=model)
    assert torch.equal(method.attribute(x, 1), RealTimeMasking(net).attribute(x, 1))
    with pytest.raises(ValueError, match="train one with: captum-robust train masking"):
        RealTimeMasking.from_pretrained("smal", model=model)


def test_a_file_for_another_classifier_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "masking.safetensors"
    save_masking_network(network(classifier()), file)
    with pytest.raises(ValueError, match="for the encoder small, not other"):
        load_masking_network(file, classifier(name="other"))
    with pytest.raises(ValueError, match="5 classes"):
        load_masking_network(file, classifier(classes=7))


@pytest.mark.data
def test_the_network_of_this_package_fits_its_classifier() -> None:
    found = real_time_masking.pretrained()
    for name, file in found.items():
        assert file.stat().st_size <= 4 * 2**20
        model = load_classifier(name)
        method = RealTimeMasking.from_pretrained(name, model=model)
        x = torch.rand(1, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
        mask = method.attribute(x)
        assert mask.shape == x.shape
        assert 0 <= mask.min() <= mask.max() <= 1
