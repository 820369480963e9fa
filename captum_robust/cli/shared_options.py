"""What the commands share: options of methods and attacks, data sets, a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_robust.cli.model_options import chosen_device, load_model

if TYPE_CHECKING:
    from captum_robust.attacks import Attack
    from captum_robust.benchmark import AttackOptions, Comparison
    from captum_robust.data import LocalizationDataset
    from captum_robust.models import Classifier

MASKING = "real_time_masking"
LOCALIZATION = "adversarial_localization"
USUAL_MODEL = "efficientnet_lite0"


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
EPSILON_HELP = (
    "Strengths of the attacks, separated by commas, in levels of an 8-bit image: 8 means 8/255 of "
    "the pixels' range."
)
Steps = Annotated[int, typer.Option(help="Of attacks that take several steps.", min=1)]
Universal = Annotated[
    Path | None,
    typer.Option(help="File of the universal perturbation, for --attack universal."),
]


def listed(methods: str | None) -> list[str] | None:
    """Return the names between the commas; None where none were given."""
    return None if methods is None else [m.strip() for m in methods.split(",") if m.strip()]


def check_network(network: Path | None, methods: list[str] | None) -> None:
    """Before the model is loaded. ``methods`` None: all of them."""
    trained = {MASKING, LOCALIZATION}
    if network is not None and methods is not None and trained.isdisjoint(methods):
        raise ValueError(
            f"--network is for the methods {MASKING} and {LOCALIZATION}: name one in --methods"
        )


def model_for(
    network: Path | None, name: str, weights: str, device: str, layer: str | None
) -> Classifier:
    """The classifier; one without published weights is that of the network's file."""
    facts = None if network is None else _localization_facts(network)
    if network is not None and facts is not None and weights.lower() == "default":
        from captum_robust.attr import AdversarialLocalization
        from captum_robust.models import SMALL_NETWORKS, load_classifier

        own = facts["classifier"]
        if own in SMALL_NETWORKS and name in (USUAL_MODEL, own):
            names, size = facts["class_names"], facts["input_size"]
            like = load_classifier(own, None, class_names=names, input_size=size, cam_layer=layer)
            like = like.to(chosen_device(device))
            trained: Classifier = AdversarialLocalization.from_file(
                network, model=like
            ).forward_func
            return trained
    return load_model(name, weights, device, layer)


def with_network(model: Classifier, methods: list[str] | None, network: Path | None) -> Any:
    """The methods, the one that takes a trained network with that of the file."""
    if network is None or (methods is not None and len(set(methods)) < len(methods)):
        return methods  # a name that is there twice is an error later
    from captum_robust.attr import AdversarialLocalization, RealTimeMasking
    from captum_robust.catalog.methods import usual_methods
    from captum_robust.nn import load_masking_network

    asked = [name for name in (MASKING, LOCALIZATION) if methods is None or name in methods]
    kind = MASKING if _localization_facts(network) is None else LOCALIZATION
    name = asked[0] if len(asked) == 1 else kind
    trained: RealTimeMasking | AdversarialLocalization
    if name == MASKING:
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


def attacks_of(
    model: Classifier,
    names: str | None,
    epsilon: str | None,
    usual: tuple[float, ...],
    options: AttackOptions,
    *,
    whole: bool = False,
) -> dict[str, Attack]:
    """Return the attacks by name, one for each strength; ``whole``: of whole levels only."""
    from captum_robust.catalog.attacks import ATTACKS, build_attacks, parse_epsilons

    if names is None:
        return {}
    chosen = listed(names) or []
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


def open_dataset(
    kind: str, path: Path | None, options: dict[str, Any], model: Classifier
) -> LocalizationDataset:
    """Open a data set whose labels count the classes of the model."""
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


def print_comparison(result: Comparison, report: Path, *, oracle: bool = False) -> None:
    """Write the report, and print the table, the summary and what failed."""
    page = result.to_html(report)  # first, as the terminal may be a pipe that closes
    typer.echo("\n" + result.to_text(oracle=oracle))
    typer.echo("\n" + result.summary())
    failures = result.failures()
    for row in failures.head(5).itertuples():
        typer.echo(f"  {row.image}: {row.error}")
    if len(failures) > 5:
        typer.echo(f"  and {len(failures) - 5} more, all in the report")
    typer.echo(f"\nreport: {page}")
