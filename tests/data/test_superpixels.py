"""Super-pixels, and the file that keeps those of a data set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor

from captum_robust.data import cached_superpixels, superpixel_path, superpixels
from captum_robust.data.tiny_imagenet import TinyImageNet
from captum_robust.nn import spread, superpixel_means

MODULE = sys.modules["captum_robust.data.superpixels"]  # the function of this name hides it


def pictures(n: int = 4, size: tuple[int, int] = (24, 32), seed: int = 0) -> Tensor:
    """Smooth, and each another."""
    drawn = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(drawn, size, mode="bilinear").clamp(0, 1)


@pytest.fixture
def images() -> Tensor:
    return pictures()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "s.safetensors"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of each image that is segmented anew."""
    numbers: list[int] = []
    real = MODULE.superpixels

    def count(images: Tensor, *arguments: Any, **options: Any) -> Tensor:
        numbers.append(len(numbers))
        return real(images, *arguments, **options)

    monkeypatch.setattr(MODULE, "superpixels", count)
    return numbers


def metadata_of(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        # Clones: they are views of the file, which a test overwrites.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata()


# Super-pixels


def test_they_are_connected_regions_with_numbers_without_gaps(images: Tensor) -> None:
    segments = superpixels(images, 20)
    assert segments.dtype == torch.int64
    assert segments.shape == (4, 24, 32)
    for one in segments.numpy():
        count = one.max() + 1
        assert set(np.unique(one)) == set(range(count))
        assert 10 <= count <= 30
        for number in range(count):
            assert ndimage.label(one == number)[1] == 1


def test_an_edge_of_the_image_is_an_edge_of_them() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, 0, :, 13:] = 1
    segments = superpixels(image, 16)[0]
    assert set(segments[:, :13].unique().tolist()).isdisjoint(segments[:, 13:].unique().tolist())


def test_no_image_sees_another(images: Tensor) -> None:
    batch = superpixels(images, 20)
    assert torch.equal(batch, torch.cat([superpixels(image[None], 20) for image in images]))


def test_grey_images_have_those_of_their_brightness() -> None:
    grey = torch.zeros(1, 1, 32, 32)
    grey[:, :, 13:] = 1
    segments = superpixels(grey, 16)[0]
    assert set(segments[:13].unique().tolist()).isdisjoint(segments[13:].unique().tolist())


def test_half_precision_and_a_graph_are_no_obstacle(images: Tensor) -> None:
    expected = superpixels(images.bfloat16().float(), 20)
    assert torch.equal(superpixels(images.bfloat16(), 20), expected)
    assert not superpixels(images.requires_grad_(), 20).requires_grad


