"""The pictures of the report: the images whose objects were placed best, and worst."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from captum_robust._progress import counted
from captum_robust.draw import (
    PREDICTED_COLOR,
    RGB,
    draw_boxes,
    encode_jpeg,
    factor_text,
    overlay,
    verdict,
)
from captum_robust.report.results import CLEAN, Results
from captum_robust.runs.store import unpack

if TYPE_CHECKING:
    import pandas as pd

_LONGER_SIDE = 208
_JPEG_QUALITY = 72
_EACH = 12
_PICTURES = 165
"""Bound on the pictures of the gallery: at about 15 kB each as text, some 2 MB."""
_SHOTS = 6
"""Images of the first screen."""
_STRIPS = 6
_STRIP_PICTURES = 100
_TRIO_PICTURES = 50
_TRIO_DEFENDED = 3
"""Bounds on the images shown under attack, and on their pictures."""


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
    name: str
    """Of the method, in words."""
    number: int
    """Of the method among those of the run."""
    picture: str
    """A data URI; empty where the method failed."""
    iou: float | None
    """None: there is no true box to compare with."""
    localized: bool
    attack: str
    decided_class: str
    """What the method takes the image for."""
    change: Change | None = None
    same_change: str = ""
    """The method, in words, beside which the same change is shown already."""


@dataclass(frozen=True)
class Entry:
    """One image of the gallery."""

    position: int
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


@dataclass(frozen=True)
class Strip:
    """One image, clean or under one attack, with the maps of it."""

    attack: str
    tiles: list[Tile]
    picture: str = ""
    """A data URI, like ``change``; empty where there is none."""
    change: str = ""
    factor: str = ""
    predicted_class: str = ""
    confidence: float = math.nan
    fooled: bool | None = None
    """None: the clean image."""
    without_gradient: bool = False
    """Not fooled, but the attack had no gradient to go by."""


@dataclass(frozen=True)
class AttackedEntry:
    """One image before and after the attacks."""

    image: str
    true_class: str
    strips: list[Strip]


@dataclass(frozen=True)
class Shot:
    """One image with the map of one method, clean and under an attack."""

    position: int
    image: str
    true_class: str
    clean: Tile
    attacked: Tile | None = None


def build_shots(
    results: Results, rows: pd.DataFrame, method: str, attack: str | None, most: int = _SHOTS
) -> list[Shot]:
    """The first images that have a map by the method; of an attack, that were right before it."""
    kept = results.right_before(most) if attack else results.pictured()
    shots: list[Shot] = []
    for position in kept:
        if len(shots) == most:
            break
        image = results.image(position)
        clean = _shots(results, rows, image, CLEAN, [method])
        attacked = _shots(results, rows, image, attack, [method]) if attack else []
        if clean and clean[0].picture:
            true_class = results.class_name(image["label"])
            both = (clean[0], attacked[0] if attacked and attacked[0].picture else None)
            shots.append(Shot(position, image["image"], true_class, *both))
    return shots


@dataclass(frozen=True)
class State:
    """One image as the classifier sees it, clean or changed, with a map by each method."""

    name: str
    picture: str
    """A data URI."""
    predicted_class: str
    confidence: float
    is_right: bool
    tiles: list[Tile]


@dataclass(frozen=True)
class Pictured:
    """One image in several states."""

    image: str
    true_class: str
    states: list[State]


def build_matrix(results: Results, rows: pd.DataFrame, states: Sequence[str]) -> list[Pictured]:
    """Every image whose picture is kept, by states and by methods that are no baselines."""
    entries = []
    for position in counted(results.pictured(), "image", None, "pictures"):
        image = results.image(position)
        mine = rows[(rows["position"] == position) & rows["method"].isin(results.compared)]
        pictured = results.attacked(position) | {CLEAN: image}
        shown = []
        for name in states:
            here = mine[mine["attack"] == name]
            picture = pictured.get(name, {}).get("picture")
            if here.empty or picture is None:
                continue
            first: Any = here.iloc[0]
            canvas = Canvas.of(results, image, picture)
            shown.append(
                State(
                    name,
                    jpeg_uri(canvas.picture),
                    results.class_name(first["predicted"]),
                    float(first["confidence"]),
                    bool(first["predicted"] == image["label"]),
                    canvas.tiles(here, name),
                )
            )
        entries.append(Pictured(image["image"], results.class_name(image["label"]), shown))
    return entries


def build_strips(results: Results, rows: pd.DataFrame) -> list[AttackedEntry]:
    """The first images that were classified right before every attack, with all that was done.

    Only of those whose pictures the run has kept; baselines' maps are left out.
    """
    methods = results.compared
    pictures = (1 + len(results.attacked_sets)) * (2 + len(methods))
    positions = results.right_before(min(_STRIPS, _STRIP_PICTURES // pictures))
    rows = rows[rows["method"].isin(methods)]
    each = counted(positions, "image", None, "pictures")
    return [_attacked_entry(results, rows, position) for position in each]


def build_trios(results: Results, rows: pd.DataFrame) -> list[AttackedEntry]:
    """The first images that were right, under the outer attacks: clean, attacked, defended.

    Each map lies over the image that its method was shown. The undefended method is the one that
    is "grad_cam", or the first that is no baseline. Empty without it, a defended method or an
    attack.
    """
    kinds = results.kinds
    has_class = rows[rows["decided"].notna()]["method"].unique()
    defended = [m for m in results.methods if m in has_class][:_TRIO_DEFENDED]
    bare = [m for m in results.methods if m not in defended and m not in results.baselines]
    bare.sort(key=lambda m: kinds[m] != "grad_cam")  # stable: the others in order
    attacks = results.plain_attacks
    if not (bare and defended and attacks):
        return []
    plain = list(dict.fromkeys([attacks[0], attacks[-1]]))
    adaptive = {a: f"{a}, adaptive" for a in plain if f"{a}, adaptive" in results.attacks}
    entries = []
    pictures = len(plain) * (2 + 2 * len(defended))
    for position in results.right_before(min(_STRIPS, max(1, _TRIO_PICTURES // pictures))):
        image = results.image(position)
        clean = _shots(results, rows, image, CLEAN, [bare[0]])
        strips = []
        for attack in plain:
            tiles = _shots(results, rows, image, attack, [bare[0], *defended])
            if attack in adaptive:
                tiles += _shots(results, rows, image, adaptive[attack], defended)
            strips.append(Strip(attack, [*clean, *tiles]))
        entries.append(AttackedEntry(image["image"], results.class_name(image["label"]), strips))
    return entries


def _shots(
    results: Results, rows: pd.DataFrame, image: dict[str, Any], attack: str, methods: Sequence[str]
) -> list[Tile]:
    """The maps of some methods over the images that each was shown."""
    position = image["position"]
    pictured = results.attacked(position) | {CLEAN: image}
    tiles = []
    for method in methods:
        here = rows[
            (rows["position"] == position) & (rows["attack"] == attack) & (rows["method"] == method)
        ]
        picture = pictured.get(results.images_of(method, attack), {}).get("picture")
        if picture is not None:
            tiles += Canvas.of(results, image, picture).tiles(here, attack)
    return tiles


def _attacked_entry(results: Results, rows: pd.DataFrame, position: int) -> AttackedEntry:
    image = results.image(position)
    pictured = results.attacked(position) | {CLEAN: image}
    mine = rows[rows["position"] == position]
    strips = []
    for name in (CLEAN, *results.attacked_sets):
        here = mine[mine["source"] == name]
        row = pictured.get(name, {"picture": None})
        if here.empty or row["picture"] is None:
            continue
        first: Any = here.iloc[0]
        canvas = Canvas.of(results, image, row["picture"])
        change: dict[str, Any] = {}
        if name != CLEAN:
            change = {
                "change": jpeg_uri(canvas.fitted(row["change"])),
                "factor": factor_text(row["amplification"]),
                "fooled": bool(row["fooled"]),
                "without_gradient": bool(row["without_gradient"]),
            }
        # An image that is attacked through transforms has the class of their mean scores.
        judged = first if name == CLEAN else row
        strips.append(
            Strip(
                attack=name,
                tiles=canvas.tiles(here, first["attack"]),
                picture=jpeg_uri(canvas.picture),
                predicted_class=results.class_name(judged["predicted"]),
                confidence=float(judged["confidence"]),
                **change,
            )
        )
    return AttackedEntry(image["image"], results.class_name(image["label"]), strips)


def build_gallery(results: Results, rows: pd.DataFrame) -> Gallery:
    """Choose the images by the mean overlap over the methods that are no baselines, and draw them.

    The boxes are those at the threshold that the table uses. Clean images only: see
    :func:`build_strips` for attacked ones.
    """
    methods = results.compared
    if "iou" not in rows:
        return Gallery([], [], 0, methods)
    rows = rows[
        (rows["attack"] == CLEAN)
        & rows["method"].isin(methods)
        & rows["position"].isin(results.pictured())
    ]
    means = rows.groupby("position")["iou"].mean().dropna()
    ranked = means.sort_values(ascending=False, kind="stable")
    changes = rows[rows["new_class"].notna()]["method"].nunique()
    most = min(_EACH, max(1, _PICTURES // (2 * (len(methods) + changes + 1))))
    best = list(ranked.index[: min(most, -(-len(ranked) // 2))])
    worst = list(ranked.index[::-1][: min(most, len(ranked) // 2)])

    def entries(positions: Sequence[int]) -> list[Entry]:
        return [
            _entry(results, rows[rows["position"] == p], int(p), float(ranked[p]))
            for p in counted(positions, "image", None, "pictures")
        ]

    return Gallery(entries(best), entries(worst), len(ranked), methods)


@dataclass(frozen=True)
class Canvas:
    """A picture in the shape of the original image, as the model's input may have squeezed it."""

    results: Results
    position: int
    picture: RGB
    truth: np.ndarray[Any, Any]
    """M×4, the true boxes on it."""
    scale: np.ndarray[Any, Any]
    """4, from the pixels of the model's input."""

    @classmethod
    def of(cls, results: Results, image: dict[str, Any], picture: bytes) -> Canvas:
        """From a row of ``images`` and a picture at the size of the model's input."""
        stored = _decoded(picture)
        height, width = stored.shape[:2]
        size = _tile_size(image["width"], image["height"])
        truth = np.array(image["boxes"]).reshape(-1, 4) * [*size, *size]
        scale = np.array([size[0] / width, size[1] / height] * 2)
        return cls(results, image["position"], _sized(stored, size), truth, scale)

    def fitted(self, picture: bytes) -> RGB:
        """Another picture in the same size."""
        return _sized(_decoded(picture), (self.picture.shape[1], self.picture.shape[0]))

    def tiles(self, rows: pd.DataFrame, attack: str) -> list[Tile]:
        """The maps of the image under one attack, of the methods in ``rows``."""
        kept = self.results.maps(self.position, attack)
        by_method = {r["method"]: r for r in rows.to_dict("records")}
        tiles: list[Tile] = []
        changes: dict[bytes, str] = {}
        for method in self.results.methods:
            if method not in by_method:
                continue
            tile, of_method = self._tile(by_method[method], kept.get(method)), kept.get(method)
            if tile.change is not None and of_method is not None:
                # Methods that guide one perturbation have it in common.
                first = changes.setdefault(of_method["perturbation"], tile.name)
                if first != tile.name:
                    tile = replace(tile, change=None, same_change=first)
            tiles.append(tile)
        return tiles

    def _tile(self, row: dict[Any, Any], kept: dict[str, Any] | None) -> Tile:
        decided = row["decided"]  # None or NaN: the method has no class of its own
        if decided is None or decided != decided:
            decided = row["predicted"]
        method = row["method"]
        tile = Tile(
            method=method,
            name=self.results.words[method],
            number=self.results.methods.index(method),
            picture="",
            iou=None,
            localized=False,
            attack=row["attack"],
            decided_class=self.results.class_name(decided),
        )
        if kept is None:  # the method failed on this image
            return tile
        values = unpack(kept["heat"], np.uint8)
        side = round(len(values) ** 0.5)
        drawn = draw_boxes(overlay(self.picture, values.reshape(side, side)), self.truth)
        tile = replace(tile, change=self._change(kept))
        if math.isnan(iou := float(row.get("iou", math.nan))):  # no box to compare with
            return replace(tile, picture=jpeg_uri(drawn))
        box = np.array([[row[c] for c in ("x0", "y0", "x1", "y1")]]) * self.scale
        picture = jpeg_uri(draw_boxes(drawn, box, PREDICTED_COLOR))
        return replace(tile, picture=picture, iou=iou, localized=bool(row["localized"]))

    def _change(self, kept: dict[str, Any]) -> Change | None:
        if kept["perturbation"] is None:
            return None
        drawn = self.fitted(kept["perturbation"])
        mark, words = verdict(bool(kept["flipped"]), kept["predicted"] == kept["explained"])
        new_class = self.results.class_name(kept["new_class"])
        return Change(jpeg_uri(drawn), factor_text(kept["amplification"]), mark, words, new_class)


