"""One perturbation for all images: fitted once, then added to any image without a pass."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from captum.log import log_usage
from torch import Tensor, nn
from torch.nn import functional as F

from captum_robust._captum import TargetType, format_tensor_into_tuples, is_tuple
from captum_robust._checks import (
    as_number,
    check_batch,
    check_count,
    check_finite,
    check_inputs,
    check_number,
    printable,
    unknown_name,
)
from captum_robust._contexts import seeded
from captum_robust._scores import FastScores, one_row_a_sample, where_the_graph_breaks
from captum_robust.attacks._attack import (
    Attack,
    LossFunction,
    Tensors,
    Victim,
    cross_entropy,
    project,
)
from captum_robust.attacks.minimal import DeepFool
from captum_robust.attacks.rank import Share

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("gradient", "deepfool")
Loader = Iterable[Any]
"""Batches of images N×C×H×W, or tuples that begin with one, such as (images, labels)."""

_FORMAT = "captum_robust.UniversalPerturbation"


class UniversalPerturbation(Attack):
    """Universal adversarial perturbation: one v that, added to any image, changes its class.

    Moosavi-Dezfooli et al., "Universal adversarial perturbations"
    (https://arxiv.org/abs/1610.08401). :meth:`fit` finds v on a set of images, by the paper's
    algorithm or, faster, by mini-batch gradients as in Shafahi et al., "Universal Adversarial
    Training" (https://arxiv.org/abs/1811.11304); :meth:`perturb` adds it to other images without a
    pass through the model. v does not depend on the image, so it often fools models that it was
    not fitted on: :func:`transfer_matrix`.

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

    rates: tuple[float, ...]
    """Of each finished pass of :meth:`fit` the share of its images that v fooled as it met them."""

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        epsilon: float = 10 / 255,
        norm: str = "Linf",
        *,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        quantize: bool = True,
    ) -> None:
        super().__init__(forward_func, epsilon=epsilon, norm=norm, bounds=bounds, quantize=quantize)
        self._check_epsilon(epsilon, None)
        self.rates = ()
        self._v: Tensor | None = None
        self._fitted_epsilon = float(epsilon)

    @property
    def perturbation(self) -> Tensor:
        """The fitted v, C×H×W, float32, on the CPU.

        Raises:
            RuntimeError: nothing is fitted yet.
        """
        if self._v is None:
            raise RuntimeError(
                "no perturbation yet: call fit(loader), or UniversalPerturbation.load(path, …)"
            )
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
        progress: bool = False,
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
            loss_func: (scores n×K, classes n) -> n losses. Cross-entropy by default, clipped at
                10 so that v does not grow on images that are long fooled.
            batch_size: larger batches are split. Small ones make more steps.
            device: where to; by default where the model is, and for a function where the images
                are.
            checkpoint: a file that holds the fit after each pass. If it is there, the fit goes on
                from it, and ends bit for bit where it would have without the interruption.
            seed: of what the loader draws from torch's global generator.
            progress: show a bar.

        Raises:
            ValueError: no images; images outside of the bounds, not finite, or of several sizes; a
                loader that is exhausted after the first pass; arguments out of range; a model
                without gradient; a checkpoint of another fit.
            TypeError: a loader that gives no floating-point tensors.
            FileNotFoundError: no folder for the checkpoint.
        """
        settings = {
            "epsilon": as_number(self.epsilon),
            "norm": self.norm,
            "bounds": None if self.bounds is None else list(self.bounds),
            "passes": passes,
            "method": method,
            "target": target,
            "step_size": step_size,
            "momentum": momentum,
            "loss_func": getattr(loss_func, "__qualname__", type(loss_func).__name__),
            "batch_size": batch_size,
            "seed": seed,
        }
        self._check_epsilon(as_number(self.epsilon), None)
        _check_settings(settings, target_rate)
        settings |= {"step_size": float(step_size), "momentum": float(momentum)}
        _check_loader(loader, passes)
        if checkpoint is not None:
            _check_folder(checkpoint)
        if target_rate is None and method == "deepfool":
            target_rate = 0.8
        state = _resumed(checkpoint, settings) or _State()
        place = _device_of(self.forward_func) if device is None else torch.device(device)
        fit = _Fit(self, state, place, target, momentum, loss_func or _clipped_cross_entropy)
        learn = fit.gradient_step if method == "gradient" else fit.deepfool_step
        try:
            for number in range(len(state.rates), passes):
                if target_rate is not None and max(state.rates, default=0.0) >= target_rate:
                    break
                step = step_size * 0.5 * (1 + math.cos(math.pi * number / passes))
                with seeded(seed + 1_000_003 * number, place):
                    chunks = _chunks(loader, number, batch_size, self.bounds, progress)
                    fit.one_pass(chunks, learn, step)
                if checkpoint is not None:
                    self._keep(state)
                    self._write(checkpoint, state, settings)
        finally:
            self._keep(state)
        return self

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
        return_details: bool = False,
    ) -> Any:
        """The inputs plus v, clipped to the bounds. Takes no pass through the model.

        Args:
            inputs: N×C×H×W. v is resized (bilinear) to another height and width, within its ball.
            target, additional_forward_args, targeted: matter only to the details.
            epsilon: v is scaled by ``epsilon`` / the one it was fitted with.
            mask: as for all attacks.
            return_details: also return :class:`~captum_robust.attacks.AttackDetails`, for two
                forward passes.

        Raises:
            RuntimeError: nothing is fitted yet.
            ValueError, TypeError: as for all attacks; inputs with other channels than v.
        """
        arguments = (inputs, target, epsilon, additional_forward_args, targeted, mask)
        result = super().perturb(*arguments)
        if not return_details:
            return result
        victim = Victim(
            self.forward_func,
            tuple(x.detach().clone() for x in format_tensor_into_tuples(inputs)),
            target,
            additional_forward_args,
            targeted,
            None,
            self.bounds,
            self.quantize,
        )
        with torch.inference_mode(False), torch.no_grad():
            victim.scores(victim.x, victim.everyone)
            victim.forward_passes.zero_()  # only the details needed it
            return result, victim.details(result if is_tuple(inputs) else (result,))

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        if len(victim.x) != 1:
            raise ValueError(f"inputs: one v is added to one tensor, got {len(victim.x)}")
        x = victim.x[0]
        v = self._sized(x.shape[1:], float(epsilon or 0.0)).to(x.device)
        change = victim.masked((v.expand(x.shape),), victim.everyone)
        return victim.within((x + change[0],))

    def _sized(self, shape: torch.Size, epsilon: float) -> Tensor:
        """v in another shape and strength."""
        v = _resized(self.perturbation, shape)
        if self._fitted_epsilon > 0:
            v = v * (epsilon / self._fitted_epsilon)
        return project((v[None],), epsilon, self.norm)[0][0]

    def save(self, path: str | Path) -> None:
        """Write v and how it was fitted, as safetensors; a file of that name is replaced.

        Raises:
            RuntimeError: nothing is fitted yet.
            FileNotFoundError: no such folder.
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
        try:
            epsilon, norm, bounds = facts["epsilon"], facts["norm"], facts["bounds"]
            attack = cls(
                forward_func,
                epsilon,
                norm,
                bounds=None if bounds is None else tuple(bounds),
                quantize=quantize,
            )
            v = tensors["perturbation"]
            attack.rates = tuple(float(r) for r in facts["rates"])
        except (KeyError, TypeError, ValueError) as error:
            if not callable(forward_func):
                raise
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise _no_perturbation(path, reason) from None
        check_finite(v[None], printable(str(path)))
        size = v.abs().max() if norm == "Linf" else v.norm()
        if v.dtype != torch.float32 or size > epsilon * (1 + 1e-5):
            raise _no_perturbation(path, f"its {norm} norm exceeds its epsilon of {epsilon:.4g}")
        attack._v = v
        return attack

    def _write(
        self,
        path: str | Path,
        state: _State | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        from safetensors.torch import save_file

        _check_folder(path)
        tensors = {"perturbation": self.perturbation.contiguous()}
        facts: dict[str, Any] = {
            "norm": self.norm,
            "epsilon": self._fitted_epsilon,
            "bounds": self.bounds,
            "fooling_rate": max(self.rates, default=None),
            "passes": len(self.rates),
            "rates": self.rates,
        }
        if state is not None:
            tensors |= state.tensors()
            facts["settings"] = settings
        # The new file takes the old one's place in one step, so a kill leaves one of them whole.
        part = Path(f"{path}.part")
        metadata = {name: json.dumps(value) for name, value in facts.items()}
        save_file(tensors, part, metadata={"format": _FORMAT, **metadata})
        os.replace(part, path)

    def _keep(self, state: _State) -> None:
        found = state.v if state.best is None else state.best
        # A fit that failed before its first step has found nothing.
        if found is not None and (state.rates or bool(found.any())):
            self._v = found.detach().float().cpu()
            self._fitted_epsilon = float(self.epsilon or 0.0)
            self.rates = tuple(state.rates)


@dataclass
class _State:
    """Where a fit stands."""

    v: Tensor | None = None
    velocity: Tensor | None = None
    best: Tensor | None = None
    """v at the end of the pass that fooled the most."""
    rates: list[float] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)
    """Bits of a clean image (:func:`_keys`) -> the class that the model gives it."""

    def move_to(self, device: torch.device) -> None:
        """v and its velocity, which a checkpoint holds on the CPU."""
        if self.v is not None:
            self.v = self.v.to(device)
        if self.velocity is not None:
            self.velocity = self.velocity.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs after a pass."""
        assert self.v is not None
        velocity = torch.zeros_like(self.v) if self.velocity is None else self.velocity
        return {
            # Clones: safetensors refuses tensors that share memory, as v does with the best.
            "iterate": self.v.cpu().contiguous().clone(),
            "velocity": velocity.cpu().contiguous(),
            "image_keys": torch.tensor(list(self.labels), dtype=torch.long),
            "image_classes": torch.tensor(list(self.labels.values()), dtype=torch.long),
        }


class _Fit:
    """One fit at work: a mini-batch in, a better v out."""

    def __init__(
        self,
        attack: UniversalPerturbation,
        state: _State,
        device: torch.device | None,
        target: int | None,
        momentum: float,
        loss_func: LossFunction,
    ) -> None:
        self.forward_func = attack.forward_func
        self.epsilon = float(attack.epsilon or 0.0)
        self.norm = attack.norm
        self.bounds = attack.bounds
        self.state = state
        self.device = device
        self.target = target
        self.momentum = momentum
        self.loss_func = loss_func
        self._scores = _Scores(attack.forward_func)
        # In L2 for both norms, as in the paper. The shortest change is not needed: v adds them up.
        self._deepfool = DeepFool(
            attack.forward_func,
            candidates=10,
            max_iterations=10,
            overshoot=0.02,
            bounds=attack.bounds,
            refine=0,
        )

    def one_pass(
        self,
        chunks: Iterator[Tensor],
        learn: Callable[[Tensor, Tensor, float], Tensor],
        step: float,
    ) -> None:
        """Learn from each mini-batch, and count those of its images that v has fooled before."""
        state = self.state
        fooled: Tensor | int = 0
        n = 0
        for chunk in chunks:
            x = chunk if self.device is None else chunk.to(self.device)
            if state.v is None:
                state.v = torch.zeros(x.shape[1:], device=x.device)
            elif state.v.shape != x.shape[1:]:
                raise ValueError(
                    f"loader: images of {tuple(state.v.shape)} and of {tuple(x.shape[1:])}; "
                    "resize them all to one size"
                )
            state.move_to(x.device)
            fooled = fooled + learn(x, self._labels(x), step).sum()
            n += len(x)
        assert state.v is not None
        rate = int(fooled) / n
        if rate >= max(state.rates, default=0.0):
            state.best = state.v
        state.rates.append(rate)

    def gradient_step(self, x: Tensor, labels: Tensor, step: float) -> Tensor:
        """n booleans: fooled by v as it was before the step."""
        state = self.state
        assert state.v is not None
        with torch.enable_grad():
            v = state.v.detach().requires_grad_()
            scores = self._scores(self._added(x, v))
            if not scores.requires_grad:
                raise ValueError(
                    "forward_func: no gradient flows from its scores to the inputs"
                    + where_the_graph_breaks(self.forward_func, (x,), None)
                )
            if self.target is not None and self.target >= scores.shape[1]:
                raise ValueError(
                    f"target: class {self.target}, but the model has the classes 0 to "
                    f"{scores.shape[1] - 1}"
                )
            aim = labels if self.target is None else torch.full_like(labels, self.target)
            loss = self.loss_func(scores, aim)
            if not isinstance(loss, Tensor) or loss.shape != (len(x),):
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_func: expected {len(x)} losses, one a sample, got {got}")
            (gradient,) = torch.autograd.grad(loss.mean(), v)
        if not bool(gradient.isfinite().all()):
            raise ValueError("forward_func: NaN or infinity in the gradient of its scores")
        if self.target is not None:
            gradient = -gradient
        gradient = gradient / gradient.abs().mean().clamp(min=1e-30)
        # A new tensor each time: state.v and state.velocity move on together, and an interrupt
        # in between costs no more than one step.
        velocity = gradient if state.velocity is None else self.momentum * state.velocity + gradient
        if self.norm == "Linf":
            direction = velocity.sign()
        else:
            direction = velocity / velocity.norm().clamp(min=1e-30)
        moved = self._projected(state.v + step * self.epsilon * direction)
        state.v, state.velocity = moved, velocity
        predicted = scores.detach().argmax(dim=1)
        return predicted != labels if self.target is None else predicted == self.target

    def deepfool_step(self, x: Tensor, labels: Tensor, _: float) -> Tensor:
        """n booleans: fooled by v as it was before the step."""
        state = self.state
        assert state.v is not None
        start = self._added(x, state.v)
        with torch.no_grad():
            fooled = self._scores(start).argmax(dim=1) != labels
        left = (~fooled).nonzero()[:, 0]
        if len(left) > 0:
            end, details = self._deepfool.perturb(start[left], labels[left], return_details=True)
            # Where DeepFool has not got to the boundary, its direction is of no use to others.
            changes = (end - start[left])[details.fooled]
            state.v = self._projected(state.v + changes.sum(dim=0))
        return fooled

    def _added(self, x: Tensor, v: Tensor) -> Tensor:
        moved = x + v
        return (moved if self.bounds is None else moved.clamp(*self.bounds)).to(x.dtype)

    def _projected(self, v: Tensor) -> Tensor:
        return project((v[None],), self.epsilon, self.norm)[0][0]

    @torch.no_grad()
    def _labels(self, x: Tensor) -> Tensor:
        """n, the classes of the clean images; a forward pass only of those not met before."""
        known = self.state.labels
        keys = _keys(x)
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            found = self._scores(x if len(new) == len(x) else x[new]).argmax(dim=1).tolist()
            known.update(zip((keys[i] for i in new), found, strict=True))
        return torch.tensor([known[key] for key in keys], device=x.device)


class _Scores:
    """N×C×H×W -> float scores N×K."""

    def __init__(self, forward_func: Callable[..., Tensor]) -> None:
        self._model_scores = FastScores(forward_func)

    def __call__(self, x: Tensor) -> Tensor:
        scores = one_row_a_sample(self._model_scores((x,), None), len(x)).float()
        if scores.ndim != 2:
            raise ValueError(
                f"forward_func: expected scores {len(x)}×K, one row an image, got "
                f"{tuple(scores.shape)}"
            )
        check_finite(scores, "forward_func, scores")
        return scores


@dataclass(frozen=True)
class FoolingRate:
    """The share of n images whose class changes, and Wilson's 95 % interval around it."""

    rate: float
    n: int
    low: float
    high: float


