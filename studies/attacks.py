"""How fast and how strong are the attacks, beside Captum's, foolbox's and torchattacks'?

    python studies/attacks.py speed IMAGENET          # PGD, DeepFool, universal perturbation;
                                                      # --device cuda
    python studies/attacks.py strength IMAGENET       # robust accuracy beside foolbox's PGD
    python studies/attacks.py losses IMAGENET         # what each loss fools, at a small radius
    python studies/attacks.py logits IMAGENET         # robust accuracy of scaled and half scores
    python studies/attacks.py ranks IMAGENET          # where the adversarial class was before
    python studies/attacks.py minimal IMAGENET        # norm and fooling rate of DeepFool
    python studies/attacks.py universal TRAIN IMAGENET   # fit, fooling rate, transfer matrix

IMAGENET is a folder in the layout of ILSVRC CLS-LOC, TRAIN any folder of images. `foolbox` comes
with the extra `test`; for torchattacks `pip install --no-deps torchattacks` (it pins an old
`requests`), for adv-lib `pip install --no-deps adv-lib`; without one its rows are left out.

The victim is EfficientNet-Lite0 with published weights, as it is loaded: no parameter is frozen.
Every PGD takes the same steps of the same size from the clean image. Robust accuracy is over all
images, misclassified ones counted as wrong, and is scored in float32 on images rounded to 8 bit.

Within `speed`, contenders take turns in rounds; a ratio of wall-clock seconds is formed in each
round, and the median counts, with the smallest and the largest beside it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import captum.robust
import harness
import torch
import torch.nn.functional as F
from harness import Laps, installed, ratio
from torch import Tensor

from captum_robust._resize import resize_image
from captum_robust.attacks import (
    FGSM,
    PGD,
    DeepFool,
    UniversalPerturbation,
    rank_analysis,
    transfer_matrix,
)
from captum_robust.attacks.outcome import sizes_of
from captum_robust.data import load_image
from captum_robust.data.image_lists import list_images
from captum_robust.models import Classifier, load_classifier

STEPS = 10
LEVELS = (1, 2, 4, 8)


Attacker = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Victim:
    """The classifier as it is loaded, and the images that it is attacked on."""

    model: Classifier
    x: Tensor
    y: Tensor
    batch: int

    @classmethod
    def of(cls, folder: Path, n: int, batch: int, device: str = "cpu") -> Victim:
        """Return the published network with the first n images."""
        model = load_classifier("efficientnet_lite0").eval().to(device)
        shown = harness.photographs(folder, n, model.input_size)
        return cls(model, shown.images.to(device), shown.labels.to(device), batch)

    def where_right(self, n: int | None = None) -> Victim:
        """Return the same with those of the first images that are classified right."""
        right = self.right_as_bytes(self.x)
        return Victim(self.model, self.x[right][:n], self.y[right][:n], self.batch)

    def right_as_bytes(self, images: Tensor) -> Tensor:
        """Return whether each image, saved with 8 bits, is classified right in float32."""
        return harness.predicted(self.model, harness.rounded(images)) == self.y

    def attacked(self, attack: Attacker) -> Tensor:
        """Return all images, attacked batch by batch."""
        return harness.in_batches(attack, self.x, self.y, size=self.batch)

    def __len__(self) -> int:
        return len(self.x)


def foolbox_attack(model: Classifier, kind: str, **settings: Any) -> Attacker:
    """Return an attack of foolbox's."""
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    epsilon = {"epsilon": settings.pop("epsilon")} if "epsilon" in settings else {}
    attack = getattr(foolbox.attacks, kind)(**settings)
    return lambda x, y: attack.run(wrapped, x, y, **epsilon)


def entropy(scores: Tensor, classes: Tensor) -> Tensor:
    """Return the loss that Captum's PGD needs: its own default goes wrong on scores."""
    return F.cross_entropy(scores, classes, reduction="none")


