"""The command ``captum-robust train robust``: parsing and printing only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    is_first,
    names_of,
    open_images,
    say_resumed,
    say_unusable,
    settings_of,
    shuffled,
)

if TYPE_CHECKING:
    from captum_robust.models import Classifier
    from captum_robust.training import LabelledImages, TrainingResult


def robust(
    images: Annotated[
        Path,
        typer.Option(help="Folder with one sub-folder of images a class, or what --kind says."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run: model.safetensors, log.jsonl, checkpoint.")
    ] = Path("captum-robust-train"),
    kind: Kind = "folder",
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
    epochs: Epochs = 30,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of stochastic gradient descent.")] = 5e-4,
    precision: Precision = "float32",
    checkpoint_every: CheckpointEvery = 60.0,
    workers: Workers = 0,
    seed: Seed = 0,
    device: TrainingDevice = "auto",
) -> None:
    """Train a classifier that withstands attacks, on a folder of images.

    Started again with the same arguments, a stopped or killed run goes on, and ends with
    the weights that it would have had. The other commands take the result as --model NAME
    --weights OUT/model.safetensors. Under accelerate launch or torchrun
    (-m captum_robust train robust) the processes share each batch.
    """
    from torch.utils.data import Subset

    from captum_robust._contexts import seeded
    from captum_robust._files import checksum
    from captum_robust.defenses import InnerAttack, adversarial_training
    from captum_robust.models import load_classifier, save_classifier
    from captum_robust.training import Augmented, LabelledImages, held_out_split
    from captum_robust.training.adversarial import METHODS

    # Before the images are read, which may take long.
    if not 0 < epsilon <= 255:
        raise ValueError(f"epsilon: expected levels above 0, at most 255, got {epsilon:g}")
    InnerAttack(epsilon / 255, steps)
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    settings = settings_of(locals())
    dataset = open_images(kind, images, out)
    names = names_of(dataset, images, classes)
    with seeded(seed, None):
        network = load_classifier(
            model, published_weights(weights), class_names=names, input_size=size
        )
    static_models = [_static(text, names) for text in static or ()]
    usable = LabelledImages(
        dataset, network.input_size, fit=fit, classes=range(len(names)), progress=is_first()
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
        held_out=Subset(usable, shuffled(testing, seed)) if testing else None,
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
    if is_first():
        file = out / "model.safetensors"
        save_classifier(network, file)
        _say_result(result, network, file, epsilon)


def _static(text: str, names: Sequence[str]) -> Classifier:
    """A model from ``NAME=FILE`` or ``NAME``."""
    from captum_robust.models import load_classifier

    name, _, file = text.partition("=")
    if file:
        return load_classifier(name, file)
    return load_classifier(name, class_names=names)


def _say_images(images: LabelledImages, training: int, held_out: int) -> None:
    if not is_first():
        return
    typer.echo(
        f"{training} images to train on, {held_out} held out, {len(images.class_names)} classes"
    )
    say_unusable(images)


def _say_result(result: TrainingResult, model: Classifier, file: Path, epsilon: float) -> None:
    say_resumed(result)
    rows = result.evaluations
    if rows:
        typer.echo(f"\naccuracy on held-out images, clean and under PGD at {epsilon:g}/255")
        for row, when in ((rows[0], "before"), (rows[-1], "after")):
            typer.echo(f"  {when:<8}{row['clean_accuracy']:6.1%}{row['robust_accuracy']:8.1%}")
    typer.echo(f"\nmodel: --model {model.name} --weights {file}")
