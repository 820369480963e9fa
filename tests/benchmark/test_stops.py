"""Errors of the machine, and images that are away: a run stops, says why, and goes on later."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from captum_robust.attacks import FGSM
from captum_robust.benchmark import Comparison, attack_images, compare, measure
from captum_robust.benchmark.batches import Batch
from captum_robust.benchmark.reading import Loaded, SampleReader
from captum_robust.data import DataError, Sample, load_dataset
from captum_robust.draw import as_rgb, encode_png
from captum_robust.models import Classifier
from captum_robust.runs.rows import ResultRow
from captum_robust.runs.store import RunStore, pack, unpack

from .conftest import Drawn, centre_heat, make_classifier

METHODS = {"light": centre_heat}


class Failing(Drawn):
    """Positions from ``first`` on raise ``error``, while there is one."""

    error: ClassVar[Exception | None] = None  # no fact of the data set
    first: ClassVar[int] = 2

    def __getitem__(self, index: int) -> Sample:
        if self.error is not None and index >= self.first:
            raise self.error
        return super().__getitem__(index)


def run(model: Classifier, data: Any, out: Path, kind: str, **options: Any) -> list[str | None]:
    """Compare or attack, and the error of each row."""
    options = {"batch_size": 2, "progress": False, **options}
    if kind == "compare":
        compare(model, data, METHODS, out=out, **options)
    else:
        attack_images(model, data, {"fgsm": FGSM(model, epsilon=1 / 255)}, out, **options)
    return errors(out, kind)


def errors(out: Path, kind: str) -> list[str | None]:
    table = "results" if kind == "compare" else "attacked"
    rows = RunStore(out).select(f"SELECT error FROM {table} ORDER BY position")
    return [row["error"] for row in rows]


def opened(folder: Path) -> RunStore:
    return RunStore(folder, {"model": "a", "dataset": "b", "settings": "c"})


@pytest.mark.parametrize(
    ("why", "free", "message"),
    [
        (
            "disk I/O error",
            0,
            r"cannot be used now \(disk I/O error; the disk is full\)",
        ),
        ("disk I/O error", 2**30, r"cannot be used now \(disk I/O error\); .* kept"),
        (
            "database or disk is full",
            2**30,
            r"cannot be used now \(database or disk is full\)",
        ),
        ("database is locked", 2**30, "cannot be used now"),
        ("attempt to write a readonly database", 2**30, "cannot be used now"),
    ],
)
def test_rows_that_cannot_be_opened_now_are_not_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, free: int, message: str
) -> None:
    opened(tmp_path).close()

    def fails(_: RunStore) -> None:
        raise sqlite3.OperationalError(why)

    monkeypatch.setattr(RunStore, "_add_columns", fails)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OSError, match=message) as caught:
        opened(tmp_path)
    assert "delete" not in str(caught.value)


def test_only_of_what_is_no_database_is_it_said_to_delete_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.sqlite"
    for name in ("none", "torn", "other"):
        opened(tmp_path / name).close()
    (tmp_path / "none" / file.name).write_bytes(b"no database" * 100)
    whole = (tmp_path / "torn" / file.name).read_bytes()
    (tmp_path / "torn" / file.name).write_bytes(whole[:4096] + b"torn" * (len(whole) // 4 - 1024))
    other = tmp_path / "other" / file.name
    other.unlink()
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE results (song TEXT)")
        database.execute("INSERT INTO results VALUES ('la')")
    database.close()
    for name, message in (("none", "; delete it"), ("torn", "damaged"), ("other", "damaged, or")):
        with pytest.raises(ValueError, match=message) as caught:
            opened(tmp_path / name)
        assert ("delete" in str(caught.value)) == (name == "none")


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write([ResultRow(0, "cam", "clean", "a.png")])
    store._database.execute("UPDATE results SET image = CAST(x'61ff62' AS TEXT)")
    with pytest.raises(ValueError, match=r"rows\.sqlite: damaged, .* \(Could not"):
        list(store.select("SELECT image FROM results"))
    packed = pack(torch.arange(100.0))
    assert unpack(packed).tolist() == list(range(100))
    for torn in (packed[:-1], b"none", packed[:20] + b"x" + packed[21:], None):
        with pytest.raises(ValueError, match=r"rows\.sqlite: damaged"):
            unpack(torn)


@pytest.mark.parametrize(
    "odd", ["confidence = 1e9", "error = x'00'", "method = 'a', pointing = -1"]
)
def test_rows_of_odd_values_are_not_reported(tmp_path: Path, odd: str) -> None:
    compare(make_classifier(), Drawn(n=2), ["center_box"], out=tmp_path, progress=False)
    with sqlite3.connect(tmp_path / "rows.sqlite") as database:
        database.execute(f"UPDATE results SET {odd} WHERE position = 1")
    database.close()
    with pytest.raises(ValueError, match=r"rows\.sqlite: damaged, .* \(a value in its results\)"):
        Comparison(tmp_path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *(("methods", []), ("attacks", {"fgsm": None}), ("settings", {"batch_size": "2"})),
        *(("dataset", {"kind": "x", "samples": None}), ("model", None), ("adaptive", {"a": {}})),
    ],
)
def test_a_description_with_an_odd_part_is_named(tmp_path: Path, part: str, value: Any) -> None:
    compare(make_classifier(), Drawn(n=2), ["center_box"], out=tmp_path, progress=False)
    described = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(described | {part: value}))
    with pytest.raises(ValueError, match=rf"run\.json holds no description .* \({part}: expected"):
        Comparison(tmp_path)


def test_a_disk_that_is_full_at_the_start_is_named_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        opened(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_run_json_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, name=name, real=real: (calls.append(name), real(*given))[1]
        )
    opened(tmp_path).close()
    assert calls[:3] == ["fsync", "link", "fsync"]
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("rows")] == ["run.json"]


def test_rows_without_run_json_are_refused_and_what_a_kill_left_is_not(tmp_path: Path) -> None:
    opened(tmp_path).close()
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds rows without run\.json, which says what of"):
        opened(tmp_path)
    assert not (tmp_path / "run.json").exists()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".0123456789abcdef.part").write_text("{")
    opened(tmp_path / "killed").close()


KINDS = pytest.mark.parametrize("kind", ["compare", "attack"])


@KINDS
def test_rows_with_errors_are_made_again_unless_they_are_to_be_kept(
    model: Classifier, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Failing(n=3)
    monkeypatch.setattr(Failing, "error", DataError("torn"))
    good, torn = [None, None, None], [None, None, "torn"]
    assert run(model, data, tmp_path / "r", kind) == torn
    monkeypatch.setattr(Failing, "error", None)
    assert run(model, data, tmp_path / "r", kind, retry=False) == torn
    assert run(model, data, tmp_path / "r", kind) == good
    monkeypatch.setattr(Failing, "error", DataError("torn"))
    assert run(model, data, tmp_path / "r", kind) == good


def test_the_row_of_an_attack_that_failed_alone_is_made_again(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, calls = measure.attack_columns, []

    def failing(batch: Batch) -> Any:
        if any(item.position == 1 for item in batch):
            raise ValueError("for a while")
        return measured(batch)

    def attack(images: Tensor, _: Tensor) -> Tensor:
        calls.append(len(images))
        return 1 - images

    def rows(retry: bool = True) -> list[str | None]:
        compare(
            *(model, Drawn(n=4), METHODS, {"mirror": attack}),
            **{"out": tmp_path, "batch_size": 2, "retry": retry, "progress": False},
        )
        assert errors(tmp_path, "compare") == [None] * 8
        return errors(tmp_path, "attack")

    monkeypatch.setattr(measure, "attack_columns", failing)
    failed = [None, "ValueError: for a while", None, None]
    assert rows() == failed
    monkeypatch.setattr(measure, "attack_columns", measured)
    assert rows(retry=False) == failed
    assert calls == [2, 2]
    assert rows() == rows() == [None] * 4
    assert calls == [2, 2, 2]  # the batch of the failed one, once


def test_a_batch_is_not_made_again_for_an_image_that_still_cannot_be_read(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(images: Tensor, _: Tensor) -> Tensor:
        calls.append(len(images))
        return images.mean(dim=1)

    data = Failing(n=3)
    monkeypatch.setattr(Failing, "error", DataError("torn"))
    for _ in range(3):
        compare(model, data, {"counted": counted}, out=tmp_path / "r", progress=False)
    assert calls == [2]


@KINDS
@pytest.mark.parametrize(
    "error", [*(OSError(n, os.strerror(n)) for n in (errno.ENOSPC, errno.EFBIG)), MemoryError()]
)
def test_an_error_of_the_machine_stops_the_run_and_is_no_row(
    model: Classifier, tmp_path: Path, kind: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Failing(n=6)
    monkeypatch.setattr(Failing, "error", error)
    with pytest.raises(OSError, match=r"the run stopped: .*(No space|too large|MemoryError).*kept"):
        run(model, data, tmp_path / "r", kind)
    assert errors(tmp_path / "r", kind) == [None, None]
    monkeypatch.setattr(Failing, "error", None)
    assert run(model, data, tmp_path / "r", kind) == [None] * 6


@KINDS
def test_a_run_stops_where_the_images_cannot_be_opened(
    model: Classifier, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Failing(n=12)
    monkeypatch.setattr(
        Failing, "error", FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    )
    with pytest.raises(OSError, match="the last 4 images could not be opened"):
        run(model, data, tmp_path / "r", kind)
    monkeypatch.setattr(Failing, "error", None)
    assert run(model, data, tmp_path / "r", kind) == [None] * 12
    monkeypatch.setattr(
        Failing, "error", FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    )
    kept = run(model, data, tmp_path / "kept", kind, retry=False)
    assert [error is None for error in kept] == [True] * 2 + [False] * 10


@KINDS
def test_a_run_stops_where_the_folder_of_the_images_is_gone(
    model: Classifier, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    for i in range(4):
        (folder / "tench").mkdir(parents=True, exist_ok=True)
        image = encode_png(as_rgb(Drawn()[i].image))
        (folder / "tench" / f"{i}.png").write_bytes(image)
    data = load_dataset("folder", folder)
    read, one_at_a_time = SampleReader.__call__, threading.Lock()

    def gone(reader: SampleReader, position: int) -> Loaded:
        with one_at_a_time:
            if position >= 2 and folder.exists():
                folder.rename(tmp_path / "elsewhere")
            return read(reader, position)

    monkeypatch.setattr(SampleReader, "__call__", gone)
    with pytest.raises(OSError, match=r"images is no longer there\. The rows are kept"):
        run(model, data, tmp_path / "r", kind)
    assert errors(tmp_path / "r", kind) == [None, None]


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_batch_that_does_not_fit_is_halved_once(
    model: Classifier, tmp_path: Path, error: type[Exception]
) -> None:
    calls = []

    def hungry(most: int, images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(images) > most:
            raise error("out of memory")
        return images.mean(dim=1)

    for most, expected in ((2, [4, 2, 2]), (1, [4, 2])):
        calls.clear()
        methods = {"hungry": lambda x, _, most=most: hungry(most, x)}
        options: dict[str, Any] = {"batch_size": 4, "progress": False}
        out = tmp_path / str(most)
        if most == 2:
            result = compare(model, Drawn(n=4), methods, out=out, **options)
            assert result.failures().empty
        else:
            with pytest.raises(OSError, match="the run stopped: out of memory"):
                compare(model, Drawn(n=4), methods, out=out, **options)
            assert Comparison(out).summary().startswith("0 images")
        assert calls == expected
