"""What does RobustCAM cost, against one forward pass and against the maps it is made of?

    python studies/robust_cam.py [--device cuda] [--precisions float32 tf32 bfloat16]

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
fails where that is above 1e-5 (in float32). Timings never fail it.
"""

import statistics
from collections.abc import Callable

import harness
import torch
from captum.attr import LayerGradCam
from harness import Laps, Precisions, installed, pink_noise, race, ratio, study
from torch import Tensor

from captum_robust import RobustCAM
from captum_robust.models import Classifier, load_classifier

K = 5
TOLERANCE = 1e-5
WEIGHTS = {"efficientnet_lite0": "DEFAULT"}  # from the package index; the others are random
GRAD_CAM = installed("pytorch_grad_cam")


def load(name: str, device: str) -> tuple[Classifier, str]:
    """Return the model, and a word on its weights; random ones are seeded."""
    torch.manual_seed(0)
    weights = WEIGHTS.get(name)
    said = "random weights, seed 0" if weights is None else "published weights"
    return load_classifier(name, weights=weights).to(device), said


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


def contenders(model: Classifier, images: Tensor) -> dict[str, Callable[[], object]]:
    """Return name -> what is timed."""
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

    timed: dict[str, Callable[[], object]] = {
        "forward": forward,
        "RobustCAM": lambda: auto.attribute(images, k=K),
        "RobustCAM, gradcam": lambda: head.attribute(images, k=K),
        "RobustCAM, upsampled": lambda: auto.attribute(images, k=K, upsample=True),
        "LayerGradCam x5": captum_maps,
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

        timed["GradCAM x5"] = grad_cam_maps
    return timed


REPEATS = {"forward": 3, "RobustCAM": 3, "RobustCAM, gradcam": 3, "RobustCAM, upsampled": 3}
"""The quick ones run so often a round."""
RATIOS = (
    ("(a) RobustCAM / forward", "RobustCAM", "forward", "at most 1.10"),
    ("    with base='gradcam' / forward", "RobustCAM, gradcam", "forward", ""),
    ("(b) LayerGradCam x5 / RobustCAM", "LayerGradCam x5", "RobustCAM", "at least 4"),
    ("(c) GradCAM x5 / RobustCAM, upsampled", "GradCAM x5", "RobustCAM, upsampled", "at least 10"),
)


def print_times(laps: dict[str, Laps], busy: dict[str, str]) -> None:
    """Print the times of each contender, the share in which a GPU was busy, and the ratios."""
    for name, taken in laps.items():
        wall, cpu = (1000 * statistics.median(column) for column in (taken.wall, taken.cpu))
        print(f"  {name:38} {wall:7.1f} ms wall {cpu:7.1f} ms CPU a call, GPU busy {busy[name]}")
    for label, slow, fast, goal in RATIOS:
        if slow in laps:
            wall = ratio(laps[slow].wall, laps[fast].wall)
            cpu = ratio(laps[slow].cpu, laps[fast].cpu)
            print(f"  {label:38} wall {wall:24} CPU {cpu:24}{goal and ' goal ' + goal}".rstrip())


def robust_cam(
    *,
    models: tuple[str, ...] = ("efficientnet_lite0", "resnet50"),
    batch: int = 16,
    rounds: int = 5,
    device: str = "cpu",
    precisions: Precisions = ("float32",),
) -> int:
    """Print the tables; return 1 if any map differs."""
    print(f"k={K}, batch of {batch}, median (smallest to largest) of n={rounds}")
    if not GRAD_CAM:
        print("(c) is left out: pip install grad-cam ttach")
    agree = True
    for name in models:
        model, weights = load(name, device)
        images = pink_noise(batch, model.input_size).to(device)
        print(f"\n{name}, {weights}, {images.shape[2]}x{images.shape[3]} pixels")
        for base, label in (("gradcam", "base='gradcam'"), ("cam", "base='cam', over h·w,")):
            worst = disagreement(model, images, base)
            agree &= worst <= TOLERANCE
            print(f"  {label} differs from LayerGradCam by at most {worst:.1e} of a map's peak")
        for precision in precisions:
            with harness.precision_of(precision, device):
                timed = contenders(model, images)
                if precision == "bfloat16":  # which NumPy does not know
                    timed.pop("GradCAM x5", None)
                laps = race(timed, rounds, repeats=REPEATS, device=device)
                busy = {name: harness.busy(call, device) for name, call in timed.items()}
            print(f"  {precision}")
            print_times(laps, busy)
    print("\nall maps agree" if agree else f"\nsome maps differ by more than {TOLERANCE}")
    return int(not agree)


if __name__ == "__main__":
    study(__doc__, robust_cam, threads=1, packages=("grad-cam",))
