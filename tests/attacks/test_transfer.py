from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.robust import MinParamPerturbation
from torch import Tensor, nn

from captum_robust.attacks import FGSM, PGD, EnsembleTransfer, SubstituteAttack, held_out
from tests.networks import PixelNet, Rounding


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    net = nn.Linear(len(weight[0]), len(weight))
    net.weight.data = torch.tensor(weight)
    net.bias.data = torch.tensor(bias or [0.0] * len(weight))
    return net.eval()


def nets(n: int = 3) -> list[PixelNet]:
    found = []
    with torch.random.fork_rng():
        for seed in range(n):
            torch.manual_seed(seed)
            found.append(PixelNet().eval())
    return found


def predicted(model: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def blobs(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images 1×8×8, bright in the left (class 0), right (1), upper (2) or lower (3) half."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    x = 0.4 * torch.rand(n, 1, 8, 8, generator=g)
    x[y == 0, :, :, :4] += 0.3
    x[y == 1, :, :, 4:] += 0.3
    x[y == 2, :, :4] += 0.3
    x[y == 3, :, 4:] += 0.3
    return x, y


def half_of(x: Tensor) -> Tensor:
    """The oracle of ``blobs``: the brightest half, without a gradient."""
    halves = (x[..., :4], x[..., 4:], x[..., :4, :], x[..., 4:, :])
    return torch.stack([h.flatten(1).mean(dim=1) for h in halves], dim=1).argmax(dim=1)


def student(seed: int = 5) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4)
        )


