"""Does a localization hold when the label is flipped, and against an attacker who knows how?

    python studies/defenses.py images DATA OUT [--universal FILE]
    python studies/defenses.py features OUT
    python studies/defenses.py choose DATA OUT
    python studies/defenses.py methods DATA OUT [--limit N]
    python studies/defenses.py adaptive DATA OUT [--limit N]
    python studies/defenses.py moved DATA OUT [--limit N]
    python studies/defenses.py table DATA OUT
    python studies/defenses.py cost [OUT] [--device cuda] [--precisions float32 tf32 bfloat16]

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

import itertools
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import harness
import torch
from captum.attr import IntegratedGradients, LayerGradCam
from harness import file_of, kept, mean
from safetensors.torch import load_file
from torch import Tensor

from captum_robust.attacks import PGD, DeepFool, ExplanationAttack, UniversalPerturbation
from captum_robust.attr import Defended, RobustCAM, TopClasses
from captum_robust.benchmark.passes import count_passes
from captum_robust.catalog.methods import METHODS, heat_map
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
from captum_robust.metrics.functional import boxes_to_mask, gap_closed
from captum_robust.models import Classifier

SIZE = (224, 224)
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
NAMES = (
    "grad_cam",
    "robust_cam",
    "defended grad_cam",
    "defended robust_cam",
    "perceptual_ball_cam",
    "top_classes ig",
)
Maps = Callable[[Tensor], Tensor]
"""Images N×3×H×W -> maps N×H×W of the predicted class."""
Names = Annotated[tuple[str, ...], "names, separated by commas", harness.listed(NAMES)]
Limit = Annotated[int, "only the first so many images"]


@dataclass(frozen=True)
class Method:
    """How maps are made, and what an attacker who knows it takes aim at."""

    maps: Maps
    defended: Defended | None = None
    movable: Defended | RobustCAM | None = None
    """What gives the same maps and can be differentiated, for the explanation attack."""
    share: float = 1.0
    """The share of the images that it is given, less for methods that take long."""
    bfloat16: bool = True
    """Convolutions in half precision, which takes half of the time on a CPU; for maps that need no
    gradient of the inputs."""


def methods_of(model: Classifier) -> dict[str, Method]:
    """Return ours, and Captum's Grad-CAM that they are measured against."""
    layer, transforms = model.cam_layer, default_transforms()
    robust = RobustCAM(model, layer)
    one_class = RobustCAM(model, layer, base="gradcam")  # Grad-CAM's map, with a graph
    ball = METHODS["perceptual_ball_cam"](model)
    behind = Defended(LayerGradCam(model, layer), transforms), Defended(robust, transforms)
    ig = TopClasses(IntegratedGradients(model), 3)
    slow = {"share": 0.25, "bfloat16": False}
    methods = (
        Method(
            lambda x: harness.grad_cams(model, x, harness.predicted(model, x)), movable=one_class
        ),
        Method(of(robust), movable=robust),
        Method(of(behind[0]), behind[0], Defended(one_class, transforms)),
        Method(of(behind[1]), behind[1], behind[1]),
        Method(lambda x: ball.explain(x, harness.predicted(model, x)).maps, **slow),
        Method(of(ig, n_steps=10, internal_batch_size=32), **slow),
    )
    return dict(zip(NAMES, methods, strict=True))


def of(attribution: Any, **options: Any) -> Maps:
    """Return the maps of an attribution that finds the predicted class itself."""
    return lambda x: heat_map(attribution.attribute(x, **options), SIZE)


def shown_in(out: Path, condition: str) -> Tensor:
    """Return the images of a condition, uint8, which `images` has kept."""
    return load_file(file_of(out, "images", condition))["x"]


