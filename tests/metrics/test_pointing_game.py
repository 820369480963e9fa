import math

import hypothesis.strategies as st
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings

from captum_robust.metrics.functional import (
    boxes_to_mask,
    pointing_game_accuracy,
    pointing_game_hits,
)


def peak(x, y, size=(50, 60)):
    heat = torch.zeros(1, *size)
    heat[0, y, x] = 1
    return heat


@pytest.mark.parametrize(
    ("x", "y", "hit"),
    [(14, 0, 1), (15, 0, 0), (9, 11, 1), (9, 12, 0), (0, 0, 1), (30, 30, 0)],
)
def test_a_hit_lies_strictly_within_the_tolerance(x, y, hit):
    # The object is the pixel (0, 0): 81 + 121 < 15², and 81 + 144 is just that.
    truth = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])]
    assert pointing_game_hits(peak(x, y), truth, tolerance=15).item() == hit


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 19), st.integers(0, 14),
    st.lists(st.tuples(*[st.floats(-1, 21), st.floats(-1, 16)] * 2), max_size=3),
    st.sampled_from([0.5, 1, 3, 5, 7.1]),
)  # fmt: skip
def test_boxes_score_like_their_filled_mask(x, y, corners, tolerance):
    boxes = torch.tensor(
        [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners]
    ).view(-1, 4)
    mask = boxes_to_mask(boxes, (15, 20))
    heat = peak(x, y, (15, 20))
    by_box = pointing_game_hits(heat, [boxes], tolerance).item()
    by_mask = pointing_game_hits(heat, mask[None], tolerance).item()
    if mask.any():
        distance = scipy.ndimage.distance_transform_edt(~mask.numpy())[y, x]
        assert by_box == by_mask == float(distance**2 < tolerance**2 - 1e-9)
    else:
        assert math.isnan(by_box)
        assert math.isnan(by_mask)


def test_empty_ground_truth_is_nan_and_never_a_hit():
    assert pointing_game_hits(peak(3, 3), [torch.zeros(0, 4)]).isnan().all()
    assert pointing_game_hits(peak(3, 3), torch.zeros(1, 50, 60, dtype=torch.bool)).isnan().all()


def test_of_equal_pixels_the_first_in_raster_order_is_the_point():
    heat = torch.zeros(1, 50, 60)
    heat[0, 40, 2] = heat[0, 3, 50] = 1
    assert pointing_game_hits(heat, [torch.tensor([[50.0, 3, 51, 4]])], 1).item() == 1


def test_accuracy_averages_over_the_classes_that_were_seen():
    hits = torch.tensor([1.0, 1, 1, 0, 0, float("nan"), 1, float("nan")])
    classes = torch.tensor([4, 4, 4, 4, 9, 9, 11, 2])
    # Class 4: 3/4; class 9: 0/1; class 11: 1/1; class 2 has no sample that counts.
    assert pointing_game_accuracy(hits, classes).item() == pytest.approx((0.75 + 0 + 1) / 3)
    assert pointing_game_accuracy(hits).item() == pytest.approx(4 / 6)


def test_accuracy_of_nothing_is_nan():
    nothing = torch.tensor([float("nan")])
    assert pointing_game_accuracy(nothing).isnan()
    assert pointing_game_accuracy(nothing, torch.tensor([3])).isnan()
    assert pointing_game_hits(torch.zeros(0, 4, 4), []).shape == (0,)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="tolerance: expected a positive number"):
        pointing_game_hits(peak(1, 1), [torch.zeros(0, 4)], 0)
    with pytest.raises(TypeError, match="ground_truth: expected Boolean"):
        pointing_game_hits(peak(1, 1), torch.zeros(1, 50, 60))
    with pytest.raises(ValueError, match="classes: expected 2 integers"):
        pointing_game_accuracy(torch.ones(2), torch.ones(2))
