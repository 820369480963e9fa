"""What the commands make of their options: data sets, attacks, a trained network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from captum_robust._checks import check, known_name, letters, printable
from captum_robust._progress import stage
from captum_robust.cli.model_options import ModelOptions, chosen_device, class_names, load_model
from captum_robust.cli.options import CERTIFIED_RADII, CERTIFY_SAMPLES, USUAL_MODEL
from captum_robust.cli.printing import echo, print_json, warn

if TYPE_CHECKING:
    from captum_robust._files import TensorFile
    from captum_robust.attacks import Attack
    from captum_robust.benchmark import AttackOptions, Comparison
    from captum_robust.catalog.certification import Certification
    from captum_robust.data import LocalizationDataset
    from captum_robust.models import Classifier

MASKING = "real_time_masking"
LOCALIZATION = "adversarial_localization"


def certification_of(
    certify: float | None, samples: int, radii: str, denoiser: bool
) -> Certification | None:
    """Return how maps and boxes are to be certified; None: not at all.

    Args:
        certify, samples, radii, denoiser: the options --certify, --certify-samples,
            --certify-radii and --certify-denoiser.

    Raises:
        ValueError: a number out of range, or options for --certify without it.
    """
    if certify is None:
        for name, is_usual in (
            ("samples", samples == CERTIFY_SAMPLES),
            ("radii", radii == CERTIFIED_RADII),
            ("denoiser", not denoiser),
        ):
            check(is_usual, f"--certify-{name} is for --certify: give it too, such as 0.25")
        return None
    from captum_robust.catalog.certification import Certification

    try:
        numbers = tuple(float(part) for part in radii.split(","))
    except ValueError:
        message = f"certify_radii: expected numbers separated by commas, got {printable(radii)!r}"
        raise ValueError(message) from None
    return Certification(certify, samples, numbers, denoiser=denoiser)


def listed(methods: str | None) -> list[str] | None:
    """Return the names between the commas; None where none were given."""
    return None if methods is None else [m.strip() for m in methods.split(",") if m.strip()]


def method_names(methods: str | None) -> list[str] | None:
    """Return the names of the catalogue that those between the commas mean, as :func:`listed`.

    Raises:
        ValueError: there is no such method.
    """
    from captum_robust.catalog.methods import METHODS

    names = listed(methods)
    return None if names is None else [known_name("method", name, METHODS) for name in names]


def attack_names(attacks: str | None) -> list[str] | None:
    """Return the names of attacks that those between the commas mean, as :func:`listed`.

    Raises:
        ValueError: there is no such attack.
    """
    from captum_robust.catalog.attacks import ATTACKS

    names = listed(attacks)
    return None if names is None else [known_name("attack", name, ATTACKS) for name in names]


def read_network(network: Path | None, methods: list[str] | None) -> TensorFile | None:
    """Read the file of a trained network, once, before the model is loaded.

    Args:
        network: the option; None: not given.
        methods: names; None: all of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none of the methods takes a network, or it is no safetensors file.
    """
    if network is None:
        return None
    from captum_robust._files import TensorFile

    takes_one = methods is None or MASKING in methods or LOCALIZATION in methods
    both = f"{MASKING} and {LOCALIZATION}"
    check(takes_one, f"--network is for the methods {both}: name one in --methods")
    return TensorFile(network)


def model_for(file: TensorFile | None, options: ModelOptions) -> Classifier:
    """The classifier; one without published weights is that of the network's file."""
    facts = None if file is None else _localization_facts(file)
    if file is not None and facts is not None and options.weights.lower() == "default":
        from captum_robust.attr import AdversarialLocalization
        from captum_robust.models import SMALL_NETWORKS
        from captum_robust.models.zoo import named_classifier

        own = facts["classifier"]
        is_meant = letters(options.model) in map(letters, (USUAL_MODEL, own))
        if own in SMALL_NETWORKS and is_meant:
            names, size = class_names(options.classes) or facts["class_names"], facts["input_size"]
            size = size if options.size is None else options.size
            like = named_classifier(
                own, "none", size, options.mean, options.std, options.layer, class_names=names
            )
            like = like.to(chosen_device(options.device))
            trained: Classifier = AdversarialLocalization.from_file(file, model=like).forward_func
            return trained
    return load_model(options)