def test_images_that_cannot_be_segmented_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images: 24×32 pixels are too few for 193 .*=192"):
        superpixels(images, 193)
    assert superpixels(images, 192).max() < 24 * 32
    with pytest.raises(ValueError, match=r"images: expected pixels in \[0, 1\], got 0.* to 25"):
        superpixels(images * 255)
    broken = images.clone()
    broken[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="images: NaN or infinity in sample 2"):
        superpixels(broken)
    with pytest.raises(ValueError, match=r"N×3×H×W, not empty, got \(0, 3, 24, 32\)"):
        superpixels(images[:0])
    with pytest.raises(ValueError, match=r"got \(3, 24, 32\)"):
        superpixels(images[0])
    with pytest.raises(ValueError, match=r"got \(4, 2, 24, 32\)"):
        superpixels(images[:, :2])
    with pytest.raises(TypeError, match=r"images: .*floating point, got torch\.uint8"):
        superpixels((images * 255).byte())
    with pytest.raises(TypeError, match=r"images: .*got list"):
        superpixels([0.5])  # type: ignore[arg-type]
    for wrong in (0, 2.5, True, "many"):
        with pytest.raises(ValueError, match="n_segments: expected a whole number from 1"):
            superpixels(images, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compactness: expected a positive number, got 0"):
        superpixels(images, 20, compactness=0)


@pytest.mark.data
def test_those_of_photographs_are_more_alike_inside_than_squares(real_data: Path) -> None:
    dataset = TinyImageNet(real_data / "tiny-imagenet-100.tar", "val")
    images = torch.stack([dataset[i].image for i in range(16)])
    found = superpixels(images, 100)
    count = found.amax(dim=(1, 2)) + 1
    assert ((count >= 50) & (count <= 150)).all()
    row = torch.arange(64) // 6  # 11×11 squares: more of them than of super-pixels
    squares = (11 * row[:, None] + row).expand(16, -1, -1)

    def left(segments: Tensor) -> float:
        """The variance within regions."""
        return float(
            (images - spread(superpixel_means(images, segments), segments)).square().mean()
        )

    assert count.float().mean() < 121
    assert left(found) < 0.75 * left(squares)


# The file


def test_they_are_computed_once(images: Tensor, file: Path, computed: list[int]) -> None:
    first = cached_superpixels(images, file, 20)
    assert len(computed) == 4
    assert torch.equal(first.long(), superpixels(images, 20))
    assert first.dtype == torch.uint8
    assert torch.equal(cached_superpixels(images, file, 20), first)
    assert len(computed) == 4
    assert list(file.parent.iterdir()) == [file]


def test_more_than_256_superpixels_are_kept_too(file: Path) -> None:
    images = pictures(3, (64, 64))
    images[1] = 0.5  # its super-pixels are a grid
    expected = superpixels(images, 400)
    assert expected.max() > 255
    assert torch.equal(cached_superpixels(images, file, 400).long(), expected)
    assert torch.equal(cached_superpixels(images, file, 400).long(), expected)


def test_without_a_file_nothing_is_kept(images: Tensor, computed: list[int]) -> None:
    for _ in range(2):
        cached_superpixels(images, None, 20)
    assert len(computed) == 8


def test_items_may_be_tuples_that_begin_with_an_image(images: Tensor, file: Path) -> None:
    items = [(image, "a class") for image in images]
    assert torch.equal(cached_superpixels(items, file, 20).long(), superpixels(images, 20))


def test_a_killed_run_goes_on(
    images: Tensor, file: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(list[Tensor]):
        def __getitem__(self, index: Any) -> Any:
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    monkeypatch.setattr(MODULE, "_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        cached_superpixels(Killed(images), file, 20)
    assert len(computed) == 3
    result = cached_superpixels(images, file, 20)
    assert len(computed) == 4
    assert torch.equal(result.long(), superpixels(images, 20))


def test_a_grown_data_set_goes_on_from_its_old_images(
    images: Tensor, file: Path, computed: list[int]
) -> None:
    cached_superpixels(images[:3], file, 20)
    cached_superpixels(images, file, 20)
    assert len(computed) == 4


def test_a_file_of_other_images_is_refused(images: Tensor, file: Path) -> None:
    cached_superpixels(images, file, 20)
    changed = images.clone()
    changed[2, 0, 5, 5] += 0.001
    with pytest.raises(ValueError, match=r"s\.safetensors is of other images: number 2 .*delete"):
        cached_superpixels(changed, file, 20)
    with pytest.raises(ValueError, match="it holds 4, the data set 3"):
        cached_superpixels(images[:3], file, 20)
    with pytest.raises(ValueError, match=r"is of 20 super-pixels .*, not of 21 super-pixels"):
        cached_superpixels(images, file, 21)
    with pytest.raises(ValueError, match=r"of compactness 10\.0 .* not of .* compactness 5\.0"):
        cached_superpixels(images, file, 20, compactness=5)
    with pytest.raises(ValueError, match=r"for 24×32 pixels, not of .* for 20×20 pixels"):
        cached_superpixels(pictures(4, (20, 20)), file, 20)


def test_a_torn_or_foreign_file_is_refused(images: Tensor, file: Path) -> None:
    cached_superpixels(images, file, 20)
    whole = file.read_bytes()
    tensors, metadata = metadata_of(file)
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"not a safetensors file .*delete the file"):
        cached_superpixels(images, file, 20)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="not a safetensors file"):
        cached_superpixels(images, file, 20)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="holds no super-pixels; delete the file"):
        cached_superpixels(images, file, 20)
    damaged = tensors["segments"].clone()
    damaged[1, 3, 4] += 1
    for wrong in (
        {**tensors, "segments": damaged},
        {**tensors, "segments": tensors["segments"][:2]},
        {**tensors, "checksums": tensors["checksums"][:0]},
        {**tensors, "segments": tensors["segments"].float()},
    ):
        save_file(wrong, file, metadata)
        with pytest.raises(ValueError, match="is damaged; delete the file"):
            cached_superpixels(images, file, 20)
    save_file({"segments": tensors["segments"]}, file, metadata)
    with pytest.raises(ValueError, match="holds no super-pixels"):
        cached_superpixels(images, file, 20)


def test_a_place_that_cannot_be_written_is_known_after_one_image(
    images: Tensor, tmp_path: Path, computed: list[int]
) -> None:
    (tmp_path / "taken").write_text("no folder")
    with pytest.raises(OSError, match="could not be written"):
        cached_superpixels(images, tmp_path / "taken" / "s.safetensors", 20)
    assert len(computed) == 1


def test_data_sets_that_cannot_be_segmented_are_refused(images: Tensor, file: Path) -> None:
    with pytest.raises(ValueError, match="images: there are none"):
        cached_superpixels([], file)
    with pytest.raises(ValueError, match=r"ends in \.safetensors, got s\.npz"):
        cached_superpixels(images, file.with_name("s.npz"))
    with pytest.raises(ValueError, match=r"all of \(24, 32\) pixels, got \(20, 20\) at 1"):
        cached_superpixels([images[0], pictures(1, (20, 20))[0]], file, 20)
    with pytest.raises(TypeError, match=r"images: expected C×H×W, .*got str"):
        cached_superpixels(["a.png"], file)
    with pytest.raises(ValueError, match="too few for 200 super-pixels"):
        cached_superpixels(images, file.with_name("t.safetensors"), 200)
    with pytest.raises(ValueError, match="n_segments"):
        cached_superpixels(images, file, 0)


def test_the_place_beside_a_data_set_tells_size_number_and_part(tmp_path: Path) -> None:
    train = superpixel_path(tmp_path / "set", 100, (64, 48), "train")
    assert train.parent == tmp_path
    assert train != superpixel_path(tmp_path / "set", 100, (64, 48), "val")
    assert train != superpixel_path(tmp_path / "set", 50, (64, 48), "train")
    assert train != superpixel_path(tmp_path / "set", 100, (48, 64), "train")
    name = superpixel_path(tmp_path / ("ü" * 127), 100, (64, 48), "train").name
    assert 254 <= len(name.encode()) <= 255
    assert name.endswith("ü.train-64x48-100.superpixels.safetensors")
