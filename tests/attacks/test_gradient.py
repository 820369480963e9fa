"""The gradient attacks beside closed forms, foolbox, adv-lib and Captum."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import captum.robust
import foolbox
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_robust.attacks import (
    FGSM,
    PGD,
    DeepFool,
    GradientStep,
    LeastLikelyClass,
    most_likely_class_map,
)
from tests.devices import ELSEWHERE, another_device, moved
from tests.networks import Counted, PixelNet


def entropy(scores: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(scores, classes, reduction="none")


def linear(*rows: list[float]) -> nn.Linear:
    """Scores W x."""
    model = nn.Linear(len(rows[0]), len(rows), bias=False)
    model.weight.data = torch.tensor(rows)
    return model


class Smooth(nn.Module):
    """A classifier in double precision, smooth, so that two routes stay together for many steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, 5)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(4 * x - 2)


@pytest.fixture
def smooth() -> Smooth:
    return Smooth().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double()


def plain(
    model: nn.Module, epsilon: float, steps: int, norm: str = "Linf", **options: object
) -> PGD:
    """PGD without what the others lack: every sample takes every step, the last one counts."""
    return PGD(
        model, epsilon, steps, epsilon / 4, norm=norm, loss="cross_entropy",
        early_stop=False, keep_best=False, quantize=False, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_on_a_linear_model_the_step_is_epsilon_times_the_sign_of_the_weights() -> None:
    w = torch.randn(7, generator=torch.Generator().manual_seed(0))
    model = linear((-w).tolist(), [0.0] * 7)  # the loss of class 0 grows with w x
    x = torch.full((2, 7), 0.5)
    expected = x + 0.125 * w.sign()
    for attack in (FGSM(model, 0.125), PGD(model, 0.125, steps=5, early_stop=False)):
        assert torch.allclose(attack.perturb(x, 0), expected)
    # In the Euclidean ball the best direction is w itself.
    expected = x + 0.125 * w / w.norm()
    for norm_attack in (FGSM(model, 0.125, norm="L2"), plain(model, 0.125, 6, "L2")):
        assert torch.allclose(norm_attack.perturb(x, 0), expected, atol=1e-6)


def test_the_plain_step_is_the_gradient_times_epsilon() -> None:
    model = linear([1.0, -2.0], [0.0, 0.0])
    x = torch.tensor([[0.5, 0.25]])  # scores 0: both probabilities are a half
    # dL/dx of class 0: (p0 - 1) w = (-.5, 1)
    assert torch.allclose(GradientStep(model, 0.2).perturb(x, 0), torch.tensor([[0.4, 0.45]]))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_iterate_is_that_of_foolbox(
    smooth: Smooth, images: Tensor, norm: str, targeted: bool
) -> None:
    epsilon = 0.06 if norm == "Linf" else 1.0
    label = smooth(images).argmax(dim=1)
    theirs_class = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}[norm]
    theirs = theirs_class(steps=9, rel_stepsize=0.25, random_start=False)
    target = (label + 2) % 5 if targeted else label
    criterion = foolbox.criteria.TargetedMisclassification(target) if targeted else label
    expected = theirs.run(
        foolbox.PyTorchModel(smooth, bounds=(0, 1)), images, criterion, epsilon=epsilon
    )
    found = plain(smooth, epsilon, 9, norm).perturb(images, target, targeted=targeted)
    assert not torch.allclose(found, images, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_the_iterate_is_that_of_adv_lib(
    smooth: Smooth, images: Tensor, adv_lib_attacks: object
) -> None:
    label = smooth(images).argmax(dim=1)
    epsilon = 0.2
    found = plain(smooth, epsilon, 5).perturb(images, label)
    assert (smooth(found).argmax(dim=1) != label).all()
    # It returns the last adversarial iterate that it saw, and it does not look at the last one.
    expected = adv_lib_attacks.pgd_linf(  # type: ignore[attr-defined]
        smooth, images, label, epsilon, steps=6, random_init=False, relative_step_size=0.25
    )
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_one_step_is_that_of_foolbox_and_of_captum(smooth: Smooth, images: Tensor) -> None:
    label = smooth(images).argmax(dim=1)
    found = FGSM(smooth, 0.05, loss="cross_entropy", quantize=False).perturb(images, label)
    of_foolbox = foolbox.attacks.LinfFastGradientAttack().run(
        foolbox.PyTorchModel(smooth, bounds=(0, 1)), images, label, epsilon=0.05
    )
    torch.testing.assert_close(found, of_foolbox, atol=1e-12, rtol=0)
    captums = captum.robust.FGSM(smooth, entropy, lower_bound=0, upper_bound=1)
    captums.zero_thresh = 0
    of_captum = captums.perturb(images, 0.05, label)
    torch.testing.assert_close(found, of_captum, atol=1e-12, rtol=0)


def negative_log(scores: Tensor, classes: Tensor) -> Tensor:
    """Captum's default loss has the gradient of this, which is finite for negative scores too."""
    return -scores.abs().log().gather(1, classes[:, None])[:, 0]


# inputs, radius, step, steps, target, whether targeted, result: Captum's own tests of its PGD
@pytest.mark.parametrize(
    ("x", "radius", "step", "steps", "target", "targeted", "expected"),
    [
        ([2.0, -9.0, 9.0, 1.0, -3.0], 0.25, 0.1, 2, 4, False, [2.0, -9.0, 9.0, 1.0, -2.8]),
        ([9.0, 10.0, -6.0, -1.0], 0.2, 0.1, 3, 3, True, [9.0, 10.0, -6.0, -1.2]),
    ],
)
def test_captums_values_come_out_with_captums_loss(
    x: list[float],
    radius: float,
    step: float,
    steps: int,
    target: int,
    targeted: bool,
    expected: list[float],
) -> None:
    def basic_model(inputs: Tensor) -> Tensor:  # Captum's BasicModel
        return 1 - F.relu(1 - inputs)

    inputs = torch.tensor([x])
    attack = PGD(
        basic_model, radius, steps, step, loss_func=negative_log, bounds=None,
        early_stop=False, keep_best=False,
    )  # fmt: skip
    found = attack.perturb(inputs, target, targeted=targeted)
    torch.testing.assert_close(found, torch.tensor([expected]))
    of_captum = captum.robust.PGD(basic_model).perturb(
        inputs, radius, step, steps, target, targeted=targeted
    )
    torch.testing.assert_close(found, of_captum)


def test_on_negative_scores_it_fools_where_captums_default_does_the_opposite() -> None:
    model = linear([1.0, 0.0], [0.0, 1.0])

    def shifted(x: Tensor) -> Tensor:
        return model(x) - 5

    x = torch.tensor([[0.6, 0.4]])
    ours = PGD(shifted, 0.2, steps=4).perturb(x, 0)
    theirs = captum.robust.PGD(shifted, lower_bound=0, upper_bound=1).perturb(x, 0.2, 0.1, 4, 0)
    assert shifted(ours).argmax() == 1
    assert shifted(theirs)[0, 0] > shifted(x)[0, 0]


def test_momentum_is_that_of_dong_et_al(smooth: Smooth, images: Tensor) -> None:
    label = smooth(images).argmax(dim=1)
    epsilon, decay = 0.06, 0.9
    x, g = images.clone(), torch.zeros_like(images)
    for _ in range(6):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(entropy(smooth(x), label).sum(), x)
        g = decay * g + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        x = (x.detach() + epsilon / 4 * g.sign()).clamp(images - epsilon, images + epsilon)
        x = x.clamp(0, 1)
    found = plain(smooth, epsilon, 6, momentum=decay).perturb(images, label)
    torch.testing.assert_close(found, x, atol=1e-12, rtol=0)


def test_an_l2_step_has_the_length_of_the_step(smooth: Smooth, images: Tensor) -> None:
    found = PGD(
        smooth, 5.0, 1, 0.01, norm="L2", bounds=None, early_stop=False, keep_best=False
    ).perturb(images)
    lengths = (found - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.01))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_random_starts_fill_the_ball(smooth: Smooth, norm: str) -> None:
    x = torch.full((1, 1, 1, 2), 0.5)

    def flat(images: Tensor) -> Tensor:
        return images.flatten(1) * 0 + torch.tensor([1.0, 0.0])

    radii = []
    for seed in range(400):
        attack = PGD(flat, 0.1, 0, norm=norm, random_start=True, early_stop=False, seed=seed)
        change = (attack.perturb(x, 0) - x).flatten()
        radii.append(change.norm() if norm == "L2" else change.abs().max())
    # In two dimensions half of a ball lies beyond .707 of its radius.
    found = torch.stack(radii)
    assert found.max() <= 0.1 + 1e-6
    assert (found > 0.1 / 2**0.5).float().mean() == pytest.approx(0.5, abs=0.08)


