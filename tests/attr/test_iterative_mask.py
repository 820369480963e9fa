"""The mask found by descent against the descent written out, and on images drawn for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust import IterativeMask, MaskDetails
from captum_robust.benchmark.passes import count_passes
from captum_robust.nn import CodeObjective, EvidenceRemoval, PaperObjective
from tests.networks import quantised

BLUR = EvidenceRemoval("blur")  # draws nothing


class OneConvolution(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(self.conv(x).relu(), 2)
        scores = 10 * self.head(features.flatten(1))
        return scores if offset is None else scores + offset


class BrightSquare(nn.Module):
    """Class 1: a window of 8×8 pixels is brighter than any colour of the evidence removal."""

    def forward(self, x: Tensor) -> Tensor:
        bright = nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), 8, stride=2)
        found = (bright - 0.68).relu().flatten(1).sum(dim=1)
        return torch.stack([torch.full_like(found, 2.0), 20 * found], dim=1)


@pytest.fixture
def net() -> OneConvolution:
    torch.manual_seed(0)
    return OneConvolution().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 36, 40, generator=torch.Generator().manual_seed(1))


def squares() -> tuple[Tensor, list[tuple[slice, slice]]]:
    """Grey images 48×48 with a white square of 14 pixels, each at another place."""
    places = [(slice(4, 18), slice(6, 20)), (slice(26, 40), slice(28, 42))]
    images = torch.full((2, 3, 48, 48), 0.4)
    for image, (rows, columns) in zip(images, places, strict=True):
        image[:, rows, columns] = 1.0
    return images, places


# The descent


def written_out(net: OneConvolution, x: Tensor, target: int, steps: int) -> Tensor:
    """The mask 1×1×H×W of one image, by torch's SGD on the authors' objective, blur only."""
    cells = torch.full((1, 2, 32, 32), 0.5, requires_grad=True)
    optimizer = torch.optim.SGD([cells], lr=0.1, momentum=0.9, nesterov=True)
    removed = BLUR.blurred(x)

    def mask() -> Tensor:
        a, b = cells[:, :1].abs(), cells[:, 1:].abs()
        return nn.functional.interpolate(a / (a + b + 0.001), x.shape[2:], mode="bilinear")

    def margin(scores: Tensor) -> Tensor:
        others = [s for i, s in enumerate(scores[0]) if i != target]
        return scores[0, target] - torch.stack(others).max()

    for _ in range(steps):
        m = mask()
        kept = margin(net(x * m + removed * (1 - m)))
        destroyed = margin(net(x * (1 - m) + removed * m))
        inner = m[0, 0]
        smooth = ((inner[1:] - inner[:-1]) ** 2).sum() + ((inner[:, 1:] - inner[:, :-1]) ** 2).sum()
        for edge in (inner[0], inner[-1], inner[:, 0], inner[:, -1]):
            smooth = smooth + 0.3 * (edge**2).sum()
        loss = (
            torch.relu(destroyed + 5)
            + 11 * ((m + 0.0005) ** 0.3).mean()
            + 0.5 * smooth / 2
            + 0.2 * torch.relu(1 - kept)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mask().detach()


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_steps_are_those_of_sgd_on_the_authors_objective(
    net: OneConvolution, x: Tensor, steps: int
) -> None:
    method = IterativeMask(net, removal=BLUR, image_noise=0, steps=steps)
    masks = method.attribute(x, 2)
    for i in range(len(x)):
        expected = written_out(net, x[i : i + 1], 2, steps)
        torch.testing.assert_close(
            masks[i : i + 1], expected.expand(1, 3, -1, -1), rtol=1e-4, atol=1e-5
        )


def test_without_momentum_it_is_plain_descent(net: OneConvolution, x: Tensor) -> None:
    """One step of plain descent with 1.9 times the rate is the first one of Nesterov's."""
    first = IterativeMask(net, removal=BLUR, image_noise=0, steps=1).attribute(x, 2)
    plain = IterativeMask(
        net, removal=BLUR, image_noise=0, steps=1, momentum=0, learning_rate=0.19
    ).attribute(x, 2)
    torch.testing.assert_close(first, plain)


@pytest.fixture(scope="module", params=[None, PaperObjective()], ids=["code", "paper"])
def found(request: pytest.FixtureRequest) -> tuple[Tensor, MaskDetails]:
    """Masks of the squares, and how they came about."""
    method = IterativeMask(
        BrightSquare(), objective=request.param, removal=EvidenceRemoval("color"), steps=100
    )
    result: tuple[Tensor, MaskDetails] = method.attribute(squares()[0], 1, return_details=True)
    return result


