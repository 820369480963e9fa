"""Detection of attacked images, from what they do to the activations of a classifier."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check_batch, check_finite, check_inputs
from captum_robust._names import printable, unknown_name
from captum_robust._weights import read_tensors, write_tensors
from captum_robust.optim import as_number

SUMMARIES = ("mean", "max", "flatten")
Images = Tensor | Iterable[Any]
"""Images N×…, or batches of them, or of tuples that begin with them, such as (images, labels)."""

_FORMAT = "captum_robust.SafetyNet"
_FOLDS = 5
_CHUNK = 1 << 22
"""Numbers held at a time while resampling."""


@dataclass(frozen=True)
class ROC:
    """How well scores tell M attacked images from N clean ones, at every threshold.

    A threshold says "attacked" of the scores that reach it.

    Attributes:
        false_positive_rate: T, the share of clean images that each threshold rejects.
        true_positive_rate: T, the share of attacked images that it rejects.
        thresholds: T, falling, from infinity; one for each score that occurs.
        area: under the curve, the chance that an attacked image has a higher score than a clean
            one (equal scores count half).
        interval: (low, high), the bootstrap interval around the area.
        resampled_areas: one of each resampling, from which the interval is taken.
    """

    false_positive_rate: Tensor
    true_positive_rate: Tensor
    thresholds: Tensor
    area: float
    interval: tuple[float, float]
    resampled_areas: Tensor

    @classmethod
    def of(
        cls,
        clean_scores: Tensor,
        attacked_scores: Tensor,
        *,
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> ROC:
        """The curve of N and M scores, of any detector.

        Args:
            clean_scores: N; higher is more suspicious.
            attacked_scores: M.
            level: confidence of the interval, in (0, 1).
            resamples: how often N clean and M attacked scores are drawn with replacement,
                independently; where both are of the same images that makes the interval wider
                than need be.
            seed: the same seed gives the same interval on every device.

        Raises:
            ValueError: no scores of one kind, NaN, a level or number of resamples out of range.
            TypeError: no tensors.

        >>> roc = ROC.of(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8]))
        >>> roc.area, roc.thresholds.tolist()[0]
        (0.75, inf)
        """
        for name, scores in (("clean_scores", clean_scores), ("attacked_scores", attacked_scores)):
            if not isinstance(scores, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(scores).__name__}")
            if scores.ndim != 1 or len(scores) == 0:
                raise ValueError(f"{name}: expected one a sample, got {tuple(scores.shape)}")
            if scores.isnan().any():
                raise ValueError(f"{name}: NaN for sample {int(scores.isnan().nonzero()[0])}")
        if not 0 < as_number(level) < 1:
            raise ValueError(f"level: expected a number in (0, 1), got {level!r}")
        if not isinstance(resamples, int) or isinstance(resamples, bool) or resamples < 1:
            raise ValueError(f"resamples: expected a whole number from 1, got {resamples!r}")
        clean, attacked = clean_scores.detach().cpu(), attacked_scores.detach().cpu()
        precise = torch.promote_types(clean.dtype, attacked.dtype)
        both = torch.cat([clean.to(precise), attacked.to(precise)])
        values, places = torch.unique(both, return_inverse=True)
        clean_places, attacked_places = places[: len(clean)], places[len(clean) :]
        # How many of each kind have each value, from the highest down.
        rejected = [
            torch.bincount(p, minlength=len(values)).flip(0).cumsum(0).double() / len(p)
            for p in (clean_places, attacked_places)
        ]
        start = torch.zeros(1, dtype=torch.double)
        at = values.flip(0).double()
        areas = _resampled_areas(clean_places, attacked_places, len(values), resamples, seed)
        tail = (1 - level) / 2
        low, high = areas.quantile(torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
        area = _areas(clean_places[None], attacked_places[None], len(values)).item()
        return cls(
            torch.cat([start, rejected[0]]),
            torch.cat([start, rejected[1]]),
            torch.cat([start.fill_(torch.inf), at]),
            area,
            (low, high),
            areas,
        )


def _areas(clean: Tensor, attacked: Tensor, values: int) -> Tensor:
    """B areas of B×N and B×M scores, each the place of its value among ``values`` ones."""
    counts = []
    for places in (clean, attacked):
        count = torch.zeros(len(places), values, dtype=torch.double)
        counts.append(count.scatter_add_(1, places, torch.ones_like(places, dtype=torch.double)))
    below = counts[0].cumsum(1) - counts[0] / 2
    return (below * counts[1]).sum(1) / (clean.shape[1] * attacked.shape[1])


def _resampled_areas(
    clean: Tensor, attacked: Tensor, values: int, resamples: int, seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _CHUNK // (values + len(clean) + len(attacked)))
    found = []
    for done in range(0, resamples, chunk):
        size = min(chunk, resamples - done)
        drawn = [
            p[torch.randint(len(p), (size, len(p)), generator=generator)] for p in (clean, attacked)
        ]
        found.append(_areas(drawn[0], drawn[1], values))
    return torch.cat(found)


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
        if not callable(model):
            raise TypeError(f"model: expected a model or a function, got {type(model).__name__}")
        if summary not in SUMMARIES:
            raise unknown_name("summary", summary, SUMMARIES)
        for name, number, least in (("bins", bins, 2), ("batch_size", batch_size, 1)):
            if name == "bins" and number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name}: expected a whole number from {least}, got {number!r}")
        for name, value in (("penalty", penalty), ("gamma", gamma)):
            if value is not None and not 0 < as_number(value) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        self.model = model
        self.layers, self.layer_names = _layers_of(model, layers)
        self.bins = bins
        self.summary = summary
        self.penalty = float(penalty)
        self.gamma = None if gamma is None else float(gamma)
        self.batch_size = batch_size
        self.threshold = None
        self._machine: _Machine | None = None

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
        whatever their numbers.

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
        _machine_class()  # before the images have gone through the model
        of_clean = self._all_activations(clean, "clean")
        of_attacked = self._all_activations(attacked, "attacked").to(of_clean.device)
        n = len(of_clean)
        if n < _FOLDS:
            raise ValueError(f"clean: expected at least {_FOLDS} images, got {n}")
        fold_of_clean = torch.arange(n, device=of_clean.device) % _FOLDS
        fold_of_attacked = fold_of_clean[_checked_sources(sources, len(of_attacked), n)]
        held_out = of_clean.new_empty(n)
        for fold in range(_FOLDS):
            others = of_attacked[fold_of_attacked != fold]
            if len(others) == 0:
                raise ValueError(
                    f"attacked: all images are made of number {fold}, {fold + _FOLDS}, … of the "
                    "clean ones; give some that are made of others"
                )
            machine = self._fitted(of_clean[fold_of_clean != fold], others)
            held_out[fold_of_clean == fold] = machine.score(of_clean[fold_of_clean == fold])
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
        machine = self._on(x)
        activations = [self._activations(part)[1] for part in self._parts(x)]
        return machine.codes(torch.cat(activations))

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
        return self._on(x).score_of_codes(self.codes(x))

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
        return ROC.of(
            self._all_scores(clean, "clean"), self._all_scores(attacked, "attacked"), **options
        )

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
        if not 0 < as_number(temperature) < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
        machine = self._on(x)
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
        facts = {
            "layers": self.layer_names,
            "bins": self.bins,
            "summary": self.summary,
            "penalty": self.penalty,
            "gamma": self.gamma,
            "threshold": self.threshold,
            "machine": {"gamma": machine.gamma, "intercept": machine.intercept},
        }
        metadata = {"format": _FORMAT, "facts": json.dumps(facts)}
        write_tensors(Path(path), machine.tensors(), metadata)

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
        machine, facts = _read(path)
        names = facts["layers"] if layers is None else layers
        if layers is None and None in facts["layers"]:
            raise ValueError(f"layers: {printable(str(path))} does not name them; give the modules")
        found = cls(
            model,
            names,
            facts["bins"],
            summary=facts["summary"],
            penalty=facts["penalty"],
            gamma=facts["gamma"],
            batch_size=batch_size,
        )
        found._machine = machine
        found.threshold = facts["threshold"]
        return found

    def _fitted_machine(self) -> _Machine:
        if self._machine is None:
            raise RuntimeError(
                "the detector is not fitted yet: call fit(clean, attacked), or SafetyNet.load(…)"
            )
        return self._machine

    @torch.inference_mode(False)
    def _on(self, x: Any) -> _Machine:
        """The machine on the device of the images, from then on."""
        machine = self._fitted_machine()
        if isinstance(x, Tensor) and x.device != machine.reference.device:
            machine = self._machine = machine.to(x.device)
        return machine

    def _fitted(self, clean: Tensor, attacked: Tensor) -> _Machine:
        """The machine that tells activations N×D from M×D."""
        deviation, mean = torch.std_mean(clean, dim=0, correction=0)
        # An activation that never changes carries nothing, and must not be divided by zero.
        scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        machine = _Machine(
            reference=mean[None] if self.bins is None else _levels(clean, self.bins),
            scale=scale,
            support_vectors=clean[:0],
            dual_coefficients=clean[:0, 0],
            gamma=1.0,
            intercept=0.0,
            quantised=self.bins is not None,
        )
        codes = torch.cat([machine.codes(clean), machine.codes(attacked)])
        variance = float(codes.double().var(correction=0))
        if variance == 0:
            raise ValueError(
                "layers: their activations are the same for all images; choose other layers"
            )
        gamma = 1 / (codes.shape[1] * variance) if self.gamma is None else self.gamma
        is_attacked = torch.arange(len(codes)) >= len(clean)
        svm = _machine_class()(C=self.penalty, gamma=gamma, class_weight="balanced")
        svm.fit(codes.cpu().numpy(), is_attacked.numpy())
        device = clean.device
        return replace(
            machine,
            support_vectors=codes[torch.as_tensor(svm.support_, dtype=torch.long, device=device)],
            dual_coefficients=torch.from_numpy(svm.dual_coef_[0]).float().to(device),
            gamma=float(gamma),
            intercept=float(svm.intercept_[0]),
        )

    def _all_scores(self, images: Images, name: str) -> Tensor:
        self._fitted_machine()
        activations = self._all_activations(images, name)
        return self._on(activations).score(activations)

    @torch.no_grad()
    def _all_activations(self, images: Images, name: str) -> Tensor:
        """N×D, of a tensor of images or of batches."""
        batches = [images] if isinstance(images, Tensor) else images
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"{name}: expected images or batches of them, got {type(images).__name__}"
            )
        found = []
        for batch in batches:
            x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            found += [self._activations(part)[1] for part in self._parts(x)]
        if not found:
            raise ValueError(f"{name}: there are no images")
        return torch.cat(found)

    def _parts(self, x: Any) -> Iterator[Tensor]:
        self._check(x)
        yield from x.split(self.batch_size)

    def _check(self, x: Any) -> None:
        check_batch((x,))
        check_inputs((x,), None)

    def _activations(self, x: Tensor) -> tuple[Any, Tensor]:
        """The model's output, and the activations n×D of all layers, float32."""
        found: list[Tensor | None] = [None] * len(self.layers)

        def hook_of(i: int) -> Any:
            def hook(layer: nn.Module, _: Any, output: Any) -> None:
                # Summarised here and now: the next layer may write into its input.
                found[i] = _summarised(output, self.summary, layer, len(x))

            return hook

        with ExitStack() as hooks:
            for i, layer in enumerate(self.layers):
                hooks.callback(layer.register_forward_hook(hook_of(i)).remove)
            # A copy: a model may write to what it is given.
            output = self.model(x.clone())
        missing = [i for i, f in enumerate(found) if f is None]
        if missing:
            i = missing[0]
            raise ValueError(f"layers: number {i}, {type(self.layers[i]).__name__}, did not run")
        each = [f.to(x.device) for f in found if f is not None]
        activations = torch.cat(each, dim=1)
        check_finite(activations, "layers, activations")
        return output, activations

    def __repr__(self) -> str:
        layers = [
            type(m).__name__ if n is None else n
            for m, n in zip(self.layers, self.layer_names, strict=True)
        ]
        return (
            f"SafetyNet(layers={layers}, bins={self.bins}, summary={self.summary!r}, "
            f"penalty={self.penalty:g}, threshold={self.threshold})"
        )


