"""Weak localization: how many boxes miss the object, with the threshold tuned on other images."""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, check_number, check_shape, check_type
from captum_robust.metrics.functional._validate import (
    ROUNDING,
    check_flag,
    check_like,
    check_real,
    check_seed,
    check_truths,
    check_within,
    numbers_in,
)
from captum_robust.metrics.functional.folds import (
    best_columns,
    fold_sums,
    folds_of,
    millionths,
    texts_of,
)
from captum_robust.metrics.functional.thresholding import alpha_grid


@dataclass(frozen=True)
class Protocol:
    """What a paper calls a correct box.

    Attributes:
        iou_thresholds: the overlaps asked for; the error is averaged over them.
        strict: an overlap must exceed the threshold, not just reach it.
        inclusive: the default of :func:`box_iou`'s ``inclusive`` for this package's half-open
            boxes. Fong & Vedaldi add one to the sides of boxes whose corners are pixel numbers,
            which is the pixel count of half-open boxes, hence False; the MaxBoxAcc code adds one
            to half-open boxes.
    """

    iou_thresholds: tuple[float, ...]
    strict: bool
    inclusive: bool


PROTOCOLS: dict[str, Protocol] = {
    "whi2020": Protocol((0.5,), strict=True, inclusive=False),
    "fong2017": Protocol((0.5,), strict=False, inclusive=False),
    "maxboxacc": Protocol((0.5,), strict=False, inclusive=True),
    "maxboxacc_v2": Protocol((0.3, 0.5, 0.7), strict=False, inclusive=True),
}
"""Name -> the overlaps at which a box is right, and how it is counted."""


@dataclass(frozen=True, eq=False)
class LocalizationResult:
    """The outcome of :func:`localization_error`.

    Attributes:
        error: the share of scored samples whose box is wrong, in [0, 1] (averaged over the
            overlap thresholds where there are several).
        correct: N Boolean; N×T for a protocol with T > 1 overlap thresholds. False where the
            sample is not scored.
        scored: N Boolean: the samples that count.
        chosen: for each fold, and each of the T overlap thresholds, the (strategy, alpha) that
            its samples were scored with: ``chosen[fold][t]``. One fold if nothing was tuned or
            ``oracle`` is set.
        n: how many samples are scored.
        without_boxes: how many had no ground-truth box (a NaN overlap).
        blacklisted: how many others the blacklist took out.
        oracle: the threshold was tuned on the very samples that are reported.
    """

    error: float
    correct: Tensor
    scored: Tensor
    chosen: tuple[tuple[tuple[str, float], ...], ...]
    n: int
    without_boxes: int
    blacklisted: int
    oracle: bool

    @property
    def per_sample_error(self) -> Tensor:
        """N float64 whose mean is the error, NaN where not scored: food for the bootstrap."""
        wrong = 1 - self.correct.double()
        wrong = wrong.mean(dim=1) if wrong.dim() == 2 else wrong
        return wrong.masked_fill(~self.scored, torch.nan)


