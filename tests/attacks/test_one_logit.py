"""A classifier with one logit z a sample is one of two classes: 1 where z is positive, else 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam, Saliency
from torch import Tensor, nn

from captum_robust import IterativeMask, PerceptualBallPerturbation, RealTimeMasking, RobustCAM
from captum_robust.attacks import (
    FGSM,
    PGD,
    DeepFool,
    EnsembleTransfer,
    ExplanationAttack,
    FoolingImage,
    LBFGSAttack,
    LeastLikelyClass,
    MapElites,
    SubstituteAttack,
    UniversalPerturbation,
    fooling_rate,
    held_out,
    most_likely_class_map,
    rank_analysis,
    transfer_matrix,
)
from captum_robust.benchmark import compare, robust_accuracy
from captum_robust.catalog.relevance import RelevancePropagation
from captum_robust.data import Sample
from captum_robust.defenses import BitDepth, DefendedModel
from captum_robust.metrics.functional import saliency_metric
from captum_robust.models import Classifier
from captum_robust.nn import MaskingNetwork
from captum_robust.training.adversarial import adversarial_training
from captum_robust.training.clean import clean_training
from captum_robust.training.settings import TrainingSettings

WEIGHT = torch.tensor([2.0, -1.0])
POINTS = torch.tensor([[0.4, 0.5], [0.5, 0.4], [0.2, 0.7]])  # z: .3, .6, -.3
LABELS = [1, 1, 0]


def column(x: Tensor) -> Tensor:
    return (x @ WEIGHT)[:, None]


def row(x: Tensor) -> Tensor:
    return x @ WEIGHT


def two(x: Tensor) -> Tensor:
    """The same classifier with two scores, (0, z)."""
    z = x @ WEIGHT
    return torch.stack([torch.zeros_like(z), z], dim=1)


ones = pytest.mark.parametrize("one", [column, row], ids=["column", "row"])


@ones
@pytest.mark.parametrize(
    "make",
    [
        FGSM,
        PGD,
        DeepFool,
        LBFGSAttack,
        LeastLikelyClass,
        lambda f: PGD(f, norm="L2", epsilon=0.2, momentum=1.0, random_start=True),
        lambda f: EnsembleTransfer([f, two], 0.2),
    ],
)
@pytest.mark.parametrize("target", [None, LABELS, [0, 1, 1]], ids=str)
def test_attacks_do_as_with_the_scores_0_and_z(one: Any, make: Any, target: Any) -> None:
    result, details = make(one).perturb(POINTS, target, return_details=True)
    expected, same = make(two).perturb(POINTS, target, return_details=True)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    for name, value in vars(details).items():
        torch.testing.assert_close(value, vars(same)[name], atol=1e-5, rtol=0)


@ones
def test_the_sign_step_by_hand(one: Callable[..., Tensor]) -> None:
    # Down z along (2, -1) where z > 0, and up it else.
    result, details = FGSM(one, 0.25, quantize=False).perturb(POINTS, return_details=True)
    expected = POINTS + 0.25 * torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(result, expected)
    assert details.label.tolist() == LABELS
    assert details.predicted.tolist() == [0, 0, 1]  # z: .3 - .75, .6 - .75, -.3 + .75
    assert details.fooled.all()


@ones
def test_the_nearest_boundary_by_hand(one: Callable[..., Tensor]) -> None:
    # The distance of z = 0 is |z| / ‖w‖.
    moved = DeepFool(one, quantize=False).perturb(POINTS) - POINTS
    expected = -(POINTS @ WEIGHT)[:, None] * WEIGHT / 5
    torch.testing.assert_close(moved, expected, atol=2e-3, rtol=0)


@ones
def test_a_targeted_attack_reaches_the_class(one: Callable[..., Tensor]) -> None:
    attack = PGD(one, 0.4)
    _, details = attack.perturb(POINTS, [0, 0, 1], targeted=True, return_details=True)
    assert details.fooled.all()
    with pytest.raises(ValueError, match=r"target: class 2 of sample 1.* the classes 0 to 1"):
        attack.perturb(POINTS, [1, 2, 0])


@ones
@pytest.mark.parametrize("objective", ["log_probability", "score"])
@pytest.mark.parametrize("target", [0, 1])
def test_a_fooling_image_gets_to_either_class(
    one: Callable[..., Tensor], objective: str, target: int
) -> None:
    attack = FoolingImage(lambda x: 9 * one(x), objective=objective, confidence=0.9, step_size=0.05)
    result, details = attack.perturb(POINTS, target, return_details=True)
    probability = torch.sigmoid(9 * row(result))
    assert (details.fooled | details.already).all()
    assert ((probability if target else 1 - probability) >= 0.9 - 1e-6).all()


@ones
def test_rates_of_changed_classes_count_the_sign(one: Callable[..., Tensor]) -> None:
    def brighter(x: Tensor) -> Tensor:
        return (x + torch.tensor([-0.2, 0.0])).clamp(0, 1)  # z less .4: only the first changes

    assert fooling_rate(one, brighter, [POINTS]).rate == pytest.approx(1 / 3)
    matrix = transfer_matrix({"brighter": brighter}, {"one": one, "two": two}, [POINTS])
    assert matrix.to_numpy().tolist() == [[pytest.approx(1 / 3)] * 2]
    ranks = rank_analysis(one, POINTS, brighter(POINTS))
    assert ranks.changed == 1
    assert ranks.adversarial_in_clean.tolist() == [1]


@ones
def test_the_most_likely_class_and_what_supports_it(one: Callable[..., Tensor]) -> None:
    found = most_likely_class_map(one, POINTS)
    assert found.classes.tolist() == LABELS
    # The log odds against class 1 are -z, those against class 0 z.
    torch.testing.assert_close(found.magnitude, WEIGHT.abs().expand(3, 2))
    assert found.sign.tolist() == [[1, -1], [1, -1], [-1, 1]]


@ones
def test_elites_have_the_sigmoids_probability(one: Callable[..., Tensor]) -> None:
    elites = MapElites(one, (2,), batch_size=8).run(10)
    assert elites.classes.tolist() == [0, 1]
    p = torch.sigmoid(row(elites.images))
    torch.testing.assert_close(elites.confidence, torch.stack([1 - p[0], p[1]]))


@ones
def test_the_explanation_moves_and_the_label_stays(one: Callable[..., Tensor]) -> None:
    def model(x: Tensor) -> Tensor:
        return one(x**2)  # a gradient that depends on x

    x = torch.tensor([[0.6, 0.3], [0.3, 0.8]])
    attack = ExplanationAttack(Saliency(model), 0.05, k=0.5, steps=3, quantize=False)
    result, details = attack.perturb(x, return_details=True)
    assert details.label.tolist() == [1, 0]
    assert details.label_kept.all()
    assert (details.moved > 0).all()
    assert torch.equal(row(result**2) > 0, row(x**2) > 0)


def images(n: int) -> tuple[Tensor, Tensor]:
    """Images 3×16×16, bright in the left (class 0) or right half (1)."""
    y = torch.arange(n) % 2
    x = 0.4 * torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    x[y == 0, :, :, :8] += 0.3
    x[y == 1, :, :, 8:] += 0.3
    return x, y


class Halves(nn.Module):
    """The right half less the left one, by a layer with two maps N×2×16×16."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.conv.weight.data = torch.tensor([[1 / 3] * 3, [1 / 2] * 3])[:, :, None, None]
        self.head = nn.Linear(2, 1, bias=False)
        self.head.weight.data = torch.tensor([[-40.0, 40.0]])

    def forward(self, x: Tensor) -> Tensor:
        half = (torch.arange(16) // 8).float()
        sides = torch.stack([1 - half, half])[:, None]
        maps = self.conv(x) * sides
        z: Tensor = self.head(maps.mean(dim=(2, 3)))
        return z[:, 0] if self.flat else z


models = pytest.mark.parametrize("flat", [False, True], ids=["column", "row"])


@models
def test_an_attribution_of_a_classifier_knows_both_classes(flat: bool) -> None:
    x = images(4)[0]
    net = Halves(flat).eval()
    model = Classifier(net, input_size=16, cam_layer="conv")
    torch.testing.assert_close(model(x).softmax(dim=1)[:, 1], torch.sigmoid(net(x).reshape(-1)))
    of_one = RobustCAM(model, net.conv, base="gradcam").attribute(
        x, 1, weights=[1.0], normalize=None
    )
    of_none = RobustCAM(model, net.conv, base="gradcam").attribute(
        x, 0, weights=[1.0], normalize=None
    )
    assert of_one.abs().amax() > 0
    torch.testing.assert_close(of_one, -of_none)
    # Captum's meaning for a plain model of one score: the score itself.
    of_score = LayerGradCam(net, net.conv).attribute(x)
    plain = RobustCAM(net, net.conv).attribute(x, weights=[1.0], normalize=None)
    torch.testing.assert_close(plain, of_score)
    torch.testing.assert_close(2 * of_one, of_score)


def test_the_analytic_map_of_a_classifier_of_one_logit() -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*body, nn.Linear(4, 1))
    model = Classifier(net, input_size=16)
    x = images(4)[0]
    found = RobustCAM(model, net[1], base="cam").attribute(x, 0, weights=[1.0], normalize=None)
    of_logit = torch.einsum("c,nchw->nhw", net[4].weight[0], net[1](net[0](x)))[:, None]
    torch.testing.assert_close(found, -of_logit / 2)
    for target in (None, 0):  # of a plain network, the score itself
        plain = RobustCAM(net, net[1], base="cam")
        found = plain.attribute(x, target, weights=[1.0], normalize=None)
        torch.testing.assert_close(found, of_logit)
    with pytest.raises(ValueError, match="class_names: expected at least two"):
        Classifier(net, class_names=["cat"])


