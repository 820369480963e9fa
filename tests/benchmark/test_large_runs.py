"""Runs of many images: what is kept of each, and how it is read part by part."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from captum_robust.attacks import FGSM
from captum_robust.benchmark import Certification, Comparison, compare
from captum_robust.metrics.functional import maxboxacc_curve
from captum_robust.metrics.functional.box_accuracy import read_levels
from captum_robust.runs.level_hits import OVERLAPS, count_hits, pack_hits
from captum_robust.runs.rows import AttackRow, ResultRow
from captum_robust.runs.schema import TABLES, columns_of
from captum_robust.runs.store import RunStore, pack

from .conftest import Drawn, make_classifier

CERTIFIED = Certification(0.25, samples=33)
METHODS = ["grad_cam", "center_box"]
CONFIGURATION: Any = {"model": "a", "dataset": "b", "settings": "c"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with an attack, of which an image is broken."""
    out = tmp_path_factory.mktemp("large") / "run"
    go_on(out)
    return out


def go_on(out: Path) -> Comparison:
    model = make_classifier()
    attack, data = {"fgsm 8/255": FGSM(model, epsilon=8 / 255)}, Drawn(9, broken=(4,))
    return compare(model, data, METHODS, attack, out=out, saliency_metric=True, progress=False)


@pytest.fixture
def run(folder: Path) -> Iterator[Comparison]:
    opened = Comparison(folder)
    yield opened
    opened._store.close()


@pytest.mark.parametrize("size", [1, 5, 7, 36, 1000])
def test_chunks_have_so_many_rows_and_are_the_data_frame_together(
    run: Comparison, size: int
) -> None:
    whole, chunks = run.to_dataframe(), list(run.to_dataframe(chunksize=size))
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert {tuple(chunk.columns) for chunk in chunks} == {tuple(whole.columns)}
    every = pd.concat([chunk.astype(object) for chunk in chunks], ignore_index=True)
    missing = whole.isna()
    assert every.isna().equals(missing)
    assert every.where(~missing, 0).equals(whole.astype(object).where(~missing, 0))
    assert whole["saliency"].notna().sum() == 16


def test_chunks_have_what_is_measured_of_some_methods_and_images_only() -> None:
    more: dict[str, Any] = {"faithfulness": True, "certify": CERTIFIED}
    data = Drawn(3, broken=(0,))
    run = compare(make_classifier(), data, METHODS, progress=False, **more)
    whole, chunks = run.to_dataframe(), list(run.to_dataframe(chunksize=2))
    assert [list(chunk) for chunk in chunks] == [list(whole)] * 3
    for name in ("deletion", "road", "infidelity", "smoothed_iou", "certified_share_0.1"):
        assert chunks[0][name].isna().all()
        assert pd.concat(chunks)[name].tolist()[2:] == whole[name].tolist()[2:]
        assert whole[name].notna().sum() == 4


def test_chunks_are_refused_where_they_have_no_size(run: Comparison) -> None:
    for size in (0, -1, 2.5):
        with pytest.raises((TypeError, ValueError), match="chunksize: expected"):
            run.to_dataframe(chunksize=size)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="first and chunksize: give one of them"):
        run.to_dataframe(first=2, chunksize=5)  # type: ignore[call-overload]


