"""Right and wrong arguments of the metrics: a value in its range, or an error that names one.

A right call must give what is documented, and where it is cheap what another way gives. In a wrong
one an argument, or a part of it, has become something else. What is neither a value in the range
nor a ``ValueError`` or ``TypeError`` that names an argument is lost.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from captum_robust import draw as pictures
from captum_robust import metrics
from captum_robust.attacks import FGSM, PGD, DeepFool, LBFGSAttack, UniversalPerturbation
from captum_robust.metrics import functional as F
from captum_robust.metrics.functional import STRATEGIES
from captum_robust.transforms import (
    JPEG,
    BitDepth,
    CropAndRescale,
    GaussianBlur,
    GaussianNoise,
    HorizontalFlip,
    MedianBlur,
    Resize,
    TotalVariation,
)
from tests.reliability.fuzzing import ANY, CALLS, SCORED, SHARES, Case, Hand, try_one, within


def overlaps(hand: Hand) -> Case:
    n, h, w = hand.size()
    a, b = hand.boxes(n, h, w), hand.boxes(n, h, w)
    if hand.random() < 0.5:
        return F.box_iou, {"a": a, "b": b, "inclusive": hand.random() < 0.5}, SHARES
    truth = torch.stack([hand.boxes(2, h, w) for _ in range(n)])
    return F.best_iou, {"boxes": a[:, None], "ground_truth": truth}, SCORED


def drawn_boxes(hand: Hand) -> Case:
    n, h, w = hand.size()
    share = 1 - hand.random()
    return hand.choice(
        [
            (F.whole_image_box, {"size": (h, w)}, within(0, 8)),
            (F.center_box, {"size": (h, w), "area_fraction": share}, within(0, 8)),
            (F.center_box_map, {"n": n, "size": (h, w), "area_fraction": share}, SHARES),
            (F.whole_image_map, {"n": n, "size": (h, w)}, SHARES),
            (F.random_map, {"n": n, "size": (h, w), "generator": hand.generator}, SHARES),
            (F.boxes_to_mask, {"boxes": hand.boxes(n, h, w), "size": (h, w)}, SHARES),
        ]
    )


def thresholds(hand: Hand) -> Case:
    n, h, w = hand.size()
    maps, masks = hand.maps(n, h, w), hand.masks(n, h, w)
    strategy, alpha = hand.choice(STRATEGIES), hand.random()
    return hand.choice(
        [
            (F.alpha_grid, {"strategy": strategy}, within(0, 10)),
            (F.threshold, {"maps": maps, "strategy": strategy, "alpha": alpha}, SHARES),
            (F.largest_component, {"mask": masks, "connectivity": hand.choice([4, 8])}, SHARES),
            (F.mask_to_box, {"mask": masks}, within(0, 8)),
            (F.tightest_box, {"masks": maps, "threshold": alpha}, within(0, 8)),
            (F.sweep_boxes, {"maps": maps, "strategies": [strategy]}, within(0, 8)),
            (F.saliency_boxes, {"maps": maps, "thresholds": {"value": (0.0, 0.5)}}, within(0, 8)),
        ]
    )


def accuracies(hand: Hand) -> Case:
    n, h, w = hand.size()
    maps, truth = hand.maps(n, h, w), hand.truth(n, h, w)
    ious = hand.rand(n, 256)
    given = {"maps": maps, "ground_truth": truth}
    return hand.choice(
        [
            (F.maxboxacc, given, SCORED),
            (F.maxboxacc_v2, given, SCORED),
            (F.maxboxacc_ious, {**given, "multi": hand.random() < 0.5, "inclusive": True}, SCORED),
            (F.maxboxacc_curve, {"ious": ious, "iou_threshold": 0.5, "interval": 0.1}, SCORED),
            (F.maxboxacc_from_ious, {"ious": ious, "iou_thresholds": [0.3, 0.7]}, SCORED),
        ]
    )


def pointing(hand: Hand) -> Case:
    n, h, w = hand.size()
    truth = hand.truth(n, h, w) if hand.random() < 0.5 else hand.masks(n, h, w)
    if hand.random() < 0.5:
        given = {"maps": hand.maps(n, h, w), "ground_truth": truth, "tolerance": 2}
        return F.pointing_game_hits, given, SCORED
    hits = hand.rand(n).round()
    classes = torch.randint(-3, 9, (n,), generator=hand.generator)
    return F.pointing_game_accuracy, {"hits": hits, "classes": classes}, SCORED


def pixels(hand: Hand) -> Case:
    n, h, w = hand.size()
    masks = hand.masks(n, h, w)
    masks[0, 0, 0] = True
    ignore = torch.zeros_like(masks)
    given = {"maps": hand.maps(n, h, w), "masks": masks, "ignore": ignore}
    counts = torch.ones(2, 1001, dtype=torch.int64)
    return hand.choice(
        [
            (F.pxap, given, SHARES),
            (F.pxap_histograms, given, within(0, 1000)),
            (F.pxap_from_histograms, {"histograms": counts}, SHARES),
        ]
    )


def stable(hand: Hand) -> Case:
    n, h, w = hand.size()
    one, two = hand.maps(n, h, w), hand.maps(n, h, w)
    given = {"clean": one, "attacked": two}
    if hand.random() < 0.05:
        large = {"clean": hand.maps(1, 11, 12), "attacked": hand.maps(1, 11, 12)}
        return F.structural_similarity, large, within(-1, 1)
    every = {**given, "measures": ["spearman", "top_k"], "reduce": "worst", "share": 0.5}
    return hand.choice(
        [
            (F.spearman_correlation, given, within(-1, 1)),
            (F.pearson_correlation, given, within(-1, 1)),
            (F.top_k_intersection, {**given, "share": 1 - hand.random()}, SHARES),
            (F.map_box_iou, {**given, "strategy": "value", "alpha": hand.random()}, SHARES),
            (F.stability, every, within(-1, 1)),
        ]
    )


def of_interval(value: Any) -> bool:
    """Whether it is an interval around a mean; of one value it is not known."""
    ends = (value.low, value.high)
    is_one = value.n == 1 and all(map(math.isnan, ends))
    is_around = value.low <= value.high and ANY(ends)
    return ANY(value.mean) and (is_one or (value.n > 1 and is_around))


def gap(value: Any) -> bool:
    return ANY(value.gap) and value.n >= 1 and SHARES(value.without_gap)


def resampled(hand: Hand) -> Case:
    n = hand.randrange(1, 6)
    a, b, c = (hand.rand(n).round() for _ in range(3))
    rest = {"level": 0.9, "resamples": 20, "seed": hand.randrange(99)}
    return hand.choice(
        [
            (F.bootstrap_interval, {"values": a, **rest}, of_interval),
            (F.bootstrap_difference, {"a": a, "b": b, **rest}, of_interval),
            (
                F.gap_closed,
                {"attacked": a, "baseline_attacked": b, "baseline_clean": c, **rest},
                gap,
            ),
        ]
    )


def folded(hand: Hand) -> Case:
    n = hand.randrange(4, 9)
    folds = torch.arange(n) % 2
    ids = [f"{hand.randrange(10**6)}-{i}" for i in range(n)]
    truths = hand.rand(n) < 0.5
    error = {"ious": hand.rand(n, 3), "alphas": [0.1, 0.2, 0.3], "folds": folds, "ids": ids}
    tuned = {"values": hand.rand(n, 3), "folds": folds, "ids": ids, "oracle": hand.random() < 0.5}
    return hand.choice(
        [
            (F.split_folds, {"samples": ids, "seed": 3}, SHARES),
            (F.gt_known_localization, {"correct_box": truths}, SHARES),
            (F.top1_localization, {"correct_box": truths, "correct_class": ~truths}, SHARES),
            (
                F.localization_error,
                {**error, "blacklist": ids[:1]},
                lambda found: SHARES(found.error) and found.n >= 1,
            ),
            (F.tuned_saliency, tuned, lambda found: within(-1e9, 1e9, nan=True)(found.per_sample)),
        ]
    )


def flat(x: Tensor) -> Tensor:
    """Scores of three classes: of the mean, its opposite, and 0."""
    mean = x.flatten(1).mean(dim=1)
    return torch.stack([mean, -mean, 0 * mean], dim=1)


def evidence(hand: Hand) -> Case:
    n, h, w = hand.size()
    images, maps = hand.rand(n, 3, h, w), hand.maps(n, h, w)
    classes = torch.randint(3, (n,), generator=hand.generator)
    boxes = torch.tensor([[0.0, 0.0, w, h]]).expand(n, 4)
    asked = {"model": flat, "images": images, "classes": classes, "batch_size": 4}
    area = hand.rand(n)
    return hand.choice(
        [
            (F.crop_and_resize, {"images": images, "boxes": boxes, "size": (2, 3)}, ANY),
            (F.crop_scores, {**asked, "boxes": boxes[:, None], "size": (2, 3)}, within(-4e9, 1)),
            (
                F.saliency_metric,
                {**asked, "masks": maps, "strategy": "value", "threshold": 0.5},
                lambda found: within(-3, 1e9)(found.metric) and SHARES(found.area),
            ),
            (F.saliency_of, {"area": area, "log_probability": -area}, within(-3, 1e9)),
            (
                F.smallest_sufficient_region,
                {**asked, "maps": maps, "areas": [0.1, 1.0], "share": 0.5, "seed": 1},
                SCORED,
            ),
            (F.smallest_destroying_region, {**asked, "maps": maps, "areas": [0.1, 1.0]}, SCORED),
        ]
    )


def removal(hand: Hand) -> Case:
    n, h, w = hand.size()
    w += 1  # a pixel is left of each image
    images, maps = hand.rand(n, 3, h, w), hand.maps(n, h, w)
    classes = torch.randint(3, (n,), generator=hand.generator)
    asked = {"model": flat, "images": images, "maps": maps, "classes": classes, "batch_size": 4}
    stepped = {**asked, "steps": hand.randrange(1, h * w + 1)}
    removed = hand.rand(n, h, w) < 0.5
    removed[:, 0, 0] = False

    def in_range(curve: F.RemovalCurve) -> bool:
        return SHARES(curve.probability) and SHARES(curve.share) and SHARES(curve.area)

    return hand.choice(
        [
            (F.deletion_curve, {**stepped, "fill": hand.choice(F.REMOVAL_FILLS)}, in_range),
            (F.insertion_curve, {**stepped, "fill": hand.choice(F.REMOVAL_FILLS)}, in_range),
            (F.removal_curves, stepped, lambda both: all(map(in_range, both))),
            (
                F.road,
                {**asked, "shares": [0.2, 0.7], "noise": 0.1, "seed": 1},
                lambda found: SHARES(found.most) and within(-0.5, 0.5)(found.combined),
            ),
            (F.linear_imputation, {"images": images, "removed": removed}, ANY),
        ]
    )


def run_metric(name: str) -> Callable[..., Any]:
    """Build, update and compute a metric class; its arguments are those of both."""
    kind = getattr(metrics, name)
    own = inspect.signature(kind.update).parameters

    def run(**given: Any) -> Any:
        metric = kind(**{k: v for k, v in given.items() if k not in own})
        metric.update(**{k: v for k, v in given.items() if k in own})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return metric.compute()

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in {**inspect.signature(kind).parameters, **own}.values()
            if parameter.name not in ("self", "kwargs")
        ]
    )
    return run


RUNS = {name: run_metric(name) for name in metrics.__all__}


def classes(hand: Hand) -> Case:
    n, h, w = hand.size()
    maps, truth = hand.maps(n, h, w), hand.truth(n, h, w)
    given = {"maps": maps, "ground_truth": truth}
    strategy = hand.choice(STRATEGIES)
    labels = torch.randint(3, (n,), generator=hand.generator)
    ids = [str(i) for i in range(n)]
    asked = {"model": flat, "images": hand.rand(n, 3, h, w), "masks": maps, "classes": labels}
    shown = {k: asked[k] for k in ("model", "images", "classes")} | {"maps": maps, "batch_size": 3}
    counted = {**given, "classes": labels, "num_classes": 3, "tolerance": 2.0}
    boxed = {**given, "ids": ids, "strategies": [strategy], "seed": 1, "blacklist": ["0"]}
    measured = {"measures": ["pearson", "box_iou"], "reduce": "mean", "alpha": 0.2}
    return hand.choice(
        [
            (RUNS["MaxBoxAcc"], {**given, "inclusive": True}, SCORED),
            (RUNS["MaxBoxAccV2"], given, SCORED),
            (RUNS["PointingGame"], counted, SCORED),
            (RUNS["PxAP"], {"maps": maps, "masks": hand.masks(n, h, w)}, SCORED),
            (RUNS["LocalizationError"], boxed, SCORED),
            (
                RUNS["AttributionStability"],
                {"clean": maps, "attacked": hand.maps(n, h, w), **measured},
                within(-1, 1, nan=True),
            ),
            (
                RUNS["SaliencyMetric"],
                {**asked, "threshold": 0.5, "strategy": "value", "batch_size": 3},
                within(-3, 1e9, nan=True),
            ),
            (RUNS["Deletion"], {**shown, "steps": 1, "fill": "blur"}, SHARES),
            (RUNS["Insertion"], {**shown, "steps": 1, "fill": "mean"}, SHARES),
        ]
    )


def in_pictures(hand: Hand) -> Case:
    _, h, w = hand.size()
    image, heat = hand.rand(3, h, w), hand.maps(1, h, w)[0]
    rgb = np.zeros((h, w, 3), dtype=np.uint8)
    boxes, levels = hand.boxes(2, h, w), within(0, 255)
    return hand.choice(
        [
            (pictures.as_rgb, {"image": image}, levels),
            (pictures.heat_rgb, {"heat": heat}, levels),
            (pictures.overlay, {"image": image, "heat": heat, "alpha": hand.random()}, levels),
            (pictures.amplified, {"change": image - 0.5}, ANY),
            (pictures.draw_boxes, {"rgb": rgb, "boxes": boxes, "width": 1}, levels),
        ]
    )


def changed(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Build a transform and apply it."""

    def run(inputs: Any, **settings: Any) -> Any:
        return kind(**settings)(inputs)

    run.__signature__ = inspect.signature(kind)  # type: ignore[attr-defined]
    return run


