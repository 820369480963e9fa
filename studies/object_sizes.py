"""Which objects does each method place: by the size of the largest, and by how many there are.

``python studies/object_sizes.py RUN DATA`` reads what ``captum-robust compare imagenet DATA --out
RUN`` measured, and prints the error of each method in each group, with its interval and n.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import harness
import torch
from torch import Tensor
from torchvision.ops import box_area

from captum_robust.benchmark import Comparison
from captum_robust.data import load_dataset

BOUNDS = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Of the share of the image that the largest box covers."""


def groups(largest: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Which of N images are in each group, from the largest box's share and the number of boxes."""
    sizes = {
        f"largest box {low:.0%} to {high:.0%}": (largest > low) & (largest <= high)
        for low, high in pairwise(BOUNDS)
    }
    return sizes | {"one box": count == 1, "two or more": count > 1}


def run(folder: Path, data: Path) -> None:
    """Print the errors of a run by group."""
    dataset = load_dataset("imagenet", data)
    rows = Comparison(folder).to_dataframe()
    rows = rows[rows["attack"] == "clean"]
    placed = rows.pivot(index="position", columns="method", values="localized").dropna()
    samples = [dataset[int(position)] for position in placed.index]
    shares = [box_area(s.boxes) / s.image[0].numel() for s in samples]
    members = groups(
        torch.stack([share.max() for share in shares]), torch.tensor([len(s) for s in shares])
    )
    print(f"error, n={len(samples)}")
    width = max(map(len, placed.columns)) + 2
    for name, inside in members.items():
        print(f"{name}, n={int(inside.sum())}")
        errors = {m: 1 - torch.tensor(placed[m].to_numpy(float))[inside] for m in placed.columns}
        for method in sorted(errors, key=lambda m: float(errors[m].mean())):
            print(f"  {method:{width}}{harness.mean(errors[method])}")


if __name__ == "__main__":
    harness.study(__doc__, run)
