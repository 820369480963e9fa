"""The perturbation against torch's L-BFGS on the paper's formula, and against closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import astuple, fields
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from captum_robust import PerceptualBallPerturbation
from captum_robust.attr import BallDetails, BallSettings
from captum_robust.attr.perceptual_ball import PAPER
from captum_robust.optim import minimize
from tests.devices import ELSEWHERE, another_device, moved
from tests.networks import Called, quantised

CLASSES = 5


class TwoConvolutions(nn.Module):
    """Two convolutions with in-place ReLUs and a head, small enough for hundreds of passes."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor, offset: Tensor | None = None, scale: float = 1.0) -> Tensor:
        features = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        scores = 10 * self.head(self.pool(features).flatten(1))
        return scores if offset is None else scores + scale * offset


@pytest.fixture
def net() -> TwoConvolutions:
    torch.manual_seed(0)
    return TwoConvolutions().double().eval()


@pytest.fixture
def x() -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, 8, 10, generator=g, dtype=torch.float64)


def features_of(model: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, list]:
    """Scores and the layers' outputs, in a pass of its own."""
    outputs: dict[int, list[Tensor]] = {}

    def hook(i: int) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs[i] = [o.clone() for o in (output if isinstance(output, tuple) else (output,))]

        return keep

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    scores = model(x)
    for handle in handles:
        handle.remove()
    return scores, [t for i in range(len(layers)) for t in outputs[i]]


def naive_margin(scores: Tensor, i: int) -> Tensor:
    others = [scores[j] for j in range(len(scores)) if j != i]
    return scores[i] - torch.stack(others).max()


def naive_objective(
    model: nn.Module,
    layers: Sequence[nn.Module],
    x: Tensor,
    moved: Tensor,
    i: int,
    settings: BallSettings,
    counterfactual: int | None = None,
) -> Tensor:
    """Equations 3 to 5 for one image, in two passes of the model."""
    with torch.no_grad():
        _, clean = features_of(model, layers, x[None])
    scores, now = features_of(model, layers, moved[None])
    if counterfactual is None:
        margin = naive_margin(scores[0], i)
    else:
        margin = -naive_margin(scores[0], counterfactual)
    value = (margin - settings.margin_target) ** 2
    for a, b in zip(now, clean, strict=True):
        distance = mse_loss(a, b)
        if settings.normalize_layers:
            distance = distance / (b**2).mean()
        value = value + settings.perceptual_weight * distance
    return value + settings.pixel_weight * mse_loss(moved, x)


def naive_attribution(
    model: nn.Module,
    layers: Sequence[nn.Module],
    x: Tensor,
    i: int,
    settings: BallSettings,
    bounds: tuple[float, float] | None = None,
    counterfactual: int | None = None,
) -> tuple[Tensor, int, int]:
    """torch.optim.LBFGS on one image: x' - x, iterations, evaluations."""
    free = x.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free],
        lr=settings.step,
        max_iter=settings.max_iterations,
        tolerance_change=settings.tolerance,
        history_size=settings.history_size,
        line_search_fn=settings.line_search,
    )

    def inside() -> Tensor:
        return free if bounds is None else free.clamp(*bounds)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = naive_objective(model, layers, x, inside(), i, settings, counterfactual)
        value.backward()
        return value

    optimizer.step(closure)
    state = optimizer.state[free]
    return (inside() - x).detach(), state["n_iter"], state["func_evals"]


# --- the objective ---


def capture_objective(
    monkeypatch: pytest.MonkeyPatch, method: PerceptualBallPerturbation, *args: Any, **kwargs: Any
) -> Any:
    """The function that ``attribute`` would minimise."""
    found: list[Any] = []

    class Captured(Exception):
        pass

    def instead(objective: Any, x: Tensor, *, start: Any, **_: Any) -> None:
        found.extend([objective, x, start])
        raise Captured

    monkeypatch.setattr("captum_robust.attr._ball.minimize", instead)
    with pytest.raises(Captured):
        method.attribute(*args, **kwargs)
    return found


