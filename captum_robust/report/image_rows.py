"""One row for each image, method and attack, as data frames: of all images, or part by part."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from captum_robust._checks import check_count
from captum_robust._files import write_by
from captum_robust._progress import counted
from captum_robust.report.certified_rows import certificate_names, image_certificates
from captum_robust.report.pseudo_boxes import drawn_boxes
from captum_robust.report.removal import area_names, image_areas
from captum_robust.report.results import CLEAN, EVERY, USUAL_TUNING, Part, Tuning
from captum_robust.report.scoring import Scoring

_BOX = ("x0", "y0", "x1", "y1")
_CROP = ("saliency", "crop_area", "crop_probability")
_KEY = ["position", "method", "attack"]
_GROUP = 50_000
"""Rows of a row group, and of the data frame that it is written from."""
_TYPES = {
    "string": ("image", "method", "attack", "source", "error"),
    "Int64": ("position", "label", "predicted", "explained", "decided", "new_class"),
    "boolean": ("localized", "flipped", "already_wrong", "fooled", "without_gradient"),
}
"""Type of pandas -> the columns that have it; all others are floating point."""


def image_rows(scoring: Scoring, tuning: Tuning = USUAL_TUNING, part: Part = EVERY) -> pd.DataFrame:
    """See :meth:`Comparison.to_dataframe`; of some positions only, with the same columns."""
    rows = pd.DataFrame(scoring.results.every_map(part))
    for frames, names in (
        (_boxes(scoring, tuning, part), _box_names(scoring, tuning)),
        (_crops(scoring, tuning, part), _CROP if scoring.results.holds("crops") else ()),
        (image_areas(scoring.results, part), area_names(scoring.results)),
        (image_certificates(scoring.results, part), certificate_names(scoring.results)),
    ):
        if names and len(rows):
            empty = pd.DataFrame(columns=[*_KEY, *names])
            every = pd.concat([one for one in frames if len(one)] or [empty])
            rows = rows.merge(every.reindex(columns=[*_KEY, *names]), how="left", on=_KEY)
    return rows


def chunks_of_rows(scoring: Scoring, tuning: Tuning, chunksize: int) -> Iterator[pd.DataFrame]:
    """Yield the rows so many at a time, the last ones what is left."""
    check_count("chunksize", chunksize, 1)
    return _chunks(scoring, tuning, chunksize)


def _chunks(scoring: Scoring, tuning: Tuning, chunksize: int) -> Iterator[pd.DataFrame]:
    results = scoring.results
    (end,) = results.select("SELECT 1 + coalesce(max(position), -1) AS stop FROM images")
    step = max(1, chunksize // (len(results.methods) * len(results.attacks)))
    left = pd.DataFrame()
    for start in counted(range(0, end["stop"], step), "part", None, "rows"):
        rows = image_rows(scoring, tuning, (start, start + step))
        left = pd.concat([left, rows], ignore_index=True) if len(left) else rows
        while len(left) >= chunksize:
            yield left[:chunksize]
            left = left[chunksize:].reset_index(drop=True)
    if len(left):
        yield left


def write_parquet(scoring: Scoring, tuning: Tuning, path: Path) -> Path:
    """See :meth:`Comparison.to_parquet`."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise ImportError("to_parquet needs pyarrow: pip install pyarrow") from None
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    chunks = chunks_of_rows(scoring, tuning, _GROUP)
    first = next(chunks, pd.DataFrame())
    schema = pa.Schema.from_pandas(_typed(first), preserve_index=False)

    def write(part: Path) -> None:
        with ParquetWriter(part, schema) as writer:
            for rows in chain([first], chunks):
                table = pa.Table.from_pandas(_typed(rows), schema, preserve_index=False)
                writer.write_table(table)

    return write_by(path, write)


def _typed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the type of each column that it has in every part."""
    known = {name: kind for kind, names in _TYPES.items() for name in names}
    return pd.DataFrame({n: _column(rows[n], known.get(str(n), "float64")) for n in rows})


def _column(values: pd.Series[Any], kind: str) -> pd.Series[Any]:
    numbers = values if kind == "string" else pd.to_numeric(values).astype("float64")
    return numbers.astype(kind)  # type: ignore[call-overload,no-any-return]


def _box_names(scoring: Scoring, tuning: Tuning) -> tuple[str, ...]:
    """The columns of the boxes, if any was scored."""
    results = scoring.results
    pairs = ((method, attack) for attack in results.attacks for method in results.methods)
    is_scored = any(scoring.score(*pair, tuning) is not None for pair in pairs)
    return ("iou", *_BOX, "localized") if is_scored else ()


def _boxes(scoring: Scoring, tuning: Tuning, part: Part) -> Iterator[pd.DataFrame]:
    """The overlap and the box of each image at the threshold of its fold."""
    results = scoring.results
    every = [(attack, method) for attack in results.attacks for method in results.methods]
    for attack, method in counted(every, "row", None, "boxes"):
        own = results.rows_of(method, attack) == attack
        scored = scoring.score(method, attack, tuning) if own else None
        if scored is None:
            continue
        rows = results.measured(method, attack, "predicted_boxes", part)
        here = _within(scored.positions, part)
        known = {position: i for i, position in enumerate(scored.positions[here].tolist())}
        rows = [row for row in rows if row["position"] in known]
        if not rows:
            continue
        at = here.start + torch.tensor([known[row["position"]] for row in rows])
        boxes = drawn_boxes(rows)[torch.arange(len(rows)), scored.columns[at]]
        frame = pd.DataFrame(boxes.numpy(), columns=list(_BOX))
        frame.insert(0, "iou", scored.overlaps[at].numpy())
        correct = scored.result.correct.reshape(len(scored.positions), -1)
        frame["localized"] = correct[at, 0].numpy()
        frame["position"] = scored.positions[at].numpy()
        yield frame.assign(method=method, attack=attack)


def _crops(scoring: Scoring, tuning: Tuning, part: Part) -> Iterator[pd.DataFrame]:
    """The saliency metric of each clean image and what it is made of."""
    for method in scoring.results.methods:
        crops = scoring.crops(method, tuning)
        if crops is not None:
            here = _within(crops.positions, part)
            values = (crops.tuned.per_sample, crops.area, crops.probability)
            columns = dict(zip(_CROP, (v[here].numpy() for v in values), strict=True))
            frame = pd.DataFrame({"position": crops.positions[here].numpy(), **columns})
            yield frame.assign(method=method, attack=CLEAN)


def _within(positions: torch.Tensor, part: Part) -> slice:
    """Where those of the ascending positions are that lie in the part."""
    start, stop = torch.searchsorted(positions, torch.tensor(part)).tolist()
    return slice(start, stop)
