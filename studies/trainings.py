"""How fast the trainings are on one process and on two, and whether one that is killed goes on.

    python studies/trainings.py throughput
    python studies/trainings.py killed

Each runs the command on noise of the size of photographs, so it needs no data. The processes
exchange gradients by gloo on the CPU, with one thread each.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from harness import listed, study
from safetensors.torch import load_file
from torchvision.utils import save_image

BATCH = 8
PHOTOGRAPHS = ("--model", "efficientnet_lite0", "--batch-size", str(BATCH))
SMALL = ("--method", "madry", "--steps", "7", "--size", "64", "--batch-size", str(BATCH))
TRAININGS = {
    "masking": (*PHOTOGRAPHS, "--weights", "none", "--size", "64", "--warm-up-steps", "0"),
    "localization": ("--pretraining-epochs", "0", "--batch-size", str(BATCH), "--segments", "50"),
    "robust": SMALL,
    "denoiser": (*PHOTOGRAPHS, "--weights", "none", "--size", "64"),
}
"""Training -> the options that keep it small."""
SETTINGS = {
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
}
"""Name -> processes, and threads of each."""
Names = Annotated[tuple[str, ...], listed(TRAININGS), "trainings, separated by commas"]


def throughput(
    *, trainings: Names = tuple(TRAININGS), steps: int = 10, rounds: int = 3, images: int = 16
) -> None:
    """Print images a second of each training, and how they compare with one thread.

    The three settings take turns. The log is written every ten steps: what counts is the time from
    its first rows to its last, so neither the start nor the first steps do.
    """
    epochs = (10 + steps) * BATCH // images
    with tempfile.TemporaryDirectory() as folder:
        photographs = made(Path(folder) / "images", images)
        print(f"\n{'':14}" + "".join(f"{name:>28}" for name in SETTINGS))
        for training in trainings:
            speeds: dict[str, list[float]] = {name: [] for name in SETTINGS}
            for number in range(rounds):
                for name, (processes, threads) in SETTINGS.items():
                    out = Path(folder) / f"{training}-{number}-{processes}-{threads}"
                    command = command_of(training, photographs, out, epochs, processes)
                    seconds = between_rows(command, environment(threads), out / "log.jsonl")
                    speeds[name].append(steps * BATCH / seconds)
            alone = speeds["1 process, 1 thread"]
            cells = []
            for own in speeds.values():
                ratios = [a / b for a, b in zip(own, alone, strict=True)]
                cells.append(f"{statistics.median(own):.1f} ({statistics.median(ratios):.2f} x)")
            print(f"{training:14}" + "".join(f"{cell:>28}" for cell in cells), flush=True)


def between_rows(command: list[str], variables: dict[str, str], log: Path) -> float:
    """Run a training; return the seconds between the first rows of its log and the last."""
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    written: list[tuple[int, float]] = []
    while process.poll() is None:
        size = log.stat().st_size if log.is_file() else 0
        if size and (not written or size > written[-1][0]):
            written.append((size, time.perf_counter()))
        time.sleep(0.01)
    if process.returncode or len(written) < 2:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return written[-1][1] - written[0][1]


def killed(*, trainings: Names = tuple(TRAININGS), epochs: int = 6) -> int:
    """Kill one of two processes in the middle, start again, and compare with an unbroken run."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        photographs = made(Path(folder) / "images", 32)
        for training in trainings:
            outs = [Path(folder) / f"{training}-{name}" for name in ("whole", "cut")]
            commands = [command_of(training, photographs, out, epochs, 2) for out in outs]
            subprocess.run(commands[0], env=environment(1), check=True, capture_output=True)
            process = subprocess.Popen(
                commands[1], env=environment(1), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            while process.poll() is None and not (outs[1] / "checkpoint.safetensors").is_file():
                time.sleep(0.02)
            began = time.monotonic()
            own = [p for p in children(process.pid) if "captum_robust" in name_of(p)]
            os.kill(own[-1], signal.SIGKILL)
            code = process.wait()
            ended = time.monotonic() - began
            left = [p for p in own if "captum_robust" in name_of(p)]
            subprocess.run(commands[1], env=environment(1), check=True, capture_output=True)
            files = [load_file(out / "checkpoint.safetensors") for out in outs]
            is_same = all(torch.equal(t, files[1][n]) for n, t in files[0].items())
            logs = [(out / "log.jsonl").read_text() for out in outs]
            same_log = "too" if logs[0] == logs[1] else "is another"
            steps = json.loads(logs[0].splitlines()[-1])["step"]
            failures += not (is_same and code and not left)
            print(
                f"{training:14}torchrun ended with {code} after {ended:.1f} s, {len(left)} "
                f"processes left; the weights after {steps} steps are "
                f"{'the same' if is_same else 'OTHERS'}, the log {same_log}",
                flush=True,
            )
    return failures


def made(folder: Path, count: int) -> Path:
    """Write images of noise of two classes; return their folder."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        file = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 128, 128, generator=generator), file)
    return folder


def command_of(training: str, images: Path, out: Path, epochs: int, processes: int) -> list[str]:
    """Return the command of a training, under torchrun where there are several processes."""
    common = ["-m", "captum_robust", "train", training, "--images", str(images), "--out", str(out)]
    common += ["--epochs", str(epochs), "--held-out", "0", "--checkpoint-every", "0.5"]
    common += ["--device", "cpu", *TRAININGS[training]]
    if processes == 1:
        return [sys.executable, *common]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, *common]


def environment(threads: int) -> dict[str, str]:
    """Return that of a process with so many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}


def children(process: int) -> list[int]:
    """Return the processes that one has started."""
    listing = Path(f"/proc/{process}/task/{process}/children")
    return [*map(int, listing.read_text().split())]


def name_of(process: int) -> Any:
    """Return the command line of a process; "" where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    study(__doc__, throughput, killed, packages=("accelerate",))
