"""The command ``captum-robust train masking``: parsing and printing only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_robust._checks import unknown_name
from captum_robust.cli.model_options import published_weights
from captum_robust.cli.train_options import (
    BatchSize,
    CheckpointEvery,
    Epochs,
    Kind,
    LearningRate,
    Precision,
    Seed,
    TrainingDevice,
    Workers,
    check_out,
    is_first,
    open_images,
    say_resumed,
    say_unusable,
    settings_of,
    shuffled,
)

if TYPE_CHECKING:
    from captum_robust.data import LocalizationDataset
    from captum_robust.training import CroppedImages, TrainingResult, TrainingSettings


def masking(
    images: Annotated[
        Path, typer.Option(help="Folder of images, in sub-folders named after classes or not.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run: masking.safetensors, log.jsonl, checkpoint.")
    ] = Path("captum-robust-masking"),
    kind: Kind = "folder",
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
    epochs: Epochs = 30,
    batch_size: BatchSize = 16,
    learning_rate: LearningRate = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    precision: Precision = "float32",
    checkpoint_every: CheckpointEvery = 60.0,
    tensorboard: Annotated[
        bool, typer.Option(help="Write losses and masks to OUT/tensorboard.")
    ] = False,
    half: Annotated[bool, typer.Option(help="Write masking.safetensors in half precision.")] = True,
    workers: Workers = 0,
    seed: Seed = 0,
    device: TrainingDevice = "auto",
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
    from captum_robust._contexts import seeded
    from captum_robust._files import checksum
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
        Unlabelled,
        held_out_split,
        masking_training,
    )

    # Before the images are read, which may take long.
    if labels not in ("folder", "model"):
        raise unknown_name("labels", labels, ["folder", "model"])
    goal = objective_named(objective, **_weights_of(weight or ()))
    stands_in = EvidenceRemoval(removal)
    settings = settings_of(locals())
    check_count("evaluation_images", evaluation_images, 0)
    classifier = load_classifier(model, published_weights(weights))
    classifier.to(memory_format=torch.channels_last)
    names = list(classifier.class_names or [])
    dataset = open_for_masking(kind, images, out, names, labels)
    if start is not None:
        network = load_masking_network(start, classifier)
    else:
        with seeded(seed, None):
            network = MaskingNetwork(classifier, learned_classes=learned_classes)
    network.to(memory_format=torch.channels_last)
    held_out_split([], held_out, seed)
    found = None
    if validation is not None:
        found = open_for_masking("folder", validation, out, names, "model")
    size = classifier.input_size
    usable = CroppedImages(dataset, size, progress=is_first())
    if found is not None:
        looked_at = CroppedImages(found, size, area=(1.0, 1.0), mirror=False)
        training, testing = list(range(len(usable))), list(range(len(looked_at)))
    else:
        looked_at = usable.whole()
        # Of all images alike: a class may have one only.
        training, testing = held_out_split([0] * len(usable), held_out, seed)
    _say_images(usable, len(training), len(testing))
    testing = shuffled(testing, seed)[:evaluation_images]
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
    if is_first():
        file = out / "masking.safetensors"
        rows = result.evaluations
        save_masking_network(
            network, file, half=half, card=_card(model, len(training), result, settings)
        )
        say_resumed(result)
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


def open_for_masking(
    kind: str, path: Path, out: Path, names: Sequence[str], labels: str
) -> LocalizationDataset:
    """Images whose labels count the classifier's classes, where they have some."""
    from captum_robust.data import load_dataset
    from captum_robust.data.classes import imagenet_names

    if kind != "folder":
        dataset = open_images(kind, path, out)
        if kind == "tiny-imagenet" and list(names) == list(imagenet_names()):
            dataset = load_dataset(kind, path, split="train", labels="imagenet")
        if labels != "model" and list(names) != list(dataset.class_names or []):
            raise ValueError(
                f"--kind {kind}: its classes are not those of the classifier; with --labels model "
                "the classifier says them"
            )
        return dataset
    check_out(out, path)
    return load_dataset("folder", path, labels="names", class_names=names or None)


def _say_images(images: CroppedImages, training: int, held_out: int) -> None:
    if not is_first():
        return
    labelled = sum(label >= 0 for label in images.labels)
    typer.echo(
        f"{training} images to train on, {held_out} to look at, {labelled} of {len(images)} with a "
        "class"
    )
    say_unusable(images)


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
