"""What inspecting a layer costs beside a plain forward pass, and whether its memory grows.

    python studies/inspection.py [--model resnet50 --layer layer3] [--images 200]

The images are drawn, and reading them counts for all. The plain pass is that of the whole network;
the others stop behind the layer. Peak memory is that of a process of its own for each number.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import peak_mib, race, study
from PIL import Image

from captum_robust._contexts import evaluation
from captum_robust.inspection import dissect, maximal_patches
from captum_robust.inspection.streaming import ImageStream
from captum_robust.models import Classifier, load_classifier


def draw(folder: Path, n: int) -> None:
    """Write n images of 500×375 coloured blocks with some noise."""
    folder.mkdir()
    for i in range(n):
        generator = np.random.default_rng(i)
        blocks = generator.integers(0, 200, (6, 8, 3), dtype=np.uint8).repeat(63, 0).repeat(63, 1)
        noise = generator.integers(0, 50, (375, 500, 3), dtype=np.uint8)
        Image.fromarray(blocks[:375, :500] + noise).save(folder / f"{i:05d}.jpg")


def forward(model: Classifier, images: Path) -> None:
    """Run the whole network on all images."""
    with torch.no_grad(), evaluation(model):
        for batch in ImageStream(model, images).batches():
            model.module(batch.inputs)


def contenders(name: str, layer: str, images: Path) -> dict[str, Callable[[], object]]:
    """What is compared, by name, with random weights."""
    model = load_classifier(name, weights=None)
    return {
        "forward": lambda: forward(model, images),
        "maximal_patches": lambda: maximal_patches(model, layer, images),
        "dissect": lambda: dissect(model, layer, images),
    }


def once(what: str, name: str, layer: str, images: str) -> None:
    """Run one of them, in a process of its own."""
    torch.set_num_threads(1)
    contenders(name, layer, Path(images))[what]()


def inspection(
    *, model: str = "resnet50", layer: str = "layer3", images: int = 200, rounds: int = 3
) -> None:
    """Print images a second, and peak memory of n and 4n images."""
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch) / "few", Path(scratch) / "many"
        draw(few, images)
        draw(many, 4 * images)
        print(f"{model}, {layer}, {images} and {4 * images} images")
        print(f"{'':18}{'images/s':>9}{'forward =':>11}{'MiB, n':>9}{'MiB, 4n':>9}")
        laps = race(contenders(model, layer, few), rounds, warm_up=False)
        for name, lap in laps.items():
            peaks = []
            for folder in (few, many):
                call = f"once({name!r}, {model!r}, {layer!r}, {str(folder)!r})"
                code = f"from inspection import once; {call}"
                peaks.append(peak_mib(["-c", code], Path(__file__).parent))
            relative = lap.median / laps["forward"].median
            speed = f"{images / lap.median:9.1f}{relative:10.2f}×"
            print(f"{name:18}{speed}{peaks[0]:9.0f}{peaks[1]:9.0f}", flush=True)


if __name__ == "__main__":
    study(__doc__, inspection, threads=1)
