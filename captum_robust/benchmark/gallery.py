"""The pictures of the report: the images whose objects were placed best, and worst."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from captum_robust.benchmark.comparison import CLEAN, GALLERY_POOL, boxes_of
from captum_robust.benchmark.overlay import (
    PREDICTED_COLOR,
    RGB,
    draw_boxes,
    encode_jpeg,
    factor_text,
    overlay,
    verdict,
)
from captum_robust.benchmark.plots import method_styles
from captum_robust.benchmark.store import unpack

if TYPE_CHECKING:
    import pandas as pd

    from captum_robust.benchmark.comparison import Comparison

_LONGER_SIDE = 208
_JPEG_QUALITY = 72
_EACH = 12
_PICTURES = 400
"""Bound on the pictures of a report: at about 15 kB each as text, some 6 MB."""


@dataclass(frozen=True)
class Change:
    """What a method did to one image."""

    picture: str
    """A data URI."""
    factor: str
    mark: str
    """✓ where the label flipped, ✗ where it did not."""
    verdict: str
    new_class: str


@dataclass(frozen=True)
class Tile:
    """One method's map over one image."""

    method: str
    picture: str
    """A data URI; empty where the method failed."""
    iou: float | None
    localized: bool
    change: Change | None = None


@dataclass(frozen=True)
class Entry:
    """One image of the gallery."""

    image: str
    picture: str
    mean_iou: float
    true_class: str
    predicted_class: str
    confidence: float
    mistaken: bool
    """The classifier predicts another class than the true one."""
    tiles: list[Tile]


@dataclass(frozen=True)
class Gallery:
    """The best and the worst of the images whose pictures the run has kept."""

    best: list[Entry]
    worst: list[Entry]
    pool: int
    """How many images they are chosen from."""
    ranked_by: list[str]
    """The methods whose mean overlap ranks the images, and whose maps are shown."""


def build_gallery(comparison: Comparison) -> Gallery:
    """Choose the images by the mean overlap over the methods that are no baselines, and draw them.

    The boxes are those at the threshold that the table uses. Clean images only: a run keeps no
    attacked pictures.
    """
    styles = method_styles(comparison)
    shown = [m for m in comparison.methods if not styles[m].baseline] or comparison.methods
    rows = comparison.to_dataframe(first=GALLERY_POOL)
    if "iou" not in rows:
        return Gallery([], [], 0, shown)
    kept = comparison.select("SELECT position FROM images WHERE picture IS NOT NULL")
    rows = rows[
        (rows["attack"] == CLEAN)
        & rows["method"].isin(shown)
        & rows["position"].isin([row["position"] for row in kept])
    ]
    means = rows.groupby("position")["iou"].mean().dropna()
    ranked = means.sort_values(ascending=False, kind="stable")
    changes = rows[rows["new_class"].notna()]["method"].nunique()
    most = min(_EACH, max(1, _PICTURES // (2 * (len(shown) + changes + 1))))
    best = list(ranked.index[: min(most, -(-len(ranked) // 2))])
    worst = list(ranked.index[::-1][: min(most, len(ranked) // 2)])

    def entries(positions: Sequence[int]) -> list[Entry]:
        return [
            _entry(comparison, rows[rows["position"] == p], int(p), float(ranked[p]))
            for p in positions
        ]

    return Gallery(entries(best), entries(worst), len(ranked), shown)


def _entry(comparison: Comparison, rows: pd.DataFrame, position: int, mean_iou: float) -> Entry:
    import cv2

    row = comparison.select("SELECT * FROM images WHERE position = ?", (position,))[0]
    stored: Any = cv2.imdecode(np.frombuffer(row["picture"], np.uint8), cv2.IMREAD_COLOR)
    model_height, model_width = stored.shape[:2]
    # In the shape of the original: the model's input may have squeezed it.
    width, height = _tile_size(row["width"], row["height"])
    picture: RGB = cv2.resize(stored, (width, height), interpolation=cv2.INTER_AREA)[:, :, ::-1]
    truth = np.array(boxes_of(row["boxes"])) * [width, height, width, height]
    scale = np.array([width / model_width, height / model_height] * 2)
    kept = {
        r["method"]: r
        for r in comparison.select(
            "SELECT method, heat, perturbation, amplification, predicted, explained, new_class, "
            "flipped FROM results WHERE position = ? AND attack = ? AND heat IS NOT NULL",
            (position, CLEAN),
        )
    }
    by_method = {r["method"]: r for r in rows.to_dict("records")}
    tiles = [
        _tile(comparison, by_method[method], kept.get(method), picture, truth, scale)
        for method in comparison.methods
        if method in by_method
    ]
    first: Any = rows.iloc[0]
    predicted = None if first["predicted"] != first["predicted"] else int(first["predicted"])
    return Entry(
        image=row["image"],
        picture=_jpeg_uri(draw_boxes(picture, truth)),
        mean_iou=mean_iou,
        true_class=comparison.class_name(row["label"]),
        predicted_class=comparison.class_name(predicted),
        confidence=float(first["confidence"]),
        mistaken=row["label"] is not None and row["label"] != predicted,
        tiles=tiles,
    )


def _tile(
    comparison: Comparison,
    row: dict[Any, Any],
    kept: dict[str, Any] | None,
    picture: RGB,
    truth: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any],
) -> Tile:
    if kept is None or row["iou"] != row["iou"]:  # NaN: the method failed on this image
        return Tile(row["method"], "", None, False)
    values = unpack(kept["heat"], np.uint8)
    side = round(len(values) ** 0.5)
    drawn = draw_boxes(overlay(picture, values.reshape(side, side)), truth)
    box = np.array([[row[c] for c in ("x0", "y0", "x1", "y1")]]) * scale
    drawn = draw_boxes(drawn, box, PREDICTED_COLOR)
    change = None if kept["perturbation"] is None else _change(comparison, kept, picture)
    iou, localized = float(row["iou"]), bool(row["localized"])
    return Tile(row["method"], _jpeg_uri(drawn), iou, localized, change)


def _change(comparison: Comparison, kept: dict[str, Any], picture: RGB) -> Change:
    import cv2

    stored: Any = cv2.imdecode(np.frombuffer(kept["perturbation"], np.uint8), cv2.IMREAD_COLOR)
    size = (picture.shape[1], picture.shape[0])
    drawn: RGB = cv2.resize(stored, size, interpolation=cv2.INTER_AREA)[:, :, ::-1]
    mark, words = verdict(bool(kept["flipped"]), kept["predicted"] == kept["explained"])
    new_class = comparison.class_name(kept["new_class"])
    return Change(_jpeg_uri(drawn), factor_text(kept["amplification"]), mark, words, new_class)


def _tile_size(width: int, height: int) -> tuple[int, int]:
    """Width and height with the longer side as shown; a very long strip is shown less long."""
    ratio = min(max(width / height, 0.4), 2.5)
    if ratio >= 1:
        return _LONGER_SIDE, round(_LONGER_SIDE / ratio)
    return round(_LONGER_SIDE * ratio), _LONGER_SIDE


def _jpeg_uri(rgb: RGB) -> str:
    data = encode_jpeg(rgb, _JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
