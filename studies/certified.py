"""How far can no attacker move a box? Certified localization error against the radius.

Written down before the numbers. The first images of the set, each with the same copies at σ of .1,
.15 and .25 (and .5 with a denoiser); the class is the label. One pass of the classifier gives three
maps of a copy, on a grid of 56×56 cells: RobustCAM, Grad-CAM and the real-time mask. Of each copy
the boxes of the largest component at all thresholds of all families are kept, and how often each
cell is among the top 5, 15, 30 and 50 %.

- The threshold is chosen on one half of the images and scored on the other, both ways, for the
  least certified error at the radius; with it σ, and the rule of the box, or each alone.
- Baselines: the centre box and the whole image, which nothing moves.
- The masking network fine-tuned with noise of .25 in two ways (stage ``fine_tune``, four epochs of
  1,000 photographs that are none of these), 200 copies each, beside the shipped one on the same.
- Beside it: the smoothed box's own error (no attack), and, in stage ``attack``, what the adaptive
  attack of the same norm does to the plain map and to the smoothed one.

``python studies/certified.py sample imagenet-val-400 OUT --sigma .25`` (40,000 passes for 100
images and 400 copies; it goes on where it stopped), then ``... score OUT``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from captum.attr import Attribution, LayerGradCam
from torch import Tensor

from captum_robust._contexts import autocast
from captum_robust._resize import resized
from captum_robust.attacks import ExplanationAttack
from captum_robust.attr import Certified, CertifiedDetails, RobustCAM
from captum_robust.attr._certificate import Counts, Rules
from captum_robust.benchmark.passes import count_passes
from captum_robust.data import load_dataset
from captum_robust.metrics.functional import (
    STRATEGIES,
    alpha_grid,
    best_certified_iou,
    best_iou,
    boxes_to_mask,
    certify_counts,
    probability_above,
    sweep_boxes,
)
from captum_robust.metrics.functional.certificates import probability_at
from captum_robust.nn import MaskingNetwork, load_denoiser, save_masking_network
from captum_robust.training import CroppedImages, TrainingSettings, masking_training

CELLS = 56
SIDE = 224
SHARES = (0.05, 0.15, 0.3, 0.5)
RADII = (0.05, 0.1, 0.25, 0.5)
METHODS = ("robust_cam", "grad_cam", "real_time_masking")
CONFIDENCE = 0.999
PASS = 8
"""Copies."""
THRESHOLDS = [(family, alpha) for family in STRATEGIES for alpha in alpha_grid(family)]
SNAPSHOTS = (200, 400)
"""Copies after which the cells' counts are kept."""


def fine_tune(data: Path, out: Path, *, sigma: float = 0.25, epochs: int = 4) -> None:
    """Teach the shipped masking network noisy images, in two ways, from labelled photographs.

    ``both``: the classifier judges the noisy image with the mask; ``eyes``: the mask is made of the
    noisy image, and judged on the clean one. Everything else is the recipe of the shipped weights.
    """
    classifier = harness.classifier()
    for name in ("both", "eyes"):
        network = harness.masking_network(None, classifier)
        if name == "eyes":
            network.encode = partial(_encode_noisy, network.encode, sigma)  # type: ignore[method-assign]
        masking_training(
            network,
            CroppedImages(load_dataset("imagenet", data, split="train"), SIDE),
            TrainingSettings(epochs, 16, 1e-3, 1e-4, precision="bfloat16"),
            image_noise=sigma if name == "both" else 0.015,
            warm_up_steps=0,
            out=out / f"{name}_{sigma:g}",
        )
        save_masking_network(network, out / f"{name}.safetensors", half=True)


def _encode_noisy(
    encode: Callable[[Tensor], Any], sigma: float, images: Tensor
) -> tuple[list[Tensor], Tensor]:
    found: tuple[list[Tensor], Tensor] = encode(images + sigma * torch.randn_like(images))
    return found


def maps_of(
    network: MaskingNetwork, others: Mapping[str, MaskingNetwork], x: Tensor, classes: Tensor
) -> dict[str, Tensor]:
    """The maps N×56×56 of three methods, or of the other networks, from one encoder's pass."""
    features, scores = network.encode(x)
    if others:
        masks = {name: one.decoder(features, classes).float() for name, one in others.items()}
        return {name: resized(mask, (CELLS, CELLS))[:, 0] for name, mask in masks.items()}
    top = scores.float().scatter(1, classes[:, None], torch.inf).topk(5, dim=1).indices
    weight = network.decoder.head_weight
    assert weight is not None
    with autocast(x.device, "float32"):
        cams = torch.einsum("nchw,nkc->nkhw", features[-1].float(), weight[top].float())
    ladder = 0.5 ** torch.arange(1, 6)
    robust = torch.einsum("nkhw,k->nhw", cams, ladder)[:, None]
    masks = network.decoder(features, classes).float()
    each = (robust.clamp(min=0), cams[:, :1].clamp(min=0), masks)
    return {name: resized(m, (CELLS, CELLS))[:, 0] for name, m in zip(METHODS, each, strict=True)}


