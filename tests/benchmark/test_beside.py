"""What runs beside the model of a run: reading ahead, metrics in a pool, one writer of the rows."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import data as torch_data

from captum_robust.attacks import FGSM
from captum_robust.benchmark import beside, compare, measure
from captum_robust.benchmark.batches import BatchReader
from captum_robust.benchmark.beside import Pool, Turns, Writer
from captum_robust.benchmark.explained import Work
from captum_robust.benchmark.reading import ahead, read_ahead
from captum_robust.data import DataError, Sample
from captum_robust.models import Classifier
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow
from captum_robust.runs.store import RunStore
from tests.reliability.children import children
from tests.reliability.commands import rows_of

from .conftest import Drawn, centre_heat, make_classifier


class Random(Drawn):
    """Adds noise from each of the global generators."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        drawn = torch.rand(()).item() + random.random() + np.random.rand()  # noqa: NPY002
        return Sample(sample.image * (drawn / 3), sample.label, sample.boxes, sample.id)


class Full(Drawn):
    """Has no room for the fourth image."""

    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            try:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            except OSError as error:
                raise RuntimeError("cannot read") from error
        return super().__getitem__(index)


class Killed(Drawn):
    """Ends its worker at the fourth image."""

    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@dataclass
class Noting(Drawn):
    """Writes down who reads, and takes its time."""

    folder: Path = Path()

    def __getitem__(self, index: int) -> Sample:
        (self.folder / f"{os.getpid()}.pid").touch()
        time.sleep(0.05)
        return super().__getitem__(index)


class OneFile(Drawn):
    """Opens the file with all its images at the first one, and moves in it to each."""

    file: Any = None
    path: ClassVar[Path]

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if self.file is None:
            self.file = self.path.open("rb")
        size = sample.image.numel() * 4
        self.file.seek(index * size)
        time.sleep(0.005)
        pixels = np.frombuffer(self.file.read(size), np.float32).copy()
        return replace(sample, image=torch.from_numpy(pixels).view_as(sample.image))


class Late(Random):
    """The first image is broken, and is not read so far that anything is drawn."""

    def __getitem__(self, index: int) -> Sample:
        if index == 0:
            raise DataError("torn")
        return super().__getitem__(index)


METHODS = ["robust_cam", "grad_cam", "smooth_grad", "center_box"]


def rows_made(data: Any, out: Path, **options: Any) -> dict[str, list[dict[str, Any]]]:
    model = make_classifier()
    options = {"batch_size": 2, "progress": False, **options}
    compare(model, data, METHODS, {"fgsm": FGSM(model, epsilon=8 / 255)}, out=out, **options)
    return rows_of(out)


