"""ROAD: the imputed pixels solve the paper's equations, and Quantus counts the same."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust.metrics import functional as F
from tests.networks import Counted, drawn

SIZE = (24, 20)


def some_hole(share: float, n: int = 2) -> Tensor:
    return torch.rand(n, *SIZE, generator=torch.Generator().manual_seed(3)) < share


def solved(image: Tensor, hole: Tensor) -> Tensor:
    """The image C×H×W with the equations of its hole written down one by one, and solved."""
    height, width = hole.shape
    places = hole.nonzero().tolist()
    matrix = torch.zeros(len(places), len(places), dtype=torch.float64)
    right = torch.zeros(len(places), len(image), dtype=torch.float64)
    for row, (y, x) in enumerate(places):
        for dy, dx in [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]:
            v, u = y + dy, x + dx
            if not (0 <= v < height and 0 <= u < width):
                continue
            weight = 1 / 12 if dy and dx else 1 / 6
            matrix[row, row] += weight
            if hole[v, u]:
                matrix[row, places.index([v, u])] -= weight
            else:
                right[row] += weight * image[:, v, u].double()
    filled = image.double().clone()
    filled[:, hole] = torch.linalg.solve(matrix, right).T
    return filled


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputed_pixels_solve_the_equations_of_the_paper(share: float) -> None:
    images, hole = drawn(2, 3, *SIZE), some_hole(share)
    hole[1, 3:20, 2:17] = True
    imputed = F.linear_imputation(images, hole)
    for i in range(2):
        expected = solved(images[i], hole[i])
        torch.testing.assert_close(imputed[i].double(), expected, atol=2e-4, rtol=0)
    kept = ~hole[:, None].expand_as(images)
    assert imputed[kept].equal(images[kept])


def test_a_hole_of_nearly_all_of_a_photograph_takes_a_few_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The image is harmonic but for its border, so that what is imputed is known."""
    x = torch.arange(150.0)[None, None, None].expand(1, 1, 131, 150)
    hole = torch.ones(1, 131, 150, dtype=torch.bool)
    hole[..., [0, -1]] = False  # left and right are left; a ramp is between them
    module = importlib.import_module("captum_robust.metrics.functional.road")
    steps, dot = [], module._dot
    monkeypatch.setattr(module, "_dot", lambda a, b: steps.append(1) or dot(a, b))
    torch.testing.assert_close(F.linear_imputation(x, hole), x, atol=0.1, rtol=0)
    assert len(steps) / 4 < 30  # 3 at each step; without the coarser systems 250


def test_one_missing_pixel_is_the_weighted_mean_of_eight() -> None:
    image = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 50.0, 6.0], [7.0, 8.0, 10.0]]]])
    hole = torch.zeros(1, 3, 3, dtype=torch.bool)
    hole[0, 1, 1] = True
    middle = F.linear_imputation(image, hole)[0, 0, 1, 1].item()
    assert middle == pytest.approx((2 + 4 + 6 + 8) / 6 + (1 + 3 + 7 + 10) / 12)
    hole = hole.roll((-1, -1), (1, 2))  # in the corner, where three are left: 1/6, 1/6 and 1/12
    corner = F.linear_imputation(image, hole)[0, 0, 0, 0].item()
    assert corner == pytest.approx((2 / 6 + 4 / 6 + 50 / 12) / (5 / 12))