@dataclass(frozen=True)
class _Machine:
    """Activations N×D -> codes N×D -> decision function N."""

    reference: Tensor
    """(bins - 1)×D, the thresholds between the levels; 1×D, the mean, where it is not quantised."""
    scale: Tensor
    """D, standard deviations."""
    support_vectors: Tensor
    """S×D codes."""
    dual_coefficients: Tensor
    """S."""
    gamma: float
    intercept: float
    quantised: bool

    def score(self, activations: Tensor) -> Tensor:
        return self.score_of_codes(self.codes(activations))

    def codes(self, activations: Tensor, temperature: float | None = None) -> Tensor:
        """With a temperature, their gradient is that of a sum of sigmoids."""
        if activations.shape[1] != len(self.scale):
            raise ValueError(
                f"inputs: they give {activations.shape[1]} activations, the detector was fitted on "
                f"{len(self.scale)}; give images of the size that it was fitted on"
            )
        if not self.quantised:
            return (activations - self.reference) / self.scale
        # Level by level: all at once would take bins times the memory.
        codes = torch.zeros_like(activations)
        for level in self.reference:
            step = (activations > level).to(activations.dtype)
            if temperature is not None:
                soft = torch.sigmoid((activations - level) / (temperature * self.scale))
                step = soft + (step - soft).detach()
            codes = codes + step
        return codes

    def score_of_codes(self, codes: Tensor) -> Tensor:
        """Σ_s a_s exp(-γ‖c - c_s‖²) + b."""
        # Autocast would round the products of whole numbers, which float32 holds exactly.
        with torch.autocast(codes.device.type, enabled=False):
            squares = codes.square().sum(1)[:, None] + self.support_vectors.square().sum(1)
            distances = (squares - 2 * codes @ self.support_vectors.T).clamp(min=0)
            return torch.exp(-self.gamma * distances) @ self.dual_coefficients + self.intercept

    def to(self, device: torch.device) -> _Machine:
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}

    def problem(self, bins: int | None) -> str | None:
        """What keeps tensors of a file from being a machine."""
        d, s = len(self.scale), len(self.dual_coefficients)
        expected = {
            "reference": (1 if bins is None else bins - 1, d),
            "scale": (d,),
            "support_vectors": (s, d),
            "dual_coefficients": (s,),
        }
        for name, shape in expected.items():
            t: Tensor = getattr(self, name)
            if t.shape != shape or t.dtype != torch.float32:
                return f"{name} is {tuple(t.shape)}, {t.dtype}, not {shape}, torch.float32"
            if not t.isfinite().all():
                return f"{name} is not finite"
        return None


