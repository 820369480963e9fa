"""Input transforms in two regimes: tested on transformed images, and trained on them as well.

    python studies/input_transforms.py --data tiny-imagenet-100.tar --out RUNS

The regimes of Guo et al. (https://arxiv.org/abs/1711.00117), with the small ResNet on the first
classes of Tiny ImageNet and the published parameters (windows of crops as a share of the image).
The network is trained on images as they are, and then, for fewer epochs, on transformed ones.
Attacks are made on the former (grey box: the attacker does not know the transform), images are
8-bit; then beside each the attacker who knows: PGD through the transform with the surrogate's
gradient (BPDA). Accuracy on the validation images of these classes, 95 % bootstrap intervals. A run
that was stopped goes on. Nothing is chosen here.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from adversarial_training import training_part, validation_samples
from torch import Tensor
from torch.utils.data import Dataset, Subset

from captum_robust.attacks import FGSM, PGD
from captum_robust.defenses import (
    JPEG,
    BitDepth,
    CropAndRescale,
    DefendedModel,
    Quilting,
    TotalVariation,
    Transform,
    adaptive_attack,
    adversarial_training,
    crop_ensemble,
)
from captum_robust.metrics.functional import bootstrap_interval
from captum_robust.models import Classifier, load_classifier
from captum_robust.training import Augmented, LabelledImages, TrainingSettings, held_out_split

STRENGTHS = (2, 4, 8)
BANK = 50_000
CROPS = 10


class Transformed(Dataset[Any]):
    """Images that were transformed before."""

    def __init__(self, images: Tensor, labels: list[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 255, self.labels[index]


class Cropped(Dataset[Any]):
    """A window of each image, another one each time."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return CropAndRescale(seed=int(torch.randint(2**31, ())))(image[None])[0], label


def train(
    out: Path, images: Dataset[Any], names: Any, epochs: int, start: Classifier | None = None
) -> Classifier:
    """Return the network trained on these images without attacks, from random or other weights."""
    torch.manual_seed(0)
    model = load_classifier("small_resnet", None, class_names=names)
    if start is not None:
        model.load_state_dict(start.state_dict())
    settings = TrainingSettings(
        epochs=epochs,
        batch_size=64,
        learning_rate=0.1 if start is None else 0.03,
        precision="bfloat16",
    )
    adversarial_training(
        model, Augmented(images), settings, method="standard", out=out, progress=True
    )
    return model.eval().requires_grad_(False)


def accuracy(model: Any, x: Tensor, labels: Tensor) -> str:
    """Return the share that is classified right, with its interval."""
    with torch.no_grad():
        right = torch.cat([model(b).argmax(dim=1) for b in x.split(50)]) == labels
    found = bootstrap_interval(right.float())
    return f"{found.mean:.3f} [{found.low:.2f},{found.high:.2f}]"


def attacked(attack: PGD, x: Tensor, labels: Tensor) -> Tensor:
    """Return 8-bit images."""
    pairs = zip(x.split(50), labels.split(50), strict=True)
    return torch.cat([attack.perturb(b, y) for b, y in pairs]).mul(255).round() / 255


def main() -> None:
    """Train, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=12, help="on images as they are")
    parser.add_argument("--further", type=int, default=4, help="and then on transformed ones")
    options = parser.parse_args()
    images = LabelledImages(
        training_part(options.data, options.classes), (64, 64), classes=range(options.classes)
    )
    chosen, rest = held_out_split(images.labels, 0.1, 0)
    clean = Subset(images, chosen)
    x = torch.stack([image for image, _ in clean])
    labels = [int(label) for _, label in clean]
    bank = torch.stack([images[i][0] for i in rest])
    samples = validation_samples(options.data, options.classes)
    shown = torch.stack([s.image for s in samples]).mul(255).round() / 255
    truth = torch.tensor([s.label for s in samples])
    defences: dict[str, tuple[Transform, ...]] = {
        "bit depth 3": (BitDepth(3),),
        "jpeg 75": (JPEG(75),),
        "total variation": (TotalVariation(),),
        "quilting": (Quilting.fit(bank, patches=BANK),),
        f"{CROPS} crops": crop_ensemble(CROPS),
    }
    base = train(options.out / "as it is", clean, images.class_names, options.epochs)
    attacks = {"fgsm 4/255": FGSM(base, 4 / 255)} | {
        f"pgd {s}/255": PGD(base, s / 255, steps=10, early_stop=False) for s in STRENGTHS
    }
    seen = {"clean": shown} | {n: attacked(a, shown, truth) for n, a in attacks.items()}
    knowing = [PGD(base, s / 255, steps=10, early_stop=False) for s in STRENGTHS]
    columns = [*seen, *(f"knows, {s}/255" for s in STRENGTHS)]
    print(
        f"n={len(truth)}, {len(labels)} images to train on, {options.epochs} epochs, "
        f"{options.further} more on transformed images"
    )
    print(f"{'':34s}", *(f"{c:18s}" for c in columns))
    print(f"{'no transform':34s}", *(f"{accuracy(base, v, truth):18s}" for v in seen.values()))
    for name, transforms in defences.items():
        if len(transforms) > 1:
            transformed: Dataset[Any] = Cropped(clean)
        else:
            made = [transforms[0](b).mul(255).round().to(torch.uint8) for b in x.split(50)]
            transformed = Transformed(torch.cat(made), labels)
        own = train(options.out / name, transformed, images.class_names, options.further, base)
        for regime, model in (("tested on", base), ("trained and tested on", own)):
            behind = DefendedModel(model, transforms)
            cells = [accuracy(behind, v, truth) for v in seen.values()]
            for attack in knowing:
                through = adaptive_attack(
                    PGD(model, attack.epsilon, steps=10, early_stop=False), transforms
                )
                cells.append(accuracy(behind, attacked(through, shown, truth), truth))
            print(f"{name + ', ' + regime:34s}", *(f"{c:18s}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