def flipped(attack: PGD, x: Tensor, labels: Tensor, *, bfloat16: bool = False) -> dict[str, Tensor]:
    """Return 8-bit images away from their labels, and which the attacked model still gets right.

    Whatever the precision of the attack, it is judged in float32.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        images = harness.attacked(attack, x, labels)
    return {"x": images, "right": harness.predicted(attack.forward_func, images) == labels}


def bare_pgd(model: Classifier, strength: int) -> PGD:
    """Return an attack of ten steps, none of which is left out."""
    return PGD(model, strength / 255, steps=10, early_stop=False)


def images(
    data: Path,
    out: Path,
    *,
    universal: Annotated[Path | None, "file of a universal perturbation"] = None,
) -> None:
    """Keep images that flip the label of the bare model."""
    model, shown = harness.classifier(), harness.photographs(data)
    clean = kept(file_of(out, "images", "clean"), lambda: {"x": harness.to_bytes(shown.images)})[
        "x"
    ]
    attacks: dict[str, Any] = {f"pgd {s}/255": bare_pgd(model, s) for s in STRENGTHS}
    attacks["deepfool"] = DeepFool(model, quantize=True)
    if universal is not None:
        attacks["universal"] = UniversalPerturbation.load(universal, model)
    for name, attack in attacks.items():
        flip = partial(flipped, attack, clean, shown.labels)
        right = (
            harness.predicted(model, kept(file_of(out, "images", name), flip)["x"]) == shown.labels
        )
        print(f"{name}: accuracy {right.float().mean():.4f}")


def features(out: Path) -> None:
    """Keep scores N×K and last features N×C×h×w under every single transform, for `choose`."""
    model = harness.classifier()

    def make(condition: str, transform: Transform) -> dict[str, Tensor]:
        batches = (transform(x) for (x,) in harness.parts(shown_in(out, condition)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, last = harness.scores_and_features(model, batches, lambda x: x)
        return {"scores": scores.float(), "features": last.half()}

    for condition, (name, transform) in itertools.product(CHOSEN_ON, POOL.items()):
        kept(
            file_of(out, "features", f"{condition}, {name}"),
            partial(make, condition, transform),
        )


def ensemble_maps(
    names: tuple[str, ...], k: int, held: dict[str, dict[str, Tensor]], weight: Tensor
) -> Tensor:
    """Return maps N×h×w of Defended(RobustCAM) of those transforms, from the held features."""
    average = torch.stack([held[n]["scores"] for n in names]).mean(dim=0)
    ladder = torch.tensor([2.0**-i for i in range(1, k + 1)])
    classes = (weight[average.topk(k, dim=1).indices] * ladder[None, :, None]).sum(dim=1)
    total = torch.zeros(())
    for name in names:
        maps = torch.einsum("nc,nchw->nhw", classes, held[name]["features"].float()).clamp(min=0)
        maps = maps / maps.flatten(1).amax(dim=1).clamp(min=1e-9)[:, None, None]
        total = total + (maps.flip(2) if name == "mirrored" else maps)
    return total / len(names)


def candidates() -> list[tuple[tuple[str, ...], int]]:
    """Return every transform alone and random ensembles of 3 to 5, with one class and with five."""
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
    """Print the ensemble that one half prefers, reported on the other half."""
    shown, model = harness.photographs(data), harness.classifier()
    half, weight = shown.half, model.module.classifier.weight.detach()
    held = {
        c: {n: load_file(file_of(out, "features", f"{c}, {n}")) for n in POOL} for c in CHOSEN_ON
    }
    check_is_defended(out, model, held["clean"], weight)

    def ious_of(file: str, names: tuple[str, ...], k: int) -> dict[str, Tensor]:
        def make(condition: str) -> dict[str, Tensor]:
            maps = harness.enlarged(ensemble_maps(names, k, held[condition], weight))
            return {"ious": harness.overlaps(maps, shown.boxes)}

        return {
            c: kept(file_of(out, "chosen", f"{file} {c}"), partial(make, c))["ious"]
            for c in CHOSEN_ON
        }

    def failures_of(ious: dict[str, Tensor]) -> dict[str, Tensor]:
        return {c: harness.failures(ious[c], half, ious["clean"]) for c in CHOSEN_ON}

    def print_means(name: str, failed: dict[str, Tensor]) -> None:
        print(f"{name:52s}", *(f"{each.mean():.4f}" for each in failed.values()))

    plain = failures_of(ious_of("grad_cam", ("as it is",), 1))
    every = {
        f"{' + '.join(names)}, k={k}": ious_of(f"{'+'.join(names)} k={k}", names, k)
        for names, k in candidates()
    }
    print(f"{len(every)} ensembles, error clean, at 2 and at 8/255, both halves (n={len(half)})")
    print_means("grad_cam", plain)
    chosen = {c: torch.zeros(len(half)) for c in CHOSEN_ON}
    for side in (0, 1):
        other = half != side

        def errors(ious: dict[str, Tensor], rows: Tensor, tuned: Tensor = other) -> list[Tensor]:
            threshold = harness.best_column(ious["clean"][tuned])
            return [(ious[c][rows][:, threshold] <= 0.5).float() for c in CHOSEN_ON]

        totals = {name: sum(e.mean() for e in errors(i, other)) for name, i in every.items()}
        best = min(totals, key=lambda name: float(totals[name]))
        for c, failed in zip(CHOSEN_ON, errors(every[best], ~other), strict=True):
            chosen[c][~other] = failed
        print(f"half {1 - side} chooses {best}")
    for name, ious in every.items():
        print_means(name, failures_of(ious))
    print("chosen on one half, reported on the other:")
    for c in CHOSEN_ON:
        line = f"  {c:12s} {mean(chosen[c])}"
        if c != "clean":
            closed = gap_closed(chosen[c], plain[c], plain["clean"])
            line += f"  gap closed {harness.interval(closed, '.2f')}"
        print(line)


def check_is_defended(
    out: Path, model: Classifier, held: dict[str, dict[str, Tensor]], weight: Tensor
) -> None:
    """Print whether the held features give what Defended gives, up to bfloat16."""
    x = shown_in(out, "clean")[:4] / 255
    names = ("jpeg 40", "mirrored", "blur 2")
    few = {n: {k: v[:4] for k, v in held[n].items()} for n in names}
    ours = ensemble_maps(names, 5, few, weight)
    theirs = Defended(RobustCAM(model, model.cam_layer), [POOL[n] for n in names]).attribute(x)
    print(f"largest difference to Defended on four images: {(ours - theirs[:, 0]).abs().max():.3f}")


def measured(
    method: Method, model: Classifier, x: Tensor, boxes: list[Tensor]
) -> dict[str, Tensor]:
    """Return overlaps N×A, with the time and the classifier passes an image."""
    began = time.perf_counter()
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=method.bfloat16)
    with count_passes(model) as passes, half, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = harness.in_batches(lambda batch: method.maps(batch).detach(), x)
    seconds = time.perf_counter() - began
    spent = torch.tensor([seconds, passes.forward, passes.backward], dtype=torch.float64) / len(x)
    return {"ious": harness.overlaps(maps.float(), boxes[: len(x)]), "spent": spent}


class Bench:
    """Methods on attacked images; what is in OUT is not computed again."""

    def __init__(self, data: Path, out: Path, limit: int | None) -> None:
        self.out, self.model, shown = out, harness.classifier(), harness.photographs(data, limit)
        self.x, self.y, self.boxes = harness.to_bytes(shown.images), shown.labels, shown.boxes
        self.methods = methods_of(self.model)

    def made(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return attacked images of all that are asked for."""
        return kept(file_of(self.out, "images", name), make, len(self.x))

    def measure(self, name: str, condition: str, x: Tensor) -> None:
        """Keep the overlaps of a method on images."""
        kept(
            file_of(self.out, "methods", f"{name}, {condition}"),
            lambda: measured(self.methods[name], self.model, x, self.boxes),
            len(x),
            of="ious",
        )


