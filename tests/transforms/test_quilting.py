from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from captum_robust.defenses import PRESETS, GaussianBlur, Quilting
from captum_robust.transforms.patch_bank import PatchBank
from captum_robust.transforms.transform import as_transforms
from tests.networks import drawn


def eight_bit(x: Tensor) -> Tensor:
    return (x * 255).round() / 255


def some_bank(patches: int = 300, channels: int = 3, patch: int = 5, seed: int = 0) -> Tensor:
    images = drawn(6, channels, 40, 40)
    return Quilting.fit(images, patches, patch, overlap=0, seed=seed).bank


def squares(queries: Tensor, patches: Tensor) -> Tensor:
    """q×M squared distances, one by one."""
    return (queries[:, None].double() - patches[None].double()).square().sum(-1)


@pytest.mark.parametrize("count", [1, 7, 256, 257, 3000])
@pytest.mark.parametrize("k", [1, 3])
def test_the_nearest_patches_are_those_of_a_full_search(count: int, k: int) -> None:
    if k > count:
        return
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 1, generator=generator)
    patches = (255 * (coarse + 0.1 * torch.rand(count, 12, generator=generator)) / 1.1).round()
    queries = (255 * torch.rand(200, 12, generator=generator)).round()
    queries[:50] = patches[torch.randint(count, (50,), generator=generator)]
    queries[50:100] = (255 * torch.rand(50, 1, generator=generator)).round()
    bank = PatchBank.of(patches)
    found = bank.nearest(queries, k).float()
    assert found.shape == (200, k, 12)
    got = (queries[:, None] - found).double().square().sum(-1)
    # The bank may hold a patch twice, so its own patches are the reference.
    expected = squares(queries, bank.patches.flatten(0, 1).float()).sort(dim=1).values[:, :k]
    assert torch.equal(got, expected)
    alone = squares(queries, patches).amin(dim=1)
    assert torch.equal(got[:, 0], alone)


def test_autocast_changes_nothing() -> None:
    x = drawn(1, 3, 20, 20)
    bank = some_bank(2000)
    expected = Quilting(bank)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Quilting(bank)(x), expected)


def test_a_tree_holds_every_patch() -> None:
    patches = (255 * torch.rand(1000, 5, generator=torch.Generator().manual_seed(0))).round()
    bank = PatchBank.of(patches)
    held = {tuple(p) for p in bank.patches.flatten(0, 1).tolist()}
    assert held == {tuple(int(v) for v in p) for p in patches.tolist()}
    assert bank.patches.shape[1] <= 256


def naive_quilting(x: Tensor, bank: Tensor, overlap: int, seam: bool) -> Tensor:
    """One image C×H×W of whole patches, patch by patch and pixel by pixel in raster order."""
    p = bank.shape[-1]
    step = p - overlap
    canvas = torch.full_like(x, math.nan)
    for y in range(0, x.shape[1] - p + 1, step):
        for z in range(0, x.shape[2] - p + 1, step):
            window = x[:, y : y + p, z : z + p]
            distances = ((bank - window) * 255).round().square().sum((1, 2, 3))
            new = bank[distances.argmin()]
            old = canvas[:, y : y + p, z : z + p].clone()
            keep = torch.zeros(p, p, dtype=torch.bool)
            if seam and overlap:
                error = (new - old).square().sum(0)
                if z > 0:
                    for r, c in enumerate(best_path(error[:, :overlap])):
                        keep[r, :c] = True
                if y > 0:
                    for r, c in enumerate(best_path(error[:overlap].T)):
                        keep[:c, r] = True
            canvas[:, y : y + p, z : z + p] = torch.where(keep, old, new)
    return canvas


def best_path(error: Tensor) -> list[int]:
    """The best of all paths from the first row to the last, by trying every one."""
    length, width = error.shape
    paths: list[list[int]] = [[c] for c in range(width)]
    for _ in range(length - 1):
        paths = [[*q, c] for q in paths for c in range(width) if abs(c - q[-1]) <= 1]
    return min(paths, key=lambda q: sum(float(error[r, c]) for r, c in enumerate(q)))


