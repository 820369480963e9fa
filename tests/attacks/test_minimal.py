from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.robust import MinParamPerturbation
from torch import Tensor, nn

from captum_robust.attacks import Attack, DeepFool, LBFGSAttack, deepfool


def linear(weight: list[list[float]]) -> nn.Linear:
    net = nn.Linear(len(weight[0]), len(weight), bias=False)
    net.weight.data = torch.tensor(weight)
    return net.eval()


# The margin of class 0 over class 1 is 3 a + 4 b, so its gradient has the L2 norm 5, the L1 norm 7.
TWO = linear([[3.0, 4.0], [0.0, 0.0]])
POINT = torch.tensor([[0.2, 0.1]])  # a margin of 1: 1/5 away in L2, 1/7 in Linf

# From (.5, .5) class 1 has the smaller gap, 1 less .6, but class 2 the nearer boundary.
THREE = linear([[1.0, 1.0], [0.7, 0.5], [-1.0, 2.0]])


@pytest.fixture
def steep() -> nn.Sequential:
    """A net that small changes of an image fool."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Softplus(beta=5),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 12),
        nn.Tanh(),
        nn.Linear(12, 15),
    ).eval()


@pytest.fixture
def images() -> Tensor:
    drawn = torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    return (drawn * 255).round() / 255


@pytest.fixture
def adv_lib_deepfool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    # adv-lib imports visdom for its plots, which nothing here draws.
    monkeypatch.setitem(sys.modules, "visdom", types.ModuleType("visdom"))
    pytest.importorskip("adv_lib")
    from adv_lib.attacks.deepfool import df

    return df


def predicted(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(dim=1)


def by_foolbox(net: nn.Module, x: Tensor, label: Tensor, norm: str, **options: Any) -> Tensor:
    foolbox = pytest.importorskip("foolbox")
    attack = {
        "L2": foolbox.attacks.L2DeepFoolAttack,
        "Linf": foolbox.attacks.LinfDeepFoolAttack,
    }[norm]
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    return attack(**options).run(model, x.clone(), label)


def l2(change: Tensor) -> Tensor:
    return change.flatten(1).norm(dim=1)


def test_on_a_linear_model_one_step_is_the_closed_form() -> None:
    attack = DeepFool(TWO, bounds=None, refine=0)
    found, details = attack.perturb(POINT, return_details=True)
    length = 1.02 * (1 / 5 + 1e-4)
    torch.testing.assert_close(found, POINT - length * torch.tensor([[0.6, 0.8]]))
    assert details.fooled.all()
    assert details.backward_passes.tolist() == [1]
    assert details.forward_passes.tolist() == [2]

    attack = DeepFool(TWO, "Linf", bounds=None, refine=0)
    torch.testing.assert_close(attack.perturb(POINT), POINT - 1.02 * (1 / 7 + 1e-4))


@pytest.mark.parametrize(("norm", "distance"), [("L2", 1 / 5), ("Linf", 1 / 7)])
def test_refined_it_is_no_longer_than_the_distance_needs(norm: str, distance: float) -> None:
    attack = DeepFool(TWO, norm, bounds=None)
    _, details = attack.perturb(POINT, return_details=True)
    assert details.fooled.all()
    length = details.l2 if norm == "L2" else details.linf
    assert distance < float(length) < 1.02 * (distance + 1e-4)


def test_the_nearest_boundary_is_not_that_of_the_smallest_gap() -> None:
    x = torch.tensor([[0.5, 0.5]])
    # Class 1: gap .4, gradient (-.3, -.5); class 2: gap .5, gradient (-2, 1).
    distances = [0.4 / (0.3**2 + 0.5**2) ** 0.5, 0.5 / 5**0.5]
    assert distances[1] < distances[0]
    found, details = DeepFool(THREE, bounds=None, refine=0).perturb(x, return_details=True)
    assert details.predicted.tolist() == [2]
    expected = 1.02 * (distances[1] + 1e-4) * torch.tensor([[-2.0, 1.0]]) / 5**0.5
    torch.testing.assert_close(found - x, expected)


def test_only_the_candidates_are_tried() -> None:
    _, details = DeepFool(THREE, bounds=None, candidates=2).perturb(
        torch.tensor([[0.5, 0.5]]), return_details=True
    )
    assert details.predicted.tolist() == [1]


def test_targeted_it_goes_to_the_target() -> None:
    attack = DeepFool(THREE, bounds=None)
    _, details = attack.perturb(
        torch.tensor([[0.5, 0.5]]), target=1, targeted=True, return_details=True
    )
    assert details.predicted.tolist() == [1]
    assert details.fooled.all()


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_the_first_iterate_is_foolboxs(norm: str, steep: nn.Sequential, images: Tensor) -> None:
    label = predicted(steep, images)
    theirs = by_foolbox(steep, images, label, norm, steps=1, candidates=10, overshoot=0.02)
    ours = DeepFool(steep, norm, max_iterations=1, refine=0).perturb(images, label)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_without_refinement_the_result_is_foolboxs(
    norm: str, steep: nn.Sequential, images: Tensor
) -> None:
    label = predicted(steep, images)
    theirs = by_foolbox(steep, images, label, norm, steps=50, candidates=10, overshoot=0.02)
    ours = DeepFool(steep, norm, refine=0).perturb(images, label)
    assert (predicted(steep, ours) != label).all()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_without_refinement_the_length_is_adv_libs(
    steep: nn.Sequential, images: Tensor, adv_lib_deepfool: Callable[..., Tensor]
) -> None:
    label = predicted(steep, images)
    theirs = adv_lib_deepfool(steep, images, label, steps=50)  # over all 15 classes
    ours = DeepFool(steep, candidates=15, refine=0).perturb(images, label)
    # It clips after each step, so the two differ where a pixel meets the bounds.
    torch.testing.assert_close(l2(ours - images), l2(theirs - images), rtol=0.02, atol=0)


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_refinement_shortens(norm: str, steep: nn.Sequential, images: Tensor) -> None:
    _, plain = DeepFool(steep, norm, refine=0).perturb(images, return_details=True)
    _, refined = DeepFool(steep, norm, refine=2).perturb(images, return_details=True)
    assert plain.fooled.all()
    assert refined.fooled.all()
    before, after = (d.l2 if norm == "L2" else d.linf for d in (plain, refined))
    assert (after <= before).all()
    assert after.mean() < before.mean()


def test_leaving_classes_out_changes_nothing_here(
    steep: nn.Sequential, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = DeepFool(steep, refine=0)
    quick, of_quick = attack.perturb(images, return_details=True)
    monkeypatch.setattr(deepfool, "_SLACK", 1e9)
    full, of_full = attack.perturb(images, return_details=True)
    torch.testing.assert_close(quick, full, atol=1e-6, rtol=1e-4)
    assert of_quick.backward_passes.sum() < of_full.backward_passes.sum()
    assert (of_full.backward_passes % 9 == 0).all()  # all 9 others of the 10 candidates


def test_lbfgs_reaches_the_distance_of_a_linear_model() -> None:
    attack = LBFGSAttack(TWO, bounds=None, searches=12)
    found, details = attack.perturb(POINT, return_details=True)
    assert details.fooled.all()
    torch.testing.assert_close(found - POINT, torch.tensor([[-0.12, -0.16]]), atol=2e-3, rtol=0)
    assert 0.2 < float(details.l2) < 0.202
    assert int(details.backward_passes) <= 1 + 12 * 25
    assert int(details.forward_passes) <= 1 + 12 * 25 + 3


def test_lbfgs_finds_the_nearest_point_within_the_bounds() -> None:
    # The margin 3 a + 4 b - .6 of (.3, .1) is .7. Straight to the boundary b would fall by .112,
    # to below 0; so it stops there, and 3 a = .6.
    net = linear([[3.0, 4.0], [0.0, 0.0]])
    net.bias = nn.Parameter(torch.tensor([-0.6, 0.0]))
    x = torch.tensor([[0.3, 0.1]])
    found, details = LBFGSAttack(net, searches=12).perturb(x, return_details=True)
    assert details.fooled.all()
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.0]]), atol=2e-3, rtol=0)


def test_lbfgs_is_as_short_as_deepfool_where_the_loss_is_the_margin(
    steep: nn.Sequential, images: Tensor
) -> None:
    def sharp(x: Tensor) -> Tensor:  # scores far apart: the cross-entropy is that of two classes
        return 20 * steep(x)

    _, slow = LBFGSAttack(sharp).perturb(images, return_details=True)
    _, quick = DeepFool(sharp, refine=0).perturb(images, return_details=True)
    assert slow.fooled.all()
    assert slow.l2.mean() < 1.1 * quick.l2.mean()


def test_lbfgs_targeted_reaches_the_target(steep: nn.Sequential, images: Tensor) -> None:
    with torch.no_grad():
        target = steep(images).topk(3, dim=1).indices[:, 2]
    found, details = LBFGSAttack(steep).perturb(images, target, targeted=True, return_details=True)
    assert details.fooled.all()
    assert torch.equal(predicted(steep, found), target)


def deepfool_linf(forward_func: Callable[..., Tensor], **options: Any) -> Attack:
    return DeepFool(forward_func, "Linf", **options)


attacks = pytest.mark.parametrize("make", [DeepFool, deepfool_linf, LBFGSAttack])


@attacks
def test_batch_equals_one_by_one(
    make: Callable[..., Attack], steep: nn.Sequential, images: Tensor
) -> None:
    # In double precision: the decisions of a line search are not those of another rounding.
    attack, x = make(steep.double()), images.double()
    label = predicted(steep, x)
    label[2] = (label[2] + 1) % 15  # misclassified
    together = attack.perturb(x, label)
    alone = [attack.perturb(x[i : i + 1], label[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    assert torch.equal(together[2], x[2])
    assert (predicted(steep, together) != label).all()


@attacks
def test_the_label_stays_lost_in_eight_bits(
    make: Callable[..., Attack], steep: nn.Sequential, images: Tensor
) -> None:
    label = predicted(steep, images)
    found, details = make(steep, quantize=True).perturb(images, label, return_details=True)
    assert details.fooled.all()
    torch.testing.assert_close(found, (found * 255).round() / 255, atol=1e-6, rtol=0)
    assert (predicted(steep, (found * 255).round().to(torch.uint8) / 255) != label).all()


def test_a_change_that_rounding_would_undo_is_enlarged() -> None:
    # Every pixel has to fall by .13 of an 8-bit level, and none can by less than one.
    x = torch.full((1, 400), 128 / 255)
    mean = nn.Linear(400, 2)
    mean.weight.data = torch.stack([torch.ones(400), torch.zeros(400)])
    mean.bias.data = torch.tensor([0.0, 400 * (128 - 0.13) / 255])
    plain = DeepFool(mean).perturb(x)
    assert predicted(mean, plain).tolist() == [1]
    assert predicted(mean, (plain * 255).round() / 255).tolist() == [0]
    found = DeepFool(mean, quantize=True).perturb(x)
    torch.testing.assert_close(found, torch.full((1, 400), 127 / 255))


@attacks
def test_a_mask_and_epsilon_hold(
    make: Callable[..., Attack], steep: nn.Sequential, images: Tensor
) -> None:
    mask = torch.zeros(1, 1, 10, 10)
    mask[..., 3:] = 1
    found, details = make(steep).perturb(images, mask=mask, return_details=True)
    assert torch.equal(found[..., :3], images[..., :3])
    assert details.fooled.any()
    attack = make(steep)
    _, free = attack.perturb(images, return_details=True)
    length = free.linf if attack.norm == "Linf" else free.l2
    middle = float(length.median())
    _, limited = attack.perturb(images, epsilon=middle, return_details=True)
    found_length = limited.linf if attack.norm == "Linf" else limited.l2
    assert (found_length <= middle + 1e-6).all()
    assert torch.equal(limited.fooled, length <= middle)


@attacks
def test_a_tuple_is_changed_as_one_input(
    make: Callable[..., Attack], steep: nn.Sequential, images: Tensor
) -> None:
    def joined(left: Tensor, right: Tensor) -> Tensor:
        return steep(torch.cat([left, right], dim=3))

    parts = (images[..., :4].contiguous(), images[..., 4:].contiguous())
    found, details = make(joined).perturb(parts, return_details=True)
    _, of_whole = make(steep).perturb(images, return_details=True)
    assert details.fooled.all()
    assert found[0].shape == parts[0].shape
    torch.testing.assert_close(details.l2, of_whole.l2, rtol=0.05, atol=0)


@attacks
def test_autocast_and_frozen_parameters(
    make: Callable[..., Attack], steep: nn.Sequential, images: Tensor
) -> None:
    steep.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        label = predicted(steep, images)
        found, details = make(steep).perturb(images, label, return_details=True)
        assert (predicted(steep, found) != label).all()
    assert details.fooled.all()
    assert found.dtype == images.dtype
    _, exact = make(steep).perturb(images, label, return_details=True)
    # Half precision rounds the margins, but hides no step.
    torch.testing.assert_close(details.l2, exact.l2, rtol=0.3, atol=0.01)


@attacks
def test_without_a_gradient_the_sample_stays(make: Callable[..., Attack]) -> None:
    def flat(x: Tensor) -> Tensor:
        return torch.stack([x.sum(dim=1) * 0 + 1, x.sum(dim=1) * 0], dim=1)

    found, details = make(flat).perturb(POINT, return_details=True)
    assert torch.equal(found, POINT)
    assert not details.fooled.any()
    assert not details.already.any()


@attacks
def test_captums_harness_finds_the_length(
    make: Callable[..., Attack], steep: nn.Sequential, images: Tensor
) -> None:
    x, label = images[:1], predicted(steep, images[:1])
    attack = make(steep)
    _, details = attack.perturb(x, label, return_details=True)
    length = float(details.linf if attack.norm == "Linf" else details.l2)
    found, epsilon = MinParamPerturbation(
        steep,
        attack,
        arg_name="epsilon",
        arg_min=0.0,
        arg_max=4 * length,
        arg_step=length / 4,
        apply_before_preproc=True,
    ).evaluate(x, target=label, attack_kwargs={"target": label})
    assert predicted(steep, found) != label
    assert length <= epsilon <= 1.3 * length


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (DeepFool, {"candidates": 1}, "candidates: expected a whole number from 2, got 1"),
        (DeepFool, {"max_iterations": 0}, "max_iterations: expected a whole number from 1"),
        (DeepFool, {"overshoot": -0.1}, "overshoot: expected a number from 0, got -0.1"),
        (DeepFool, {"refine": -1}, "refine: expected a whole number from 0, got -1"),
        (DeepFool, {"norm": "L1"}, "norm: expected one of"),
        (LBFGSAttack, {"searches": 0}, "searches: expected a whole number from 1"),
        (LBFGSAttack, {"constant": 0}, "constant: expected a positive number, got 0"),
        (LBFGSAttack, {"history_size": 0}, "history_size: expected a whole number from 1"),
    ],
)
def test_wrong_options_are_named(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(TWO, **options)


@pytest.mark.data
def test_photographs_need_less_than_by_foolbox(
    real_data: Path, adv_lib_deepfool: Callable[..., Tensor]
) -> None:
    from captum_robust.data import load_dataset, resize
    from captum_robust.models import load_classifier

    model = load_classifier("efficientnet_lite0")
    dataset = load_dataset("imagenet", real_data / "imagenet-val-400")
    samples = [resize(dataset[i], model.input_size) for i in range(2)]
    x = torch.stack([s.image for s in samples])
    label = predicted(model, x)
    theirs = by_foolbox(model, x, label, "L2", steps=50, candidates=10, overshoot=0.02)
    plain = DeepFool(model, refine=0).perturb(x, label)
    refined, details = DeepFool(model).perturb(x, label, return_details=True)
    assert details.fooled.all()
    torch.testing.assert_close(l2(plain - x), l2(theirs - x), rtol=0.02, atol=0)
    assert l2(refined - x).mean() < 0.95 * l2(theirs - x).mean()


def test_searches_run_without_autocast_and_what_they_find_fools_under_it(
    steep: nn.Sequential, images: Tensor
) -> None:
    # Of ten photographs, searches under autocast fooled four.
    seen: list[torch.dtype] = []

    def model(x: Tensor) -> Tensor:
        scores: Tensor = steep(x)
        seen.append(scores.dtype)
        return scores

    with torch.autocast("cpu", dtype=torch.bfloat16):
        label = predicted(steep, images)
        found, details = LBFGSAttack(model).perturb(images, label, return_details=True)
        assert (predicted(steep, found) != label).all()
    assert details.fooled.all()
    half, single = torch.bfloat16, torch.float32
    first, last = seen.index(single), len(seen) - seen[::-1].index(single)
    assert seen == [half] * first + [single] * (last - first) + [half] * (len(seen) - last)
    assert first == 1
    assert last < len(seen)
