"""How fast ``captum-robust video`` is, where the time goes, and whether its memory grows.

    python studies/video.py [--network FILE.safetensors] [--threads 2] [--size 224]

The video pans over the photographs of the sample set. Wall and processor time are printed, per
frame: on a machine with other work the latter says more, and OMP_WAIT_POLICY=passive helps. "all
but the network" is the same command with a network that gives a mask without work. Peak memory is
that of a process of its own for each length, with that network too, on the same video as often as
needed.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from captum_robust.data import load_dataset
from captum_robust.models import load_classifier
from captum_robust.nn import MaskingNetwork, load_masking_network
from captum_robust.show.video import annotate_video

RATE = 25


class NoWork:
    """A mask from left to right, and always the same scores."""

    def __init__(self, side: int = 224) -> None:
        self.input_size = (side, side)
        self.mask = torch.linspace(0, 1, side).expand(1, 1, side, side)
        self.scores = torch.arange(1000) / 1000

    def masks_and_scores(self, x: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As a masking network's."""
        return self.mask.expand(len(x), -1, -1, -1), self.scores.expand(len(x), -1)


def panned(n: int, size: int) -> list[np.ndarray]:
    """n frames that pan and zoom over the sample photographs."""
    photographs = load_dataset("samples")
    frames = []
    for i in range(n):
        place = i * len(photographs) / n
        image = photographs[int(place)].image.permute(1, 2, 0).numpy()[:, :, ::-1]
        done = place % 1
        height, width = (round(side * (0.95 - 0.25 * done)) for side in image.shape[:2])
        y = round((image.shape[0] - height) / 2)
        x = round((image.shape[1] - width) * done)
        part = np.ascontiguousarray(image[y : y + height, x : x + width] * 255).astype(np.uint8)
        frames.append(cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA))
    return frames


def write(path: Path, frames: list[np.ndarray], n: int) -> None:
    """The first n frames, from the start again where there are fewer."""
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), RATE, size)
    for i in range(n):
        writer.write(frames[i % len(frames)])
    writer.release()


def read(path: Path) -> None:
    """Decode all frames."""
    capture = cv2.VideoCapture(str(path))
    while capture.read()[0]:
        pass


def report(name: str, work: Callable[[], object], n: int) -> None:
    """Print milliseconds a frame; the best of three runs by wall time."""
    seen = []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        seen.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = min(seen)
    print(f"{name:36}{wall / n * 1e3:9.2f}{cpu / n * 1e3:12.2f}{n / wall:12.1f}", flush=True)


def peak_mib(path: Path, out: Path) -> float:
    """Peak resident memory of annotating the video in a process of its own, in MiB."""
    command = [sys.executable, __file__, "--annotate", str(path), str(out)]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("the process for memory failed")
    return usage.ru_maxrss / 1024


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", help="a .safetensors file, or untrained; else that shipped")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--size", type=int, default=224, help="side of the frames, in pixels")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--lengths", type=int, nargs="*", default=[200, 2000, 20000])
    parser.add_argument("--annotate", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.annotate else options.threads)
    cv2.setNumThreads(options.threads)
    if options.annotate:
        annotate_video(options.annotate[0], options.annotate[1], NoWork(), smooth=0.8)
        return
    if options.network is None:
        from captum_robust.attr import RealTimeMasking

        network = RealTimeMasking.from_pretrained("efficientnet_lite0").network.eval()
    elif options.network == "untrained":
        network = MaskingNetwork(load_classifier("efficientnet_lite0")).eval()
    else:
        network = load_masking_network(options.network, load_classifier("efficientnet_lite0"))
    print(
        f"torch {torch.__version__}, OpenCV {cv2.__version__}, {platform.machine()}, "
        f"{options.threads} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"{datetime.date.today()}; EfficientNet-Lite0, {options.frames} frames of "
        f"{options.size}×{options.size}"
    )
    frames = panned(options.frames, options.size)
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "in.mp4", Path(scratch) / "out.mp4"
        write(source, frames, options.frames)
        print(f"{'':36}{'ms wall':>9}{'ms of CPU':>12}{'frames/s':>12}")
        report("decode", lambda: read(source), options.frames)
        report("encode", lambda: write(out, frames, options.frames), options.frames)
        report("all but the network", lambda: annotate_video(source, out, NoWork()), options.frames)
        for precision in ("float32", "bfloat16"):
            for n in options.batch_sizes:
                x = torch.rand(n, 224, 224, 3).permute(0, 3, 1, 2)

                def run(x: Tensor = x, precision: str = precision) -> None:
                    half = precision == "bfloat16"
                    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                        for _ in range(-(-options.frames // len(x))):
                            network.masks_and_scores(x)

                report(f"network, {precision}, batches of {n}", run, options.frames)

                def whole(n: int = n, precision: str = precision) -> None:
                    annotate_video(source, out, network, batch_size=n, precision=precision)

                report(f"end to end, {precision}, batches of {n}", whole, options.frames)
        if options.lengths:
            print("frames   peak MiB")
        for length in options.lengths:
            write(source, frames, length)
            print(f"{length:6d}{peak_mib(source, out):11.0f}", flush=True)


if __name__ == "__main__":
    main()