@models
def test_methods_that_compare_classes_take_one_logit(flat: bool) -> None:
    x, y = images(4)
    net = Halves(flat).eval()

    def two_scores(x: Tensor) -> Tensor:
        z = net(x).reshape(-1)
        return torch.stack([torch.zeros_like(z), z], dim=1)

    for target in (None, 0, 1):
        ball = PerceptualBallPerturbation(net, net.conv)
        found, details = ball.attribute(x, target, return_details=True)
        same = PerceptualBallPerturbation(two_scores, net.conv).attribute(x, target)
        torch.testing.assert_close(found, same, atol=1e-5, rtol=1e-3)
        assert details.original_class.tolist() == (y.tolist() if target is None else [target] * 4)
        masks = IterativeMask(net, steps=3).attribute(x, target)
        expected = IterativeMask(two_scores, steps=3).attribute(x, target)
        torch.testing.assert_close(masks, expected, atol=1e-5, rtol=1e-3)
    network = MaskingNetwork(net, layers=[net.conv], input_size=(16, 16))
    assert network.decoder.shape.num_classes == 2
    masks = RealTimeMasking(network)
    assert torch.equal(masks.attribute(x), masks.attribute(x, y))


METHODS = [
    "robust_cam",
    "grad_cam",
    "saliency",
    "input_x_gradient",
    "perceptual_ball",
    "iterative_mask",
    "defended_robust_cam",
]


