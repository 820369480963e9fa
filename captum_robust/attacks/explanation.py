"""The attack on the explanation: the label stays, the attribution map moves."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from captum.attr import Attribution, LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust._captum import TargetType, format_output
from captum_robust._checks import as_number, check_count, check_finite, check_number
from captum_robust._contexts import seeded
from captum_robust._scores import arguments_of, target_of
from captum_robust.attacks._attack import (
    Attack,
    AttackDetails,
    Tensors,
    Victim,
    divided,
    per_sample,
    steepest,
    take,
    take_each,
)
from captum_robust.attacks._second_derivatives import (
    recorded_gradients,
    smooth_activations,
)
from captum_robust.attacks.gradient import random_points

Explainer: TypeAlias = Attribution | Callable[..., Any]
"""A Captum attribution, or a function (inputs, target) -> maps."""

OBJECTIVES = ("top_k", "mass_center", "target_map")


@dataclass(frozen=True)
class ExplanationDetails(AttackDetails):
    """What became of each of N samples and of its map, by the attribution of the original model.

    ``fooled`` is False for all: the label stays.
    """

    objective_before: Tensor
    """N, the objective of the clean map, in [0, 1]."""
    objective_after: Tensor
    """N, that of the result's map; never less than before."""
    top_k_intersection: Tensor
    """N, the share of the clean map's top positions that are top positions of the result's."""
    rank_correlation: Tensor
    """N, Spearman's correlation of the two maps; 0 if one of them is constant."""
    center_shift: Tensor
    """N, the distance of the centres of mass in pixels of the input; NaN for what is no image."""
    label_kept: Tensor
    """N booleans: the result is of the label, and with ``quantize`` its 8-bit rounding too. False
    for those misclassified ``already``."""

    @property
    def moved(self) -> Tensor:
        """N, by how much the objective rose; 0 where no change kept the label and moved the map."""
        return self.objective_after - self.objective_before


