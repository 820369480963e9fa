"""Every training of the package with a tiny network, as a function that a killed child runs.

Each takes the folder of the run and returns the network, with which the whole run ends.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Subset, TensorDataset
from torchvision.utils import save_image

from captum_robust import _files, cli
from captum_robust.training import (
    CollapseWatch,
    LocalizationEvaluation,
    clean_training,
    fit,
    localization_training,
    masking_training,
)
from captum_robust.training.adversarial import adversarial_training
from captum_robust.training.checkpoints import Log
from tests.training import test_localization as localization
from tests.training import test_masking as masking
from tests.training.test_loop import Drawing, cross_entropy, drawn, settings, small_net

SHORT = {"epochs": 6, "evaluate_every": 8, "device": "cpu"}
IMAGES = drawn()
LAST = "last.safetensors"
HELD_OUT = Subset(IMAGES, range(6))


def score(network: nn.Module) -> dict[str, float]:
    """A number that falls from look to look, as weights grow in training."""
    return {"score": -float(network[0].weight.detach().norm())}


def loop(out: Path) -> nn.Module:
    """The loop itself, with drawn noise, a process that loads images, and best weights."""
    network = small_net()
    chosen = settings(epochs=2, batch_size=2, evaluate_every=5, workers=1)
    fit(network, Drawing(), cross_entropy, chosen, evaluate=score, best="score", out=out)
    return network


def clean(out: Path) -> nn.Module:
    """A classifier on images as they are."""
    network = small_net()
    clean_training(network, IMAGES, settings(**SHORT), held_out=HELD_OUT, out=out)
    return network


def adversarial(out: Path, method: str, **options: Any) -> nn.Module:
    """A classifier on attacked images, or on clean ones in bfloat16."""
    network = small_net()
    precision = "bfloat16" if method == "standard" else "float32"
    chosen = settings(**SHORT, precision=precision)
    adversarial_training(
        network, IMAGES, chosen, method=method, steps=2, held_out=HELD_OUT, out=out, **options
    )
    return network


def masks(out: Path) -> nn.Module:
    """A masking network, with best weights and patience."""
    network = masking.network()
    masking_training(
        network,
        masking.squares(),
        masking.settings(evaluate_every=5, epochs=8),
        warm_up_steps=5,
        validation=masking.squares(6),
        patience=4,
        out=out,
    )
    return network.decoder


def opponents(out: Path) -> nn.Module:
    """A localization network, whose masks collapse on the way."""
    network = localization.networks()
    images, segments, labels, _ = localization.squares()
    few = TensorDataset(images[:6], segments[:6], labels[:6])
    localization_training(
        network,
        localization.data(),
        localization.settings(epochs=8, evaluate_every=10),
        watch=CollapseWatch(0.4, 0.6, steps=10),
        steps_of_classifier=2,
        validation=LocalizationEvaluation(network, few),
        out=out,
    )
    return network


def photographs(folder: Path) -> None:
    """Four of each of three classes, for the commands."""
    generator = torch.Generator().manual_seed(0)
    for c, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            image = 0.4 * torch.rand(3, 36, 36, generator=generator)
            image[2 - c, 8:28, 8:28] = 0.9
            save_image(image, folder / name / f"{i}.png")


def command(out: Path, *options: str) -> None:
    """``captum-robust train``, on the photographs beside the run."""
    shared = ["--images", "photographs", "--out", out.name, "--device", "cpu", "--size", "32"]
    shared += ["--batch-size", "4", "--held-out", ".25", "--checkpoint-every", "0"]
    sys.argv = ["captum-robust", *options, *shared]
    cli.main()


TRAININGS: dict[str, Callable[[Path], nn.Module]] = {
    "loop": loop,
    "clean": clean,
    "masking": masks,
    "localization": opponents,
    "madry": lambda out: adversarial(out, "madry"),
    "ensemble": lambda out: adversarial(out, "ensemble", static_models=[small_net(1)]),
    "standard": lambda out: adversarial(out, "standard"),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "train masking": ("--epochs", "6", "--warm-up-steps", "5", "--model", "small_resnet",
                      "--weights", "none", "--evaluate-every", "3", "--patience", "4"),
    "train localization": ("--epochs", "5", "--pretraining-epochs", "5", "--width", "2",
                           "--segments", "16"),
    "train robust": ("--epochs", "6", "--steps", "2", "--model", "small_resnet"),
}  # fmt: skip


@dataclass(frozen=True)
class Wound:
    """There is room for a share of the n-th write of a file only; it kills, or is an error."""

    file: str
    number: int
    share: float
    kills: bool

    def inflict(self) -> None:
        """Watch all writes of this process."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.kills else signal.SIG_IGN)
        put, add, writes = _files.write_by, Log.add, itertools.count(1)

        def limited_put(path: Path, write: Callable[[Path], object], **options: Any) -> Path:
            if path.name != self.file or next(writes) != self.number:
                return put(path, write, **options)
            write(probe := path.parents[1] / "probe")
            size = probe.stat().st_size
            probe.unlink()
            with room(int(self.share * size)):
                return put(path, write, **options)

        def limited_add(log: Log, rows: Sequence[Any]) -> None:
            if self.file != "log.jsonl" or not rows or next(writes) != self.number:
                return add(log, rows)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            assert log.path is not None
            with room(log.path.stat().st_size + int(self.share * len(text))):
                return add(log, rows)

        _files.write_by, Log.add = limited_put, limited_add  # type: ignore[assignment, method-assign]


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may become larger inside."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def damage(path: Path, how: str, drawn: random.Random, other: Path) -> None:
    """Do to a file what its name says; ``other`` is the same one of another run."""
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    i, j, byte = (drawn.randrange(len(each)) for each in (lines, lines, data))
    if how == "deleted":
        path.unlink()
    elif how == "other run":
        path.write_bytes(other.read_bytes())
    elif how == "cut":
        path.write_bytes(data[:byte])
    elif how == "byte":
        changed = data[byte] ^ drawn.randrange(1, 256)
        path.write_bytes(data[:byte] + bytes([changed]) + data[byte + 1 :])
    elif how == "reordered":
        lines[i], lines[j] = lines[j], lines[i]
        path.write_bytes(b"".join(lines))
    elif how == "doubled":
        path.write_bytes(b"".join([*lines[:i], lines[i], *lines[i:]]))
    elif how == "NaN":
        lines[i] = re.sub(rb": [\d.e-]+}$", b": NaN}", lines[i])
        path.write_bytes(b"".join(lines))
    else:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(load_file(path), path, {**metadata, "step": how.removeprefix("step ")})


def run(name: str, out: Path, wound: Wound | None = None, start: float = 0.0) -> None:
    """What a child does: the training, and its last weights beside the run.

    It starts when the clock of :func:`time.monotonic` says so, and writes what it says to a file.
    """
    os.chdir(out.parent)
    said = os.open(out.parent / f"said-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(said, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of processes that load images
    torch.set_num_threads(1)
    if wound is not None:
        wound.inflict()
    while time.monotonic() < start:
        pass
    if name in COMMANDS:
        command(out, *name.split(), *COMMANDS[name])
    else:
        train(name, out)


def train(name: str, out: Path) -> None:
    """Go on to the end; the weights that the network ends with go beside the run."""
    _files.write_tensors(out.parent / LAST, TRAININGS[name](out).state_dict(), {})
