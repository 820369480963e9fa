"""What does RobustCAM cost, against one forward pass and against the maps it is made of?

    python studies/robust_cam.py

Times RobustCAM (k=5) on a batch against (a) one plain forward pass without gradients, (b) five
calls of Captum's LayerGradCam, one a class rank, and (c) five calls of GradCAM from the package
`grad-cam` (`pip install grad-cam ttach`; without it (c) is left out). (b) and (c) are told the
classes, RobustCAM finds them. GradCAM always resizes its maps to the images, so RobustCAM is timed
against it with `upsample=True`. The models are as they are loaded: no parameter is frozen.

The contenders take turns within one run. A ratio is formed in each round, of wall-clock seconds and
of the seconds that the process spent on the cores (less sensitive to other load); the median round
counts, with the smallest and the largest beside it.

First the maps are compared: for each of the five top classes RobustCAM's signed map of that class
alone with LayerGradCam's, by the largest difference relative to the map's largest value. The run
fails where that is above 1e-5. Timings never fail it.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import captum
import torch
from captum.attr import LayerGradCam
from torch import Tensor

from captum_robust import RobustCAM
from captum_robust.models import Classifier, load_classifier

K = 5
TOLERANCE = 1e-5
WEIGHTS = {"efficientnet_lite0": "DEFAULT"}  # from the package index; the others are random
GRAD_CAM = importlib.util.find_spec("pytorch_grad_cam") is not None


def load(name: str, device: str) -> tuple[Classifier, str]:
    """Return the model, and a word on its weights; random ones are seeded."""
    torch.manual_seed(0)
    weights = WEIGHTS.get(name)
    said = "random weights, seed 0" if weights is None else "published weights"
    return load_classifier(name, weights=weights).to(device), said


def pink_noise(n: int, size: tuple[int, int]) -> Tensor:
    """Return n seeded images N×3×H×W in [0, 1], with the 1/f spectrum of photographs."""
    noise = torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(0))
    fy, fx = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]
    frequency = (fy**2 + fx**2).sqrt()
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp(min=1 / max(size)), size)
    low, high = smooth.amin((1, 2, 3), True), smooth.amax((1, 2, 3), True)
    return (smooth - low) / (high - low)


def top_classes(model: Classifier, images: Tensor) -> Tensor:
    """Return the k top classes of each image, N×k."""
    with torch.no_grad():
        return model(images).topk(K, dim=1).indices


def disagreement(model: Classifier, images: Tensor, base: str) -> float:
    """Return the largest relative difference to LayerGradCam, over images and top classes."""
    theirs = LayerGradCam(model, model.cam_layer)
    ours = RobustCAM(model, model.cam_layer, base=base)
    worst = []
    for target in top_classes(model, images).unbind(1):
        expected = theirs.attribute(images, target).detach()
        maps = ours.attribute(images, target, weights=[1.0], normalize=None)
        if base == "cam":  # the weights are not averaged over the positions
            maps = maps / (maps.shape[2] * maps.shape[3])
        difference = (maps - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
        worst.append(difference.max())
    return torch.stack(worst).max().item()  # NaN stays NaN, and is no agreement


def contenders(model: Classifier, images: Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """Return name -> what is timed, and how often a round."""
    classes = top_classes(model, images).unbind(1)
    layer = model.cam_layer
    auto, head = RobustCAM(model, layer), RobustCAM(model, layer, base="gradcam")
    layer_grad_cam = LayerGradCam(model, layer)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    def captum_maps() -> None:
        for target in classes:
            layer_grad_cam.attribute(images, target)

    timed: dict[str, tuple[Callable[[], object], int]] = {
        "forward": (forward, 3),
        "RobustCAM": (lambda: auto.attribute(images, k=K), 3),
        "RobustCAM, gradcam": (lambda: head.attribute(images, k=K), 3),
        "RobustCAM, upsampled": (lambda: auto.attribute(images, k=K, upsample=True), 3),
        "LayerGradCam x5": (captum_maps, 1),
    }
    if GRAD_CAM:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        targets = [[ClassifierOutputTarget(c) for c in column.tolist()] for column in classes]

        def grad_cam_maps() -> None:
            # One object for the five calls; its hooks must be gone when the others run.
            with GradCAM(model=model, target_layers=[layer]) as cam:
                for column in targets:
                    cam(input_tensor=images, targets=column)

        timed["GradCAM x5"] = (grad_cam_maps, 1)
    return timed


RATIOS = (
    ("(a) RobustCAM / forward", "RobustCAM", "forward", "at most 1.10"),
    ("    with base='gradcam' / forward", "RobustCAM, gradcam", "forward", ""),
    ("(b) LayerGradCam x5 / RobustCAM", "LayerGradCam x5", "RobustCAM", "at least 4"),
    ("(c) GradCAM x5 / RobustCAM, upsampled", "GradCAM x5", "RobustCAM, upsampled", "at least 10"),
)


def race(
    timed: dict[str, tuple[Callable[[], object], int]], rounds: int, device: str
) -> dict[str, list[tuple[float, float]]]:
    """Return for each contender (wall, CPU) seconds a call in each round, after one warm-up."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    turns = max(times for _, times in timed.values())
    for number in range(-1, rounds):
        spent = dict.fromkeys(timed, (0.0, 0.0))
        for turn, name in itertools.product(range(turns), rotated(list(timed), number)):
            run, times = timed[name]
            if turn >= times:
                continue
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wait()
            now = time.perf_counter() - wall, time.process_time() - cpu
            spent[name] = spent[name][0] + now[0], spent[name][1] + now[1]
        if number >= 0:
            for name, (wall, cpu) in spent.items():
                seconds[name].append((wall / timed[name][1], cpu / timed[name][1]))
    return seconds


