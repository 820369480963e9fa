from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from captum_robust import _files as _weights
from captum_robust.training import TrainingResult, TrainingSettings, fit
from captum_robust.training.acceleration import training_device


def drawn(n: int = 24, classes: int = 3) -> TensorDataset:
    """Images whose brightest channel is their class."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    images = 0.3 * torch.rand(n, 3, 8, 8, generator=g)
    images[torch.arange(n), labels] += 0.5
    return TensorDataset(images, labels)


def small_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(6, 3),
        )


def cross_entropy(network: nn.Module, batch: tuple[Tensor, ...], seed: int) -> Tensor:
    images, labels = batch
    return F.cross_entropy(network(images).float(), labels)


def settings(**changes: Any) -> TrainingSettings:
    given = {"epochs": 4, "batch_size": 4, "learning_rate": 0.1, "checkpoint_every": 0.0}
    return TrainingSettings(**{**given, **changes})


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[n]) for n, x in a.state_dict().items())


class Stop(Exception):
    pass


def stopping_after(steps: int) -> Any:
    """The loss, which raises once it was called so often."""
    calls = 0

    def loss(network: nn.Module, batch: tuple[Tensor, ...], seed: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > steps:
            raise Stop
        return cross_entropy(network, batch, seed)

    return loss


def test_training_lowers_the_loss_and_learns_the_classes() -> None:
    network = small_net()
    result = fit(network, drawn(), cross_entropy, settings(epochs=20))
    losses = [row["loss"] for row in result.rows]
    assert result.steps == len(losses) == 20 * 6
    assert sum(losses[-12:]) < 0.5 * sum(losses[:12])
    images, labels = drawn().tensors
    assert (network.eval()(images).argmax(dim=1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("stops", [(1,), (13,), (3, 17, 2)])
def test_a_stopped_run_ends_with_the_weights_and_the_log_of_a_whole_one(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"norm": float(network[0].weight.detach().norm())}

    whole = small_net()
    expected = fit(
        whole, drawn(), cross_entropy, settings(), out=tmp_path / "whole", evaluate=evaluate
    )
    for stop in stops:
        with pytest.raises(Stop):
            fit(
                small_net(), drawn(), stopping_after(stop), settings(),
                out=tmp_path / "cut", evaluate=evaluate,
            )  # fmt: skip
    # The weights of the network that goes on do not matter.
    resumed = small_net(seed=5)
    result = fit(
        resumed, drawn(), cross_entropy, settings(), out=tmp_path / "cut", evaluate=evaluate
    )
    assert same_weights(whole, resumed)
    assert result.rows == expected.rows
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "cut")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_any_optimiser_goes_on_where_it_was(tmp_path: Path, optimizer: Any) -> None:
    def run(network: nn.Module, loss: Any, out: str | None) -> TrainingResult:
        return fit(
            network, drawn(), loss, settings(),
            optimizer=optimizer(network.parameters(), lr=0.01),
            out=None if out is None else tmp_path / out,
        )  # fmt: skip

    whole, resumed = small_net(), small_net()
    run(whole, cross_entropy, None)
    with pytest.raises(Stop):
        run(small_net(), stopping_after(15), "cut")
    assert run(resumed, cross_entropy, "cut").resumed_from == 10
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("where", ["step", "images", "evaluation"])
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on(tmp_path: Path, where: str) -> None:
    calls = dict.fromkeys(("step", "images", "evaluation"), 0)
    presses = {"step": 8, "images": 16 + 30, "evaluation": 3}  # 16 tell the images from others
    steps = {"step": 8, "images": 7, "evaluation": 8}
    images = drawn()

    def press(place: str) -> None:
        calls[place] += 1
        if calls[place] == presses[where] and place == where:
            signal.raise_signal(signal.SIGINT)

    class Images(Dataset[Any]):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Any:
            press("images")
            return images[index]

    def loss(network: nn.Module, batch: tuple[Tensor, ...], seed: int) -> Tensor:
        press("step")
        return cross_entropy(network, batch, seed)

    def evaluate(network: nn.Module) -> dict[str, float]:
        press("evaluation")
        return {"first": float(next(network.parameters()).detach().sum())}

    rare = settings(checkpoint_every=1e9, evaluate_every=4)

    def train(out: Path, network: nn.Module) -> TrainingResult:
        return fit(network, Images(), loss, rare, evaluate=evaluate, out=out)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", small_net())
    assert signal.getsignal(signal.SIGINT) is handler
    calls = dict.fromkeys(calls, -10_000)  # nobody presses it again
    stopped, whole = small_net(1), small_net()
    went_on = train(tmp_path / "stopped", stopped)
    assert went_on.resumed_from == steps[where]
    result = train(tmp_path / "whole", whole)
    assert went_on.rows == result.rows
    assert [row["step"] for row in result.evaluations] == [0, 4, 8, 12, 16, 20, 24]
    for a, b in zip(stopped.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_how_often_checkpoints_are_written_changes_nothing(tmp_path: Path) -> None:
    often, never = small_net(), small_net()
    fit(often, drawn(), cross_entropy, settings(), out=tmp_path / "a")
    fit(never, drawn(), cross_entropy, settings(checkpoint_every=1e9))
    assert same_weights(often, never)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, again = small_net(), small_net(seed=1)
    expected = fit(first, drawn(), cross_entropy, settings(), out=tmp_path)
    result = fit(again, drawn(), stopping_after(0), settings(), out=tmp_path)
    assert result.resumed_from == result.steps == 24
    assert result.rows == expected.rows
    assert same_weights(first, again)


class Drawing(Dataset[Any]):
    """Adds noise from each of the three global generators."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = drawn()[index]
        noise = torch.rand(3, 8, 8) + random.random() + np.random.random()  # noqa: NPY002
        return image + 0.1 * noise, int(label)


