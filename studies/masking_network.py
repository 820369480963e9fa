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

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from captum_robust.attr import RealTimeMasking
from captum_robust.data import load_dataset, resize
from captum_robust.metrics.functional import (
    STRATEGIES,
    best_iou,
    bootstrap_difference,
    bootstrap_interval,
    saliency_metric,
    split_folds,
    sweep_boxes,
)
from captum_robust.models import Classifier, load_classifier
from captum_robust.nn import (
    CodeObjective,
    EvidenceRemoval,
    MaskingNetwork,
    PaperObjective,
    load_masking_network,
    save_masking_network,
)
from captum_robust.training import (
    CroppedImages,
    TrainingSettings,
    Unlabelled,
    held_out_split,
    masking_training,
)

BATCH = 16
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


def classifier() -> Classifier:
    """Laid out as convolutions of half precision are fastest with."""
    model = load_classifier("efficientnet_lite0").requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def photographs(path: Path, limit: int | None) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Images N×3×224×224, labels N, boxes, and the half that each image is in."""
    dataset = load_dataset("imagenet", path)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    samples = [resize(dataset[i], SIZE) for i in range(count)]
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([-1 if s.label is None else s.label for s in samples])
    return images, labels, [s.boxes for s in samples], split_folds(list(dataset.ids)[:count])


def masks_of(network: MaskingNetwork, images: Tensor, classes: Tensor) -> Tensor:
    """N×H×W."""
    method = RealTimeMasking(network)
    parts = zip(images.split(BATCH), classes.split(BATCH), strict=True)
    return torch.cat([method.attribute(x, c)[:, 0] for x, c in parts])


def failures_of(masks: Tensor, boxes: list[Tensor], half: Tensor) -> Tensor:
    """N, whether the box is wrong, at the threshold that is best for the other half."""
    swept = [sweep_boxes(m, STRATEGIES) for m in masks.split(100)]
    predicted = torch.cat([torch.cat([s[name] for name in STRATEGIES], dim=1) for s in swept])
    wrong = (best_iou(predicted, boxes) <= 0.5).float()
    failures = torch.zeros(len(masks))
    for side in (0, 1):
        best = wrong[half != side].mean(dim=0).argmin()
        failures[half == side] = wrong[half == side][:, best]
    return failures


def shown(values: Tensor) -> str:
    """A mean with its 95 % interval."""
    found = bootstrap_interval(values.double())
    return f"{values.mean():6.3f} [{found.low:6.3f}, {found.high:6.3f}]"


def difference(a: Tensor, b: Tensor) -> str:
    """The mean of paired differences with its 95 % interval."""
    found = bootstrap_difference(a.double(), b.double())
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def another(classes: Tensor, count: int, seed: int = 0) -> Tensor:
    """A class of each image drawn among the others."""
    generator = torch.Generator().manual_seed(seed)
    return (classes + torch.randint(1, count, classes.shape, generator=generator)) % count


def side_by_side(network: MaskingNetwork, images: Tensor, labels: Tensor) -> None:
    """Whether the mask goes where the class is."""
    with torch.no_grad():
        predicted = torch.cat([network.encoder(x).argmax(dim=1) for x in images.split(BATCH)])
    right = (predicted == labels).nonzero()[:, 0]
    first, second = right[: len(right) // 2], right[len(right) // 2 : len(right) // 2 * 2]
    different = labels[first] != labels[second]
    first, second = first[different], second[different]
    pairs = torch.cat([images[first], images[second]], dim=3)  # N×3×224×448
    a, b = labels[first], labels[second]
    none = another(a, 1000)
    none = torch.where(none == b, (none + 1) % 1000, none)
    of_a, of_b, of_none = (masks_of(network, pairs, c) for c in (a, b, none))
    middle = SIZE[1]
    share = torch.cat(
        [
            of_a[..., :middle].sum(dim=(1, 2)) / of_a.sum(dim=(1, 2)),
            of_b[..., middle:].sum(dim=(1, 2)) / of_b.sum(dim=(1, 2)),
        ]
    )
    print(f"two photographs side by side, {len(pairs)} pairs")
    print(f"  share of the mask on the half of its class {shown(share)}  (ignored selector: .5)")
    print(f"  more than half of it there                 {shown((share > 0.5).float())}")
    own = torch.cat([of_a[..., :middle], of_b[..., middle:]]).mean(dim=(1, 2))
    other = torch.cat([of_a[..., middle:], of_b[..., :middle]]).mean(dim=(1, 2))
    print(f"  mean of the mask on the half of its class  {shown(own)}")
    print(f"  on the other half                          {shown(other)}")
    print(f"  of a class in neither, anywhere            {shown(of_none.mean(dim=(1, 2)))}")


def selectors(
    network: MaskingNetwork, images: Tensor, labels: Tensor, boxes: list[Tensor], half: Tensor
) -> None:
    """What a wrong class does to the mask and its box."""
    wrong = another(labels, 1000)
    masks, others = masks_of(network, images, labels), masks_of(network, images, wrong)
    fails, fails_other = failures_of(masks, boxes, half), failures_of(others, boxes, half)
    print(f"single photographs, n={len(images)}")
    print(f"  mean mask, label        {shown(masks.mean(dim=(1, 2)))}")
    print(f"  mean mask, random class {shown(others.mean(dim=(1, 2)))}")
    print(f"  localization error, label        {shown(fails)}")
    print(f"  localization error, random class {shown(fails_other)}")
    print(f"  difference {difference(fails_other, fails)}")


def run_classes(data: Path, file: Path | None, limit: int | None) -> None:
    """Print both."""
    model = classifier()
    if file is None:
        network = RealTimeMasking.from_pretrained("efficientnet_lite0", model=model).network
    else:
        network = load_masking_network(file, model)
    network.to(memory_format=torch.channels_last)
    images, labels, boxes, half = photographs(data, limit)
    side_by_side(network, images, labels)
    selectors(network, images, labels, boxes, half)


def run_train(images: Path, out: Path, names: Sequence[str], epochs: int) -> None:
    """One network a variant."""
    model = classifier()
    usable = CroppedImages(load_dataset("folder", images), SIZE)
    training, _ = held_out_split([0] * len(usable), 0.1, seed=0)
    for name in names:
        torch.manual_seed(0)
        network = MaskingNetwork(model, learned_classes=name == LEARNED)
        network.to(memory_format=torch.channels_last)
        folder = out / name.replace(" ", "_").replace(",", "")
        masking_training(
            network,
            Unlabelled(Subset(usable, training)),
            TrainingSettings(
                epochs=epochs,
                batch_size=BATCH,
                learning_rate=3e-3,
                weight_decay=1e-4,
                precision="bfloat16",
            ),
            out=folder,
            progress=True,
            **VARIANTS[name],
        )
        save_masking_network(network, folder / "masking.safetensors", half=True)
    print(f"{len(names)} networks, {len(training)} images, {epochs} epochs")


def run_table(data: Path, out: Path, limit: int | None) -> None:
    """What each variant is worth."""
    model = classifier()
    images, labels, boxes, half = photographs(data, limit)
    print(f"n={len(images)}, true class; differences to the first row, 95 % intervals")
    print(f"{'':28s}{'saliency metric':>28s}{'localization error':>30s}  mean mask: label, random")
    first: tuple[Tensor, Tensor] | None = None
    for name in VARIANTS:
        file = out / name.replace(" ", "_").replace(",", "") / "masking.safetensors"
        if not file.is_file():
            continue
        network = load_masking_network(file, model).to(memory_format=torch.channels_last)
        masks = masks_of(network, images, labels)
        others = masks_of(network, images, another(labels, 1000))
        metric = saliency_metric(model, images, masks, labels, batch_size=BATCH).metric
        fails = failures_of(masks, boxes, half)
        means = f"{masks.mean():.3f}  {others.mean():.3f}"
        print(f"{name:28s}{shown(metric):>28s}{shown(fails):>30s}  {means}")
        if first is None:
            first = metric, fails
        else:
            line = f"{difference(metric, first[0]):>28s}{difference(fails, first[1]):>30s}"
            print(f"{'':28s}{line}")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["classes", "train", "table"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--network", type=Path, help="classes: a file, else the package's")
    parser.add_argument("--limit", type=int, help="only the first so many images of DATA")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    arguments = parser.parse_args()
    if arguments.stage == "classes":
        run_classes(arguments.paths[0], arguments.network, arguments.limit)
    elif arguments.stage == "train":
        names = [n for n in VARIANTS if n in arguments.variants.split(",")]
        run_train(*arguments.paths, names, arguments.epochs)
    else:
        run_table(*arguments.paths, arguments.limit)


if __name__ == "__main__":
    main()
