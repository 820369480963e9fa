"""Infidelity and sensitivity: the numbers of Captum, hand-worked ones, the passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max
from torch import Tensor, nn

from captum_robust.metrics import Infidelity
from captum_robust.metrics import functional as F
from captum_robust.metrics.functional.regions import blurred_images
from tests.networks import Counted

N, SIZE = 3, (16, 12)
CLASSES = torch.tensor([0, 3, 1])


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(560, 4)).eval()
    with torch.no_grad():
        net[3].weight.mul_(6)  # so that probabilities move
    return net


def some_images() -> Tensor:
    return torch.rand(N, 2, *SIZE, generator=torch.Generator().manual_seed(1))


def some_maps() -> Tensor:
    return torch.randn(N, *SIZE, generator=torch.Generator().manual_seed(2))


def test_squares_are_squares_of_the_stated_sides() -> None:
    squares = F.random_squares(400, (48, 32), seed=3)
    rows, columns = squares.any(dim=2).sum(dim=1), squares.any(dim=1).sum(dim=1)
    assert rows.equal(columns)
    assert squares.flatten(1).sum(dim=1).equal(rows * columns)
    assert (rows.min(), rows.max()) == (4, 16)
    assert squares.any(dim=0).all()
    assert squares.equal(F.random_squares(400, (48, 32), seed=3))
    assert not squares.equal(F.random_squares(400, (48, 32), seed=4))
    assert F.random_squares(5, (1, 3)).sum().item() == 5


@pytest.mark.parametrize("fill", F.REMOVAL_FILLS)
@pytest.mark.parametrize("normalize", [True, False])
def test_infidelity_is_that_of_captum_on_the_same_squares(
    net: nn.Module, fill: str, normalize: bool
) -> None:
    images, maps = some_images(), some_maps()
    squares = F.random_squares(11, SIZE, seed=5)
    whole = {
        "mean": images.mean(dim=(2, 3), keepdim=True).expand_as(images),
        "blur": blurred_images(images),
    }[fill]

    def remove(copies: Tensor) -> tuple[Tensor, Tensor]:
        """Captum gives each image so many times in a row."""
        gone = squares.repeat(N, 1, 1)[:, None].expand_as(copies)
        fills = whole.repeat_interleave(len(squares), dim=0)
        return gone.float(), torch.where(gone, fills, copies)

    theirs = captum_infidelity(
        lambda x: net(x).softmax(dim=1),
        remove,
        images,
        maps[:, None].expand_as(images) / 2,  # the sum over both channels is that of the map
        target=CLASSES,
        n_perturb_samples=len(squares),
        normalize=normalize,
    )
    settings: dict[str, Any] = {"squares": 11, "seed": 5, "fill": fill, "normalize": normalize}
    ours = F.infidelity(net, images, maps, CLASSES, **settings)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=1e-4)


def test_the_scale_of_a_map_does_not_count_unless_it_is_asked_for() -> None:
    # Two squares take .6 and .2. A map whose sums are 3 and 1 foretells both; one of 0 and 1 only
    # .2, and errs by .6; one of 1 and 1 foretells .4, and errs by .2 twice; zeros by both.
    squares = torch.tensor([[[True, False]], [[False, True]]])
    maps = torch.tensor([[[3.0, 1.0]], [[0.0, 1.0]], [[-1.0, -1.0]], [[0.0, 0.0]]])
    drops = torch.tensor([[0.6, 0.2]]).expand(4, 2)
    expected = torch.tensor([0.0, 0.6**2 / 2, 0.2**2, (0.6**2 + 0.2**2) / 2])
    for factor in (1.0, 1e-30, 1e30):
        torch.testing.assert_close(F.infidelity_of(factor * maps, squares, drops), expected)
    as_they_are = F.infidelity_of(maps / 5, squares, drops, normalize=False)
    error = torch.tensor([0.0, 0.36 / 2, (0.8**2 + 0.4**2) / 2, 0.4 / 2])
    torch.testing.assert_close(as_they_are, error)


def test_the_metric_keeps_squares_of_small_drops(net: nn.Module) -> None:
    with torch.no_grad():
        net[3].weight.mul_(0.03)
    batch = net, some_images(), some_maps(), CLASSES
    metric = Infidelity()
    metric.update(*batch)
    mean = F.infidelity(*batch).mean()
    assert 1e-7 < mean < 1e-6
    torch.testing.assert_close(metric.compute(), mean, rtol=1e-2, atol=1e-9)


def test_a_network_that_ends_in_a_softmax_has_the_same_drops(net: nn.Module) -> None:
    squares = F.random_squares(4, SIZE)
    ended = nn.Sequential(net, nn.Softmax(dim=1))
    drops, expected = (F.square_drops(m, some_images(), squares, CLASSES) for m in (ended, net))
    torch.testing.assert_close(drops, expected)


def test_drops_take_one_pass_a_square_and_one_and_know_no_map(net: nn.Module) -> None:
    model = Counted(net)
    squares = F.random_squares(7, SIZE)
    drops = F.square_drops(model, some_images(), squares, CLASSES, batch_size=5)
    assert sum(model.calls) == 8 * N
    assert set(model.calls[:-1]) == {5}
    with torch.no_grad():
        for i, image in enumerate(some_images()):
            clean = net(image[None]).softmax(dim=1)[0, CLASSES[i]]
            mean = image.mean(dim=(1, 2), keepdim=True)
            for square, drop in zip(squares, drops[i], strict=True):
                p = net(torch.where(square, mean, image)[None]).softmax(dim=1)[0, CLASSES[i]]
                torch.testing.assert_close(drop, clean - p, atol=1e-6, rtol=0)


def test_sensitivity_is_that_of_captum_on_each_image_with_the_same_seed(net: nn.Module) -> None:
    saliency, images = Saliency(net), some_images()

    def explain(x: Tensor, target: Tensor) -> Tensor:
        return saliency.attribute(x, target).mean(dim=1)

    ours = F.sensitivity(explain, images, CLASSES, radius=0.1, samples=6, seed=9)
    given = F.sensitivity(
        explain, images, CLASSES, maps=explain(images, CLASSES), radius=0.1, samples=6, seed=9
    )
    assert ours.equal(given)
    for i in range(N):
        one = slice(i, i + 1)
        with torch.random.fork_rng():
            torch.manual_seed(9)
            theirs = sensitivity_max(
                lambda x, target: saliency.attribute(x, target)[0].mean(dim=1, keepdim=True),
                images[one],
                perturb_radius=0.1,
                n_perturb_samples=6,
                max_examples_per_batch=1,
                target=CLASSES[one],
            )
        torch.testing.assert_close(ours[one], theirs)


def test_sensitivity_worked_by_hand() -> None:
    # The map is the image, of 1 everywhere: noise moves it by the noise itself.
    images = torch.ones(2, 1, 4, 4)
    noise = torch.empty(3, 16).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(4))
    found = F.sensitivity(lambda x, _: x[:, 0], images, CLASSES[:2], radius=0.5, samples=3, seed=4)
    torch.testing.assert_close(found, (noise.norm(dim=1).max() / 4).expand(2))
    # A map of zeros has the length 1, and what is always the same does not move.
    calls: list[int] = []

    def steady(x: Tensor, _: Tensor) -> Tensor:
        calls.append(len(x))
        return x[:, 0] * 0

    assert F.sensitivity(steady, images, CLASSES[:2]).tolist() == [0, 0]
    assert calls == [2] * 11


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (F.infidelity, {"maps": torch.rand(N, 7, 7)}, "maps: expected 3×16×12, got 3×7×7"),
        (F.infidelity, {"maps": some_maps() * math.nan}, "maps: NaN or infinity in sample 0"),
        (F.infidelity, {"fill": "black"}, "fill: expected one of blur, mean"),
        (F.infidelity, {"squares": 0}, "count: expected"),
        (F.infidelity, {"batch_size": 0}, "batch_size: expected"),
        (F.sensitivity, {"radius": 0}, "radius: expected"),
        (F.sensitivity, {"samples": 0}, "samples: expected"),
        (F.sensitivity, {"maps": torch.rand(N, 7, 7)}, "maps: expected those of explain"),
        (F.sensitivity, {"explain": lambda x, _: x[:1, 0]}, "maps of explain: expected 3, got 1"),
    ],
)
def test_wrong_arguments_are_named(
    net: nn.Module, call: Any, changes: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"images": some_images(), "classes": CLASSES}
    if call is F.infidelity:
        given |= {"model": net, "maps": some_maps()}
    else:
        given |= {"explain": lambda x, _: x[:, 0]}
    with pytest.raises(ValueError, match=message):
        call(**given | changes)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e30, 3e38])
def test_the_size_of_a_map_moves_neither_number(net: nn.Module, scale: float) -> None:
    images, maps = some_images(), some_maps()
    maps = maps / maps.abs().amax()
    plain = F.infidelity(net, images, maps, CLASSES)
    torch.testing.assert_close(F.infidelity(net, images, scale * maps, CLASSES), plain)
    explain = lambda x, _: x.mean(dim=1) / x.amax()  # noqa: E731
    plain = F.sensitivity(explain, images, CLASSES)
    scaled = F.sensitivity(lambda x, y: scale * explain(x, y), images, CLASSES)
    assert (plain > 0).all()
    torch.testing.assert_close(scaled, plain, atol=1e-4, rtol=1e-3)