@models
def test_compare_and_robust_accuracy_score_both_labels(flat: bool) -> None:
    x, y = images(4)
    net = Halves(flat).eval()
    model = Classifier(net, input_size=16, cam_layer="conv", perceptual_layers=["conv"])
    boxes = [[[0, 0, 8, 16]], [[8, 0, 16, 16]]]
    samples = [
        Sample(x[i], int(y[i]), torch.tensor(boxes[int(y[i])]).float(), f"{i}")
        for i in range(len(x))
    ]
    table = compare(model, samples, METHODS).table()
    assert (table["failed"] == 0).all()
    assert (table["n"] == 4).all()
    accuracy = robust_accuracy(net, PGD(net, 0.3), samples, [0.0, 0.3])
    assert accuracy["clean_accuracy"].tolist() == [1.0, 1.0]
    assert accuracy["robust_accuracy"].tolist() == [1.0, 0.0]


def test_relevance_sums_to_the_score_of_either_class() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, bias=False)
        net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 196, 1, bias=False))
    x = images(4)[0]
    relevance = RelevancePropagation(Classifier(net.eval(), input_size=16))
    half = net(x)[:, 0].detach() / 2
    for target, score in ((0, -half), (1, half)):
        found = relevance(x, torch.full((4,), target)).sum(dim=(1, 2, 3))
        torch.testing.assert_close(found, score, atol=1e-3, rtol=1e-2)


