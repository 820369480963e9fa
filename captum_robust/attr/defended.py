"""Defended: an attribution averaged over transforms of the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from captum.attr import Attribution, NeuronAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust._captum import format_output, is_tuple
from captum_robust._checks import check, check_choice, check_count, check_finite, check_number
from captum_robust._progress import counted
from captum_robust._scores import (
    ClassScores,
    arguments_of,
    at_least_float,
    finite_scores,
    model_scores,
    target_of,
)
from captum_robust.attr._classes import Target
from captum_robust.attr._inputs import as_given, checked, in_dtype_of, input_of, size_of
from captum_robust.attr._transformed import COMBINATIONS, Group, Result, combined_maps, groups_of
from captum_robust.attr._wrapped import (
    Wrapper,
    innermost,
    is_of_layer,
    listed,
    over_tensors,
    passed_on,
    run,
    takes_target,
    without_details,
)
from captum_robust.transforms.transform import Transform, as_transforms

_CPU_BATCH = 16
"""Images; of convolutions, larger batches leave a processor's caches and take longer an image."""
_WITHOUT_POSITIONS = (nn.Linear, nn.Bilinear, nn.Flatten, nn.Embedding, nn.EmbeddingBag)


class Defended(Wrapper):
    """The average of an attribution over transforms of the image, of the class they agree on.

    An attack that flips the label of an image seldom survives a little blur, noise or compression.
    The class scores are averaged over the transformed images, the best class of the average is
    explained on each, and the maps, moved back to where they belong, are combined. The transforms
    are those of Guo et al., "Countering Adversarial Images using Input Transformations"
    (https://arxiv.org/abs/1711.00117). It holds against an attacker who does not know it; one who
    does attacks the average itself (:class:`captum_robust.defenses.DefendedModel`).

    All transformed images of one size are one batch. It costs, with T transforms, T attributions;
    and T forward passes to find the class, but where a target is given. :class:`RobustCAM` finds it
    in its own pass where all are one batch; in several the scores of all have to come first, also
    with a target, for the other top classes.

    Args:
        attribution: any of images N×C×H×W. One with ``ranks_classes`` (:class:`RobustCAM`,
            :class:`TopClasses`) takes all of its top classes from the averaged scores.
        transforms: one or several of :mod:`captum_robust.defenses`, or functions of images that
            neither draw nor move pixels.
        combine: ``"mean"``; ``"normalized_mean"``, of maps that are divided by their largest
            magnitude first; ``"median"``, position by position, of an even number the lower
            of the two in the middle. A position counts in those transforms only that show it.
        transforms_per_eval: at most so many transforms in a batch, whose images are made when it is
            their turn (twice, where the class has to be found first). None: all; on the CPU as many
            as make 16 images, where that takes no more passes.
        clamp: an image that leaves the pixels a transform takes, mostly [0, 1], by at most so many
            widths of theirs is clamped for it, as noise around it does (``NoiseTunnel``,
            ``sensitivity_max``); one that leaves them further, as in 0 to 255, is refused. 0: all.

    Raises:
        TypeError: ``attribution`` is no attribution, a transform neither transform nor function.
        ValueError: an unknown ``combine``; no transforms; one that changes the size or moves pixels
            and does not say how maps get back, that draws without a seed, or that moves pixels
            where the attribution is of a neuron or of a layer without positions.

    >>> from captum.attr import InputXGradient
    >>> from captum_robust.defenses import Transform
    >>> class Brighter(Transform):
    ...     def _apply(self, x):
    ...         return x + 0.5
    >>> attribution = InputXGradient(lambda x: x.flatten(1))
    >>> Defended(attribution, [Brighter(), lambda x: x]).attribute(torch.zeros(1, 1, 1, 2), 1)
    tensor([[[[0.0000, 0.2500]]]])
    """

    explains_prediction = True

    def __init__(
        self,
        attribution: Attribution,
        transforms: Transform | Callable[[Tensor], Tensor] | Sequence[Any],
        combine: str = "mean",
        *,
        transforms_per_eval: int | None = None,
        clamp: float = 1.0,
    ) -> None:
        super().__init__(attribution)
        check_choice("combine", combine, COMBINATIONS)
        check_count("transforms_per_eval", transforms_per_eval, 1, optional=True)
        check_number("clamp", clamp, 0)
        self.transforms = as_transforms(transforms)
        self.combine = combine
        self.transforms_per_eval = transforms_per_eval
        self.clamp = clamp
        self._ranks_classes = getattr(attribution, "ranks_classes", False)
        self._check_fit()

    def _check_fit(self) -> None:
        """``ValueError`` where a transform moves what the attribution cannot follow."""
        moving = next((t for t in self.transforms if t.moves_pixels), None)
        if moving is None:
            return
        inner = innermost(self.attribution)
        name, moves = type(inner).__name__, f"transforms: {moving!r} moves pixels"
        is_neuron = isinstance(inner, NeuronAttribution)
        check(not is_neuron, f"{moves}, and the neuron of {name} stays where it is")
        layer = inner.layer if is_of_layer(inner) else None
        its_layer = f"the layer of {name}, a {type(layer).__name__}"
        has_none = isinstance(layer, _WITHOUT_POSITIONS)
        check(not has_none, f"{moves}, and {its_layer}, has no positions to move back")

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        **arguments: Any,
    ) -> Any:
        """The combined attribution, in the shape that the attribution gives for the inputs.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: N×C×H×W with the pixels that the transforms take, mostly in [0, 1]; or a tuple
                of such, all transformed alike.
            target: None: the class with the highest score, averaged over the transforms.
            additional_forward_args: passed on, tensors of N rows once a transform.
            arguments: those of the attribution's ``attribute``, tensors of N rows likewise.

        Returns:
            As the attribution; of a layer's map the resolution for the inputs as they are. What
            comes behind the attributions, as ``convergence_delta``, is averaged.

        Raises:
            ValueError: no images, pixels out of range, NaN or infinity; results that a transform
                which moves pixels cannot move back; a baseline or mask of the inputs' size for a
                transform that changes the size, or, where it is not the same in all places, for one
                that moves pixels.
        """
        with torch.inference_mode(False), torch.enable_grad():
            return self._explain(inputs, target, additional_forward_args, arguments, graph=False)

    def differentiable(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        **arguments: Any,
    ) -> Any:
        """The result of :meth:`attribute` with a graph, for an attacker of the map itself.

        The transforms have the gradients of their surrogates. The attribution has to offer
        ``differentiable`` too, as :class:`RobustCAM` does.

        Raises:
            TypeError: it does not.
        """
        lacks = f"{type(self.attribution).__name__} has no method differentiable()"
        advice = "RobustCAM has, and with k=1 it is the map of LayerGradCam"
        has = hasattr(self.attribution, "differentiable")
        check(has, f"attribution: {lacks}; {advice}", TypeError)
        with torch.inference_mode(False), torch.enable_grad():
            return self._explain(inputs, target, additional_forward_args, arguments, graph=True)

    def scores(
        self, inputs: Tensor | tuple[Tensor, ...], additional_forward_args: object | None = None
    ) -> Tensor:
        """The class scores N×K, averaged over the transforms, without a graph."""
        tensors = checked(inputs)
        with torch.inference_mode(False):
            groups = self._groups(tensors, {}, graph=False)
            return self._average(groups, additional_forward_args, len(tensors[0]))

    def _groups(
        self, inputs: tuple[Tensor, ...], arguments: dict[str, Any], graph: bool
    ) -> Iterator[Group]:
        x, most = inputs[0], self.transforms_per_eval
        # One that ranks classes needs no pass of its own to find them if all are in one batch.
        if most is None and x.device.type == "cpu" and not self._ranks_classes:
            most = max(1, _CPU_BATCH // len(x))
        most = most or len(self.transforms)
        return groups_of(self.transforms, inputs, arguments, most, graph, self.clamp)

    def _explain(
        self, inputs: Any, target: Target, extra: Any, arguments: dict[str, Any], *, graph: bool
    ) -> Any:
        tensors = checked(inputs)
        n, count = len(tensors[0]), len(self.transforms)
        passed = passed_on(None, extra, arguments)
        # A graph holds all images anyway.
        in_turn = not graph and (self.transforms_per_eval or count) < count
        kept = None if in_turn else list(self._groups(tensors, passed, graph))

        def groups() -> Iterable[Group]:
            return self._groups(tensors, passed, graph) if kept is None else kept

        shared: dict[str, Any] = {}
        if self._ranks_classes and kept is not None and len(kept) == 1:
            shared["ranking"] = lambda s: (
                at_least_float(s).reshape(count, n, -1).mean(dim=0).repeat(count, 1)
            )
        elif self._ranks_classes and not callable(target):
            mean = self._average(groups(), extra, n, target)
            shared["ranking"] = lambda scores: mean.repeat(len(scores) // n, 1)
        elif target is None and takes_target(self.attribution):
            mean = self._average(groups(), extra, n)
            if mean.ndim == 2 and mean.shape[1] > 1:
                target = mean.argmax(dim=1)
        passed = passed_on(target, extra, shared | arguments)

        of_number: dict[int, Result] = {}
        for group in counted(groups(), "group", None, "defended"):
            whole = as_given(inputs, group.inputs)
            each = self._attribute(group, whole, n, passed, graph)
            of_number |= zip(group.numbers, each, strict=True)
        results = [of_number[i] for i in range(count)]
        is_layer = is_of_layer(self.attribution)
        maps = []
        for i in range(len(results[0].parts)):
            x = input_of(tensors, i)
            combined = combined_maps(self.transforms, results, i, x, self.combine, is_layer)
            maps.append(in_dtype_of(x, combined))
        result = format_output(results[0].is_tuple, tuple(maps))
        rests = zip(*(r.rest for r in results), strict=True)
        means = [torch.stack(rest).mean(dim=0) for rest in rests]
        return (result, *means) if means else result

    def _average(
        self, groups: Iterable[Group], arguments: Any, n: int, target: Target = None
    ) -> Tensor:
        """The mean class scores N×K; where scores are N×K×…, those that the target selects."""
        total: Tensor | None = None
        for group in groups:
            count = len(group.numbers)
            rows = list(range(n)) * count
            passed = arguments_of(arguments, rows, n)
            with torch.no_grad():
                scores = model_scores(self.forward_func, group.inputs, passed)
            scores = finite_scores(scores, n, copies=count)
            if target is not None and scores.ndim > 1:
                scores = ClassScores(scores, target_of(target, rows, n))(scores)
            scores = at_least_float(scores).reshape(count, n, *scores.shape[1:]).sum(dim=0)
            total = scores if total is None else total + scores
        assert total is not None
        return total / len(self.transforms)

    def _attribute(
        self, group: Group, images: Any, n: int, arguments: dict[str, Any], graph: bool
    ) -> list[Result]:
        """The result of each transform of a group, whose images have the caller's structure."""
        count = len(group.numbers)
        rows = list(range(n)) * count
        passed = {
            name: (target_of if name == "target" else arguments_of)(value, rows, n)
            for name, value in arguments.items()
        }
        try:
            if graph:
                result = self.attribution.differentiable(images, **passed)
            else:
                result = over_tensors(Tensor.detach, run(self.attribution, images, passed))
            parts, rest = without_details(result, self.attribution, is_tuple(images), passed)
            for each in (each for part in parts for each in torch.split(part, n)):
                check_finite(each, "attribution")
        except ValueError:
            # The scores may be to blame, and a sample has another number among those of all.
            self._average([group], arguments.get("additional_forward_args"), n)
            raise
        complete = all(len(part) == n * count for part in parts)
        wanted = f"{n * count} results for as many images"
        check(complete, f"attribution: expected {wanted}, got {listed(parts)}")
        is_result_tuple = isinstance(result[0] if rest else result, tuple)
        sizes = tuple(size_of(input_of(group.inputs, i)) for i in range(len(parts)))
        # The rows of each transform.
        by_transform = zip(*(each.chunk(count) for each in (*parts, *rest)), strict=True)
        last = len(parts)
        return [Result(own[:last], sizes, own[last:], is_result_tuple) for own in by_transform]
