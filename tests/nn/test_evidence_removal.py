"""What stands in for removed pixels, against SciPy's filter and the ranges it is drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from captum_robust.nn import EvidenceRemoval, blend


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 3, 20, 28, generator=generator(1))


# The blur


@pytest.mark.parametrize(("height", "width"), [(224, 224), (20, 28), (61, 75)])
def test_the_blur_is_scipys_with_a_mirrored_border(height: int, width: int) -> None:
    x = torch.rand(2, 3, height, width, generator=generator(), dtype=torch.float64)
    sigma = 11 * min(height, width) / 224
    expected = gaussian_filter(x.numpy(), sigma, axes=(2, 3), mode="reflect")
    torch.testing.assert_close(EvidenceRemoval("blur")(x), torch.from_numpy(expected))


def test_a_dot_in_the_middle_stays_in_the_middle() -> None:
    """The authors' kernel reaches from -28 to 26 under Python 2."""
    x = torch.zeros(1, 1, 225, 225, dtype=torch.float64)
    x[..., 112, 112] = 1
    blurred = EvidenceRemoval("blur")(x)
    for axis in (2, 3):
        torch.testing.assert_close(blurred, blurred.flip(axis))
    assert divmod(int(blurred.argmax()), 225) == (112, 112)


@pytest.mark.parametrize("size", [(224, 224), (7, 31), (1, 5)])
def test_a_constant_image_stays_constant(size: tuple[int, int]) -> None:
    """Also at the border, which zero padding would darken."""
    x = torch.full((1, 3, *size), 0.7)
    torch.testing.assert_close(EvidenceRemoval("blur")(x), x)


def test_the_blur_is_the_same_in_each_call_and_for_each_image(x: Tensor) -> None:
    removal = EvidenceRemoval("blur")
    together = removal(x)
    assert torch.equal(removal(x), together)
    torch.testing.assert_close(torch.cat([removal(each[None]) for each in x]), together)


# Colours


def test_a_color_is_within_its_range() -> None:
    x = torch.zeros(2000, 3, 1, 1)
    colors = EvidenceRemoval("color", noise=0)(x, generator()).flatten()
    assert colors.min() >= 0.5 - 0.165
    assert colors.max() <= 0.5 + 0.165
    # Of a uniform distribution: width²/12 is the variance.
    assert colors.std() == pytest.approx(0.33 / 12**0.5, rel=0.02)
    assert colors.mean() == pytest.approx(0.5, abs=0.005)
    wide = EvidenceRemoval("color", noise=0, color_range=0.5)(x, generator()).flatten()
    assert 0 <= wide.min() < 0.01
    assert 0.99 < wide.max() <= 1


def test_a_color_is_one_a_channel_and_image(x: Tensor) -> None:
    colors = EvidenceRemoval("color", noise=0)(x, generator())
    assert torch.equal(colors, colors[:, :, :1, :1].expand_as(x))
    assert len(colors[:, :, 0, 0].unique()) == 18


def test_the_noise_has_its_deviation() -> None:
    noise = EvidenceRemoval("color", color_range=0)(torch.zeros(4, 3, 60, 60), generator()) - 0.5
    assert noise.std() == pytest.approx(0.055, rel=0.02)
    assert noise.mean() == pytest.approx(0, abs=0.001)


# What is drawn


def test_both_draws_blur_or_color_for_each_image() -> None:
    x = torch.rand(400, 1, 4, 4, generator=generator(1))
    removed = EvidenceRemoval("both", noise=0)(x, generator())
    is_blurred = (removed == EvidenceRemoval("blur")(x)).flatten(1).all(dim=1)
    is_color = (removed == removed[:, :, :1, :1]).flatten(1).all(dim=1)
    assert torch.equal(is_blurred, ~is_color)
    assert 160 < int(is_blurred.sum()) < 240  # four deviations of 400 fair draws


@pytest.mark.parametrize("scheme", ["color", "both"])
def test_each_call_and_each_image_draws_anew(scheme: str) -> None:
    x = torch.full((8, 3, 6, 6), 0.5)
    removal, g = EvidenceRemoval(scheme), generator()
    calls = torch.cat([removal(x, g), removal(x, g)])
    drawn = calls[((calls - 0.5).abs() > 1e-3).flatten(1).any(dim=1)]
    assert len(drawn) > 2
    assert len(drawn.unique(dim=0)) == len(drawn)


@pytest.mark.parametrize("scheme", ["blur", "color", "both"])
def test_a_generator_repeats_itself_and_leaves_torchs_alone(scheme: str, x: Tensor) -> None:
    before = torch.get_rng_state()
    first = EvidenceRemoval(scheme)(x, generator(3))
    assert torch.equal(EvidenceRemoval(scheme)(x, generator(3)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_torchs_is_drawn_from(x: Tensor) -> None:
    removal = EvidenceRemoval()
    torch.manual_seed(4)
    first = removal(x)
    torch.manual_seed(4)
    assert torch.equal(removal(x), first)
    assert not torch.equal(removal(x), first)


@pytest.mark.parametrize("scheme", ["blur", "color", "both"])
def test_a_shared_draw_gives_each_image_what_it_gets_alone(scheme: str, x: Tensor) -> None:
    removal = EvidenceRemoval(scheme)
    for seed in range(4):  # "both" draws a blur for some of them and a colour for others
        together = removal(x, generator(seed), shared=True)
        assert together.shape == x.shape
        alone = torch.cat([removal(each[None], generator(seed)) for each in x])
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_keep_their_type_and_get_no_gradient(dtype: torch.dtype, x: Tensor) -> None:
    removed = EvidenceRemoval()(x.to(dtype).requires_grad_(), generator())
    assert removed.dtype == dtype
    assert not removed.requires_grad


# Blending


def test_blend_shows_the_image_where_the_mask_is_one_and_the_removal_where_it_is_zero() -> None:
    x, removed = torch.full((1, 3, 1, 3), 0.8), torch.full((1, 3, 1, 3), 0.4)
    mask = torch.tensor([1.0, 0.0, 0.25]).reshape(1, 1, 1, 3)
    expected = torch.tensor([0.8, 0.4, 0.5]).reshape(1, 1, 1, 3).expand(1, 3, 1, 3)
    torch.testing.assert_close(blend(x, mask, removed), expected)


def test_only_the_mask_gets_a_gradient_through_blend(x: Tensor) -> None:
    """The difference of image and removal over the channels, for each pixel of the mask."""
    mask = torch.full((6, 1, 20, 28), 0.3, requires_grad=True)
    removed = EvidenceRemoval()(x, generator())
    blend(x, mask, removed).sum().backward()
    assert mask.grad is not None
    torch.testing.assert_close(mask.grad, (x - removed).sum(dim=1, keepdim=True))


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scheme": "blurr"}, r"scheme: .*got 'blurr'; did you mean 'blur'"),
        ({"sigma": 0}, "sigma.*0"),
        ({"sigma": float("inf")}, "sigma.*inf"),
        ({"sigma": "wide"}, "sigma.*wide"),
        ({"color_range": -0.1}, r"color_range.*-0\.1"),
        ({"color_range": 0.6}, r"color_range.*0\.6"),
        ({"noise": -1}, "noise.*-1"),
        ({"noise": float("nan")}, "noise.*nan"),
    ],
)
def test_a_bad_number_is_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvidenceRemoval(**kwargs)


def test_what_is_no_batch_of_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="x: expected N×C×H×W, got 3×8×8"):
        EvidenceRemoval()(torch.rand(3, 8, 8))
