"""What might hold against the attacker who knows the transforms? Tries, measured.

    python benchmarks/defense_tries.py finetune TRAIN OUT [--steps N]
    python benchmarks/defense_tries.py table DATA OUT [--limit N] [--trunk OUT/trunk.safetensors]

Images, methods, errors and OUT are those of `benchmarks/defenses.py`. Tried are: more classes,
evidence that depends on no class, maps of earlier layers, noise that nobody knows beforehand, and a
trunk that `finetune` trains on the images of the folder TRAIN. The attack is PGD through the
transforms that the try itself has.
"""

import argparse
import sys
from pathlib import Path

import torch
from defenses import (
    ADAPTIVE_STRENGTHS,
    BATCH,
    CHOSEN_ON,
    Maps,
    Method,
    bare_pgd,
    batches,
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from captum_robust.attacks import PGD
from captum_robust.attr import Defended, RobustCAM
from captum_robust.defenses import (
    GaussianNoise,
    Transform,
    adaptive_attack,
    default_transforms,
)
from captum_robust.models import Classifier, load_classifier

TUNED = 96
"""Clean images whose halves the thresholds are tuned on."""


def run_tries(data: Path, out: Path, limit: int, trunk: Path | None) -> None:
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
    if trunk is None:
        return
    tuned = load_classifier("efficientnet_lite0", trunk).requires_grad_(False)
    for name, used in (("bare", ()), ("defended", transforms)):

        def attack(strength: int, used: tuple[Transform, ...] = used) -> PGD:
            pgd = bare_pgd(tuned, strength)
            return adaptive_attack(pgd, used, transforms_per_eval=1) if used else pgd

        seen = {"clean": clean} | {
            f"{s}/255": first_of(
                file_of(out, "images", f"tuned {name} pgd {s}"),
                limit,
                lambda s=s, attack=attack: flipped(attack(s), x, y, bfloat16=True),
            )["x"]
            for s in ADAPTIVE_STRENGTHS
        }
        cam = RobustCAM(tuned, tuned.cam_layer)
        with torch.no_grad():
            right = [
                torch.cat([tuned(b).argmax(dim=1) for b in batches(v[:limit])])
                .eq(y)
                .float()
                .mean()
                .item()
                for v in seen.values()
            ]
        line(f"fine-tuned trunk, {name}", of(Defended(cam, used) if used else cam), seen)
        print("  accuracy of the bare trunk on these", *(f"{r:.3f}" for r in right))


def energy(model: Classifier, transforms: tuple[Transform, ...]) -> Maps:
    """The mean square of the features over channels and transforms, without any class."""

    def maps(x: Tensor) -> Tensor:
        found: list[Tensor] = []
        handle = model.cam_layer.register_forward_hook(lambda *a: found.append(a[2]))
        with torch.no_grad():
            for t in transforms:
                model(t(x))
        handle.remove()
        return enlarged(torch.stack([f.square().mean(dim=1) for f in found]).mean(dim=0))

    return maps


def finetune(train: Path, out: Path, steps: int) -> None:
    """A trunk whose features, and class probabilities, stay where the original's clean ones are.

    Every step attacks a batch of 16 random crops of 160 px at 4/255 (two steps from a random
    start), so that the squared distance of the last features, relative to their size, and the
    divergence of the class probabilities from those of the frozen original grow, and then makes
    them small. No labels are used. Batch norms keep their averages.
    """
    from torchvision.transforms import v2

    from captum_robust.data import load_image
    from captum_robust.data.images import list_images

    torch.manual_seed(0)
    files = list(list_images(train).values())
    photographs = [load_image(f).mul(255).to(torch.uint8) for f in files]
    augment = v2.Compose(
        [v2.RandomResizedCrop(160, scale=(0.35, 1), antialias=True), v2.RandomHorizontalFlip()]
    )
    teacher, tuned = frozen(), load_classifier("efficientnet_lite0")
    parameters = list(tuned.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-4, total_steps=steps, pct_start=0.1
    )
    epsilon = 4 / 255

    def seen(model: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        handle = model.cam_layer.register_forward_hook(lambda *a: found.append(a[2].float()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = model(x).float()
        handle.remove()
        return found[0], scores

    def distance(x: Tensor, goal: tuple[Tensor, Tensor]) -> Tensor:
        features, scores = seen(tuned, x)
        size = goal[0].square().mean(dim=(1, 2, 3))
        apart = (features - goal[0]).square().mean(dim=(1, 2, 3)) / size
        surprise = torch.nn.functional.kl_div(
            scores.log_softmax(dim=1), goal[1].softmax(dim=1), reduction="none"
        )
        return apart + surprise.sum(dim=1)

    for step in range(steps):
        chosen = torch.randint(len(photographs), (BATCH,)).tolist()
        x = torch.stack([augment(photographs[i]) for i in chosen]).float() / 255
        with torch.no_grad():
            goal = seen(teacher, x)
        change = (2 * torch.rand_like(x) - 1) * epsilon
        for p in parameters:
            p.requires_grad_(False)
        for _ in range(2):
            change.requires_grad_()
            (g,) = torch.autograd.grad(distance((x + change).clamp(0, 1), goal).sum(), change)
            change = (change.detach() + 0.75 * epsilon * g.sign()).clamp(-epsilon, epsilon)
        for p in parameters:
            p.requires_grad_(True)
        loss = distance((x + change).clamp(0, 1), goal).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f}", file=sys.stderr, flush=True)
    state = {name: value.contiguous() for name, value in tuned.module.state_dict().items()}
    save_file(state, out / "trunk.safetensors")


def main() -> None:
    """One stage."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=("finetune", "table"))
    parser.add_argument("data", type=Path, help="TRAIN or DATA")
    parser.add_argument("out", type=Path)
    parser.add_argument("--trunk", type=Path, help="what finetune wrote")
    parser.add_argument("--steps", type=int, default=300, help="of finetune")
    parser.add_argument("--limit", type=int, default=100, help="images of the table")
    arguments = parser.parse_args()
    if arguments.stage == "finetune":
        finetune(arguments.data, arguments.out, arguments.steps)
    else:
        run_tries(arguments.data, arguments.out, arguments.limit, arguments.trunk)


if __name__ == "__main__":
    main()
