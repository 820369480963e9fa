"""The draw has the stated probability, in both variants, and the gradient is worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from captum_robust.nn import straight_through

N = 40_000


def share_of_ones(p: float, **options: Any) -> float:
    drawn = straight_through(torch.full((N,), p), torch.Generator().manual_seed(0), **options)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    return float(drawn.mean())


def bound(p: float) -> float:
    """Hoeffding's bound: a share of N draws is farther from p in one of 10^6 tests."""
    return math.sqrt(math.log(2e6) / (2 * N))


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9, 0.98])
def test_ones_are_as_frequent_as_asked(p: float) -> None:
    assert abs(share_of_ones(p) - p) < bound(p)


@pytest.mark.parametrize(
    ("p", "printed"), [(0.0, 0.2689), (0.1, 0.3100), (0.5, 0.5), (1.0, 0.7311)]
)
def test_the_printed_formula_is_never_near_certain(p: float, printed: float) -> None:
    assert 1 / (1 + math.exp(1 - 2 * p)) == pytest.approx(printed, abs=1e-4)
    assert abs(share_of_ones(p, literal=True) - printed) < bound(p)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_it_draws_as_two_gumbel_variables_do(p: float, literal: bool) -> None:
    z1, z2 = np.random.default_rng(0).gumbel(size=(2, N))
    drawn = p + z1 > 1 - p + z2 if literal else math.log(p) + z1 > math.log(1 - p) + z2
    assert abs(drawn.mean() - share_of_ones(p, literal=literal)) < 2 * bound(p)


def test_no_draw_differs_from_a_certain_probability() -> None:
    assert share_of_ones(0.0) == 0
    assert share_of_ones(1.0) == 1


@pytest.mark.parametrize("literal", [False, True])
def test_the_gradient_passes_as_if_nothing_was_drawn(literal: bool) -> None:
    p = torch.tensor([0.0, 1.0, 0.3, 0.999999], requires_grad=True)
    weights = torch.tensor([2.0, -3.0, 5.0, 7.0])
    (straight_through(p, literal=literal) * weights).sum().backward()
    assert p.grad is not None
    assert torch.equal(p.grad, weights)


def test_the_gradient_of_logits_is_finite_however_large_they_are() -> None:
    logits = torch.tensor([-math.inf, -1e4, -50.0, 0.0, 50.0, 1e4, math.inf], requires_grad=True)
    drawn = straight_through(torch.sigmoid(logits), torch.Generator().manual_seed(0))
    assert drawn[:3].tolist() == [0, 0, 0]
    assert drawn[4:].tolist() == [1, 1, 1]
    drawn.sum().backward()
    assert logits.grad is not None
    # ∂σ/∂logit = σ(1 - σ), a quarter at 0.
    torch.testing.assert_close(logits.grad, torch.tensor([0, 0, 0, 0.25, 0, 0, 0]))


def test_a_result_is_exactly_zero_or_one() -> None:
    # b + p - p is not: (1 + .3) - .3 rounds to another number for many p.
    p = torch.rand(10_000, generator=torch.Generator().manual_seed(3))
    assert ((1 + p) - p != 1).any()
    assert set(straight_through(p).unique().tolist()) == {0.0, 1.0}


def test_half_precision_draws_with_full_precision() -> None:
    p = torch.full((N,), 2**-9, dtype=torch.bfloat16)
    drawn = straight_through(p, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.bfloat16
    # Uniform bfloat16 numbers are multiples of 2^-8, of which 0 alone is below p: twice as often.
    assert abs(float(drawn.float().mean()) - 2**-9) < 0.6 * 2**-9


def test_a_generator_decides_and_the_global_one_stays() -> None:
    p = torch.full((50,), 0.5)
    before = torch.get_rng_state()
    first = straight_through(p, torch.Generator().manual_seed(7))
    assert torch.equal(first, straight_through(p, torch.Generator().manual_seed(7)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, straight_through(p, torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("wrong", [1.5, -0.1, math.nan, math.inf])
def test_what_is_no_probability_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"probabilities: .*\[0, 1\].*sigmoid"):
        straight_through(torch.tensor([0.5, wrong]))


def test_what_is_no_tensor_of_floats_is_refused() -> None:
    with pytest.raises(TypeError, match=r"probabilities: .*got torch\.int64"):
        straight_through(torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"probabilities: .*got float"):
        straight_through(0.5)  # type: ignore[arg-type]
