"""The report of a comparison: one HTML file that needs nothing else, and no script."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_robust._files import write_whole
from captum_robust.draw import PREDICTED_COLOR, TRUTH_COLOR
from captum_robust.metrics.functional import STABILITY_MEASURES
from captum_robust.report.comparison import CLEAN, FEW, GALLERY_POOL
from captum_robust.report.outcomes import attack_series
from captum_robust.report.pictures import build_gallery, build_strips, build_trios
from captum_robust.report.plots import (
    FAMILIES,
    beside,
    line_style,
    method_styles,
    overlaid_width,
)

if TYPE_CHECKING:
    import pandas as pd

    from captum_robust.report.comparison import Comparison

_SHOWN_FAILURES = 50
_NO_GAP = 0.025
"""In more of the resamples than this there is no gap: its interval reaches zero."""
_STABILITY_LABELS = {
    "spearman": "Spearman",
    "pearson": "Pearson",
    "ssim": "SSIM",
    "top_k": "Top 10 %",
    "box_iou": "Box IoU",
}
_EXPLAINED = {
    "label": "the true class (the predicted one where it is not known)",
    "prediction": "the predicted class",
}


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
        "saliency",
        "Saliency metric",
        "number",
        "low",
        "How small a crop the class survives: log(max(area, 0.05)) − log probability of the "
        "explained class in the smallest box around all pixels above a threshold, resized to the "
        "classifier's input (Dabkowski & Gal, 2017). Lower is better, at least −3. The threshold "
        "was chosen on one half of the images and scored on the other. Clean images only.",
    ),
    Column(
        "flipped",
        "Flipped %",
        "percent",
        "",
        "Of methods that perturb the image: the share of images whose label the perturbation "
        "changed, among those whose explained class was the prediction (below: how many).",
    ),
    Column(
        "accuracy",
        "Accuracy %",
        "percent",
        "high",
        "The share of the labelled images whose class is right: the classifier's, and of a "
        "defended method that of the scores averaged over its transforms.",
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
        loader=PackageLoader("captum_robust.report", "templates"),
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
        "crops": _crops(comparison),
        "charts": _charts(comparison),
        "attacks": _attacks(table, comparison) if len(comparison.attacks) > 1 else None,
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
        ("Explained class", _EXPLAINED.get(settings["target"], settings["target"])),
        ("Preparation", fit.get(settings["fit"], settings["fit"])),
        ("Attacks", "; ".join(comparison.attacks[1:]) or "none"),
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
    if "same_as" in table:  # they stand under the plain attack
        table = table[table["same_as"].isna()]
    for attack, block in table.groupby("attack", sort=False):
        rows = [
            {
                "method": record["method"],
                "baseline": styles[record["method"]].baseline,
                "interval": _interval(record),
                "cells": [_cell(column, record) for column in COLUMNS if column.key in table],
            }
            for record in block.to_dict("records")
        ]
        for i, column in enumerate(c for c in COLUMNS if c.key in table):
            _mark_best([row["cells"][i] for row in rows if not row["baseline"]], column)
        groups.append({"attack": attack, "rows": rows})
    return groups


def _cell(column: Column, record: dict[Any, Any]) -> dict[str, Any]:
    value = record[column.key]
    if column.form == "text":
        return _plain_cell(value if isinstance(value, str) else "–")
    value = float(value)
    if math.isnan(value):
        return _plain_cell("–")
    if column.form == "percent":
        text = f"{100 * value:.1f}"
    elif column.form == "count":
        text = f"{value:.0f}"
    else:
        text = f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    below = f"of {record['flippable']:.0f}" if column.key == "flipped" else ""
    if column.key == "saliency":
        below = f"{record['saliency_low']:.2f} to {record['saliency_high']:.2f}"
    return {"value": value, "text": text, "best": False, "below": below}


def _plain_cell(text: str) -> dict[str, Any]:
    return {"value": None, "text": text, "best": False, "below": ""}


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


def _crops(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each method and the true box: the saliency metric and what it is made of."""
    styles = method_styles(comparison)
    return [
        {
            "method": record["method"],
            "baseline": record["method"] not in styles or styles[record["method"]].baseline,
            "cells": [
                (f"{record['saliency']:.3f}", f"{record['low']:.2f} to {record['high']:.2f}"),
                (f"{100 * record['area']:.1f}", ""),
                (f"{100 * record['probability']:.1f}", ""),
                (f"{record['n']}", ""),
            ],
            "threshold": record["threshold"],
        }
        for record in comparison.saliency_table().to_dict("records")
    ]


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


