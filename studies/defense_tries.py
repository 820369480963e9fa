"""What might hold against the attacker who knows the transforms? Tries, measured.

    python studies/defense_tries.py DATA OUT [--limit N]

More classes, the average taken of the features instead of the maps, evidence that depends on no
class, maps of an earlier layer, noise that nobody knows beforehand. Images, methods, errors and OUT
are those of `studies/defenses.py`. The attack is PGD through the transforms that the try itself
has. For networks trained on attacked images see `studies/adversarial_training.py`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import harness
import torch
from defenses import (
    ADAPTIVE_STRENGTHS,
    CHOSEN_ON,
    Maps,
    Method,
    bare_pgd,
    flipped,
    measured,
    methods_of,
    of,
    shown_in,
)
from torch import Tensor

from captum_robust._contexts import outputs_of
from captum_robust.attr import Defended, RobustCAM
from captum_robust.defenses import (
    GaussianNoise,
    Transform,
    adaptive_attack,
    default_transforms,
)
from captum_robust.models import Classifier

TUNED = 96
"""Clean images whose halves the thresholds are tuned on."""


def defense_tries(
    data: Path, out: Path, *, limit: Annotated[int, "images of the table"] = 48
) -> None:
    """Print a line a try: its error on the first images, clean and attacked at 2 and 8/255."""
    model, shown = harness.classifier(), harness.photographs(data)
    images, labels = harness.to_bytes(shown.images), shown.labels
    transforms = default_transforms()
    cam = RobustCAM(model, model.cam_layer)

    def attacked_through(
        name: str, through: Sequence[Transform], **settings: Any
    ) -> dict[str, Tensor]:
        """Clean images, and those that are attacked through transforms."""
        seen = {"clean": images[: max(TUNED, limit)]}
        for strength in ADAPTIVE_STRENGTHS:
            attack = adaptive_attack(bare_pgd(model, strength), through, **settings)
            flip = partial(flipped, attack, images[:limit], labels[:limit], bfloat16=True)
            file = harness.file_of(out, "images", f"{name} pgd {strength}")
            seen[f"{strength}/255"] = harness.kept(file, flip, limit)["x"]
        return seen

    def line(name: str, maps: Maps, seen: dict[str, Tensor]) -> None:
        ious = {
            c: harness.kept(
                harness.file_of(out, "tries", f"{limit} {name}, {c}"),
                lambda v=v: measured(Method(maps), model, v, shown.boxes),
            )["ious"]
            for c, v in seen.items()
        }
        errors = [harness.failures(ious[c][:limit], shown.half, ious["clean"]) for c in seen]
        print(f"{name:44s}", *map(harness.mean, errors), flush=True)

    print(f"n={limit}; error clean, and under PGD through the transforms at 2 and at 8/255")
    bare = {c: shown_in(out, c)[: max(TUNED, limit)] for c in CHOSEN_ON}
    line("grad_cam (PGD on the bare model)", methods_of(model)["grad_cam"].maps, bare)
    seen = attacked_through("adaptive", transforms, transforms_per_eval=1)
    line("defended", of(Defended(cam, transforms)), seen)
    line("top 20 classes alike", of(Defended(cam, transforms), weights=[1.0] * 20), seen)
    early = RobustCAM(model, model.module.get_submodule("blocks.10"), base="gradcam")
    line("map of block 10", of(Defended(early, transforms)), seen)
    line("features averaged, not maps", averaged_features(model, transforms), seen)
    line("no class: energy of the last features", energy(model, transforms), seen)
    noisy = [GaussianNoise(0.2, seed=s) for s in range(5)]
    # The attacker's draws are others than the defender's.
    redrawn = attacked_through("redrawn", noisy[:1], redraw=True, samples=5, seed=99)
    line("noise .2, five draws that nobody knows", of(Defended(cam, noisy)), redrawn)


@torch.no_grad()
def passed(
    model: Classifier, transforms: tuple[Transform, ...], x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return last features T×N×C×h×w and scores T×N×K of the images under each transform."""
    features, scores = [], []
    with outputs_of([model.cam_layer]) as outputs:
        for transform in transforms:
            scores.append(model(transform(x)))
            features.append(outputs[0])
    return torch.stack(features), torch.stack(scores)


def energy(model: Classifier, transforms: tuple[Transform, ...]) -> Maps:
    """Return the mean square of the features over channels and transforms, without any class."""
    return lambda x: harness.enlarged(passed(model, transforms, x)[0].square().mean(dim=(0, 2)))


def averaged_features(model: Classifier, transforms: tuple[Transform, ...]) -> Maps:
    """Return RobustCAM's map of the mean features, for the classes that the mean scores choose."""
    weight = model.module.classifier.weight.detach()
    ladder = torch.tensor([2.0**-i for i in range(1, 6)])

    def maps(x: Tensor) -> Tensor:
        features, scores = passed(model, transforms, x)
        top = scores.float().mean(dim=0).topk(5, dim=1).indices
        classes = (weight[top] * ladder[None, :, None]).sum(dim=1)
        average = features.float().mean(dim=0)
        return harness.enlarged(torch.einsum("nc,nchw->nhw", classes, average).clamp(min=0))

    return maps


if __name__ == "__main__":
    harness.study(__doc__, defense_tries)