@pytest.mark.parametrize("data", [Drawn(7, broken=[1, 4]), Random(5)])
def test_workers_change_no_column_of_any_row(data: Drawn, tmp_path: Path) -> None:
    alone = rows_made(data, tmp_path / "alone")
    assert rows_made(data, tmp_path / "workers", workers=2) == alone
    assert len(alone["results"]) == 2 * len(METHODS) * len(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_may_hold_an_open_file(workers: int, model: Classifier, tmp_path: Path) -> None:
    """Neither threads nor forked processes may share its place."""
    images = [Drawn(16)[i].image for i in range(16)]
    OneFile.path = tmp_path / "images"
    OneFile.path.write_bytes(torch.stack(images).numpy().tobytes())
    for data, name in ((OneFile(16), "file"), (Drawn(16), "drawn")):
        options: dict[str, Any] = {"batch_size": 2, "progress": False, "workers": workers}
        compare(model, data, ["center_box"], out=tmp_path / name, **options)
    assert rows_of(tmp_path / "file") == rows_of(tmp_path / "drawn")


def test_a_data_set_draws_the_same_where_its_first_image_is_broken(tmp_path: Path) -> None:
    alone = rows_made(Late(5), tmp_path / "alone", batch_size=1)
    assert rows_made(Late(5), tmp_path / "workers", batch_size=1, workers=1) == alone


def test_a_run_that_goes_on_draws_the_same_images(tmp_path: Path) -> None:
    whole = rows_made(Random(6), tmp_path / "whole")
    out = tmp_path / "again"
    rows_made(Random(6), out)
    store = RunStore(out)
    store._database.execute("DELETE FROM results WHERE position > 1")
    store.close()
    assert rows_made(Random(6), out, workers=1) == whole


def test_the_pool_changes_no_column_of_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_the_model = rows_made(Drawn(6), tmp_path / "beside")
    submit = Pool.submit

    def in_turn(pool: Pool, make: Callable[..., Any], *arguments: Any) -> Any:
        future = submit(pool, make, *arguments)
        future.exception()
        return future

    monkeypatch.setattr(Pool, "submit", in_turn)
    assert rows_made(Drawn(6), tmp_path / "in_turn") == beside_the_model
    for threads in (1, 3):  # as many parts of a batch
        monkeypatch.setattr(beside, "_MOST_THREADS", threads)
        monkeypatch.setattr(beside, "cores", lambda: 4)
        assert rows_made(Drawn(6), tmp_path / f"{threads}") == beside_the_model


def test_a_batch_is_let_go_without_the_garbage_collector(
    model: Classifier, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    monkeypatch.setattr(
        sys.modules["captum_robust.benchmark.compare"], "Work", remembered(Work, alive)
    )
    gc.collect()
    gc.disable()
    try:
        compare(
            model, drawn, ["robust_cam"], {"fgsm": FGSM(model, 0.01)}, batch_size=1, progress=False
        )
        assert len(alive) == len(drawn)
        assert sum(one() is not None for one in alive) <= 1
    finally:
        gc.enable()


def remembered(kind: Callable[..., Any], made: list[weakref.ref[Any]]) -> Callable[..., Any]:
    """Make objects of a kind, and note each of them."""

    def make(*arguments: Any) -> Any:
        made.append(weakref.ref(one := kind(*arguments)))
        return one

    return make


def test_classes_are_read_off_the_first_methods_pass_and_are_the_classifiers(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    passes: list[int] = []
    handle = model.register_forward_hook(lambda _, given, __: passes.append(len(given[0])))
    compare(model, drawn, ["robust_cam"], out=tmp_path / "a", batch_size=3, progress=False)
    handle.remove()
    assert passes.count(3) == 2  # one a batch
    compare(model, drawn, ["center_box"], out=tmp_path / "b", batch_size=3, progress=False)
    facts = [
        [(r["predicted"], r["confidence"]) for r in rows_of(tmp_path / name)["results"]]
        for name in "ab"
    ]
    assert facts[0] == facts[1]


def test_an_error_of_the_machine_in_a_worker_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"the run stopped: .*Too many open files.* rows are kept"):
        rows_made(Full(6), tmp_path, workers=1)
    assert [row["position"] for row in rows_of(tmp_path)["images"]] == [0, 1]


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a worker that reads images was killed.* fewer workers"):
        rows_made(Killed(6), tmp_path, workers=1)


def test_a_data_set_that_cannot_be_sent_is_refused_by_name(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Local(Drawn):
        pass

    loader = torch_data.DataLoader
    spawned = lambda *a, **k: loader(*a, multiprocessing_context="spawn", **k)  # noqa: E731
    monkeypatch.setattr("captum_robust.benchmark.reading.DataLoader", spawned)
    with pytest.raises(ValueError, match=r"workers: the data set Local can't be sent .*workers=0"):
        compare(model, Local(4), ["center_box"], workers=1, progress=False)


@pytest.mark.parametrize("workers", [-1, 1.5])
def test_workers_are_counted(model: Classifier, workers: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="workers: expected"):
        compare(model, Drawn(2), ["center_box"], workers=workers, progress=False)


def noting(folder: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    rows_made(Noting(400, folder=folder), folder / "run", workers=2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_run_and_no_row_is_half(number: int, tmp_path: Path) -> None:
    run = children.Process(target=noting, args=(tmp_path,))
    run.start()
    rows, end = tmp_path / "run" / "rows.sqlite", time.monotonic() + 240
    while not (len(list(tmp_path.glob("*.pid"))) > 2 and rows.exists()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert run.pid is not None
    os.kill(run.pid, number)
    run.join(120)
    assert run.exitcode not in (0, None)
    readers = [int(file.stem) for file in tmp_path.glob("*.pid")]
    while any(map(is_running, readers)):
        assert time.monotonic() < end
        time.sleep(0.05)
    made = rows_of(tmp_path / "run") if rows.exists() else {"images": [], "results": []}
    assert {r["position"] for r in made["results"]} == {r["position"] for r in made["images"]}


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{number}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


def test_the_next_batch_is_read_while_one_is_used(model: Classifier) -> None:
    read_second = threading.Event()

    class Noted(Drawn):
        def __getitem__(self, index: int) -> Sample:
            if index == 2:
                read_second.set()
            return super().__getitem__(index)

    reader = BatchReader(model, Noted(6))
    batches = [range(0, 2), range(2, 4), range(4, 6)]
    with read_ahead(reader.samples, batches, 0) as items:
        assert [item.position for item in next(items)] == [0, 1]
        assert read_second.wait(30)  # before it is asked for
        assert [[item.position for item in batch] for batch in items] == [[2, 3], [4, 5]]


def test_reading_goes_two_ahead_and_no_further() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with ahead(numbers()) as items:
        assert next(items) == 0
        time.sleep(0.3)
        assert len(made) <= 4
    assert len(made) < 100


def test_an_error_of_what_is_read_ahead_comes_at_its_place() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise ValueError("torn")

    with ahead(numbers()) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="torn"):
            next(items)


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError("no room")])
def test_what_was_finished_before_measuring_failed_is_kept(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the machine ends the run with its reason; another one is a row's."""
    columns = measure.map_columns

    def fails(maps: Tensor, batch: Any, boxes: Any) -> Any:
        if any(item.position == 3 for item in batch):
            raise error
        return columns(maps, batch, boxes)

    monkeypatch.setattr(measure, "map_columns", fails)
    model = make_classifier()
    options: dict[str, Any] = {"out": tmp_path, "batch_size": 2, "progress": False}
    methods = {"light": centre_heat}
    if isinstance(error, MemoryError):
        with pytest.raises(OSError, match="the run stopped: no room; its rows are kept"):
            compare(model, Drawn(6), methods, **options)
        # Those of the last batch may have been finished before the error was seen.
        kept = [row["position"] for row in rows_of(tmp_path)["results"]]
        assert kept in ([0, 1], [0, 1, 4, 5])
        return
    compare(model, Drawn(6), methods, **options)
    errors = [row["error"] for row in rows_of(tmp_path)["results"]]
    assert errors == [None, None, None, "ValueError: odd", None, None]


def opened(folder: Path) -> RunStore:
    return RunStore(folder, {"model": "a", "dataset": "b", "settings": "c"})


def result(position: int) -> tuple[list[ResultRow], list[ImageRow], list[AttackRow]]:
    name = f"{position}.png"
    return [ResultRow(position, "m", "clean", name)], [ImageRow(position, name)], []


def test_the_model_does_not_wait_for_the_writer_until_its_queue_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, slow = opened(tmp_path), threading.Event()
    write = RunStore.write

    def slowly(store: RunStore, *rows: Any) -> None:
        assert slow.wait(30)
        write(store, *rows)

    monkeypatch.setattr(RunStore, "write", slowly)
    given = []

    def give() -> None:
        with Writer(store) as writer:
            for position in range(40):
                writer.write(*result(position))
                given.append(position)

    model = threading.Thread(target=give)
    model.start()
    end = time.monotonic() + 30
    while len(given) < beside._WAITING:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(given) <= 2 * beside._WAITING + 1  # what it holds, and what waits
    slow.set()
    model.join()
    (count,) = store.select("SELECT count(*) AS n FROM results")
    assert count["n"] == 40


def test_an_error_of_the_writer_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunStore, "write", full)
    with pytest.raises(OSError, match=r"the run stopped: .*No space left on device"):
        rows_made(Drawn(6), tmp_path)


def test_nothing_measures_while_a_method_is_timed_on_all_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(beside, "cores", torch.get_num_threads)
    turns = Turns(torch.device("cpu"))
    inside: list[bool] = []
    is_timed = threading.Event()

    def work() -> None:
        inside.append(is_timed.is_set())
        time.sleep(0.02)
        inside.append(is_timed.is_set())

    with Pool(turns) as pool:
        futures = []
        for _ in range(5):
            futures.append(pool.submit(work))
            with turns.timed():
                is_timed.set()
                time.sleep(0.02)
                is_timed.clear()
        for future in futures:
            future.result()
    assert inside == [False] * 10


@pytest.mark.parametrize(("device", "spare"), [("cuda", 0), ("cpu", 2)])
def test_where_cores_are_left_metrics_run_beside_what_is_timed(
    device: str, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "cores", lambda: torch.get_num_threads() + spare)
    turns = Turns(torch.device(device))
    with Pool(turns) as pool, turns.timed():
        assert pool.submit(lambda: 3).result(30) == 3


def test_what_is_missing_is_found_by_the_key_and_not_by_a_scan(tmp_path: Path) -> None:
    store = opened(tmp_path)
    plans = []
    store._database.set_trace_callback(plans.append)
    store.of_positions("results", "", 4, 8, [{"method": "m", "attack": "clean"}])
    store.of_positions("attacked", "file", 4, 8, [{"attack": "pgd"}])
    store._database.set_trace_callback(None)
    for sql in plans:
        (plan,) = store._database.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()
        assert plan[-1].startswith("SEARCH")
        assert "position>? AND position<?" in plan[-1]
    assert len(plans) == 2
