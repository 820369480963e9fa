"""Small victims for the tests of the attacks."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.networks import PixelNet


@pytest.fixture
def net() -> PixelNet:
    torch.manual_seed(0)
    return PixelNet().eval()


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
