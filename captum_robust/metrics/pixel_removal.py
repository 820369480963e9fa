"""Whether maps are faithful to the model, as torchmetrics classes."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from captum_robust._checks import check_choice, check_count, check_number
from captum_robust.metrics._counts import CountMetric
from captum_robust.metrics.functional._validate import check_flag, check_seed
from captum_robust.metrics.functional.faithfulness import (
    REMOVAL_FILLS,
    REMOVAL_STEPS,
    RemovalCurve,
    deletion_curve,
    insertion_curve,
)
from captum_robust.metrics.functional.folds import millionths
from captum_robust.metrics.functional.infidelity import (
    INFIDELITY_SQUARES,
    SENSITIVITY_RADIUS,
    SENSITIVITY_SAMPLES,
    infidelity,
    sensitivity,
)
from captum_robust.metrics.functional.randomization import Explain, model_randomization
from captum_robust.metrics.functional.road import ROAD_SHARES, check_imputation, road
from captum_robust.metrics.functional.saliency import Scores


class _Removal(CountMetric):
    """The mean over the images of one value each, in whole millionths of ``1 / _scale``.

    The classifier is an argument of ``update``, so that the metric holds no copy of it. The mean
    does not depend on batches, order or sharding.
    """

    sums: Tensor
    images: Tensor
    _scale = 1.0
    """More for values that are small."""

    def __init__(self, batch_size: int | None, *settings: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("batch_size", batch_size, 1, optional=True)
        self.batch_size = batch_size
        self._count("sums")
        self._count("images")
        self._keep_apart(type(self).__name__, *settings)

    def _values(self, model: Scores, images: Tensor, maps: Tensor, classes: Tensor) -> Tensor:
        """Return the value of each of N images."""
        raise NotImplementedError

    def update(self, model: Scores, images: Tensor, maps: Tensor, classes: Tensor) -> None:
        """Add images N×C×H×W with their maps N×H×W or N×1×H×W and N classes."""
        self._add(self._values(model, images, maps, classes))

    def _add(self, values: Tensor) -> None:
        # In float64, which not every device has.
        self.sums += millionths(self._scale * values.cpu().double()).sum().to(self.sums.device)
        self.images += len(values)

    def compute(self) -> Tensor:
        """Return the mean over the images; NaN of none."""
        return self.sums / (1e6 * self._scale * self.images)


class _Area(_Removal):
    """The area under a curve of deletion or insertion."""

    _curve: Callable[..., RemovalCurve]

    def __init__(self, steps: int, fill: str, batch_size: int | None, **kwargs: Any) -> None:
        check_count("steps", steps, 1)
        check_choice("fill", fill, REMOVAL_FILLS)
        super().__init__(batch_size, steps, fill, **kwargs)
        self.steps = steps
        self.fill = fill

    def _values(self, *batch: Any) -> Tensor:
        curve = type(self)._curve
        settings = {"steps": self.steps, "fill": self.fill, "batch_size": self.batch_size}
        return curve(*batch, **settings).area


class Deletion(_Area):
    """The area under the curve of deletion, averaged over the images; lower is better.

    See :func:`captum_robust.metrics.functional.deletion_curve`.

    Args:
        steps: in how many the pixels are replaced.
        fill: "mean" or "blur", what they are replaced by.
        batch_size: how many images the classifier gets at once; None: as for the function.
        kwargs: of ``torchmetrics.Metric``.

    >>> import torch
    >>> def model(x):  # the class has the probability of the brightness
    ...     p = x.mean(dim=(1, 2, 3))
    ...     return torch.stack([p, 1 - p], dim=1).log()
    >>> image = torch.tensor([[[[1.0, 0.6], [0.2, 0.2]]]])
    >>> metric = Deletion(steps=2)
    >>> metric.update(model, image, image[:, 0], torch.tensor([0]))
    >>> round(metric.compute().item(), 3)  # the trapezoids of .5, .35 and .5
    0.425
    """

    higher_is_better = False
    _curve = staticmethod(deletion_curve)

    def __init__(
        self,
        steps: int = REMOVAL_STEPS,
        fill: str = "mean",
        *,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(steps, fill, batch_size, **kwargs)


class Insertion(_Area):
    """The area under the curve of insertion, averaged over the images; higher is better.

    See :func:`captum_robust.metrics.functional.insertion_curve`; arguments are those of
    :class:`Deletion`.
    """

    higher_is_better = True
    _curve = staticmethod(insertion_curve)

    def __init__(
        self,
        steps: int = REMOVAL_STEPS,
        fill: str = "blur",
        *,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(steps, fill, batch_size, **kwargs)


class ROAD(_Removal):
    """(least - most) / 2, averaged over shares of the pixels and images; higher is better.

    Least and most are the probabilities of the class without the pixels that matter least, and
    most, by the map; see :func:`captum_robust.metrics.functional.road`, whose arguments these are.
    Others are of ``torchmetrics.Metric``.
    """

    higher_is_better = True

    def __init__(
        self,
        shares: Sequence[float] = ROAD_SHARES,
        noise: float = 0.01,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.shares = check_imputation(shares, noise, seed)
        super().__init__(batch_size, self.shares, noise, seed, **kwargs)
        self.noise = noise
        self.seed = seed

    def _values(self, *batch: Any) -> Tensor:
        settings: dict[str, Any] = {"shares": self.shares, "noise": self.noise, "seed": self.seed}
        return road(*batch, **settings, batch_size=self.batch_size).combined


class Infidelity(_Removal):
    """How badly the map foretells what squares are worth, averaged over the images.

    Lower is better. See :func:`captum_robust.metrics.functional.infidelity`, whose arguments these
    are. Others are of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(
        self,
        squares: int = INFIDELITY_SQUARES,
        fill: str = "mean",
        *,
        normalize: bool = True,
        seed: int = 0,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_count("squares", squares, 1)
        check_choice("fill", fill, REMOVAL_FILLS)
        check_flag("normalize", normalize)
        check_seed(seed)
        super().__init__(batch_size, squares, fill, normalize, seed, **kwargs)
        if normalize:  # squares of small numbers, at most 1
            self._scale = 1e3
        self._settings: dict[str, Any] = {
            "squares": squares,
            "fill": fill,
            "normalize": normalize,
            "seed": seed,
        }

    def _values(self, *batch: Any) -> Tensor:
        return infidelity(*batch, **self._settings, batch_size=self.batch_size)


class Sensitivity(_Removal):
    """How far noise moves the map at most, averaged over the images; lower is steadier.

    See :func:`captum_robust.metrics.functional.sensitivity`, whose arguments these are. Others are
    of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(
        self,
        radius: float = SENSITIVITY_RADIUS,
        samples: int = SENSITIVITY_SAMPLES,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_number("radius", radius, 0, open_low=True)
        check_count("samples", samples, 1)
        check_seed(seed)
        super().__init__(None, radius, samples, seed, **kwargs)
        self._settings: dict[str, Any] = {"radius": radius, "samples": samples, "seed": seed}

    def update(  # type: ignore[override]  # of a method, not of its maps
        self, explain: Explain, images: Tensor, classes: Tensor, maps: Tensor | None = None
    ) -> None:
        """Add images N×C×H×W with N classes, and their maps N×H×W where they are known."""
        self._add(sensitivity(explain, images, classes, maps=maps, **self._settings))


class ModelRandomization(_Removal):
    """How far the map stays the same while the model loses its weights, averaged over the images.

    The mean over the stages of the randomization; lower is better, as the map of a trained model
    must show what that has learned. See
    :func:`captum_robust.metrics.functional.model_randomization`.

    Args:
        measure: "spearman", the rank correlation, or "ssim", the structural similarity.
        layers: names of the model's layers, in the order in which they are randomised; None: all
            that have parameters, last first.
        stages: how often maps are made; None: after each layer.
        seed: of the new weights.
        kwargs: of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(
        self,
        measure: str = "spearman",
        *,
        layers: Sequence[str] | None = None,
        stages: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_choice("measure", measure, ("spearman", "ssim"))
        check_seed(seed)
        layers = None if layers is None else tuple(layers)
        if stages is not None:
            check_count("stages", stages, 1)
        super().__init__(None, measure, layers, stages, seed, **kwargs)
        self.measure = measure
        self.layers = layers
        self.stages = stages
        self.seed = seed

    def update(  # type: ignore[override]  # of a method, not of its maps
        self, model: nn.Module, explain: Explain, images: Tensor, classes: Tensor
    ) -> None:
        """Add images N×C×H×W with N classes; ``explain`` explains that very model."""
        settings: dict[str, Any] = {"layers": self.layers, "stages": self.stages}
        scores = model_randomization(model, explain, images, classes, seed=self.seed, **settings)
        self._add(getattr(scores, self.measure).mean(dim=0))