def test_a_parquet_file_has_the_rows_of_the_data_frame(
    run: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("captum_robust.report.image_rows._GROUP", 7)
    path = run.to_parquet(tmp_path / "new" / "rows.parquet")
    file, whole = parquet.ParquetFile(path), run.to_dataframe()
    assert file.num_row_groups == -(-len(whole) // 7)
    rows = pd.read_parquet(path)
    assert list(rows) == list(whole)
    assert rows.isna().equals(whole.isna())
    for name in whole:
        known = whole[name].notna()
        assert (rows[name][known] == whole[name][known]).all(), name
    kinds = {name: str(file.schema_arrow.field(name).type) for name in file.schema_arrow.names}
    assert {kinds[n] for n in ("position", "label", "decided", "new_class")} == {"int64"}
    assert {kinds[n] for n in ("localized", "fooled", "flipped")} == {"bool"}
    assert {kinds[n] for n in ("iou", "x0", "margin", "seconds", "linf")} == {"double"}
    assert {kinds[n] for n in ("image", "error", "source")} == {"large_string"}


def test_a_parquet_file_is_there_whole_or_as_it_was(
    run: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("old")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="to_parquet needs pyarrow: pip install pyarrow"):
        run.to_parquet(path)
    monkeypatch.undo()
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        run.to_parquet(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="could not be written"):
        run.to_parquet(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_of_which_nothing_was_read_is_an_empty_file(tmp_path: Path, model: Any) -> None:
    pytest.importorskip("pyarrow")
    with pytest.warns(match="could be used"):
        run = compare(model, Drawn(2, broken=(0, 1)), METHODS, progress=False)
    assert next(run.to_dataframe(chunksize=3))["error"].notna().all()
    path = run.to_parquet(tmp_path / "rows.parquet")
    assert len(pd.read_parquet(path)) == 4


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("DELETE FROM results", "readonly"),
        ("UPDATE images SET label = 0", "readonly"),
        ("SELECT mthod FROM results", "no such column: mthod"),
        ("nonsense", "syntax error"),
        ("SELECT 1; SELECT 2", "one statement"),
    ],
)
def test_a_query_of_a_users_own_changes_nothing_and_is_refused_by_its_text(
    run: Comparison, sql: str, reason: str
) -> None:
    query = "SELECT * FROM results WHERE position >= ? ORDER BY position, method, attack"
    before = run.select(query, [0])
    with pytest.raises(ValueError, match=rf"sql: expected one query .* got '{sql}' \(.*{reason}"):
        run.select(sql)
    assert run.select(query, [0]) == before
    assert len(before) == 36


def test_another_rank_reads_no_rows_until_it_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[bool] = []
    join = RunStore._join

    def noted(store: RunStore) -> None:
        joined.append(store._is_writer)
        join(store)

    monkeypatch.setattr(RunStore, "_join", noted)
    monkeypatch.setattr(sys.modules[compare.__module__], "is_first", lambda: False)
    data, options = Drawn(3), {"out": tmp_path / "run", "progress": False}
    run = compare(make_classifier(), data, METHODS, **options)  # type: ignore[arg-type]
    assert joined == [True]
    assert run.methods == METHODS
    assert len(run.table()) == 2
    assert joined == [True, False]
    (tmp_path / "run" / "rows.sqlite").write_bytes(b"no database" * 100)
    late = Comparison(tmp_path / "run", _lazy=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"rows\.sqlite: no rows of a run"):
            len(late)


def test_only_hits_of_the_levels_are_kept_and_overlaps_of_earlier_versions_read() -> None:
    ious = torch.rand(5000, 256, generator=torch.Generator().manual_seed(0))
    ious[0, :4] = torch.tensor([0.3, 0.5, 0.7, 0.0])
    for asked in OVERLAPS.values():
        new, old = [pack_hits(row, asked) for row in ious], [pack(row) for row in ious]
        for packed in (new, old, old[:9] + new[9:]):
            hits = torch.from_numpy(count_hits(packed, asked) / len(ious))
            for share, overlap in zip(hits, asked, strict=True):
                assert read_levels(share).allclose(maxboxacc_curve(ious, overlap), atol=1e-12)
        assert max(map(len, new)) < 32 * len(asked) + 20
    with pytest.raises(ValueError, match=r"rows\.sqlite: damaged, .* \(12 bytes of levels\)"):
        count_hits([pack(torch.zeros(3))], (0.5,))


def test_a_run_of_an_earlier_version_is_read_and_goes_on(folder: Path, tmp_path: Path) -> None:
    """Its rows were in tables without row identifiers, and no index by position."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_bytes((folder / "run.json").read_bytes())
    with closing(sqlite3.connect(out / "rows.sqlite", isolation_level=None)) as database:
        database.execute("ATTACH ? AS new", (str(folder / "rows.sqlite"),))
        database.execute("CREATE TABLE classes AS SELECT * FROM new.classes")
        for table, row, key in TABLES:
            columns = ", ".join(f"{name} {kind}" for name, kind in columns_of(row).items())
            without = "" if table == "images" else " WITHOUT ROWID"
            database.execute(f"CREATE TABLE {table} ({columns}, PRIMARY KEY ({key})){without}")
            database.execute(f"INSERT INTO {table} SELECT * FROM new.{table}")
        database.execute("DELETE FROM results WHERE position > 6")
    expected = Comparison(folder)
    assert len(Comparison(out).to_dataframe()) == len(expected.to_dataframe()) - 8
    tables = (one.table().drop(columns="ms_per_image") for one in (go_on(out), expected))
    assert next(tables).equals(next(tables))
    run = Comparison(out)
    assert "WITHOUT ROWID" in str(run.select("SELECT sql FROM sqlite_master"))


@pytest.mark.parametrize("others", [False, True])
def test_what_is_asked_of_a_batch_or_an_image_is_found_without_a_look_at_all_rows(
    tmp_path: Path, others: bool
) -> None:
    if others:
        RunStore(tmp_path, CONFIGURATION).close()
        (tmp_path / "rows.sqlite").rename(tmp_path / "rows.1.sqlite")
    store = RunStore(tmp_path, CONFIGURATION)
    store.begin()
    keyed = "SELECT error FROM results WHERE method = 'm' AND attack = 'clean' AND position >= 5"
    pictured = "SELECT error FROM results WHERE position = 5 AND attack = 'clean'"
    for query in (
        f"{keyed} AND position < 9",
        pictured,
        "SELECT error FROM attacked WHERE position = 5",
    ):
        steps = [row["detail"] for row in store.select(f"EXPLAIN QUERY PLAN {query}")]
        assert not any(step in ("SCAN a", "SCAN b", "SCAN results") for step in steps), steps
        assert any("position" in step for step in steps), steps
    store.close()


def test_rows_follow_each_other_without_gaps(tmp_path: Path) -> None:
    store, heat = RunStore(tmp_path, CONFIGURATION), bytes(1200)
    for position in range(400):
        for method in ("a", "b", "c"):
            rows = [ResultRow(position, method, "clean", "name", heat=heat)]
            store.write(rows, attacked=[AttackRow(position, method, "name", picture=heat)])
    store.close()
    rows_bytes = 400 * 3 * 2 * len(heat)
    assert (tmp_path / "rows.sqlite").stat().st_size < 1.2 * rows_bytes
