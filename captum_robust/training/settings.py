"""The settings of each training: name, type, default and meaning of each, written once.

The options of ``captum-robust train`` follow from them: what stands below a field is its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from captum_robust._checks import as_levels, check_choice, check_count, check_number


def _levels_or_text(text: str) -> object:
    """The strength as a number, else as it was typed, for the check that refuses it to name."""
    levels = as_levels(text)
    return text if math.isnan(levels) else levels


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how to train.

    The learning rate rises linearly over the ``warmup`` share of the steps, then falls along half
    a cosine to 0. An epoch leaves out the images that fill no batch, other ones each time.
    Whatever ``checkpoint_every`` is, a run that was killed ends with the same weights.

    Raises:
        ValueError: a value out of range; names it.
    """

    epochs: int = 30
    """Passes over the images."""
    batch_size: int = 64
    """Images a step, of all processes together."""
    micro_batch_size: int | None = None
    """Images that a process takes at once, where memory is short: the gradients of its share of a
    batch add up part by part, and the step is that of the whole. Else all of its share."""
    learning_rate: float = 0.1
    """The highest of the schedule."""
    weight_decay: float = 5e-4
    """Weight decay of stochastic gradient descent."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    precision: str = "float32"
    """float32 or bfloat16."""
    seed: int = 0
    """Seed of all that is drawn."""
    evaluate_every: int | None = None
    """Steps between two measurements; else each epoch."""
    checkpoint_every: float = 60.0
    """Seconds between two checkpoints."""
    workers: int = 0
    """Processes that load images."""
    device: str = "auto"
    """auto, or cpu."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("workers", 0)):
            check_count(name, getattr(self, name), least)
        for name in ("micro_batch_size", "evaluate_every"):
            check_count(name, getattr(self, name), 1, optional=True)
        check_number("learning_rate", self.learning_rate, 0, open_low=True)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("checkpoint_every", self.checkpoint_every, 0)
        check_number("warmup", self.warmup, 0, 1)
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        check_choice("device", self.device, ("auto", "cpu"))

    def training(self, **other: Any) -> TrainingSettings:
        """Those of these settings that the loop takes, with others in their place."""
        own = self.named(*(f.name for f in fields(TrainingSettings)))
        return TrainingSettings(**(own | other))

    def named(self, *names: str) -> dict[str, Any]:
        """These of the settings, for a function that takes them under the same names."""
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(TrainingSettings):
    """What the trainings on a folder of images have in common."""

    images: Path
    """Folder with one sub-folder of images a class, or what --kind says."""
    out: Path
    """Folder of the run."""
    kind: str = "folder"
    """folder, tiny-imagenet (its training part), imagenet, or webdataset (a tar, a folder of
    tars, or a pattern of them)."""
    exif_orientation: bool = field(default=False, metadata={"options": ("--exif-orientation",)})
    """Boxes and masks of the data set were drawn on upright images, as most viewers show them.
    Without it, on the pixels as they are stored. Images are upright either way."""
    mean: str | None = None
    """Means of the channels that the classifier takes, separated by commas, for pixels in [0, 1];
    else its own."""
    std: str | None = None
    """Standard deviations of the channels, as for --mean."""
    size: int | None = None
    """Side of the images in pixels; else the model's own."""


@dataclass(frozen=True, kw_only=True)
class LabelledSettings(RecipeSettings):
    """What the trainings on images of known classes have in common."""

    fit: str = "squash"
    """squash the whole image to the size, or crop its centre."""
    classes: int | None = None
    """Only the first so many classes of the data set."""
    held_out: float = 0.1
    """Share of the images that is not trained on, to measure with."""
    evaluation_images: int = 128
    """So many of them are measured, before, during and after."""
    augment: bool = True
    """Mirror and shift the images at random."""