def test_the_mask_is_where_the_class_is(found: tuple[Tensor, MaskDetails]) -> None:
    masks = found[0]
    assert masks.shape == (2, 3, 48, 48)
    assert float(masks.min()) >= 0
    assert float(masks.max()) <= 1
    for mask, (rows, columns) in zip(masks, squares()[1], strict=True):
        inside = mask[0, rows, columns].mean()
        outside = (mask[0].sum() - mask[0, rows, columns].sum()) / (48 * 48 - 14 * 14)
        assert inside > 5 * outside
        top, left = divmod(int(mask[0].argmax()), 48)
        assert rows.start <= top < rows.stop
        assert columns.start <= left < columns.stop


def test_the_objective_falls_and_its_course_is_told(found: tuple[Tensor, MaskDetails]) -> None:
    details = found[1]
    assert details.explained_class.tolist() == [1, 1]
    assert details.objective.shape == (2, 101)
    assert (
        details.objective[:, -5:].mean(dim=1) < 0.7 * details.objective[:, :5].mean(dim=1)
    ).all()


def test_the_last_objective_is_that_of_the_returned_mask(net: OneConvolution, x: Tensor) -> None:
    masks, details = IterativeMask(net, removal=BLUR, image_noise=0, steps=3).attribute(
        x, 2, return_details=True
    )
    mask, removed = masks[:, :1], BLUR.blurred(x)
    terms = CodeObjective(area=11, smoothness=0.5, preserver=0.2)(
        mask,
        net(x * mask + removed * (1 - mask)),
        net(x * (1 - mask) + removed * mask),
        torch.tensor([2, 2, 2]),
    )
    torch.testing.assert_close(details.objective[:, -1], terms["total"].detach())


def test_a_step_costs_two_images_a_sample(net: OneConvolution, x: Tensor) -> None:
    method = IterativeMask(net, steps=4)
    with count_passes(net) as passes:
        method.attribute(x, 2)
    assert (passes.forward, passes.backward) == (2 * 3 * 4, 2 * 3 * 4)
    with count_passes(net) as passes:
        method.attribute(x)
    assert (passes.forward, passes.backward) == (2 * 3 * 4 + 3, 2 * 3 * 4)
    with count_passes(net) as passes:
        method.attribute(x, 2, return_details=True)
    assert (passes.forward, passes.backward) == (2 * 3 * 5, 2 * 3 * 4)


def test_without_a_target_each_sample_is_asked_for_its_prediction(
    net: OneConvolution, x: Tensor
) -> None:
    def by_brightness(x: Tensor) -> Tensor:
        brightness = x.mean(dim=(1, 2, 3))
        return (
            torch.stack([1 - brightness, brightness, 0 * brightness], dim=1) + 0.1 * net(x)[:, :1]
        )

    images = torch.cat([0.9 + 0.1 * x, 0.1 * x])
    predicted = torch.tensor([1, 1, 1, 0, 0, 0])
    method = IterativeMask(by_brightness, steps=3)
    masks, details = method.attribute(images, return_details=True)
    assert torch.equal(details.explained_class, predicted)
    torch.testing.assert_close(masks, method.attribute(images, predicted))


# What is drawn


class Recorder(OneConvolution):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        self.seen.append(x.detach().clone())
        return super().forward(x, offset)


def test_evidence_is_drawn_anew_for_both_images_of_a_step_and_alike_for_all_samples() -> None:
    net = Recorder()
    x = torch.zeros(3, 3, 32, 32)  # what is seen is a colour, times what the mask removes
    IterativeMask(net, removal=EvidenceRemoval("color", noise=0), image_noise=0).attribute(
        x, 0, steps=2
    )
    seen = torch.stack([s[:, :, 5, 5].reshape(2, 3, 3) for s in net.seen])  # step, copy, n, c
    assert torch.equal(seen, seen[:, :, :1].expand_as(seen))
    colors = seen[:, :, 0].reshape(4, 3)
    assert len(colors.unique(dim=0)) == 4
    kept_and_destroyed = colors[:2] / 0.5  # both keep about a half before the first step
    assert (kept_and_destroyed > 0.33).all()
    assert (kept_and_destroyed < 0.67).all()


