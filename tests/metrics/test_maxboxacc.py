import cv2
import numpy as np
import pytest
import torch

from captum_robust.metrics.functional import (
    maxboxacc,
    maxboxacc_curve,
    maxboxacc_from_ious,
    maxboxacc_ious,
    maxboxacc_v2,
    sweep_boxes,
)
from captum_robust.metrics.functional.box_accuracy import sweep_and_maxboxacc
from captum_robust.metrics.functional.thresholding import STRATEGIES


def published_overlap(boxes, truth):
    """The intersection over union of the authors' evaluation: corners are covered pixels."""
    best = 0.0
    for x0, y0, x1, y1 in boxes:
        for u0, v0, u1, v1 in truth:
            w = max(0, min(x1, u1) - max(x0, u0) + 1)
            h = max(0, min(y1, v1) - max(y0, v0) + 1)
            union = (x1 - x0 + 1) * (y1 - y0 + 1) + (u1 - u0 + 1) * (v1 - v0 + 1) - w * h
            best = max(best, w * h / union)
    return best


def published_boxes(heat, tau, multi, polygon):
    """One threshold as the authors take it; by pixels instead of polygons if asked."""
    height, width = heat.shape
    heat = heat.astype(np.float64)
    scaled = heat - heat.min()
    scaled = scaled / scaled.max() if scaled.max() > 0 else scaled
    gray = (scaled * 255).astype(np.uint8)
    _, salient = cv2.threshold(gray, int(tau * gray.max()), 255, cv2.THRESH_BINARY)
    if polygon:
        outlines = cv2.findContours(salient, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[-2]
        if not multi and outlines:
            outlines = [max(outlines, key=cv2.contourArea)]
        rectangles = [cv2.boundingRect(outline) for outline in outlines]
    else:
        _, _, statistics, _ = cv2.connectedComponentsWithStats(salient, connectivity=8)
        statistics = statistics[1:]
        if not multi and len(statistics):
            statistics = statistics[[statistics[:, 4].argmax()]]
        rectangles = [tuple(map(int, row[:4])) for row in statistics]
    if not rectangles:
        return [(0, 0, 0, 0)]
    return [(x, y, min(x + w, width - 1), min(y + h, height - 1)) for x, y, w, h in rectangles]


def published_curve(heat, truth, multi, polygon, taus):
    return [published_overlap(published_boxes(heat, tau, multi, polygon), truth) for tau in taus]


def some_maps(n, size, grain, seed):
    noise = torch.rand(n, 1, grain, grain, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=size, mode="bilinear")[:, 0]


TRUTH = [
    torch.tensor([[3.0, 5.0, 20.0, 30.0]]),
    torch.tensor([[0.0, 0.0, 39.0, 33.0], [10.0, 3.0, 18.0, 12.0]]),
    torch.tensor([[25.0, 20.0, 30.0, 24.0], [2.0, 2.0, 8.0, 6.0], [30.0, 1.0, 39.0, 33.0]]),
]


@pytest.mark.parametrize("polygon", [False, True])
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("grain", [4, 12, 34])
def test_overlaps_are_those_of_the_authors_procedure(polygon, multi, grain):
    maps = some_maps(3, (34, 40), grain, seed=grain)
    contours = "polygon" if polygon else "component"
    found = maxboxacc_ious(maps, TRUTH, multi=multi, contours=contours)
    taus = np.arange(0, 1, 0.02)
    for heat, truth, row in zip(maps, TRUTH, found, strict=True):
        expected = published_curve(heat.numpy(), truth.tolist(), multi, polygon, taus)
        assert row[[int(tau * 255) for tau in taus]].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("multi", [False, True])
def test_a_batch_gives_what_its_maps_give_one_by_one(multi):
    maps = some_maps(20, (150, 160), 6, seed=3)
    truth = [TRUTH[i % 3] * 4 for i in range(20)]
    found = maxboxacc_ious(maps, truth, multi)
    for i in (0, 10, 11, 19):
        assert (maxboxacc_ious(maps[i : i + 1], truth[i : i + 1], multi)[0] == found[i]).all()


@pytest.mark.parametrize("grain", [3, 40])
def test_one_pass_with_the_sweep_gives_what_each_gives_alone(grain):
    maps = some_maps(4, (34, 40), grain, seed=5) - 0.4
    maps[3] = maps[3].round()  # most pixels are equal
    truth = [*TRUTH, torch.zeros(0, 4)]
    boxes, one, every = sweep_and_maxboxacc(maps, STRATEGIES, truth)
    assert boxes.equal(torch.cat(list(sweep_boxes(maps, STRATEGIES).values()), dim=1))
    for found, multi in ((one, False), (every, True)):
        assert found[:3].equal(maxboxacc_ious(maps, truth, multi)[:3])
        assert found[3].isnan().all()


def test_component_and_polygon_agree_on_a_smooth_map():
    maps = some_maps(3, (34, 40), 3, seed=0)
    component = maxboxacc_ious(maps, TRUTH)
    polygon = maxboxacc_ious(maps, TRUTH, contours="polygon")
    assert (component == polygon).float().mean() > 0.95


def test_half_open_boxes_score_as_pixel_counts_without_the_authors_rule():
    heat = torch.zeros(1, 10, 10)
    heat[0, 2:6, 3:9] = 1
    truth = [torch.tensor([[3.0, 2.0, 9.0, 4.0]])]
    assert maxboxacc_ious(heat, truth, inclusive=False)[0, 100] == 0.5
    # Inclusive: 7×3 of 7×5 pixels.
    assert maxboxacc_ious(heat, truth)[0, 100] == pytest.approx(21 / 35)
    assert maxboxacc_ious(heat, truth, multi=True, inclusive=False)[0, 100] == 0.5


@pytest.mark.parametrize("contours", ["component", "polygon"])
@pytest.mark.parametrize("multi", [False, True])
def test_a_constant_map_gives_the_one_pixel_box(contours, multi):
    heat = torch.full((1, 8, 8), 3.0)
    truth = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])]
    # The pixel (0, 0) against 2×2 pixels.
    found = maxboxacc_ious(heat, truth, multi=multi, contours=contours)
    assert (found == 0.25).all()
    plain = maxboxacc_ious(heat, truth, multi=multi, contours=contours, inclusive=False)
    assert (plain == 0).all()


