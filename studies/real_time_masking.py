"""What a mask costs: the trained network beside one forward pass, and beside a mask an image.

    python studies/real_time_masking.py [--network FILE] [--images DATA] [--iterative N]
        [--device cuda] [--precisions float32 tf32 bfloat16]

EfficientNet-Lite0 with the masking network of the package, or that of FILE. Times are ratios to the
classifier's own forward pass in the same run: the rows of a round take turns, and the ratio shown
is the median over the rounds. Then, of the first N photographs of an ImageNet validation folder
(the sample photographs without one): the objective of the network's mask, and how many steps, and
seconds, the iterative method needs until its own is as low on average.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import harness
import torch
from captum.attr import LayerGradCam
from harness import Precisions, classifier, masking_network, photographs, race, ratio, study
from torch import Tensor

from captum_robust import IterativeMask, RealTimeMasking
from captum_robust.benchmark.passes import count_passes
from captum_robust.nn import CodeObjective, EvidenceRemoval, blend

OBJECTIVE = CodeObjective()


def costs(method: RealTimeMasking, rounds: int, device: str, precisions: Precisions) -> None:
    """Print time and passes beside one pass of the classifier, and beside Captum's Grad-CAM."""
    model = method.network.encoder
    cam = LayerGradCam(model, model.cam_layer)
    without_gradients = torch.no_grad()
    print("ms an image (best round); times the classifier's pass; passes an image; GPU busy")
    for precision, batch in itertools.product(precisions, (1, 16)):
        x = torch.rand(batch, 3, *model.input_size).to(device, memory_format=torch.channels_last)
        target = torch.zeros(batch, dtype=torch.long, device=device)
        rows: dict[str, Callable[[], object]] = {
            "classifier forward": without_gradients(lambda x=x: model(x)),
            "mask and scores": without_gradients(lambda x=x: method.network.masks_and_scores(x)),
            "RealTimeMasking": without_gradients(lambda x=x: method.attribute(x)),
            "Captum's LayerGradCam": lambda x=x, t=target: cam.attribute(x, t),
        }
        with harness.precision_of(precision, device):
            laps = race(rows, rounds, device=device)
            busy = {name: harness.busy(call, device) for name, call in rows.items()}
        print(f"batch of {batch}, {precision}")
        for name, call in rows.items():
            with count_passes(model) as passes:
                call()
            print(
                f"  {name:24s} {min(laps[name].wall) / batch * 1000:7.1f} "
                f"{ratio(laps[name].wall, laps['classifier forward'].wall):24} "
                f"{passes.forward / batch:4.1f} {busy[name]}"
            )


@torch.no_grad()
def objective_of(method: RealTimeMasking, x: Tensor, classes: Tensor) -> Tensor:
    """Return N values, with the draws that the iterative method meets in one of its steps."""
    masks = method.attribute(x, classes)[:, :1]
    removal, generator = EvidenceRemoval(), torch.Generator().manual_seed(0)
    scores = []
    for mask in (masks, 1 - masks):
        noisy = x + 0.015 * torch.randn(x[:1].shape, generator=generator).to(x.device)
        without = removal(noisy, generator, shared=True)
        scores.append(method.network.encoder(blend(noisy, mask, without)))
    return OBJECTIVE(masks, *scores, classes)["total"]


def iterative_beside(method: RealTimeMasking, x: Tensor, steps: int) -> None:
    """Print how long the iterative method takes until its objective is as low."""
    model = method.network.encoder
    with torch.no_grad():
        classes = model(x).argmax(dim=1)
    mask = {"mask": lambda: method.attribute(x, classes)}
    spent = race(mask, 1, warm_up=x.is_cuda, device=str(x.device))["mask"].median
    goal = objective_of(method, x, classes).mean()
    slow = IterativeMask(model, objective=OBJECTIVE, steps=steps)
    harness.wait_for(str(x.device))
    began = time.perf_counter()
    _, details = slow.attribute(x, classes, return_details=True)
    harness.wait_for(str(x.device))
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
        needed = seconds * reached[0] / steps
        print(f"  as low after {reached[0]} steps, about {needed:.1f} s: ", end="")
        print(f"{needed / spent:.0f} times as long")
    else:
        print(f"  not as low after {steps} steps: more than {seconds / spent:.0f} times as long")


def real_time_masking(
    *,
    network: Annotated[Path | None, "a masking network, else the package's"] = None,
    images: Annotated[Path | None, "an ImageNet validation folder"] = None,
    iterative: Annotated[int, "images of the iterative method; 0: none"] = 8,
    steps: Annotated[int, "of the iterative method"] = 200,
    rounds: int = 10,
    device: str = "cpu",
    precisions: Precisions = ("float32", "bfloat16"),
) -> None:
    """Print both tables."""
    torch.manual_seed(0)
    model = classifier()
    method = RealTimeMasking(masking_network(network, model))
    method.network.to(device, memory_format=torch.channels_last)
    costs(method, rounds, device, precisions)
    if iterative:
        kind = "samples" if images is None else "imagenet"
        x = photographs(images, iterative, model.input_size, kind).images.to(device)
        iterative_beside(method, x, steps)


if __name__ == "__main__":
    study(__doc__, real_time_masking)
