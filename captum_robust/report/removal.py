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
from captum_robust.report.results import CLEAN, Results
from captum_robust.runs.store import unpack

CURVES = {"removal": ("deletion", "insertion"), "road": ("road_most", "road_least")}
"""Column of the rows -> the curves in the order of their packed values, behind the share."""
NUMBERS = ("infidelity", "sensitivity", "randomized_spearman", "randomized_ssim")
"""Measured of each image as they are."""


def _curves(
    results: Results, method: str, value: str, stop: int | None = None
) -> tuple[list[int], dict[str, RemovalCurve]]:
    """The positions of the clean images that were measured, and their curves by name.

    Both are empty where none was; with ``stop`` only of the positions before it.
    """
    rows = results.measured(method, CLEAN, value, stop)
    if not rows:
        return [], {}
    packed = [unpack(row["value"]) for row in rows]
    sizes = {len(values) for values in packed}
    fits = len(sizes) == 1 and not max(sizes) % 3
    check(fits, f"{results.store.folder}: {value}: expected three values a step, got others")
    share, *probabilities = torch.from_numpy(np.stack(packed)).reshape(len(rows), 3, -1).unbind(1)
    curves = zip(CURVES[value], probabilities, strict=True)
    return [row["position"] for row in rows], {n: RemovalCurve(share[0], p) for n, p in curves}


def mean_areas(results: Results, method: str, level: float, seed: int) -> dict[str, float]:
    """Return the mean of each number with its interval, as columns of the method's row."""
    columns: dict[str, float] = {}
    for name, (_, values) in measured_areas(results, method).items():
        mean = bootstrap_interval(values, level=level, seed=seed)
        columns |= {name: mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return columns


def measured_areas(
    results: Results, method: str, stop: int | None = None
) -> dict[str, tuple[list[int], torch.Tensor]]:
    """Return the positions of the clean images before ``stop``, and areas and numbers of each."""
    positions, curves = _curves(results, method, "removal", stop)
    measured = {name: (positions, curve.area) for name, curve in curves.items()}
    positions, curves = _curves(results, method, "road", stop)
    if curves:
        most, least = (curves[name].probability for name in CURVES["road"])
        measured["road"] = positions, (least - most).mean(dim=1) / 2
    for name in NUMBERS:
        if rows := results.measured(method, CLEAN, name, stop):
            values = torch.tensor([row["value"] for row in rows], dtype=torch.float32)
            measured[name] = [row["position"] for row in rows], values
    return measured


def image_areas(results: Results, stop: int) -> Iterator[pd.DataFrame]:
    """Yield the areas and numbers of each clean image before ``stop``, a frame a method."""
    for method in results.methods:
        measured = measured_areas(results, method, stop)
        each = {name: pd.Series(v.numpy(), index=at) for name, (at, v) in measured.items()}
        if each:
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
