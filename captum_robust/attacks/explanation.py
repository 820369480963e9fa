"""The attack on the explanation: the label stays, the attribution map moves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust._captum import TargetType
from captum_robust._checks import check, check_choice, check_count, check_number, check_type
from captum_robust.attacks._second_derivatives import smooth_activations
from captum_robust.attacks.ascent import Stepping, ascend
from captum_robust.attacks.attack import Attack
from captum_robust.attacks.attribution_maps import (
    OBJECTIVES,
    AttributionMaps,
    Explainer,
    Goal,
    check_explainer,
    checked_map,
    rank_correlation,
)
from captum_robust.attacks.norms import Tensors, of_mean_one, plus, scaled
from captum_robust.attacks.victim import AttackDetails, Victim, leads_of, put_each, take, take_each


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


@dataclass(eq=False, repr=False)
class ExplanationAttack(Stepping):
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
        attribution: whose map is moved, computed for the label; where the model has one logit a
            sample, without a target, for that. Any Captum attribution, or a function
            (inputs, target) -> maps N×h×w, N×1×h×w or of the inputs' shape, which gets
            ``additional_forward_args`` by that name where there are some. Captum's gradients are
            recorded while it runs (:func:`recorded_gradients`); an attribution that detaches its
            result can offer a method ``differentiable`` with the arguments of ``attribute``, as
            :class:`captum_robust.attr.RobustCAM` does.
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

    attribution: Explainer
    epsilon: float = 2 / 255
    steps: int = 30
    step_size: float | None = None
    _: KW_ONLY
    objective: str = "top_k"
    k: float = 0.1
    region: Tensor | None = None
    target_map: Tensor | None = None
    forward_func: Callable[..., Tensor] | None = None  # type: ignore[assignment]
    surrogate: Explainer | None = None
    attribution_arguments: Mapping[str, Any] | None = None
    surrogate_arguments: Mapping[str, Any] | None = None
    beta: float | None = 30.0
    module: nn.Module | None = None
    label_slack: float = 0.5
    norm: str = "Linf"
    random_start: bool = True
    judge_every: int = 1
    bounds: tuple[float, float] | None = (0.0, 1.0)
    quantize: bool = True
    seed: int | None = 0

    def __post_init__(self) -> None:
        check_explainer("attribution", self.attribution)
        if self.surrogate is not None:
            check_explainer("surrogate", self.surrogate)
        if self.forward_func is None:
            if not isinstance(self.attribution, Attribution):
                raise ValueError("forward_func: an attribution that is a function needs one")
            self.forward_func = self.attribution.forward_func
        super().__post_init__()
        check_count("judge_every", self.judge_every, 1)
        check_choice("objective", self.objective, OBJECTIVES)
        check_number("k", self.k, 0, 1, open_low=True, open_high=True)
        check_number("label_slack", self.label_slack, 0, 1)
        check(
            self.random_start or self.objective != "mass_center",
            "random_start: the objective 'mass_center' has no gradient at the clean input",
        )
        if self.module is not None:
            check_type("module", self.module, nn.Module, "a torch.nn.Module")
        self.attribution_arguments = dict(self.attribution_arguments or {})
        self.surrogate_arguments = dict(self.surrogate_arguments or {})
        if self.beta is not None:
            self.beta = check_number("beta", self.beta, 0, open_low=True)
        self._set_maps(self.region, self.target_map)
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
        hint = "give a target_map for the map to go to"
        check(not targeted, f"targeted: this attack keeps the label; {hint}")
        # What belongs to this call is kept in a copy, so that calls do not see each other.
        call = copy.copy(self)
        call._set_maps(region, target_map)
        has_map = self.objective != "target_map" or call.target_map is not None
        check(has_map, "target_map: the objective 'target_map' needs one")
        arguments = (inputs, target, epsilon, additional_forward_args, False, mask)
        return Attack.perturb(call, *arguments, return_details=return_details)

    def _details(self, victim: Victim, results: Tensors) -> AttackDetails:
        details = victim.details(results)
        known = vars(details) | {"fooled": torch.zeros_like(details.fooled)}
        return ExplanationDetails(**known, **self._outcome)

    def _set_maps(self, region: Tensor | None, target_map: Tensor | None) -> None:
        """Takes over what is given, once it is checked."""
        got = self.objective
        if region is not None:
            check(got == "top_k", f"region: needs objective='top_k', not {got!r}")
            self.region = checked_map("region", region)
        if target_map is not None:
            check(got == "target_map", f"target_map: needs objective='target_map', not {got!r}")
            self.target_map = checked_map("target_map", target_map)

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        assert epsilon is not None
        scores = victim.scores(victim.x, victim.everyone)
        lead = leads_of(scores, victim.label)
        clean = self._maps(victim, victim.x, victim.everyone)
        goal = self._goal(victim, clean)
        best = _Farthest(victim, goal, clean)
        before = best.objective.clone()
        rows = (~victim.already).nonzero()[:, 0]
        if len(rows) > 0 and epsilon > 0:
            self._climb(victim, best, rows, lead[rows], epsilon)
        self._outcome = {
            "objective_before": before,
            "objective_after": best.objective,
            "top_k_intersection": goal.top_k_intersection(best.maps),
            "rank_correlation": rank_correlation(clean, best.maps),
            "center_shift": goal.center_shift(best.maps),
            "label_kept": best.kept,
        }
        return best.x

    def _climb(
        self, victim: Victim, best: _Farthest, rows: Tensor, lead: Tensor, epsilon: float
    ) -> None:
        """All steps of samples ``rows``, whose labels lead by ``lead`` on the clean inputs."""
        moved, moved_goal = self._maps, best.goal
        if self.surrogate is not None:
            options = (self.surrogate_arguments, self.seed)
            moved = AttributionMaps("surrogate", self.surrogate, *options)
            if self.steps > 0:
                moved_goal = self._goal(victim, moved(victim, victim.x, victim.everyone))
        is_exact = self.surrogate is None and self.beta is None

        def look(x: Tensors, step: int) -> tuple[Tensors, Tensors] | None:
            is_last = step == self.steps
            with torch.set_grad_enabled(not is_last):
                leaves = tuple(t.detach().requires_grad_(not is_last) for t in x)
                scores = victim.scores(leaves, rows)
                current = leads_of(scores, victim.label[rows])
            gradients: Tensors = ()
            maps: Tensor | None = None
            if not is_last:
                with self._smooth():
                    gradients, maps = moved.gradients(victim, moved_goal, x, rows)
            if is_last or step % self.judge_every == 0:
                if maps is None or not is_exact:
                    maps = self._maps(victim, x, rows)
                best.see(x, rows, maps, ~victim.succeeds(scores, rows))
            if is_last:
                return None
            # 0 where the label leads by enough, 1 where it is lost.
            pull = 1 - current.detach() / (self.label_slack * lead).clamp(min=1e-12)
            pull = pull.nan_to_num(0).clamp(0, 1)  # the only class of a model leads by infinity
            if bool(pull.any()):
                back = of_mean_one(victim.gradients(current, leaves, rows))
                gradients = plus(scaled(of_mean_one(gradients), 1 - pull), scaled(back, pull))
            return x, victim.masked(gradients, rows)

        x = clean = take_each(victim.x, rows)
        if self.random_start:
            start = self._norm.random_points(clean, epsilon, self._generator())
            # Drawn once for all samples, of which each may have a mask.
            change = tuple(s.expand_as(c) for s, c in zip(start, clean, strict=True))
            x = self._moved(victim, clean, change, rows, epsilon)
        ascend(x, self.steps + 1, look, partial(self._stepped, victim, rows, epsilon))

    def _step_length(self, epsilon: float) -> float:
        return epsilon / 10 if self.step_size is None else self.step_size

    def _goal(self, victim: Victim, clean: Tensor) -> Goal:
        size = tuple(victim.x[0].shape[2:]) if victim.x[0].ndim == 4 else None
        wanted = self.region if self.objective == "top_k" else self.target_map
        return Goal(clean, self.objective, self.k, size, wanted)

    @property
    def _maps(self) -> AttributionMaps:
        options = (self.attribution_arguments, self.seed)
        return AttributionMaps("attribution", self.attribution, *options)

    @contextmanager
    def _smooth(self) -> Iterator[None]:
        """While it lasts, the activations of the modules are smooth, unless ``beta`` is None."""
        explainers = (self.attribution, self.surrogate)
        functions = [self.forward_func, *(getattr(e, "forward_func", None) for e in explainers)]
        functions = functions if self.module is None else [self.module]
        with ExitStack() as stack:
            for module in dict.fromkeys(f for f in functions if isinstance(f, nn.Module)):
                if self.beta is not None:
                    stack.enter_context(smooth_activations(module, self.beta))
            yield


class _Farthest:
    """The input of each of N samples whose map moved farthest, and what is known of it."""

    def __init__(self, victim: Victim, goal: Goal, clean: Tensor) -> None:
        self.victim = victim
        self.goal = goal
        self.x = tuple(t.clone() for t in victim.x)
        self.maps = clean.clone()
        self.objective = goal(clean, victim.everyone)
        self.kept = ~victim.already & self._kept_as_bytes(victim.x, victim.everyone)
        """N booleans: the label is kept."""

    def see(self, x: Tensors, rows: Tensor, maps: Tensor, is_kept: Tensor) -> None:
        """Keep those iterates n×… of ``rows`` that moved farther than before, with their label."""
        objective = self.goal(maps, rows)
        at = (is_kept & (objective > self.objective[rows])).nonzero()[:, 0]
        if len(at) > 0:
            at = at[self._kept_as_bytes(take_each(x, at), rows[at])]
        where = rows[at]
        put_each(self.x, where, take_each(x, at))
        self.maps[where], self.objective[where] = take(maps, at), take(objective, at)
        self.kept[where] = True

    def _kept_as_bytes(self, x: Tensors, rows: Tensor) -> Tensor:
        """n booleans: with ``quantize``, whether the 8-bit rounding of ``rows`` has the label."""
        victim = self.victim
        if not victim.quantize:
            return torch.ones_like(rows, dtype=torch.bool)
        return ~victim.succeeds(victim.scores(victim.to_bytes(x, rows), rows), rows)