@pytest.mark.parametrize("seam", [True, False])
@pytest.mark.parametrize(("patch", "overlap"), [(5, 2), (5, 1), (4, 2), (6, 3), (3, 0)])
def test_quilting_is_that_of_a_plain_loop(patch: int, overlap: int, seam: bool) -> None:
    step = patch - overlap
    x = drawn(2, 3, patch + 5 * step, patch + 3 * step)
    bank = some_bank(150, patch=patch)
    made = Quilting(bank, overlap, seam=seam)(x)
    expected = [naive_quilting(eight_bit(image), bank, overlap, seam) for image in x]
    torch.testing.assert_close(made, torch.stack(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(22, 17), (7, 5), (3, 4), (5, 5), (1, 9)])
@pytest.mark.parametrize("seam", [True, False])
def test_images_of_any_size_are_covered(size: tuple[int, int], seam: bool) -> None:
    x = drawn(3, 3, *size)
    transform = Quilting(some_bank(), seam=seam)
    made = transform(x)
    assert made.shape == x.shape
    assert made.min() >= 0
    assert made.max() <= 1
    # No border is left out, as it is in the published code.
    assert ((made - x).abs().mean((0, 1)) < 0.5).all()
    single = torch.cat([transform(image[None]) for image in x])
    assert torch.equal(made, single)
    assert transform.surrogate(x).shape == x.shape


def test_an_image_whose_patches_are_in_the_bank_comes_back() -> None:
    x = eight_bit(drawn(1, 3, 20, 23))
    windows = x[0].unfold(1, 5, 3).unfold(2, 5, 3).flatten(1, 2).transpose(0, 1)
    bank = torch.cat((some_bank(400), windows))
    for seam in (True, False):
        torch.testing.assert_close(Quilting(bank, seam=seam)(x), x, atol=1e-6, rtol=0)


def test_grey_images_other_precisions_and_the_gradient_of_the_surrogate() -> None:
    transform = Quilting(some_bank(channels=1))
    x = drawn(2, 1, 16, 13)
    expected = transform(x)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert transform(x.to(dtype)).dtype == dtype
    assert torch.equal(transform(x.double()).float(), expected)
    x.requires_grad_()
    soft = transform.surrogate(x)
    torch.testing.assert_close(soft, GaussianBlur(1.0).surrogate(x))
    (gradient,) = torch.autograd.grad(soft[..., 8, 6].sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[..., 7:10, 5:8] > 0.04).all()