@pytest.mark.parametrize("target", [0, 2, CLASSES - 1])  # the published code fails on the ends
@pytest.mark.parametrize("normalize_layers", [False, True])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_value_and_gradient_are_the_papers_formula(
    net: TwoConvolutions,
    x: Tensor,
    target: int,
    normalize_layers: bool,
    bounds: tuple[float, float] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = (net.relu1, net.conv2, net.relu2)
    settings = BallSettings(7.0, 3.0, -1.5, normalize_layers=normalize_layers)
    method = PerceptualBallPerturbation(net, layers, settings=settings)
    objective, flat, start = capture_objective(monkeypatch, method, x, target, bounds=bounds)
    value, gradient, _ = start
    for rows in ([0, 1, 2, 3], [3, 1], [2]):
        noise = torch.randn(len(rows), flat[0].numel(), dtype=x.dtype) * 0.3
        points = flat[rows] + noise
        value, gradient, _ = objective(points, torch.tensor(rows))
        for k, row in enumerate(rows):
            free = points[k].reshape(x[0].shape).clone().requires_grad_()
            inside = free if bounds is None else free.clamp(*bounds)
            expected = naive_objective(net, layers, x[row], inside, target, settings)
            torch.testing.assert_close(value[k], expected.detach())
            (slope,) = torch.autograd.grad(expected, free)
            torch.testing.assert_close(gradient[k].reshape(slope.shape), slope)


@pytest.mark.parametrize("target", [None, 1])
def test_the_first_evaluation_is_the_formula_at_x(
    net: TwoConvolutions, x: Tensor, target: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = PerceptualBallPerturbation(net, net.relu2)
    _, _, (value, gradient, _) = capture_objective(monkeypatch, method, x, target)
    for row in range(len(x)):
        i = int(net(x)[row].argmax()) if target is None else target
        free = x[row].clone().requires_grad_()
        expected = naive_objective(net, [net.relu2], x[row], free, i, BallSettings())
        torch.testing.assert_close(value[row], expected.detach())
        (slope,) = torch.autograd.grad(expected, free)
        torch.testing.assert_close(gradient[row].reshape(slope.shape), slope)


# --- the minimum ---

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "normalised layers": ({"normalize_layers": True}, {}),
    "no perceptual term": ({"perceptual_weight": 0.0}, {}),
    "heavy": ({"perceptual_weight": 1e3, "pixel_weight": 50.0, "margin_target": -0.5}, {}),
    "short history": ({"history_size": 2, "step": 0.4}, {}),
    "bounded": ({}, {"bounds": (0.0, 1.0)}),
    "counterfactual": ({}, {"counterfactual": 3}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_ends_where_torchs_lbfgs_ends_on_each_image(
    net: TwoConvolutions, x: Tensor, variant: str
) -> None:
    changes, arguments = VARIANTS[variant]
    settings = BallSettings(**{"max_iterations": 12, **changes})
    layers = (net.relu1, net.relu2)
    method = PerceptualBallPerturbation(net, layers, settings=settings)
    target = net(x).argsort(dim=1)[:, -1]
    target[target == 3] = 1
    found, details = method.attribute(x, target, return_details=True, **arguments)
    for row in range(len(x)):
        expected, iterations, evaluations = naive_attribution(
            net,
            layers if settings.perceptual_weight else (),
            x[row],
            int(target[row]),
            settings,
            **arguments,
        )
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-8)
        assert details.iterations[row] == iterations
        assert details.evaluations[row] == evaluations


def test_a_layer_of_zeros_can_be_normalised(net: TwoConvolutions, x: Tensor) -> None:
    layer = nn.ReLU()

    def model(x: Tensor) -> Tensor:
        return net(x) + layer(x.mean((1, 2, 3)) - 9).unsqueeze(1)

    method = PerceptualBallPerturbation(model, (net.relu2, layer))
    found = method.attribute(x, 0, normalize_layers=True, max_iterations=5)
    expected = PerceptualBallPerturbation(net, net.relu2).attribute(
        x, 0, normalize_layers=True, max_iterations=5
    )
    torch.testing.assert_close(found, expected)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.a(x)), torch.tanh(self.b(x))


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fork = TwoOutputs()
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fork(x)
        return 10 * self.head(torch.cat([a.mean((2, 3)), b.mean((2, 3))], dim=1))


@pytest.mark.parametrize("normalize_layers", [False, True])
def test_each_tensor_of_a_layers_tuple_counts(x: Tensor, normalize_layers: bool) -> None:
    torch.manual_seed(1)
    net = Forked().double()
    settings = BallSettings(max_iterations=10, normalize_layers=normalize_layers)
    found = PerceptualBallPerturbation(net, net.fork, settings=settings).attribute(x[:1], 0)
    expected, _, _ = naive_attribution(net, [net.fork], x[0], 0, settings)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-8)


def test_attention_without_its_weights_counts_with_its_output(x: Tensor) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
            self.head = nn.Linear(10, CLASSES)
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(1, 2)
            y, _ = self.attention(tokens, tokens, tokens, need_weights=False)
            return self.head(self.inner(y).mean(dim=1))

    torch.manual_seed(0)
    net = Attending().double()
    found = PerceptualBallPerturbation(net, net.attention).attribute(x, 0, max_iterations=5)
    expected = PerceptualBallPerturbation(net, net.inner).attribute(x, 0, max_iterations=5)
    torch.testing.assert_close(found, expected)


def small_vit() -> tuple[nn.Module, list[nn.Module]]:
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)
    nn.init.normal_(vit.heads.head.weight)
    return vit, list(vit.encoder.layers)


def small_resnet() -> tuple[nn.Module, list[nn.Module]]:
    resnet = torchvision.models.resnet18(num_classes=CLASSES)
    return resnet, [resnet.layer1, resnet.layer2]


@pytest.mark.parametrize("make", [small_resnet, small_vit])
def test_torchvision_models_end_where_torchs_lbfgs_ends(make: Any) -> None:
    torch.manual_seed(2)
    model, layers = make()
    model.double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    settings = BallSettings(max_iterations=4)
    found = PerceptualBallPerturbation(model, layers, settings=settings).attribute(x, 2)
    for row in range(2):
        expected, _, _ = naive_attribution(model, layers, x[row], 2, settings)
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-9)