def noise_of(copy: int, sigma: float) -> Tensor:
    """The noise 3×H×W of a copy, the same for each image."""
    generator = torch.Generator().manual_seed(copy)
    return torch.randn(3, SIDE, SIDE, generator=generator) * sigma


@torch.no_grad()
def sample(
    data: Path,
    out: Path,
    *,
    sigma: float = 0.25,
    n: int = 400,
    limit: int = 100,
    denoiser: Path | None = None,
    networks: tuple[Path, ...] = (),
    precision: str = "bfloat16",
) -> None:
    """Draw the copies of each image, and keep what their maps show, or masks of other networks."""
    photographs = harness.photographs(data, limit)
    network = harness.masking_network(None, harness.classifier())
    others = {f.stem: harness.masking_network(f, network.encoder) for f in networks}
    methods = [*others] or METHODS
    clean = None if denoiser is None else load_denoiser(denoiser)
    name = f"{sigma:g}" if denoiser is None else f"{sigma:g}_{denoiser.stem}"

    def make(i: int) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        counts = {m: torch.zeros(len(SHARES), CELLS, CELLS) for m in methods}
        snapshots: dict[str, list[Tensor]] = {m: [] for m in methods}
        for begin in range(0, n, PASS):
            noise = torch.stack([noise_of(j, sigma) for j in range(begin, min(n, begin + PASS))])
            x = (photographs.images[i] + noise).contiguous(memory_format=torch.channels_last)
            with autocast(x.device, precision):
                x = x if clean is None else clean(x).float()
                maps = maps_of(network, others, x, photographs.labels[[i]].expand(len(x)))
            for m, each in maps.items():
                swept = sweep_boxes(each, STRATEGIES)
                found.setdefault(m, []).append(torch.cat([swept[s] for s in STRATEGIES], 1).byte())
                for s, share in enumerate(SHARES):
                    rules = Rules(sigma, n, CONFIDENCE, 0.75, share, None, "pixels", "holm")
                    counts[m][s] += rules.shown(each).sum(dim=0)
                if begin + PASS in SNAPSHOTS:
                    snapshots[m].append(counts[m].short())
        boxes = {f"{m} boxes": torch.cat(b)[None] for m, b in found.items()}
        shown = {f"{m} shown": torch.stack(s)[None] for m, s in snapshots.items()}
        return boxes | shown

    for i in range(len(photographs)):
        harness.kept(harness.file_of(out, name, f"{i:04d}"), lambda i=i: make(i))


def boxes_of(boxes: Tensor, sigma: float, n: int) -> Iterator[tuple[int, Counts]]:
    """For each threshold the counts of the first n copies' boxes N×copies×T×4."""
    rules = Rules(sigma, n, CONFIDENCE, 0.75, 0.5, None, "median", "holm")
    black = torch.empty(len(boxes), 1, SIDE, SIDE)
    ends = torch.arange(CELLS + 1, dtype=torch.uint8)
    for t in range(boxes.shape[2]):
        counts = Counts(rules, 1 - CONFIDENCE, black, (CELLS, CELLS), None)
        of = boxes[:, :n, t].permute(0, 2, 1)
        counts.sides = torch.stack([(of == end).sum(dim=2) for end in ends], dim=2).int()
        yield t, counts


def proven(boxes: Tensor, truths: list[Tensor], sigma: float, n: int, radius: float) -> Tensor:
    """N×T: the overlap that is proven at the radius, of medians of boxes N×copies×T×4; at radius 0
    that of the medians themselves."""
    columns = []
    for _, counts in boxes_of(boxes, sigma, n):
        middle, inner, outer = counts._median_boxes(probability_at(max(radius, 1e-9) / sigma))
        of_middle = best_iou(middle[:, None], truths)[:, 0]
        columns.append(of_middle if radius == 0 else best_certified_iou(inner, outer, truths))
    return torch.stack(columns, dim=1)