def pgd_contenders(model: Classifier, epsilon: float) -> dict[str, Attacker]:
    """Return name -> (images, labels) -> adversarial images."""
    step = epsilon / 4
    captums = captum.robust.PGD(model, entropy, lower_bound=0, upper_bound=1)
    captums.fgsm.zero_thresh = 0.0  # pixels with a small gradient move too, as in the others
    ours = PGD(model, epsilon, STEPS, step)
    every = PGD(model, epsilon, STEPS, step, early_stop=False, keep_best=False)

    def at(precision: harness.Precision, x: Tensor, y: Tensor) -> Tensor:
        with harness.precision_of(precision, str(x.device)):
            return ours.perturb(x, y)

    found: dict[str, Attacker] = {
        "ours": ours.perturb,
        "ours, all steps": every.perturb,
        "ours, TF32": partial(at, "tf32"),
        "ours, bfloat16": partial(at, "bfloat16"),
        "Captum": lambda x, y: captums.perturb(x, epsilon, step, STEPS, y),
    }
    if installed("foolbox"):
        settings = {"steps": STEPS, "rel_stepsize": 0.25, "random_start": False}
        found["foolbox"] = foolbox_attack(model, "LinfPGD", epsilon=epsilon, **settings)
    if installed("torchattacks"):
        import torchattacks

        attack = torchattacks.PGD(model, eps=epsilon, alpha=step, steps=STEPS, random_start=False)
        found["torchattacks"] = attack
    return found


def speed(
    imagenet: Path,
    *,
    images: int = 16,
    batch: int = 16,
    rounds: int = 3,
    levels: tuple[float, ...] = (1.0, 8.0),
    deepfool: Annotated[int, "images"] = 16,
    universal: Annotated[int, "images"] = 16,
    device: str = "cpu",
) -> None:
    """PGD at all strengths, DeepFool, and the universal perturbation."""
    victim = Victim.of(imagenet, images, batch, device)
    victim.model(victim.x[:2])
    print(f"PGD, {STEPS} steps of a quarter of the radius, batches of {batch}, n={len(victim)}")
    for level in levels:
        contenders = pgd_contenders(victim.model, level / 255)
        laps = race_attacks(victim, contenders, rounds)
        print(f"\n  {level:g}/255: times as long as ours; robust accuracy; ms an image; GPU busy")
        for name, taken in laps.items():
            accuracy = victim.right_as_bytes(taken.result).float().mean()
            print(
                f"    {name:16} {ratio(taken.wall, laps['ours'].wall):26} {accuracy:.3f} "
                f"{1000 * taken.median / len(victim):8.1f}  "
                f"{harness.busy(partial(victim.attacked, contenders[name]), device)}",
                flush=True,
            )
    race_deepfool(victim.where_right(deepfool), rounds)
    race_universal(victim, universal, rounds)


def race_attacks(victim: Victim, attacks: dict[str, Attacker], rounds: int) -> dict[str, Laps]:
    """Return the times of attacks on all images; on a CPU no round warms up: they are long."""
    timed = {name: partial(victim.attacked, attack) for name, attack in attacks.items()}
    return harness.race(timed, rounds, warm_up=victim.x.is_cuda, device=str(victim.x.device))


def deepfool_contenders(model: Classifier, norm: str, **ours: Attacker) -> dict[str, Attacker]:
    """Return ours, and foolbox's where it is installed."""
    if installed("foolbox"):
        settings = {"steps": 50, "candidates": 10, "overshoot": 0.02}
        ours["foolbox"] = foolbox_attack(model, f"{norm.title()}DeepFoolAttack", **settings)
    return ours