class ExplanationAttack(Attack):
    r"""Moves the attribution map of an input within a ball in which its label stays.

    Ghorbani, Abid and Zou, "Interpretation of Neural Networks is Fragile"
    (https://arxiv.org/abs/1710.10547): steps up an objective of the map, of which the iterate is
    returned that moved the map farthest among those that keep the label. A sample that has no such
    iterate, and one that is misclassified to begin with, comes back unchanged.

    The map of an attribution in the shape of the inputs N×C×… is its magnitude summed over the
    channels; that of a layer or a class activation map is its positive part, after a sum over the
    channels where there are several. Maps are divided by their sum, so the scale counts for
    nothing; a map of zeros counts as a uniform one. The objectives, each in [0, 1] and the higher
    the farther the map moved:

    ``"top_k"``
        1 - the mass on the positions that are the clean map's top ones; with ``region`` on those of
        the region instead, so that the map leaves the object.
    ``"mass_center"``
        The distance of the map's centre of mass from the clean one's, in diagonals of the image.
    ``"target_map"``
        The cosine similarity with a given map.

    An attribution is a gradient, so its own gradient is a second derivative, which is zero for the
    ReLU. Steps are made on a network with smooth activations therefore (``beta``); what is returned
    is judged on the network as it is.

    A step takes one attribution with its second derivative, one attribution to judge (none with
    ``beta=None`` and no ``surrogate``), one forward pass for the label, and a backward pass when
    the label of a sample is at risk; a further forward pass of the samples that moved farther than
    before for their 8-bit rounding. The passes in the details are those for the label.

    Args:
        attribution: whose map is moved, computed for the label. Any Captum attribution, or a
            function (inputs, target) -> maps N×h×w, N×1×h×w or of the inputs' shape, which gets
            ``additional_forward_args`` by that name where there are some. Captum's gradients are
            recorded while it runs (:func:`recorded_gradients`); an attribution that detaches its
            result can offer a method ``differentiable`` with the arguments of ``attribute``, as
            :class:`captum_robust.RobustCAM` does.
        epsilon: radius of the ball in units of the inputs.
        steps: how many.
        step_size: ``epsilon`` / 10 by default.
        objective: one of the three above.
        k: the share of the positions that are top ones, between 0 and 1.
        region: N×H×W (or 1×H×W) weights from 0 to 1, such as the mask of a box; of any size,
            resized to the map's. Needs ``"top_k"``.
        target_map: N×H×W (or 1×H×W), not negative, resized likewise. Needs ``"target_map"``.
        forward_func: inputs -> scores, whose label stays; by default that of the attribution.
        bounds, quantize: see :mod:`captum_robust.attacks`.
        seed: of the start, and of an attribution that draws; see there.
        surrogate: an attribution whose map is moved in the place of one through which no gradient
            flows. Judged is the other.
        attribution_arguments: keyword arguments of ``attribute``, such as ``{"n_steps": 10}``.
        surrogate_arguments: those of the surrogate.
        beta: sharpness of the smooth activations, see :func:`smooth_activations`; None: the network
            as it is, which is right for one that is smooth (GELU, SiLU).
        module: whose activations are smooth meanwhile. By default those of ``forward_func``, of the
            attribution and of the surrogate that are modules; a function does not show its own.
        label_slack: where the lead of the label is below this share of its lead on the clean input,
            a step also goes towards the label: the more the closer it is, and only towards it once
            the label is lost.
        norm: ``"Linf"``: steps along the sign of the gradient; ``"L2"``: along the gradient,
            of length ``step_size``.
        random_start: begin at a random point of the ball, the same for every sample. At the clean
            input itself the gradient of ``"mass_center"`` is zero.
        judge_every: judge only each so many steps, and the last, where the attribution is slow.

    >>> from captum.attr import InputXGradient
    >>> model = nn.Linear(3, 2, bias=False)
    >>> model.weight.data = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    >>> attack = ExplanationAttack(InputXGradient(model), 0.125, k=0.3, random_start=False)
    >>> attack.perturb(torch.tensor([[0.25, 0.75, 0.5]]), target=0)
    tensor([[0.3750, 0.6250, 0.6250]])
    """

    def __init__(
        self,
        attribution: Explainer,
        epsilon: float = 2 / 255,
        steps: int = 30,
        step_size: float | None = None,
        *,
        objective: str = "top_k",
        k: float = 0.1,
        region: Tensor | None = None,
        target_map: Tensor | None = None,
        forward_func: Callable[..., Tensor] | None = None,
        surrogate: Explainer | None = None,
        attribution_arguments: Mapping[str, Any] | None = None,
        surrogate_arguments: Mapping[str, Any] | None = None,
        beta: float | None = 30.0,
        module: nn.Module | None = None,
        label_slack: float = 0.5,
        norm: str = "Linf",
        random_start: bool = True,
        judge_every: int = 1,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        quantize: bool = True,
        seed: int | None = 0,
    ) -> None:
        for name, value in (("attribution", attribution), ("surrogate", surrogate)):
            is_one = isinstance(value, Attribution) or (
                callable(value) and not isinstance(value, type)
            )
            if value is not None and not is_one:
                got = f"the class {value.__name__}" if isinstance(value, type) else type(value)
                raise TypeError(f"{name}: expected a Captum attribution or a function, got {got}")
        if forward_func is None:
            if not isinstance(attribution, Attribution):
                raise ValueError("forward_func: an attribution that is a function needs one")
            forward_func = attribution.forward_func
        super().__init__(forward_func, epsilon=epsilon, norm=norm, bounds=bounds, quantize=quantize)
        check_count("steps", steps, 0)
        check_count("judge_every", judge_every, 1)
        if step_size is not None and not as_number(step_size) > 0:
            raise ValueError(f"step_size: expected a positive number or None, got {step_size!r}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {OBJECTIVES}, got {objective!r}")
        if not 0 < as_number(k) < 1:
            raise ValueError(f"k: expected a share of the map between 0 and 1, got {k!r}")
        if not 0 <= as_number(label_slack) <= 1:
            raise ValueError(f"label_slack: expected a share from 0 to 1, got {label_slack!r}")
        if objective == "mass_center" and not random_start:
            raise ValueError(
                "random_start: the objective 'mass_center' has no gradient at the clean input"
            )
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        self.attribution = attribution
        self.surrogate = surrogate
        self.attribution_arguments = dict(attribution_arguments or {})
        self.surrogate_arguments = dict(surrogate_arguments or {})
        self.steps = steps
        self.step_size = step_size
        self.objective = objective
        self.k = k
        self.beta = None if beta is None else check_number("beta", beta, 0, open_low=True)
        self.module = module
        self.label_slack = label_slack
        self.random_start = random_start
        self.judge_every = judge_every
        self.seed = seed
        self.region = self.target_map = None
        self._set_maps(region, target_map)
        self._outcome: dict[str, Tensor] = {}

    @log_usage()
    def perturb(
        self,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        epsilon: float | None = None,
        additional_forward_args: object | None = None,
        targeted: bool = False,
        mask: Tensor | Tensors | None = None,
        *,
        region: Tensor | None = None,
        target_map: Tensor | None = None,
        return_details: bool = False,
    ) -> Any:
        """The inputs with a moved map, in the shape of ``inputs``, detached.

        As :meth:`Attack.perturb`, with ``region`` and ``target_map`` for this call, and
        :class:`ExplanationDetails`.

        Raises:
            ValueError: as there; a targeted attack; an attribution through which no gradient flows
                to the inputs; maps that do not fit the objective.
        """
        if targeted:
            raise ValueError(
                "targeted: this attack keeps the label; give a target_map for the map to go to"
            )
        # What belongs to this call is kept in a copy, so that calls do not see each other.
        call = copy.copy(self)
        call._set_maps(region, target_map)
        if self.objective == "target_map" and call.target_map is None:
            raise ValueError("target_map: the objective 'target_map' needs one")
        result = Attack.perturb(
            call,
            inputs,
            target,
            epsilon,
            additional_forward_args,
            mask=mask,
            return_details=return_details,
        )
        if not return_details:
            return result
        adversarial, details = result
        known = {field.name: getattr(details, field.name) for field in fields(details)}
        known["fooled"] = torch.zeros_like(details.fooled)
        return adversarial, ExplanationDetails(**known, **call._outcome)

    def _set_maps(self, region: Tensor | None, target_map: Tensor | None) -> None:
        """Takes over what is given, once it is checked."""
        for name, needed, value in (
            ("region", "top_k", region),
            ("target_map", "target_map", target_map),
        ):
            if value is None:
                continue
            if self.objective != needed:
                raise ValueError(f"{name}: needs objective={needed!r}, not {self.objective!r}")
            setattr(self, name, _checked_map(name, value))

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        assert epsilon is not None
        scores = victim.scores(victim.x, victim.everyone)
        lead = _lead(scores, victim.label)
        clean = self._maps(victim, victim.x, victim.everyone)
        goal = self._goal(victim, clean)
        kept = ~victim.already & self._kept_as_bytes(victim, victim.x, victim.everyone)
        best = _Farthest(victim.x, clean, goal(clean, victim.everyone), kept)
        before = best.objective.clone()
        rows = (~victim.already).nonzero()[:, 0]
        if len(rows) > 0 and epsilon > 0:
            self._climb(victim, goal, best, rows, lead, epsilon)
        self._outcome = {
            "objective_before": before,
            "objective_after": best.objective,
            "top_k_intersection": goal.top_k_intersection(best.maps),
            "rank_correlation": _rank_correlation(clean, best.maps),
            "center_shift": goal.center_shift(best.maps),
            "label_kept": best.kept,
        }
        return best.x

    def _climb(
        self,
        victim: Victim,
        goal: _Goal,
        best: _Farthest,
        rows: Tensor,
        lead: Tensor,
        epsilon: float,
    ) -> None:
        """All steps of samples ``rows``."""
        surrogate_goal = goal
        if self.surrogate is not None and self.steps > 0:
            of_surrogate = self._maps(victim, victim.x, victim.everyone, by_surrogate=True)
            surrogate_goal = self._goal(victim, of_surrogate)
        clean, lead = take_each(victim.x, rows), lead[rows]
        length = epsilon / 10 if self.step_size is None else self.step_size
        x = clean
        if self.random_start:
            generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
            start = random_points(clean, epsilon, self.norm, generator)
            # Drawn once for all samples, of which each may have a mask.
            change = tuple(s.expand_as(c) for s, c in zip(start, clean, strict=True))
            x = victim.moved(clean, change, rows, epsilon, self.norm)
        is_exact = self.surrogate is None and self.beta is None
        for step in range(self.steps + 1):
            is_last = step == self.steps
            with torch.set_grad_enabled(not is_last):
                leaves = tuple(t.detach().requires_grad_(not is_last) for t in x)
                scores = victim.scores(leaves, rows)
                current = _lead(scores, victim.label[rows])
            gradients: Tensors = ()
            maps: Tensor | None = None
            if not is_last:
                gradients, maps = self._map_gradients(victim, surrogate_goal, x, rows)
            if is_last or step % self.judge_every == 0:
                if maps is None or not is_exact:
                    maps = self._maps(victim, x, rows)
                self._judge(victim, goal, best, x, rows, maps, ~victim.succeeds(scores, rows))
            if is_last:
                return
            # 0 where the label leads by enough, 1 where it is lost.
            pull = 1 - current.detach() / (self.label_slack * lead).clamp(min=1e-12)
            pull = pull.nan_to_num(0).clamp(0, 1)  # the only class of a model leads by infinity
            if bool(pull.any()):
                back = _of_mean_one(victim.gradients(current, leaves, rows))
                gradients = tuple(
                    (1 - per_sample(pull, g)) * g + per_sample(pull, b) * b
                    for g, b in zip(_of_mean_one(gradients), back, strict=True)
                )
            direction = steepest(victim.masked(gradients, rows), self.norm)
            change = tuple(i - c + length * d for i, c, d in zip(x, clean, direction, strict=True))
            x = victim.moved(clean, change, rows, epsilon, self.norm)

    def _map_gradients(
        self, victim: Victim, goal: _Goal, x: Tensors, rows: Tensor
    ) -> tuple[Tensors, Tensor]:
        """Of the objective of samples ``rows``, and the maps n×…, by smooth activations."""
        with torch.enable_grad(), self._smooth():
            leaves = tuple(t.detach().requires_grad_() for t in x)
            maps = self._maps(
                victim, leaves, rows, by_surrogate=self.surrogate is not None, graph=True
            )
            objective = goal(maps, rows)
            found: Any = (None,)
            if objective.requires_grad:
                found = torch.autograd.grad(objective.sum(), leaves, allow_unused=True)
        if all(g is None for g in found):
            name = "attribution" if self.surrogate is None else "surrogate"
            explainer = self.attribution if self.surrogate is None else self.surrogate
            kind = getattr(explainer, "__name__", type(explainer).__name__)
            raise ValueError(
                f"{name}: no gradient flows from the map of {kind} to the inputs, and this attack "
                "needs one; give surrogate=, another attribution of the same model, such as "
                "captum.attr.Saliency, whose map is moved in its stead"
            )
        gradients = tuple(
            torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)
        )
        for g in gradients:
            check_finite(g, "attribution, second derivative")
        return gradients, maps.detach()

    def _judge(
        self,
        victim: Victim,
        goal: _Goal,
        best: _Farthest,
        x: Tensors,
        rows: Tensor,
        maps: Tensor,
        is_kept: Tensor,
    ) -> None:
        """Keeps those iterates n×… of ``rows`` that moved farther than before, with their label."""
        objective = goal(maps, rows)
        at = (is_kept & (objective > best.objective[rows])).nonzero()[:, 0]
        if len(at) > 0 and victim.quantize:
            at = at[self._kept_as_bytes(victim, take_each(x, at), rows[at])]
        best.see(rows[at], take_each(x, at), take(maps, at), take(objective, at))

    def _kept_as_bytes(self, victim: Victim, x: Tensors, rows: Tensor) -> Tensor:
        """n booleans: with ``quantize``, whether the 8-bit rounding of ``rows`` has the label."""
        if not victim.quantize:
            return torch.ones_like(rows, dtype=torch.bool)
        return ~victim.succeeds(victim.scores(victim.to_bytes(x), rows), rows)

    def _goal(self, victim: Victim, clean: Tensor) -> _Goal:
        size = tuple(victim.x[0].shape[2:]) if victim.x[0].ndim == 4 else None
        wanted = self.region if self.objective == "top_k" else self.target_map
        return _Goal(clean, self.objective, self.k, size, wanted)

    def _maps(
        self,
        victim: Victim,
        x: Tensors,
        rows: Tensor,
        *,
        by_surrogate: bool = False,
        graph: bool = False,
    ) -> Tensor:
        """The maps n×… of samples ``rows`` at x; without ``graph`` of the model as it is."""
        explainer = self.attribution if not by_surrogate else self.surrogate
        options = self.attribution_arguments if not by_surrogate else self.surrogate_arguments
        places = rows.tolist()
        # The label, in the form of the target where that also selects among N×K×… scores.
        is_indexed = isinstance(victim.target, tuple) or (
            isinstance(victim.target, list) and isinstance(victim.target[0], tuple)
        )
        target = target_of(victim.target, places, victim.n) if is_indexed else victim.label[rows]
        passed = dict(options)
        if victim.arguments is not None:
            rest = arguments_of(victim.arguments, places, victim.n)
            passed["additional_forward_args"] = rest
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            # An attribution that draws, draws the same each time.
            stack.enter_context(seeded(self.seed, victim.x[0].device))
            leaves = x if graph else tuple(t.detach().requires_grad_() for t in x)
            inputs = format_output(len(leaves) > 1, leaves)
            run: Callable[..., Any]
            if not isinstance(explainer, Attribution):
                assert explainer is not None
                run = explainer
                passed["target"] = target
            else:
                run = explainer.attribute
                if _takes_target(explainer):
                    passed["target"] = target
            offered = getattr(explainer, "differentiable", None)
            if graph and offered is not None:
                run = offered
            elif graph:
                stack.enter_context(recorded_gradients())
            found = run(inputs, **passed)
        maps = _as_maps(found, leaves, isinstance(explainer, LayerAttribution))
        check_finite(maps, "attribution")
        return maps if graph else maps.detach()

    @contextmanager
    def _smooth(self) -> Iterator[None]:
        if self.beta is None:
            yield
            return
        found: list[Any] = [self.module]
        if self.module is None:
            explainers = (self.attribution, self.surrogate)
            found = [self.forward_func, *(getattr(e, "forward_func", None) for e in explainers)]
        modules = dict.fromkeys(f for f in found if isinstance(f, nn.Module))
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(smooth_activations(module, self.beta))
            yield