@dataclass(frozen=True, kw_only=True)
class RobustSettings(LabelledSettings):
    """A classifier that withstands attacks, see :class:`RobustRecipe`."""

    out: Path = Path("captum-robust-train")
    """Folder of the run: model.safetensors, log.jsonl, checkpoint."""
    model: str = "small_resnet"
    """small_resnet (for 64 pixels), efficientnet_lite0, …1, …2, a torchvision classification model,
    timm:NAME, or an own one as package.module:function, which is called without arguments."""
    weights: str = "none"
    """Where to start: none for random ones, DEFAULT, a member of torchvision's weights enum, or the
    file of a state dict. Without a file an own model has the weights of its function."""
    method: str = "madry"
    """madry; ensemble, with --static; or standard, without attacks, to compare with."""
    static: list[str] | None = None
    """ensemble: a model that was trained before, as NAME=FILE.safetensors or NAME; may be given
    several times."""
    epsilon: float = field(
        default=8.0, metadata={"facts": {"parser": _levels_or_text, "metavar": "FLOAT"}}
    )
    """Strength of the attack in levels of an 8-bit image: 8, or 8/255."""
    steps: int = 7
    """Steps of the attack within each training step."""


@dataclass(frozen=True, kw_only=True)
class MaskingSettings(RecipeSettings):
    """A masking network, see :class:`MaskingRecipe`."""

    images: Path
    """Folder of images, in sub-folders named after classes or not."""
    out: Path = Path("captum-robust-masking")
    """Folder of the run: masking.safetensors, log.jsonl, checkpoint."""
    model: str = "efficientnet_lite0"
    """The classifier: efficientnet_lite0, …1, …2, small_resnet, torchvision's, timm:NAME, or an own
    one as package.module:function."""
    weights: str = "DEFAULT"
    """Weights of the classifier: DEFAULT, a member of torchvision's weights enum, none, or the file
    of a state dict."""
    start: Path | None = None
    """A masking network to start from, else a new one."""
    labels: str = "folder"
    """folder: the classes of the sub-folders, of images without one what the classifier sees;
    model: always what the classifier sees in the part shown."""
    objective: str = "paper"
    """paper: its equation 3; code: the authors' hinges."""
    weight: list[str] | None = None
    """A weight of the objective, as NAME=NUMBER; may be given several times."""
    removal: str = "both"
    """What stands in for removed pixels: both, blur or color."""
    fake_probability: float = 0.3
    """Share of the images asked for a class that is not there."""
    fakes: str = "area"
    """What these are trained for: area, no mask; swapped, all but the true class."""
    crop: float = 0.0
    """Weight of the saliency metric of the mask's own box, whose sides then learn too."""
    warm_up_steps: int = 200
    """Steps in which the feature filter alone is trained, before the rest."""
    learned_classes: bool = False
    """Learn the classes' vectors, not take the classifier's last layer."""
    limit: int | None = None
    """Of --images only so many, drawn; else all."""
    validation: Path | None = None
    """Folder of images to stop by; else a part of --images."""
    held_out: float = 0.1
    """Without --validation: share of the images not trained on."""
    evaluation_images: int = 128
    """So many of these are looked at, before, during and after."""
    evaluate_every: int | None = None
    """Steps between two such looks; else each epoch."""
    patience: int | None = None
    """Stop after so many looks without a better one."""
    tensorboard: bool = False
    """Write losses and masks to OUT/tensorboard."""
    half: bool = True
    """Write masking.safetensors in half precision."""
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""


