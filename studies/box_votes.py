"""Does a box that several maps vote for place an object better than the box of one of them?

Averages and products of *maps* gained nothing earlier; here *boxes* are averaged, which carry how
far each map thinks that the object reaches. Written down before the numbers of ``score``:

- Kinds of maps: masks of images of 160 to 320 pixels, each mirrored too; guided Grad-CAM at 224 and
  288, mirrored, blurred by 0, 4 and 8 pixels; a perceptual ball times a class activation map.
- Each kind has one threshold, and its boxes are averaged; then the kinds' boxes are. Thresholds are
  chosen in turn, two rounds, for the largest mean of σ((IoU - .5) / .05) on one half, which is less
  noisy than the count of right boxes; the other half is scored, both ways.
- Which set of maps votes is chosen on one half too, by the same mean, among the sets below.
- Tried beside it: shrinking the box towards the centre box, a greedy choice of single maps.

``python studies/box_votes.py maps imagenet-val-400 OUT`` (half an hour), then ``... score OUT``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import captum.attr
import harness
import torch
from safetensors.torch import load_file
from torch import Tensor

from captum_robust._files import write_tensors
from captum_robust._resize import blurred, resize_image, resized
from captum_robust.attr import RealTimeMasking
from captum_robust.catalog.methods import METHODS, heat_map
from captum_robust.metrics.functional import best_iou, sweep_boxes

SIDE = 224
CENTRE = torch.tensor([33.0, 33, 191, 191])
GUIDED = ((224, 0, False), (224, 0, True), (224, 4, False), (224, 8, False), (288, 0, False))
"""Side, blur in pixels of 224, mirrored."""
MASKS = [f"mask{s}{m}" for s in (160, 192, 224, 256, 288, 320) for m in ("", "m")]
G, FLIPPED = "guided224b4", "guided224b0m"
FOUR = [f"mask{s}{m}" for s in (192, 224, 256, 288) for m in ("", "m")]
SETS: dict[str, list[list[str]]] = {
    "mask": [["mask224"]],
    "guided": [[G]],
    "mask, guided": [["mask224"], [G]],
    "mask mirrored, guided (fast)": [["mask224", "mask224m"], [G]],
    "four masks, guided": [FOUR, [G, FLIPPED]],
    "four masks, guided, ball": [FOUR, [G, FLIPPED], ["ball"]],
    "all masks": [MASKS],
    "all masks, all guided": [MASKS, ["guided"]],
    "all masks, all guided, ball (best)": [MASKS, ["guided"], ["ball"]],
    "fast, ball": [["mask224", "mask224m"], [G], ["ball"]],
}


def maps(data: Path, out: Path) -> None:
    """Draw the boxes of every map at every threshold, and keep them."""
    model = harness.classifier()
    photographs = harness.photographs(data)
    mask = RealTimeMasking.from_pretrained("efficientnet_lite0", model=model)
    guided = captum.attr.GuidedGradCam(model, model.cam_layer)
    ball = METHODS["perceptual_ball_cam"](model)

    def at(side: int, mirrored: bool, call: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        parts = []
        for x, labels in harness.parts(photographs.images, photographs.labels):
            x = resize_image(x, (side, side))
            found = call(x.flip(3) if mirrored else x, labels).detach()
            found = resized((found.flip(2) if mirrored else found)[:, None], (SIDE, SIDE))[:, 0]
            parts.append(torch.cat(list(sweep_boxes(found).values()), dim=1).to(torch.int16))
        return torch.cat(parts)

    boxes: dict[str, Tensor] = {}
    for name in MASKS:
        side = int(name[4:7])
        boxes[name] = at(side, name.endswith("m"), lambda x, y: mask.attribute(x, y)[:, 0])
    for side, blur, mirrored in GUIDED:

        def guide(x: Tensor, y: Tensor, side: int = side, blur: int = blur) -> Tensor:
            heat = heat_map(guided.attribute(x.clone(), y).detach(), (side, side))
            return blurred(heat, blur * side / SIDE) if blur else heat

        boxes[f"guided{side}b{blur}{'m' if mirrored else ''}"] = at(side, mirrored, guide)
    boxes["ball"] = at(SIDE, False, lambda x, y: ball.explain(x, y).maps)
    boxes["half"] = photographs.half
    for number, true in enumerate(photographs.boxes):
        boxes[f"true{number}"] = true
    write_tensors(out, boxes, {})


class Votes:
    """The boxes of all maps, and what of them is right."""

    def __init__(self, kept: dict[str, Tensor]) -> None:
        self.half = kept.pop("half")
        self.truth = [kept.pop(f"true{i}") for i in range(len(self.half))]
        self.drawn = {name: boxes.float() for name, boxes in kept.items()}

    def overlaps(self, boxes: Tensor) -> Tensor:
        """N×A of boxes N×A×4, or N of N×4."""
        found = best_iou(boxes if boxes.ndim == 3 else boxes[:, None], self.truth)
        return found if boxes.ndim == 3 else found[:, 0]

    def chosen(self, kinds: list[list[str]], half: Tensor) -> tuple[Tensor, list[int]]:
        """The voted boxes N×4 at the thresholds that are best on a half, and which these are."""
        means = [torch.stack([self.drawn[m] for m in kind]).mean(dim=0) for kind in kinds]
        at = [int(softly(self.overlaps(m))[half].mean(dim=0).argmax()) for m in means]
        for _ in range(2 if len(means) > 1 else 0):
            for i, own in enumerate(means):
                others = [m[:, at[j]] for j, m in enumerate(means) if j != i]
                mean = (torch.stack(others).sum(dim=0)[:, None] + own) / len(means)
                at[i] = int(softly(self.overlaps(mean))[half].mean(dim=0).argmax())
        every = torch.stack([m[:, t] for m, t in zip(means, at, strict=True)])
        return every.mean(dim=0), at

    def greedy(self, half: Tensor, most: int = 6) -> tuple[Tensor, list[str]]:
        """The mean of single maps, each the one that helps most, at its best threshold."""
        names: list[str] = []
        total, value = torch.zeros(len(self.half), 4), -1.0
        while len(names) < most:
            tried = {}
            for name in self.drawn.keys() - set(names):
                mean = (self.drawn[name] + total[:, None]) / (len(names) + 1)
                values = softly(self.overlaps(mean))[half].mean(dim=0)
                tried[name] = float(values.max()), self.drawn[name][:, int(values.argmax())]
            name = max(sorted(tried), key=lambda one: tried[one][0])
            if tried[name][0] <= value + 0.001:
                break
            value, total = tried[name][0], total + tried[name][1]
            names.append(name)
        return total / len(names), names


def softly(overlaps: Tensor) -> Tensor:
    """1 of boxes that are right, 0 of others, with a slope between."""
    return torch.sigmoid((overlaps - 0.5) / 0.05)


def score(kept: Path) -> None:
    """Choose on one half, score on the other, both ways; sets, then which of them."""
    votes = Votes(load_file(kept))
    guided = [name for name in votes.drawn if name.startswith("guided")]
    n = len(votes.half)

    def miss(boxes: Tensor) -> Tensor:
        return (votes.overlaps(boxes) <= 0.5).double()

    missed: dict[str, Tensor] = {name: torch.zeros(n, dtype=torch.float64) for name in SETS}
    within: dict[tuple[str, int], float] = {}
    shrunk, greedy = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
    print(f"n={n}, error on the half that nothing was chosen on")
    for name, given in SETS.items():
        kinds = [guided if kind == ["guided"] else kind for kind in given]
        thresholds = []
        for fold in (0, 1):
            here = votes.half == fold
            boxes, at = votes.chosen(kinds, here)
            missed[name][~here] = miss(boxes)[~here]
            within[name, fold] = float(softly(votes.overlaps(boxes))[here].mean())
            thresholds.append(at)
            if name == "all masks, all guided":
                share = max(
                    (0.0, 0.05, 0.1, 0.15, 0.2),
                    key=lambda s: float(
                        softly(votes.overlaps((1 - s) * boxes + s * CENTRE))[here].mean()
                    ),
                )
                shrunk[~here] = miss((1 - share) * boxes + share * CENTRE)[~here]
                greedy[~here] = miss(votes.greedy(here)[0])[~here]
        halves = [float(missed[name][votes.half == fold].mean()) for fold in (1, 0)]
        less = harness.difference(missed[name], missed["mask"])
        said = f"{halves[0]:.3f} {halves[1]:.3f}  less the mask: {less}  columns {thresholds}"
        print(f"  {name:36}{harness.mean(missed[name])}  {said}", flush=True)
    print(f"  {'all, shrunk to the centre':36}{harness.mean(shrunk)}")
    print(f"  {'greedy choice':36}{harness.mean(greedy)}")
    best = torch.zeros(n, dtype=torch.float64)
    for fold in (0, 1):
        name = max(SETS, key=lambda one: within[one, fold])
        other = votes.half != fold
        best[other] = missed[name][other]
        print(f"chosen on half {fold}: {name}; on the other: {missed[name][other].mean():.3f}")
    print(f"both ways: {harness.mean(best)}; less the mask: ", end="")
    print(harness.difference(best, missed["mask"]))


if __name__ == "__main__":
    harness.study(__doc__, maps, score)
