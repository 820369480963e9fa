"""RobustCAM: the class activation map averaged over the top classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import GradientAttribution, LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust._captum import format_output
from captum_robust._checks import check, check_choice
from captum_robust._contexts import DID_NOT_RUN
from captum_robust._scores import at_least_float, finite_scores, model_scores, one_row_a_sample
from captum_robust.attr._classes import Ranking, Target, class_weights, top_classes
from captum_robust.attr._inputs import MODES, checked, divided, enlarged, in_dtype_of, module_of
from captum_robust.attr._layer_cut import LayerCut, cut_at, gradients_of
from captum_robust.nn.layout import Layout, recognised
from captum_robust.nn.places import Layouts

_BASES = ("auto", "cam", "gradcam")
_NORMALIZATIONS = ("max", "minmax_each", None)


class RobustCAM(LayerAttribution, GradientAttribution):
    r"""The class activation map of the k top classes, each half as heavy as the one above it.

    .. math:: \hat M = \sum_{i=1}^{k} 2^{-i} M_{c_i}, \qquad M_c(x, y) = \sum_j w_j^c f_j(x, y)

    An attack that flips the label mostly moves the true class to second place, so a map averaged
    over the top classes moves less than the map of the winner. Equations 1 and 2 of Prakash et al.,
    "Robust Discriminative Localization Maps" (2018). The paper prints "global max pool" for the
    weights; they are the classifier's, behind global average pooling, as in Zhou et al. (2016).

    It costs one forward pass. The part up to ``layer`` runs without gradients; only the part
    behind it is differentiated, once, for all k classes together.

    Args:
        forward_func: the model, or any function of the inputs that calls it.
        layer: whose output, N×C×h×w, the map is made of (``Classifier.cam_layer``), or its dotted
            name in the model, such as ``"layer4"``. N×C×… with any number of positions works, and a
            tuple of such. Channels in the last dimension, and the tokens of images, are recognised
            by how they were computed.
        base: the map of one class. ``"cam"``: equation 1, for a network whose layer is followed by
            global average pooling and one linear layer; analytic, no backward pass.
            ``"gradcam"``: LayerGradCam's map, for any layer and head (on such a network equation 1
            divided by h·w). ``"auto"``: LayerGradCam's map too, analytically where that is exact.
        reshape_transform: turns the layer's output into N×C×h×w, where it is not recognised or
            otherwise than that. A ``Classifier`` brings its own for its ``cam_layer``.

    Raises:
        ValueError: an unknown ``base``; no layer of that name.
        TypeError: ``layer`` is no module and no name, or a name where ``forward_func`` is no model.
    """

    explains_prediction = True  # without a target; ``Guided`` asks
    ranks_classes = True  # by ``ranking``; ``Defended`` asks

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: nn.Module | str,
        *,
        base: str = "auto",
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        layer = module_of(forward_func, layer)
        check_choice("base", base, _BASES)
        LayerAttribution.__init__(self, forward_func, layer)
        GradientAttribution.__init__(self, forward_func)
        if reshape_transform is None:
            reshape_transform = reshape_of(forward_func, layer)
        self.base = base
        self.reshape_transform = reshape_transform
        self._recognised: dict[Any, list[Layout | None]] = {}

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        *,
        k: int | None = None,
        weights: str | Sequence[float] = "exponential",
        normalize: str | None = "max",
        upsample: bool = False,
        ranking: Ranking | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The map of each sample: N×1×h×w, the layer's size, or N×1×H×W with ``upsample``.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: N×C×H×W, or a tuple.
            target: None: the k classes with the highest scores. A given class comes first, the
                other top classes follow. With scores N×K×…, a tuple's first index is the class.
            additional_forward_args: passed on to ``forward_func``.
            attribute_to_layer_input: make the map of the layer's input instead of its output.
            k: how many classes; at most the number there is. Default 5, or as many as ``weights``.
            weights: ``"exponential"``: 2^-i for the i-th class, from 1. Or the k weights.
            normalize: ``"max"``: the positive part divided by its maximum, in [0, 1] (a map
                without a positive value becomes zeros). ``"minmax_each"``: the map of each class
                scaled to [0, 1] before averaging, and the average again, as in the authors' code.
                None: the signed sum as it is.
            upsample: bilinear, to the spatial size of the (first) input.
            ranking: scores N×K -> the numbers N×K that rank the classes in their stead, as
                :class:`Defended` has them.

        Returns:
            One map, or a tuple of maps for a layer that returns several tensors, in a tuple (of
            any kind), list or dictionary, or a tuple of one; dtype of the input.

        Raises:
            ValueError: a wrong ``k``, ``weights`` or ``normalize``; a layer that does not run or
                does not influence the scores; ``base="cam"`` on a network that it does not hold
                for; ``upsample`` where map and input have not the same number of dimensions;
                tokens whose places in the image are not known, or that no score depends on but for
                a class token.
            TypeError: a layer whose output holds no floating-point tensor; scores that are no
                tensor.
        """
        cut = LayerCut(self.layer, attribute_to_layer_input)
        average = Average(class_weights(k, weights), normalize, upsample, ranking)
        return self._map(inputs, target, additional_forward_args, cut, average)

    def differentiable(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        *,
        k: int | None = None,
        weights: str | Sequence[float] = "exponential",
        normalize: str | None = "max",
        upsample: bool = False,
        ranking: Ranking | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The map of :meth:`attribute` with its graph, to be differentiated by the inputs.

        For whoever optimises the map itself, as :class:`captum_robust.attacks.ExplanationAttack`.
        The whole network is recorded, not only the part behind the layer.
        """
        cut = LayerCut(self.layer, attribute_to_layer_input, keep_trunk=True)
        average = Average(class_weights(k, weights), normalize, upsample, ranking)
        return self._map(inputs, target, additional_forward_args, cut, average)

    def _map(
        self, inputs: Any, target: Target, extra: object, cut: LayerCut, average: Average
    ) -> Tensor | tuple[Tensor, ...]:
        tensors = checked(inputs)
        x = tensors[0]
        # The grad mode, which a cut switches on, is restored behind it.
        with torch.inference_mode(False), torch.set_grad_enabled(cut.keep_trunk):
            # Of a function of the scores, the head's weights are no class activation map.
            heads = self._reads_heads and not callable(target)
            scores, weight, layouts = self._forward(tensors, extra, cut, heads)
            scores = finite_scores(scores, len(x))
            with torch.enable_grad():
                ranked = top_classes(scores, target, len(average.ladder), average.ranking)
            class_maps = self._class_maps(cut, layouts, weight, *ranked)
            with torch.autocast(scores.device.type, enabled=False):
                maps = tuple(in_dtype_of(x, average.of(m, x)) for m in class_maps)
        result: Tensor | tuple[Tensor, ...] = format_output(cut.is_tuple, maps)
        return result

    @property
    def _reads_heads(self) -> bool:
        """Whether linear layers are looked at, whose weights may make an analytic map."""
        # What a function makes of a module's scores is its own: "auto" differentiates it.
        is_module = isinstance(self.forward_func, nn.Module)
        return self.base == "cam" or (self.base == "auto" and is_module)

    def _forward(
        self, inputs: tuple[Tensor, ...], extra: object, cut: LayerCut, heads: bool = False
    ) -> tuple[Tensor, Tensor | None, list[Layout | None]]:
        """The scores, the weight K×C of an analytic class activation map, and the layer's layouts.

        It runs once; gradients are recorded from the layer on only, if it is to be cut.
        """
        key = cut.at_input, tuple(x.shape[1:] for x in inputs)
        # A layout is the same for all batches: it is followed in the first pass alone.
        follow = self.reshape_transform is None and key not in self._recognised
        followed = Layouts(*inputs) if follow else None
        with cut_at(cut, self.forward_func, heads, followed):
            scores = model_scores(self.forward_func, inputs, extra)
            scores = one_row_a_sample(scores, len(inputs[0]))
            weight = cut.linear_weight(scores)
            if cut.leaves and not scores.requires_grad and weight is None:
                # A trunk with its own no_grad block ended the recording on leaving it. With
                # gradients on outside of that block it goes on; the layer is still cut off before.
                with torch.enable_grad():
                    scores = model_scores(self.forward_func, inputs, extra)
        check(cut.leaves, f"layer: it {DID_NOT_RUN}")
        if self.reshape_transform is not None:
            return scores, weight, [None] * len(cut.leaves)
        if follow:
            each = zip(cut.places, cut.leaves, strict=True)
            self._recognised[key] = [
                recognised(self.layer, places, x, inputs[0]) for places, x in each
            ]
        return scores, weight, self._recognised[key]

    def _class_maps(
        self,
        cut: LayerCut,
        layouts: list[Layout | None],
        weight: Tensor | None,
        selected: Tensor,
        classes: Tensor | None,
    ) -> list[Tensor]:
        """The signed map of each class, N×k×…, for each tensor of the layer."""
        n = len(selected)
        self._check_batch(cut, layouts, n)
        if weight is not None:
            leaf = cut.leaves[0]
            if classes is None:
                classes = torch.zeros(n, 1, dtype=torch.long)  # of the one score
            # Equation 1; "auto" keeps to LayerGradCam's scale, whichever way it takes.
            scale = 1 if self.base == "cam" else 1 / (leaf.shape[2] * leaf.shape[3])
            channel_weights = at_least_float(weight[classes.to(weight.device)]) * scale
            return [weighted_sum(channel_weights.transpose(0, 1), self._features(leaf, None, cut))]
        needs = "a layer N×C×h×w followed by global average pooling and one linear layer"
        message = f"base: 'cam' needs {needs} that gives the scores; use base='gradcam'"
        check(self.base != "cam", message)
        check(selected.requires_grad, "layer: the scores do not depend on it differentiably")
        gradients = gradients_of(selected, cut.leaves, create_graph=cut.keep_trunk)
        maps = []
        for leaf, gradient, layout in zip(cut.leaves, gradients, layouts, strict=True):
            g = torch.stack([self._features(each, layout, cut) for each in gradient])
            if layout is not None:
                message = "layer: the scores depend on none of its positions, but on a class token"
                advice = "take a layer before the last attention"
                check(g.any() or not gradient.any(), f"{message}; {advice}")
            maps.append(self._combined(at_least_float(g), self._features(leaf, layout, cut)))
        return maps

    def _check_batch(self, cut: LayerCut, layouts: list[Layout | None], n: int) -> None:
        for leaf, layout in zip(cut.leaves, layouts, strict=True):
            batch = 0 if layout is None else layout.batch
            is_given = self.reshape_transform is not None
            fits = leaf.ndim >= 2 and (is_given or leaf.shape[batch] == n)
            shape = tuple(leaf.shape)
            check(fits, f"layer: expected {n}×C×… for a batch of {n}, got {shape}")

    def _combined(self, gradients: Tensor, features: Tensor) -> Tensor:
        """The maps N×k×… of gradients k×N×C×… and features N×C×…: weighted by their means."""
        return weighted_sum(positions_of(gradients, 3).mean(dim=3), features)

    def _features(self, x: Tensor, layout: Layout | None, cut: LayerCut) -> Tensor:
        x = x if cut.keep_trunk else x.detach()
        reshape = self.reshape_transform or layout
        return x if reshape is None else reshape(x)


def reshape_of(forward_func: object, layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The ``reshape_transform`` that a ``Classifier`` was given for this layer, if it was."""
    given: Callable[[Tensor], Tensor] | None = getattr(forward_func, "reshape_transform", None)
    # The layer is looked for only where it was given too.
    is_own = given is not None and getattr(forward_func, "cam_layer", None) is layer
    return given if is_own else None


def positions_of(x: Tensor, first: int) -> Tensor:
    """The dimensions from ``first`` on as one, of length 1 where there are none."""
    return x.reshape(*x.shape[:first], -1)


def weighted_sum(channel_weights: Tensor, features: Tensor) -> Tensor:
    """Σ_c: k×N×C weights, N×C×… features -> N×k×…."""
    channel_weights, positions = channel_weights.transpose(0, 1), positions_of(features, 2)
    dtype = torch.promote_types(features.dtype, channel_weights.dtype)
    dtype = torch.promote_types(dtype, torch.float32)  # a sum over channels may exceed float16
    with torch.autocast(features.device.type, enabled=False):
        weights = channel_weights.to(features.device, dtype)  # the head may be on another device
        maps = torch.bmm(weights, positions.to(dtype))
    return maps.reshape(*channel_weights.shape[:2], *features.shape[2:])


@dataclass
class Average:
    """How the maps of the top classes become one; ``RobustCAM.attribute`` explains the options."""

    ladder: list[float]
    normalize: str | None
    upsample: bool
    ranking: Ranking | None

    def __post_init__(self) -> None:
        check_choice("normalize", self.normalize, _NORMALIZATIONS)

    def of(self, class_maps: Tensor, x: Tensor) -> Tensor:
        """N×k×… maps for inputs x -> N×1×…, weighted, upsampled, normalised."""
        class_maps = at_least_float(class_maps)
        if self.normalize == "minmax_each":
            class_maps = minmax(class_maps, first=2)
        ladder = self.ladder[: class_maps.shape[1]]
        w = torch.tensor(ladder, dtype=class_maps.dtype, device=class_maps.device)
        average = torch.einsum("nk...,k->n...", class_maps, w).unsqueeze(1)
        if self.upsample:
            of_input = f"the input's {x.ndim - 2} spatial dimensions"
            message = f"upsample: the map {tuple(average.shape)} and {of_input} do not fit"
            check(average.ndim in MODES and average.ndim == x.ndim, message)
            average = enlarged(average, x.shape[2:])
        if self.normalize == "max":
            positive = average.clamp(min=0)
            top = positive.flatten(1).amax(dim=1)
            return divided(positive, top.reshape(-1, *[1] * (average.ndim - 1)))
        return minmax(average, first=1) if self.normalize == "minmax_each" else average


def minmax(maps: Tensor, first: int) -> Tensor:
    """Each map scaled to [0, 1] over the dimensions from ``first`` on; a constant one to zeros."""
    rows = maps.reshape(*maps.shape[:first], -1)
    low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
    return divided(rows - low, high - low).reshape(maps.shape)
