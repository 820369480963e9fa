import hypothesis.strategies as st
import pytest
import torch
import torchvision
from hypothesis import given, settings

from captum_robust.metrics.functional import (
    best_iou,
    box_iou,
    boxes_to_mask,
    center_box,
    center_box_map,
    pointing_game_hits,
    random_map,
    sweep_boxes,
    whole_image_box,
    whole_image_map,
)


@st.composite
def boxes(draw, size=12):
    x0, y0 = draw(st.integers(0, size - 1)), draw(st.integers(0, size - 1))
    return [x0, y0, draw(st.integers(x0 + 1, size)), draw(st.integers(y0 + 1, size))]


@settings(max_examples=100, deadline=None)
@given(st.lists(boxes(), min_size=1, max_size=5), st.lists(boxes(), min_size=1, max_size=5))
def test_iou_is_that_of_torchvision(a, b):
    a, b = torch.tensor(a).float(), torch.tensor(b).float()
    expected = torchvision.ops.box_iou(a, b)
    torch.testing.assert_close(box_iou(a[:, None], b[None]), expected)


@settings(max_examples=100, deadline=None)
@given(boxes(), boxes())
def test_iou_counts_pixels(a, b):
    mask_a, mask_b = (boxes_to_mask(torch.tensor([box]), (13, 13)) for box in (a, b))
    expected = (mask_a & mask_b).sum() / (mask_a | mask_b).sum()
    assert box_iou(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected.item())
    # Inclusive corners name the last pixel itself.
    last = torch.tensor([0, 0, 1, 1])
    inclusive = box_iou(torch.tensor(a) - last, torch.tensor(b) - last, inclusive=True)
    assert inclusive == pytest.approx(expected.item())


@settings(max_examples=50, deadline=None)
@given(boxes(), boxes())
def test_iou_is_symmetric_and_between_zero_and_one(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    assert box_iou(a, b) == box_iou(b, a)
    assert 0 <= box_iou(a, b) <= 1
    assert box_iou(a, a) == 1


def test_two_empty_boxes_overlap_by_zero():
    assert box_iou(torch.zeros(4), torch.zeros(4)) == 0


def test_best_iou_takes_the_best_of_each_sample_and_nan_without_boxes():
    predicted = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 2, 4]]]).expand(3, -1, -1)
    truth = [
        torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 4]]),
        torch.zeros(0, 4),
        torch.tensor([[8.0, 8, 9, 9]]),
    ]
    found = best_iou(predicted, truth)
    assert found[0].tolist() == [0.5, 1.0]
    assert found[1].isnan().all()
    assert found[2].tolist() == [0, 0]


def test_whole_number_boxes_do_not_round_the_ground_truth():
    found = best_iou(torch.tensor([[[0, 0, 2, 1]]]), [torch.tensor([[0.0, 0.0, 1.5, 1.0]])])
    assert found.item() == 0.75


def test_best_iou_of_samples_without_any_box_is_nan():
    assert best_iou(torch.ones(2, 3, 4), [torch.zeros(0, 4)] * 2).isnan().all()
    assert best_iou(torch.ones(0, 3, 4), []).shape == (0, 3)


def test_best_iou_refuses_ground_truth_that_does_not_fit():
    with pytest.raises(ValueError, match="ground_truth: expected one for each of 2 samples, got 1"):
        best_iou(torch.ones(2, 3, 4), [torch.zeros(0, 4)])
    with pytest.raises(ValueError, match=r"ground_truth\[0\]: expected x0 ≤ x1"):
        best_iou(torch.ones(1, 3, 4), [torch.tensor([[3.0, 0, 1, 1]])])


def test_center_box_has_the_asked_area_and_the_image_s_aspect():
    x0, y0, x1, y1 = center_box((120, 200)).tolist()
    assert (x1 - x0) * (y1 - y0) == pytest.approx(120 * 200 / 2, rel=1e-5)
    assert (x1 - x0) / (y1 - y0) == pytest.approx(200 / 120, rel=1e-5)
    assert (x0 + x1, y0 + y1) == pytest.approx((200, 120))


def test_center_box_map_sweeps_to_the_center_box():
    heat = center_box_map(2, (100, 80), area_fraction=0.25)
    swept = sweep_boxes(heat, ["value"])["value"]
    assert (swept[:, 1:] == torch.tensor([20.0, 25, 60, 75])).all()


def test_whole_image_map_sweeps_to_the_whole_image():
    swept = sweep_boxes(whole_image_map(2, (9, 14)), ["value"])["value"]
    assert (swept == whole_image_box((9, 14))).all()


@pytest.mark.parametrize("baseline", [center_box_map, whole_image_map])
def test_baseline_maps_point_at_the_center(baseline):
    heat = baseline(1, (101, 201))
    point = [torch.tensor([[100.0, 50, 101, 51]])]
    assert pointing_game_hits(heat, point, tolerance=1).item() == 1
    assert heat[heat > 0].min() >= 0.99


def test_random_map_repeats_with_its_seed():
    first, again = (random_map(2, (30, 20), torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (2, 30, 20)
    assert (first == again).all()
    assert not (first[0] == first[1]).all()


def test_boxes_fill_the_pixels_whose_centre_they_cover():
    mask = boxes_to_mask(torch.tensor([[0.4, 0.6, 2.5, 1.6]]), (3, 4))
    # Columns 0 (centre .5) and 1; centre 2.5 lies on the open end. Row 1 alone.
    assert mask.nonzero().tolist() == [[1, 0], [1, 1]]
