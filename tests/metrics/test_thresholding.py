import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from captum_robust.metrics.functional import STRATEGIES, alpha_grid, threshold


def kept(heat, strategy, alpha):
    return threshold(torch.tensor([heat]), strategy, alpha)[0].int().tolist()


def kept_by_numpy(heat, strategy, alpha):
    """The definitions again, pixel by pixel in double precision."""
    heat = heat.astype(np.float64)
    if strategy == "value":
        return heat - heat.min() >= alpha * (heat.max() - heat.min())
    if strategy == "mean":
        return heat >= alpha * heat.mean()
    if strategy == "percentile":
        count = max(1, round((1 - alpha) * heat.size))
        return heat >= np.sort(heat.ravel())[::-1][count - 1]
    flat = np.maximum(heat.ravel(), 0)
    mask, running = np.zeros(flat.size, bool), 0.0
    total = float(sum(sorted(flat, reverse=True)))
    for pixel in sorted(range(flat.size), key=lambda i: (-heat.ravel()[i], i)):
        running += flat[pixel]
        if running >= alpha * total:
            break
        mask[pixel] = True
    return mask.reshape(heat.shape)


def test_grids_are_those_of_fong_and_vedaldi():
    assert alpha_grid("value") == pytest.approx(np.arange(0, 1, 0.05))
    assert alpha_grid("energy") == pytest.approx(np.arange(0, 1, 0.05))
    assert alpha_grid("percentile") == pytest.approx(np.arange(0, 1, 0.05))
    assert alpha_grid("mean") == pytest.approx(np.arange(0, 10.5, 0.5))


def test_value_threshold_is_a_fraction_of_the_range_and_keeps_the_pixel_on_it():
    heat = [[-2.0, 0.0], [2.0, 6.0]]  # range 8 from -2: half of it is the pixel 2
    assert kept(heat, "value", 0.5) == [[0, 0], [1, 1]]
    assert kept(heat, "value", 0.51) == [[0, 0], [0, 1]]


def test_mean_threshold_keeps_the_pixel_on_it():
    heat = [[0.0, 1.0], [2.0, 5.0]]  # mean 2
    assert kept(heat, "mean", 1.0) == [[0, 0], [1, 1]]
    assert kept(heat, "mean", 2.5) == [[0, 0], [0, 1]]
    assert kept(heat, "mean", 3.0) == [[0, 0], [0, 0]]


def test_energy_threshold_drops_the_crossing_pixel():
    heat = [[4.0, 3.0], [2.0, 1.0]]
    assert kept(heat, "energy", 0.65) == [[1, 0], [0, 0]]  # 4 < 6.5, 4 + 3 crosses
    assert kept(heat, "energy", 0.4) == [[0, 0], [0, 0]]  # 4 < 4 does not hold


def test_energy_threshold_takes_equal_pixels_in_raster_order():
    assert kept([[1.0, 1.0], [1.0, 1.0]], "energy", 0.75) == [[1, 1], [0, 0]]


def test_energy_threshold_counts_negative_pixels_as_zeros():
    assert kept([[4.0, -9.0], [2.0, 2.0]], "energy", 0.8) == [[1, 0], [1, 0]]


def test_percentile_threshold_keeps_the_top_fraction():
    assert kept([[1.0, 4.0], [3.0, 2.0]], "percentile", 0.5) == [[0, 1], [1, 0]]


def test_percentile_threshold_keeps_all_pixels_that_tie_with_the_last():
    assert kept([[1.0, 4.0], [3.0, 3.0]], "percentile", 0.5) == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("strategy", "pixels"), [("value", 4), ("mean", 4), ("percentile", 4), ("energy", 0)]
)
def test_a_map_of_zeros_is_kept_whole_except_by_energy(strategy, pixels):
    assert threshold(torch.zeros(1, 2, 2), strategy, 0.5).sum() == pixels


def test_a_constant_map_equals_its_mean_exactly():
    assert threshold(torch.full((1, 224, 224), 0.1), "mean", 1.0).all()


maps = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    elements=st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, width=32)),
)


@settings(max_examples=150, deadline=None)
@given(maps, st.sampled_from(STRATEGIES), st.data())
def test_threshold_follows_its_definition(heat, strategy, data):
    alpha = data.draw(st.sampled_from(alpha_grid(strategy)))
    expected = kept_by_numpy(heat, strategy, alpha)
    assert (threshold(torch.from_numpy(heat)[None], strategy, alpha)[0].numpy() == expected).all()


@settings(max_examples=50, deadline=None)
@given(maps, st.sampled_from(STRATEGIES))
def test_a_higher_threshold_keeps_no_more_or_no_less(heat, strategy):
    counts = [threshold(torch.from_numpy(heat)[None], strategy, a).sum().item()
              for a in alpha_grid(strategy)]  # fmt: skip
    # Energy keeps more as α rises, and so does the mean where it is negative.
    assert counts in (sorted(counts), sorted(counts, reverse=True))


def test_half_precision_maps_are_read_exactly():
    heat = torch.rand(2, 5, 5).half()
    for strategy in STRATEGIES:
        assert (threshold(heat, strategy, 0.5) == threshold(heat.double(), strategy, 0.5)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_map_is_named_by_its_sample(value):
    heat = torch.zeros(3, 2, 2)
    heat[1, 0, 0] = value
    with pytest.raises(ValueError, match="maps: NaN or infinity in sample 1"):
        threshold(heat, "value", 0.5)


def test_wrong_arguments_are_named():
    heat = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="strategy: expected one of energy, mean"):
        threshold(heat, "median", 0.5)
    with pytest.raises(
        ValueError, match=r"alpha of strategy 'energy': expected a number in \[0, 1\]"
    ):
        threshold(heat, "energy", 1.5)
    with pytest.raises(ValueError, match="N×H×W"):
        threshold(heat[0], "energy", 0.5)
    with pytest.raises(TypeError, match="tensor"):
        threshold(np.zeros((1, 2, 2)), "energy", 0.5)


def test_no_maps_give_no_masks():
    assert threshold(torch.zeros(0, 4, 5), "energy", 0.5).shape == (0, 4, 5)
