"""Threads beside the one that runs the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_beginning = threading.Lock()


def begin_thread() -> None:
    """What a thread that works beside the model does first: it computes by itself from then on.

    Else PyTorch gives each thread helpers of its own. Where all helpers together are more than the
    cores, those of the model no longer wait busily for their next operation but sleep, and are
    woken thousands of times a second: small operations took 2.5 times as long.
    """
    with _beginning:
        if "backend: OpenMP" not in torch.__config__.parallel_info():
            return  # all threads share the helpers, whose number is fixed
        usual = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of all that begin later
        again = threading.Thread(target=torch.set_num_threads, args=(usual,))
        again.start()
        again.join()


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The parts, on the CPU and without their graphs, stacked by this thread alone.

    The helpers of an operation of PyTorch are busy for milliseconds behind it, in which they keep
    a core from the threads beside the model.
    """
    return torch.from_numpy(np.stack([part.detach().cpu().numpy() for part in parts]))


def copied(x: Tensor) -> Tensor:
    """A copy of a tensor without a graph; on the CPU by this thread alone."""
    return x.clone() if x.device.type != "cpu" else torch.from_numpy(x.numpy().copy("K"))
