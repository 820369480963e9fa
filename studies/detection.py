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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import harness
import torch
import torch.nn.functional as F
from harness import file_of, kept
from torch import Tensor, nn

from captum_robust._contexts import outputs_of
from captum_robust._resize import resize_image
from captum_robust.attacks import FGSM, PGD, DeepFool, UniversalPerturbation
from captum_robust.attacks.rank import Share
from captum_robust.data import load_dataset, load_image, resize
from captum_robust.data.image_lists import list_images
from captum_robust.defenses import ROC, SafetyNet
from captum_robust.models import Classifier, load_classifier
from captum_robust.nn import DenseAssociativeMemory

POWERS = (2, 3, 10, 20, 30)
HELD_OUT = Literal["pgd1", "pgd2", "pgd4", "pgd8", "fgsm4", "deepfool", "universal"]
ATTACKS: dict[str, tuple[str, Callable[[Classifier], Any]]] = {
    **{
        f"pgd{s}": (f"PGD {s}/255", lambda model, s=s: PGD(model, s / 255, early_stop=False))
        for s in (1, 2, 4, 8)
    },
    "fgsm4": ("FGSM 4/255", lambda model: FGSM(model, 4 / 255, early_stop=False)),
    "deepfool": ("DeepFool, L2", lambda model: DeepFool(model, quantize=True)),
    "universal": ("universal, 10/255", lambda model: UniversalPerturbation(model, 10 / 255)),
}
"""Name -> how the tables call it, and the attack."""


def share_of(hits: Tensor) -> str:
    """Return the share that is true, with Wilson's 95 % interval."""
    return harness.interval(Share.of(int(hits.sum()), len(hits)))


class Squashed:
    """A folder's images in batches, read anew in each pass."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.files, self.batch = list(list_images(folder).values()), batch

    def __iter__(self) -> Iterator[Tensor]:
        for numbers in torch.randperm(len(self.files)).split(self.batch):
            images = [load_image(self.files[int(i)]) for i in numbers]
            yield torch.stack([resize_image(image, (224, 224)) for image in images])


@dataclass
class Attacked:
    """The photographs, what the attacks make of them, and what the classifier sees in both."""

    data: Path
    cache: Path
    images: int = 400
    batch: int = 16

    def __post_init__(self) -> None:
        self.model = load_classifier("efficientnet_lite0").requires_grad_(False)

        def read() -> dict[str, Tensor]:
            shown = harness.photographs(self.data / "imagenet-val-400")
            return {"x": harness.to_bytes(shown.images), "y": shown.labels}

        clean = kept(file_of(self.cache, "clean"), read)
        self.x, self.y = clean["x"][: self.images], clean["y"][: self.images]
        self.clean = self.activations("clean", lambda: self.x)
        self.is_right = self.clean["scores"].argmax(dim=1) == self.y

    def by(self, name: str) -> Tensor:
        """Return the images that an attack makes, uint8."""

        def make() -> dict[str, Tensor]:
            attack = ATTACKS[name][1](self.model)
            if name == "universal":
                attack.fit(Squashed(self.data / "imagenet-train-1000", self.batch))
            return {"x": harness.attacked(attack, self.x, self.y, self.batch)}

        return kept(file_of(self.cache, name), make, len(self.x))["x"]

    def activations(self, name: str, images: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Return scores N×K, and the mean N×C of each channel behind the last ReLU."""

        def make() -> dict[str, Tensor]:
            batches = (part for (part,) in harness.parts(images(), size=self.batch))
            average = partial(torch.mean, dim=(2, 3))
            scores, means = harness.scores_and_features(self.model, batches, average)
            return {"scores": scores, "means": means}

        return kept(file_of(self.cache, f"activations_{name}_{len(self.x)}"), make)


CACHE = Path("detection-cache")