def test_what_the_data_set_draws_depends_on_seed_epoch_and_image_only(tmp_path: Path) -> None:
    whole, resumed = small_net(), small_net()
    fit(whole, Drawing(), cross_entropy, settings())
    with pytest.raises(Stop):
        fit(small_net(), Drawing(), stopping_after(14), settings(), out=tmp_path)
    torch.rand(7)
    fit(resumed, Drawing(), cross_entropy, settings(), out=tmp_path)
    assert same_weights(whole, resumed)
    other = small_net()
    fit(other, Drawing(), cross_entropy, settings(seed=1))
    assert not same_weights(whole, other)


def test_processes_that_load_images_change_nothing() -> None:
    alone, helped = small_net(), small_net()
    fit(alone, Drawing(), cross_entropy, settings(epochs=2))
    fit(helped, Drawing(), cross_entropy, settings(epochs=2, workers=2))
    assert same_weights(alone, helped)


def test_each_epoch_takes_every_image_once_in_another_order() -> None:
    seen: list[list[float]] = []

    def loss(network: nn.Module, batch: tuple[Tensor, ...], seed: int) -> Tensor:
        seen.append(batch[0].mean(dim=(1, 2, 3)).tolist())
        return cross_entropy(network, batch, seed)

    fit(small_net(), drawn(), loss, settings(epochs=2))
    first, second = list(chain(*seen[:6])), list(chain(*seen[6:]))
    expected = drawn().tensors[0].mean(dim=(1, 2, 3)).tolist()
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second


def test_images_that_fill_no_batch_are_other_ones_each_epoch() -> None:
    seen: list[float] = []

    def loss(network: nn.Module, batch: tuple[Tensor, ...], seed: int) -> Tensor:
        seen.extend(batch[0].mean(dim=(1, 2, 3)).tolist())
        return cross_entropy(network, batch, seed)

    result = fit(small_net(), drawn(10), loss, settings(epochs=30))
    assert result.steps == 30 * 2
    assert len(set(seen)) == 10


def test_the_learning_rate_rises_then_falls_along_half_a_cosine() -> None:
    result = fit(small_net(), drawn(), cross_entropy, settings(epochs=5, warmup=1 / 3))
    rates = [row["learning_rate"] for row in result.rows]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == pytest.approx(0.1)
    assert rates[20] == pytest.approx(0.05)  # half of the way
    assert rates[-1] < 0.001


def test_the_caller_keeps_random_state_and_modes() -> None:
    network = small_net().eval()
    network[0].train()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    fit(network, Drawing(), cross_entropy, settings(epochs=1))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert network[0].training
    assert not network[1].training
    assert not network.training
    assert "forward" not in vars(network)


def test_bfloat16_reaches_the_layers_and_leaves_the_weights_in_float32() -> None:
    network = small_net()
    seen: list[torch.dtype] = []
    network[0].register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    fit(network, drawn(), cross_entropy, settings(epochs=1, precision="bfloat16"))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_weights_learn_after_a_pass_without_gradients_in_bfloat16() -> None:
    """Autocast's cache would keep weights that were cast without gradients."""

    def loss(network: nn.Module, batch: tuple[Tensor, ...], seed: int) -> Tensor:
        with torch.no_grad():
            network(batch[0])
        return cross_entropy(network, batch, seed)

    network = small_net()
    before = network[6].weight.detach().clone()
    fit(network, drawn(), loss, settings(epochs=1, precision="bfloat16", weight_decay=0.0))
    assert not torch.equal(before, network[6].weight)


