from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_robust import RISE
from captum_robust.attr.rise import _Masks
from tests.networks import Counted, Net


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(1))


def masks_of(**options: Any) -> Tensor:
    """The masks B×12×16 that an all-white image meets."""
    seen: list[Tensor] = []

    def record(images: Tensor) -> Tensor:
        seen.append(images[:, 0].clone())
        return images.mean(dim=(2, 3))

    RISE(record, **options).attribute(torch.ones(1, 3, 12, 16), 0)
    return torch.cat(seen[1:])  # the first pass is of the image as it is


def test_a_mask_is_a_shifted_crop_of_an_enlarged_grid() -> None:
    x = torch.zeros(1, 3, 22, 17)
    masks = _Masks(x, 50, 5, 0.5, torch.Generator().manual_seed(0))
    (_, down), (_, right) = masks._enlarge
    assert set(down.tolist()) == set(range(5))  # a cell is 5 pixels high, and 4 wide
    assert set(right.tolist()) == set(range(4))
    drawn = masks(slice(0, 50))
    for grid, i, j, mask in zip(masks._cells, down.tolist(), right.tolist(), drawn, strict=True):
        large = F.interpolate(grid[None, None], (30, 24), mode="bilinear", align_corners=False)
        torch.testing.assert_close(mask, large[0, :, i : i + 22, j : j + 17])


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_the_mean_of_a_mask_is_p_at_each_pixel(p: float) -> None:
    masks = masks_of(n_masks=4000, p=p)
    assert masks.min() >= 0
    assert masks.max() <= 1
    tolerance = 5 * math.sqrt(p * (1 - p) / 4000)
    torch.testing.assert_close(masks.mean(dim=0), torch.full((12, 16), p), rtol=0, atol=tolerance)


def test_the_map_is_the_mean_of_the_masks_by_their_scores(net: Net, x: Tensor) -> None:
    n, p = 60, 0.4
    masks = masks_of(n_masks=n, s=4, p=p)
    result = RISE(net, n_masks=n, s=4, p=p).attribute(x, 2)
    for image, own in zip(x, result, strict=True):
        with torch.no_grad():
            scores = torch.stack([net(image[None] * mask)[0, 2] for mask in masks])
        centred = scores - scores.mean()
        expected = scores.mean() + (centred[:, None, None] * masks).sum(0) / ((n - 1) * p)
        torch.testing.assert_close(own, expected.expand(3, -1, -1))
        # The sum that the paper prints differs by what chance makes of the mean score.
        printed = (scores[:, None, None] * masks).sum(dim=0) / (n * p)
        off = scores.mean() * (masks.mean(dim=0) / p - 1) - (expected - scores.mean()) / n
        torch.testing.assert_close(printed, expected + off)


def test_it_is_unbiased() -> None:
    # 2×2 cells, enlarged to 3×3 and cropped to 2×2: rows and columns (a, (a + b) / 2).
    p, enlarge = 0.3, torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    f = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    expected = torch.zeros(2, 2)
    for cells in itertools.product((0.0, 1.0), repeat=4):
        grid = torch.tensor(cells).reshape(2, 2)
        mask = enlarge @ grid @ enlarge.T
        chance = p ** sum(cells) * (1 - p) ** (4 - sum(cells))
        expected += chance * (f * mask).sum().square() * mask / p

    def squared(images: Tensor) -> Tensor:
        return (f * images[:, 0]).sum(dim=(1, 2)).square()

    image = torch.ones(1, 1, 2, 2)
    few = [RISE(squared, n_masks=3, s=2, p=p, seed=i).attribute(image) for i in range(1000)]
    maps = torch.cat(few)[:, 0]
    error = maps.std(dim=0) / math.sqrt(len(maps))
    assert ((maps.mean(dim=0) - expected).abs() < 4 * error).all()


def test_all_classes_are_explained_by_the_passes_of_one(net: Net, x: Tensor) -> None:
    counted = Counted(net)
    rise = RISE(counted, n_masks=30)
    together = rise.attribute_all_classes(x)
    assert together.shape == (2, 6, 12, 16)
    assert sum(counted.calls) == 2 * 31
    for k in range(6):
        torch.testing.assert_close(together[:, k : k + 1].expand_as(x), rise.attribute(x, k))
    one = RISE(lambda images: net(images)[:, 1], n_masks=30)
    torch.testing.assert_close(one.attribute_all_classes(x), together[:, 1:2])


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_how_many_run_at_once_makes_no_difference(net: Net, x: Tensor, at_once: int) -> None:
    expected = RISE(net, n_masks=30).attribute(x, 1)
    counted = Counted(net)
    result = RISE(counted, n_masks=30).attribute(x, 1, perturbations_per_eval=at_once)
    torch.testing.assert_close(result, expected)
    assert max(counted.calls[1:]) == min(at_once, 30)


def test_masked_images_fill_a_budget_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images, counted = torch.rand(1, 3, 200, 200), Counted(nn.AdaptiveAvgPool2d(1))
    RISE(counted, n_masks=20).attribute(images, (0, 0, 0))
    assert counted.calls == [1, 17, 3]  # 2 · 4 MiB of images of 480,000 bytes