def rotated(names: list[str], by: int) -> list[str]:
    """Return the names from another one on in each round: none always follows the same load."""
    by %= len(names)
    return names[by:] + names[:by]


def version(package: str) -> str:
    """Return the installed version, or "–"."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "–"


def print_times(seconds: dict[str, list[tuple[float, float]]]) -> None:
    """Print the times of each contender, and the ratios."""
    for name, taken in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*taken, strict=True))
        print(f"  {name:38} {1000 * wall:7.0f} ms wall {1000 * cpu:7.0f} ms CPU a call")
    for label, slow, fast, goal in RATIOS:
        if slow not in seconds:
            continue
        pairs = list(zip(seconds[slow], seconds[fast], strict=True))
        wall, cpu = (sorted(s[i] / f[i] for s, f in pairs) for i in (0, 1))
        shown = [f"{statistics.median(r):6.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in (wall, cpu)]
        print(
            f"  {label:38} wall {shown[0]:24} CPU {shown[1]:24}{goal and ' goal ' + goal}".rstrip()
        )


def main() -> int:
    """Print the tables; return 1 if any map differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["efficientnet_lite0", "resnet50"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = options.device
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    print(
        f"{datetime.date.today()}, {where}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} torch thread(s); Python {platform.python_version()}, torch "
        f"{torch.__version__}, Captum {captum.__version__}, grad-cam {version('grad-cam')}, "
        f"captum_robust {version('captum-robust')}"
    )
    print(f"k={K}, batch of {options.batch}, median (smallest to largest) of n={options.rounds}")
    if not GRAD_CAM:
        print("(c) is left out: pip install grad-cam ttach")
    agree = True
    for name in options.models:
        model, said = load(name, device)
        images = pink_noise(options.batch, model.input_size).to(device)
        print(f"\n{name}, {said}, {images.shape[2]}x{images.shape[3]} pixels")
        for base, shown in (("gradcam", "base='gradcam'"), ("cam", "base='cam', over h·w,")):
            worst = disagreement(model, images, base)
            agree &= worst <= TOLERANCE
            print(f"  {shown} differs from LayerGradCam by at most {worst:.1e} of a map's peak")
        print_times(race(contenders(model, images), options.rounds, device))
    print("\nall maps agree" if agree else f"\nsome maps differ by more than {TOLERANCE}")
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
