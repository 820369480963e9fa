"""The device that a training runs on, and the processes that share its batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from captum_robust.training.settings import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_of(settings: TrainingSettings, partial: bool = False) -> Accelerator:
    """Return Accelerate's view of this process; ``partial``: a step may leave weights out.

    Raises:
        ImportError: accelerate is missing; names the pip command.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, PartialState
    except ImportError:
        raise ImportError(
            'training needs the package accelerate: pip install "captum-robust[train]"'
        ) from None
    cpu = settings.device == "cpu"
    # Accelerate keeps the device of a process's first training for all others.
    kept = PartialState._shared_state
    is_other = kept and (kept["device"].type != "cpu" if cpu else kept["_cpu"])
    if is_other and kept["num_processes"] == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    # Its own mixed precision would rewrite the network's forward method.
    return Accelerator(
        mixed_precision="no",
        cpu=cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=partial)],
    )


def training_device(settings: TrainingSettings) -> torch.device:
    """Return the device that :func:`captum_robust.training.fit` trains on."""
    device: torch.device = accelerator_of(settings).device
    return device


def half_precision(device: torch.device, precision: str) -> torch.autocast:
    """Return a context of mixed precision, off unless ``precision`` is ``"bfloat16"``.

    Without the cache, which would hand weights that were cast without gradients, as an attack may
    do, to a pass that needs them.
    """
    enabled = precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
