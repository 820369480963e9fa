from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from captum_robust.metrics.functional import tightest_box
from captum_robust.nn.soft_crop import cropped, soft_boxes


def blobs(n: int = 8, height: int = 24, width: int = 32) -> torch.Tensor:
    """Rectangles of ones, at least a quarter of each side."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(n, 1, height, width)
    for mask in masks:
        y, x = (
            int(torch.randint(0, side // 2, (), generator=generator)) for side in (height, width)
        )
        mask[0, y : y + height // 3, x : x + width // 3] = 1
    return masks


def test_sides_stand_where_those_of_the_tightest_box_do() -> None:
    masks = blobs()
    sizes = torch.tensor([32, 24, 32, 24])
    assert torch.allclose(soft_boxes(masks) * sizes, tightest_box(masks[:, 0]), atol=1e-5)


def test_the_mean_over_thresholds_is_the_mean_of_the_boxes_at_each() -> None:
    """Of any mask: by hand, from the boxes of two thousand thresholds."""
    masks = torch.rand(1, 1, 6, 9, generator=torch.Generator().manual_seed(1))
    thresholds = torch.linspace(0, 1, 4001)[1::2]
    boxes = tightest_box((masks[0] > thresholds[:, None, None]).float())  # whole where none is
    expected = boxes.mean(dim=0) / torch.tensor([9, 6, 9, 6])
    assert torch.allclose(soft_boxes(masks)[0], expected, atol=2e-3)


def test_an_empty_mask_has_the_whole_image_and_a_point_a_tenth_of_each_side() -> None:
    mask = torch.zeros(1, 1, 40, 40)
    assert torch.allclose(soft_boxes(mask)[0], torch.tensor([0, 0, 1.0, 1]), atol=1e-2)
    mask[..., 0, 39] = 1
    box = soft_boxes(mask)[0]
    assert torch.allclose(box, torch.tensor([0.9, 0, 1, 0.1]), atol=1e-2)


def test_a_crop_is_what_interpolation_makes_of_the_pixels() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.25, 0.5, 0.75, 1]])
    crops = cropped(images, boxes)
    assert torch.allclose(crops[0], images[0], atol=1e-5)
    part = F.interpolate(images[1:, :, 16:, 8:24], (32, 32), mode="bilinear")[0]
    inner = slice(2, -2)  # at the edge it sees the pixels beyond
    assert torch.allclose(crops[1][:, inner, inner], part[:, inner, inner], atol=1e-5)


def test_sides_have_the_gradient_of_differences() -> None:
    masks = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    masks.requires_grad_()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()

    def value(m: torch.Tensor) -> torch.Tensor:
        return cropped(images, soft_boxes(m)).float().square().mean().double()

    (gradient,) = torch.autograd.grad(value(masks), masks)
    strongest = gradient.abs().flatten().argmax()
    step = torch.zeros(masks.numel(), dtype=torch.float64)
    step[strongest] = 1e-3
    step = step.view_as(masks)
    difference = (value(masks + step) - value(masks - step)) / 2e-3
    assert difference.item() == pytest.approx(gradient.flatten()[strongest].item(), rel=0.1)


def test_half_precision_images_stay_so() -> None:
    images = torch.rand(1, 3, 8, 8).bfloat16()
    assert cropped(images, torch.tensor([[0, 0, 0.5, 0.5]])).dtype == torch.bfloat16
