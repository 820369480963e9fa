"""The wrappers of torchmetrics around each metric class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.wrappers import MetricTracker, MinMaxMetric

from captum_robust import metrics

MAPS = torch.rand(8, 12, 12, generator=torch.Generator().manual_seed(0))
BOXES = [torch.tensor([[2.0, 2.0, 8.0, 8.0]])] * 8
LABELS, IDS = torch.zeros(8, dtype=torch.int64), [str(i) for i in range(8)]
NET = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 12 * 12, 4))
INPUTS: dict[str, tuple[Callable[[], Metric], tuple[Any, ...]]] = {
    "one measure": (lambda: metrics.AttributionStability("spearman"), (MAPS, MAPS.flip(0))),
    "LocalizationError": (metrics.LocalizationError, (MAPS, BOXES, IDS)),
    "MaxBoxAcc": (metrics.MaxBoxAcc, (MAPS, BOXES)),
    "MaxBoxAccV2": (metrics.MaxBoxAccV2, (MAPS, BOXES)),
    "PointingGame": (lambda: metrics.PointingGame(3, 1), (MAPS, BOXES, LABELS)),
    "PxAP": (metrics.PxAP, (MAPS, MAPS > 0.5)),
    "SaliencyMetric": (
        metrics.SaliencyMetric,
        (NET, MAPS.unsqueeze(1).expand(-1, 3, -1, -1), MAPS, LABELS, IDS),
    ),
}


def test_every_class_is_here() -> None:
    classes = {name for name in metrics.__all__ if isinstance(getattr(metrics, name), type)}
    assert classes == {*INPUTS, "AttributionStability"} - {"one measure"}


@pytest.mark.parametrize("name", INPUTS)
def test_the_wrappers_give_what_the_metric_gives(name: str) -> None:
    make, batch = INPUTS[name]
    plain = make()
    plain.update(*batch)
    value = plain.compute()
    extremes, tracker, less = MinMaxMetric(make()), MetricTracker(make()), 1 - make()
    extremes.update(*batch)
    less.update(*batch)
    tracker.increment()
    tracker.update(*batch)
    assert extremes.compute() == {"raw": value, "max": value, "min": value}
    assert tracker.best_metric() == pytest.approx(float(value))
    assert float(less.compute()) == pytest.approx(1 - float(value))


class _TwoOfTorchmetrics(Metric):
    def update(self) -> None: ...

    def compute(self) -> dict[str, torch.Tensor]:
        return {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}


@pytest.mark.parametrize(
    ("several", "batch"),
    [
        (_TwoOfTorchmetrics, ()),  # any metric of several values
        (metrics.AttributionStability, (MAPS, MAPS.flip(0))),
        (lambda: 1 - metrics.AttributionStability(), (MAPS, MAPS.flip(0))),
    ],
)
def test_extremes_of_several_measures_are_refused_as_torchmetrics_does(
    several: Callable[[], Metric], batch: tuple[Any, ...]
) -> None:
    extremes = MinMaxMetric(several())
    extremes.update(*batch)
    with pytest.raises(RuntimeError, match="should be a float or scalar tensor, but got"):
        extremes.compute()
