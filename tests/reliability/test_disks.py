"""Commands whose disk is full at any moment: they say so, keep their rows, and go on with room."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from captum_robust.benchmark import Comparison

from .commands import (
    MODEL,
    command,
    files_of,
    finish,
    limited,
    rows_of,
    start,
    write_images,
)
from .trainings import room

TryOften = Callable[..., None]
_REASONS = ("No space left", "disk is full", "disk I/O error", "File too large")


def arguments(kind: str, images: Path, out: Path) -> list[object]:
    """The words of a command."""
    boxes = ["--boxes", images.with_suffix(".csv")]
    methods = ["--methods", "robust_cam,smooth_grad", "--attack", "fgsm"]
    words = {
        "compare": ["compare", "folder", images, *boxes, *methods],
        "attack": ["attack", images, "--attack", "fgsm", "--all"],
        "explain": ["explain", images, "--methods", "robust_cam", "--save-maps"],
    }
    batches = [] if kind == "explain" else ["--batch-size", 2, "--epsilon", 16]
    return [*words[kind], *batches, *MODEL, "--out", out]


def mounted(*options: object) -> bool:
    """Whether the system mounts what was asked for: it lets the root do so, and not everywhere."""
    try:
        done = subprocess.run(["mount", *map(str, options)], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of that size at the new folder, or False, and the folder is as any other."""
    folder.mkdir()
    is_small = mounted("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder)
    try:
        yield is_small
    finally:
        if is_small:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and of the runs that had room."""
    folder = tmp_path_factory.mktemp("whole")
    images = write_images(folder / "images")
    for kind in ("compare", "attack", "explain"):
        finish(folder / "log", command, *arguments(kind, images, folder / kind))
    return folder


def check_end(said: str, code: int) -> None:
    """``AssertionError`` unless it ended with one line that names the reason."""
    assert code == 2, f"exit code {code}: {said}"
    assert "captum-robust: error: " in said, said
    assert any(reason in said for reason in _REASONS), said
    assert "delete" not in said, said


def good_rows(out: Path) -> set[tuple[Any, ...]]:
    """The rows that hold no error, with the seconds, which no row that is made again has."""
    if not (out / "rows.sqlite").exists():
        return set()
    with sqlite3.connect(out / "rows.sqlite") as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        rows = {
            (table, *row)
            for table in tables & {"results", "attacked"}
            for row in database.execute(f"SELECT * FROM {table} WHERE error IS NULL")
        }
    database.close()
    return rows


def fill(kind: str, whole: Path, folder: Path, seed: int) -> None:
    """Run a command until its disk is full, and with room again: nothing is lost."""
    draw, log, disk = Random(seed), folder / "log", folder / str(seed)
    largest = max(f.stat().st_size for f in (whole / kind).rglob("*") if f.is_file())
    total = sum(f.stat().st_size for f in (whole / kind).rglob("*") if f.is_file())
    out = disk / "run"
    words = arguments(kind, whole / "images", out)
    with small_disk(disk, draw.randint(4, total // 1024)) as is_small:
        if is_small and seed % 2 == 0:
            running = start(log, command, *words)
        else:
            assert not is_small or mounted("-o", "remount,size=40m", disk)
            running = start(log, limited, draw.randint(2000, largest - 1), command, *words)
        code = running.end()
        if code:
            check_end(running.said(), code)
        assert not is_small or mounted("-o", "remount,size=40m", disk)
        before = good_rows(out)
        finish(log, command, *words)
        assert before <= good_rows(out), "rows were made again"
        check_whole(kind, out, whole / kind)


def check_whole(kind: str, out: Path, whole: Path) -> None:
    """``AssertionError`` unless rows and files are those of a run that had room."""
    if kind != "explain":
        assert rows_of(out) == rows_of(whole), "other rows"
    files, expected = files_of(out), files_of(whole)
    assert files.keys() == expected.keys(), f"other files: {files.keys() ^ expected.keys()}"
    if kind != "compare":  # its report holds the seconds
        assert files == expected, "other contents"


@pytest.mark.parametrize("kind", ["compare", "attack", "explain"])
def test_commands(kind: str, whole: Path, tmp_path: Path, try_often: TryOften) -> None:
    def one(seed: int) -> None:
        fill(kind, whole, tmp_path, seed)

    try_often(f"full disks of {kind}", one, quick=2, long=30)


def test_reports(whole: Path, tmp_path: Path, try_often: TryOften) -> None:
    """The old report stays, and nothing lies beside it."""
    run = Comparison(whole / "compare")
    size = run.to_html(tmp_path / "report.html").stat().st_size

    def one(seed: int) -> None:
        draw, folder = Random(seed), tmp_path / str(seed)
        with small_disk(folder, draw.randint(8, size // 1024)) as is_small:
            report = folder / "report.html"
            report.write_text("old")
            limit = size if is_small and seed % 2 == 0 else draw.randint(0, size - 1)
            with room(limit), pytest.raises(OSError, match=r"report\.html.*(No space|too large)"):
                run.to_html(report)
            assert report.read_text() == "old"
            assert [f.name for f in folder.iterdir()] == [report.name]
            if is_small:
                assert mounted("-o", "remount,size=40m", folder)
            assert run.to_html(report).stat().st_size == size

    try_often("full disks of reports", one, quick=2, long=30)
