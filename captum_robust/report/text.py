"""The tables of a comparison for a terminal."""

from __future__ import annotations

import math

from captum_robust._plurals import amount
from captum_robust.catalog.certification import Certification
from captum_robust.report.certified_rows import certification_of
from captum_robust.report.failures import shown_reasons
from captum_robust.report.outcomes import attacks_text
from captum_robust.report.results import FEW, NOTHING_SCORED
from captum_robust.report.run_tables import Tables
from captum_robust.report.tables import (
    COLUMNS,
    GAP_COLUMNS,
    SALIENCY_COLUMNS,
    STABILITY_COLUMNS,
    certificate_columns,
    text_table,
)

_ADAPTIVE_NOTE = (
    "adaptive: the attacker knows the transforms of a defended method; =: a method without a "
    "defence,\nof which the plain attack knows all there is: its value; -: the map has no gradient"
)
_SALIENCY_NOTE = (
    "saliency metric: log(max(area, .05)) - log probability of the class in the tightest "
    "crop, lower is better;\nthresholds tuned on the other half; best crop: the best of each image "
    "by the metric itself;\nclean images; true box: the largest one annotated"
)

_REMOVAL_NOTE = (
    "deletion, insertion: area under the probability of the class while the pixels that the map "
    "ranks highest\nare replaced by the mean, lower is better, or put into the blurred image, "
    "higher is better; clean images"
)
_ROAD_NOTE = (
    "road: probability of the class without the smallest pixels less that without the largest, "
    "halved, where\ntheir neighbours fill them; higher is better"
)
_INFIDELITY_NOTE = (
    "infidelity: mean squared error of the map's sums over squares, scaled to fit best, as falls "
    "of the probability\nwhen the mean replaces each; lower is better"
)
_SENSITIVITY_NOTE = (
    "sensitivity: how far noise of at most 0.02 moves the map, as a part of its length; lower is "
    "steadier"
)
_RANDOMIZATION_NOTE = (
    "randomized: how far the map is the same while the classifier loses its weights, in three "
    "stages; lower is better,\nand 1 is a map that does not look at the classifier"
)
_NOTES = {
    "deletion": _REMOVAL_NOTE,
    "road": _ROAD_NOTE,
    "infidelity": _INFIDELITY_NOTE,
    "sensitivity": _SENSITIVITY_NOTE,
    "randomized_spearman": _RANDOMIZATION_NOTE,
}


_GAP_NOTE = (
    "gap: error of {} attacked less clean; closed: the part of "
    "it that the method does not lose\nunder the same attack (of an adaptive one: under its "
    "own); no gap: share of the bootstrap's draws\nwithout any, which are not in the interval"
)


def text_of(tables: Tables) -> str:
    """Return all tables of a run that have rows, each with a line on what it counts."""
    text = f"{text_table(tables.clean, COLUMNS, ['method', 'n'])}\n{tuning_note(tables)}"
    text += "".join(f"\n{note}" for name, note in _NOTES.items() if name in tables.clean)
    if len(tables.results.attacks) > 1:
        text = f"clean images\n{text}\n\nattacks\n{attacks_text(tables.attacks)}"
        if "error" in tables.methods:
            text += f"\n\nerror under attack\n{_errors_text(tables)}"
    gap_note = _GAP_NOTE.format(tables.gap_baseline)
    under_attack, clean = ["attack", "method", "n"], ["method", "n"]
    stability = "maps under attack, beside the clean ones"
    for title, table, columns, before, note in (
        (stability, tables.stability, STABILITY_COLUMNS, under_attack, ""),
        ("gap closed", tables.gaps, GAP_COLUMNS, under_attack, f"\n{gap_note}"),
        ("saliency metric", tables.saliency, SALIENCY_COLUMNS, clean, f"\n{_SALIENCY_NOTE}"),
    ):
        if not table.empty:
            text += f"\n\n{title}\n{text_table(table, columns, before)}{note}"
    text += _certificates_text(tables)
    reasons, others = shown_reasons(tables.results.failures())
    if reasons:
        more = [f"and {others} other reasons"] if others else []
        lines = ["what failed, and why the first of each kind did", *map(str, reasons), *more]
        text += "\n\n" + "\n  ".join(lines)
    return text


def _certificates_text(tables: Tables) -> str:
    """What is proven; empty for a run that does not certify."""
    how = certification_of(tables.results)
    columns = certificate_columns(how.radii) if how else ()
    if how is None or (share := columns[-1].key) not in tables.clean:
        return ""
    rows = tables.clean.dropna(subset=[share])
    text = f"\n\ncertificates\n{text_table(rows, columns, ['method'])}\n{certified_note(how)}"
    lacking = [f"\n{line}" for line in lacking_notes(how)]
    return text + "".join(lacking)


def certified_note(how: Certification) -> str:
    """What the certificates of a run count."""
    copies = amount(how.samples, "copy")
    return (
        f"certificates: {copies} with noise of {how.sigma:g}, {made_of_copies(how)}; "
        "error: images whose box is not proven to\noverlap a true one by more than .5, whatever "
        "changes the image by at most R in L2; share: of the pixels\nthat is certified; "
        f"with {100 * how.confidence:g} % confidence an image; thresholds as they ship"
    )


def made_of_copies(how: Certification) -> str:
    """What becomes of a noisy copy before a method sees it."""
    return "then denoised" if how.denoiser else "cut off at 0 and 1"


def lacking_notes(how: Certification) -> list[str]:
    """A line for each radius at which there are too few copies."""
    return [
        f"R {r:g}: no pixel is proven by {amount(how.samples, 'copy')}; it takes {least} at least"
        for r, least in how.unproven().items()
    ]


_TUNED = {
    "two-fold": "tuned on the other half of the images",
    "shipped": "as they ship for each method",
    "usual": "at a fifth of the map's range, where none ships",
    "pseudo": "tuned on boxes that the other methods agree on",
    "oracle": "tuned on the reported images (oracle)",
}


def tuning_note(tables: Tables) -> str:
    """Return what the error counts, and how thresholds were chosen."""
    if "error" not in tables.methods:
        return NOTHING_SCORED if tables.results.is_unscored() else "nothing was scored"
    ways = [way for way in dict.fromkeys(tables.clean["tuned"]) if way in _TUNED]
    note = "error: share of boxes with IoU of .5 or less, 95 % bootstrap interval; thresholds "
    note += " and ".join(_TUNED[way] for way in ways)
    if tables.clean["n"].max() < FEW:
        note += f"\nfewer than {FEW} images are too few to rank methods: read the intervals"
    return note


def _errors_text(tables: Tables) -> str:
    errors = tables.scoring.error_by_attack(tables.methods)
    errors = errors.map(lambda e: "-" if math.isnan(e) else f"{e:.3f}")
    for method in errors.index:
        for attack in errors.columns:
            if tables.results.rows_of(method, attack) not in (attack, None):
                errors.loc[method, attack] += "="
    errors.index.name = errors.columns.name = None
    return errors.to_string() + (f"\n{_ADAPTIVE_NOTE}" if tables.results.adaptive else "")
