"""ClassActivationMap: the maps of the field by name, of one layer or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust._captum import format_tensor_into_tuples
from captum_robust._checks import check, check_type, known_name
from captum_robust._contexts import without_autocast
from captum_robust._scores import at_least_float
from captum_robust.attr._classes import Target
from captum_robust.attr._inputs import MODES, enlarged, in_dtype_of, module_of, of_largest_one
from captum_robust.attr._layer_cut import LayerCut
from captum_robust.attr.robust_cam import Average, RobustCAM, positions_of, weighted_sum
from captum_robust.nn.layout import Layout

KINDS = ("grad_cam", "grad_cam_plus_plus", "layer_cam", "hires_cam", "eigen_cam")


class ClassActivationMap(RobustCAM):
    r"""A class activation map of one layer, or the mean of those of several.

    With features A, and the gradient g of the explained score by them, at channel c and position x:

    - ``"grad_cam"``: :math:`\sum_c \mathrm{mean}_x(g_c) A_c` (https://arxiv.org/abs/1610.02391)
    - ``"grad_cam_plus_plus"``: :math:`\sum_c A_c \sum_x \frac{\max(g_c, 0)}{2 + g_c \sum_x A_c}`,
      for the exponential of the score (https://arxiv.org/abs/1710.11063, equation 19)
    - ``"layer_cam"``: :math:`\sum_c \max(g_c, 0) A_c` (https://doi.org/10.1109/TIP.2021.3089943)
    - ``"hires_cam"``: :math:`\sum_c g_c A_c` (https://arxiv.org/abs/2011.08891)
    - ``"eigen_cam"``: the first principal component of A over the positions, in the direction in
      which the features grow; the same for all classes (https://arxiv.org/abs/2008.00299)

    It costs one forward pass and one backward pass from the scores to the first of the layers;
    ``"eigen_cam"`` takes no gradient. :class:`ScoreCAM` is a class of its own, and
    :class:`RobustCAM` the map averaged over the top classes.

    Args:
        forward_func: the model, or any function of the inputs that calls it.
        layer: the layer or its name, or several. Their positive maps, each divided by its maximum,
            are enlarged bilinearly to the size of the input and averaged.
        kind: one of these names, also as "Grad-CAM++".
        reshape_transform: as for :class:`RobustCAM`, for each of the layers.

    Raises:
        ValueError: an unknown ``kind``, no layer, none of that name, or one twice.
        TypeError: as for :class:`RobustCAM`.
    """

    ranks_classes = False

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: nn.Module | str | Sequence[nn.Module | str],
        kind: str = "layer_cam",
        *,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        kind = known_name("kind", kind, KINDS)
        given = (layer,) if isinstance(layer, (nn.Module, str)) else layer
        check_type("layer", given, Sequence, "a torch.nn.Module, its name, or a list of such")
        check(given, "layer: expected at least one")
        layers = [module_of(forward_func, each) for each in given]
        check(len(set(layers)) == len(layers), "layer: expected each once")
        super().__init__(
            forward_func, layers[0], base="gradcam", reshape_transform=reshape_transform
        )
        self.layers = tuple(layers)
        self.kind = kind

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        *,
        normalize: str | None = "max",
        upsample: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """The map of each sample: N×1×h×w, the layer's size; N×1×H×W with ``upsample``, or of
        several layers.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: N×C×H×W, or a tuple.
            target: the explained class, or a function of the scores; None: the predicted class.
            additional_forward_args: passed on to ``forward_func``.
            attribute_to_layer_input: make the map of the layer's input instead of its output.
            normalize: ``"max"``: the positive part divided by its maximum. ``"minmax_each"``:
                scaled to [0, 1]. None: the signed map as it is.
            upsample: bilinear, to the spatial size of the (first) input.

        Returns:
            As :meth:`RobustCAM.attribute`; one map where there are several layers.

        Raises:
            ValueError: a wrong ``normalize``; a layer that does not run, has no positions, or does
                not influence the scores.
        """
        cut = LayerCut(self.layer, attribute_to_layer_input, others=self.layers[1:])
        average = Average([1.0], normalize, upsample, None)
        return self._map(inputs, target, additional_forward_args, cut, average)

    def differentiable(  # type: ignore[override]  # of one class
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        *,
        normalize: str | None = "max",
        upsample: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """The map of :meth:`attribute` with its graph, as :meth:`RobustCAM.differentiable`."""
        others = self.layers[1:]
        cut = LayerCut(self.layer, attribute_to_layer_input, keep_trunk=True, others=others)
        average = Average([1.0], normalize, upsample, None)
        return self._map(inputs, target, additional_forward_args, cut, average)

    def _map(
        self, inputs: Any, target: Target, extra: object, cut: LayerCut, average: Average
    ) -> Tensor | tuple[Tensor, ...]:
        maps = super()._map(inputs, target, extra, cut, average)
        if not cut.others:
            return maps
        x = format_tensor_into_tuples(inputs)[0]
        for each in maps:
            fits = each.ndim == x.ndim and each.ndim in MODES
            got = f"got {tuple(each.shape)} of an input {tuple(x.shape)}"
            check(fits, f"layer: expected maps of the input's dimensions to fuse, {got}")
        mean = torch.stack([enlarged(at_least_float(m), x.shape[2:]) for m in maps]).mean(dim=0)
        return in_dtype_of(x, mean if average.normalize is None else of_largest_one(mean))

    def _class_maps(
        self,
        cut: LayerCut,
        layouts: list[Layout | None],
        weight: Tensor | None,
        selected: Tensor,
        classes: Tensor | None,
    ) -> list[Tensor]:
        if self.kind != "eigen_cam":
            return super()._class_maps(cut, layouts, weight, selected, classes)
        self._check_batch(cut, layouts, len(selected))
        each = zip(cut.leaves, layouts, strict=True)
        return [_first_component(self._features(leaf, layout, cut)) for leaf, layout in each]

    def _combined(self, gradients: Tensor, features: Tensor) -> Tensor:
        a = at_least_float(features)
        if self.kind == "grad_cam_plus_plus":
            # g² / (2 g² + g³ ΣA) in the paper, 0 where g is.
            by = 2 + positions_of(a, 2).sum(dim=2, keepdim=True) * positions_of(gradients, 3)
            alpha = by.masked_fill(by == 0, 1).reciprocal()
            weights = (positions_of(gradients, 3).clamp(min=0) * alpha).sum(dim=3)
            return weighted_sum(weights, features)
        if self.kind in ("layer_cam", "hires_cam"):
            g = gradients.clamp(min=0) if self.kind == "layer_cam" else gradients
            return (g * a).sum(dim=2).transpose(0, 1)
        return super()._combined(gradients, features)


def _first_component(features: Tensor) -> Tensor:
    """N×1×… of features N×C×…: their deviation from the mean along its main direction."""
    with without_autocast(features):
        a = positions_of(at_least_float(features), 2).mT
        total = a.sum(dim=2, keepdim=True)
        a = a - a.mean(dim=1, keepdim=True)
        component = a @ torch.linalg.svd(a, full_matrices=False).Vh[:, :1].mT
        # The decomposition leaves the sign open.
        grows = (component * total).sum(dim=1, keepdim=True) >= 0
        component = torch.where(grows, component, -component)
    return component.reshape(len(features), 1, *features.shape[2:])