def methods(
    data: Path,
    out: Path,
    *,
    methods: Names = NAMES,
    conditions: Annotated[tuple[str, ...], "the same", harness.listed(CONDITIONS)] = CONDITIONS,
    limit: Limit | None = None,
) -> None:
    """Keep the boxes of every method on every condition."""
    bench = Bench(data, out, None)
    for condition, name in itertools.product(conditions, methods):
        if not file_of(out, "images", condition).exists():
            print(f"no images of {condition!r}", file=sys.stderr)
            continue
        x = shown_in(out, condition)
        count = min(limit or len(x), round(bench.methods[name].share * len(x)))
        bench.measure(name, condition, x[:count])


def adaptive(data: Path, out: Path, *, methods: Names = NAMES, limit: Limit = 100) -> None:
    """Keep those of the defended methods where the label was flipped through their transforms."""
    bench = Bench(data, out, limit)
    for strength, name in itertools.product(ADAPTIVE_STRENGTHS, methods):
        defended = bench.methods[name].defended
        if defended is None:
            continue
        pgd = bare_pgd(bench.model, strength)
        attack = adaptive_attack(pgd, defended.transforms, transforms_per_eval=1)
        flip = partial(flipped, attack, bench.x, bench.y, bfloat16=True)
        shown = bench.made(f"adaptive pgd {strength}", flip)
        print(
            f"adaptive pgd {strength}/255, n={limit}: behind the transforms "
            f"{mean(shown['right'])} right"
        )
        bench.measure(name, f"adaptive pgd {strength}/255", shown["x"])