_TENSORS = ("reference", "scale", "support_vectors", "dual_coefficients")


def _machine_class() -> Any:
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise ImportError(
            "fitting a detector needs scikit-learn: pip install 'captum-robust[demo]'"
        ) from None
    return SVC


def _levels(activations: Tensor, bins: int) -> Tensor:
    """(bins - 1)×D, between which lie equal shares of N×D activations."""
    n = len(activations)
    ordered = activations.sort(dim=0).values
    # Midway between two, so that no image lies on a threshold.
    above = [min(max(round(n * k / bins), 1), n - 1) for k in range(1, bins)]
    return torch.stack([(ordered[i - 1] + ordered[i]) / 2 for i in above])


def _quantile(scores: Tensor, rate: float) -> float:
    """The smallest of the scores above which lies at most a share ``rate`` of them."""
    # A share that should be whole may lie just above it by rounding.
    place = math.ceil(len(scores) * (1 - rate) - 1e-9)
    return float(scores.sort().values[max(place, 1) - 1])


def _checked_sources(sources: Tensor | Sequence[int] | None, m: int, n: int) -> Tensor:
    if sources is None:
        return torch.arange(m) % n
    found = torch.as_tensor(sources).cpu()
    if found.shape != (m,) or found.is_floating_point() or found.dtype == torch.bool:
        raise ValueError(
            f"sources: expected {m} numbers of clean images, got {found.dtype} of shape "
            f"{tuple(found.shape)}"
        )
    if int(found.min()) < 0 or int(found.max()) >= n:
        raise ValueError(
            f"sources: expected numbers from 0 to {n - 1}, got {int(found.min())} to "
            f"{int(found.max())}"
        )
    return found.long()


