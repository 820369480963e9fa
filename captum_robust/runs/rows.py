"""The rows of a run: a column of its database for each field."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ImageRow:
    """One image of a run. ``boxes`` are M×4 in fractions of the image's width and height."""

    position: int
    image: str
    label: int | None = None
    height: int | None = None
    width: int | None = None
    boxes: list[list[float]] | None = None
    picture: bytes | None = None
    true_crop: bytes | None = None
    """What ``ResultRow.crops`` holds, for the largest true box."""
    error: str | None = None


@dataclass
class ResultRow:
    """One method on one image under one attack; tensors are packed, see ``store.pack``."""

    position: int
    method: str
    attack: str
    image: str
    predicted: int | None = None
    explained: int | None = None
    confidence: float | None = None
    seconds: float | None = None
    forward_passes: float | None = None
    backward_passes: float | None = None
    pointing: float | None = None
    ious: bytes | None = None
    predicted_boxes: bytes | None = None
    maxboxacc: bytes | None = None
    maxboxacc_v2: bytes | None = None
    pxap: bytes | None = None
    heat: bytes | None = None
    new_class: int | None = None
    flipped: bool | None = None
    margin: float | None = None
    perturbation: bytes | None = None
    amplification: float | None = None
    decided: int | None = None
    """The class that a defended method takes the image for; of others ``predicted``."""
    source: str | None = None
    """The attack whose row has the image that the map is of, where it is not ``attack``."""
    spearman: float | None = None
    pearson: float | None = None
    ssim: float | None = None
    top_k: float | None = None
    box_iou: float | None = None
    """How far the map is that of the clean image, see ``metrics.functional.stability``."""
    crops: bytes | None = None
    """2×A, of A thresholds: area and log probability of the crop, see ``crop_scores`` there."""
    removal: bytes | None = None
    """3×(S+1): the share of the pixels; the class's probability when so many are gone; are in."""
    road: bytes | None = None
    """3×A: the share of the pixels; the probability without the largest; the smallest."""
    infidelity: float | None = None
    randomized_spearman: float | None = None
    randomized_ssim: float | None = None
    """How far the map stays the same without the model's weights, the mean over the stages."""
    sensitivity: float | None = None
    certificate: bytes | None = None
    """What is proven of its box, see ``measure.certificate_columns``."""
    certified_cells: bytes | None = None
    """R×h×w uint8 of so many radii, what is proven of each cell."""
    error: str | None = None


@dataclass
class AttackRow:
    """One image under one attack, whatever the methods."""

    position: int
    attack: str
    image: str
    label: int | None = None
    """The class that the attack was given: where none is known, the prediction."""
    before: int | None = None
    predicted: int | None = None
    confidence: float | None = None
    already: bool | None = None
    """Misclassified before the attack."""
    fooled: bool | None = None
    """Classified right before, and not after (a targeted attack: as the class aimed at)."""
    skipped: bool | None = None
    """Not attacked, as its label is the class aimed at."""
    linf: float | None = None
    l2: float | None = None
    """Length of the change, in pixel units."""
    without_gradient: bool | None = None
    """Right before and not fooled, but the attack had no gradient to go by."""
    file: str | None = None
    """Path of the adversarial image, relative to the run's folder."""
    picture: bytes | None = None
    change: bytes | None = None
    amplification: float | None = None
    """The attacked image, and its change so many times, as JPEG."""
    error: str | None = None
