"""Smallest sufficient and smallest destroying regions, of images whose answer can be counted."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_robust.metrics.functional import (
    REGION_AREAS,
    smallest_destroying_region,
    smallest_sufficient_region,
)
from captum_robust.nn import EvidenceRemoval

SIDE = 10


def white_pixels(x: torch.Tensor) -> torch.Tensor:
    """Class 1 wins with more than 12 white pixels, by a margin of the count."""
    count = (x[:, 0] > 0.9).flatten(1).sum(dim=1).float()
    return torch.stack([torch.full_like(count, 12.5), count], dim=1)


def black(x: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    return torch.zeros_like(x)


def with_block(side: int = 5) -> torch.Tensor:
    """A white square of ``side``² of 100 pixels, on black."""
    image = torch.zeros(1, 3, SIDE, SIDE)
    image[:, :, 2 : 2 + side, 3 : 3 + side] = 1
    return image


ONE = torch.tensor([1])


def test_the_smallest_regions_by_counting_pixels():
    image = with_block()  # 25 white pixels; more than 12 are needed
    heat = image[:, 0]
    # 10 pixels are not enough, 15 are.
    assert smallest_sufficient_region(
        white_pixels, image, heat, ONE, removal=black
    ).item() == pytest.approx(0.15)
    # Without 10 of 25 there are 15 left; without 15, 10.
    assert smallest_destroying_region(
        white_pixels, image, heat, ONE, removal=black
    ).item() == pytest.approx(0.15)
    # A map that points away shows 75 black pixels first: 80 + 5 white ones, 90: 15.
    away = 1 - heat
    assert smallest_sufficient_region(
        white_pixels, image, away, ONE, removal=black
    ).item() == pytest.approx(0.9)
    assert smallest_destroying_region(
        white_pixels, image, away, ONE, removal=black
    ).item() == pytest.approx(0.9)


def test_a_model_that_normalises_in_place_does_not_darken_the_image():
    image = with_block()
    before = image.clone()

    def in_place(x):
        x.mul_(0.5)  # seen twice, no pixel is white any more
        return white_pixels(2 * x)

    for check in (smallest_sufficient_region, smallest_destroying_region):
        for share in (None, 1.0):
            # As above: 10 of 100 pixels are not enough, and 15 are. With a share the probability
            # of the whole image is wanted: all 25 pixels, and the first white one that is missing.
            area = check(in_place, image, image[:, 0], ONE, removal=black, share=share)
            everything = 0.25 if check is smallest_sufficient_region else REGION_AREAS[0]
            assert area.item() == pytest.approx(0.15 if share is None else everything)
    assert torch.equal(image, before)


def test_what_no_area_gives_is_nan():
    small = with_block(3)  # 9 white pixels: class 1 is not there at all
    heat = small[:, 0]
    for check in (smallest_sufficient_region, smallest_destroying_region):
        assert check(white_pixels, small, heat, ONE, removal=black).isnan().all()

    def always(x):
        return torch.tensor([0.0, 1.0]).expand(len(x), 2)

    assert smallest_destroying_region(always, small, heat, ONE, removal=black).isnan().all()
    assert smallest_sufficient_region(always, small, heat, ONE, removal=black).item() == (
        pytest.approx(REGION_AREAS[0])
    )


def test_a_share_of_the_probability_is_another_question():
    image = with_block(4)  # 16 white pixels: p = sigmoid(3.5) = .9707
    heat = image[:, 0]
    # p with k pixels: sigmoid(k - 12.5). Half of .9707 is .485: 13 pixels (.62), not 12 (.38).
    options = {"areas": (0.12, 0.13, 0.16, 1.0), "removal": black}
    found = smallest_sufficient_region(white_pixels, image, heat, ONE, share=0.5, **options)
    assert found.item() == pytest.approx(0.13)
    found = smallest_sufficient_region(white_pixels, image, heat, ONE, share=0.99, **options)
    assert found.item() == pytest.approx(0.16)
    # Below half of it once 4 of the 16 are gone.
    options["areas"] = (0.03, 0.04, 0.05)
    found = smallest_destroying_region(white_pixels, image, heat, ONE, share=0.5, **options)
    assert found.item() == pytest.approx(0.04)


def test_the_default_removal_is_a_gaussian_blur():
    image = with_block()
    seen = []

    def spy(x):
        seen.append(x.clone())
        return white_pixels(x)

    # sigma 10 of 224 is .446 of 10 pixels; torchvision's blur of a wide kernel is the reference
    from torchvision.transforms.functional import gaussian_blur

    smallest_sufficient_region(spy, image, image[:, 0], ONE, areas=(0.01,))
    expected = gaussian_blur(F.pad(image, (5,) * 4), 9, 10 * SIDE / 224)[:, :, 5:-5, 5:-5]
    expected[0, :, 2, 3] = 1  # the first of the largest pixels is shown
    torch.testing.assert_close(seen[0], expected, atol=1e-3, rtol=0)


def test_what_is_drawn_is_drawn_once_an_image_and_follows_the_seed():
    def noise(x, generator):
        return torch.rand(x.shape, generator=generator)

    seen = []

    def spy(x):
        seen.append(x.clone())
        return torch.tensor([0.0, -1.0]).expand(len(x), 2)

    images = with_block().repeat(2, 1, 1, 1)
    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        smallest_sufficient_region(
            spy,
            images,
            images[:, 0],
            torch.tensor([1, 1]),
            areas=(0.3, 0.4),
            removal=noise,
            seed=seed,
        )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[4])
    assert not torch.equal(seen[0][0], seen[0][1])
    outside = seen[0] == seen[1]  # of the two steps only the pixels in between differ
    assert (~outside).any(dim=1).flatten(1).sum(dim=1).tolist() == [10, 10]


def test_the_evidence_removal_of_the_masking_networks_is_one():
    image = with_block()
    options = {"removal": EvidenceRemoval("color", noise=0)}  # grey is not white
    found = smallest_sufficient_region(white_pixels, image, image[:, 0], ONE, **options)
    assert found.item() == pytest.approx(0.15)


def test_a_batch_gives_what_a_plain_loop_gives():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(320, 3)).eval()
    n = 12
    g = torch.Generator().manual_seed(1)
    images, maps = torch.rand(n, 3, SIDE, SIDE, generator=g), torch.rand(n, SIDE, SIDE, generator=g)
    maps = (4 * maps).round()  # many ties
    classes = net(images).argmax(dim=1)
    classes[::4] = (classes[::4] + 1) % 3
    removed = torch.rand(n, 3, SIDE, SIDE, generator=g)
    expected = {True: [], False: []}
    for i in range(n):
        ranked = sorted(range(SIDE * SIDE), key=lambda p, i=i: (-maps[i].flatten()[p].item(), p))
        for destroys, found in expected.items():
            answer = math.nan
            with torch.no_grad():
                if not destroys or net(images[i : i + 1]).argmax() == classes[i]:
                    for area in reversed(REGION_AREAS):
                        mask = torch.zeros(SIDE * SIDE)
                        mask[ranked[: round(area * SIDE * SIDE)]] = 1
                        mask = mask.view(SIDE, SIDE)
                        mask = 1 - mask if destroys else mask
                        x = mask * images[i] + (1 - mask) * removed[i]
                        if (net(x[None]).argmax() == classes[i]) != destroys:
                            answer = area
            found.append(answer)
    for size in (64, 5):
        options = {"removal": lambda x, _: removed, "batch_size": size}
        sufficient = smallest_sufficient_region(net, images, maps, classes, **options)
        destroying = smallest_destroying_region(net, images, maps, classes, **options)
        assert sufficient.tolist() == pytest.approx(expected[False], nan_ok=True)
        assert destroying.tolist() == pytest.approx(expected[True], nan_ok=True)
    assert len(set(sufficient[~sufficient.isnan()].tolist())) > 2  # not all the same


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.rand(3, 4)}, ValueError, "images: expected N×C×H×W"),
        ({"maps": torch.rand(1, 4, 4)}, ValueError, "maps: expected 1×10×10, got 1×4×4"),
        ({"maps": torch.full((1, SIDE, SIDE), math.inf)}, ValueError, "NaN or infinity"),
        ({"maps": None}, TypeError, "maps: expected a tensor"),
        ({"classes": torch.tensor([1, 1])}, ValueError, "classes: expected 1 indices"),
        ({"areas": ()}, ValueError, "areas: expected shares in"),
        ({"areas": (0.5, 0.2)}, ValueError, "areas: expected shares in"),
        ({"areas": (0.0, 0.2)}, ValueError, "areas: expected shares in"),
        ({"areas": (0.5, 1.2)}, ValueError, "areas: expected shares in"),
        ({"share": 0.0}, ValueError, r"share: expected a number in \(0, 1\]"),
        ({"share": "half"}, ValueError, r"share: expected a number in \(0, 1\]"),
        ({"batch_size": 1.5}, ValueError, "batch_size: expected a whole number from 1"),
        ({"removal": lambda x, g: x[0]}, ValueError, "images from removal: expected 1×3"),
    ],
)
@pytest.mark.parametrize("check", [smallest_sufficient_region, smallest_destroying_region])
def test_wrong_arguments_are_named(check, changes, error, message):
    image = with_block()
    arguments = {"images": image, "maps": image[:, 0], "classes": ONE, **changes}
    with pytest.raises(error, match=message):
        check(white_pixels, **arguments)


def test_an_empty_batch_gives_nothing():
    empty = torch.zeros(0, 3, SIDE, SIDE)
    none = torch.zeros(0, dtype=torch.int64)
    assert smallest_sufficient_region(white_pixels, empty, empty[:, 0], none).shape == (0,)
