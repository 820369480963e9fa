"""What every input transform keeps to, and what each one does."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from captum_robust.defenses import (
    JPEG,
    PRESETS,
    BitDepth,
    CropAndRescale,
    GaussianBlur,
    GaussianNoise,
    HorizontalFlip,
    Identity,
    MedianBlur,
    Resize,
    TotalVariation,
    Transform,
    crop_ensemble,
    default_transforms,
)
from captum_robust.transforms.transform import as_transforms
from tests.networks import drawn

MAKE: dict[str, Callable[[], Transform]] = {
    "identity": Identity,
    "jpeg": JPEG,
    "jpeg_coarse": lambda: JPEG(10),
    "bit_depth": lambda: BitDepth(3),
    "gaussian_blur": lambda: GaussianBlur(2),
    "median_blur": MedianBlur,
    "wide_median_blur": lambda: MedianBlur(5),
    "gaussian_noise": lambda: GaussianNoise(0.2, seed=3),
    "half_size": lambda: Resize(0.5),
    "double_size": lambda: Resize(2.0, restore=False),
    "fixed_size": lambda: Resize(size=(9, 6), restore=False),
    "crop": lambda: CropAndRescale(0.6, seed=1),
    "crop_at": lambda: CropAndRescale((4, 3), (0.5, 1.0)),
    "flip": HorizontalFlip,
    "total_variation": lambda: TotalVariation(iterations=60),
    "total_variation_of_all": lambda: TotalVariation(0.1, drop=0),
}
# Quilting has its own: its bank is of so many channels.
every = pytest.mark.parametrize("transform", [m() for m in MAKE.values()], ids=list(MAKE))


@every
@pytest.mark.parametrize("shape", [(3, 22, 17), (3, 16, 16), (1, 9, 12), (3, 7, 5), (1, 5, 8)])
def test_images_of_any_size_stay_images(transform: Transform, shape: tuple[int, int, int]) -> None:
    x = drawn(2, *shape)
    kept = x.clone()
    made = transform(x)
    assert torch.equal(x, kept)
    assert made.shape[:2] == x.shape[:2]
    if not (isinstance(transform, Resize) and transform.moves_pixels):
        assert made.shape == x.shape
    assert made.min() >= 0
    assert made.max() <= 1
    assert made.dtype == x.dtype
    assert not made.requires_grad


@every
def test_batch_equals_one_by_one(transform: Transform) -> None:
    x = drawn(4)
    single = torch.cat([transform(image[None]) for image in x])
    torch.testing.assert_close(transform(x), single, atol=1e-6, rtol=0)


@every
def test_twice_the_same_and_the_global_generator_left_alone(transform: Transform) -> None:
    x = drawn()
    torch.manual_seed(5)
    first = transform(x)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    transform(x), transform.surrogate(x)
    assert torch.equal(transform(x), first)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_give_nearly_the_same(transform: Transform, dtype: torch.dtype) -> None:
    x = drawn().to(dtype)
    made = transform(x)
    assert made.dtype == dtype
    assert transform.surrogate(x).dtype == dtype
    expected = transform(x.float()).to(dtype)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)


@every
def test_autocast_does_not_coarsen(transform: Transform) -> None:
    x = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        made, soft = transform(x), transform.surrogate(x)
    assert torch.equal(made, transform(x))
    torch.testing.assert_close(soft, transform.surrogate(x))


@every
@pytest.mark.parametrize("shape", [(3, 22, 17), (1, 7, 5)])
def test_the_surrogate_has_the_shape_and_a_gradient(
    transform: Transform, shape: tuple[int, int, int]
) -> None:
    x = drawn(2, *shape).requires_grad_()
    with torch.no_grad():
        soft = transform.surrogate(x)
        exact = transform(x)
    assert soft.shape == exact.shape
    weights = torch.rand(soft.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((soft * weights).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert (soft.detach() - exact).abs().mean() < 0.03


def test_a_function_gets_the_precision_of_the_images() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x

    (transform,) = as_transforms(function)
    transform(drawn().half())
    assert seen[-1] == torch.float16


@every
def test_channels_last_and_views_are_taken(transform: Transform) -> None:
    x = drawn()
    made = transform(x)
    last = transform(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, made, atol=1e-6, rtol=0)
    view = x.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(transform(view), made, atol=1e-6, rtol=0)


@every
def test_constants_stay_and_come_back_where_they_were_seen(transform: Transform) -> None:
    value = 0.5 if isinstance(transform, BitDepth) else 128 / 255
    x = torch.full((1, 3, 20, 26), value)
    if not isinstance(transform, GaussianNoise):
        made = transform(x)
        torch.testing.assert_close(made, torch.full_like(made, value), atol=1e-6, rtol=0)
    ones = torch.ones(1, 1, *transform(x).shape[2:])
    maps, seen = transform.align(ones, (20, 26))
    assert maps.shape[2:] == (20, 26)
    torch.testing.assert_close(maps, torch.ones_like(maps) if seen is None else seen)


MOVING = [
    Resize(0.5, restore=False),
    Resize(2.0, restore=False),
    Resize(size=(31, 64), restore=False),
    HorizontalFlip(),
    CropAndRescale(0.5, (0.0, 0.0)),
    CropAndRescale((24, 30), (0.5, 0.5)),
    CropAndRescale(0.7, seed=4),
    CropAndRescale(40, (0.3, 0.4)),
]


@pytest.mark.parametrize("transform", MOVING, ids=repr)
@pytest.mark.parametrize("at", [(14, 19), (21, 30), (27, 22)])
def test_a_bright_dot_comes_back_to_its_place(transform: Transform, at: tuple[int, int]) -> None:
    assert transform.moves_pixels
    x = torch.zeros(1, 1, 45, 60)
    x[0, 0, at[0] - 1 : at[0] + 2, at[1] - 1 : at[1] + 2] = 1
    maps, seen = transform.align(transform(x), (45, 60))
    assert maps.shape == x.shape
    if seen is not None:
        assert seen.shape == x.shape
        assert (maps[seen == 0] == 0).all()
        if seen[0, 0, at[0], at[1]] == 0:
            return
    rows = torch.arange(45.0)[:, None]
    columns = torch.arange(60.0)
    mass = maps[0, 0] / maps.sum()
    assert abs((mass * rows).sum() - at[0]) < 1
    assert abs((mass * columns).sum() - at[1]) < 1


@pytest.mark.parametrize("transform", MOVING, ids=repr)
def test_maps_of_a_coarse_layer_are_aligned_too(transform: Transform) -> None:
    maps, seen = transform.align(torch.ones(2, 1, 7, 7), (45, 60))
    assert maps.shape[:2] == (2, 1)
    assert seen is None or torch.equal(maps, seen.expand_as(maps))


@pytest.mark.parametrize("quality", [5, 40, 75, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_opencv(quality: int, channels: int) -> None:
    x = drawn(1, channels, 37, 50)
    pixels = (x[0] * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
    _, file = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(file, cv2.IMREAD_UNCHANGED).reshape(pixels.shape)[..., ::-1]
    made = (JPEG(quality)(x)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.abs(made.astype(int) - decoded.astype(int)).max() <= 1


@pytest.mark.parametrize("quality", [10, 40, 75, 90])
@pytest.mark.parametrize("size", [(64, 80), (37, 50), (7, 5)])
def test_the_jpeg_surrogate_is_close_to_the_file(quality: int, size: tuple[int, int]) -> None:
    x = drawn(2, 3, *size)
    transform = JPEG(quality)
    error = (transform.surrogate(x) - transform(x)).abs().mean()
    change = (transform(x) - x).abs().mean()
    assert error < 0.25 * change


def test_the_jpeg_surrogate_is_exact_where_coefficients_are_multiples() -> None:
    # A second coding of the same file finds multiples of its tables and changes next to nothing.
    x = JPEG(50)(drawn(1, 1, 48, 48))
    torch.testing.assert_close(JPEG(50).surrogate(x), x, atol=2 / 255, rtol=0)


def test_bit_depth_has_one_level_more_than_a_display() -> None:
    x = torch.linspace(0, 1, 1000).view(1, 1, 10, 100)
    assert BitDepth(3)(x).unique().tolist() == [i / 8 for i in range(9)]
    assert BitDepth(8)(x).unique().numel() == 257


@pytest.mark.parametrize("size", [(22, 17), (7, 5)])
def test_blurs_are_those_of_scipy(size: tuple[int, int]) -> None:
    x = drawn(1, 3, *size)
    for sigma in (1.0, 2.5):
        expected = ndimage.gaussian_filter(x[0].double().numpy(), (0, sigma, sigma), truncate=4)
        np.testing.assert_allclose(GaussianBlur(sigma)(x)[0], expected, atol=1e-6)
    for width in (3, 5):
        expected = ndimage.median_filter(x[0].numpy(), (1, width, width), mode="reflect")
        np.testing.assert_array_equal(MedianBlur(width)(x)[0], expected)


def test_noise_has_its_deviation_and_is_the_same_on_every_image() -> None:
    x = torch.full((3, 3, 80, 80), 0.5)
    made = GaussianNoise(0.1, seed=0)(x) - 0.5
    assert torch.equal(made[0], made[2])
    assert abs(made.std() - 0.1) < 0.005
    assert abs(made.mean()) < 0.005
    assert not torch.equal(made, GaussianNoise(0.1, seed=1)(x) - 0.5)
    other = GaussianNoise(0.1, seed=0).with_seed(1)
    assert torch.equal(other(x), GaussianNoise(0.1, seed=1)(x))


def test_without_a_seed_each_call_draws_from_the_global_generator() -> None:
    x = torch.full((2, 3, 12, 12), 0.5)
    for transform in (GaussianNoise(0.1, seed=None), CropAndRescale(0.5, seed=None)):
        state = torch.get_rng_state()
        transform(x)
        assert not torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(GaussianNoise(seed=None)(x), GaussianNoise(seed=None)(x))
    with pytest.raises(ValueError, match="give a seed"):
        CropAndRescale(0.5, seed=None).align(x, (12, 12))


def test_half_size_drops_the_finest_pattern_and_keeps_a_ramp() -> None:
    checks = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float().view(1, 1, 16, 16)
    assert (Resize(0.5)(checks)[..., 4:-4, 4:-4] - 0.5).abs().max() < 1e-5
    ramp = torch.linspace(0.2, 0.8, 40).expand(1, 1, 40, 40)
    torch.testing.assert_close(Resize(0.5)(ramp)[..., 4:-4], ramp[..., 4:-4], atol=1e-5, rtol=0)


def test_a_crop_shows_its_window() -> None:
    x = drawn(2, 3, 40, 50)
    made = CropAndRescale((20, 25), (1.0, 0.0))(x)
    expected = torch.nn.functional.interpolate(x[:, :, 20:, :25], (40, 50), mode="bilinear")
    torch.testing.assert_close(made, expected)
    whole = CropAndRescale(1.0, seed=7)
    assert torch.equal(whole(x), x)
    assert torch.equal(whole.align(x, (40, 50))[1], torch.ones(1, 1, 40, 50))


def test_the_published_ensemble_is_thirty_windows_of_ninety_pixels() -> None:
    seen = [t.align(torch.ones(1, 1, 7, 7), (224, 224))[1] for t in crop_ensemble()]
    assert len(seen) == 30
    assert all(s.sum() == 90 * 90 for s in seen)
    places = {tuple(s[0, 0].nonzero()[0].tolist()) for s in seen}
    assert len(places) > 25
    tops = [top for top, _ in places]
    assert min(tops) < 30
    assert max(tops) > 224 - 90 - 30


@pytest.mark.parametrize("transform", [Resize(1.0), CropAndRescale(1.0)], ids=repr)
def test_an_image_that_keeps_its_size_keeps_its_gradient_at_black_and_white(
    transform: Transform,
) -> None:
    x = torch.tensor([0.0, 0.5, 1.0]).expand(1, 1, 3, 3).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(transform.surrogate(x).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_every_place_of_a_window_is_drawn() -> None:
    tops = {
        int(CropAndRescale((3, 3), seed=s).align(torch.ones(1, 1, 1, 1), (5, 5))[1].nonzero()[0, 2])
        for s in range(60)
    }
    assert tops == {0, 1, 2}


def test_ensembles_of_two_seeds_share_no_window() -> None:
    first, second = crop_ensemble(5, seed=0), crop_ensemble(5, seed=1)
    assert {t.seed for t in first}.isdisjoint(t.seed for t in second)


def test_the_grid_of_crops_goes_from_corner_to_corner() -> None:
    grid = crop_ensemble(size=0.5, sliding=True)
    corners = [
        tuple(t.align(torch.ones(1, 1, 1, 1), (20, 20))[1][0, 0].nonzero()[0].tolist())
        for t in grid
    ]
    assert corners == [(a, b) for a in (0, 5, 10) for b in (0, 5, 10)]


def test_presets_have_the_published_parameters() -> None:
    assert [repr(t) for t in PRESETS["guo2018_jpeg"]()] == ["JPEG(quality=75)"]
    assert [repr(t) for t in PRESETS["guo2018_bit_depth"]()] == ["BitDepth(bits=3)"]
    assert len(PRESETS["guo2018_crop_ensemble"]()) == 30
    assert len(PRESETS["guo2018_crop_grid"]()) == 9


def test_the_default_ensemble_is_one_that_can_be_used() -> None:
    x = drawn(2, 3, 24, 20)
    for transform in as_transforms(default_transforms()):
        assert transform(x).isfinite().all()
        assert not torch.equal(transform(x), x)


def test_a_transform_says_its_parameters() -> None:
    assert repr(GaussianNoise(0.1, seed=2)) == "GaussianNoise(seed=2, std=0.1)"
    assert repr(CropAndRescale(8, (0, 1))) == "CropAndRescale(size=(8, 8), position=(0.0, 1.0))"
    assert repr(HorizontalFlip()) == "HorizontalFlip()"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: JPEG(0), "quality"),
        (lambda: JPEG(101), "quality"),
        (lambda: JPEG(75.0), "quality"),
        (lambda: BitDepth(0), "bits"),
        (lambda: BitDepth(17), "bits"),
        (lambda: BitDepth("3"), "bits"),
        (lambda: GaussianBlur(0), "sigma"),
        (lambda: GaussianBlur(float("nan")), "sigma"),
        (lambda: GaussianBlur("wide"), "sigma"),
        (lambda: MedianBlur(4), "odd"),
        (lambda: MedianBlur(1), "size"),
        (lambda: GaussianNoise(-0.1), "std"),
        (lambda: GaussianNoise(0.1, seed=-1), "seed"),
        (lambda: GaussianNoise(0.1, seed=1.5), "seed"),
        (lambda: Resize(), "one of them"),
        (lambda: Resize(0.5, size=8), "one of them"),
        (lambda: Resize(-1), "scale"),
        (lambda: Resize(size=0), "size"),
        (lambda: Resize(size=(3, 4, 5)), "size"),
        (lambda: CropAndRescale(1.5), "size"),
        (lambda: CropAndRescale(0), "size"),
        (lambda: CropAndRescale("half"), "size"),
        (lambda: CropAndRescale(0.5, (0, 2)), "position"),
        (lambda: CropAndRescale(0.5, 0.5), "position"),
        (lambda: crop_ensemble(0), "n:"),
        (lambda: crop_ensemble(seed=None), "seed"),
    ],
)
def test_wrong_parameters_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@every
def test_wrong_images_are_refused(transform: Transform) -> None:
    for call in (transform, transform.surrogate):
        with pytest.raises(TypeError, match="tensor"):
            call(np.zeros((1, 3, 8, 8)))
        with pytest.raises(TypeError, match="floating point"):
            call(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        with pytest.raises(ValueError, match="N×C×H×W"):
            call(torch.zeros(3, 8, 8))
        with pytest.raises(ValueError, match="empty"):
            call(torch.zeros(0, 3, 8, 8))
        with pytest.raises(ValueError, match="NaN"):
            call(torch.full((1, 3, 8, 8), float("nan")))
        with pytest.raises(ValueError, match="outside"):
            call(torch.full((1, 3, 8, 8), 2.0))


def test_images_that_a_transform_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or 3 channels"):
        JPEG()(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="smaller than the window"):
        CropAndRescale(9)(torch.zeros(1, 3, 8, 20))
