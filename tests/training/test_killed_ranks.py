"""A training on two processes of which one is killed: torchrun ends, and the next one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from captum_robust.training import TrainingResult, fit
from tests.training.test_loop import Drawing, cross_entropy, settings, small_net

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def train(out: str, pause: str) -> TrainingResult:
    """Run by each process; the network has batch norm and dropout, and its images are drawn."""
    rank = os.environ.get("RANK", "alone")
    Path(out).with_suffix(f".{rank}").write_text(str(os.getpid()))
    torch.set_num_threads(1)

    def slow(*arguments: Any) -> Any:
        time.sleep(float(pause))
        return cross_entropy(*arguments)

    return fit(small_net(), Drawing(), slow, settings(epochs=8, micro_batch_size=1), out=out)


def started(out: Path, pause: float = 0.0) -> subprocess.Popen[str]:
    script = out.parent / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.training.test_killed_ranks import train\ntrain(*sys.argv[1:])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*TORCHRUN, str(script), str(out), str(pause)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def rows(out: Path) -> list[dict[str, Any]]:
    log = out / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def test_a_killed_rank_costs_nothing_but_time(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = started(whole)
    assert undisturbed.wait(timeout=300) == 0
    deadline = time.monotonic() + 300
    process = started(cut, pause=0.05)
    while len(rows(cut)) < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int(cut.with_suffix(".0").read_text()), signal.SIGKILL)  # the one that writes
    said = process.communicate(timeout=100)[1]
    assert process.returncode
    assert "SIGKILL" in said
    assert not Path(f"/proc/{cut.with_suffix('.1').read_text()}").exists()
    assert started(cut).wait(timeout=300) == 0
    assert rows(cut) == rows(whole)
    expected = load_file(whole / "checkpoint.safetensors")
    for name, value in load_file(cut / "checkpoint.safetensors").items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(ValueError, match="processes: 2 there, 1 here"):
        train(str(cut), "0")
