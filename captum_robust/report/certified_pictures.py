"""The pictures of certificates: a photograph, and the map of each method with what is proven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from captum_robust._checks import check
from captum_robust.catalog.certification import ABSTAIN, IN, OUT
from captum_robust.draw import TRUTH_COLOR, draw_boxes, draw_certificate
from captum_robust.report.certified_rows import certification_of, certified_rows
from captum_robust.report.pictures import Canvas, Tile, jpeg_uri
from captum_robust.report.results import CLEAN, Results
from captum_robust.runs.store import unpack

if TYPE_CHECKING:
    import pandas as pd

_PICTURES = 48
"""Bound on the pictures: at about 15 kB each as text, some 700 kB."""
_IMAGES = 4
_METHODS = 3
_RADII = 3


@dataclass(frozen=True)
class Certified:
    """What is proven of one map within a radius."""

    radius: float
    picture: str
    """A data URI."""
    shares: dict[str, float]
    """Of the image, certified "in", certified "out", and what "abstains"."""
    iou: float | None
    """The least overlap that is proven; None: there is no true box."""


@dataclass(frozen=True)
class CertifiedMap:
    """The map of a method, and what is proven of it."""

    tile: Tile
    at: list[Certified]


@dataclass(frozen=True)
class CertifiedEntry:
    """One image."""

    image: str
    true_class: str
    has_boxes: bool
    """A true box is known, and drawn."""
    picture: str
    """A data URI."""
    maps: list[CertifiedMap]


def build_certificates(
    results: Results, rows: pd.DataFrame, methods: Sequence[str]
) -> list[CertifiedEntry]:
    """The first images with the certificates of the first methods, within three of the radii.

    Of these those for which there are enough copies.

    Args:
        results: of the run.
        rows: of :func:`image_rows`.
        methods: the best first.
    """
    how = certification_of(results)
    if how is None:
        return []
    methods = list(methods)[:_METHODS]
    proving = [i for i, radius in enumerate(how.radii) if radius not in how.unproven()]
    last = len(proving) - 1
    chosen = [proving[i] for i in sorted({0, last // 2, last})] if last >= _RADII else proving
    pictures = 1 + len(methods) * (1 + len(chosen))
    entries: list[CertifiedEntry] = []
    for position in results.pictured():
        if len(entries) == min(_IMAGES, max(1, _PICTURES // pictures)):
            break
        image = results.image(position)
        canvas = Canvas.of(results, image, image["picture"])
        here = rows[(rows["position"] == position) & (rows["attack"] == CLEAN)]
        maps = [_map(results, canvas, here, method, chosen) for method in methods]
        known = [each for each in maps if each is not None]
        if known:
            picture = jpeg_uri(draw_boxes(canvas.picture, canvas.truth, TRUTH_COLOR))
            true_class = results.class_name(image["label"])
            has_boxes = len(canvas.truth) > 0
            entries.append(CertifiedEntry(image["image"], true_class, has_boxes, picture, known))
    return entries


def _map(
    results: Results, canvas: Canvas, rows: pd.DataFrame, method: str, chosen: Sequence[int]
) -> CertifiedMap | None:
    stored = results.select(
        "SELECT certified_cells AS value FROM results WHERE position = ? AND method = ? "
        "AND attack = ? AND certified_cells IS NOT NULL",
        (canvas.position, method, CLEAN),
    )
    known = certified_rows(results, method, (canvas.position, canvas.position + 1))
    tiles = canvas.tiles(rows[rows["method"] == method], CLEAN)
    if not (stored and known and tiles):
        return None
    lines = known.lines[0].numpy()
    cells = unpack(stored[0]["value"], np.uint8)
    each = len(cells) // len(known.radii)
    side = round(each**0.5)
    fits = side * side * len(known.radii) == len(cells) and cells.max() <= IN
    check(fits, f"{results.store.folder}: certified_cells: expected a square a radius, got others")
    states = cells.reshape(-1, side, side)
    at = [_at(canvas, known.radii[i], states[i], lines[i + 1]) for i in chosen]
    return CertifiedMap(tiles[0], at)


def _at(
    canvas: Canvas, radius: float, states: np.ndarray[Any, Any], line: np.ndarray[Any, Any]
) -> Certified:
    boxes = [line[at : at + 4] * canvas.scale for at in (2, 6)]
    inner, outer = (None if np.isnan(box).any() else box.tolist() for box in boxes)
    drawn = draw_certificate(canvas.picture, states, inner, outer)
    drawn = draw_boxes(drawn, canvas.truth, TRUTH_COLOR)
    names = {"in": IN, "out": OUT, "abstains": ABSTAIN}
    shares = {name: float((states == state).mean()) for name, state in names.items()}
    iou = None if np.isnan(line[1]) else float(line[1])
    return Certified(radius, jpeg_uri(drawn), shares, iou)
