"""The command ``captum-robust compare``: parsing and printing only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from captum_robust._checks import check, check_choice
from captum_robust.cli.model_options import RunOptions
from captum_robust.cli.options import (
    CERTIFIED_RADII,
    CERTIFY_SAMPLES,
    argument,
    command_of,
    option,
)
from captum_robust.cli.shared_options import (
    attacks_of,
    certification_of,
    method_names,
    model_for,
    open_dataset,
    print_comparison,
    read_network,
    with_network,
)


@dataclass(frozen=True, kw_only=True)
class CompareOptions(RunOptions):
    """The options of the command."""

    kind: str = field(metadata=argument())
    """imagenet, tiny-imagenet, coco, voc, folder, webdataset or samples."""
    path: Path | None = field(default=None, metadata=argument())
    """Folder or archive of the data set; none for samples."""
    out: Path = Path("captum-robust-compare")
    """Folder of the run and its report."""
    methods: str | None = None
    """Names, separated by commas. See captum-robust methods."""
    network: Path | None = None
    target: str = "label"
    """The class to explain: label or prediction."""
    oracle: bool = field(default=False, metadata=option("--oracle"))
    """Tune thresholds on the reported images."""
    thresholds: str | None = None
    """two-fold, tuned on the other half of the images; shipped, as they come for each method; or
    pseudo, tuned on boxes that the other methods agree on, for images without boxes. By default
    two-fold, but shipped where fewer than 50 images have a box."""
    masks: Path | None = None
    """folder: parallel folder of masks."""
    attack: str | None = None
    all_steps: bool = field(default=False, metadata=option("--all-steps"))
    """pgd: go on with images that are fooled. Else their change is often much smaller than the
    strength allows, and so is what it does to the maps."""
    adaptive: bool = field(default=False, metadata=option("--adaptive"))
    """Also attack the defended methods through their transforms, and the maps themselves, at each
    strength."""
    saliency_metric: bool = field(default=False, metadata=option("--saliency-metric"))
    """Also measure how small a crop around each map the class survives: up to 22 classifier passes
    more an image and method."""
    faithfulness: bool = field(default=False, metadata=option("--faithfulness"))
    """Also measure how the class goes as the largest pixels of each map are deleted, and comes as
    they are inserted, 65 classifier passes more an image and method; what it keeps without the
    largest and the smallest where their neighbours fill them (ROAD), 10; and how badly the map
    foretells what squares of the image are worth, 33 an image for all methods."""
    sensitivity: bool = field(default=False, metadata=option("--sensitivity"))
    """Also measure how far noise moves each map: ten times the method's own passes."""
    randomization: bool = field(default=False, metadata=option("--randomization"))
    """Also measure how far each map stays the same while the classifier loses its weights, in three
    stages: three times the method's own passes."""
    certify: float | None = None
    """Also measure what of each map and box no attacker can move, by copies with noise of this
    standard deviation, such as 0.25 for pixels in [0, 1]: as many times the method's own passes as
    there are samples."""
    certify_samples: int = field(default=CERTIFY_SAMPLES, metadata=option(min=1))
    certify_radii: str = CERTIFIED_RADII
    certify_denoiser: bool = field(default=False, metadata=option("--certify-denoiser"))
    precision: str = "float32"
    json: bool = field(default=False, metadata=option("--json"))
    """Print one JSON object instead: a row for each method and attack, with n and intervals, and
    where the report is."""


@command_of(CompareOptions, resumes=True)
def compare(options: CompareOptions) -> None:
    """Run attribution methods over a data set: a table with intervals, and a report.

    The centre box and the whole image are always among the methods. With --attack every
    method also runs on the images under each attack at each strength. --adaptive adds the
    attacker who knows how a method defends itself. Started again with the same
    arguments, a stopped run goes on. Under torchrun (python -m captum_robust) the
    processes share the images.
    """
    import warnings

    from captum_robust._processes import is_first
    from captum_robust.benchmark import AttackOptions, RunWarning
    from captum_robust.benchmark import compare as run
    from captum_robust.catalog.attacks import COMPARED_EPSILONS
    from captum_robust.catalog.methods import FIXED_BOXES
    from captum_robust.report.results import WAYS

    only_attacked = ("epsilon", "universal", "adaptive", "all_steps")
    for name in only_attacked if options.attack is None else ():
        is_given = getattr(options, name) not in (None, False)
        flag = name.replace("_", "-")
        check(not is_given, f"--{flag} is for attacks: give --attack too, such as --attack pgd")
    certification = certification_of(
        options.certify, options.certify_samples, options.certify_radii, options.certify_denoiser
    )
    if options.thresholds is not None:
        check(not options.oracle, "--thresholds and --oracle: give one of them")
        check_choice("thresholds", options.thresholds, WAYS)
    chosen = method_names(options.methods)
    if chosen:  # every table has the baselines; they cost no classifier pass
        chosen += [name for name in FIXED_BOXES if name not in chosen]
    file = read_network(options.network, chosen)
    classifier = model_for(file, options)
    dataset = open_dataset(options.kind, options.path, vars(options), classifier)
    of_attacks = AttackOptions(options.steps, options.seed, options.universal, options.all_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)  # said at the end, beside the report
        result = run(
            classifier,
            dataset,
            with_network(classifier, chosen, file),
            attacks_of(classifier, options.attack, options.epsilon, COMPARED_EPSILONS, of_attacks),
            out=options.out,
            limit=options.limit,
            batch_size=options.batch_size,
            target=options.target,
            fit=options.fit,
            precision=options.precision,
            seed=options.seed,
            retry=not options.no_retry,
            workers=options.workers,
            adaptive=options.adaptive,
            saliency_metric=options.saliency_metric,
            faithfulness=options.faithfulness,
            sensitivity=options.sensitivity,
            randomization=options.randomization,
            certify=certification,
        )
    if is_first():
        report = options.out / "report.html"
        tuning = {"oracle": options.oracle, "thresholds": options.thresholds}
        print_comparison(result, report, as_json=options.json, **tuning)
