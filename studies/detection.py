"""How well are attacks detected that the detector has not seen, and what does a memory resist?

    python studies/detection.py roc DATA --cache FOLDER       # SafetyNet, area under the ROC
    python studies/detection.py adaptive DATA --cache FOLDER  # an attacker who knows SafetyNet
    python studies/detection.py memory DATA --cache FOLDER    # dense associative memory

DATA holds `imagenet-val-400` (in the layout of ILSVRC CLS-LOC), `imagenet-train-1000` (any folder
of images, for the universal perturbation) and `tiny-imagenet-100.tar`. What is attacked is written
to the cache, and read from there the next time.

The classifier is EfficientNet-Lite0 with published weights. `roc` fits on every other image and
tests on the rest, and the other way round; an attacked image counts where the attack succeeded: it
is classified right before and wrong, as an image of 8 bits, after. Layer, bins and penalty of the
detector were chosen on 240 images of `imagenet-train-1000`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from captum_robust.attacks import FGSM, PGD, DeepFool, UniversalPerturbation
from captum_robust.attacks.rank import Share
from captum_robust.data import load_dataset, load_image, resize
from captum_robust.defenses import ROC, SafetyNet
from captum_robust.models import Classifier, load_classifier
from captum_robust.nn import DenseAssociativeMemory

POWERS = (2, 3, 10, 20, 30)
ATTACKS: dict[str, Callable[[Classifier], Any]] = {
    "pgd1": lambda model: PGD(model, 1 / 255, early_stop=False),
    "pgd2": lambda model: PGD(model, 2 / 255, early_stop=False),
    "pgd4": lambda model: PGD(model, 4 / 255, early_stop=False),
    "pgd8": lambda model: PGD(model, 8 / 255, early_stop=False),
    "fgsm4": lambda model: FGSM(model, 4 / 255, early_stop=False),
    "deepfool": lambda model: DeepFool(model, quantize=True),
    "universal": lambda model: UniversalPerturbation(model, 10 / 255),
}
NAMES = {
    "pgd1": "PGD 1/255",
    "pgd2": "PGD 2/255",
    "pgd4": "PGD 4/255",
    "pgd8": "PGD 8/255",
    "fgsm4": "FGSM 4/255",
    "deepfool": "DeepFool, L2",
    "universal": "universal, 10/255",
}


class Folder:
    """Tensors by name, made where they are not there yet."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of that name."""
        file = self.path / f"{name}.safetensors"
        if not file.exists():
            part = file.with_suffix(".part")
            save_file(make(), part)
            part.rename(file)
        return load_file(file)


def to_bytes(x: Tensor) -> Tensor:
    """Return pixels in [0, 1] as uint8."""
    return (x * 255).round().to(torch.uint8)


def photographs(options: argparse.Namespace, cache: Folder) -> tuple[Tensor, Tensor]:
    """Return the images uint8 N×3×224×224 and their labels."""

    def read() -> dict[str, Tensor]:
        dataset = load_dataset("imagenet", Path(options.data) / "imagenet-val-400")
        samples = [resize(dataset[i], (224, 224)) for i in range(len(dataset))]
        x = torch.stack([s.image for s in samples])
        return {"x": to_bytes(x), "y": torch.tensor([s.label for s in samples])}

    clean = cache.get("clean", read)
    return clean["x"][: options.images], clean["y"][: options.images]


class Squashed:
    """A folder's images in batches, read anew in each pass."""

    def __init__(self, folder: Path, batch: int) -> None:
        suffixes = {".jpeg", ".jpg", ".png"}
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
        self.batch = batch

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.files)).tolist()
        for start in range(0, len(order), self.batch):
            images = [load_image(self.files[i])[None] for i in order[start : start + self.batch]]
            yield torch.cat(
                [F.interpolate(i, (224, 224), mode="bilinear", antialias=True) for i in images]
            ).clamp(0, 1)


