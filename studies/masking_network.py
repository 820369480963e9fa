"""Does a mask follow the class that is asked for, and what does each part of the training bring?

    python studies/masking_network.py classes DATA [--network FILE]
    python studies/masking_network.py train IMAGES OUT [--epochs N] [--variants a,b]
    python studies/masking_network.py table DATA OUT

EfficientNet-Lite0; DATA is an ImageNet validation folder (Kaggle's layout), IMAGES a folder of
training images, of which a tenth is held out; nothing is trained or chosen on DATA.

`classes`: pairs of photographs of different classes side by side, both of which the classifier
gets right alone: the share of the mask's mass on the half of the class that is asked for (a
selector that is ignored gives .5), and the mean of the mask for the right class, the other one and
one that is in neither. Then, over single photographs, the localization error of the mask of the
label and of the mask of a class drawn at random, thresholds chosen on the other half.

`train` trains a network for every variant of VARIANTS, alike but for what the variant leaves out,
for as many epochs; started again it goes on. `table` prints their saliency metric and localization
error on DATA, and how the mask of a wrong class compares.
"""

from pathlib import Path
from typing import Annotated, Any

import harness
import torch
from harness import difference, mean
from torch import Tensor
from torch.utils.data import Subset

from captum_robust.attr import RealTimeMasking
from captum_robust.data import load_dataset
from captum_robust.metrics.functional import saliency_metric
from captum_robust.nn import (
    CodeObjective,
    EvidenceRemoval,
    MaskingNetwork,
    PaperObjective,
    save_masking_network,
)
from captum_robust.training import (
    CroppedImages,
    TrainingSettings,
    Unlabelled,
    held_out_split,
    masking_training,
)

SIZE = (224, 224)
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "no fake classes": {"fake_probability": 0.0},
    "fakes swapped": {"fakes": "swapped"},
    "blur only": {"removal": EvidenceRemoval("blur")},
    "color only": {"removal": EvidenceRemoval("color")},
    "no total variation": {"objective": PaperObjective(total_variation=0.0)},
    "objective of the code": {"objective": CodeObjective(), "fakes": "swapped"},
    "no warm-up": {"warm_up_steps": 0},
    "class vectors learned": {},
}
LEARNED = "class vectors learned"
"""Anew, where all others have those of the classifier's last layer, frozen."""


Limit = Annotated[int | None, "only the first so many images of DATA"]


def masks_of(network: MaskingNetwork, images: Tensor, classes: Tensor) -> Tensor:
    """Return the masks of the classes, N×H×W."""
    method = RealTimeMasking(network)
    return harness.in_batches(lambda x, c: method.attribute(x, c)[:, 0], images, classes)


