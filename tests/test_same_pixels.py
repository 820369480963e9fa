"""One picture in every format, mode and orientation: the same pixels wherever images are read."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from captum_robust.attacks import FGSM
from captum_robust.benchmark import attack_images, compare
from captum_robust.data import load_image
from captum_robust.data.folder import ImageFolder
from captum_robust.models import Classifier
from captum_robust.show.explain import explain_image, pictures_of
from captum_robust.training.image_sets import CroppedImages
from captum_robust.training.robust_recipe import RobustRecipe
from captum_robust.training.settings import RobustSettings
from captum_robust.transforms.quilting import _source

SIDE = 16
Pixels = npt.NDArray[Any]
Case = Callable[[Pixels, Path], Pixels]
"""Writes a file from numbers SIDE×SIDE×4 in 0 to 255, and returns what it shows, H×W×3 in [0, 1],
worked out from the numbers."""
CASES: dict[str, tuple[Case, float]] = {}
"""Name of a file -> how it is written, and by how many levels of 255 the format may be off."""


def case(name: str, levels: float = 0.01) -> Callable[[Case], Case]:
    def kept(write: Case) -> Case:
        CASES[name] = (write, levels)
        return write

    return kept


def over_white(color: Pixels, alpha: Pixels) -> Pixels:
    """Colours in 0 to 255, H×W×3, through which a white ground is seen."""
    share = alpha[..., None] / 255
    return (color * share + 255 * (1 - share)) / 255


def grey(values: Pixels) -> Pixels:
    """Of values in [0, 1], H×W."""
    return np.repeat(values[..., None], 3, axis=2)


def rgb(name: str, levels: float = 0.01, **options: Any) -> None:
    @case(name, levels)
    def write(v: Pixels, path: Path) -> Pixels:
        Image.fromarray(v[..., :3]).save(path, **options)
        return v[..., :3] / 255


def rgba(name: str, levels: float = 1, **options: Any) -> None:
    @case(name, levels)
    def write(v: Pixels, path: Path) -> Pixels:
        Image.fromarray(v).save(path, **options)
        return over_white(v[..., :3], v[..., 3])


def grey_8(name: str, levels: float = 0.01, **options: Any) -> None:
    @case(name, levels)
    def write(v: Pixels, path: Path) -> Pixels:
        Image.fromarray(v[..., 0]).save(path, **options)
        return grey(v[..., 0] / 255)


def grey_16(name: str) -> None:
    @case(name)
    def write(v: Pixels, path: Path) -> Pixels:
        values = v[..., 0].astype(np.uint16) * 256 + v[..., 1]
        Image.fromarray(values).save(path)
        return grey(values / 65535)


def rgb_16(name: str) -> None:
    @case(name, levels=1)  # Pillow keeps the upper byte
    def write(v: Pixels, path: Path) -> Pixels:
        values = v[..., :3].astype(np.uint16) * 256 + v[..., 1:4]
        assert cv2.imwrite(str(path), values[..., ::-1].copy())
        return values / 65535


def rgba_16(name: str) -> None:
    @case(name, levels=1.5)
    def write(v: Pixels, path: Path) -> Pixels:
        values = v.astype(np.uint16) * 256 + v[..., [1, 2, 3, 0]]
        assert cv2.imwrite(str(path), values[..., [2, 1, 0, 3]])
        return over_white(values[..., :3] / 257, values[..., 3] / 257)


def black_and_white(name: str) -> None:
    @case(name)
    def write(v: Pixels, path: Path) -> Pixels:
        Image.fromarray(v[..., 0] > 127).save(path)
        return grey((v[..., 0] > 127) * 1.0)


def palette(name: str, transparent: int | None = None) -> None:
    @case(name)
    def write(v: Pixels, path: Path) -> Pixels:
        colors, indices = v[0, :, :3], v[..., 0] % SIDE
        image = Image.fromarray(indices)
        image.putpalette(colors.tobytes())
        image.save(path, **({} if transparent is None else {"transparency": transparent}))
        shown = colors[indices] / 255
        return np.where((indices == transparent)[..., None], 1.0, shown)


def cmyk(name: str, levels: float, **options: Any) -> None:
    @case(name, levels)
    def write(v: Pixels, path: Path) -> Pixels:
        Image.fromarray(v, "CMYK").save(path, **options)
        ink = v / 255
        return (1 - ink[..., :3]) * (1 - ink[..., 3:])


def sideways(name: str, orientation: int, levels: float = 0.01, **options: Any) -> None:
    """``orientation``: how EXIF says that the upright image has to be made from the stored one."""

    @case(name, levels)
    def write(v: Pixels, path: Path) -> Pixels:
        upright = v[..., :3]
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: upright.transpose(1, 0, 2)[::-1],  # to be turned clockwise
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: upright.transpose(1, 0, 2)[:, ::-1],  # to be turned anticlockwise
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
        return upright / 255


@case("grey-alpha.png", 1)
def grey_alpha(v: Pixels, path: Path) -> Pixels:
    Image.fromarray(v[..., [0, 3]], "LA").save(path)
    return over_white(v[..., [0, 0, 0]], v[..., 3])


@case("grey-key.png")
def grey_key(v: Pixels, path: Path) -> Pixels:
    Image.fromarray(v[..., 0]).save(path, transparency=int(v[0, 0, 0]))
    return grey(np.where(v[..., 0] == v[0, 0, 0], 1.0, v[..., 0] / 255))


@case("grey-16-key.png")
def grey_16_key(v: Pixels, path: Path) -> Pixels:
    values = v[..., 0].astype(np.uint16) * 256 + v[..., 1]
    Image.fromarray(values).save(path)
    key = int(values[0, 0]).to_bytes(2, "big")
    chunk = b"tRNS" + key
    chunk = len(key).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    data = path.read_bytes()
    place = data.index(b"IDAT") - 4
    path.write_bytes(data[:place] + chunk + data[place:])
    return grey(np.where(values == values[0, 0], 1.0, values / 65535))


@case("color-key.png")
def color_key(v: Pixels, path: Path) -> Pixels:
    key = v[0, 0, :3]
    Image.fromarray(v[..., :3]).save(path, transparency=tuple(int(c) for c in key))
    return np.where((v[..., :3] == key).all(2)[..., None], 1.0, v[..., :3] / 255)


@case("float.tif")
def floating(v: Pixels, path: Path) -> Pixels:
    values = (v[..., 0] / 255).astype(np.float32)
    Image.fromarray(values).save(path)
    return grey(values)


@case("white-is-zero-16.tif")
def white_is_zero(v: Pixels, path: Path) -> Pixels:
    values = v[..., 0].astype(np.uint16) * 256 + v[..., 1]
    Image.fromarray(65535 - values).save(path, tiffinfo={262: 0})
    return grey(values / 65535)


rgb("color.png")
grey_8("grey.png")
rgba("alpha.png")
grey_16("sixteen.png")
rgb_16("color-sixteen.png")
rgba_16("alpha-sixteen.png")
black_and_white("bits.png")
palette("palette.png")
palette("palette-key.png", transparent=3)
sideways("turned-6.png", 6)
rgb("color.jfif", 12, format="JPEG", quality=95, subsampling=0)
grey_8("grey.jpg", 9, quality=95)
cmyk("cmyk.jpg", 16, quality=95)
for number in range(1, 9):
    sideways(f"turned-{number}.jpg", number, 12, quality=95, subsampling=0)
rgb("color.webp", lossless=True)
rgba("alpha.webp", lossless=True, exact=True)
sideways("turned-8.webp", 8, lossless=True)
rgb("color.bmp")
grey_8("grey.bmp")
black_and_white("bits.bmp")
rgb("color.tif")
rgb("packed.tiff", compression="tiff_lzw")
cmyk("cmyk.tif", 2)
grey_16("sixteen.tif")
rgb_16("color-sixteen.tif")
sideways("turned-5.tif", 5)
palette("palette.gif")
palette("palette-key.gif", transparent=3)
rgb("color.jp2", irreversible=False)
grey_8("grey.jp2", irreversible=False)
grey_16("sixteen.jp2")
rgb("color.tga")
rgba("alpha.tga")
rgb("color.ppm")
grey_8("grey.pgm")
grey_16("sixteen.pgm")
black_and_white("bits.pbm")
rgb("without-suffix", format="PNG")
rgb("dotted.0001", format="PNG")
if ".avif" in Image.registered_extensions():
    rgb("color.avif", 12, quality=100, subsampling="4:4:4")
    rgba("alpha.avif", 12, quality=100, subsampling="4:4:4")
    sideways("turned-7.avif", 7, 12, quality=100, subsampling="4:4:4")


def numbers_of(name: str) -> Pixels:
    """Blocks of four pixels in colours that no other case has."""
    drawn = np.random.default_rng(zlib.crc32(name.encode()))
    blocks = drawn.integers(0, 256, (SIDE // 4, SIDE // 4, 4), dtype=np.uint8)
    return blocks.repeat(4, axis=0).repeat(4, axis=1)


Folder = tuple[Path, dict[str, tuple[Tensor, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder of two classes, and what each file shows with the tolerance in [0, 1]."""
    root, shows = tmp_path_factory.mktemp("images"), {}
    for i, (name, (write, levels)) in enumerate(CASES.items()):
        path = root / ("goldfish", "tench")[i % 2] / name
        path.parent.mkdir(exist_ok=True)
        expected = torch.from_numpy(write(numbers_of(name), path)).float().permute(2, 0, 1)
        shows[f"{path.parent.name}/{name}"] = (expected, levels / 255)
    return root, shows