def localization_error(
    ious: Tensor | Mapping[str, Tensor],
    *,
    protocol: str = "whi2020",
    iou_threshold: float | None = None,
    strict: bool | None = None,
    strategy: str = "energy",
    alphas: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    ids: Sequence[Hashable] | None = None,
    folds: Tensor | None = None,
    seed: int = 0,
    oracle: bool = False,
    blacklist: Tensor | Collection[Hashable] | None = None,
) -> LocalizationResult:
    """Return the weak localization error, with the threshold tuned on the other half of the data.

    The samples fall into two folds. Each fold is scored with the threshold that makes the fewest
    errors on the other one; of equal ones, with the largest mean overlap there. Given overlaps of
    several families, the family is chosen along with α. One threshold alone needs no tuning.

    Args:
        ious: overlaps N×A of the boxes at A thresholds (:func:`best_iou`), NaN where there is
            no ground truth; or one such tensor for each family of thresholds.
        protocol: which boxes are correct: ``"whi2020"`` IoU > .5 (also the rule of adversarial
            localization networks), ``"fong2017"`` and ``"maxboxacc"`` IoU ≥ .5,
            ``"maxboxacc_v2"`` the average over IoU ≥ .3, .5, .7, each with a threshold of its
            own. See :data:`PROTOCOLS`.
        iou_threshold: replaces the protocol's overlap.
        strict: replaces the protocol's choice between > and ≥.
        strategy: the family that a single tensor ``ious`` belongs to.
        alphas: the α of each column, for each family; by default :func:`alpha_grid`.
        ids: an id a sample, for ``folds`` and ``blacklist``.
        folds: N integers 0 and 1; by default :func:`split_folds` of the ids, or of N.
        seed: of that split.
        oracle: tune on the very samples that are reported, as some papers do; optimistic.
        blacklist: samples to leave out: N Boolean, or ids.

    Raises:
        ValueError: when shapes do not fit, no sample is left, or a fold is empty.

    >>> ious = torch.tensor([[0.2, 0.6], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9]])
    >>> result = localization_error(ious, alphas=[0.5, 0.9], oracle=True)
    >>> result.error, result.chosen
    (0.25, ((('energy', 0.9),),))
    """
    check_flag("oracle", oracle)
    check_seed(seed)
    names, overlaps = _columns(ious, strategy, alphas)
    n = len(overlaps)
    thresholds, strict = correctness_rule(protocol, iou_threshold, strict)
    # With a single threshold there is nothing to tune.
    single = oracle or len(names) == 1
    ids = None if ids is None else texts_of("ids", ids)
    folds = folds_of(n, ids, folds, seed, single).to(overlaps.device)
    without = overlaps.isnan().any(dim=1)
    listed = listed_samples(blacklist, ids, n).to(overlaps.device)
    scored = ~(without | listed)
    total = int(scored.sum())
    check(
        total,
        f"ious: expected a sample to score, got {n}, of which {int(without.sum())} have no box "
        f"and {int(listed.sum())} are blacklisted",
    )
    correct = correct_columns(overlaps, thresholds, strict)
    folds = folds.masked_fill(~scored, -1)
    best = best_columns(*localization_sums(overlaps, correct, folds), single)
    picked = torch.zeros(n, len(thresholds), dtype=torch.bool, device=overlaps.device)
    for fold, columns in enumerate(best):
        for t, column in enumerate(columns):
            picked[:, t] |= (folds == fold) & correct[:, t, column]
    return LocalizationResult(
        error=1 - picked.sum().item() / (total * len(thresholds)),
        correct=picked if len(thresholds) > 1 else picked[:, 0],
        scored=scored,
        chosen=tuple(tuple(names[column] for column in columns) for columns in best),
        n=total,
        without_boxes=int(without.sum()),
        blacklisted=int((listed & ~without).sum()),
        oracle=oracle and len(names) > 1,
    )


def correctness_rule(
    protocol: str, iou_threshold: float | None = None, strict: bool | None = None
) -> tuple[tuple[float, ...], bool]:
    """Return a protocol's overlap thresholds and strictness, with the given ones in their place."""
    check_choice("protocol", protocol, PROTOCOLS)
    rule = PROTOCOLS[protocol]
    if iou_threshold is not None:
        check_number("iou_threshold", iou_threshold, 0, 1)
    check_flag("strict", strict, optional=True)
    thresholds = rule.iou_thresholds if iou_threshold is None else (iou_threshold,)
    return thresholds, rule.strict if strict is None else strict


def correct_columns(overlaps: Tensor, thresholds: Sequence[float], strict: bool) -> Tensor:
    """Return N×T×C Boolean: which of C boxes a sample are correct at each of T overlaps."""
    wanted = torch.tensor(thresholds, dtype=overlaps.dtype, device=overlaps.device)[:, None]
    return overlaps[:, None] > wanted if strict else overlaps[:, None] >= wanted


