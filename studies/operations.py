"""What `scaling.py` times: an operation of the package for each public name that is one.

`OPERATIONS` has what is called, with the inputs of a :class:`world.World`. A name that is none is
in `COVERED`, with the reason. A test compares both with the `__all__` of the package and its rooms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn
from world import Sizes, World, compared, explained

from captum_robust import (
    attacks,
    attr,
    benchmark,
    data,
    defenses,
    inspection,
    interop,
    metrics,
    optim,
    training,
    transforms,
)
from captum_robust import nn as networks
from captum_robust.metrics import functional as F
from captum_robust.show.locate import locate
from captum_robust.show.video import annotate_video

Call = Callable[[World], Any]
"""What is timed; it returns what the operation returns."""


LEAST = Sizes()


@dataclass(frozen=True)
class Operation:
    """What is timed, and against what."""

    call: Call
    axes: tuple[str, ...] = ("images", "side", "classes")
    seconds: float = 1.0
    """How much longer than others its largest call may take, as it has more to do at first."""
    streams: bool = False
    """Whether it reads one batch after another, so that memory must not grow with the images."""
    least: Sizes = LEAST
    """What the axes that do not vary have."""


def _each(axes: str, **calls: Call) -> dict[str, Operation]:
    return {name: Operation(call, tuple(axes.split())) for name, call in calls.items()}


def _layer(w: World) -> nn.Module:
    return w.model.cam_layer


ATTRIBUTIONS = _each(
    "images side classes",
    AdversarialLocalization=lambda w: attr.AdversarialLocalization(w.localization).attribute(w.x),
    Certified=lambda w: attr.Certified(
        attr.RobustCAM(w.model, _layer(w)), 0.1, 0.3, 50, 0.99
    ).attribute(w.x, w.y),
    ClassActivationMap=lambda w: attr.ClassActivationMap(w.model, _layer(w)).attribute(w.x, w.y),
    Defended=lambda w: attr.Defended(
        attr.RobustCAM(w.model, _layer(w)), transforms.GaussianBlur(1)
    ).attribute(w.x, w.y),
    Guided=lambda w: attr.Guided(Saliency(w.model)).attribute(w.x, w.y),
    IterativeMask=lambda w: attr.IterativeMask(w.model, steps=4).attribute(w.x, w.y),
    MultiScale=lambda w: attr.MultiScale(Saliency(w.model)).attribute(w.x, w.y),
    PerceptualBallPerturbation=lambda w: attr.PerceptualBallPerturbation(
        w.model, [_layer(w)], settings=attr.BallSettings(max_iterations=4)
    ).attribute(w.x, w.y),
    RISE=lambda w: attr.RISE(w.model, n_masks=32).attribute(w.x, w.y),
    RealTimeMasking=lambda w: attr.RealTimeMasking(w.masking).attribute(w.x, w.y),
    ScoreCAM=lambda w: attr.ScoreCAM(w.model, _layer(w)).attribute(w.x, w.y),
)
ATTRIBUTIONS |= _each(
    "images side classes k",
    RobustCAM=lambda w: attr.RobustCAM(w.model, _layer(w)).attribute(w.x, k=w.sizes.k),
    TopClasses=lambda w: attr.TopClasses(
        IntegratedGradients(w.model), min(w.sizes.k, w.sizes.classes)
    ).attribute(w.x, n_steps=2),
)

LABEL_ATTACKS = _each(
    "images side classes",
    FGSM=lambda w: attacks.FGSM(w.model).perturb(w.x, w.y),
    PGD=lambda w: attacks.PGD(w.model, steps=4, early_stop=False).perturb(w.x, w.y),
    GradientStep=lambda w: attacks.GradientStep(w.model).perturb(w.x, w.y),
    LeastLikelyClass=lambda w: attacks.LeastLikelyClass(w.model).perturb(w.x),
    EnsembleTransfer=lambda w: attacks.EnsembleTransfer([w.model], steps=4).perturb(w.x, w.y),
    DeepFool=lambda w: attacks.DeepFool(w.model, max_iterations=4).perturb(w.x, w.y),
    LBFGSAttack=lambda w: attacks.LBFGSAttack(w.model, searches=2, max_iterations=2).perturb(
        w.x, w.y
    ),
    FoolingImage=lambda w: attacks.FoolingImage(w.model, steps=4).perturb(w.x, w.y),
    UniversalPerturbation=lambda w: attacks.UniversalPerturbation(w.model).fit(
        w.batches(), passes=1, progress=False
    ),
    SubstituteAttack=lambda w: attacks.SubstituteAttack(w.model, budget=None).fit(
        w.x, w.trained, rounds=2, epochs=1
    ),
    most_likely_class_map=lambda w: attacks.most_likely_class_map(w.model, w.x, w.y),
    held_out=lambda w: attacks.held_out(
        {"a": w.model, "b": w.trunk},
        w.x,
        w.y,
        lambda sources: attacks.EnsembleTransfer(sources, steps=2),
    ),
    fooling_rate=lambda w: attacks.fooling_rate(w.model, 0.1 * w.other[0], w.batches()),
    transfer_matrix=lambda w: attacks.transfer_matrix(
        {"a": 0.1 * w.other[0]}, {"a": w.model}, w.batches()
    ),
    rank_analysis=lambda w: attacks.rank_analysis(w.model, w.x, w.other, batch_size=w.sizes.batch),
    cross_entropy=lambda w: attacks.cross_entropy(w.scores, w.labels),
    adaptive_attack=lambda w: defenses.adaptive_attack(
        attacks.PGD(w.model, steps=2, early_stop=False), transforms.GaussianBlur(1)
    ).perturb(w.x, w.y),
    DefendedModel=lambda w: defenses.DefendedModel(w.model, transforms.default_transforms())(w.x),
)
LABEL_ATTACKS |= _each(
    "images side",
    ExplanationAttack=lambda w: attacks.ExplanationAttack(
        attr.RobustCAM(w.model, _layer(w)), steps=2
    ).perturb(w.x),
)

TRANSFORMS = _each(
    "images side",
    BitDepth=lambda w: transforms.BitDepth()(w.x),
    CropAndRescale=lambda w: transforms.CropAndRescale()(w.x),
    GaussianBlur=lambda w: transforms.GaussianBlur()(w.x),
    GaussianNoise=lambda w: transforms.GaussianNoise()(w.x),
    HorizontalFlip=lambda w: transforms.HorizontalFlip()(w.x),
    JPEG=lambda w: transforms.JPEG()(w.x),
    MedianBlur=lambda w: transforms.MedianBlur()(w.x),
    Quilting=lambda w: w.quilting(w.x),
    Resize=lambda w: transforms.Resize(0.5)(w.x),
    TotalVariation=lambda w: transforms.TotalVariation(iterations=10)(w.x),
)

_of_maps: dict[str, Call] = {
    "best_iou": lambda w: F.best_iou(w.box[:, None], w.boxes),
    "box_iou": lambda w: F.box_iou(w.box, w.box),
    "center_box_map": lambda w: F.center_box_map(len(w.x), w.x.shape[2:]),
    "random_map": lambda w: F.random_map(len(w.x), w.x.shape[2:]),
    "whole_image_map": lambda w: F.whole_image_map(len(w.x), w.x.shape[2:]),
    "certified_order": lambda w: F.certified_order(w.masks, ~w.masks, w.maps),
    "certified_pointing": lambda w: F.certified_pointing(w.masks, w.boxes),
    "certified_share": lambda w: F.certified_share(w.masks, ~w.masks),
    "certify_counts": lambda w: F.certify_counts(*w.counts, 50),
    "crop_and_resize": lambda w: F.crop_and_resize(w.x, w.box, w.x.shape[2:]),
    "image_grid": lambda w: F.image_grid(w.x, 2),
    "infidelity_of": lambda w: F.infidelity_of(w.maps, w.squares, w.drops),
    "largest_component": lambda w: F.largest_component(w.masks),
    "linear_imputation": lambda w: F.linear_imputation(w.x, w.masks),
    "map_box_iou": lambda w: F.map_box_iou(w.maps, w.other.mean(dim=1)),
    "mask_to_box": lambda w: F.mask_to_box(w.masks),
    "maxboxacc": lambda w: F.maxboxacc(w.maps, w.boxes),
    "maxboxacc_ious": lambda w: F.maxboxacc_ious(w.maps, w.boxes),
    "maxboxacc_v2": lambda w: F.maxboxacc_v2(w.maps, w.boxes),
    "pearson_correlation": lambda w: F.pearson_correlation(w.maps, w.other.mean(dim=1)),
    "pointing_game_hits": lambda w: F.pointing_game_hits(w.maps, w.boxes),
    "pxap": lambda w: F.pxap(w.maps, w.masks),
    "pxap_histograms": lambda w: F.pxap_histograms(w.maps, w.masks),
    "saliency_boxes": lambda w: F.saliency_boxes(w.maps),
    "spearman_correlation": lambda w: F.spearman_correlation(w.maps, w.other.mean(dim=1)),
    "stability": lambda w: F.stability(w.maps, w.other.mean(dim=1)),
    "structural_similarity": lambda w: F.structural_similarity(w.maps, w.other.mean(dim=1)),
    "sweep_boxes": lambda w: F.sweep_boxes(w.maps),
    "threshold": lambda w: F.threshold(w.maps, "energy", 0.5),
    "tightest_box": lambda w: F.tightest_box(w.masks),
    "top_k_intersection": lambda w: F.top_k_intersection(w.maps, w.other.mean(dim=1)),
}
_of_model: dict[str, Call] = {
    "certified_deletion": lambda w: F.certified_deletion(
        w.model, w.x, w.masks, ~w.masks, w.maps, w.y, steps=8
    ),
    "crop_scores": lambda w: F.crop_scores(w.model, w.x, w.box[:, None], w.y),
    "deletion_curve": lambda w: F.deletion_curve(w.model, w.x, w.maps, w.y, steps=8),
    "infidelity": lambda w: F.infidelity(w.model, w.x, w.maps, w.y, squares=8),
    "insertion_curve": lambda w: F.insertion_curve(w.model, w.x, w.maps, w.y, steps=8),
    "model_randomization": lambda w: F.model_randomization(w.model, w.explain, w.x, w.y, stages=2),
    "removal_curves": lambda w: F.removal_curves(w.model, w.x, w.maps, w.y, steps=8),
    "road": lambda w: F.road(w.model, w.x, w.maps, w.y, shares=(0.1, 0.3)),
    "saliency_metric": lambda w: F.saliency_metric(w.model, w.x, w.maps, w.y),
    "sensitivity": lambda w: F.sensitivity(w.explain, w.x, w.y, samples=2),
    "smallest_destroying_region": lambda w: F.smallest_destroying_region(
        w.model, w.x, w.maps, w.y, areas=(0.1, 0.3, 1.0)
    ),
    "smallest_sufficient_region": lambda w: F.smallest_sufficient_region(
        w.model, w.x, w.maps, w.y, areas=(0.1, 0.3, 1.0)
    ),
    "square_drops": lambda w: F.square_drops(w.model, w.x, w.squares, w.y),
}
_of_numbers: dict[str, Call] = {
    "best_certified_iou": lambda w: F.best_certified_iou(w.box, w.box, w.boxes),
    "bootstrap_difference": lambda w: F.bootstrap_difference(w.values, 1 - w.values),
    "bootstrap_interval": lambda w: F.bootstrap_interval(w.values),
    "certified_iou": lambda w: F.certified_iou(w.box, w.box, w.box),
    "certified_localization_error": lambda w: F.certified_localization_error(w.box, w.box, w.boxes),
    "gap_closed": lambda w: F.gap_closed(
        (w.values > 0.8).float(), (w.values > 0.5).float(), (w.values > 0.9).float()
    ),
    "gt_known_localization": lambda w: F.gt_known_localization(w.values > 0.5),
    "localization_error": lambda w: F.localization_error(
        w.overlaps, alphas=[number / 256 for number in range(256)]
    ),
    "maxboxacc_curve": lambda w: F.maxboxacc_curve(w.overlaps),
    "maxboxacc_from_ious": lambda w: F.maxboxacc_from_ious(w.overlaps),
    "pointing_game_accuracy": lambda w: F.pointing_game_accuracy(w.values > 0.5, w.labels),
    "probability_above": lambda w: F.probability_above((50 * w.values).long(), 50),
    "pxap_from_histograms": lambda w: F.pxap_from_histograms(w.histograms),
    "saliency_of": lambda w: F.saliency_of(w.values.clamp(min=0.1), -w.values),
    "split_folds": lambda w: F.split_folds([str(number) for number in range(len(w.values))]),
    "top1_localization": lambda w: F.top1_localization(w.values > 0.5, w.values > 0.3),
    "tuned_saliency": lambda w: F.tuned_saliency(w.overlaps),
    "held_out_split": lambda w: training.held_out_split(w.labels.tolist(), 0.2, 0),
    "ROC": lambda w: defenses.ROC.of(w.values, w.values + 0.1),
    "summarize_attack": lambda w: benchmark.summarize_attack(
        w.values > 0.9, w.values < 0.5, w.values, w.values
    ),
    "removal_loss": lambda w: networks.removal_loss(w.scores, w.labels),
}


def _updated(metric: Any, w: World, *columns: Any) -> Any:
    """Return the value of a metric that is shown one batch after another; lists are per image."""
    size = w.sizes.batch
    for start in range(0, len(w.x), size):
        here = slice(start, start + size)
        metric.update(*(c[here] if isinstance(c, Tensor | list) else c for c in columns))
    return metric.compute()


_classes: dict[str, Call] = {
    "AttributionStability": lambda w: _updated(
        metrics.AttributionStability(), w, w.maps, w.other.mean(dim=1)
    ),
    "CertifiedLocalizationError": lambda w: _updated(
        metrics.CertifiedLocalizationError(), w, w.box, w.box, w.boxes
    ),
    "CertifiedPointing": lambda w: _updated(metrics.CertifiedPointing(), w, w.masks, w.boxes),
    "CertifiedShare": lambda w: _updated(metrics.CertifiedShare(), w, w.masks, ~w.masks),
    "LocalizationError": lambda w: _updated(metrics.LocalizationError(), w, w.maps, w.boxes, w.ids),
    "MaxBoxAcc": lambda w: _updated(metrics.MaxBoxAcc(), w, w.maps, w.boxes),
    "MaxBoxAccV2": lambda w: _updated(metrics.MaxBoxAccV2(), w, w.maps, w.boxes),
    "PointingGame": lambda w: _updated(metrics.PointingGame(), w, w.maps, w.boxes),
    "PxAP": lambda w: _updated(metrics.PxAP(), w, w.maps, w.masks),
    "Deletion": lambda w: _updated(metrics.Deletion(4), w, w.model, w.x, w.maps, w.y),
    "Infidelity": lambda w: _updated(metrics.Infidelity(4), w, w.model, w.x, w.maps, w.y),
    "Insertion": lambda w: _updated(metrics.Insertion(4), w, w.model, w.x, w.maps, w.y),
    "ModelRandomization": lambda w: _updated(
        metrics.ModelRandomization(stages=1), w, w.model, w.explain, w.x, w.y
    ),
    "ROAD": lambda w: _updated(metrics.ROAD((0.1, 0.5)), w, w.model, w.x, w.maps, w.y),
    "SaliencyMetric": lambda w: _updated(metrics.SaliencyMetric(), w, w.model, w.x, w.maps, w.y),
    "Sensitivity": lambda w: _updated(metrics.Sensitivity(samples=2), w, w.explain, w.x, w.y),
}
METRICS = {
    **_each("images side", **_of_maps),
    **_each("images side classes", **_of_model),
    **_each("images", **_of_numbers),
    **_each("images", **_classes),
}

_networks: dict[str, Call] = {
    "CorruptionNetwork": lambda w: w.localization.corruption(w.x),
    "Denoiser": lambda w: w.denoiser(w.x),
    "EvidenceRemoval": lambda w: networks.EvidenceRemoval()(w.x),
    "LocalizationNetwork": lambda w: w.localization(w.x),
    "MaskingNetwork": lambda w: w.masking(w.x, w.y),
    "SimpleConvNet": lambda w: w.trunk(w.x),
    "SmallResNet": lambda w: w.residual(w.x),
    "Classifier": lambda w: w.model(w.x),
    "CodeObjective": lambda w: networks.CodeObjective()(w.maps[:, None], w.scores, w.scores, w.y),
    "PaperObjective": lambda w: networks.PaperObjective()(w.maps[:, None], w.scores, w.scores, w.y),
    "blend": lambda w: networks.blend(w.x, w.maps[:, None], w.other),
    "spread": lambda w: networks.spread(networks.superpixel_means(w.x, w.segments), w.segments),
    "straight_through": lambda w: networks.straight_through(w.maps[:, None]),
    "superpixel_means": lambda w: networks.superpixel_means(w.x, w.segments),
    "upsampled": lambda w: networks.upsampled(w.maps[:, None], (w.sizes.side, w.sizes.side)),
    "superpixels": lambda w: data.superpixels(w.x, 16),
    "minimize": lambda w: optim.minimize(_bowl, w.x, max_iterations=4),
    "quantus_explain_func": lambda w: interop.quantus_explain_func(Saliency)(
        w.model, w.x.cpu().numpy(), w.y.cpu().numpy()
    ),
}


def _bowl(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    return x.pow(4).flatten(1).sum(dim=1), 4 * x.pow(3), None


NETWORKS = {
    **_each("images side", **_networks),
    "DenseAssociativeMemory": Operation(
        lambda w: networks.DenseAssociativeMemory(32, w.sizes.classes, 4).fit(
            w.features, w.labels.cpu(), epochs=1
        ),
        ("images", "classes"),
    ),
}

_runs: dict[str, Call] = {
    "attack_images": lambda w: w.attack_images(w.out()),
    "robust_accuracy": lambda w: benchmark.robust_accuracy(
        w.model, attacks.FGSM(w.model), w.dataset, [2 / 255], batch_size=w.sizes.batch
    ),
    "locate": lambda w: locate(w.model, w.x.cpu(), method="grad_cam", batch_size=w.sizes.batch),
    "video": lambda w: annotate_video(
        w.video, w.out().with_suffix(".avi"), w.masking, batch_size=w.sizes.batch, progress=False
    ),
    "penultimate_features": lambda w: inspection.penultimate_features(
        w.model, w.dataset, batch_size=w.sizes.batch
    ),
    "maximal_patches": lambda w: inspection.maximal_patches(
        w.model, _layer(w), w.dataset, range(4), 3, batch_size=w.sizes.batch
    ),
    "dissect": lambda w: inspection.dissect(
        w.model, _layer(w), w.dataset, units=range(4), batch_size=w.sizes.batch
    ),
    "tour": lambda w: inspection.tour(
        w.model, w.dataset, units=4, top=3, points=16, batch_size=w.sizes.batch
    ),
    "LocalizationDataset": lambda w: [len(sample.boxes) for sample in w.dataset],
    "load_dataset": lambda w: len(data.load_dataset("folder", w.photographs)),
    "load_image": lambda w: [data.load_image(p).shape for p in w.photographs.glob("*.png")],
    "resize": lambda w: [data.resize(sample, 24).size for sample in w.dataset],
    "resize_and_center_crop": lambda w: [
        data.resize_and_center_crop(sample, 28, 24).size for sample in w.dataset
    ],
    "fitted": lambda w: [data.fitted(sample, 24, "crop").size for sample in w.dataset],
    "cached_superpixels": lambda w: data.cached_superpixels(
        list(w.x.cpu()), w.out().with_suffix(".safetensors"), 16
    ),
    "SafetyNet": lambda w: defenses.SafetyNet(w.model, _layer(w), batch_size=w.sizes.batch).fit(
        w.x, w.other
    ),
}
_trainings: dict[str, Call] = {
    "clean_training": lambda w: training.clean_training(w.trained, w.pairs, w.training()),
    "fit": lambda w: training.fit(w.trained, w.pairs, defenses.standard_loss, w.training()),
    "adversarial_training": lambda w: defenses.adversarial_training(
        w.trained, w.pairs, w.training(), steps=2
    ),
    "denoising_training": lambda w: training.denoising_training(
        w.denoiser, w.pairs, w.model, _layer(w), w.training()
    ),
    "masking_training": lambda w: training.masking_training(
        w.masking, w.pairs, w.training(), warm_up_steps=0
    ),
    "warm_up": lambda w: training.warm_up(
        w.masking, w.pairs, steps=2, images=len(w.x), batch_size=w.sizes.batch
    ),
    "localization_training": lambda w: training.localization_training(
        w.localization, w.segmented, w.training()
    ),
    "RobustAccuracy": lambda w: defenses.RobustAccuracy(w.pairs, steps=2, batch_size=w.sizes.batch)(
        w.model
    ),
    "DenoisingEvaluation": lambda w: training.DenoisingEvaluation(
        w.model, w.pairs, batch_size=w.sizes.batch
    )(w.denoiser),
    "LocalizationEvaluation": lambda w: training.LocalizationEvaluation(
        w.localization, w.segmented, batch_size=w.sizes.batch
    )(),
    "MaskingEvaluation": lambda w: training.MaskingEvaluation(
        w.masking, w.model, w.pairs, batch_size=w.sizes.batch
    )(w.masking.decoder),
    "CroppedImages": lambda w: training.CroppedImages(w.dataset, 24)[0],
    "LabelledImages": lambda w: training.LabelledImages(w.dataset, 24)[0],
}
_reports: dict[str, Call] = {
    "Comparison": lambda w: w.run.table(),
    "report": lambda w: w.run.to_html(w.out().with_suffix(".html")),
    "AttackRun": lambda w: w.attacked_run.table(),
    "neighbours": lambda w: inspection.neighbours(w.features, labels=w.labels.cpu()),
    "embedding": lambda w: inspection.embedding(w.features),
    "embedding, pca": lambda w: inspection.embedding(w.features, "pca"),
}
_TWO = Sizes(images=2)
WHOLES = {
    **{
        name: Operation(call, ("images", "batch"), 3, streams=True, least=Sizes(images=32))
        for name, call in _runs.items()
    },
    **{
        name: Operation(call, ("images", "batch"), 3, least=Sizes(images=32))
        for name, call in _trainings.items()
    },
    **{name: Operation(call, ("images",), 3) for name, call in _reports.items()},
    # Its pictures are larger than these images, and take most of the time.
    "explain": Operation(lambda w: explained(w, w.out()), ("images",), 3, streams=True, least=_TWO),
    "compare": Operation(
        lambda w: compared(w, w.out()),
        ("images", "side", "classes", "batch", "methods"),
        5,
        streams=True,
        least=Sizes(images=16),
    ),
}
OPERATIONS = {**ATTRIBUTIONS, **LABEL_ATTACKS, **TRANSFORMS, **METRICS, **NETWORKS, **WHOLES}

_RESULTS = """AttackDetails AttackSummary Activations BallDetails CertifiedDetails Detector
Dissection Elites Embedding ExplanationDetails Features FirstLayerFilters FoolingRate GapClosed
Interval LocalizationResult MaskDetails MaximalPatches Minimum MostLikelyClassMap Neighbours
RandomizationScores RankAnalysis ReceptiveField RemovalCurve RoadScores SaliencyScores Sample Share
Stop SubstituteRound Tour TrainingResult TunedSaliency"""
_SETTINGS = """AttackOptions BallSettings Certification DenoisingSettings LocalizationSettings
MaskingSettings Protocol RobustSettings TrainingSettings"""
_CONSTANTS = """ATTACKS BASELINES CORRECTIONS FITS INFIDELITY_SQUARES KINDS LITE_NAMES METHODS
PRESETS PROTOCOLS REGION_AREAS REMOVAL_FILLS REMOVAL_STEPS ROAD_SHARES SALIENCY_THRESHOLDS
SENSITIVITY_RADIUS SENSITIVITY_SAMPLES SMALL_NETWORKS STABILITY_MEASURES STRATEGIES __version__"""
_ONE = """activations alpha_grid build_attacks center_box check_options crop_ensemble
default_transforms explorer find_cam_layer find_perceptual_layers first_layer_filters grid_boxes
layers_with_weights least_samples load_classifier load_denoiser load_localization_network
load_masking_network overlay paper_perceptual_layers plot_robust_accuracy random_squares
read_localization_facts receptive_field recorded_gradients save_classifier save_denoiser
save_localization_network save_masking_network smooth_activations superpixel_path takes_size
tokens_to_map whole_image_box bare_module boxes_to_mask MapElites map_elites"""
_PARTS = {
    "Attack": "PGD",
    "Transform": "TotalVariation",
    "Identity": "BitDepth",
    "DataError": "load_image",
    "RunWarning": "compare",
    "with_attacked": "tour",
    "InnerAttack": "adversarial_training",
    "MadryLoss": "adversarial_training",
    "EnsembleLoss": "adversarial_training",
    "standard_loss": "fit",
    "RobustRecipe": "adversarial_training",
    "AreaPenalty": "localization_training",
    "CollapseWatch": "localization_training",
    "LocalizationRecipe": "localization_training",
    "SegmentedImages": "localization_training",
    "DenoisingLoss": "denoising_training",
    "DenoisingRecipe": "denoising_training",
    "MaskingLoss": "masking_training",
    "MaskingRecipe": "masking_training",
    "Augmented": "fit",
    "Unlabelled": "fit",
}
COVERED = {
    **dict.fromkeys(_RESULTS.split(), "what an operation returns"),
    **dict.fromkeys(_SETTINGS.split(), "settings"),
    **dict.fromkeys(_CONSTANTS.split(), "a constant"),
    **dict.fromkeys(_ONE.split(), "no number of images: one image, a model, a size or a file"),
    **{name: f"as a part of {whole}" for name, whole in _PARTS.items()},
}
"""Public name -> why it is not in `OPERATIONS`."""
REASONS = {
    ("neighbours", "images"): "each image is compared with each: N² distances",
    ("MedianBlur", "side"): (
        "13 copies of an image leave the caches; per pixel 146 ns at 128, 172 at 512"
    ),
    ("SafetyNet", "images"): "its support vector machine compares images with each other",
    ("embedding", "images"): "t-SNE: N log N and more in its libraries",
}
"""Operation and axis -> why the cost grows faster than the axis."""
