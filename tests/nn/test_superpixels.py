"""Means over super-pixels against a loop, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from captum_robust.nn import spread, superpixel_means


@pytest.fixture
def values() -> Tensor:
    return torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def segments() -> Tensor:
    drawn = torch.randint(0, 6, (3, 5, 7), generator=torch.Generator().manual_seed(1))
    drawn[1].clamp_(max=2)  # an image with fewer super-pixels than the others
    return drawn


def test_means_are_those_of_a_loop(values: Tensor, segments: Tensor) -> None:
    means = superpixel_means(values, segments)
    expected = np.zeros((3, 2, 6))
    for i in range(3):
        for s in range(6):
            inside = segments[i].numpy() == s
            if inside.any():
                expected[i, :, s] = values[i].numpy()[:, inside].mean(axis=1)
    np.testing.assert_allclose(means.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_spread_gives_each_pixel_the_value_of_its_superpixel(segments: Tensor) -> None:
    values = torch.arange(3 * 2 * 6.0).reshape(3, 2, 6)
    result = spread(values, segments)
    for n, c, y, x in np.ndindex(3, 2, 5, 7):
        assert result[n, c, y, x] == values[n, c, segments[n, y, x]]


def test_pooled_maps_are_constant_in_a_superpixel_and_keep_their_mean(
    values: Tensor, segments: Tensor
) -> None:
    pooled = spread(superpixel_means(values, segments), segments)
    for n, s in np.ndindex(3, 6):
        inside = pooled[n][:, segments[n] == s]
        if inside.numel():
            assert (inside == inside[:, :1]).all()
    torch.testing.assert_close(pooled.mean(dim=(2, 3)), values.mean(dim=(2, 3)))


def test_a_batch_gives_what_its_images_give(values: Tensor, segments: Tensor) -> None:
    batch = superpixel_means(values, segments)
    for i in range(3):
        single = superpixel_means(values[i : i + 1], segments[i : i + 1])
        assert torch.equal(batch[i : i + 1, :, : single.shape[2]], single)
        assert not batch[i, :, single.shape[2] :].any()


def test_each_pixel_has_its_share_of_the_gradient() -> None:
    values = torch.zeros(1, 1, 2, 2, requires_grad=True)
    segments = torch.tensor([[[0, 0], [0, 1]]])
    (superpixel_means(values, segments) * torch.tensor([6.0, 5.0])).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[[[2.0, 2.0], [2.0, 5.0]]]]))
    means = torch.zeros(1, 1, 2, requires_grad=True)
    spread(means, segments).sum().backward()
    assert means.grad is not None
    assert means.grad.tolist() == [[[3.0, 1.0]]]


def test_half_precision_is_summed_exactly() -> None:
    # 4,096 ones: a sum in bfloat16 ends at 256, where adding 1 changes nothing.
    values = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    means = superpixel_means(values, torch.zeros(1, 64, 64, dtype=torch.uint8))
    assert means.dtype == torch.bfloat16
    assert means.tolist() == [[[1.0]]]


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_type_of_integer_is_taken(values: Tensor, segments: Tensor, kind: Any) -> None:
    expected = superpixel_means(values, segments)
    assert torch.equal(superpixel_means(values, segments.to(kind)), expected)
    assert torch.equal(spread(expected, segments.to(kind)), spread(expected, segments))


def test_bad_segments_are_refused(values: Tensor, segments: Tensor) -> None:
    means = superpixel_means(values, segments)
    for wrong, message in (
        (segments - 1, r"numbers from 0 to \d+, got -1"),
        (segments + 35, r"numbers from 0 to \d+, got 40"),
        (segments[:2], "expected 3×.*got 2×5×7"),
        (segments[:, None], "got 3×1×5×7"),
    ):
        with pytest.raises(ValueError, match=f"segments: .*{message}"):
            superpixel_means(values, wrong)
        with pytest.raises(ValueError, match=f"segments: .*{message}"):
            spread(means, wrong)
    with pytest.raises(ValueError, match="numbers from 0 to 4, got 5"):
        spread(means[:, :, :5], segments)
    with pytest.raises(ValueError, match="expected 3×5×7, got 3×7×5"):
        superpixel_means(values, segments.transpose(1, 2))
    for kind in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"segments: .*integers, got {kind}"):
            superpixel_means(values, segments.to(kind))
        with pytest.raises(TypeError, match=f"segments: .*integers, got {kind}"):
            spread(means, segments.to(kind))
    with pytest.raises(TypeError, match=r"segments: .*integers, got list"):
        superpixel_means(values, [[0]])  # type: ignore[arg-type]


def test_bad_values_are_refused(values: Tensor, segments: Tensor) -> None:
    with pytest.raises(TypeError, match=r"values: .*floating point, got torch\.int64"):
        superpixel_means(values.long(), segments)
    with pytest.raises(ValueError, match=r"values: expected N×C×H×W, not empty, got \(3, 5, 7\)"):
        superpixel_means(values[:, 0], segments)
    with pytest.raises(ValueError, match=r"not empty, got \(0, 2, 5, 7\)"):
        superpixel_means(values[:0], segments[:0])
    with pytest.raises(ValueError, match="values: expected N×C×S"):
        spread(values, segments)
    with pytest.raises(TypeError, match="values: expected a tensor, got list"):
        spread([1.0], segments)  # type: ignore[arg-type]