def _decoded(data: bytes) -> RGB:
    import cv2

    stored: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    rgb: RGB = stored[:, :, ::-1]
    return rgb


def _sized(rgb: RGB, size: tuple[int, int]) -> RGB:
    import cv2

    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _entry(results: Results, rows: pd.DataFrame, position: int, mean_iou: float) -> Entry:
    row = results.image(position)
    canvas = Canvas.of(results, row, row["picture"])
    first: Any = rows.iloc[0]
    return Entry(
        position=position,
        image=row["image"],
        picture=jpeg_uri(draw_boxes(canvas.picture, canvas.truth)),
        mean_iou=mean_iou,
        true_class=results.class_name(row["label"]),
        predicted_class=results.class_name(first["predicted"]),
        confidence=float(first["confidence"]),
        mistaken=row["label"] is not None and row["label"] != first["predicted"],
        tiles=canvas.tiles(rows, CLEAN),
    )


def _tile_size(width: int, height: int) -> tuple[int, int]:
    """Width and height with the longer side as shown; a very long strip is shown less long."""
    ratio = min(max(width / height, 0.4), 2.5)
    if ratio >= 1:
        return _LONGER_SIDE, round(_LONGER_SIDE / ratio)
    return round(_LONGER_SIDE * ratio), _LONGER_SIDE


def jpeg_uri(rgb: RGB) -> str:
    """The picture as a data URI."""
    data = encode_jpeg(rgb, _JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