class _Farthest:
    """Of each of N samples the input whose map moved farthest, and what is known of it."""

    def __init__(self, x: Tensors, maps: Tensor, objective: Tensor, kept: Tensor) -> None:
        self.x = tuple(t.clone() for t in x)
        self.maps = maps.clone()
        self.objective = objective.clone()
        self.kept = kept.clone()

    def see(self, rows: Tensor, x: Tensors, maps: Tensor, objective: Tensor) -> None:
        """Takes over n samples, at ``rows``, which have kept their label."""
        for kept, new in zip(self.x, x, strict=True):
            kept[rows] = new
        self.maps[rows] = maps
        self.objective[rows] = objective
        self.kept[rows] = True


class _Goal:
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
        if clean.ndim != 3 and (objective != "top_k" or wanted is not None):
            shown = "the region" if objective == "top_k" else f"objective={objective!r}"
            raise ValueError(
                f"attribution: {shown} needs maps N×h×w, one an input, got {tuple(clean.shape)}"
            )
        self.objective = objective
        self.count = max(1, round(k * clean[0].numel()))
        self.top = _top(clean, self.count)
        self.size = size
        self.center = self._center(clean) if clean.ndim == 3 else None
        self.wanted: Tensor | None = None
        if wanted is not None:
            self.wanted = _resized(wanted, clean, "region" if objective == "top_k" else objective)

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
        return _lengths(shift) / math.hypot(*self._extent(maps))

    def top_k_intersection(self, maps: Tensor) -> Tensor:
        """N, of all maps."""
        return (self.top & _top(maps, self.count)).sum(dim=1) / self.count

    def center_shift(self, maps: Tensor) -> Tensor:
        """N, of all maps, in pixels."""
        if self.center is None or self.size is None:
            return torch.full_like(maps.flatten(1)[:, 0], math.nan)
        return _lengths(self._center(maps) - self.center)

    def _center(self, maps: Tensor) -> Tensor:
        """n×2, the centre of mass (y, x) in pixels of the image."""
        share = _shares(maps).reshape(maps.shape)
        ends = zip(self._extent(maps), maps.shape[1:], strict=True)
        y, x = ((torch.arange(n, device=maps.device) + 0.5) * (extent / n) for extent, n in ends)
        along = (share.sum(dim=2) * y, share.sum(dim=1) * x)
        return torch.stack([a.sum(dim=1) for a in along], dim=1)

    def _extent(self, maps: Tensor) -> tuple[int, ...]:
        return tuple(maps.shape[1:]) if self.size is None else self.size