MASKING_RECIPES: dict[str, dict[str, Any]] = {
    "imagenet": {
        **{"kind": "imagenet", "model": "resnet50", "labels": "model", "limit": 50_000},
        **{"epochs": 5, "batch_size": 64, "learning_rate": 3e-3, "precision": "bfloat16"},
        **{"held_out": 0.01, "evaluation_images": 500, "evaluate_every": 500, "workers": 8},
    },
}
"""Name of a recipe -> the settings that it is, for those that are not given."""


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings(RecipeSettings):
    """A denoiser, see :class:`DenoisingRecipe`."""

    images: Path
    """Folder of images, in sub-folders or not; what is in them does not matter."""
    out: Path = Path("captum-robust-denoiser")
    """Folder of the run: denoiser.safetensors, log.jsonl, checkpoint."""
    model: str = "efficientnet_lite0"
    """The classifier, as for train masking."""
    weights: str = "DEFAULT"
    """Weights of the classifier, as for train masking."""
    start: Path | None = None
    """A denoiser to start from, else a new one."""
    width: int = 64
    """Channels of a new one, at a quarter of the resolution."""
    sigma_low: float = 0.05
    """The least standard deviation of the noise, of pixels in [0, 1]."""
    sigma_high: float = 0.5
    """The largest."""
    features: float = 1.0
    """Weight of what the classifier sees, beside the pixels; 0: these alone, which is quicker."""
    part: int | None = None
    """Side of the parts of images that it learns from; else the classifier's."""
    held_out: float = 0.1
    """Share of the images not trained on."""
    evaluation_images: int = 128
    """So many of these are looked at, before, during and after."""
    batch_size: int = 8
    learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""


@dataclass(frozen=True, kw_only=True)
class LocalizationSettings(LabelledSettings):
    """A localization network, see :class:`LocalizationRecipe`."""

    images: Path = field(metadata={"options": ("--images", "--root")})
    """Folder with one sub-folder of images a class, or what --kind says."""
    out: Path = Path("captum-robust-localization")
    """Folder of the run: localization.safetensors, log.jsonl, …"""
    kind: str = field(default="folder", metadata={"options": ("--kind", "--dataset")})
    """folder, tiny-imagenet (its training part), imagenet, or webdataset (a tar, a folder of
    tars, or a pattern of them)."""
    model: str = "simple_convnet"
    """The classifier: simple_convnet or small_resnet (for 64 pixels), efficientnet_lite0, …1, …2,
    a torchvision classification model, timm:NAME, or an own one as package.module:function."""
    weights: str = "none"
    """Weights of the classifier: none for random ones, DEFAULT, a member of torchvision's weights
    enum, or the file of a state dict."""
    pretraining_epochs: int = 20
    """Epochs of the classifier alone, on clean images, before the rest."""
    pretraining_rate: float = 2e-3
    """The highest learning rate of these epochs."""
    width: int = 16
    """Channels of the corruption network."""
    trunk: str | None = None
    """What its features come from: a network as for --model, or classifier, a copy of that; else
    four scales of its own."""
    trunk_weights: str = "none"
    """Weights of the trunk, as for --weights."""
    train_trunk: bool | None = field(
        default=None, metadata={"options": ("--train-trunk/--freeze-trunk",)}
    )
    """Whether it learns with the rest; else only where its weights are random."""
    trunk_size: int | None = None
    """Images are enlarged to this side for the trunk; else they are not."""
    superpixels: bool = True
    """Remove whole super-pixels, or pixels."""
    segments: int = 100
    """About so many super-pixels an image."""
    superpixel_file: Path | None = None
    """Where they are kept; else beside the images, or in --out."""
    area: float = 3.0
    """Weight of the share that is removed."""
    area_start: float | None = None
    """The weight in the first step; else the same."""
    area_rise: float = 0.3
    """Share of the steps in which it rises from the one to the other."""
    area_target: float = 0.5
    """Share to remove, which the weight then follows; 0: it does not."""
    area_gain: float = 0.05
    """How fast the weight follows the share."""
    area_power: float = 2.0
    """Power of the share of each image; 1 as in the paper, 2 evens the images out."""
    trainable_layers: int | None = None
    """So many of the classifier's last layers are trained; else all of it."""
    steps_of_classifier: int = 1
    """For each step of the corruption network."""
    clean_share: float = 0.9
    """Share of the images that the classifier sees as they are."""
    form: str = "bounded"
    """Form of the corruption network's loss: bounded, squared or literal."""
    literal: bool = False
    """Draw masks by the paper's formula, not its correction."""
    evaluation_images: int = 512
    half: bool = False
    """Write localization.safetensors in half precision."""
    epochs: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
