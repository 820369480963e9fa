"""A GPU gives what the CPU gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from captum_robust.attacks import PGD, ExplanationAttack, FoolingImage, UniversalPerturbation
from captum_robust.attr import RobustCAM
from captum_robust.benchmark import compare
from captum_robust.data import Sample
from captum_robust.defenses import Quilting, SafetyNet, adversarial_training
from captum_robust.metrics import functional as metrics
from captum_robust.metrics.functional import saliency_metric, smallest_destroying_region
from captum_robust.models import load_classifier, save_classifier
from captum_robust.nn import EvidenceRemoval, load_masking_network, save_masking_network
from captum_robust.training import TrainingSettings, masking_training
from tests.attacks import test_contract as attacks
from tests.attr import test_contract as attributions
from tests.defenses import test_detection
from tests.networks import Net, PixelNet, classifier_of
from tests.networks import drawn as smooth_images
from tests.training import test_masking
from tests.transforms import test_quilting, test_transforms

DEVICE = "cuda"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions without TensorFloat-32, whose 10 bits would be what is measured."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def made(make: Callable[[], nn.Module], device: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().to(device)


def drawn(n: int = 3, height: int = 12, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(n, 3, height, width, generator=generator) * 255).round() / 255


def on_both(result: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    expected, found = result("cpu"), result(DEVICE)
    assert found.device.type == DEVICE
    assert found.dtype == expected.dtype
    return found.cpu(), expected


def check_close(found: Tensor, expected: Tensor) -> None:
    atol = 1e-3 * max(1e-6, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol, equal_nan=True)


def check_ranks(found: Tensor, expected: Tensor) -> None:
    """Compare what many steps or signs led to, where rounding grows."""
    assert found.shape == expected.shape
    for a, b in zip(found.flatten(1), expected.flatten(1), strict=True):
        assert torch.equal(a, b) if (b == b[0]).all() else spearmanr(a, b)[0] > 0.99


@pytest.mark.parametrize("case", attributions.CASES, ids=lambda c: c.name)
def test_attributions(case: attributions.Case) -> None:
    def result(device: str) -> Any:
        net, target = made(Net, device), torch.tensor([0, 3, 5], device=device)
        return case.make(net, net.conv2).attribute(drawn().to(device), target)

    is_iterative = case.name in ("perceptual_ball", "iterative_mask")
    (check_ranks if is_iterative else check_close)(*on_both(result))


EXPLANATION = attacks.Case(
    "explanation", lambda net: ExplanationAttack(RobustCAM(net, net.conv2), steps=4), epsilon=0.05
)
FOOLING = attacks.Case("fooling", lambda net: FoolingImage(net, steps=4), epsilon=1.0)


@pytest.mark.parametrize("case", [*attacks.CASES, EXPLANATION, FOOLING], ids=lambda c: c.name)
def test_attacks(case: attacks.Case) -> None:
    def change(device: str) -> Tensor:
        net, x = made(PixelNet, device), drawn().to(device)
        return case.make(net).perturb(x, attacks.predicted(net, x), epsilon=case.epsilon) - x

    check_ranks(*on_both(change))


def test_universal_perturbation_and_its_file(tmp_path: Path) -> None:
    def change(device: str) -> Tensor:
        net, x = made(PixelNet, device), drawn(12).to(device)
        UniversalPerturbation(net, 0.1).fit(x.split(4), passes=2).save(tmp_path / "v.safetensors")
        return UniversalPerturbation.load(tmp_path / "v.safetensors", net).perturb(x) - x

    check_ranks(*on_both(change))


TRANSFORMS = {**test_transforms.MAKE, "quilting": lambda: Quilting(test_quilting.some_bank())}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("way", ["__call__", "surrogate"])
def test_transforms_of_defences(name: str, way: str) -> None:
    x, transform = smooth_images(), TRANSFORMS[name]()
    found, expected = on_both(lambda device: getattr(transform, way)(x.to(device)))
    # One of a hundred values may be rounded to another level, or come from another patch.
    assert float(((found - expected).abs() > 1e-3).float().mean()) < 0.01


def test_detector_and_its_file(tmp_path: Path) -> None:
    clean, attacked = test_detection.images(40, 0), test_detection.images(40, 0, attacked=True)

    def scores(device: str) -> Tensor:
        net = made(test_detection.TokenNet, device)
        fitted = SafetyNet(net, test_detection.LAYERS).fit(clean.to(device), attacked.to(device))
        fitted.save(tmp_path / "detector.safetensors")
        loaded = SafetyNet.load(tmp_path / "detector.safetensors", net)
        return loaded.score(test_detection.images(40, 1).to(device))[None]

    check_ranks(*on_both(scores))


def test_metrics_of_masks() -> None:
    def numbers(device: str) -> Tensor:
        x, classes = (t.to(device) for t in test_masking.squares(6).tensors)
        net, maps = test_masking.Colors().to(device), x.amax(dim=1)
        region = smallest_destroying_region(net, x, maps, classes, removal=EvidenceRemoval())
        return torch.stack([saliency_metric(net, x, maps, classes).metric, region])

    check_close(*on_both(numbers))


def test_a_trained_masking_network_and_its_file(tmp_path: Path) -> None:
    network, data = test_masking.network(), test_masking.squares(16)
    settings = TrainingSettings(epochs=1, batch_size=8)
    result = masking_training(network, data, settings, validation=data, out=tmp_path)
    assert [row["step"] for row in result.rows if "loss" in row] == [1, 2]
    assert next(network.decoder.parameters()).device.type == DEVICE
    save_masking_network(network, tmp_path / "masking.safetensors")

    def masks(device: str) -> Tensor:
        encoder = test_masking.Colors().to(device)
        loaded = load_masking_network(tmp_path / "masking.safetensors", encoder)
        with torch.no_grad():
            return loaded(*(t.to(device) for t in data.tensors))

    check_close(*on_both(masks))


def test_a_trained_classifier_and_its_file(tmp_path: Path) -> None:
    x, file = drawn(8, 32, 32), tmp_path / "model.safetensors"
    network = load_classifier("small_resnet", None, class_names=["a", "b", "c"], input_size=32)
    settings = TrainingSettings(epochs=2, batch_size=8, precision="bfloat16")
    adversarial_training(network, TensorDataset(x, torch.arange(8) % 3), settings, steps=2)
    assert next(network.parameters()).device.type == DEVICE
    save_classifier(network, file)
    with torch.no_grad():
        check_close(*on_both(lambda d: load_classifier("small_resnet", file).to(d)(x.to(d))))


ONCE = [c for c in attributions.CASES if c.name not in ("perceptual_ball", "iterative_mask")]


@pytest.fixture
def products(precision: str) -> Iterator[None]:
    """Products in TensorFloat-32 where that is the precision."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    yield
    matmul.allow_tf32 = cudnn.allow_tf32 = False


