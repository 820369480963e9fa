"""What is no argument of a metric is refused by its name, and gives no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from captum_robust.attacks import FGSM, PGD, DeepFool, LBFGSAttack, UniversalPerturbation
from captum_robust.metrics import PointingGame, SaliencyMetric
from captum_robust.metrics import functional as F

NAN, INF = float("nan"), float("inf")
BOX = torch.tensor([[1.0, 1.0, 3.0, 3.0]])
MAPS = torch.arange(16.0).view(1, 4, 4)
MASKS = MAPS > 7
IMAGE = torch.zeros(1, 3, 4, 4)
HITS = torch.tensor([1.0, 0.0])
NEGATIVE = -HITS  # log probabilities, but no shares


def refused(call: Callable[[], Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b.*: expected|^{name}: "):
        call()


NO_NUMBERS: list[Any] = [None, "text", [1.0, 0.0], 3, BOX.to("meta"), BOX.to(torch.complex64)]
NO_BOXES: list[Any] = [
    *NO_NUMBERS,
    BOX.bool(),
    BOX[:, :3],
    BOX * NAN,
    BOX * INF,
    BOX.flip(-1),
    BOX * 1e12,
    BOX.to_sparse(),
]


@pytest.mark.parametrize("boxes", NO_BOXES, ids=str)
def test_what_is_no_box_is_refused(boxes: Any) -> None:
    refused(lambda: F.box_iou(boxes, BOX), "a")
    refused(lambda: F.box_iou(BOX, boxes), "b")
    refused(lambda: F.boxes_to_mask(boxes, (4, 4)), "boxes")
    refused(lambda: F.best_iou(BOX[None], [boxes]), r"ground_truth\[0\]")
    refused(lambda: F.pointing_game_hits(MAPS, [boxes]), r"ground_truth\[0\]")


def test_boxes_that_do_not_broadcast_are_refused() -> None:
    refused(lambda: F.box_iou(BOX.expand(2, 4), BOX.expand(3, 4)), "b")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float64])
def test_boxes_of_any_real_numbers_overlap_alike(dtype: torch.dtype) -> None:
    # 1 of 4 + 4 - 1 pixels; in unsigned numbers 1 - 2 is 255.
    a, b = torch.tensor([1, 1, 3, 3], dtype=dtype), torch.tensor([2, 2, 4, 4], dtype=dtype)
    assert F.box_iou(a, b).item() == pytest.approx(1 / 7)
    assert F.pointing_game_hits(MAPS, [b[None]], 1).tolist() == [1]


@pytest.mark.parametrize("hits", [*NO_NUMBERS, HITS[None], HITS * 2, -HITS, HITS / 0], ids=str)
def test_what_is_no_hit_is_refused(hits: Any) -> None:
    refused(lambda: F.pointing_game_accuracy(hits), "hits")


@pytest.mark.parametrize("classes", ["text", [1, 2], HITS, HITS.bool(), HITS[:1].long()], ids=str)
def test_what_is_no_class_is_refused(classes: Any) -> None:
    refused(lambda: F.pointing_game_accuracy(HITS, classes), "classes")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_the_accuracy_of_hits_does_not_depend_on_their_type(dtype: torch.dtype) -> None:
    hits, classes = torch.tensor([1, 1, 0], dtype=dtype), torch.tensor([0, 10**12, 10**12])
    assert F.pointing_game_accuracy(hits).item() == pytest.approx(2 / 3, abs=1e-3)
    assert F.pointing_game_accuracy(hits, classes).item() == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    "area", [*NO_NUMBERS, HITS * NAN, HITS * 2, NEGATIVE, HITS.bool()], ids=str
)
def test_what_is_no_area_or_log_probability_is_refused(area: Any) -> None:
    refused(lambda: F.saliency_of(area, -HITS), "area")
    if area is not NEGATIVE:
        refused(lambda: F.saliency_of(HITS, area), "log_probability")


def test_areas_and_log_probabilities_have_one_shape() -> None:
    refused(lambda: F.saliency_of(HITS, -HITS[:1]), "log_probability")
    assert F.saliency_of(torch.ones(2, dtype=torch.int64), -HITS).tolist() == [1, 0]


@pytest.mark.parametrize("masks", [*NO_NUMBERS, MAPS, MASKS[0], MASKS[:, :2], MASKS[:0]], ids=str)
def test_what_is_no_mask_is_refused(masks: Any) -> None:
    refused(lambda: F.pxap(MAPS, masks), "masks")


@pytest.mark.parametrize(
    "maps", [*NO_NUMBERS, MAPS[0], MAPS * NAN, MAPS * INF, MAPS.double() * 1e300], ids=str
)
def test_what_is_no_map_is_refused(maps: Any) -> None:
    refused(lambda: F.pxap(maps, MASKS), "maps")
    refused(lambda: F.threshold(maps, "value", 0.5), "maps")
    refused(lambda: F.spearman_correlation(maps, MAPS), "clean")
    refused(lambda: F.stability(MAPS, maps, measures=["pearson"]), "attacked")


@pytest.mark.parametrize("counts", [*NO_NUMBERS, torch.full((2, 1001), -1.0), torch.zeros(2, 3)])
def test_what_is_no_count_is_refused(counts: Any) -> None:
    refused(lambda: F.pxap_from_histograms(counts), "histograms")


@pytest.mark.parametrize("truths", [*NO_NUMBERS, HITS[:0], HITS / 2, HITS * NAN], ids=str)
def test_what_is_no_truth_value_is_refused(truths: Any) -> None:
    refused(lambda: F.gt_known_localization(truths), "correct_box")
    refused(lambda: F.top1_localization(HITS, truths), "correct_class")


def test_boolean_folds_are_those_of_zeros_and_ones() -> None:
    # The first fold is scored at the second column, which is right in the second, and vice versa.
    ious = torch.tensor([[0.9, 0.0], [0.9, 0.0], [0.0, 0.9], [NAN, NAN]])
    folds = torch.tensor([0, 0, 1, 1])
    for given in (folds, folds.bool(), folds.float()):
        assert F.localization_error(ious, alphas=[0.1, 0.2], folds=given).error == 1


@pytest.mark.parametrize("size", [None, 4, "ab", (4,), (4, 0), (4, 1.5), (4, NAN), (4, 2**70)])
def test_what_is_no_size_is_refused(size: Any) -> None:
    refused(lambda: F.whole_image_box(size), "size")
    refused(lambda: F.random_map(1, size), "size")
    refused(lambda: F.boxes_to_mask(BOX, size), "size")


@pytest.mark.parametrize("device", ["banana", "cuda:x", 1.5, []])
def test_a_device_that_there_is_not_is_refused(device: Any) -> None:
    attack = UniversalPerturbation(lambda x: x.flatten(1))
    refused(lambda: attack.fit([torch.zeros(1, 3, 2, 2)], device=device), "device")


@pytest.mark.parametrize("bounds", [(0, INF), (-INF, INF), (0, NAN), (1, 0), (0,), 3, "ab", None])
def test_bounds_of_attacks_are_finite(bounds: Any) -> None:
    for attack in (FGSM, PGD, DeepFool, LBFGSAttack, UniversalPerturbation):
        if bounds is None:
            attack(lambda x: x, bounds=bounds)
        else:
            refused(lambda kind=attack: kind(lambda x: x, bounds=bounds), "bounds")  # type: ignore[misc]


@pytest.mark.parametrize(
    "call",
    [
        lambda classes: PointingGame(3).update(MAPS, [BOX], classes),
        lambda classes: SaliencyMetric().update(torch.zeros, IMAGE, MAPS, classes),
        lambda classes: F.pointing_game_accuracy(torch.ones(1), classes),
        lambda classes: F.saliency_metric(torch.zeros, IMAGE, MAPS, classes),
    ],
)
def test_classes_without_numbers_are_refused(call: Callable[[Any], Any]) -> None:
    refused(lambda: call(torch.zeros(1, dtype=torch.int64, device="meta")), "classes")
