"""The command ``captum-robust``: parsing and printing only."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_robust._checks import printable
from captum_robust.cli import train as cli_train
from captum_robust.cli import video_command as cli_video
from captum_robust.cli.model_options import (
    Device,
    Model,
    Weights,
    chosen_device,
    class_number,
    load_model,
)

if TYPE_CHECKING:
    from captum_robust.attacks import Attack
    from captum_robust.benchmark import AttackOptions, AttackRun, Comparison
    from captum_robust.data import LocalizationDataset
    from captum_robust.models import Classifier

_MASKING = "real_time_masking"
_LOCALIZATION = "adversarial_localization"
_USUAL_MODEL = "efficientnet_lite0"
_SHOWN_ROWS = 40

app = typer.Typer(
    name="captum-robust",
    help="Where does a classifier look, and how well does that place the object?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_train.app, name="train")

Methods = Annotated[
    str | None,
    typer.Option(help="Names, separated by commas. See captum-robust methods."),
]
Layer = Annotated[
    str | None,
    typer.Option(help="Layer for class activation maps, by its dotted name; else the last map."),
]
Network = Annotated[
    Path | None,
    typer.Option(
        help="For real_time_masking or adversarial_localization: file of a network for the model, "
        "from captum-robust train masking or train localization, which holds the small classifier "
        "that it was trained against too; else the one that comes with the package."
    ),
]
Attacks = Annotated[
    str | None,
    typer.Option(
        "--attack", help="Names of attacks, separated by commas. See captum-robust methods."
    ),
]
_EPSILON_HELP = (
    "Strengths of the attacks, separated by commas, in levels of an 8-bit image: 8 means 8/255 of "
    "the pixels' range."
)
Steps = Annotated[int, typer.Option(help="Of attacks that take several steps.", min=1)]
Universal = Annotated[
    Path | None,
    typer.Option(help="File of the universal perturbation, for --attack universal."),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run and its report.")] = Path(
        "captum-robust-demo"
    ),
    device: Device = "auto",
) -> None:
    """Compare methods on the sample photographs with EfficientNet-Lite0; write the report."""
    from captum_robust.benchmark import compare as run
    from captum_robust.data import load_dataset

    model = load_model("efficientnet_lite0", "DEFAULT", device)
    dataset = load_dataset("samples")
    _say(f"{len(dataset)} photographs, EfficientNet-Lite0")
    _finish(run(model, dataset, out=out, progress=True), out / "report.html")


@app.command()
def compare(
    kind: Annotated[
        str, typer.Argument(help="imagenet, tiny-imagenet, coco, voc, folder or samples.")
    ],
    path: Annotated[
        Path | None, typer.Argument(help="Folder or archive of the data set; none for samples.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run and its report.")] = Path(
        "captum-robust-compare"
    ),
    model: Model = _USUAL_MODEL,
    weights: Weights = "DEFAULT",
    layer: Layer = None,
    methods: Methods = None,
    network: Network = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images that a method gets at once.")] = 16,
    target: Annotated[str, typer.Option(help="The class to explain: label or prediction.")] = (
        "label"
    ),
    fit: Annotated[
        str, typer.Option(help="squash the whole image to the model's size, or crop its centre.")
    ] = "squash",
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Tune thresholds on the reported images.")
    ] = False,
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    boxes: Annotated[Path | None, typer.Option(help="folder: CSV of boxes.")] = None,
    masks: Annotated[Path | None, typer.Option(help="folder: parallel folder of masks.")] = None,
    images: Annotated[Path | None, typer.Option(help="coco: folder of the images.")] = None,
    attack: Attacks = None,
    epsilon: Annotated[str | None, typer.Option(help=f"{_EPSILON_HELP} 8 by default.")] = None,
    steps: Steps = 10,
    universal: Universal = None,
    all_steps: Annotated[
        bool,
        typer.Option(
            "--all-steps",
            help="pgd: go on with images that are fooled. Else their change is often much smaller "
            "than the strength allows, and so is what it does to the maps.",
        ),
    ] = False,
    adaptive: Annotated[
        bool,
        typer.Option(
            "--adaptive",
            help="Also attack the defended methods through their transforms, and the maps "
            "themselves, at each strength.",
        ),
    ] = False,
    saliency_metric: Annotated[
        bool,
        typer.Option(
            "--saliency-metric",
            help="Also measure how small a crop around each map the class survives: up to 18 "
            "classifier passes more an image and method.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="For methods and attacks that draw.")] = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Run attribution methods over a data set: a table with intervals, and a report.

    The centre box and the whole image are always among the methods. With --attack every
    method also runs on the images under each attack at each strength. --adaptive adds the
    attacker who knows how a method defends itself. Started again with the same
    arguments, a stopped run goes on. Under torchrun (python -m captum_robust) the
    processes share the images.
    """
    from captum_robust.benchmark import AttackOptions
    from captum_robust.benchmark import compare as run
    from captum_robust.catalog.attacks import COMPARED_EPSILONS
    from captum_robust.catalog.methods import FIXED_BOXES

    if attack is None and (epsilon is not None or universal is not None or adaptive or all_steps):
        option = "--adaptive" if adaptive else "--all-steps"
        option = option if universal is None else "--universal"
        option = option if epsilon is None else "--epsilon"
        raise ValueError(f"{option} is for attacks: give --attack too, such as --attack pgd")
    chosen = _names(methods)
    if chosen:  # every table has the baselines; they cost no classifier pass
        chosen += [name for name in FIXED_BOXES if name not in chosen]
    _check_network(network, chosen)
    given = {"split": split, "boxes": boxes, "masks": masks, "images": images}
    classifier = _model_for(network, model, weights, device, layer)
    dataset = _open(kind, path, {k: v for k, v in given.items() if v is not None}, classifier)
    options = AttackOptions(steps, seed, universal, all_steps)
    result = run(
        classifier,
        dataset,
        _with_network(classifier, chosen, network),
        _build_attacks(classifier, attack, epsilon, COMPARED_EPSILONS, options),
        out=out,
        limit=limit,
        batch_size=batch_size,
        target=target,
        fit=fit,
        precision=precision,
        seed=seed,
        adaptive=adaptive,
        saliency_metric=saliency_metric,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        _finish(result, out / "report.html", oracle=oracle)


@app.command()
def explain(
    path: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path(
        "captum-robust-explain"
    ),
    model: Model = _USUAL_MODEL,
    weights: Weights = "DEFAULT",
    layer: Layer = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names, separated by commas; see captum-robust methods. robust_cam by default, "
            "or, with --counterfactual, perceptual_ball."
        ),
    ] = None,
    network: Network = None,
    target: Annotated[
        str | None,
        typer.Option(help="The class to explain, by name or number; else the prediction."),
    ] = None,
    counterfactual: Annotated[
        str | None,
        typer.Option(
            help="What would make it this class, by name or number? For methods that perturb the "
            "image, such as perceptual_ball."
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="How many classes to print.", min=1)] = 5,
    threshold: Annotated[
        float,
        typer.Option(help="The box holds the largest part above this share of the map's range."),
    ] = 0.2,
    device: Device = "auto",
) -> None:
    """Draw where the classifier looks: one PNG an image, the top classes in the terminal."""
    from captum_robust.catalog.methods import build_methods
    from captum_robust.data import DataError
    from captum_robust.show.explain import explain_image

    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
    usual = "robust_cam" if counterfactual is None else "perceptual_ball"
    named = _names(usual if methods is None else methods)
    _check_network(network, named)
    sources = list(_image_files(path, out))
    originals = {file.resolve() for _, file in sources}
    for name, _ in sources:
        if (out / name).resolve() in originals:
            raise ValueError(f"{out / name}: would overwrite the image itself; give another --out")
    classifier = _model_for(network, model, weights, device, layer)
    chosen = build_methods(classifier, _with_network(classifier, named, network))
    number = None if target is None else class_number(classifier, target, "target")
    towards = None
    if counterfactual is not None:
        towards = class_number(classifier, counterfactual, "counterfactual")
    failed = 0
    for name, file in sources:
        try:
            explained = explain_image(
                classifier,
                file,
                chosen,
                out / name,
                target=number,
                counterfactual=towards,
                threshold=threshold,
                top=top,
            )
        except DataError as error:
            if len(sources) == 1:
                raise
            failed += 1
            typer.echo(f"captum-robust: {printable(str(error))}", err=True)
            continue
        _say(printable(f"{file} -> {explained.picture}"))
        for label, probability in explained.classes:
            _say(f"  {probability:6.1%}  {label}")
        for method, verdict in explained.verdicts.items():
            _say(f"  {method}: {verdict}")
    if failed:
        _say(f"{len(sources)} images: {failed} could not be used")
    if failed == len(sources):
        raise typer.Exit(2)