class Linear(nn.Module):
    """Scores W x + b behind a layer that passes the input on."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.same(x).flatten(1) @ self.weight.T + self.bias


@pytest.mark.parametrize("perceptual_weight", [0.0, 4.0])
@pytest.mark.parametrize("normalize_layers", [False, True])
@pytest.mark.parametrize("target", [0, 1])
def test_two_linear_classes_have_a_closed_form(
    perceptual_weight: float, normalize_layers: bool, target: int
) -> None:
    # With w = w_i - w_j and M the margin at x, J(d) = (M + w·d - T)² + μ |d|² / D, where
    # μ = λ + λ' for the features d (λ' / mean x² if normalised). J' = 0 at
    # d = -w (M - T) / (|w|² + μ / D).
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(2, 12, generator=g, dtype=torch.float64)
    x = torch.rand(3, 3, 2, 2, generator=g, dtype=torch.float64)
    model = Linear(weight, torch.tensor([0.3, -0.1], dtype=torch.float64))
    found, details = PerceptualBallPerturbation(model, model.same).attribute(
        x,
        target,
        perceptual_weight=perceptual_weight,
        pixel_weight=2.0,
        margin_target=-0.7,
        normalize_layers=normalize_layers,
        return_details=True,
    )
    w = weight[target] - weight[1 - target]
    margin = model(x)[:, target] - model(x)[:, 1 - target]
    size = x.square().flatten(1).mean(1) if normalize_layers else torch.ones(3)
    mu = 2.0 + perceptual_weight / size
    expected = -w * ((margin + 0.7) / (w @ w + mu / 12)).unsqueeze(1)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-5, atol=1e-7)
    after = margin + expected @ w
    torch.testing.assert_close(details.margin, after, rtol=1e-5, atol=1e-7)
    assert torch.equal(details.flipped, after < 0)


def test_with_little_weight_the_step_is_deepfools() -> None:
    # The nearest point of the plane of equal scores is along w_i - w_j; a margin target of 0 ends
    # there, and j is the class that is reached first.
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 6, generator=g, dtype=torch.float64)
    x = torch.rand(5, 6, generator=g, dtype=torch.float64)
    model = Linear(weight, torch.zeros(4, dtype=torch.float64))
    scores, order = model(x).sort(dim=1, descending=True)
    found = PerceptualBallPerturbation(model, ()).attribute(
        x, pixel_weight=1e-7, margin_target=0.0, tolerance=1e-14
    )
    w = weight[order[:, 0]] - weight[order[:, 1]]
    deepfool = -w * ((scores[:, 0] - scores[:, 1]) / w.square().sum(1)).unsqueeze(1)
    same_plane = (
        model(x + deepfool).topk(2).indices.sort().values == order[:, :2].sort().values
    ).all(1)
    assert same_plane.sum() >= 3
    torch.testing.assert_close(found[same_plane], deepfool[same_plane], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("margin_target", "flipped"), [(-2.0, True), (2.0, False)])
def test_only_a_negative_margin_target_changes_the_class(
    net: TwoConvolutions, x: Tensor, margin_target: float, flipped: bool
) -> None:
    _, details = PerceptualBallPerturbation(net, net.relu2).attribute(
        x, perceptual_weight=0.1, margin_target=margin_target, return_details=True
    )
    assert details.flipped.tolist() == [flipped] * 4
    assert (details.margin < 0).tolist() == [flipped] * 4


# --- what comes with it ---


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("counterfactual", [None, [2, 3, 1, 4]])
@pytest.mark.parametrize("line_search", ["strong_wolfe", "fixed"])
def test_every_detail_is_that_of_x_and_the_attribution(
    net: TwoConvolutions, x: Tensor, bounds: Any, counterfactual: list[int] | None, line_search: str
) -> None:
    layers = (net.relu1, net.relu2)
    settings = BallSettings(
        5.0,
        2.0,
        max_iterations=8,
        line_search=line_search,
        step=0.3 if line_search == "fixed" else 1,
    )
    method = PerceptualBallPerturbation(net, layers, settings=settings)
    target = torch.tensor([1, 2, 0, 3])
    found, details = method.attribute(
        x, target, bounds=bounds, counterfactual=counterfactual, return_details=True
    )
    assert isinstance(details, BallDetails)
    moved = x + found
    scores = net(moved).detach()
    assert torch.equal(details.original_class, target)
    assert torch.equal(details.new_class, scores.argmax(dim=1))
    torch.testing.assert_close(details.pixel_distance, found.flatten(1).norm(dim=1))
    for row in range(4):
        i = int(target[row])
        cf = None if counterfactual is None else counterfactual[row]
        expected = naive_objective(net, layers, x[row], moved[row], i, settings, cf)
        torch.testing.assert_close(details.objective[row], expected.detach())
        margin = naive_margin(scores[row], i) if cf is None else -naive_margin(scores[row], cf)
        torch.testing.assert_close(details.margin[row], margin)
        assert details.flipped[row] == (margin < 0)
        distance = sum(
            mse_loss(a, b)
            for a, b in zip(
                features_of(net, layers, moved[row][None])[1],
                features_of(net, layers, x[row][None])[1],
                strict=True,
            )
        )
        torch.testing.assert_close(details.feature_distance[row], distance.detach())
    for field in fields(BallDetails):
        assert getattr(details, field.name).shape == (4,)
        assert not getattr(details, field.name).requires_grad


@pytest.mark.parametrize(
    "settings",
    [BallSettings(), BallSettings(line_search="fixed", step=0.2), BallSettings(map_tolerance=0.05)],
    ids=["search", "fixed", "settled"],
)
@pytest.mark.parametrize("size", [None, 1, 3])
def test_an_evaluation_is_one_forward_pass_the_first_one_included(
    net: TwoConvolutions, x: Tensor, settings: BallSettings, size: int | None
) -> None:
    seen: list[int] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    _, details = PerceptualBallPerturbation(net, net.relu2, settings=settings).attribute(
        x, internal_batch_size=size, return_details=True
    )
    assert sum(seen) == details.evaluations.sum()
    if size is None:
        assert len(seen) == details.evaluations.max()


# --- counterfactuals ---


def test_a_counterfactual_class_wins_where_it_is_asked_for(net: TwoConvolutions, x: Tensor) -> None:
    method = PerceptualBallPerturbation(net, net.relu2)
    predicted = net(x).argmax(dim=1)
    for shift in range(1, CLASSES):
        wanted = (predicted + shift) % CLASSES
        found, details = method.attribute(
            x,
            counterfactual=wanted,
            perceptual_weight=0.01,
            pixel_weight=0.01,
            max_iterations=60,
            return_details=True,
        )
        assert details.flipped.all()
        assert torch.equal(net(x + found).argmax(dim=1), wanted)
        assert torch.equal(details.new_class, wanted)
        assert torch.equal(details.original_class, predicted)
        assert (details.margin < 0).all()


def test_a_counterfactual_class_that_is_not_reached_is_said(
    net: TwoConvolutions, x: Tensor
) -> None:
    method = PerceptualBallPerturbation(net, net.relu2)
    predicted = net(x).argmax(dim=1)
    wanted, n = (predicted + 1) % CLASSES, len(x)
    stiff: dict[str, Any] = {"perceptual_weight": 1e6, "max_iterations": 2, "return_details": True}
    for size in (None, 1):
        with pytest.warns(UserWarning, match=f"{n} of {n} samples do not reach the") as said:
            _, details = method.attribute(
                x, counterfactual=wanted, internal_batch_size=size, **stiff
            )
        assert len(said) == 1
        assert not details.flipped.any()


def test_every_form_of_counterfactual_means_the_same(net: TwoConvolutions, x: Tensor) -> None:
    method = PerceptualBallPerturbation(net, net.relu2, settings=BallSettings(max_iterations=3))
    expected = method.attribute(x, 0, counterfactual=2)
    for form in (
        torch.tensor(2),
        torch.tensor([2]),
        [2],
        (2,),
        [2] * 4,
        (2,) * 4,
        np.array([2] * 4),
    ):
        for size in (None, 1, 3):
            found = method.attribute(x, 0, counterfactual=form, internal_batch_size=size)
            torch.testing.assert_close(found, expected)
    each = (1, 2, 3, 4)
    expected = torch.cat(
        [method.attribute(x[i : i + 1], 0, counterfactual=each[i]) for i in range(4)]
    )
    for form in (each, list(each), torch.tensor(each)):
        for size in (None, 1, 2, 3):
            found = method.attribute(x, 0, counterfactual=form, internal_batch_size=size)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("counterfactual", "message"),
    [
        (1, "of sample 0 it is the explained class, 1"),
        ([2, 2, 1, 0], "of sample 2 it is the explained class, 1"),
        (CLASSES, f"expected classes from 0 to {CLASSES - 1}, got {CLASSES}"),
        (-1, "expected classes from 0 to"),
        ([0, 2, 3], "expected 1 or 4 classes, got 3"),
        ([0, 2], "expected 1 or 4 classes, got 2"),
        (torch.tensor([0, 2]), "expected 1 or 4 classes, got 2"),
        ((0, 2), "expected 1 or 4 classes, got 2"),
        (True, "expected a class or one a sample"),
        (2.0, "expected a class or one a sample"),
        (torch.tensor([[0, 2, 3, 4]]), "expected a class or one a sample"),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [None, 1, 2])
def test_a_wrong_counterfactual_is_named(
    net: TwoConvolutions, x: Tensor, counterfactual: Any, message: str, size: int | None
) -> None:
    method = PerceptualBallPerturbation(net, net.relu2, settings=BallSettings(max_iterations=1))
    with pytest.raises(ValueError, match=f"counterfactual: {message}"):
        method.attribute(x, 1, counterfactual=counterfactual, internal_batch_size=size)


# --- bounds ---


def test_bounds_hold_and_are_used_to_the_full(net: TwoConvolutions, x: Tensor) -> None:
    x = torch.cat([x, torch.ones_like(x[:1]), torch.zeros_like(x[:1])])
    method = PerceptualBallPerturbation(net, net.relu2)
    free = x + method.attribute(x, 0, perceptual_weight=0.01, pixel_weight=0.01)
    assert free.min() < 0
    assert free.max() > 1
    bounded = x + method.attribute(x, 0, perceptual_weight=0.01, pixel_weight=0.01, bounds=(0, 1))
    assert bounded.min() >= -1e-12
    assert bounded.max() <= 1 + 1e-12
    assert (bounded == 0).any()
    assert (bounded - x).flatten(1).norm(dim=1).all()


def count_passes(net: nn.Module) -> list[int]:
    seen: list[int] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def test_inputs_outside_of_the_bounds_name_the_sample_before_any_pass(
    net: TwoConvolutions, x: Tensor
) -> None:
    seen = count_passes(net)
    x[2, 0, 1, 1] = 1.25
    with pytest.raises(ValueError, match=r"inputs: sample 2 has values from .* to 1.25, outside"):
        PerceptualBallPerturbation(net, net.relu2).attribute(x, 0, bounds=(0, 1))
    channels = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    wrong: list[Any] = [(1, 0), (0.0, math.nan), (0, 0), (0, 1, 2), (0, None), 1, "01", channels]
    for bounds in wrong:
        with pytest.raises(ValueError, match="bounds: expected"):
            PerceptualBallPerturbation(net, net.relu2).attribute(x, 0, bounds=bounds)
    assert seen == []


# --- settings ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_weight", 0.0),
        ("pixel_weight", -1.0),
        ("pixel_weight", math.nan),
        ("pixel_weight", math.inf),
        ("pixel_weight", torch.ones(2)),
        ("pixel_weight", "1"),
        ("perceptual_weight", -1.0),
        ("perceptual_weight", math.nan),
        ("perceptual_weight", math.inf),
        ("perceptual_weight", [10.0]),
        ("margin_target", math.nan),
        ("margin_target", math.inf),
        ("margin_target", "-2"),
        ("tolerance", -1e-9),
        ("tolerance", math.nan),
        ("tolerance", "small"),
        ("map_tolerance", -0.1),
        ("map_tolerance", math.nan),
        ("internal_batch_size", 0),
        ("internal_batch_size", 1.5),
        ("internal_batch_size", True),
        ("max_iterations", 0),
        ("max_iterations", 2.5),
        ("history_size", 0),
        ("step", 0.0),
        ("step", math.nan),
        ("line_search", "wolfe"),
    ],
)
def test_a_wrong_option_is_named_before_any_pass(
    net: TwoConvolutions, x: Tensor, name: str, value: Any
) -> None:
    seen = count_passes(net)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        PerceptualBallPerturbation(net, net.relu2).attribute(x, 0, **{name: value})
    if name in {field.name for field in fields(BallSettings)}:
        settings = BallSettings(**{name: value})
        with pytest.raises(ValueError, match=f"{name}: expected"):
            PerceptualBallPerturbation(net, net.relu2, settings=settings).attribute(x, 0)
    assert seen == []


def test_an_argument_goes_before_the_settings_and_those_before_the_defaults(
    net: TwoConvolutions, x: Tensor
) -> None:
    changes: dict[str, Any] = {
        "perceptual_weight": 3.0,
        "pixel_weight": 0.5,
        "margin_target": -1.0,
        "max_iterations": 5,
        "tolerance": 1e-3,
        "history_size": 2,
        "step": 0.5,
        "line_search": "fixed",
        "normalize_layers": True,
        "map_tolerance": 0.01,
    }
    assert set(changes) == {field.name for field in fields(BallSettings)}
    plain = PerceptualBallPerturbation(net, net.relu2)
    changed = PerceptualBallPerturbation(net, net.relu2, settings=BallSettings(**changes))
    expected = changed.attribute(x, 0)
    assert torch.equal(plain.attribute(x, 0, **changes), expected)
    defaults = {field.name: field.default for field in fields(BallSettings)}
    assert torch.equal(changed.attribute(x, 0, **defaults), plain.attribute(x, 0))
    assert not torch.equal(plain.attribute(x, 0), expected)
    assert plain.settings == BallSettings()


def test_the_papers_settings_are_those_of_its_code() -> None:
    expected = {
        "perceptual_weight": 1e4,
        "pixel_weight": 1.0,
        "margin_target": -2.0,
        "max_iterations": 100,
        "history_size": 100,
        "step": 1.0,
        "line_search": "fixed",
        "tolerance": 1e-9,
        "normalize_layers": False,
        "map_tolerance": 0.0,
    }
    assert {field.name: getattr(PAPER, field.name) for field in fields(PAPER)} == expected


def test_the_papers_variants_keep_its_layers_of_vgg19() -> None:
    model = torchvision.models.vgg19_bn(init_weights=False)
    unguided = PerceptualBallPerturbation.paper_unguided(model)
    assert [model.features[i] for i in (16, 19, 22, 25, 29, 32)] == list(unguided.layers)
    assert unguided.settings == PAPER
    with pytest.raises(ValueError, match="vgg19"):
        PerceptualBallPerturbation.paper_unguided(torchvision.models.resnet18())


def test_a_tolerance_ends_samples_earlier(net: TwoConvolutions, x: Tensor) -> None:
    method = PerceptualBallPerturbation(net, net.relu2)
    _, exact = method.attribute(x, 0, max_iterations=60, return_details=True)
    _, coarse = method.attribute(x, 0, max_iterations=60, tolerance=0.05, return_details=True)
    assert (coarse.iterations <= exact.iterations).all()
    assert coarse.iterations.sum() < exact.iterations.sum()
    assert (coarse.objective >= exact.objective - 1e-9).all()


def test_the_map_tolerance_ends_the_samples_that_have_settled_and_no_other(
    net: TwoConvolutions, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer iterations must not mean fewer evaluations, or a search might be cut short.
    monkeypatch.setattr(
        "captum_robust.attr._ball.minimize",
        lambda *args, **options: minimize(*args, max_evaluations=1000, **options),
    )
    layers, tolerance = [net.relu2], 0.06
    method = PerceptualBallPerturbation(net, layers)
    found, details = method.attribute(
        x, 0, map_tolerance=tolerance, max_iterations=30, return_details=True
    )
    ends = details.iterations.tolist()
    assert len(set(ends)) > 1
    for row, end in enumerate(ends):
        maps = [
            method.attribute(x[row : row + 1], 0, max_iterations=i)[0] for i in range(1, end + 1)
        ]
        lengths = [float((a / a.norm() - b / b.norm()).norm()) for a, b in pairwise(maps)]
        assert min(lengths[:-1], default=1) >= tolerance
        assert lengths[-1] < tolerance or end == 30
        torch.testing.assert_close(found[row], maps[-1], rtol=1e-6, atol=1e-9)


# --- layers ---


def test_wrong_layers_are_named(net: TwoConvolutions, x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"layers: expected a torch.nn.Module or its .*, got int"):
        PerceptualBallPerturbation(net, (net.relu1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers: number 2, ReLU, was already given"):
        PerceptualBallPerturbation(net, (net.relu1, net.relu2, net.relu1))
    with pytest.raises(ValueError, match="layers: number 1, ReLU, is not a part of the model"):
        PerceptualBallPerturbation(net, (net.relu1, nn.ReLU()))
    part = nn.Sequential(net.conv1, net.relu1)  # what a slice of a Sequential makes
    with pytest.raises(ValueError, match=r"not a part of the model; its modules are: give list"):
        PerceptualBallPerturbation(net, part)
    assert PerceptualBallPerturbation(net, list(part)).layers == (net.conv1, net.relu1)
    outside = PerceptualBallPerturbation(lambda x: net(x), (net.relu1, nn.ReLU()))
    with pytest.raises(ValueError, match="layers: number 1, ReLU, did not run"):
        outside.attribute(x, 0)
    net.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layers: number 0, Linear, did not run"):
        PerceptualBallPerturbation(net, net.spare).attribute(x, 0)
    PerceptualBallPerturbation(net, net.spare).attribute(
        x, 0, perceptual_weight=0, max_iterations=1
    )


def test_a_layer_that_takes_no_hook_leaves_none_on_the_others(
    net: TwoConvolutions, x: Tensor
) -> None:
    class Scripted(nn.ReLU):
        def register_forward_hook(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("not supported on ScriptModules")

    net.relu2 = Scripted()
    method = PerceptualBallPerturbation(net, (net.relu1, net.relu2))
    with pytest.raises(RuntimeError, match="not supported on ScriptModules"):
        method.attribute(x, 0)
    assert not net.relu1._forward_hooks


class Branches(nn.Module):
    """A net with side branches that a gradient does not pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TwoConvolutions()
        self.embedding = nn.Embedding(4, 3)
        self.side = nn.Conv2d(3, 3, 1)
        self.shut = nn.Conv2d(3, 3, 1)
        self.total = nn.Identity()
        self.count = nn.Identity()
        self.named = Named()

    def forward(self, x: Tensor) -> Tensor:
        every = self.embedding(torch.zeros(len(x), dtype=torch.long))
        side = self.side(x.detach()).mean((1, 2, 3)) + every.sum(dim=1)
        with torch.no_grad():
            side = side + self.shut(x).mean((1, 2, 3))
        self.total(x.sum())
        self.count(torch.ones(len(x), dtype=torch.long))
        self.named(x)
        return self.net(x) + side.unsqueeze(1)


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"n": torch.zeros(len(x), dtype=torch.long)}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("embedding", ValueError, "number 1, Embedding, does not depend on the inputs"),
        ("side", ValueError, "number 1, Conv2d, does not depend on the inputs"),
        ("shut", ValueError, "number 1, Conv2d, does not depend on the inputs"),
        ("total", ValueError, r"the output of Identity has the shape \(\), expected 4×…"),
        ("count", TypeError, ".* is no floating-point tensor or tuple of them, but torch.int64"),
        ("named", TypeError, ".* is no floating-point tensor or tuple of them, but dict"),
    ],
)
def test_a_layer_without_use_is_named_before_the_first_step(
    x: Tensor, name: str, error: type[Exception], message: str
) -> None:
    torch.manual_seed(0)
    model = Branches().double()
    seen = count_passes(model)
    method = PerceptualBallPerturbation(model, (model.net.relu1, getattr(model, name)))
    with pytest.raises(error, match=f"layers: {message}"):
        method.attribute(x, 0)
    assert seen == [4]
    PerceptualBallPerturbation(model, model.net.relu1).attribute(x, 0, max_iterations=1)


