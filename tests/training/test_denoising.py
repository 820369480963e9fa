"""A denoiser in front of a classifier: its loss by hand, its training, its file and command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.utils import save_image

from captum_robust.models import load_classifier, save_classifier
from captum_robust.nn import Denoiser, load_denoiser, save_denoiser
from captum_robust.training import (
    DenoisingEvaluation,
    DenoisingLoss,
    TrainingSettings,
    denoising_training,
)
from tests.networks import Net

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (3, 5), (64, 48)])
def test_a_new_denoiser_changes_nothing_but_the_range(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size) * 2 - 0.5
    assert torch.equal(Denoiser(4).eval()(x), x.clamp(0, 1))
    assert torch.equal(Denoiser(4)(x), x)


def test_the_loss_is_that_of_its_definition(net: Net, x: Tensor) -> None:
    loss = DenoisingLoss(net, net.conv2, (0.2, 0.2), 0.5)
    noise = torch.Generator().manual_seed(7)
    torch.rand(6, generator=noise)
    noisy = x + 0.2 * torch.randn(x.shape, generator=noise)
    found = loss(nn.Identity(), (x, torch.zeros(6)), 7)

    def seen(images: Tensor) -> Tensor:
        return net.relu(net.conv2(net.relu(net.conv1(images.clone()))))

    # The layer's output is written over by the activation in place, as its user sees it.
    clean, other = seen(x), seen(noisy)
    error = (noisy - x).square().mean() / 0.2
    maps = ((other - clean).square().sum((1, 2, 3)) / clean.square().sum((1, 2, 3))).mean()
    p, q = net(x).softmax(1), net(noisy).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(found["pixels"], error)
    torch.testing.assert_close(found["map"], maps.detach())
    torch.testing.assert_close(found["classes"], divergence.detach())
    torch.testing.assert_close(found["loss"], 2 * error + 0.5 * (maps + 0.2 * divergence))
    assert set(DenoisingLoss(net, net.conv2, features=0)(nn.Identity(), (x, None), 0)) == {
        "loss",
        "pixels",
    }


def test_training_takes_noise_out_and_leaves_the_classifier(net: Net) -> None:
    generator = torch.Generator().manual_seed(2)
    flat = torch.rand(32, 3, 1, 1, generator=generator).expand(-1, -1, 16, 16).contiguous()
    data = TensorDataset(flat, torch.zeros(32))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(0)
    denoiser = Denoiser()
    settings = TrainingSettings(epochs=20, batch_size=8, learning_rate=3e-3, device="cpu")
    options = {"sigma": (0.2, 0.3), "validation": data}
    result = denoising_training(denoiser, data, net, net.conv2, settings, features=0, **options)
    first, last = result.evaluations[0], result.evaluations[-1]
    assert last["error"] < 0.7 * first["error"]
    assert last["kept_without"] == first["kept_without"]
    settings = TrainingSettings(epochs=2, batch_size=8, learning_rate=1e-4, device="cpu")
    denoising_training(denoiser, data, net, net.conv2, settings, **options)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_evaluation_counts_classes_that_stay(net: Net, x: Tensor) -> None:
    found = DenoisingEvaluation(net, TensorDataset(x), sigma=1e-6)(nn.Identity())
    assert found["kept"] == found["kept_without"] == 1
    assert found["error"] < 1e-10


def test_a_file_holds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(6)
    nn.init.normal_(denoiser.last.weight)
    save_denoiser(denoiser, tmp_path / "d.safetensors")
    x = torch.rand(1, 3, 20, 20)
    loaded = load_denoiser(tmp_path / "d.safetensors")
    assert not loaded.training
    assert torch.equal(loaded(x), denoiser.eval()(x))
    with pytest.raises(FileNotFoundError):
        load_denoiser(tmp_path / "other.safetensors")
    file = Path(load_denoiser.__globals__["__file__"]).parents[1] / "weights"
    with pytest.raises(ValueError, match="denoiser"):
        load_denoiser(file / "real_time_masking_efficientnet_lite0.safetensors")


def test_the_packages_own_takes_noise_out() -> None:
    denoiser = load_denoiser()
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    image = torch.stack([y, x, 0.5 * (x + y)])[None]
    noisy = image + 0.25 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (denoiser(noisy) - image).square().mean()
    assert error < 0.25 * (noisy.clamp(0, 1) - image).square().mean()


def test_bad_settings_are_refused(net: Net) -> None:
    for sigma in ((0.3, 0.1), (0.1, float("inf"))):
        with pytest.raises(ValueError, match="sigma"):
            DenoisingLoss(net, net.conv2, sigma)
    with pytest.raises(ValueError, match="width: expected a whole number from 2 to 4096"):
        Denoiser(5000)  # no file could hold it
    with pytest.raises(ValueError, match="features"):
        DenoisingLoss(net, net.conv2, features=-1)
    with pytest.raises(ValueError, match="x: expected"):
        Denoiser(4)(torch.rand(3, 16, 16))


def test_the_command_writes_one_and_goes_on(run: Run, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_classifier("small_resnet", None, class_names=("a", "b"), input_size=32)
    save_classifier(model, tmp_path / "model.safetensors")
    (tmp_path / "images").mkdir()
    for i in range(8):
        save_image(torch.rand(3, 40, 44), tmp_path / f"images/{i}.png")
    given = ("train", "denoiser", "--images", "images", "--model", "small_resnet")
    given += ("--weights", tmp_path / "model.safetensors", "--epochs", "2", "--batch-size", "2")
    given += ("--held-out", "0.25", "--width", "4", "--out", "run", "--device", "cpu")
    code, out, err = run(*given)
    assert code == 0, err
    assert "6 images to train on, 2 to look at" in out
    assert "the class stays of" in out
    file = tmp_path / "run/denoiser.safetensors"
    assert load_denoiser(file).width == 4
    with safe_open(file, "pt") as opened:
        card = json.loads(opened.metadata()["card"])
    assert card["training_images"] == 6
    written = file.read_bytes()
    code, out, _ = run(*given)
    assert (code, "went on from step 6 of 6" in out) == (0, True)
    assert file.read_bytes() == written
    for option, value in (
        *(("--sigma-low", "0.6"), ("--sigma-high", "inf"), ("--part", "0")),
        ("--evaluation-images", "-1"),
    ):
        code, _, err = run(*given, option, value)
        assert code == 2
        assert f"error: {option.replace('low', 'high')}: expected" in err
