"""Does a localization hold when the label is flipped, and against an attacker who knows how?

    python studies/defenses.py images DATA OUT [--universal FILE]
    python studies/defenses.py features OUT
    python studies/defenses.py choose DATA OUT
    python studies/defenses.py methods DATA OUT [--limit N]
    python studies/defenses.py adaptive DATA OUT [--limit N]
    python studies/defenses.py moved DATA OUT [--limit N]
    python studies/defenses.py table DATA OUT
    python studies/defenses.py cost OUT

EfficientNet-Lite0 with its published weights; DATA is an ImageNet validation folder (Kaggle's
layout). Every method explains the class that it predicts itself, as nobody knows the label of an
attacked image. Error: the share of images whose box has an overlap of at most .5 with every
annotated one. Thresholds, and what `choose` chooses, are those that do best on the clean images
(`choose`: clean and attacked at 2 and 8/255) of one half; reported is the other half, both ways.

`images` attacks all images away from their label, misclassified ones too: PGD of 10 steps at 1, 2,
4 and 8/255 that stops for nothing, DeepFool (8-bit images), and a saved universal perturbation of
10/255. Images are 8-bit. `features` keeps the scores and the last features of every image under
every single transform, of which `choose` makes the maps of any ensemble (it checks that they are
those of Defended). `methods` runs the methods themselves. `adaptive` flips the label through a
defended method's own transforms: PGD on the averaged scores with the gradients of the surrogates
(BPDA), in bfloat16, judged in float32. `moved` is the explanation attack through the method: the
map leaves the boxes while the (averaged) class stays. What is in OUT is not computed again.
"""

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captum.attr import IntegratedGradients, LayerGradCam
from safetensors.torch import load_file, save_file
from torch import Tensor

from captum_robust.attacks import PGD, DeepFool, ExplanationAttack, UniversalPerturbation
from captum_robust.attr import Defended, RobustCAM, TopClasses
from captum_robust.benchmark.passes import count_passes
from captum_robust.catalog.methods import METHODS, heat_map
from captum_robust.data import LocalizationDataset, load_dataset, resize
from captum_robust.defenses import (
    JPEG,
    DefendedModel,
    GaussianBlur,
    GaussianNoise,
    HorizontalFlip,
    Identity,
    Resize,
    Transform,
    adaptive_attack,
    default_transforms,
)
from captum_robust.metrics.functional import (
    STRATEGIES,
    best_iou,
    bootstrap_difference,
    bootstrap_interval,
    boxes_to_mask,
    center_box,
    gap_closed,
    split_folds,
    sweep_boxes,
    whole_image_box,
)
from captum_robust.models import Classifier, load_classifier

SIZE = 224
BATCH = 16
STRENGTHS = (1, 2, 4, 8)
ADAPTIVE_STRENGTHS = (2, 8)
CONDITIONS = ("clean", *(f"pgd {s}/255" for s in STRENGTHS), "deepfool", "universal")
CHOSEN_ON = ("clean", "pgd 2/255", "pgd 8/255")
POOL: dict[str, Transform] = {
    "as it is": Identity(),
    "jpeg 40": JPEG(40),
    "jpeg 20": JPEG(20),
    "blur 1": GaussianBlur(1),
    "blur 2": GaussianBlur(2),
    "noise .1": GaussianNoise(0.1, seed=0),
    "noise .2": GaussianNoise(0.2, seed=0),
    "noise .3": GaussianNoise(0.3, seed=0),
    "half": Resize(scale=0.5),
    "mirrored": HorizontalFlip(),
}
CANDIDATES = 48
Maps = Callable[[Tensor], Tensor]
"""Images N×3×H×W -> maps N×H×W of the predicted class."""


@dataclass(frozen=True)
class Data:
    """The annotated boxes of the images, in pixels, and the half that each image is in."""

    boxes: list[Tensor]
    half: Tensor