def test_the_attack_averages_the_loss_over_the_transform(images: Tensor) -> None:
    # Scores (w x, 0). The transform flips the sign of w in the first of three draws, so the mean
    # gradient has the sign of the other two.
    model = linear([1.0, 1.0], [0.0, 0.0])
    signs = itertools.cycle([-1.0, 1.0, 1.0])

    def transform(x: Tensor) -> Tensor:
        return x * next(signs)

    x = torch.tensor([[0.05, 0.05], [0.02, 0.08]])  # all probabilities are about a half
    attack = PGD(
        model, 0.1, 1, transform=transform, samples=3, bounds=None,
        early_stop=False, keep_best=False,
    )  # fmt: skip
    torch.testing.assert_close(attack.perturb(x, 0), x - 0.1)
    _, details = attack.perturb(x, 0, return_details=True)
    assert details.forward_passes.tolist() == [7, 7]  # clean, and three at each of two points
    assert details.backward_passes.tolist() == [3, 3]


def test_draws_of_half_a_batch_get_the_arguments_of_their_samples() -> None:
    # Two samples are fooled by one step and leave; two draws each of the others are four rows, as
    # many as there were samples.
    seen: list[list[float]] = []

    def margin(x: Tensor, boundary: Tensor) -> Tensor:
        seen.append(boundary.tolist())
        return torch.stack([x[:, 0] - boundary, torch.zeros(len(x))], dim=1)

    attack = PGD(
        margin, 0.125, steps=4, transform=lambda x: x, samples=2, step_size=0.0625, quantize=False
    )
    boundary = torch.tensor([0.46875, 0.46875, 0.125, 0.25])
    attack.perturb(torch.full((4, 1), 0.5), 0, additional_forward_args=boundary)
    assert seen[-1] == [0.125, 0.125, 0.25, 0.25]