def test_neither_the_batch_nor_the_scale_of_pixels_moves_what_is_imputed() -> None:
    images, hole = drawn(3, 3, *SIZE), some_hole(0.6, 3)
    hole[2] = False
    hole[2, 1:23, 1:19] = True  # takes the most iterations
    together = F.linear_imputation(images, hole)
    for i in range(3):
        alone = F.linear_imputation(images[i : i + 1], hole[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)
    for scale in (1e-25, 1e25):
        scaled = F.linear_imputation(images * scale, hole) / scale
        torch.testing.assert_close(scaled, together, atol=1e-4, rtol=0)
    half = F.linear_imputation(images.bfloat16(), hole)
    assert half.dtype == torch.bfloat16


def net_of(channels: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(252, 4)
    ).eval()
    with torch.no_grad():
        net[3].weight.mul_(20)
    return net


def test_probabilities_are_those_of_the_imputed_images() -> None:
    net, images, maps = net_of(3), drawn(2, 3, *SIZE), torch.rand(2, *SIZE)
    classes = torch.tensor([1, 3])
    model = Counted(net)
    found = F.road(model, images, maps, classes, shares=[0.2, 0.5], noise=0.1, seed=4, batch_size=3)
    assert model.calls == [3, 3, 2]  # two images, two shares, two orders
    added = 0.1 * torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(4))
    for i in range(2):
        ranked = maps[i].flatten().argsort(descending=True)
        for column, count in enumerate((96, 240)):
            for of, gone in ((found.most, ranked[:count]), (found.least, ranked[-count:])):
                hole = torch.zeros(480, dtype=torch.bool)
                hole[gone] = True
                hole = hole.view(SIZE)
                x = solved(images[i], hole).float() + added * hole
                with torch.no_grad():
                    p = net(x[None]).softmax(dim=1)[0, classes[i]].item()
                assert of[i, column].item() == pytest.approx(p, abs=2e-3)
    combined = ((found.least - found.most).sum(dim=1) / 2 / 2).tolist()
    assert found.combined.tolist() == pytest.approx(combined)


def test_the_accuracies_are_those_of_quantus() -> None:
    """The share of images whose class survives is Quantus' ``ROAD`` at each percentage.

    Of its two orders Quantus has most relevant first only, and gives no probabilities. The images
    here have one channel: with more, its places of flattened channels are taken for places of the
    image. Its noise is drawn from NumPy's global state, so there is none here.
    """
    quantus = pytest.importorskip("quantus")
    net = net_of(1)
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(40, 1, *SIZE, generator=generator)
    maps = torch.rand(40, *SIZE, generator=generator)
    with torch.no_grad():
        classes = net(images).argmax(dim=1)
    metric = quantus.ROAD(
        noise=0.0, percentages=[10, 40, 70, 90], normalise=False, disable_warnings=True
    )
    batch: dict[str, Any] = {
        "x_batch": images.numpy(),
        "y_batch": classes.numpy(),
        "a_batch": maps[:, None].numpy(),
    }
    theirs = metric(model=net, **batch)
    ours = F.road(net, images, maps, classes, shares=[0.1, 0.4, 0.7, 0.9], noise=0)
    kept = ours.most_kept.double().mean(dim=0).tolist()
    assert kept == pytest.approx([float(v) for v in theirs.values()])
    assert min(kept) < 1


def test_the_imputer_is_that_of_pytorch_grad_cam() -> None:
    """Both solve the same system; that package's solver is direct, and its noise not seeded."""
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road")
    image, hole = drawn(1, 3, *SIZE), some_hole(0.7, 1)
    theirs = peer.NoisyLinearImputer(noise=0.0)(image[0], (~hole[0]).float())
    torch.testing.assert_close(F.linear_imputation(image, hole)[0], theirs, atol=2e-4, rtol=0)


def test_wrong_arguments_are_named() -> None:
    images, maps, classes = drawn(2, 3, *SIZE), torch.rand(2, *SIZE), torch.tensor([0, 1])
    for changes, message in (
        ({"shares": [0.5, 1.0]}, r"shares: expected a number in \(0, 1\), got 1.0"),
        ({"shares": []}, "shares: expected a list of numbers, at least one"),
        ({"noise": -1}, "noise: expected a number from 0"),
        ({"maps": maps[:1]}, "maps: expected 2×24×20, got 1×24×20"),
        ({"maps": maps * math.inf}, "maps: NaN or infinity"),
        ({"seed": 0.5}, "seed: expected a whole number"),
    ):
        given: dict[str, Any] = {"images": images, "maps": maps, "classes": classes, **changes}
        with pytest.raises(ValueError, match=message):
            F.road(net_of(3), **given)
    with pytest.raises(ValueError, match=r"a pixel left of each image, .* sample\(s\) \[1\]"):
        F.linear_imputation(images, torch.stack([maps[0] > 0.5, maps[1] > -1]))
    with pytest.raises(TypeError, match="removed: expected Boolean"):
        F.linear_imputation(images, maps)