@dataclass(frozen=True)
class Method:
    """How maps are made, and what an attacker who knows it takes aim at."""

    maps: Maps
    defended: Defended | None = None
    movable: Defended | RobustCAM | None = None
    """What gives the same maps and can be differentiated, for the explanation attack."""
    share: float = 1.0
    """Of the images, for those that take long."""
    bfloat16: bool = True
    """Convolutions in half precision, which takes half of the time on a CPU; for maps that need no
    gradient of the inputs."""


def methods_of(model: Classifier) -> dict[str, Method]:
    """Ours, and Captum's Grad-CAM that they are measured against."""
    layer = model.cam_layer
    grad_cam, robust = LayerGradCam(model, layer), RobustCAM(model, layer)
    one_class = RobustCAM(model, layer, base="gradcam")  # Grad-CAM's map, with a graph
    ball = METHODS["perceptual_ball_cam"](model)
    transforms = default_transforms()
    behind = Defended(grad_cam, transforms), Defended(robust, transforms)

    def predicted(maps: Callable[[Tensor, Tensor], Tensor]) -> Maps:
        def explain(x: Tensor) -> Tensor:
            with torch.no_grad():
                return maps(x, model(x).argmax(dim=1))

        return explain

    return {
        "grad_cam": Method(
            predicted(lambda x, t: heat_map(grad_cam.attribute(x, t), (SIZE, SIZE))),
            movable=one_class,
        ),
        "robust_cam": Method(of(robust), movable=robust),
        "defended grad_cam": Method(of(behind[0]), behind[0], Defended(one_class, transforms)),
        "defended robust_cam": Method(of(behind[1]), behind[1], behind[1]),
        "perceptual_ball_cam": Method(
            predicted(lambda x, t: ball.explain(x, t).maps), share=0.25, bfloat16=False
        ),
        "top_classes ig": Method(
            of(TopClasses(IntegratedGradients(model), 3), n_steps=10, internal_batch_size=32),
            share=0.25,
            bfloat16=False,
        ),
    }


def of(attribution: Any, **options: Any) -> Maps:
    """The maps of an attribution that finds the predicted class itself."""
    return lambda x: heat_map(attribution.attribute(x, **options), (SIZE, SIZE))


def load_data(path: Path) -> tuple[Tensor, Tensor, Data]:
    """Images N×3×224×224 of whole levels, labels N, and the boxes."""
    dataset: LocalizationDataset = load_dataset("imagenet", path)
    samples = [resize(dataset[i], (SIZE, SIZE)) for i in range(len(dataset))]
    images = torch.stack([s.image for s in samples]).mul(255).round().to(torch.uint8)
    labels = torch.tensor([-1 if s.label is None else s.label for s in samples])
    return images, labels, Data([s.boxes for s in samples], split_folds(list(dataset.ids)))


def file_of(out: Path, kind: str, name: str) -> Path:
    """Where a result lies."""
    return out / kind / f"{name.replace('/', '_').replace(' ', '_')}.safetensors"


def batches(x: Tensor) -> Iterator[Tensor]:
    """Float images, batch by batch."""
    return (b.float() / 255 for b in x.split(BATCH))


def to_levels(x: Tensor) -> Tensor:
    """8-bit images."""
    return x.mul(255).round().to(torch.uint8)