def race_deepfool(victim: Victim, rounds: int) -> None:
    """Print DeepFool beside foolbox's and torchattacks', on images that are classified right."""
    ours = DeepFool(victim.model).perturb
    contenders = deepfool_contenders(victim.model, "L2", ours=ours)
    print(f"\nDeepFool, L2, 10 classes, batches of {victim.batch}, n={len(victim)}")
    print("    times as long as ours; fooled; mean L2 norm; ms an image")
    say_deepfool(victim, race_attacks(victim, contenders, rounds))
    if installed("torchattacks"):
        import torchattacks

        one = Victim(victim.model, victim.x[:1], victim.y[:1], 1)
        slow = torchattacks.DeepFool(victim.model, steps=50, overshoot=0.02)
        contenders = {"ours, one image": ours, "torchattacks, one": slow}
        say_deepfool(one, race_attacks(one, contenders, 1))


def say_deepfool(victim: Victim, laps: dict[str, Laps]) -> None:
    """Print one row a contender, the first of which the others are compared with."""
    first = next(iter(laps.values()))
    for name, taken in laps.items():
        fooled = harness.predicted(victim.model, taken.result) != victim.y
        norm = (taken.result - victim.x).flatten(1).norm(dim=1)[fooled].mean()
        print(
            f"    {name:18} {ratio(taken.wall, first.wall):26} {fooled.float().mean():.3f} "
            f"{norm:.4f} {1000 * taken.median / len(victim):8.0f}",
            flush=True,
        )


def race_universal(victim: Victim, n: int, rounds: int) -> None:
    """Print one pass of the fit beside one forward and backward pass an image."""
    model, x = victim.model, victim.x[:n]

    def plain(size: int) -> None:
        for part in x.split(size):
            leaf = part.clone().requires_grad_()
            scores = model(leaf)
            entropy(scores, scores.argmax(dim=1)).sum().backward()
        model.zero_grad(set_to_none=True)

    def fit() -> None:
        attack = UniversalPerturbation(model, 10 / 255)
        attack.fit(x.split(victim.batch), passes=1, progress=False)

    laps = harness.race(
        {
            "the fit": fit,
            f"one forward and backward pass in batches of {victim.batch}": partial(
                plain, victim.batch
            ),
            "the same image by image": partial(plain, 1),
        },
        rounds,
        warm_up=x.is_cuda,
        device=str(x.device),
    )
    print(f"\nuniversal perturbation, one pass, n={len(x)}, times as long as the fit:")
    for name in list(laps)[1:]:
        print(f"    {ratio(laps[name].wall, laps['the fit'].wall):26} {name}", flush=True)


def strength(imagenet: Path, *, images: int = 200, batch: int = 16) -> None:
    """Robust accuracy of ours and of foolbox's PGD."""
    victim = Victim.of(imagenet, images, batch)
    print(f"robust accuracy after rounding to 8 bit, n={len(victim)}, 95 % interval")
    clean = victim.right_as_bytes(victim.x)
    print(f"    {'clean':28} {harness.mean(clean, '.4f')}", flush=True)
    for levels in LEVELS:
        attacks = pgd_contenders(victim.model, levels / 255)
        for name in ("ours", "foolbox"):
            if name in attacks:
                right = victim.right_as_bytes(victim.attacked(attacks[name])) & clean
                print(f"    {f'{levels}/255 {name}':28} {harness.mean(right, '.4f')}", flush=True)


def losses(
    imagenet: Path, *, images: int = 240, first: int = 0, levels: float = 0.25, batch: int = 16
) -> None:
    """What PGD fools by each of its losses, beside what DeepFool shows to be possible.

    The losses and steps were chosen on every second image from 0; ``first=1`` are the others.
    """
    every = Victim.of(imagenet, 2 * images, batch)
    victim = Victim(every.model, every.x[first::2], every.y[first::2], batch).where_right()
    epsilon = levels / 255
    shortest = victim.attacked(DeepFool(victim.model, "Linf").perturb) - victim.x
    possible = shortest.flatten(1).abs().amax(dim=1) <= epsilon
    print(f"fooled at {levels}/255 in float32, {STEPS} steps, n={len(victim)} classified right")
    print(f"    {'possible, as DeepFool shows':28} {int(possible.sum()):4}")
    options: dict[str, Any] = {"quantize": False}
    attacks = {
        f"PGD, {loss}{word}": PGD(victim.model, epsilon, STEPS, loss=loss, **options, **more)
        for loss in ("cross_entropy", "margin", "dlr", "log_odds")
        for word, more in (("", {}), (", momentum .75", {"momentum": 0.75}))
    }
    for name, attack in attacks.items():
        attacked = victim.attacked(attack.perturb)
        fooled = harness.predicted(victim.model, attacked) != victim.y
        print(f"    {name:28} {int(fooled.sum()):4}", flush=True)


