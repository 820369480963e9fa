"""The maps that an attribution gives for samples under attack, and how far they have moved."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from captum.attr import Attribution, GuidedGradCam, LayerAttribution, LayerGradCam, NoiseTunnel
from torch import Tensor, nn

from captum_robust._captum import format_output
from captum_robust._checks import check, check_finite, check_shape, shape_or_type
from captum_robust._contexts import alone, as_written, private_hooks, seeded
from captum_robust._resize import resized
from captum_robust._scores import arguments_of, at_least_float, given_copies, target_of
from captum_robust.attacks._second_derivatives import recorded_gradients
from captum_robust.attacks.backward import gradients_or_zeros, no_gradient
from captum_robust.attacks.norms import Linf, Tensors
from captum_robust.attacks.outcome import sizes_of
from captum_robust.attacks.victim import Victim
from captum_robust.nn.layout import followed_outputs, placed, recognised

Explainer: TypeAlias = Attribution | Callable[..., Any]
"""A Captum attribution, or a function (inputs, target) -> maps."""
OBJECTIVES = ("top_k", "mass_center", "target_map")


def check_explainer(name: str, value: object) -> None:
    """``TypeError`` for what is neither an attribution nor a function; a class is none."""
    is_one = isinstance(value, Attribution) or (callable(value) and not isinstance(value, type))
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    check(is_one, f"{name}: expected a Captum attribution or a function, got {got}", TypeError)


@dataclass(frozen=True)
class AttributionMaps:
    """An attribution with what it takes to run it on some samples of a batch."""

    name: str
    """The argument that it came as, for messages."""
    explainer: Explainer
    arguments: Mapping[str, Any] | None
    """Keyword arguments of the attribution."""
    seed: int | None
    """Seeds an attribution that draws, so that it draws the same each time."""

    def __call__(self, victim: Victim, x: Tensors, rows: Tensor, graph: bool = False) -> Tensor:
        """The maps n×… of samples ``rows`` at x; with ``graph`` one back to x."""
        explainer, places = self.explainer, rows.tolist()
        # The label, in the form of the target where that also selects among N×K×… scores.
        is_indexed = isinstance(victim.target, tuple) or (
            isinstance(victim.target, list) and isinstance(victim.target[0], tuple)
        )
        target = target_of(victim.target, places, victim.n) if is_indexed else victim.label[rows]
        if victim.has_one_score:
            target = None  # the score itself: an attribution knows no second class
        run: Any = explainer.attribute if isinstance(explainer, Attribution) else explainer
        passed = dict(self.arguments or {})
        if victim.arguments is not None:
            rest = arguments_of(victim.arguments, places, victim.n)
            passed["additional_forward_args"] = rest
        if run is explainer or _takes_target(run):
            passed["target"] = target
        with ExitStack() as stack:
            stack.enter_context(seeded(self.seed, victim.x[0].device))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(as_written())
            leaves = x if graph else tuple(t.detach().requires_grad_() for t in x)
            if graph and hasattr(explainer, "differentiable"):
                run = explainer.differentiable
            elif graph:
                stack.enter_context(recorded_gradients())
            if isinstance(explainer, Attribution):
                stack.enter_context(alone(explainer.forward_func))
                stack.enter_context(private_hooks(explainer.forward_func))
                stack.enter_context(given_copies(explainer))
            outputs = stack.enter_context(_outputs_of(explainer, passed, leaves))
            given = victim.as_given(leaves, rows)
            try:
                attributed = run(format_output(len(given) > 1, given), **passed)
            except RuntimeError as error:
                if not any(sign in str(error) for sign in _BROKEN):
                    raise
                raise no_gradient(victim.forward_func, victim.x, victim.arguments) from error
        attributed = self._placed(attributed, outputs, leaves[0])
        maps = _as_maps(attributed, given, isinstance(explainer, LayerAttribution))
        check_finite(maps, "attribution")
        return maps if graph else maps.detach()

    def _placed(self, attributed: Any, outputs: list[Any], image: Tensor) -> Any:
        """The attribution of a layer whose channels are last, with these in dimension 1."""
        explainer = _of_layer(self.explainer)
        reshapes = [recognised(explainer.layer, layout, x, image) for x, layout in outputs]
        if all(reshape is None for reshape in reshapes):
            return attributed
        name, better = type(explainer).__name__, 'RobustCAM(model, layer, base="gradcam")'
        takes = f"{name} takes dimension 1 of its layer for the channels, which are elsewhere"
        is_cam = isinstance(explainer, LayerGradCam)
        check(not is_cam, f"{self.name}: {takes}; give {better} with the arguments {{'k': 1}}")
        return placed(attributed, outputs, reshapes)

    def gradients(
        self, victim: Victim, goal: Callable[[Tensor, Tensor], Tensor], x: Tensors, rows: Tensor
    ) -> tuple[Tensors, Tensor]:
        """The gradients n×… of the objective of samples ``rows``, and the maps n×…."""
        with torch.enable_grad():
            leaves = tuple(t.detach().requires_grad_() for t in x)
            maps = self(victim, leaves, rows, graph=True)
            objective = goal(maps, rows)
        gradients = gradients_or_zeros(objective, leaves)
        if gradients is None:
            kind = getattr(self.explainer, "__name__", type(self.explainer).__name__)
            raise ValueError(
                f"{self.name}: no gradient flows from the map of {kind} to the inputs, and this "
                "attack needs one; give surrogate=, another attribution of the same model, such as "
                "captum.attr.Saliency, whose map is moved in its stead"
            )
        for gradient in gradients:
            check_finite(gradient, "attribution, second derivative")
        victim.backward_passes[rows] += 1
        victim.saw_gradient[rows] |= Linf().lengths(gradients) > 0
        return gradients, maps.detach()


_BROKEN = ("not have been used in the graph", "does not require grad")
"""What torch says where an attribution finds no gradient."""


def _of_layer(explainer: Explainer) -> Any:
    """Captum's own attribution of a layer, of which the explainer is made; None for another."""
    inner: Any = explainer
    inner = inner.attribution_method if isinstance(inner, NoiseTunnel) else inner
    inner = inner.grad_cam if isinstance(inner, GuidedGradCam) else inner
    # RobustCAM knows where its layer has the channels.
    is_captums = isinstance(inner, LayerAttribution) and not hasattr(inner, "differentiable")
    return inner if is_captums and isinstance(inner.layer, nn.Module) else None


