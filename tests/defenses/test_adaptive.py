"""An attacker who knows the transforms: the defended model, and attacks of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust import Defended, RobustCAM
from captum_robust.attacks import (
    FGSM,
    PGD,
    Attack,
    DeepFool,
    ExplanationAttack,
    UniversalPerturbation,
)
from captum_robust.defenses import (
    JPEG,
    BitDepth,
    CropAndRescale,
    DefendedModel,
    GaussianBlur,
    GaussianNoise,
    HorizontalFlip,
    Resize,
    Transform,
    adaptive_attack,
)


def make_net(classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    ).eval()
    with torch.no_grad():  # or one class would lead on every image
        net[-1].bias -= net(drawn()).mean(dim=0)
    return net


def drawn(n: int = 6, size: tuple[int, int] = (20, 24)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear").clamp(0.02, 0.98)


SEVERAL = (JPEG(50), GaussianNoise(0.1, seed=3), BitDepth(3), HorizontalFlip())


class Steps(Transform):
    """Rounds down to tenths, and has the gradient of three times the image."""

    def _apply(self, x: Tensor) -> Tensor:
        return (x * 10).floor() / 10

    def _surrogate(self, x: Tensor) -> Tensor:
        return 3 * x


def test_scores_are_the_mean_over_the_transforms():
    net, x = make_net(), drawn()
    expected = torch.stack([net(t(x)) for t in SEVERAL]).mean(dim=0)
    torch.testing.assert_close(DefendedModel(net, SEVERAL)(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(DefendedModel(net, SEVERAL)(x), expected)


def test_it_decides_as_the_defended_attribution_does():
    net, x = make_net(), drawn()
    defended = Defended(RobustCAM(net, net[2]), SEVERAL)
    torch.testing.assert_close(DefendedModel(net, SEVERAL)(x), defended.scores(x))


def test_transforms_of_other_sizes_count_alike():
    net, x = make_net(), drawn()
    transforms = [Resize(0.5, restore=False), GaussianBlur(1), Resize(2.0, restore=False)]
    expected = torch.stack([net(t(x)) for t in transforms]).mean(dim=0)
    torch.testing.assert_close(DefendedModel(net, transforms)(x), expected)


def test_the_gradient_is_the_mean_of_the_surrogates_gradients():
    net, x = make_net(), drawn().requires_grad_()
    (found,) = torch.autograd.grad(DefendedModel(net, [Steps(), GaussianBlur(1)])(x).sum(), x)
    # Of the steps: the model's gradient at the rounded image, times three.
    rounded = Steps()(x).requires_grad_()
    (of_steps,) = torch.autograd.grad(net(rounded).sum(), rounded)
    (of_blur,) = torch.autograd.grad(net(GaussianBlur(1).surrogate(x)).sum(), x)
    torch.testing.assert_close(found, (3 * of_steps + of_blur) / 2)


def test_the_forward_pass_is_exact_also_with_gradients():
    net, x = make_net(), drawn().requires_grad_()
    torch.testing.assert_close(DefendedModel(net, [Steps()])(x), net(Steps()(x)))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_small_batches_of_transforms_give_the_same(most):
    net, x = make_net(), drawn().requires_grad_()
    whole, parts = (
        DefendedModel(net, SEVERAL),
        DefendedModel(net, SEVERAL, transforms_per_eval=most),
    )
    seen: list[int] = []
    net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    a, b = whole(x), parts(x)
    torch.testing.assert_close(a, b)
    (ga,), (gb,) = (torch.autograd.grad(s.square().sum(), x) for s in (a, b))
    torch.testing.assert_close(ga, gb)
    assert seen[0] == 4 * 6
    assert max(seen[1:]) == most * 6


def test_no_sample_sees_another():
    net, x = make_net(), drawn()
    model = DefendedModel(net, (*SEVERAL, CropAndRescale(0.6, seed=1)))
    alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(model(x), alone)


def test_arguments_go_to_every_transform():
    net, x = make_net(), drawn(2)
    shift = torch.tensor([[1.0], [5.0]])
    model = DefendedModel(lambda x, s, scale: scale * net(x) + s, SEVERAL[:2])
    expected = 2 * DefendedModel(net, SEVERAL[:2])(x) + shift
    torch.testing.assert_close(model(x, shift, 2.0), expected)


def test_its_mode_and_its_parameters_are_the_models():
    net = make_net()
    model = DefendedModel(net, SEVERAL)
    assert not model.training
    assert net.training is False
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}
    assert DefendedModel(make_net().train(), SEVERAL).training
    x = drawn(2)
    (grad,) = torch.autograd.grad(model(x).sum(), net[0].weight)  # training through it works
    assert grad.abs().max() > 0


def test_a_defender_of_known_draws_gives_the_same_each_time_and_an_unknown_one_does_not():
    net, x = make_net(), drawn()
    noisy = [GaussianNoise(0.3, seed=3), GaussianBlur(1)]
    state = torch.random.get_rng_state()
    known = DefendedModel(net, noisy)
    assert torch.equal(known(x), known(x))
    first, second = (DefendedModel(net, noisy, redraw=True, seed=5) for _ in range(2))
    a, b = first(x), first(x)
    assert not torch.equal(a, b)
    assert torch.equal(second(x), a)
    assert torch.equal(second(x), b)
    assert not torch.equal(DefendedModel(net, noisy, redraw=True, seed=6)(x), a)
    assert torch.equal(state, torch.random.get_rng_state())


def test_samples_average_the_draws_of_one_transform():
    x = torch.full((1, 1, 4, 4), 0.5)
    # Of N draws of noise with deviation .1, beside a transform without: variance .01 / (4 N).
    flat: Callable[[Tensor], Tensor] = lambda x: x.flatten(1)  # noqa: E731
    noisy = [GaussianNoise(0.1), lambda x: x]
    for samples in (1, 16):
        model = DefendedModel(flat, noisy, redraw=True, samples=samples)
        values = torch.cat([model(x) for _ in range(400)])
        assert values.mean().item() == pytest.approx(0.5, abs=2e-3)
        assert values.std().item() == pytest.approx(0.1 / 2 / samples**0.5, rel=0.1)


def test_the_gradient_belongs_to_the_draw_of_the_same_call():
    x = drawn(1).requires_grad_()
    model = DefendedModel(lambda x: x.square().flatten(1), [GaussianNoise(0.2)], redraw=True)
    scores = model(x)
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    inside = (scores > 1e-6) & (scores < 1 - 1e-6)
    # The square's gradient is twice its root, at the noisy image whose scores they are.
    expected = 2 * scores.sqrt()
    torch.testing.assert_close(gradient.flatten(1)[inside], expected[inside])


def robust(model: Any, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).double().mean())


@pytest.mark.parametrize(
    "make",
    [lambda m: PGD(m, 0.02, steps=20), lambda m: FGSM(m, 0.02)],
    ids=["pgd", "fgsm"],
)
def test_the_attacker_who_knows_fools_the_ensemble_more_often(make):
    net = make_net()
    transforms = [HorizontalFlip(), GaussianNoise(0.25, seed=1), GaussianBlur(2), BitDepth(2)]
    defended = DefendedModel(net, transforms)
    x = drawn(64)
    y = defended(x).argmax(dim=1)
    plain = make(net)
    knowing = adaptive_attack(plain, transforms)
    left = [robust(defended, a.perturb(x, y), y) for a in (plain, knowing)]
    assert left[1] < left[0] - 0.1
    assert plain.forward_func is net


def test_the_attacker_without_the_draws_fools_less_often_than_the_one_with_them():
    net = make_net()
    noisy = [GaussianNoise(0.25, seed=s) for s in range(2)]
    defended = DefendedModel(net, noisy)
    x = drawn(64)
    y = defended(x).argmax(dim=1)
    left = {}
    for name, options in {"known": {}, "unknown": {"redraw": True, "samples": 4}}.items():
        attack = adaptive_attack(PGD(net, 0.01, steps=20), noisy, **options)
        left[name] = robust(defended, attack.perturb(x, y), y)
    assert left["known"] < left["unknown"] < 1


def test_deepfool_finds_a_smaller_change_of_the_ensemble_than_of_its_model():
    net, x = make_net(), drawn(8)
    transforms = [GaussianBlur(1), HorizontalFlip()]
    defended = DefendedModel(net, transforms)
    y = defended(x).argmax(dim=1)
    found = adaptive_attack(DeepFool(net, quantize=False), transforms).perturb(x, y)
    assert robust(defended, found, y) == 0


def test_the_settings_of_the_attack_stay():
    net = make_net()
    attack = PGD(net, 0.03, steps=7, norm="L2", seed=4)
    made = adaptive_attack(attack, SEVERAL, transforms_per_eval=2)
    settings = {k: v for k, v in vars(attack).items() if k != "forward_func"}
    assert {k: v for k, v in vars(made).items() if k != "forward_func"} == settings
    assert isinstance(made.forward_func, DefendedModel)
    assert made.forward_func.model is net
    assert made.forward_func.transforms_per_eval == 2


def test_the_explanation_is_attacked_through_the_wrapper():
    net, x = make_net(), drawn(8)
    transforms = [GaussianBlur(1), HorizontalFlip(), BitDepth(3)]
    defended = Defended(RobustCAM(net, net[2]), transforms)
    model = DefendedModel(net, transforms)
    y = model(x).argmax(dim=1)
    attack = ExplanationAttack(defended, 0.1, 10, forward_func=model, k=0.2, beta=None)
    moved, details = attack.perturb(x, y, return_details=True)
    assert details.moved.max() > 0.02
    assert robust(model, moved, y) == 1


def test_the_world_is_left_as_it_was():
    net, x = make_net(), drawn(2)
    before, weights = x.clone(), copy.deepcopy(net.state_dict())
    adaptive_attack(PGD(net, 0.05, steps=2), SEVERAL).perturb(x)
    assert torch.equal(x, before)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not net._forward_pre_hooks


def test_half_precision_stays():
    dtype = torch.bfloat16
    model = DefendedModel(make_net().to(dtype), [GaussianBlur(1), HorizontalFlip()])
    x = drawn(2).to(dtype).requires_grad_()
    scores = model(x)
    assert scores.dtype == dtype
    assert torch.autograd.grad(scores.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a function, got int"),
        ({"transforms": []}, ValueError, "transforms: expected at least one"),
        ({"transforms": [3]}, TypeError, "transforms: expected a Transform or a function"),
        ({"transforms": [GaussianNoise(0.1, seed=None)]}, ValueError, "give it a seed"),
        ({"samples": 2}, ValueError, "samples: without redraw every draw is the same"),
        ({"samples": 0}, ValueError, "samples: expected a whole number from 1, got 0"),
        ({"seed": -1}, ValueError, "seed: expected a whole number from 0"),
        ({"transforms_per_eval": 0}, ValueError, "transforms_per_eval: expected a whole number"),
        (
            {"transforms": [GaussianBlur(1)], "redraw": True},
            ValueError,
            "redraw: none of the transforms draws",
        ),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: Any, message: str):
    given: dict[str, Any] = {"model": make_net(), "transforms": SEVERAL, **options}
    with pytest.raises(error, match=message):
        DefendedModel(**given)


def test_wrong_images_are_named():
    model = DefendedModel(make_net(), SEVERAL)
    with pytest.raises(ValueError, match="the batch is empty"):
        model(drawn()[:0])
    with pytest.raises(ValueError, match="outside of the bounds"):
        model(drawn() + 1)
    broken = drawn()
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in sample 1"):
        model(broken)


def test_what_cannot_be_adapted_is_refused():
    net = make_net()
    with pytest.raises(TypeError, match=r"attack: expected a captum_robust.attacks.Attack, got f"):
        adaptive_attack(lambda x, _: x, SEVERAL)
    fitted: list[Attack] = [
        UniversalPerturbation(net, 0.1),
        ExplanationAttack(RobustCAM(net, net[2])),
    ]
    for attack in fitted:
        with pytest.raises(ValueError, match=f"{type(attack).__name__} is made of more than the"):
            adaptive_attack(attack, SEVERAL)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    net, x = make_net(), drawn()
    on_cpu = DefendedModel(net, SEVERAL)(x)
    torch.testing.assert_close(
        DefendedModel(net.cuda(), SEVERAL)(x.cuda()).cpu(), on_cpu, rtol=1e-3, atol=1e-3
    )


def test_scores_of_half_precision_are_added_in_single() -> None:
    def large(x: Tensor) -> Tensor:  # twice that is infinity in float16
        return torch.stack([x.mean(dim=(1, 2, 3)) * 0 + 6e4, x.mean(dim=(1, 2, 3)) * 0 + 5e4], 1)

    scores = DefendedModel(large, [BitDepth(8), BitDepth(4)])(torch.rand(2, 3, 8, 8).half())
    expected = torch.tensor([6e4, 5e4]).half().expand(2, 2)
    assert torch.equal(scores, expected)
