"""Certificates of the catalogue's methods: those of ``Certified``, and what hand work says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn

from captum_robust import draw
from captum_robust.attr import Certified
from captum_robust.benchmark import Certification
from captum_robust.catalog.certification import ABSTAIN, IN, OUT, Certificates
from captum_robust.catalog.methods import (
    Explanation,
    Method,
    build_methods,
    from_attribution,
    from_function,
)
from captum_robust.models import Classifier
from captum_robust.nn import load_denoiser

SIZE = 32


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 256, 4),
    )
    return Classifier(net, (0.5,) * 3, (0.5,) * 3, SIZE).eval()


def some_images(n: int = 2) -> Tensor:
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def clipped(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


def test_pixels_and_boxes_are_those_of_certified(model: Classifier) -> None:
    images, target = some_images(), torch.tensor([1, 2])
    how = Certification(0.1, 40, (0.02, 0.05), share=0.3)
    method = from_attribution(Saliency(model))
    found = how.of(model, method, images, target)
    first_pixels = [math.ceil(cell * SIZE / 28) for cell in range(28)]
    for one in found.at:
        shared: dict[str, Any] = {"sigma": 0.1, "n": 40, "radius": one.radius, "denoiser": clipped}
        pixels = Certified(Saliency(model), share=0.3, size=28, **shared)
        boxes = Certified(Saliency(model), threshold=("value", 0.2), box="median", **shared)
        maps = pixels.attribute(images, target)
        _, details = boxes.attribute(images, target, return_details=True)
        expected = (2 * maps[:, 0][:, first_pixels][:, :, first_pixels]).to(torch.uint8)
        assert torch.equal(one.cells, expected)
        assert {OUT, ABSTAIN} <= set(one.cells.unique().tolist())
        torch.testing.assert_close(one.inner, details.inner_box, equal_nan=True)
        torch.testing.assert_close(one.outer, details.outer_box, equal_nan=True)
        torch.testing.assert_close(found.box, details.box)
        certified = (expected != 1).double().mean(dim=(1, 2))
        assert one.share.tolist() == pytest.approx(certified.tolist())


def test_copies_go_through_the_denoiser_uncut(model: Classifier) -> None:
    images, target = some_images(), torch.tensor([1, 2])
    how = Certification(0.1, 40, (0.02,), denoiser=True)
    found = how.of(model, from_attribution(Saliency(model)), images, target)
    boxes = Certified(
        *(Saliency(model), 0.1, None, 40),
        **{"radius": 0.02, "threshold": ("value", 0.2), "box": "median"},
        denoiser=load_denoiser(),
    )
    _, details = boxes.attribute(images, target, return_details=True)
    torch.testing.assert_close(found.at[0].outer, details.outer_box, equal_nan=True)
    torch.testing.assert_close(found.box, details.box)
    assert how.facts()["denoiser"] is True
    assert "denoiser" not in Certification(0.1, 40, (0.02,)).facts()  # as runs of before have it


def test_a_box_that_sees_no_image_is_certified_without_a_pass(model: Classifier) -> None:
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    (method,) = build_methods(model, ["center_box"]).values()
    assert method.box is not None
    box = method.box((SIZE, SIZE)).tolist()
    found = Certification(0.25).of(model, method, some_images(), torch.zeros(2).long())
    assert [one.radius for one in found.at] == [0.1, 0.25, 0.5]
    for one in found.at:
        assert one.inner.tolist() == one.outer.tolist() == found.box.tolist()
        assert one.outer[1].tolist() == pytest.approx(box)
        assert one.share.tolist() == [1, 1]
        # Half of the image's area, as cells of 28×28.
        assert (one.cells == IN).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert passes == []


def of_first_pixel(images: Tensor, _: Tensor | None) -> Explanation:
    """A box that the method draws itself: wide where the first pixel is bright."""
    bright = images[:, 0, 0, 0] > 0.5 - 1.5 * 0.25
    width = torch.where(bright, 24.0, 8.0)
    boxes = torch.stack([torch.full_like(width, v) for v in (4.0, 4.0, 0.0, 28.0)], dim=1)
    boxes[:, 2] = width
    return Explanation(torch.zeros(len(images), SIZE, SIZE), boxes=boxes)


def test_a_side_is_proven_as_far_as_it_stays_and_no_farther(model: Classifier) -> None:
    images = torch.full((1, 3, SIZE, SIZE), 0.5)
    how = Certification(0.25, 600, (0.25, 0.35, 0.5))
    found = how.of(model, Method(of_first_pixel), images, torch.tensor([0]))
    # An attacker needs 1.5 σ = .375 to darken the pixel.
    near, _, far = found.at
    for box in (found.box, near.inner, near.outer):
        assert box.tolist() == [[4, 4, 24, 28]]
    assert far.inner.tolist() == [[4, 4, 8, 28]]
    assert far.outer.tolist() == [[4, 4, 24, 28]]
    # The pixels are those of the box: what it holds in any case is certified in.
    assert near.share.item() == 1
    assert far.share.item() < 1
    inside = (far.cells == IN)[0].nonzero()
    assert inside[:, 1].max() <= 8 * 28 / SIZE


def test_a_defended_method_explains_its_own_class_of_each_copy(model: Classifier) -> None:
    given: list[Tensor | None] = []

    def heat(images: Tensor, target: Tensor | None) -> Tensor:
        given.append(target)
        return images.mean(dim=1)

    Certification(0.25, 40, (0.1,)).of(model, from_function(heat), some_images(), None)
    assert set(given) == {None}


def test_copies_are_within_the_range_of_pixels_and_the_images_stay(model: Classifier) -> None:
    ranges: list[tuple[float, float]] = []

    def heat(images: Tensor, _: Tensor | None) -> Tensor:
        ranges.append((images.min().item(), images.max().item()))
        return images.mean(dim=1)

    images = some_images()
    Certification(0.5, 40, (0.1,)).of(model, from_function(heat), images, torch.zeros(2).long())
    assert set(ranges) == {(0, 1)}
    assert torch.equal(images, some_images())


def test_the_certificates_of_an_image_do_not_depend_on_its_batch(model: Classifier) -> None:
    images, target = some_images(3), torch.tensor([1, 2, 3])
    method = from_attribution(Saliency(model))

    def of(rows: slice) -> Certificates:
        how = Certification(0.1, 40, (0.03,))
        return how.of(model, method, images[rows], target[rows])

    whole, last = of(slice(0, 3)), of(slice(2, 3))
    assert torch.equal(whole.at[0].cells[2:], last.at[0].cells)
    torch.testing.assert_close(whole.at[0].outer[2:], last.at[0].outer, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "certify: expected a positive number"),
        ((-1.0,), "certify: expected a positive number"),
        ((math.nan,), "certify: expected a"),
        ((0.25, 0), "certify_samples: expected a whole number from 1"),
        ((0.25, 32), r"certify_samples: expected at least 33 for .* of 0\.1, got 32"),
        ((0.25, 100, ()), "certify_radii: expected at least one"),
        ((0.25, 100, (0.1, -1.0)), "certify_radii: expected a positive number"),
        ((0.01, 100, (0.1,)), r"certify_radii: 0\.1 is too far for noise of 0\.01"),
        ((0.25, 100, (0.1,), 1.0), "share: expected a number"),
        ((0.25, 100, (0.1,), 0.1, 1.0), "confidence: expected a number"),
    ],
)
def test_what_can_not_be_certified_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Certification(*arguments)


def test_the_least_number_of_copies_is_that_of_a_certificate() -> None:
    # (1 - confidence) / 28² is the chance that all n show a pixel of the probability τ = Φ(.4).
    tau = (1 + math.erf(0.4 / math.sqrt(2))) / 2
    assert tau**33 + (1 - tau) ** 33 <= 0.001 / 784 < tau**32
    assert Certification(0.25, 33, (0.1,)).least(0.1) == 33


def test_a_certificate_is_drawn_in_three_colours_over_grey_with_its_boxes() -> None:
    photo = np.full((40, 60, 3), 100, np.uint8)
    photo[..., 0] = 250  # red goes: colours mean certificates alone
    cells = torch.tensor([[0, 1], [2, 2]])
    drawn = draw.draw_certificate(photo, cells)
    corners = drawn[5, 5], drawn[5, 50], drawn[30, 5]
    for corner, color in zip(corners, draw.CERTIFIED_COLORS.values(), strict=True):
        grey = int(0.299 * 250 + 0.701 * 100 + 0.5)
        expected = 0.38 * grey + 0.62 * np.array(color)
        assert corner.tolist() == pytest.approx(expected.tolist(), abs=1)
    lightness = [int(corner.astype(int).sum()) for corner in corners]
    assert lightness[0] < lightness[2] < lightness[1]  # told apart without colours
    boxed = draw.draw_certificate(photo, cells, [20, 10, 40, 30], [10, 5, 50, 35])
    assert boxed[20, 22].tolist() == list(draw.INNER_COLOR)
    assert boxed[20, 12].tolist() == list(draw.OUTER_COLOR)
    assert (photo == photo[0, 0]).all()


@pytest.mark.parametrize("cells", [torch.full((2, 2), 3), torch.zeros(2), torch.rand(2, 2)])
def test_only_certificates_are_drawn(cells: Tensor) -> None:
    with pytest.raises(ValueError, match="cells: expected"):
        draw.draw_certificate(np.zeros((8, 8, 3), np.uint8), cells)