def _outputs_of(
    explainer: Explainer, arguments: dict[str, Any], images: Tensors
) -> AbstractContextManager[list[Any]]:
    """What the layer of an explainer gives inside, with its places; nothing without a layer."""
    inner = _of_layer(explainer)
    at_input = bool(arguments.get("attribute_to_layer_input", False))
    return nullcontext([]) if inner is None else followed_outputs(inner.layer, at_input, images)


def _as_maps(attributed: Any, inputs: Tensors, is_of_layer: bool) -> Tensor:
    """Maps n×h×w of an attribution; of several inputs one after the other, n×P."""
    parts = attributed if isinstance(attributed, (tuple, list)) else (attributed,)
    n = len(inputs[0])
    for part in parts:
        is_batch = isinstance(part, Tensor) and part.ndim >= 2 and len(part) == n
        check(is_batch, f"attribution: expected {n} maps, got {shape_or_type(part)}")
    is_each = len(parts) == len(inputs) and not is_of_layer
    maps = []
    for i, part in enumerate(parts):
        m = at_least_float(part).to(inputs[0].device)
        if is_each and m.shape == inputs[i].shape:
            m = m.abs()
            maps.append(m.sum(dim=1) if m.ndim > 2 else m)
            continue
        has_channels = m.ndim > 3 or (is_of_layer and m.ndim == 3)
        maps.append((m.sum(dim=1) if has_channels else m).clamp(min=0))
    return maps[0] if len(maps) == 1 else torch.cat([m.flatten(1) for m in maps], dim=1)


