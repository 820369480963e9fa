from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from skimage.restoration import denoise_tv_bregman, denoise_tv_chambolle
from torch import Tensor

from captum_robust.defenses import PRESETS, TotalVariation
from tests.networks import drawn


def objective(z: Tensor, x: Tensor, mask: Tensor, weight: float) -> Tensor:
    """One number an image, from the definition."""
    z, x = z.double(), x.double()
    down, right = torch.zeros_like(z), torch.zeros_like(z)
    down[..., :-1, :] = z.diff(dim=-2)
    right[..., :-1] = z.diff(dim=-1)
    lengths = (down**2 + right**2).sqrt()
    return (mask * (z - x) ** 2 / 2 + weight * lengths).sum((1, 2, 3))


def kept(transform: TotalVariation, x: Tensor) -> Tensor:
    """The mask, from what the surrogate's gradient reaches."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(transform.surrogate(x).sum(), x)
    return (gradient[:1] != 0).to(x.dtype)


def test_a_step_keeps_its_edge_and_loses_the_known_height() -> None:
    # A row of a zeros and b ones moves by weight/a and weight/b towards each other.
    x = torch.tensor([0.0] * 4 + [1.0] * 6).view(1, 1, 1, 10)
    z = TotalVariation(0.1, drop=0, iterations=1500)(x)
    expected = torch.tensor([0.1 / 4] * 4 + [1 - 0.1 / 6] * 6).view(1, 1, 1, 10)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=0)


def test_only_kept_pixels_count_in_a_step() -> None:
    x = torch.tensor([0.0] * 8 + [1.0] * 8).view(1, 1, 1, 16)
    transform = TotalVariation(0.1, drop=0.5, iterations=1500, seed=3)
    mask = kept(transform, x)
    left, right = mask[..., :8].sum(), mask[..., 8:].sum()
    assert 0 < left < 8
    assert 0 < right < 8
    z = transform(x)
    torch.testing.assert_close(z[..., 0], torch.full((1, 1, 1), 0.1) / left, atol=1e-3, rtol=0)
    torch.testing.assert_close(z[..., -1], 1 - 0.1 / right.view(1, 1, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_the_objective_is_as_small_as_a_general_solver_makes_it(drop: float) -> None:
    x = drawn(1, 1, 9, 7).double()
    transform = TotalVariation(0.03, drop, iterations=1000, seed=1)
    mask = kept(transform, x)
    if drop == 0:
        assert mask.all()

    def smoothed(flat: Any) -> tuple[float, Any]:
        z = torch.from_numpy(flat).view_as(x).requires_grad_()
        down = torch.nn.functional.pad(z.diff(dim=-2), (0, 0, 0, 1))
        right = torch.nn.functional.pad(z.diff(dim=-1), (0, 1))
        lengths = (down**2 + right**2 + 1e-10).sqrt()
        value = (mask * (z - x) ** 2 / 2 + 0.03 * lengths).sum()
        (gradient,) = torch.autograd.grad(value, z)
        return value.item(), gradient.numpy().ravel()

    found = minimize(smoothed, x.numpy().ravel(), jac=True, options={"maxiter": 5000}).x
    reference = objective(torch.from_numpy(found).view_as(x), x, mask, 0.03)
    ours = objective(transform(x), x, mask, 0.03)
    torch.testing.assert_close(ours, reference, rtol=2e-3, atol=0)
    quick = objective(TotalVariation(0.03, drop, seed=1)(x), x, mask, 0.03)
    assert quick < 1.02 * reference


def test_without_a_mask_the_objective_is_not_above_that_of_scikit_image() -> None:
    x = drawn(1, 3, 40, 33)
    image = x[0].permute(1, 2, 0).numpy()
    every = torch.ones(())
    ours = objective(TotalVariation(0.03, drop=0)(x), x, every, 0.03)
    bregman = denoise_tv_bregman(image, weight=1 / 0.03, eps=1e-6, channel_axis=-1)
    chambolle = denoise_tv_chambolle(image, weight=0.03, eps=1e-8, channel_axis=-1)
    for result in (bregman, chambolle):
        z = torch.from_numpy(np.ascontiguousarray(result)).permute(2, 0, 1)[None]
        assert ours < 1.002 * objective(z, x, every, 0.03)
        assert (z - TotalVariation(0.03, drop=0)(x)).abs().mean() < 0.01


def test_half_of_the_pixels_of_each_channel_have_no_say() -> None:
    x = drawn(2, 3, 40, 40)
    transform = TotalVariation()
    mask = kept(transform, x)
    assert abs(mask.mean() - 0.5) < 0.03
    assert (mask[:, 0] != mask[:, 1]).float().mean() > 0.4
    other = torch.where(mask > 0, x, 1 - x)
    torch.testing.assert_close(transform(other), transform(x), atol=2e-3, rtol=0)
    assert (transform(x) - x).abs().mean() < 0.05


def test_it_brings_a_noisy_image_nearer_to_the_clean_one() -> None:
    clean = torch.full((1, 3, 32, 32), 0.3)
    clean[..., 8:24, 8:24] = 0.7
    noise = 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = clean + noise
    restored = TotalVariation(0.06, drop=0)(noisy)
    assert (restored - clean).square().mean() < 0.3 * (noisy - clean).square().mean()


def test_the_surrogate_is_close_and_its_gradient_that_of_the_solver() -> None:
    x = drawn(1, 1, 12, 12).double()
    transform = TotalVariation(0.03, iterations=600)
    assert (transform.surrogate(x) - transform(x)).abs().mean() < 0.01
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(transform.surrogate(x)[..., 3:9, 3:9].sum(), x)
    # Along the gradient the exact result grows about as fast as the surrogate says.
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (transform((x + s).clamp(0, 1))[..., 3:9, 3:9].sum() for s in (step, -step))
    slope = (ahead - behind) / (2 * step.norm())
    assert abs(slope - gradient.norm()) < 0.15 * gradient.norm()


def test_the_surrogate_can_be_differentiated_twice() -> None:
    x = drawn(1, 1, 8, 8).requires_grad_()
    soft = TotalVariation().surrogate(x)
    weights = torch.ones_like(soft).requires_grad_()
    (gradient,) = torch.autograd.grad((soft * weights).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weights)
    assert second.isfinite().all()
    assert second.abs().max() > 0


def test_the_published_parameters() -> None:
    (transform,) = PRESETS["guo2018_tvm"]()
    assert isinstance(transform, TotalVariation)
    assert (transform.weight, transform.drop) == (0.03, 0.5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": "much"}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"drop": 1}, "drop"),
        ({"drop": -0.1}, "drop"),
        ({"drop": None}, "drop"),
        ({"iterations": 0}, "iterations"),
        ({"iterations": 1.5}, "iterations"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_parameters_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TotalVariation(**settings)