def _check_rate(rate: float) -> None:
    if not 0 < as_number(rate) < 1:
        raise ValueError(f"false_positive_rate: expected a number in (0, 1), got {rate!r}")


def _layers_of(
    model: Callable[[Tensor], Any], layers: Any
) -> tuple[tuple[nn.Module, ...], tuple[str | None, ...]]:
    """The modules, and their names in the model where they have one."""
    if not isinstance(layers, (nn.Module, str, Iterable)):
        raise TypeError(f"layers: expected modules or names, got {type(layers).__name__}")
    listed = [layers] if isinstance(layers, (nn.Module, str)) else list(layers)
    if not listed:
        raise ValueError("layers: expected at least one")
    named = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    names = {id(module): name for name, module in named.items()}
    found = []
    for layer in listed:
        if isinstance(layer, str):
            if not named:
                raise ValueError(f"layers: {layer!r} names a layer, and the model is a function")
            if layer not in named:
                raise unknown_name("layer", layer, [n for n in named if n])
            found.append(named[layer])
        elif isinstance(layer, nn.Module):
            found.append(layer)
        else:
            raise TypeError(f"layers: expected modules or names, got {type(layer).__name__}")
    return tuple(found), tuple(names.get(id(module)) for module in found)


def _summarised(output: Any, summary: str, layer: nn.Module, n: int) -> Tensor:
    """Activations n×D, float32, in memory of their own."""
    name = type(layer).__name__
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = getattr(output, "dtype", type(output).__name__)
        raise TypeError(f"layers: the output of {name} is no floating-point tensor, but {kind}")
    if output.ndim == 0 or len(output) != n:
        raise ValueError(
            f"layers: the output of {name} has the shape {tuple(output.shape)}, expected {n}×… for "
            f"a batch of {n}"
        )
    own = output.clone().float()
    if own.ndim <= 2 or summary == "flatten":
        return own.reshape(n, -1)
    positions = (1,) if own.ndim == 3 else tuple(range(2, own.ndim))
    return own.mean(positions) if summary == "mean" else own.amax(positions)