def test_a_transform_draws_the_same_for_a_sample_whatever_becomes_of_the_others(
    net: PixelNet, x: Tensor
) -> None:
    def shifted(images: Tensor) -> Tensor:  # one draw for all of them
        return images.roll(int(torch.randint(12, ())), dims=-2) * torch.rand(())

    attack = PGD(net, 0.25, 4, transform=shifted, samples=3, restarts=2)
    label = net(x).argmax(dim=1)
    label[0] += 1  # misclassified: leaves the batch at once
    together = attack.perturb(x, label)
    alone = [attack.perturb(x[i : i + 1], label[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_only_the_generators_that_are_put_back_are_seeded(
    net: PixelNet, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("seeds the graphics cards, where nothing is drawn")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fails)
    PGD(net, 0.1, 1, transform=lambda images: images * torch.rand(())).perturb(x)


def test_a_transform_that_draws_is_seeded_and_leaves_the_generator(
    net: PixelNet, x: Tensor
) -> None:
    def noisy(images: Tensor) -> Tensor:
        return (images + 0.1 * torch.randn_like(images)).clamp(0, 1)

    attack = PGD(net, 0.1, 3, transform=noisy, samples=2, early_stop=False)
    state = torch.get_rng_state()
    first = attack.perturb(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(attack.perturb(x), first)


def test_a_fooled_image_costs_nothing_more() -> None:
    # Scores (x + 1, 1.4): an image at .45 falls in one step of .0625, one at .95 in no step.
    model = Counted(nn.Identity())

    def scores(x: Tensor) -> Tensor:
        return torch.cat([model(x) + 1, torch.full_like(x, 1.4)], dim=1)

    x = torch.tensor([[0.45], [0.95]])
    result, details = PGD(scores, 0.25, 4, 0.0625, quantize=False).perturb(
        x, 0, return_details=True
    )
    torch.testing.assert_close(result, torch.tensor([[0.3875], [0.7]]))
    assert details.fooled.tolist() == [True, False]
    # The first image: clean, and after its step. The second: at five points; once more where it
    # was left alone in the batch; the details look at both again without being counted.
    assert details.forward_passes.tolist() == [2, 6]
    assert details.backward_passes.tolist() == [1, 4]
    assert sum(model.calls) == 2 + 6 + 2


def test_fooled_means_fooled_as_an_8_bit_image() -> None:
    # Scores (x, .5): the level of an 8-bit image below .5 is 127/255 = .49804.
    def scores(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x, 0.5)], dim=1)

    x = torch.tensor([[128 / 255]])  # .50196
    # Down to .49996, which is saved as 127 and fools; .5002 is saved as 128 and does not.
    at_once, details = PGD(scores, 1 / 255, 2, 0.6 / 255).perturb(x, 0, return_details=True)
    assert details.fooled.item()
    torch.testing.assert_close(at_once, x - 0.6 / 255)
    _, details = PGD(scores, 0.45 / 255, 2, 0.45 / 255).perturb(x, 0, return_details=True)
    assert not details.fooled.item()

    def just_below(x: Tensor) -> Tensor:  # lost at .5015, which is saved as 128 again
        return torch.cat([x, torch.full_like(x, 0.5015)], dim=1)

    for quantize, expected in ((True, False), (False, True)):
        attack = PGD(just_below, 0.45 / 255, 1, 0.45 / 255, quantize=quantize)
        _, details = attack.perturb(x, 0, return_details=True)
        assert bool(details.fooled) is expected


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("attack", [PGD, DeepFool])
def test_rounding_to_8_bits_stays_in_the_ball(attack: Any, norm: str) -> None:
    """A pixel of 76.6 levels is 1.4 from level 78, so with a radius of 1 none above 77 counts."""
    x = torch.tensor([[76.6 / 255]])
    for boundary, reached in ((77.8, False), (77.4, False), (76.9, True)):

        def scores(x: Tensor, at: float = boundary) -> Tensor:
            return torch.cat([torch.full_like(x, at / 255), x], dim=1)

        made = attack(scores, epsilon=1 / 255, norm=norm, quantize=True)
        result, details = made.perturb(x, 0, return_details=True)
        assert details.fooled.item() is reached
        if reached:
            assert (255 * result).round().item() == 77


def test_rounding_an_image_stays_in_the_euclidean_ball() -> None:
    """Each of 100 pixels just past the half of a level: to the nearest the length would double."""

    def scores(x: Tensor) -> Tensor:
        total = x.sum(dim=1, keepdim=True)
        return torch.cat([torch.full_like(total, (10_000 + 55) / 255), total], dim=1)

    x = torch.full((1, 100), 100 / 255)
    attack = PGD(scores, epsilon=6 / 255, norm="L2")  # ten times .6 of a level
    _, details = attack.perturb(x, 0, return_details=True)
    assert not details.fooled.item()  # before, as an image that is 10 levels away
    assert PGD(scores, 10 / 255, norm="L2").perturb(x, 0, return_details=True)[1].fooled.item()
    # Where the clean image is none of 8 bits itself, its own rounding, of 3 levels, comes at right
    # angles: the image of 101 is 7 away, where 6.7 and 7.07 are allowed.
    between = torch.full((1, 100), 100.3 / 255)
    for radius, reached in ((6.0, False), (6.4, True)):
        made = PGD(scores, radius / 255, norm="L2")
        assert made.perturb(between, 0, return_details=True)[1].fooled.item() is reached


def test_restarts_find_what_one_start_misses() -> None:
    # The label is lost only beyond 0.2 to the right, and the loss falls on the way there: the sign
    # step from the start leads left.
    def scores(x: Tensor) -> Tensor:
        margin = torch.where(x < 0.6, x - 0.1, 2.4 - 3 * x - 0.6 * (x > 0.7))
        return torch.cat([margin, torch.zeros_like(x)], dim=1)

    x = torch.tensor([[0.5]])
    once, missed = PGD(scores, 0.3, 3, 0.02).perturb(x, 0, return_details=True)
    _, found = PGD(scores, 0.3, 3, 0.02, restarts=20).perturb(x, 0, return_details=True)
    assert not missed.fooled.item()
    assert found.fooled.item()
    assert once < x


def test_the_best_iterate_is_kept() -> None:
    # A step of .2 over a loss that peaks .1 away: the second step is back where it began.
    def scores(x: Tensor) -> Tensor:
        return torch.cat([1 + (x - 0.6).abs(), torch.zeros_like(x)], dim=1)

    x = torch.tensor([[0.45]])
    kept = PGD(scores, 0.4, 2, 0.2, quantize=False).perturb(x, 0)
    last = PGD(scores, 0.4, 2, 0.2, quantize=False, keep_best=False).perturb(x, 0)
    torch.testing.assert_close(kept, torch.tensor([[0.65]]))
    torch.testing.assert_close(last, torch.tensor([[0.45]]))


def test_an_early_stop_never_fools_fewer(net: PixelNet, x: Tensor) -> None:
    _, some = PGD(net, 0.1, 5).perturb(x, return_details=True)
    _, every = PGD(net, 0.1, 5, early_stop=False, keep_best=False).perturb(x, return_details=True)
    assert (some.fooled | ~every.fooled).all()
    assert (some.forward_passes <= every.forward_passes + 2).all()


def test_the_least_likely_class_is_aimed_at(net: PixelNet, x: Tensor) -> None:
    least = net(x).argmin(dim=1)
    _, details = LeastLikelyClass(net, 0.2).perturb(x, return_details=True)
    assert torch.equal(details.label, least)
    found = LeastLikelyClass(net, 0.2, early_stop=False).perturb(x)
    expected = FGSM(net, 0.2, early_stop=False).perturb(x, least, targeted=True)
    assert torch.equal(found, expected)


# min(eps + 4, 1.25 eps) levels, rounded up
@pytest.mark.parametrize(("levels", "steps"), [(2, 3), (8, 10), (16, 20), (32, 36), (0, 0)])
def test_the_iterated_attack_takes_as_many_steps_as_levels_allow(levels: int, steps: int) -> None:
    model = linear([1.0], [-1.0])
    x = torch.tensor([[1.0]])
    attack = LeastLikelyClass(model, levels / 255, steps=None)
    found, details = attack.perturb(x, return_details=True)
    assert details.backward_passes.tolist() == [steps]
    torch.testing.assert_close(found, 1 - torch.tensor([[min(levels, steps) / 255]]))


def test_the_map_of_the_most_likely_class_by_hand() -> None:
    model = linear([2.0, -1.0, 0.0], [0.0, 0.0, 0.0])
    x = torch.tensor([[0.5, 0.0, 0.3]])  # scores (1, 0)
    found = most_likely_class_map(model, x)
    assert found.classes.tolist() == [0]
    assert found.sign.tolist() == [[1.0, -1.0, 0.0]]
    torch.testing.assert_close(found.magnitude, torch.tensor([[2.0, 1.0, 0.0]]))
    of_other = most_likely_class_map(model, x, target=1)
    assert of_other.sign.tolist() == [[-1.0, 1.0, 0.0]]


def test_equal_scores_leave_another_class_than_the_label_to_aim_at(
    net: PixelNet, x: Tensor
) -> None:
    attack = LeastLikelyClass(lambda images: 0 * net(images))
    result, details = attack.perturb(x, return_details=True)
    assert torch.equal(result, x)
    assert (details.label != 0).all()
    assert not details.fooled.any()


def wrong(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        make()


def test_wrong_options_are_named(net: PixelNet, x: Tensor) -> None:
    wrong(lambda: PGD(net, steps=-1), "steps")
    wrong(lambda: PGD(net, steps=2.5), "steps")  # type: ignore[arg-type]
    wrong(lambda: PGD(net, step_size=0.0), "step_size")
    wrong(lambda: PGD(net, norm="L1"), "norm")
    wrong(lambda: PGD(net, restarts=0), "restarts")
    wrong(lambda: PGD(net, momentum=-1.0), "momentum")
    wrong(lambda: PGD(net, samples=2), "samples")
    wrong(lambda: PGD(net, bounds=(1, 0)), "bounds")
    wrong(lambda: PGD(net, epsilon=-0.1), "epsilon")
    wrong(lambda: PGD(net, epsilon=8.0), "epsilon")  # levels instead of pixel units
    wrong(lambda: LeastLikelyClass(net, steps=None, step_size=0.1), "steps")
    wrong(lambda: LeastLikelyClass(net).perturb(x, 1, targeted=True), "targeted")
    wrong(lambda: PGD(net, loss_func=F.cross_entropy).perturb(x), "loss_func")
    wrong(lambda: most_likely_class_map(net, x[:0]), "inputs")
    wrong(lambda: PGD(net, seed=-1), "seed")
    wrong(lambda: PGD(net, seed=0.5), "seed")  # type: ignore[arg-type]
    wrong(lambda: PGD(net, epsilon=None).perturb(x), "epsilon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^loss_func: expected a function or None, got str"):
        PGD(net, loss_func="cross_entropy")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^transform: expected a function or None, got int"):
        PGD(net, transform=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^inputs: expected floating point"):
        most_likely_class_map(net, x.byte())


@pytest.mark.parametrize("make", [FGSM, PGD, LeastLikelyClass])
def test_a_head_on_another_device_gives_the_same(
    make: Callable[..., PGD], net: PixelNet, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(net).perturb(x, [0, 1, 2])
    moved(net.head)
    net.pool.register_forward_hook(lambda _, args, output: output.to(ELSEWHERE))
    with another_device(monkeypatch):
        found = make(net).perturb(x, [0, 1, 2])
    assert torch.equal(found, expected)
