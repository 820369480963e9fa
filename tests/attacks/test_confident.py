"""A classifier that is sure of its class is no more robust for it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, Saliency
from torch import nn

from captum_robust._scores import probabilities_of
from captum_robust.attacks import (
    FGSM,
    PGD,
    DeepFool,
    EnsembleTransfer,
    ExplanationAttack,
    GradientStep,
    LBFGSAttack,
    LeastLikelyClass,
    UniversalPerturbation,
    cross_entropy,
    fooling_rate,
    map_elites,
    most_likely_class_map,
    rank_analysis,
)
from captum_robust.attacks.backward import ScaleSearch
from captum_robust.attacks.losses import LOSSES, log_cross_entropy, units_of
from captum_robust.attacks.norms import NORMS
from captum_robust.training.adversarial import InnerAttack

FACTORS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3)


def ensemble(model, epsilon):
    return EnsembleTransfer([model, model], epsilon, early_stop=True)


def line(factor):
    """Two classes, apart by 2 · factor · (x₀ - x₁) / 2: at (.6, .4) an ε above .1 fools it."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = factor * torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    return model


POINT = torch.tensor([[0.6, 0.4]])


@pytest.mark.parametrize("factor", [1.0, 50.0, 100.0, 1e3, 1e6])
@pytest.mark.parametrize("attack", [FGSM, PGD, LeastLikelyClass])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_any_margin_is_crossed(factor, attack, norm):
    _, details = attack(line(factor), 0.2, norm=norm).perturb(POINT, 0, return_details=True)
    assert details.fooled.all()
    _, details = attack(line(factor), 0.05, norm=norm).perturb(POINT, 0, return_details=True)
    assert not details.fooled.any()
    assert not details.without_gradient.any()


def trained_with(classes, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.rand(200, 20)
        y = (x @ torch.randn(20, classes)).argmax(dim=1)
        net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, classes))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net, x, y


@pytest.fixture(scope="module")
def trained():
    return trained_with(classes=4, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_robust_accuracy_does_not_depend_on_a_factor_of_the_logits(trained, dtype):
    net, x, y = trained
    accuracies = []
    for factor in FACTORS:
        scaled = copy.deepcopy(net)
        scaled[2].weight.data *= factor
        scaled[2].bias.data *= factor
        scaled.to(dtype)
        attack = PGD(lambda z, scaled=scaled: scaled(z.to(dtype)), 8 / 255)
        _, details = attack.perturb(x, y, return_details=True)
        accuracies.append(float((~details.already & ~details.fooled).float().mean()))
    assert max(accuracies) - min(accuracies) <= 0.02
    assert 0.5 < max(accuracies) < 0.95


def test_training_attacks_a_network_that_is_sure():
    attacked = InnerAttack(epsilon=0.2, steps=10)(line(1e4), POINT, torch.tensor([0]), 0)
    assert line(1.0)(attacked).argmax(dim=1) == 1


def test_the_mean_over_draws_is_that_of_the_cross_entropy(trained):
    net, x, _ = trained
    scores = net(x[:6]).double().detach()
    classes = torch.zeros(6, dtype=torch.long)
    log = log_cross_entropy(scores, classes)
    torch.testing.assert_close(log.exp(), F.cross_entropy(scores, classes, reduction="none"))
    torch.testing.assert_close(cross_entropy(scores, classes), log.exp())


@pytest.mark.parametrize("z", [-1e4, -30.0, -10.0, -1.0, 0.0, 30.0, 1e4])
def test_the_logarithm_has_the_gradient_of_the_formula(z):
    scores = torch.tensor([[0.0, z]], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_cross_entropy(scores, torch.tensor([0])).sum(), scores)
    precise = torch.tensor(z, dtype=torch.float64)
    expected = (
        1.0 if z < -30 else float(precise.sigmoid() / precise.exp().log1p()) if z < 99 else 1 / z
    )
    torch.testing.assert_close(gradient, torch.tensor([[-expected, expected]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1e-38, 1e-24, 1.0, 1e24])
def test_euclidean_lengths_neither_vanish_nor_overflow(size):
    change = (torch.tensor([[3.0, 4.0], [0.0, 0.0]]) * size,)
    torch.testing.assert_close(
        NORMS["L2"].lengths(change) / size, torch.tensor([5.0, 0.0]), rtol=1e-4, atol=0
    )
    (unit,) = NORMS["L2"].steepest(change)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]), rtol=1e-4, atol=0)