def kept(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the file holds; made and written where there is none."""
    if not file.exists():
        began = time.time()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(make(), file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        print(f"{file.stem}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    return load_file(file)


def first_of(
    file: Path, count: int, make: Callable[[], dict[str, Tensor]], of: str = "x"
) -> dict[str, Tensor]:
    """Of the first so many images what the file holds; made anew where it holds fewer."""
    if file.exists() and len(load_file(file)[of]) < count:
        file.unlink()
    return {n: v[:count] if len(v) >= count else v for n, v in kept(file, make).items()}


def attack_images(data: Path, out: Path, universal: Path | None) -> None:
    """Images that flip the label of the bare model."""
    model = frozen()
    images, labels, _ = load_data(data)
    kept(file_of(out, "images", "clean"), lambda: {"x": images})
    attacks: dict[str, Any] = {f"pgd {s}/255": bare_pgd(model, s) for s in STRENGTHS}
    attacks["deepfool"] = DeepFool(model, quantize=True)
    if universal is not None:
        attacks["universal"] = UniversalPerturbation.load(universal, model)
    for name, attack in attacks.items():
        found = kept(
            file_of(out, "images", name), lambda attack=attack: flipped(attack, images, labels)
        )["x"]
        with torch.no_grad():
            classes = torch.cat([model(x).argmax(dim=1) for x in batches(found)])
        print(f"{name}: accuracy {(classes == labels).float().mean():.4f}")


def frozen() -> Classifier:
    """The classifier, its weights laid out as convolutions of half precision are fastest with."""
    model = load_classifier("efficientnet_lite0").requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def keep_features(out: Path) -> None:
    """Of every single transform, for `choose`."""
    model = frozen()
    for condition, name in itertools.product(CHOSEN_ON, POOL):
        kept(
            file_of(out, "features", f"{condition}, {name}"),
            lambda condition=condition, name=name: features(
                model, POOL[name], load_file(file_of(out, "images", condition))["x"]
            ),
        )


def features(model: Classifier, transform: Transform, x: Tensor) -> dict[str, Tensor]:
    """Scores N×K and last features N×C×h×w, in half precision."""
    found: list[Tensor] = []
    handle = model.cam_layer.register_forward_hook(lambda *a: found.append(a[2].half()))
    bfloat16 = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.no_grad(), bfloat16:
        scores = torch.cat([model(transform(b)).float() for b in batches(x)])
    handle.remove()
    return {"scores": scores, "features": torch.cat(found)}


def ensemble_maps(
    names: tuple[str, ...], k: int, held: dict[str, dict[str, Tensor]], weight: Tensor
) -> Tensor:
    """Maps N×h×w of Defended(RobustCAM) of those transforms, from the held features."""
    mean = torch.stack([held[n]["scores"] for n in names]).mean(dim=0)
    ladder = torch.tensor([2.0**-i for i in range(1, k + 1)])
    classes = (weight[mean.topk(k, dim=1).indices] * ladder[None, :, None]).sum(dim=1)
    total = torch.zeros(())
    for name in names:
        maps = torch.einsum("nc,nchw->nhw", classes, held[name]["features"].float()).clamp(min=0)
        maps = maps / maps.flatten(1).amax(dim=1).clamp(min=1e-9)[:, None, None]
        total = total + (maps.flip(2) if name == "mirrored" else maps)
    return total / len(names)


def ious_of(maps: Tensor, boxes: list[Tensor]) -> Tensor:
    """N×A, the best overlap of the box of each threshold of each strategy."""
    swept = [sweep_boxes(m, STRATEGIES) for m in maps.split(100)]
    predicted = torch.cat([torch.cat([s[name] for name in STRATEGIES], dim=1) for s in swept])
    return best_iou(predicted, boxes)


def two_fold(tuned_on: Tensor, ious: Tensor, half: Tensor) -> Tensor:
    """Failures of the first images, at the threshold best for the other half of ``tuned_on``.

    Both are of the first images; of ``tuned_on`` there may be more.
    """
    failures = torch.zeros(len(ious))
    for side in (0, 1):
        tuned, reported = half[: len(tuned_on)] != side, half[: len(ious)] == side
        best = (tuned_on[tuned] <= 0.5).float().mean(dim=0).argmin()
        failures[reported] = (ious[reported][:, best] <= 0.5).float()
    return failures


def candidates() -> list[tuple[tuple[str, ...], int]]:
    """Every transform alone, and random ensembles of 3 to 5; with one class, and with five."""
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[tuple[str, ...], int]] = [((name,), 5) for name in POOL]
    while len(found) < CANDIDATES:
        size = int(torch.randint(3, 6, (), generator=generator))
        order = torch.randperm(len(POOL), generator=generator)[:size].sort().values.tolist()
        each = (tuple(list(POOL)[i] for i in order), 5 if len(found) % 3 else 1)
        if each not in found:
            found.append(each)
    return found


def choose(data: Path, out: Path) -> None:
    """The ensemble that one half prefers, reported on the other half."""
    _, _, known = load_data(data)
    weight = frozen().module.classifier.weight.detach()
    held = {
        c: {n: load_file(file_of(out, "features", f"{c}, {n}")) for n in POOL} for c in CHOSEN_ON
    }
    _check_is_defended(out, held["clean"], weight)
    baseline = {
        c: kept(
            file_of(out, "chosen", f"grad_cam {c}"),
            lambda c=c: {
                "ious": ious_of(
                    enlarged(ensemble_maps(("as it is",), 1, held[c], weight)), known.boxes
                )
            },
        )["ious"]
        for c in CHOSEN_ON
    }
    listed = candidates()
    found = [
        {
            c: kept(
                file_of(out, "chosen", f"{'+'.join(names)} k={k} {c}"),
                lambda c=c, names=names, k=k: {
                    "ious": ious_of(enlarged(ensemble_maps(names, k, held[c], weight)), known.boxes)
                },
            )["ious"]
            for c in CHOSEN_ON
        }
        for names, k in listed
    ]
    plain = {c: two_fold(baseline["clean"], baseline[c], known.half) for c in CHOSEN_ON}
    n = len(known.half)
    print(f"{len(listed)} ensembles, error clean, at 2 and at 8/255, both halves (n={n})")
    print(f"{'grad_cam':52s}", *(f"{plain[c].mean():.4f}" for c in CHOSEN_ON))
    chosen = {c: torch.zeros(len(known.half)) for c in CHOSEN_ON}
    for side in (0, 1):
        other = known.half != side
        best, least = -1, float("inf")
        for i, ious in enumerate(found):
            threshold = (ious["clean"][other] <= 0.5).float().mean(dim=0).argmin()
            errors = [(ious[c][other][:, threshold] <= 0.5).float().mean() for c in CHOSEN_ON]
            if sum(errors) < least:
                best, least = i, float(sum(errors))
        threshold = (found[best]["clean"][other] <= 0.5).float().mean(dim=0).argmin()
        for c in CHOSEN_ON:
            chosen[c][~other] = (found[best][c][~other][:, threshold] <= 0.5).float()
        print(f"half {1 - side} chooses {' + '.join(listed[best][0])}, k={listed[best][1]}")
    for (names, k), ious in zip(listed, found, strict=True):
        errors = [two_fold(ious["clean"], ious[c], known.half).mean() for c in CHOSEN_ON]
        print(f"{' + '.join(names) + f', k={k}':52s}", *(f"{e:.4f}" for e in errors))
    print("chosen on one half, reported on the other:")
    for c in CHOSEN_ON:
        line = f"  {c:12s} {interval(chosen[c])}"
        if c != "clean":
            line += f"  gap closed {gap(chosen[c], plain[c], plain['clean'])}"
        print(line)


def _check_is_defended(out: Path, held: dict[str, dict[str, Tensor]], weight: Tensor) -> None:
    """The held features give what Defended gives, up to bfloat16."""
    model = frozen()
    x = load_file(file_of(out, "images", "clean"))["x"][:4].float() / 255
    names = ("jpeg 40", "mirrored", "blur 2")
    few = {n: {k: v[:4] for k, v in held[n].items()} for n in names}
    ours = ensemble_maps(names, 5, few, weight)
    theirs = Defended(RobustCAM(model, model.cam_layer), [POOL[n] for n in names]).attribute(x)
    print(f"largest difference to Defended on four images: {(ours - theirs[:, 0]).abs().max():.3f}")


def enlarged(maps: Tensor) -> Tensor:
    """At the size of the images."""
    return torch.nn.functional.interpolate(maps[:, None], (SIZE, SIZE), mode="bilinear")[:, 0]


def interval(failures: Tensor) -> str:
    """A mean with its 95 % interval."""
    found = bootstrap_interval(failures)
    return f"{failures.mean():.4f} [{found.low:.3f}, {found.high:.3f}]"


def gap(ours: Tensor, attacked: Tensor, clean: Tensor) -> str:
    """The gap closed with its 95 % interval."""
    found = gap_closed(ours, attacked, clean)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def run_methods(
    data: Path,
    out: Path,
    names: list[str] | None,
    conditions: list[str] | None,
    limit: int | None,
) -> None:
    """Boxes of every method on every condition."""
    model = frozen()
    _, _, known = load_data(data)
    methods = methods_of(model)
    for condition, name in itertools.product(conditions or CONDITIONS, names or methods):
        file = file_of(out, "images", condition)
        if not file.exists():
            print(f"no images of {condition!r}", file=sys.stderr)
            continue
        x = load_file(file)["x"]
        count = min(limit or len(x), round(methods[name].share * len(x)))
        first_of(
            file_of(out, "methods", f"{name}, {condition}"),
            count,
            lambda x=x[:count], name=name: measured(methods[name], model, x, known.boxes),
            of="ious",
        )


def measured(
    method: Method, model: Classifier, x: Tensor, boxes: list[Tensor]
) -> dict[str, Tensor]:
    """Overlaps N×A, with the time and the classifier passes an image."""
    maps, began = [], time.perf_counter()
    with count_passes(model) as passes:
        for batch in batches(x):
            half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=method.bfloat16)
            with half, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                maps.append(method.maps(batch).detach())
    seconds = time.perf_counter() - began
    spent = torch.tensor([seconds, passes.forward, passes.backward], dtype=torch.float64) / len(x)
    return {"ious": ious_of(torch.cat(maps), boxes[: len(x)]), "spent": spent}


def run_adaptive(data: Path, out: Path, names: list[str] | None, limit: int) -> None:
    """The defended methods on images whose label was flipped through their own transforms."""
    model = frozen()
    images, labels, known = load_data(data)
    x, y, boxes = images[:limit], labels[:limit], known.boxes[:limit]
    methods = methods_of(model)
    for strength, name in itertools.product(ADAPTIVE_STRENGTHS, names or methods):
        method = methods[name]
        if method.defended is None:
            continue
        attack = adaptive_attack(
            bare_pgd(model, strength), method.defended.transforms, transforms_per_eval=1
        )
        shown = first_of(
            file_of(out, "images", f"adaptive pgd {strength}"),
            limit,
            lambda attack=attack: flipped(attack, x, y, bfloat16=True),
        )
        print(
            f"adaptive pgd {strength}/255, n={limit}: behind the transforms "
            f"{interval(shown['right'].float())} right"
        )
        first_of(
            file_of(out, "methods", f"{name}, adaptive pgd {strength}/255"),
            limit,
            lambda shown=shown["x"], method=method: measured(method, model, shown, boxes),
            of="ious",
        )


def bare_pgd(model: Classifier, strength: int) -> PGD:
    """Of ten steps, none of which is left out."""
    return PGD(model, strength / 255, steps=10, early_stop=False)


def flipped(attack: PGD, x: Tensor, labels: Tensor, *, bfloat16: bool = False) -> dict[str, Tensor]:
    """8-bit images away from their labels, and which the attacked model still gets right.

    Whatever the precision of the attack, it is judged in float32.
    """
    images, right = [], []
    for batch, label in zip(batches(x), labels.split(BATCH), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            images.append(to_levels(attack.perturb(batch, label)))
        with torch.no_grad():
            scores = attack.forward_func(images[-1].float() / 255)
        right.append(scores.argmax(dim=1) == label)
    return {"x": torch.cat(images), "right": torch.cat(right)}


def run_moved(data: Path, out: Path, names: list[str] | None, limit: int) -> None:
    """Methods on images whose map was moved through the method itself while the class stayed."""
    model = frozen()
    images, _, known = load_data(data)
    x, boxes = images[:limit], known.boxes[:limit]
    methods = methods_of(model)
    inside = torch.stack([boxes_to_mask(b, (SIZE, SIZE)) for b in boxes]).float()
    for strength, name in itertools.product(ADAPTIVE_STRENGTHS, names or methods):
        method = methods[name]
        if method.movable is None:
            continue
        shown = first_of(
            file_of(out, "images", f"{name} moved {strength}"),
            limit,
            lambda method=method, e=strength / 255: moved_maps(method, model, x, inside, e),
        )["x"]
        first_of(
            file_of(out, "methods", f"{name}, explanation attack {strength}/255"),
            limit,
            lambda shown=shown, method=method: measured(method, model, shown, boxes),
            of="ious",
        )


def moved_maps(
    method: Method, model: Classifier, x: Tensor, inside: Tensor, epsilon: float
) -> dict[str, Tensor]:
    """Images whose map left the annotated boxes while the class stayed."""
    assert method.movable is not None
    scores: Any = model
    if method.defended is not None:
        scores = DefendedModel(model, method.defended.transforms)
    found = []
    # Second derivatives of all transformed images at once would not fit into memory.
    few = max(1, BATCH // 8)
    for batch, region in zip((x.float() / 255).split(few), inside.split(few), strict=True):
        attack = ExplanationAttack(
            method.movable,
            epsilon,
            steps=10,
            step_size=epsilon / 4,
            region=region,
            forward_func=scores,
            beta=None,
            random_start=False,
        )
        found.append(to_levels(attack.perturb(batch)))
    return {"x": torch.cat(found)}


def print_table(data: Path, out: Path) -> None:
    """Errors of all methods that have run, and the gap closed."""
    _, _, known = load_data(data)
    files = sorted((out / "methods").glob("*.safetensors"))
    if not files:
        raise SystemExit("nothing has run yet")
    rows = {}
    for name in (
        "grad_cam",
        "robust_cam",
        "defended grad_cam",
        "defended robust_cam",
        "perceptual_ball_cam",
        "top_classes ig",
    ):
        for condition in (
            *CONDITIONS,
            *(f"adaptive pgd {s}/255" for s in ADAPTIVE_STRENGTHS),
            *(f"explanation attack {s}/255" for s in ADAPTIVE_STRENGTHS),
        ):
            file = file_of(out, "methods", f"{name}, {condition}")
            if file.exists():
                rows[name, condition] = load_file(file)
    baseline = {c: rows["grad_cam", c]["ious"] for c in CONDITIONS if ("grad_cam", c) in rows}
    print(
        "error, 95 % interval; gap closed to Grad-CAM on the same images; of clean images the "
        "difference to it"
    )
    for (name, condition), row in rows.items():
        ious = row["ious"]
        n = len(ious)
        failures = two_fold(rows[name, "clean"]["ious"], ious, known.half)
        plain = two_fold(baseline["clean"], baseline["clean"][:n], known.half)
        line = f"{name:20s} {condition:24s} n={n:<4d} {interval(failures)}"
        # Of a method without a defence, the attack on the bare model is that which knows.
        against = condition.replace("adaptive ", "")
        if condition == "clean" and name != "grad_cam":
            found = bootstrap_difference(failures, plain)
            line += f"  {found.mean:+.4f} [{found.low:+.3f}, {found.high:+.3f}]"
        elif name != "grad_cam" and against != "clean" and against in baseline:
            attacked = two_fold(baseline["clean"], baseline[against][:n], known.half)
            line += f"  {gap(failures, attacked, plain)}"
        print(line)
    for name, box in (("centre box", center_box), ("whole image", whole_image_box)):
        failures = best_iou(box((SIZE, SIZE)).expand(len(known.boxes), 1, 4), known.boxes) <= 0.5
        print(f"{name:20s} {'any':24s} n={len(failures):<4d} {interval(failures[:, 0].float())}")
    print("passes forward and backward an image, clean:")
    for (name, condition), row in rows.items():
        if condition == "clean":
            _, forward, backward = row["spent"].tolist()
            print(f"  {name:20s} {forward:6.1f} {backward:6.1f}")


def print_cost(out: Path, rounds: int) -> None:
    """Transforms through the classifier as one batch, against a loop over transforms."""
    model = frozen()
    x = load_file(file_of(out, "images", "clean"))["x"][:BATCH].float() / 255
    transforms = default_transforms()
    robust, grad_cam = RobustCAM(model, model.cam_layer), LayerGradCam(model, model.cam_layer)

    def loop(batch: Tensor) -> Tensor:
        """What a user would write: find the class, then explain it, transform by transform."""
        with torch.no_grad():
            shown = [t(batch) for t in transforms]
            target = torch.stack([model(s) for s in shown]).mean(dim=0).argmax(dim=1)
        return torch.stack([grad_cam.attribute(s, target) for s in shown]).mean(dim=0)

    def one_by_one(explain: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: [explain(x[i : i + 1]) for i in range(len(x))]

    def only_transforms() -> None:
        for t in transforms:
            t(x)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    timed: dict[str, Callable[[], Any]] = {
        "classifier forward": forward,
        "transforms alone": only_transforms,
        "grad_cam": lambda: grad_cam.attribute(x, model(x).argmax(dim=1)),
        "robust_cam": lambda: robust.attribute(x),
        "defended robust_cam": lambda: Defended(robust, transforms).attribute(x),
        "defended grad_cam": lambda: Defended(grad_cam, transforms).attribute(x),
        "  one transform at a time": lambda: Defended(
            grad_cam, transforms, transforms_per_eval=1
        ).attribute(x),
        "  loop by hand": lambda: loop(x),
        "defended grad_cam, image by image": one_by_one(Defended(grad_cam, transforms).attribute),
        "  loop by hand, image by image": one_by_one(loop),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, run in timed.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    passes = {}
    for name, run in timed.items():
        with count_passes(model) as counted:
            run()
        passes[name] = counted.forward / len(x)
    print(f"{len(transforms)} transforms, batch of {len(x)}, median of {rounds} rounds")
    print("ms an image; times the classifier's forward pass; forward passes an image")
    unit = sorted(seconds["classifier forward"])[rounds // 2]
    for name, values in seconds.items():
        median = sorted(values)[rounds // 2]
        print(f"{name:36s} {1000 * median / len(x):8.1f} {median / unit:7.2f} {passes[name]:6.1f}")


def main() -> None:
    """One stage."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    stages = ["images", "features", "choose", "methods", "adaptive", "moved", "table", "cost"]
    parser.add_argument("stage", choices=stages)
    parser.add_argument("paths", nargs="+", type=Path, help="DATA OUT, or OUT")
    parser.add_argument("--universal", type=Path, help="file of a universal perturbation")
    parser.add_argument("--methods", help="names, separated by commas")
    parser.add_argument("--conditions", help=f"of {', '.join(CONDITIONS)}, separated by commas")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    needs = 1 if arguments.stage in ("features", "cost") else 2
    if len(arguments.paths) != needs:
        parser.error(f"{arguments.stage}: expected {'OUT' if needs == 1 else 'DATA OUT'}")
    data, out = arguments.paths[0], arguments.paths[-1]
    names = arguments.methods.split(",") if arguments.methods else None
    conditions = arguments.conditions.split(",") if arguments.conditions else None
    if arguments.stage == "images":
        attack_images(data, out, arguments.universal)
    elif arguments.stage == "features":
        keep_features(out)
    elif arguments.stage == "choose":
        choose(data, out)
    elif arguments.stage == "methods":
        run_methods(data, out, names, conditions, arguments.limit)
    elif arguments.stage == "adaptive":
        run_adaptive(data, out, names, arguments.limit or 100)
    elif arguments.stage == "moved":
        run_moved(data, out, names, arguments.limit or 32)
    elif arguments.stage == "table":
        print_table(data, out)
    else:
        print_cost(out, arguments.rounds)


if __name__ == "__main__":
    main()