def logits(
    imagenet: Path, *, images: int = 40, levels: float = 0.1, steps: int = 10, batch: int = 16
) -> None:
    """Robust accuracy of one network whose scores are multiplied, in three precisions."""
    victim = Victim.of(imagenet, images, batch)
    factors = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3)
    print(f"robust accuracy under PGD {levels}/255, {steps} steps, n={len(victim)}, scores times")
    print(f"    {'':10}" + "".join(f"{factor:8g}" for factor in factors))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        network = copy.deepcopy(victim.model).to(dtype)
        print(f"    {str(dtype).removeprefix('torch.'):10}", end="")
        for factor in factors:
            attack = PGD(partial(_multiplied, network, factor), levels / 255, steps, quantize=False)
            robust = []
            for x, y in zip(victim.x.split(batch), victim.y.split(batch), strict=True):
                details = attack.perturb(x, y, return_details=True)[1]
                robust.append(~details.already & ~details.fooled & ~details.without_gradient)
            print(f"{float(torch.cat(robust).float().mean()):8.3f}", end="", flush=True)
        print()


def _multiplied(network: Classifier, factor: float, x: Tensor) -> Tensor:
    scores: Tensor = factor * network(x)
    return scores


def ranks(imagenet: Path, *, images: int = 200, batch: int = 16) -> None:
    """Figure 1 of Prakash et al.: 38 % second, 64 % among the first five there."""
    victim = Victim.of(imagenet, images, batch).where_right()
    model = victim.model
    attacks: dict[str, Any] = {
        "FGSM 1/255": FGSM(model, 1 / 255),
        "FGSM 8/255": FGSM(model, 8 / 255),
        "PGD 1/255, stopped early": PGD(model, 1 / 255, STEPS),
        "PGD 1/255, all steps": PGD(model, 1 / 255, STEPS, early_stop=False),
        "PGD 8/255, all steps": PGD(model, 8 / 255, STEPS, early_stop=False),
        "DeepFool": DeepFool(model),
    }
    print(f"images classified right: n={len(victim)}. How many changed their class; of those, with")
    print("95 % intervals: the new class was second, was in the first five; the old one is second,")
    print("is in the first five")
    for name, attack in attacks.items():
        analysis = rank_analysis(model, victim.x, victim.attacked(attack.perturb), batch_size=16)
        shares = [
            harness.interval(analysis.share(direction, k), ".2f")
            for direction in ("adversarial_in_clean", "clean_in_adversarial")
            for k in (2, 5)
        ]
        print(f"    {name:26} {analysis.changed:4}  {'  '.join(shares)}", flush=True)


