"""All numbers of a GPU in one go, for whoever has one.

    python studies/gpu.py IMAGENET                    # some 20 minutes
    python studies/gpu.py IMAGENET --device cpu --quick   # does it run? measures no GPU

Runs the studies of RobustCAM, attacks, the perceptual ball, masks in real time and defences, each
in a process of its own, in float32, TF32 and bfloat16; then `compare` with all fast methods on 400
images, as images a second; then the tests of tests/test_cuda.py. Each says in which share of the
time the GPU was busy: the union of its kernels and copies, as torch's profiler sees them, in one
more call. IMAGENET is an ImageNet validation folder in Kaggle's layout.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import harness

from captum_robust.benchmark import compare
from captum_robust.data import load_dataset

HERE = Path(__file__).parent
FAST = (
    "robust_cam",
    "grad_cam",
    "grad_cam_plus_plus",
    "layer_cam",
    "hires_cam",
    "eigen_cam",
    "saliency",
    "saliency_max",
    "input_x_gradient",
    "guided_backprop",
    "guided_grad_cam",
    "deconvolution",
    "real_time_masking",
    "box_vote_fast",
)
"""Methods of a few passes an image."""
PRECISIONS = get_args(harness.Precision)


def commands(data: Path, device: str, quick: bool) -> dict[str, list[str]]:
    """Return name -> script and arguments."""
    three = ["--precisions", *PRECISIONS]
    few = "--batch 2 --rounds 1" if quick else "--batch 64"
    own = {
        "robust_cam": "--models efficientnet_lite0",
        "attacks": "--images 2 --levels 1 --deepfool 2 --universal 2" if quick else "--images 64",
        "perceptual_ball": "--batch-sizes 16 64 --images 64",
        "real_time_masking": "--rounds 1 --iterative 1 --steps 2" if quick else "",
    }
    if quick:
        own["perceptual_ball"] = "--batch-sizes 2 --images 2 --rounds 1 --iterations 2 --size 64"
    every = {
        "robust_cam": [*few.split(), *three],
        "attacks": ["speed", str(data), *few.split()],
        "perceptual_ball": ["--data", str(data)],
        "real_time_masking": ["--images", str(data), *three],
        "defenses": ["cost", *few.split(), *three],
    }
    return {
        name: [f"{name}.py", *arguments, *own.get(name, "").split(), "--device", device]
        for name, arguments in every.items()
    }


def compared(data: Path, device: str, images: int, batch: int) -> None:
    """Print images a second of `compare` in each precision, and how busy the GPU was."""
    model, dataset = harness.classifier().to(device), load_dataset("imagenet", data)
    print(f"compare, {len(FAST)} methods, {images} images, batches of {batch}")
    for precision in PRECISIONS:

        def run(n: int, given: harness.Precision = precision) -> None:
            autocast = "bfloat16" if given == "bfloat16" else "float32"
            with tempfile.TemporaryDirectory() as out, harness.precision_of(given, device):
                options = {"limit": n, "batch_size": batch, "precision": autocast}
                compare(model, dataset, FAST, out=out, progress=False, **options)

        run(min(images, batch))
        harness.wait_for(device)
        began = time.perf_counter()
        run(images)
        harness.wait_for(device)
        speed = images / (time.perf_counter() - began)
        busy = harness.busy(partial(run, min(images, 3 * batch)), device)
        print(f"  {precision:9} {speed:8.2f} images a second, GPU busy {busy}", flush=True)


def gpu(
    data: Path,
    *,
    device: str = "cuda",
    quick: Annotated[bool, "as little as shows that all of them run"] = False,
    images: Annotated[int, "of compare"] = 400,
    batch: Annotated[int, "of compare"] = 64,
) -> int:
    """Run all of them; return 1 if one fails."""
    failed = []
    runs = {n: [str(HERE / c[0]), *c[1:]] for n, c in commands(data, device, quick).items()}
    if device.startswith("cuda"):
        runs["test_cuda"] = ["-m", "pytest", "-q", str(HERE.parent / "tests" / "test_cuda.py")]
    for name, command in runs.items():
        print(f"\n== {' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, *command], check=False).returncode:
            failed.append(name)
    print("\n== compare", flush=True)
    compared(data, device, 2 if quick else images, 2 if quick else batch)
    print(f"\nfailed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    harness.study(__doc__, gpu)
