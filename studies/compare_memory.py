"""Does the memory of ``captum-robust compare`` grow with the number of images?

    python studies/compare_memory.py [KIND PATH]

Runs the command in a process of its own for each number of images and prints the peak resident
memory of each, on drawn images unless a data set is given. The report is written too.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def draw(folder: Path, n: int) -> None:
    """Write n images of 500×375 noise with a bright square, and boxes.csv."""
    lines = ["file,x0,y0,x1,y1"]
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 90, (375, 500, 3), dtype=np.uint8)
        pixels[100:300, 150:400] = 200
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg")
        lines.append(f"{i:05d}.jpg,150,100,400,300")
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")


def peak_mib(arguments: list[str]) -> float:
    """Peak resident memory of one process in MiB."""
    command = [sys.executable, "-m", "captum_robust", "compare", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            sys.exit(said.read())
    return usage.ru_maxrss / 1024


def main() -> None:
    """Print a table of images and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", nargs="?", default="folder")
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--methods", default="robust_cam,saliency,center_box")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{datetime.date.today()}; methods {options.methods}"
    )
    print("images  peak MiB")
    with tempfile.TemporaryDirectory() as scratch:
        path = options.path
        if path is None:
            path = Path(scratch) / "drawn"
            path.mkdir()
            draw(path, max(options.images))
        for n in options.images:
            out = Path(scratch) / f"run-{n}"
            arguments = [options.kind, str(path), "--limit", str(n), "--out", str(out)]
            print(f"{n:6d}  {peak_mib([*arguments, '--methods', options.methods]):8.0f}")


if __name__ == "__main__":
    main()
