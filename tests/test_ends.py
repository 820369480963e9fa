"""Signals and memory that runs out end each command with a line and an exit code."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from captum_robust.cli.app import _as_ctrl_c
from captum_robust.training import fit
from tests.training.test_loop import cross_entropy, drawn, settings, small_net

Run = Callable[..., tuple[int, str, str]]
CALLED = {
    "compare folder": "captum_robust.benchmark.compare",
    "attack": "captum_robust.benchmark.attack_images",
    "explain": "captum_robust.show.explain.explain_image",
    "demo": "captum_robust.benchmark.demo.compare",
    "demo --all": "captum_robust.benchmark.compare",
    "train masking --images": "captum_robust.training.masking_recipe.MaskingRecipe",
}
"""What each command calls."""
SMALL = ("--model", "small_resnet", "--weights", "none")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no such signals")


def given(command: str, folder: Path) -> tuple[Any, ...]:
    """The options of a command, with one image."""
    image = folder / "images" / "0.png"
    image.parent.mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(image)
    one = image if command == "attack" else image.parent
    return () if command.startswith("demo") else (one, *SMALL)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("command", CALLED)
def test_a_signal_stops_each_command_with_its_exit_code(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, code: int
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.Signals[name])

    monkeypatch.setattr(CALLED[command], stopped)
    before = signal.getsignal(signal.Signals[name])
    got, _, err = run(*command.split(), *given(command, tmp_path))
    assert (got, err) == (code, "captum-robust: stopped; the same command goes on from here\n")
    assert signal.getsignal(signal.Signals[name]) is before


OUT_OF_MEMORY = [
    (MemoryError(), "MemoryError"),
    (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate"), "DefaultCPUAllocator: can't allocate"),
]


@pytest.mark.parametrize(("error", "said"), OUT_OF_MEMORY)
@pytest.mark.parametrize("command", CALLED)
def test_memory_that_runs_out_is_one_line_of_each_command(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    error: Exception,
    said: str,
) -> None:
    def failed(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(CALLED[command], failed)
    got, _, err = run(*command.split(), *given(command, tmp_path))
    assert (got, err) == (2, f"captum-robust: error: {said}\n")


def test_memory_that_runs_out_before_the_first_attack_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("captum_robust.benchmark.reading.SampleReader.__call__", failed)
    got, _, err = run("attack", *given("attack", tmp_path), "--target", "tench")
    assert got == 2
    assert err.startswith("captum-robust: error: the run stopped: MemoryError; its rows are kept.")


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_ends_the_step_of_a_training_also_where_ctrl_c_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: Any
) -> None:
    steps = 0

    def loss(network: nn.Module, batch: tuple[Tensor, ...], seed: int) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 8:
            if ctrl_c is signal.SIG_IGN:
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        return cross_entropy(network, batch, seed)

    rare, out = settings(checkpoint_every=1e9), tmp_path / "run"
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt), _as_ctrl_c():
            fit(small_net(), drawn(), loss, rare, out=out)
        assert signal.getsignal(signal.SIGINT) is ctrl_c
    finally:
        signal.signal(signal.SIGINT, before)
    stopped, whole = small_net(1), small_net()
    assert fit(stopped, drawn(), cross_entropy, rare, out=out).resumed_from == 8
    fit(whole, drawn(), cross_entropy, rare)
    for mine, other in zip(stopped.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
