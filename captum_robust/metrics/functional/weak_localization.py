"""Weak localization: how many boxes miss the object, with the threshold tuned on other images."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from captum_robust.metrics.functional._validate import check_choice
from captum_robust.metrics.functional.thresholding import STRATEGIES, alpha_grid


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


def split_folds(samples: int | Sequence[Hashable], seed: int = 0) -> Tensor:
    """Divide samples into two folds, to tune a threshold on one and report on the other.

    Args:
        samples: their number: random halves, equal up to one. Or their ids: the fold of an id
            follows from its text and the seed alone, so that every process of a distributed run
            agrees without asking, in any order; halves of about the same size.
        seed: another seed, another split.

    Returns:
        N int64, 0 or 1.

    >>> split_folds(6).bincount().tolist()
    [3, 3]
    >>> split_folds(["cat.jpg", "dog.jpg"])[1] == split_folds(["dog.jpg"])[0]
    tensor(True)
    """
    if isinstance(samples, int):
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(samples, generator=generator) % 2
    if isinstance(samples, str):
        raise TypeError(f"samples must be a number or a sequence of ids, not {samples!r}")
    digests = [blake2b(f"{seed}:{sample}".encode(), digest_size=1).digest() for sample in samples]
    return torch.tensor([digest[0] & 1 for digest in digests], dtype=torch.int64)


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
    names, overlaps = _columns(ious, strategy, alphas)
    n = len(overlaps)
    if ids is not None and len(ids) != n:
        raise ValueError(f"ids has {len(ids)} entries for {n} samples")
    thresholds, strict = correctness_rule(protocol, iou_threshold, strict)
    without = overlaps.isnan().any(dim=1)
    listed = _listed(blacklist, ids, n).to(overlaps.device)
    scored = ~(without | listed)
    if not scored.any():
        raise ValueError(
            f"no sample is left to score: of {n}, {int(without.sum())} have no box and "
            f"{int(listed.sum())} are blacklisted"
        )
    correct = correct_columns(overlaps, thresholds, strict) & scored[:, None, None]
    # With a single threshold there is nothing to tune.
    single = oracle or len(names) == 1
    if single:
        folds = torch.zeros(n, dtype=torch.int64)
    elif folds is None:
        folds = split_folds(n if ids is None else ids, seed)
    elif folds.shape != (n,) or not ((folds == 0) | (folds == 1)).all():
        raise ValueError(f"folds must be {n} zeros and ones, not {tuple(folds.shape)}")
    folds = folds.to(overlaps.device)
    counts = torch.stack([correct[folds == fold].sum(dim=0) for fold in (0, 1)])
    sizes = torch.stack([scored[folds == fold].sum() for fold in (0, 1)])
    overlap = millionths(overlaps)
    sums = torch.stack([overlap[scored & (folds == fold)].sum(dim=0) for fold in (0, 1)])
    best = best_columns(counts, sums, sizes, single)
    picked = torch.zeros(n, len(thresholds), dtype=torch.bool, device=overlaps.device)
    for fold, columns in enumerate(best):
        for t, column in enumerate(columns):
            picked[:, t] |= (folds == fold) & correct[:, t, column]
    total = int(scored.sum())
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
    check_choice(protocol, tuple(PROTOCOLS), "protocol")
    rule = PROTOCOLS[protocol]
    if iou_threshold is not None and not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1], not {iou_threshold!r}")
    thresholds = rule.iou_thresholds if iou_threshold is None else (iou_threshold,)
    return thresholds, rule.strict if strict is None else strict


def correct_columns(overlaps: Tensor, thresholds: Sequence[float], strict: bool) -> Tensor:
    """Return N×T×C Boolean: which of C boxes a sample are correct at each of T overlaps."""
    wanted = torch.tensor(thresholds, dtype=overlaps.dtype, device=overlaps.device)[:, None]
    return overlaps[:, None] > wanted if strict else overlaps[:, None] >= wanted


def millionths(overlaps: Tensor) -> Tensor:
    """Return overlaps in [0, 1] as whole numbers, whose sum does not depend on the order."""
    return (overlaps * 1e6).round().long()


def best_columns(
    counts: Tensor, overlap_sums: Tensor, sizes: Tensor, single: bool
) -> list[list[int]]:
    """Return for each fold the column (threshold) to score it with, at each overlap.

    Args:
        counts: 2×T×C correct boxes in each fold.
        overlap_sums: 2×C, the :func:`millionths` of each fold's scored samples added up; among
            columns with as many correct boxes the largest sum wins, and of those the first.
        sizes: 2, the scored samples in each fold.
        single: all samples are in the first fold, which is tuned on itself.

    Raises:
        ValueError: when a fold is empty.
    """
    if not single and (sizes == 0).any():
        raise ValueError(
            f"the folds have {sizes.tolist()} samples; tuning needs one in each. "
            "Give other folds, another seed or oracle=True"
        )
    sources = (0,) if single else (1, 0)
    best = []
    for fold in sources:
        sums = overlap_sums[fold].tolist()
        # Not argmax over the tensor: of equal maxima it may return any on some devices.
        ranked = [list(zip(row, sums, strict=True)) for row in counts[fold].tolist()]
        best.append([row.index(max(row)) for row in ranked])
    return best


def gt_known_localization(correct_box: Tensor) -> Tensor:
    """Return GT-known Loc: the share of correct boxes for the annotated class, float64.

    >>> gt_known_localization(torch.tensor([True, False])).item()
    0.5
    """
    return correct_box.double().mean()


def top1_localization(correct_box: Tensor, correct_class: Tensor) -> Tensor:
    """Return Top-1 Loc: the share of samples whose box and class are both correct, float64.

    >>> top1_localization(torch.tensor([True, True]), torch.tensor([True, False])).item()
    0.5
    """
    if correct_box.shape != correct_class.shape:
        raise ValueError(
            f"correct_box and correct_class must have one shape, not {tuple(correct_box.shape)} "
            f"and {tuple(correct_class.shape)}"
        )
    return (correct_box.bool() & correct_class.to(correct_box.device).bool()).double().mean()


def _columns(
    ious: Tensor | Mapping[str, Tensor],
    strategy: str,
    alphas: Sequence[float] | Mapping[str, Sequence[float]] | None,
) -> tuple[list[tuple[str, float]], Tensor]:
    """Line the families up: the (strategy, alpha) of C columns, and N×C overlaps."""
    families = {strategy: ious} if isinstance(ious, Tensor) else ious
    if not families:
        raise ValueError("ious must hold the overlaps of at least one family")
    names: list[tuple[str, float]] = []
    for family, overlaps in families.items():
        if not isinstance(overlaps, Tensor):
            raise TypeError(f"ious of {family!r} must be a tensor, not {type(overlaps).__name__}")
        if overlaps.dim() != 2:
            raise ValueError(f"ious of {family!r} must be N×A, not {tuple(overlaps.shape)}")
        if alphas is None:
            check_choice(family, STRATEGIES, "strategy")
            grid: Sequence[float] = alpha_grid(family)
        else:
            grid = alphas[family] if isinstance(alphas, Mapping) else alphas
        if len(grid) != overlaps.shape[1]:
            raise ValueError(
                f"ious of {family!r} have {overlaps.shape[1]} columns for {len(grid)} alphas"
            )
        names += [(family, float(alpha)) for alpha in grid]
    if len({len(overlaps) for overlaps in families.values()}) > 1:
        raise ValueError("ious must have the same number of samples in every family")
    return names, torch.cat(list(families.values()), dim=1)


def _listed(
    blacklist: Tensor | Collection[Hashable] | None, ids: Sequence[Hashable] | None, n: int
) -> Tensor:
    if blacklist is None:
        return torch.zeros(n, dtype=torch.bool)
    if isinstance(blacklist, Tensor):
        if blacklist.dtype != torch.bool or blacklist.shape != (n,):
            raise ValueError(
                f"blacklist must be {n} truth values or a collection of ids, "
                f"not {tuple(blacklist.shape)} of {blacklist.dtype}"
            )
        return blacklist
    if ids is None:
        raise ValueError("a blacklist of ids needs the ids of the samples")
    names = set(blacklist)
    return torch.tensor([sample in names for sample in ids], dtype=torch.bool)
