"""Two ranks of ``torchrun``, each with workers that read: the rows of one process without them."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from captum_robust.benchmark import compare
from captum_robust.data import Sample

from .conftest import Drawn, make_classifier
from .test_ranks import rows_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
METHODS = ["smooth_grad", "grad_cam", "center_box"]


@dataclass
class Noting(Drawn):
    """Writes down who reads, and takes its time."""

    folder: Path = Path()
    seconds: ClassVar[float] = 0.0  # no fact of the data set

    def __getitem__(self, index: int) -> Sample:
        (self.folder / f"{os.getpid()}.pid").touch()
        time.sleep(self.seconds)
        return super().__getitem__(index)


def share(folder: str, workers: str, seconds: str) -> None:
    """What each process does; its rows and who read them are in the folder."""
    torch.set_num_threads(1)
    Noting.seconds = float(seconds)
    data = Noting(22, broken=[5], folder=Path(folder))
    options: dict[str, Any] = {"batch_size": 2, "progress": False, "workers": int(workers)}
    compare(make_classifier(), data, METHODS, out=Path(folder) / "run", **options)


def started(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Two ranks with two workers each, in a process group of their own, as of a terminal."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.benchmark.test_ranks_with_workers import share\nshare(*sys.argv[1:])\n"
    )
    command = [*TORCHRUN, str(script), str(folder), "2", str(seconds)]
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def done_in(file: Path) -> int:
    """How many results a file of rows has while its rank writes it."""
    try:
        with sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True) as database:
            (count,) = database.execute("SELECT count(*) FROM results").fetchone()
        database.close()
    except sqlite3.OperationalError:
        return 0
    return int(count)


def is_running(number: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


def readers(folder: Path) -> list[int]:
    return [int(file.stem) for file in folder.glob("*.pid")]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process without workers."""
    folder = tmp_path_factory.mktemp("one")
    share(str(folder), "0", "0")
    return folder


def test_interrupted_ranks_leave_no_worker_and_go_on_to_the_rows_of_one_process(
    one: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    end = time.monotonic() + 240
    process, run = started(cut, seconds=0.5), cut / "run"
    while not all(done_in(run / name) for name in ("rows.sqlite", "rows.1.sqlite")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=100)[1]
    assert process.returncode, said
    assert len(readers(cut)) > 2
    while any(map(is_running, readers(cut))):
        assert time.monotonic() < end
        time.sleep(0.05)
    before, expected = rows_of(cut / "run"), rows_of(one / "run")
    assert 0 < len(before["results"]) < len(expected["results"])
    assert all(row in expected[table] for table, rows in before.items() for row in rows)
    process = started(cut, seconds=0)  # the same command again
    assert process.wait(timeout=200) == 0, process.communicate()[1]
    assert rows_of(cut / "run") == expected


def test_ranks_with_workers_give_the_rows_of_one_process_without(one: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    process = started(two, seconds=0)
    assert process.wait(timeout=200) == 0, process.communicate()[1]
    assert len(readers(two)) == 2 * (1 + 2)  # each rank looks at the first image itself
    assert {path.name for path in (two / "run").glob("rows*")} == {"rows.sqlite", "rows.1.sqlite"}
    assert rows_of(two / "run") == rows_of(one / "run")