def _attacks(table: pd.DataFrame, comparison: Comparison) -> dict[str, Any]:
    """What the section on attacks shows."""
    attacked = comparison.attack_table()
    strips = build_strips(comparison)
    target = comparison.configuration["settings"]["target"]
    header = ["Clean accuracy %", "Already wrong", "Fooled %", "Robust accuracy %"]
    return {
        "header": [*header, "L∞ / 255", "L2", "Attacked", "Failed"],
        "rows": [
            {"attack": row["attack"], "cells": _attack_cells(row)}
            for row in attacked.to_dict("records")
        ],
        "unlabelled": int(attacked["unlabelled"].max()),
        "chart": _robust_chart(attack_series(attacked)),
        "errors": _errors_under_attack(table, comparison),
        "error_charts": _error_charts(comparison),
        "methods": comparison.methods,
        "adaptive": bool(comparison.configuration.get("adaptive")),
        "stability": _stability(comparison),
        "stability_header": [_STABILITY_LABELS[m] for m in STABILITY_MEASURES],
        "gaps": _gaps(comparison),
        "trios": build_trios(comparison),
        "columns": comparison.attacks,
        "explained": _EXPLAINED.get(target, target),
        "strips": strips,
        "shown": bool(attacked["n"].any()),
    }


def _attack_cells(row: dict[Any, Any]) -> list[tuple[str, str]]:
    """Text and what stands below it, in the order of the header."""
    fooled = _percent(row["fooled"])
    return [
        (_percent(row["clean_accuracy"]), ""),
        (f"{row['already_wrong']}", f"of {row['n']}"),
        (fooled, f"of {row['n_right']}"),
        (_percent(row["robust_accuracy"]), _span(row["robust_low"], row["robust_high"])),
        ("–" if math.isnan(row["linf"]) else f"{255 * row['linf']:.1f}", ""),
        ("–" if math.isnan(row["l2"]) else f"{row['l2']:.2f}", ""),
        (f"{row['n']}", ""),
        (f"{row['failed']}", ""),
    ]