def test_other_measures_take_one_logit() -> None:
    x, y = images(4)
    net = Halves(False).eval()

    def two_scores(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(net(x)), net(x)], dim=1)

    boxes = torch.tensor([[0, 0, 16, 16]] * 4)
    found = saliency_metric(net, x, boxes, y).metric
    torch.testing.assert_close(found, saliency_metric(two_scores, x, boxes, y).metric)
    defended = DefendedModel(net, BitDepth(8))
    assert FGSM(defended, 0.3).perturb(x, y, return_details=True)[1].fooled.all()
    attack = UniversalPerturbation(net, 0.3).fit([x[y == 0]], passes=20)
    assert fooling_rate(net, attack, [x[y == 0]]).rate == 1
    shares = held_out({"one": net, "two": two_scores}, x, y)
    assert shares["n"].tolist() == [4, 4]


@pytest.mark.parametrize(
    "answer",
    [
        lambda z: z,
        lambda z: (z > 0).long(),
        lambda z: (z > 0).to(torch.uint8),
        lambda z: z > 0,
        lambda z: (z > 0).long()[:, 0],
        lambda z: torch.cat([0 * z, z], dim=1),
    ],
)
def test_an_oracle_tells_two_classes_in_every_form(answer: Callable[[Tensor], Tensor]) -> None:
    x, y = images(8)
    net = Halves(False).eval()
    attack = SubstituteAttack(lambda x: answer(net(x)))
    torch.manual_seed(0)
    substitute = nn.Sequential(nn.Flatten(), nn.Linear(768, 1))
    rounds = attack.fit(x, substitute, rounds=2, epochs=30)
    assert rounds[-1].agreement == 1
    assert torch.equal(attack.judge(x, y), torch.zeros(8, dtype=torch.bool))
    assert torch.equal(attack.judge(x, 1 - y), torch.ones(8, dtype=torch.bool))


def test_training_lowers_the_cross_entropy_of_the_sigmoid() -> None:
    x, y = images(16)
    data = [(a, int(c)) for a, c in zip(x, y, strict=True)]
    torch.manual_seed(0)
    for train in (clean_training, adversarial_training):
        net = nn.Sequential(nn.Flatten(), nn.Linear(768, 1))
        before = F.binary_cross_entropy_with_logits(net(x)[:, 0], y.float())
        settings = TrainingSettings(epochs=20, batch_size=8, learning_rate=0.01)
        train(net, data, settings)
        after = F.binary_cross_entropy_with_logits(net(x)[:, 0], y.float())
        assert after < 0.5 * before
        assert torch.equal((net(x)[:, 0] > 0).long(), y)


def test_classes_in_the_place_of_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected scores N×K, or one logit a sample.*int64"):
        fooling_rate(lambda x: two(x).argmax(dim=1), lambda x: x, [POINTS])


def test_what_looks_like_probabilities_is_warned_of() -> None:
    def probability(x: Tensor) -> Tensor:
        return torch.sigmoid(column(x))

    message = r"the one score of each sample is in \[0, 1\]"
    with pytest.warns(UserWarning, match=message):
        PGD(probability, 0.1).perturb(POINTS)
    with pytest.warns(UserWarning, match=message):
        fooling_rate(probability, lambda x: x, [POINTS])
    x, y = images(2)
    model = Classifier(nn.Sequential(Halves(False), nn.Sigmoid()).eval(), input_size=16)
    boxes = torch.tensor([[0.0, 0.0, 8.0, 16.0]])
    samples = [Sample(x[i], int(y[i]), boxes, f"{i}") for i in range(2)]
    with pytest.warns(UserWarning, match=message):
        compare(model, samples, ["center_box"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(column, 0.1).perturb(POINTS)
        DeepFool(column).perturb(POINTS[2:])  # ends where z is just above 0