def test_a_step_along_a_tiny_gradient_has_its_length():
    options = {"norm": "L2", "early_stop": False, "quantize": False, "keep_best": False}
    moved = PGD(line(1e-24), 0.5, steps=1, step_size=0.01, **options).perturb(POINT, 0)
    assert (moved - POINT).norm().item() == pytest.approx(0.01, rel=1e-4)


class Rounding(nn.Module):
    """What is rounded has no gradient, for the first sample's pixels."""

    def forward(self, x):
        rounds = x[:, :1] > 0.5
        return torch.where(rounds, (10 * x).round(), 10 * x)


def test_samples_without_any_gradient_are_counted_and_said():
    x = torch.tensor([[0.9, 0.3], [0.4, 0.2], [0.4, 0.39]])
    with pytest.warns(UserWarning, match="gradient of 1 of 3 samples was zero in every step"):
        _, details = PGD(Rounding(), 0.02).perturb(x, [0, 0, 0], return_details=True)
    assert details.without_gradient.tolist() == [True, False, False]
    assert details.fooled.tolist() == [False, False, True]


class Averaged(nn.Module):
    """Scores of means over 64×64 positions, sure by 8: of a cross-entropy, the gradient of none
    is above 2e-8, and float16 takes what is below 3e-8 for zero."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)
        self.head.weight.data *= 0.1
        self.head.bias.data[0] += 8

    def forward(self, x):
        return self.head(self.conv(x).tanh().mean(dim=(2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sees_the_gradients_that_float32_does(dtype):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"early_stop": False, "keep_best": False, "quantize": False}
    moved = FGSM(Averaged().to(dtype), 2 / 255, early_stop=False, quantize=False).perturb(x)
    precise = FGSM(Averaged(), 2 / 255, early_stop=False, quantize=False).perturb(x.float())
    same = (moved - x).sign() == (precise - x.float()).sign()
    assert same.float().mean() > 0.97  # not a pixel before, in float16
    cast = Averaged().to(dtype)
    inside = PGD(lambda z: cast(z.to(dtype)).float(), 2 / 255, **options).perturb(x.float())
    assert (inside != x.float()).float().mean() > 0.9


def test_gradients_that_overflow_are_taken_again():
    """A network in half precision whose gradient is 3,000 overflows at the usual scale."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).half()
    model[0].weight.data = torch.tensor([[100.0, -100.0], [0.0, 0.0]]).half()
    model[1].weight.data = torch.tensor([[30.0, 0.0], [0.0, 0.0]]).half()
    attack = FGSM(model, 0.2, loss="margin")
    _, details = attack.perturb(POINT.half(), 0, return_details=True)
    assert details.fooled.all()
    assert details.backward_passes.tolist() == [2]
    assert not details.without_gradient.any()


@pytest.mark.parametrize("attack", [PGD, DeepFool, LBFGSAttack])
def test_a_gradient_that_no_scale_saves_ends(attack):
    """A softmax in float16 that is 0 and 1: zero up to a scale of 2⁻¹⁴, beyond it NaN."""
    model = line(100.0).half()
    with pytest.warns(UserWarning, match="1 of 1 samples"):
        _, details = attack(lambda z: model(z).softmax(1)).perturb(
            POINT.half(), 0, return_details=True
        )
    assert details.without_gradient.all()


def test_a_scale_between_one_that_vanishes_and_one_that_overflows():
    for first in (-8.0, 10.0, 26.0):
        for fits in range(-20, 26):  # the only scale that does
            search = ScaleSearch(1, torch.device("cpu"))
            exponents = torch.tensor([first])
            for _ in range(20):
                search.note(exponents, exponents < fits, exponents > fits)
                if not search.goes_on:
                    break
                exponents = search.exponents
            assert exponents == fits


@pytest.mark.parametrize("attack", [LBFGSAttack, PGD, ensemble])
def test_a_copy_of_a_softmax_is_one(attack):
    model = line(100.0)

    def copied(x):
        return model(x).softmax(1)[:, :, None].clone().squeeze(2).double()

    _, details = attack(copied, epsilon=0.2).perturb(POINT, 0, return_details=True)
    assert details.fooled.all()


