"""What a run's folder has to hold for it to go on, and who may write to it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from captum_robust import _files
from captum_robust._files import sole_user
from captum_robust.training import fit
from captum_robust.training.recipe import Recipe
from tests.training.test_loop import (
    Stop,
    cross_entropy,
    drawn,
    settings,
    small_net,
    stopping_after,
)


def score(network: nn.Module) -> dict[str, float]:
    return {"score": float(network[0].weight.detach().norm())}


def go(out: Path, stop: int | None = None) -> None:
    loss = cross_entropy if stop is None else stopping_after(stop)
    fit(small_net(), drawn(), loss, settings(), evaluate=score, best="score", out=out)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    with pytest.raises(Stop):
        go(tmp_path / "run", 15)
    return tmp_path / "run"


def rewrite(path: Path, **changes: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, **changes})


@pytest.mark.parametrize("how", ["emptied", "reordered", "NaN"])
def test_a_log_of_other_rows_is_refused(stopped: Path, how: str) -> None:
    log = stopped / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    torn = lines[3].partition('"loss": ')
    log.write_text(
        {
            "emptied": "",
            "reordered": "".join([lines[1], lines[0], *lines[2:]]),
            "NaN": "".join([*lines[:3], torn[0] + torn[1] + "NaN}\n", *lines[4:]]),
        }[how]
    )
    before = log.read_text()
    with pytest.raises(ValueError, match=r"log\.jsonl is not the log that checkpoint"):
        go(stopped)
    assert log.read_text() == before


def test_best_weights_that_are_not_those_of_the_run_are_refused(
    stopped: Path, tmp_path: Path
) -> None:
    best = stopped / "best.safetensors"
    own = best.read_bytes()
    go(tmp_path / "other")
    best.write_bytes((tmp_path / "other" / best.name).read_bytes())
    with pytest.raises(ValueError, match=r"best\.safetensors is of another run"):
        go(stopped)
    best.write_bytes(own[:-8])
    with pytest.raises(ValueError, match=r"best\.safetensors is not a safetensors file"):
        go(stopped)
    best.unlink()
    with pytest.raises(FileNotFoundError, match=r"best\.safetensors: no such file"):
        go(stopped)
    best.write_bytes(own)
    go(stopped)


@pytest.mark.parametrize("step", ["999999", "-5", "1.5", "true"])
def test_a_step_that_the_run_does_not_have_is_refused(stopped: Path, step: str) -> None:
    rewrite(stopped / "checkpoint.safetensors", step=step)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: step: expected 0 to 24, got"):
        go(stopped)


def test_a_checkpoint_of_another_run_is_refused(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        go(tmp_path / "other", 15)
    other = tmp_path / "other" / "checkpoint.safetensors"
    (stopped / other.name).write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is of another run"):
        go(stopped)


@pytest.mark.parametrize("name", ["checkpoint", "best"])
def test_weights_with_a_changed_byte_are_refused(stopped: Path, name: str) -> None:
    """safetensors has no checksum: the last byte is one of a number."""
    file = stopped / f"{name}.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged"):
        go(stopped)


def test_a_row_that_is_there_twice_is_dropped(tmp_path: Path) -> None:
    go(tmp_path)
    log = tmp_path / "log.jsonl"
    before = log.read_text()
    log.write_text(before + before.splitlines(keepends=True)[-1])
    go(tmp_path)
    assert log.read_text() == before


@pytest.mark.parametrize("name", ["run.json", "checkpoint.safetensors"])
def test_a_folder_without_a_file_that_was_there_is_refused(stopped: Path, name: str) -> None:
    (stopped / name).unlink()
    before = {file.name: file.read_bytes() for file in stopped.iterdir()}
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file, but log\.jsonl"):
        go(stopped)
    assert {file.name: file.read_bytes() for file in stopped.iterdir()} == before


def test_what_a_killed_run_was_writing_is_removed(stopped: Path) -> None:
    torn = stopped / ".0123456789abcdef.part"
    torn.mkdir()
    (torn / "part").write_text("torn")
    go(stopped)
    assert not torn.exists()


def looking(out: Path, stop: int = 99, pressed: int | None = None) -> list[int]:
    """Train with a score that falls; Ctrl-C at one look at it; return the steps of all looks."""
    looks: list[int] = []

    def fewest(network: nn.Module) -> dict[str, float]:
        looks.append(int(network[1].num_batches_tracked))
        if looks[-1] == pressed:
            signal.raise_signal(signal.SIGINT)
        return {"score": -looks[-1]}

    loss = stopping_after(stop)
    fit(small_net(), drawn(), loss, settings(), evaluate=fewest, best="score", out=out)
    return looks


def test_the_best_weights_of_a_look_that_was_stopped_are_found_again(tmp_path: Path) -> None:
    """Ctrl-C leaves a checkpoint without the row of the look, which is made when it goes on."""
    with pytest.raises(KeyboardInterrupt):
        looking(tmp_path, pressed=12)
    checkpoint = tmp_path / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    with pytest.raises(Stop):
        looking(tmp_path, stop=1)
    checkpoint.write_bytes(before)  # as if it had been killed before the next one
    assert looking(tmp_path) == [12, 18, 24]
    steps = [json.loads(row)["step"] for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted([*range(1, 25), 0, 6, 12, 18, 24])


def test_a_last_look_that_was_stopped_is_made_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        looking(tmp_path, pressed=24)
    assert [looking(tmp_path), looking(tmp_path)] == [[24], []]


def test_of_two_threads_one_gets_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    class Slow(set[Path]):
        """One that answers when the other thread has asked too, or does not for a while."""

        def __contains__(self, place: object) -> bool:
            answer = super().__contains__(place)
            with suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            return answer

    ended, got = threading.Barrier(2), []

    def enter(_: int) -> None:
        with suppress(ValueError), sole_user(tmp_path):
            got.append(1)
            with suppress(threading.BrokenBarrierError):
                ended.wait(1.0)

    monkeypatch.setattr(_files, "_used", Slow())
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(enter, range(2)))
    assert got == [1]


def test_a_folder_has_one_training_at_a_time(tmp_path: Path) -> None:
    with sole_user(tmp_path), pytest.raises(ValueError, match="is used by another run now"):
        go(tmp_path)
    program = (
        "import sys; from pathlib import Path; from captum_robust._files import sole_user\n"
        "with sole_user(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == b"in\n"
    with pytest.raises(ValueError, match="is used by another run now"):
        go(tmp_path)
    child.kill()  # a killed one leaves no lock
    child.communicate()
    go(tmp_path)


def test_the_network_of_a_recipe_is_written_while_nobody_else_has_its_folder(
    tmp_path: Path,
) -> None:
    """The next one to have it removes what is half written there."""
    saved = []

    def save(result: object) -> None:
        with pytest.raises(ValueError, match="is used by another run now"), sole_user(tmp_path):
            pass
        saved.append(result)

    settings = SimpleNamespace(out=tmp_path)
    recipe: Any = SimpleNamespace(_fit=lambda: "result", _save=save, settings=settings)
    assert Recipe.train(recipe) == "result"
    assert saved == ["result"]
