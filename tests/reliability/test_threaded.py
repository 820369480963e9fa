"""Many calls of every attribution, wrapper and attack, in threads that share one small network."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from tests.attacks.test_contract import CASES as ATTACKS
from tests.networks import PixelNet
from tests.test_threads import KINDS

Call = Callable[[Tensor, Tensor], Any]
CALLS = 8
"""Of each thread in one try."""


def attack_of(case: Any) -> Callable[[nn.Module, nn.Module], Call]:
    """The attack of a case of the contract, as the attributions are made."""
    return lambda net, _: lambda x, y: case.make(net).perturb(x, y, epsilon=case.epsilon)


# What draws from the generator that all threads share gives other values by what it is.
MADE = KINDS | {case.name: attack_of(case) for case in ATTACKS}
MADE = {name: make for name, make in MADE.items() if name != "random_starts"}


def check_close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def try_threads(seed: int) -> int:
    """Several kinds at once, often with plain passes beside; return the number of calls."""
    draw = Random(seed)
    threads = draw.choice((2, 4, 8))
    torch.manual_seed(0)
    net = nn.Sequential(PixelNet()).eval()
    x = torch.rand(threads, 2, 3, 12, 16, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor([0, 1])
    names = [list(MADE)[(seed + i) % len(MADE)] for i in range(threads)]
    if draw.random() < 0.5:  # all threads by the same
        names = names[:1] * threads
    calls = [MADE[name](net, net[0].conv2) for name in names]
    expected = [call(images, y) for call, images in zip(calls, x, strict=True)]
    with torch.no_grad():
        scores = net(x[0])

    def repeated(i: int) -> None:
        for _ in range(CALLS):
            check_close(calls[i](x[i], y), expected[i])

    def passes() -> None:
        for _ in range(5 * CALLS):
            check_close(net(x[0]).detach(), scores)

    with ThreadPoolExecutor(threads + 1) as pool:
        futures = [pool.submit(repeated, i) for i in range(threads)]
        futures.append(pool.submit(passes))
        errors = [future.exception() for future in futures]
    for name, error in zip([*names, "passes"], errors, strict=True):
        assert error is None, f"{name} among {sorted(set(names))}: {error}"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())
    return threads * CALLS


def test_calls(try_often: Callable[..., None]) -> None:
    try_often("threaded calls", try_threads, quick=6, long=600)
