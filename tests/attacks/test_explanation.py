"""ExplanationAttack: the label stays, the map moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import (
    Attribution,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    LayerGradientXActivation,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.robust import AttackComparator, MinParamPerturbation
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from captum_robust import PerceptualBallPerturbation, RobustCAM
from captum_robust.attacks import (
    Attack,
    ExplanationAttack,
    ExplanationDetails,
    recorded_gradients,
    smooth_activations,
)
from captum_robust.attacks.attribution_maps import rank_correlation
from tests.networks import ChannelsLastNet, Grid, PixelNet

EPSILON = 0.05
MAKERS: dict[str, Callable[[nn.Module, nn.Module], Attribution]] = {
    "saliency": lambda net, layer: Saliency(net),
    "input_x_gradient": lambda net, layer: InputXGradient(net),
    "integrated_gradients": lambda net, layer: IntegratedGradients(net),
    "grad_cam": LayerGradCam,
    "guided_grad_cam": GuidedGradCam,
    "robust_cam": RobustCAM,
}
ARGUMENTS: dict[str, dict[str, Any]] = {"integrated_gradients": {"n_steps": 4}}
makers = pytest.mark.parametrize("name", MAKERS)


def attack_of(name: str, net: PixelNet, **options: Any) -> ExplanationAttack:
    options = {"steps": 6, "attribution_arguments": ARGUMENTS.get(name)} | options
    return ExplanationAttack(MAKERS[name](net, net.conv2), EPSILON, **options)


def predicted(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(dim=1)


@pytest.fixture
def details_of(net: PixelNet, x: Tensor) -> Callable[..., tuple[Tensor, ExplanationDetails]]:
    def run(name: str, **options: Any) -> tuple[Tensor, ExplanationDetails]:
        attack = attack_of(name, net, **options)
        return attack.perturb(x, predicted(net, x), return_details=True)

    return run


@makers
def test_the_label_and_the_ball_are_kept_and_the_map_moves(
    name: str, net: PixelNet, x: Tensor, details_of: Callable[..., Any]
) -> None:
    moved, details = details_of(name)
    label = predicted(net, x)
    assert moved.shape == x.shape
    assert not moved.requires_grad
    assert moved.is_contiguous()
    assert moved.amin() >= 0
    assert moved.amax() <= 1
    assert float((moved - x).abs().max()) <= EPSILON + 1e-6
    assert torch.equal(predicted(net, moved), label)
    assert torch.equal(predicted(net, (moved * 255).round() / 255), label)
    assert details.label_kept.all()
    assert not details.fooled.any()
    assert (details.moved > 0.01).all()
    assert (details.objective_after <= 1).all()


@makers
def test_it_moves_the_map_more_than_noise_of_the_same_size(
    name: str, net: PixelNet, x: Tensor, details_of: Callable[..., Any]
) -> None:
    _, details = details_of(name, steps=10)
    # The objective is also computed here, from its definition.
    arguments = ARGUMENTS.get(name, {})
    label = predicted(net, x)

    def share(inputs: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = inputs.clone().requires_grad_()
        maps = MAKERS[name](net, net.conv2).attribute(inputs, target=label, **arguments).detach()
        maps = maps.abs().sum(dim=1) if maps.shape == x.shape else maps[:, 0].clamp(min=0)
        flat = maps.flatten(1)
        if top is None:
            top = flat.topk(round(0.1 * flat.shape[1]), dim=1).indices
        return 1 - flat.gather(1, top).sum(dim=1) / flat.sum(dim=1), top

    before, top = share(x)
    torch.testing.assert_close(details.objective_before, before)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        noisy, _ = share((x + EPSILON * sign).clamp(0, 1), top)
        assert (details.objective_after > noisy).all()


@pytest.mark.parametrize("objective", ["top_k", "mass_center", "target_map", "region"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_objective_rises_in_either_ball(
    objective: str, norm: str, net: PixelNet, x: Tensor
) -> None:
    corner = torch.zeros(1, 12, 16)
    corner[:, :6, :8] = 1
    options: dict[str, Any] = {"objective": objective}
    if objective == "target_map":
        options["target_map"] = corner
    if objective == "region":
        options = {"region": corner}
    epsilon = EPSILON if norm == "Linf" else 1.0
    attack = ExplanationAttack(Saliency(net), epsilon, 8, norm=norm, **options)
    moved, details = attack.perturb(x, predicted(net, x), return_details=True)
    assert (details.moved > 0).all()
    assert (details.center_shift > 0).all()
    lengths = (moved - x).flatten(1)
    lengths = lengths.abs().amax(dim=1) if norm == "Linf" else lengths.norm(dim=1)
    assert (lengths <= epsilon + 1e-5).all()


def test_of_a_linear_model_the_top_position_shrinks_and_the_others_grow() -> None:
    # Input x gradient is w * x; the share of the largest, w1 x1 / sum, falls with x1 and with the
    # rest growing: the end of the ball is at x1 - eps, all others + eps.
    model = nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    x = torch.tensor([[0.5, 0.5, 0.25, 0.5], [0.25, 0.5, 0.5, 0.25]])
    for beta in (None, 30.0):
        attack = ExplanationAttack(InputXGradient(model), 0.125, 25, k=0.25, beta=beta)
        moved, details = attack.perturb(x, 0, return_details=True)
        torch.testing.assert_close(moved, x + 0.125 * torch.tensor([1.0, -1.0, 1.0, 1.0]))
        torch.testing.assert_close(details.objective_before, 1 - torch.tensor([1 / 2.25, 0.5]))
        after = 1 - torch.tensor([0.75 / (0.75 + 0.625 + 0.375 + 0.625), 0.75 / 2.125])
        torch.testing.assert_close(details.objective_after, after)


def test_of_a_quadratic_model_the_centre_moves_by_what_the_formula_says() -> None:
    # s(x) = sum x^2 / 2 has the gradient x, so that the saliency map is the image itself.
    def scores(x: Tensor) -> Tensor:
        energy = x.square().sum(dim=(1, 2, 3)) / 2
        return torch.stack([energy, energy - 1], dim=1)

    x = torch.full((1, 1, 1, 2), 0.5)
    attack = ExplanationAttack(
        Saliency(scores), 0.25, 20, objective="mass_center", beta=None, quantize=False
    )
    moved, details = attack.perturb(x, 0, return_details=True)
    # From the middle, 1.0, to (0.25 * 0.5 + 0.75 * 1.5) / 1 = 1.25 or as far the other way.
    torch.testing.assert_close(moved.sort().values, torch.tensor([[[[0.25, 0.75]]]]))
    torch.testing.assert_close(details.center_shift, torch.tensor([0.25]))
    torch.testing.assert_close(details.objective_after, torch.tensor([0.25 / 5**0.5]))


def test_a_label_that_forbids_the_way_holds_the_map_back() -> None:
    # The first class wins while x1 > x2, and the map is (x1, x2) of which x1 is the top position:
    # free of the label x1 would fall to .5 and x2 rise to .7.
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.eye(2)
    x = torch.tensor([[0.6, 0.6 - 0.05]])

    def itself(inputs: Tensor, target: Tensor) -> Tensor:
        return inputs[:, None]

    attack = ExplanationAttack(itself, 0.1, 40, k=0.5, forward_func=model, quantize=False)
    moved, details = attack.perturb(x, 0, return_details=True)
    assert moved[0, 0] > moved[0, 1]
    assert details.label_kept.all()
    assert details.moved > 0
    assert details.objective_after < 0.5


def test_a_model_of_one_class_has_no_label_to_lose() -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.ones(1, 3)
    attack = ExplanationAttack(InputXGradient(model), 0.125, 25, k=0.3)
    moved = attack.perturb(torch.tensor([[0.25, 0.75, 0.5]]))
    torch.testing.assert_close(moved, torch.tensor([[0.375, 0.625, 0.625]]))


def test_misclassified_images_come_back_unchanged(net: PixelNet, x: Tensor) -> None:
    label = predicted(net, x)
    label[1] = (label[1] + 1) % 6
    moved, details = attack_of("saliency", net).perturb(x, label, return_details=True)
    assert torch.equal(moved[1], x[1])
    assert details.already.tolist() == [False, True, False]
    assert details.label_kept.tolist() == [True, False, True]
    assert details.moved[1] == 0
    assert details.rank_correlation[1] == 1
    assert details.top_k_intersection[1] == 1


def test_nothing_moves_without_room(net: PixelNet, x: Tensor) -> None:
    for options in ({"epsilon": 0.0}, {"mask": torch.zeros_like(x)}):
        moved, details = attack_of("saliency", net).perturb(
            x, predicted(net, x), return_details=True, **options
        )
        assert torch.equal(moved, x)
        assert not details.moved.any()


def test_the_mask_says_where_the_input_may_change(net: PixelNet, x: Tensor) -> None:
    mask = torch.zeros(1, 1, 12, 16)
    mask[..., :8] = 1
    moved = attack_of("saliency", net).perturb(x, predicted(net, x), mask=mask)
    assert torch.equal(moved[..., 8:], x[..., 8:])
    assert not torch.equal(moved, x)


@pytest.mark.parametrize("name", ["saliency", "robust_cam"])
def test_batch_equals_one_by_one(name: str, net: PixelNet, x: Tensor) -> None:
    net, x = net.double(), x.double()
    label = predicted(net, x)
    region = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(2))
    attack = attack_of(name, net, region=region)
    batch = attack.perturb(x, label)
    single = torch.cat(
        [attack.perturb(x[i : i + 1], label[i : i + 1], region=region[i : i + 1]) for i in range(3)]
    )
    torch.testing.assert_close(batch, single)


def test_tuples_and_additional_arguments_go_through(net: PixelNet, x: Tensor) -> None:
    inputs = (x, x.flip(0))
    with torch.no_grad():
        label = net(*inputs, 0.5).argmax(dim=1)
    attack = attack_of("saliency", net)
    moved, details = attack.perturb(inputs, label, additional_forward_args=0.5, return_details=True)
    assert all(m.shape == x.shape for m in moved)
    assert (details.moved > 0).all()
    with torch.no_grad():
        assert torch.equal(net(*moved, 0.5).argmax(dim=1), label)
    each = torch.linspace(0, 0.2, 3).reshape(3, 1, 1, 1)  # a row of each sample
    both = Saliency(lambda x, shift: net(x + shift))
    label = predicted(net, x + each)
    shifted = ExplanationAttack(both, EPSILON, 4, module=net)
    batch = shifted.perturb(x, label, additional_forward_args=each)
    last = shifted.perturb(x[2:], label[2:], additional_forward_args=each[2:])
    assert (batch[2:] - last).abs().mean() < 1e-3


def test_tuple_targets_index_scores_of_more_dimensions(x: Tensor) -> None:
    torch.manual_seed(0)
    net = PixelNet(classes=24).eval()

    grid = Grid(net)
    label = predicted(lambda x: grid(x)[:, :, 1, 2], x)
    targets = [(int(c), 1, 2) for c in label]
    moved = ExplanationAttack(Saliency(grid), EPSILON, 3).perturb(x, targets)
    flat = Saliency(lambda x: grid(x)[:, :, 1, 2])
    expected = ExplanationAttack(flat, EPSILON, 3, module=grid).perturb(x, label)
    assert not torch.equal(moved, x)
    torch.testing.assert_close(moved, expected)


def test_spearman_is_scipys(net: PixelNet, x: Tensor) -> None:
    clean, other = (LayerGradCam(net, net.relu).attribute(z, 1).clamp(min=0) for z in (x, x**2))
    found = rank_correlation(clean.detach(), other.detach())
    pairs = zip(clean.detach().flatten(1), other.detach().flatten(1), strict=True)
    expected = [spearmanr(a, b).statistic for a, b in pairs]
    torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", ["occlusion", "ball"])
def test_an_attribution_without_gradient_needs_a_surrogate(
    make: str, net: PixelNet, x: Tensor
) -> None:
    arguments: dict[str, Any] = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)}
    attribution: Attribution = Occlusion(net)
    if make == "ball":
        attribution = PerceptualBallPerturbation(net, net.conv2)
        arguments = {"max_iterations": 2}
    label = predicted(net, x)
    options: dict[str, Any] = {"attribution_arguments": arguments, "steps": 4}
    with pytest.raises(ValueError, match=r"no gradient flows from the map of .*; give surrogate="):
        ExplanationAttack(attribution, EPSILON, **options).perturb(x, label)
    attack = ExplanationAttack(attribution, EPSILON, surrogate=Saliency(net), **options)
    moved, details = attack.perturb(x, label, return_details=True)
    assert (details.moved >= 0).all()
    assert details.moved.any()
    assert torch.equal(predicted(net, moved), label)


def test_captums_harnesses_run_it(net: PixelNet, x: Tensor) -> None:
    attack: Attack = attack_of("saliency", net)
    label = predicted(net, x)

    def accuracy(scores: Tensor) -> Tensor:
        return (scores.argmax(dim=1) == label).float()

    comparator = AttackComparator(forward_func=net, metric=accuracy)
    comparator.add_attack(attack, "explanation", attack_kwargs={"target": label})
    result = comparator.evaluate(x)
    assert result["explanation"]["mean"].tolist() == [1, 1, 1]

    # The least strength at which a tenth more of the map has left its top positions.
    one, of_one = x[:1], label[:1]
    clean = Saliency(net).attribute(one.clone().requires_grad_(), of_one).sum(dim=1).flatten(1)
    top = clean.topk(19, dim=1).indices

    def outside(inputs: Tensor) -> Tensor:
        maps = Saliency(net).attribute(inputs.clone().requires_grad_(), of_one).sum(dim=1)
        maps = maps.flatten(1)
        return 1 - maps.gather(1, top).sum(dim=1) / maps.sum(dim=1)

    limit = float(outside(one)) + 0.05
    search = MinParamPerturbation(
        forward_func=outside,
        attack=attack,
        arg_name="epsilon",
        arg_min=0.0,
        arg_max=0.2,
        arg_step=0.02,
        mode="binary",
        correct_fn=lambda share: bool(share < limit),
    )
    moved, least = search.evaluate(one, attack_kwargs={"target": of_one})
    assert 0 < least <= 0.2
    assert outside(moved) >= limit


def test_the_seed_decides_and_the_global_generator_does_not_move(net: PixelNet, x: Tensor) -> None:
    label = predicted(net, x)
    state = torch.get_rng_state()
    first, again, other = (
        attack_of("saliency", net, seed=seed).perturb(x, label) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@makers
def test_the_callers_world_is_left_as_it_was(name: str, net: PixelNet, x: Tensor) -> None:
    label = predicted(net, x)
    net.conv1.weight.requires_grad_(False)
    net.conv2.weight.grad = torch.ones_like(net.conv2.weight)
    x.requires_grad_()

    def world() -> list[Any]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        state: list[Any] = [torch.is_grad_enabled(), x.grad, x.tolist(), torch.autograd.grad]
        for m in net.modules():
            state += [m.training, list(m.__dict__), *[list(getattr(m, h)) for h in hooks]]
        for p in net.parameters():
            state += [p.tolist(), p.requires_grad, None if p.grad is None else p.grad.tolist()]
        return state

    before = world()
    expected = attack_of(name, net, steps=2).perturb(x, label)
    assert world() == before
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            moved = attack_of(name, net, steps=2).perturb(x, label)
        torch.testing.assert_close(moved.clone(), expected)
    pool, calls = net.pool, 0

    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 6:
                raise RuntimeError("broken pool")
            return pool(x)

    net.pool = Breaks().eval()
    before = world()
    with pytest.raises(RuntimeError, match="broken pool"):
        attack_of(name, net, steps=9).perturb(x, label)
    assert world() == before


def test_bfloat16_autocast_runs(net: PixelNet, x: Tensor) -> None:
    label = predicted(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved, details = attack_of("saliency", net).perturb(x, label, return_details=True)
    assert moved.dtype == x.dtype
    assert (details.moved >= 0).all()
    assert details.moved.any()


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "objective: expected one of", {"objective": "away"}),
        (ValueError, "k: expected a number", {"k": 5}),
        (ValueError, "beta: expected a positive", {"beta": 0}),
        (ValueError, "steps: expected a whole number", {"steps": -1}),
        (ValueError, "step_size: expected", {"step_size": 0}),
        (ValueError, "label_slack: expected", {"label_slack": 2}),
        (ValueError, "random_start: ", {"objective": "mass_center", "random_start": False}),
        (TypeError, "surrogate: expected a Captum", {"surrogate": Saliency}),
        (TypeError, "module: expected", {"module": "relu"}),
        (ValueError, "region: needs objective='top_k'", {"objective": "mass_center"}),
        (ValueError, "region: expected values from 0 to 1", {}),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(
    error: type[Exception], match: str, options: dict[str, Any], net: PixelNet
) -> None:
    if match.startswith("region"):
        options = options | {"region": torch.full((1, 4, 4), 2.0)}
    with pytest.raises(error, match=match):
        ExplanationAttack(Saliency(net), **options)


def test_wrong_calls_are_named(net: PixelNet, x: Tensor) -> None:
    label = predicted(net, x)
    with pytest.raises(ValueError, match="targeted: this attack keeps the label"):
        attack_of("saliency", net).perturb(x, label, targeted=True)
    with pytest.raises(ValueError, match="target_map: the objective"):
        attack_of("saliency", net, objective="target_map").perturb(x, label)
    with pytest.raises(ValueError, match="region: expected 3 maps, one a sample, got 2"):
        attack_of("saliency", net).perturb(x, label, region=torch.ones(2, 12, 16))
    with pytest.raises(ValueError, match="forward_func: an attribution that is a function"):
        ExplanationAttack(lambda x, target: x)
    with pytest.raises(ValueError, match="attribution: expected 3 maps"):
        ExplanationAttack(lambda x, target: x.sum(), forward_func=net).perturb(x, label)


def test_recorded_gradients_can_be_differentiated_and_the_function_is_put_back() -> None:
    plain, hook = torch.autograd.grad, Tensor.register_hook
    x = torch.tensor([2.0], requires_grad=True)
    with recorded_gradients():
        (slope,) = torch.autograd.grad(x**3, x, None, False, False)
    assert torch.autograd.grad(slope, x) == (torch.tensor([12.0]),)  # of 3 x^2
    with pytest.raises(RuntimeError, match="inside"), recorded_gradients():
        raise RuntimeError("inside")
    assert torch.autograd.grad is plain
    assert Tensor.register_hook is hook


def test_guided_backpropagation_bends_the_first_derivative_only() -> None:
    # Of s = relu(-relu(x)^2 + 3 relu(x)) the guided gradient is that of s where it is positive,
    # 3 - 2 x at 0 < x < 1.5; its derivative, -2, is negative and must come through.
    from captum.attr import GuidedBackprop

    class Hill(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.relu2 = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(x)
            return self.relu2(3 * y - y**2)

    x = torch.tensor([[1.0]], requires_grad=True)
    with recorded_gradients():
        guided = GuidedBackprop(Hill()).attribute(x, 0)
    torch.testing.assert_close(guided.detach(), torch.tensor([[1.0]]))
    torch.testing.assert_close(torch.autograd.grad(guided.sum(), x)[0], torch.tensor([[-2.0]]))


ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": lambda **k: nn.Hardtanh(-0.5, 0.25, **k),
    "leaky_relu": lambda **k: nn.LeakyReLU(0.2, **k),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
}


def softplus_of(name: str, x: Tensor, beta: float) -> Tensor:
    """The definition, with torch's own softplus."""

    def s(x: Tensor) -> Tensor:
        return F.softplus(x, beta, threshold=1000)

    six = s(x + 3) - s(x - 3)
    return {
        "relu": s(x),
        "relu6": s(x) - s(x - 6),
        "hardtanh": -0.5 + s(x + 0.5) - s(x - 0.25),
        "leaky_relu": 0.2 * x + 0.8 * s(x),
        "hardswish": x * six / 6,
        "hardsigmoid": six / 6,
    }[name]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("beta", [1.0, 12.0])
