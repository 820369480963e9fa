"""Runs that are killed at any moment, several times, and go on to what one run gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from captum_robust.benchmark import AttackRun, Comparison

from .commands import (
    MODEL,
    attacked,
    check_same,
    command,
    compared,
    files_of,
    finish,
    kill_often,
    write_images,
)

TryOften = Callable[..., None]


@dataclass(frozen=True)
class Whole:
    """Runs that nobody interrupted, and how long they take."""

    images: Path
    folder: Path
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Of compare, attack and explain."""
    folder = tmp_path_factory.mktemp("whole")
    images = write_images(folder / "images")
    log = folder / "log"
    finish(log, compared, images, folder / "first")  # starts the server
    seconds = {
        "compare": finish(log, compared, images, folder / "compare"),
        "attack": finish(log, attacked, images, folder / "attack"),
        "explain": finish(log, command, *explained(images, folder / "explain")),
    }
    return Whole(images, folder, seconds)


def explained(images: Path, out: Path) -> list[object]:
    methods = "robust_cam,smooth_grad"
    return ["explain", images, *MODEL, "--methods", methods, "--save-maps", "--out", out]


def killed(whole: Whole, kind: str, seed: int, task: Any, *arguments: Any, log: Path) -> int:
    """Kill a run until a kill has met one, let it end, and return the number of kills."""
    draw, kills = Random(seed), 0
    while not kills:
        kills = kill_often(draw, whole.seconds[kind], log, task, *arguments)
    finish(log, task, *arguments)
    return kills


def test_compare(whole: Whole, tmp_path: Path, try_often: TryOften) -> None:
    def one(seed: int) -> int:
        out = tmp_path / str(seed) / "run"
        kills = killed(whole, "compare", seed, compared, whole.images, out, log=tmp_path / "log")
        check_same(out, whole.folder / "compare")
        json.loads((out / "run.json").read_text())
        result = Comparison(out)
        assert result.failures().empty
        assert "error" in result.to_text()
        if seed % 10 == 0:
            result.to_html(out / "report.html")
        return kills

    try_often("kills of compare", one, quick=3, long=180)


def test_attack(whole: Whole, tmp_path: Path, try_often: TryOften) -> None:
    def one(seed: int) -> int:
        out = tmp_path / str(seed) / "run"
        kills = killed(whole, "attack", seed, attacked, whole.images, out, log=tmp_path / "log")
        check_same(out, whole.folder / "attack")
        assert AttackRun(out).failures() == []
        return kills

    try_often("kills of attack_images", one, quick=2, long=40)


def test_explain(whole: Whole, tmp_path: Path, try_often: TryOften) -> None:
    def one(seed: int) -> int:
        out = tmp_path / str(seed) / "run"
        arguments = explained(whole.images, out)
        kills = killed(whole, "explain", seed, command, *arguments, log=tmp_path / "log")
        assert files_of(out) == files_of(whole.folder / "explain")
        return kills

    try_often("kills of explain", one, quick=1, long=20)