@pytest.mark.parametrize("case", ONCE, ids=lambda c: c.name)
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.usefixtures("products")
def test_attributions_in_lower_precision(case: attributions.Case, precision: str) -> None:
    def result(device: str) -> Any:
        net, target = made(Net, device), torch.tensor([0, 3, 5], device=device)
        is_half = device == DEVICE and precision == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=is_half):
            return case.make(net, net.conv2).attribute(drawn().to(device), target).float()

    found, expected = on_both(result)
    error = (found - expected).flatten(1).norm(dim=1)
    tolerance = 3 * case.bfloat16_tolerance if precision == "bfloat16" else 0.05
    assert bool((error <= tolerance * expected.flatten(1).norm(dim=1)).all())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_comparison(precision: str) -> None:
    def result(device: str) -> Tensor:
        model = classifier_of().to(device)
        samples = [
            Sample(x, number % 3, torch.tensor([[8.0, 8.0, 40.0, 40.0]]), str(number))
            for number, x in enumerate(smooth_images(6, 3, 64, 64))
        ]
        attack = {"pgd 2/255": PGD(model, 2 / 255, steps=3)}
        methods = ["robust_cam", "saliency", "layer_cam", "guided_backprop", "center_box"]
        found = compare(model, samples, methods, attack, precision=precision, progress=False)
        assert found.failures().empty
        return torch.tensor(found.table()["error"].astype(float).to_numpy())[None].to(device)

    found, expected = on_both(result)
    assert float((found - expected).abs().max()) <= 1 / 3  # of two images the box may turn


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "sweep_boxes": lambda maps: metrics.sweep_boxes(maps, ["energy"])["energy"],
    "threshold": lambda maps: metrics.threshold(maps, "energy", 0.5),
    "pxap_histograms": lambda maps: metrics.pxap_histograms(maps, maps > 0.5),
    "stability": lambda maps: metrics.spearman_correlation(maps, maps.square()),
}


@pytest.mark.parametrize("name", MEASURES)
def test_metrics_of_maps(name: str) -> None:
    found = on_both(lambda device: MEASURES[name](smooth_images(4)[:, 0].to(device)))
    check_close(*(t.float() for t in found))