def minimal(
    imagenet: Path,
    *,
    images: int = 200,
    batch: int = 16,
    norms: tuple[str, ...] = ("L2", "Linf"),
) -> None:
    """Fooling rate and norm of DeepFool beside foolbox's and adv-lib's."""
    victim = Victim.of(imagenet, images, batch).where_right()
    model = victim.model
    for norm in norms:
        attacks = {
            "ours": DeepFool(model, norm).perturb,
            "ours, refine=0": DeepFool(model, norm, refine=0).perturb,
            "ours, quantize": DeepFool(model, norm, quantize=True).perturb,
        }
        attacks = deepfool_contenders(model, norm, **attacks)
        if installed("adv_lib"):
            attacks["adv-lib, 10 classes"] = partial(adv_lib_deepfool, model, norm)
        print(f"\nDeepFool, {norm}, images classified right: n={len(victim)}. Of each: fooled;")
        print(
            "fooled when saved with 8 bits; norm, mean and median; ours less it, over images that"
        )
        print("both fool")
        ours: tuple[Tensor, Tensor] | None = None
        for name, attack in attacks.items():
            made = victim.attacked(attack)
            fooled = harness.predicted(model, made) != victim.y
            as_bytes = ~victim.right_as_bytes(made)
            largest, euclidean = sizes_of(made - victim.x)
            sizes = euclidean if norm == "L2" else largest
            ours = ours or (sizes, fooled)
            less = harness.mean((ours[0] - sizes)[ours[1] & fooled], "+.5f")
            print(
                f"    {name:20} {fooled.float().mean():.3f}  {as_bytes.float().mean():.3f}  "
                f"{sizes[fooled].mean():.5f} {sizes[fooled].median():.5f}  {less}",
                flush=True,
            )


class TopTen(torch.nn.Module):
    """A model that shows the scores of ten classes of one image only."""

    def __init__(self, model: Classifier, classes: Tensor) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x: Tensor) -> Tensor:
        """Return 1×10 scores."""
        return self.model(x).gather(1, self.classes)


def adv_lib_deepfool(model: Classifier, norm: str, x: Tensor, y: Tensor) -> Tensor:
    """Return adv-lib's, image by image: with 1000 classes it takes 999 backward passes a step."""
    from adv_lib.attacks.deepfool import df

    def attack(image: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            classes = model(image).topk(10).indices
        place = (classes == label).nonzero()[:, 1]
        order = 2 if norm == "L2" else float("inf")
        seen = TopTen(model, classes)
        return df(seen, image, place, steps=50, norm=order, return_unsuccessful=True)

    return harness.in_batches(attack, x, y, size=1)


def universal(
    train: Path,
    imagenet: Path,
    *,
    out: Path = Path("universal-perturbations"),
    images: int = 400,
    batch: int = 16,
    models: int = 3,
    bfloat16: bool = False,
) -> None:
    """Fit one perturbation a model, and what each does to each."""
    size = (224, 224)  # of all three: they take any size
    files = list_images(train).values()
    pixels = torch.stack([harness.to_bytes(resize_image(load_image(file), size)) for file in files])
    shown = harness.photographs(imagenet, images, size)
    names = [f"efficientnet_lite{i}" for i in range(models)]
    victims = {name: load_classifier(name).eval() for name in names}
    found = {}
    for name, model in victims.items():
        accuracy = (
            (harness.predicted(model, harness.rounded(shown.images)) == shown.labels).float().mean()
        )
        print(f"{name}: top-1 accuracy at 224 px {accuracy:.3f}")
        attack, file = UniversalPerturbation(model, 10 / 255), out / f"{name}.safetensors"
        if file.exists():
            attack = UniversalPerturbation.load(file, model)
        else:
            out.mkdir(parents=True, exist_ok=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                attack.fit(Batches(pixels, batch), checkpoint=file.with_suffix(".checkpoint"))
            attack.save(file)
        found[name] = attack.perturbation
    print(f"\nfooling rate on n={len(shown)} images it was not fitted on; rows: fitted on")
    table = transfer_matrix(found, victims, shown.images.split(16))
    print(table.to_string(float_format="{:.3f}".format))


class Batches:
    """uint8 images as float batches in [0, 1], again in each pass."""

    def __init__(self, images: Tensor, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        for (part,) in harness.parts(self.images, size=self.size):
            yield part


if __name__ == "__main__":
    sys.modules.setdefault("visdom", ModuleType("visdom"))  # adv-lib asks for it, for its plots
    stages = (speed, strength, losses, logits, ranks, minimal, universal)
    harness.study(__doc__, *stages, threads=1, packages=("foolbox", "torchattacks"))