class InPlace(nn.Module):
    """Layers whose outputs the next operation overwrites, and one that runs twice."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu = nn.ReLU(inplace=in_place)
        self.relu_again = nn.ReLU()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x.mul_(3).sub_(0.5) if self.in_place else x * 3 - 0.5
        x = self.relu(x)
        x = self.conv2(x)
        x = (self.relu if self.in_place else self.relu_again)(x)
        x = (x + 1).exp_() if self.in_place else (x + 1).exp()
        return self.head(x.mean((2, 3)))


def test_in_place_operations_and_reuse_change_nothing(x: Tensor) -> None:
    torch.manual_seed(0)
    hard, easy = InPlace(True).double(), InPlace(False).double()
    easy.load_state_dict(hard.state_dict())
    settings = BallSettings(max_iterations=8)
    found = PerceptualBallPerturbation(
        hard, (hard.conv1, hard.conv2, hard.relu), settings=settings
    ).attribute(x[:2], 0)
    for row in range(2):  # the reused layer counts with its last call
        layers = (easy.conv1, easy.conv2, easy.relu_again)
        expected, _, _ = naive_attribution(easy, layers, x[row], 0, settings)
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 12), (3, 1, 3, 4)])
def test_a_model_that_writes_to_its_input_works(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, CLASSES).double()
    x = torch.rand(shape, dtype=torch.float64)
    before = x.clone()
    found, expected = (
        PerceptualBallPerturbation(model, linear).attribute(x, 0, max_iterations=6)
        for model in (
            lambda x: linear(x.sub_(0.5).mul_(4).flatten(1)),
            lambda x: linear(((x - 0.5) * 4).flatten(1)),
        )
    )
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, before)


class Viewing(nn.Module):
    """A head that can't take the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 80, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).view(len(x), 320))


