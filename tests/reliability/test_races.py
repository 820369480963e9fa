"""Two processes that begin the same run in one folder at the same moment, and readers beside."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from captum_robust.benchmark import Comparison

from .commands import attacked, check_same, compared, finish, start, write_images

TryOften = Callable[..., None]
KINDS = {"compare": compared, "attack": attacked}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and of the runs that were alone."""
    folder = tmp_path_factory.mktemp("whole")
    images = write_images(folder / "images")
    for kind, task in KINDS.items():
        finish(folder / "log", task, images, folder / kind)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_of_one_run(kind: str, whole: Path, tmp_path: Path, try_often: TryOften) -> None:
    """Both work, as the ranks of torchrun do, and one may die: the rows are those of one."""

    def one(seed: int) -> None:
        draw, out = Random(seed), tmp_path / str(seed)
        both = [start(tmp_path / f"log{i}", KINDS[kind], whole / "images", out) for i in range(2)]
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0, 1))
            both[0].signalled(signal.SIGKILL)
            del both[0]
        for running in both:
            assert running.end() == 0, running.said()
        if len(both) == 1:
            finish(tmp_path / "log", KINDS[kind], whole / "images", out)
        check_same(out, whole / kind)

    try_often(f"races of two of {kind}", one, quick=2, long=20)


@pytest.mark.parametrize("kind", KINDS)
def test_two_that_differ(kind: str, whole: Path, tmp_path: Path, try_often: TryOften) -> None:
    """The one that comes second is refused by name, and the first goes on."""

    def one(seed: int) -> None:
        out = tmp_path / str(seed)
        both = [
            start(tmp_path / f"log{i}", KINDS[kind], whole / "images", out, seed=i)
            for i in range(2)
        ]
        codes = [running.end() for running in both]
        assert sorted(code == 0 for code in codes) == [False, True], [b.said() for b in both]
        refused = both[codes.index(0) - 1].said()
        assert "holds another run (settings.seed" in refused, refused

    try_often(f"races of another {kind}", one, quick=2, long=20)


def test_reader_beside_a_writer(whole: Path, tmp_path: Path, try_often: TryOften) -> None:
    def one(seed: int) -> int:
        out: Any = tmp_path / str(seed)
        running, reads = start(tmp_path / "log", compared, whole / "images", out), 0
        while running.process.is_alive():
            if (out / "run.json").exists():
                result = Comparison(out)
                result.summary()
                result.table()
                reads += 1
        assert running.end() == 0, running.said()
        check_same(out, whole / "compare")
        return reads

    try_often("readers beside a writer", one, quick=2, long=20)