def fooling_rate(
    forward_func: Callable[..., Tensor],
    perturbation: Tensor | Callable[[Tensor], Tensor],
    loader: Loader,
) -> FoolingRate:
    """The share of images whose predicted class changes; their true classes do not matter.

    The interval is that of Wilson, "Probable inference, the law of succession, and statistical
    inference" (1927), which also holds for rates near 0 and 1.

    Args:
        forward_func: images N×C×H×W -> scores N×K.
        perturbation: v, C×H×W, added and clipped to [0, 1], resized where the images have another
            size; or any attack or function, images -> images.
        loader: as for :meth:`UniversalPerturbation.fit`; read once.

    Raises:
        ValueError, TypeError: as :meth:`UniversalPerturbation.fit`.

    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> images = torch.tensor([[0.4, 0.3], [0.9, 0.1]])
    >>> fooling_rate(model, torch.tensor([-0.1, 0.1]), [images])
    FoolingRate(rate=0.5, n=2, low=0.0945..., high=0.9054...)
    """
    changed, n = _label_changes({"": perturbation}, {"": forward_func}, loader)
    share = Share.of(changed["", ""], n)
    return FoolingRate(rate=share.value, n=n, low=share.low, high=share.high)


def transfer_matrix(
    perturbations: Mapping[str, Tensor | Callable[[Tensor], Tensor]],
    models: Mapping[str, Callable[..., Tensor]],
    loader: Loader,
) -> pd.DataFrame:
    """How often what was fitted on one model fools another: label-change rates, not accuracies.

    Each model sees the clean images once, and once those of each perturbation.

    Args:
        perturbations: name -> v, attack or function, as for :func:`fooling_rate`; the rows.
        models: name -> forward function; the columns.
        loader: as for :meth:`UniversalPerturbation.fit`; read once.

    Raises:
        ValueError, TypeError: as :meth:`UniversalPerturbation.fit`; nothing to compare.
    """
    import pandas as pd

    if not perturbations or not models:
        empty = "models" if perturbations else "perturbations"
        raise ValueError(f"{empty}: expected at least one")
    changed, n = _label_changes(perturbations, models, loader)
    rates = [[changed[source, model] / n for model in models] for source in perturbations]
    return pd.DataFrame(
        rates,
        index=pd.Index(perturbations, name="source"),
        columns=pd.Index(models, name="attacked"),
    )