def of_cells(shown: Tensor, truths: list[Tensor], sigma: float, n: int, radius: float) -> Tensor:
    """N×2S: the same of the rules "pixels" and "component", of counts N×S×56×56."""
    columns = []
    for box in ("pixels", "component"):
        rules = Rules(sigma, n, CONFIDENCE, 0.75, 0.5, None, box, "holm")
        for s in range(shown.shape[1]):
            black = torch.empty(len(shown), 1, SIDE, SIDE)
            counts = Counts(rules, 1 - CONFIDENCE, black, (CELLS, CELLS), None)
            counts.shown = shown[:, s].int()
            details = counts.certified(probability_at(max(radius, 1e-9) / sigma))
            middle = details.box.nan_to_num(0)[:, None]
            iou = best_iou(middle, truths)[:, 0]
            if radius > 0:
                iou = best_certified_iou(details.inner_box, details.outer_box, truths)
            columns.append(iou)
    return torch.stack(columns, dim=1)


def chosen(ious: Tensor, half: Tensor) -> tuple[Tensor, list[int]]:
    """N failures at the column that is best for the other half, and the two columns.

    The best is that of the largest mean of σ((IoU - .5) / .05), which is less noisy than a count.
    """
    failed, columns = torch.zeros(len(ious)), []
    soft = torch.sigmoid((ious - 0.5) / 0.05)
    for side in (0, 1):
        best = int(soft[half != side].mean(dim=0).argmax())
        failed[half == side] = (ious[half == side][:, best] <= 0.5).float()
        columns.append(best)
    return failed, columns


def score(
    data: Path, out: Path, *, n: int = 400, limit: int = 100, methods: tuple[str, ...] = METHODS
) -> None:
    """Certified error against the radius, two-fold, by method, σ and rule of the box."""
    photographs = harness.photographs(data, limit)
    half, truths = photographs.half, photographs.boxes
    for name, failed in harness.fixed_boxes((SIDE, SIDE), truths).items():
        print(f"{name:40} {harness.mean(failed)} at every radius")
    names = [f"{family} {alpha:g}" for family, alpha in THRESHOLDS]
    cells = [f"{rule} {share:g}" for rule in ("pixels", "component") for share in SHARES]
    print(
        f"n={n} copies, {len(truths)} images, confidence {CONFIDENCE}; smoothed box, then R =",
        RADII,
    )
    for method in methods:
        every: dict[float, list[Tensor]] = {r: [] for r in (0.0, *RADII)}
        labels: list[str] = []
        for folder in sorted(p for p in out.iterdir() if p.is_dir()):
            files = sorted(folder.iterdir())[:limit]
            if len(files) < len(truths):
                continue
            found = [harness.load_file(f) for f in files]
            boxes = torch.cat([f[f"{method} boxes"] for f in found])
            shown = torch.cat([f[f"{method} shown"] for f in found])[:, SNAPSHOTS.index(n)]
            sigma = float(folder.name.split("_")[0])
            lines: dict[str, list[str]] = {"median": [], "pixels, component": []}
            for radius in every:
                of_median = proven(boxes, truths, sigma, n, radius)
                of_pixels = of_cells(shown, truths, sigma, n, radius)
                for rule, ious, columns in (
                    ("median", of_median, names),
                    ("pixels, component", of_pixels, cells),
                ):
                    failed, best = chosen(ious, half)
                    at = " / ".join(columns[c] for c in best)
                    lines[rule].append(f"{failed.mean():.3f} ({at})")
                every[radius].append(of_median)
            for rule, texts in lines.items():
                print(f"{method}, σ={folder.name}, {rule}:", ", ".join(texts), flush=True)
            labels += [f"σ={folder.name}, {name}" for name in names]
        for radius, each in every.items():
            failed, best = chosen(torch.cat(each, dim=1), half)
            at = " / ".join(labels[c] for c in best)
            print(f"  {method}, median, σ chosen too, R={radius:g}: {harness.mean(failed)} ({at})")


def shares(out: Path) -> None:
    """How much of the map is certified: in, and in or out, by method, σ, share shown and copies."""
    print(f"certified in, and in or out, of the cells at R = {RADII}")
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        found = [harness.load_file(f) for f in sorted(folder.iterdir())]
        sigma = float(folder.name.split("_")[0])
        for method in METHODS:
            shown = torch.cat([f[f"{method} shown"] for f in found]).int()
            for s, share in enumerate(SHARES):
                for snapshot, n in enumerate(SNAPSHOTS[: shown.shape[1]]):
                    line = f"σ={folder.name} {method:18} {share:4.0%} n={n}, {len(found)} images:"
                    for radius in RADII:
                        counts = shown[:, snapshot, s]
                        tau = probability_at(radius / sigma)
                        inside, outside = certify_counts(counts, n - counts, n, tau, CONFIDENCE)
                        both = (inside | outside).double().mean()
                        line += f"  {inside.double().mean():.3f} {both:.3f}"
                    print(line, flush=True)


