from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.svm import SVC
from torch import Tensor, nn

from captum_robust.attacks import PGD
from captum_robust.defenses import ROC, SafetyNet


class TokenNet(nn.Module):
    """Images N×3×8×8 -> scores N×4, with an in-place ReLU that is used twice, and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.tokens = nn.Linear(6, 5)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.conv1(4 * x - 2))))
        tokens = self.tokens(x.flatten(2).transpose(1, 2))
        return self.head(self.relu(tokens.mean(dim=1)))


LAYERS = ["conv2", "relu"]


@pytest.fixture
def net() -> TokenNet:
    torch.manual_seed(0)
    return TokenNet().eval()


def images(n: int, seed: int, attacked: bool = False) -> Tensor:
    """Smooth drawn images; the attacked ones bear a checkerboard."""
    x = torch.rand(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.2
    x = nn.functional.interpolate(x, (8, 8), mode="bilinear")
    signs = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1
    return x + 0.2 * signs if attacked else x


@pytest.fixture
def fitted(net: TokenNet) -> SafetyNet:
    return SafetyNet(net, LAYERS).fit(images(40, 0), images(40, 0, attacked=True))


def outputs_of(net: TokenNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """conv2's output, and that of the second call of the ReLU: written down once more."""
    conv2 = net.conv2(net.conv1(4 * x - 2).relu())
    tokens = net.tokens(conv2.relu().flatten(2).transpose(1, 2))
    return conv2, tokens.mean(dim=1).relu()


def test_what_was_not_seen_in_fitting_is_told_apart(fitted: SafetyNet) -> None:
    clean, attacked = images(60, 1), images(60, 2, attacked=True)
    assert fitted.roc(clean, attacked).area > 0.9
    assert fitted.predict(attacked).float().mean() > 0.6
    assert fitted.predict(clean).float().mean() < 0.2


def test_gradient_attacks_are_detected(net: TokenNet) -> None:
    x, attack = images(64, 3), PGD(net, 0.1, early_stop=False)
    attacked = attack.perturb(x)
    detector = SafetyNet(net, LAYERS).fit(x[:40], attacked[:40])
    assert detector.roc(x[40:], attacked[40:]).area > 0.7