def with_network(model: Classifier, methods: list[str] | None, file: TensorFile | None) -> Any:
    """The methods, the one that takes a trained network with that of the file."""
    if file is None or (methods is not None and len(set(methods)) < len(methods)):
        return methods  # a name that is there twice is an error later
    from captum_robust.attr import AdversarialLocalization, RealTimeMasking
    from captum_robust.catalog.methods import usual_methods
    from captum_robust.nn import load_masking_network

    asked = [name for name in (MASKING, LOCALIZATION) if methods is None or name in methods]
    kind = MASKING if _localization_facts(file) is None else LOCALIZATION
    name = asked[0] if len(asked) == 1 else kind
    trained: RealTimeMasking | AdversarialLocalization
    if name == MASKING:
        trained = RealTimeMasking(load_masking_network(file, model))
    else:
        trained = AdversarialLocalization.from_file(file, model=model)
    if methods is None:
        methods = list(dict.fromkeys([*usual_methods(model), name]))
    return {m: trained if m == name else m for m in methods}


def _localization_facts(file: TensorFile) -> dict[str, Any] | None:
    """What a file says of its localization network; None: it holds none."""
    from captum_robust.nn.localization_network import KIND, read_localization_facts

    # What else is wrong with it, if anything, the masking network's reader says.
    return read_localization_facts(file) if file.holds(KIND) else None


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
    chosen = attack_names(names) or []
    has_strength = not chosen or any(ATTACKS[name].has_strength for name in chosen)
    check(epsilon is None or has_strength, f"--epsilon: {', '.join(chosen)} takes no strength")
    is_used = options.universal is None or "universal" in chosen
    check(is_used, "--universal is for --attack universal")
    epsilons = list(usual) if epsilon is None else parse_epsilons(epsilon)
    for number in epsilons if whole else []:
        check(
            number == int(number),
            f"epsilon: an image file holds whole levels, so a change of {number:g} is none "
            "that it can hold; expected whole numbers from 0 to 255",
        )
    return build_attacks(model, chosen, epsilons, options)


def given_data_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a command that a data set takes and that were given."""
    names = ("split", "boxes", "masks", "images", "exif_orientation")
    values = {name: options.get(name) for name in names}
    return {name: value for name, value in values.items() if value not in (None, False)}


def open_dataset(
    kind: str, path: Path | None, options: Mapping[str, Any], model: Classifier
) -> LocalizationDataset:
    """Open a data set whose labels count the classes of the model.

    Args:
        kind: see :func:`captum_robust.data.load_dataset`.
        path: of the data set; None: it has none.
        options: of the command, by name; those of the kind are among them.
        model: the classes of which are counted.
    """
    from captum_robust.data import load_dataset
    from captum_robust.data.classes import imagenet_names, is_numbered
    from captum_robust.data.given import folder_of_model

    given = given_data_options(options)
    own: dict[str, Any] = {}
    if tuple(model.class_names or ()) != imagenet_names():
        if kind == "tiny-imagenet":
            own = {"labels": "wnids"}  # of a model that was trained on it
        elif kind in ("coco", "voc") and not is_numbered(model.class_names or ()):
            own = {"class_names": model.class_names}  # ImageNet's "kite" is a bird
    try:
        if kind == "folder" and path is not None:
            names = model.class_names or []
            dataset: LocalizationDataset = folder_of_model(path, names, names.__len__, **given)
        else:
            dataset = load_dataset(kind, path, **own, **given)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise ValueError(f"{path}: {error}") from None
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"a data set of kind {kind!r} does not take all of: {flags}") from None
    if "labels" in own:
        names = list(model.class_names or [])
        are_first = names == list(dataset.class_names or [])[: len(names)]
        check(are_first, f"{path}: the {len(names)} classes of the model are not its first ones")
    return dataset


def print_comparison(
    result: Comparison, report: Path, *, as_json: bool = False, **tuning: Any
) -> None:
    """Write the report, and print the table, what failed, and the summary.

    ``tuning`` is how thresholds are chosen, as ``Comparison.to_text`` takes it. With ``as_json``
    one JSON object is printed in place of the table and the summary.

    Raises:
        typer.Exit: a method failed on every image; its reason is on standard error.
    """
    # The report first, as the terminal may be a pipe that closes.
    with stage("scoring, and writing the report"):
        page = result.to_html(report, **tuning)
    if as_json:
        tables = {"table": result.table(**tuning), "attacks": result.attack_table()}
        facts = {"failures": result.failures(), "summary": result.summary(), "report": page}
        print_json(tables | facts)
    else:
        echo("\n" + result.to_text(**tuning))
        echo("\n" + result.summary())
        echo(f"\nreport: {page}")
    failures = result.complete_failures()
    for sentence in failures:
        warn(sentence)
    if failures:
        raise typer.Exit(2)
