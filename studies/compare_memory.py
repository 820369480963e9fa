"""Does the memory of ``captum-robust compare`` grow with the number of images?

    python studies/compare_memory.py [KIND PATH]

Runs the command in a process of its own for each number of images and prints the peak resident
memory of each, on drawn images unless a data set is given. The report is written too.
"""

import tempfile
from pathlib import Path

import numpy as np
from harness import peak_mib, study
from PIL import Image


def draw(folder: Path, n: int) -> None:
    """Write n images of 500×375 noise with a bright square, and boxes.csv."""
    folder.mkdir()
    lines = ["file,x0,y0,x1,y1"]
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 90, (375, 500, 3), dtype=np.uint8)
        pixels[100:300, 150:400] = 200
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg")
        lines.append(f"{i:05d}.jpg,150,100,400,300")
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")


def compare_memory(
    kind: str = "folder",
    path: Path | None = None,
    *,
    images: tuple[int, ...] = (50, 200, 800),
    methods: str = "robust_cam,saliency,center_box",
) -> None:
    """Print a table of images and peak memory."""
    print(f"methods {methods}\nimages  peak MiB")
    with tempfile.TemporaryDirectory() as scratch:
        if path is None:
            path = Path(scratch) / "drawn"
            draw(path, max(images))
        for n in images:
            out = Path(scratch) / f"run-{n}"
            command = ["-m", "captum_robust", "compare", kind, str(path), "--limit", str(n)]
            peak = peak_mib([*command, "--out", str(out), "--methods", methods])
            print(f"{n:6d}  {peak:8.0f}", flush=True)


if __name__ == "__main__":
    study(__doc__, compare_memory)