def beyond(near: CertifiedDetails, inner: Tensor, outer: Tensor) -> bool:
    """Whether a side of the box of one image is proven to be outside of what was proven of it."""
    low, high = near.outer_box[0], near.inner_box[0]
    early = (low[:2] > inner[:2]) | (high[:2] < outer[:2])
    late = (high[2:] > outer[2:]) | (low[2:] < inner[2:])
    return bool((early | late).any())  # NaN is neither


def attack(
    data: Path,
    *,
    limit: int = 20,
    n: int = 200,
    sigma: float = 0.25,
    starts: int = 3,
    steps: int = 20,
    averaged: int = 8,
    threshold: str = "percentile 0.6",
    denoiser: Path | None = None,
) -> None:
    """What the adaptive attack in L2 does to the plain box and to the smoothed one; violations.

    The attack moves the map out of the annotated boxes while the class stays, from several starts,
    once of the plain map and once of the mean over noisy copies, whose noise each start draws anew.
    A violation is what other copies prove of the attacked image against what was proven of the
    clean one: a pixel certified in that is now certified out, or a side of the box beyond its
    bound, at any radius.
    """
    photographs = harness.photographs(data, limit)
    x, labels, truths = photographs.images, photographs.labels, photographs.boxes
    model = harness.classifier()
    clean = (lambda images: images) if denoiser is None else load_denoiser(denoiser)
    cam = RobustCAM(model, model.cam_layer)
    family, alpha = threshold.split()
    options = {"threshold": (family, float(alpha)), "size": CELLS, "box": "median", "n": n}
    sure = Certified(cam, sigma, denoiser=clean, **options)  # type: ignore[arg-type]
    region = torch.stack([boxes_to_mask(b, (SIDE, SIDE)) for b in truths]).float()

    def certificates(images: Tensor, seed: int) -> list[CertifiedDetails]:
        sure.seed = seed
        with autocast(images.device, "bfloat16"):
            return [
                sure.attribute(images[i : i + 1], int(labels[i]), return_details=True)[1]
                for i in range(len(images))
            ]

    def boxes(maps: Tensor) -> Tensor:
        return sweep_boxes(maps, [family])[family][:, alpha_grid(family).index(float(alpha))]

    def plain(images: Tensor) -> Tensor:
        with autocast(images.device, "bfloat16"):
            maps = harness.in_batches(lambda a, b: cam.attribute(a, b).float(), images, labels)
        return best_iou(boxes(harness.enlarged(maps.clamp(min=0)))[:, None], truths)[:, 0]

    first = certificates(x, 0)
    smooth = torch.cat([d.box for d in first])
    print(
        f"{limit} images, σ={sigma}, n={n}, {threshold}; plain",
        harness.mean(1.0 * (plain(x) <= 0.5)),
    )
    print("smoothed", harness.mean(1.0 * (best_iou(smooth[:, None], truths)[:, 0] <= 0.5)))
    for radius in RADII[1:]:
        bound = [d.at(radius) for d in first]
        inner, outer = (
            torch.cat([getattr(d, f) for d in bound]) for f in ("inner_box", "outer_box")
        )
        proven_iou = best_certified_iou(inner, outer, truths)
        worst_plain, worst_smooth = plain(x), best_iou(smooth[:, None], truths)[:, 0]
        tries = violations = 0
        for start in range(starts):
            noise = torch.stack(
                [noise_of(10_000 * (start + 1) + j, sigma) for j in range(averaged)]
            )

            def mean_map(images: Tensor, target: Tensor, noise: Tensor = noise) -> Tensor:
                maps = [cam.differentiable(clean(images + each), target) for each in noise]
                return torch.stack([m.clamp(min=0).float() for m in maps]).mean(dim=0)

            for explainer in (cam, mean_map):
                attacker = ExplanationAttack(
                    explainer,
                    radius,
                    steps=steps,
                    norm="L2",
                    forward_func=model,
                    beta=None,
                    seed=start,
                    judge_every=steps,
                    quantize=False,
                )
                with autocast(x.device, "bfloat16"):
                    moved = torch.cat(
                        [
                            attacker.perturb(*part[:2], region=part[2])
                            for part in harness.parts(x, labels, region, size=4)
                        ]
                    )
                assert ((moved - x).flatten(1).norm(dim=1) <= radius * 1.001).all()
                now = certificates(moved, 1_000 + start)
                for before, after, i, o in zip(bound, now, inner, outer, strict=True):
                    tries += 1
                    near = after.at(1e-6)  # what holds of the attacked image itself
                    pixels = (before.inside & near.outside) | (before.outside & near.inside)
                    violations += int(pixels.any() or beyond(near, i, o))
                worst_plain = torch.minimum(worst_plain, plain(moved))
                found = torch.cat([d.box for d in now])
                worst_smooth = torch.minimum(worst_smooth, best_iou(found[:, None], truths)[:, 0])
        print(
            f"R={radius}: plain under attack {harness.mean(1.0 * (worst_plain <= 0.5))}, smoothed "
            f"under attack {harness.mean(1.0 * (worst_smooth <= 0.5))}, certified "
            f"{harness.mean(1.0 * (proven_iou <= 0.5))}; violations {violations} of {tries}",
            flush=True,
        )