def attacked(
    name: str, model: Classifier, x: Tensor, y: Tensor, options: argparse.Namespace, cache: Folder
) -> Tensor:
    """Return the attacked images uint8, of all images that are asked for."""

    def make() -> dict[str, Tensor]:
        attack = ATTACKS[name](model)
        if name == "universal":
            attack.fit(Squashed(Path(options.data) / "imagenet-train-1000", options.batch))
        pairs = zip(x.split(options.batch), y.split(options.batch), strict=True)
        return {"x": torch.cat([to_bytes(attack.perturb(a / 255, b)) for a, b in pairs])}

    found = cache.get(name, make)["x"]
    if len(found) < len(x):
        raise SystemExit(f"{cache.path} holds {name} of {len(found)} images only; remove the file")
    return found[: len(x)]


@torch.no_grad()
def activations(model: Classifier, x: Tensor, batch: int) -> dict[str, Tensor]:
    """Return scores N×K, and the mean N×C of each channel behind the last ReLU."""
    means: list[Tensor] = []
    handle = model.cam_layer.register_forward_hook(
        lambda _, __, output: means.append(output.mean(dim=(2, 3)))
    )
    scores = torch.cat([model(part / 255) for part in x.split(batch)])
    handle.remove()
    return {"scores": scores, "means": torch.cat(means)}


def roc(options: argparse.Namespace) -> None:
    """SafetyNet on attacks that it was not fitted on, beside plainer detectors."""
    model = load_classifier("efficientnet_lite0").requires_grad_(False)
    cache = Folder(options.cache)
    x, y = photographs(options, cache)
    clean = cache.get(f"activations_clean_{len(x)}", lambda: activations(model, x, options.batch))
    is_right = clean["scores"].argmax(dim=1) == y
    print(f"n={len(x)} clean images, {int(is_right.sum())} of them classified right")
    found, fooled = {}, {}
    for name in options.attacks:
        found[name] = cache.get(
            f"activations_{name}_{len(x)}",
            lambda name=name: activations(
                model, attacked(name, model, x, y, options, cache), options.batch
            ),
        )
        fooled[name] = is_right & (found[name]["scores"].argmax(dim=1) != y)
    halves = torch.arange(len(x)) % 2 == 0, torch.arange(len(x)) % 2 == 1
    fits = [("pgd2",), ("pgd2", "fgsm4"), ("pgd2", "deepfool")]
    say_confidence(clean, found, fooled)
    for fitted_on in (f for f in fits if set(f) <= set(found)):
        for bins in (options.bins, None):
            say_detector(fitted_on, bins, clean["means"], found, fooled, halves)


def say_confidence(
    clean: dict[str, Tensor], found: dict[str, dict[str, Tensor]], fooled: dict[str, Tensor]
) -> None:
    """Print the areas of the least confident first, and of the most confident first."""
    print("\nmaximum softmax probability; area of 'the less confident, the more suspicious'")
    for name, each in found.items():
        curve = ROC.of(-confidence(clean), -confidence(each)[fooled[name]])
        print(
            f"    {NAMES[name]:20} n={int(fooled[name].sum()):4}  {curve.area:.3f} "
            f"[{curve.interval[0]:.3f}, {curve.interval[1]:.3f}]",
            flush=True,
        )


def confidence(found: dict[str, Tensor]) -> Tensor:
    """Return the probability of the most likely class."""
    return found["scores"].softmax(dim=1).amax(dim=1)


