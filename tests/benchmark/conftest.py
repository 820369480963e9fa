"""A tiny classifier and drawn images, for runs that take a second."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust.benchmark import Comparison
from captum_robust.data import DataError, Sample
from captum_robust.models import Classifier
from captum_robust.report import pictures
from captum_robust.report.results import GALLERY_POOL


@dataclass
class Drawn:
    """Bright squares on noise, each with its box; ``broken`` positions can't be read."""

    n: int = 6
    size: tuple[int, int] = (40, 48)
    broken: Sequence[int] = ()
    kind: str = "drawn"
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = self.ids or [f"{i}.png" for i in range(self.n)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise DataError(f"{self.ids[index]}: truncated")
        g = torch.Generator().manual_seed(index)
        image = 0.3 * torch.rand(3, *self.size, generator=g)
        x, y = (int(v) for v in torch.randint(2, 16, (2,), generator=g))
        image[:, y : y + 18, x : x + 22] += 0.6
        height, width = self.size  # the square ends where the image does
        far = [min(x + 22, width), min(y + 18, height)]
        boxes = torch.tensor([[x, y, *far]], dtype=torch.float32)
        return Sample(image, label=index % 4, boxes=boxes, id=self.ids[index])


def make_classifier() -> Classifier:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    names = ["tench", "goldfish", "shark", "ray"]
    return Classifier(net, (0.5,) * 3, (0.5,) * 3, 32, class_names=names).eval()


@pytest.fixture
def model() -> Classifier:
    return make_classifier()


@pytest.fixture
def drawn() -> Drawn:
    return Drawn()


def centre_heat(images: Tensor, _: Tensor) -> Tensor:
    """A method of the user's own: brightness."""
    return images.mean(dim=1)


def gallery_of(run: Comparison) -> pictures.Gallery:
    return pictures.build_gallery(run._results, run.to_dataframe(first=GALLERY_POOL))


def strips_of(run: Comparison) -> list[pictures.AttackedEntry]:
    return pictures.build_strips(run._results, run.to_dataframe(first=GALLERY_POOL))


def trios_of(run: Comparison) -> list[pictures.AttackedEntry]:
    return pictures.build_trios(run._results, run.to_dataframe(first=GALLERY_POOL))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    quiet += ["--disable-component-update", "--disable-sync", "--disable-quic"]
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=quiet)
        yield opened
        opened.close()
