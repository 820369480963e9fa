"""How fast and how strong are the attacks, beside Captum's, foolbox's and torchattacks'?

    python studies/attacks.py speed IMAGENET          # PGD, DeepFool, universal perturbation
    python studies/attacks.py strength IMAGENET       # robust accuracy beside foolbox's PGD
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

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import captum.robust
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_robust.attacks import (
    FGSM,
    PGD,
    DeepFool,
    UniversalPerturbation,
    rank_analysis,
    transfer_matrix,
)
from captum_robust.data import load_dataset, load_image, resize
from captum_robust.metrics.functional import bootstrap_interval
from captum_robust.models import Classifier, load_classifier

STEPS = 10
LEVELS = (1, 2, 4, 8)


def installed(package: str) -> bool:
    """Whether a peer is there to compare with."""
    return importlib.util.find_spec(package) is not None


def photographs(folder: str, n: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the first n images N×3×H×W and their labels N."""
    dataset = load_dataset("imagenet", folder)
    samples = [resize(dataset[i], size) for i in range(min(n, len(dataset)))]
    return torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples])


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and labels in batches."""
    yield from zip(x.split(size), y.split(size), strict=True)


@torch.no_grad()
def right_as_bytes(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """Return whether each image, saved with 8 bits, is classified right in float32."""
    rounded = (x * 255).round() / 255
    return torch.cat([model(part).argmax(dim=1) for part in rounded.split(16)]) == y


def entropy(scores: Tensor, classes: Tensor) -> Tensor:
    """Return the loss that Captum's PGD needs: its own default goes wrong on scores."""
    return F.cross_entropy(scores, classes, reduction="none")


