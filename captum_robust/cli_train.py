"""The command ``captum-robust train``: parsing and printing only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_robust._names import printable, unknown_name

if TYPE_CHECKING:
    from captum_robust.data import LocalizationDataset
    from captum_robust.models import Classifier
    from captum_robust.training import (
        CroppedImages,
        LabelledImages,
        TrainingResult,
        TrainingSettings,
    )

app = typer.Typer(
    help="Train networks; a run that was stopped goes on when it is started again.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def train() -> None:
    """Train networks; a run that was stopped goes on when it is started again."""


@app.command()
def robust(
    images: Annotated[
        Path,
        typer.Option(help="Folder with one sub-folder of images a class, or what --kind says."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run: model.safetensors, log.jsonl, checkpoint.")
    ] = Path("captum-robust-train"),
    kind: Annotated[
        str, typer.Option(help="folder, tiny-imagenet (its training part) or imagenet.")
    ] = "folder",
    model: Annotated[
        str,
        typer.Option(
            help="small_resnet (for 64 pixels), efficientnet_lite0, …1, …2, or a torchvision "
            "classification model."
        ),
    ] = "small_resnet",
    weights: Annotated[
        str,
        typer.Option(
            help="Where to start: none for random ones, DEFAULT, a member of torchvision's "
            "weights enum, or a .safetensors file."
        ),
    ] = "none",
    method: Annotated[
        str,
        typer.Option(
            help="madry; ensemble, with --static; or standard, without attacks, to compare with."
        ),
    ] = "madry",
    static: Annotated[
        list[str] | None,
        typer.Option(
            help="ensemble: a model that was trained before, as NAME=FILE.safetensors or NAME; "
            "may be given several times."
        ),
    ] = None,
    epsilon: Annotated[
        float, typer.Option(help="Strength of the attack in levels of an 8-bit image.")
    ] = 8.0,
    steps: Annotated[int, typer.Option(help="Of the attack within each training step.")] = 7,
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
        float,
        typer.Option(help="Share of the images that is not trained on, to measure accuracy with."),
    ] = 0.1,
    evaluation_images: Annotated[
        int, typer.Option(help="So many of them are measured, before, during and after.")
    ] = 128,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between two measurements; else each epoch.")
    ] = None,
    augment: Annotated[bool, typer.Option(help="Mirror and shift the images at random.")] = True,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Images a step, of all processes together.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="The highest of the schedule.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of stochastic gradient descent.")] = 5e-4,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between two checkpoints.")
    ] = 60.0,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, or cpu.")] = "auto",
) -> None:
    """Train a classifier that withstands attacks, on a folder of images.

    Started again with the same arguments, a stopped or killed run goes on, and ends with
    the weights that it would have had. The other commands take the result as --model NAME
    --weights OUT/model.safetensors. Under accelerate launch or torchrun
    (-m captum_robust train robust) the processes share each batch.
    """
    from torch.utils.data import Subset

    from captum_robust._random import seeded
    from captum_robust._weights import checksum
    from captum_robust.defenses import InnerAttack, adversarial_training
    from captum_robust.defenses.adversarial_training import METHODS
    from captum_robust.models import load_classifier, save_classifier
    from captum_robust.training import (
        Augmented,
        LabelledImages,
        TrainingSettings,
        held_out_split,
    )
    from captum_robust.training.loop import training_device

    # Before the images are read, which may take long.
    if not 0 < epsilon <= 255:
        raise ValueError(f"epsilon: expected levels above 0, at most 255, got {epsilon:g}")
    InnerAttack(epsilon / 255, steps)
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    settings = TrainingSettings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        precision=precision,
        seed=seed,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        workers=workers,
        device=device,
    )
    training_device(settings)
    dataset = _open(kind, images, out)
    names = list(dataset.class_names or [])
    if len(names) < 2:
        raise ValueError(f"{images}: expected at least two classes, found {len(names)}")
    if classes is not None and not 2 <= classes <= len(names):
        raise ValueError(f"classes: expected a number from 2 to {len(names)}, got {classes}")
    names = names[:classes]
    with seeded(seed, None):
        network = load_classifier(model, _chosen(weights), class_names=names, input_size=size)
    static_models = [_static(text, names) for text in static or ()]
    usable = LabelledImages(
        dataset, network.input_size, fit=fit, classes=range(len(names)), progress=_is_first()
    )
    training, testing = held_out_split(usable.labels, held_out, seed)
    _say_images(usable, len(training), len(testing))
    shown = Subset(usable, training)
    result = adversarial_training(
        network,
        Augmented(shown) if augment else shown,
        settings,
        method=method,
        epsilon=epsilon / 255,
        steps=steps,
        static_models=static_models,
        # Shuffled: the first of them are of all classes.
        held_out=Subset(usable, _shuffled(testing, seed)) if testing else None,
        evaluation_images=evaluation_images,
        out=out,
        configuration={
            "model": model,
            "weights": weights,
            # A file of this name may have been written anew since.
            "weights_crc32": f"{checksum(network.state_dict().values()):08x}",
            "classes": names,
            "input_size": list(network.input_size),
            "augment": augment,
        },
        progress=True,
    )
    if _is_first():
        file = out / "model.safetensors"
        save_classifier(network, file)
        _say_result(result, network, file, epsilon)


@app.command()
def masking(
    images: Annotated[
        Path, typer.Option(help="Folder of images, in sub-folders named after classes or not.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run: masking.safetensors, log.jsonl, checkpoint.")
    ] = Path("captum-robust-masking"),
    kind: Annotated[
        str, typer.Option(help="folder, tiny-imagenet (its training part) or imagenet.")
    ] = "folder",
    model: Annotated[
        str,
        typer.Option(help="The classifier: efficientnet_lite0, …1, …2, small_resnet, torchvision."),
    ] = "efficientnet_lite0",
    weights: Annotated[
        str,
        typer.Option(
            help="Of the classifier: DEFAULT, a member of torchvision's weights enum, none, or a "
            ".safetensors file."
        ),
    ] = "DEFAULT",
    start: Annotated[
        Path | None, typer.Option(help="A masking network to start from, else a new one.")
    ] = None,
    labels: Annotated[
        str,
        typer.Option(
            help="folder: the classes of the sub-folders, of images without one what the "
            "classifier sees; model: always what the classifier sees in the part shown."
        ),
    ] = "folder",
    objective: Annotated[
        str, typer.Option(help="paper: its equation 3; code: the authors' hinges.")
    ] = "paper",
    weight: Annotated[
        list[str] | None,
        typer.Option(help="Of the objective, as NAME=NUMBER; may be given several times."),
    ] = None,
    removal: Annotated[
        str, typer.Option(help="What stands in for removed pixels: both, blur or color.")
    ] = "both",
    fake_probability: Annotated[
        float, typer.Option(help="Share of the images asked for a class that is not there.")
    ] = 0.3,
    fakes: Annotated[
        str,
        typer.Option(
            help="What these are trained for: area, no mask; swapped, all but the true class."
        ),
    ] = "area",
    warm_up_steps: Annotated[
        int, typer.Option(help="Of the feature filter alone, before the rest is trained.")
    ] = 200,
    learned_classes: Annotated[
        bool,
        typer.Option(help="Learn the classes' vectors, not take the classifier's last layer."),
    ] = False,
    validation: Annotated[
        Path | None, typer.Option(help="Folder of images to stop by; else a part of --images.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Without --validation: share of the images not trained on.")
    ] = 0.1,
    evaluation_images: Annotated[
        int, typer.Option(help="So many of these are looked at, before, during and after.")
    ] = 128,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between two such looks; else each epoch.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks without a better one.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Images a step, of all processes together.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="The highest of the schedule.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between two checkpoints.")
    ] = 60.0,
    tensorboard: Annotated[
        bool, typer.Option(help="Write losses and masks to OUT/tensorboard.")
    ] = False,
    half: Annotated[bool, typer.Option(help="Write masking.safetensors in half precision.")] = True,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, or cpu.")] = "auto",
) -> None:
    """Train a network that shows in one pass where the evidence of a class is.

    Started again with the same arguments, a stopped or killed run goes on, and ends with
    the weights that it would have had. The network that it writes keeps the weights that had the
    lowest saliency metric on images not trained on; captum-robust video takes it as --network.
    Under accelerate launch or torchrun (-m captum_robust train masking) the processes share each
    batch.
    """
    import torch
    from torch.utils.data import Subset

    from captum_robust._checks import check_count
    from captum_robust._random import seeded
    from captum_robust._weights import checksum
    from captum_robust.models import load_classifier
    from captum_robust.nn import (
        EvidenceRemoval,
        MaskingNetwork,
        load_masking_network,
        save_masking_network,
    )
    from captum_robust.nn.mask_objective import objective_named
    from captum_robust.training import (
        CroppedImages,
        TrainingSettings,
        Unlabelled,
        held_out_split,
        masking_training,
    )
    from captum_robust.training.loop import training_device

    # Before the images are read, which may take long.
    if labels not in ("folder", "model"):
        raise unknown_name("labels", labels, ["folder", "model"])
    goal = objective_named(objective, **_weights_of(weight or ()))
    stands_in = EvidenceRemoval(removal)
    settings = TrainingSettings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        precision=precision,
        seed=seed,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        workers=workers,
        device=device,
    )
    check_count("evaluation_images", evaluation_images, 0)
    training_device(settings)
    classifier = load_classifier(model, _chosen(weights))
    classifier.to(memory_format=torch.channels_last)
    names = list(classifier.class_names or [])
    dataset = _open_for_masking(kind, images, out, names, labels)
    if start is not None:
        network = load_masking_network(start, classifier)
    else:
        with seeded(seed, None):
            network = MaskingNetwork(classifier, learned_classes=learned_classes)
    network.to(memory_format=torch.channels_last)
    held_out_split([], held_out, seed)
    found = None
    if validation is not None:
        found = _open_for_masking("folder", validation, out, names, "model")
    size = classifier.input_size
    usable = CroppedImages(dataset, size, progress=_is_first())
    whole = usable.whole()
    if found is not None:
        looked_at = CroppedImages(found, size, area=(1.0, 1.0), mirror=False)
        training, testing = list(range(len(usable))), list(range(len(looked_at)))
    else:
        looked_at = whole
        # Of all images alike: a class may have one only.
        training, testing = held_out_split([0] * len(usable), held_out, seed)
    _say_masking_images(usable, len(training), len(testing))
    testing = _shuffled(testing, seed)[:evaluation_images]
    if patience is not None and not testing:
        raise ValueError(
            "--patience: there are no images to look at; give --validation, or a larger --held-out"
        )
    shown: Any = Subset(usable, training)
    result = masking_training(
        network,
        Unlabelled(shown) if labels == "model" else shown,
        settings,
        objective=goal,
        removal=stands_in,
        fake_probability=fake_probability,
        fakes=fakes,
        warm_up_steps=0 if start is not None else warm_up_steps,
        validation=Subset(looked_at, testing) if testing else None,
        patience=patience,
        out=out,
        tensorboard=tensorboard,
        configuration={
            "model": model,
            "weights": weights,
            "weights_crc32": f"{checksum(classifier.state_dict().values()):08x}",
            "start": None if start is None else str(start),
            "start_crc32": f"{checksum(network.decoder.state_dict().values()):08x}",
            "labels": labels,
        },
        progress=True,
    )
    if _is_first():
        file = out / "masking.safetensors"
        rows = result.evaluations
        save_masking_network(
            network, file, half=half, card=_card(model, len(training), result, settings)
        )
        if result.resumed_from:
            typer.echo(f"went on from step {result.resumed_from} of {result.steps}")
        if rows:
            best = min(rows, key=lambda row: row["saliency_metric"])
            typer.echo(f"\nof {len(testing)} images that were not trained on")
            for row, when in ((rows[0], "before"), (best, f"step {best['step']}")):
                typer.echo(
                    f"  {when:<10} saliency metric {row['saliency_metric']:.3f} (crop of "
                    f"{row['area']:.2f} of the image, probability {row['probability']:.2f}), mask "
                    f"{row['mask']:.3f}, of another class {row['mask_of_another']:.3f}"
                )
        typer.echo(f"\nnetwork: {file}")


def _weights_of(texts: Sequence[str]) -> dict[str, float]:
    """Of an objective, from ``NAME=NUMBER``."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--weight: expected NAME=NUMBER, got {text!r}") from None
    return found