def say_detector(
    fitted_on: tuple[str, ...],
    bins: int | None,
    clean: Tensor,
    found: dict[str, dict[str, Tensor]],
    fooled: dict[str, Tensor],
    halves: tuple[Tensor, Tensor],
) -> None:
    """Print the areas of one kind of detector, the mean of both halves."""
    # The network is over: what the detector is given are the activations.
    layer = nn.Identity()
    detectors = []
    for fit, _ in (halves, halves[::-1]):
        images = [found[name]["means"][fit & fooled[name]] for name in fitted_on]
        sources = torch.cat([fooled[name][fit].nonzero()[:, 0] for name in fitted_on])
        detectors.append(SafetyNet(layer, layer, bins).fit(clean[fit], images, sources=sources))
    kind = "activations as they are" if bins is None else f"codes of {bins} levels"
    print(f"\nRBF machine on {kind}, fitted on {', '.join(NAMES[n] for n in fitted_on)}")
    print("    area, 95 % interval; detected where at most 5 % of the clean images were to be")
    tests = tuple(zip(detectors, halves[::-1], strict=True))
    for name, each in found.items():
        curves = [
            d.roc(clean[test], each["means"][test & fooled[name]], seed=i)
            for i, (d, test) in enumerate(tests)
        ]
        areas = (curves[0].resampled_areas + curves[1].resampled_areas) / 2
        low, high = areas.quantile(torch.tensor([0.025, 0.975], dtype=areas.dtype)).tolist()
        caught = torch.cat([d.predict(each["means"][t & fooled[name]]) for d, t in tests])
        share = Share.of(int(caught.sum()), len(caught))
        seen = " (seen)" if name in fitted_on else ""
        print(
            f"    {NAMES[name] + seen:27} n={len(caught):4}  "
            f"{(curves[0].area + curves[1].area) / 2:.3f} [{low:.3f}, {high:.3f}]   "
            f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]",
            flush=True,
        )
    alarms = torch.cat([d.predict(clean[test]) for d, test in tests])
    share = Share.of(int(alarms.sum()), len(alarms))
    print(
        f"    {'clean images, rejected':27} n={len(alarms):4}  {'':22} {share.value:.3f} "
        f"[{share.low:.3f}, {share.high:.3f}]",
        flush=True,
    )


def adaptive(options: argparse.Namespace) -> None:
    """PGD on the classifier's loss and the detector's score together, through the surrogate."""
    model = load_classifier("efficientnet_lite0").requires_grad_(False)
    cache = Folder(options.cache)
    x, y = photographs(options, cache)
    of_pgd = attacked("pgd2", model, x, y, options, cache)
    clean = cache.get(f"activations_clean_{len(x)}", lambda: activations(model, x, options.batch))
    is_right = clean["scores"].argmax(dim=1) == y
    fit = (torch.arange(len(x)) % 2 == 0).nonzero()[:, 0][: options.fit]
    test = ((torch.arange(len(x)) % 2 == 1) & is_right).nonzero()[:, 0][: options.adaptive]
    detector = SafetyNet(model, model.cam_layer, options.bins)
    detector.fit([p / 255 for p in x[fit].split(16)], [p / 255 for p in of_pgd[fit].split(16)])
    assert detector.threshold is not None
    alarms = detector.predict(x[test] / 255)
    print(
        f"fitted on PGD 2/255 of n={len(fit)} images; tested on n={len(test)} others that are "
        f"classified right, {float(alarms.float().mean()):.3f} of them rejected"
    )
    print("fooled; of the fooled detected; fooled and not detected, Wilson's 95 % interval")
    for levels in options.levels:
        plain = attacked(f"pgd{levels}", model, x, y, options, cache)[test]
        say_evasion(f"{levels}/255, does not know", detector, plain, y[test])
        best = torch.zeros(len(test), dtype=torch.bool)
        for weight in options.weights:
            attack = knowing(detector, levels / 255, weight, options.steps)
            key = f"adaptive_{levels}_{weight:g}_{options.steps}_{options.fit}_{len(test)}"
            images = cache.get(
                f"{key}_{options.bins}",
                lambda attack=attack: {"x": in_batches(attack, x[test], y[test])},
            )["x"]
            label = f"{levels}/255, knows, weight {weight:g}"
            best |= say_evasion(label, detector, images, y[test])
        share = Share.of(int(best.sum()), len(best))
        print(
            f"    {f'{levels}/255, knows, the best':32}                {share.value:.3f} "
            f"[{share.low:.3f}, {share.high:.3f}]",
            flush=True,
        )


def in_batches(attack: PGD, x: Tensor, y: Tensor, batch: int = 16) -> Tensor:
    """Return the attacked images uint8 of images uint8."""
    pairs = zip(x.split(batch), y.split(batch), strict=True)
    return torch.cat([to_bytes(attack.perturb(a / 255, b)) for a, b in pairs])