def roc(
    data: Path,
    *,
    cache: Path = CACHE,
    images: int = 400,
    batch: int = 16,
    bins: int = 4,
    attacks: tuple[HELD_OUT, ...] = tuple(ATTACKS),
) -> None:
    """SafetyNet on attacks that it was not fitted on, beside plainer detectors."""
    seen = Attacked(data, cache, images, batch)
    print(f"n={len(seen.x)} clean images, {int(seen.is_right.sum())} of them classified right")
    found, fooled = {}, {}
    for name in attacks:
        found[name] = seen.activations(name, partial(seen.by, name))
        fooled[name] = seen.is_right & (found[name]["scores"].argmax(dim=1) != seen.y)
    say_confidence(seen.clean, found, fooled)
    for fitted_on in (("pgd2",), ("pgd2", "fgsm4"), ("pgd2", "deepfool")):
        for levels in (bins, None) if set(fitted_on) <= set(found) else ():
            say_detector(fitted_on, levels, seen.clean["means"], found, fooled)


def say_confidence(
    clean: dict[str, Tensor], found: dict[str, dict[str, Tensor]], fooled: dict[str, Tensor]
) -> None:
    """Print the areas of the least confident first, and of the most confident first."""

    def confidence(activations: dict[str, Tensor]) -> Tensor:
        return activations["scores"].softmax(dim=1).amax(dim=1)

    print("\nmaximum softmax probability; area of 'the less confident, the more suspicious'")
    for name, each in found.items():
        curve = ROC.of(-confidence(clean), -confidence(each)[fooled[name]])
        print(
            f"    {ATTACKS[name][0]:20} n={int(fooled[name].sum()):4}  {curve.area:.3f} "
            f"[{curve.interval[0]:.3f}, {curve.interval[1]:.3f}]",
            flush=True,
        )


def say_detector(
    fitted_on: tuple[str, ...],
    bins: int | None,
    clean: Tensor,
    found: dict[str, dict[str, Tensor]],
    fooled: dict[str, Tensor],
) -> None:
    """Print the areas of one kind of detector, the mean of both halves."""
    # The network is over: what the detector is given are the activations.
    layer = nn.Identity()
    even = torch.arange(len(clean)) % 2 == 0
    tests = []
    for fit in (even, ~even):
        images = [found[name]["means"][fit & fooled[name]] for name in fitted_on]
        sources = torch.cat([fooled[name][fit].nonzero()[:, 0] for name in fitted_on])
        detector = SafetyNet(layer, layer, bins).fit(clean[fit], images, sources=sources)
        tests.append((detector, ~fit))
    kind = "activations as they are" if bins is None else f"codes of {bins} levels"
    print(f"\nRBF machine on {kind}, fitted on {', '.join(ATTACKS[n][0] for n in fitted_on)}")
    print("    area, 95 % interval; detected where at most 5 % of the clean images were to be")
    for name, each in found.items():
        curves = [
            d.roc(clean[test], each["means"][test & fooled[name]], seed=i)
            for i, (d, test) in enumerate(tests)
        ]
        areas = (curves[0].resampled_areas + curves[1].resampled_areas) / 2
        low, high = areas.quantile(torch.tensor([0.025, 0.975], dtype=areas.dtype)).tolist()
        caught = torch.cat([d.predict(each["means"][t & fooled[name]]) for d, t in tests])
        label = ATTACKS[name][0] + (" (seen)" if name in fitted_on else "")
        print(
            f"    {label:27} n={len(caught):4}  {(curves[0].area + curves[1].area) / 2:.3f} "
            f"[{low:.3f}, {high:.3f}]   {share_of(caught)}",
            flush=True,
        )
    alarms = torch.cat([d.predict(clean[test]) for d, test in tests])
    print(f"    {'clean images, rejected':27} n={len(alarms):4}  {'':22} {share_of(alarms)}")


