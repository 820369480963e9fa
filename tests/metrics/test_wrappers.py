"""The wrappers of torchmetrics around each metric class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric

from captum_robust import metrics

MAPS = torch.rand(8, 12, 12, generator=torch.Generator().manual_seed(0))
BOXES = [torch.tensor([[2.0, 2.0, 8.0, 8.0]])] * 8
LABELS, IDS = torch.zeros(8, dtype=torch.int64), [str(i) for i in range(8)]
NET = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 12 * 12, 4))
SHOWN = (NET, MAPS.unsqueeze(1).expand(-1, 3, -1, -1), MAPS, LABELS)


def first_channel(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return images[:, 0]


CONV = torch.nn.Conv2d(3, 2, 3, padding=1)


def first_map(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return CONV(images)[:, 0]


INPUTS: dict[str, tuple[Callable[[], Metric], tuple[Any, ...]]] = {
    "one measure": (lambda: metrics.AttributionStability("spearman"), (MAPS, MAPS.flip(0))),
    "LocalizationError": (metrics.LocalizationError, (MAPS, BOXES, IDS)),
    "MaxBoxAcc": (metrics.MaxBoxAcc, (MAPS, BOXES)),
    "MaxBoxAccV2": (metrics.MaxBoxAccV2, (MAPS, BOXES)),
    "PointingGame": (lambda: metrics.PointingGame(3, 1), (MAPS, BOXES, LABELS)),
    "PxAP": (metrics.PxAP, (MAPS, MAPS > 0.5)),
    "SaliencyMetric": (
        metrics.SaliencyMetric,
        (*SHOWN, IDS),
    ),
    "Deletion": (lambda: metrics.Deletion(4), SHOWN),
    "Insertion": (lambda: metrics.Insertion(4), SHOWN),
    "Infidelity": (lambda: metrics.Infidelity(5), SHOWN),
    "Sensitivity": (lambda: metrics.Sensitivity(samples=2), (first_channel, *SHOWN[1::2])),
    "ModelRandomization": (metrics.ModelRandomization, (CONV, first_map, *SHOWN[1::2])),
    "ROAD": (lambda: metrics.ROAD([0.2, 0.6]), SHOWN),
    "CertifiedShare": (metrics.CertifiedShare, (MAPS > 0.7, MAPS < 0.2)),
    "CertifiedPointing": (metrics.CertifiedPointing, (MAPS > 0.7, BOXES)),
    "CertifiedLocalizationError": (
        metrics.CertifiedLocalizationError,
        (
            torch.cat(BOXES[:4] + [BOXES[0] + 1] * 4),
            torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 8),
            BOXES,
        ),
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


@pytest.mark.parametrize("name", ["LocalizationError", "MaxBoxAcc", "MaxBoxAccV2", "PointingGame"])
def test_boxes_in_one_tensor_are_those_of_the_list_and_can_be_resampled(name: str) -> None:
    make, (maps, boxes, *others) = INPUTS[name]
    if name == "LocalizationError":
        others = [torch.arange(8)]  # the ids as numbers
    listed, whole = make(), make()
    listed.update(maps, boxes, *others)
    whole.update(maps, torch.stack(boxes), *others)
    assert whole.compute() == listed.compute()
    drawn = BootStrapper(make(), num_bootstraps=3, raw=True)
    drawn.update(maps, torch.stack(boxes), *others)
    assert drawn.compute()["raw"].shape == (3,)


def test_masks_of_image_files_are_the_boolean_ones() -> None:
    bright = MAPS > 0.5
    ignore = torch.rand(MAPS.shape, generator=torch.Generator().manual_seed(1)) > 0.8
    expected = metrics.functional.pxap(MAPS, bright, ignore)
    hits = metrics.functional.pointing_game_hits(MAPS, bright, 1)
    for light in (1, 255):
        masks = (bright.to(torch.uint8) * light)[:, None]
        ignored = ignore.to(torch.uint8) * light
        assert metrics.functional.pxap(MAPS, masks, ignored) == expected
        assert metrics.functional.pointing_game_hits(MAPS, masks, 1).equal(hits)
    with pytest.raises(TypeError, match="masks: expected Boolean"):
        metrics.functional.pxap(MAPS, (MAPS * 3).to(torch.uint8))
    with pytest.raises(TypeError, match="ground_truth: expected Boolean"):
        metrics.functional.pointing_game_hits(MAPS[:, :, :4], MAPS[:, :, :4], 1)
