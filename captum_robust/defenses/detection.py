"""Detection of attacked images, from what they do to the activations of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import (
    check,
    check_batch,
    check_callable,
    check_choice,
    check_count,
    check_inputs,
    check_number,
    check_numbers_below,
    check_type,
    printable,
)
from captum_robust._facts import Form, choice, listed, number, or_none, parts, text, whole
from captum_robust._files import read_facts, write_facts
from captum_robust._progress import counted
from captum_robust.defenses._activations import SUMMARIES, layers_of, output_and_activations
from captum_robust.defenses._support_vectors import SupportVectorMachine, support_vector_classifier
from captum_robust.defenses.roc import ROC

Images = Tensor | Iterable[Any]
"""Images N×…, or batches of them, or of tuples that begin with them, such as (images, labels)."""

_KIND = "captum_robust.SafetyNet"
_SETTINGS = ("bins", "summary", "penalty", "gamma")
_OF_MACHINE = ("gamma", "intercept")
_FORM: Form = {
    "machine": parts({"gamma": number(0, open_low=True), "intercept": number()}),
    "bins": or_none(whole(2)),
    "summary": choice(*SUMMARIES),
    "penalty": number(0, open_low=True),
    "gamma": or_none(number(0, open_low=True)),
    "layers": listed(or_none(text()), 1),
    "threshold": number(),
}
_FOLDS = 5


class SafetyNet:
    """A detector that reads the quantised late activations of a classifier with an RBF machine.

    Lu, Issaranon, Forsyth, "SafetyNet: Detecting and Rejecting Adversarial Examples Robustly"
    (https://arxiv.org/abs/1704.00103). Each activation is quantised to a code of ``bins`` levels,
    and a support vector machine with a radial basis function kernel tells the codes of attacked
    images from those of clean ones. Quantised activations give an attacker who knows the detector
    no gradient; :meth:`surrogate` gives one anyway, to measure what that is worth. It sees attacks
    that go far beyond a boundary; those that stop behind it, such as DeepFool, it hardly does.

    The thresholds between the levels are quantiles of the clean training images, of each
    activation by itself, so that every level is equally frequent.

    Fitting needs scikit-learn (the extra ``demo``); scoring does not: the decision function is
    computed in torch, on the device of the activations, in float32.

    Args:
        model: inputs N×… -> any output. Nothing of it is changed; give it in evaluation mode, it
            is left in the mode that it is given in.
        layers: one or more late layers whose outputs are N×…, modules or their dotted names in
            ``model``. Of a layer that runs more than once in a pass the last output counts.
        bins: levels of a code, from 2; 2 makes it binary. None: activations are not quantised, but
            less their mean and divided by their deviation over the clean training images.
        summary: what becomes of an output N×C×… before that: ``"mean"`` or ``"max"`` over all
            positions, one activation a channel (tokens N×T×C are summarised over T), which does
            not ask where in the image the object stands; ``"flatten"``: every unit by itself, as
            in the paper's fully connected layers.
        penalty: C of the support vector machine.
        gamma: of the kernel exp(-γ‖a-b‖²), codes being 0, 1, …, ``bins`` - 1. None: one over the
            number of activations and their variance, scikit-learn's ``"scale"``.
        batch_size: how many images go through the model at once.

    Attributes:
        threshold: images whose score is above it are rejected; None before :meth:`fit`.

    Raises:
        TypeError: a model that can't be called, or layers that are neither modules nor names.
        ValueError: no layers, unknown ones, or an argument out of range.
    """

    threshold: float | None

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        layers: nn.Module | str | Sequence[nn.Module | str],
        bins: int | None = 4,
        *,
        summary: str = "mean",
        penalty: float = 10.0,
        gamma: float | None = None,
        batch_size: int = 32,
    ) -> None:
        check_callable("model", model)
        check_choice("summary", summary, SUMMARIES)
        self.model = model
        self.layers, self.layer_names = layers_of(model, layers)
        self.bins = check_count("bins", bins, 2, optional=True)
        self.summary = summary
        self.penalty = check_number("penalty", penalty, 0, open_low=True)
        self.gamma = None if gamma is None else check_number("gamma", gamma, 0, open_low=True)
        self.batch_size = check_count("batch_size", batch_size, 1)
        self.threshold = None
        self._machine: SupportVectorMachine | None = None

    @torch.inference_mode(False)
    def fit(
        self,
        clean: Images,
        attacked: Images,
        *,
        sources: Tensor | Sequence[int] | None = None,
        false_positive_rate: float = 0.05,
    ) -> SafetyNet:
        """Learn to tell attacked images from clean ones; returns the detector itself.

        Both are read once, and only their activations are kept. The two kinds weigh alike,
        whatever their numbers. The time of the machine, which compares images with each other,
        grows as their square where there are many; that of the network as their number.

        The threshold is set by cross-validation: the clean images are scored by five machines, each
        fitted without every fifth of them and without what was made of those by an attack.
        :meth:`calibrate` sets it on images of their own.

        Args:
            clean: images N×…, a tensor or batches (tensors, or tuples that begin with them).
            attacked: images M×…, in the same forms; such that the attack succeeded on.
            sources: M, the number of the clean image that each attacked one was made of. A machine
                that has seen an image attacked finds the clean one suspicious, and the threshold
                comes out too high where this is wrong. None: 0, 1, …, N - 1, and that over again.
            false_positive_rate: the share of clean images that may be rejected, in (0, 1).

        Raises:
            ValueError: fewer than 5 clean images, no attacked ones, or none that are made of four
                fifths of the clean ones; NaN or infinity in images or activations; a layer that did
                not run; activations that are the same for all images; sources out of range.
            TypeError: images that are not floating point, a layer whose output is no tensor.
            ImportError: no scikit-learn.
        """
        _check_rate(false_positive_rate)
        support_vector_classifier()  # before the images have gone through the model
        of_clean = self._all_activations(clean, "clean")
        of_attacked = self._all_activations(attacked, "attacked").to(of_clean.device)
        n = len(of_clean)
        check(n >= _FOLDS, f"clean: expected at least {_FOLDS} images, got {n}")
        fold_of_clean = torch.arange(n, device=of_clean.device) % _FOLDS
        fold_of_attacked = fold_of_clean[_checked_sources(sources, len(of_attacked), n)]
        held_out = of_clean.new_empty(n)
        for fold in counted(range(_FOLDS), "fold", None, "SafetyNet"):
            others = of_attacked[fold_of_attacked != fold]
            check(
                len(others),
                f"attacked: all images are made of number {fold}, {fold + _FOLDS}, … of the clean "
                "ones; give some that are made of others",
            )
            out = fold_of_clean == fold
            held_out[out] = self._fitted(of_clean[~out], others).score(of_clean[out])
        self._machine = self._fitted(of_clean, of_attacked)
        self.threshold = _quantile(held_out, false_positive_rate)
        return self

    def calibrate(self, clean: Images, false_positive_rate: float = 0.05) -> SafetyNet:
        """Set the threshold so that at most such a share of these clean images is rejected.

        Raises:
            RuntimeError: nothing is fitted yet.
            ValueError: no images, or a rate that is not in (0, 1).
        """
        _check_rate(false_positive_rate)
        self.threshold = _quantile(self._all_scores(clean, "clean"), false_positive_rate)
        return self

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The codes N×D of images N×…: whole numbers, float32; or the scaled activations.

        Raises:
            RuntimeError: nothing is fitted yet.
        """
        return self._fitted_machine(x).codes(self._all_activations([x], "inputs"))

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """N numbers, float32, of images N×…; the higher, the more suspicious.

        It is the decision function of the support vector machine: about -1 for a clean image, 1
        for an attacked one.

        Raises:
            RuntimeError: nothing is fitted yet.
            ValueError, TypeError: as for :meth:`fit`; an input of another size, with
                ``"flatten"``.
        """
        return self._fitted_machine(x).score_of_codes(self.codes(x))

    def predict(self, x: Tensor) -> Tensor:
        """N booleans: rejected as attacked; errors as for :meth:`score`."""
        scores = self.score(x)
        assert self.threshold is not None
        return scores > self.threshold

    def roc(self, clean: Images, attacked: Images, **options: Any) -> ROC:
        """The curve on images N×… and M×…, tensors or batches, which fitting has not seen.

        Args:
            clean, attacked: as for :meth:`fit`.
            options: ``level``, ``resamples`` and ``seed`` of :meth:`ROC.of`.

        Raises:
            RuntimeError: nothing is fitted yet.
            ValueError, TypeError: no images of one kind; as for :meth:`score`.
        """
        scores = self._all_scores(clean, "clean"), self._all_scores(attacked, "attacked")
        return ROC.of(*scores, **options)

    def surrogate(self, x: Tensor, temperature: float = 0.25) -> tuple[Any, Tensor]:
        """The model's output and the N scores, with a gradient, for who attacks both at once.

        The scores are those of :meth:`score`. Their gradient is taken as if each step of the
        quantisation were a sigmoid, which is the backward pass differentiable approximation of
        Athalye et al. (https://arxiv.org/abs/1802.00420). One forward pass, of the whole batch.

        Args:
            x: images N×….
            temperature: width of the sigmoid, in standard deviations of the activation over the
                clean training images.

        Raises:
            RuntimeError: nothing is fitted yet.
            ValueError: a temperature that is not positive; as for :meth:`score`.
        """
        check_number("temperature", temperature, 0, open_low=True)
        machine = self._fitted_machine(x)
        self._check(x)
        output, activations = self._activations(x)
        return output, machine.score_of_codes(machine.codes(activations, temperature))

    def save(self, path: str | Path) -> None:
        """Write what was fitted, as safetensors with a JSON header; replaces a file of that name.

        The model is not in it.

        Raises:
            RuntimeError: nothing is fitted yet.
            OSError: the file cannot be written.
        """
        machine = self._fitted_machine()
        facts = {name: getattr(self, name) for name in _SETTINGS} | {
            "layers": self.layer_names,
            "threshold": self.threshold,
            "machine": {name: getattr(machine, name) for name in _OF_MACHINE},
        }
        write_facts(path, machine.tensors(), _KIND, facts)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Callable[[Tensor], Any],
        layers: nn.Module | str | Sequence[nn.Module | str] | None = None,
        *,
        batch_size: int = 32,
    ) -> SafetyNet:
        """The detector that :meth:`save` wrote, around the same model.

        Args:
            path: the file.
            model: as for the constructor.
            layers: None: those of the same names in ``model``.
            batch_size: as for the constructor.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not safetensors, or holds no detector; or its layers have no
                names, or such as ``model`` does not have, and none are given.
        """
        tensors, facts = read_facts(path, _KIND, "SafetyNet", _FORM, any_suffix=True)
        where = printable(str(path))
        try:
            own: dict[str, Any] = {**facts["machine"], **tensors}
            machine = SupportVectorMachine(**own, quantised=facts["bins"] is not None)
            machine = machine.checked(facts["bins"])
        except (TypeError, ValueError) as error:  # of tensors: others, or some are missing
            raise ValueError(f"{where} holds no SafetyNet that can be used ({error})") from None
        settings = {name: facts[name] for name in _SETTINGS}
        names, threshold = facts["layers"], float(facts["threshold"])
        is_named = layers is not None or None not in names
        check(is_named, f"layers: {where} does not name them; give the modules")
        given: Any = names if layers is None else layers
        try:
            detector = cls(model, given, **settings, batch_size=batch_size)
        except ValueError as error:  # of a layer that this model does not have
            raise ValueError(f"{where}: {error}") from None
        detector._machine, detector.threshold = machine, threshold
        return detector

    @torch.inference_mode(False)
    def _fitted_machine(self, x: Any = None) -> SupportVectorMachine:
        """The machine, on the device of images from then on where some are given."""
        if self._machine is None:
            raise RuntimeError("not fitted yet: call fit(clean, attacked), or SafetyNet.load(…)")
        if isinstance(x, Tensor):
            self._machine = self._machine.to(x.device)
        return self._machine

    def _all_scores(self, images: Images, name: str) -> Tensor:
        self._fitted_machine()
        activations = self._all_activations(images, name)
        return self._fitted_machine(activations).score(activations)

    @torch.no_grad()
    def _all_activations(self, images: Images, name: str) -> Tensor:
        """N×D, of a tensor of images or of batches."""
        check_type(name, images, Iterable, "images or batches of them")
        activations = []
        batches = [images] if isinstance(images, Tensor) else images
        doing = f"activations, {name}"
        for batch in counted(batches, "batch", None, doing):
            x: Any = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            self._check(x)
            parts = counted(x.split(self.batch_size), "part", None, doing)
            activations += [self._activations(part)[1] for part in parts]
        check(activations, f"{name}: expected images, got none")
        return torch.cat(activations)

    def _check(self, x: Any) -> None:
        check_batch((x,))
        check_inputs((x,), None)

    def _activations(self, x: Tensor) -> tuple[Any, Tensor]:
        """The model's output, and the activations n×D of all layers, float32."""
        return output_and_activations(self.model, x, self.layers, self.summary)

    def _fitted(self, clean: Tensor, attacked: Tensor) -> SupportVectorMachine:
        return SupportVectorMachine.fitted(clean, attacked, self.bins, self.penalty, self.gamma)

    def __repr__(self) -> str:
        named = zip(self.layers, self.layer_names, strict=True)
        layers = [type(module).__name__ if name is None else name for module, name in named]
        return (
            f"SafetyNet(layers={layers}, bins={self.bins}, summary={self.summary!r}, "
            f"penalty={self.penalty:g}, threshold={self.threshold})"
        )


def _check_rate(rate: float) -> None:
    check_number("false_positive_rate", rate, 0, 1, open_low=True, open_high=True)


def _quantile(scores: Tensor, rate: float) -> float:
    """The smallest of the scores above which lies at most a share ``rate`` of them."""
    # A share that should be whole may lie just above it by rounding.
    place = math.ceil(len(scores) * (1 - rate) - 1e-9)
    return float(scores.sort().values[max(place, 1) - 1])


def _checked_sources(sources: Tensor | Sequence[int] | None, m: int, n: int) -> Tensor:
    if sources is None:
        return torch.arange(m) % n
    numbers = torch.as_tensor(sources).cpu()
    kind, shape = numbers.dtype, tuple(numbers.shape)
    is_whole = not (kind.is_floating_point or kind == torch.bool)
    fits = is_whole and shape == (m,)
    check(fits, f"sources: expected {m} numbers of clean images, got {kind} of shape {shape}")
    check_numbers_below("sources", numbers, n)
    return numbers.long()