def test_samples_without_boxes_are_nan_and_do_not_count():
    maps = some_maps(2, (34, 40), 4, seed=1)
    for multi in (False, True):
        found = maxboxacc_ious(maps, [TRUTH[0], torch.zeros(0, 4)], multi=multi)
        assert found[1].isnan().all()
        assert not found[0].isnan().any()
        assert maxboxacc_from_ious(found) == maxboxacc_from_ious(found[:1])


def test_the_best_threshold_is_taken_over_the_set_not_per_image():
    ious = torch.zeros(2, 256)
    ious[0, 10] = ious[1, 200] = 0.9
    assert maxboxacc_from_ious(ious) == 0.5
    ious[1, 10] = 0.5
    assert maxboxacc_from_ious(ious) == 1
    assert maxboxacc_from_ious(ious, strict=True) == 0.5


def test_v2_averages_the_best_accuracy_of_three_overlaps():
    ious = torch.zeros(4, 256)
    ious[:, 50] = torch.tensor([0.3, 0.5, 0.7, 0.1])
    # Accuracies 3/4, 2/4, 1/4.
    assert maxboxacc_from_ious(ious, (0.3, 0.5, 0.7)) == pytest.approx(0.5)


def test_the_last_level_is_out_of_reach_of_every_threshold():
    ious = torch.zeros(1, 256)
    ious[0, 255] = 1
    assert maxboxacc_from_ious(ious) == 0
    assert len(maxboxacc_curve(ious)) == 1000


def test_curve_reads_the_level_of_each_threshold():
    ious = torch.zeros(1, 256)
    ious[0, 51] = 1  # ⌊255 τ⌋ = 51 for τ in [.2, .2039…]
    assert maxboxacc_curve(ious).nonzero().flatten().tolist() == [200, 201, 202, 203]


def test_batch_functions_are_the_two_steps_in_one():
    maps = some_maps(3, (34, 40), 8, seed=2)
    assert maxboxacc(maps, TRUTH) == maxboxacc_from_ious(maxboxacc_ious(maps, TRUTH))
    ious = maxboxacc_ious(maps, TRUTH, multi=True)
    assert maxboxacc_v2(maps, TRUTH) == maxboxacc_from_ious(ious, (0.3, 0.5, 0.7))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="contours: expected one of component, polygon"):
        maxboxacc_ious(torch.zeros(1, 4, 4), TRUTH[:1], contours="exact")
    with pytest.raises(ValueError, match="ground_truth: expected one for each of 1 samples, got 3"):
        maxboxacc_ious(torch.zeros(1, 4, 4), TRUTH)
    with pytest.raises(ValueError, match="ious: expected N×256, got 3×100"):
        maxboxacc_from_ious(torch.zeros(3, 100))
    assert maxboxacc_ious(torch.zeros(0, 4, 4), []).shape == (0, 256)