def _open_for_masking(
    kind: str, path: Path, out: Path, names: Sequence[str], labels: str
) -> LocalizationDataset:
    """Images whose labels count the classifier's classes, where they have some."""
    from captum_robust.data import load_dataset
    from captum_robust.data.classes import imagenet_names

    if kind != "folder":
        dataset = _open(kind, path, out)
        if kind == "tiny-imagenet" and list(names) == list(imagenet_names()):
            dataset = load_dataset(kind, path, split="train", labels="imagenet")
        if labels != "model" and list(names) != list(dataset.class_names or []):
            raise ValueError(
                f"--kind {kind}: its classes are not those of the classifier; with --labels model "
                "the classifier says them"
            )
        return dataset
    _check_out(out, path)
    return load_dataset("folder", path, labels="names", class_names=names or None)


def _say_masking_images(images: CroppedImages, training: int, held_out: int) -> None:
    if not _is_first():
        return
    labelled = sum(label >= 0 for label in images.labels)
    typer.echo(
        f"{training} images to train on, {held_out} to look at, {labelled} of {len(images)} with a "
        "class"
    )
    _say_unusable(images)


def _card(model: str, images: int, result: TrainingResult, settings: TrainingSettings) -> str:
    """What is worth knowing of the network, for who gets its file."""
    import json

    from captum_robust import __version__

    rows = result.evaluations
    best = min(rows, key=lambda row: row["saliency_metric"]) if rows else {}
    return json.dumps(
        {
            "made_with": f"captum-robust {__version__} train masking",
            "classifier": model,
            "training_images": images,
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "validation": best,
        }
    )


