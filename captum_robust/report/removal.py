"""Faithfulness of a run: curves of deletion, insertion and ROAD, and what has no curve."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np
import pandas as pd
import torch

from captum_robust._checks import check
from captum_robust._progress import counted
from captum_robust.metrics.functional import RemovalCurve, bootstrap_interval
from captum_robust.report.pairs import positions_of
from captum_robust.report.results import CLEAN, EVERY, Part, Results
from captum_robust.runs.store import unpack

CURVES = {"removal": ("deletion", "insertion"), "road": ("road_most", "road_least")}
"""Column of the rows -> the curves in the order of their packed values, behind the share."""
NUMBERS = ("infidelity", "sensitivity", "randomized_spearman", "randomized_ssim")
"""Measured of each image as they are."""
AREAS = {"deletion": "removal", "insertion": "removal", "road": "road"} | {n: n for n in NUMBERS}
"""What is summed up in one number an image -> its column of the rows."""


def _curves(
    results: Results, method: str, value: str, part: Part = EVERY
) -> tuple[torch.Tensor, dict[str, RemovalCurve]]:
    """The positions of the clean images that were measured, and their curves by name.

    Both are empty where none was.
    """
    rows = results.measured(method, CLEAN, value, part)
    if not rows:
        return positions_of(()), {}
    packed = [unpack(row["value"]) for row in rows]
    sizes = {len(values) for values in packed}
    fits = len(sizes) == 1 and not max(sizes) % 3
    check(fits, f"{results.store.folder}: {value}: expected three values a step, got others")
    share, *probabilities = torch.from_numpy(np.stack(packed)).reshape(len(rows), 3, -1).unbind(1)
    curves = zip(CURVES[value], probabilities, strict=True)
    positions = positions_of(rows)
    return positions, {n: RemovalCurve(share[0], p) for n, p in curves}


def mean_areas(results: Results, method: str, level: float, seed: int) -> dict[str, float]:
    """Return the mean of each number with its interval, as columns of the method's row."""
    columns: dict[str, float] = {}
    for name in AREAS:
        _, values = measured_area(results, method, name)
        if not len(values):
            continue
        mean = bootstrap_interval(values, level=level, seed=seed)
        columns |= {name: mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return columns


def measured_area(
    results: Results, method: str, name: str, part: Part = EVERY
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of the clean images that were measured, and the number of each."""
    if name in NUMBERS:
        rows = results.measured(method, CLEAN, name, part)
        values = torch.tensor([row["value"] for row in rows], dtype=torch.float32)
        return positions_of(rows), values
    positions, curves = _curves(results, method, AREAS[name], part)
    if not curves:
        return positions, torch.zeros(0)
    if name != "road":
        return positions, curves[name].area
    most, least = (curves[of].probability for of in CURVES["road"])
    return positions, (least - most).mean(dim=1) / 2


def area_names(results: Results) -> tuple[str, ...]:
    """Return those of :data:`AREAS` that the run has measured."""
    return tuple(name for name, value in AREAS.items() if results.holds(value))


def image_areas(results: Results, part: Part) -> Iterator[pd.DataFrame]:
    """Yield the areas and numbers of each clean image of the part, a frame a method."""
    names = area_names(results)
    for method in results.methods:
        measured = {name: measured_area(results, method, name, part) for name in names}
        each = {name: pd.Series(v.numpy(), index=at.numpy()) for name, (at, v) in measured.items()}
        if any(map(len, each.values())):
            frame = pd.DataFrame(each).rename_axis("position").reset_index()
            yield frame.assign(method=method, attack=CLEAN)


def mean_curves(results: Results) -> pd.DataFrame:
    """Return the mean curves of each method: ``method``, ``curve``, ``share``, ``probability``."""
    parts = [pd.DataFrame(columns=["method", "curve", "share", "probability"])]
    for method in counted(results.methods, "method", None, "curves"):
        both = (_curves(results, method, value)[1].items() for value in CURVES)
        for name, curve in chain.from_iterable(both):
            mean = {"share": curve.share, "probability": curve.probability.double().mean(dim=0)}
            parts.append(pd.DataFrame({"method": method, "curve": name, **mean}))
    return pd.concat(parts[1:] or parts, ignore_index=True)
