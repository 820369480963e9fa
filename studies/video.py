"""How fast ``captum-robust video`` is, where the time goes, and whether its memory grows.

    python studies/video.py [--network FILE.safetensors] [--threads 2] [--size 224]

The video pans over the photographs of the sample set. Wall and processor time are printed, per
frame: on a machine with other work the latter says more, and OMP_WAIT_POLICY=passive helps. "all
but the network" is the same command with a network that gives a mask without work. Peak memory is
that of a process of its own for each length, with that network too, on the same video as often as
needed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
from harness import masking_network, peak_mib, race, study
from torch import Tensor

from captum_robust.data import load_dataset
from captum_robust.models import load_classifier
from captum_robust.nn import MaskingNetwork
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
    laps = race({name: work}, 3, warm_up=False)[name]
    wall, cpu = min(zip(laps.wall, laps.cpu, strict=True))
    print(f"{name:36}{wall / n * 1e3:9.2f}{cpu / n * 1e3:12.2f}{n / wall:12.1f}", flush=True)


def annotate(source: str, out: str) -> None:
    """Annotate a video with a network that does no work, in a process of its own."""
    torch.set_num_threads(1)
    annotate_video(source, out, NoWork(), smooth=0.8)


def video(
    *,
    network: Annotated[Path | None, "a .safetensors file, or untrained; else that shipped"] = None,
    frames: int = 100,
    size: Annotated[int, "side of the frames, in pixels"] = 224,
    batch_sizes: tuple[int, ...] = (1, 4, 8),
    lengths: Annotated[tuple[int, ...], "frames of the videos for memory, or none"] = (
        200,
        2000,
        20000,
    ),
) -> None:
    """Print the tables."""
    cv2.setNumThreads(torch.get_num_threads())
    model = load_classifier("efficientnet_lite0")
    if network == Path("untrained"):
        masking = MaskingNetwork(model).eval()
    else:
        masking = masking_network(network, model)
    print(f"EfficientNet-Lite0, {frames} frames of {size}×{size}")
    pictures = panned(frames, size)
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "in.mp4", Path(scratch) / "out.mp4"
        write(source, pictures, frames)
        print(f"{'':36}{'ms wall':>9}{'ms of CPU':>12}{'frames/s':>12}")
        report("decode", lambda: read(source), frames)
        report("encode", lambda: write(out, pictures, frames), frames)
        report("all but the network", lambda: annotate_video(source, out, NoWork()), frames)
        for precision in ("float32", "bfloat16"):
            for n in batch_sizes:
                x = torch.rand(n, 224, 224, 3).permute(0, 3, 1, 2)

                def run(x: Tensor = x, precision: str = precision) -> None:
                    half = precision == "bfloat16"
                    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                        for _ in range(-(-frames // len(x))):
                            masking.masks_and_scores(x)

                def whole(n: int = n, precision: str = precision) -> None:
                    annotate_video(source, out, masking, batch_size=n, precision=precision)

                report(f"network, {precision}, batches of {n}", run, frames)
                report(f"end to end, {precision}, batches of {n}", whole, frames)
        print("frames   peak MiB")
        for length in lengths:
            write(source, pictures, length)
            code = f"from video import annotate; annotate({str(source)!r}, {str(out)!r})"
            peak = peak_mib(["-c", code], Path(__file__).parent)
            print(f"{length:6d}{peak:11.0f}", flush=True)


if __name__ == "__main__":
    study(__doc__, video, threads=2, packages=("opencv-python",))