@pytest.mark.parametrize("attack", [LBFGSAttack, DeepFool])
@pytest.mark.parametrize("end", [nn.Identity(), nn.Softmax(1)])
def test_a_compiled_graph_serves_one_backward_pass_and_may_end_in_a_softmax(attack, end):
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    linear = nn.Linear(4, 6, bias=False)
    linear.weight.data = 3 * torch.randn(6, 4, generator=generator)
    model = nn.Sequential(linear, nn.Tanh(), nn.Linear(6, 6, bias=False), end)
    model[2].weight.data = 20 * torch.eye(6)
    x = torch.rand(6, 4, generator=generator)
    found = attack(torch.compile(model, backend="aot_eager")).perturb(x, return_details=True)[1]
    expected = attack(model).perturb(x, return_details=True)[1]
    torch.testing.assert_close(found.l2, expected.l2, rtol=0.02, atol=1e-3)
    assert torch.equal(found.fooled, expected.fooled)


def test_a_universal_perturbation_without_any_gradient_is_warned_of():
    attack = UniversalPerturbation(lambda x: line(10.0)(x.round()), 0.2)
    with pytest.warns(UserWarning, match="gradient of all images was zero in every step"):
        attack.fit([POINT], passes=2)


def test_a_universal_perturbation_reaches_a_target_however_far():
    """The loss of the target is above 10 for every clean image."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 100, generator=generator)
    x = torch.rand(32, 64, generator=generator) * 0.2 + 0.4
    bias = torch.zeros(100)
    bias[0] = 30.0

    attack = UniversalPerturbation(lambda z: (z - 0.5) @ weights + bias, 0.4)
    assert attack.fit([x], passes=20, target=1).rates[-1] == 1.0


def test_an_ensemble_of_models_that_end_in_a_softmax():
    model = line(100.0)  # a margin of 20
    sure = EnsembleTransfer([lambda z: model(z).softmax(1)] * 2, 0.2)
    for loss in ("log_odds", "margin", "cross_entropy"):
        sure.loss = loss
        _, details = sure.perturb(POINT, 0, return_details=True)
        assert details.fooled.all()
    seen = []

    def loss_func(scores, classes):
        seen.append(scores.detach())
        return -scores.gather(1, classes[:, None])[:, 0]

    EnsembleTransfer([lambda z: line(1.0)(z).softmax(1)], 0.2, loss_func=loss_func).perturb(
        POINT, 0
    )
    torch.testing.assert_close(seen[0], line(1.0)(POINT).softmax(1).detach())


def test_an_ensemble_warns_of_one_probability_a_sample():
    model = nn.Linear(2, 1)
    with pytest.warns(UserWarning, match="models, model 1: the one score of each sample is in"):
        EnsembleTransfer([model, lambda z: model(z).sigmoid()], 0.1).perturb(POINT)


def test_the_gradient_itself_is_scaled_back():
    step = GradientStep(line(1.0).half(), 0.5, loss="margin", bounds=None)
    torch.testing.assert_close(
        step.perturb(POINT.half(), 0), torch.tensor([[0.1, 0.9]]).half(), rtol=0, atol=3e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_no_half_precision_leaves_the_ball(dtype, norm):
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).to(dtype)
    epsilon = 4 / 255 if norm == "Linf" else 0.3
    for random_start in (False, True):
        options = {"random_start": random_start, "early_stop": False, "quantize": False}
        attack = PGD(head, epsilon, norm=norm, **options)
        change = (attack.perturb(x).double() - x.double()).flatten(1)
        length = change.abs().amax() if norm == "Linf" else change.norm(dim=1).amax()
        assert 0.7 * epsilon < length <= epsilon * (1 + 1e-6)


def test_gradients_that_are_not_finite_are_counted():
    def root(x):  # an infinite slope at 0.25
        return torch.cat([torch.zeros_like(x), (x - 0.25).clamp(min=0).sqrt() - 1], dim=1)

    x = torch.tensor([[0.25], [0.75]])
    with pytest.warns(UserWarning, match="of 1 of 2 samples was zero in every step, or not finite"):
        result, details = PGD(root, 0.1).perturb(x, 0, return_details=True)
    assert details.without_gradient.tolist() == [True, False]
    assert torch.equal(result[:1], x[:1])


@pytest.mark.parametrize("factor", [1e-3, 1e-2, 0.1, 10.0, 1e3])
@pytest.mark.parametrize("make", [FGSM, PGD, ensemble, LeastLikelyClass])
def test_no_factor_of_the_logits_changes_an_image(trained, make, factor):
    net, x, y = trained
    scaled = copy.deepcopy(net)
    scaled[2].weight.data *= factor
    scaled[2].bias.data *= factor
    moved, expected = (make(m, 8 / 255).perturb(x, y) for m in (scaled, net))
    assert ((moved - expected).abs().amax(dim=1) < 1e-4).float().mean() > 0.97


def test_the_named_losses_by_hand():
    scores = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 1.0, -1.0]])
    classes = torch.tensor([0, 0])
    assert LOSSES["margin"](scores, classes).tolist() == [-2.0, 2.0]
    torch.testing.assert_close(LOSSES["dlr"](scores, classes), torch.tensor([-2 / 3, 1.0]))
    odds = torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, -1.0]]).logsumexp(dim=1)
    torch.testing.assert_close(LOSSES["log_odds"](scores, classes), odds - scores[:, 0])
    # The deviation of 3, 1, 0, -1 over the classes is the root of 8.75 / 4.
    torch.testing.assert_close(units_of(scores[:1]), torch.tensor([[(8.75 / 4) ** 0.5 / 10]]))


def test_a_loss_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"loss: expected one of .*; did you mean 'margin'"):
        PGD(line(1.0), loss="margn")
    with pytest.raises(ValueError, match="loss: 'dlr' needs scores of three classes or more"):
        PGD(line(1.0), loss="dlr").perturb(POINT, 0)


def test_the_map_of_a_class_that_is_sure_is_not_empty():
    found = most_likely_class_map(line(1e4), POINT)  # a margin of 2,000
    assert found.sign.tolist() == [[1.0, -1.0]]
    assert (found.magnitude > 0).all()


class Softmax(nn.Module):
    def __init__(self, net, pixels=1.0):
        super().__init__()
        self.net, self.pixels = net, pixels

    def forward(self, x):
        return self.net(x / self.pixels).softmax(dim=1)


@pytest.mark.parametrize("attack", [PGD, DeepFool, LBFGSAttack])
def test_probabilities_are_attacked_like_the_scores_that_they_are_of(trained, attack):
    net, x, y = trained
    sharp = copy.deepcopy(net)
    sharp[2].weight.data *= 2
    sharp[2].bias.data *= 2  # the probability of many samples' class is 1 to the bit
    found = attack(Softmax(sharp)).perturb(x[:40], y[:40], return_details=True)[1]
    of_scores = attack(sharp).perturb(x[:40], y[:40], return_details=True)[1]
    assert not of_scores.without_gradient.any()
    assert (found.fooled == of_scores.fooled).float().mean() > 0.97
    at = found.fooled & of_scores.fooled
    torch.testing.assert_close(found.l2[at].mean(), of_scores.l2[at].mean(), rtol=0.1, atol=0)


@pytest.mark.parametrize("factor", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("attack", [PGD, DeepFool, LBFGSAttack, ensemble])
def test_sigmoids_of_each_class_are_attacked_like_their_logits(trained, attack, factor):
    net, x, y = trained
    scaled, epsilon = lambda z: factor * net(z), [8 / 255] * (attack in (PGD, ensemble))
    expected = attack(scaled, *epsilon).perturb(x[:60], y[:60], return_details=True)[1]
    attacked = attack(lambda z: scaled(z).sigmoid(), *epsilon)
    found = attacked.perturb(x[:60], y[:60], return_details=True)[1]
    assert expected.fooled.any()
    assert (found.fooled == expected.fooled).float().mean() > 0.95


def test_a_sigmoid_that_rounds_to_one_is_warned_of(trained):
    net, x, y = trained
    with pytest.warns(UserWarning, match=r"60 of 60 samples to 0 or 1.*before the sigmoid"):
        PGD(lambda z: (1e3 * net(z)).sigmoid(), 8 / 255).perturb(x[:60], y[:60])


@pytest.mark.parametrize("attack", [PGD, ensemble])
def test_a_mean_of_softmaxes_is_one(trained, attack):
    net, x, y = trained
    sharp = lambda z: 0.3 * net(z)  # noqa: E731
    mean = lambda z: (sharp(z).softmax(1) + sharp(z.flip(1).flip(1)).softmax(1)) / 2  # noqa: E731
    expected = attack(sharp, 8 / 255).perturb(x[:60], y[:60])
    torch.testing.assert_close(attack(mean, 8 / 255).perturb(x[:60], y[:60]), expected)


@pytest.mark.parametrize("attack", [PGD, ensemble])
def test_scores_that_happen_to_add_to_one_are_scores(attack):
    """Of a linear model, which may fall below 0: the logarithm would bend them."""
    model = nn.Linear(2, 3)
    model.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    model.bias.data = torch.tensor([0.1, 0.0, -0.6])  # at (.6, .4): .7, .4, -.1 and, to 0: .8
    x = torch.tensor([[0.6, 0.4]])
    model.bias.data += (1 - model(x).sum()) / 3
    model.bias.data[2] += 0.1
    model.bias.data[0] -= 0.1
    assert (model(x) >= 0).all()
    torch.testing.assert_close(model(x).sum(), torch.tensor(1.0))
    seen = []

    def loss_func(scores, classes):
        seen.append(scores.detach())
        return -scores[range(len(scores)), classes]

    attack(model, 0.05).perturb(x, 0)
    made = EnsembleTransfer([model], 0.05, loss_func=loss_func)
    made.perturb(x, 0)
    torch.testing.assert_close(seen[0], model(x).detach())


@pytest.mark.parametrize("attack", [PGD, DeepFool, LBFGSAttack])
def test_scores_too_coarse_to_compare_are_warned_of(trained, attack):
    net, x, _ = trained
    with pytest.warns(UserWarning, match="of 9 samples are rounded to steps of more than a tenth"):
        attack(lambda z: (net(z) + 4096).bfloat16(), epsilon=0.1).perturb(x[:9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(lambda z: net(z).bfloat16(), epsilon=0.1).perturb(x[:9])


def test_a_limitless_search_takes_pixels_of_any_size(trained):
    net, x, y = trained
    _, expected = LBFGSAttack(net, bounds=None).perturb(x[:20], y[:20], return_details=True)
    assert (expected.fooled | expected.already).all()
    made = LBFGSAttack(lambda z: net(z / 1e6), bounds=None)
    _, found = made.perturb(x[:20] * 1e6, y[:20], return_details=True)
    assert (found.fooled == expected.fooled).all()
    torch.testing.assert_close(found.l2 / 1e6, expected.l2, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("attack", [DeepFool, LBFGSAttack])
def test_the_smallest_change_has_no_units(trained, attack):
    net, x, y = trained
    _, expected = attack(net).perturb(x[:12], y[:12], return_details=True)
    assert (expected.fooled | expected.already).all()
    for pixels, factor in ((255.0, 1.0), (1.0, 1e-4), (1.0, 1e4)):
        model = lambda z, p=pixels, f=factor: net(z / p) * f  # noqa: E731
        made = attack(model, bounds=(0, pixels))
        _, found = made.perturb(x[:12] * pixels, y[:12], return_details=True)
        assert (found.fooled == expected.fooled).all()
        torch.testing.assert_close(found.l2 / pixels, expected.l2, rtol=0.02, atol=1e-3)


def test_deepfool_leaves_an_exact_tie():
    """Scores near 32 in bfloat16 are a quarter apart: most of the two are equal to the bit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plane = nn.Linear(20, 1)
    x = torch.rand(40, 20, generator=torch.Generator().manual_seed(1))

    def tied(x):
        z = plane(x)
        return torch.cat([z + 32, 32 - z], dim=1).to(torch.bfloat16)

    _, details = DeepFool(tied).perturb(x, return_details=True)
    assert (details.fooled | details.already).all()  # 8 % before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deepfool_of_half_precision_gets_where_float32_does(dtype):
    net, x, y = trained_with(classes=2, seed=1)
    _, expected = DeepFool(net).perturb(x[:80], y[:80], return_details=True)
    half = copy.deepcopy(net).to(dtype)
    _, found = DeepFool(half).perturb(x[:80].to(dtype), y[:80], return_details=True)
    assert (expected.fooled | expected.already).all()
    assert (found.fooled | found.already).all()  # 80 % before, in bfloat16
    torch.testing.assert_close(found.l2.mean(), expected.l2.mean(), rtol=0.03, atol=0)


