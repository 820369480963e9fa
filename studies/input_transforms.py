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

from pathlib import Path
from typing import Annotated, Any

import harness
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from captum_robust.attacks import FGSM, PGD
from captum_robust.data import resize
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
from captum_robust.models import Classifier, load_classifier
from captum_robust.training import Augmented, LabelledImages, TrainingSettings, held_out_split

SIZE = (64, 64)
BATCH = 50
STRENGTHS = (2, 4, 8)
BANK = 50_000
CROPS = 10


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


def pgd(model: Classifier, strength: int) -> PGD:
    """Return an attack of ten steps, none of which is left out."""
    return PGD(model, strength / 255, steps=10, early_stop=False)


def input_transforms(
    *,
    data: Annotated[Path, "Tiny ImageNet, folder or archive"],
    out: Annotated[Path, "folder of the runs"],
    classes: int = 20,
    epochs: Annotated[int, "on images as they are"] = 12,
    further: Annotated[int, "epochs on transformed ones, after that"] = 4,
) -> None:
    """Train, attack, print."""
    images = LabelledImages(
        harness.tiny_imagenet(data, "train", classes), SIZE, classes=range(classes)
    )
    chosen, rest = held_out_split(images.labels, 0.1, 0)
    clean = Subset(images, chosen)
    x, labels = torch.stack([i for i, _ in clean]), [int(label) for _, label in clean]
    bank = torch.stack([images[i][0] for i in rest])
    held_out = harness.Photographs.of(
        [resize(s, SIZE) for s in harness.tiny_imagenet(data, "val", classes)]
    )
    truth = held_out.labels
    defences: dict[str, tuple[Transform, ...]] = {
        "bit depth 3": (BitDepth(3),),
        "jpeg 75": (JPEG(75),),
        "total variation": (TotalVariation(),),
        "quilting": (Quilting.fit(bank, patches=BANK),),
        f"{CROPS} crops": crop_ensemble(CROPS),
    }
    base = train(out / "as it is", clean, images.class_names, epochs)
    attacks = {"fgsm 4/255": FGSM(base, 4 / 255)} | {
        f"pgd {s}/255": pgd(base, s) for s in STRENGTHS
    }
    photos = harness.rounded(held_out.images)
    seen = {"clean": harness.to_bytes(photos)} | {
        name: harness.attacked(attack, photos, truth, BATCH) for name, attack in attacks.items()
    }

    def accuracy(model: Any, images: Tensor) -> str:
        return f"{harness.mean(harness.predicted(model, images, BATCH) == truth):20s}"

    columns = [*seen, *(f"knows, {s}/255" for s in STRENGTHS)]
    print(
        f"n={len(truth)}, {len(labels)} images to train on, {epochs} epochs, "
        f"{further} more on transformed images"
    )
    print(f"{'':40s}", *(f"{c:20s}" for c in columns))
    print(f"{'no transform':40s}", *(accuracy(base, v) for v in seen.values()))
    for name, transforms in defences.items():
        if len(transforms) > 1:
            transformed: Dataset[Any] = Cropped(clean)
        else:
            made = [
                harness.to_bytes(transforms[0](batch)) for (batch,) in harness.parts(x, size=BATCH)
            ]
            transformed = TensorDataset(torch.cat(made) / 255, torch.tensor(labels))
        own = train(out / name, transformed, images.class_names, further, base)
        for regime, model in (("tested on", base), ("trained and tested on", own)):
            behind = DefendedModel(model, transforms)
            cells = [accuracy(behind, v) for v in seen.values()]
            for strength in STRENGTHS:
                through = adaptive_attack(pgd(model, strength), transforms)
                cells.append(accuracy(behind, harness.attacked(through, photos, truth, BATCH)))
            print(f"{name + ', ' + regime:40s}", *cells, flush=True)


if __name__ == "__main__":
    harness.study(__doc__, input_transforms)