@pytest.mark.parametrize("bins", [2, 4, None])
@pytest.mark.parametrize("gamma", [None, 0.03])
def test_scores_are_those_of_scikit_learn(
    net: TokenNet, bins: int | None, gamma: float | None
) -> None:
    clean, attacked, x = images(30, 0), images(20, 1, attacked=True), images(25, 2)
    detector = SafetyNet(net, LAYERS, bins, gamma=gamma, penalty=3.0).fit(clean, attacked)
    codes = torch.cat([detector.codes(clean), detector.codes(attacked)]).double().numpy()
    theirs = SVC(C=3.0, gamma=gamma or "scale", class_weight="balanced")
    theirs.fit(codes, [0] * 30 + [1] * 20)
    expected = torch.from_numpy(theirs.decision_function(detector.codes(x).double().numpy()))
    torch.testing.assert_close(detector.score(x).double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_codes_are_quartiles_of_the_clean_activations(net: TokenNet, fitted: SafetyNet) -> None:
    codes = fitted.codes(images(40, 0))
    conv2, last = outputs_of(net, images(40, 0))
    assert codes.shape == (40, 6 + 5)
    expected = conv2.mean(dim=(2, 3)).argsort(dim=0).argsort(dim=0) // 10
    assert torch.equal(codes[:, :6], expected.float())
    alive = last[:, (last > 0).all(dim=0)]
    assert alive.shape[1] > 0
    expected = alive.argsort(dim=0).argsort(dim=0) // 10
    assert torch.equal(codes[:, 6:][:, (last > 0).all(dim=0)], expected.float())


@torch.no_grad()
def test_without_bins_activations_are_standardised(net: TokenNet) -> None:
    clean = images(40, 0)
    detector = SafetyNet(net, "conv2", bins=None).fit(clean, images(40, 0, attacked=True))
    x = images(7, 4)
    means = outputs_of(net, clean)[0].mean(dim=(2, 3))
    expected = outputs_of(net, x)[0].mean(dim=(2, 3)) - means.mean(dim=0)
    expected /= means.std(dim=0, correction=0)
    torch.testing.assert_close(detector.codes(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("summary", "layer", "shape"),
    [
        ("max", "conv2", 6),
        ("flatten", "conv2", 6 * 64),
        ("mean", "tokens", 5),
        ("flatten", "tokens", 64 * 5),
        ("max", "head", 4),
    ],
)
def test_summaries_of_maps_tokens_and_vectors(
    net: TokenNet, summary: str, layer: str, shape: int
) -> None:
    clean = images(20, 0)
    detector = SafetyNet(net, layer, bins=None, summary=summary)
    codes = detector.fit(clean, images(20, 0, attacked=True)).codes(clean)
    assert codes.shape == (20, shape)
    if summary == "max" and layer == "conv2":
        largest = outputs_of(net, clean)[0].amax(dim=(2, 3))
        expected = (largest - largest.mean(dim=0)) / largest.std(dim=0, correction=0)
        torch.testing.assert_close(codes, expected, rtol=1e-4, atol=1e-4)


def test_batches_give_what_one_tensor_gives(net: TokenNet, fitted: SafetyNet) -> None:
    clean, attacked = images(40, 0), images(40, 0, attacked=True)
    labels = torch.zeros(13)

    def loader() -> Iterator[Any]:
        yield from zip(clean.split(13), [labels, labels, labels, labels], strict=True)

    again = SafetyNet(net, LAYERS, batch_size=7).fit(loader(), list(attacked.split(9)))
    x = images(9, 5)
    torch.testing.assert_close(again.score(x), fitted.score(x))
    assert again.threshold == pytest.approx(fitted.threshold, abs=1e-5)


def test_a_batch_gives_what_its_images_give_one_by_one(fitted: SafetyNet) -> None:
    x = images(5, 6)
    one_by_one = torch.cat([fitted.score(i) for i in x.split(1)])
    torch.testing.assert_close(fitted.score(x), one_by_one, rtol=1e-4, atol=1e-5)


def test_the_threshold_is_set_on_images_that_the_machine_has_not_seen(net: TokenNet) -> None:
    clean, attacked = images(50, 0), images(50, 0, attacked=True)
    detector = SafetyNet(net, "conv2", bins=None).fit(clean, attacked, false_positive_rate=0.1)
    held_out = torch.empty(50)
    for fold in range(5):
        kept = torch.arange(50) % 5 != fold
        part = SafetyNet(net, "conv2", bins=None).fit(clean[kept], attacked[kept])
        held_out[~kept] = part.score(clean[~kept])
    assert detector.threshold is not None
    assert int((held_out > detector.threshold + 1e-5).sum()) == 5
    assert int((held_out > detector.threshold - 1e-5).sum()) == 6


def test_what_was_made_of_a_held_out_image_is_held_out_too(net: TokenNet) -> None:
    # Of every fifth clean image none is attacked, of the others the attacks come in another order.
    clean, attacked = images(40, 0), images(40, 0, attacked=True)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:30]
    detector = SafetyNet(net, "conv2", bins=None).fit(clean, attacked[order], sources=order)
    held_out = torch.empty(40)
    for fold in range(5):
        kept = torch.arange(40) % 5 != fold
        part = SafetyNet(net, "conv2", bins=None)
        part.fit(clean[kept], attacked[order[order % 5 != fold]])
        held_out[~kept] = part.score(clean[~kept])
    assert detector.threshold == pytest.approx(float(held_out.sort().values[37]), abs=1e-4)


def test_attacks_without_sources_are_of_the_clean_images_over_and_over(net: TokenNet) -> None:
    clean, attacked = images(20, 0), images(20, 0, attacked=True)
    twice = torch.cat([attacked, attacked])
    numbers = list(range(20)) * 2
    first = SafetyNet(net, LAYERS).fit(clean, twice)
    second = SafetyNet(net, LAYERS).fit(clean, twice, sources=numbers)
    assert first.threshold == second.threshold
    third = SafetyNet(net, LAYERS).fit(clean, twice, sources=torch.tensor(numbers).flip(0))
    assert first.threshold != third.threshold


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([0, 1], r"sources: expected 6 numbers of clean images, got torch.int64 of shape \(2,\)"),
        ([0.0] * 6, "sources: expected 6 numbers of clean images, got torch.float32"),
        ([True] * 6, "sources: .* got torch.bool"),
        ([0, 1, 2, 3, 4, 6], "sources: expected numbers from 0 to 5, got 6"),
        ([0, 1, 2, 3, 4, -1], "sources: expected numbers from 0 to 5, got -1"),
        ([0, 5, 0, 5, 0, 5], "attacked: all images are made of number 0, 5, … of the clean"),
    ],
)
def test_wrong_sources_are_named(net: TokenNet, sources: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafetyNet(net, LAYERS).fit(images(6, 0), images(6, 0, attacked=True), sources=sources)


@pytest.mark.parametrize(("rate", "rejected"), [(0.05, 2), (0.1, 4), (0.5, 20), (0.999, 39)])
def test_calibration_rejects_no_larger_share_of_clean_images(
    fitted: SafetyNet, rate: float, rejected: int
) -> None:
    clean = images(40, 7)
    assert fitted.calibrate(clean, rate) is fitted
    assert int(fitted.predict(clean).sum()) == rejected


def test_detector_survives_the_disk(fitted: SafetyNet, net: TokenNet, tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    fitted.save(path)
    loaded = SafetyNet.load(path, net)
    x = images(9, 5)
    assert torch.equal(loaded.score(x), fitted.score(x))
    assert torch.equal(loaded.predict(x), fitted.predict(x))
    assert loaded.threshold == fitted.threshold
    assert loaded.layer_names == tuple(LAYERS)
    given = SafetyNet.load(path, lambda x: net(x), [net.conv2, net.relu])
    assert torch.equal(given.score(x), fitted.score(x))


def test_scoring_needs_no_scikit_learn(
    fitted: SafetyNet, net: TokenNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted.save(tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    assert SafetyNet.load(tmp_path / "a.safetensors", net).score(images(3, 1)).shape == (3,)
    with pytest.raises(ImportError, match=r"pip install 'captum-robust\[demo\]'"):
        fitted.fit(images(40, 0), images(40, 1))


def test_a_layer_outside_of_the_model_has_to_be_given_to_load(
    net: TokenNet, tmp_path: Path
) -> None:
    detector = SafetyNet(lambda x: net(x), net.conv2)
    detector.fit(images(20, 0), images(20, 0, attacked=True)).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not name them; give the modules"):
        SafetyNet.load(tmp_path / "a.safetensors", net)
    loaded = SafetyNet.load(tmp_path / "a.safetensors", net, net.conv2)
    assert torch.equal(loaded.score(images(3, 1)), detector.score(images(3, 1)))


def test_a_file_that_holds_no_detector_says_so(
    fitted: SafetyNet, net: TokenNet, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        SafetyNet.load(path, net)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        SafetyNet.load(path, net)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no SafetyNet"):
        SafetyNet.load(path, net)
    fitted.save(path)
    tensors = load_file(path)
    facts = {
        "layers": LAYERS,
        "bins": 4,
        "summary": "mean",
        "penalty": 1,
        "gamma": None,
        "threshold": 0,
        "machine": {"gamma": 0.1, "intercept": 0},
    }
    for change, text, message in [
        ({"scale": torch.ones(3)}, json.dumps(facts), r"reference: expected 3×3, got 3×11"),
        (
            {"scale": torch.full((11,), torch.nan)},
            json.dumps(facts),
            "scale: expected finite numbers",
        ),
        ({}, json.dumps(facts | {"bins": 3}), "reference: expected 2×11, got 3×11"),
        ({}, "{}", "can be used .*machine"),
        ({}, "[]", "holds no SafetyNet"),
        ({}, "nothing", "holds no SafetyNet"),
    ]:
        save_file(tensors | change, path, {"captum_robust.SafetyNet": text})
        with pytest.raises(ValueError, match=message):
            SafetyNet.load(path, net)


@pytest.mark.parametrize(("bins", "gamma"), [(4, 0.1), (None, None)])
def test_a_file_of_version_0_1_is_read(
    net: TokenNet, tmp_path: Path, bins: int | None, gamma: float | None
) -> None:
    detector = SafetyNet(net, LAYERS, bins, gamma=gamma)
    detector.fit(images(20, 0), images(20, 0, attacked=True))
    machine = detector._machine
    assert machine is not None
    facts = {
        "layers": LAYERS,
        "bins": bins,
        "summary": "mean",
        "penalty": 10.0,
        "gamma": gamma,
        "threshold": detector.threshold,
        "machine": {"gamma": machine.gamma, "intercept": machine.intercept},
    }
    metadata = {"format": "captum_robust.SafetyNet", "facts": json.dumps(facts)}
    tensors = {name: tensor.contiguous() for name, tensor in machine.tensors().items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    loaded = SafetyNet.load(tmp_path / "a.safetensors", net)
    assert repr(loaded) == repr(detector)
    torch.testing.assert_close(loaded.score(images(9, 5)), detector.score(images(9, 5)))


def test_the_surrogate_scores_like_the_detector(fitted: SafetyNet, net: TokenNet) -> None:
    x = images(6, 1).requires_grad_()
    output, scores = fitted.surrogate(x)
    torch.testing.assert_close(output, net(x))
    torch.testing.assert_close(scores, fitted.score(x), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_step_is_that_of_a_sigmoid() -> None:
    # One activation a of a linear layer, one threshold t, deviation s: dcode/da is σ'((a-t)/τs)/τs.
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    clean = torch.arange(10.0)[:, None]
    detector = SafetyNet(layer, layer, bins=2, gamma=1.0).fit(clean, clean + 4)
    x = torch.tensor([[5.0]], requires_grad=True)
    _, score = detector.surrogate(x, temperature=0.5)
    (found,) = torch.autograd.grad(score.sum(), x)
    width = 0.5 * clean.std(correction=0)
    s = torch.sigmoid((x.detach() - 4.5) / width)
    machine = detector._machine
    assert machine is not None
    code = torch.ones(1, 1, requires_grad=True)
    (of_code,) = torch.autograd.grad(machine.score_of_codes(code).sum(), code)
    torch.testing.assert_close(found, of_code * s * (1 - s) / width)
    assert found.abs().sum() > 0


def test_an_attack_through_the_surrogate_lowers_the_score(fitted: SafetyNet) -> None:
    x = images(12, 8, attacked=True)
    before = fitted.score(x)
    for _ in range(10):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(fitted.surrogate(x)[1].sum(), x)
        x = x - 0.01 * gradient.sign()
    assert (fitted.score(x.detach()) < before).float().mean() > 0.8


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_world_is_left_as_it_was(net: TokenNet, fails: bool) -> None:
    net.conv1.weight.requires_grad_(False)
    net.conv2.train()
    hooked: list[nn.Module] = []
    net.conv2.register_forward_hook(lambda m, *_: hooked.append(m) and None)
    x = images(20, 0).requires_grad_()
    modes = [m.training for m in net.modules()]
    needs = [p.requires_grad for p in net.parameters()]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()]
    before, state = x.detach().clone(), torch.get_rng_state()
    detector = SafetyNet(net, ["conv2", "unused"] if fails else LAYERS)
    if fails:
        with pytest.raises(ValueError, match="layers: number 1, Linear, did not run"):
            detector.fit(x, images(20, 1, attacked=True))
    else:
        detector.fit(x, images(20, 1, attacked=True))
        assert not detector.score(x).requires_grad
        detector.predict(x)
        detector.roc(x, x)
    assert torch.equal(x, before)
    assert x.requires_grad
    assert x.grad is None
    assert modes == [m.training for m in net.modules()]
    assert needs == [p.requires_grad for p in net.parameters()]
    assert all(p.grad is None for p in net.parameters())
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_what_inference_mode_fitted_can_be_attacked(net: TokenNet) -> None:
    with torch.inference_mode():
        clean = images(20, 0)
        detector = SafetyNet(net, LAYERS).fit(clean, images(20, 0, attacked=True))
        detector.score(clean)
    x = images(3, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(detector.surrogate(x)[1].sum(), x)
    assert gradient.abs().sum() > 0


def test_half_precision_inputs_and_autocast(net: TokenNet, fitted: SafetyNet) -> None:
    x = images(8, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = fitted.score(x)
    assert scores.dtype == torch.float32
    codes, expected = fitted.codes(x), fitted.score(x)
    machine = fitted._machine
    assert machine is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(machine.score_of_codes(codes), expected)
    half = SafetyNet(net.bfloat16(), LAYERS)
    half.fit(images(20, 0).bfloat16(), images(20, 0, attacked=True).bfloat16())
    assert half.score(x.bfloat16()).dtype == torch.float32


def test_the_curve_is_that_of_scikit_learn() -> None:
    g = torch.Generator().manual_seed(0)
    clean = torch.randn(37, generator=g).mul(4).round()  # equal scores among them
    attacked = (torch.randn(53, generator=g) + 0.7).mul(4).round()
    roc = ROC.of(clean, attacked)
    labels, scores = [0] * 37 + [1] * 53, torch.cat([clean, attacked]).numpy()
    false, true, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    torch.testing.assert_close(roc.false_positive_rate, torch.from_numpy(false))
    torch.testing.assert_close(roc.true_positive_rate, torch.from_numpy(true))
    torch.testing.assert_close(roc.thresholds, torch.from_numpy(thresholds).double())
    assert roc.area == pytest.approx(roc_auc_score(labels, scores))


def test_the_interval_of_the_area_has_hanleys_width() -> None:
    g = torch.Generator().manual_seed(0)
    clean, attacked = torch.randn(200, generator=g), torch.randn(200, generator=g) + 1
    roc = ROC.of(clean, attacked)
    # Hanley & McNeil 1982: the standard error of an area A of n and n scores.
    a, n = roc.area, 200
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = ((a * (1 - a) + (n - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / n**2) ** 0.5
    low, high = roc.interval
    assert low < a < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_areas_at_the_ends() -> None:
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4, 0.5])
    assert ROC.of(low, high).area == 1
    assert ROC.of(high, low).area == 0
    assert ROC.of(torch.ones(3), torch.ones(2)).area == 0.5
    assert ROC.of(low, high).resampled_areas.tolist() == [1.0] * 2000


def test_the_interval_draws_from_its_seed_alone() -> None:
    clean, attacked = torch.arange(20.0), torch.arange(20.0) + 3.5
    state = torch.get_rng_state()
    first, again = ROC.of(clean, attacked, seed=1), ROC.of(clean, attacked, seed=1)
    assert torch.equal(first.resampled_areas, again.resampled_areas)
    assert not torch.equal(first.resampled_areas, ROC.of(clean, attacked, seed=2).resampled_areas)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a function, got int"),
        ({"layers": []}, ValueError, "layers: expected at least one"),
        ({"layers": "conv3"}, ValueError, r"layer: .*got 'conv3'; did you mean 'conv"),
        ({"layers": ["conv1", 3]}, TypeError, "layers: expected modules or names, got int"),
        ({"layers": 3}, TypeError, "layers: expected modules or names, got int"),
        ({"model": lambda x: x, "layers": "a"}, ValueError, "'a' names a layer, and the model is"),
        ({"bins": 1}, ValueError, "bins: expected a whole number from 2, or None, got 1"),
        ({"bins": 2.0}, ValueError, "bins: .* got 2.0"),
        ({"summary": "average"}, ValueError, r"summary: .*got 'average'"),
        ({"penalty": 0}, ValueError, "penalty: expected a positive number, got 0"),
        ({"gamma": -1}, ValueError, "gamma: expected a positive number, got -1"),
        ({"gamma": "scale"}, ValueError, "gamma: expected a positive number, got 'scale'"),
        ({"batch_size": 0}, ValueError, "batch_size: .* from 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(
    net: TokenNet, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SafetyNet(**{"model": net, "layers": "conv2"} | arguments)


NAN = images(6, 0).index_fill(0, torch.tensor([2]), torch.nan)


@pytest.mark.parametrize(
    ("clean", "attacked", "error", "message"),
    [
        (images(6, 0), [], ValueError, "attacked: expected images, got none"),
        ([], images(6, 0), ValueError, "clean: expected images, got none"),
        (images(4, 0), images(6, 0), ValueError, "clean: expected at least 5 images, got 4"),
        (images(6, 0), images(0, 0), ValueError, "the batch is empty"),
        (NAN, images(6, 0), ValueError, "NaN or infinity in sample 2"),
        (images(6, 0), NAN, ValueError, "NaN or infinity in sample 2"),
        (images(6, 0).long(), images(6, 0), TypeError, "expected floating point, got torch.int64"),
        (3, images(6, 0), TypeError, "clean: expected images or batches of them, got int"),
        (["a"], images(6, 0), TypeError, "inputs: expected tensors, got str"),
        (torch.zeros(6, 3, 8, 8), torch.zeros(6, 3, 8, 8), ValueError, "the same for all images"),
    ],
)
def test_wrong_images_are_named(
    net: TokenNet, clean: Any, attacked: Any, error: type[Exception], message: str
) -> None:
    detector = SafetyNet(net, LAYERS)
    with pytest.raises(error, match=message):
        detector.fit(clean, attacked)
    assert detector.threshold is None


@pytest.mark.parametrize("rate", [0, 1, -0.1, float("nan"), "5 %"])
def test_a_rate_is_between_0_and_1(fitted: SafetyNet, rate: Any) -> None:
    with pytest.raises(ValueError, match="false_positive_rate: expected a number in"):
        fitted.fit(images(6, 0), images(6, 1), false_positive_rate=rate)
    with pytest.raises(ValueError, match="false_positive_rate: expected a number in"):
        fitted.calibrate(images(6, 0), rate)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf")])
def test_a_temperature_is_positive(fitted: SafetyNet, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        fitted.surrogate(images(2, 0), temperature)


def test_nothing_works_before_fitting(net: TokenNet, tmp_path: Path) -> None:
    detector, x = SafetyNet(net, LAYERS), images(6, 0)
    for call in (
        lambda: detector.score(x),
        lambda: detector.predict(x),
        lambda: detector.codes(x),
        lambda: detector.surrogate(x),
        lambda: detector.roc(x, x),
        lambda: detector.calibrate(x),
        lambda: detector.save(tmp_path / "a.safetensors"),
    ):
        with pytest.raises(RuntimeError, match="not fitted yet"):
            call()


def test_activations_that_are_no_numbers_of_a_batch_are_named(net: TokenNet) -> None:
    class Strange(nn.Module):
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.make = make

        def forward(self, x: Tensor) -> Any:
            return self.make(x)

    def fit(make: Any) -> None:
        layer = Strange(make)
        model = nn.Sequential(layer)
        SafetyNet(model, layer).fit(images(6, 0), images(6, 1))

    with pytest.raises(TypeError, match="expected floating point from Strange, got tuple"):
        fit(lambda x: (x, x))
    with pytest.raises(TypeError, match=r"expected floating point from Strange, got torch.int64"):
        fit(lambda x: x.long())
    with pytest.raises(ValueError, match=r"an output 6×… of Strange, got \(1, 6, 3, 8, 8\)"):
        fit(lambda x: x[None])
    with pytest.raises(ValueError, match="layers, activations: NaN or infinity in sample 0"):
        fit(lambda x: x / 0)


def test_flattened_units_ask_for_images_of_the_size_fitted_on(net: TokenNet) -> None:
    detector = SafetyNet(net, "conv2", summary="flatten")
    detector.fit(images(20, 0), images(20, 0, attacked=True))
    with pytest.raises(ValueError, match="they give 600 activations, the detector was fitted on"):
        detector.score(torch.rand(2, 3, 10, 10))


@pytest.mark.parametrize(
    ("clean", "attacked", "options", "error", "message"),
    [
        (torch.zeros(0), torch.ones(3), {}, ValueError, "clean_scores: expected one a sample"),
        (torch.ones(3), torch.ones(3, 1), {}, ValueError, "attacked_scores: expected one a sample"),
        (torch.tensor([torch.nan]), torch.ones(3), {}, ValueError, "clean_scores: .* got NaN for"),
        ([1.0], torch.ones(3), {}, TypeError, "clean_scores: expected a tensor, got list"),
        (torch.ones(3), torch.ones(3), {"level": 1}, ValueError, "level: .* got 1"),
        (torch.ones(3), torch.ones(3), {"resamples": 0}, ValueError, "resamples: .* got 0"),
        (torch.ones(3), torch.ones(3), {"seed": "x"}, ValueError, "seed: .* got 'x'"),
    ],
)
def test_wrong_scores_are_named(
    clean: Any, attacked: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ROC.of(clean, attacked, **options)
