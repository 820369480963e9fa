import subprocess
import sys

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings

from captum_robust.metrics.functional import (
    STRATEGIES,
    alpha_grid,
    largest_component,
    mask_to_box,
    sweep_boxes,
    threshold,
)

# Few distinct values: many ties in value and in area.
tied = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    elements=st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0, 2.0]),
)


def one_by_one(maps, strategy, connectivity=8, filtered=True):
    boxes = []
    for alpha in alpha_grid(strategy):
        mask = threshold(maps, strategy, alpha)
        boxes.append(mask_to_box(largest_component(mask, connectivity) if filtered else mask))
    return torch.stack(boxes, dim=1)


@settings(max_examples=60, deadline=None)
@given(tied, st.sampled_from([4, 8]), st.booleans())
def test_sweep_equals_one_threshold_at_a_time(heat, connectivity, filtered):
    maps = torch.from_numpy(heat)
    swept = sweep_boxes(maps, STRATEGIES, connectivity, filtered)
    for strategy in STRATEGIES:
        assert (swept[strategy] == one_by_one(maps, strategy, connectivity, filtered)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("grain", [4, 40])
def test_sweep_equals_one_threshold_at_a_time_on_larger_maps(dtype, grain):
    generator = torch.Generator().manual_seed(grain)
    noise = torch.randn(3, 1, grain, grain, generator=generator)
    maps = torch.nn.functional.interpolate(noise, size=(61, 47), mode="bilinear")[:, 0].to(dtype)
    swept = sweep_boxes(maps)
    for strategy in STRATEGIES:
        assert (swept[strategy] == one_by_one(maps, strategy)).all()


@settings(max_examples=60, deadline=None)
@given(tied, st.sampled_from([4, 8]))
def test_sweep_finds_the_largest_component_of_scipy(heat, connectivity):
    swept = sweep_boxes(torch.from_numpy(heat), ["value"], connectivity)["value"]
    structure = np.ones((3, 3)) if connectivity == 8 else None
    for sample, boxes in zip(heat.astype(np.float64), swept, strict=True):
        low, high = sample.min(), sample.max()
        for alpha, box in zip(alpha_grid("value"), boxes, strict=True):
            labels, number = scipy.ndimage.label(sample - low >= alpha * (high - low), structure)
            sizes = [(labels == label).sum() for label in range(1, number + 1)]
            rows, columns = np.nonzero(labels == 1 + int(np.argmax(sizes)))
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == expected


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8])
def test_sweep_does_not_depend_on_the_scale(scale):
    maps = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(1)) * scale
    swept = sweep_boxes(maps)
    for strategy in STRATEGIES:
        assert (swept[strategy] == one_by_one(maps, strategy)).all()


def test_a_component_that_spans_the_image_can_still_be_overtaken():
    heat = torch.zeros(1, 20, 20)
    heat[0, 2:18, 2:18] = 0.5
    heat[0, [0, -1]] = 1
    heat[0, :, [0, -1]] = 1
    boxes = sweep_boxes(heat, ["value"])["value"][0]
    assert boxes[15].tolist() == [0, 0, 20, 20]  # the frame alone, 76 pixels
    assert boxes[5].tolist() == [2, 2, 18, 18]  # beside 256 pixels


def test_a_map_of_zeros_gives_the_whole_image_in_every_family():
    for boxes in sweep_boxes(torch.zeros(1, 5, 7)).values():
        assert (boxes == torch.tensor([0.0, 0, 7, 5])).all()


def test_without_component_filter_the_box_holds_all_kept_pixels():
    heat = torch.zeros(1, 6, 6)
    heat[0, 0, 0] = heat[0, 4, 2:4] = 1
    assert sweep_boxes(heat, ["value"])["value"][0, 10].tolist() == [2, 4, 4, 5]
    swept = sweep_boxes(heat, ["value"], largest_component_only=False)["value"]
    assert swept[0, 10].tolist() == [0, 0, 4, 5]


def test_a_batch_gives_what_its_maps_give_one_by_one():
    maps = torch.rand(40, 120, 130, generator=torch.Generator().manual_seed(0))
    swept = sweep_boxes(maps)
    for i in (0, 31, 39):
        alone = sweep_boxes(maps[i : i + 1])
        assert all((alone[s][0] == swept[s][i]).all() for s in STRATEGIES)


def test_maps_may_be_transposed_views_that_require_grad():
    maps = torch.rand(2, 8, 6, requires_grad=True)
    swept = sweep_boxes(maps.transpose(1, 2), ["value"])["value"]
    assert not swept.requires_grad
    assert (swept == sweep_boxes(maps.detach().transpose(1, 2).contiguous())["value"]).all()


def test_no_maps_give_no_boxes():
    assert sweep_boxes(torch.zeros(0, 4, 4), ["mean"])["mean"].shape == (0, 21, 4)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="maps: NaN or infinity in sample 0"):
        sweep_boxes(torch.full((1, 2, 2), torch.nan))
    with pytest.raises(TypeError, match="strategies: expected a sequence"):
        sweep_boxes(torch.zeros(1, 2, 2), "value")
    with pytest.raises(ValueError, match="connectivity: expected 4 or 8"):
        sweep_boxes(torch.zeros(1, 2, 2), connectivity=6)


def test_importing_the_metrics_loads_neither_numba_nor_opencv():
    code = (
        "import sys, captum_robust; slow = {'numba', 'cv2'}; before = slow & set(sys.modules);"
        "import captum_robust.metrics, captum_robust.metrics.functional;"
        "assert slow & set(sys.modules) == before, slow & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
