"""What the tests of wrong calls share: drawn arguments, what they become, and what may follow."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

CALLS = 50
"""Of one try: a seed's."""
NAN, INF = float("nan"), float("inf")


class Hand(random.Random):
    """What draws arguments."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def maps(self, n: int, h: int, w: int) -> Tensor:
        """Heat maps of any scale, with ties, some constant."""
        scale = self.choice([1.0, 1.0, 1e-6, 1e6, 1e30])
        maps = (self.rand(n, h, w) - self.choice([0.0, 0.5])) * scale
        kind = self.random()
        if kind < 0.2:
            maps = (maps / scale * 3).round()
        elif kind < 0.3:
            maps = torch.full((n, h, w), self.choice([0.0, 1.0, -2.5]))
        return maps.double() if self.random() < 0.2 else maps

    def boxes(self, m: int, h: int, w: int) -> Tensor:
        ends = self.rand(m, 2, 2).sort(dim=1).values * torch.tensor([w, h])
        return (ends.round() if self.random() < 0.5 else ends).flatten(1)

    def truth(self, n: int, h: int, w: int) -> list[Tensor]:
        return [self.boxes(self.randrange(3), h, w) for _ in range(n)]

    def masks(self, n: int, h: int, w: int) -> Tensor:
        return self.rand(n, h, w) < self.choice([0.0, 0.2, 0.5, 1.0])

    def size(self) -> tuple[int, int, int]:
        return self.randrange(1, 4), self.randrange(1, 8), self.randrange(1, 8)


def odd_tensor(hand: Hand, like: Tensor) -> Any:
    """The tensor with another dtype, shape, device or values."""
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    kind = hand.randrange(12)
    if kind < 4 and like.numel() and like.is_floating_point():
        changed = like.clone()
        at = hand.randrange(like.numel())
        changed.view(-1)[at] = hand.choice([NAN, INF, -INF, -1.0, -1e30, 1e30, 2.0])
        return changed
    if kind < 6:
        return like.to(hand.choice([*dtypes, torch.complex64]))
    if kind == 6:
        return hand.choice([like[None], like[..., None], like.flatten(), like.sum(), like[:0]][:4])
    if kind == 7:
        return like[:0] if like.ndim else like.reshape(1)[:0]
    if kind == 8:
        return like.to("meta")
    if kind == 9:
        return like.flip(-1) if like.ndim else -like
    if kind == 10:
        return like.tolist()
    return torch.cat([like, like]) if like.ndim else like.to_sparse()


ODD: tuple[Any, ...] = (
    *(None, "text", "", b"bytes", [], {}, (), [None], object(), 1j, 10**400, 2**70),
    *(0, -1, 3, 1.5, -0.5, NAN, INF, -INF, True, "0.5", [0.5], (1, 2, 3), {"a": 1}, {1, 2}),
    *(np.zeros(3), np.float32(NAN), "cuda:99", torch.tensor(NAN), torch.zeros(2, 3)),
)


def oddly(hand: Hand, value: Any) -> Any:
    """The argument, or a part of it, changed into something that it should not be, mostly."""
    if hand.random() < 0.3:
        return hand.choice(ODD)
    if isinstance(value, Tensor):
        return odd_tensor(hand, value)
    if isinstance(value, (list, tuple)) and value:
        at = hand.randrange(len(value))
        changed = list(value)
        changed[at] = oddly(hand, value[at])
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict) and value:
        at = hand.choice(list(value))
        return {**value, at: oddly(hand, value[at])}
    return hand.choice(ODD)


Case = tuple[Callable[..., Any], dict[str, Any], Callable[[Any], bool]]
"""A function, right arguments, and whether what it returns is in the documented range."""


def within(low: float, high: float, *, nan: bool = False) -> Callable[[Any], bool]:
    """Whether all numbers are in [low, high], but for rounding; NaN only where it is documented."""

    def fits(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(fits, value.values()))
        if isinstance(value, tuple | list):
            return all(map(fits, value))
        numbers = torch.as_tensor(value).double()
        inside = (numbers >= low - 1e-5) & (numbers <= high + 1e-5)
        return bool((inside | numbers.isnan() if nan else inside).all())

    return fits


SHARES = within(0, 1)
SCORED = within(0, 1, nan=True)
ANY = within(-1e300, 1e300)


def names_one(error: Exception, function: Callable[..., Any]) -> bool:
    """Whether the message names an argument, as a word."""
    names = {*inspect.signature(function).parameters, "inputs"} - {"self", "kwargs"}
    return bool(names & set(re.findall(r"[a-z_]\w*", str(error))))


def try_one(hand: Hand, case: Callable[[Hand], Case]) -> None:
    """Call with right arguments, or with one of them changed; anything undocumented raises."""
    function, given, fits = case(hand)
    is_right = hand.random() < 0.4
    if not is_right:
        name = hand.choice(list(given))
        given = {**given, name: oddly(hand, given[name])}
    try:
        value = function(**given)
    except (ValueError, TypeError) as error:
        if is_right or not names_one(error, function):
            raise AssertionError(f"{function}({given}): {type(error).__name__}: {error}") from error
        return
    except Exception as error:
        raise AssertionError(f"{function}({given}): {type(error).__name__}: {error}") from error
    assert fits(value), f"{function}({given}) = {value}"
