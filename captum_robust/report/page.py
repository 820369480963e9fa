"""The report of a comparison: one HTML file that needs nothing else, and reads without script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_robust._files import write_whole
from captum_robust._plurals import amount
from captum_robust.catalog.attacks import LEVELS
from captum_robust.draw import (
    CERTIFIED_COLORS,
    INNER_COLOR,
    OUTER_COLOR,
    PREDICTED_COLOR,
    TRUTH_COLOR,
)
from captum_robust.report.certified_pictures import build_certificates
from captum_robust.report.certified_rows import certification_of, certified_curves
from captum_robust.report.chance import Chance
from captum_robust.report.failures import shown_reasons
from captum_robust.report.first_screen import (
    dots_of,
    first_shots,
    leading,
    sentence_of,
    shown_attack,
)
from captum_robust.report.image_rows import image_rows
from captum_robust.report.line_charts import LineChart, choices_of, curves_by_method, line_chart
from captum_robust.report.outcomes import NO_GRADIENT, attack_series
from captum_robust.report.pictures import build_gallery, build_strips, build_trios
from captum_robust.report.plots import (
    FAMILIES,
    Style,
    method_styles,
    plot_error_series,
    plot_robust_accuracy,
    svg_uri,
)
from captum_robust.report.results import FEW, GALLERY_POOL, Results
from captum_robust.report.run_tables import Tables
from captum_robust.report.scoring import TRUE_BOX
from captum_robust.report.tables import (
    ATTACK_COLUMNS,
    COLUMNS,
    FAILURE_COLUMNS,
    GROUPS,
    SALIENCY_COLUMNS,
    STABILITY_COLUMNS,
    Column,
    certificate_columns,
    errors_grid,
    gaps_grid,
    grid,
    has_unsure_gap,
)
from captum_robust.report.text import made_of_copies

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Template
    from matplotlib.figure import Figure

_SHOWN_FAILURES = 50
_EXPLAINED = {
    "label": "the true class (the predicted one where it is not known)",
    "prediction": "the predicted class",
}


@dataclass(frozen=True)
class Chart:
    """A figure and what it says in words."""

    title: str
    described: str
    picture: str
    """A data URI; empty where matplotlib is missing."""

    @classmethod
    def of(cls, title: str, described: str, plot: Callable[..., Figure], *data: Any) -> Chart:
        """Draw it by a function."""
        try:
            return cls(title, described, svg_uri(plot(*data)))
        except ImportError:  # matplotlib is no requirement
            return cls(title, described, "")


def write_report(tables: Tables, path: Path) -> Path:
    """Write the report of a comparison as one HTML file, whole or not at all.

    Args:
        tables: also of a run that was stopped half-way, or of which no image was scored.
        path: of the file; its folder is made.

    Returns:
        The path.

    Raises:
        IsADirectoryError: the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    html = page_template("report.html.j2").render(_content(tables))
    return write_whole(path, html.encode("utf-8", errors="replace"))


