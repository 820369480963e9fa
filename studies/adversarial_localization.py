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

`table`: box accuracy (the box overlaps the object's by more than half), and with the class right
too, of every row of the poster's table and of the variants; mean and deviation over the seeds.
Blurred maps of each method are tried too, on the other half. `necessity`: what becomes of the masks
where fewer of the classifier's layers are trained; whether they fool others too is asked of the
classifiers of the other seeds. `times`: milliseconds an image.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import harness
import torch
from captum.attr import LayerGradCam, Saliency
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset
from torchvision.transforms.functional import gaussian_blur

from captum_robust.attr import AdversarialLocalization
from captum_robust.catalog.relevance import RelevancePropagation
from captum_robust.data.superpixels import cached_superpixels, superpixels
from captum_robust.metrics.functional import (
    best_iou,
    bootstrap_interval,
    center_box,
    localization_error,
    split_folds,
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
from captum_robust.training.schedule import Batch

SIZE = (64, 64)
BATCH = 50
BLURS = (0, 2, 4, 8)
"""Standard deviations in pixels."""
AREAS = tuple(i / 20 for i in range(4, 21))
"""The areas of the centre box, one of which is chosen on the other half."""
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


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained; the same for all stages."""

    classes: int = 100
    seeds: Annotated[tuple[int, ...], "separated by commas", harness.numbered] = (0, 1, 2)
    device: Annotated[str, "auto or cpu"] = "auto"


def images_of(path: Path, split: str, classes: int) -> LabelledImages:
    """Return the images of the first classes."""
    return LabelledImages(harness.tiny_imagenet(path, split, classes), SIZE, classes=range(classes))


def segments_of(images: LabelledImages, out: Path, part: str) -> Tensor:
    """Return the super-pixels, kept in the folder of the runs."""
    file = out / f"{part}-{len(images.class_names)}.superpixels.safetensors"
    return cached_superpixels(images, file, progress=True)


def network_file(out: Path, seed: int, variant: str) -> Path:
    """Return where a variant's localization network is."""
    return harness.folder_of(out, f"seed{seed}", variant) / "localization.safetensors"


def classifier_file(out: Path, seed: int) -> Path:
    """Return where the training on clean images leaves its classifier."""
    return harness.folder_of(out, f"seed{seed}", CLASSIFIER) / "model.safetensors"


def train(
    data: Path,
    out: Path,
    options: Options,
    *,
    variants: Annotated[tuple[str, ...], "separated by ;", harness.listed(VARIANTS, ";")] = (OURS,),
    pretraining_epochs: int = 20,
    epochs: int = 2,
) -> None:
    """Train what is not trained yet; started again with the same arguments it goes on."""
    images = images_of(data, "train", options.classes)
    segmented = SegmentedImages(images, segments_of(images, out, "train"))
    for seed in options.seeds:
        training, held_out = held_out_split(images.labels, 0.1, seed)
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = [held_out[i] for i in order[:1000]]
        settings = TrainingSettings(
            epochs=epochs,
            batch_size=64,
            learning_rate=1e-3,
            weight_decay=1e-4,
            precision="bfloat16",
            seed=seed,
            device=options.device,
        )
        torch.manual_seed(seed)
        model = load_classifier(CLASSIFIER, None, class_names=images.class_names)
        result = clean_training(
            model,
            Augmented(Subset(images, training)),
            replace(settings, epochs=pretraining_epochs, learning_rate=2e-3, weight_decay=1e-3),
            held_out=Subset(images, held_out),
            out=classifier_file(out, seed).parent,
            progress=True,
        )
        save_classifier(model, classifier_file(out, seed))
        accuracy = result.evaluations[-1]["clean_accuracy"]
        print(f"seed {seed}, {CLASSIFIER}: held out, accuracy {accuracy:.3f}", flush=True)
        for variant in variants:
            train_variant(out, settings, variant, segmented, training, held_out)


def train_variant(
    out: Path,
    settings: TrainingSettings,
    variant: str,
    segmented: SegmentedImages,
    training: list[int],
    held_out: list[int],
) -> None:
    """Train one localization network from the classifier of its seed."""
    seed, images = settings.seed, segmented.dataset
    torch.manual_seed(seed)
    model = load_classifier(CLASSIFIER, classifier_file(out, seed))
    network = LocalizationNetwork(CorruptionNetwork(width=16), model)
    network.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    kept = {"out": network_file(out, seed, variant).parent, "progress": True}
    if variant == TAUGHT:
        taught = Augmented(Subset(SegmentedImages(images, filled_boxes(images.boxes)), training))
        fit(network.corruption, taught, box_loss, replace(settings, learning_rate=2e-3), **kept)
        save_localization_network(network, network_file(out, seed, variant))
        return
    changes = {"superpixels": True, **VARIANTS[variant]}
    boxes = [images.boxes[i] for i in held_out]
    began = time.perf_counter()
    result = localization_training(
        network,
        Augmented(Subset(segmented, training)),
        settings,
        validation=LocalizationEvaluation(
            network, Subset(segmented, held_out), boxes, changes["superpixels"]
        ),
        **kept,
        **changes,
    )
    save_localization_network(network, network_file(out, seed, variant))
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


class Validation:
    """The validation images, once; maps N×H×W of them, and what their boxes are worth."""

    def __init__(self, data: Path, out: Path, classes: int) -> None:
        images = images_of(data, "val", classes)
        self.x = torch.stack([images[i][0] for i in range(len(images))])
        self.labels, self.boxes = torch.tensor(images.labels), images.boxes
        self.segments = segments_of(images, out, "val").long()
        self.folds = split_folds(images.ids)

    def right(self, model: Classifier) -> Tensor:
        """Return N, whether the class is right."""
        return harness.predicted(model, self.x, BATCH) == self.labels

    def cam(self, model: Classifier) -> Tensor:
        """Return class activation maps of the labels: of this network Grad-CAM is the same map."""
        return harness.grad_cams(model, self.x, self.labels, BATCH, signed=True)

    def gradient(self, model: Classifier) -> Tensor:
        """Return Simonyan's maps, the largest absolute gradient over the channels."""

        def explained(x: Tensor, y: Tensor) -> Tensor:
            return Saliency(model).attribute(x.clone().requires_grad_(), y).amax(dim=1).detach()

        return harness.in_batches(explained, self.x, self.labels, size=BATCH)

    def lrp(self, model: Classifier) -> Tensor:
        """Return the positive relevance, summed over the channels."""
        relevance = RelevancePropagation(model)

        def explained(x: Tensor, y: Tensor) -> Tensor:
            return relevance(x, y).sum(dim=1).relu()

        return harness.in_batches(explained, self.x, self.labels, size=BATCH)

    @torch.no_grad()
    def removal(self, network: LocalizationNetwork, pooled: bool) -> Tensor:
        """Return the probabilities of removal."""

        def masked(x: Tensor, segments: Tensor) -> Tensor:
            return network(x, segments if pooled else None)[:, 0]

        return harness.in_batches(masked, self.x, self.segments, size=BATCH)

    def correct(self, maps: Tensor) -> Tensor:
        """Return N, at the threshold, family and blur that are best for the other half."""
        blurred = {
            f"blur {b}": gaussian_blur(maps[:, None], 6 * b + 1, b)[:, 0] if b else maps
            for b in BLURS
        }
        return harness.tuned(blurred, self.boxes, folds=self.folds).correct

    def correct_removal(self, network: LocalizationNetwork, pooled: bool) -> Tensor:
        """Return the same of the log-odds of removal, from the least of each image on.

        The probabilities are close to 0 or 1 for most pixels; their order is what a box is made of.
        """
        odds = torch.logit(self.removal(network, pooled), eps=1e-6)
        return self.correct(odds - odds.amin(dim=(1, 2), keepdim=True))


def table_of_seed(out: Path, seed: int, val: Validation) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each row N correct boxes and N correct classes."""
    model = load_classifier(CLASSIFIER, classifier_file(out, seed))
    right = val.right(model)
    fixed = harness.fixed_boxes(SIZE, val.boxes)
    centre = torch.stack([center_box(SIZE, area) for area in AREAS])
    ious = best_iou(centre.expand(len(right), -1, 4), val.boxes)
    tuned = localization_error({"value": ious}, alphas={"value": AREAS}, folds=val.folds).correct
    rows = {
        "max image box": (fixed["whole image"] == 0, right),
        "centre box, half the area": (fixed["centre box"] == 0, right),
        "centre box, area chosen": (tuned, right),
        "backprop": (val.correct(val.gradient(model)), right),
        "LRP": (val.correct(val.lrp(model)), right),
        "CAM": (val.correct(val.cam(model)), right),
    }
    for variant in VARIANTS:
        file = network_file(out, seed, variant)
        if not file.is_file():
            continue
        network = AdversarialLocalization.from_file(file, model=model).network
        own_right = val.right(network.classifier)
        pooled = VARIANTS[variant].get("superpixels", True)
        if variant == OURS:
            cam = val.correct(val.cam(network.classifier))
            rows["CAM of our classifier"] = (cam, own_right)
        rows[variant] = (val.correct_removal(network, pooled), own_right)
        if pooled:
            rows[f"{variant}, not pooled"] = (val.correct_removal(network, False), own_right)
    return rows


def spread(values: Sequence[float]) -> str:
    """Return mean and deviation in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):6.1f} ± {100 * deviation:3.1f}"