def test_another_seed_draws_otherwise(net: OneConvolution, x: Tensor) -> None:
    results = [IterativeMask(net, steps=3, seed=seed).attribute(x, 1) for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_without_a_seed_it_draws_from_torchs_generator(net: OneConvolution, x: Tensor) -> None:
    method = IterativeMask(net, steps=3, seed=None)
    torch.manual_seed(5)
    first, second = method.attribute(x, 1), method.attribute(x, 1)
    torch.manual_seed(5)
    assert torch.equal(method.attribute(x, 1), first)
    assert not torch.equal(first, second)


# Batches, inputs and arguments


@pytest.mark.parametrize("size", [1, 2, 3])
def test_working_on_few_at_once_changes_nothing(net: OneConvolution, x: Tensor, size: int) -> None:
    offset = torch.tensor([[0.0, 3, 0, 0], [0, 0, 5, 0], [1, 0, 0, 0]])
    method = IterativeMask(net, steps=4)
    target = [0, 3, 1]
    whole, of_whole = method.attribute(x, target, offset, return_details=True)
    parts, of_parts = method.attribute(
        x, target, offset, internal_batch_size=size, return_details=True
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_parts.objective, of_whole.objective, rtol=1e-4, atol=1e-5)


def test_an_argument_as_long_as_a_part_of_the_batch_is_not_one_row_a_sample(x: Tensor) -> None:
    net = OneConvolution()
    shapes = []

    def scores(x: Tensor, per_channel: Tensor) -> Tensor:
        shapes.append(per_channel.shape)
        return net(x - per_channel[:, None, None])

    x = torch.cat([x, x])
    IterativeMask(scores, steps=1).attribute(
        x, 0, torch.tensor([0.1, 0.2, 0.3]), internal_batch_size=3
    )
    assert set(shapes) == {(3,)}


def test_an_input_that_does_not_count_is_masked_and_leaves_the_other_alone(
    net: OneConvolution, x: Tensor
) -> None:
    kwargs: dict[str, Any] = {"removal": BLUR, "image_noise": 0, "steps": 12}
    alone = IterativeMask(net, **kwargs).attribute(x, 2)
    both = IterativeMask(lambda x, _: net(x), **kwargs).attribute((x, x[:, :1, :20]), 2)
    assert isinstance(both, tuple)
    torch.testing.assert_close(both[0], alone)
    assert both[1].shape == (3, 1, 20, 40)
    assert (both[1].mean(dim=(1, 2, 3)) < 0.45).all()  # from .5: only area and smoothness count


def test_the_objective_of_two_inputs_holds_both_masks(net: OneConvolution, x: Tensor) -> None:
    kwargs: dict[str, Any] = {"removal": BLUR, "image_noise": 0, "steps": 1}
    _, alone = IterativeMask(net, **kwargs).attribute(x, 2, return_details=True)
    _, both = IterativeMask(lambda x, _: net(x), **kwargs).attribute((x, x), 2, return_details=True)
    half = torch.full((3, 1, 36, 40), 0.5 / 1.001)
    of_mask = CodeObjective(area=11, smoothness=0.5, preserver=0.2).of_mask(half)
    expected = alone.objective[:, 0] + of_mask["area"] + of_mask["smoothness"]
    torch.testing.assert_close(both.objective[:, 0], expected)


def test_a_model_that_views_its_features_gives_the_same(net: OneConvolution, x: Tensor) -> None:
    def viewed(x: Tensor) -> Tensor:
        features = net.conv(x).relu()
        if not features.is_contiguous():
            features.view(len(x), -1)  # raises: of a channels_last tensor it cannot be
        return 10 * net.head(nn.functional.adaptive_avg_pool2d(features, 2).flatten(1))

    with pytest.raises(RuntimeError, match="view size"):
        viewed(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(
        IterativeMask(viewed, steps=3).attribute(x), IterativeMask(net, steps=3).attribute(x)
    )


def test_half_precision_inputs_give_masks_of_that_type(net: OneConvolution, x: Tensor) -> None:
    masks = IterativeMask(net.bfloat16(), steps=3).attribute(x.bfloat16(), 1)
    assert masks.dtype == torch.bfloat16
    assert torch.isfinite(masks).all()


def test_double_precision_goes_through(net: OneConvolution, x: Tensor) -> None:
    masks = IterativeMask(net.double(), steps=3).attribute(x.double(), 1)
    assert masks.dtype == torch.float64


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"objective": "code"}, TypeError, "objective: expected a PaperObjective.*got str"),
        ({"removal": "blur"}, TypeError, "removal: expected an EvidenceRemoval, got str"),
        ({"image_noise": -1}, ValueError, "image_noise.*-1"),
        ({"image_noise": float("nan")}, ValueError, "image_noise"),
        ({"mask_size": 0}, ValueError, "mask_size.*0"),
        ({"steps": 0}, ValueError, "steps.*0"),
        ({"steps": 1.5}, ValueError, r"steps.*1\.5"),
        ({"learning_rate": 0}, ValueError, "learning_rate.*0"),
        ({"learning_rate": float("inf")}, ValueError, "learning_rate"),
        ({"momentum": 1}, ValueError, r"momentum.*\[0, 1\)"),
        ({"momentum": "much"}, ValueError, "momentum.*much"),
        ({"seed": -1}, ValueError, "seed.*-1"),
    ],
)
def test_a_bad_option_is_named(
    net: OneConvolution, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        IterativeMask(net, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "steps.*0"),
        ({"internal_batch_size": 0}, "internal_batch_size.*0"),
        ({"internal_batch_size": True}, "internal_batch_size.*True"),
    ],
)
def test_a_bad_option_of_a_call_is_named(
    net: OneConvolution, x: Tensor, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        IterativeMask(net).attribute(x, 1, **kwargs)


def test_inputs_that_are_no_images_are_named(net: OneConvolution, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images N×C×H×W, got \(3, 5\) at position 1"):
        IterativeMask(net).attribute((x, torch.rand(3, 5)), 1)
    with pytest.raises(ValueError, match=r"batches of 3 and 2"):
        IterativeMask(net).attribute((x, x[:2]), 1)
    with pytest.raises(TypeError, match="floating point"):
        IterativeMask(net).attribute((255 * x).byte(), 1)
    with pytest.raises(ValueError, match="no elements"):
        IterativeMask(net).attribute(x[:, :, :0], 1)


def test_scores_of_one_class_or_of_none_are_an_error(net: OneConvolution, x: Tensor) -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        IterativeMask(lambda x: net(x)[:, :1, None]).attribute(x, (0, 0))
    with pytest.raises(TypeError, match="expected a tensor of scores, got tuple"):
        IterativeMask(lambda x: (net(x),)).attribute(x, 0)
    with pytest.raises(ValueError, match="expected scores 6×K"):
        IterativeMask(lambda x: net(x)[:4]).attribute(x, 0)


def test_scores_without_a_gradient_are_an_error(net: OneConvolution, x: Tensor) -> None:
    def cut(x: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x)

    with pytest.raises(ValueError, match="do not depend on the inputs differentiably"):
        IterativeMask(cut).attribute(x, 0)


def test_a_quantised_head_is_an_error(net: OneConvolution, x: Tensor) -> None:
    """Its scores claim a graph, through which no gradient flows."""
    net.head = quantised(net.head)
    with pytest.raises(ValueError, match="do not depend on the inputs differentiably"):
        IterativeMask(net).attribute(x, 0)


def test_a_flat_sample_has_no_mask_and_is_counted(net: OneConvolution, x: Tensor) -> None:
    def gated(x: Tensor) -> Tensor:
        """Dead for what is darker than .4, and blurring makes nothing brighter."""
        opened = (x.amax(dim=(1, 2, 3)) - 0.4).relu()[:, None]
        return torch.tensor([1.0, 0.0, 0.0, 0.0]) + opened * net(x)

    x = torch.cat([0.3 * x[:1], x[1:]])
    method = IterativeMask(gated, removal=BLUR, image_noise=0, steps=3)
    for batch in (x, x[:1]):
        masks, details = method.attribute(batch, 0, return_details=True)
        assert masks.flatten(1).any(dim=1).tolist() == [False, True, True][: len(batch)]
        assert details.flat.tolist() == [True, False, False][: len(batch)]


def test_equal_scores_of_kept_and_destroyed_image_alone_are_no_error(
    net: OneConvolution, x: Tensor
) -> None:
    """At the first step both are half the image and half its blur."""
    mask = 0.5 / 1.001

    def nearly_flat(x: Tensor) -> Tensor:
        return (net(x) * 4).round() + 1e-20 * net(x)

    flat = torch.full_like(x, 0.5)
    assert 0.49 < mask < 0.5
    result = IterativeMask(nearly_flat, removal=BLUR, image_noise=0, steps=1).attribute(flat, 0)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_gradient_that_is_nan_names_the_sample(
    net: OneConvolution, x: Tensor, steps: int
) -> None:
    def steep(x: Tensor) -> Tensor:
        """The root has an infinite slope at the zeros that it is taken of."""
        rooted = (0 * x[2 :: len(x) // 2 if len(x) == 6 else 1]).sum(dim=(1, 2, 3), keepdim=True)
        extra = torch.zeros(len(x), 4)
        extra[2 :: 3 if len(x) == 6 else 1] = rooted.sqrt().reshape(-1, 1)
        return net(x) + extra

    with pytest.raises(ValueError, match="NaN or infinity in sample 2"):
        IterativeMask(steep, steps=steps).attribute(x, 0)
