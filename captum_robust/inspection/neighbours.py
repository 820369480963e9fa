"""Which images a network takes for alike: nearest neighbours among their features."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captum_robust._checks import check, check_choice, check_count, whole_numbers
from captum_robust._plurals import amount
from captum_robust.draw import blank_figure
from captum_robust.inspection.features import Features, penultimate_features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("cosine", "euclidean")


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k nearest images of each of Q images, itself left out; numbers count the features.

    Attacked images may be asked about, but are nobody's neighbours.
    """

    features: Features
    queries: list[int]
    """Q numbers."""
    indices: Tensor
    """Q×k, the nearest first."""
    distances: Tensor
    """Q×k."""
    within: Tensor
    """Q×k, the nearest of the same class; -1 where there are fewer, or no class is known."""
    across: Tensor
    """Q×k, the nearest of other classes; likewise."""
    notes: list[str]
    """What to know of the result."""

    @property
    def same_class(self) -> float:
        """The share of neighbours that are of their query's class; NaN where none is known."""
        labels = self.features.labels
        own = labels[self.queries][:, None].expand_as(self.indices)
        is_known = (own >= 0) & (labels[self.indices] >= 0)
        return float((labels[self.indices] == own)[is_known].float().mean())

    def plot(self, most: int = 8) -> Figure:
        """Draw the first queries with their neighbours: all, of the same class, of other classes.

        Raises:
            ValueError: the features came without pictures.
            ImportError: matplotlib is missing.
        """
        check(self.features.thumbnails is not None, "features: expected ones with thumbnails")
        parts = {"nearest": self.indices}
        if bool((self.within >= 0).any() or (self.across >= 0).any()):
            parts |= {"of its class": self.within, "of others": self.across}
        rows = min(most, len(self.queries))
        figure = blank_figure(
            figsize=(1.3 + 2.6 * len(parts), 0.6 + 0.65 * rows), layout="constrained"
        )
        axes = figure.subplots(rows, 1 + len(parts), squeeze=False, width_ratios=_widths(parts))
        for each in axes.flat:
            each.set_axis_off()
        axes[0, 0].set_title("image", fontsize="small")
        for row in range(rows):
            axes[row, 0].imshow(self._row([self.queries[row]]))
            for column, (title, numbers) in enumerate(parts.items(), start=1):
                if row == 0:
                    axes[0, column].set_title(title, fontsize="small")
                there = [n for n in numbers[row].tolist() if n >= 0]
                if there:
                    axes[row, column].imshow(self._row(there, numbers.shape[1]))
        return figure

    def _row(self, numbers: Sequence[int], count: int = 1) -> npt.NDArray[np.uint8]:
        """Pictures side by side, on white where there are fewer than ``count``."""
        thumbnails = self.features.thumbnails
        assert thumbnails is not None
        pictures = thumbnails[list(numbers)].permute(2, 0, 3, 1).flatten(1, 2)
        full = torch.full((len(pictures), count * thumbnails.shape[3], 3), 255, dtype=torch.uint8)
        full[:, : pictures.shape[1]] = pictures[:, : full.shape[1]]
        return full.numpy()


def _widths(parts: dict[str, Tensor]) -> list[int]:
    return [1, *(max(1, numbers.shape[1]) for numbers in parts.values())]