def _takes_target(attribute: Callable[..., Any]) -> bool:
    """Whether ``attribute`` takes a target: that of a neuron or of an activation does not."""
    parameters = inspect.signature(attribute).parameters
    return "target" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class Goal:
    """How far maps have moved from the clean maps N×….

    ``size`` is (H, W) of an image; ``wanted`` the region or the target, N×H×W or 1×H×W.
    """

    def __init__(
        self,
        clean: Tensor,
        objective: str,
        k: float,
        size: tuple[int, ...] | None,
        wanted: Tensor | None,
    ) -> None:
        needing = "the region" if objective == "top_k" else f"objective={objective!r}"
        check(
            clean.ndim == 3 or (objective == "top_k" and wanted is None),
            f"attribution: expected maps N×h×w, one an input, for {needing}, got "
            f"{tuple(clean.shape)}",
        )
        self.objective = objective
        self.count = max(1, round(k * clean[0].numel()))
        self.top = _top(clean, self.count)
        self.size = size
        self.center = self._center(clean) if clean.ndim == 3 else None
        name = "region" if objective == "top_k" else objective
        self.wanted = None if wanted is None else _fitted(wanted, clean, name)

    def __call__(self, maps: Tensor, rows: Tensor) -> Tensor:
        """The objective of n maps of samples ``rows``, in [0, 1]."""
        share = _shares(maps)
        if self.objective == "top_k":
            weight = self.top.to(share.dtype) if self.wanted is None else self.wanted
            return 1 - (share * weight[rows]).sum(dim=1)
        if self.objective == "target_map":
            assert self.wanted is not None
            return F.cosine_similarity(share, self.wanted[rows], dim=1, eps=1e-30)
        assert self.center is not None
        shift = self._center(maps) - self.center[rows]
        return sizes_of(shift)[1] / math.hypot(*self._extent(maps))

    def top_k_intersection(self, maps: Tensor) -> Tensor:
        """N, of all maps."""
        return (self.top & _top(maps, self.count)).sum(dim=1) / self.count

    def center_shift(self, maps: Tensor) -> Tensor:
        """N, of all maps, in pixels."""
        if self.center is None or self.size is None:
            return torch.full_like(maps.flatten(1)[:, 0], math.nan)
        return sizes_of(self._center(maps) - self.center)[1]

    def _center(self, maps: Tensor) -> Tensor:
        """n×2, the centre of mass (y, x) in pixels of the image."""
        share = _shares(maps).reshape(maps.shape)
        ends = zip(self._extent(maps), maps.shape[1:], strict=True)
        y, x = ((torch.arange(n, device=maps.device) + 0.5) * (extent / n) for extent, n in ends)
        along = (share.sum(dim=2) * y, share.sum(dim=1) * x)
        return torch.stack([a.sum(dim=1) for a in along], dim=1)

    def _extent(self, maps: Tensor) -> tuple[int, ...]:
        return tuple(maps.shape[1:]) if self.size is None else self.size


def _shares(maps: Tensor) -> Tensor:
    """Maps n×… as shares of their sum, n×P; a map of zeros is uniform."""
    flat = maps.flatten(1)
    total = flat.sum(dim=1, keepdim=True)
    has_mass = total > torch.finfo(flat.dtype).tiny
    return torch.where(has_mass, flat / torch.where(has_mass, total, 1), 1 / flat.shape[1])


def _top(maps: Tensor, count: int) -> Tensor:
    """N×P booleans: the ``count`` largest of each map."""
    flat = maps.flatten(1)
    at = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, at, True)


def checked_map(name: str, value: Any) -> Tensor:
    """The map that a user gave for an objective, in float32."""
    check_shape(name, value, "N×H×W")
    check(value.numel() > 0, f"{name}: expected N×H×W, got {tuple(value.shape)}")
    given: Tensor = value.detach().float()
    check_finite(given, name)
    lowest, highest = float(given.amin()), float(given.amax())
    limit, expected = (1.0, "from 0 to 1") if name == "region" else (math.inf, "from 0")
    is_inside = lowest >= 0 and highest <= limit
    check(is_inside, f"{name}: expected values {expected}, got {lowest:.4g} to {highest:.4g}")
    return given


def _fitted(wanted: Tensor, like: Tensor, name: str) -> Tensor:
    """Averaged or enlarged to the size of maps N×h×w, as N×P."""
    n, got = len(like), len(wanted)
    check(got in (1, n), f"{name}: expected {n} maps, one a sample, got {got}")
    wanted = wanted.to(device=like.device, dtype=like.dtype)
    height, width = like.shape[1:]
    wanted = resized(wanted[:, None], (height, width))[:, 0].clamp(min=0)
    return wanted.expand(like.shape).flatten(1)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """N, Spearman's correlation of N×… maps, equal values with the mean of their ranks."""
    ranks = [_ranks(maps.flatten(1)) for maps in (a, b)]
    left, right = (r - r.mean(dim=1, keepdim=True) for r in ranks)
    return F.cosine_similarity(left, right, dim=1, eps=1e-12).to(a.dtype)


def _ranks(values: Tensor) -> Tensor:
    """N×P, from 1, in float64: sums of the ranks of an image's pixels exceed float32."""
    ascending = values.sort(dim=1).values
    first = torch.searchsorted(ascending, values.contiguous())
    behind = torch.searchsorted(ascending, values.contiguous(), right=True)
    return (first + behind + 1).double() / 2