def _open(kind: str, path: Path, out: Path) -> LocalizationDataset:
    from captum_robust.data import load_dataset

    options: dict[str, dict[str, Any]] = {
        "folder": {"labels": "sorted"},
        "tiny-imagenet": {"split": "train", "labels": "wnids"},
        "imagenet": {"split": "train"},
    }
    if kind not in options:
        raise unknown_name("kind of data set", kind, options)
    _check_out(out, path)
    return load_dataset(kind, path, **options[kind])


def _check_out(out: Path, images: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if images.is_dir() and out.resolve().is_relative_to(images.resolve()):
        raise ValueError(
            f"--out {out} lies inside {images}, the images' folder; give another --out"
        )


def _chosen(weights: str) -> str | None:
    plain = weights.lower()
    return None if plain == "none" else "DEFAULT" if plain == "default" else weights


def _static(text: str, names: Sequence[str]) -> Classifier:
    """A model from ``NAME=FILE`` or ``NAME``."""
    from captum_robust.models import load_classifier

    name, _, file = text.partition("=")
    if file:
        return load_classifier(name, file)
    return load_classifier(name, class_names=names)


def _shuffled(numbers: Sequence[int], seed: int) -> list[int]:
    import torch

    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return [numbers[i] for i in order.tolist()]


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _say_images(images: LabelledImages, training: int, held_out: int) -> None:
    if not _is_first():
        return
    typer.echo(
        f"{training} images to train on, {held_out} held out, {len(images.class_names)} classes"
    )
    _say_unusable(images)


def _say_unusable(images: LabelledImages | CroppedImages) -> None:
    if images.unusable:
        total = len(images) + len(images.unusable)
        typer.echo(f"{total} images: {len(images.unusable)} could not be used", err=True)
        for why in list(images.unusable.values())[:5]:
            typer.echo(f"  {printable(why)}", err=True)


def _say_result(result: TrainingResult, model: Classifier, file: Path, epsilon: float) -> None:
    if result.resumed_from:
        typer.echo(f"went on from step {result.resumed_from} of {result.steps}")
    rows = result.evaluations
    if rows:
        typer.echo(f"\naccuracy on held-out images, clean and under PGD at {epsilon:g}/255")
        for row, when in ((rows[0], "before"), (rows[-1], "after")):
            typer.echo(f"  {when:<8}{row['clean_accuracy']:6.1%}{row['robust_accuracy']:8.1%}")
    typer.echo(f"\nmodel: --model {model.name} --weights {file}")