def another(classes: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return a class for each image, drawn among the others."""
    generator = torch.Generator().manual_seed(seed)
    return (classes + torch.randint(1, count, classes.shape, generator=generator)) % count


def side_by_side(network: MaskingNetwork, images: Tensor, labels: Tensor) -> None:
    """Print whether the mask goes where the class is."""
    right = (harness.predicted(network.encoder, images) == labels).nonzero()[:, 0]
    first, second = right[: len(right) // 2], right[len(right) // 2 : len(right) // 2 * 2]
    different = labels[first] != labels[second]
    first, second = first[different], second[different]
    pairs = torch.cat([images[first], images[second]], dim=3)  # N×3×224×448
    a, b = labels[first], labels[second]
    none = another(a, 1000)
    none = torch.where(none == b, (none + 1) % 1000, none)
    of_a, of_b, of_none = (masks_of(network, pairs, c) for c in (a, b, none))
    own = torch.cat([of_a[..., : SIZE[1]], of_b[..., SIZE[1] :]])
    other = torch.cat([of_a[..., SIZE[1] :], of_b[..., : SIZE[1]]])
    share = own.sum(dim=(1, 2)) / torch.cat([of_a, of_b]).sum(dim=(1, 2))
    print(f"two photographs side by side, {len(pairs)} pairs")
    print(f"  share of the mask on the half of its class {mean(share)}  (ignored selector: .5)")
    print(f"  more than half of it there                 {mean(share > 0.5)}")
    print(f"  mean of the mask on the half of its class  {mean(own.mean(dim=(1, 2)))}")
    print(f"  on the other half                          {mean(other.mean(dim=(1, 2)))}")
    print(f"  of a class in neither, anywhere            {mean(of_none.mean(dim=(1, 2)))}")


def classes(
    data: Path,
    *,
    network: Annotated[Path | None, "a file, else the package's"] = None,
    limit: Limit = None,
) -> None:
    """Print whether the mask follows the class that is asked for."""
    model = harness.classifier()
    masking = harness.masking_network(network, model).to(memory_format=torch.channels_last)
    shown = harness.photographs(data, limit)
    side_by_side(masking, shown.images, shown.labels)
    masks = masks_of(masking, shown.images, shown.labels)
    others = masks_of(masking, shown.images, another(shown.labels, 1000))
    fails, fails_other = (
        harness.failures(harness.overlaps(m, shown.boxes), shown.half) for m in (masks, others)
    )
    print(f"single photographs, n={len(shown)}")
    print(f"  mean mask, label        {mean(masks.mean(dim=(1, 2)))}")
    print(f"  mean mask, random class {mean(others.mean(dim=(1, 2)))}")
    print(f"  localization error, label        {mean(fails)}")
    print(f"  localization error, random class {mean(fails_other)}")
    print(f"  difference {difference(fails_other, fails)}")


def train(
    images: Path,
    out: Path,
    *,
    variants: Annotated[tuple[str, ...], "separated by commas", harness.listed(VARIANTS)] = tuple(
        VARIANTS
    ),
    epochs: int = 20,
) -> None:
    """Train one network a variant; started again it goes on."""
    model = harness.classifier()
    usable = CroppedImages(load_dataset("folder", images), SIZE)
    training, _ = held_out_split([0] * len(usable), 0.1, seed=0)
    settings = TrainingSettings(
        epochs=epochs,
        batch_size=harness.BATCH,
        learning_rate=3e-3,
        weight_decay=1e-4,
        precision="bfloat16",
    )
    for name in variants:
        torch.manual_seed(0)
        network = MaskingNetwork(model, learned_classes=name == LEARNED)
        network.to(memory_format=torch.channels_last)
        folder, shown = harness.folder_of(out, name), Unlabelled(Subset(usable, training))
        masking_training(network, shown, settings, out=folder, progress=True, **VARIANTS[name])
        save_masking_network(network, folder / "masking.safetensors", half=True)
    print(f"{len(variants)} networks, {len(training)} images, {epochs} epochs")


def table(data: Path, out: Path, *, limit: Limit = None) -> None:
    """Print what each variant is worth."""
    model = harness.classifier()
    shown = harness.photographs(data, limit)
    images, labels = shown.images, shown.labels
    print(f"n={len(shown)}, true class; differences to the first row, 95 % intervals")
    print(f"{'':28s}{'saliency metric':>28s}{'localization error':>30s}  mean mask: label, random")
    first: tuple[Tensor, Tensor] | None = None
    for name in VARIANTS:
        file = harness.folder_of(out, name) / "masking.safetensors"
        if not file.is_file():
            continue
        network = harness.masking_network(file, model).to(memory_format=torch.channels_last)
        masks = masks_of(network, images, labels)
        others = masks_of(network, images, another(labels, 1000))
        metric = saliency_metric(model, images, masks, labels, batch_size=harness.BATCH).metric
        fails = harness.failures(harness.overlaps(masks, shown.boxes), shown.half)
        means = f"{masks.mean():.3f}  {others.mean():.3f}"
        print(f"{name:28s}{mean(metric):>28s}{mean(fails):>30s}  {means}")
        if first is None:
            first = metric, fails
        else:
            line = f"{difference(metric, first[0]):>28s}{difference(fails, first[1]):>30s}"
            print(f"{'':28s}{line}")


if __name__ == "__main__":
    harness.study(__doc__, classes, train, table)
