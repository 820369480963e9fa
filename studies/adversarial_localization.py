"""Is a localization network better than the maps of the classifier that it is trained against?

    python studies/adversarial_localization.py train DATA OUT [--variants 'a;b'] [--seeds 0,1,2]
    python studies/adversarial_localization.py table DATA OUT
    python studies/adversarial_localization.py necessity DATA OUT [--plot FILE]
    python studies/adversarial_localization.py times DATA OUT

DATA is Tiny ImageNet, folder or archive. Networks are trained on its training part, of which a
tenth is held out to look at on the way; nothing is trained or chosen on its validation part but
the thresholds, each half of which is scored with those of the other half.

`train`: for each seed the small classifier on clean images, and for each variant of VARIANTS a
localization network that starts from the classifier; "taught the boxes" is the same corruption
network trained with the boxes of the training part, which nothing else sees: about the most that
can be hoped for. Started again with the same arguments it goes on.

`table`: metric 1 (the box overlaps the object's by more than half) and metric 2 (the class is right
too) of every row of the poster's table, and of the variants; mean and deviation over the seeds. Of
each method also blurred maps are tried, on the other half. `necessity`: what becomes of the masks
where fewer of the classifier's layers are trained; whether they fool others too is asked of the
classifiers of the other seeds. `times`: milliseconds an image.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerGradCam, Saliency
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset
from torchvision.transforms.functional import gaussian_blur

from captum_robust.attr import AdversarialLocalization
from captum_robust.catalog.relevance import RelevancePropagation
from captum_robust.data import LocalizationDataset, Sample, load_dataset
from captum_robust.data.superpixels import cached_superpixels, superpixels
from captum_robust.metrics.functional import (
    alpha_grid,
    best_iou,
    bootstrap_interval,
    center_box,
    localization_error,
    split_folds,
    sweep_boxes,
    whole_image_box,
)
from captum_robust.models import Classifier, load_classifier, save_classifier
from captum_robust.nn import (
    CorruptionNetwork,
    LocalizationNetwork,
    save_localization_network,
)
from captum_robust.training import (
    AreaPenalty,
    Augmented,
    LabelledImages,
    LocalizationEvaluation,
    SegmentedImages,
    TrainingSettings,
    clean_training,
    fit,
    held_out_split,
    localization_training,
)
from captum_robust.training.localization_evaluation import total_variation
from captum_robust.training.loop import Batch

SIZE = (64, 64)
BATCH = 50
FAMILIES = ("value", "mean", "energy")
BLURS = (0, 2, 4, 8)
"""Standard deviations in pixels."""
AREAS = tuple(i / 20 for i in range(4, 21))
"""Of the centre box whose area is chosen on the other half."""
CLASSIFIER = "simple_convnet"
OURS = "ours"
TAUGHT = "taught the boxes"
VARIANTS: dict[str, dict[str, Any]] = {
    OURS: {},
    TAUGHT: {"superpixels": False},
    "no super-pixels": {"superpixels": False},
    "literal Gumbel": {"literal": True},
    "squared loss": {"form": "squared"},
    "literal loss": {"form": "literal"},
    "half clean": {"clean_share": 0.5},
    "constant weight": {"area": AreaPenalty(2.5, 1.5, 0.3, target=None, power=1)},
    # Half of the images masked, so that the layers that train see masks enough to learn from.
    **{
        f"pixels, {n} layers": {"superpixels": False, "clean_share": 0.5, "trainable_layers": n}
        for n in range(5)
    },
}
NECESSITY = [name for name in VARIANTS if name.startswith("pixels")]


class Part(LocalizationDataset):
    """Some samples of another data set."""

    kind = "part"

    def __init__(self, whole: LocalizationDataset, positions: Sequence[int]) -> None:
        self.whole, self.positions = whole, list(positions)
        self.root, self.class_names = whole.root, whole.class_names
        self.ids = [whole.ids[p] for p in self.positions]

    def _load(self, index: int) -> Sample:
        return self.whole[self.positions[index]]


def images_of(path: Path, split: str, classes: int) -> LabelledImages:
    """The images of the first classes."""
    whole = load_dataset("tiny-imagenet", path, split=split, labels="wnids")
    if split == "train" and classes < len(whole.class_names):
        # Ids begin with the WordNet id: only one image of each class is read to find its number.
        first: dict[str, int] = {}
        for position, name in enumerate(whole.ids):
            first.setdefault(name.split("_")[0], position)
        wanted = {wnid for wnid, p in first.items() if (whole[p].label or 0) < classes}
        whole = Part(whole, [p for p, name in enumerate(whole.ids) if name.split("_")[0] in wanted])
    return LabelledImages(whole, SIZE, classes=range(classes))


def segments_of(images: LabelledImages, out: Path, part: str) -> Tensor:
    """The super-pixels, kept in the folder of the runs."""
    file = out / f"{part}-{len(images.class_names)}.superpixels.safetensors"
    return cached_superpixels(images, file, progress=True)


def folder_of(out: Path, seed: int, name: str) -> Path:
    """Where a run is."""
    return out / f"seed{seed}" / name.replace(" ", "_").replace(",", "")


def settings_of(options: argparse.Namespace, seed: int, **changes: Any) -> TrainingSettings:
    """Of a run."""
    given: dict[str, Any] = {
        "epochs": options.epochs,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "precision": "bfloat16",
        "seed": seed,
        "device": options.device,
    }
    return TrainingSettings(**{**given, **changes})


def classifier_of(out: Path, seed: int) -> Classifier:
    """What the training on clean images left."""
    return load_classifier(CLASSIFIER, folder_of(out, seed, CLASSIFIER) / "model.safetensors")


def run_train(options: argparse.Namespace) -> None:
    """Train what is not trained yet."""
    images = images_of(options.data, "train", options.classes)
    shown = SegmentedImages(images, segments_of(images, options.out, "train"))
    for seed in options.seeds:
        training, held_out = held_out_split(images.labels, 0.1, seed)
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = [held_out[i] for i in order[:1000]]
        torch.manual_seed(seed)
        model = load_classifier(CLASSIFIER, None, class_names=images.class_names)
        folder = folder_of(options.out, seed, CLASSIFIER)
        result = clean_training(
            model,
            Augmented(Subset(images, training)),
            settings_of(
                options,
                seed,
                epochs=options.pretraining_epochs,
                learning_rate=2e-3,
                weight_decay=1e-3,
            ),
            held_out=Subset(images, held_out),
            out=folder,
            progress=True,
        )
        save_classifier(model, folder / "model.safetensors")
        accuracy = result.evaluations[-1]["clean_accuracy"]
        print(f"seed {seed}, {CLASSIFIER}: held out, accuracy {accuracy:.3f}", flush=True)
        for variant in options.variants:
            train_variant(options, seed, variant, shown, training, held_out)


def train_variant(
    options: argparse.Namespace,
    seed: int,
    variant: str,
    shown: SegmentedImages,
    training: list[int],
    held_out: list[int],
) -> None:
    """Train one localization network from the classifier of its seed."""
    torch.manual_seed(seed)
    network = LocalizationNetwork(CorruptionNetwork(width=16), classifier_of(options.out, seed))
    network.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    images = shown.dataset
    folder = folder_of(options.out, seed, variant)
    if variant == TAUGHT:
        taught = SegmentedImages(images, filled_boxes(images.boxes))  # type: ignore[attr-defined]
        fit(
            network.corruption,
            Augmented(Subset(taught, training)),
            box_loss,
            settings_of(options, seed, learning_rate=2e-3),
            out=folder,
            progress=True,
        )
        save_localization_network(network, folder / "localization.safetensors")
        return
    changes = {"superpixels": True, **VARIANTS[variant]}
    boxes = [images.boxes[i] for i in held_out]  # type: ignore[attr-defined]
    evaluation = LocalizationEvaluation(
        network, Subset(shown, held_out), boxes, changes["superpixels"]
    )
    began = time.perf_counter()
    result = localization_training(
        network,
        Augmented(Subset(shown, training)),
        settings_of(options, seed),
        validation=evaluation,
        out=folder,
        progress=True,
        **changes,
    )
    save_localization_network(network, folder / "localization.safetensors")
    last = ", ".join(f"{k} {v:.3f}" for k, v in result.evaluations[-1].items() if k != "step")
    restarts = max(int(row.get("restarts", 0)) for row in result.rows)
    print(
        f"seed {seed}, {variant}: {result.steps} steps, from {result.resumed_from}, "
        f"{time.perf_counter() - began:.0f} s, {restarts} restarts; held out, {last}",
        flush=True,
    )


def filled_boxes(boxes: Sequence[Tensor]) -> Tensor:
    """N×H×W: 1 in the boxes of an image, 0 around them."""
    maps = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
    for of_image, own in zip(maps, boxes, strict=True):
        for left, top, right, bottom in own.round().int().tolist():
            of_image[top:bottom, left:right] = 1
    return maps


def box_loss(corruption: torch.nn.Module, batch: Batch, _: int) -> Tensor:
    """Cross-entropy of each pixel."""
    images, inside, _labels = batch
    return F.binary_cross_entropy_with_logits(corruption(images)[:, 0], inside.float())


@dataclass
class Validation:
    """The validation images, once."""

    x: Tensor
    labels: Tensor
    boxes: list[Tensor]
    segments: Tensor
    folds: Tensor
    ids: list[str]

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Validation":
        """Of the options' data set."""
        images = images_of(options.data, "val", options.classes)
        return cls(
            torch.stack([images[i][0] for i in range(len(images))]),
            torch.tensor(images.labels),
            images.boxes,
            segments_of(images, options.out, "val").long(),
            split_folds(images.ids),
            images.ids,
        )

    def in_parts(self, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """What the call gives for images, labels and segments, batch after batch."""
        parts = (t.split(BATCH) for t in (self.x, self.labels, self.segments))
        return torch.cat([call(*part) for part in zip(*parts, strict=True)])


def predicted(model: Classifier, x: Tensor) -> Tensor:
    """The classes with the highest scores."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in x.split(BATCH)])


def cam_maps(model: Classifier, found: Validation) -> Tensor:
    """Class activation maps of the labels, N×H×W: of this network Grad-CAM is the same map."""
    cam = LayerGradCam(model, model.cam_layer)
    maps = found.in_parts(lambda x, y, _: cam.attribute(x, y).detach())
    return F.interpolate(maps, SIZE, mode="bilinear", align_corners=False)[:, 0]


def gradient_maps(model: Classifier, found: Validation) -> Tensor:
    """Simonyan's: the largest absolute gradient over the channels, N×H×W."""

    def explained(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        return Saliency(model).attribute(x.clone().requires_grad_(), y).amax(dim=1).detach()

    return found.in_parts(explained)


def lrp_maps(model: Classifier, found: Validation) -> Tensor:
    """The positive relevance, summed over the channels, N×H×W."""
    relevance = RelevancePropagation(model)
    return found.in_parts(lambda x, y, _: relevance(x, y).sum(dim=1).relu())


def own_maps(network: LocalizationNetwork, found: Validation, pooled: bool) -> Tensor:
    """Log-odds of removal, N×H×W, from the least of each image on.

    The probabilities are close to 0 or 1 for most pixels; their order is what a box is made of.
    """
    odds = torch.logit(probabilities(network, found, pooled), eps=1e-6)
    return odds - odds.amin(dim=(1, 2), keepdim=True)


def probabilities(network: LocalizationNetwork, found: Validation, pooled: bool) -> Tensor:
    """Of removal, N×H×W."""
    with torch.no_grad():
        return found.in_parts(lambda x, _, s: network(x, s if pooled else None)[:, 0])


def boxes_of(maps: Tensor) -> dict[str, Tensor]:
    """Boxes N×A×4 for each family of thresholds and each blur."""
    swept = {}
    for blur in BLURS:
        shown = maps if blur == 0 else gaussian_blur(maps[:, None], 6 * blur + 1, blur)[:, 0]
        for family, boxes in sweep_boxes(shown, FAMILIES).items():
            swept[f"{family}, blur {blur}"] = boxes
    return swept


def correct_boxes(maps: Tensor, found: Validation) -> Tensor:
    """N, at the threshold, family and blur that are best for the other half."""
    ious = {name: best_iou(boxes, found.boxes) for name, boxes in boxes_of(maps).items()}
    grids = {name: alpha_grid(name.split(",")[0]) for name in ious}
    return localization_error(ious, alphas=grids, folds=found.folds).correct


def table_of_seed(options: argparse.Namespace, seed: int, found: Validation) -> dict[str, Any]:
    """Of each row N correct boxes and N correct classes."""
    model = classifier_of(options.out, seed)
    right = predicted(model, found.x) == found.labels
    n = len(found.x)
    whole = best_iou(whole_image_box(SIZE).expand(n, 1, 4), found.boxes)[:, 0] > 0.5
    half = best_iou(center_box(SIZE).expand(n, 1, 4), found.boxes)[:, 0] > 0.5
    centre = torch.stack([center_box(SIZE, area) for area in AREAS])
    ious = best_iou(centre.expand(n, -1, 4), found.boxes)
    tuned = localization_error({"value": ious}, alphas={"value": AREAS}, folds=found.folds).correct
    rows = {
        "max image box": (whole, right),
        "centre box, half the area": (half, right),
        "centre box, area chosen": (tuned, right),
        "backprop": (correct_boxes(gradient_maps(model, found), found), right),
        "LRP": (correct_boxes(lrp_maps(model, found), found), right),
        "CAM": (correct_boxes(cam_maps(model, found), found), right),
    }
    for variant in VARIANTS:
        file = folder_of(options.out, seed, variant) / "localization.safetensors"
        if not file.is_file():
            continue
        network = AdversarialLocalization.from_file(file, model=model).network
        own = network.classifier
        own_right = predicted(own, found.x) == found.labels
        pooled = VARIANTS[variant].get("superpixels", True)
        if variant == OURS:
            rows["CAM of our classifier"] = (correct_boxes(cam_maps(own, found), found), own_right)
        rows[variant] = (correct_boxes(own_maps(network, found, pooled), found), own_right)
        if pooled:
            maps = own_maps(network, found, False)
            rows[f"{variant}, not pooled"] = (correct_boxes(maps, found), own_right)
    return rows


def shown(values: Sequence[float]) -> str:
    """Mean and deviation in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):6.1f} ± {100 * deviation:3.1f}"


def run_table(options: argparse.Namespace) -> None:
    """Print it."""
    found = Validation.of(options)
    seeds = [
        seed
        for seed in options.seeds
        if (folder_of(options.out, seed, CLASSIFIER) / "model.safetensors").is_file()
    ]
    tables = [table_of_seed(options, seed, found) for seed in seeds]
    print(f"{len(found.x)} validation images of {options.classes} classes, seeds {seeds}")
    print(f"  {'':28}{'metric 1':>14}{'metric 2':>14}   seeds; metric 1 of the first, 95 %")
    names = list(dict.fromkeys(name for table in tables for name in table))
    for name in names:
        of_seeds = [table[name] for table in tables if name in table]
        first = [boxes.double().mean().item() for boxes, _ in of_seeds]
        second = [(boxes & right).double().mean().item() for boxes, right in of_seeds]
        interval = bootstrap_interval(of_seeds[0][0])
        print(
            f"  {name:28}{shown(first):>14}{shown(second):>14}   {len(of_seeds)}; "
            f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
        )
    with_ours = [table for table in tables if OURS in table]
    for other in ("CAM", "CAM of our classifier", "max image box", "centre box, area chosen"):
        gains = []
        for metric in (1, 2):
            pairs = [(table[OURS], table[other]) for table in with_ours]
            gains.append(
                [
                    float(
                        (a[0] & (a[1] | (metric == 1))).double().mean()
                        - (b[0] & (b[1] | (metric == 1))).double().mean()
                    )
                    for a, b in pairs
                ]
            )
        if with_ours:
            print(f"  ours - {other}: metric 1 {shown(gains[0])}, metric 2 {shown(gains[1])}")


def run_necessity(options: argparse.Namespace) -> None:
    """Print, and draw, what the masks are like where fewer layers are trained."""
    found = Validation.of(options)
    print("masks of pixels, means over the validation images; mean ± deviation over the seeds")
    print(
        "  fooled: of the images that a classifier sees right clean, those seen wrong without the"
    )
    print("  mask's pixels; another image's: without those of the next image's mask")
    columns = ("mask", "variation", "own fooled", "others fooled", "another image's")
    print("  layers " + "".join(f"{name:>18}" for name in columns) + f"{'metric 1':>18}")
    points: dict[int, list[list[float]]] = {}
    for number, variant in enumerate(NECESSITY):
        for seed in options.seeds:
            file = folder_of(options.out, seed, variant) / "localization.safetensors"
            if file.is_file():
                points.setdefault(number, []).append(artefacts(options, seed, file, found))
        if number in points:
            of_layers = list(zip(*points[number], strict=True))
            print(f"  {number:6} " + "".join(f"{shown(values):>18}" for values in of_layers))
    if options.plot is not None:
        draw(points, options.plot)


def artefacts(options: argparse.Namespace, seed: int, file: Path, found: Validation) -> list[float]:
    """Mean mask, its variation, and how much it fools: the numbers of a row."""
    clean = classifier_of(options.out, seed)
    files = sorted(options.out.glob(f"seed*/{CLASSIFIER}/model.safetensors"))
    own = folder_of(options.out, seed, CLASSIFIER) / "model.safetensors"
    others = [load_classifier(CLASSIFIER, other) for other in files if other != own]
    if not others:
        raise SystemExit("necessity: train the classifier of another seed first")
    network = AdversarialLocalization.from_file(file, model=clean).network
    maps = probabilities(network, found, pooled=False)[:, None]
    masks = (maps > 0.5).float()
    removed = network.remove(found.x, masks)
    moved = network.remove(found.x, masks.roll(1, dims=0))

    def fooled(model: Classifier, x: Tensor) -> float:
        right = predicted(model, found.x) == found.labels
        return float((predicted(model, x) != found.labels)[right].double().mean())

    return [
        float(maps.mean()),
        float(total_variation(maps).mean()),
        fooled(network.classifier, removed),
        statistics.mean(fooled(other, removed) for other in others),
        statistics.mean(fooled(other, moved) for other in others),
        float(correct_boxes(own_maps(network, found, False), found).double().mean()),
    ]


def draw(points: dict[int, list[list[float]]], file: Path) -> None:
    """The plot of the necessity experiment."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers = sorted(points)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, series in (
        (axes[0], {"total variation of the mask": 1, "mean of the mask": 0}),
        (axes[1], {"its own classifier": 2, "another classifier": 3, "another image's mask": 4}),
    ):
        for name, column in series.items():
            values = [[row[column] for row in points[n]] for n in layers]
            means = [statistics.mean(v) for v in values]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            axis.errorbar(layers, means, spread, marker="o", capsize=3, label=name)
        axis.set_xlabel("layers of the classifier that are trained")
        axis.set_xticks(layers)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    axes[1].set_ylim(0, 1)
    axes[1].set_ylabel("share fooled, of images seen right")
    figure.savefig(file, dpi=150)


def run_times(options: argparse.Namespace) -> None:
    """Milliseconds an image, the rows in turns; the poster's machine took 93."""
    names = [str(i) for i in range(options.classes)]
    model = load_classifier(CLASSIFIER, None, class_names=names)
    network = LocalizationNetwork(CorruptionNetwork(width=16), model).eval()
    cam = LayerGradCam(model, model.cam_layer)
    print("ms an image, median of 9 rounds in turns; the poster: 93 ms")
    for batch in (1, 50):
        x = torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(0))
        target = torch.zeros(batch, dtype=torch.long)
        maps = superpixels(x)
        rows: dict[str, Callable[[], object]] = {
            "classifier, one pass": lambda x=x: model(x),
            "probabilities of pixels": lambda x=x: network(x),
            "pooled over super-pixels": lambda x=x, s=maps: network(x, s),
            "super-pixels (SLIC)": lambda x=x: superpixels(x),
            "CAM": lambda x=x, t=target: cam.attribute(x, t),
        }
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for number in range(10):
            for name, call in rows.items():
                with torch.set_grad_enabled(name == "CAM"):
                    began = time.perf_counter()
                    call()
                    if number:
                        seconds[name].append(time.perf_counter() - began)
        print(f"batch of {batch}")
        passes = statistics.median(seconds["classifier, one pass"])
        for name, values in seconds.items():
            middle = statistics.median(values)
            print(f"  {name:28}{1000 * middle / batch:8.2f}{middle / passes:8.1f} passes")


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["train", "table", "necessity", "times"])
    parser.add_argument("data", type=Path, help="Tiny ImageNet, folder or archive")
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument(
        "--variants", default=OURS, help=f"separated by ;, of {'; '.join(VARIANTS)}"
    )
    parser.add_argument("--pretraining-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="necessity: where to draw it")
    parser.add_argument("--device", default="auto", help="auto or cpu")
    options = parser.parse_args()
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.variants = [name.strip() for name in options.variants.split(";")]
    for name in options.variants:
        if name not in VARIANTS:
            parser.error(f"no variant {name!r}; known: {', '.join(VARIANTS)}")
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads used; Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )
    stages = {
        "train": run_train,
        "table": run_table,
        "necessity": run_necessity,
        "times": run_times,
    }
    stages[options.stage](options)


if __name__ == "__main__":
    main()