def in_batches(attack: Attacker, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the attacked images of all batches."""
    return torch.cat([attack(x, y) for x, y in parts])


Attacker = Callable[[Tensor, Tensor], Tensor]


def pgd_contenders(model: Classifier, epsilon: float) -> dict[str, Attacker]:
    """Return name -> (images, labels) -> adversarial images."""
    step = epsilon / 4
    captums = captum.robust.PGD(model, entropy, lower_bound=0, upper_bound=1)
    captums.fgsm.zero_thresh = 0.0  # pixels with a small gradient move too, as in the others
    ours = PGD(model, epsilon, STEPS, step)
    every = PGD(model, epsilon, STEPS, step, early_stop=False, keep_best=False)

    def in_bfloat16(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return ours.perturb(x, y)

    found: dict[str, Attacker] = {
        "ours": ours.perturb,
        "ours, all steps": every.perturb,
        "ours, bfloat16": in_bfloat16,
        "Captum": lambda x, y: captums.perturb(x, epsilon, step, STEPS, y),
    }
    if installed("foolbox"):
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        theirs = foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=0.25, random_start=False)
        found["foolbox"] = lambda x, y: theirs.run(wrapped, x, y, epsilon=epsilon)
    if installed("torchattacks"):
        import torchattacks

        attack = torchattacks.PGD(model, eps=epsilon, alpha=step, steps=STEPS, random_start=False)
        found["torchattacks"] = attack
    return found


def race(
    timed: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the wall-clock seconds of each contender in each round, and its last result."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    results: dict[str, Any] = {}
    for number in range(rounds):
        names = list(timed)
        by = number % len(names)
        for name in names[by:] + names[:by]:
            began = time.perf_counter()
            results[name] = timed[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds, results


def ratio(slow: list[float], fast: list[float]) -> str:
    """Return median (smallest to largest) of how many times longer the first took."""
    each = sorted(s / f for s, f in zip(slow, fast, strict=True))
    return f"{statistics.median(each):6.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def speed(options: argparse.Namespace) -> None:
    """PGD at all strengths, DeepFool, and the universal perturbation."""
    model = load_classifier("efficientnet_lite0").eval()
    x, y = photographs(options.imagenet, options.images, model.input_size)
    model(x[:2])
    print(f"PGD, {STEPS} steps of a quarter of the radius, batches of {options.batch}, n={len(x)}")
    for levels in options.levels:
        parts = list(batches(x, y, options.batch))
        contenders = pgd_contenders(model, levels / 255)
        timed = {name: partial(in_batches, attack, parts) for name, attack in contenders.items()}
        seconds, results = race(timed, options.rounds)
        print(f"\n  {levels:g}/255: times as long as ours; robust accuracy; ms an image")
        for name, taken in seconds.items():
            accuracy = right_as_bytes(model, results[name], y).float().mean()
            each = 1000 * statistics.median(taken) / len(x)
            print(
                f"    {name:16} {ratio(taken, seconds['ours']):26} {accuracy:.3f} {each:8.0f}",
                flush=True,
            )
    race_deepfool(model, x, y, options)
    race_universal(model, x, options)


def race_deepfool(model: Classifier, x: Tensor, y: Tensor, options: argparse.Namespace) -> None:
    """DeepFool beside foolbox's and torchattacks', on images that are classified right."""
    right = right_as_bytes(model, x, y)
    x, y = x[right][: options.deepfool], y[right][: options.deepfool]
    attack = DeepFool(model)
    timed: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: torch.cat([attack.perturb(a, b) for a, b in batches(x, y, options.batch)])
    }
    if installed("foolbox"):
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        theirs = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10, overshoot=0.02)
        timed["foolbox"] = lambda: torch.cat(
            [theirs.run(wrapped, a, b) for a, b in batches(x, y, options.batch)]
        )
    seconds, results = race(timed, options.rounds)
    print(f"\nDeepFool, L2, 10 classes, batches of {options.batch}, n={len(x)}")
    print("    times as long as ours; fooled; mean L2 norm; ms an image")
    for name, taken in seconds.items():
        say_deepfool(model, name, results[name], x, y, ratio(taken, seconds["ours"]), taken)
    if installed("torchattacks"):
        import torchattacks

        one, its = x[:1], y[:1]
        slow = torchattacks.DeepFool(model, steps=50, overshoot=0.02)
        race_of_one = {
            "ours, one image": lambda: attack.perturb(one, its),
            "torchattacks, one": lambda: slow(one, its),
        }
        seconds, results = race(race_of_one, 1)
        base = seconds["ours, one image"]
        for name, taken in seconds.items():
            say_deepfool(model, name, results[name], one, its, ratio(taken, base), taken)


@torch.no_grad()
def say_deepfool(
    model: Classifier,
    name: str,
    found: Tensor,
    x: Tensor,
    y: Tensor,
    times: str,
    taken: list[float],
) -> None:
    """Print one row."""
    fooled = torch.cat([model(part).argmax(dim=1) for part in found.split(16)]) != y
    norm = (found - x).flatten(1).norm(dim=1)[fooled].mean()
    each = 1000 * statistics.median(taken) / len(x)
    print(
        f"    {name:18} {times:26} {fooled.float().mean():.3f} {norm:.4f} {each:8.0f}", flush=True
    )


def race_universal(model: Classifier, x: Tensor, options: argparse.Namespace) -> None:
    """One pass of the fit beside one forward and backward pass an image."""
    x = x[: options.universal]

    def plain() -> None:
        for part in x.split(options.batch):
            leaf = part.clone().requires_grad_()
            scores = model(leaf)
            entropy(scores, scores.argmax(dim=1)).sum().backward()
        model.zero_grad(set_to_none=True)

    def one_by_one() -> None:
        for part in x.split(1):
            leaf = part.clone().requires_grad_()
            scores = model(leaf)
            entropy(scores, scores.argmax(dim=1)).sum().backward()
        model.zero_grad(set_to_none=True)

    def fit() -> None:
        attack = UniversalPerturbation(model, 10 / 255)
        attack.fit(x.split(options.batch), passes=1, progress=False)

    seconds, _ = race({"fit": fit, "plain": plain, "one": one_by_one}, options.rounds)
    print(f"\nuniversal perturbation, one pass, n={len(x)}, times as long as the fit:")
    for name, said in (
        ("plain", f"one forward and backward pass in batches of {options.batch}"),
        ("one", "the same image by image"),
    ):
        print(f"    {ratio(seconds[name], seconds['fit']):26} {said}", flush=True)


def strength(options: argparse.Namespace) -> None:
    """Robust accuracy of ours and of foolbox's PGD."""
    model = load_classifier("efficientnet_lite0").eval()
    x, y = photographs(options.imagenet, options.images, model.input_size)
    print(f"robust accuracy after rounding to 8 bit, n={len(x)}, 95 % interval")
    clean = right_as_bytes(model, x, y)
    say_accuracy("clean", clean)
    for levels in LEVELS:
        attacks = pgd_contenders(model, levels / 255)
        for name in ("ours", "foolbox"):
            if name in attacks:
                found = [attacks[name](a, b) for a, b in batches(x, y, options.batch)]
                right = right_as_bytes(model, torch.cat(found), y)
                say_accuracy(f"{levels}/255 {name}", right & clean)


def say_accuracy(name: str, right: Tensor) -> None:
    """Print one row."""
    interval = bootstrap_interval(right.double())
    print(
        f"    {name:28} {right.double().mean():.4f} [{interval.low:.4f}, {interval.high:.4f}]",
        flush=True,
    )


def ranks(options: argparse.Namespace) -> None:
    """Figure 1 of Prakash et al.: 38 % second, 64 % among the first five there."""
    model = load_classifier("efficientnet_lite0").eval()
    x, y = photographs(options.imagenet, options.images, model.input_size)
    right = right_as_bytes(model, x, y)
    x, y = x[right], y[right]
    attacks: dict[str, Any] = {
        "FGSM 1/255": FGSM(model, 1 / 255),
        "FGSM 8/255": FGSM(model, 8 / 255),
        "PGD 1/255, stopped early": PGD(model, 1 / 255, STEPS),
        "PGD 1/255, all steps": PGD(model, 1 / 255, STEPS, early_stop=False),
        "PGD 8/255, all steps": PGD(model, 8 / 255, STEPS, early_stop=False),
        "DeepFool": DeepFool(model),
    }
    print(f"images classified right: n={len(x)}. How many changed their class; of those, with 95 %")
    print(
        "intervals: the new class was second, was in the first five; the old one is second, is in"
    )
    print("the first five")
    for name, attack in attacks.items():
        found = torch.cat([attack.perturb(a, b) for a, b in batches(x, y, options.batch)])
        analysis = rank_analysis(model, x, found, batch_size=16)
        shares = [
            analysis.share(direction, k)
            for direction in ("adversarial_in_clean", "clean_in_adversarial")
            for k in (2, 5)
        ]
        shown = "  ".join(f"{s.value:.2f} [{s.low:.2f}, {s.high:.2f}]" for s in shares)
        print(f"    {name:26} {analysis.changed:4}  {shown}", flush=True)


def minimal(options: argparse.Namespace) -> None:
    """Fooling rate and norm of DeepFool beside foolbox's and adv-lib's."""
    model = load_classifier("efficientnet_lite0").eval()
    x, y = photographs(options.imagenet, options.images, model.input_size)
    right = right_as_bytes(model, x, y)
    x, y = x[right], y[right]
    for norm in options.norms:
        found = {
            "ours": DeepFool(model, norm).perturb,
            "ours, refine=0": DeepFool(model, norm, refine=0).perturb,
            "ours, quantize": DeepFool(model, norm, quantize=True).perturb,
        }
        if installed("foolbox"):
            import foolbox

            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
            kind = foolbox.attacks.L2DeepFoolAttack
            kind = kind if norm == "L2" else foolbox.attacks.LinfDeepFoolAttack
            theirs = kind(steps=50, candidates=10, overshoot=0.02)
            found["foolbox"] = lambda a, b, theirs=theirs, w=wrapped: theirs.run(w, a, b)
        if installed("adv_lib"):
            found["adv-lib, 10 classes"] = partial(adv_lib_deepfool, model, norm)
        print(
            f"\nDeepFool, {norm}, images classified right: n={len(x)}. Of each: fooled; fooled when"
        )
        print("saved with 8 bits; norm, mean and median; ours less it, over images that both fool")
        ours: tuple[Tensor, Tensor] | None = None
        for name, attack in found.items():
            images = torch.cat([attack(a, b) for a, b in batches(x, y, options.batch)])
            with torch.no_grad():
                scores = torch.cat([model(part) for part in images.split(16)])
            fooled = scores.argmax(dim=1) != y
            as_bytes = ~right_as_bytes(model, images, y)
            change = (images - x).flatten(1)
            norms = change.norm(dim=1) if norm == "L2" else change.abs().amax(dim=1)
            ours = ours or (norms, fooled)
            both = ours[1] & fooled
            less = (ours[0] - norms)[both].double()
            interval = bootstrap_interval(less)
            print(
                f"    {name:20} {fooled.float().mean():.3f}  {as_bytes.float().mean():.3f}  "
                f"{norms[fooled].mean():.5f} {norms[fooled].median():.5f}  {less.mean():+.5f} "
                f"[{interval.low:+.5f}, {interval.high:+.5f}]",
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

    found = []
    for image, label in zip(x.split(1), y.split(1), strict=True):
        with torch.no_grad():
            classes = model(image).topk(10).indices
        place = (classes == label).nonzero()[:, 1]
        shown = TopTen(model, classes)
        order = 2 if norm == "L2" else float("inf")
        found.append(df(shown, image, place, steps=50, norm=order, return_unsuccessful=True))
    return torch.cat(found)


def universal(options: argparse.Namespace) -> None:
    """Fit one perturbation a model, and what each does to each."""
    files = sorted(
        p for p in Path(options.train).rglob("*") if p.suffix.lower() in {".jpeg", ".jpg", ".png"}
    )
    names = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")[: options.models]
    models = {name: load_classifier(name).eval() for name in names}
    size = (224, 224)  # of all three: they take any size
    train = torch.stack([squashed(file, size) for file in files])
    x, y = photographs(options.imagenet, options.images, size)
    found = {}
    for name, model in models.items():
        print(f"{name}: top-1 accuracy at 224 px {right_as_bytes(model, x, y).float().mean():.3f}")
        attack = UniversalPerturbation(model, 10 / 255)
        file = Path(options.out) / f"{name}.safetensors"
        if file.exists():
            attack = UniversalPerturbation.load(file, model)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bfloat16):
                attack.fit(
                    Batches(train, options.batch), checkpoint=file.with_suffix(".checkpoint")
                )
            attack.save(file)
        found[name] = attack.perturbation
    print(f"\nfooling rate on n={len(x)} images it was not fitted on; rows: fitted on")
    table = transfer_matrix(found, models, x.split(16))
    print(table.to_string(float_format="{:.3f}".format))


class Batches:
    """uint8 images as float batches in [0, 1], again in each pass."""

    def __init__(self, images: Tensor, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.images.split(self.size):
            yield part.float() / 255


def squashed(file: Path, size: tuple[int, int]) -> Tensor:
    """Return the whole image at the given size, uint8."""
    image = load_image(file)
    small = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)
    return (small[0].clamp(0, 1) * 255).round().to(torch.uint8)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--batch", type=int, default=16)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, n in (
        ("speed", speed, 16),
        ("strength", strength, 200),
        ("ranks", ranks, 200),
        ("minimal", minimal, 200),
        ("universal", universal, 400),
    ):
        command = commands.add_parser(name, help=run.__doc__)
        if name == "universal":
            command.add_argument("train")
            command.add_argument("--out", default="universal-perturbations")
            command.add_argument("--models", type=int, default=3)
            command.add_argument("--bfloat16", action="store_true")
        command.add_argument("imagenet")
        command.add_argument("--images", type=int, default=n)
        command.set_defaults(run=run)
        if name == "minimal":
            command.add_argument("--norms", nargs="+", default=["L2", "Linf"])
        if name == "speed":
            command.add_argument("--rounds", type=int, default=3)
            command.add_argument("--levels", type=float, nargs="+", default=[1.0, 8.0])
            command.add_argument("--deepfool", type=int, default=16, help="images")
            command.add_argument("--universal", type=int, default=16, help="images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.modules.setdefault("visdom", ModuleType("visdom"))  # adv-lib asks for it, for its plots
    packages = ("torch", "captum", "foolbox", "torchattacks", "captum-robust")
    versions = [f"{p} {importlib.metadata.version(p)}" for p in packages if has_version(p)]
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{options.threads} torch thread(s); {', '.join(versions)}"
    )
    options.run(options)
    return 0


def has_version(package: str) -> bool:
    """Whether the package is installed."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
