"""Images that cannot be read for a while: their errors take the place of no row, nor stay."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from captum_robust.data import dataset

from .commands import attacked, check_same, compared, finish, kill_often, start, write_images

TryOften = Callable[..., None]
TASKS = {"compare": compared, "attack": attacked}


def without(lost: str, task: Callable[..., None], images: Path, out: Path) -> None:
    """The run, where one image cannot be read."""
    load = dataset.load_oriented

    def failing(file: Any, *, name: str) -> Any:
        if Path(name).name == lost:
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        return load(file, name=name)

    dataset.load_oriented = failing
    task(images, out)


@pytest.mark.parametrize("kind", TASKS)
def test_images_that_come_back(kind: str, tmp_path: Path, try_often: TryOften) -> None:
    task, log = TASKS[kind], tmp_path / "log"
    images = write_images(tmp_path / "images")
    finish(log, task, images, tmp_path / "first")  # starts the server
    seconds = finish(log, task, images, tmp_path / "whole")

    def one(seed: int) -> None:
        draw, out = Random(seed), tmp_path / f"run-{seed}"
        if draw.random() < 0.7:
            kill_often(draw, seconds, log, task, images, out)
        if draw.random() < 0.5:
            start(log, without, f"{draw.randrange(8)}.png", task, images, out).end()
        else:
            running = start(log, task, images, out)
            running.process.join(draw.uniform(0, seconds))
            images.rename(away := tmp_path / "away")
            running.end()
            away.rename(images)
        finish(log, task, images, out)
        check_same(out, tmp_path / "whole")

    try_often(f"images away and back: {kind}", one, quick=1, long=30)
