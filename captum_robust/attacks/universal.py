"""One perturbation for all images: fitted once, then added to any image without a pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import (
    check,
    check_callable,
    check_choice,
    check_count,
    check_finite,
    check_number,
    checked_device,
    printable,
)
from captum_robust._contexts import seeded
from captum_robust._facts import Fact, Form, choice, listed, number, optional, or_none, whole
from captum_robust._files import read_facts, write_facts
from captum_robust.attacks.attack import Attack
from captum_robust.attacks.backward import FIRST_SCALE, ScaleSearch, gradients_or_zeros, no_gradient
from captum_robust.attacks.deepfool import DeepFool
from captum_robust.attacks.fooling_rates import image_scores, sized_as
from captum_robust.attacks.image_batches import (
    Loader,
    check_class,
    check_loader,
    image_batches,
    place_of,
)
from captum_robust.attacks.losses import LossFunction, Reading, cross_entropy
from captum_robust.attacks.norms import NORMS, Tensors, of_mean_one, plus
from captum_robust.attacks.victim import Victim, check_losses, clipped

METHODS = ("gradient", "deepfool")
_KIND = "captum_robust.UniversalPerturbation"
_FORM: Form = {
    "norm": choice(*NORMS),
    "epsilon": number(0),
    "bounds": or_none(listed(number(), 2, 2)),
    "rates": listed(number(0, 1)),
    "fooling_rate": optional(or_none(number(0, 1))),
    "passes": optional(whole(0)),
    "settings": optional(Fact("fields", lambda value: isinstance(value, dict))),
}


@dataclass(eq=False, repr=False)
class UniversalPerturbation(Attack):
    """Universal adversarial perturbation: one v that, added to any image, changes its class.

    Moosavi-Dezfooli et al., "Universal adversarial perturbations"
    (https://arxiv.org/abs/1610.08401). :meth:`fit` finds v on a set of images, by the paper's
    algorithm or, faster, by mini-batch gradients as in Shafahi et al., "Universal Adversarial
    Training" (https://arxiv.org/abs/1811.11304); ``perturb`` adds it to other images without a
    pass through the model. v does not depend on the image, so it often fools models that it was
    not fitted on: :func:`transfer_matrix`.

    ``perturb`` takes images N×C×H×W. v is resized (bilinear) to another height and width,
    within its ball; its ``epsilon`` scales v by that over the one it was fitted with; ``target``,
    ``additional_forward_args`` and ``targeted`` matter only to the details, which take two forward
    passes. It raises ``RuntimeError`` before anything is fitted, and ``ValueError`` for inputs with
    other channels than v.

    Args:
        forward_func, bounds, quantize: see :mod:`captum_robust.attacks`. The model that v is
            fitted on, in evaluation mode: it is left in the mode that it is given in.
        epsilon: radius of the ball that v stays in, in units of the inputs. The paper's 10 (of
            255) is the default; its L2 radius of 2000 is 2000/255 for pixels in [0, 1].
        norm: ``"Linf"`` or ``"L2"``.

    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> model.weight.data = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> attack = UniversalPerturbation(model, epsilon=0.25)
    >>> attack.fit([torch.tensor([[0.6, 0.4, 0.5], [0.5, 0.3, 0.5]])], passes=30).perturbation
    tensor([-0.2500,  0.2500,  0.0000])
    >>> attack.perturb(torch.tensor([[0.7, 0.5, 0.9]]))
    tensor([[0.4500, 0.7500, 0.9000]])
    """

    forward_func: Callable[..., Tensor]
    epsilon: float = 10 / 255
    norm: str = "Linf"
    _: KW_ONLY
    bounds: tuple[float, float] | None = (0.0, 1.0)
    quantize: bool = True
    rates: tuple[float, ...] = field(default=(), init=False)
    """For each finished pass of :meth:`fit`, the share of images that v fooled as it met them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_epsilon(self.epsilon, None)
        self._v: Tensor | None = None
        self._fitted_epsilon = float(self.epsilon)

    @property
    def perturbation(self) -> Tensor:
        """The fitted v, C×H×W, float32, on the CPU.

        Raises:
            RuntimeError: nothing is fitted yet.
        """
        if self._v is None:
            hint = "call fit(loader), or UniversalPerturbation.load(path, …)"
            raise RuntimeError(f"there is no perturbation yet: {hint}")
        return self._v

    @torch.inference_mode(False)
    def fit(
        self,
        loader: Loader,
        *,
        passes: int = 5,
        method: str = "gradient",
        target: int | None = None,
        target_rate: float | None = None,
        step_size: float = 0.1,
        momentum: float = 0.9,
        loss_func: LossFunction | None = None,
        batch_size: int = 16,
        device: torch.device | str | None = None,
        checkpoint: str | Path | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> UniversalPerturbation:
        """Find v on the images of ``loader``, from v = 0; returns the attack itself.

        No labels are needed: an image is fooled when its class is not that of the clean image. v
        is kept from the end of the pass that fooled the most; the rate of a pass is counted on
        the way, each image before v learns from it, and costs nothing. A fit that is interrupted
        (Ctrl-C) keeps what it has, and raises.

        ``"gradient"``: each mini-batch costs one forward and one backward pass (in the first pass
        over the images another forward for their clean classes, which are then remembered). v
        takes a step of ``step_size`` ε along the sign (L2: the direction) of the accumulated
        gradient of the mean loss; steps shrink with the cosine of the pass.

        ``"deepfool"``: the paper's. The images of a mini-batch that v does not fool yet get
        DeepFool (at most 10 iterations, 10 classes, overshoot 0.02); what it adds to those that it
        fools is added to v, which is projected on the ball. Ends at the paper's fooling rate of
        0.8 unless ``target_rate`` says otherwise.

        Args:
            loader: read anew each pass: a list of batches, a ``DataLoader``, … (a generator can
                be read once only). Batches are images N×C×H×W within the bounds, all of one size,
                or tuples that begin with them. Let it shuffle: torch's global generator is seeded
                for each pass, and put back.
            passes: over the loader, at most.
            target: fit v to give all images this class (``"gradient"`` only); images that have it
                already count as reached.
            target_rate: stop after the pass that fooled such a share.
            step_size: of the first pass, in units of ``epsilon``.
            momentum: decay of the sum of gradients (each scaled to mean absolute value 1).
            loss_func: (scores n×K, classes n) -> n losses. By default cross-entropy, of scores
                that are scaled to the deviation of 2.5 over the classes that those of ImageNet
                networks have (in the first batch), and without a target clipped at 10, so that v
                does not grow on images that are long fooled.
            batch_size: larger batches are split. Small ones make more steps.
            device: where to; by default where the model is, and for a function where the images
                are.
            checkpoint: a file that holds the fit after each pass. If it is there, the fit goes on
                from it, and ends bit for bit where it would have without the interruption.
            seed: of what the loader draws from torch's global generator.
            progress: show a bar; None: after two seconds, on a terminal or in a notebook.

        Raises:
            ValueError: no images; images outside of the bounds, not finite, or of several sizes; a
                loader that is exhausted after the first pass; arguments out of range; a model
                without gradient; a checkpoint of another fit.
            TypeError: a loader that gives no floating-point tensors.
            FileNotFoundError: no folder for the checkpoint.
        """
        self._check_epsilon(self.epsilon, None)
        for name, value, least in (("passes", passes, 1), ("batch_size", batch_size, 1)):
            check_count(name, value, least)
        check_count("seed", seed, 0)
        check_choice("method", method, METHODS)
        check_count("target", target, 0, optional=True)
        can_aim = target is None or method == "gradient"
        only = "as only the method 'gradient' takes one"
        check(can_aim, f"target: expected None, {only}, got {target}")
        if target_rate is not None:
            check_number("target_rate", target_rate, 0, 1, open_low=True)
        settings = {
            "epsilon": float(self.epsilon),
            "norm": self.norm,
            "bounds": None if self.bounds is None else list(self.bounds),
            "passes": passes,
            "method": method,
            "target": target,
            "step_size": check_number("step_size", step_size, 0, open_low=True),
            "momentum": check_number("momentum", momentum, 0),
            "loss_func": getattr(loss_func, "__qualname__", type(loss_func).__name__),
            "batch_size": batch_size,
            "seed": seed,
        }
        check_loader(loader, passes)
        if target_rate is None and method == "deepfool":
            target_rate = 0.8
        place = place_of(self.forward_func) if device is None else checked_device(device)
        fit = _Fit(self, settings, place, loss_func)
        if checkpoint is not None:
            _check_folder(checkpoint)
            fit.resume(checkpoint)
        try:
            for number in range(len(fit.rates), passes):
                if target_rate is not None and max(fit.rates, default=0.0) >= target_rate:
                    break
                step = step_size * 0.5 * (1 + math.cos(math.pi * number / passes))
                with seeded(seed + 1_000_003 * number, place):
                    chunks = image_batches(loader, self.bounds, batch_size, number, progress)
                    fit.one_pass(chunks, step)
                if checkpoint is not None:
                    self._keep(fit)
                    self._write(checkpoint, fit)
        finally:
            self._keep(fit)
        if method == "gradient" and not bool(fit.velocity.any()):
            warnings.warn(
                "the gradient of all images was zero in every step: nothing was fitted, and that "
                "images are not fooled does not make the model robust",
                stacklevel=2,
            )
        return self

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        count = len(victim.x)
        check(count == 1, f"inputs: expected one tensor, as one v is added to it, got {count}")
        x = victim.x[0]
        v, radius = sized_as(self.perturbation, x.shape[1:]), float(epsilon or 0.0)
        if self._fitted_epsilon > 0:
            v = v * (radius / self._fitted_epsilon)
        (v,) = self._norm.project((v[None],), radius)
        change = victim.masked((v.to(x.device).expand(x.shape),), victim.everyone)
        return victim.within(plus(victim.x, change))

    def save(self, path: str | Path) -> None:
        """Write v and how it was fitted, as safetensors; a file of that name is replaced.

        Raises:
            RuntimeError: nothing is fitted yet.
            FileNotFoundError: no such folder.
            OSError: the file cannot be written, as on a full disk; one of that name stays.
        """
        self._write(path)

    @classmethod
    def load(
        cls, path: str | Path, forward_func: Callable[..., Tensor], *, quantize: bool = True
    ) -> UniversalPerturbation:
        """The attack that :meth:`save` wrote, or the best pass of a checkpoint.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not safetensors, or holds no universal perturbation.
        """
        tensors, facts = _read(path)
        check_callable("forward_func", forward_func)
        try:
            epsilon, norm = facts["epsilon"], facts["norm"]
            bounds = facts["bounds"] and tuple(facts["bounds"])
            attack = cls(forward_func, epsilon, norm, bounds=bounds, quantize=quantize)
            v = tensors["perturbation"]
        except (KeyError, ValueError) as error:
            raise _no_perturbation(path, error) from None
        attack._v, attack.rates = v, tuple(map(float, facts["rates"]))
        check(v.ndim and v.numel(), f"{path}: perturbation: expected C×H×W")
        size = float(attack._norm.lengths((v[None],)))
        if v.dtype != torch.float32 or size > epsilon * (1 + 1e-5):
            raise _no_perturbation(path, f"its {norm} norm exceeds its epsilon of {epsilon:.4g}")
        return attack

    def _write(self, path: str | Path, fit: _Fit | None = None) -> None:
        _check_folder(path)
        tensors = {"perturbation": self.perturbation}
        facts: dict[str, Any] = {
            "norm": self.norm,
            "epsilon": self._fitted_epsilon,
            "bounds": self.bounds,
            "fooling_rate": max(self.rates, default=None),
            "passes": len(self.rates),
            "rates": self.rates,
        }
        if fit is not None:
            tensors |= fit.tensors()
            facts["settings"] = fit.settings
        write_facts(path, tensors, _KIND, facts)

    def _keep(self, fit: _Fit) -> None:
        v = fit.v if fit.best is None else fit.best
        # A fit that failed before its first step has nothing to keep.
        if fit.rates or bool(v.any()):
            self._v = v[0].detach().float().cpu()
            self._fitted_epsilon = float(self.epsilon)
            self.rates = tuple(fit.rates)


@dataclass
class _Fit:
    """One fit at work: a mini-batch in, a better v out."""

    attack: UniversalPerturbation
    settings: dict[str, Any]
    device: torch.device | None
    loss_func: LossFunction | None
    v: Tensor = field(default_factory=partial(torch.zeros, 0))
    """1×C×H×W; empty before the first mini-batch."""
    velocity: Tensor = field(default_factory=partial(torch.zeros, 0))
    """1×C×H×W, the sum of gradients."""
    best: Tensor | None = None
    """v at the end of the pass that fooled the most."""
    rates: list[float] = field(default_factory=list)
    unit: Tensor | None = None
    """What logits are divided by for the loss by default."""
    reading: Reading | None = None
    exponent: float = math.log2(FIRST_SCALE)
    """Of two: what the loss is multiplied by for the backward pass."""
    labels: dict[int, int] = field(default_factory=dict)
    """Bits of a clean image (:func:`_keys`) -> the class that the model gives it."""

    def __post_init__(self) -> None:
        forward_func, bounds = self.attack.forward_func, self.attack.bounds
        self._scores = image_scores(forward_func)
        # In L2 for both norms, as in the paper. The shortest change is not needed: v adds them up.
        self._deepfool = DeepFool(forward_func, max_iterations=10, bounds=bounds, refine=0)

    def resume(self, checkpoint: str | Path) -> None:
        """Go on where the fit of a checkpoint stands, if there is one."""
        if not Path(checkpoint).is_file():
            return
        tensors, facts = _read(checkpoint)
        name = f"checkpoint: {printable(str(checkpoint))}"
        saved = facts["settings"]
        check(saved is not None, f"{name} is a finished perturbation, no checkpoint")
        for key, value in self.settings.items():
            other = f"a fit with {key}={saved.get(key)!r}, not {value!r}; remove it to begin anew"
            check(saved.get(key) == value, f"{name} is of {other}")
        try:
            known = tensors["image_keys"], tensors["image_classes"]
            self.v, self.velocity = tensors["iterate"][None], tensors["velocity"][None]
            self.best, self.rates = tensors["perturbation"][None], list(facts["rates"])
            self.unit = tensors.get("unit")
            exponent = tensors.get("exponent", torch.tensor(self.exponent))
        except KeyError as error:
            raise _no_perturbation(checkpoint, error) from None
        scalars = [exponent, exponent if self.unit is None else self.unit]
        groups = [self.v, self.velocity, self.best], scalars, list(known)
        is_whole = all(len({(t.shape, t.dtype) for t in group}) == 1 for group in groups)
        is_whole &= (known[0].ndim, known[0].dtype, exponent.ndim) == (1, torch.int64, 0)
        is_whole &= self.v.dtype == exponent.dtype == torch.float32
        is_whole &= self.unit is None or bool((self.unit > 0).all())
        check(is_whole, f"{name} is damaged; remove it to begin anew")
        self.exponent = float(exponent)
        self.labels = dict(zip(known[0].tolist(), known[1].tolist(), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs after a pass."""
        return {
            "iterate": self.v[0],
            "velocity": self.velocity[0],
            "unit": torch.ones(()) if self.unit is None else self.unit,
            "exponent": torch.tensor(self.exponent),
            "image_keys": torch.tensor(list(self.labels), dtype=torch.long),
            "image_classes": torch.tensor(list(self.labels.values()), dtype=torch.long),
        }

    def one_pass(self, chunks: Iterator[Tensor], step: float) -> None:
        """Learn from each mini-batch, and count those of its images that v has fooled before."""
        learn = self.gradient_step if self.settings["method"] == "gradient" else self.deepfool_step
        fooled: Tensor | int = 0
        n = 0
        for chunk in chunks:
            x = chunk if self.device is None else chunk.to(self.device)
            if self.v.numel() == 0:
                self.v = self.velocity = torch.zeros(x[:1].shape)
            before, now = tuple(self.v.shape[1:]), tuple(x.shape[1:])
            expected = "expected images of one size, resized where they differ"
            check(before == now, f"loader: {expected}, got {before} and {now}")
            self.v, self.velocity = self.v.to(x.device), self.velocity.to(x.device)
            fooled = fooled + learn(x, self._labels(x), step).sum()
            n += len(x)
        rate = int(fooled) / n
        if rate >= max(self.rates, default=0.0):
            self.best = self.v
        self.rates.append(rate)

    def gradient_step(self, x: Tensor, labels: Tensor, step: float) -> Tensor:
        """n booleans: fooled by v as it was before the step."""
        target, norm = self.settings["target"], self.attack._norm
        aim = labels if target is None else torch.full_like(labels, target)
        search = ScaleSearch(1, x.device)
        while True:
            with torch.enable_grad():
                v = self.v.detach().requires_grad_()
                scores = self._scores(self._added(x, v))
                check_class("target", target or 0, scores)
                loss = self._losses(scores, aim, x).mean()
            scale = torch.tensor(2.0**self.exponent, device=x.device)
            gradients = gradients_or_zeros(loss if target is None else -loss, (v,), scale=scale)
            if gradients is None:
                raise no_gradient(self.attack.forward_func, (x,), None)
            largest = gradients[0].abs().amax()
            search.note(scale.log2()[None], (largest == 0)[None], ~largest.isfinite()[None])
            if not bool(search.goes_on):
                break
            self.exponent = float(search.exponents)
        check_finite(gradients[0], "forward_func, gradient")
        # A new tensor each time: v and the velocity move on together, and an interrupt in between
        # costs no more than one step.
        velocity = self.settings["momentum"] * self.velocity + of_mean_one(gradients)[0]
        (direction,) = norm.steepest((velocity,))
        moved = self._projected(self.v + step * self.attack.epsilon * direction)
        self.v, self.velocity = moved, velocity
        predicted = scores.detach().argmax(dim=1)
        return predicted != labels if target is None else predicted == target

    def _losses(self, scores: Tensor, aim: Tensor, x: Tensor) -> Tensor:
        """The n losses of scores n×K of images near x, n×C×H×W."""
        if self.reading is None:
            self.reading = Reading(scores, partial(self._ask, x[:1]))
        if self.loss_func is not None:
            losses = self.loss_func(scores, aim)
            check_losses(losses, len(x))
            return losses
        logits = self.reading.logits(scores)
        if self.unit is None:
            self.unit = 4 * self.reading.units.median()
        of_logits = _clipped_cross_entropy if self.settings["target"] is None else cross_entropy
        return of_logits(logits / self.unit.to(logits), aim)

    def _ask(self, x: Tensor) -> tuple[Tensor, Tensors]:
        x = x.detach().requires_grad_()
        return self._scores(x), (x,)

    def deepfool_step(self, x: Tensor, labels: Tensor, _: float) -> Tensor:
        """n booleans: fooled by v as it was before the step."""
        start = self._added(x, self.v)
        with torch.no_grad():
            fooled = self._scores(start).argmax(dim=1) != labels
        left = (~fooled).nonzero()[:, 0]
        if len(left) > 0:
            end, details = self._deepfool.perturb(start[left], labels[left], return_details=True)
            # Where DeepFool has not got to the boundary, its direction is of no use to others.
            changes = (end - start[left])[details.fooled]
            self.v = self._projected(self.v + changes.sum(dim=0))
        return fooled

    def _added(self, x: Tensor, v: Tensor) -> Tensor:
        return clipped((x + v,), self.attack.bounds)[0].to(x.dtype)

    def _projected(self, v: Tensor) -> Tensor:
        return self.attack._norm.project((v,), self.attack.epsilon)[0]

    @torch.no_grad()
    def _labels(self, x: Tensor) -> Tensor:
        """n, the classes of the clean images; a forward pass only of those not met before."""
        known, keys = self.labels, _keys(x)
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            scores = self._scores(x if len(new) == len(x) else x[new])
            known.update(zip((keys[i] for i in new), scores.argmax(dim=1).tolist(), strict=True))
        return torch.tensor([known[key] for key in keys], device=x.device)


def _clipped_cross_entropy(scores: Tensor, classes: Tensor) -> Tensor:
    return cross_entropy(scores, classes).clamp(max=10)


def _keys(x: Tensor) -> list[int]:
    """One number an image, of its bits: equal for equal images, and (with a chance of about
    2⁻³³ or less a pair) for no others. Integers that wrap around: the same on all devices."""
    bits = x.float().reshape(len(x), -1).contiguous().view(torch.int32)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, bits.shape[1:], generator=generator)
    factors = (factors | 1).to(x.device)
    keys: list[int] = torch.stack([(row * factors).sum() for row in bits]).tolist()
    return keys


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return read_facts(path, _KIND, "universal perturbation", _FORM, any_suffix=True)


def _no_perturbation(path: str | Path, reason: Exception | str) -> ValueError:
    reason = f"no {reason}" if isinstance(reason, KeyError) else str(reason)
    return ValueError(f"{printable(str(path))} holds no universal perturbation: {reason}")


def _check_folder(path: str | Path) -> None:
    folder = Path(path).parent
    check(folder.is_dir(), f"{folder}: no such folder", FileNotFoundError)
