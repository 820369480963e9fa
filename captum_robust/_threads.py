"""Threads beside the one that runs the model."""

from __future__ import annotations

import threading

import torch

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