@torch.no_grad()
def _label_changes(
    perturbations: Mapping[str, Tensor | Callable[[Tensor], Tensor]],
    models: Mapping[str, Callable[..., Tensor]],
    loader: Loader,
) -> tuple[dict[tuple[str, str], int], int]:
    """(perturbation, model) -> how many of the n images change their class; and n."""
    _check_loader(loader, 1)
    scores = {name: _Scores(model) for name, model in models.items()}
    devices = {name: _device_of(model) for name, model in models.items()}
    counts: dict[tuple[str, str], Tensor | int] = {
        (source, model): 0 for source in perturbations for model in models
    }
    n = 0
    for x in _chunks(loader, 0, None, (0.0, 1.0), progress=False):
        n += len(x)
        perturbed = {name: _apply(p, name, x) for name, p in perturbations.items()}
        for model in models:
            clean = scores[model](x.to(devices[model] or x.device)).argmax(dim=1)
            for source, y in perturbed.items():
                predicted = scores[model](y.to(clean.device)).argmax(dim=1)
                counts[source, model] = counts[source, model] + (predicted != clean).sum()
    return {pair: int(count) for pair, count in counts.items()}, n


def _apply(perturbation: Tensor | Callable[[Tensor], Tensor], name: str, x: Tensor) -> Tensor:
    if isinstance(perturbation, Tensor):
        v = _resized(perturbation.to(x), x.shape[1:])
        return (x + v).clamp(0, 1)
    if not callable(perturbation):
        kind = type(perturbation).__name__
        raise TypeError(f"perturbation {name!r}: expected a tensor or an attack, got {kind}")
    y = perturbation(x)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"perturbation {name!r}: expected {tuple(x.shape)} as it came, got {got}")
    return y


