"""What a mask costs: the trained network beside one forward pass, and beside a mask an image.

    python studies/real_time_masking.py [--network FILE] [--images DATA] [--iterative N]

EfficientNet-Lite0 with the masking network of the package, or that of FILE. Times are ratios to the
classifier's own forward pass in the same run: the rows of a round follow one another, and the
ratio shown is the median over the rounds. Then, of the first N photographs of an ImageNet
validation folder (the sample photographs without one): the objective of the network's mask, and
how many steps, and seconds, the iterative method needs until its own is as low on average.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from captum.attr import LayerGradCam
from torch import Tensor

from captum_robust import IterativeMask, RealTimeMasking
from captum_robust.benchmark.passes import count_passes
from captum_robust.data import load_dataset, resize
from captum_robust.models import load_classifier
from captum_robust.nn import CodeObjective, EvidenceRemoval, blend, load_masking_network

OBJECTIVE = CodeObjective()


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def costs(method: RealTimeMasking, rounds: int) -> None:
    """Time and passes beside one pass of the classifier, and beside Captum's Grad-CAM."""
    model = method.network.encoder
    cam = LayerGradCam(model, model.cam_layer)
    print("ms an image (best round); times the classifier's forward pass (median); passes an image")
    for batch, half in ((1, False), (16, False), (1, True), (16, True)):
        x = torch.rand(batch, 3, *model.input_size).to(memory_format=torch.channels_last)
        target = torch.zeros(batch, dtype=torch.long)
        rows: dict[str, Callable[[], object]] = {
            "classifier forward": lambda x=x: model(x),
            "mask and scores": lambda x=x: method.network.masks_and_scores(x),
            "RealTimeMasking": lambda x=x: method.attribute(x),
            "Captum's LayerGradCam": lambda x=x, t=target: cam.attribute(x, t),
        }
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            for number in range(rounds + 1):
                for name, call in rows.items():
                    with torch.set_grad_enabled(name.startswith("Captum")):
                        spent = timed(call)
                    if number:
                        seconds[name].append(spent)
        print(f"batch of {batch}, {'bfloat16' if half else 'float32'}")
        for name, call in rows.items():
            ratios = [
                s / f for s, f in zip(seconds[name], seconds["classifier forward"], strict=True)
            ]
            with count_passes(model) as passes:
                call()
            print(
                f"  {name:24s} {min(seconds[name]) / batch * 1000:7.1f} "
                f"{statistics.median(ratios):6.2f} {passes.forward / batch:4.1f}"
            )


def objective_of(method: RealTimeMasking, x: Tensor, classes: Tensor) -> Tensor:
    """N, with the draws that the iterative method meets in one of its steps."""
    masks = method.attribute(x, classes)[:, :1]
    removal, generator = EvidenceRemoval(), torch.Generator().manual_seed(0)
    scores = []
    with torch.no_grad():
        for mask in (masks, 1 - masks):
            noise = torch.randn(x[:1].shape, generator=generator)
            noisy = x + 0.015 * noise
            scores.append(
                method.network.encoder(blend(noisy, mask, removal(noisy, generator, shared=True)))
            )
    return OBJECTIVE(masks, *scores, classes)["total"]


def iterative(method: RealTimeMasking, x: Tensor, steps: int) -> None:
    """How long the iterative method takes until its objective is as low."""
    model = method.network.encoder
    with torch.no_grad():
        classes = model(x).argmax(dim=1)
    spent = timed(lambda: method.attribute(x, classes))
    goal = objective_of(method, x, classes).mean()
    found = IterativeMask(model, objective=OBJECTIVE, steps=steps)
    began = time.perf_counter()
    _, details = found.attribute(x, classes, return_details=True)
    seconds = time.perf_counter() - began
    means = details.objective.mean(dim=0)
    reached = (means <= goal).nonzero()[:, 0].tolist()
    print(f"\nobjective of the authors' code, n={len(x)}, mean")
    print(f"  RealTimeMasking {goal:.3f} in {spent:.2f} s")
    print(
        f"  IterativeMask {means[0]:.3f} before, {means[-1]:.3f} after {steps} steps, "
        f"{seconds:.1f} s"
    )
    if reached:
        print(
            f"  as low after {reached[0]} steps, about {seconds * reached[0] / steps:.1f} s: "
            f"{seconds * reached[0] / steps / spent:.0f} times as long"
        )
    else:
        print(f"  not as low after {steps} steps: more than {seconds / spent:.0f} times as long")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", type=Path, help="a masking network, else the package's")
    parser.add_argument("--images", type=Path, help="an ImageNet validation folder")
    parser.add_argument("--iterative", type=int, default=8, help="images; 0: none")
    parser.add_argument("--steps", type=int, default=200, help="of the iterative method")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = load_classifier("efficientnet_lite0").requires_grad_(False)
    if arguments.network is None:
        method = RealTimeMasking.from_pretrained("efficientnet_lite0", model=model)
    else:
        method = RealTimeMasking(load_masking_network(arguments.network, model))
    model.to(memory_format=torch.channels_last)
    method.network.to(memory_format=torch.channels_last).eval()
    costs(method, arguments.rounds)
    if arguments.iterative:
        kind = "samples" if arguments.images is None else "imagenet"
        dataset = load_dataset(kind, arguments.images)
        count = min(arguments.iterative, len(dataset))
        x = torch.stack([resize(dataset[i], model.input_size).image for i in range(count)])
        iterative(method, x, arguments.steps)


if __name__ == "__main__":
    main()
