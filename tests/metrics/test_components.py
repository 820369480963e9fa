import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_robust.metrics.functional import largest_component, mask_to_box

masks = arrays.arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 8)))


def largest_by_scipy(mask, connectivity):
    structure = np.ones((3, 3)) if connectivity == 8 else None
    labels, number = scipy.ndimage.label(mask, structure)
    if number == 0:
        return mask
    # scipy labels in raster order of the first pixels; max returns the first of equal ones.
    return labels == max(range(1, number + 1), key=lambda label: (labels == label).sum())


@settings(max_examples=200, deadline=None)
@given(masks, st.sampled_from([4, 8]))
def test_largest_component_is_that_of_scipy(mask, connectivity):
    found = largest_component(torch.from_numpy(mask)[None], connectivity)[0].numpy()
    assert (found == largest_by_scipy(mask, connectivity)).all()


def test_of_equal_components_the_first_in_raster_order_stays():
    # Its first pixel (row 0, column 3) comes before the left one's (row 1, column 0).
    mask = torch.tensor([[[0, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]]], dtype=torch.bool)
    assert largest_component(mask)[0].nonzero().tolist() == [[0, 3], [1, 3]]


def test_diagonal_neighbours_connect_only_with_eight():
    mask = torch.eye(3, dtype=torch.bool)[None]
    assert largest_component(mask, 8).sum() == 3
    assert largest_component(mask, 4).sum() == 1


@settings(max_examples=100, deadline=None)
@given(masks)
def test_box_is_tight_and_half_open(mask):
    box = mask_to_box(torch.from_numpy(mask)[None])[0].tolist()
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        assert box == [0, 0, mask.shape[1], mask.shape[0]]
    else:
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="connectivity: expected 4 or 8, got 6"):
        largest_component(torch.ones(1, 2, 2, dtype=torch.bool), 6)
    with pytest.raises(TypeError, match="mask: expected Boolean, got"):
        mask_to_box(torch.ones(1, 2, 2))
