"""How fast are boxes at all thresholds, against OpenCV's components one threshold at a time?

    python studies/localization.py

Prints, for smooth, medium and noisy maps, the maps a second of both and their ratio: for the
three threshold families of Fong & Vedaldi (61 thresholds), MaxBoxAcc and MaxBoxAccV2 (256
levels). The two take turns within one run, on one thread; the median round counts. Their boxes
must be identical, or the run fails.
"""

from collections.abc import Callable
from typing import Annotated

import cv2
import numpy as np
import torch
from harness import race, study

from captum_robust.metrics.functional import alpha_grid, maxboxacc_ious, sweep_boxes

FAMILIES = ("value", "mean", "energy")
# The side of the noise that is upsampled to a map: that of a ResNet's last layer, four times it,
# and a value of its own for every pixel.
GRAIN = {"smooth": 7, "medium": 28, "noisy": 224}


def synthetic_maps(n: int, size: int, grain: int) -> torch.Tensor:
    """Return seeded maps N×H×W with the texture of a class activation map, and rougher ones."""
    noise = torch.rand(n, 1, grain, grain, generator=torch.Generator().manual_seed(grain))
    maps = torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic")
    return maps[:, 0].clamp(min=0).contiguous()


def synthetic_boxes(n: int, size: int) -> list[torch.Tensor]:
    """Return two seeded boxes a map, with whole numbers for corners."""
    ends = torch.rand(n, 2, 2, 2, generator=torch.Generator().manual_seed(0)).mul(size).floor()
    low, high = ends.amin(dim=2), ends.amax(dim=2)
    return list(torch.cat([low, high + 1], dim=2))


def component_boxes(mask: np.ndarray) -> np.ndarray:
    """Return the half-open boxes of a mask's components and, last, their areas."""
    _, _, statistics_, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    boxes = statistics_[1:].copy()
    boxes[:, 2:4] += boxes[:, :2]
    return boxes


def largest_box(mask: np.ndarray) -> np.ndarray | None:
    """Return the box of the largest component; of equal ones, the first in raster order."""
    _, labels, table, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if len(table) == 1:
        return None
    areas = table[1:, cv2.CC_STAT_AREA]
    largest = np.flatnonzero(areas == areas.max()) + 1
    if len(largest) > 1:
        first = np.isin(labels, largest).argmax()
        x, y, w, h = table[labels.flat[first], :4]
    else:
        x, y, w, h = table[largest[0], :4]
    return np.array([x, y, x + w, y + h])


def plain_sweep(maps: torch.Tensor) -> torch.Tensor:
    """Return the boxes N×61×4, one threshold at a time."""
    height, width = maps.shape[1:]
    whole = np.array([0, 0, width, height])
    boxes = []
    for heat in maps.numpy().astype(np.float64):
        low, high, mean = heat.min(), heat.max(), heat.mean()
        order = np.argsort(-heat, axis=None, kind="stable")
        running = np.cumsum(heat.flat[order])
        masks = [heat - low >= alpha * (high - low) for alpha in alpha_grid("value")]
        masks += [heat >= alpha * mean for alpha in alpha_grid("mean")]
        for alpha in alpha_grid("energy"):
            mask = np.zeros(heat.size, bool)
            mask[order[: np.searchsorted(running, alpha * running[-1])]] = True
            masks.append(mask.reshape(heat.shape))
        found = [largest_box(mask.view(np.uint8)) for mask in masks]
        boxes.append(np.stack([whole if box is None else box for box in found]))
    return torch.from_numpy(np.stack(boxes)).float()


def plain_maxboxacc(maps: torch.Tensor, truth: list[torch.Tensor], multi: bool) -> torch.Tensor:
    """Return the overlaps N×256, one level at a time, scored as the authors score them."""
    height, width = maps.shape[1:]
    result = np.zeros((len(maps), 256), np.float32)
    for i, heat in enumerate(maps.numpy().astype(np.float64)):
        shifted = heat - heat.min()
        gray = (shifted / shifted.max() * 255).astype(np.uint8)
        goal = truth[i].numpy().astype(np.float64)
        for level in range(256):
            mask = (gray > level).view(np.uint8)
            if multi:
                boxes = component_boxes(mask)[:, :4]
            else:
                box = largest_box(mask)
                boxes = np.zeros((0, 4), np.int64) if box is None else box[None]
            if len(boxes) == 0:
                boxes = np.zeros((1, 4), np.int64)
            boxes = np.minimum(boxes, [width, height, width - 1, height - 1])
            result[i, level] = overlap(boxes[:, None], goal[None]).max()
    return torch.from_numpy(result)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union of boxes whose corners are covered pixels."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1
    shared = sides.clip(min=0).prod(axis=-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2] + 1).prod(axis=-1) for box in (a, b))
    return shared / (area_a + area_b - shared)


def localization(
    *,
    n: Annotated[int, "maps of each kind"] = 16,
    size: Annotated[int, "side of the maps in pixels"] = 224,
    rounds: int = 5,
) -> int:
    """Print the table; return 1 if any result differs."""
    cv2.setNumThreads(1)
    print(f"n={n} maps of {size}×{size}, median of {rounds} rounds")
    print(f"{'map':8}{'boxes of':14}{'ours/s':>9}{'plain/s':>9}{'ratio':>8}{'differ':>8}")
    truth = synthetic_boxes(n, size)
    differ = 0
    for kind, grain in GRAIN.items():
        maps = synthetic_maps(n, size, grain)
        contests: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = {
            "3 families": (
                lambda maps=maps: torch.cat(list(sweep_boxes(maps, FAMILIES).values()), dim=1),
                lambda maps=maps: plain_sweep(maps),
            ),
            "MaxBoxAcc": (
                lambda maps=maps: maxboxacc_ious(maps, truth),
                lambda maps=maps: plain_maxboxacc(maps, truth, multi=False),
            ),
            "MaxBoxAccV2": (
                lambda maps=maps: maxboxacc_ious(maps, truth, multi=True),
                lambda maps=maps: plain_maxboxacc(maps, truth, multi=True),
            ),
        }
        for name, (ours, plain) in contests.items():
            fast, slow = race({"ours": ours, "plain": plain}, rounds).values()
            mismatches = int((fast.result != slow.result).sum())
            differ += mismatches
            print(
                f"{kind:8}{name:14}{n / fast.median:9.0f}{n / slow.median:9.1f}"
                f"{slow.median / fast.median:8.1f}{mismatches:8}"
            )
    print("all boxes are identical" if differ == 0 else f"{differ} results differ")
    return int(differ > 0)


if __name__ == "__main__":
    study(__doc__, localization, threads=1, packages=("numba", "opencv-python", "numpy"))
