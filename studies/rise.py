"""What does RISE cost beside a plain loop, and beside masks that are cropped one by one?

    python studies/rise.py [--models NAME …] [--n-masks N] [--images N] [--seconds S]

All three explain the predicted class of the same images, by its probability, with the same masks.
They take turns within one run; a rate is that of the median round.

- RISE: this package's. The masks are a product of matrices, made as they are needed. How many
  run at once is its own choice; of the loops it is --batch, which is best small on a CPU.
- plain loop: as the paper's code does: all masks are made first, each enlarged on its own from its
  grid and cropped at its shift; they are kept, multiplied with the image in batches, and summed.
- crop loop: TorchRay's rule: the grids of a batch are enlarged together, and each mask is cropped
  by a slice of its own.

The loops print the paper's sum; for the comparison of the maps the mean score is taken out and put
back in them too, as in the docstring of RISE. The run fails where a map differs by more than 1e-4
of its range. Timings never fail it. With --seconds 90 each model gets as few masks as fit into so
many seconds, by the time of one batch, at least 40 and at most --n-masks.
"""

import time
from collections.abc import Callable, Iterator

import torch
from harness import pink_noise, race, ratio, study
from torch import Tensor
from torch.nn import functional as F

from captum_robust import RISE
from captum_robust.models import Classifier, load_classifier

CELLS, P = 7, 0.5
TOLERANCE = 1e-4
WEIGHTS = {"efficientnet_lite0": "DEFAULT"}  # from the package index; the others are random


def drawn(n_masks: int, size: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    """Return the grids and shifts that RISE draws with the seed 0."""
    generator = torch.Generator().manual_seed(0)
    grids = (torch.rand(n_masks, CELLS, CELLS, generator=generator) < P).float()
    steps = [-(-side // CELLS) for side in size]
    return grids, [torch.randint(step, (n_masks,), generator=generator) for step in steps]


def cropped(grids: Tensor, shifts: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Return masks B×1×H×W of grids that are enlarged together and cropped one by one."""
    larger = [(CELLS + 1) * -(-side // CELLS) for side in size]
    large = F.interpolate(grids[:, None], larger, mode="bilinear")
    corners = zip(large, *(s.tolist() for s in shifts), strict=True)
    return torch.stack([m[:, i : i + size[0], j : j + size[1]] for m, i, j in corners])


class Loop:
    """RISE of one class as a loop over the images and over batches of masks."""

    def __init__(self, model: Classifier, n_masks: int, batch: int, device: str) -> None:
        self.model, self.n_masks, self.batch, self.device = model, n_masks, batch, device

    def one_by_one(self, size: tuple[int, int]) -> Iterator[Tensor]:
        """Yield the batches of masks that are all made first."""
        grids, (down, right) = drawn(self.n_masks, size)
        each = zip(grids.split(1), down.split(1), right.split(1), strict=True)
        masks = torch.cat([cropped(g, [i, j], size) for g, i, j in each])
        for part in masks.split(self.batch):
            yield part.to(self.device)

    def by_crops(self, size: tuple[int, int]) -> Iterator[Tensor]:
        """Yield batches of masks as they are needed."""
        grids, shifts = drawn(self.n_masks, size)
        for rows in torch.arange(self.n_masks).split(self.batch):
            yield cropped(grids[rows].to(self.device), [s[rows] for s in shifts], size)

    @torch.no_grad()
    def maps(self, masks: Callable[[tuple[int, int]], Iterator[Tensor]], images: Tensor) -> Tensor:
        """Return N×H×W."""
        maps = []
        for x in images.split(1):
            target = int(self.model(x).argmax())
            # In double precision, as the difference of the sums is small.
            total = of_masks = torch.zeros_like(x[0, 0], dtype=torch.float64)
            scores = []
            for part in masks((x.shape[2], x.shape[3])):
                scores.append(self.model(x * part).softmax(dim=1)[:, target])
                total = total + (scores[-1].reshape(-1, 1, 1) * part[:, 0]).sum(dim=0)
                of_masks = of_masks + part[:, 0].sum(dim=0)
            mean = torch.cat(scores).double().mean()
            maps.append(mean + (total - mean * of_masks) / ((self.n_masks - 1) * P))
        return torch.stack(maps)


@torch.no_grad()
def fitting(
    model: Classifier, x: Tensor, most: int, batch: int, rounds: int, seconds: float
) -> int:
    """Return how many masks of each image x all three can be given in so many seconds."""
    some = x[:1].expand(batch, -1, -1, -1)
    model(some)
    began = time.perf_counter()
    float(model(some).sum())
    passes = seconds / (time.perf_counter() - began) * batch
    return min(most, max(40, int(passes / (3 * rounds * len(x)))))


def rise(
    *,
    models: tuple[str, ...] = ("efficientnet_lite0",),
    n_masks: int = 2000,
    images: int = 2,
    batch: int = 8,
    rounds: int = 3,
    seconds: float | None = None,
    device: str = "cpu",
) -> int:
    """Print images a second of each, and the largest difference of the maps; return 1 if one is."""
    print(f"loops in batches of {batch}; median (smallest to largest) of {rounds}")
    agree = True
    for name in models:
        torch.manual_seed(0)
        model = load_classifier(name, weights=WEIGHTS.get(name)).to(device)
        x = pink_noise(images, model.input_size).to(device)
        masks = n_masks if seconds is None else fitting(model, x, n_masks, batch, rounds, seconds)
        ours = RISE(lambda x, model=model: model(x).softmax(dim=1), n_masks=masks, s=CELLS, p=P)
        loop = Loop(model, masks, batch, device)
        laps = race(
            {
                "RISE": lambda: ours.attribute(x)[:, 0],  # noqa: B023
                "plain loop": lambda: loop.maps(loop.one_by_one, x),  # noqa: B023
                "crop loop": lambda: loop.maps(loop.by_crops, x),  # noqa: B023
            },
            rounds,
            warm_up=device != "cpu",
            device=device,
        )
        print(f"\n{name}, {images} images of {x.shape[2]}x{x.shape[3]} pixels, {masks} masks each")
        for label, taken in laps.items():
            own, expected = laps["RISE"].result, taken.result
            span = expected.amax((1, 2)) - expected.amin((1, 2))
            worst = float(((own - expected).abs().amax((1, 2)) / span).max())
            agree &= worst <= TOLERANCE
            times = ratio(taken.wall, laps["RISE"].wall)
            print(
                f"  {label:12} {images / taken.median:8.4f} images a second, "
                f"{images * masks / taken.median:.1f} masks a second; {times} times the time of "
                f"RISE; maps differ by at most {worst:.1e} of their range"
            )
    return int(not agree)


if __name__ == "__main__":
    study(__doc__, rise, threads=1)