def adaptive(
    data: Path,
    *,
    cache: Path = CACHE,
    images: int = 400,
    batch: int = 16,
    bins: int = 4,
    fit: Annotated[int, "images to fit on"] = 100,
    adaptive: Annotated[int, "images to attack"] = 16,
    levels: tuple[Literal[1, 2, 4, 8], ...] = (2, 8),
    weights: tuple[float, ...] = (1,),
    steps: Annotated[int, "of the attack"] = 10,
) -> None:
    """PGD on the classifier's loss and the detector's score together, through the surrogate."""
    seen = Attacked(data, cache, images, batch)
    x, y, of_pgd = seen.x, seen.y, seen.by("pgd2")
    even = torch.arange(len(x)) % 2 == 0
    fitted = even.nonzero()[:fit, 0]
    test = (~even & seen.is_right).nonzero()[:adaptive, 0]
    detector = SafetyNet(seen.model, seen.model.cam_layer, bins)
    detector.fit(*([part for (part,) in harness.parts(images[fitted])] for images in (x, of_pgd)))
    alarms = detector.predict(x[test] / 255)
    print(
        f"fitted on PGD 2/255 of n={len(fitted)} images; tested on n={len(test)} others that are "
        f"classified right, {float(alarms.float().mean()):.3f} of them rejected"
    )
    print("fooled; of the fooled detected; fooled and not detected, Wilson's 95 % interval")
    for level in levels:
        plain = seen.by(f"pgd{level}")[test]
        say_evasion(f"{level}/255, does not know", detector, plain, y[test])
        best = torch.zeros(len(test), dtype=torch.bool)
        for weight in weights:
            attack = knowing(detector, level / 255, weight, steps)
            key = f"adaptive_{level}_{weight:g}_{steps}_{fit}_{len(test)}_{bins}"
            made = kept(
                file_of(cache, key),
                lambda attack=attack: {"x": harness.attacked(attack, x[test], y[test])},
            )["x"]
            best |= say_evasion(f"{level}/255, knows, weight {weight:g}", detector, made, y[test])
        print(
            f"    {f'{level}/255, knows, the best':32}                {share_of(best)}", flush=True
        )


def knowing(detector: SafetyNet, epsilon: float, weight: float, steps: int) -> PGD:
    """Return an attack that fools the classifier by a margin and stays below the threshold."""
    assert detector.threshold is not None
    threshold = detector.threshold

    def with_suspicion(x: Tensor) -> Tensor:
        scores, suspicion = detector.surrogate(x)
        return torch.cat([scores, suspicion[:, None]], dim=1)

    def loss(scores: Tensor, label: Tensor) -> Tensor:
        suspicion = (scores[:, -1] - threshold + 0.1).clamp(min=0)
        # No more of either than is needed: the rest of the ball is for the other one.
        return harness.margin(scores[:, :-1], label).clamp(max=1) - weight * suspicion

    # Steps of one level: a smaller change would be lost where the image is rounded to 8 bits.
    return PGD(with_suspicion, epsilon, steps, 1 / 255, loss_func=loss, early_stop=False)


