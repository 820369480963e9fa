"""Images sewn from patches of other, clean images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_robust._checks import (
    check,
    check_count,
    check_floating,
    check_shape,
    check_type,
    printable,
)
from captum_robust._facts import Form, choice, or_none, whole
from captum_robust._files import checksum, read_facts, write_facts
from captum_robust._progress import counted
from captum_robust._resize import blurred
from captum_robust.transforms.patch_bank import PatchBank
from captum_robust.transforms.transform import Transform

_KIND = "captum-robust quilting 1"
_SETTINGS = ("patch", "overlap", "seam", "neighbors", "seed")
_FORM: Form = {
    "channels": whole(1, 1024),
    "patch": whole(1, 1024),
    "overlap": whole(0, 512),
    "seam": choice(False, True, 0, 1),
    "neighbors": whole(1),
    "seed": or_none(whole(-(2**63), 2**64 - 1)),
}


class Quilting(Transform):
    """Each patch of the image is replaced by the nearest of a bank of patches of clean images.

    Guo et al., "Countering Adversarial Images using Input Transformations"
    (https://arxiv.org/abs/1711.00117), with the quilting of Efros and Freeman, "Image Quilting for
    Texture Synthesis and Transfer" (SIGGRAPH 2001): patches overlap, and are cut along the path
    where they differ least. The patches of the image are compared as a whole, and in 8 bits. Make
    the bank from images that no attacker has touched: :meth:`fit`.

    In three points the authors' code does otherwise. It compares by a product quantiser, which
    finds near patches but not always the nearest. It leaves up to ``patch − overlap`` rows and
    columns at the lower and right border black, three of a 224×224 image. And its graph cut ties no
    pixel to the older patch, so that by our reading each patch overwrites those before it, as here
    with ``seam=False``.

    The surrogate is a Gaussian blur, of 1 pixel for patches of 5×5: the nearest patch follows what
    is coarse in the image and not what is fine. Against PGD it gave the stronger attack than the
    identity of Athalye et al. (https://arxiv.org/abs/1802.00420).

    Args:
        bank: M×C×p×p patches with pixels in [0, 1]; they are rounded to 8 bits. Or a bank of such.
        overlap: of neighbouring patches in pixels, at most p/2.
        seam: cut along the path of least difference. False: the later patch on top.
        neighbors: draw each patch from so many nearest; 1 draws nothing.
        seed: of that draw.

    Raises:
        TypeError: the bank is no floating-point tensor.
        ValueError: a bank of another shape, or with pixels outside of [0, 1]; numbers out of range;
            images of other channels than the bank's.
    """

    def __init__(
        self,
        bank: Tensor | PatchBank,
        overlap: int = 2,
        *,
        seam: bool = True,
        neighbors: int = 1,
        seed: int | None = 0,
    ) -> None:
        super().__init__(seed=seed)
        if not isinstance(bank, PatchBank):
            _check_images("bank", bank, "M×C×p×p")
            in_range = bank.amin() >= 0 and bank.amax() <= 1  # NaN is neither
            check(in_range, "bank: expected pixels in [0, 1]")
            bank = PatchBank.of((bank.detach().float() * 255).round())
        self._bank = bank
        # Shown with the parameters: two banks are two transforms.
        self.bank_checksum = f"{checksum([bank.patches]):08x}"
        self.patch = bank.shape[-1]
        self.overlap = check_count("overlap", overlap, 0, self.patch // 2)
        self.seam = bool(seam)
        self.neighbors = check_count("neighbors", neighbors, 1, len(bank))
        self.draws = neighbors > 1

    @classmethod
    def fit(
        cls,
        images: Tensor | str | Path,
        patches: int = 100_000,
        patch: int = 5,
        overlap: int = 2,
        *,
        seam: bool = True,
        neighbors: int = 1,
        seed: int = 0,
    ) -> Quilting:
        """The transform whose bank is drawn at random places of images, as many from each.

        The published bank has 1,000,000 patches of 20,000 training images.

        Args:
            images: N×C×H×W in [0, 1], or a folder of image files at any depth.
            patches: how many.
            patch: their height and width.
            overlap: as for the constructor; so are ``seam`` and ``neighbors``.
            seed: of the places; also the constructor's.

        Raises:
            FileNotFoundError: no such folder.
            TypeError: images that are neither.
            ValueError: a folder without images, or images smaller than a patch; numbers out of
                range.
        """
        check_count("patches", patches, 1)
        check_count("patch", patch, 1)
        check_count("seed", seed)
        generator = torch.Generator().manual_seed(seed)
        count, image_of = _source(images)
        # So many from each image; what is left over goes to a random choice of them.
        shares = torch.full((count,), patches // count)
        shares[torch.randperm(count, generator=generator)[: patches % count]] += 1
        bank = []
        for i in counted(shares.nonzero()[:, 0].tolist(), "image", None, "patches"):
            name, image = image_of(i)
            size = "×".join(map(str, image.shape[1:]))
            fits = min(image.shape[1:]) >= patch
            check(
                fits, f"images: {name} of {size} pixels is smaller than a patch of {patch}×{patch}"
            )
            bank.append(_patches_of(image, patch, int(shares[i]), generator))
        return cls(torch.cat(bank), overlap, seam=seam, neighbors=neighbors, seed=seed)

    def save(self, path: str | Path) -> None:
        """Write the bank and the settings as a safetensors file; replaces a file of that name.

        Raises:
            OSError: it cannot be written.
        """
        settings = {name: getattr(self, name) for name in _SETTINGS}
        settings["channels"] = self._bank.shape[0]
        write_facts(path, self._bank.tensors(), _KIND, settings)

    @classmethod
    def load(cls, path: str | Path) -> Quilting:
        """What :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file holds something else.
        """
        tensors, settings = read_facts(path, _KIND, "quilting", _FORM, any_suffix=True)
        try:
            channels, patch = settings.pop("channels"), settings.pop("patch")
            bank = PatchBank(**tensors, shape=(channels, patch, patch))
            return cls(bank.checked(), **settings)
        except (TypeError, ValueError) as error:  # of tensors: others, or some are missing
            where = printable(str(path))
            raise ValueError(f"{where} holds no quilting that can be used ({error})") from None

    @property
    def bank(self) -> Tensor:
        """M×C×p×p, the patches in [0, 1]. A few may appear twice."""
        values = self._bank.patches.flatten(0, 1).float() / 255
        return values.reshape(-1, *self._bank.shape)

    def _check(self, x: Tensor) -> None:
        super()._check(x)
        own, got = self._bank.shape[0], x.shape[1]
        check(got == own, f"inputs: expected {own} channels, as the bank has, got {got}")

    def _apply(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        step, p = self.patch - self.overlap, self.patch
        # To the right and below, the border is repeated until the last patch fits.
        right, below = (-(-max(n - p, 0) // step) * step + p - n for n in (width, height))
        pixels = F.pad((x.float() * 255).round(), (0, right, 0, below), mode="replicate")
        windows = pixels.unfold(2, p, step).unfold(3, p, step)  # N×C×rows×columns×p×p
        windows = windows.permute(0, 2, 3, 1, 4, 5)
        bank = self._bank.to(x.device)
        nearest = bank.nearest(windows.flatten(0, 2).flatten(1), self.neighbors)
        nearest = nearest.reshape(*windows.shape[:3], self.neighbors, -1)
        chosen = self._chosen(nearest).reshape(windows.shape).float() / 255
        return _sewn(chosen, self.overlap, self.seam)[:, :, :height, :width]

    def _surrogate(self, x: Tensor) -> Tensor:
        return blurred(x, self.patch / 5).clamp(0, 1)

    def _chosen(self, nearest: Tensor) -> Tensor:
        """One of the neighbours N×rows×columns×k×d of each place, the same for all images."""
        if not self.draws:
            return nearest[:, :, :, 0]
        _, rows, columns, k, _ = nearest.shape
        draw = torch.randint(k, (rows, columns), generator=self._generator()).to(nearest.device)
        row = torch.arange(rows, device=nearest.device)[:, None]
        return nearest[:, row, torch.arange(columns, device=nearest.device), draw]


def _check_images(name: str, images: Any, shape: str) -> None:
    check_shape(name, images, shape)
    check_floating(name, images)
    check(images.numel(), f"{name}: expected {shape} with pixels, got {tuple(images.shape)}")


def _source(images: Any) -> tuple[int, Callable[[int], tuple[str, Tensor]]]:
    """How many images there are, and a function from a number to a name and an image C×H×W."""
    if isinstance(images, Tensor):
        _check_images("images", images, "N×C×H×W")
        return len(images), lambda i: (f"number {i}", images[i])
    check_type("images", images, (str, Path), "a tensor N×C×H×W or a folder")
    from captum_robust.data.image_lists import list_images
    from captum_robust.data.images import load_image

    root, where = Path(images), printable(str(images))
    check(root.is_dir(), f"images: no folder {where}", FileNotFoundError)
    files = list(list_images(root).items())
    check(files, f"images: no image files in {where}")
    return len(files), lambda i: (files[i][0], load_image(files[i][1]))


def _patches_of(image: Tensor, patch: int, count: int, generator: torch.Generator) -> Tensor:
    """count×C×p×p from random places of an image C×H×W."""
    places = [
        torch.randint(int(n) - patch + 1, (count, 1, 1), generator=generator)
        for n in image.shape[1:]
    ]
    inside = torch.arange(patch)
    return image[:, places[0] + inside[:, None], places[1] + inside].transpose(0, 1).cpu()


def _sewn(patches: Tensor, overlap: int, seam: bool) -> Tensor:
    """Lay patches N×rows×columns×C×p×p, each over those before it: images N×C×H×W.

    With ``seam`` each is cut where it differs least from those before.

    A patch meets those to its left, above it, and above it to either side. Patch (i, j) comes in
    step 2·i + j, where all of these are in their place, with all others of that step.
    """
    n, rows, columns, channels, p, _ = patches.shape
    step = p - overlap
    size = ((rows - 1) * step + p, (columns - 1) * step + p)
    canvas = patches.new_zeros(n, channels, *size)
    inside = torch.arange(p, device=patches.device)
    fronts = list(_fronts(rows, columns, patches.device))
    for row, column in counted(fronts, "front", None, "quilting"):
        down = (row * step)[:, None, None] + inside[:, None]
        right = (column * step)[:, None, None] + inside
        new = patches[:, row, column].transpose(1, 2)  # N×C×m×p×p
        if overlap and seam:
            old = canvas[:, :, down, right]
            error = (new - old).square().sum(dim=1)  # N×m×p×p
            # The strip to the left, and the one above turned on its side: 2×N×m×p×overlap.
            strips = torch.stack((error[..., :overlap], error.transpose(2, 3)[..., :overlap]))
            beyond = F.pad(_beyond_the_seam(strips), (0, p - overlap), value=True)
            left = beyond[0] | (column == 0)[:, None, None]
            above = beyond[1].transpose(2, 3) | (row == 0)[:, None, None]
            new = torch.where((left & above)[:, None], new, old)
        canvas[:, :, down, right] = new
    return canvas


def _fronts(rows: int, columns: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Row and column of the patches of each step."""
    for front in range(2 * (rows - 1) + columns):
        first = max(0, -(-(front - columns + 1) // 2))
        row = torch.arange(first, min(rows - 1, front // 2) + 1, device=device)
        yield row, front - 2 * row


def _beyond_the_seam(error: Tensor) -> Tensor:
    """Where, in strips …×p×o, the new patch shows: from the path of least error on.

    The path goes from the first of the p rows to the last, and moves by at most one column a row.
    """
    length, width = error.shape[-2:]
    costs = [error[..., 0, :]]
    for r in range(1, length):
        reached = F.pad(costs[-1], (1, 1), value=math.inf).unfold(-1, 3, 1).amin(dim=-1)
        costs.append(error[..., r, :] + reached)
    columns = torch.arange(width, device=error.device)
    at = costs[-1].argmin(dim=-1, keepdim=True)
    path = [at]
    for cost in reversed(costs[:-1]):
        at = cost.masked_fill((columns - at).abs() > 1, math.inf).argmin(dim=-1, keepdim=True)
        path.append(at)
    return columns >= torch.stack(path[::-1], dim=-2)
