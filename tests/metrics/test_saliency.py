"""The saliency metric: crops, areas, probabilities, and thresholds chosen on other images."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from captum_robust.metrics import SaliencyMetric
from captum_robust.metrics.functional import (
    SALIENCY_THRESHOLDS,
    crop_and_resize,
    crop_scores,
    mask_to_box,
    saliency_boxes,
    saliency_metric,
    saliency_of,
    split_folds,
    threshold,
    tightest_box,
    tuned_saliency,
)

N = 7


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 5, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()


@pytest.fixture
def net() -> nn.Module:
    net = tiny_net()
    net(torch.rand(1, 3, 24, 20))
    return net


def some_images(n: int = N, size: tuple[int, int] = (24, 20)) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(1))


def some_maps(n: int = N, size: tuple[int, int] = (24, 20)) -> torch.Tensor:
    coarse = torch.rand(n, 1, 5, 5, generator=torch.Generator().manual_seed(2)) ** 4
    return F.interpolate(coarse, size, mode="bilinear")[:, 0]


def constant(*probabilities: float):
    """A classifier that gives every image these probabilities."""
    scores = torch.tensor(probabilities).clamp(min=1e-30).log()
    return lambda x: scores.expand(len(x), -1)


def by_hand(net, images, boxes, classes, size):
    """Sliced, resized by torch and classified one image at a time."""
    values = []
    for image, box, number in zip(images, boxes, classes, strict=True):
        x0, y0, x1, y1 = (int(v) for v in box)
        crop = F.interpolate(
            image[None, :, y0:y1, x0:x1], size, mode="bilinear", align_corners=False, antialias=True
        )
        with torch.no_grad():
            p = net(crop)[0].softmax(dim=0)[number]
        area = (x1 - x0) * (y1 - y0) / image[0].numel()
        values.append(math.log(max(area, 0.05)) - math.log(p))
    return values


@pytest.mark.parametrize(
    ("box", "p", "expected"),
    [
        # half of each side: log .25 - log .8
        ((2, 2, 6, 6), 0.8, math.log(0.25) - math.log(0.8)),
        # the whole image: -log p
        ((0, 0, 8, 8), 0.5, math.log(2)),
        # one pixel of 64 counts as a twentieth, and with p = 1 that is the least there is
        ((3, 3, 4, 4), 1.0, math.log(0.05)),
    ],
)
def test_the_metric_by_hand(box, p, expected):
    images = torch.rand(1, 3, 8, 8)
    boxes = torch.tensor([box], dtype=torch.float32)
    model = constant(p, 1 - p)
    scores = saliency_metric(model, images, boxes, torch.tensor([0]))
    assert scores.metric.item() == pytest.approx(expected, abs=1e-6)
    assert scores.probability.item() == pytest.approx(p)
    x0, y0, x1, y1 = box
    assert scores.area.item() == (x1 - x0) * (y1 - y0) / 64
    mask = torch.zeros(1, 8, 8)
    mask[0, y0:y1, x0:x1] = 0.9
    from_mask = saliency_metric(model, images, mask, torch.tensor([0]))
    assert from_mask.metric.item() == scores.metric.item()


def test_an_improbable_class_costs_without_limit_and_stays_finite():
    def model(x):  # the probability, e^-200, is no float32
        return torch.tensor([0.0, 200.0]).expand(len(x), 2)

    whole = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    scores = saliency_metric(model, torch.rand(1, 3, 8, 8), whole, torch.tensor([0]))
    assert scores.metric.item() == pytest.approx(200)
    assert scores.probability.item() == 0


def test_the_tightest_box_holds_every_pixel_above_the_threshold():
    mask = torch.zeros(3, 6, 9)
    mask[0, 1, 2] = mask[0, 4, 7] = 0.51  # two components: the box holds both
    mask[1] = 0.5  # not above
    assert tightest_box(mask).tolist() == [[2, 1, 8, 5], [0, 0, 9, 6], [0, 0, 9, 6]]
    assert tightest_box(mask[:1] > 0).tolist() == [[2, 1, 8, 5]]


@pytest.mark.parametrize("size", [(24, 20), (7, 9), (40, 31), (1, 1)])
def test_crops_are_slices_resized_by_torch(size):
    images = some_images()
    boxes = torch.tensor(
        [
            [0, 0, 20, 24],
            [3, 5, 17, 9],
            [19, 23, 20, 24],
            [0, 0, 1, 24],
            [4, 2, 9, 22],
            [0, 11, 20, 12],
            [1, 1, 19, 23],
        ]
    ).float()
    crops = crop_and_resize(images, boxes, size)
    for image, box, crop in zip(images, boxes.int().tolist(), crops, strict=True):
        x0, y0, x1, y1 = box
        sliced = image[None, :, y0:y1, x0:x1]
        expected = F.interpolate(
            sliced, size, mode="bilinear", align_corners=False, antialias=True
        )[0]
        torch.testing.assert_close(crop, expected, atol=2e-6, rtol=0)


def test_a_crop_made_larger_is_the_same_without_antialiasing():
    image, box = some_images(1), torch.tensor([[3.0, 5.0, 12.0, 16.0]])
    plain = F.interpolate(image[:, :, 5:16, 3:12], (24, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(crop_and_resize(image, box, (24, 20)), plain, atol=2e-6, rtol=0)


def test_of_fractions_of_pixels_those_are_cut_whose_centre_the_box_holds():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    near = crop_and_resize(image, torch.tensor([[0.6, 1.5, 2.4, 3.4]]), (2, 1))
    assert near.flatten().tolist() == [5, 9]  # column 1, rows 1 and 2
    thin = crop_and_resize(image, torch.tensor([[2.6, 0.6, 3.4, 0.7]]), (1, 1))
    assert thin.item() == 3  # the pixel that holds its middle
    point = crop_and_resize(image, torch.tensor([[3.9, 3.9, 4.5, 4.5]]), (1, 1))
    assert point.item() == 15


def test_half_precision_crops_are_those_of_float32():
    images, boxes = some_images(2), torch.tensor([[3.0, 5.0, 12.0, 16.0]] * 2)
    expected = crop_and_resize(images.bfloat16().float(), boxes, (24, 20)).bfloat16()
    assert torch.equal(crop_and_resize(images.bfloat16(), boxes, (24, 20)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = crop_and_resize(images, boxes, (24, 20))
    assert torch.equal(inside, crop_and_resize(images, boxes, (24, 20)))


def test_the_metric_is_that_of_a_plain_loop(net):
    images, masks = some_images(), some_maps()
    masks[4] = 0  # empty: the whole image
    classes = torch.arange(N) % 4
    scores = saliency_metric(net, images, masks, classes, threshold=0.3, size=(24, 20))
    boxes = mask_to_box(masks > 0.3)
    assert boxes[4].tolist() == [0, 0, 20, 24]
    assert len(boxes.unique(dim=0)) > 3
    expected = by_hand(net, images, boxes, classes.tolist(), (24, 20))
    assert scores.metric.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("strategy", "alpha"), [("value", 0.6), ("mean", 2.0), ("energy", 0.5)])
def test_maps_of_any_scale_take_a_threshold_of_a_family(net, strategy, alpha):
    images, maps, classes = some_images(), 100 * some_maps() + 3, torch.zeros(N, dtype=torch.long)
    if strategy == "mean":
        maps = maps - 3
    options = {"threshold": alpha, "strategy": strategy, "size": (24, 20)}
    boxes = mask_to_box(threshold(maps, strategy, alpha))
    expected = by_hand(net, images, boxes, classes.tolist(), (24, 20))
    scores = saliency_metric(net, images, maps, classes, **options)
    assert scores.metric.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_mask_of_another_size_cuts_the_same_part(net):
    images, classes = some_images(), torch.zeros(N, dtype=torch.long)
    small = (torch.rand(N, 12, 10, generator=torch.Generator().manual_seed(3)) > 0.97).float()
    large = small.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    one = saliency_metric(net, images, small, classes)
    two = saliency_metric(net, images, large, classes)
    assert torch.equal(one.metric, two.metric)


def test_large_images_are_cropped_before_they_are_made_small(net):
    large, classes = some_images(2, (96, 80)), torch.tensor([1, 3])
    boxes = torch.tensor([[10, 20, 70, 90], [0, 0, 30, 40]]).float()
    scores = saliency_metric(net, large, boxes, classes, size=(24, 20))
    expected = by_hand(net, large, boxes, classes.tolist(), (24, 20))
    assert scores.metric.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_models_own_size_is_taken(net):
    net.input_size = (24, 20)
    large, classes = some_images(2, (96, 80)), torch.tensor([1, 3])
    boxes = torch.tensor([[10, 20, 70, 90], [0, 0, 30, 40]]).float()
    scores = saliency_metric(net, large, boxes, classes)
    expected = by_hand(net, large, boxes, classes.tolist(), (24, 20))
    assert scores.metric.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_batch_gives_what_its_images_give_one_by_one(net):
    images, masks, classes = some_images(), some_maps(), torch.arange(N) % 4
    together = saliency_metric(net, images, masks, classes, threshold=0.3)
    for i in range(N):
        alone = saliency_metric(
            net, images[i : i + 1], masks[i : i + 1], classes[i : i + 1], threshold=0.3
        )
        torch.testing.assert_close(alone.metric[0], together.metric[i])
    few = saliency_metric(net, images, masks, classes, threshold=0.3, batch_size=2)
    torch.testing.assert_close(few.metric, together.metric)


def test_boxes_that_cut_the_same_pixels_are_classified_once(net):
    seen = []

    def counted(x):
        seen.append(len(x))
        return net(x)

    images, classes = some_images(2), torch.tensor([0, 1])
    one, other = [1.0, 2.0, 9.0, 20.0], [1.2, 2.2, 9.2, 20.2]
    boxes = torch.tensor([[one, other, [0.0, 0.0, 20.0, 24.0]], [one, one, one]])
    area, log_p = crop_scores(counted, images, boxes, classes)
    assert sum(seen) == 3
    assert area.shape == log_p.shape == (2, 3)
    assert log_p[0, 0] == log_p[0, 1]
    assert log_p[0, 0] != log_p[0, 2]
    for column in range(3):
        expected = by_hand(net, images, boxes[:, column].round(), [0, 1], (24, 20))
        found = saliency_of(area[:, column], log_p[:, column])
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_boxes_at_all_thresholds_hold_all_pixels_above_them():
    maps = some_maps() - 0.01
    boxes = saliency_boxes(maps)
    assert boxes.shape == (N, sum(map(len, SALIENCY_THRESHOLDS.values())), 4)
    column = 0
    for family, alphas in SALIENCY_THRESHOLDS.items():
        for alpha in alphas:
            assert torch.equal(boxes[:, column], mask_to_box(threshold(maps, family, alpha)))
            column += 1


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(
        nn.Flatten(), nn.LazyBatchNorm1d(), nn.Dropout(0.5), nn.LazyLinear(3)
    ).eval()
    images, classes = some_images(), torch.zeros(N, dtype=torch.long)
    net(images)
    expected = saliency_metric(net, images, some_maps(), classes)
    net.train()
    net[2].eval()
    found = saliency_metric(net, images, some_maps(), classes)
    assert torch.equal(expected.metric, found.metric)
    assert [m.training for m in net] == [True, True, False, True]
    assert int(net[1].num_batches_tracked) == 0
    assert not found.metric.requires_grad


def test_each_half_is_scored_with_the_threshold_of_the_other():
    values = torch.tensor([[0.0, 3.0], [1.0, 3.0], [5.0, 2.0], [6.0, 1.0]])
    folds = torch.tensor([0, 0, 1, 1])
    tuned = tuned_saliency(values, folds=folds)
    assert tuned.chosen == (1, 0)
    assert tuned.per_sample.tolist() == [3, 3, 5, 6]
    assert tuned.columns.tolist() == [1, 1, 0, 0]
    assert not tuned.oracle
    oracle = tuned_saliency(values, oracle=True)
    assert oracle.chosen == (1,)  # means 3 and 2.25
    assert oracle.per_sample.tolist() == [3, 3, 2, 1]
    assert oracle.oracle
    ids = [f"{i}.png" for i in range(4)]
    by_id = tuned_saliency(values, ids=ids, seed=1)
    assert torch.equal(
        by_id.per_sample, tuned_saliency(values, folds=split_folds(ids, 1)).per_sample
    )


def test_a_sample_that_is_not_scored_chooses_nothing():
    values = torch.tensor([[-99.0, math.nan], [1.0, 0.0], [0.0, 1.0]])
    tuned = tuned_saliency(values, folds=torch.tensor([0, 0, 1]))
    assert tuned.per_sample.isnan().tolist() == [True, False, False]
    assert tuned.per_sample[1:].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"folds: expected scored samples .* got \[0, 1\]"):
        tuned_saliency(values[[0, 2]], folds=torch.tensor([0, 1]))
    # One threshold needs no halves.
    assert tuned_saliency(values[1:, :1], folds=torch.tensor([0, 0])).per_sample.tolist() == [1, 0]


IDS = [f"{i}.jpg" for i in range(N)]


@pytest.mark.parametrize("split", [1, 3, N])
def test_the_class_gives_the_mean_of_the_function_whatever_the_batches(net, split):
    images, masks, classes = some_images(), some_maps(), torch.arange(N) % 4
    fixed = SaliencyMetric(0.3)
    chosen = SaliencyMetric(thresholds=SALIENCY_THRESHOLDS, seed=3)
    oracle = SaliencyMetric(thresholds=SALIENCY_THRESHOLDS, oracle=True)
    assert sorted(split_folds(IDS, 3).bincount(minlength=2).tolist())[0] > 1
    order = torch.randperm(N, generator=torch.Generator().manual_seed(split))
    for part in order.split(split):
        batch = (net, images[part], masks[part], classes[part])
        fixed.update(*batch)
        chosen.update(*batch, ids=[IDS[i] for i in part])
        oracle.update(*batch)
    boxes = tightest_box(masks, 0.3)
    expected = sum(by_hand(net, images, boxes, classes.tolist(), (24, 20))) / N
    assert fixed.compute().item() == pytest.approx(expected, abs=1e-5)
    values = saliency_of(*crop_scores(net, images, saliency_boxes(masks), classes))
    tuned = tuned_saliency(values, ids=IDS, seed=3).per_sample.mean().item()
    assert chosen.compute().item() == pytest.approx(tuned, abs=2e-6)
    best = tuned_saliency(values, oracle=True).per_sample.mean().item()
    assert oracle.compute().item() == pytest.approx(best, abs=2e-6)
    assert best <= tuned


def test_the_class_without_images_or_with_one_half_has_no_value(net):
    metric = SaliencyMetric(thresholds={"value": (0.5,), "mean": (1.0,)})
    with pytest.warns(UserWarning, match="before the"):
        assert metric.compute().isnan()
    one = (net, some_images(1), some_maps(1), torch.tensor([0]), IDS[:1])
    assert metric(*one).isnan()
    assert not metric.higher_is_better
    with pytest.raises(ValueError, match="ids: expected those of the images"):
        metric.update(*one[:4])
    with pytest.raises(ValueError, match="ids: expected one for each of 1 samples, got 2"):
        metric.update(*one[:4], IDS[:2])
    with pytest.raises(ValueError, match="masks: expected 1×24×20, got 1×12×10"):
        metric.update(net, some_images(1), some_maps(1, (12, 10)), torch.tensor([0]), IDS[:1])


def test_metrics_with_other_thresholds_share_no_state_in_a_collection(net):
    images, masks, classes = some_images(), some_maps(), torch.arange(N) % 4
    both = MetricCollection({"a": SaliencyMetric(0.3), "b": SaliencyMetric(0.31)})
    both.update(net, images[:1], torch.ones(1, 24, 20), classes[:1])  # the same value for both
    both.update(net, images[1:], masks[1:], classes[1:])
    masks = torch.cat([torch.ones(1, 24, 20), masks[1:]])
    expected = saliency_metric(net, images, masks, classes, threshold=0.31).metric.mean()
    assert both.compute()["b"].item() == pytest.approx(expected.item(), abs=2e-6)


def metric_of(net, **changes):
    arguments = {
        "model": net,
        "images": some_images(2),
        "masks": some_maps(2),
        "classes": torch.tensor([0, 1]),
        **changes,
    }
    return saliency_metric(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": None}, TypeError, "images: expected a tensor N×C×H×W"),
        ({"images": torch.ones(2, 3, 24, 20, dtype=torch.uint8)}, TypeError, "floating point"),
        ({"images": torch.rand(3, 24, 20)}, ValueError, "N×C×H×W"),
        ({"masks": [1]}, TypeError, "masks: expected a tensor .*, got list"),
        ({"masks": some_maps(3)}, ValueError, "masks: expected 2×h×w, or boxes 2×4"),
        ({"masks": torch.rand(2, 3)}, ValueError, r"or boxes 2×4, got \(2, 3\)"),
        ({"masks": some_maps(2) * math.nan}, ValueError, "masks: NaN or infinity in sample 0"),
        ({"masks": torch.tensor([[0, 0, 1, 1], [5, 5, 4, 9.0]])}, ValueError, r"sample\(s\) \[1"),
        ({"masks": torch.tensor([[20, 0, 30, 1], [5, 5, 6, 9.0]])}, ValueError, r"sample\(s\) \[0"),
        ({"masks": torch.full((2, 4), math.nan)}, ValueError, r"sample\(s\) \[0, 1"),
        ({"classes": [0, 1]}, TypeError, "classes: expected a tensor"),
        ({"classes": torch.tensor([0.0, 1.0])}, ValueError, "2 indices"),
        ({"classes": torch.tensor([0])}, ValueError, "2 indices"),
        ({"classes": torch.tensor([0, 4])}, ValueError, "classes: expected numbers from 0 to 3"),
        ({"classes": torch.tensor([-1, 0])}, ValueError, "classes: expected numbers from 0 to 3"),
        ({"threshold": math.nan}, ValueError, "threshold: expected a finite number, got nan"),
        ({"threshold": "half"}, ValueError, "threshold: expected a finite number, got 'half'"),
        ({"strategy": "median"}, ValueError, "strategy: expected one of"),
        (
            {"strategy": "value", "threshold": 2.0},
            ValueError,
            r"threshold of strategy 'value': expected a number in \[0, 1\]",
        ),
        ({"size": (0, 4)}, ValueError, "size: expected"),
        ({"batch_size": 0}, ValueError, "batch_size: expected"),
        ({"model": lambda x: x}, ValueError, "scores of the model: expected 2×K"),
        (
            {"model": lambda x: torch.tensor([[0.0, 1.0], [math.nan, 0.0]])},
            ValueError,
            r"model: expected finite scores, .* sample\(s\) \[1\]",
        ),
    ],
)
def test_wrong_arguments_are_named(net, changes, error, message):
    with pytest.raises(error, match=message):
        metric_of(net, **changes)


def test_wrong_thresholds_are_named():
    maps = some_maps(1)
    with pytest.raises(ValueError, match=r"thresholds of 'value': expected one of .* got 0\.33"):
        saliency_boxes(maps, {"value": (0.33,)})
    with pytest.raises(ValueError, match="thresholds: expected one of"):
        saliency_boxes(maps, {"median": (0.5,)})
    for empty in ({}, {"value": ()}):
        with pytest.raises(ValueError, match="at least one"):
            SaliencyMetric(thresholds=empty)
    with pytest.raises(
        ValueError, match=r"threshold of strategy 'value': expected a number in \[0, 1\]"
    ):
        SaliencyMetric(1.5, "value")
    with pytest.raises(ValueError, match="threshold: expected a finite number"):
        SaliencyMetric(math.inf)
    for values, message in (
        (torch.rand(3), "N×A"),
        (torch.rand(3, 0), "A from 1"),
        (torch.full((2, 2), math.inf), "infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned_saliency(values)
    with pytest.raises(TypeError, match="values: expected a tensor"):
        tuned_saliency([[1.0]])
    with pytest.raises(ValueError, match="ids: expected one for each of 2 samples, got 1"):
        tuned_saliency(torch.rand(2, 2), ids=["a"])
    with pytest.raises(ValueError, match="zeros and ones"):
        tuned_saliency(torch.rand(2, 2), folds=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="boxes: expected 1×4, got 1×1×4"):
        crop_and_resize(some_images(1), torch.rand(1, 1, 4), (2, 2))
    with pytest.raises(TypeError, match="boxes: expected a tensor 1×4, got list"):
        crop_and_resize(some_images(1), [[0, 0, 1, 1]], (2, 2))
    with pytest.raises(ValueError, match="boxes: expected 1×A×4, got 1×4"):
        crop_scores(tiny_net(), some_images(1), torch.rand(1, 4), torch.tensor([0]))


def test_an_empty_batch_gives_nothing(net):
    empty = saliency_metric(
        net, some_images(0), torch.zeros(0, 24, 20), torch.zeros(0, dtype=torch.int64)
    )
    assert empty.metric.shape == empty.area.shape == (0,)
