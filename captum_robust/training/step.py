"""One step of a training: gradients of the parts of a batch add up, then the optimiser moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from captum_robust._checks import check, shape_or_type
from captum_robust._contexts import seeded
from captum_robust.training.acceleration import half_precision
from captum_robust.training.parts import PartSeed
from captum_robust.training.schedule import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss: TypeAlias = Callable[[nn.Module, Batch, int], Tensor | Mapping[str, Tensor]]
"""(network, images of a step, seed of what is drawn for them) -> their mean loss, a number; or
named numbers, one of them ``"loss"``, that are all logged."""


def take_step(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: Any,
    loss: Loss,
    parts: Sequence[tuple[Batch, PartSeed]],
    precision: str,
) -> dict[str, Tensor]:
    """Return the numbers of the loss, their means over the images of this process.

    Each part counts by its number of images. Processes exchange gradients once, in the last part.
    """
    device = accelerator.device
    network.train()
    optimizer.zero_grad()
    is_cut = len(parts) > 1
    is_shared = is_cut or accelerator.num_processes > 1
    statistics = RunningStatistics(network.modules() if is_shared else ())
    sums: dict[str, Any] = {}
    for batch, seed in parts:
        part = seed.part
        waits = nullcontext() if part.is_last else accelerator.no_sync(network)
        with waits, seeded(seed, device):
            with half_precision(device, precision):
                value = loss(network, batch, seed)
            values = dict(value) if isinstance(value, Mapping) else {"loss": value}
            _check_numbers(values)
            accelerator.backward(part.share * values["loss"] if is_cut else values["loss"])
        statistics.take(part.share)
        for name, number in values.items():
            own = number.detach().reshape(())
            sums[name] = sums.get(name, 0) + len(batch[0]) * own if is_cut else own
    statistics.put(accelerator)
    optimizer.step()
    count = sum(len(batch[0]) for batch, _ in parts) if is_cut else 1
    return {name: total / count for name, total in sums.items()}


class RunningStatistics:
    """The running mean and variance of batch norm, one update a step.

    Each part normalises by its own mean and variance, as the layer does, and starts from the
    averages of the step before; their changes are averaged over the parts of all processes. So
    parts of one size give one step, whichever process has them.

    Args:
        modules: those of a network; only layers in training mode count.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        norms = [m for m in modules if isinstance(m, _NormBase) and m.training]
        buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self._buffers: list[Tensor] = buffers
        self._before = [b.clone() for b in buffers]
        self._changes = [torch.zeros_like(b) for b in buffers]

    @torch.no_grad()
    def take(self, share: float) -> None:
        """Add what a part of this share has changed, and put back what was before."""
        for buffer, before, change in zip(self._buffers, self._before, self._changes, strict=True):
            change += share * (buffer - before)
            buffer.copy_(before)

    @torch.no_grad()
    def put(self, accelerator: Accelerator) -> None:
        """Move the averages by the mean of the changes over all processes."""
        if not self._buffers:
            return
        mean = accelerator.reduce(torch.cat([c.flatten() for c in self._changes]), "mean")
        own = mean.split([c.numel() for c in self._changes])
        for buffer, change in zip(self._buffers, own, strict=True):
            buffer += change.view_as(buffer)


def _check_numbers(values: Mapping[str, Any]) -> None:
    check("loss" in values, f'loss: expected a number named "loss" among {sorted(values)}')
    for name, value in values.items():
        is_number = isinstance(value, Tensor) and value.numel() == 1
        check(is_number, f"{name}: expected one number, got {shape_or_type(value)}")
