"""What a method of the catalogue is, and what it says of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_robust.attacks import Attack
from captum_robust.catalog.box_vote import BoxVote
from captum_robust.catalog.thresholds import USUAL_THRESHOLD, Threshold
from captum_robust.transforms.transform import Transform


@dataclass(frozen=True)
class Perturbation:
    """How a method changed N images to see what they are recognised by."""

    change: Tensor
    """N×C×H×W, signed, in the unit of the pixels."""
    new_class: Tensor
    """N, the class of each changed image."""
    flipped: Tensor
    """N, whether the explained class lost its first place (or the counterfactual one won it)."""
    margin: Tensor
    """N, by how much it still has it: negative once flipped."""


@dataclass(frozen=True)
class Explanation:
    """What a method says of N images."""

    maps: Tensor
    """N×H×W, where larger means more important."""
    perturbation: Perturbation | None = None
    boxes: Tensor | None = None
    """N×4, (x0, y0, x1, y1) in pixels of the map, where the method places them itself."""


@dataclass(frozen=True)
class Method:
    """How images are explained, and, for a baseline, the box that it always draws."""

    explain: Callable[[Tensor, Tensor | None], Explanation]
    """(images N×C×H×W, classes N or None) -> what it says of them. None stands for the classes that
    a defended method takes them for."""
    box: Callable[[tuple[int, int]], Tensor] | None = None
    """(H, W) -> (x0, y0, x1, y1), whatever the threshold; None: the box comes from the map."""
    towards: Callable[[int], Method] | None = None
    """The same method towards a counterfactual class; None: it can't be asked for one."""
    transforms: tuple[Transform, ...] = ()
    """Those that it defends itself by. It takes an image for the class of their averaged scores,
    and explains that where it gets no class."""
    attack_map: Callable[[float, int], Attack] | None = None
    """(strength, steps) -> the attack on its map; None: no gradient of the map is at hand."""
    threshold: Threshold = USUAL_THRESHOLD
    """Of the box, where there are no boxes to tune it on."""
    vote: BoxVote | None = None
    """What places the boxes itself, if the method does; it takes features that are known."""
    scored_by: Any = None
    """The classifier that it gives the images once, as they are; None: that is not known."""

    def boxes(self, explanation: Explanation) -> Tensor | None:
        """N×4, whatever the threshold; None: they come from the map."""
        if self.box is None:
            return explanation.boxes
        n, height, width = explanation.maps.shape
        return self.box((height, width)).expand(n, 4)
