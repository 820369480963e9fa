from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from captum_robust.attacks import LeastLikelyClass, Share, rank_analysis

IDENTITY = nn.Identity()  # the inputs are the scores

# Ranks by hand. Sample 0 keeps its class; 1 goes from class 0 to the second; 2 from class 3 to the
# last, where the former class is third; 3 swaps its first two.
CLEAN = torch.tensor(
    [[9.0, 5, 1, 0], [9.0, 5, 1, 0], [0.0, 1, 2, 9], [3.0, 4, 1, 2]],
)
ADVERSARIAL = torch.tensor(
    [[8.0, 5, 1, 0], [5.0, 9, 7, 0], [9.0, 5, 1, 4], [4.0, 3, 1, 2]],
)


def test_ranks_are_those_counted_by_hand() -> None:
    ranks = rank_analysis(IDENTITY, CLEAN, ADVERSARIAL)
    assert (ranks.n, ranks.changed) == (4, 3)
    assert ranks.adversarial_in_clean.tolist() == [1, 3, 1]
    assert ranks.clean_in_adversarial.tolist() == [2, 2, 1]
    assert ranks.share("adversarial_in_clean", 2).value == pytest.approx(2 / 3)
    assert ranks.share("clean_in_adversarial", 2).value == pytest.approx(1 / 3)
    assert ranks.share("clean_in_adversarial", 3).value == 1
    assert ranks.share("adversarial_in_clean", 3).n == 3


def test_histogram_gathers_what_is_further_down() -> None:
    ranks = rank_analysis(IDENTITY, CLEAN, ADVERSARIAL, top=3)
    assert ranks.histogram("adversarial_in_clean").tolist() == [2, 0, 1]
    assert ranks.histogram("clean_in_adversarial").tolist() == [1, 2, 0]


@pytest.mark.parametrize(("count", "n"), [(0, 7), (3, 7), (38, 100), (7, 7)])
def test_interval_is_wilsons(count: int, n: int) -> None:
    share = Share.of(count, n)
    expected = binomtest(count, n).proportion_ci(method="wilson")
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_batches_count_what_all_at_once_counts() -> None:
    g = torch.Generator().manual_seed(0)
    clean, adversarial = torch.rand(2, 17, 6, generator=g)
    whole = rank_analysis(IDENTITY, clean, adversarial)
    parts = rank_analysis(IDENTITY, clean, adversarial, batch_size=5)
    assert 0 < whole.changed < 17
    assert torch.equal(whole.adversarial_in_clean, parts.adversarial_in_clean)
    assert torch.equal(whole.clean_in_adversarial, parts.clean_in_adversarial)


def test_a_changed_class_is_never_first_even_among_equal_scores() -> None:
    clean = torch.tensor([[1.0, 1, 1]])
    ranks = rank_analysis(IDENTITY, clean, torch.tensor([[0.0, 1, 1]]))
    assert ranks.adversarial_in_clean.tolist() == [1]
    assert ranks.clean_in_adversarial.tolist() == [2]


def test_takes_a_function_of_several_inputs() -> None:
    half = CLEAN / 2
    ranks = rank_analysis(lambda a, b: a + b, (half, half), (ADVERSARIAL - half, half))
    assert ranks.adversarial_in_clean.tolist() == [1, 3, 1]


def test_the_least_likely_class_was_last_before(x: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(576, 6))
    result, details = LeastLikelyClass(model, 0.25).perturb(x, return_details=True)
    assert details.fooled.all()
    ranks = rank_analysis(model, x, result)
    assert ranks.adversarial_in_clean.tolist() == [5, 5, 5]


def test_nothing_changed_gives_nan_and_a_figure() -> None:
    ranks = rank_analysis(IDENTITY, CLEAN, CLEAN)
    assert ranks.changed == 0
    share = ranks.share("adversarial_in_clean", 5)
    assert share.n == 0
    assert all(math.isnan(v) for v in (share.value, share.low, share.high))
    assert ranks.histogram("adversarial_in_clean").tolist() == [0, 0, 0, 0, 0]
    ranks.plot()


def test_figure_shows_both_histograms_as_shares() -> None:
    figure = rank_analysis(IDENTITY, CLEAN, ADVERSARIAL, top=3).plot()
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights[0] == pytest.approx([2 / 3, 0, 1 / 3])
    assert heights[1] == pytest.approx([1 / 3, 2 / 3, 0])
    assert "3 of 4" in figure.get_suptitle()


def test_a_model_may_write_to_its_inputs() -> None:
    clean, adversarial = torch.tensor([[0.9, 0.5]]), torch.tensor([[0.5, 0.9]])
    found = rank_analysis(lambda x: x.neg_(), clean, adversarial)
    assert found.changed == 1
    assert torch.equal(clean, torch.tensor([[0.9, 0.5]]))


def test_leaves_model_and_inputs_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    seen: list[bool] = []
    net.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    x = CLEAN.clone().requires_grad_()
    rank_analysis(net, x, ADVERSARIAL)
    assert seen == [False, False]  # one pass each
    assert net.training
    assert x.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adversarial": ADVERSARIAL[:3]}, "adversarial: expected the shapes"),
        ({"adversarial": (ADVERSARIAL, ADVERSARIAL)}, "adversarial: expected the shapes"),
        ({"clean": CLEAN[:0], "adversarial": CLEAN[:0]}, "batch is empty"),
        ({"adversarial": ADVERSARIAL * math.nan}, "sample 0"),
        ({"top": 1}, "top"),
        ({"batch_size": 0}, "batch_size"),
        ({"forward_func": lambda x: x.sum(dim=1)[1:]}, "scores 4×K"),
        ({"forward_func": lambda x: x.log()}, "infinity in sample 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    right: dict[str, object] = {
        "forward_func": IDENTITY,
        "clean": CLEAN,
        "adversarial": ADVERSARIAL,
    }
    with pytest.raises(ValueError, match=message):
        rank_analysis(**(right | arguments))  # type: ignore[arg-type]


def test_unknown_direction_is_named() -> None:
    ranks = rank_analysis(IDENTITY, CLEAN, ADVERSARIAL)
    with pytest.raises(ValueError, match=r"direction: expected one of .*, got 'clean'"):
        ranks.share("clean", 2)
    with pytest.raises(ValueError, match="k:"):
        ranks.share("adversarial_in_clean", 1)


def test_a_tensor_is_needed() -> None:
    def scores(x: Tensor) -> list[float]:
        return x.tolist()

    with pytest.raises(TypeError, match="forward_func"):
        rank_analysis(scores, CLEAN, ADVERSARIAL)  # type: ignore[arg-type]
