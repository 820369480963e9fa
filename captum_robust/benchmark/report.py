"""The report of a comparison: one HTML file that needs nothing else, and no script."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_robust.benchmark.comparison import CLEAN, FEW, GALLERY_POOL
from captum_robust.benchmark.gallery import build_gallery
from captum_robust.benchmark.overlay import PREDICTED_COLOR, TRUTH_COLOR, write_whole
from captum_robust.benchmark.plots import FAMILIES, method_styles

if TYPE_CHECKING:
    import pandas as pd

    from captum_robust.benchmark.comparison import Comparison

_SHOWN_FAILURES = 50


@dataclass(frozen=True)
class Column:
    """A column of ``Comparison.table()`` in the report."""

    key: str
    label: str
    form: str
    """ "percent", "count", "number" or "text"."""
    better: str
    """ "low", "high", or "" where no value is the best."""
    meaning: str


COLUMNS = (
    Column(
        "error",
        "Error %",
        "percent",
        "low",
        "Weak localization error: the share of images whose predicted box overlaps no true box by "
        "more than half (intersection over union > 0.5). Below it, the 95 % bootstrap interval.",
    ),
    Column(
        "tuned",
        "Tuned on",
        "text",
        "",
        "“two-fold”: the rule that turns a map into a box (family and α) was chosen on one half of "
        "the images and scored on the other, and the other way round, so no image was scored with "
        "a threshold chosen on it. “oracle”: chosen on the very images that are reported, which "
        "flatters the method. “-”: the box is fixed.",
    ),
    Column(
        "threshold",
        "Threshold",
        "text",
        "",
        "The chosen family and α, for the two halves (families: Fong & Vedaldi, 2017).",
    ),
    Column(
        "top1_error",
        "Top-1 %",
        "percent",
        "low",
        "Top-1 localization error: as Error, but the classifier's first class must be right too, "
        "as in the ImageNet localization challenge.",
    ),
    Column(
        "maxboxacc",
        "MaxBoxAcc %",
        "percent",
        "high",
        "The share of images placed with an overlap of at least 0.5, at the best threshold τ of "
        "all on the reported images themselves (Choe et al., 2020): an upper bound, not to be "
        "compared with 100 % − Error.",
    ),
    Column(
        "maxboxacc_v2",
        "V2 %",
        "percent",
        "high",
        "MaxBoxAccV2: the same, averaged over overlaps of 0.3, 0.5 and 0.7, where the best of all "
        "connected regions counts (Choe et al., 2020).",
    ),
    Column(
        "pointing",
        "Pointing %",
        "percent",
        "high",
        "Pointing game: how often the map's largest value lies on the object or less than 15 "
        "pixels beside it, averaged over the classes (Zhang et al., 2016).",
    ),
    Column(
        "pxap",
        "PxAP %",
        "percent",
        "high",
        "Average precision of the map's pixels against the object's mask (Choe et al., 2020).",
    ),
    Column(
        "flipped",
        "Flipped %",
        "percent",
        "",
        "Of methods that perturb the image: the share of images whose label the perturbation "
        "changed, among those whose explained class was the prediction.",
    ),
    Column("forward", "Forward", "number", "low", "Forward passes of the classifier an image."),
    Column("backward", "Backward", "number", "low", "Backward passes an image."),
    Column("ms_per_image", "ms / image", "number", "low", "Mean time of a map on this machine."),
    Column("n", "Scored", "count", "", "Images with a box to score against."),
    Column("failed", "Failed", "count", "", "Images without a map, for whatever reason."),
)


def write_report(comparison: Comparison, path: Path) -> Path:
    """Write the report of a comparison as one HTML file, whole or not at all.

    Args:
        comparison: also of a run that was stopped half-way, or of which no image was scored.
        path: of the file; its folder is made.

    Returns:
        The path.

    Raises:
        IsADirectoryError: the path is a folder.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("captum_robust.benchmark", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    html = environment.get_template("report.html.j2").render(_content(comparison))
    return write_whole(path, html.encode("utf-8", errors="replace"))


def _content(comparison: Comparison) -> dict[str, Any]:
    table = comparison.table()
    failures = comparison.failures()
    counts = comparison.select(
        "SELECT count(*) AS read, count(error) AS broken, "
        "coalesce(sum(error IS NULL AND boxes = '[]'), 0) AS unboxed FROM images"
    )[0]
    styles = method_styles(comparison)
    gallery = build_gallery(comparison)
    shown = (*gallery.best, *gallery.worst)
    return {
        "methods": comparison.methods,
        "conclusion": _conclusion(table, comparison),
        "facts": _facts(comparison, counts),
        "columns": [column for column in COLUMNS if column.key in table],
        "groups": _groups(table, comparison),
        "styles": styles,
        "charts": _charts(comparison),
        "gallery": gallery,
        "changes": any(tile.change for entry in shown for tile in entry.tiles),
        "pool_limit": GALLERY_POOL,
        "failures": failures.head(_SHOWN_FAILURES).to_dict("records"),
        "failure_count": len(failures),
        "unboxed": counts["unboxed"],
        "colors": {"truth": TRUTH_COLOR, "predicted": PREDICTED_COLOR},
    }


def _facts(comparison: Comparison, counts: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of what the result depends on."""
    configuration = comparison.configuration
    model, settings = configuration["model"], configuration["settings"]
    size = "×".join(map(str, model["input_size"]))
    planned = configuration["dataset"]["samples"]
    images = (
        f"{counts['read']} read, {counts['broken']} not usable, {counts['unboxed']} without box"
    )
    if counts["read"] < planned:
        images += f"; the run is not finished ({planned} planned)"
    explained = {
        "label": "the true class (the predicted one where it is not known)",
        "prediction": "the predicted class",
    }
    fit = {
        "squash": f"whole image resized to {size}",
        "crop": f"shorter side resized, centre {size} cut out",
    }
    return [
        (
            "Model",
            f"{model['name']}, {model['parameters']:,} parameters, "
            f"input {size}, weights checksum {model['weights_crc32']:08x}",
        ),
        ("Data", str(configuration["dataset"]["kind"])),
        ("Images", images),
        ("Explained class", explained.get(settings["target"], settings["target"])),
        ("Preparation", fit.get(settings["fit"], settings["fit"])),
        ("Attacks", ", ".join(configuration["attacks"]) or "none"),
        (
            "Settings",
            f"{settings['device']}, {settings['precision']}, batch size "
            f"{settings['batch_size']}, seed {settings['seed']}",
        ),
        ("Versions", ", ".join(f"{k} {v}" for k, v in configuration["versions"].items())),
        ("Report written", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]


def _conclusion(table: pd.DataFrame, comparison: Comparison) -> str:
    """What the clean rows of the table say, in words."""
    if "error" not in table:
        return "No image has a box that could be scored, so the methods are not ranked."
    styles = method_styles(comparison)
    clean = table[(table["attack"] == CLEAN) & table["error"].notna()].to_dict("records")
    methods = [row for row in clean if not styles[row["method"]].baseline]
    baselines = [row for row in clean if styles[row["method"]].baseline]
    if not methods:
        return "Only baselines were scored."
    best = methods[0]
    *others, last = [row["method"] for row in methods if row["error"] == best["error"]]
    first = f"{', '.join(others)} and {last} place" if others else f"{last} places"
    text = f"{first} the object best of the methods: "
    text += (
        f"{100 * best['error']:.1f} % of the boxes miss it (95 % interval "
        f"{100 * best['error_low']:.1f} to {100 * best['error_high']:.1f} %, "
        f"{best['n']} images)."
    )
    if baselines:
        other = baselines[0]
        text += f" The best baseline, {other['method']}, misses {100 * other['error']:.1f} %"
        if best["error_low"] <= other["error"] <= best["error_high"]:
            text += ", which lies within that interval: no clear difference."
        else:
            text += "." if best["error"] < other["error"] else ", which is better."
    if best["n"] < FEW:
        text += f" Fewer than {FEW} images are too few to rank methods: read the intervals."
    return text


def _groups(table: pd.DataFrame, comparison: Comparison) -> list[dict[str, Any]]:
    """For each attack its rows; a row has a cell for each column, the best of them marked."""
    styles = method_styles(comparison)
    groups = []
    for attack, block in table.groupby("attack", sort=False):
        rows = [
            {
                "method": record["method"],
                "baseline": styles[record["method"]].baseline,
                "interval": _interval(record),
                "cells": [
                    _cell(column, record[column.key]) for column in COLUMNS if column.key in table
                ],
            }
            for record in block.to_dict("records")
        ]
        for i, column in enumerate(c for c in COLUMNS if c.key in table):
            _mark_best([row["cells"][i] for row in rows if not row["baseline"]], column)
        groups.append({"attack": attack, "rows": rows})
    return groups


def _cell(column: Column, value: Any) -> dict[str, Any]:
    if column.form == "text":
        return {"value": None, "text": value if isinstance(value, str) else "–", "best": False}
    value = float(value)
    if math.isnan(value):
        return {"value": None, "text": "–", "best": False}
    if column.form == "percent":
        text = f"{100 * value:.1f}"
    elif column.form == "count":
        text = f"{value:.0f}"
    else:
        text = f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    return {"value": value, "text": text, "best": False}


def _mark_best(cells: list[dict[str, Any]], column: Column) -> None:
    """Mark the best among the methods; all of them where the digits shown are the same."""
    known = [cell for cell in cells if cell["value"] is not None]
    if not known or not column.better:
        return
    choose = min if column.better == "low" else max
    best = choose(known, key=lambda cell: cell["value"])["text"]
    if any(cell["text"] != best for cell in known):
        for cell in known:
            cell["best"] = cell["text"] == best


def _interval(record: dict[Any, Any]) -> tuple[float, float] | None:
    low, high = record.get("error_low", math.nan), record.get("error_high", math.nan)
    return None if math.isnan(low) else (100 * low, 100 * high)


def _charts(comparison: Comparison) -> list[dict[str, Any]]:
    """Error against threshold for each family: lines of points with x and y in [0, 1]."""
    curves = comparison.curves()
    charts = []
    for family, meaning in FAMILIES.items():
        of_family = curves[curves["strategy"] == family]
        if of_family.empty:
            continue
        largest = float(of_family["alpha"].max())
        step = 0.2 if largest <= 1 else 2
        lines, lowest = {}, []
        for method, one in of_family.groupby("method", sort=False):
            points = list(zip(one["alpha"], one["error"], strict=True))
            lines[method] = [(alpha / largest, error) for alpha, error in points]
            alpha, error = min(points, key=lambda point: point[1])
            lowest.append(f"{method} {100 * error:.1f} % at {alpha:g}")
        charts.append(
            {
                "family": family,
                "meaning": meaning,
                "ticks": [
                    (i * step / largest, f"{i * step:g}") for i in range(int(largest / step) + 1)
                ],
                "lines": lines,
                "lowest": "; ".join(lowest),
            }
        )
    return charts