def _read(path: str | Path) -> tuple[_Machine, dict[str, Any]]:
    """What a file of :meth:`SafetyNet.save` holds."""
    tensors, metadata = read_tensors(Path(path))
    if metadata.get("format") != _FORMAT:
        raise _no_detector(path, f"its format is {metadata.get('format')!r}")
    try:
        facts = json.loads(metadata["facts"])
        machine = _Machine(
            **{name: tensors[name] for name in _TENSORS},
            gamma=float(facts["machine"]["gamma"]),
            intercept=float(facts["machine"]["intercept"]),
            quantised=facts["bins"] is not None,
        )
        facts = {
            "layers": list(facts["layers"]),
            "bins": None if facts["bins"] is None else int(facts["bins"]),
            "summary": str(facts["summary"]),
            "penalty": float(facts["penalty"]),
            "gamma": None if facts["gamma"] is None else float(facts["gamma"]),
            "threshold": float(facts["threshold"]),
        }
    except KeyError as error:
        raise _no_detector(path, f"no {error}") from None
    except (TypeError, ValueError) as error:
        raise _no_detector(path, str(error)) from None
    if problem := machine.problem(facts["bins"]):
        raise _no_detector(path, problem)
    return machine, facts


def _no_detector(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"{printable(str(path))} holds no SafetyNet: {reason}")
