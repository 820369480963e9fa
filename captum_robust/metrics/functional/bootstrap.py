"""Confidence intervals by the percentile bootstrap (Efron & Tibshirani, 1993)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust._checks import check, check_count, check_number, check_shape
from captum_robust._progress import counted
from captum_robust.metrics.functional._validate import (
    LARGEST_VALUE,
    check_like,
    check_real,
    check_seed,
    check_within,
)

# Draws held at a time, 8 bytes each.
CHUNK_DRAWS = 1 << 22
MANY = 1 << 14
MOST_KINDS = 16
"""Of more than so many samples with no more different values, as of hits and misses, it is drawn
how often each value comes up: the same distribution, without a draw for each sample."""
MOST_RESAMPLES = 10**7
"""Of more torch tells no quantile."""


@dataclass(frozen=True)
class Interval:
    """A mean and the bootstrap interval around it.

    Attributes:
        mean: the mean of the values.
        low: the lower end of the interval; NaN of one value, whose spread is not known.
        high: the upper end, or NaN.
        level: the share of resampled means that lies between the ends.
        n: how many values went in (those that are not NaN).
    """

    mean: float
    low: float
    high: float
    level: float
    n: int


def bootstrap_interval(
    values: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the mean of one value a sample, and its bootstrap confidence interval.

    Args:
        values: N numbers or truth values; NaN ones are left out.
        level: confidence, in (0, 1).
        resamples: how often N values are drawn with replacement. Of more than 16,384 that differ
            in 16 values at most, as hits and misses, it is drawn how often each value comes up.
        seed: the same seed gives the same interval on every device.

    Raises:
        ValueError: when no value is left, and for arguments out of range.

    >>> bootstrap_interval(torch.tensor([1.0, 1.0, float("nan")]))
    Interval(mean=1.0, low=1.0, high=1.0, level=0.95, n=2)
    """
    check_resampling(level, resamples, seed)
    return _interval("values", one_a_sample("values", values), level, resamples, seed)


def one_a_sample(name: str, values: Tensor) -> Tensor:
    """Return N values on the CPU in float64; refuse what are none, and infinite ones."""
    check_real(name, values, "a tensor N", truths=True)
    check_shape(name, values, "N")
    values = values.detach().cpu().double()
    check(not values.isinf().any(), f"{name}: expected no infinity, got some")
    check_within(name, values, -LARGEST_VALUE, LARGEST_VALUE, may_be_nan=True)
    return values


def _interval(name: str, values: Tensor, level: float, resamples: int, seed: int) -> Interval:
    values = values[~values.isnan()]
    nothing = "got nothing but NaN: there is no mean to resample"
    check(len(values), f"{name}: expected a number, {nothing}")
    n, means = len(values), resampled_means(values[None], resamples, seed)[0]
    return Interval(values.mean().item(), *percentiles(means, level, n), level, n)


def bootstrap_difference(
    a: Tensor, b: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the mean of ``a - b`` over the same samples, and its interval: the paired bootstrap.

    Args:
        a: N values, one a sample.
        b: N values of the same samples in the same order; a pair with a NaN is left out.
        level: as in :func:`bootstrap_interval`, like the rest.
        resamples: how often N pairs are drawn with replacement.
        seed: the same seed gives the same interval.

    >>> bootstrap_difference(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])).high
    0.0
    """
    check_resampling(level, resamples, seed)
    first, second = one_a_sample("a", a), one_a_sample("b", b)
    check_like("b", second, "a", first)
    return _interval("a and b", first - second, level, resamples, seed)


def check_resampling(level: float, resamples: int, seed: int) -> None:
    """Refuse a confidence or a number of resamples out of range, and a seed that is none."""
    check_number("level", level, 0, 1, open_low=True, open_high=True)
    check_count("resamples", resamples, 1, MOST_RESAMPLES)
    check_seed(seed)


def percentiles(means: Tensor, level: float, n: int) -> tuple[float, float]:
    """Return the ends between which a share ``level`` of the means lies; NaN of n = 1 value."""
    if n == 1:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def resampled_means(columns: Tensor, resamples: int, seed: int) -> Tensor:
    """Return the means C×R of N values drawn with replacement, the same draws for all C columns.

    Args:
        columns: C×N on the CPU, without NaN.
        resamples: R.
        seed: the same seed gives the same draws.
    """
    n = columns.shape[1]
    generator = torch.Generator().manual_seed(seed)
    if n > MANY:
        kinds, counts = torch.unique(columns, dim=1, return_counts=True)
        if len(counts) <= MOST_KINDS:
            means: Tensor = kinds @ _drawn_counts(counts, resamples, generator) / n
            return means
    chunk = max(1, CHUNK_DRAWS // n)
    parts = []
    for done in counted(range(0, resamples, chunk), "part", None, "bootstrap"):
        drawn = torch.randint(n, (min(chunk, resamples - done), n), generator=generator)
        parts.append(torch.stack([column[drawn].mean(dim=1) for column in columns]))
    return torch.cat(parts, dim=1)


def _drawn_counts(counts: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Return K×R, how often each of K kinds of samples is among as many drawn as there are.

    That is multinomial: binomial for the first kind, then for the next one of what is left.
    """
    left = torch.full((resamples,), float(counts.sum()), dtype=torch.float64)
    others = counts.flip(0).cumsum(0).flip(0)
    drawn = []
    for share in (counts.double() / others).tolist():
        drawn.append(torch.binomial(left, torch.full_like(left, share), generator=generator))
        left = left - drawn[-1]
    return torch.stack(drawn)
