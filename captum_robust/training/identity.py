"""What tells one run from another: its settings, its data, its network, its optimiser."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from captum_robust.training.schedule import SeededItems
from captum_robust.training.settings import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


def identity_of(
    network: nn.Module,
    dataset: Any,
    optimizer: Optimizer,
    settings: TrainingSettings,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return the part of a run's configuration that is the same for whatever is trained."""
    facts = asdict(settings)
    for name in ("workers", "checkpoint_every", "device"):  # the weights do not depend on these
        del facts[name]
    return {
        **facts,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "data": _data_checksum(dataset, settings.seed),
        "network": f"{type(network).__name__} {_shapes_checksum(network)}",
        "optimizer": _optimizer_text(optimizer),
    }


def _data_checksum(dataset: Any, seed: int) -> str:
    """Return how many samples there are and a checksum of 16: enough to notice other data."""
    count, crc = len(dataset), 0
    items = SeededItems(dataset, seed, 0)
    for index in sorted({i * (count - 1) // 15 for i in range(16)}):
        item = items[index]
        for part in item if isinstance(item, (list, tuple)) else [item]:
            array = torch.as_tensor(part).detach().cpu().contiguous().numpy()
            crc = zlib.crc32(array.tobytes(), crc)
    return f"{count} samples {crc:08x}"


def _shapes_checksum(network: nn.Module) -> str:
    """Return a checksum of names and shapes."""
    shapes = {name: list(t.shape) for name, t in network.state_dict().items()}
    return f"{zlib.crc32(json.dumps(shapes).encode()):08x}"


def _optimizer_text(optimizer: Optimizer) -> str:
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
        | {"lr": group.get("initial_lr", group["lr"])}  # "lr" may be what a schedule left
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} {groups}"
