"""What the rows of a run say of certificates: errors and shares of each method, within radii."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from captum_robust._checks import check
from captum_robust.catalog.certification import Certification
from captum_robust.metrics.functional import bootstrap_interval
from captum_robust.report.pairs import positions_of
from captum_robust.report.results import CLEAN, EVERY, Part, Results
from captum_robust.report.tables import certificate_key
from captum_robust.runs.store import unpack

_WIDTH = 10
"""Numbers of a line, see ``benchmark.measure.certificate_columns``."""


@dataclass(frozen=True)
class CertifiedRows:
    """The certificates of one method, of M clean images."""

    positions: Tensor
    radii: list[float]
    lines: Tensor
    """M×(R+1)×10, a line for the smoothed box and one for each radius."""

    def named(self) -> dict[str, Tensor]:
        """M numbers by the key of their column; NaN where there is none, as without a box."""
        overlap, share = self.lines[:, :, 1], self.lines[:, 1:, 0]
        # With an overlap of .5 the box counts as a miss.
        error = (overlap <= 0.5).float().masked_fill(overlap.isnan(), torch.nan)
        columns = {"smoothed_error": error[:, 0]}
        for i, radius in enumerate(self.radii):
            columns[certificate_key("error", radius)] = error[:, i + 1]
            columns[certificate_key("share", radius)] = share[:, i]
        return columns


def certification_of(results: Results) -> Certification | None:
    """How the run certifies; None: it does not."""
    facts = results.configuration["settings"].get("certificates")
    if facts is None:
        return None
    names = ("sigma", "samples", "confidence", "share", "denoiser")
    known = {k: v for k, v in facts.items() if k in names}
    return Certification(**known, radii=tuple(facts["radii"]), seed=0)


def certified_rows(results: Results, method: str, part: Part = EVERY) -> CertifiedRows | None:
    """What a method's rows of a part prove; None: nothing."""
    how = certification_of(results)
    rows = results.measured(method, CLEAN, "certificate", part) if how else []
    if how is None or not rows:
        return None
    packed = [unpack(row["value"]) for row in rows]
    expected = _WIDTH * (1 + len(how.radii))
    fits = all(len(values) == expected for values in packed)
    check(fits, f"{results.store.folder}: certificate: expected {expected} values, got others")
    values = torch.from_numpy(np.stack(packed)).reshape(len(rows), -1, _WIDTH)
    positions = positions_of(rows)
    return CertifiedRows(positions, list(how.radii), values)


def certificate_means(results: Results, method: str, level: float, seed: int) -> dict[str, float]:
    """Return the mean of each number with its interval, as columns of the method's row."""
    columns: dict[str, float] = {}
    rows = certified_rows(results, method)
    for name, values in (rows.named() if rows else {}).items():
        if values.isnan().all():  # no image has a box
            continue
        mean = bootstrap_interval(values[~values.isnan()], level=level, seed=seed)
        columns |= {name: mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return columns


def certificate_names(results: Results) -> tuple[str, ...]:
    """The columns of :func:`image_certificates`; none where nothing is certified."""
    how = certification_of(results)
    if how is None or not results.holds("certificate"):
        return ()
    of_radii = ((certificate_key(of, r) for of in ("iou", "share")) for r in how.radii)
    return ("smoothed_iou", *chain.from_iterable(of_radii))


def image_certificates(results: Results, part: Part) -> Iterator[pd.DataFrame]:
    """Yield the overlaps and shares of each clean image of the part, a frame a method."""
    for method in results.methods:
        if (rows := certified_rows(results, method, part)) is None:
            continue
        # Of each line its overlap and share, of the first, of the smoothed box, the overlap alone.
        values = rows.lines[:, :, [1, 0]].flatten(1)[:, [0, *range(2, 2 * rows.lines.shape[1])]]
        frame = pd.DataFrame(values.numpy(), columns=list(certificate_names(results)))
        yield frame.assign(position=rows.positions.numpy(), method=method, attack=CLEAN)


def certified_curves(results: Results, table: pd.DataFrame) -> pd.DataFrame:
    """The error that is not ruled out against the radius: ``method``, ``radius``, ``error``.

    At 0 that of the smoothed box. From the rows of the clean images of the run's table.
    """
    how = certification_of(results)
    keys = {0.0: "smoothed_error"}
    keys |= {r: certificate_key("error", r) for r in (how.radii if how else ())}
    rows: list[dict[str, Any]] = [
        {"method": record["method"], "radius": radius, "error": record[key]}
        for record in table.to_dict("records")
        for radius, key in keys.items()
        if key in record and record[key] == record[key]
    ]
    return pd.DataFrame(rows, columns=["method", "radius", "error"])
