"""Nearest neighbours among many patches, found without measuring the distance to each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust._checks import check, check_count
from captum_robust._files import TensorRecord

_LEAF = 256
"""A leaf of the tree has at most so many patches."""
_COORDINATES = 8
"""So many principal components bound the distance to a leaf. More bound it hardly better."""
_CELLS = 1 << 24
"""So many distances are held at a time."""


@dataclass(frozen=True)
class PatchBank(TensorRecord):
    """Patches in the leaves of a tree, and the box around each leaf.

    The tree halves the patches along the principal component in which they vary most. Distances in
    some principal components, and in the length of the rest, are not above the distances of the
    patches, so the box of a leaf says how near its patches are at best.

    Pixels are whole numbers from 0 to 255. Then every squared distance of patches of up to 128
    values is a whole number that float32 holds exactly, in whatever order it is summed, and the
    neighbours found depend neither on the batch nor on the device.
    """

    patches: Tensor
    """L×m×d uint8: leaves, patches in a leaf, pixels times channels. Where the number of patches is
    no multiple of the leaves' some appear twice."""
    mean: Tensor
    """d, float32."""
    basis: Tensor
    """d×d, float32: a column a principal component, the strongest first."""
    lowest: Tensor
    """L×c, float32: corners of the boxes."""
    highest: Tensor
    shape: tuple[int, ...]
    """A patch's, such as C×p×p."""

    @classmethod
    @torch.no_grad()
    def of(cls, patches: Tensor) -> PatchBank:
        """Build the bank of patches n×…, whole numbers from 0 to 255."""
        values = patches.flatten(1).float()
        mean = values.mean(dim=0)
        # Coarser components, as autocast makes them, would not bound the distances.
        with torch.autocast(values.device.type, enabled=False):
            covariance = (values - mean).T @ (values - mean)
            basis = torch.linalg.eigh(covariance.double()).eigenvectors.flip(1).float()
            components = (values - mean) @ basis
        leaves = torch.arange(len(values), device=values.device)[None]
        while leaves.shape[1] > _LEAF:
            if leaves.shape[1] % 2:
                leaves = torch.cat((leaves, leaves[:, -1:]), dim=1)
            inside = components[leaves]
            widest = inside.var(dim=1).argmax(dim=1)
            along = inside.gather(2, widest[:, None, None].expand(-1, inside.shape[1], 1))
            order = along[..., 0].argsort(dim=1, stable=True)
            leaves = leaves.gather(1, order).reshape(2 * len(leaves), -1)
        corners = _coordinates(components)[leaves]
        held = values.to(torch.uint8)[leaves]
        return cls(held, mean, basis, corners.amin(1), corners.amax(1), tuple(patches.shape[1:]))

    def checked(self) -> PatchBank:
        """Return this bank.

        Raises:
            ValueError: the tensors and the shape do not fit together.
        """
        for length in self.shape:
            check_count("shape", length, 1)
        leaves, d = len(self.patches), math.prod(self.shape)
        corners = f"{leaves}×{min(d, _COORDINATES) + 1}"
        self.check_shapes(f"{leaves}×m×{d}", f"{d}", f"{d}×{d}", corners, corners)
        for name, t in self.tensors().items():
            own = torch.uint8 if name == "patches" else torch.float32
            check(t.dtype == own, f"{name}: expected {own}, got {t.dtype}")
        check(len(self), "patches: expected at least one")
        return self

    def __len__(self) -> int:
        return self.patches.shape[0] * self.patches.shape[1]

    def nearest(self, queries: Tensor, k: int = 1) -> Tensor:
        """The ``k`` nearest patches (q×k×d, uint8) of patches q×d, nearest first.

        The patches of ``queries`` are whole numbers from 0 to 255 in float32. Which of several
        patches at the same distance comes is left open.
        """
        rows = max(1, _CELLS // len(self.patches))
        starts = range(0, len(queries), rows)
        return torch.cat([self._nearest(queries[i : i + rows], k) for i in starts])

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        place = _coordinates((queries - self.mean) @ self.basis)
        bounds = queries.new_zeros(len(queries), len(self.patches))
        for c in range(place.shape[1]):
            here = place[:, c : c + 1]
            outside = torch.maximum(self.lowest[:, c] - here, here - self.highest[:, c]).clamp_(0)
            bounds.addcmul_(outside, outside)
        # Rounding must not shut out a patch.
        bounds.mul_(1 - 1e-4).sub_(1)
        best = queries.new_full((len(queries), k), torch.inf)
        indices = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
        # The leaf that may be nearest, then four more, then all that are not farther than the
        # patches found so far.
        for width in (1, 4, len(self.patches)):
            worth = (bounds <= best[:, -1:]) & bounds.isfinite()
            if width < len(self.patches):
                nearest = bounds.topk(min(width, len(self.patches)), largest=False).indices
                worth &= torch.zeros_like(worth).scatter_(1, nearest, True)
            self._visit(queries, worth, best, indices)
            bounds.masked_fill_(worth, torch.inf)
        return self.patches.flatten(0, 1)[indices]

    def _visit(self, queries: Tensor, worth: Tensor, best: Tensor, indices: Tensor) -> None:
        """Measure the distances where ``worth`` (q×L) is true; keeps ``best`` and ``indices``."""
        k = best.shape[1]
        size = self.patches.shape[1]
        leaves, visitors = worth.T.nonzero(as_tuple=True)
        counts = torch.bincount(leaves, minlength=len(self.patches)).tolist()
        for leaf, rows in enumerate(torch.split_with_sizes(visitors, counts)):
            if len(rows) == 0:
                continue
            patches = self.patches[leaf].to(queries.dtype)
            asking = queries[rows]
            squares = torch.addmm(patches.square().sum(dim=1), asking, patches.T, alpha=-2)
            squares += asking.square().sum(dim=1, keepdim=True)
            if k == 1:
                near, which = squares.min(dim=1, keepdim=True)
            else:
                near, which = squares.topk(min(k, size), dim=1, largest=False)
            all_near = torch.cat((best[rows], near), dim=1)
            all_indices = torch.cat((indices[rows], which + leaf * size), dim=1)
            kept, order = all_near.sort(dim=1, stable=True)
            best[rows] = kept[:, :k]
            indices[rows] = all_indices.gather(1, order[:, :k])


def _coordinates(components: Tensor) -> Tensor:
    """The strongest principal components, and the length of the rest."""
    strong = components[..., :_COORDINATES]
    rest = components[..., _COORDINATES:].square().sum(dim=-1, keepdim=True).sqrt()
    return torch.cat((strong, rest), dim=-1)