def knowing(detector: SafetyNet, epsilon: float, weight: float, steps: int) -> PGD:
    """Return an attack that fools the classifier by a margin and stays below the threshold."""
    assert detector.threshold is not None
    threshold = detector.threshold

    def with_suspicion(x: Tensor) -> Tensor:
        scores, suspicion = detector.surrogate(x)
        return torch.cat([scores, suspicion[:, None]], dim=1)

    def loss(scores: Tensor, label: Tensor) -> Tensor:
        suspicion = scores[:, -1]
        classes = scores[:, :-1]
        own = classes.gather(1, label[:, None])[:, 0]
        others = classes.scatter(1, label[:, None], -torch.inf).amax(dim=1)
        # No more of either than is needed: the rest of the ball is for the other one.
        return (others - own).clamp(max=1) - weight * (suspicion - threshold + 0.1).clamp(min=0)

    # Steps of one level: a smaller change would be lost where the image is rounded to 8 bits.
    return PGD(with_suspicion, epsilon, steps, 1 / 255, loss_func=loss, early_stop=False)


@torch.no_grad()
def say_evasion(name: str, detector: SafetyNet, x: Tensor, y: Tensor) -> Tensor:
    """Print one row; return which images are fooled and not detected."""
    fooled = torch.cat([detector.model(p / 255).argmax(dim=1) for p in x.split(16)]) != y
    caught = torch.cat([detector.predict(p / 255) for p in x.split(16)])
    evades = fooled & ~caught
    share = Share.of(int(evades.sum()), len(evades))
    print(
        f"    {name:32} {float(fooled.float().mean()):.3f}  "
        f"{float(caught[fooled].float().mean()):.3f}   {share.value:.3f} "
        f"[{share.low:.3f}, {share.high:.3f}]",
        flush=True,
    )
    return evades


