"""What does adversarial training buy, and does it sharpen the maps?

    python studies/adversarial_training.py --data tiny-imagenet-100.tar --out RUNS [--epochs 30]

Trains the small ResNet twice with one recipe on the first classes of Tiny ImageNet, as it is and
on attacked images (Madry), with the code of `captum-robust train robust`: stopped, the same command
goes on. A tenth of the training images is held out for the early looks and nothing else is chosen
here. Then, on the validation images of these classes:

- accuracy, clean and under PGD with 10 and 20 steps from a random start, in float32;
- Grad-CAM and the gradient of the image for the labelled class: localization error (IoU at most
  .5; the threshold of one half of the images is chosen on the other) beside the centre box and the
  whole image, the share of the map's mass inside the box, and the share of the image that holds
  half of the map's mass;
- Grad-CAM of the predicted class under attack: correlation with the clean map, localization error.

Each with the paired difference between the two networks and 95 % bootstrap intervals. `--measure`
only measures networks that an earlier call trained.

`--timing` measures instead what a training step costs with this package's inner attack and with
its PGD class in its place, in turns.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from captum.attr import LayerGradCam, Saliency
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms import GaussianBlur

from captum_robust.attacks import PGD
from captum_robust.data import LocalizationDataset, Sample, load_dataset, resize
from captum_robust.defenses import adversarial_training, standard_loss
from captum_robust.metrics.functional import (
    LocalizationResult,
    best_iou,
    bootstrap_difference,
    bootstrap_interval,
    boxes_to_mask,
    center_box,
    localization_error,
    spearman_correlation,
    sweep_boxes,
    whole_image_box,
)
from captum_robust.models import Classifier, load_classifier, save_classifier
from captum_robust.training import Augmented, LabelledImages, TrainingSettings, held_out_split
from captum_robust.training.adversarial import InnerAttack

EPSILONS = (2, 4, 8)
FAMILIES = ("value", "mean", "energy")
SIZE = 64
# The blur of 8 px that this project uses at 224, at this size.
BLUR = 8 * SIZE / 224


class Part(LocalizationDataset):
    """Some samples of another data set."""

    kind = "part"

    def __init__(self, whole: LocalizationDataset, positions: Sequence[int]) -> None:
        self.whole, self.positions = whole, list(positions)
        self.root, self.class_names = whole.root, whole.class_names
        self.ids = [whole.ids[p] for p in self.positions]

    def _load(self, index: int) -> Sample:
        return self.whole[self.positions[index]]


def training_part(path: Path, classes: int) -> LocalizationDataset:
    """Return the training images of the first classes, whose ids begin with the WordNet id."""
    whole = load_dataset("tiny-imagenet", path, split="train", labels="wnids")
    first = {}
    for position, name in enumerate(whole.ids):
        first.setdefault(name.split("_")[0], position)
    wanted = {wnid for wnid, position in first.items() if (whole[position].label or 0) < classes}
    return Part(whole, [p for p, name in enumerate(whole.ids) if name.split("_")[0] in wanted])


def validation_samples(path: Path, classes: int) -> list[Sample]:
    """Return the validation images of the first classes."""
    whole = load_dataset("tiny-imagenet", path, split="val", labels="wnids")
    samples = [whole[i] for i in range(len(whole))]
    return [resize(s, SIZE) for s in samples if s.label is not None and s.label < classes]


def train(options: argparse.Namespace, name: str, images: LabelledImages) -> Classifier:
    """Return the network trained by method ``name``, from the folder of an earlier run if whole."""
    torch.manual_seed(options.seed)
    model = load_classifier("small_resnet", None, class_names=images.class_names)
    training, held_out = held_out_split(images.labels, 0.1, options.seed)
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0)).tolist()
    out = options.out / name
    start = time.perf_counter()
    result = adversarial_training(
        model,
        Augmented(Subset(images, training)),
        TrainingSettings(
            epochs=options.epochs,
            batch_size=64,
            learning_rate=options.learning_rate,
            precision="bfloat16",
            seed=options.seed,
            evaluate_every=5 * (len(training) // 64),
        ),
        method=name,
        epsilon=options.epsilon / 255,
        steps=options.steps,
        held_out=Subset(images, [held_out[i] for i in order]),
        evaluation_images=len(held_out),
        out=out,
        progress=True,
    )
    seconds = time.perf_counter() - start
    save_classifier(model, out / "model.safetensors")
    print(
        f"{name}: {result.steps} steps of 64, this call from step {result.resumed_from}, "
        f"{seconds:.0f} s"
    )
    for row in result.evaluations:
        print(
            f"  step {row['step']:5}: held out, clean {row['clean_accuracy']:.3f}, PGD-10 at "
            f"{options.epsilon:g}/255 {row['robust_accuracy']:.3f}"
        )
    return model.eval()


def survivors(model: Classifier, x: Tensor, labels: Tensor, epsilon: float, steps: int) -> Tensor:
    """Return N floats: 1 where the attacked image is still classified right."""
    attack = PGD(model, epsilon / 255, steps, random_start=True)
    kept = []
    for part, target in zip(x.split(50), labels.split(50), strict=True):
        details = attack.perturb(part, target, return_details=True)[1]
        kept.append(~details.already & ~details.fooled)
    return torch.cat(kept).double()


def grad_cams(model: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """Return the positive parts of Grad-CAM, N×H×W, of the labelled classes."""
    cam = LayerGradCam(model, model.cam_layer)
    maps = [
        cam.attribute(part, target, relu_attributions=True).detach()
        for part, target in zip(x.split(50), labels.split(50), strict=True)
    ]
    size = (SIZE, SIZE)
    return torch.nn.functional.interpolate(torch.cat(maps), size, mode="bilinear")[:, 0]


def gradient_maps(model: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """Return the largest absolute gradient over the channels, blurred, N×H×W."""
    images = x.clone().requires_grad_()
    found = Saliency(model).attribute(images, labels, abs=True).amax(dim=1, keepdim=True)
    return GaussianBlur(2 * round(3 * BLUR) + 1, BLUR)(found)[:, 0]


def predictions(model: Classifier, x: Tensor) -> Tensor:
    """Return the predicted classes."""
    with torch.no_grad():
        return model(x).argmax(dim=1)


def box_errors(maps: Tensor, samples: list[Sample]) -> LocalizationResult:
    """Return the errors of the boxes, thresholds chosen on the other half of the images."""
    boxes = [s.boxes for s in samples]
    found = sweep_boxes(maps, FAMILIES)
    return localization_error(
        {family: best_iou(b, boxes) for family, b in found.items()},
        ids=[s.id for s in samples],
    )


def half_mass_area(maps: Tensor) -> Tensor:
    """Return for each map the share of the pixels, the largest first, with half of its mass."""
    ordered = maps.flatten(1).sort(dim=1, descending=True).values.double().cumsum(dim=1)
    half = ordered[:, -1:] / 2
    share = (ordered < half).sum(dim=1).add(1).double() / maps[0].numel()
    return share.masked_fill(half[:, 0] == 0, torch.nan)


def row(name: str, values: Tensor) -> str:
    """Return a line of a table: mean and interval."""
    interval = bootstrap_interval(values)
    return f"  {name:34}{interval.mean:8.3f}  [{interval.low:.3f}, {interval.high:.3f}]"


def difference(name: str, values: dict[str, Tensor]) -> str:
    """Return a line of a table: the paired difference and its interval."""
    interval = bootstrap_difference(values["madry"], values["standard"])
    return f"  {name:34}{interval.mean:+8.3f}  [{interval.low:+.3f}, {interval.high:+.3f}]"


def measure(models: dict[str, Classifier], samples: list[Sample]) -> None:
    """Print the tables."""
    x = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])
    boxes = [s.boxes for s in samples]
    print(f"\naccuracy on {len(samples)} validation images")
    right: dict[str, Tensor] = {}
    for name, model in models.items():
        right[name] = (predictions(model, x) == labels).double()
        print(row(f"{name}, clean", right[name]))
        for epsilon in EPSILONS:
            for steps in (10, 20):
                kept = survivors(model, x, labels, epsilon, steps)
                print(row(f"{name}, PGD-{steps} at {epsilon}/255", kept), flush=True)
    print(difference("robust - standard, clean", right))

    print("\nlocalization error of fixed boxes")
    for name, box in (
        ("centre box", center_box((SIZE, SIZE))),
        ("whole image", whole_image_box((SIZE, SIZE))),
    ):
        ious = best_iou(box.expand(len(samples), 1, 4), boxes)[:, 0]
        print(row(name, (ious <= 0.5).double()))
    both = (right["madry"] * right["standard"]).bool()
    for title, maps_of in (
        ("Grad-CAM", grad_cams),
        (f"absolute gradient of the image, blurred by {BLUR:g} px", gradient_maps),
    ):
        maps = {name: maps_of(model, x, labels) for name, model in models.items()}
        compare_maps(title, maps, samples, both)
    print_stability(models, x, samples)


def compare_maps(title: str, maps: dict[str, Tensor], samples: list[Sample], both: Tensor) -> None:
    """Print how well the maps of the two networks place the object, and how sharp they are."""
    boxes = [s.boxes for s in samples]
    masks = torch.stack([boxes_to_mask(b, (SIZE, SIZE)) for b in boxes])
    errors, inside, area = {}, {}, {}
    print(f"\n{title}, labelled class: localization error")
    for name, found in maps.items():
        result = box_errors(found, samples)
        errors[name] = result.per_sample_error
        mass = found.double().flatten(1).sum(dim=1)
        in_box = (found.double() * masks).flatten(1).sum(dim=1)
        inside[name] = (in_box / mass).masked_fill(mass == 0, torch.nan)
        area[name] = half_mass_area(found)
        chosen = ", ".join(f"{family} {alpha:g}" for ((family, alpha),) in result.chosen)
        print(row(name, errors[name]) + f"  thresholds: {chosen}")
    print(difference("robust - standard", errors))
    name = f"the same, both right (n={int(both.sum())})"
    print(difference(name, {n: e.masked_fill(~both, torch.nan) for n, e in errors.items()}))
    print(f"{title}: share of the map's mass inside the box")
    print(row("box's share of the image", masks.double().flatten(1).mean(dim=1)))
    for name in maps:
        print(row(name, inside[name]))
    print(difference("robust - standard", inside))
    print(f"{title}: share of the image that holds half of the map's mass")
    for name in maps:
        print(row(name, area[name]))
    print(difference("robust - standard", area))
    for name in maps:
        empty = int(area[name].isnan().sum())
        if empty:
            print(f"  {name}: {empty} maps without anything positive are left out")


def print_stability(models: dict[str, Classifier], x: Tensor, samples: list[Sample]) -> None:
    """Print what becomes of Grad-CAM of the predicted class under PGD-10, all steps taken."""
    labels = torch.tensor([s.label for s in samples])
    for epsilon in EPSILONS:
        print(f"\nGrad-CAM of the predicted class under PGD-10 at {epsilon}/255, all steps taken")
        kept, errors = {}, {}
        for name, model in models.items():
            attack = PGD(model, epsilon / 255, 10, random_start=True, early_stop=False)
            parts = zip(x.split(50), labels.split(50), strict=True)
            attacked = torch.cat([attack.perturb(part, target) for part, target in parts])
            clean_maps, maps = (grad_cams(model, i, predictions(model, i)) for i in (x, attacked))
            kept[name] = spearman_correlation(clean_maps, maps)
            errors[name] = box_errors(maps, samples).per_sample_error
        for title, values in (
            ("Spearman's correlation with the clean map", kept),
            ("localization error", errors),
        ):
            print(title)
            for name in models:
                print(row(name, values[name]))
            print(difference("robust - standard", values))


def timing(options: argparse.Namespace) -> None:
    """Print the cost of a training step with each inner attack, and of a plain one."""
    torch.manual_seed(0)
    model = load_classifier("small_resnet", None, class_names=[str(i) for i in range(20)])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, labels = torch.rand(64, 3, SIZE, SIZE), torch.randint(0, 20, (64,))
    epsilon = options.epsilon / 255

    def step(name: str, steps: int) -> float:
        # Processor time: other programs may run beside this one.
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            attacked = x
            if name == "inner":
                attacked = InnerAttack(epsilon, steps)(model, x, labels, 0)
            elif name == "PGD":
                model.eval()
                attacked = PGD(
                    model,
                    epsilon,
                    steps,
                    random_start=True,
                    early_stop=False,
                    keep_best=False,
                    quantize=False,
                ).perturb(x, labels)
            model.train()
            loss = standard_loss(model, (attacked, labels), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.process_time() - start

    print("processor time of a training step of 64 images, median of 7 rounds in turns")
    for steps in (3, 7):
        taken: dict[str, list[float]] = {"plain": [], "inner": [], "PGD": []}
        for _ in range(7):
            for name, times in taken.items():
                times.append(step(name, steps))
        plain, inner, pgd = (statistics.median(times) for times in taken.values())
        print(
            f"  {steps} steps: plain {plain:.3f} s, inner attack {inner:.3f} s, PGD {pgd:.3f} s; "
            f"PGD / inner {pgd / inner:.2f}, inner / plain {inner / plain:.1f}"
        )


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="Tiny ImageNet, folder or archive")
    parser.add_argument("--out", type=Path, default=Path("adversarial-training"))
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--epsilon", type=float, default=4, help="levels of 255, in training")
    parser.add_argument("--steps", type=int, default=3, help="of the inner attack")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--timing", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread used; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    if options.timing:
        timing(options)
        return 0
    if options.data is None:
        parser.error("--data is needed")
    if options.measure:
        models = {
            name: load_classifier("small_resnet", options.out / name / "model.safetensors")
            for name in ("madry", "standard")
        }
        measure(models, validation_samples(options.data, options.classes))
        return 0
    images = LabelledImages(
        training_part(options.data, options.classes), SIZE, classes=range(options.classes)
    )
    print(f"{len(images)} images of {len(images.class_names)} classes, a tenth of them held out")
    models = {name: train(options, name, images) for name in ("madry", "standard")}
    measure(models, validation_samples(options.data, options.classes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
