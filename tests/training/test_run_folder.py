"""What a run's folder has to hold for it to go on, and who may write to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from captum_robust._files import sole_user
from captum_robust.training import fit
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