def metrics_of(row: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the shares of correct boxes, and of correct boxes with the correct class."""
    boxes, right = row
    return boxes.double().mean().item(), (boxes & right).double().mean().item()


def table(data: Path, out: Path, options: Options) -> None:
    """Print both metrics of every row, mean and deviation over the seeds."""
    val = Validation(data, out, options.classes)
    seeds = [seed for seed in options.seeds if classifier_file(out, seed).is_file()]
    tables = [table_of_seed(out, seed, val) for seed in seeds]
    print(f"{len(val.x)} validation images of {options.classes} classes, seeds {seeds}")
    print(f"  {'':28}{'box':>14}{'box and class':>14}   seeds; box of the first, 95 %")
    for name in dict.fromkeys(name for rows in tables for name in rows):
        of_seeds = [rows[name] for rows in tables if name in rows]
        first, second = zip(*map(metrics_of, of_seeds), strict=True)
        interval = bootstrap_interval(of_seeds[0][0])
        print(
            f"  {name:28}{spread(first):>14}{spread(second):>14}   {len(of_seeds)}; "
            f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
        )
    with_ours = [rows for rows in tables if OURS in rows]
    for other in ("CAM", "CAM of our classifier", "max image box", "centre box, area chosen"):
        pairs = [(metrics_of(rows[OURS]), metrics_of(rows[other])) for rows in with_ours]
        if pairs:
            gains = [spread([a[i] - b[i] for a, b in pairs]) for i in (0, 1)]
            print(f"  ours - {other}: box {gains[0]}, box and class {gains[1]}")


def necessity(
    data: Path,
    out: Path,
    options: Options,
    *,
    plot: Annotated[Path | None, "where to draw it"] = None,
) -> None:
    """Print, and draw, what the masks are like where fewer layers are trained."""
    val = Validation(data, out, options.classes)
    print("masks of pixels, means over the validation images; mean ± deviation over the seeds")
    print("  fooled: of the images that a classifier sees right clean, those seen wrong without")
    print("  the mask's pixels; another image's: without those of the next image's mask")
    columns = ("mask", "variation", "own fooled", "others fooled", "another image's", "box")
    print("  layers " + "".join(f"{name:>18}" for name in columns))
    points: dict[int, list[list[float]]] = {}
    for number, variant in enumerate(NECESSITY):
        for seed in options.seeds:
            if (file := network_file(out, seed, variant)).is_file():
                points.setdefault(number, []).append(artefacts(out, seed, file, val))
        if number in points:
            of_layers = list(zip(*points[number], strict=True))
            print(f"  {number:6} " + "".join(f"{spread(values):>18}" for values in of_layers))
    if plot is not None:
        draw(points, plot)


def artefacts(out: Path, seed: int, file: Path, val: Validation) -> list[float]:
    """Return the mean mask, its variation, and how much it fools: the numbers of a row."""
    own = classifier_file(out, seed)
    files = sorted(out.glob(f"seed*/{CLASSIFIER}/model.safetensors"))
    others = [load_classifier(CLASSIFIER, other) for other in files if other != own]
    if not others:
        raise SystemExit("necessity: train the classifier of another seed first")
    model = load_classifier(CLASSIFIER, own)
    network = AdversarialLocalization.from_file(file, model=model).network
    maps = val.removal(network, pooled=False)[:, None]
    masks = (maps > 0.5).float()
    removed = network.remove(val.x, masks)
    moved = network.remove(val.x, masks.roll(1, dims=0))

    def fooled(model: Classifier, x: Tensor) -> float:
        wrong = harness.predicted(model, x, BATCH) != val.labels
        return float(wrong[val.right(model)].double().mean())

    return [
        float(maps.mean()),
        float(total_variation(maps).mean()),
        fooled(network.classifier, removed),
        statistics.mean(fooled(other, removed) for other in others),
        statistics.mean(fooled(other, moved) for other in others),
        float(val.correct_removal(network, False).double().mean()),
    ]


def draw(points: dict[int, list[list[float]]], file: Path) -> None:
    """Draw the plot of the necessity experiment."""
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


def times(data: Path, out: Path, options: Options) -> None:  # noqa: ARG001
    """Print milliseconds an image, the rows in turns; the poster's machine took 93."""
    names = [str(i) for i in range(options.classes)]
    model = load_classifier(CLASSIFIER, None, class_names=names)
    network = LocalizationNetwork(CorruptionNetwork(width=16), model).eval()
    cam = LayerGradCam(model, model.cam_layer)
    without_gradients = torch.no_grad()
    print("ms an image, median of 9 rounds in turns; the poster: 93 ms")
    for batch in (1, 50):
        x = torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(0))
        target = torch.zeros(batch, dtype=torch.long)
        calls: dict[str, Callable[[], object]] = {
            "classifier, one pass": without_gradients(partial(model, x)),
            "probabilities of pixels": without_gradients(partial(network, x)),
            "pooled over super-pixels": without_gradients(partial(network, x, superpixels(x))),
            "super-pixels (SLIC)": partial(superpixels, x),
            "CAM": partial(cam.attribute, x, target),
        }
        laps = harness.race(calls, 9)
        print(f"batch of {batch}")
        for name, own in laps.items():
            passes = own.median / laps["classifier, one pass"].median
            print(f"  {name:28}{1000 * own.median / batch:8.2f}{passes:8.1f} passes")


if __name__ == "__main__":
    harness.study(__doc__, train, table, necessity, times)
