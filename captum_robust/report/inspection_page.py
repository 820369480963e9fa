"""The tour through a network: one HTML file that needs nothing else, and no script."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_robust._checks import printable
from captum_robust._files import write_whole
from captum_robust.inspection import Dissection, Stop, Tour
from captum_robust.report.page import page_template
from captum_robust.report.plots import svg_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_AN_INCH = 110
_SHOWN_DETECTORS = 12
_SHOWN_FAILURES = 20


@dataclass(frozen=True)
class Picture:
    """A figure and what it shows."""

    uri: str
    """A data URI."""
    described: str
    """In words, for who does not see it."""
    notes: tuple[str, ...] = ()


def write_tour(tour: Tour, path: Path) -> Path:
    """Write the page of a tour, whole or not at all, and return its path.

    Args:
        tour: by :func:`captum_robust.inspection.tour`.
        path: of the file; its folder is made.

    Raises:
        IsADirectoryError: the path is a folder.
        ImportError: matplotlib is missing.
    """
    html = page_template("inspection.html.j2").render(_content(tour))
    return write_whole(path, html.encode("utf-8", errors="replace"))


def _content(tour: Tour) -> dict[str, Any]:
    filters = tour.filters
    return {
        "model": tour.model,
        "images": tour.images,
        "notes": tour.notes,
        "filters": filters
        and Picture(
            _raster(filters.plot()),
            f"{len(filters.weights)} filters of {filters.layer}",
        ),
        "filter_shape": filters and "×".join(map(str, filters.weights.shape[1:])),
        "photograph": printable(tour.photograph),
        "stops": [_stop(tour, stop) for stop in tour.stops],
        "source": tour.features.source,
        "compared": len(tour.features.ids),
        "neighbours": Picture(
            _raster(tour.neighbours.plot(), photographs=True),
            "images with their nearest neighbours",
            tuple(tour.neighbours.notes),
        ),
        "same_class": tour.neighbours.same_class,
        "attack": tour.attack,
        "attacked": tour.attacked
        and Picture(
            _raster(tour.attacked.plot(), photographs=True),
            "attacked images with their nearest neighbours",
        ),
        "attacked_same_class": tour.attacked and tour.attacked.same_class,
        "has_classes": bool((tour.features.labels >= 0).any()),
        "embeddings": [
            Picture(
                _raster(one.plot(), photographs=True, sharper=2),
                f"images in the plane, by {one.method}",
                tuple(one.notes),
            )
            for one in tour.embeddings
        ],
        "failures": list(tour.unusable.items())[:_SHOWN_FAILURES],
        "failure_count": len(tour.unusable),
    }


def _stop(tour: Tour, stop: Stop) -> dict[str, Any]:
    """What the section on a layer shows."""
    patches, (height, width) = stop.patches, tour.activations.maps[stop.name].shape[1:]
    return {
        "name": stop.name,
        "channels": stop.channels,
        "size": f"{height}×{width}",
        "looked_at": len(patches.units),
        "shown": len(patches.shown),
        "field": patches.field.described if patches.field else "of another size at each",
        "field_picture": patches.field
        and not patches.field.is_whole
        and Picture(svg_uri(patches.field.plot()), "receptive fields of three positions"),
        "patches": Picture(
            _raster(patches.plot(), photographs=True),
            f"patches that units of {stop.name} answer to most",
            tuple(patches.notes),
        ),
        "activations": Picture(
            _raster(tour.activations.plot([stop.name])), f"activations of {stop.name}"
        ),
        "dissections": [_dissection(kind, one) for kind, one in stop.dissections.items()],
    }


def _dissection(kind: str, one: Dissection) -> dict[str, Any]:
    """What is shown of the concepts that units stand for."""
    detectors = one.detectors
    counts = ", ".join(f"{name} ({count})" for name, count in one.histogram().items())
    return {
        "kind": kind.capitalize(),
        "notes": one.notes,
        "picture": Picture(
            svg_uri(one.plot()), f"units by concept: {counts or 'none'}", tuple(one.notes)
        ),
        "count": len(detectors),
        "looked_at": len(one.units),
        "least": one.least_iou,
        "best": [
            (d.unit, printable(d.concept), f"{d.iou:.2f}") for d in detectors[:_SHOWN_DETECTORS]
        ],
    }


def _raster(figure: Figure, *, photographs: bool = False, sharper: int = 1) -> str:
    """The figure as a data URI, in JPEG where there are photographs in it, else in PNG."""
    buffer, kind = io.BytesIO(), "jpeg" if photographs else "png"
    options: dict[str, Any] = {"pil_kwargs": {"quality": 85}} if photographs else {}
    figure.savefig(buffer, format=kind, dpi=sharper * _DOTS_AN_INCH, facecolor="white", **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