CHANGED = {
    kind: changed(kind)
    for kind in (
        *(BitDepth, CropAndRescale, GaussianBlur, GaussianNoise, HorizontalFlip, JPEG, MedianBlur),
        *(Resize, TotalVariation),
    )
}


def transformed(hand: Hand) -> Case:
    n, h, w = hand.size()
    seed = hand.randrange(99)
    kind, settings = hand.choice(
        [
            (BitDepth, {"bits": hand.randrange(1, 9)}),
            (CropAndRescale, {"size": 0.5, "position": (0.5, 0.5), "seed": seed}),
            (GaussianBlur, {"sigma": 0.1 + hand.random()}),
            (GaussianNoise, {"std": 0.1, "seed": seed}),
            (HorizontalFlip, {}),
            (JPEG, {"quality": hand.randrange(1, 101)}),
            (MedianBlur, {"size": 3}),
            (Resize, {"scale": 0.5 + hand.random()}),
            (TotalVariation, {"weight": 0.03, "drop": 0.5, "iterations": 2, "seed": seed}),
        ]
    )
    return CHANGED[kind], {"inputs": hand.rand(n, 3, h, w), **settings}, SHARES


def attacks(hand: Hand) -> Case:
    common = {"forward_func": flat, "bounds": (0.0, 1.0)}
    return hand.choice(
        [
            (FGSM, {**common, "epsilon": 0.1, "norm": "Linf"}, bool),
            (PGD, {**common, "epsilon": 0.1, "steps": 3, "norm": "L2"}, bool),
            (DeepFool, {**common, "max_iterations": 3}, bool),
            (LBFGSAttack, {**common}, bool),
            (UniversalPerturbation, {**common, "epsilon": 0.1, "norm": "Linf"}, bool),
        ]
    )


