"""The command ``captum-robust train localization``: parsing and printing only."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_robust._checks import unknown_name
from captum_robust.cli.model_options import published_weights
from captum_robust.cli.train_options import (
    BatchSize,
    CheckpointEvery,
    Epochs,
    LearningRate,
    Precision,
    Seed,
    TrainingDevice,
    Workers,
    is_first,
    names_of,
    open_images,
    say_resumed,
    say_unusable,
    settings_of,
    shuffled,
)

if TYPE_CHECKING:
    from torch import Tensor

    from captum_robust.models import Classifier
    from captum_robust.training import LabelledImages, TrainingResult, TrainingSettings

_CLASSIFIER = "classifier"
"""The trunk that is a copy of it."""


def localization(
    images: Annotated[
        Path,
        typer.Option(
            "--images",
            "--root",
            help="Folder with one sub-folder of images a class, or what --kind says.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run: localization.safetensors, log.jsonl, …")
    ] = Path("captum-robust-localization"),
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            "--dataset",
            help="folder, tiny-imagenet (its training part) or imagenet.",
        ),
    ] = "folder",
    model: Annotated[
        str,
        typer.Option(
            help="The classifier: simple_convnet or small_resnet (for 64 pixels), "
            "efficientnet_lite0, …1, …2, or a torchvision classification model."
        ),
    ] = "simple_convnet",
    weights: Annotated[
        str,
        typer.Option(
            help="Of the classifier: none for random ones, DEFAULT, a member of torchvision's "
            "weights enum, or a .safetensors file."
        ),
    ] = "none",
    pretraining_epochs: Annotated[
        int, typer.Option(help="Of the classifier alone, on clean images, before the rest.")
    ] = 20,
    pretraining_rate: Annotated[
        float, typer.Option(help="The highest learning rate of these epochs.")
    ] = 2e-3,
    width: Annotated[int, typer.Option(help="Channels of the corruption network.")] = 16,
    trunk: Annotated[
        str | None,
        typer.Option(
            help="What its features come from: a network as for --model, or classifier, a copy of "
            "that; else four scales of its own."
        ),
    ] = None,
    trunk_weights: Annotated[str, typer.Option(help="Of the trunk, as for --weights.")] = "none",
    train_trunk: Annotated[
        bool | None,
        typer.Option(
            "--train-trunk/--freeze-trunk",
            help="Whether it learns with the rest; else only where its weights are random.",
        ),
    ] = None,
    trunk_size: Annotated[
        int | None,
        typer.Option(help="Images are enlarged to this side for the trunk; else they are not."),
    ] = None,
    superpixels: Annotated[bool, typer.Option(help="Remove whole super-pixels, or pixels.")] = True,
    segments: Annotated[int, typer.Option(help="About so many super-pixels an image.")] = 100,
    superpixel_file: Annotated[
        Path | None,
        typer.Option(help="Where they are kept; else beside the images, or in --out."),
    ] = None,
    area: Annotated[float, typer.Option(help="Weight of the share that is removed.")] = 3.0,
    area_start: Annotated[
        float | None, typer.Option(help="The weight in the first step; else the same.")
    ] = None,
    area_rise: Annotated[
        float, typer.Option(help="Share of the steps in which it rises from the one to the other.")
    ] = 0.3,
    area_target: Annotated[
        float,
        typer.Option(help="Share to remove, which the weight then follows; 0: it does not."),
    ] = 0.5,
    area_gain: Annotated[float, typer.Option(help="How fast the weight follows the share.")] = 0.05,
    area_power: Annotated[
        float,
        typer.Option(help="Of the share of each image; 1 as in the paper, 2 evens the images out."),
    ] = 2.0,
    trainable_layers: Annotated[
        int | None,
        typer.Option(help="So many of the classifier's last layers are trained; else all of it."),
    ] = None,
    steps_of_classifier: Annotated[
        int, typer.Option(help="For each step of the corruption network.")
    ] = 1,
    clean_share: Annotated[
        float, typer.Option(help="Share of the images that the classifier sees as they are.")
    ] = 0.9,
    form: Annotated[
        str, typer.Option(help="Of the corruption network's loss: bounded, squared or literal.")
    ] = "bounded",
    literal: Annotated[
        bool, typer.Option(help="Draw masks by the paper's formula, not its correction.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; else the model's own.")
    ] = None,
    fit: Annotated[
        str, typer.Option(help="squash the whole image to the size, or crop its centre.")
    ] = "squash",
    classes: Annotated[
        int | None, typer.Option(help="Only the first so many classes of the data set.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the images that is not trained on, to measure with.")
    ] = 0.1,
    evaluation_images: Annotated[
        int, typer.Option(help="So many of them are measured, before, during and after.")
    ] = 512,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between two measurements; else each epoch.")
    ] = None,
    augment: Annotated[bool, typer.Option(help="Mirror and shift the images at random.")] = True,
    epochs: Epochs = 10,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    precision: Precision = "float32",
    checkpoint_every: CheckpointEvery = 60.0,
    half: Annotated[
        bool, typer.Option(help="Write localization.safetensors in half precision.")
    ] = False,
    workers: Workers = 0,
    seed: Seed = 0,
    device: TrainingDevice = "auto",
) -> None:
    """Train a network that removes objects against a classifier that learns to miss nothing.

    First the classifier alone, on clean images, then both. Started again with the same arguments,
    a stopped or killed run goes on in the phase where it was, and ends with the weights that it
    would have had. Boxes are used to measure only; images without any are trained on all the same.
    Under accelerate launch or torchrun (-m captum_robust train localization) the processes share
    each batch.
    """
    from torch.utils.data import Subset

    from captum_robust._checks import check_count
    from captum_robust._contexts import seeded
    from captum_robust._files import checksum
    from captum_robust.models import load_classifier
    from captum_robust.nn import CorruptionNetwork, LocalizationNetwork, save_localization_network
    from captum_robust.nn.removal_loss import FORMS
    from captum_robust.training import (
        AreaPenalty,
        Augmented,
        LabelledImages,
        LocalizationEvaluation,
        SegmentedImages,
        clean_training,
        held_out_split,
        localization_training,
    )

    # Before the images are read, which may take long.
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    penalty = AreaPenalty(area, area_start, area_rise, area_target or None, area_gain, area_power)
    check_count("pretraining_epochs", pretraining_epochs, 0)
    check_count("evaluation_images", evaluation_images, 0)
    is_random = published_weights(weights) is None and not pretraining_epochs
    trains = _trains_trunk(trunk, trunk_weights, train_trunk, is_random)
    settings = settings_of(locals())
    dataset = open_images(kind, images, out)
    names = names_of(dataset, images, classes)
    held_out_split([], held_out, seed)
    with seeded(seed, None):
        classifier = load_classifier(
            model, published_weights(weights), class_names=names, input_size=size
        )
        way_down = None if trunk is None else _trunk(trunk, trunk_weights, classifier, trunk_size)
        if way_down is not None:
            way_down.requires_grad_(trains)
        corruption = CorruptionNetwork(
            way_down, width=width, input_size=classifier.input_size, trunk_size=trunk_size
        )
        network = LocalizationNetwork(
            corruption, classifier, n_segments=segments if superpixels else None
        )
    start = checksum(network.state_dict().values())
    usable = LabelledImages(
        dataset, classifier.input_size, fit=fit, classes=range(len(names)), progress=is_first()
    )
    training, testing = held_out_split(usable.labels, held_out, seed)
    # Shuffled: the first of them are of all classes.
    testing = shuffled(testing, seed)[:evaluation_images]
    shown: Any = usable
    if superpixels:
        part = "-".join(["train", fit, *([] if classes is None else [f"{classes}classes"])])
        maps = _superpixels(usable, superpixel_file, images, out, segments, part)
        shown = SegmentedImages(usable, maps)
    boxes = [usable.boxes[i] for i in testing]
    evaluation = LocalizationEvaluation(network, Subset(shown, testing), boxes, superpixels)
    _say_images(usable, len(training), len(testing), evaluation.can_score)
    if is_first() and trunk is not None:
        typer.echo(f"trunk: {trunk}, {'trained with the rest' if trains else 'frozen'}")

    def augmented(part: Any) -> Any:
        return Augmented(part) if augment else part

    described = {
        "model": model,
        "weights": weights,
        "start_crc32": f"{start:08x}",
        "classes": names,
        "input_size": list(classifier.input_size),
        "augment": augment,
    }
    if pretraining_epochs:
        first = replace(
            settings, epochs=pretraining_epochs, learning_rate=pretraining_rate, evaluate_every=None
        )
        before = clean_training(
            classifier,
            augmented(Subset(usable, training)),
            first,
            held_out=Subset(usable, testing) if testing else None,
            out=out / "classifier",
            configuration=described,
            progress=True,
        )
        if trunk == _CLASSIFIER:
            corruption.trunk.load_state_dict(classifier.state_dict())
        if is_first():
            _say_pretraining(before)
    result = localization_training(
        network,
        augmented(Subset(shown, training)),
        settings,
        steps_of_classifier=steps_of_classifier,
        area=penalty,
        trainable_layers=trainable_layers,
        form=form,
        literal=literal,
        superpixels=superpixels,
        clean_share=clean_share,
        validation=evaluation if testing else None,
        out=out,
        configuration={
            **described,
            "width": width,
            "trunk": [trunk, trunk_weights, trains, trunk_size],
            "segments": segments,
            "pretraining": [pretraining_epochs, pretraining_rate],
        },
        progress=True,
    )
    if is_first():
        file = out / "localization.safetensors"
        of_trunk = None if trunk is None else [trunk, trunk_weights, trains]
        card = _card(model, of_trunk, len(training), result, settings)
        save_localization_network(network, file, half=half, card=card)
        _say_result(result, file)


def _trains_trunk(name: str | None, weights: str, train: bool | None, is_random: bool) -> bool:
    """Whether the trunk is trained, of options that go together.

    ``is_random``: so are the weights of the classifier, a copy of which the trunk may be.
    """
    has_weights = published_weights(weights) is not None
    if name is None and (has_weights or train is not None):
        raise ValueError("--trunk-weights, --train-trunk and --freeze-trunk: give --trunk too")
    if name == _CLASSIFIER and has_weights:
        raise ValueError("--trunk-weights: the trunk is a copy of the classifier; give --weights")
    is_random = is_random if name == _CLASSIFIER else not has_weights
    if is_random and train is False:
        raise ValueError("--freeze-trunk: the trunk's weights are random; give --trunk-weights")
    return is_random if train is None else train


def _trunk(name: str, weights: str, classifier: Classifier, size: int | None) -> Classifier:
    """A copy of the classifier, or a network for images of a side, else of the classifier's."""
    from captum_robust.models import load_classifier, takes_size

    if name == _CLASSIFIER:
        trunk = copy.deepcopy(classifier)
    else:
        chosen = published_weights(weights)
        # No feature depends on the classes of random weights: they are as few as there are.
        names = classifier.class_names if chosen is None else None
        trunk = load_classifier(name, chosen, class_names=names)
    height, width = classifier.input_size if size is None else (size, size)
    if not takes_size(trunk, (height, width)):
        raise ValueError(
            f"--trunk {name} does not take images of {height}×{width} pixels; give another "
            f"--trunk-size, such as {trunk.input_size[0]}"
        )
    return trunk


