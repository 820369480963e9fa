"""What might hold against the attacker who knows the transforms? Tries, measured.

    python studies/defense_tries.py DATA OUT [--limit N]

More classes, the average taken of the features instead of the maps, evidence that depends on no
class, maps of an earlier layer, noise that nobody knows beforehand. Images, methods, errors and OUT
are those of `studies/defenses.py`. The attack is PGD through the transforms that the try itself
has. For networks trained on attacked images see `studies/adversarial_training.py`.
"""

import argparse
from pathlib import Path

import torch
from defenses import (
    ADAPTIVE_STRENGTHS,
    CHOSEN_ON,
    Maps,
    Method,
    bare_pgd,
    enlarged,
    file_of,
    first_of,
    flipped,
    frozen,
    interval,
    kept,
    load_data,
    measured,
    methods_of,
    of,
    two_fold,
)
from safetensors.torch import load_file
from torch import Tensor

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


def run_tries(data: Path, out: Path, limit: int) -> None:
    """One line a try: its error on the first images, clean and attacked at 2 and 8/255."""
    model = frozen()
    images, labels, known = load_data(data)
    x, y = images[:limit], labels[:limit]
    clean = images[: max(TUNED, limit)]
    transforms = default_transforms()
    shown = {"clean": clean} | {
        f"{s}/255": first_of(
            file_of(out, "images", f"adaptive pgd {s}"),
            limit,
            lambda s=s: flipped(
                adaptive_attack(bare_pgd(model, s), transforms, transforms_per_eval=1),
                x,
                y,
                bfloat16=True,
            ),
        )["x"]
        for s in ADAPTIVE_STRENGTHS
    }

    def line(name: str, maps: Maps, seen: dict[str, Tensor]) -> None:
        ious = {
            c: kept(
                file_of(out, "tries", f"{limit} {name}, {c}"),
                lambda v=v: measured(Method(maps), model, v, known.boxes),
            )["ious"]
            for c, v in seen.items()
        }
        errors = [two_fold(ious["clean"], ious[c][:limit], known.half) for c in seen]
        print(f"{name:44s}", *(interval(e) for e in errors), flush=True)

    print(f"n={limit}; error clean, and under PGD through the transforms at 2 and at 8/255")
    grad_cam = methods_of(model)["grad_cam"].maps
    bare = {c: load_file(file_of(out, "images", c))["x"][: len(clean)] for c in CHOSEN_ON}
    line("grad_cam (PGD on the bare model)", grad_cam, bare)
    line("defended", of(Defended(RobustCAM(model, model.cam_layer), transforms)), shown)
    cam = RobustCAM(model, model.cam_layer)
    line("top 20 classes alike", of(Defended(cam, transforms), weights=[1.0] * 20), shown)
    early = RobustCAM(model, model.module.get_submodule("blocks.10"), base="gradcam")
    line("map of block 10", of(Defended(early, transforms)), shown)
    line("features averaged, not maps", averaged_features(model, transforms), shown)
    line("no class: energy of the last features", energy(model, transforms), shown)
    noisy = [GaussianNoise(0.2, seed=s) for s in range(5)]
    redrawn = {"clean": clean} | {
        f"{s}/255": first_of(
            file_of(out, "images", f"redrawn pgd {s}"),
            limit,
            # The attacker's draws are others than the defender's.
            lambda s=s: flipped(
                adaptive_attack(bare_pgd(model, s), noisy[:1], redraw=True, samples=5, seed=99),
                x,
                y,
                bfloat16=True,
            ),
        )["x"]
        for s in ADAPTIVE_STRENGTHS
    }
    line("noise .2, five draws that nobody knows", of(Defended(cam, noisy)), redrawn)


def passed(
    model: Classifier, transforms: tuple[Transform, ...], x: Tensor
) -> tuple[Tensor, Tensor]:
    """Last features T×N×C×h×w and scores T×N×K of the images under each transform."""
    found: list[Tensor] = []
    handle = model.cam_layer.register_forward_hook(lambda *a: found.append(a[2]))
    with torch.no_grad():
        scores = torch.stack([model(t(x)) for t in transforms])
    handle.remove()
    return torch.stack(found), scores


def energy(model: Classifier, transforms: tuple[Transform, ...]) -> Maps:
    """The mean square of the features over channels and transforms, without any class."""
    return lambda x: enlarged(passed(model, transforms, x)[0].square().mean(dim=(0, 2)))


def averaged_features(model: Classifier, transforms: tuple[Transform, ...]) -> Maps:
    """RobustCAM's map of the mean features, for the classes that the mean scores choose."""
    weight = model.module.classifier.weight.detach()
    ladder = torch.tensor([2.0**-i for i in range(1, 6)])

    def maps(x: Tensor) -> Tensor:
        features, scores = passed(model, transforms, x)
        top = scores.float().mean(dim=0).topk(5, dim=1).indices
        classes = (weight[top] * ladder[None, :, None]).sum(dim=1)
        mean = features.float().mean(dim=0)
        return enlarged(torch.einsum("nc,nchw->nhw", classes, mean).clamp(min=0))

    return maps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=48, help="images of the table")
    arguments = parser.parse_args()
    run_tries(arguments.data, arguments.out, arguments.limit)


if __name__ == "__main__":
    main()