AREAS = {
    "metrics: overlaps of boxes": (overlaps, 2000),
    "metrics: boxes and baselines": (drawn_boxes, 5000),
    "metrics: thresholds and components": (thresholds, 1500),
    "metrics: MaxBoxAcc": (accuracies, 800),
    "metrics: the pointing game": (pointing, 4000),
    "metrics: PxAP": (pixels, 2500),
    "metrics: stability": (stable, 1200),
    "metrics: the bootstrap": (resampled, 4000),
    "metrics: folds and tuning": (folded, 5000),
    "metrics: the saliency metric": (evidence, 800),
    "metrics: pixels that are removed": (removal, 800),
    "metrics: classes": (classes, 200),
    "pictures": (in_pictures, 1500),
    "transforms": (transformed, 600),
    "attacks: their settings": (attacks, 4000),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("area", AREAS)
def test_right_and_wrong_arguments(try_often: Callable[..., None], area: str) -> None:
    case, long = AREAS[area]

    def one(seed: int) -> int:
        hand = Hand(seed)
        for _ in range(CALLS):
            try_one(hand, case)
        return CALLS

    try_often(area, one, quick=long // 100, long=long)


def test_overlaps_are_those_of_torchvision(try_often: Callable[..., None]) -> None:
    def one(seed: int) -> int:
        hand = Hand(seed)
        a, b = (hand.boxes(CALLS, 50, 60).double() for _ in range(2))
        expected = torchvision.ops.box_iou(a, b).diagonal().nan_to_num()
        torch.testing.assert_close(F.box_iou(a, b), expected)
        return CALLS

    try_often("metrics: as torchvision's overlaps", one, quick=10, long=1000)


def test_hits_and_correlations_are_those_of_numpy(try_often: Callable[..., None]) -> None:
    def one(seed: int) -> int:
        hand = Hand(seed)
        a, b = hand.rand(20, 5, 6), hand.rand(20, 5, 6)
        masks = hand.masks(20, 5, 6)
        hits = F.pointing_game_hits(a, masks, 2).tolist()
        found = F.pearson_correlation(a, b).tolist()
        for one_map, other, mask, hit, value in zip(a, b, masks, hits, found, strict=True):
            point = np.unravel_index(int(one_map.argmax()), (5, 6))
            near = [np.hypot(*(np.array(place) - point)) < 2 for place in np.argwhere(mask.numpy())]
            assert near == [] or hit == float(any(near))
            expected = np.corrcoef(one_map.flatten(), other.flatten())[0, 1]
            assert value == pytest.approx(expected, abs=1e-6)
        return 40

    try_often("metrics: as numpy's", one, quick=10, long=500)