def say_evasion(name: str, detector: SafetyNet, x: Tensor, y: Tensor) -> Tensor:
    """Print one row; return which images are fooled and not detected."""
    fooled = harness.predicted(detector.model, x) != y
    caught = harness.in_batches(detector.predict, x)
    evades = fooled & ~caught
    print(
        f"    {name:32} {float(fooled.float().mean()):.3f}  "
        f"{float(caught[fooled].float().mean()):.3f}   {share_of(evades)}",
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
        with outputs_of([self.model.cam_layer]) as outputs:
            self.model(x)
        return outputs[0].float().mean(dim=(2, 3))

    def scores(self, v: Tensor) -> Tensor:
        """Return N×K: a memory's potentials, for tanh rounds where they are large."""
        is_memory = isinstance(self.head, DenseAssociativeMemory)
        return self.head.potentials(v) if is_memory else self.head(v)

    def forward(self, x: Tensor) -> Tensor:
        """Return N×K scores of images."""
        return self.scores(self.features(x))


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


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is trained on Tiny ImageNet, and attacked."""

    cache: Path = CACHE
    classes: int = 20
    per_class: int = 100
    size: int = 96
    powers: tuple[int, ...] = POWERS
    m: Annotated[int, "of the loss"] = 1
    memories: int = 400
    epochs: int = 20
    attacked: Annotated[int, "images to attack"] = 30
    memory_steps: int = 10
    memory_levels: tuple[int, ...] = (1, 2, 4)
    white_box: tuple[int, ...] = (1,)

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of that name."""
        return kept(file_of(self.cache, name), make)

    def tiny(self, path: Path) -> dict[str, Tensor]:
        """Return training and validation images uint8 of the first classes, and their labels."""
        size = (self.size, self.size)
        train = load_dataset("tiny-imagenet", path, split="train")
        wnids = sorted({name.split("_")[0] for name in train.ids})[: self.classes]
        images: dict[str, list[Tensor]] = {"x_train": [], "x_val": []}
        labels: dict[str, list[int]] = {"y_train": [], "y_val": []}
        classes = {}
        for number, wnid in enumerate(wnids):
            of_class = [i for i, name in enumerate(train.ids) if name.startswith(f"{wnid}_")]
            for i in of_class[: self.per_class]:
                sample = resize(train[i], size)
                classes[sample.label] = number
                images["x_train"].append(harness.to_bytes(sample.image))
                labels["y_train"].append(number)
        for sample in load_dataset("tiny-imagenet", path, split="val"):
            if sample.label in classes:
                images["x_val"].append(harness.to_bytes(resize(sample, size).image))
                labels["y_val"].append(classes[sample.label])
        tensors = {name: torch.stack(each) for name, each in images.items()}
        return tensors | {name: torch.tensor(each) for name, each in labels.items()}

    def linear(self, v: Tensor, y: Tensor, classes: int) -> Linear:
        """Return a linear head after Adam on the cross-entropy, in steps of 64."""
        torch.manual_seed(0)
        head = Linear(v, classes)
        optimizer = torch.optim.Adam(head.parameters(), 1e-3)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(v)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(head(v[rows]), y[rows]).backward()
                optimizer.step()
        return head.requires_grad_(False)

    def fitted(self, v: Tensor, y: Tensor, classes: int, n: int) -> DenseAssociativeMemory:
        """Return a memory after its fit."""
        memory = DenseAssociativeMemory(v.shape[1], classes, self.memories, n=n)
        key = f"memory_{n}_{self.memories}_{self.epochs}_{self.m}_{self.size}_{len(v)}"
        weights = self.kept(
            key, lambda: dict(memory.fit(v, y, epochs=self.epochs, m=self.m).state_dict())
        )
        memory.load_state_dict(weights)
        return memory.requires_grad_(False)

    def images(
        self,
        name: str,
        victim: WithHead,
        loss: Callable[[Tensor, Tensor], Tensor] | None,
        levels: int,
        x: Tensor,
        y: Tensor,
    ) -> Tensor:
        """Return the images uint8 that PGD makes on a head."""
        attack = PGD(victim, levels / 255, self.memory_steps, loss_func=loss, early_stop=False)
        key = f"tiny_{self.size}_{len(x)}_{levels}_{name}_{self.memory_steps}"
        return self.kept(key, lambda: {"x": harness.attacked(attack, x, y, 25)})["x"]


def relative_margin(scores: Tensor, label: Tensor) -> Tensor:
    """Return how far the best other class leads, whatever the scale of the scores."""
    # A power of small cosines may be 1e-30, and must not vanish on its way through the network.
    return harness.margin(scores, label) / scores.detach().abs().amax(dim=1).clamp(min=1e-30)


def right(victim: WithHead, x: Tensor, y: Tensor) -> Tensor:
    """Return whether each image uint8 is classified right."""
    return harness.predicted(victim, x, 32) == y


def memory(data: Path, options: Memory) -> None:
    """Accuracy of the memory and of a linear head on the same features, clean and attacked."""
    model = load_classifier("efficientnet_lite0").requires_grad_(False)
    key = f"{options.classes}_{options.per_class}_{options.size}"
    tiny = options.kept(f"tiny_{key}", lambda: options.tiny(data / "tiny-imagenet-100.tar"))
    trunk = WithHead(model, nn.Identity())

    @torch.no_grad()
    def features() -> dict[str, Tensor]:
        return {
            k: harness.in_batches(trunk.features, tiny[f"x_{k}"], size=32) for k in ("train", "val")
        }

    v = options.kept(f"features_{key}", features)
    y, y_val = tiny["y_train"], tiny["y_val"]
    classes = int(y.max()) + 1
    heads: dict[str, nn.Module] = {"linear": options.linear(v["train"], y, classes)}
    for n in options.powers:
        heads[f"n={n}"] = options.fitted(v["train"], y, classes, n)
    print(
        f"Tiny ImageNet, {classes} classes at {options.size} px: {len(y)} training and "
        f"{len(y_val)} validation images; {options.memories} memories"
    )
    print("\nclean accuracy on all validation images")
    victims = {name: WithHead(model, head) for name, head in heads.items()}
    for name, victim in victims.items():
        with torch.no_grad():
            hits = victim.scores(v["val"]).argmax(dim=1) == y_val
        print(f"    {name:8} {share_of(hits)}", flush=True)
    # Every so many, so that each class has its share.
    rows = torch.arange(0, len(y_val), max(1, len(y_val) // options.attacked))[: options.attacked]
    x, y_val = tiny["x_val"][rows], y_val[rows]
    say_stillness(victims, x[:32], y_val[:32])
    say_attacked(victims, x, y_val, options)


def say_attacked(victims: dict[str, WithHead], x: Tensor, y: Tensor, options: Memory) -> None:
    """Print what is left right of attacked images."""
    print(
        f"\naccuracy under PGD, {options.memory_steps} steps, n={len(x)}, Wilson's 95 % interval;"
    )
    print("white-box on the margin of the potentials; on the cross-entropy of the outputs;")
    print("on images made on the linear head; of the linear head on images made on the memory;")
    print("worst of all up to this size, image by image")
    linear = victims["linear"]
    worst = {name: right(victim, x, y) for name, victim in victims.items()}
    for name, hits in worst.items():
        print(f"    clean    {name:8} {share_of(hits)}", flush=True)
    for levels in options.memory_levels:
        of_linear = options.images("linear", linear, relative_margin, levels, x, y)
        if levels not in options.white_box:
            for name, victim in victims.items():
                hits = share_of(right(victim, of_linear, y), ".2f")
                print(f"    {levels}/255  {name:8} {'':44}  {hits}", flush=True)
            continue
        for name, victim in victims.items():
            made = [of_linear]
            if name != "linear":
                tanh = Outputs(victim.model, victim.head)
                made = [
                    options.images(name, victim, relative_margin, levels, x, y),
                    options.images(f"{name}-tanh", tanh, None, levels, x, y),
                    of_linear,
                ]
            each = [right(victim, images, y) for images in made]
            worst[name] = torch.stack([worst[name], *each]).all(dim=0)
            columns = [share_of(hits, ".2f") for hits in each]
            if name != "linear":
                hits = right(linear, made[0], y)
                worst["linear"] &= hits
                columns += [share_of(seen, ".2f") for seen in (hits, worst[name])]
            print(f"    {levels}/255  {name:8} {'  '.join(columns)}", flush=True)
        print(f"    {levels}/255  linear, worst of all {share_of(worst['linear'])}", flush=True)


def say_stillness(victims: dict[str, WithHead], x: Tensor, y: Tensor) -> None:
    """Print for how many images the gradient of each loss with respect to the pixels is zero."""
    print(f"\nshare of n={len(x)} clean images without any gradient: of the cross-entropy of the")
    print("outputs, of the margin of the potentials; mean of the largest output")
    entropy = partial(F.cross_entropy, reduction="none")
    for name, victim in victims.items():
        if name == "linear":
            continue
        tanh, shares = Outputs(victim.model, victim.head), []
        for through, loss in ((tanh, entropy), (victim, relative_margin)):
            leaf = (x / 255).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(through(leaf), y).sum(), leaf)
            shares.append(float((gradient.flatten(1).abs().amax(dim=1) == 0).float().mean()))
        with torch.no_grad():
            largest = tanh(x / 255).abs().amax(dim=1).mean()
        print(f"    {name:8} {shares[0]:.2f}  {shares[1]:.2f}  {float(largest):.4f}", flush=True)


if __name__ == "__main__":
    harness.study(__doc__, roc, adaptive, memory)