def _errors_under_attack(table: pd.DataFrame, comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each method, a cell for each attack; empty where no box was scored."""
    if "error" not in table:
        return []
    styles = method_styles(comparison)
    by_name = {(r["method"], r["attack"]): r for r in table.to_dict("records")}
    return [
        {
            "method": method,
            "baseline": styles[method].baseline,
            "cells": [_error_cell(by_name.get((method, attack))) for attack in comparison.attacks],
        }
        for method in comparison.error_by_attack(table).index
    ]


def _error_cell(record: dict[Any, Any] | None) -> tuple[str, str]:
    """The error and its interval; marked where it is that of the plain attack."""
    if record is None:
        return "–", ""
    mark = " =" if isinstance(record.get("same_as"), str) else ""
    return _percent(record["error"]) + mark, _span(record["error_low"], record["error_high"])


def _stability(comparison: Comparison) -> list[dict[str, Any]]:
    """For each attack a row a method: the five measures, the most stable one marked."""
    table = comparison.stability_table()
    styles = method_styles(comparison)
    groups = []
    for attack, block in table.groupby("attack", sort=False):
        rows = [
            {
                "method": record["method"],
                "baseline": styles[record["method"]].baseline,
                "cells": [
                    _plain_cell("–")
                    if math.isnan(record[m])
                    else {
                        "value": record[m],
                        "text": f"{record[m]:.3f}",
                        "best": False,
                        "below": "",
                    }
                    for m in STABILITY_MEASURES
                ],
            }
            for record in block.to_dict("records")
        ]
        for i in range(len(STABILITY_MEASURES)):
            cells = [row["cells"][i] for row in rows if not row["baseline"]]
            _mark_best(cells, Column("", "", "number", "high", ""))
        groups.append({"attack": attack, "rows": rows})
    return groups


def _gaps(comparison: Comparison) -> dict[str, Any] | None:
    """The gap that each method closes under each attack; None without Grad-CAM to compare with."""
    table = comparison.gap_table()
    if table.empty:
        return None
    records = {(r["method"], r["attack"]): r for r in table.to_dict("records")}
    attacks = list(dict.fromkeys(table["attack"]))
    clean = {r["attack"]: r["gap"] for r in records.values()}
    styles = method_styles(comparison)
    return {
        "baseline": table["baseline"].iloc[0],
        "attacks": [(attack, f"{100 * clean[attack]:.1f}") for attack in attacks],
        "rows": [
            {
                "method": method,
                "baseline": styles[method].baseline,
                "cells": [_gap_cell(records.get((method, attack))) for attack in attacks],
            }
            for method in dict.fromkeys(table["method"])
        ],
        "without": list(dict.fromkeys(table.loc[table["closed"].isna(), "attack"])),
        "unsure": any(
            r["without_gap"] > _NO_GAP and not math.isnan(r["closed"]) for r in records.values()
        ),
    }


def _gap_cell(record: dict[Any, Any] | None) -> tuple[str, str]:
    if record is None or math.isnan(record["closed"]):
        return "–", ""
    below = f"{record['low']:.2f} to {record['high']:.2f}"
    if record["without_gap"] > _NO_GAP:
        below += f"; no gap in {100 * record['without_gap']:.0f} %"
    return f"{record['closed']:.2f}", below


def _error_charts(comparison: Comparison) -> list[dict[str, Any]]:
    """Localization error against strength, a chart an attack, on one scale."""
    styles = method_styles(comparison)
    series = comparison.error_series()
    largest = max((float(rows["epsilon"].max()) for rows in series.values()), default=0.0)
    charts = []
    for name, rows in series.items():
        lines, described = [], []
        drawn = [m for m in comparison.methods if (rows["method"] == m).sum() > 1]
        for i, method in enumerate(drawn):
            one = rows[rows["method"] == method]
            numbers = one[["epsilon", "error", "error_low", "error_high"]].to_numpy(float).tolist()
            style = styles[method]
            aside = 0.0 if style.fixed else beside(i, len(drawn))
            points = [(_inset(e / largest) + aside, *shares) for e, *shares in numbers]
            line = {"name": method, "style": style, "points": points, "plain": style.fixed}
            lines.append(line | {"width": 1.3 if style.baseline else 2})
            said = [f"{100 * y:.1f} at {255 * e:g}" for e, y, _, _ in numbers]
            described.append(f"{method}: {', '.join(said)}")
        if lines:
            ticks = [(_inset(x), label) for x, label in _strength_ticks(largest)]
            charts.append(
                {
                    "title": name,
                    "quantity": f"Localization error under {name}",
                    "lines": lines,
                    "described": "; ".join(described),
                    "ticks": ticks,
                }
            )
    return charts


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def _span(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"


def _robust_chart(series: dict[str, pd.DataFrame]) -> dict[str, Any] | None:
    """Robust accuracy against strength: lines of (x, y, low, high) in [0, 1]; None for points."""
    series = {name: rows[rows["n"] > 0] for name, rows in series.items()}
    if all(len(rows) < 2 for rows in series.values()):
        return None
    largest = max(float(rows["epsilon"].max()) for rows in series.values() if len(rows))
    lines, described = [], []
    for i, (name, rows) in enumerate(series.items()):
        numbers = rows[["epsilon", "robust_accuracy", "robust_low", "robust_high"]]
        values = numbers.to_numpy(float).tolist()
        points = [(epsilon / largest, *shares) for epsilon, *shares in values]
        if points and points[0][0] > 0:
            clean = float(rows["clean_accuracy"].iloc[0])
            points = [(0.0, clean, clean, clean), *points]
        width = overlaid_width(i, len(series))
        line = {"name": name, "style": line_style(i), "points": points, "plain": False}
        lines.append(line | {"width": width})
        said = [f"{100 * y:.1f} at {255 * largest * x:g}" for x, y, _, _ in points]
        described.append(f"{name}: {', '.join(said)}")
    return {
        "title": "",
        "quantity": "Robust accuracy",
        "lines": lines,
        "described": "; ".join(described),
        "ticks": _strength_ticks(largest),
    }


def _inset(x: float) -> float:
    """Away from the ends of a chart, where points stand beside each other."""
    return 0.05 + 0.9 * x


def _strength_ticks(largest: float) -> list[tuple[float, str]]:
    """Places in [0, 1] and labels, in levels."""
    levels = 255 * largest
    step = _round_step(levels / 4)
    return [(i * step / levels, f"{i * step:g}") for i in range(int(levels / step + 1e-9) + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, … (and their tenths) from ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))