@torch.no_grad()
def classes(
    data: Path,
    *,
    limit: int = 100,
    n: int = 100,
    sigma: float = 0.25,
    denoiser: Path | None = None,
    without: bool = False,
    precision: str = "bfloat16",
) -> None:
    """Of how many images the class is proven, and is the label; with a denoiser and without."""
    photographs = harness.photographs(data, limit)
    model = harness.classifier()
    clean = load_denoiser(denoiser)
    for name, prepared in (("denoised", clean), ("as it is", None)):
        if without and prepared is not None:
            continue
        hits, kept = torch.zeros(limit, dtype=torch.long), 0.0
        found = torch.empty(limit, dtype=torch.long)
        for i in range(limit):
            drawn = []
            for begin in range(0, n + n // 10, PASS):
                noise = torch.stack([noise_of(j, sigma) for j in range(begin, begin + PASS)])
                x = photographs.images[i] + noise
                with autocast(x.device, precision):
                    x = x if prepared is None else prepared(x).float()
                    drawn.append(model(x).argmax(dim=1))
            each = torch.cat(drawn)
            found[i] = each[: n // 10].mode().values
            hits[i] = (each[n // 10 : n + n // 10] == found[i]).sum()
            kept += (each == photographs.labels[i]).float().mean().item() / limit
        above = probability_above(hits, n, CONFIDENCE)
        right = found == photographs.labels
        line = f"{name}, σ={sigma}, n={n}: copies of the label {kept:.2f}"
        for radius in RADII:
            proven = above > probability_at(radius / sigma)
            line += f"; R={radius}: proven {proven.double().mean():.2f}, "
            line += f"and right {(proven & right).double().mean():.2f}"
        print(line, flush=True)


def cost(data: Path, *, n: int = 100, rounds: int = 3, precision: str = "float32") -> None:
    """Seconds an image of n copies, beside n separate calls of the attribution, and bare passes."""
    photographs = harness.photographs(data, 1)
    x, label = photographs.images, int(photographs.labels[0])
    model = harness.classifier()
    noisy = x + torch.stack([noise_of(j, 0.25) for j in range(n)])
    for name, cam in (
        ("RobustCAM", RobustCAM(model, model.cam_layer)),
        ("Captum's Grad-CAM", LayerGradCam(model, model.cam_layer)),
    ):
        sure = Certified(cam, 0.25, n=n, size=CELLS)
        with count_passes(model) as passes:
            sure.attribute(x, label)

        def one_by_one(cam: Attribution = cam) -> Tensor:
            return torch.cat([cam.attribute(noisy[j : j + 1], label).detach() for j in range(n)])

        def bare() -> Tensor:
            return harness.in_batches(model, noisy, size=PASS)

        def certified(sure: Certified = sure) -> Tensor:
            return sure.attribute(x, label)  # type: ignore[no-any-return]

        contenders = {
            "certified": certified,
            "one by one": one_by_one,
            "bare": torch.no_grad()(bare),
        }
        with autocast(x.device, precision):
            laps = harness.race(contenders, rounds)
        seconds = sum(laps["certified"].wall) / rounds
        print(f"{name}, {precision}, n={n}: {passes}, {seconds:.2f} s an image")
        print(
            "  n separate calls take",
            harness.ratio(laps["one by one"].wall, laps["certified"].wall),
        )
        print(
            "  Certified takes of bare passes",
            harness.ratio(laps["certified"].wall, laps["bare"].wall),
        )


if __name__ == "__main__":
    harness.study(__doc__, fine_tune, sample, score, shares, attack, classes, cost, threads=1)