def _clipped_cross_entropy(scores: Tensor, classes: Tensor) -> Tensor:
    return cross_entropy(scores, classes).clamp(max=10)


def _resized(v: Tensor, shape: torch.Size) -> Tensor:
    """v for images of ``shape``; averages of its values only, so none exceeds the largest."""
    if v.shape == shape:
        return v
    if v.ndim != 3 or len(shape) != 3 or v.shape[0] != shape[0]:
        raise ValueError(
            f"inputs: images of shape {tuple(shape)}, but the perturbation has {tuple(v.shape)}"
        )
    return F.interpolate(v[None], shape[1:], mode="bilinear", antialias=True)[0]


def _check_settings(settings: dict[str, Any], target_rate: float | None) -> None:
    for name, least in (("passes", 1), ("batch_size", 1), ("seed", 0)):
        check_count(name, settings[name], least)
    method, target = settings["method"], settings["target"]
    step_size, momentum = settings["step_size"], settings["momentum"]
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if target is not None:
        check_count("target", target, 0)
        if method != "gradient":
            raise ValueError(f"target: only method 'gradient' takes one, not {method!r}")
    if target_rate is not None and not 0 < as_number(target_rate) <= 1:
        raise ValueError(f"target_rate: expected a share in (0, 1], got {target_rate!r}")
    check_number("step_size", step_size, 0, open_low=True)
    if not 0 <= as_number(momentum) < math.inf:
        raise ValueError(f"momentum: expected a number from 0, got {momentum!r}")


