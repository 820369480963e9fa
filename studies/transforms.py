"""What the input transforms cost, beside scikit-image's denoising and a full patch search.

    python studies/transforms.py IMAGES [--images 8] [--patches 100000]

IMAGES is any folder of images; the first are transformed at 224×224, and the bank for quilting is
made of the rest. Milliseconds an image are the processor's, the median of three rounds in each of
which contenders take turns; "surrogate" is forward and backward together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import race, rounded, study
from torch import Tensor

from captum_robust._resize import resize_image
from captum_robust.data import load_image
from captum_robust.data.image_lists import list_images
from captum_robust.defenses import (
    JPEG,
    BitDepth,
    CropAndRescale,
    GaussianBlur,
    GaussianNoise,
    HorizontalFlip,
    MedianBlur,
    Quilting,
    Resize,
    TotalVariation,
    Transform,
)

ROUNDS = 3


def transforms(folder: Path, *, images: int = 8, patches: int = 100_000) -> None:
    """Print all tables, one after the other."""
    files = list(list_images(folder).values())
    if len(files) <= images:
        raise SystemExit(f"{len(files)} images in {folder}, too few")
    loaded = torch.stack([rounded(resize_image(load_image(f), (224, 224))) for f in files])
    x, rest = loaded[:images], loaded[images:]
    start = time.perf_counter()
    quilting = Quilting.fit(rest, patches)
    print(
        f"{len(x)} images 224×224; bank of {patches} patches: {time.perf_counter() - start:.1f} s"
    )
    each(x, quilting)
    denoising(x)
    search(x, quilting)


def each(x: Tensor, quilting: Quilting) -> None:
    """Each transform, and its surrogate with the backward pass."""
    listed: list[Transform] = [
        JPEG(75),
        BitDepth(3),
        GaussianBlur(1),
        GaussianBlur(2),
        MedianBlur(3),
        MedianBlur(5),
        GaussianNoise(0.1),
        Resize(0.5),
        CropAndRescale(),
        HorizontalFlip(),
        TotalVariation(),
        quilting,
    ]
    print(f"\n{'ms an image':64}{'exact':>8}{'surrogate':>11}")
    for transform in listed:
        exact, surrogate = taking_turns(
            x, lambda i, t=transform: t(i), lambda i, t=transform: backward(t, i)
        )
        print(f"{transform!r:64}{exact:8.1f}{surrogate:11.1f}")


def denoising(x: Tensor) -> None:
    """Total variation without dropped pixels, the time and the objective reached."""
    from skimage.restoration import denoise_tv_bregman, denoise_tv_chambolle

    def peer(function: Callable[..., object], **settings: float) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            arrays = images.permute(0, 2, 3, 1).numpy()
            made = [torch.as_tensor(function(a, channel_axis=-1, **settings)) for a in arrays]
            return torch.stack(made).permute(0, 3, 1, 2)

        return run

    ours = TotalVariation(0.03, drop=0)
    contenders = {
        "TotalVariation(drop=0), 50 iterations": ours,
        "scikit-image denoise_tv_bregman": peer(denoise_tv_bregman, weight=1 / 0.03),
        "scikit-image denoise_tv_bregman, eps=1e-6": peer(
            denoise_tv_bregman, weight=1 / 0.03, eps=1e-6
        ),
        "scikit-image denoise_tv_chambolle": peer(denoise_tv_chambolle, weight=0.03),
        "scikit-image denoise_tv_chambolle, eps=1e-6": peer(
            denoise_tv_chambolle, weight=0.03, eps=1e-6
        ),
    }
    times = taking_turns(x, *contenders.values())
    best = objective(TotalVariation(0.03, drop=0, iterations=1000)(x), x)
    print(f"\n{'denoising':64}{'ms':>8}{'over the optimum':>20}")
    for (name, run), ms in zip(contenders.items(), times, strict=True):
        print(f"{name:64}{ms:8.1f}{(objective(run(x), x) / best - 1).mean() * 100:18.2f} %")


def objective(z: Tensor, x: Tensor) -> Tensor:
    """The objective of total variation denoising, for each image."""
    down, right = torch.zeros_like(z), torch.zeros_like(z)
    down[..., :-1, :], right[..., :-1] = z.diff(dim=-2), z.diff(dim=-1)
    lengths = (down.square() + right.square()).sqrt()
    return ((z - x).square() / 2 + 0.03 * lengths).sum((1, 2, 3))


def search(x: Tensor, quilting: Quilting) -> None:
    """The search for the nearest patches, beside the distances to all of them."""
    pixels = (x * 255).round()
    windows = pixels.unfold(2, 5, 3).unfold(3, 5, 3).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    bank = (quilting.bank * 255).round().flatten(1)
    squares = bank.square().sum(dim=1)

    def full(images: Tensor) -> Tensor:
        del images
        found = []
        for image in windows.flatten(2):
            nearest = [
                torch.addmm(squares, part, bank.T, alpha=-2).argmin(dim=1)
                for part in image.split(256)
            ]
            found.append(bank[torch.cat(nearest)])
        return torch.stack(found)

    def tree(images: Tensor) -> Tensor:
        del images
        return quilting._bank.nearest(windows.flatten(2).flatten(0, 1))[:, 0].float()

    wanted, got = full(x).flatten(0, 1), tree(x)
    queries = windows.flatten(2).flatten(0, 1)
    same = ((queries - wanted).square().sum(1) == (queries - got).square().sum(1)).float().mean()
    times = taking_turns(x, tree, full)
    print(f"\n{'nearest patches of ' + str(len(bank)):64}{'ms':>8}")
    for name, ms in zip(("tree of patches", "distances to all"), times, strict=True):
        print(f"{name:64}{ms:8.1f}")
    print(f"ratio {times[1] / times[0]:.1f}; as near in {float(same):.2%} of the places")


def backward(transform: Transform, x: Tensor) -> Tensor:
    """The gradient of the sum of the surrogate's pixels."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(transform.surrogate(x).sum(), x)
    return gradient


def taking_turns(x: Tensor, *contenders: Callable[[Tensor], object]) -> list[float]:
    """Return the processor milliseconds an image of each, the median of the rounds."""
    for contender in contenders:
        contender(x[:1])
    runs = {str(i): lambda c=contender: c(x) for i, contender in enumerate(contenders)}
    laps = race(runs, ROUNDS, warm_up=False).values()
    return [1000 * statistics.median(each.cpu) / len(x) for each in laps]


if __name__ == "__main__":
    study(__doc__, transforms)