def test_each_input_has_masks_of_its_own_at_its_size() -> None:
    def left_and_top(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return a[..., :4].mean(dim=(1, 2, 3)) + weight * b[:, :, :3].mean(dim=(1, 2, 3))

    a, b = torch.ones(2, 1, 6, 8), torch.ones(2, 3, 6, 6)
    weight = torch.tensor([1.0, 0.0])  # each sample keeps its own
    rise = RISE(left_and_top, n_masks=3000, s=2)
    of_a, of_b = rise.attribute((a, b), additional_forward_args=weight)
    assert (of_a.shape, of_b.shape) == (a.shape, b.shape)
    assert (of_a[..., :3].mean(dim=(1, 2, 3)) > of_a[..., 5:].mean(dim=(1, 2, 3)) + 0.1).all()
    top, bottom = of_b[:, :, :2].mean(dim=(1, 2, 3)), of_b[:, :, 4:].mean(dim=(1, 2, 3))
    assert top[0] > bottom[0] + 0.1
    assert (top[1] - bottom[1]).abs() < 0.02


def test_a_seed_fixes_the_masks_and_none_draws_from_the_global_generator() -> None:
    assert torch.equal(masks_of(n_masks=9), masks_of(n_masks=9, seed=0))
    assert not torch.equal(masks_of(n_masks=9), masks_of(n_masks=9, seed=1))
    torch.manual_seed(3)
    first = masks_of(n_masks=9, seed=None)
    assert not torch.equal(first, masks_of(n_masks=9, seed=None))
    torch.manual_seed(3)
    assert torch.equal(first, masks_of(n_masks=9, seed=None))


def test_hidden_pixels_show_the_baseline() -> None:
    seen: list[Tensor] = []

    def record(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return images.mean(dim=(2, 3))

    colour = torch.tensor([0.2, 0.4, 0.6]).reshape(1, 3, 1, 1)
    for baselines in (colour, colour.expand(1, 3, 12, 16)):
        seen.clear()
        RISE(record, n_masks=9).attribute(torch.ones(1, 3, 12, 16), 0, baselines=baselines)
        masks = masks_of(n_masks=9).unsqueeze(1)
        torch.testing.assert_close(torch.cat(seen[1:]), masks + (1 - masks) * colour)


def test_a_sample_is_done_once_its_map_is_exact_enough(net: Net, x: Tensor) -> None:
    rise, counted = RISE(net, n_masks=450, s=3), Counted(net)
    many = RISE(counted, n_masks=450, s=3)
    all_masks = rise.attribute(x, 1, tolerance=0)
    torch.testing.assert_close(all_masks, rise.attribute(x, 1))
    result = many.attribute(x, 1, tolerance=100, perturbations_per_eval=30)
    assert counted.calls == [2, *[30, 30, 30, 10] * 2]  # in blocks of 100
    torch.testing.assert_close(result, RISE(net, n_masks=450, s=3).attribute(x, 1, tolerance=50))
    alone = rise.attribute(x[1:], 1, tolerance=0.1)
    torch.testing.assert_close(rise.attribute(x, 1, tolerance=0.1)[1:], alone)


def test_the_standard_error_is_that_of_maps_with_other_seeds(net: Net, x: Tensor) -> None:
    tolerance, counted = 0.1, Counted(net)
    long = RISE(net, n_masks=20_000, s=3, seed=99).attribute(x[:1], 1)
    span = float(long.max() - long.min())
    errors = []
    for seed in range(20):
        stopped = RISE(counted, n_masks=10_000, s=3, seed=seed)
        found = stopped.attribute(x[:1], 1, tolerance=tolerance)
        # A shift of the whole map is no error of it.
        difference = found - long
        errors.append((difference - difference.mean()).square().mean())
    assert sum(counted.calls) < 20 * 5000
    error = float(torch.stack(errors).mean().sqrt())
    assert 0.3 * tolerance * span < error < 1.2 * tolerance * span


def test_it_needs_no_gradient(x: Tensor) -> None:
    class Bright(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.from_numpy((images[..., :8].numpy() > 0.3).mean(axis=(1, 2, 3)))

    found = RISE(Bright(), n_masks=300).attribute(x)[:, 0]
    assert found[..., :6].mean() > found[..., 10:].mean()


def test_more_cells_than_pixels_and_one_mask_work(net: Net, x: Tensor) -> None:
    assert RISE(net, n_masks=1, s=40).attribute(x, 1).isfinite().all()


def test_the_bar_counts_masks(net: Net, x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    RISE(net, n_masks=2).attribute(x, 1, show_progress=True)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"p": 0}, {"p": 1}, {"p": float("nan")}, {"s": 0}, {"n_masks": 0}, {"seed": -1}, {"s": 2.5}],
    ids=str,
)
def test_a_wrong_option_is_named(net: Net, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        RISE(net, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        {"perturbations_per_eval": 0},
        {"tolerance": -1},
        {"baselines": torch.zeros(2, 3)},
        {"baselines": (0, 0)},
        {"baselines": torch.tensor(float("nan"))},
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(net: Net, x: Tensor, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}"):
        RISE(net, n_masks=3).attribute(x, 1, **arguments)


def test_nan_under_a_mask_names_the_sample(net: Net, x: Tensor) -> None:
    def fails(images: Tensor) -> Tensor:
        return net(images) + (images.mean(dim=(1, 2, 3)) - 0.35).sqrt().unsqueeze(1)

    x[0] = 0.9 + x[0]
    with pytest.raises(ValueError, match=r"scores: NaN or infinity in sample 1"):
        RISE(fails, n_masks=20, p=0.7).attribute(x, 1)


def test_all_classes_need_a_score_each(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"forward_func: expected scores N×K"):
        RISE(lambda images: images, n_masks=2).attribute_all_classes(x)
    with pytest.raises(ValueError, match=r"inputs: expected images"):
        RISE(lambda images: images, n_masks=2).attribute(x[0])