def _check_loader(loader: Loader, passes: int) -> None:
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(
            "loader: expected an iterable of image batches, such as a list or a DataLoader, got "
            f"{type(loader).__name__}"
        )
    if passes > 1 and isinstance(loader, Iterator):
        raise ValueError(
            f"loader: {type(loader).__name__} is exhausted after one pass, and there are {passes}; "
            "give a list of batches or a DataLoader, or passes=1"
        )


def _chunks(
    loader: Loader,
    number: int,
    batch_size: int | None,
    bounds: tuple[float, float] | None,
    progress: bool,
) -> Iterator[Tensor]:
    """The checked mini-batches of pass ``number``, at least one."""
    is_empty = True
    for place, batch in enumerate(_shown(loader, number) if progress else loader):
        x = batch[0] if isinstance(batch, (tuple, list)) and len(batch) > 0 else batch
        where = f"loader, batch {place}"
        if not isinstance(x, Tensor):
            raise TypeError(f"{where}: expected images N×C×H×W, got {type(x).__name__}")
        if x.ndim < 2:
            raise ValueError(f"{where}: expected images N×C×H×W, got shape {tuple(x.shape)}")
        x = x.detach()
        try:
            check_batch((x,))
            check_inputs((x,), bounds)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}, {error}") from None
        is_empty = False
        yield from torch.split(x.clone() if x.is_inference() else x, batch_size or len(x))
    if is_empty:
        raise ValueError(
            "loader: no images"
            if number == 0
            else f"loader: exhausted, no images in pass {number + 1}; it must start anew each pass"
        )


