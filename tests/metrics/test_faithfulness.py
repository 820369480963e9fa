"""Deletion and insertion: hand-worked areas, shared passes, Quantus on the same input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust.metrics import functional as F
from captum_robust.metrics.functional.regions import blurred_images
from tests.networks import Counted

N, SIZE = 5, (24, 20)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(252, 4)).eval()
    with torch.no_grad():
        net[3].weight.mul_(6)  # so that probabilities move
    return net


def brightness(x: Tensor) -> Tensor:
    """Scores whose probability of class 0 is the mean of the image."""
    p = x.mean(dim=(1, 2, 3)).clamp(1e-6, 1 - 1e-6)
    return torch.stack([p, 1 - p], dim=1).log()


def some_images() -> Tensor:
    """Images whose channels have a mean of zero: the fill "mean" is then the number 0."""
    images = torch.rand(N, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return images - images.mean(dim=(2, 3), keepdim=True)


def some_maps() -> Tensor:
    return torch.rand(N, *SIZE, generator=torch.Generator().manual_seed(2))


CLASSES = torch.arange(N) % 4


def test_areas_worked_by_hand() -> None:
    # The mean is .5. Without 1 and .6 the image is .5 .5 .2 .2, mean .35; only these: .65.
    image = torch.tensor([[[[1.0, 0.2], [0.6, 0.2]]]])
    target = torch.tensor([0])
    fills = {"deletion_fill": "mean", "insertion_fill": "mean"}
    deletion, insertion = F.removal_curves(brightness, image, image[:, 0], target, steps=2, **fills)
    torch.testing.assert_close(deletion.probability, torch.tensor([[0.5, 0.35, 0.5]]))
    torch.testing.assert_close(insertion.probability, torch.tensor([[0.5, 0.65, 0.5]]))
    assert deletion.area.item() == pytest.approx((0.5 / 2 + 0.35 + 0.5 / 2) / 2)
    assert insertion.area.item() == pytest.approx((0.5 / 2 + 0.65 + 0.5 / 2) / 2)


def test_steps_that_do_not_divide_the_pixels_weigh_by_what_they_change() -> None:
    # Of 4 pixels 1, 3 and 4 are gone after 3 steps: widths of 1/4, 1/2 and 1/4.
    image = torch.tensor([[[[0.8, 0.4], [0.0, 0.0]]]])  # mean .3
    curve = F.deletion_curve(brightness, image, image[:, 0], torch.tensor([0]), steps=3)
    assert curve.share.tolist() == [0, 0.25, 0.75, 1]
    after = [0.3, 0.175, 0.225, 0.3]
    assert curve.probability[0].tolist() == pytest.approx(after)
    area = (0.3 + 0.175) / 8 + (0.175 + 0.225) / 4 + (0.225 + 0.3) / 8
    assert curve.area.item() == pytest.approx(area)


@pytest.mark.parametrize("fill", F.REMOVAL_FILLS)
def test_every_point_is_that_of_the_image_put_together_alone(net: nn.Module, fill: str) -> None:
    images, maps = some_images() + 0.4, some_maps()
    whole = {
        "mean": images.mean(dim=(2, 3), keepdim=True).expand_as(images),
        "blur": blurred_images(images),
    }[fill]
    deletion, insertion = F.removal_curves(
        net, images, maps, CLASSES, steps=7, deletion_fill=fill, insertion_fill=fill, batch_size=9
    )
    for i in range(N):
        order = sorted(range(480), key=(-maps[i].flatten()).tolist().__getitem__)
        for step in range(8):
            changed = torch.zeros(480, dtype=torch.bool)
            changed[order[: round(step * 480 / 7)]] = True
            changed = changed.view(SIZE)
            for curve, x in (
                (deletion, torch.where(changed, whole[i], images[i])),
                (insertion, torch.where(changed, images[i], whole[i])),
            ):
                with torch.no_grad():
                    p = net(x[None]).softmax(dim=1)[0, CLASSES[i]]
                assert curve.probability[i, step].item() == pytest.approx(p.item(), abs=1e-6)


def test_both_curves_cost_two_passes_a_step_and_fill_the_batches(net: nn.Module) -> None:
    for fill, passes in (("blur", 12), ("mean", 13)):
        model = Counted(net)
        both = F.removal_curves(
            model, some_images(), some_maps(), CLASSES, steps=6, deletion_fill=fill, batch_size=8
        )
        assert sum(model.calls) == passes * N
        assert set(model.calls[:-1]) == {8}
        assert model.calls[-1] <= 8
        alone = F.deletion_curve(net, some_images(), some_maps(), CLASSES, steps=6, fill=fill)
        torch.testing.assert_close(both[0].probability, alone.probability)
        alone = F.insertion_curve(net, some_images(), some_maps(), CLASSES, steps=6)
        torch.testing.assert_close(both[1].probability, alone.probability)
    model = Counted(net)
    F.deletion_curve(model, some_images(), some_maps(), CLASSES, steps=6, batch_size=100)
    assert model.calls == [7 * N]


def test_a_batch_gives_what_its_images_give_one_by_one(net: nn.Module) -> None:
    images, maps = some_images(), some_maps()
    whole = F.removal_curves(net, images, maps, CLASSES, steps=5)
    for i in range(N):
        one = slice(i, i + 1)
        alone = F.removal_curves(net, images[one], maps[one], CLASSES[one], steps=5)
        for every, single in zip(whole, alone, strict=True):
            torch.testing.assert_close(every.probability[one], single.probability)


def test_only_the_order_of_a_map_counts_and_equal_pixels_go_row_by_row(net: nn.Module) -> None:
    images, maps = some_images(), some_maps()
    first = F.deletion_curve(net, images, maps, CLASSES, steps=5).probability
    for same in (maps[:, None], 1e6 * maps - 3, maps.double() ** 3):
        assert F.deletion_curve(net, images, same, CLASSES, steps=5).probability.equal(first)
    falling = -torch.arange(480.0).view(1, *SIZE).expand(N, -1, -1)
    by_rows = F.deletion_curve(net, images, falling, CLASSES, steps=5).probability
    constant = torch.full((N, *SIZE), 0.25)
    assert F.deletion_curve(net, images, constant, CLASSES, steps=5).probability.equal(by_rows)


def test_the_model_is_in_evaluation_mode_and_left_as_it_was(net: nn.Module) -> None:
    dropping = nn.Sequential(nn.Dropout(0.5), net).train()
    curve = F.deletion_curve(dropping, some_images(), some_maps(), CLASSES, steps=3)
    assert curve.probability.equal(
        F.deletion_curve(net, some_images(), some_maps(), CLASSES, steps=3).probability
    )
    assert dropping.training
    assert all(p.grad is None for p in net.parameters())


def test_deletion_is_quantus_pixel_flipping_with_its_first_point(net: nn.Module) -> None:
    """The curve is that of Quantus' ``PixelFlipping``, where the two mean the same.

    They differ in that Quantus

    - begins behind the first step: the clean image is no point of its curve, nor in its area, which
      is a sum of trapezoids a step wide, not one, and has no insertion;
    - flattens the channels: a step is of single values, and only one of a multiple of C of them,
      here 60 = 3 · 20, takes whole pixels. It has to divide H·W, which a multiple of 3 never does
      at 224×224, where pixels lose their channels one by one;
    - takes the mean for its "mean" fill over the channels, of the image as it is in that step. Here
      the mean of each channel is 0, and the fill of both is the number 0;
    - orders equal values by an unstable sort. Here no two pixels are equal.
    """
    quantus = pytest.importorskip("quantus")
    images, maps = some_images(), some_maps()
    ours = F.deletion_curve(net, images, maps, CLASSES, steps=24)
    flipping = quantus.PixelFlipping(
        features_in_step=60, perturb_baseline=0.0, normalise=False, disable_warnings=True
    )
    batch: dict[str, Any] = {
        "x_batch": images.numpy(),
        "y_batch": CLASSES.numpy(),
        "a_batch": maps[:, None].numpy(),
    }
    theirs = torch.tensor(flipping(model=net, softmax=True, **batch))
    torch.testing.assert_close(ours.probability[:, 1:], theirs.float(), atol=1e-6, rtol=0)
    both = torch.cat([ours.probability[:, :1], theirs.float()], dim=1)
    torch.testing.assert_close(ours.area, torch.trapezoid(both, dx=1 / 24), atol=1e-6, rtol=0)


def test_an_empty_batch_gives_nothing(net: nn.Module) -> None:
    curve = F.deletion_curve(net, some_images()[:0], some_maps()[:0], CLASSES[:0], steps=3)
    assert curve.probability.shape == (0, 4)
    assert curve.area.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"maps": torch.rand(N, 7, 7)}, ValueError, "maps: expected 5×24×20, got 5×7×7"),
        ({"maps": torch.rand(N, 3, *SIZE)}, ValueError, "maps: expected N×H×W"),
        ({"maps": some_maps() * math.nan}, ValueError, "maps: NaN or infinity in sample 0"),
        ({"images": torch.ones(N, 3, *SIZE).int()}, TypeError, "images: expected floating point"),
        ({"classes": torch.tensor([9] * N)}, ValueError, "classes: expected numbers from 0 to 3"),
        ({"fill": "black"}, ValueError, "fill: expected one of blur, mean, got 'black'"),
        ({"steps": 0}, ValueError, "steps: expected a whole number from 1 to 480, got 0"),
        ({"steps": 481}, ValueError, "steps: expected a whole number from 1 to 480, got 481"),
        ({"batch_size": 0}, ValueError, "batch_size: expected"),
        ({"model": "net"}, TypeError, "model: expected a function"),
    ],
)
def test_wrong_arguments_are_named(
    net: nn.Module, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"model": net, "images": some_images(), "maps": some_maps()}
    with pytest.raises(error, match=message):
        F.deletion_curve(**{**given, "classes": CLASSES, **changes})


ON_CPU = {
    "deletion": lambda model, x, classes: F.deletion_curve(model, x, x[:, 0], classes),
    "saliency metric": lambda model, x, classes: F.crop_scores(
        model, x, torch.rand(len(x), 30, 4).sort(dim=2).values * 10 + LEAST, classes
    ),
    "smallest sufficient region": lambda model, x, classes: F.smallest_sufficient_region(
        model, x, x[:, 0], classes
    ),
    "smallest destroying region": lambda model, x, classes: F.smallest_destroying_region(
        model, x, x[:, 0], classes
    ),
}
LEAST = torch.tensor([0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("metric", ON_CPU)
def test_the_cpu_gets_eight_images_a_thread(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    sizes = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.mean(dim=(2, 3))

    ON_CPU[metric](model, torch.rand(40, 3, 12, 12), torch.zeros(40, dtype=torch.int64))
    assert max(sizes) == 16
