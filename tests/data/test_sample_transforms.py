import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as TF

from captum_robust.data import DataError, Sample, resize, resize_and_center_crop
from captum_robust.data.annotations import mask_box
from captum_robust.data.fit import crop_to

sides = st.integers(8, 90)


@st.composite
def boxed_samples(draw):
    """A sample whose mask is its box, of at least 4 pixels a side."""
    height, width = draw(sides), draw(sides)
    x0 = draw(st.integers(0, width - 4))
    y0 = draw(st.integers(0, height - 4))
    x1 = draw(st.integers(x0 + 4, width))
    y1 = draw(st.integers(y0 + 4, height))
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    box = torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32)
    return Sample(mask.float().expand(3, -1, -1), 7, box, "drawn", mask=mask)


def assert_box_follows_mask(sample):
    """The box of the mask is within half a pixel of the box, where the object is left at all."""
    assert sample.mask.shape == sample.image.shape[1:]
    if sample.mask.any():
        distance = (torch.tensor(mask_box(sample.mask)).reshape(-1, 4) - sample.boxes).abs().max()
        assert distance <= 0.5 + 1e-4


@given(boxed_samples(), sides, sides)
@settings(deadline=None, max_examples=150)
def test_the_box_follows_the_resize_as_the_mask_does(sample, height, width):
    resized = resize(sample, (height, width))
    assert resized.size == (height, width)
    assert resized.original_size == sample.size
    assert 0 <= resized.image.min() <= resized.image.max() <= 1
    assert_box_follows_mask(resized)


@given(boxed_samples(), st.integers(16, 64), st.data())
@settings(deadline=None, max_examples=150)
def test_the_box_follows_resize_and_centre_crop_as_the_mask_does(sample, short, data):
    crop = data.draw(st.integers(4, short))
    cropped = resize_and_center_crop(sample, short, crop)
    assert cropped.size == (crop, crop)
    if len(cropped.boxes):
        assert_box_follows_mask(cropped)
    else:
        assert not cropped.mask.any()


@given(sides, sides, st.integers(16, 64), st.data())
@settings(deadline=None, max_examples=50)
def test_resize_and_centre_crop_is_torchvisions(height, width, short, data):
    crop = data.draw(st.integers(4, short))
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    ours = resize_and_center_crop(Sample(image, None, torch.zeros(0, 4), "a"), short, crop)
    theirs = TF.center_crop(TF.resize(image, short, antialias=True), crop)
    torch.testing.assert_close(ours.image, theirs.clamp(0, 1))


def test_a_box_worked_by_hand():
    sample = Sample(torch.zeros(3, 100, 200), None, torch.tensor([[20.0, 10, 120, 60]]), "a")
    assert resize(sample, (50, 50)).boxes.tolist() == [[5, 5, 30, 30]]
    # Short side 50: 50×100, the middle 50×50 starts at x = 25; the box is at 10…60 before.
    assert resize_and_center_crop(sample, 50, 50).boxes.tolist() == [[0, 5, 35, 30]]
    # Squashed to 100×100, the middle 40×40 starts at 30; the box is at 10…60, 10…60 before.
    assert resize_and_center_crop(sample, (100, 100), 40).boxes.tolist() == [[0, 0, 30, 30]]


def test_boxes_outside_the_crop_are_dropped_and_the_others_clipped():
    boxes = torch.tensor([[0.0, 0, 30, 30], [20, 20, 60, 60], [0, 0, 31, 100]])
    cropped = crop_to(Sample(torch.zeros(3, 100, 100), None, boxes, "a"), (30, 30, 70, 70))
    assert cropped.boxes.tolist() == [[0, 0, 30, 30], [0, 0, 1, 40]]


def test_the_same_size_is_the_same_sample():
    sample = Sample(torch.rand(3, 5, 6), None, torch.zeros(0, 4), "a")
    assert resize(sample, (5, 6)) is sample


def test_one_pixel_grows():
    dot = Sample(torch.full((3, 1, 1), 0.3), None, torch.tensor([[0.0, 0, 1, 1]]), "dot")
    grown = resize(dot, 4)
    torch.testing.assert_close(grown.image, torch.full((3, 4, 4), 0.3))
    assert grown.boxes.tolist() == [[0, 0, 4, 4]]


@pytest.mark.parametrize("size", [0, -1, (3,), (2, 0), (1, 2, 3), (2.5, 2)])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=r"^size: expected a (whole number|number of pixels)"):
        resize(Sample(torch.zeros(3, 4, 4), None, torch.zeros(0, 4), "a"), size)


def test_a_crop_larger_than_the_image_is_refused():
    sample = Sample(torch.zeros(3, 4, 4), None, torch.zeros(0, 4), "a")
    with pytest.raises(ValueError, match="crop: expected one within the resized image"):
        resize_and_center_crop(sample, 8, 9)
    with pytest.raises(ValueError, match="window: expected a part of the image"):
        crop_to(sample, (0, 0, 5, 4))


def test_a_strip_that_would_fill_the_memory_is_a_data_error():
    strip = Sample(torch.zeros(3, 1, 100_000), None, torch.zeros(0, 4), "strip.png")
    with pytest.raises(DataError, match=r"strip\.png"):
        resize_and_center_crop(strip, 256, 224)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([5, 5, 400, 40], "lies outside the image of 48×40 pixels"),
        ([-20, 5, 30, 30], "lies outside the image of 48×40 pixels"),
        ([50, 5, 60, 30], "lies outside the image of 48×40 pixels"),
        ([5, 5, 5, 30], "has no area"),
        ([30, 5, 5, 30], "has no area"),
        ([5, 5, float("nan"), 30], "is not finite"),
    ],
)
def test_a_sample_whose_box_is_not_in_its_image_is_refused(box: list[float], message: str) -> None:
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0], box])
    with pytest.raises(DataError, match=f"dog: box 1 .*{message}"):
        Sample(torch.rand(3, 40, 48), 0, boxes, "dog")


def test_a_box_that_reaches_a_pixel_beyond_is_clipped() -> None:
    sample = Sample(torch.rand(3, 40, 48), 0, torch.tensor([[-0.5, 2, 49, 40.5]]), "dog")
    assert sample.boxes.tolist() == [[0, 2, 48, 40]]
    assert resize(sample, (400, 480)).boxes.tolist() == [[0, 20, 480, 400]]