def neighbours(
    features: Any,
    images: Any = None,
    *,
    queries: Sequence[int] | None = None,
    k: int = 5,
    labels: Sequence[int] | Tensor | None = None,
    metric: str = "cosine",
    batch_size: int = 16,
    progress: bool | None = None,
) -> Neighbours:
    """Find the nearest neighbours of images in feature space, also within and across classes.

    Faiss computes them where it is installed, else scikit-learn; both search through all, so that
    the time grows as images times queries: with the square of the images where all are asked about.

    Args:
        features: N×D, :class:`captum_robust.inspection.Features`, or a model whose penultimate
            features of ``images`` these are.
        images: for a model; as for :func:`captum_robust.inspection.maximal_patches`.
        queries: numbers of the images whose neighbours are wanted; None: all.
        k: how many neighbours; where there are fewer images, as many as there are.
        labels: N class indices, -1 where none is known; None: those of the samples.
        metric: ``"cosine"``, one minus the cosine, or ``"euclidean"``.
        batch_size, progress: for a model.

    Raises:
        ValueError: features that are not N×D or not finite, queries or labels that do not fit, or
            a model without ``images``.
        ImportError: neither Faiss nor scikit-learn is there.
    """
    if isinstance(features, nn.Module):
        check(images is not None, "images: a model needs those whose features are compared")
        own = penultimate_features(features, images, batch_size=batch_size, progress=progress)
    else:
        own = Features.of(features)
    check_choice("metric", metric, METRICS)
    check_count("k", k, 1)
    n = len(own.values)
    check(own.values.isfinite().all(), "features: NaN or infinity in them")
    known = own.labels
    if labels is not None:
        numbers = whole_numbers(labels)
        check(numbers is not None, f"labels: expected class indices, got {reprlib.repr(labels)}")
        known = torch.tensor(numbers, dtype=torch.int64)
    check(known.shape == (n,), f"labels: expected one for each of {n} images, got {len(known)}")
    own = replace(own, labels=known)
    clean = own.is_clean
    count = int(clean.sum())
    asked = list(range(n)) if queries is None else whole_numbers(queries)
    inside = asked is not None and all(0 <= q < n for q in asked)
    check(inside, f"queries: expected numbers from 0 to {n - 1}, got {queries}")
    assert asked is not None
    points, scale = own.values.numpy(), 1.0
    # Squares of very large or small numbers would leave the range of floating point.
    if metric == "cosine":
        largest = np.abs(points).max(axis=1, keepdims=True, initial=0)
        points = points / np.where(largest > 0, largest, 1)
        points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    elif largest := float(np.abs(points).max(initial=0)):
        scale = 2.0 ** math.floor(math.log2(largest))  # a power of two changes no digit
        points = points / np.float32(scale)
    notes = []
    if k > count - 1:
        notes.append(f"Each of the images has {amount(count - 1, 'neighbour')}, not {k}.")
        k = count - 1
    rows = torch.tensor(asked, dtype=torch.int64)
    every = torch.arange(n)
    indices, distances = _nearest(points, every[clean], rows, k, metric)
    within, across = torch.full_like(indices, -1), torch.full_like(indices, -1)
    for label in torch.unique(known[rows]).tolist():
        if label < 0:
            continue
        some = known[rows] == label
        for members, table in ((known == label, within), ((known != label) & (known >= 0), across)):
            table[some] = _nearest(points, every[members & clean], rows[some], k, metric)[0]
    if (known < 0).any():
        notes.append(f"Without a known class: {amount(int((known < 0).sum()), 'image')}.")
    return Neighbours(own, asked, indices, distances * scale, within, across, notes)


def _nearest(
    points: npt.NDArray[np.float32], among: Tensor, rows: Tensor, k: int, metric: str
) -> tuple[Tensor, Tensor]:
    """The k nearest Q×k of points N×D among some, without the point itself; -1 beyond all."""
    indices = torch.full((len(rows), k), -1)
    distances = torch.full((len(rows), k), torch.nan)
    count = min(k + 1, len(among))  # with itself
    if not count or not k or not len(rows):
        return indices, distances
    found, far = _search(points[among.numpy()], points[rows.numpy()], count)
    order = among[found]
    is_other = order != rows[:, None]
    # Of several equal points it need not be among those found; then the last one goes.
    keep = is_other.int().argsort(dim=1, descending=True, stable=True)[:, :k]
    order, is_other = order.gather(1, keep), is_other.gather(1, keep)
    far = far.gather(1, keep)
    far = far.square() / 2 if metric == "cosine" else far
    indices[:, : order.shape[1]] = torch.where(is_other, order, -1)
    distances[:, : order.shape[1]] = torch.where(is_other, far, torch.nan)
    return indices, distances


def check_scikit_learn() -> None:
    """``ImportError`` that names the pip command where scikit-learn is not there."""
    is_there = find_spec("sklearn") is not None
    advice = "needs scikit-learn: pip install 'captum-robust[inspect]'"
    check(is_there, f"a search for neighbours, or an embedding, {advice}", ImportError)


def _search(
    points: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32], count: int
) -> tuple[Tensor, Tensor]:
    """The numbers Q×count of the nearest points, and their Euclidean distances."""
    if find_spec("faiss") is not None:
        import faiss

        index = faiss.IndexFlatL2(points.shape[1])
        index.add(np.ascontiguousarray(points))
        squares, numbers = index.search(np.ascontiguousarray(wanted), count)
        return torch.from_numpy(numbers).long(), torch.from_numpy(squares).clamp(min=0).sqrt()
    check_scikit_learn()
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(points)
    far, numbers = search.kneighbors(wanted)
    return torch.from_numpy(numbers).long(), torch.from_numpy(far).float()