def page_template(name: str) -> Template:
    """A template of this room, which escapes what is put into it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("captum_robust.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["amount"] = amount
    return environment.get_template(name)


def page_script() -> dict[str, str]:
    """The script of a page, and the hash by which the page's policy allows it, and no other."""
    text = (files("captum_robust.report") / "templates" / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return {"script": text, "script_hash": f"sha256-{digest}"}


def _content(tables: Tables) -> dict[str, Any]:
    results, table = tables.results, tables.methods
    baselines, words = results.baselines, results.words
    failures = tables.scoring.failures()
    counts = results.counts()
    reasons, other_reasons = shown_reasons(results.failures())
    frame = image_rows(tables.scoring, part=(0, GALLERY_POOL))
    gallery = build_gallery(results, frame)
    entries = (*gallery.best, *gallery.worst)
    once = table if "same_as" not in table else table[table["same_as"].isna()]
    saliency = tables.saliency.replace({"threshold": {"-": "–"}})
    others = {*baselines, TRUE_BOX}
    columns = [column for column in columns_of(results) if column.key in table]
    ahead = Chance(tables.scoring, tables.tuning).ahead
    styles = _styles(tables)
    return {
        **page_script(),
        "methods": results.methods,
        "words": words,
        "links": {m: i for i, m in enumerate(results.methods) if entries and m in results.compared},
        "sentence": sentence_of(tables, ahead),
        "is_few": table["n"].max() < FEW,
        "few": FEW,
        "dots": dots_of(tables, shown_attack(tables)),
        "shown_attack": shown_attack(tables),
        "shots": first_shots(tables, frame) if "error" in tables.clean else [],
        "facts": _facts(results, counts),
        # Those of several radii are explained once.
        "explained": {c.label.partition(", R")[0]: c.meaning or c.key for c in columns},
        "groups": {key: GROUPS[key] for key in GROUPS if any(c.group == key for c in columns)},
        "results": grid(once, columns, baselines, by="attack", words=words, ahead=ahead),
        "crops": grid(saliency, SALIENCY_COLUMNS, others, head="Box around", words=words),
        "choices": choices_of(styles, words, leading(tables)),
        "charts": _curves(tables, styles),
        "removal": _removal(tables, styles),
        "certificates": _certificates(tables, frame, styles),
        "attacks": _attacks(tables, frame, styles) if len(results.attacks) > 1 else None,
        "gallery": gallery,
        "changes": any(tile.change for entry in entries for tile in entry.tiles),
        "pool_limit": GALLERY_POOL,
        "failures": grid(
            failures.replace({"method": words}).head(_SHOWN_FAILURES),
            FAILURE_COLUMNS,
            head="Image",
            names="image",
        ),
        "shown_failures": min(len(failures), _SHOWN_FAILURES),
        "failure_count": len(failures),
        "reasons": reasons,
        "other_reasons": other_reasons,
        "unboxed": counts["unboxed"],
        "colors": {"truth": TRUTH_COLOR, "predicted": PREDICTED_COLOR},
    }


def _styles(tables: Tables) -> dict[str, Style]:
    """How the line of each method looks; the best ones differ most."""
    results = tables.results
    ranked = leading(tables, most=len(results.methods))
    order = dict.fromkeys([*ranked, *results.methods])
    by_rank = method_styles({method: results.kinds[method] for method in order})
    return {method: by_rank[method] for method in results.methods}


def _facts(results: Results, counts: dict[str, int]) -> list[tuple[str, str]]:
    """Label and text of what the result depends on."""
    configuration = results.configuration
    model, settings = configuration["model"], configuration["settings"]
    size = "×".join(map(str, model["input_size"]))
    planned = configuration["dataset"]["samples"]
    images = (
        f"{counts['read']} read, {counts['broken']} not usable, {counts['unboxed']} without box"
    )
    if counts["unlabelled"]:
        images += f", {counts['unlabelled']} without label (there the prediction is explained)"
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
        ("Attacks", "; ".join(results.attacks[1:]) or "none"),
        (
            "Settings",
            f"{settings['device']}, {settings['precision']}, batch size "
            f"{settings['batch_size']}, seed {settings['seed']}",
        ),
        ("Versions", ", ".join(f"{k} {v}" for k, v in configuration["versions"].items())),
        ("Report written", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]


def _curves(tables: Tables, styles: Mapping[str, Style]) -> list[LineChart]:
    """Error against threshold, a chart a family."""
    charts = []
    words = tables.results.words
    for family, curves in tables.scoring.curves().groupby("strategy", sort=False):
        lowest = curves.loc[curves.groupby("method", sort=False)["error"].idxmin()]
        said = "; ".join(
            f"{words[row['method']]} {100 * row['error']:.1f} % at {row['alpha']:g}"
            for row in lowest.to_dict("records")
        )
        described = f"Error against α for the family {family}. Lowest: {said}."
        lines = curves_by_method(curves, "alpha", "error")
        charts.append(line_chart(str(family), FAMILIES[str(family)], described, lines, styles))
    return charts


_REMOVED = {
    "deletion": ("Deletion", "deleted", "deletion", "Areas below the curves of deletion"),
    "insertion": ("Insertion", "inserted", "insertion", "Areas below the curves of insertion"),
    "road_most": ("ROAD, largest first", "imputed", "road", "ROAD"),
    "road_least": ("ROAD, smallest first", "imputed", "road", "ROAD"),
}
"""Curve -> title, what happens to pixels, the column that sums it up, and what that is."""


def _removal(tables: Tables, styles: Mapping[str, Style]) -> list[LineChart]:
    """Probability against the share of the image, a chart for each way to remove it."""
    charts = []
    words = tables.results.words
    for name, curves in tables.removal.groupby("curve", sort=False):
        title, done, column, summary = _REMOVED[str(name)]
        areas = zip(tables.clean["method"], tables.clean[column], strict=True)
        said = "; ".join(f"{words[method]} {area:.3f}" for method, area in areas if area == area)
        described = f"{summary}: {said}."
        lines = curves_by_method(curves, "share", "probability")
        label = f"share of the pixels {done}"
        charts.append(line_chart(title, label, described, lines, styles))
    return charts


def columns_of(results: Results) -> tuple[Column, ...]:
    """The columns of the results, with those of the radii within which the run certifies."""
    how = certification_of(results)
    at = next(i for i, column in enumerate(COLUMNS) if column.group == "attack")
    return (*COLUMNS[:at], *(certificate_columns(how.radii) if how else ()), *COLUMNS[at:])


def _certificates(
    tables: Tables, frame: pd.DataFrame, styles: Mapping[str, Style]
) -> dict[str, Any] | None:
    """What the section on certificates shows; None: the run has none."""
    how, words = certification_of(tables.results), tables.results.words
    if how is None:
        return None
    curves = certified_curves(tables.results, tables.clean)
    charts = []
    if not curves.empty:
        lines = curves_by_method(curves, "radius", "error")
        said = "; ".join(
            f"{words[method]} "
            + ", ".join(f"{100 * e:.1f} % at {r:g}" for r, e in zip(*curve, strict=True))
            for method, curve in lines.items()
        )
        label = "radius R of the change, in L2"
        described = f"Certified error against R. {said}."
        charts.append(line_chart("Certified error", label, described, lines, styles))
    shown = [m for m in leading(tables) if m not in tables.results.baselines]
    return {
        "samples": how.samples,
        "sigma": f"{how.sigma:g}",
        "made": made_of_copies(how),
        "confidence": f"{100 * how.confidence:g}",
        "unproven": how.unproven(),
        "charts": charts,
        "entries": build_certificates(tables.results, frame, shown),
        "colors": dict(reversed(CERTIFIED_COLORS.items())),
        "inner": INNER_COLOR,
        "outer": OUTER_COLOR,
    }


def _attacks(tables: Tables, frame: pd.DataFrame, styles: Mapping[str, Style]) -> dict[str, Any]:
    """What the section on attacks shows."""
    results, attacked, gaps = tables.results, tables.attacks, tables.gaps
    baselines, words = results.baselines, results.words
    ahead = Chance(tables.scoring, tables.tuning).ahead
    target = results.configuration["settings"]["target"]
    has_stuck = bool(attacked["without_gradient"].any())
    columns = [c for c in ATTACK_COLUMNS if has_stuck or c.key != "without_gradient"]
    chart, error_charts = _robust_chart(attack_series(attacked)), _error_charts(tables, styles)
    return {
        "table": grid(attacked, columns, head="Attack", names="attack"),
        "unlabelled": int(attacked["unlabelled"].max()),
        "no_gradient": NO_GRADIENT if has_stuck else "",
        "chart": chart,
        "undrawn": any(not one.picture for one in (*error_charts, chart) if one),
        "errors": errors_grid(
            tables.methods, tables.clean["method"], results.attacks, baselines, words
        )
        if "error" in tables.methods
        else None,
        "error_charts": error_charts,
        "adaptive": bool(results.adaptive),
        "stability": grid(
            tables.stability, STABILITY_COLUMNS, baselines, by="attack", words=words, ahead=ahead
        ),
        "gaps": gaps_grid(gaps, baselines, words),
        "gaps_of": words.get(tables.gap_baseline, ""),
        "no_gaps": list(dict.fromkeys(gaps.loc[gaps["closed"].isna(), "attack"])),
        "unsure": has_unsure_gap(gaps),
        "trios": build_trios(results, frame),
        "explained": _EXPLAINED.get(target, target),
        "strips": build_strips(results, frame),
        "shown": bool(attacked["n"].any()),
    }


def _error_charts(tables: Tables, styles: Mapping[str, Style]) -> list[Chart]:
    """Localization error against strength, a chart an attack of two strengths or more.

    The lines of the best methods under its strongest attack; in words those of all.
    """
    charts = []
    words = tables.results.words
    for name, rows in tables.scoring.error_series(tables.methods).items():
        counts = rows["method"].value_counts()
        lines = {m: rows[rows["method"] == m] for m in styles if counts.get(m, 0) > 2}
        if not lines:
            continue
        said = "; ".join(f"{words[m]}: {_said(one, 'error')}" for m, one in lines.items())
        shown = [m for m in leading(tables, rows["attack"].iloc[-1]) if m in lines]
        kept = rows[rows["method"].isin(shown)].assign(method=rows["method"].map(words))
        drawn = {words[m]: styles[m] for m in shown}
        quantity = f"Localization error under {name} in % against the strength of the attack"
        described = f"{quantity}. {said}."
        charts.append(Chart.of(name, described, plot_error_series, {name: kept}, drawn))
    return charts


def _robust_chart(series: dict[str, pd.DataFrame]) -> Chart | None:
    """Robust accuracy against strength; None for points."""
    series = {name: rows[rows["n"] > 0] for name, rows in series.items()}
    if all(len(rows) < 2 for rows in series.values()):
        return None
    said = []
    for name, rows in series.items():
        numbers = _said(rows, "robust_accuracy")
        if len(rows) and rows["epsilon"].iloc[0] > 0:
            numbers = f"{100 * rows['clean_accuracy'].iloc[0]:.1f} at 0, {numbers}"
        said.append(f"{name}: {numbers}")
    described = "Robust accuracy in % against the strength of the attack. " + "; ".join(said) + "."
    return Chart.of("", described, plot_robust_accuracy, series)


def _said(rows: pd.DataFrame, column: str) -> str:
    pairs = zip(rows[column], rows["epsilon"], strict=True)
    return ", ".join(f"{100 * share:.1f} at {LEVELS * epsilon:g}" for share, epsilon in pairs)