@pytest.mark.parametrize("size", [1e-36, 1e-24, 1e20, 1e30])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_nearest_boundary_of_tiny_and_huge_scores(size, norm):
    """That is where both values are .5."""
    moved = DeepFool(line(size), norm, quantize=False).perturb(POINT, 0)
    torch.testing.assert_close(moved, torch.tensor([[0.5, 0.5]]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", ["gradient", "deepfool"])
def test_a_universal_perturbation_does_not_depend_on_a_factor(trained, method):
    net, x, _ = trained
    rates = []
    for factor in (1e-3, 1.0, 1e3):
        model = lambda z, f=factor: net(z) * f  # noqa: E731
        fit = UniversalPerturbation(model, 0.1).fit(x[:60].split(20), passes=3, method=method)
        rates.append(fit.rates[-1])
    assert max(rates) - min(rates) <= 0.02


def test_a_universal_perturbation_of_a_softmax(trained):
    net, x, _ = trained
    rates = []
    for model in (lambda z: net(z), lambda z: net(z).softmax(1)):
        rates.append(UniversalPerturbation(model, 0.1).fit(x.split(20), passes=3).rates[-1])
    assert rates[0] > 0.1
    assert abs(rates[0] - rates[1]) <= 0.02


def test_a_universal_perturbation_in_half_precision_has_a_gradient():
    """A mean over 4,096 pixels, with small weights before it: below what float16 holds."""

    class Means(nn.Module):
        def forward(self, x):
            means = (x * 2**-6).flatten(2).mean(dim=2) * 2**6
            return torch.stack([means[:, 0], means[:, 1]], dim=1)

    x = torch.full((4, 2, 64, 64), 0.5)
    x[:, 0] += 0.05
    expected = UniversalPerturbation(Means(), 0.1).fit([x], passes=3)
    found = UniversalPerturbation(Means(), 0.1).fit([x.half()], passes=3)
    torch.testing.assert_close(found.perturbation, expected.perturbation, rtol=0, atol=1e-3)
    assert found.perturbation[0].max() < -0.015  # three steps of .1, .075 and .025 of .1


@pytest.mark.parametrize("masked", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("make", [FGSM, PGD, ensemble, LeastLikelyClass])
def test_classes_that_are_masked_do_not_count(trained, make, masked):
    net, x, y = trained
    is_masked = torch.tensor([False, False, False, True])
    below = lambda z: net(z).masked_fill(is_masked, -200.0)  # noqa: E731 – their least is -74
    _, expected = make(below, 8 / 255).perturb(x[:60], y[:60] % 3, return_details=True)
    attack = make(lambda z: net(z).masked_fill(is_masked, masked), 8 / 255)
    _, found = attack.perturb(x[:60], y[:60] % 3, return_details=True)
    assert (found.fooled == expected.fooled).float().mean() > 0.95


@pytest.mark.parametrize(
    "end",
    [
        lambda p: 100 * p,
        lambda p: p.clamp(0, 1),
        lambda p: p[:, torch.arange(p.shape[1])],
        lambda p: p.log().exp(),
    ],
    ids=["per cent", "clamp", "order", "exp"],
)
@pytest.mark.parametrize("attack", [PGD, LBFGSAttack, ensemble])
def test_probabilities_are_known_whatever_comes_after_the_softmax(trained, attack, end):
    net, x, y = trained
    mild, epsilon = lambda z: 0.3 * net(z), [8 / 255] * (attack in (PGD, ensemble))
    _, expected = attack(mild, *epsilon).perturb(x[:40], y[:40], return_details=True)
    attacked = attack(lambda z: end(mild(z).softmax(1)), *epsilon)
    _, found = attacked.perturb(x[:40], y[:40], return_details=True)
    assert (found.fooled == expected.fooled).all()


def test_an_ensemble_of_tiny_logits_is_fooled_like_one_of_plain_ones(trained):
    net, x, y = trained
    _, expected = ensemble(net, 8 / 255).perturb(x[:60], y[:60], return_details=True)
    _, found = ensemble(lambda z: net(z) * 1e-20, 8 / 255).perturb(
        x[:60], y[:60], return_details=True
    )
    assert expected.fooled.any()
    assert (found.fooled == expected.fooled).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_fooled_like_those_they_were(trained, dtype):
    """Of 8 bits, rounded to the dtype: its grid near 1 is as coarse as the levels in bfloat16."""
    net, x, y = trained
    levels = (x[:100] * 255).round() / 255
    half = copy.deepcopy(net).to(dtype)
    _, expected = PGD(lambda z: half(z.to(dtype)), 4 / 255).perturb(
        levels, y[:100], return_details=True
    )
    result, found = PGD(half, 4 / 255).perturb(levels.to(dtype), y[:100], return_details=True)
    assert abs(found.fooled.float().mean() - expected.fooled.float().mean()) <= 0.05
    change = (result.float() - levels.to(dtype).float()).abs().amax()
    assert change <= 4 / 255


def test_map_elites_gives_the_probabilities_of_a_softmax():
    model = lambda z: (10 * z.flatten(1)[:, :3]).softmax(1)  # noqa: E731
    found = map_elites(model, (1, 2, 2), generations=30)
    torch.testing.assert_close(found.confidence, model(found.images).diagonal())


def test_an_image_a_hair_off_the_levels_is_fooled_like_one_on_them(trained):
    net, x, y = trained
    levels = ((x[:100] * 255).round() / 255).clamp(0.1, 0.9)
    _, expected = PGD(net, 2 / 255).perturb(levels, y[:100], return_details=True)
    for offset in (1e-5, -1e-5):
        _, found = PGD(net, 2 / 255).perturb(levels + offset, y[:100], return_details=True)
        assert abs(found.fooled.float().mean() - expected.fooled.float().mean()) <= 0.02
        assert found.linf.max() <= 2 / 255 + 1e-7


def test_rounding_in_the_euclidean_ball_costs_little():
    """Of 768 pixels, whose changes are about a level: all towards the clean image is far less."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(768, 2)
    x = (torch.rand(200, 768, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    y = net(x).argmax(dim=1)
    length = (net(x).diff(dim=1).abs()[:, 0] / net.weight.diff(dim=0).norm()).detach()
    epsilon = 28 / 255  # a level a pixel
    possible = length < 0.9 * epsilon
    assert possible.sum() > 20
    _, details = PGD(net, epsilon, norm="L2").perturb(x, y, return_details=True)
    assert details.fooled[possible].float().mean() > 0.95
    assert not details.fooled[length > 1.001 * epsilon].any()


def test_rates_of_float64_scores_see_what_float32_does_not():
    model = lambda z: line(1.0)(z.float()).double() * 1e-3 + 1e6  # noqa: E731 – 1e-4 apart
    swapped = lambda z: z.flip(1)  # noqa: E731
    assert fooling_rate(model, swapped, [POINT.double()]).rate == 1.0
    assert rank_analysis(model, POINT, POINT.flip(1)).changed == 1


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_map_of_a_class_has_the_signs_of_any_factor(trained, factor):
    net, x, _ = trained
    expected = most_likely_class_map(net, x[:50]).sign
    found = most_likely_class_map(lambda z: factor * net(z), x[:50]).sign
    assert (found == expected).float().mean() > 0.99


def whole(x):
    return (10 * line(1.0)(x)).round().int()


@pytest.mark.parametrize("attack", [PGD, DeepFool, LBFGSAttack])
def test_whole_scores_have_no_gradient_and_this_is_said(attack):
    with pytest.raises(ValueError, match="forward_func: no gradient flows from its scores"):
        attack(whole).perturb(POINT, 0)
    with pytest.raises(
        ValueError, match=r"forward_func: expected scores 1×K for a batch of 1, got \(1, 0\)"
    ):
        attack(lambda z: z[:, :0]).perturb(POINT, 0)


def test_minus_infinity_is_refused_with_a_remedy():
    masked = lambda z: line(1.0)(z).masked_fill(torch.tensor([False, True]), -torch.inf)  # noqa: E731
    with pytest.raises(ValueError, match="masked by -infinity a low number"):
        PGD(masked).perturb(POINT, 0)


@pytest.mark.parametrize("method", [Saliency, InputXGradient])
def test_an_attack_on_the_map_of_a_detached_model_names_the_break(method):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = torch.rand(2, 3, 2, 2)
    with pytest.raises(ValueError, match="no gradient flows from its scores"):
        ExplanationAttack(method(Detached(model))).perturb(x, torch.tensor([0, 1]))


@pytest.mark.parametrize("attack", [PGD, DeepFool, LBFGSAttack])
def test_probabilities_of_a_detached_model_name_the_break(attack):
    model = nn.Sequential(Detached(line(1.0)), nn.Softmax(1))  # its weights have a graph
    with pytest.raises(ValueError, match="no gradient flows from its scores"):
        attack(model).perturb(POINT, 0)


def test_whole_scores_have_probabilities():
    scores = torch.tensor([[1, 0], [2, 1]])
    expected = torch.tensor([[1.0, 0.0], [0.7311, 0.2689]])
    torch.testing.assert_close(probabilities_of(scores)[1], expected[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(probabilities_of(scores[:1])[0], expected[0])


class Detached(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.detach())
