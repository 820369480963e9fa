"""Metrics of localization, evidence, faithfulness and stability as pure functions on tensors.

Heat maps are N×H×W, boxes (x0, y0, x1, y1) in pixels and half-open (x1 is the last column plus
one), ground truth a list of M_i×4 boxes, one tensor a sample. A result lies on the device of the
maps or boxes that it was made from; of maps on MPS, which has no float64, on the CPU. NaN or
infinity in a map raises a ``ValueError`` that names the sample.
"""

from captum_robust.metrics.functional.bootstrap import (
    Interval,
    bootstrap_difference,
    bootstrap_interval,
)
from captum_robust.metrics.functional.box_accuracy import (
    maxboxacc,
    maxboxacc_curve,
    maxboxacc_from_ious,
    maxboxacc_ious,
    maxboxacc_v2,
)
from captum_robust.metrics.functional.box_sweep import sweep_boxes
from captum_robust.metrics.functional.boxes import (
    best_iou,
    box_iou,
    boxes_to_mask,
    center_box,
    center_box_map,
    random_map,
    whole_image_box,
    whole_image_map,
)
from captum_robust.metrics.functional.certificates import (
    CORRECTIONS,
    best_certified_iou,
    certified_iou,
    certified_localization_error,
    certify_counts,
    least_samples,
    probability_above,
)
from captum_robust.metrics.functional.certified_pixels import (
    certified_deletion,
    certified_order,
    certified_pointing,
    certified_share,
    grid_boxes,
    image_grid,
)
from captum_robust.metrics.functional.components import largest_component, mask_to_box
from captum_robust.metrics.functional.faithfulness import (
    REMOVAL_FILLS,
    REMOVAL_STEPS,
    RemovalCurve,
    deletion_curve,
    insertion_curve,
    removal_curves,
)
from captum_robust.metrics.functional.folds import split_folds
from captum_robust.metrics.functional.infidelity import (
    INFIDELITY_SQUARES,
    SENSITIVITY_RADIUS,
    SENSITIVITY_SAMPLES,
    infidelity,
    infidelity_of,
    random_squares,
    sensitivity,
    square_drops,
)
from captum_robust.metrics.functional.pixel_precision import (
    pxap,
    pxap_from_histograms,
    pxap_histograms,
)
from captum_robust.metrics.functional.pointing import pointing_game_accuracy, pointing_game_hits
from captum_robust.metrics.functional.randomization import (
    RandomizationScores,
    layers_with_weights,
    model_randomization,
)
from captum_robust.metrics.functional.regions import (
    REGION_AREAS,
    smallest_destroying_region,
    smallest_sufficient_region,
)
from captum_robust.metrics.functional.road import (
    ROAD_SHARES,
    RoadScores,
    linear_imputation,
    road,
)
from captum_robust.metrics.functional.saliency import (
    SALIENCY_THRESHOLDS,
    SaliencyScores,
    TunedSaliency,
    crop_and_resize,
    crop_scores,
    saliency_boxes,
    saliency_metric,
    saliency_of,
    tightest_box,
    tuned_saliency,
)
from captum_robust.metrics.functional.stability import (
    STABILITY_MEASURES,
    GapClosed,
    gap_closed,
    map_box_iou,
    pearson_correlation,
    spearman_correlation,
    stability,
    structural_similarity,
    top_k_intersection,
)
from captum_robust.metrics.functional.thresholding import STRATEGIES, alpha_grid, threshold
from captum_robust.metrics.functional.weak_localization import (
    PROTOCOLS,
    LocalizationResult,
    Protocol,
    gt_known_localization,
    localization_error,
    top1_localization,
)

__all__ = [
    "CORRECTIONS",
    "INFIDELITY_SQUARES",
    "PROTOCOLS",
    "REGION_AREAS",
    "REMOVAL_FILLS",
    "REMOVAL_STEPS",
    "ROAD_SHARES",
    "SALIENCY_THRESHOLDS",
    "SENSITIVITY_RADIUS",
    "SENSITIVITY_SAMPLES",
    "STABILITY_MEASURES",
    "STRATEGIES",
    "GapClosed",
    "Interval",
    "LocalizationResult",
    "Protocol",
    "RandomizationScores",
    "RemovalCurve",
    "RoadScores",
    "SaliencyScores",
    "TunedSaliency",
    "alpha_grid",
    "best_certified_iou",
    "best_iou",
    "bootstrap_difference",
    "bootstrap_interval",
    "box_iou",
    "boxes_to_mask",
    "center_box",
    "center_box_map",
    "certified_deletion",
    "certified_iou",
    "certified_localization_error",
    "certified_order",
    "certified_pointing",
    "certified_share",
    "certify_counts",
    "crop_and_resize",
    "crop_scores",
    "deletion_curve",
    "gap_closed",
    "grid_boxes",
    "gt_known_localization",
    "image_grid",
    "infidelity",
    "infidelity_of",
    "insertion_curve",
    "largest_component",
    "layers_with_weights",
    "least_samples",
    "linear_imputation",
    "localization_error",
    "map_box_iou",
    "mask_to_box",
    "maxboxacc",
    "maxboxacc_curve",
    "maxboxacc_from_ious",
    "maxboxacc_ious",
    "maxboxacc_v2",
    "model_randomization",
    "pearson_correlation",
    "pointing_game_accuracy",
    "pointing_game_hits",
    "probability_above",
    "pxap",
    "pxap_from_histograms",
    "pxap_histograms",
    "random_map",
    "random_squares",
    "removal_curves",
    "road",
    "saliency_boxes",
    "saliency_metric",
    "saliency_of",
    "sensitivity",
    "smallest_destroying_region",
    "smallest_sufficient_region",
    "spearman_correlation",
    "split_folds",
    "square_drops",
    "stability",
    "structural_similarity",
    "sweep_boxes",
    "threshold",
    "tightest_box",
    "top1_localization",
    "top_k_intersection",
    "tuned_saliency",
    "whole_image_box",
    "whole_image_map",
]
