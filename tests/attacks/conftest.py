"""Small victims for the tests of the attacks."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A small classifier of images in [0, 1], with in-place ReLUs, one of them used twice."""

    def __init__(self, channels: int = 3, classes: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor, other: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if other is not None:
            x = x + scale * other
        x = self.relu(self.conv1(4 * x - 2))
        x = self.relu(self.conv2(x))
        return self.head(self.pool(x).flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    """Three images whose pixels are those of 8-bit files."""
    drawn = torch.rand(3, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    return (drawn * 255).round() / 255


@pytest.fixture
def adv_lib_attacks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``adv_lib.attacks``; its plots need visdom, which nothing here does."""
    monkeypatch.setitem(sys.modules, "visdom", sys.modules.get("visdom") or ModuleType("visdom"))
    pytest.importorskip("adv_lib")
    return importlib.import_module("adv_lib.attacks")
