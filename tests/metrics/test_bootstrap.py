import math

import pytest
import torch

from captum_robust.metrics.functional import (
    bootstrap,
    bootstrap_difference,
    bootstrap_interval,
    gap_closed,
)


def test_interval_is_that_of_the_binomial_for_many_samples():
    values = torch.arange(1000) % 10 < 3
    found = bootstrap_interval(values)
    half_width = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - half_width, abs=0.003)
    assert found.high == pytest.approx(0.3 + half_width, abs=0.003)
    assert (found.level, found.n) == (0.95, 1000)


def test_a_lower_level_gives_a_narrower_interval():
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    wide, narrow = bootstrap_interval(values, 0.99), bootstrap_interval(values, 0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_values_that_are_nan_are_left_out():
    values = torch.tensor([0.0, 1.0, float("nan"), 1.0])
    without = torch.tensor([0.0, 1.0, 1.0])
    assert bootstrap_interval(values) == bootstrap_interval(without)


def test_the_same_seed_gives_the_same_interval():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert (torch.random.get_rng_state() == state).all()


def test_chunks_of_draws_cover_all_resamples(monkeypatch):
    import captum_robust.metrics.functional.bootstrap as bootstrap

    monkeypatch.setattr(bootstrap, "CHUNK_DRAWS", 64)
    values = torch.arange(1000) % 2
    found = bootstrap_interval(values, resamples=300)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=0.2)


def test_a_paired_difference_is_tighter_than_the_two_alone():
    a = torch.rand(100, generator=torch.Generator().manual_seed(0))
    b = a - 0.1
    b[3] = float("nan")
    found = bootstrap_difference(a, b)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.n == 99


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("level", r"level: expected a number in \(0, 1\), got"),
        ("resamples", "resamples: expected a whole number from 1"),
        ("seed", "seed: expected a whole number"),
    ],
)
@pytest.mark.parametrize("value", ["x", None, [1], math.nan, 1.5, torch.rand(3), True])
def test_what_is_no_number_is_named(name, message, value):
    ones = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(ones, **{name: value})
    with pytest.raises(ValueError, match=message):
        gap_closed(ones, ones, 0 * ones, **{name: value})


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="b: expected a tensor N, got list"):
        bootstrap_difference(torch.ones(3), [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="nothing but NaN"):
        bootstrap_interval(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="level: expected a number in"):
        bootstrap_interval(torch.ones(3), level=95)
    with pytest.raises(ValueError, match=r"b: expected the shape of a, \(3,\), got \(2,\)"):
        bootstrap_difference(torch.ones(3), torch.ones(2))
    with pytest.raises(TypeError, match="values: expected a tensor N, got list"):
        bootstrap_interval([1.0])


def test_one_value_has_no_interval():
    for one in (torch.tensor([0.5]), torch.tensor([math.nan, 0.5])):
        interval = bootstrap_interval(one)
        assert (interval.mean, interval.n) == (0.5, 1)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
    lone = bootstrap_difference(torch.tensor([1.0]), torch.tensor([0.0]))
    assert lone.mean == 1
    assert math.isnan(lone.low)
    gap = gap_closed(torch.zeros(1), torch.ones(1), torch.zeros(1))
    assert gap.value == 1
    assert math.isnan(gap.low)
    assert math.isnan(gap.high)


def test_of_many_samples_with_few_values_it_is_drawn_how_often_each_comes_up(monkeypatch):
    n, p = 1 << 15, torch.tensor([0.5, 0.2, 0.3])
    values = torch.repeat_interleave(torch.tensor([0.0, 1.0, -1.0]), (n * p).round().long())
    found = bootstrap_interval(values, resamples=20_000)
    # The mean of draws with replacement has the standard deviation of the values over √n.
    spread = 1.959964 * (values.double().std(correction=0) / n**0.5).item()
    assert found.low == pytest.approx(found.mean - spread, abs=0.03 * spread)
    assert found.high == pytest.approx(found.mean + spread, abs=0.03 * spread)
    assert found == bootstrap_interval(values.flip(0), resamples=20_000)
    monkeypatch.setattr(bootstrap, "MOST_KINDS", 0)  # a draw for each sample
    each = bootstrap_interval(values, resamples=2000)
    assert each.low == pytest.approx(found.low, abs=0.15 * spread)


def test_gaps_of_many_samples_are_resampled_together():
    n = 1 << 15
    ids = torch.arange(n)
    misses = [(ids % 10 < limit).double() for limit in (5, 6, 2)]
    found = gap_closed(*misses)
    # All three methods miss together, so the gap of .4 hardly moves.
    assert found.value == pytest.approx(0.25, abs=1e-3)
    assert found.high - found.low < 0.02