def _superpixels(
    usable: LabelledImages, file: Path | None, images: Path, out: Path, segments: int, part: str
) -> Tensor:
    """N×H×W, by the first process; the others read its file."""
    from accelerate import PartialState

    from captum_robust.data.superpixels import cached_superpixels, superpixel_path

    if file is None:
        height, width = usable[0][0].shape[1:]
        file = superpixel_path(images, segments, (height, width), part)
        if not file.exists() and not os.access(file.parent, os.W_OK):
            file = out / file.name
    with PartialState().main_process_first():
        return cached_superpixels(usable, file, segments, progress=is_first())


def _say_images(images: LabelledImages, training: int, testing: int, can_score: bool) -> None:
    if not is_first():
        return
    typer.echo(
        f"{training} images to train on, {testing} to measure with, {len(images.class_names)} "
        "classes"
    )
    if testing and not can_score:
        typer.echo("no boxes are known of these images: the masks are trained, but not scored")
    say_unusable(images)


def _say_pretraining(result: TrainingResult) -> None:
    say_resumed(result)
    rows = result.evaluations
    if rows:
        typer.echo(f"classifier alone: accuracy {rows[-1]['clean_accuracy']:.1%}")


def _say_result(result: TrainingResult, file: Path) -> None:
    say_resumed(result)
    rows = result.evaluations
    if rows:
        typer.echo("\non images that were not trained on")
        for row, when in ((rows[0], "before"), (rows[-1], "after")):
            typer.echo(f"  {when:<7} {_told(row)}")
    restarts = max((int(row.get("restarts", 0)) for row in result.rows), default=0)
    if restarts:
        times = "once" if restarts == 1 else f"{restarts} times"
        typer.echo(f"the masks collapsed {times}, and were started anew")
    typer.echo(f"\nnetwork: {file}")


def _told(row: dict[str, Any]) -> str:
    parts: Sequence[str] = [
        f"mask {row['mask']:.3f}, its total variation {row['total_variation']:.3f}, accuracy "
        f"{row['clean_accuracy']:.1%}, without what is removed {row['masked_accuracy']:.1%}"
    ]
    if "metric_1" in row:
        parts = [*parts, f"box right {row['metric_1']:.1%}, class too {row['metric_2']:.1%}"]
    return "; ".join(parts)


def _card(
    model: str,
    trunk: list[Any] | None,
    images: int,
    result: TrainingResult,
    settings: TrainingSettings,
) -> str:
    """What is worth knowing of the network, for who gets its file."""
    import json

    from captum_robust import __version__

    return json.dumps(
        {
            "made_with": f"captum-robust {__version__} train localization",
            "classifier": model,
            "trunk": trunk,
            "training_images": images,
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "held_out": result.evaluations[-1] if result.evaluations else {},
        }
    )