def moved(data: Path, out: Path, *, methods: Names = NAMES, limit: Limit = 32) -> None:
    """Keep those where the map was moved through the method itself while the class stayed."""
    bench = Bench(data, out, limit)
    inside = torch.stack([boxes_to_mask(b, SIZE) for b in bench.boxes]).float()
    for strength, name in itertools.product(ADAPTIVE_STRENGTHS, methods):
        method = bench.methods[name]
        if method.movable is None:
            continue
        move = partial(moved_images, method, bench.model, bench.x, inside, strength / 255)
        shown = bench.made(f"{name} moved {strength}", move)["x"]
        bench.measure(name, f"explanation attack {strength}/255", shown)


def moved_images(
    method: Method, model: Classifier, x: Tensor, inside: Tensor, epsilon: float
) -> dict[str, Tensor]:
    """Return images whose map left the annotated boxes while the class stayed."""
    scores: Any = model
    if method.defended is not None:
        scores = DefendedModel(model, method.defended.transforms)

    def move(batch: Tensor, region: Tensor) -> Tensor:
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
        return harness.to_bytes(attack.perturb(batch))

    # Second derivatives of all transformed images at once would not fit into memory.
    return {"x": harness.in_batches(move, x, inside, size=max(1, harness.BATCH // 8))}


def table(data: Path, out: Path) -> None:
    """Print the errors of all methods that have run, and the gap closed."""
    shown = harness.photographs(data)
    conditions = (
        *CONDITIONS,
        *(f"adaptive pgd {s}/255" for s in ADAPTIVE_STRENGTHS),
        *(f"explanation attack {s}/255" for s in ADAPTIVE_STRENGTHS),
    )
    files = {
        (name, condition): file_of(out, "methods", f"{name}, {condition}")
        for name, condition in itertools.product(NAMES, conditions)
    }
    rows = {key: load_file(file) for key, file in files.items() if file.exists()}
    if not rows:
        raise SystemExit("nothing has run yet")
    baseline = {c: rows["grad_cam", c]["ious"] for c in CONDITIONS if ("grad_cam", c) in rows}
    print(
        "error, 95 % interval; gap closed to Grad-CAM on the same images; of clean images the "
        "difference to it"
    )
    for (name, condition), row in rows.items():
        n = len(row["ious"])
        failed = harness.failures(row["ious"], shown.half, rows[name, "clean"]["ious"])
        plain = harness.failures(baseline["clean"][:n], shown.half, baseline["clean"])
        line = f"{name:20s} {condition:24s} n={n:<4d} {mean(failed)}"
        # Of a method without a defence, the attack on the bare model is that which knows.
        against = condition.replace("adaptive ", "")
        if condition == "clean" and name != "grad_cam":
            line += f"  {harness.difference(failed, plain)}"
        elif name != "grad_cam" and against != "clean" and against in baseline:
            fooled = harness.failures(baseline[against][:n], shown.half, baseline["clean"])
            line += f"  {harness.interval(gap_closed(failed, fooled, plain), '.2f')}"
        print(line)
    for name, failed in harness.fixed_boxes(SIZE, shown.boxes).items():
        print(f"{name:20s} {'any':24s} n={len(failed):<4d} {mean(failed)}")
    print("passes forward and backward an image, clean:")
    for (name, condition), row in rows.items():
        if condition == "clean":
            _, forward, backward = row["spent"].tolist()
            print(f"  {name:20s} {forward:6.1f} {backward:6.1f}")


def cost(
    out: Annotated[Path | None, "with images that `images` has kept; pink noise without it"] = None,
    *,
    rounds: int = 5,
    batch: int = harness.BATCH,
    device: str = "cpu",
    precisions: harness.Precisions = ("float32",),
) -> None:
    """Print transforms through the classifier as one batch, against a loop over transforms."""
    model = harness.classifier().to(device)
    x = harness.pink_noise(batch, SIZE) if out is None else shown_in(out, "clean")[:batch] / 255
    x = x.to(device)
    transforms = default_transforms()
    robust, grad_cam = RobustCAM(model, model.cam_layer), LayerGradCam(model, model.cam_layer)
    behind = Defended(grad_cam, transforms)
    in_turns = Defended(grad_cam, transforms, transforms_per_eval=1)

    def loop(batch: Tensor) -> Tensor:
        """What a user would write: find the class, then explain it, transform by transform."""
        with torch.no_grad():
            shown = [t(batch) for t in transforms]
            target = torch.stack([model(s) for s in shown]).mean(dim=0).argmax(dim=1)
        return torch.stack([grad_cam.attribute(s, target) for s in shown]).mean(dim=0)

    timed: dict[str, Callable[[], Any]] = {
        "classifier forward": torch.no_grad()(lambda: model(x)),
        "transforms alone": lambda: [t(x) for t in transforms],
        "grad_cam": lambda: grad_cam.attribute(x, model(x).argmax(dim=1)),
        "robust_cam": lambda: robust.attribute(x),
        "defended robust_cam": lambda: Defended(robust, transforms).attribute(x),
        "defended grad_cam": lambda: behind.attribute(x),
        "  one transform at a time": lambda: in_turns.attribute(x),
        "  loop by hand": lambda: loop(x),
        "defended grad_cam, image by image": lambda: harness.in_batches(
            behind.attribute, x, size=1
        ),
        "  loop by hand, image by image": lambda: harness.in_batches(loop, x, size=1),
    }
    print(f"{len(transforms)} transforms, batch of {len(x)}, median of {rounds} rounds")
    print("ms an image; times the classifier's pass; forward passes an image; GPU busy")
    for precision in precisions:
        print(precision)
        with harness.precision_of(precision, device):
            laps = harness.race(timed, rounds, device=device)
            busy = {name: harness.busy(run, device) for name, run in timed.items()}
        for name, run in timed.items():
            with count_passes(model) as counted:
                run()
            median, passes = laps[name].median, counted.forward / len(x)
            times = median / laps["classifier forward"].median
            print(
                f"{name:36s} {1000 * median / len(x):8.1f} {times:7.2f} {passes:6.1f} {busy[name]}"
            )


if __name__ == "__main__":
    harness.study(__doc__, images, features, choose, methods, adaptive, moved, table, cost)