def test_smooth_activations_are_made_of_softplus(name: str, inplace: bool, beta: float) -> None:
    module = ACTIVATIONS[name](inplace=inplace)
    x = torch.linspace(-8, 8, 41).double().requires_grad_()
    y = x * 1
    with smooth_activations(module, beta):
        result = module(y)
    torch.testing.assert_close(result, softplus_of(name, x, beta))
    assert (result is y) == inplace
    with smooth_activations(module, beta):
        assert torch.autograd.gradcheck(lambda x: module(x * 1), x)
        assert torch.autograd.gradgradcheck(lambda x: module(x * 1), x)


def test_smooth_activations_reach_functions_and_subclasses_and_put_all_back() -> None:
    class Capped(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return F.relu6(input)

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.capped, self.prelu = Capped(), nn.PReLU(2)

        def forward(self, x: Tensor) -> list[Tensor]:
            functions = (torch.relu, Tensor.relu, lambda x: x.clone().relu_(), F.relu)
            return [f(x) for f in (self.capped, self.prelu, *functions)]

    net, x = Many(), torch.linspace(-8, 8, 10).reshape(5, 2)
    plain = net(x)
    before = [list(m.__dict__) for m in net.modules()]
    with smooth_activations(net, 1.0):
        capped, prelu, *functions = net(x)
        outside = torch.relu(x)
    torch.testing.assert_close(capped, F.softplus(x) - F.softplus(x - 6))
    torch.testing.assert_close(prelu, 0.25 * x + 0.75 * F.softplus(x))
    for result in functions:
        torch.testing.assert_close(result, F.softplus(x))
    assert torch.equal(outside, x.clamp(min=0))
    with pytest.raises(RuntimeError, match="inside"), smooth_activations(net, 1.0):
        raise RuntimeError("inside")
    assert [list(m.__dict__) for m in net.modules()] == before
    for a, b in zip(net(x), plain, strict=True):
        assert torch.equal(a, b)


def test_an_own_forward_of_the_caller_is_put_back() -> None:
    relu = nn.ReLU()
    relu.forward = own = lambda x: F.relu(x) + 1  # type: ignore[method-assign]
    with smooth_activations(relu, 1.0):
        torch.testing.assert_close(relu(torch.zeros(1)), torch.tensor([1.6931]), atol=1e-4, rtol=0)
    assert relu.forward is own


def test_smooth_activations_let_the_gradient_of_a_relu_network_move(
    net: PixelNet, x: Tensor
) -> None:
    # Without them the second derivative of the piecewise linear network is zero.
    label = predicted(net, x)
    stiff = attack_of("saliency", net, beta=None, random_start=False)
    assert torch.equal(stiff.perturb(x, label), x)
    assert not torch.equal(attack_of("saliency", net, random_start=False).perturb(x, label), x)


def test_a_layer_with_the_channels_last_is_placed_or_refused(x: Tensor) -> None:
    torch.manual_seed(0)
    net = ChannelsLastNet().eval()
    for kind in (LayerGradientXActivation, LayerActivation):
        moved = [
            ExplanationAttack(kind(net, layer), steps=3, surrogate=Saliency(net)).perturb(
                x, return_details=True
            )[1]
            for layer in (net.first, net.norm)
        ]
        torch.testing.assert_close(moved[1].objective_after, moved[0].objective_after)
        torch.testing.assert_close(moved[1].center_shift, moved[0].center_shift)
    better = RobustCAM(net, net.norm, base="gradcam")
    same = RobustCAM(net, net.first, base="gradcam")
    options: dict[str, Any] = {"attribution_arguments": {"k": 1}, "steps": 2}
    expected = ExplanationAttack(same, **options).perturb(x)
    torch.testing.assert_close(ExplanationAttack(better, **options).perturb(x), expected)
    for explainer in (
        LayerGradCam(net, net.norm),
        NoiseTunnel(LayerGradCam(net, net.norm)),
        GuidedGradCam(net, net.norm),
    ):
        with pytest.raises(ValueError, match=r"attribution: LayerGradCam .* give RobustCAM\("):
            ExplanationAttack(explainer, steps=2).perturb(x)


def test_the_passes_of_all_steps_are_counted(net: PixelNet, x: Tensor) -> None:
    # With no slack a label is never pulled back that was not lost, so one a step: the map's.
    attack = ExplanationAttack(Saliency(net), 1e-4, steps=3, label_slack=0)
    _, details = attack.perturb(x, return_details=True)
    assert details.label_kept.all()
    assert details.backward_passes.tolist() == [3] * len(x)