def test_a_model_that_views_its_features_works(x: Tensor) -> None:
    torch.manual_seed(0)
    model = Viewing().double()
    settings = BallSettings(max_iterations=6)
    found = PerceptualBallPerturbation(model, model.conv, settings=settings).attribute(x, 0)
    for row in range(len(x)):
        expected, _, _ = naive_attribution(model, [model.conv], x[row], 0, settings)
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-10)


# --- models without an answer ---


def test_scores_that_are_no_tensor_are_a_clear_error(net: TwoConvolutions, x: Tensor) -> None:
    for wrap, got in ((lambda y: (y, y), "tuple"), (lambda y: {"logits": y}, "dict")):
        method = PerceptualBallPerturbation(lambda x, wrap=wrap: wrap(net(x)), net.relu1)
        with pytest.raises(
            TypeError, match=f"forward_func: expected a tensor of scores, got {got}"
        ):
            method.attribute(x)


def test_scores_of_one_class_are_a_clear_error(net: TwoConvolutions, x: Tensor) -> None:
    method = PerceptualBallPerturbation(lambda x: net(x)[:, :1, None], ())
    with pytest.raises(ValueError, match="a margin needs scores N×K of at least two classes"):
        method.attribute(x, (0, 0))


@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("kind", ["weights of zero", "detached", "other input"])
def test_constant_scores_are_a_clear_error(
    net: TwoConvolutions, x: Tensor, kind: str, n: int, size: int | None
) -> None:
    model: Any = net
    if kind == "weights of zero":
        nn.init.zeros_(net.head.weight)
    elif kind == "detached":
        model = lambda x: net(x.detach())  # noqa: E731
    else:
        model = lambda x: net(torch.ones_like(x))  # noqa: E731
    seen = count_passes(net)
    with pytest.raises(ValueError, match=r"forward_func: its scores (are constant|do not depend)"):
        PerceptualBallPerturbation(model, ()).attribute(x[:n], 0, internal_batch_size=size)
    assert len(seen) <= 2  # at x, and once elsewhere