def test_evaluation_sees_a_network_in_evaluation_mode_before_during_and_after() -> None:
    modes: list[bool] = []

    def evaluate(network: nn.Module) -> dict[str, float]:
        modes.append(network.training)
        torch.rand(3)  # its draws change nothing
        return {"accuracy": 1.0}

    looked, alone = small_net(), small_net()
    result = fit(looked, drawn(), cross_entropy, settings(evaluate_every=10), evaluate=evaluate)
    assert modes == [False] * 4
    assert [row["step"] for row in result.evaluations] == [0, 10, 20, 24]
    fit(alone, drawn(), cross_entropy, settings(evaluate_every=10))
    assert same_weights(looked, alone)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"batch_size": 6}, "batch_size: 4 there, 6 here"),
        ({"epochs": 5}, "epochs: 4 there, 5 here"),
        ({"seed": 3}, "seed"),
        ({"learning_rate": 0.2}, "learning_rate"),
        ({"precision": "bfloat16"}, "precision"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    fit(small_net(), drawn(), cross_entropy, settings(), out=tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds another run") as error:
        fit(small_net(), drawn(), cross_entropy, settings(**change), out=tmp_path)
    assert word in str(error.value)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_run_whose_draws_were_others_is_refused(tmp_path: Path) -> None:
    fit(small_net(), drawn(), cross_entropy, settings(), out=tmp_path)
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["configuration"].pop("draws") == "of each image"
    (tmp_path / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"holds another run \(draws: "):
        fit(small_net(), drawn(), cross_entropy, settings(), out=tmp_path)


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"out: expected a folder, got .*file"):
            fit(small_net(), drawn(), cross_entropy, settings(epochs=1), out=out)


def test_other_images_or_another_network_are_another_run(tmp_path: Path) -> None:
    fit(small_net(), drawn(), cross_entropy, settings(epochs=1), out=tmp_path)
    images, labels = drawn().tensors
    other = TensorDataset(images.flip(0), labels)
    with pytest.raises(ValueError, match=r"another run \(data"):
        fit(small_net(), other, cross_entropy, settings(epochs=1), out=tmp_path)
    wider = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ValueError, match=r"another run \(network"):
        fit(wider, drawn(), cross_entropy, settings(epochs=1), out=tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        fit(small_net(), drawn(), stopping_after(13), settings(), out=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_weights.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            fit(small_net(), drawn(), cross_entropy, settings(), out=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))
    whole, resumed = small_net(), small_net()
    fit(whole, drawn(), cross_entropy, settings())
    fit(resumed, drawn(), cross_entropy, settings(), out=tmp_path)
    assert same_weights(whole, resumed)


def test_a_torn_log_and_the_rest_of_a_torn_write_do_no_harm(tmp_path: Path) -> None:
    expected = fit(small_net(), drawn(), cross_entropy, settings()).rows
    with pytest.raises(Stop):
        fit(small_net(), drawn(), stopping_after(13), settings(), out=tmp_path)
    (tmp_path / ".checkpoint.safetensors.part").write_bytes(b"torn")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 11, "ep')
    result = fit(small_net(), drawn(), cross_entropy, settings(), out=tmp_path)
    assert result.rows == expected
    assert [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()] == expected


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    fit(small_net(), drawn(), cross_entropy, settings(epochs=1), out=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is not a safetensors file"):
        fit(small_net(), drawn(), cross_entropy, settings(epochs=1), out=tmp_path)


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss: (nan|inf) in step \d+"):
        fit(small_net(), drawn(), cross_entropy, settings(learning_rate=1e30), out=tmp_path)
    rows = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == []


def test_weights_that_a_finite_loss_broke_are_not_saved(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)

    def loss(network: nn.Module, batch: tuple[Tensor, ...], _: int) -> Tensor:
        # 0, but the slope of the root is infinite there.
        return (0 * network(batch[0])).abs().sqrt().mean()

    dataset = TensorDataset(torch.ones(4, 3))
    chosen = TrainingSettings(epochs=1, batch_size=4, device="cpu")
    with pytest.raises(ValueError, match="weights: NaN or infinity after step 1"):
        fit(network, dataset, loss, chosen, out=tmp_path)
    saved = load_file(tmp_path / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in saved.values())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"workers": -1}, "workers"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"checkpoint_every": float("inf")}, "checkpoint_every"),
        ({"warmup": 1.5}, "warmup"),
        ({"precision": "float16"}, "precision"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        TrainingSettings(**change)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: 25, but there are 24"):
        fit(small_net(), drawn(), cross_entropy, settings(batch_size=25))
    with pytest.raises(TypeError, match="dataset: expected one with a length"):
        fit(small_net(), iter([]), cross_entropy, settings())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected one number"):
        fit(small_net(), drawn(), lambda n, b, s: n(b[0]), settings())
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"out: expected a folder, got .*file, which is none"):
        fit(small_net(), drawn(), cross_entropy, settings(), out=file)


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {root!r})
from tests.training.test_loop import plain_net, settings, small_net, stopping_after, drawn
from captum_robust.training import fit

