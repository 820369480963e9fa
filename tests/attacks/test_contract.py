"""What holds for every attack that follows labels. An attack joins by one line in CASES.

UniversalPerturbation, FoolingImage and ExplanationAttack keep other promises: see their tests.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from captum.robust import AttackComparator, MinParamPerturbation, Perturbation
from torch import Tensor, nn

from captum_robust.attacks import (
    FGSM,
    PGD,
    Attack,
    DeepFool,
    EnsembleTransfer,
    GradientStep,
    LBFGSAttack,
    LeastLikelyClass,
)
from tests.networks import PixelNet, Rounding, quantised


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[..., Attack]  # forward_func -> attack
    epsilon: float = 0.25  # a strength at which the attack of the small net succeeds at times
    ball: str | None = "Linf"  # the norm that epsilon limits
    targeted: bool = True  # whether it can be aimed
    needs_gradients: bool = True
    early_stop: bool = True  # a misclassified image is left alone
    leaves_label: bool = True  # raises its loss; others lower that of another class
    rounding: float = 1e-5  # between batches of other sizes; a level where levels are searched


CASES = [
    Case("fgsm", FGSM),
    Case("fgsm_l2", lambda f: FGSM(f, norm="L2"), epsilon=2.0, ball="L2"),
    Case("pgd", lambda f: PGD(f, steps=4)),
    Case("pgd_l2", lambda f: PGD(f, steps=4, norm="L2"), epsilon=2.0, ball="L2"),
    Case("pgd_random_start", lambda f: PGD(f, steps=3, random_start=True, restarts=2)),
    Case(
        "pgd_l2_random_start",
        lambda f: PGD(f, steps=3, norm="L2", random_start=True),
        epsilon=2.0,
        ball="L2",
    ),
    Case("pgd_momentum", lambda f: PGD(f, steps=4, momentum=0.9)),
    Case(
        "pgd_all_steps",
        lambda f: PGD(f, steps=3, early_stop=False, keep_best=False),
        early_stop=False,
    ),
    Case("gradient_step", GradientStep, epsilon=30.0, ball=None),
    Case("least_likely", LeastLikelyClass, targeted=False, leaves_label=False),
    Case(
        "least_likely_iterated",
        lambda f: LeastLikelyClass(f, steps=None),
        targeted=False,
        leaves_label=False,
    ),
    Case("ensemble", lambda f: EnsembleTransfer([f], steps=4, early_stop=True)),
    Case(
        "ensemble_all_steps",
        lambda f: EnsembleTransfer([f, lambda *x: f(*x) / 2], steps=3),
        early_stop=False,
    ),
    Case("deepfool", DeepFool, epsilon=2.0, ball="L2"),
    Case("deepfool_linf", lambda f: DeepFool(f, "Linf")),
    Case(
        "deepfool_bytes",
        lambda f: DeepFool(f, quantize=True),
        epsilon=2.0,
        ball="L2",
        rounding=1 / 255,
    ),
    # Rounding grows with every iteration, so few; many are compared in test_minimal.py.
    Case(
        "lbfgs",
        lambda f: LBFGSAttack(f, searches=2, max_iterations=3),
        epsilon=2.0,
        ball="L2",
        leaves_label=False,
        rounding=1e-4,  # its steps amplify that of the scores
    ),
]

cases = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])


def those(which: Callable[[Case], bool]) -> Any:
    """The cases that a claim is about."""
    chosen = [c for c in CASES if which(c)]
    return pytest.mark.parametrize("case", chosen, ids=[c.name for c in chosen])


aimed = those(lambda c: c.targeted)


def predicted(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(dim=1)


def length(change: Tensor, norm: str) -> float:
    rows = change.flatten(1)
    return float((rows.abs().amax(dim=1) if norm == "Linf" else rows.norm(dim=1)).max())


@cases
def test_is_a_perturbation_with_captums_keywords(case: Case, net: PixelNet) -> None:
    attack = case.make(net)
    assert isinstance(attack, Perturbation)
    names = list(inspect.signature(attack.perturb).parameters)
    assert names[:6] == [
        "inputs", "target", "epsilon", "additional_forward_args", "targeted", "mask",
    ]  # fmt: skip
    assert hasattr(type(attack).perturb, "__wrapped__")  # @log_usage


@cases
def test_result_is_a_detached_image_in_the_ball(case: Case, net: PixelNet, x: Tensor) -> None:
    result = case.make(net).perturb(x, predicted(net, x), epsilon=case.epsilon)
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    assert not result.requires_grad
    assert result.is_contiguous()
    assert result.amin() >= 0
    assert result.amax() <= 1
    assert not torch.equal(result, x)
    if case.ball is not None:
        assert length(result - x, case.ball) <= case.epsilon + 1e-6


@those(lambda c: c.leaves_label)
def test_the_loss_of_the_label_grows(case: Case, net: PixelNet, x: Tensor) -> None:
    label = predicted(net, x)
    result = case.make(net).perturb(x, label, epsilon=case.epsilon)
    entropy = nn.CrossEntropyLoss(reduction="none")
    with torch.no_grad():
        before, after = entropy(net(x), label), entropy(net(result), label)
    assert (after > before).any()
    assert (after >= before).all()


@aimed
def test_the_loss_of_the_target_falls(case: Case, net: PixelNet, x: Tensor) -> None:
    target = (predicted(net, x) + 1) % 6
    result = case.make(net).perturb(x, target, epsilon=case.epsilon, targeted=True)
    entropy = nn.CrossEntropyLoss(reduction="none")
    with torch.no_grad():
        assert (entropy(net(result), target) < entropy(net(x), target)).all()


@cases
def test_each_form_of_target_is_read(case: Case, net: PixelNet, x: Tensor) -> None:
    attack = case.make(net)
    same = torch.full((3,), int(predicted(net, x)[0]))
    expected = attack.perturb(x, same, epsilon=case.epsilon)
    for form in (int(same[0]), same[:1], same.tolist()):
        assert torch.equal(attack.perturb(x, form, epsilon=case.epsilon), expected)


@cases
def test_without_a_target_it_is_the_prediction(case: Case, net: PixelNet, x: Tensor) -> None:
    attack = case.make(net)
    expected = attack.perturb(x, predicted(net, x), epsilon=case.epsilon)
    assert torch.equal(attack.perturb(x, epsilon=case.epsilon), expected)


@cases
def test_scores_with_more_dimensions_take_tuples(case: Case, x: Tensor) -> None:
    torch.manual_seed(0)
    flat = PixelNet(classes=24).eval()

    def grid(images: Tensor) -> Tensor:
        return flat(images).reshape(-1, 4, 2, 3)

    def of_one_place(images: Tensor) -> Tensor:
        return grid(images)[:, :, 1, 2]

    label = int(predicted(of_one_place, x)[0])  # type: ignore[arg-type]
    expected = case.make(of_one_place).perturb(x, label, epsilon=case.epsilon)
    found = case.make(grid).perturb(x, (label, 1, 2), epsilon=case.epsilon)
    torch.testing.assert_close(found, expected)
    found = case.make(grid).perturb(x, [(label, 1, 2)] * 3, epsilon=case.epsilon)
    torch.testing.assert_close(found, expected)


@cases
def test_a_tuple_is_mirrored_with_a_tuple(case: Case, net: PixelNet, x: Tensor) -> None:
    other = x.flip(3) / 4
    first, second = case.make(net).perturb((x, other), epsilon=case.epsilon)
    assert first.shape == second.shape == x.shape
    assert not torch.equal(first, x)
    assert not torch.equal(second, other)
    if case.ball == "L2":  # one ball holds both
        assert length(torch.cat([first - x, second - other], 1), "L2") <= case.epsilon + 1e-6


@cases
def test_a_mask_keeps_the_rest_as_it_was(case: Case, net: PixelNet, x: Tensor) -> None:
    mask = torch.zeros(1, 1, 12, 16)
    mask[..., 4:] = 1
    result = case.make(net).perturb(x, epsilon=case.epsilon, mask=mask)
    assert torch.equal(result[..., :4], x[..., :4])
    assert not torch.equal(result, x)


@cases
def test_additional_forward_args_follow_their_samples(case: Case, net: PixelNet, x: Tensor) -> None:
    attack = case.make(net)
    other = x.flip(0) / 4

    def alone(i: int) -> Tensor:
        one = slice(i, i + 1)
        return attack.perturb(
            x[one], epsilon=case.epsilon, additional_forward_args=(other[one], 0.5)
        )

    found = attack.perturb(x, epsilon=case.epsilon, additional_forward_args=(other, 0.5))
    torch.testing.assert_close(
        found, torch.cat([alone(i) for i in range(3)]), atol=case.rounding, rtol=0
    )


@cases
def test_batch_equals_one_by_one(case: Case, net: PixelNet, x: Tensor) -> None:
    attack = case.make(net)
    label = predicted(net, x)
    label[1] = (label[1] + 1) % 6  # misclassified
    together, details = attack.perturb(x, label, epsilon=case.epsilon, return_details=True)
    for i in range(3):
        one = slice(i, i + 1)
        alone, of_alone = attack.perturb(
            x[one], label[one], epsilon=case.epsilon, return_details=True
        )
        torch.testing.assert_close(together[one], alone, atol=case.rounding, rtol=0)
        assert bool(details.fooled[i]) == bool(of_alone.fooled[0])
        assert int(details.predicted[i]) == int(of_alone.predicted[0])


@those(lambda c: c.early_stop)
def test_a_misclassified_image_comes_back_as_it_was(case: Case, net: PixelNet, x: Tensor) -> None:
    attack = case.make(net)
    wrong = (predicted(net, x) + 1) % 6
    result, details = attack.perturb(x, wrong, epsilon=case.epsilon, return_details=True)
    assert torch.equal(result, x)
    assert details.already.all()
    assert not details.fooled.any()


@cases
def test_details_say_what_the_bytes_say(case: Case, net: PixelNet, x: Tensor) -> None:
    label = predicted(net, x)
    result, details = case.make(net).perturb(x, epsilon=case.epsilon, return_details=True)
    found = predicted(net, (result * 255).round() / 255)
    assert torch.equal(details.predicted, found)
    assert not details.already.any()
    if case.targeted:
        assert torch.equal(details.label, label)
        assert torch.equal(details.fooled, found != label)
    torch.testing.assert_close(details.linf, (result - x).flatten(1).abs().amax(dim=1))
    torch.testing.assert_close(details.l2, (result - x).flatten(1).norm(dim=1))


@cases
def test_without_strength_nothing_changes(case: Case, net: PixelNet, x: Tensor) -> None:
    assert torch.equal(case.make(net).perturb(x, epsilon=0.0), x)


@cases
def test_the_same_call_gives_the_same_images(case: Case, net: PixelNet, x: Tensor) -> None:
    attack = case.make(net)
    first = attack.perturb(x, epsilon=case.epsilon)
    torch.rand(7)
    assert torch.equal(attack.perturb(x, epsilon=case.epsilon), first)


@cases
@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_world_is_left_as_it_was(
    case: Case, net: PixelNet, x: Tensor, fails: bool
) -> None:
    net.train()
    net.head.eval()
    net.conv1.weight.requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = x.clone().requires_grad_()
    before = x.detach().clone()
    random_state = torch.get_rng_state()
    attack = case.make(net)
    calls = 0

    def failing(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("half-way")
        return net(*args)

    if fails:
        attack.forward_func = failing
    try:
        attack.perturb(x, epsilon=case.epsilon)
    except KeyError:
        assert fails
    assert x.grad is None
    assert x.requires_grad
    assert torch.equal(x.detach(), before)
    assert net.training
    assert not net.head.training
    assert not net.conv1.weight.requires_grad
    assert all(p.requires_grad for p in list(net.parameters())[1:])
    assert all((p.grad == 1).all() for p in net.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in net.parameters())
    assert not any(
        [*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks] for m in net.modules()
    )
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)


@cases
def test_grad_mode_and_frozen_parameters_do_not_matter(
    case: Case, net: PixelNet, x: Tensor
) -> None:
    attack = case.make(net)
    expected = attack.perturb(x, epsilon=case.epsilon)
    with torch.no_grad():
        assert torch.equal(attack.perturb(x, epsilon=case.epsilon), expected)
    with torch.inference_mode():
        assert torch.equal(attack.perturb(x.clone(), epsilon=case.epsilon), expected)
    net.requires_grad_(False)
    assert torch.equal(attack.perturb(x, epsilon=case.epsilon), expected)


@cases
def test_memory_format_channels_and_autocast(case: Case, net: PixelNet, x: Tensor) -> None:
    attack = case.make(net)
    expected = attack.perturb(x, epsilon=case.epsilon)
    strided = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(attack.perturb(strided, epsilon=case.epsilon), expected)
    grey = PixelNet(channels=1).eval()
    assert case.make(grey).perturb(x[:, :1], epsilon=case.epsilon).shape == (3, 1, 12, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attack.perturb(x, epsilon=case.epsilon)
    assert result.dtype == x.dtype
    assert torch.isfinite(result).all()


@cases
def test_a_model_may_write_to_its_inputs(case: Case) -> None:
    torch.manual_seed(0)
    grey = PixelNet(channels=1).eval()
    x = torch.rand(2, 1, 12, 16)  # one channel: in channels_last and as it is the same memory
    before = x.clone()
    found = case.make(lambda images: grey(images.mul_(0.5))).perturb(x, epsilon=case.epsilon)
    expected = case.make(lambda images: grey(images * 0.5)).perturb(x, epsilon=case.epsilon)
    assert torch.equal(x, before)
    assert torch.equal(found, expected)


@cases
def test_one_logit_is_that_of_class_1_of_two(case: Case, x: Tensor) -> None:
    torch.manual_seed(0)
    one = PixelNet(classes=1).eval()
    with torch.no_grad():
        one.head.bias -= one(x).mean()  # so that there are images of both classes

    def two(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(one(x)), one(x)], dim=1)

    expected, same = case.make(two).perturb(x, epsilon=case.epsilon, return_details=True)
    for model in (one, lambda x: one(x)[:, 0]):
        found, details = case.make(model).perturb(x, epsilon=case.epsilon, return_details=True)
        torch.testing.assert_close(found, expected, atol=2 * case.rounding, rtol=0)
        assert torch.equal(details.label, same.label)
        assert torch.equal(details.fooled, same.fooled)
    assert details.label.unique().tolist() == [0, 1]


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_network_of_another_precision_is_attacked_in_its_own(
    case: Case, net: PixelNet, x: Tensor, dtype: torch.dtype
) -> None:
    expected = case.make(net).perturb(x, epsilon=case.epsilon)
    result = case.make(copy.deepcopy(net).to(dtype)).perturb(x.to(dtype), epsilon=case.epsilon)
    assert result.dtype == dtype
    assert result.isfinite().all()
    assert not torch.equal(result, x.to(dtype))
    if case.ball is not None:  # to the last bit, of which half precision has few
        change = result.double() - x.to(dtype).double()
        assert length(change, case.ball) <= case.epsilon * (1 + 1e-6)
    if dtype == torch.float64:
        torch.testing.assert_close(result.float(), expected, atol=10 * case.rounding, rtol=0)


@those(lambda c: c.needs_gradients)
def test_a_frozen_int8_head_is_refused_by_name(case: Case, net: PixelNet, x: Tensor) -> None:
    net.head = quantised(net.head)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient flows from its scores to the inputs"):
        case.make(net).perturb(x, epsilon=case.epsilon)


@cases
def test_arguments_of_inference_mode_are_taken(case: Case, net: PixelNet, x: Tensor) -> None:
    attack = case.make(lambda images, factor: net(images * factor))
    expected = attack.perturb(x, epsilon=case.epsilon, additional_forward_args=x.flip(0))
    with torch.inference_mode():
        found = attack.perturb(x, epsilon=case.epsilon, additional_forward_args=x.flip(0))
    assert torch.equal(found, expected)


@cases
def test_no_gradient_in_half_precision_changes_nothing(
    case: Case, net: PixelNet, x: Tensor
) -> None:
    half = x.half()
    attack = case.make(lambda images: net(images.float()))
    found = attack.perturb(half, epsilon=case.epsilon, mask=torch.zeros(1, 1, 1, 1))
    assert found.dtype == torch.float16
    assert torch.equal(found, half)


@cases
def test_a_model_that_views_its_features_works(case: Case, x: Tensor) -> None:
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(4 * 3 * 4, 5)

    def viewing(images: Tensor) -> Tensor:
        features = conv(images)
        return head(features.view(len(features), -1))  # fails on channels_last

    result = case.make(viewing).perturb(x, epsilon=case.epsilon)
    assert result.is_contiguous()
    assert not torch.equal(result, x)


@cases
def test_captums_harnesses_take_it(case: Case, net: PixelNet, x: Tensor) -> None:
    label = predicted(net, x)
    attack = case.make(net)

    def accuracy(scores: Tensor, target: Tensor) -> Tensor:
        return (scores.argmax(dim=1) == target).float()

    comparator = AttackComparator(net, accuracy)
    comparator.add_attack(
        attack,
        "ours",
        attack_kwargs={"epsilon": case.epsilon},
        additional_attack_arg_names=["target"],
    )
    result = comparator.evaluate(x, target=label)
    assert result["Original"].tolist() == [1, 1, 1]
    attacked = attack.perturb(x, label, epsilon=case.epsilon)
    assert torch.equal(result["ours"]["mean"], accuracy(net(attacked), label))
    found, strength = MinParamPerturbation(
        net,
        attack,
        arg_name="epsilon",
        arg_min=0.0,
        arg_max=case.epsilon,
        arg_step=case.epsilon / 4,
        apply_before_preproc=True,
    ).evaluate(x[:1], target=label[:1], attack_kwargs={"target": label[:1]})
    if found is not None:
        assert strength > 0
        assert predicted(net, found)[0] != label[0]


def test_captums_harness_finds_the_least_epsilon_of_a_linear_model() -> None:
    # f = (x0 - x1 + .05, 0): the sign step lowers x0 - x1 by 2 epsilon.
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    model.bias.data = torch.tensor([0.05, 0.0])
    x = torch.tensor([[0.5, 0.45]])  # a margin of .1: fooled from an epsilon of .05 on
    harness = MinParamPerturbation(
        model,
        PGD(model, steps=3, quantize=False),
        arg_name="epsilon",
        arg_min=0.0,
        arg_max=0.2,
        arg_step=0.02,
    )
    _, epsilon = harness.evaluate(x, target=0, attack_kwargs={"target": 0})
    assert epsilon == pytest.approx(0.06)


@cases
def test_wrong_inputs_are_named(case: Case, net: PixelNet, x: Tensor) -> None:
    attack = case.make(net)
    with pytest.raises(ValueError, match="inputs: the batch is empty"):
        attack.perturb(x[:0])
    bad = x.clone()
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="inputs: NaN or infinity in sample 1"):
        attack.perturb(bad)
    bright = x.clone()
    bright[2, 0, 0, 0] = 1.5
    with pytest.raises(ValueError, match=r"inputs: sample 2 has values from .* to 1\.5"):
        attack.perturb(bright)
    with pytest.raises(TypeError, match="inputs: expected floating point"):
        attack.perturb((x * 255).to(torch.uint8))
    with pytest.raises(ValueError, match="mask"):
        attack.perturb(x, epsilon=case.epsilon, mask=torch.ones(5))
    with pytest.raises(ValueError, match="mask: expected zeros and ones"):
        attack.perturb(x, epsilon=case.epsilon, mask=torch.full_like(x, 0.5))
    with pytest.raises(ValueError, match="forward_func, scores: NaN or infinity in sample 2"):
        case.make(lambda t: net(t) / (torch.arange(len(t)) != 2)[:, None]).perturb(
            x, epsilon=case.epsilon
        )
    with pytest.raises(TypeError, match="forward_func"):
        case.make("resnet50")


@cases
@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf"), "much"])
def test_a_wrong_epsilon_is_named(case: Case, net: PixelNet, x: Tensor, epsilon: Any) -> None:
    with pytest.raises(ValueError, match="epsilon: expected"):
        case.make(net).perturb(x, epsilon=epsilon)


@those(lambda c: c.ball is not None)
def test_an_epsilon_above_the_range_is_named(case: Case, net: PixelNet, x: Tensor) -> None:
    above = 1.01 if case.ball == "Linf" else 1.01 * (3 * 12 * 16) ** 0.5
    with pytest.raises(ValueError, match="epsilon: expected a number from 0 to"):
        case.make(net).perturb(x, epsilon=above)


@cases
@pytest.mark.parametrize("target", [6, -1, [0, 1, 6], torch.tensor([0, 9, 1])])
def test_a_target_out_of_range_is_named(case: Case, net: PixelNet, x: Tensor, target: Any) -> None:
    with pytest.raises(ValueError, match=r"target: class .* the model has the classes 0 to 5"):
        case.make(net).perturb(x, target, epsilon=case.epsilon)


@aimed
def test_what_has_the_class_aimed_at_stays_as_it_is(case: Case, net: PixelNet, x: Tensor) -> None:
    aims = predicted(net, x)
    aims[1] = (aims[1] + 1) % 6
    options: dict[str, Any] = {"epsilon": case.epsilon, "targeted": True, "return_details": True}
    result, details = case.make(net).perturb(x, aims, **options)
    assert details.already.tolist() == [True, False, True]
    assert details.fooled.tolist()[::2] == [False, False]
    if case.early_stop:
        assert torch.equal(result[::2], x[::2])
    alone, _ = case.make(net).perturb(x[1:2], aims[1:2], **options)
    torch.testing.assert_close(result[1:2], alone, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="target: a targeted attack needs"):
        case.make(net).perturb(x, epsilon=case.epsilon, targeted=True)


@those(lambda c: c.needs_gradients)
def test_the_layer_that_breaks_the_graph_is_named(case: Case, x: Tensor) -> None:
    broken = nn.Sequential(nn.Conv2d(3, 2, 3), Rounding(), nn.Flatten(), nn.Linear(280, 4))
    with pytest.raises(ValueError, match=r"layer '1' \(Rounding\) breaks the graph"):
        case.make(broken).perturb(x, epsilon=1e-3)

    class Undifferentiable(PixelNet):
        def forward(self, x: Tensor, *_: Any) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(ValueError, match="no gradient flows from its scores"):
        case.make(Undifferentiable()).perturb(x, epsilon=1e-3)


@cases
@pytest.mark.parametrize(
    "form",
    [
        lambda y: y.to(torch.uint8),
        lambda y: y.to(torch.int16),
        lambda y: y.tolist(),
        lambda y: list(y.numpy()),
        lambda y: y.numpy(),
    ],
    ids=["uint8", "int16", "list", "numbers of numpy", "array"],
)
def test_labels_of_any_whole_numbers_are_taken(
    case: Case, form: Callable[[Tensor], Any], net: PixelNet, x: Tensor
) -> None:
    labels = predicted(net, x)
    found = case.make(net).perturb(x, form(labels), epsilon=case.epsilon)
    assert torch.equal(found, case.make(net).perturb(x, labels, epsilon=case.epsilon))
    with pytest.raises(TypeError, match=r"target: expected whole numbers, got torch\.float32"):
        case.make(net).perturb(x, labels.float(), epsilon=case.epsilon)


@cases
def test_inputs_that_rounding_moved_over_the_bounds_are_clipped(
    case: Case, net: PixelNet, x: Tensor
) -> None:
    over = x.clone()
    over[0, 0, 0, :2] = torch.tensor([-3e-8, 1.0000001])
    inside = over.clamp(0, 1)
    found, expected = (case.make(net).perturb(z, epsilon=case.epsilon) for z in (over, inside))
    assert torch.equal(found, expected)
    over[0, 0, 0, 0] = -1e-4
    with pytest.raises(ValueError, match=r"sample 0 has values from -0\.0001 to 1"):
        case.make(net).perturb(over, epsilon=case.epsilon)


@those(lambda c: c.needs_gradients)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_attacked_alike(
    case: Case, backend: str, net: PixelNet, x: Tensor
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend)
    found = case.make(compiled).perturb(x, epsilon=case.epsilon)
    expected = case.make(net).perturb(x, epsilon=case.epsilon)
    torch.testing.assert_close(found, expected, atol=case.rounding, rtol=0)