def test_drawn_neighbors_depend_on_the_seed_only() -> None:
    x = drawn(2, 3, 20, 20)
    transform = Quilting(some_bank(), neighbors=5, seed=1)
    torch.manual_seed(0)
    first = transform(x)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(transform(x), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(transform.with_seed(2)(x), first)
    assert torch.equal(transform(x[1:]), first[1:])
    assert (first - x).abs().mean() < 0.2


def test_fit_takes_as_many_patches_as_asked_from_all_images() -> None:
    # Image i is i/10 everywhere, so a patch tells where it is from.
    images = (torch.arange(10.0) / 10).view(10, 1, 1, 1).expand(10, 3, 8, 9)
    bank = Quilting.fit(images, 253, seed=0).bank
    counts = [int(((bank - i / 10).abs() < 0.01).flatten(1).all(1).sum()) for i in range(10)]
    assert sum(counts) == len(bank) == 253
    assert set(counts) == {25, 26}
    again = Quilting.fit(images, 253, seed=0).bank
    assert torch.equal(bank, again)
    few = Quilting.fit(drawn(9), 4, seed=0).bank
    assert len(few) == 4


def test_fit_reads_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    images = eight_bit(drawn(2, 3, 12, 12))
    for name, image in zip(("a/one.png", "two.png"), images, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / name)
    assert torch.equal(
        Quilting.fit(tmp_path, 40, seed=1).bank, Quilting.fit(images, 40, seed=1).bank
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files"):
        Quilting.fit(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder"):
        Quilting.fit(tmp_path / "none")


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    x = drawn()
    made = Quilting(some_bank(600), 1, seam=False, neighbors=2, seed=7)
    made.save(tmp_path / "bank.safetensors")
    loaded = Quilting.load(tmp_path / "bank.safetensors")
    assert repr(loaded) == repr(made)
    assert torch.equal(loaded(x), made(x))
    assert torch.equal(loaded.bank, made.bank)
    unseeded = Quilting(some_bank(), seed=None)
    unseeded.save(tmp_path / "bank.safetensors")
    assert Quilting.load(tmp_path / "bank.safetensors").seed is None


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    with pytest.raises(FileNotFoundError):
        Quilting.load(path)
    Quilting(some_bank()).save(tmp_path / "bank.pt")  # any name
    assert torch.equal(Quilting.load(tmp_path / "bank.pt").bank, some_bank())
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="safetensors"):
        Quilting.load(path)
    save_file({"patches": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no quilting"):
        Quilting.load(path)
    Quilting(some_bank()).save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for broken in ({**tensors, "mean": torch.zeros(3)}, {"mean": torch.zeros(3)}):
        save_file(broken, path, metadata)
        with pytest.raises(ValueError, match="can be used"):
            Quilting.load(path)
    (kind, text), *_ = metadata.items()
    wrong_settings = ({"patch": 7}, {"overlap": 4}, {"neighbors": "many"}, {"patch": 5.0}, {"a": 1})
    for wrong in wrong_settings:
        save_file(tensors, path, {kind: json.dumps(json.loads(text) | wrong)})
        with pytest.raises(ValueError, match="can be used"):
            Quilting.load(path)


@pytest.mark.parametrize(("seam", "seed"), [("0", "7"), ("1", "")])
def test_a_file_of_version_0_1_is_read(tmp_path: Path, seam: str, seed: str) -> None:
    made = Quilting(some_bank(), 1, seam=seam == "1", neighbors=2, seed=int(seed) if seed else None)
    settings = {"channels": "3", "patch": "5", "overlap": "1", "seam": seam, "neighbors": "2"}
    metadata = {"format": "captum-robust quilting 1", **settings, "seed": seed}
    tensors = {name: tensor.contiguous() for name, tensor in made._bank.tensors().items()}
    save_file(tensors, tmp_path / "bank.safetensors", metadata)
    loaded = Quilting.load(tmp_path / "bank.safetensors")
    assert repr(loaded) == repr(made)
    assert torch.equal(loaded.bank, made.bank)


def test_the_published_parameters() -> None:
    (transform,) = PRESETS["guo2018_quilting"](drawn(), patches=50)
    assert isinstance(transform, Quilting)
    assert (transform.patch, transform.overlap, transform.neighbors) == (5, 2, 1)
    assert as_transforms(transform) == (transform,)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (([1.0],), TypeError, "bank"),
        ((torch.zeros(4, 3, 5, 5, dtype=torch.uint8),), TypeError, "bank"),
        ((torch.zeros(4, 3, 5),), ValueError, "M×C×p×p"),
        ((torch.zeros(0, 3, 5, 5),), ValueError, "M×C×p×p"),
        ((torch.zeros(4, 3, 5, 4),), ValueError, "M×C×p×p"),
        ((torch.full((4, 3, 5, 5), 2.0),), ValueError, r"\[0, 1\]"),
        ((torch.full((4, 3, 5, 5), math.nan),), ValueError, r"\[0, 1\]"),
        ((torch.zeros(4, 3, 5, 5), 3), ValueError, "overlap"),
        ((torch.zeros(4, 3, 5, 5), -1), ValueError, "overlap"),
    ],
)
def test_wrong_banks_are_refused(arguments: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Quilting(*arguments)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"images": [1]}, TypeError, "images"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError, "floating point"),
        ({"images": torch.zeros(3, 8, 8)}, ValueError, "N×C×H×W"),
        ({"images": torch.zeros(0, 3, 8, 8)}, ValueError, "N×C×H×W"),
        ({"images": torch.zeros(1, 3, 4, 8)}, ValueError, "smaller than"),
        ({"patches": 0}, ValueError, "patches"),
        ({"patch": 0}, ValueError, "patch"),
        ({"seed": None}, ValueError, "seed"),
        ({"patches": 3, "neighbors": 4}, ValueError, "neighbors"),
        ({"neighbors": 0}, ValueError, "neighbors"),
    ],
)
def test_wrong_sources_are_refused(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Quilting.fit(**{"images": torch.zeros(1, 3, 8, 8), "patches": 10, **settings})


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="3 channels"):
        Quilting(some_bank())(torch.zeros(1, 1, 8, 8))


def test_two_banks_do_not_look_the_same() -> None:
    images = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, other = (Quilting.fit(each, patches=20) for each in images)
    assert repr(one) != repr(other)
    assert repr(one) == repr(Quilting.fit(images[0], patches=20))
