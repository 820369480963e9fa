"""Confidence intervals by the percentile bootstrap (Efron & Tibshirani, 1993)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust._checks import as_number

# Draws held at a time, 8 bytes each.
CHUNK_DRAWS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean and the bootstrap interval around it.

    Attributes:
        mean: the mean of the values.
        low: the lower end of the interval.
        high: the upper end.
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
        resamples: how often N values are drawn with replacement.
        seed: the same seed gives the same interval on every device.

    Raises:
        ValueError: when no value is left, and for arguments out of range.

    >>> bootstrap_interval(torch.tensor([1.0, 1.0, float("nan")]))
    Interval(mean=1.0, low=1.0, high=1.0, level=0.95, n=2)
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a tensor, not {type(values).__name__}")
    if values.dim() != 1:
        raise ValueError(f"values must have one dimension, not shape {tuple(values.shape)}")
    check_resampling(level, resamples, seed)
    values = values.detach().to(device="cpu", dtype=torch.float64)
    values = values[~values.isnan()]
    n = len(values)
    if n == 0:
        raise ValueError("values hold nothing but NaN: there is no mean to resample")
    means = resampled_means(values[None], resamples, seed)[0]
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(values.mean().item(), low, high, level, n)


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
    for name, values in (("a", a), ("b", b)):
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(values).__name__}")
    if a.shape != b.shape:
        raise ValueError(
            f"a and b must pair up, not have shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return bootstrap_interval(a.double() - b.double().to(a.device), level, resamples, seed)


def check_resampling(level: float, resamples: int, seed: int) -> None:
    """Refuse a confidence or a number of resamples out of range, and a seed that is none."""
    if not 0 < as_number(level) < 1:
        raise ValueError(f"level must be in (0, 1), not {level!r}")
    if not _is_whole(resamples) or resamples < 1:
        raise ValueError(f"resamples must be at least 1 and whole, not {resamples!r}")
    if not _is_whole(seed):
        raise ValueError(f"seed must be a whole number, not {seed!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def resampled_means(columns: Tensor, resamples: int, seed: int) -> Tensor:
    """Return the means C×R of N values drawn with replacement, the same draws for all C columns.

    Args:
        columns: C×N on the CPU, without NaN.
        resamples: R.
        seed: the same seed gives the same draws.
    """
    n = columns.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, CHUNK_DRAWS // n)
    parts = []
    for done in range(0, resamples, chunk):
        drawn = torch.randint(n, (min(chunk, resamples - done), n), generator=generator)
        parts.append(torch.stack([column[drawn].mean(dim=1) for column in columns]))
    return torch.cat(parts, dim=1)