def test_a_quantised_head_is_a_clear_error(net: TwoConvolutions, x: Tensor) -> None:
    net = net.float()
    net.head = quantised(net.head)
    with pytest.raises(ValueError, match="do not depend on the inputs differentiably"):
        PerceptualBallPerturbation(net, (net.relu1,)).attribute(x.float(), 0)


def dead_image(x: Tensor, value: float) -> tuple[nn.Module, Tensor]:
    """A net that is flat around images of this grey, and only there; x with one of them."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = TwoConvolutions().double()
            self.gate = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            off = x - value
            return self.net(self.gate(off - 0.05) - self.gate(-off - 0.05))

    x = x.clone()
    x[1] = value
    return Around().eval(), x


@pytest.mark.parametrize("value", [0.0, 0.2, 0.5, 1.0])
def test_a_flat_image_stays_as_it_is_in_a_batch_and_alone(x: Tensor, value: float) -> None:
    model, x = dead_image(x, value)
    method = PerceptualBallPerturbation(model, model.gate)
    for size in (None, 1, 2):
        found, details = method.attribute(
            x, perceptual_weight=0.1, internal_batch_size=size, return_details=True
        )
        assert torch.isfinite(found).all()
        assert found.flatten(1).any(dim=1).tolist() == [True, False, True, True]
        assert not details.flipped[1]
        assert details.pixel_distance[1] == details.feature_distance[1] == 0
        assert (details.iterations[1], details.evaluations[1]) == (0, 1)
    alone, details = method.attribute(x[1:2], return_details=True)
    assert not alone.any()
    assert details.flipped.tolist() == [False]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sample_at_a_dead_relu_is_flat_alone_too(sign: float) -> None:
    # The only weight opens where the sum of the pixels is above 5000 (or below -5000).
    def model(x: Tensor) -> Tensor:
        opened = (sign * x.sum(dim=(1, 2, 3)) - 5000).relu()
        return torch.stack([torch.ones_like(opened), opened], dim=1)

    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[1] = sign * 200  # 9600 in all
    method = PerceptualBallPerturbation(model, ())
    for size in (None, 1):
        found, details = method.attribute(x, 1, internal_batch_size=size, return_details=True)
        assert found.flatten(1).any(dim=1).tolist() == [False, True]
        assert details.flat.tolist() == [True, False]
    alone, details = method.attribute(x[:1], 1, return_details=True)
    assert not alone.any()
    assert int(details.flat.sum()) == 1


def test_nan_in_the_inputs_names_the_sample_before_any_pass(
    net: TwoConvolutions, x: Tensor
) -> None:
    seen = count_passes(net)
    x[3, 1, 2, 2] = math.nan
    with pytest.raises(ValueError, match=r"inputs: NaN or infinity in sample 3"):
        PerceptualBallPerturbation(net, net.relu2).attribute(x, internal_batch_size=2)
    assert seen == []


def test_nan_in_the_scores_names_the_sample_of_the_whole_batch(
    net: TwoConvolutions, x: Tensor
) -> None:
    x = torch.cat([x, x])
    x[5] += 5

    def model(x: Tensor) -> Tensor:
        return net(x) + torch.where(x.amax((1, 2, 3)) > 4, math.nan, 0.0).unsqueeze(1)

    for size in (None, 1, 2, 3):
        with pytest.raises(ValueError, match=r"scores: NaN or infinity in sample 5"):
            PerceptualBallPerturbation(model, ()).attribute(
                x, 0, internal_batch_size=size, max_iterations=1
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_everywhere_but_at_the_start_names_the_sample(
    net: TwoConvolutions, x: Tensor, dtype: torch.dtype
) -> None:
    net, x = net.to(dtype), x.to(dtype)

    def model(inputs: Tensor) -> Tensor:
        alike = (inputs.unsqueeze(1) == x[2]).flatten(2).all(2).any(1)
        near = (inputs.mean((1, 2, 3)) - x[2].mean()).abs() < 1e-3
        return net(inputs) / torch.where(near & ~alike, math.nan, 1.0).unsqueeze(1).to(dtype)

    for size in (None, 1, 2):
        with pytest.raises(ValueError, match=r"NaN or infinity in sample 2, at every step"):
            PerceptualBallPerturbation(model, ()).attribute(
                x, 0, step=1e-4, max_iterations=40, internal_batch_size=size
            )


# --- batches ---


def test_parts_of_a_batch_equal_the_whole(net: TwoConvolutions, x: Tensor) -> None:
    x = torch.cat([x, x.flip(0) * 0.5, x.flip(3)])
    method = PerceptualBallPerturbation(net, (net.relu1, net.relu2))
    expected, details = method.attribute(x, max_iterations=12, return_details=True)
    for size in (1, 5, 12, 100):
        found, others = method.attribute(
            x, max_iterations=12, internal_batch_size=size, return_details=True
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        for field in fields(BallDetails):
            a, b = getattr(others, field.name), getattr(details, field.name)
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_each_sample_keeps_its_target_and_arguments_when_others_have_left(
    net: TwoConvolutions, x: Tensor, size: int | None
) -> None:
    offset = torch.tensor(
        [[9.0, 0, 0, 0, 0], [0, 3.0, 0, 0, 0], [0, 0, 0, 0, 40.0], [0, 0, 1.0, 0, 0]],
        dtype=torch.float64,
    )
    target = [0, 1, 4, 2]
    options: dict[str, Any] = {"max_iterations": 25, "tolerance": 0.02, "perceptual_weight": 1.0}
    method = PerceptualBallPerturbation(net, net.relu2)
    alone = [
        method.attribute(
            x[i : i + 1], target[i], (offset[i : i + 1], 0.7), return_details=True, **options
        )
        for i in range(4)
    ]
    expected = torch.cat([found for found, _ in alone])
    assert len({int(details.evaluations) for _, details in alone}) > 2
    for form in (target, torch.tensor(target)):
        found, details = method.attribute(
            x, form, (offset, 0.7), internal_batch_size=size, return_details=True, **options
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        assert details.original_class.tolist() == target


@pytest.mark.parametrize("size", [None, 2])
def test_an_argument_that_is_not_one_row_a_sample_stays_whole(
    net: TwoConvolutions, x: Tensor, size: int | None
) -> None:
    # As long as a part of the batch is, but not as the batch.
    pair = torch.tensor([0.2, 0.9], dtype=torch.float64)

    def model(x: Tensor, pair: Tensor) -> Tensor:
        assert len(pair) == 2
        return net(x * pair[0] + pair[1])

    options: dict[str, Any] = {"max_iterations": 25, "tolerance": 0.02, "perceptual_weight": 1.0}
    found = PerceptualBallPerturbation(model, net.relu2).attribute(
        x, None, pair, internal_batch_size=size, **options
    )
    expected = PerceptualBallPerturbation(lambda x: net(x * 0.2 + 0.9), net.relu2).attribute(
        x, **options
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [None, 1, 3])
def test_tuple_targets_keep_their_sample(net: TwoConvolutions, x: Tensor, size: int | None) -> None:
    # N×K×2 scores: the second index says which of two score vectors counts.
    def model(x: Tensor) -> Tensor:
        return torch.stack([net(x), net(x.flip(3)).flip(1)], dim=2)

    target = [(0, 1), (3, 0), (2, 1), (4, 1)]
    options: dict[str, Any] = {"max_iterations": 25, "tolerance": 0.02, "perceptual_weight": 1.0}
    method = PerceptualBallPerturbation(model, net.conv1)
    found = method.attribute(x, target, internal_batch_size=size, **options)
    for row, (i, which) in enumerate(target):
        alone = PerceptualBallPerturbation(
            lambda x, which=which: model(x)[:, :, which], net.conv1
        ).attribute(x[row : row + 1], i, **options)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("target", [[1], [1, 2], torch.tensor([1, 2]), torch.ones(4, 1, dtype=int)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_target_of_the_wrong_length_is_no_better_in_parts(
    net: TwoConvolutions, x: Tensor, target: Any, size: int
) -> None:
    method = PerceptualBallPerturbation(net, net.relu2, settings=BallSettings(max_iterations=1))
    with pytest.raises(Exception) as whole:  # noqa: PT011
        method.attribute(x, target)
    with pytest.raises(whole.type):
        method.attribute(x, target, internal_batch_size=size)


# --- inputs ---


def test_a_tuple_of_inputs_is_moved_together(net: TwoConvolutions, x: Tensor) -> None:
    grey = torch.rand(4, 1, 8, 10, dtype=torch.float64)

    def model(x: Tensor, grey: Tensor) -> Tensor:
        return net(x * 0.7 + grey)

    both = Called(lambda x: model(x[:, :3], x[:, 3:]))
    options: dict[str, Any] = {"max_iterations": 10}
    found = PerceptualBallPerturbation(model, net.relu2).attribute((x, grey), 0, **options)
    assert isinstance(found, tuple)
    assert [f.shape for f in found] == [x.shape, grey.shape]
    joined = PerceptualBallPerturbation(both, ()).forward_func
    expected = PerceptualBallPerturbation(lambda b: joined(b), net.relu2).attribute(
        torch.cat([x, grey], dim=1), 0, **options
    )
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-6, atol=1e-9)
    assert isinstance(
        PerceptualBallPerturbation(net, net.relu2).attribute((x,), 0, **options), tuple
    )
    with pytest.raises(ValueError, match="inputs: batches of 4 and 3 samples"):
        PerceptualBallPerturbation(model, ()).attribute((x, grey[:3]), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_perturbation_has_the_type_of_its_input(
    net: TwoConvolutions, x: Tensor, dtype: torch.dtype
) -> None:
    exact = PerceptualBallPerturbation(net, net.relu2).attribute(x, 0, max_iterations=3)
    net.to(dtype)
    found, details = PerceptualBallPerturbation(net, net.relu2).attribute(
        x.to(dtype), 0, max_iterations=3, return_details=True
    )
    assert found.dtype == dtype
    assert details.margin.dtype == torch.promote_types(dtype, torch.float32)
    alike = nn.functional.cosine_similarity(found.double().flatten(1), exact.flatten(1))
    assert alike.min() > (0.8 if dtype == torch.bfloat16 else 0.99999)


def test_autocast_changes_nothing(net: TwoConvolutions, x: Tensor) -> None:
    # In half precision the first steps of a search are lost in rounding.
    net, x = net.float(), x.float()
    ball = PerceptualBallPerturbation(net, net.relu2)
    expected, of_expected = ball.attribute(x, return_details=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, details = ball.attribute(x, return_details=True)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, expected)
    assert all(
        torch.equal(a, b) for a, b in zip(astuple(details), astuple(of_expected), strict=True)
    )


def test_samples_that_scores_are_too_coarse_to_move_are_told() -> None:
    def coarse(x: Tensor) -> Tensor:
        """Scores with a slope; those of samples with a mark stay where they are all the same."""
        scores = torch.stack([x[:, 0], -x[:, 0]], dim=1)
        stays = scores - scores.detach() + torch.tensor([2.0, -2.0])
        return torch.where(x[:, 1:] == 1, stays, scores)

    ball = PerceptualBallPerturbation(coarse, ())
    x = torch.tensor([[0.2, 1.0], [0.2, 0.0]])
    with pytest.warns(UserWarning, match="1 of 2 samples do not move.*in float32"):
        found = ball.attribute(x, max_iterations=2)
    assert found.any(dim=1).tolist() == [False, True]


def test_a_model_that_changes_the_type_works(net: TwoConvolutions, x: Tensor) -> None:
    exact = PerceptualBallPerturbation(net, net.relu2).attribute(x, 0, tolerance=0.01)
    for model in (lambda x: net(x).float(), lambda x: net(x.double())):
        found = PerceptualBallPerturbation(model, net.relu2).attribute(x, 0, tolerance=0.01)
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-3)
    single = x.float()
    found = PerceptualBallPerturbation(lambda x: net(x.double()), net.relu2).attribute(
        single, 0, max_iterations=4
    )
    assert found.dtype == torch.float32


@pytest.mark.parametrize("size", [None, 1])
def test_tensors_of_inference_mode_are_welcome(
    net: TwoConvolutions, x: Tensor, size: int | None
) -> None:
    def model(x: Tensor, each: Tensor, common: Tensor) -> Tensor:
        return net(x * each[:, None, None, None] * common)

    method = PerceptualBallPerturbation(model, net.relu2, settings=BallSettings(max_iterations=3))
    each, common = torch.linspace(0.5, 2, 4).double(), torch.tensor([1.5]).double()
    expected = method.attribute(x, 0, (each, common))
    with torch.inference_mode():
        arguments = (each.clone(), common.clone())
        found = method.attribute(x.clone(), 0, arguments, internal_batch_size=size)
    torch.testing.assert_close(found.clone(), expected)


def test_whole_numbers_can_not_be_perturbed(net: TwoConvolutions) -> None:
    with pytest.raises(TypeError, match=r"inputs: expected floating point, got torch\.int64"):
        PerceptualBallPerturbation(net, ()).attribute(torch.ones(2, 3, 8, 10, dtype=torch.long), 0)


# --- saliency ---


@pytest.mark.parametrize("blur", [0.1, 0.4, 1.0, 1.7, 2.0, 7.5, 40.0])
@pytest.mark.parametrize("shape", [(2, 3, 9, 14), (1, 1, 4, 3), (3, 4, 1, 20)])
def test_saliency_is_scipys_gaussian_of_the_root_mean_square(
    blur: float, shape: tuple[int, ...]
) -> None:
    d = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = PerceptualBallPerturbation.saliency(d, blur)
    root_mean_square = np.sqrt((d.numpy() ** 2).mean(axis=1))
    for image, expected in zip(found.numpy(), root_mean_square, strict=True):
        np.testing.assert_allclose(image, gaussian_filter(expected, blur), rtol=1e-10)
    np.testing.assert_allclose(PerceptualBallPerturbation.saliency(d, 0), root_mean_square)


def test_saliency_is_blurred_by_two_pixels_as_in_the_papers_code() -> None:
    d = torch.randn(1, 3, 16, 16)
    found = PerceptualBallPerturbation.saliency(d)
    expected = gaussian_filter(d.double().square().mean(1).sqrt()[0].numpy(), 2.0)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5)
    assert found.dtype == torch.float32
    assert PerceptualBallPerturbation.saliency(d.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PerceptualBallPerturbation.saliency(d), found)


def test_wrong_saliency_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="attributions: expected N×C×H×W, got 3×4×4"):
        PerceptualBallPerturbation.saliency(torch.zeros(3, 4, 4))
    for blur in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="blur: expected"):
            PerceptualBallPerturbation.saliency(torch.zeros(1, 3, 4, 4), blur)


def test_layers_on_two_devices_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Split(nn.Sequential):
        place: Any = "cpu"

        def forward(self, x: Tensor) -> Tensor:
            features = self[2](self[1](self[0](x)).to(self.place)).mean(dim=(2, 3))
            return self[3](features)

    torch.manual_seed(0)
    net = Split(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)).eval()
    split = copy.deepcopy(net)
    split.place = ELSEWHERE
    for part in (split[2], split[3]):
        moved(part)
    x = torch.rand(2, 3, 9, 9)
    for normalize in (False, True):
        options: dict[str, Any] = {"normalize_layers": normalize, "max_iterations": 3}
        ball = PerceptualBallPerturbation(net, [net[0], net[2]])
        expected = ball.attribute(x, torch.tensor([0, 2]), **options)
        with another_device(monkeypatch):
            ball = PerceptualBallPerturbation(split, [split[0], split[2]])
            found = ball.attribute(x, torch.tensor([0, 2]), **options)
        torch.testing.assert_close(found, expected)