def _lengths(vectors: Tensor) -> Tensor:
    """N, of vectors N×2."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return lengths


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


def _lead(scores: Tensor, label: Tensor) -> Tensor:
    """n, the score of the label less the highest other one."""
    own = scores.gather(1, label[:, None])[:, 0]
    return own - scores.scatter(1, label[:, None], -math.inf).amax(dim=1)


def _of_mean_one(gradients: Tensors) -> Tensors:
    """Each sample divided by its mean magnitude over all tensors; zeros stay zeros."""
    n = len(gradients[0])
    total = torch.stack([g.reshape(n, -1).abs().sum(dim=1) for g in gradients]).sum(dim=0)
    mean = total / sum(g[0].numel() for g in gradients)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return tuple(divided(g, mean) for g in gradients)


def _as_maps(found: Any, inputs: Tensors, is_of_layer: bool) -> Tensor:
    """Maps n×h×w of an attribution; of several inputs one after the other, n×P."""
    parts = found if isinstance(found, (tuple, list)) else (found,)
    n = len(inputs[0])
    for part in parts:
        if not isinstance(part, Tensor) or part.ndim < 2 or len(part) != n:
            got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"attribution: expected {n} maps, got {got}")
    is_each = len(parts) == len(inputs) and not is_of_layer
    maps = []
    for i, part in enumerate(parts):
        m = part.float() if part.dtype.itemsize < 4 else part
        if is_each and m.shape == inputs[i].shape:
            m = m.abs()
            maps.append(m.sum(dim=1) if m.ndim > 2 else m)
            continue
        has_channels = m.ndim > 3 or (is_of_layer and m.ndim == 3)
        maps.append((m.sum(dim=1) if has_channels else m).clamp(min=0))
    return maps[0] if len(maps) == 1 else torch.cat([m.flatten(1) for m in maps], dim=1)


def _takes_target(attribution: Attribution) -> bool:
    """Whether ``attribute`` takes a target: that of a neuron or of an activation does not."""
    parameters = inspect.signature(attribution.attribute).parameters
    return "target" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _checked_map(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor N×H×W, got {type(value).__name__}")
    if value.ndim != 3 or value.numel() == 0:
        raise ValueError(f"{name}: expected N×H×W, got {tuple(value.shape)}")
    given: Tensor = value.detach().float()
    check_finite(given, name)
    lowest, highest = float(given.amin()), float(given.amax())
    limit = 1.0 if name == "region" else math.inf
    if lowest < 0 or highest > limit:
        expected = "from 0 to 1" if name == "region" else "from 0"
        raise ValueError(f"{name}: expected values {expected}, got {lowest:.4g} to {highest:.4g}")
    return given


def _resized(wanted: Tensor, like: Tensor, name: str) -> Tensor:
    """Averaged or enlarged to the size of maps N×h×w, as N×P."""
    if len(wanted) not in (1, len(like)):
        raise ValueError(f"{name}: expected {len(like)} maps, one a sample, got {len(wanted)}")
    wanted = wanted.to(device=like.device, dtype=like.dtype)
    if wanted.shape[1:] != like.shape[1:]:
        wanted = F.interpolate(
            wanted[:, None], like.shape[1:], mode="bilinear", align_corners=False, antialias=True
        )[:, 0].clamp(min=0)
    return wanted.expand(like.shape).flatten(1)


def _rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """N, Spearman's correlation of N×… maps, equal values with the mean of their ranks."""
    centered = []
    for maps in (a, b):
        ranks = _ranks(maps.flatten(1))
        centered.append(ranks - ranks.mean(dim=1, keepdim=True))
    product = (centered[0] * centered[1]).sum(dim=1)
    lengths = centered[0].norm(dim=1) * centered[1].norm(dim=1)
    return torch.where(lengths > 0, product / lengths.clamp(min=1e-12), 0).to(a.dtype)


def _ranks(values: Tensor) -> Tensor:
    """N×P, from 1, in float64: sums of the ranks of an image's pixels exceed float32."""
    ascending = values.sort(dim=1).values
    first = torch.searchsorted(ascending, values.contiguous())
    behind = torch.searchsorted(ascending, values.contiguous(), right=True)
    return (first + behind + 1).double() / 2
