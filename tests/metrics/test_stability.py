"""Agreement of maps before and after an attack; the gap that a method closes."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from skimage.metrics import structural_similarity as skimage_similarity
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric

from captum_robust.metrics import AttributionStability
from captum_robust.metrics.functional import (
    STABILITY_MEASURES,
    bootstrap_interval,
    box_iou,
    gap_closed,
    largest_component,
    map_box_iou,
    mask_to_box,
    pearson_correlation,
    spearman_correlation,
    stability,
    structural_similarity,
    threshold,
    top_k_intersection,
)

PAIRED = {
    "spearman": spearman_correlation,
    "pearson": pearson_correlation,
    "ssim": structural_similarity,
    "top_k": top_k_intersection,
    "box_iou": map_box_iou,
}


def two_maps(n: int = 4, size: tuple[int, int] = (20, 26), levels: int | None = None):
    """Related maps; with ``levels`` rounded, so that many pixels are equal."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2 * n, 1, 5, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[:, 0]
    a = smooth[:n].exp()
    b = a + torch.linspace(0.2, 2, n)[:, None, None] * smooth[n:]
    return (a, b) if levels is None else ((a * levels).round(), (b * levels).round())


@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "ties"])
def test_rank_correlation_is_scipys(levels):
    a, b = two_maps(levels=levels)
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert spearman_correlation(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_of_ties_by_hand():
    a = torch.tensor([[[1.0, 1.0, 2.0, 3.0]]])  # ranks 1.5, 1.5, 3, 4
    b = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    # Around the mean of 2.5: (-1, -1, .5, 1.5) and (-1.5, -.5, .5, 1.5).
    assert spearman_correlation(a, b).item() == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_linear_correlation_is_scipys():
    a, b = two_maps()
    expected = [pearsonr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert pearson_correlation(a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_correlations_take_pixels_of_any_size():
    a, b = two_maps(1)
    expected = pearson_correlation(a, b).item()
    for scale in (1e-30, 1e30):
        assert pearson_correlation(a * scale, b).item() == pytest.approx(expected, abs=1e-6)
    far = pearson_correlation(a.double() + 1e6, b.double())
    assert far.item() == pytest.approx(expected, abs=1e-6)


def test_structural_similarity_is_skimages_of_maps_in_the_unit_range():
    a, b = two_maps()
    expected = []
    for pair in zip(a.double().numpy(), b.double().numpy(), strict=True):
        x, y = ((m - m.min()) / np.ptp(m) for m in pair)
        expected.append(
            skimage_similarity(
                x, y, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        )
    assert structural_similarity(a, b).tolist() == pytest.approx(expected, abs=1e-4)
    assert structural_similarity(a.double(), b.double()).tolist() == pytest.approx(expected)


def test_top_k_intersection_by_hand():
    a = torch.tensor([[[9.0, 8.0, 7.0, 6.0], [0.0, 0.0, 0.0, 0.0]]])
    b = torch.tensor([[[9.0, 0.0, 8.0, 0.0], [7.0, 0.0, 6.0, 0.0]]])
    assert top_k_intersection(a, b, share=0.25).item() == 0.5  # {0, 1} and {0, 2}
    assert top_k_intersection(a, b, share=0.5).item() == 0.5  # {0, 1, 2, 3} and {0, 2, 4, 6}
    assert top_k_intersection(a, b, share=0.01).item() == 1  # at least one pixel
    assert top_k_intersection(a, b, share=1).item() == 1


def test_equal_pixels_share_the_last_places():
    a = torch.tensor([[[5.0, 1.0, 1.0, 0.0]]])  # of two places one goes to the 5, half to each 1
    b = torch.tensor([[[5.0, 4.0, 0.0, 0.0]]])
    assert top_k_intersection(a, b, share=0.5).item() == (1 + 0.5) / 2
    assert top_k_intersection(a, a, share=0.5).item() == 1


def test_box_overlap_is_that_of_the_boxes_of_the_two_maps():
    a, b = two_maps()
    boxes = [mask_to_box(largest_component(threshold(m, "energy", 0.3))) for m in (a, b)]
    expected = box_iou(*boxes).tolist()
    assert map_box_iou(a, b, "energy", 0.3).tolist() == pytest.approx(expected)
    assert 0 < min(expected) < max(expected) < 1 or len(set(expected)) > 1


@pytest.mark.parametrize("measure", PAIRED)
def test_a_map_that_does_not_change_has_one_whatever_its_scale(measure):
    a, _ = two_maps()
    assert PAIRED[measure](a, a).tolist() == pytest.approx([1] * 4)
    assert PAIRED[measure](a, 4 * a + 2).tolist() == pytest.approx([1] * 4, abs=1e-4)


@pytest.mark.parametrize("measure", PAIRED)
def test_no_sample_sees_another(measure):
    a, b = two_maps()
    alone = torch.cat([PAIRED[measure](a[i : i + 1], b[i : i + 1]) for i in range(len(a))])
    torch.testing.assert_close(PAIRED[measure](a, b), alone, rtol=0, atol=1e-6)
    assert len(set(alone.tolist())) > 1


@pytest.mark.parametrize("measure", PAIRED)
def test_a_map_that_an_attack_empties_has_moved(measure):
    a, _ = two_maps()
    a += 1e-3 * torch.rand(a.shape, generator=torch.Generator().manual_seed(1))  # no ties
    empty = torch.zeros_like(a)
    found = PAIRED[measure](a, empty)
    assert (found < 0.9).all()
    expected = {"spearman": 0, "pearson": 0, "top_k": 52 * (52 / 520) / 52}
    if measure in expected:
        assert found.tolist() == pytest.approx([expected[measure]] * 4)
    assert PAIRED[measure](empty, empty + 3).tolist() == pytest.approx([1] * 4)


@pytest.mark.parametrize("measure", PAIRED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_any_dtype_gives_the_value_of_its_numbers(measure, dtype):
    a, b = ((10 * m).round().clamp(-100, 100) for m in two_maps())
    found = PAIRED[measure](a.to(dtype), b.to(dtype))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, PAIRED[measure](a, b), rtol=0, atol=1e-4)


@pytest.mark.parametrize("measure", PAIRED)
def test_no_maps_give_no_values(measure):
    none = torch.zeros(0, 12, 12)
    assert PAIRED[measure](none, none).shape == (0,)


@pytest.mark.parametrize("measure", PAIRED)
def test_bad_maps_are_refused(measure):
    function, a = PAIRED[measure], torch.rand(2, 12, 12)
    with pytest.raises(ValueError, match=r"attacked: expected the shape of clean, \(2, 12, 12\)"):
        function(a, a[:1])
    with pytest.raises(ValueError, match="clean: expected N×H×W"):
        function(a[0], a[0])
    with pytest.raises(TypeError, match="attacked: expected a tensor"):
        function(a, a.numpy())
    broken = a.clone()
    broken[1, 3, 4] = math.nan
    with pytest.raises(ValueError, match="attacked: NaN or infinity in sample 1"):
        function(a, broken)


def test_a_map_smaller_than_the_window_is_refused():
    small = torch.rand(1, 7, 7)
    with pytest.raises(ValueError, match=r"at least 11×11 pixels .*, got 7×7; enlarge them"):
        structural_similarity(small, small)


def test_stability_is_each_measure_on_average_or_at_worst():
    clean, first = two_maps()
    attacked = torch.stack([first, clean.flip(1), clean])
    mean, worst = (stability(clean, attacked, reduce=r) for r in ("mean", "worst"))
    assert tuple(mean) == tuple(worst) == STABILITY_MEASURES
    for name, function in PAIRED.items():
        each = torch.stack([function(clean, maps) for maps in attacked])
        assert torch.equal(mean[name], each.mean(dim=0))
        assert torch.equal(worst[name], each.min(dim=0).values)
        assert (worst[name] < mean[name]).all()
    one = stability(clean, first)
    assert all(torch.equal(one[name], PAIRED[name](clean, first)) for name in PAIRED)


def test_stability_passes_its_settings_on():
    clean, attacked = two_maps()
    found = stability(clean, attacked, share=0.3, strategy="energy", alpha=0.5)
    assert torch.equal(found["top_k"], top_k_intersection(clean, attacked, 0.3))
    assert torch.equal(found["box_iou"], map_box_iou(clean, attacked, "energy", 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": []}, "measures: expected at least one"),
        ({"measures": ["ssim", "ssim"]}, "each once"),
        ({"measures": ["psnr"]}, "measures: expected one of box_iou, pearson"),
        ({"reduce": "min"}, "reduce: expected one of mean, worst, got 'min'"),
        ({"share": 0}, r"share: expected a number in \(0, 1\], got 0"),
        ({"share": math.nan}, "share: expected a number in"),
        ({"strategy": "valve"}, "strategy: expected one of"),
        ({"alpha": 2}, "alpha of strategy 'value': expected a number in"),
        ({"share": "x"}, r"share: expected a number in \(0, 1\], got 'x'"),
        ({"share": None}, "share: expected a number in"),
        ({"share": torch.rand(3)}, "share: expected a number in"),
        ({"alpha": "x"}, r"alpha of strategy 'value': expected a number in \[0, 1\], got 'x'"),
        ({"alpha": [0.2]}, "alpha of strategy 'value': expected a number in"),
        ({"measures": [["ssim"]]}, "measures: expected one of"),
    ],
)
def test_wrong_settings_are_named(options, message):
    a, b = two_maps(1)
    with pytest.raises(ValueError, match=message):
        stability(a, b, **options)
    with pytest.raises(ValueError, match=message):
        AttributionStability(**options)


def test_wrong_shapes_and_kinds_are_named():
    a, b = two_maps()
    with pytest.raises(TypeError, match="measures: expected a sequence of names, got 'ssim'"):
        stability(a, b, measures="ssim")
    for none in (None, 3, torch.rand(2)):
        with pytest.raises(TypeError, match="measures: expected a sequence of names"):
            stability(a, b, measures=none)
    with pytest.raises(ValueError, match="attacked: expected A×N×H×W"):
        stability(a, b[0])
    with pytest.raises(ValueError, match="at least one attack"):
        stability(a, b[None][:0])
    with pytest.raises(ValueError, match="attacked: expected the shape of clean"):
        stability(a, torch.stack([b, b])[:, :2])
    with pytest.raises(TypeError, match="attacked: expected a tensor A×N×H×W, got list"):
        stability(a, [b])


def test_the_class_averages_over_images_in_any_batches():
    clean, first = two_maps()
    attacked = torch.stack([first, clean.flip(2)])
    expected = stability(clean, attacked, reduce="worst")
    metric = AttributionStability(reduce="worst")
    for part in ([0, 2, 3], [1]):
        metric.update(clean[part], attacked[:, part])
    for name, value in metric.compute().items():
        assert value.item() == pytest.approx(expected[name].mean().item(), abs=1e-6)


def test_sums_of_two_processes_are_those_of_one():
    clean, attacked = two_maps()
    whole, halves = AttributionStability(), [AttributionStability(), AttributionStability()]
    whole.update(clean, attacked)
    for metric, part in zip(halves, ([2, 0], [3, 1]), strict=True):
        metric.update(clean[part], attacked[part])
    assert whole._reductions["sums"] is whole._reductions["images"] is torch_sum()
    assert torch.equal(whole.sums, halves[0].sums + halves[1].sums)


def torch_sum():
    from torchmetrics.utilities import dim_zero_sum

    return dim_zero_sum


def test_without_images_the_class_has_no_value():
    metric = AttributionStability(measures=["top_k"])
    with pytest.warns(UserWarning, match="before"):
        assert math.isnan(metric.compute()["top_k"])


def failures(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_gap_closed_by_hand():
    clean = failures(0, 0, 0, 1, 0)
    hit = failures(1, 1, 1, 1, 0)
    ours = failures(0, 1, 0, 1, 0)
    found = gap_closed(ours, hit, clean)
    assert found.value == pytest.approx((4 / 5 - 2 / 5) / (4 / 5 - 1 / 5))
    assert (found.n, found.gap, found.reason) == (5, pytest.approx(3 / 5), None)
    assert found.low <= found.value <= found.high
    # A resample has no gap when none of the first three images is drawn.
    assert found.without_gap == pytest.approx((2 / 5) ** 5, abs=0.006)
    assert gap_closed(clean, hit, clean).value == 1
    assert gap_closed(hit, hit, clean).value == 0
    assert gap_closed(failures(1, 1, 1, 1, 1), hit, clean).value == pytest.approx(-1 / 3)


def test_the_gap_interval_is_that_of_the_delta_method_for_many_images():
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(4000, generator=generator)
    clean, hit = (u < 0.3).double(), (u < 0.8).double()
    ours = (torch.rand(4000, generator=generator) < 0.4).double()
    found = gap_closed(ours, hit, clean)
    numerator, denominator = hit - ours, hit - clean
    ratio = numerator.mean() / denominator.mean()
    spread = (numerator - ratio * denominator).std() / denominator.mean() / 4000**0.5
    assert found.value == pytest.approx(ratio.item())
    assert found.low == pytest.approx((ratio - 1.96 * spread).item(), abs=0.006)
    assert found.high == pytest.approx((ratio + 1.96 * spread).item(), abs=0.006)
    assert found.without_gap == 0


def test_the_images_are_drawn_jointly():
    clean = (torch.arange(50) % 3 == 0).double()
    hit = torch.ones(50)
    found = gap_closed(clean, hit, clean)  # any resample gives exactly 1
    assert (found.low, found.value, found.high) == (1, 1, 1)


@pytest.mark.parametrize(
    ("hit", "clean"), [((0, 1, 0), (0, 1, 0)), ((0, 0, 0), (0, 1, 0)), ((0, 1, 0), (1, 0, 0))]
)
def test_without_a_gap_there_is_no_value_but_a_reason(hit, clean):
    found = gap_closed(failures(0, 0, 0), failures(*hit), failures(*clean))
    assert all(math.isnan(v) for v in (found.value, found.low, found.high))
    assert "the attack costs the baseline nothing" in found.reason
    assert found.gap <= 0 <= found.without_gap <= 1


def test_images_without_all_three_are_left_out():
    nan = math.nan
    with_nan = gap_closed(failures(0, nan, 1, 0), failures(1, 1, 1, nan), failures(0, 0, 1, 0))
    assert with_nan == gap_closed(failures(0, 1), failures(1, 1), failures(0, 1))
    with pytest.raises(ValueError, match="expected an image with all three outcomes"):
        gap_closed(failures(nan), failures(0), failures(0))
    with pytest.raises(ValueError, match="expected no infinity"):
        gap_closed(failures(math.inf, 1), failures(1, 1), failures(0, 0))


def test_truth_values_are_failures_and_seeds_repeat():
    ours, hit, clean = failures(0, 1, 1), failures(1, 1, 1), failures(0, 0, 1)
    state = torch.random.get_rng_state()
    found = gap_closed(ours.bool(), hit.bool(), clean.bool(), seed=3)
    assert found == gap_closed(ours, hit, clean, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert gap_closed(ours, hit, clean, level=0.5).level == 0.5


def test_wrong_arguments_of_the_gap_are_named():
    a = failures(0, 1)
    with pytest.raises(ValueError, match="baseline_clean: expected the shape of attacked"):
        gap_closed(a, a, a[:1])
    with pytest.raises(ValueError, match="attacked: expected N, got 1×2"):
        gap_closed(a[None], a[None], a[None])
    with pytest.raises(TypeError, match="baseline_attacked: expected a tensor N, got list"):
        gap_closed(a, [0, 1], a)
    with pytest.raises(
        TypeError, match=r"baseline_clean: expected real numbers, got torch\.complex64"
    ):
        gap_closed(a, a, a.cfloat())
    with pytest.raises(ValueError, match="level: expected a number in"):
        gap_closed(a, a, a, level=95)
    with pytest.raises(ValueError, match="resamples: expected a whole number from 1"):
        gap_closed(a, a, a, resamples=0)


def test_one_bootstrap_draws_alike_for_intervals_and_gaps():
    hit, clean = torch.ones(40), torch.zeros(40)
    ours = (torch.arange(40) % 4 == 0).double()
    found, interval = gap_closed(ours, hit, clean), bootstrap_interval(1 - ours)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    a, b = two_maps(levels=2)
    on_gpu = stability(a.cuda(), b.cuda())
    for name, values in stability(a, b).items():
        torch.testing.assert_close(on_gpu[name].cpu(), values, rtol=0, atol=1e-5)


def two_batches():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, 12, 12, generator=generator)
    far, near = torch.rand(3, 12, 12, generator=generator), clean[1] ** 2
    return (clean[0], far), (clean[1], near)


def test_one_measure_is_one_number_for_the_wrappers_of_torchmetrics():
    batches = two_batches()
    values = [
        np.mean([spearmanr(a.flatten(), b.flatten())[0] for a, b in zip(*one, strict=True)])
        for one in batches
    ]
    tracker = MetricTracker(AttributionStability("spearman"))
    extremes = MinMaxMetric(AttributionStability("spearman"))
    for batch in batches:
        tracker.increment()
        tracker.update(*batch)
    np.testing.assert_allclose(tracker.compute_all(), values, atol=1e-5)
    assert tracker.best_metric(return_step=True) == (pytest.approx(1), 1)  # monotone: 1
    for batch in reversed(batches):
        extremes.update(*batch)
        seen = extremes.compute()
        extremes._base_metric.reset()
    assert seen["max"] == pytest.approx(1)
    assert seen["min"] == pytest.approx(values[0], abs=1e-5)
    loss = 1 - AttributionStability("spearman")
    loss.update(*batches[0])
    assert loss.compute() == pytest.approx(1 - values[0], abs=1e-5)
    assert loss(*batches[1]) == pytest.approx(0, abs=1e-5)


def test_arithmetic_on_several_measures_is_on_each():
    first, second = two_batches()
    plain = AttributionStability()
    plain.update(*first)
    values = plain.compute()
    assert isinstance(values, dict)
    less, double, positive = 1 - AttributionStability(), 2 * AttributionStability(), abs(plain)
    gain = AttributionStability() - AttributionStability()
    for metric in (less, double, gain):
        metric.update(*first)
    for name in STABILITY_MEASURES:
        assert less.compute()[name] == 1 - values[name]
        assert double.compute()[name] == 2 * values[name]
        assert positive.compute()[name] == abs(values[name])
        assert gain.compute()[name] == 0
    assert set(less(*second)) == set(STABILITY_MEASURES)


def test_a_collection_of_measures_is_tracked():
    names = ("spearman", "top_k")
    tracker = MetricTracker(MetricCollection({n: AttributionStability(n) for n in names}))
    for batch in two_batches():
        tracker.increment()
        tracker.update(*batch)
    best, step = tracker.best_metric(return_step=True)
    assert best == {"spearman": pytest.approx(1), "top_k": pytest.approx(1)}
    assert step == {"spearman": 1, "top_k": 1}


def test_what_torchmetrics_makes_of_several_measures_is_of_each() -> None:
    maps = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(0))
    measures = ["spearman", "top_k"]
    # Spearman's coefficient of reversed maps is -1. Minus is that of the absolute value there.
    negative, absolute = -AttributionStability(measures), abs(AttributionStability(measures))
    for metric, sign in ((negative, -1), (absolute, 1)):
        metric.update(maps, -maps)
        assert metric.compute()["spearman"] == pytest.approx(sign)
    bootstrapped = BootStrapper(AttributionStability(measures), num_bootstraps=3, raw=True)
    bootstrapped.update(maps, maps)
    values = bootstrapped.compute()
    for name in measures:
        assert values["mean"][name] == 1
        assert values["std"][name] == 0
        assert values["raw"][name].tolist() == [1, 1, 1]