def localization_sums(
    overlaps: Tensor, correct: Tensor, folds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what tuning needs of each fold: 2×T×C correct boxes, 2×C overlaps, 2 samples.

    Args:
        overlaps: N×C; they add up in :func:`millionths`.
        correct: N×T×C of :func:`correct_columns`.
        folds: N; samples that are not scored are in neither 0 nor 1.
    """
    counts, sums = fold_sums(correct, folds), fold_sums(millionths(overlaps), folds)
    return counts, sums, fold_sums(torch.ones_like(folds), folds)


def gt_known_localization(correct_box: Tensor) -> Tensor:
    """Return GT-known Loc: the share of correct boxes for the annotated class, float64.

    >>> gt_known_localization(torch.tensor([True, False])).item()
    0.5
    """
    return check_truths("correct_box", correct_box).mean()


def top1_localization(correct_box: Tensor, correct_class: Tensor) -> Tensor:
    """Return Top-1 Loc: the share of samples whose box and class are both correct, float64.

    >>> top1_localization(torch.tensor([True, True]), torch.tensor([True, False])).item()
    0.5
    """
    box = check_truths("correct_box", correct_box)
    label = check_truths("correct_class", correct_class)
    check_like("correct_class", label, "correct_box", box)
    return (box * label.to(box.device)).mean()


def _columns(
    ious: Tensor | Mapping[str, Tensor],
    strategy: str,
    alphas: Sequence[float] | Mapping[str, Sequence[float]] | None,
) -> tuple[list[tuple[str, float]], Tensor]:
    """Line the families up: the (strategy, alpha) of C columns, and N×C overlaps."""
    check_type("strategy", strategy, str, "the name of a family")
    families = {strategy: ious} if isinstance(ious, Tensor) else ious
    check_type("ious", families, Mapping, "a tensor N×A, or one for each family")
    check(families, "ious: expected the overlaps of at least one family, got none")
    names: list[tuple[str, float]] = []
    for family, overlaps in families.items():
        check_real(f"ious of {family!r}", overlaps, "a tensor N×A")
        check_shape(f"ious of {family!r}", overlaps, "N×A")
        given = alphas.get(family, ()) if isinstance(alphas, Mapping) else alphas
        name = f"alphas of {family!r}"
        grid = alpha_grid(family) if given is None else numbers_in(name, given, 0, math.inf)
        columns = overlaps.shape[1]
        check(
            len(grid) == columns,
            f"ious of {family!r}: expected a column for each of {len(grid)} alphas, got {columns}",
        )
        names += [(family, float(alpha)) for alpha in grid]
    counts = sorted({len(overlaps) for overlaps in families.values()})
    check(len(counts) == 1, f"ious: expected as many samples in every family, got {counts}")
    every = torch.cat(list(families.values()), dim=1)
    every = every if every.dtype == torch.float64 else every.float()
    check_within("ious", every, 0, 1 + ROUNDING, may_be_nan=True)
    return names, every


def listed_samples(
    blacklist: Tensor | Collection[Hashable] | None, ids: Sequence[Hashable] | None, n: int
) -> Tensor:
    """Return N Boolean: the samples that the blacklist takes out."""
    if isinstance(blacklist, Tensor) and (blacklist.dtype == torch.bool or blacklist.ndim != 1):
        got = f"{tuple(blacklist.shape)} of {blacklist.dtype}"
        fits = blacklist.dtype == torch.bool and blacklist.shape == (n,)
        check(fits, f"blacklist: expected {n} truth values or a collection of ids, got {got}")
        return blacklist
    if blacklist is None:
        return torch.zeros(n, dtype=torch.bool)
    check(ids is not None, "ids: expected those of the samples, for the blacklist, got None")
    names = set(texts_of("blacklist", blacklist))
    return torch.tensor([sample in names for sample in texts_of("ids", ids)], dtype=torch.bool)
