"""Two folds of the samples: a threshold is tuned on one and reported on the other."""

from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, check_count, check_type
from captum_robust.metrics.functional._validate import (
    check_each,
    check_real,
    check_seed,
    check_within,
)

LARGEST_SUMMAND = 4e9
"""That is summed in whole millionths, so that thousands of them fit into 64 bits."""


def split_folds(samples: int | Sequence[Hashable], seed: int = 0) -> Tensor:
    """Divide samples into two folds, to tune a threshold on one and report on the other.

    The fold of a sample follows from the text of its id and the seed alone, so that every process
    of a distributed run agrees without asking, in any order. The folds are of about the same size;
    of a handful of samples one may be empty.

    Args:
        samples: their ids, or their number N: the ids are then 0 … N-1.
        seed: another seed, another split.

    Returns:
        N int64, 0 or 1.

    >>> split_folds(["cat.jpg", "dog.jpg"])[1] == split_folds(["dog.jpg"])[0]
    tensor(True)
    >>> split_folds(3).equal(split_folds(["0", "1", "2"]))
    True
    """
    is_text = isinstance(samples, str)
    check(not is_text, "samples: expected a number or a sequence of ids, got a text", TypeError)
    check_seed(seed)
    if isinstance(samples, int):
        samples = range(check_count("samples", samples))
    ids = texts_of("samples", samples)
    digests = [blake2b(f"{seed}:{sample}".encode(), digest_size=1).digest() for sample in ids]
    return torch.tensor([digest[0] & 1 for digest in digests], dtype=torch.int64)


def texts_of(name: str, ids: Any) -> list[str]:
    """Return the text of each id, the same for a number, an array's and a tensor's element.

    Bytes are read as UTF-8, and whole numbers of floating point, as of a table with gaps, as whole.

    >>> texts_of("ids", torch.tensor([3, 4])) == texts_of("ids", [3.0, b"4"])
    True
    """
    got = f"expected a collection of ids, got the text {ids!r}; one id is a list of one"
    check(not isinstance(ids, (str, bytes)), f"{name}: {got}", TypeError)
    dimensions = getattr(ids, "ndim", 1)
    check(dimensions == 1, f"{name}: expected one id a sample, got {dimensions} dimensions")
    if isinstance(ids, Tensor):
        check_real(name, ids, "ids", truths=True)
    check_type(name, ids, Iterable, "a collection of ids")
    values = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    values = [_plain(value) for value in values]
    is_bool = any(isinstance(value, bool) for value in values)
    check(not is_bool, f"{name}: expected ids, got truth values", TypeError)
    for value in values:
        # NaN is not equal to itself.
        is_id = isinstance(value, Hashable) and value is not None and value == value
        check(is_id, f"{name}: expected ids, got {value!r}")
    return list(map(_text, values))


def _plain(value: Any) -> Any:
    """The Python number of an element of an array or a tensor; what has several is no id."""
    if getattr(value, "ndim", 0):
        return None
    return value.item() if hasattr(value, "item") and not getattr(value, "is_meta", 0) else value


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def folds_of(
    n: int, ids: Sequence[Hashable] | None, folds: Tensor | None, seed: int, single: bool
) -> Tensor:
    """Return N zeros and ones: the given ones, or the split of the ids, or of N.

    With ``single``, where nothing is tuned on other samples, all are in the first fold.
    """
    ids = None if ids is None else texts_of("ids", ids)
    check_each("ids", ids, n)
    if single:
        return torch.zeros(n, dtype=torch.int64)
    if folds is None:
        return split_folds(n if ids is None else ids, seed)
    check_real("folds", folds, f"a tensor of {n} zeros and ones", truths=True)
    fits = folds.shape == (n,) and bool(((folds == 0) | (folds == 1)).all())
    check(fits, f"folds: expected {n} zeros and ones, got others of shape {tuple(folds.shape)}")
    return folds.long()


def millionths(values: Tensor) -> Tensor:
    """Return values as whole numbers, whose sum does not depend on the order; NaN as any."""
    check_within("values", values, -LARGEST_SUMMAND, LARGEST_SUMMAND, may_be_nan=True)
    return (values * 1e6).round().long()


def fold_sums(values: Tensor, folds: Tensor) -> Tensor:
    """Return 2×…: the sums of N×… truth values or whole numbers over the samples of each fold.

    Samples whose fold is neither 0 nor 1 are in no sum.
    """
    return torch.stack([values[folds == fold].sum(dim=0) for fold in (0, 1)])


def best_columns(
    scores: Tensor, tie_breakers: Tensor, sizes: Tensor, single: bool
) -> list[list[int]]:
    """Return for each fold the T columns (thresholds) to score it with: the other fold's best.

    Args:
        scores: 2×T×C whole numbers, such as the correct boxes in each fold; the largest wins.
        tie_breakers: 2×C; among columns of one score the largest of these wins, and of those the
            first.
        sizes: 2, the scored samples in each fold.
        single: all samples are in the first fold, which is tuned on itself.

    Raises:
        ValueError: when a fold is empty.
    """
    counts = sizes.tolist()
    check(
        counts[0] and (single or counts[1]),
        f"folds: expected scored samples in each to tune on, got {counts}; give other folds, "
        "another seed, or tune on the reported ones too (oracle=True, --oracle)",
    )
    best = []
    for fold in (0,) if single else (1, 0):
        ties = tie_breakers[fold].tolist()
        # Not argmax over the tensor: of equal maxima it may return any on some devices.
        ranked = [list(zip(row, ties, strict=True)) for row in scores[fold].tolist()]
        best.append([row.index(max(row)) for row in ranked])
    return best
