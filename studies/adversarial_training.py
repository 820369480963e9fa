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

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import harness
import torch
from captum.attr import Saliency
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms import GaussianBlur

from captum_robust.attacks import PGD
from captum_robust.data import resize
from captum_robust.defenses import adversarial_training, standard_loss
from captum_robust.metrics.functional import (
    boxes_to_mask,
    spearman_correlation,
)
from captum_robust.models import Classifier, load_classifier, save_classifier
from captum_robust.training import Augmented, LabelledImages, TrainingSettings, held_out_split
from captum_robust.training.adversarial import InnerAttack

EPSILONS = (2, 4, 8)
SIZE = (64, 64)
# The blur of 8 px that this project uses at 224, at this size.
BLUR = 8 * SIZE[0] / 224
BATCH = 50
METHODS = ("madry", "standard")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained, and on what."""

    data: Annotated[Path | None, "Tiny ImageNet, folder or archive"] = None
    out: Path = Path("adversarial-training")
    classes: int = 20
    epochs: int = 30
    epsilon: Annotated[float, "levels of 255, in training"] = 4
    steps: Annotated[int, "of the inner attack"] = 3
    learning_rate: float = 0.1
    seed: int = 0


def train(options: Options, name: str, images: LabelledImages) -> Classifier:
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


def survivors(model: Classifier, shown: harness.Photographs, epsilon: float, steps: int) -> Tensor:
    """Return N: whether the attacked image is still classified right."""
    attack = PGD(model, epsilon / 255, steps, random_start=True)

    def survives(x: Tensor, labels: Tensor) -> Tensor:
        details = attack.perturb(x, labels, return_details=True)[1]
        return ~details.already & ~details.fooled

    return harness.in_batches(survives, shown.images, shown.labels, size=BATCH)


def gradient_maps(model: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """Return the largest absolute gradient over the channels, blurred, N×H×W."""
    images = x.clone().requires_grad_()
    gradient = Saliency(model).attribute(images, labels, abs=True).amax(dim=1, keepdim=True)
    return GaussianBlur(2 * round(3 * BLUR) + 1, BLUR)(gradient)[:, 0]


def half_mass_area(maps: Tensor) -> Tensor:
    """Return for each map the share of the pixels, the largest first, with half of its mass."""
    ordered = maps.flatten(1).sort(dim=1, descending=True).values.double().cumsum(dim=1)
    half = ordered[:, -1:] / 2
    share = (ordered < half).sum(dim=1).add(1).double() / maps[0].numel()
    return share.masked_fill(half[:, 0] == 0, torch.nan)


def print_row(name: str, text: str, more: str = "") -> None:
    """Print a line of a table."""
    print(f"  {name:34}{text:>24}{more}", flush=True)


def print_rows(title: str, values: dict[str, Tensor]) -> None:
    """Print the mean of each network, and the paired difference between them."""
    print(title)
    for name, each in values.items():
        print_row(name, harness.mean(each))
    print_row("robust - standard", harness.difference(values["madry"], values["standard"]))


def print_tables(models: dict[str, Classifier], shown: harness.Photographs) -> None:
    """Print the tables."""
    x, labels = shown.images, shown.labels
    print(f"\naccuracy on {len(shown)} validation images")
    right: dict[str, Tensor] = {}
    for name, model in models.items():
        right[name] = (harness.predicted(model, x, BATCH) == labels).double()
        print_row(f"{name}, clean", harness.mean(right[name]))
        for epsilon in EPSILONS:
            for steps in (10, 20):
                kept = survivors(model, shown, epsilon, steps)
                print_row(f"{name}, PGD-{steps} at {epsilon}/255", harness.mean(kept))
    print_row("robust - standard, clean", harness.difference(right["madry"], right["standard"]))

    print("\nlocalization error of fixed boxes")
    for name, failed in harness.fixed_boxes(SIZE, shown.boxes).items():
        print_row(name, harness.mean(failed))
    both = (right["madry"] * right["standard"]).bool()
    for title, maps_of in (
        ("Grad-CAM", harness.grad_cams),
        (f"absolute gradient of the image, blurred by {BLUR:g} px", gradient_maps),
    ):
        maps = {name: maps_of(model, x, labels) for name, model in models.items()}
        compare_maps(title, maps, shown, both)
    print_stability(models, shown)


def compare_maps(
    title: str, maps: dict[str, Tensor], shown: harness.Photographs, both: Tensor
) -> None:
    """Print how well the maps of the two networks place the object, and how sharp they are."""
    masks = torch.stack([boxes_to_mask(b, SIZE) for b in shown.boxes])
    errors, inside, area = {}, {}, {}
    print(f"\n{title}, labelled class: localization error")
    for name, own in maps.items():
        result = harness.tuned(own, shown.boxes, ids=shown.ids)
        errors[name] = result.per_sample_error
        mass = own.double().flatten(1).sum(dim=1)
        in_box = (own.double() * masks).flatten(1).sum(dim=1)
        inside[name] = (in_box / mass).masked_fill(mass == 0, torch.nan)
        area[name] = half_mass_area(own)
        chosen = ", ".join(f"{family} {alpha:g}" for ((family, alpha),) in result.chosen)
        print_row(name, harness.mean(errors[name]), f"  thresholds: {chosen}")
    print_row("robust - standard", harness.difference(errors["madry"], errors["standard"]))
    of_both = {name: each.masked_fill(~both, torch.nan) for name, each in errors.items()}
    name = f"the same, both right (n={int(both.sum())})"
    print_row(name, harness.difference(of_both["madry"], of_both["standard"]))
    print_rows(f"{title}: share of the map's mass inside the box", inside)
    print_row("box's share of the image", harness.mean(masks.double().flatten(1).mean(dim=1)))
    print_rows(f"{title}: share of the image that holds half of the map's mass", area)
    for name in maps:
        if empty := int(area[name].isnan().sum()):
            print(f"  {name}: {empty} maps without anything positive are left out")


def print_stability(models: dict[str, Classifier], shown: harness.Photographs) -> None:
    """Print what becomes of Grad-CAM of the predicted class under PGD-10, all steps taken."""

    def maps_of(model: Classifier, images: Tensor) -> Tensor:
        return harness.grad_cams(model, images, harness.predicted(model, images, BATCH))

    for epsilon in EPSILONS:
        print(f"\nGrad-CAM of the predicted class under PGD-10 at {epsilon}/255, all steps taken")
        kept, errors = {}, {}
        for name, model in models.items():
            attack = PGD(model, epsilon / 255, 10, random_start=True, early_stop=False)
            attacked = harness.in_batches(attack.perturb, shown.images, shown.labels, size=BATCH)
            maps = maps_of(model, attacked)
            kept[name] = spearman_correlation(maps_of(model, shown.images), maps)
            errors[name] = harness.tuned(maps, shown.boxes, ids=shown.ids).per_sample_error
        print_rows("Spearman's correlation with the clean map", kept)
        print_rows("localization error", errors)


def print_costs(epsilon: float) -> None:
    """Print the cost of a training step with each inner attack, and of a plain one."""
    torch.manual_seed(0)
    model = load_classifier("small_resnet", None, class_names=[str(i) for i in range(20)])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, labels = torch.rand(64, 3, *SIZE), torch.randint(0, 20, (64,))

    def step(attack: Callable[[], Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            attacked = attack()
            model.train()
            loss = standard_loss(model, (attacked, labels), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def with_pgd(steps: int) -> Tensor:
        model.eval()
        as_inner = {"early_stop": False, "keep_best": False, "quantize": False}
        return PGD(model, epsilon, steps, random_start=True, **as_inner).perturb(x, labels)

    print("processor time of a training step of 64 images, median of 7 rounds in turns")
    for steps in (3, 7):
        inner = InnerAttack(epsilon, steps)
        attacks: dict[str, Callable[[], Tensor]] = {
            "plain": lambda: x,
            "inner": lambda inner=inner: inner(model, x, labels, 0),
            "PGD": partial(with_pgd, steps),
        }
        # Processor time: other programs may run beside this one.
        laps = harness.race(
            {name: partial(step, a) for name, a in attacks.items()}, 7, warm_up=False
        )
        plain, own, pgd = (statistics.median(each.cpu) for each in laps.values())
        print(
            f"  {steps} steps: plain {plain:.3f} s, inner attack {own:.3f} s, PGD {pgd:.3f} s; "
            f"PGD / inner {pgd / own:.2f}, inner / plain {own / plain:.1f}"
        )


def main(
    options: Options,
    *,
    measure: Annotated[bool, "only measure what an earlier call trained"] = False,
    timing: Annotated[bool, "only what a training step costs"] = False,
) -> None:
    """Print the tables."""
    if timing:
        print_costs(options.epsilon / 255)
        return
    if options.data is None:
        raise SystemExit("--data is needed")
    if measure:
        files = {name: options.out / name / "model.safetensors" for name in METHODS}
        models = {name: load_classifier("small_resnet", file) for name, file in files.items()}
    else:
        part = harness.tiny_imagenet(options.data, "train", options.classes)
        images = LabelledImages(part, SIZE, classes=range(options.classes))
        print(f"{len(images)} images of {len(images.class_names)} classes, a tenth held out")
        models = {name: train(options, name, images) for name in METHODS}
    part = harness.tiny_imagenet(options.data, "val", options.classes)
    print_tables(models, harness.Photographs.of([resize(sample, SIZE) for sample in part]))


if __name__ == "__main__":
    harness.study(__doc__, main, threads=1)
