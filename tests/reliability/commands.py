"""Runs in processes of their own, to be killed: forked from one that has imported all they need."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import torch

from captum_robust import benchmark, cli
from captum_robust.attacks import FGSM, PGD
from captum_robust.data import LocalizationDataset, load_dataset
from captum_robust.draw import as_rgb, encode_png
from captum_robust.models import Classifier
from tests.benchmark.conftest import Drawn, make_classifier
from tests.reliability.children import children

MODEL = ("--model", f"{__name__}:tiny")
_CLASSES = ("tench", "goldfish", "shark", "ray")
_KEYS = {
    "images": "position",
    "results": "method, attack, position",
    "attacked": "attack, position",
}


def tiny() -> Classifier:
    """The model of all runs."""
    return make_classifier()


def write_images(folder: Path, n: int = 8) -> Path:
    """A folder of ``n`` drawn images by class, and the table of their boxes beside it."""
    table = ["file,x0,y0,x1,y1"]
    for i in range(n):
        sample = Drawn(n)[i]
        name = f"{_CLASSES[i % 4]}/{i}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_png(as_rgb(sample.image)))
        table.append(",".join(map(str, (name, *sample.boxes[0].int().tolist()))))
    folder.with_suffix(".csv").write_text("\n".join(table) + "\n")
    return folder


def opened(images: Path) -> LocalizationDataset:
    """The data set that :func:`write_images` wrote."""
    boxes = images.with_suffix(".csv")
    return load_dataset("folder", images, boxes=boxes, class_names=_CLASSES)


def compared(images: Path, out: Path, **options: Any) -> None:
    """Three methods, one that draws among them, under two attacks."""
    model, data = tiny(), opened(images)
    attacks = {
        "fgsm 16/255": FGSM(model, epsilon=16 / 255),
        "pgd 8/255": PGD(model, epsilon=8 / 255, steps=2, random_start=True),
    }
    methods = ["robust_cam", "smooth_grad", "center_box"]
    options = {"batch_size": 2, "progress": False, **options}
    benchmark.compare(model, data, methods, attacks, out=out, **options)


def attacked(images: Path, out: Path, **options: Any) -> None:
    """The files of all images under two attacks."""
    model, data = tiny(), opened(images)
    attacks = {
        "fgsm 16/255": FGSM(model, epsilon=16 / 255),
        "pgd 32/255": PGD(model, epsilon=32 / 255, steps=2),
    }
    options = {"batch_size": 2, "progress": False, "keep_all": True, **options}
    benchmark.attack_images(model, data, attacks, out, **options)


def command(*arguments: object) -> None:
    """The command of the package."""
    sys.argv = ["captum-robust", *map(str, arguments)]
    cli.main()


def limited(size: int, task: Callable[..., None], *arguments: Any) -> None:
    """A task that no file larger than ``size`` bytes can be written in; Python ignores SIGXFSZ."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    task(*arguments)


@dataclass(frozen=True)
class Running:
    """A run in a process of its own; what it prints is in ``log``."""

    process: BaseProcess
    log: Path

    def end(self, seconds: float = 120) -> int:
        """Wait for its end, and return the exit code."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"it hangs: {self.said()}")
        return self.process.exitcode

    def signalled(self, number: int) -> bool:
        """Send it a signal and wait for its end; whether it ran until then."""
        if self.process.exitcode is not None:
            return False
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return self.end() != 0

    def said(self) -> str:
        """All that it has printed, or the end of it."""
        return self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""


def start(log: Path, task: Callable[..., None], *arguments: Any, **options: Any) -> Running:
    """Start a function of a module; what it prints goes into ``log``."""
    target = (log, task, arguments, options)
    process = children.Process(target=_run, args=target, daemon=True)
    process.start()
    return Running(process, log)


def finish(log: Path, task: Callable[..., None], *arguments: Any, **options: Any) -> float:
    """Run it to its end, which has to be a good one; return the seconds it took."""
    began = time.monotonic()
    running = start(log, task, *arguments, **options)
    code = running.end()
    assert code == 0, f"exit code {code}: {running.said()}"
    return time.monotonic() - began


def kill_often(
    draw: Random, seconds: float, log: Path, task: Callable[..., None], *rest: Any
) -> int:
    """Start it up to three times, end it at any moment of ``seconds``; how often it ran then."""
    kills = 0
    for _ in range(draw.randint(1, 3)):
        running = start(log, task, *rest)
        running.process.join(draw.uniform(0, seconds))
        kills += running.signalled(draw.choice(_SIGNALS))
    return kills


_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def _run(log: Path, task: Callable[..., None], arguments: Any, options: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    torch.set_num_threads(1)
    task(*arguments, **options)


def rows_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of a run by table, in the order of their keys, without the seconds."""
    with sqlite3.connect(run / "rows.sqlite") as database:
        database.row_factory = sqlite3.Row
        rows = {
            table: [dict(row) for row in database.execute(f"SELECT * FROM {table} ORDER BY {key}")]
            for table, key in _KEYS.items()
        }
    database.close()
    for row in rows["results"]:
        del row["seconds"]
    return rows


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in the files of a folder, but for those of SQLite; no part of one may be left."""
    assert not list(folder.rglob("*.part")), "parts of files"
    found = (f for f in folder.rglob("*") if f.is_file())
    files = [f for f in found if not f.name.startswith(("rows.sqlite", "run.json."))]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def check_same(run: Path, whole: Path) -> None:
    """``AssertionError`` unless rows and files are those of an uninterrupted run, and no more."""
    assert rows_of(run) == rows_of(whole), "other rows"
    files, expected = files_of(run), files_of(whole)
    assert files.keys() == expected.keys(), f"other files: {files.keys() ^ expected.keys()}"
    differing = [name for name in files if files[name] != expected[name]]
    assert not differing, f"other contents: {differing}"