loss = stopping_after({steps})

def slow(*arguments):
    time.sleep({pause})
    return loss(*arguments)

torch.set_num_threads(1)
fit({network}(), drawn(), slow, settings(epochs=10), out={out!r})
"""


def script(folder: Path, network: str, steps: int = 1000, pause: float = 0.0) -> str:
    """A program that trains in the folder, and fails after so many steps."""
    root = str(Path(__file__).parents[2])
    out = str(folder / "run")
    file = folder / f"{network}_{steps}.py"
    file.write_text(SCRIPT.format(root=root, out=out, network=network, steps=steps, pause=pause))
    return str(file)


@pytest.mark.parametrize(
    ("numbers", "steps", "best"),
    [
        ([9.0, 5.0, 4.0, 6.0, 3.0, 3.0, 8.0, 0.0], 6, 4),  # an equal number is no better one
        ([1.0, 9.0, 8.0, 7.0, 7.5, 7.1, 0.0], 5, 0),  # worse than before, but still improving
        ([1.0, 9.0, 9.0, 9.0, 0.0], 3, 0),
        ([9.0, math.nan, 5.0, math.nan, math.nan, 0.0], 4, 2),
    ],
)
def test_patience_counts_evaluations_of_the_training_alone(
    numbers: list[float], steps: int, best: int, tmp_path: Path
) -> None:
    seen: list[dict[str, Tensor]] = []

    def evaluate(network: nn.Module) -> dict[str, float]:
        seen.append({n: t.clone() for n, t in network.state_dict().items()})
        return {"error": numbers[len(seen) - 1]}

    network = small_net()
    given = settings(epochs=4, evaluate_every=1)
    options: dict[str, Any] = {"best": "error", "patience": 2, "out": tmp_path / "run"}
    result = fit(network, drawn(), cross_entropy, given, evaluate=evaluate, **options)
    assert [row["step"] for row in result.evaluations] == list(range(steps + 1))
    assert all(torch.equal(t, seen[best][n]) for n, t in network.state_dict().items())
    # It has ended, and stays so.
    again = fit(small_net(), drawn(), cross_entropy, given, evaluate=evaluate, **options)
    assert len(again.rows) == len(result.rows)


def test_each_training_of_a_process_has_the_device_that_it_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def device(name: str, there: str) -> str:
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", there)  # what "auto" finds
        return training_device(settings(device=name)).type

    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    assert device("cpu", "cpu") == "cpu"
    for _ in range(2):
        assert device("auto", "meta") == "meta"
        assert device("cpu", "cpu") == "cpu"


def plain_net() -> nn.Sequential:
    """Without batch norm and dropout, so that a batch may be cut in two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)
        )


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, resumed = small_net(), small_net()
    expected = fit(whole, drawn(), cross_entropy, settings(epochs=10))
    log = tmp_path / "run" / "log.jsonl"
    process = subprocess.Popen([sys.executable, script(tmp_path, "small_net", pause=0.02)])
    deadline = time.monotonic() + 200
    while not (log.is_file() and log.read_text().count("\n") >= 11):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = fit(resumed, drawn(), cross_entropy, settings(epochs=10), out=tmp_path / "run")
    assert 0 < result.resumed_from < result.steps
    assert same_weights(whole, resumed)
    assert result.rows == expected.rows


@pytest.mark.usefixtures("one_thread")
def test_two_processes_that_are_stopped_and_go_on_give_the_weights_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone"]
    stopped = [*torchrun, script(tmp_path, "plain_net", steps=33)]
    assert subprocess.run(stopped, env=environment, timeout=300, capture_output=True).returncode
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 31))
    whole = [*torchrun, script(tmp_path, "plain_net")]
    subprocess.run(whole, env=environment, timeout=300, check=True)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["configuration"]["processes"] == 2
    alone = plain_net()
    expected = fit(alone, drawn(), cross_entropy, settings(epochs=10))
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert losses == pytest.approx([row["loss"] for row in expected.rows], rel=1e-3)
    tensors = load_file(tmp_path / "run" / "checkpoint.safetensors")
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(tensors[f"network.{name}"], weight, rtol=1e-3, atol=1e-4)
    # One process can't go on with it: it would draw something else.
    with pytest.raises(ValueError, match="processes: 2 there, 1 here"):
        fit(alone, drawn(), cross_entropy, settings(epochs=10), out=tmp_path / "run")