class WithHead(nn.Module):
    """Pixels in [0, 1] -> what a head gives of the mean of each channel behind the last ReLU."""

    def __init__(self, model: Classifier, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head

    def features(self, x: Tensor) -> Tensor:
        """Return N×C features, float32."""
        found: list[Tensor] = []
        handle = self.model.cam_layer.register_forward_hook(
            lambda _, __, output: found.append(output.float().mean(dim=(2, 3)))
        )
        try:
            self.model(x)
        finally:
            handle.remove()
        return found[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return N×K: a memory's potentials, for tanh rounds where they are large."""
        v = self.features(x)
        is_memory = isinstance(self.head, DenseAssociativeMemory)
        scores: Tensor = self.head.potentials(v) if is_memory else self.head(v)
        return scores


class Outputs(WithHead):
    """The same with the tanh, for an attack that does not look behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return N×K."""
        return super().forward(x).tanh()


class Linear(nn.Module):
    """A linear layer of centred features, of a mean length of 1."""

    def __init__(self, v: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("center", v.mean(dim=0))
        self.register_buffer("length", (v - v.mean(dim=0)).norm(dim=1).mean())
        self.linear = nn.Linear(v.shape[1], classes)

    def forward(self, v: Tensor) -> Tensor:
        """Return N×K."""
        return self.linear((v - self.center) / self.length)


def tiny(options: argparse.Namespace, cache: Folder) -> dict[str, Tensor]:
    """Return training and validation images uint8 of the first classes, and their labels."""

    def read() -> dict[str, Tensor]:
        path = Path(options.data) / "tiny-imagenet-100.tar"
        size = (options.size, options.size)
        train = load_dataset("tiny-imagenet", path, split="train")
        wnids = sorted({id.split("_")[0] for id in train.ids})[: options.classes]
        found: dict[str, list[Tensor]] = {"x_train": [], "x_val": []}
        labels: dict[str, list[int]] = {"y_train": [], "y_val": []}
        classes = {}
        for number, wnid in enumerate(wnids):
            of_class = [i for i, id in enumerate(train.ids) if id.startswith(f"{wnid}_")]
            for i in of_class[: options.per_class]:
                sample = resize(train[i], size)
                classes[sample.label] = number
                found["x_train"].append(to_bytes(sample.image))
                labels["y_train"].append(number)
        for sample in load_dataset("tiny-imagenet", path, split="val"):
            if sample.label in classes:
                found["x_val"].append(to_bytes(resize(sample, size).image))
                labels["y_val"].append(classes[sample.label])
        tensors = {name: torch.stack(each) for name, each in found.items()}
        return tensors | {name: torch.tensor(each) for name, each in labels.items()}

    return cache.get(f"tiny_{options.classes}_{options.per_class}_{options.size}", read)


def trained_linear(v: Tensor, y: Tensor, classes: int, epochs: int) -> Linear:
    """Return a linear head after Adam on the cross-entropy, in steps of 64."""
    torch.manual_seed(0)
    head = Linear(v, classes)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(v)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(head(v[rows]), y[rows]).backward()
            optimizer.step()
    return head.requires_grad_(False)


def stored_memory(
    v: Tensor, y: Tensor, classes: int, n: int, options: argparse.Namespace, cache: Folder
) -> DenseAssociativeMemory:
    """Return a memory after its fit."""
    made = DenseAssociativeMemory(v.shape[1], classes, options.memories, n=n)
    key = f"memory_{n}_{options.memories}_{options.epochs}_{options.m}_{options.size}_{len(v)}"
    fitted = cache.get(
        key, lambda: dict(made.fit(v, y, epochs=options.epochs, m=options.m).state_dict())
    )
    made.load_state_dict(fitted)
    return made.requires_grad_(False)


def margin(scores: Tensor, label: Tensor) -> Tensor:
    """Return how far the best other class leads, whatever the scale of the scores."""
    own = scores.gather(1, label[:, None])[:, 0]
    others = scores.scatter(1, label[:, None], -torch.inf).amax(dim=1)
    # A power of small cosines may be 1e-30, and must not vanish on its way through the network.
    size = scores.detach().abs().amax(dim=1).clamp(min=1e-30)
    return (others - own) / size


@torch.no_grad()
def right(victim: WithHead, x: Tensor, y: Tensor) -> Tensor:
    """Return whether each image uint8 is classified right."""
    return torch.cat([victim(p / 255).argmax(dim=1) for p in x.split(32)]) == y


def shown(hits: Tensor) -> str:
    """Return an accuracy and its interval."""
    share = Share.of(int(hits.sum()), len(hits))
    return f"{share.value:.3f} [{share.low:.2f}, {share.high:.2f}]"


def memory(options: argparse.Namespace) -> None:
    """Accuracy of the memory and of a linear head on the same features, clean and attacked."""
    model = load_classifier("efficientnet_lite0").requires_grad_(False)
    cache = Folder(options.cache)
    data = tiny(options, cache)
    trunk = WithHead(model, nn.Identity())

    def features() -> dict[str, Tensor]:
        with torch.no_grad():
            return {
                k: torch.cat([trunk.features(p / 255) for p in data[f"x_{k}"].split(32)])
                for k in ("train", "val")
            }

    key = f"{options.classes}_{options.per_class}_{options.size}"
    v = cache.get(f"features_{key}", features)
    y, y_val = data["y_train"], data["y_val"]
    classes = int(y.max()) + 1
    heads: dict[str, nn.Module] = {"linear": trained_linear(v["train"], y, classes, options.epochs)}
    for n in options.powers:
        heads[f"n={n}"] = stored_memory(v["train"], y, classes, n, options, cache)
    print(
        f"Tiny ImageNet, {classes} classes at {options.size} px: {len(y)} training and "
        f"{len(y_val)} validation images; {options.memories} memories"
    )
    print("\nclean accuracy on all validation images")
    victims = {name: WithHead(model, head) for name, head in heads.items()}
    for name, head in heads.items():
        with torch.no_grad():
            is_memory = isinstance(head, DenseAssociativeMemory)
            scores = head.potentials(v["val"]) if is_memory else head(v["val"])
        hits = scores.argmax(dim=1) == y_val
        print(f"    {name:8} {shown(hits)}", flush=True)
    # Every so many, so that each class has its share.
    rows = torch.arange(0, len(y_val), max(1, len(y_val) // options.attacked))[: options.attacked]
    x, y_val = data["x_val"][rows], y_val[rows]
    say_stillness(victims, x[:32], y_val[:32])
    print(
        f"\naccuracy under PGD, {options.memory_steps} steps, n={len(x)}, Wilson's 95 % interval;"
    )
    print("white-box on the margin of the potentials; on the cross-entropy of the outputs;")
    print("on images made on the linear head; of the linear head on images made on the memory;")
    print("worst of all up to this size, image by image")
    still = {name: right(victim, x, y_val) for name, victim in victims.items()}
    for name in heads:
        print(f"    clean    {name:8} {shown(still[name])}", flush=True)
    worst = {name: hits.clone() for name, hits in still.items()}
    for levels in options.memory_levels:
        of_linear = memory_images("linear", victims["linear"], margin, levels, x, y_val, options)
        if levels not in options.white_box:
            for name, victim in victims.items():
                hits = right(victim, of_linear, y_val)
                print(f"    {levels}/255  {name:8} {'':38}  {shown(hits)}", flush=True)
            continue
        for name, victim in victims.items():
            columns = []
            made = {"": of_linear}
            if name != "linear":
                tanh = Outputs(model, victim.head)
                made = {
                    "own": memory_images(name, victim, margin, levels, x, y_val, options),
                    "tanh": memory_images(f"{name}-tanh", tanh, None, levels, x, y_val, options),
                    "linear": of_linear,
                }
            for images in made.values():
                hits = right(victim, images, y_val)
                worst[name] &= hits
                columns.append(shown(hits))
            if name != "linear":
                hits = right(victims["linear"], made["own"], y_val)
                worst["linear"] &= hits
                columns += [shown(hits), shown(worst[name])]
            print(f"    {levels}/255  {name:8} {'  '.join(columns)}", flush=True)
        print(f"    {levels}/255  linear, worst of all {shown(worst['linear'])}", flush=True)


def memory_images(
    name: str,
    victim: WithHead,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
    levels: int,
    x: Tensor,
    y: Tensor,
    options: argparse.Namespace,
) -> Tensor:
    """Return the images uint8 that PGD makes on a head."""
    attack = PGD(victim, levels / 255, options.memory_steps, loss_func=loss, early_stop=False)
    cache = Folder(options.cache)
    key = f"tiny_{options.size}_{len(x)}_{levels}_{name}_{options.memory_steps}"
    return cache.get(key, lambda: {"x": in_batches(attack, x, y, 25)})["x"]


def say_stillness(victims: dict[str, WithHead], x: Tensor, y: Tensor) -> None:
    """Print for how many images the gradient of each loss with respect to the pixels is zero."""
    print(f"\nshare of n={len(x)} clean images without any gradient: of the cross-entropy of the")
    print("outputs, of the margin of the potentials; mean of the largest output")
    for name, victim in victims.items():
        if name == "linear":
            continue
        shares = []
        for through, loss in ((Outputs(victim.model, victim.head), None), (victim, margin)):
            leaf = (x / 255).requires_grad_()
            scores = through(leaf)
            each = F.cross_entropy(scores, y, reduction="none") if loss is None else loss(scores, y)
            (gradient,) = torch.autograd.grad(each.sum(), leaf)
            shares.append(float((gradient.flatten(1).abs().amax(dim=1) == 0).float().mean()))
        with torch.no_grad():
            largest = victim(x / 255).tanh().abs().amax(dim=1).mean()
        print(f"    {name:8} {shares[0]:.2f}  {shares[1]:.2f}  {float(largest):.4f}", flush=True)


def footer() -> str:
    """Return the machine and the date."""
    return (
        f"\n{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, "
        f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["roc", "adaptive", "memory"])
    parser.add_argument("data")
    parser.add_argument("--cache", default="detection-cache")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--bins", type=int, default=4)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--fit", type=int, default=100, help="adaptive: images to fit on")
    parser.add_argument("--adaptive", type=int, default=16, help="adaptive: images to attack")
    parser.add_argument("--levels", nargs="+", type=int, choices=[1, 2, 4, 8], default=[2, 8])
    parser.add_argument("--memory-levels", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--white-box", nargs="+", type=int, default=[1])
    parser.add_argument("--weights", nargs="+", type=float, default=[1])
    parser.add_argument("--steps", type=int, default=10, help="adaptive: steps of the attack")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--powers", nargs="+", type=int, default=list(POWERS))
    parser.add_argument("--m", type=int, default=1, help="memory: of the loss")
    parser.add_argument("--memories", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--attacked", type=int, default=30, help="memory: images to attack")
    parser.add_argument("--memory-steps", type=int, default=10)
    options = parser.parse_args()
    {"roc": roc, "adaptive": adaptive, "memory": memory}[options.what](options)
    print(footer())


if __name__ == "__main__":
    main()