@app.command()
def attack(
    path: Annotated[
        Path | None,
        typer.Argument(help="An image, a folder of images, or the data set that --kind names."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="imagenet, tiny-imagenet, coco, voc, folder or samples (which takes no path). "
            "By default an image file is one image, and a folder is of kind folder."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run: images, table and curves.")] = Path(
        "captum-robust-attack"
    ),
    attack: Annotated[
        str,
        typer.Option(help="Names of attacks, separated by commas. See captum-robust methods."),
    ] = "pgd",
    epsilon: Annotated[
        str | None, typer.Option(help=f"{_EPSILON_HELP} 1,2,4,8 by default.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The class to move towards, by name or number; else away from the label."
        ),
    ] = None,
    steps: Steps = 10,
    universal: Universal = None,
    keep_all: Annotated[
        bool, typer.Option("--all", help="Also write the images that do not fool the model.")
    ] = False,
    model: Model = _USUAL_MODEL,
    weights: Weights = "DEFAULT",
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images that are attacked at once.")] = 16,
    fit: Annotated[
        str, typer.Option(help="squash the whole image to the model's size, or crop its centre.")
    ] = "squash",
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    boxes: Annotated[Path | None, typer.Option(help="folder: CSV with a column label.")] = None,
    images: Annotated[Path | None, typer.Option(help="coco: folder of the images.")] = None,
    seed: Annotated[int, typer.Option(help="For attacks that draw.")] = 0,
    device: Device = "auto",
) -> None:
    """Write images that fool the model, and say how many do at each strength.

    Each is a PNG at the size of the model's input that still fools when it is read back.
    An image without a label is measured against the model's own prediction. Images
    that are misclassified to begin with are not attacked, and counted apart. Started
    again with the same arguments, a stopped run goes on.
    """
    from captum_robust.benchmark import AttackOptions, attack_images
    from captum_robust.catalog.attacks import ATTACKS, SWEPT_EPSILONS

    given = {"split": split, "boxes": boxes, "images": images}
    classifier = load_model(model, weights, device)
    options_given = {k: v for k, v in given.items() if v is not None}
    dataset = _open_images(kind, path, out, options_given, classifier)
    options = AttackOptions(steps, seed, universal)
    built = _build_attacks(classifier, attack, epsilon, SWEPT_EPSILONS, options, whole=True)
    aimed = None if target is None else class_number(classifier, target, "target")
    for name in _names(attack) or []:
        if aimed is not None and not ATTACKS[name].can_aim:
            raise ValueError(f"target: {name} cannot move towards a given class")
    result = attack_images(
        classifier,
        dataset,
        built,
        out,
        target=aimed,
        limit=limit,
        batch_size=batch_size,
        fit=fit,
        seed=seed,
        keep_all=keep_all,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        _finish_attack(result)


app.command()(cli_video.video)


@app.command()
def methods() -> None:
    """List the methods that compare and explain know, and the attacks of compare and attack."""
    from captum_robust.attr.real_time_masking import pretrained
    from captum_robust.benchmark import ATTACKS, BASELINES, METHODS
    from captum_robust.catalog.methods import SLOW

    notes = dict.fromkeys(BASELINES, "baseline")
    notes |= dict.fromkeys(SLOW, "slow: runs only where it is named")
    trained = ", ".join(pretrained()) or "no model yet"
    notes[_MASKING] = (
        f"trained for {trained}; for others captum-robust train masking, then --network"
    )
    notes[_LOCALIZATION] = "needs --network, from captum-robust train localization"
    notes["lrp"] = "for chains of layers only, such as vgg16 and simple_convnet"
    for name in METHODS:
        _say(f"{name}  ({notes[name]})" if name in notes else name)
    for name, kind in ATTACKS.items():
        _say(f"{name}  (attack: {kind.meaning})")


def main() -> None:
    """Run the command; what a user got wrong is one line on standard error and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except (ValueError, TypeError, OSError, ImportError, sqlite3.Error) as error:
        code = _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if type(error).__module__.split(".")[0] not in {"click", "typer"}:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(_message(error))
            code = 0
        else:
            code = _fail(error)
    if code == 130:  # Ctrl-C, which typer itself may already have turned into this code
        typer.echo("captum-robust: stopped; the same command goes on from here", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception) -> int:
    typer.echo(f"captum-robust: error: {printable(_message(error))}", err=True)
    return 2


def _message(error: Exception) -> str:
    """Of an error of the command line's parser, or of any other."""
    own = getattr(error, "format_message", None)
    return str(own() if own else error)


def _say(text: str) -> None:
    typer.echo(text)


def _names(methods: str | None) -> list[str] | None:
    return None if methods is None else [m.strip() for m in methods.split(",") if m.strip()]


def _check_network(network: Path | None, methods: list[str] | None) -> None:
    """Before the model is loaded. ``methods`` None: all of them."""
    trained = {_MASKING, _LOCALIZATION}
    if network is not None and methods is not None and trained.isdisjoint(methods):
        raise ValueError(
            f"--network is for the methods {_MASKING} and {_LOCALIZATION}: name one in --methods"
        )


def _model_for(
    network: Path | None, name: str, weights: str, device: str, layer: str | None
) -> Classifier:
    """The classifier; one without published weights is that of the network's file."""
    facts = None if network is None else _localization_facts(network)
    if network is not None and facts is not None and weights.lower() == "default":
        from captum_robust.attr import AdversarialLocalization
        from captum_robust.models import SMALL_NETWORKS, load_classifier

        own = facts["classifier"]
        if own in SMALL_NETWORKS and name in (_USUAL_MODEL, own):
            names, size = facts["class_names"], facts["input_size"]
            like = load_classifier(own, None, class_names=names, input_size=size, cam_layer=layer)
            like = like.to(chosen_device(device))
            trained: Classifier = AdversarialLocalization.from_file(
                network, model=like
            ).forward_func
            return trained
    return load_model(name, weights, device, layer)


def _with_network(model: Classifier, methods: list[str] | None, network: Path | None) -> Any:
    """The methods, the one that takes a trained network with that of the file."""
    if network is None or (methods is not None and len(set(methods)) < len(methods)):
        return methods  # a name that is there twice is an error later
    from captum_robust.attr import AdversarialLocalization, RealTimeMasking
    from captum_robust.catalog.methods import usual_methods
    from captum_robust.nn import load_masking_network

    asked = [name for name in (_MASKING, _LOCALIZATION) if methods is None or name in methods]
    kind = _MASKING if _localization_facts(network) is None else _LOCALIZATION
    name = asked[0] if len(asked) == 1 else kind
    trained: RealTimeMasking | AdversarialLocalization
    if name == _MASKING:
        trained = RealTimeMasking(load_masking_network(network, model))
    else:
        trained = AdversarialLocalization.from_file(network, model=model)
    if methods is None:
        methods = list(dict.fromkeys([*usual_methods(model), name]))
    return {m: trained if m == name else m for m in methods}


def _localization_facts(network: Path) -> dict[str, Any] | None:
    """What a file says of its localization network; None: it holds none."""
    from captum_robust.nn import read_localization_facts

    try:
        return read_localization_facts(network)
    except ValueError:  # what is wrong with it, if anything, the masking network's reader says
        return None


def _build_attacks(
    model: Classifier,
    names: str | None,
    epsilon: str | None,
    usual: tuple[float, ...],
    options: AttackOptions,
    *,
    whole: bool = False,
) -> dict[str, Attack]:
    from captum_robust.catalog.attacks import ATTACKS, build_attacks, parse_epsilons

    if names is None:
        return {}
    chosen = _names(names) or []
    known = [ATTACKS[name] for name in chosen if name in ATTACKS]
    if epsilon is not None and known and not any(kind.has_strength for kind in known):
        raise ValueError(f"--epsilon: {', '.join(chosen)} takes no strength")
    if options.universal is not None and "universal" not in chosen:
        raise ValueError("--universal is for --attack universal")
    epsilons = list(usual) if epsilon is None else parse_epsilons(epsilon)
    for number in epsilons if whole else []:
        if number != int(number):
            raise ValueError(
                f"epsilon: an image file holds whole levels, so a change of {number:g} is none "
                "that it can hold; expected whole numbers from 0 to 255"
            )
    return build_attacks(model, chosen, epsilons, options)


def _open(
    kind: str, path: Path | None, options: dict[str, Any], model: Classifier
) -> LocalizationDataset:
    from captum_robust.data import load_dataset
    from captum_robust.data.classes import imagenet_names

    own: dict[str, Any] = {}
    if kind == "folder":  # names of folders and labels in a CSV are classes of the model
        own = {"class_names": model.class_names}
    elif kind == "tiny-imagenet" and tuple(model.class_names or ()) != imagenet_names():
        own = {"labels": "wnids"}  # of a model that was trained on it, not of ImageNet's classes
    try:
        dataset = load_dataset(kind, path, **own, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise ValueError(f"{path}: {error}") from None
        given = ", ".join(f"--{name}" for name in options)
        raise ValueError(f"a data set of kind {kind!r} does not take all of: {given}") from None
    if "labels" in own:
        names = list(model.class_names or [])
        if names != list(dataset.class_names or [])[: len(names)]:
            raise ValueError(
                f"{path}: the {len(names)} classes of the model are not its first ones"
            )
    return dataset


def _open_images(
    kind: str | None, path: Path | None, out: Path, options: dict[str, Any], model: Classifier
) -> LocalizationDataset:
    """The data set to attack: by its kind, or what is found at the path."""
    if path is None and kind is None:
        raise ValueError("give an image, a folder of images, or --kind samples")
    if path is not None and path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"--out {out} lies inside {path}, the images' folder; give another --out")
    if kind is None and path is not None and not path.is_dir():
        from captum_robust.benchmark.attack_images import Photograph

        if options:
            given = ", ".join(f"--{name}" for name in options)
            raise ValueError(f"a single image does not take: {given}")
        return Photograph(path)
    return _open("folder" if kind is None else kind, path, options, model)


def _image_files(path: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """Name of the picture and file of each image; the pictures of an earlier call are none."""
    from captum_robust.data.images import list_images

    if path.is_dir():
        found = list_images(path, without=out)
        if not found:
            raise ValueError(f"{path}: no images in it")
        times = Counter(str(Path(name).with_suffix("")) for name in found)
        for name, file in found.items():
            stem = str(Path(name).with_suffix(""))
            yield f"{stem if times[stem] == 1 else name}.png", file
    elif path.is_file():
        yield f"{path.stem}.png", path
    else:
        raise FileNotFoundError(f"{path}: no such image or folder")


def _finish(result: Comparison, report: Path, *, oracle: bool = False) -> None:
    page = result.to_html(report)  # first, as the terminal may be a pipe that closes
    _say("\n" + result.to_text(oracle=oracle))
    _say("\n" + result.summary())
    failures = result.failures()
    for row in failures.head(5).itertuples():
        _say(f"  {row.image}: {row.error}")
    if len(failures) > 5:
        _say(f"  and {len(failures) - 5} more, all in the report")
    _say(f"\nreport: {page}")


def _finish_attack(result: AttackRun) -> None:
    table = result.write_csv()
    try:
        curves = f", curves: {result.write_curves()}"
    except ImportError as missing:
        curves = f" (no curves: {missing})"
    shown = result.to_text(_SHOWN_ROWS)
    if shown:
        _say("\n" + shown)
    _say("\n" + result.table_text())
    _say("\n" + result.summary())
    failures = result.failures()
    for image, why in failures[:5]:
        text = why if image in why else f"{image}: {why}"
        typer.echo(f"captum-robust: {printable(text)}", err=True)
    if len(failures) > 5:
        _say(f"  and {len(failures) - 5} more, all in the table")
    _say(f"\ntable: {table}{curves}")
    if not result.used():
        raise typer.Exit(2)
    seen = result.table()
    if seen["n"].any() and not seen["n_right"].any():
        raise ValueError(
            f"the model classifies none of the {seen['n'].max()} images right, so there is nothing "
            "to attack; do the labels count the model's classes?"
        )
