"""Images with classes, read and checked once, as a training loop takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from captum_robust._names import unknown_name
from captum_robust.data import (
    DataError,
    LocalizationDataset,
    Sample,
    resize,
    resize_and_center_crop,
)


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """The usable images of a data set at one size: (3×H×W in [0, 1], class) by number.

    Every image is decoded once when this is made, so that one that can't be is known before the
    training begins; and again in each epoch unless all of them fit in ``memory``, as bytes.

    Args:
        dataset: its labels count the classes of its ``class_names``.
        size: (H, W), or one number for a square.
        fit: ``"squash"`` the whole image to the size, or ``"crop"`` its centre.
        classes: numbers of the classes to take, which count anew from 0 in this order; None: all.
        memory: bytes.
        progress: show a bar.

    Raises:
        ValueError: an unknown ``fit``, classes that are none, or fewer than two classes of which
            there are images.
    """

    def __init__(
        self,
        dataset: LocalizationDataset,
        size: int | tuple[int, int],
        *,
        fit: str = "squash",
        classes: Sequence[int] | None = None,
        memory: int = 2**31,
        progress: bool = False,
    ) -> None:
        if fit not in ("squash", "crop"):
            raise unknown_name("fit", fit, ["squash", "crop"])
        names = list(dataset.class_names or [])
        chosen = list(range(len(names))) if classes is None else list(classes)
        wrong = [c for c in chosen if not 0 <= c < len(names)]
        if wrong or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"classes: expected different numbers from 0 to {len(names) - 1}, got {chosen}"
            )
        self.dataset, self.size, self.fit = dataset, size, fit
        self.class_names = [names[c] for c in chosen]
        self.ids: list[str] = []
        self.labels: list[int] = []
        self.unusable: dict[str, str] = {}
        """Id -> why: it can't be decoded, or has no class."""
        self._positions: list[int] = []
        self._pixels: Tensor | None = None
        self._read({c: i for i, c in enumerate(chosen)}, memory, progress)
        found = sorted({self.class_names[label] for label in self.labels})
        if len(found) < 2:
            raise ValueError(
                f"{dataset.root}: expected images of at least two classes, found "
                f"{len(found)} ({', '.join(found) or 'none'}) in {len(dataset)} images, of which "
                f"{len(self.unusable)} could not be used"
                + "".join(f"; {why}" for why in list(self.unusable.values())[:1])
            )

    def _read(self, new_label: dict[int, int], memory: int, progress: bool) -> None:
        from tqdm import tqdm

        kept: list[Tensor] = []
        fits = True
        for i in tqdm(range(len(self.dataset)), unit="image", disable=not progress):
            try:
                sample = self.dataset[i]
                pixels = self._pixels_of(sample)
            except DataError as error:
                self.unusable[self.dataset.ids[i]] = str(error)
                continue
            if sample.label is None:
                self.unusable[sample.id] = f"{sample.source or sample.id}: no class is known"
                continue
            if sample.label not in new_label:
                continue
            self.ids.append(sample.id)
            self.labels.append(new_label[sample.label])
            self._positions.append(i)
            fits = fits and (len(kept) + 1) * pixels.numel() <= memory
            if fits:
                kept.append(pixels)
            else:
                kept.clear()
        if fits and kept:
            self._pixels = torch.stack(kept)

    def _pixels_of(self, sample: Sample) -> Tensor:
        """3×H×W bytes: the same images whether they are kept or decoded again."""
        if self.fit == "squash":
            image = resize(sample, self.size).image
        else:
            side = self.size if isinstance(self.size, int) else max(self.size)
            image = resize_and_center_crop(sample, side, self.size).image
        return (image * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._pixels is None:
            pixels = self._pixels_of(self.dataset[self._positions[index]])
        else:
            pixels = self._pixels[index]
        return pixels.float() / 255, self.labels[index]


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images mirrored in half of all cases and shifted by up to a tenth of their sides.

    What a shift leaves open is filled with the mirrored border. Draws from torch's global
    generator, which a training loop seeds for each image.
    """

    def __init__(self, dataset: Dataset[tuple[Tensor, int]]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        _, height, width = image.shape
        down, right = height // 10, width // 10
        padded = F.pad(image[None], (right, right, down, down), mode="reflect")[0]
        top = int(torch.randint(0, 2 * down + 1, ()))
        left = int(torch.randint(0, 2 * right + 1, ()))
        return padded[:, top : top + height, left : left + width], label


def held_out_split(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images to train on, and of those held out: ``share`` of each class.

    Raises:
        ValueError: a share outside of [0, 1), or one that leaves nothing to train on.

    >>> train, held_out = held_out_split([0, 1, 0, 1, 0, 0], 0.5, seed=0)
    >>> len(train), len(held_out), sorted(train + held_out)
    (3, 3, [0, 1, 2, 3, 4, 5])
    """
    if not 0 <= share < 1:
        raise ValueError(f"held_out: expected a share in [0, 1), got {share!r}")
    generator = torch.Generator().manual_seed(seed)
    by_class: dict[int, list[int]] = {}
    for i in torch.randperm(len(labels), generator=generator).tolist():
        by_class.setdefault(labels[i], []).append(i)
    held_out: list[int] = []
    for numbers in by_class.values():
        held_out += numbers[: int(share * len(numbers))]
    left = sorted(set(range(len(labels))) - set(held_out))
    return left, sorted(held_out)