def _shown(loader: Loader, number: int) -> Loader:
    from tqdm.auto import tqdm

    shown: Loader = tqdm(loader, desc=f"universal perturbation, pass {number + 1}", leave=False)
    return shown


def _keys(x: Tensor) -> list[int]:
    """One number an image, of its bits: equal for equal images, and (with a chance of about
    2⁻³³ or less a pair) for no others. Integers that wrap around: the same on all devices."""
    bits = x.float().reshape(len(x), -1).contiguous().view(torch.int32)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, bits.shape[1:], generator=generator)
    factors = (factors | 1).to(x.device)
    found: list[int] = torch.stack([(row * factors).sum() for row in bits]).tolist()
    return found


def _device_of(forward_func: Callable[..., Tensor]) -> torch.device | None:
    if isinstance(forward_func, nn.Module):
        for p in forward_func.parameters():
            return p.device
    return None


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that this module wrote, and the facts beside them."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {printable(str(path))}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{printable(str(path))} is not a safetensors file ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise _no_perturbation(path, f"its format is {metadata.get('format')!r}")
    try:
        facts = {name: json.loads(text) for name, text in metadata.items() if name != "format"}
    except ValueError as error:
        raise _no_perturbation(path, str(error)) from None
    return tensors, facts


def _no_perturbation(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"{printable(str(path))} holds no universal perturbation: {reason}")


def _check_folder(path: str | Path) -> None:
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {printable(str(folder))}")


def _resumed(checkpoint: str | Path | None, settings: dict[str, Any]) -> _State | None:
    """Where the fit of a checkpoint stands, if there is one."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return None
    tensors, facts = _read(checkpoint)
    name = printable(str(checkpoint))
    saved = facts.get("settings")
    if not isinstance(saved, dict):
        raise ValueError(f"checkpoint: {name} is a finished perturbation, no checkpoint")
    for key, value in settings.items():
        if saved.get(key) != value:
            raise ValueError(
                f"checkpoint: {name} is of a fit with {key}={saved.get(key)!r}, not {value!r}; "
                "remove it to begin anew"
            )
    try:
        keys, classes = tensors["image_keys"].tolist(), tensors["image_classes"].tolist()
        return _State(
            v=tensors["iterate"],
            velocity=tensors["velocity"],
            best=tensors["perturbation"],
            rates=list(facts["rates"]),
            labels=dict(zip(keys, classes, strict=True)),
        )
    except KeyError as error:
        raise _no_perturbation(checkpoint, f"no {error}") from None
