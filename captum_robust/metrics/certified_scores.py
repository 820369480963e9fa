"""How much is certified, and how well, as torchmetrics classes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from captum_robust._checks import check_number
from captum_robust.metrics._counts import CountMetric
from captum_robust.metrics.functional.certificates import best_certified_iou
from captum_robust.metrics.functional.certified_pixels import certified_pointing, certified_share
from captum_robust.metrics.functional.folds import millionths


class _Mean(CountMetric):
    """The mean of one value an image, in whole millionths; images without a value count nowhere."""

    sums: Tensor
    images: Tensor
    """How many have a value."""

    def __init__(self, *settings: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._count("sums")
        self._count("images")
        self._keep_apart(type(self).__name__, *settings)

    def _add(self, values: Tensor) -> None:
        values = values[~values.isnan()].cpu().double()
        self.sums += millionths(values).sum().to(self.sums.device)
        self.images += len(values)

    def compute(self) -> Tensor:
        """Return the mean over the images that have a value; NaN of none."""
        return self.sums / (1e6 * self.images)


class CertifiedShare(_Mean):
    """The share of the pixels that are certified, averaged over the images; higher is better.

    See :func:`captum_robust.metrics.functional.certified_share`.

    Args:
        kwargs: of ``torchmetrics.Metric``.

    >>> import torch
    >>> inside, outside = torch.tensor([[[True, False]]]), torch.tensor([[[False, False]]])
    >>> metric = CertifiedShare()
    >>> metric.update(inside, outside)
    >>> metric.compute().item()
    0.5
    """

    higher_is_better = True

    def update(self, inside: Tensor, outside: Tensor) -> None:
        """Add images: N×H×W truth values, where pixels are certified in, and where out."""
        self._add(certified_share(inside, outside))


class CertifiedPointing(_Mean):
    """How much of what is certified in lies on the object, averaged; higher is better.

    See :func:`captum_robust.metrics.functional.certified_pointing`. Images without a pixel that is
    certified in are left out; ``images`` counts the others.

    Args:
        kwargs: of ``torchmetrics.Metric``.
    """

    higher_is_better = True

    def update(self, inside: Tensor, ground_truth: Tensor | Sequence[Tensor]) -> None:
        """Add images: N×H×W truth values, where pixels are certified in, with masks or boxes."""
        self._add(certified_pointing(inside, ground_truth))


class CertifiedLocalizationError(_Mean):
    """The share of images whose box is not proven to be right, whatever the attacker does.

    See :func:`captum_robust.metrics.functional.certified_localization_error`. Images without a box
    are left out; ``images`` counts the others. Lower is better.

    Args:
        iou_threshold: the overlap, in [0, 1), that has to be exceeded.
        kwargs: of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(self, iou_threshold: float = 0.5, **kwargs: Any) -> None:
        check_number("iou_threshold", iou_threshold, 0, 1, open_high=True)
        super().__init__(iou_threshold, **kwargs)
        self.iou_threshold = iou_threshold

    def update(self, inner: Tensor, outer: Tensor, ground_truth: Tensor | Sequence[Tensor]) -> None:
        """Add images: boxes N×4, NaN where there is none, with N ground-truth boxes M_i×4."""
        proven = best_certified_iou(inner, outer, ground_truth)
        wrong = (proven <= self.iou_threshold).double()
        self._add(wrong.masked_fill(proven.isnan(), float("nan")))