class Counting:
    """An oracle that counts the images it was shown."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.seen += len(x)
        return half_of(x)


# Of two models, one that looks at the first pixel and one at the second: f = (2 x0, 0) and
# (2 x1, 0), less .5.
FIRST = linear([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [-0.5, 0.0])
SECOND = linear([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]], [-0.5, 0.0])


def test_the_step_follows_the_mean_loss() -> None:
    x = torch.tensor([[0.5, 0.6, 0.4]])
    attack = EnsembleTransfer([FIRST, SECOND], epsilon=0.1, steps=1, step_size=0.1, quantize=False)
    # Each model's loss falls with the pixel it looks at; nobody looks at the third.
    torch.testing.assert_close(attack.perturb(x, 0), torch.tensor([[0.4, 0.5, 0.4]]))


def test_the_loss_is_the_mean_of_the_models_cross_entropies(x: Tensor) -> None:
    models = nets()
    y = torch.tensor([0, 4, 5])
    leaf = x.clone().requires_grad_()
    mean = torch.stack([F.cross_entropy(m(leaf), y, reduction="sum") for m in models]).mean()
    (gradient,) = torch.autograd.grad(mean, leaf)
    expected = (x + 0.05 * gradient.sign()).clamp(0, 1)
    options = {"steps": 1, "step_size": 0.05, "keep_best": False, "loss": "cross_entropy"}
    attack = EnsembleTransfer(models, epsilon=0.05, **options)
    torch.testing.assert_close(attack.perturb(x, y), expected)
    aimed = attack.perturb(x, y, targeted=True)
    torch.testing.assert_close(aimed, (x - 0.05 * gradient.sign()).clamp(0, 1))


def test_fooled_needs_all_of_the_models_or_a_share_of_them() -> None:
    # An epsilon of .2 takes x0 below the boundary at .25, and leaves x1 above it.
    x = torch.tensor([[0.4, 0.6, 0.5]])

    def details(share: float) -> Any:
        attack = EnsembleTransfer([FIRST, SECOND], epsilon=0.2, steps=4, share=share)
        return attack.perturb(x, 0, return_details=True)[1]

    assert details(1.0).fooled.tolist() == [False]
    assert details(0.51).fooled.tolist() == [False]
    assert details(0.5).fooled.tolist() == [True]
    assert details(1.0).already.tolist() == [False]


def test_misclassified_before_by_enough_models_counts_as_already() -> None:
    x = torch.tensor([[0.1, 0.6, 0.5], [0.1, 0.1, 0.5]])

    def already(share: float) -> list[bool]:
        attack = EnsembleTransfer([FIRST, SECOND], share=share, early_stop=True)
        result, details = attack.perturb(x, 0, return_details=True)
        assert torch.equal(result[1], x[1])  # left alone, since early_stop is set
        found: list[bool] = details.already.tolist()
        return found

    assert already(1.0) == [False, True]
    assert already(0.5) == [True, True]


def test_early_stop_ends_a_sample_when_all_models_are_fooled() -> None:
    # Boundaries at .25; the steps of .0625 take x0 over it with the second, x1 with the sixth.
    x = torch.tensor([[0.3125, 0.5625, 0.5], [0.3125, 0.3125, 0.5]])
    attack = EnsembleTransfer(
        [FIRST, SECOND], epsilon=0.5, steps=8, step_size=0.0625, early_stop=True, quantize=False
    )
    result, details = attack.perturb(x, 0, return_details=True)
    assert details.fooled.all()
    expected = torch.tensor([[0.0, 0.1875, 0.5], [0.1875, 0.1875, 0.5]])
    torch.testing.assert_close(result, expected)


def test_one_model_is_pgd(net: PixelNet, x: Tensor) -> None:
    options: dict[str, Any] = {"epsilon": 0.1, "steps": 5, "early_stop": True}
    ours = EnsembleTransfer([net], **options).perturb(x)
    torch.testing.assert_close(ours, PGD(net, **options).perturb(x), atol=1e-6, rtol=0)


def test_draws_of_a_transform_are_judged_by_their_mean(x: Tensor) -> None:
    def noisy(images: Tensor) -> Tensor:
        return images + 0.05 * torch.rand_like(images)

    attack = EnsembleTransfer(
        nets(2), epsilon=0.2, steps=4, transform=noisy, samples=3, early_stop=True
    )
    state = torch.get_rng_state()
    first, details = attack.perturb(x, return_details=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(attack.perturb(x), first)
    assert details.fooled.shape == (3,)


def test_tuple_targets_pick_each_models_scores(x: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flat = [PixelNet(classes=8).eval() for _ in range(2)]

    def grid(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda images: model(images).reshape(-1, 4, 2)

    def column(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda images: grid(model)(images)[:, :, 1]

    found, details = EnsembleTransfer([grid(m) for m in flat], early_stop=True).perturb(
        x, (2, 1), return_details=True
    )
    expected, of_columns = EnsembleTransfer([column(m) for m in flat], early_stop=True).perturb(
        x, 2, return_details=True
    )
    torch.testing.assert_close(found, expected)
    assert torch.equal(details.fooled, of_columns.fooled)
    assert torch.equal(details.already, of_columns.already)


def test_the_model_without_a_gradient_is_named(net: PixelNet, x: Tensor) -> None:
    with torch.random.fork_rng():
        cut = nn.Sequential(nn.Flatten(), Rounding(), nn.Linear(576, 6))
    # The scores of the second have a graph, to its weights; the mean of both, one to the inputs.
    with pytest.raises(ValueError, match=r"model 1; layer '1' \(Rounding\) breaks the graph"):
        EnsembleTransfer([net, cut]).perturb(x)
    with pytest.raises(ValueError, match="model 0"):
        EnsembleTransfer([cut.requires_grad_(False), net]).perturb(x)
    whole = EnsembleTransfer([net.requires_grad_(False), net], transform=lambda i: i * 1.0)
    assert not torch.equal(whole.perturb(x), x)  # frozen parameters and transforms are no cut


@pytest.mark.parametrize(
    ("models", "options", "error", "message"),
    [
        ([], {}, ValueError, "models: expected at least one"),
        (FIRST, {}, TypeError, "models: expected a list"),
        ([FIRST, "vgg"], {}, TypeError, "at 1: expected a function, got str"),
        ([FIRST], {"share": 0}, ValueError, "share"),
        ([FIRST], {"share": 1.1}, ValueError, "share"),
        ([FIRST], {"epsilon": -1}, ValueError, "epsilon"),
    ],
)
def test_wrong_ensembles_are_named(
    models: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EnsembleTransfer(models, **options)


def test_models_of_different_classes_are_an_error() -> None:
    three = linear([[1.0, 0.0, 0.0]] * 3)
    with pytest.raises(ValueError, match=r"scores \(1, 2\), of model 1, got \(1, 3\)"):
        EnsembleTransfer([FIRST, three]).perturb(torch.tensor([[0.5, 0.5, 0.5]]), 0)


def test_held_out_counts_what_a_model_got_right_before() -> None:
    # epsilon .25 moves both pixels down by .25, whichever model is attacked, if it looks at both.
    both = linear([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [-0.5, 0.0])
    models = {"first": FIRST, "second": SECOND, "both": both}
    images = torch.tensor(
        [[0.45, 0.45, 0.5], [0.9, 0.45, 0.5], [0.45, 0.9, 0.5], [0.1, 0.9, 0.5]],
    )
    table = held_out(
        models,
        images,
        [0, 0, 0, 0],
        lambda sources: EnsembleTransfer(sources, epsilon=0.25, steps=1, step_size=0.25),
    )
    assert table.index.tolist() == ["first", "second", "both"]
    # The boundary of first is at x0 = .25: it has 3 images right, of which 2 fall below.
    assert table.loc["first", ["n", "fooled"]].tolist() == [3, pytest.approx(2 / 3)]
    assert table.loc["second", ["n", "fooled"]].tolist() == [4, pytest.approx(2 / 4)]
    # x0 + x1 > .5 before: all 4; after: .4, .85, .85, .5 (x0 is at 0), the last on the boundary.
    assert table.loc["both", "n"] == 4
    assert table.loc["both", "low"] < table.loc["both", "fooled"] < table.loc["both", "high"]
    assert table.loc["both", "sources_fooled"] == pytest.approx((2 / 3 + 2 / 4) / 2)


def test_held_out_with_targets_says_how_many_reached_them(x: Tensor) -> None:
    models = dict(zip("abc", nets(), strict=True))
    y = predicted(models["a"], x)
    with torch.no_grad():  # what every model gives the lowest score on the whole
        targets = torch.stack([m(x).log_softmax(dim=1) for m in models.values()]).sum(0).argmin(1)
    seen: list[list[Any]] = []

    def make(sources: list[Any]) -> EnsembleTransfer:
        seen.append(sources)
        return EnsembleTransfer(sources, epsilon=0.5, steps=20)

    table = held_out(models, x, y, make, targets=targets)
    whole = held_out(models, x, y, make, targets=targets, batch_size=2)
    assert seen[0] == [models["b"], models["c"]]
    assert table.equals(whole)
    attacked = make([models["b"], models["c"]]).perturb(x, targets, targeted=True)
    expected = (predicted(models["a"], attacked) == targets).float().mean()
    assert table.loc["a", "n"] == 3
    assert table.loc["a", "reached"] == pytest.approx(float(expected))


def test_nothing_right_before_gives_nan() -> None:
    wrong = linear([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [0.0, 1.0])
    table = held_out({"first": FIRST, "wrong": wrong}, torch.full((2, 3), 0.5), [0, 0])
    assert table.loc["wrong", "n"] == 0
    assert table["fooled"].isna().tolist() == [False, True]


@pytest.mark.parametrize("models", [{"one": FIRST}, [FIRST, SECOND]])
def test_one_model_cannot_be_held_out(models: Any) -> None:
    with pytest.raises(ValueError, match="models: expected two or more by name"):
        held_out(models, torch.full((2, 3), 0.5), [0, 0])


def test_labels_must_be_one_an_image() -> None:
    models = {"first": FIRST, "second": SECOND}
    with pytest.raises(ValueError, match="labels: expected 2 classes"):
        held_out(models, torch.full((2, 3), 0.5), [0])
    with pytest.raises(ValueError, match="targets: expected 2 classes"):
        held_out(models, torch.full((2, 3), 0.5), [0, 0], targets=torch.rand(2))
    with pytest.raises(ValueError, match="targets: expected other classes, got that of image 1"):
        held_out(models, torch.full((2, 3), 0.5), [0, 0], targets=[1, 0])


def test_the_set_doubles_each_round_and_every_label_is_counted() -> None:
    oracle = Counting()
    attack = SubstituteAttack(oracle, budget=1000)
    x, _ = blobs(8)
    rounds = attack.fit(x, student(), rounds=4, epochs=1)
    assert [r.labelled for r in rounds] == [8, 16, 32, 64]
    assert [r.queries for r in rounds] == [8, 16, 32, 64]
    assert attack.queries == oracle.seen == 64
    assert attack.queries_left == 936


@pytest.mark.parametrize(
    ("budget", "labelled"),
    [
        (5, [5]),
        (8, [8]),
        (9, [8, 9]),
        (30, [8, 16, 30]),
        (32, [8, 16, 32]),
        (None, [8, 16, 32, 64]),
    ],
)
def test_the_budget_is_used_up_and_never_exceeded(budget: int | None, labelled: list[int]) -> None:
    oracle = Counting()
    attack = SubstituteAttack(oracle, budget=budget)
    rounds = attack.fit(blobs(8)[0], student(), rounds=4, epochs=1, batch_size=3)
    assert [r.labelled for r in rounds] == labelled
    assert attack.queries == oracle.seen == labelled[-1]


def test_questions_beyond_the_budget_are_refused_before_they_are_asked() -> None:
    oracle = Counting()
    attack = SubstituteAttack(oracle, budget=10)
    x, y = blobs(8)
    attack.fit(x, student(), rounds=1, epochs=1)
    with pytest.raises(ValueError, match="budget: 8 images to ask about, but 2 of 10"):
        attack.judge(x, y)
    attack.judge(x[:2], y[:2])
    assert oracle.seen == attack.queries == 10
    with pytest.raises(ValueError, match="budget: all 10 queries are spent"):
        attack.fit(x, student())
    assert oracle.seen == 10


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0.1, [[0.6, 0.4], [0.0, 1.0]]),  # into the class; the second is clipped
        (-0.1, [[0.4, 0.6], [0.15, 0.85]]),  # towards the boundary
    ],
)
def test_new_images_lie_along_the_sign_of_the_substitutes_gradient(
    step: float, expected: list[list[float]]
) -> None:
    shown: list[Tensor] = []

    def oracle(x: Tensor) -> Tensor:
        shown.append(x)
        return torch.tensor([0, 1])

    # The score of class 0 grows with the first pixel and falls with the second, that of class 1
    # the other way; a learning rate next to nothing leaves it so.
    net = linear([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    x = torch.tensor([[0.5, 0.5, 0.5], [0.05, 0.95, 0.5]])
    SubstituteAttack(oracle).fit(x, net, rounds=2, step=step, epochs=1, lr=1e-12)
    torch.testing.assert_close(shown[1][:, :2], torch.tensor(expected))


def test_a_step_towards_the_boundary_asks_what_the_substitute_does_not_know() -> None:
    def known(step: float) -> float:
        rounds = SubstituteAttack(half_of).fit(
            blobs(20)[0], student(), rounds=4, epochs=20, step=step, lr=5e-3
        )
        return sum(r.agreement_on_new for r in rounds[1:]) / 3

    assert known(-0.1) < known(0.1)


def test_the_bounds_are_those_of_the_augmentation_and_of_the_attack() -> None:
    shown: list[Tensor] = []

    def oracle(x: Tensor) -> Tensor:
        shown.append(x)
        return half_of(x)

    x, y = blobs(8)
    attack = SubstituteAttack(oracle, bounds=(-1.0, 1.0))
    attack.fit(2 * x - 1, student(), rounds=2, epochs=1, step=-1.0)
    assert shown[1].amin() == -1
    assert shown[1].amax() == 1
    assert attack.perturb(2 * x - 1, y, epsilon=1.0).amin() == -1


def test_what_it_learns_fools_the_oracle() -> None:
    x, y = blobs(80)
    attack = SubstituteAttack(half_of, budget=440, make=lambda f: FGSM(f, 0.2, early_stop=False))
    rounds = attack.fit(x[:40], student(), rounds=4, epochs=20, lr=5e-3)
    assert rounds[-1].agreement > 0.9
    test, label = x[40:], y[40:]
    assert attack.agreement(test).value > 0.9
    assert not attack.judge(test, label).any()
    adversarial = attack.perturb(test, label)
    assert (adversarial - test).abs().amax() <= 0.2 + 1e-6
    assert attack.judge(adversarial, label).float().mean() > 0.5
    assert attack.queries == 320 + 3 * 40


def test_a_model_is_an_oracle_by_its_argmax() -> None:
    def scores(x: Tensor) -> Tensor:
        return F.one_hot(half_of(x), 4).float()

    x, y = blobs(16)
    by_scores, by_classes = SubstituteAttack(scores), SubstituteAttack(half_of)
    nets = student(), student()
    first = by_scores.fit(x, nets[0], rounds=2, epochs=2)
    assert first == by_classes.fit(x, nets[1], rounds=2, epochs=2)
    assert torch.equal(by_scores.perturb(x, y), by_classes.perturb(x, y))


def test_equal_seeds_give_equal_substitutes_and_leave_the_generator_alone() -> None:
    x, _ = blobs(12)

    def weights(seed: int) -> Tensor:
        net = student()
        SubstituteAttack(half_of, budget=20).fit(x, net, epochs=2, seed=seed)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    state = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_grad_mode_around_it_does_not_matter() -> None:
    x, y = blobs(8)

    def attacked() -> Tensor:
        attack = SubstituteAttack(half_of)
        attack.fit(x, student(), rounds=2, epochs=2)
        result: Tensor = attack.perturb(x, y)
        return result

    expected = attacked()
    with torch.no_grad():
        assert torch.equal(attacked(), expected)


def test_the_substitute_is_trained_and_left_in_evaluation_mode() -> None:
    net = student().train()
    frozen = net[1].weight.requires_grad_(False)
    before = frozen.clone(), net[4].weight.detach().clone()
    x = blobs(8)[0].requires_grad_()
    attack = SubstituteAttack(half_of)
    attack.fit(x, net, rounds=2, epochs=2)
    assert attack.substitute is net
    assert not net.training
    assert torch.equal(net[1].weight, before[0])
    assert not torch.equal(net[4].weight, before[1])
    assert all(p.grad is None for p in net.parameters())
    assert x.grad is None


def test_a_last_image_alone_does_not_stop_batch_normalisation() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4))
    attack = SubstituteAttack(half_of, budget=9)
    attack.fit(blobs(9)[0], net, rounds=1, epochs=1, batch_size=4)
    assert attack.queries == 9


def test_the_inner_attack_is_the_callers_choice_and_runs_in_captums_harness() -> None:
    x, y = blobs(24)
    attack = SubstituteAttack(half_of, make=lambda f: PGD(f, 0.3, steps=5))
    attack.fit(x, student(), rounds=2, epochs=20, lr=5e-3)
    result, details = attack.perturb(x, y, epsilon=0.1, return_details=True)
    assert (result - x).abs().amax() <= 0.1 + 1e-6
    assert details.fooled.shape == (24,)
    harness = MinParamPerturbation(
        attack.substitute,
        attack,
        arg_name="epsilon",
        arg_min=0.0,
        arg_max=0.5,
        arg_step=0.05,
        apply_before_preproc=True,
    )
    asked = attack.queries
    found, epsilon = harness.evaluate(x[:1], target=int(y[0]), attack_kwargs={"target": int(y[0])})
    assert found is not None
    assert 0 < epsilon <= 0.5
    assert attack.queries == asked


@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        (lambda x: x.mean(), "oracle: expected 4 classes"),
        (lambda x: x.flatten(1)[:, 0], "oracle: expected 4 classes"),
        (lambda x: half_of(x)[1:], "oracle: expected 4 classes"),
        (lambda x: half_of(x) - 5, "oracle: expected 4 classes"),
        (lambda x: half_of(x).tolist(), "oracle: expected 4 classes.* got list"),
        (lambda x: x.flatten(1) * float("nan"), "oracle, scores: NaN"),
        (lambda x: half_of(x) + 9, "substitute: expected scores of the oracle's classes"),
    ],
)
def test_answers_that_are_no_classes_are_an_error(
    oracle: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SubstituteAttack(oracle).fit(blobs(4)[0], student())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"step": 0}, "step"),
        ({"lr": float("nan")}, "lr"),
        ({"images": torch.rand(0, 1, 8, 8)}, "batch is empty"),
        ({"images": 2 * torch.ones(2, 1, 8, 8)}, "outside of the bounds"),
        ({"substitute": nn.Flatten()}, "substitute: expected parameters to train"),
    ],
)
def test_wrong_arguments_of_a_fit_are_named(options: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"images": blobs(4)[0], "substitute": student()}
    attack = SubstituteAttack(half_of)
    with pytest.raises(ValueError, match=message):
        attack.fit(**(right | options))
    assert attack.queries == 0


def test_a_budget_of_zero_and_a_missing_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="budget: expected a whole number from 1"):
        SubstituteAttack(half_of, budget=0)
    with pytest.raises(TypeError, match="oracle"):
        SubstituteAttack("vgg")  # type: ignore[arg-type]
    attack = SubstituteAttack(half_of)
    x, y = blobs(4)
    with pytest.raises(RuntimeError, match="call fit"):
        attack.perturb(x, y)
    with pytest.raises(RuntimeError, match="call fit"):
        attack.agreement(x)
    with pytest.raises(TypeError, match="substitute"):
        attack.fit(x, half_of)  # type: ignore[arg-type]
    assert attack.queries == 0


def test_a_last_batch_of_one_is_no_batch_to_normalise() -> None:
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    attack = SubstituteAttack(lambda x: (x.mean(dim=(1, 2, 3)) > 0.5).long())
    for size in (1, 2, 4):  # torch: "Expected more than 1 value per channel when training"
        attack.fit(images, network, rounds=1, epochs=1, batch_size=size)


def test_a_substitute_that_detaches_is_named() -> None:
    class Detaching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1).detach())

    images = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    attack = SubstituteAttack(lambda x: (x[:, 0] > x[:, 1]).long())
    with pytest.raises(ValueError, match=r"Detaching\.forward breaks the graph itself"):
        attack.fit(images, Detaching(2, 2), rounds=2, epochs=1)