class Seen(nn.Module):
    """A classifier of two classes that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.images += [*x.detach().clone()]
        return self.conv(x).mean((2, 3))


@pytest.fixture
def seen() -> tuple[Seen, Classifier]:
    torch.manual_seed(0)
    net = Seen()
    return net, Classifier(net, (0.0,) * 3, (1.0,) * 3, SIDE, class_names=["goldfish", "tench"])


def off(image: Tensor, expected: Tensor, tolerance: float) -> float:
    """By how much an image is off beyond the tolerance and the rounding to 8 bits."""
    assert image.shape == expected.shape
    return float((image - expected).abs().max()) - tolerance - 0.51 / 255


def assert_all_seen(images: list[Tensor], shows: dict[str, tuple[Tensor, float]]) -> None:
    """Each of the files is among the images; no two show the same."""
    missing = [
        name
        for name, (expected, tolerance) in shows.items()
        if min(off(image, expected, tolerance) for image in images) > 0
    ]
    assert missing == []


def test_there_are_forty_kinds_and_each_is_told_from_the_others(folder: Folder) -> None:
    assert len(CASES) >= 40
    shown = list(folder[1].values())
    for i, (one, tolerance) in enumerate(shown):
        assert all(off(other, one, tolerance) > 0 for other, _ in shown[:i])


@pytest.mark.parametrize("name", CASES)
def test_the_loader_gives_what_was_drawn(tmp_path: Path, name: str) -> None:
    write, levels = CASES[name]
    expected = torch.from_numpy(write(numbers_of(name), tmp_path / name)).float().permute(2, 0, 1)
    torch.testing.assert_close(load_image(tmp_path / name), expected, atol=levels / 255, rtol=0)


def test_explain_shows_the_model_these_pixels(
    folder: Folder, seen: tuple[Seen, Classifier], tmp_path: Path
) -> None:
    root, shows = folder
    net, model = seen
    pictures = pictures_of([root], tmp_path)
    assert len(pictures) == len(shows)
    for picture, file in pictures:
        net.images.clear()
        explain_image(model, file, {}, picture, top=1)
        expected, tolerance = shows[file.relative_to(root).as_posix()]
        assert off(net.images[0], expected, tolerance) <= 0, file


def test_attack_shows_the_model_these_pixels(
    folder: Folder, seen: tuple[Seen, Classifier], tmp_path: Path
) -> None:
    net, model = seen
    attacks = {"fgsm 1/255": FGSM(model, 1 / 255)}
    dataset = ImageFolder(folder[0], class_names=model.class_names)
    attack_images(model, dataset, attacks, tmp_path / "run", progress=False)
    assert_all_seen(net.images, folder[1])


def test_compare_shows_methods_these_pixels(
    folder: Folder, seen: tuple[Seen, Classifier], tmp_path: Path
) -> None:
    shown: list[Tensor] = []

    def method(images: Tensor, target: Tensor) -> Tensor:
        shown.extend(images)
        return images.mean(1)

    dataset = ImageFolder(folder[0], class_names=seen[1].class_names)
    compare(seen[1], dataset, {"mean": method}, out=tmp_path / "run", progress=False)
    assert_all_seen(shown, folder[1])


def test_training_is_on_these_pixels(folder: Folder, tmp_path: Path) -> None:
    root, shows = folder
    settings = RobustSettings(images=root, out=tmp_path / "run", size=SIDE, device="cpu")
    images = RobustRecipe(settings).images
    whole = CroppedImages(ImageFolder(root, labels="sorted"), SIDE).whole()
    assert images.class_names == ["goldfish", "tench"]
    for those in (images, whole):
        assert sorted(those.ids) == sorted(shows)
        for i, id in enumerate(those.ids):
            image, label = those[i]
            assert images.class_names[label] == id.split("/")[0]
            assert off(image, *shows[id]) <= 0, id


def test_quilting_takes_its_patches_from_these_pixels(folder: Folder) -> None:
    root, shows = folder
    count, image_of = _source(root)
    images = dict(image_of(i) for i in range(count))
    assert images.keys() == shows.keys()
    assert [name for name, image in images.items() if off(image, *shows[name]) > 0] == []
