"""Boxes that several methods agree on, in place of true ones, to tune thresholds on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_robust._checks import check, check_shape
from captum_robust.catalog.thresholds import Threshold
from captum_robust.metrics.functional import alpha_grid, box_iou, localization_error
from captum_robust.report.pairs import NO_VALUES, Values, paired, positions_of
from captum_robust.report.results import STRATEGY_ORDER, Results
from captum_robust.runs.store import unpack

LEAST_METHODS = 2
"""Whose boxes can agree or not."""


def agreed_boxes(boxes: Tensor) -> Tensor:
    """N×4, of M boxes an image the one whose mean overlap with the others is largest.

    The idea is that of thresholds tuned on pseudo-boxes (https://arxiv.org/abs/2404.10034), which
    come from a region proposal network there, and from the other methods of a run here.

    Args:
        boxes: N×M×4, (x0, y0, x1, y1), from M = 2; of two the first.

    Raises:
        ValueError: another shape, fewer methods.

    >>> boxes = torch.tensor([[[0.0, 0, 4, 4], [0.0, 0, 5, 4], [8.0, 8, 9, 9]]])
    >>> agreed_boxes(boxes).tolist()
    [[0.0, 0.0, 4.0, 4.0]]
    """
    check_shape("boxes", boxes, "N×M×4")
    count = boxes.shape[1]
    expected = f"expected the boxes of at least {LEAST_METHODS} other methods"
    check(count >= LEAST_METHODS, f"boxes: {expected}, got those of {count}")
    overlaps = box_iou(boxes[:, :, None], boxes[:, None]).sum(dim=2)
    return boxes[torch.arange(len(boxes)), overlaps.argmax(dim=1)]


def pseudo_threshold(
    results: Results, method: str, attack: str, placed: Callable[[str], Values]
) -> Threshold:
    """That whose boxes are most often right where the other methods' boxes are taken for true.

    No true box is looked at.

    Args:
        results: of the run.
        method: whose threshold it is.
        attack: or the clean images.
        placed: gives :func:`placed_boxes` of each of the others under the attack.

    Raises:
        ValueError: the run has fewer than two other methods, or no image on which all have a map.
    """
    others = [m for m in results.compared if m != method and m not in results.fixed_boxes]
    expected = f"expected at least {LEAST_METHODS} methods beside {method} without a fixed box"
    is_enough = len(others) >= LEAST_METHODS
    check(is_enough, f"thresholds: for pseudo-boxes {expected}, got {len(others)}")
    rows = results.measured(method, attack, "predicted_boxes")
    own = (positions_of(rows), drawn_boxes(rows)) if rows else NO_VALUES
    drawn, *boxes = paired([own, *map(placed, others)])
    needed = f"images on which {method} and the other methods have a map"
    check(len(drawn), f"thresholds: for pseudo-boxes expected {needed}")
    agreed = agreed_boxes(torch.stack(boxes, dim=1))
    families = torch.split(
        box_iou(drawn, agreed[:, None]), [len(alpha_grid(s)) for s in STRATEGY_ORDER], dim=1
    )
    overlaps = dict(zip(STRATEGY_ORDER, families, strict=True))
    return Threshold(*localization_error(overlaps, oracle=True).chosen[0][0])


def placed_boxes(results: Results, method: str, attack: str) -> Values:
    """The positions with a map by a method, and its boxes M×4 at its shipped threshold."""
    shipped = results.threshold(method)
    column = every_threshold(STRATEGY_ORDER).index((shipped.strategy, shipped.alpha))
    rows = results.measured(method, attack, "predicted_boxes")
    return (positions_of(rows), drawn_boxes(rows)[:, column]) if rows else NO_VALUES


def drawn_boxes(rows: Sequence[dict[str, Any]]) -> Tensor:
    """N×A×4 float32, the boxes at all thresholds in rows of ``predicted_boxes``."""
    boxes = np.stack([unpack(row["value"], np.int16).reshape(-1, 4) for row in rows])
    return torch.from_numpy(boxes.astype(np.float32))


def every_threshold(strategies: Iterable[str]) -> list[tuple[str, float]]:
    """All thresholds of some families, in the order of a row's boxes."""
    return [(strategy, alpha) for strategy in strategies for alpha in alpha_grid(strategy)]
