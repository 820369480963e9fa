"""Which layers, weight, iterations, blur, noise and guide make a perturbation point at the object?

    python studies/perceptual_ball_search.py maps DATA OUT      # the better part of an hour
    python studies/perceptual_ball_search.py boxes DATA OUT     # minutes
    python studies/perceptual_ball_search.py table OUT

`maps` perturbs every image of DATA (ImageNet in Kaggle's layout) under every configuration below
and keeps the map after some numbers of iterations, alone and times the input gradient; a
configuration that is in OUT already is not run again. `boxes` blurs the maps, multiplies them by
class activation maps, and draws the boxes of every threshold; `table` chooses configuration,
iterations, blur, guide and threshold on one half of the images and reports the error on the other
half, both ways, with the paired difference to Captum's Grad-CAM. The halves are those of
`captum-robust compare`.

Batch norms are folded into the convolutions before them, which changes the scores by 1e-5 and takes
a third off the time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import harness
import torch
from harness import difference, kept, listed, mean, overlaps, parts, photographs, study
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captum_robust.attr import BallSettings, MultiScale, PerceptualBallPerturbation, RobustCAM
from captum_robust.attr._ball import Ball
from captum_robust.attr._samples import Samples
from captum_robust.catalog.methods import METHODS
from captum_robust.metrics.functional import (
    alpha_grid,
    best_iou,
    localization_error,
    split_folds,
)
from captum_robust.metrics.functional.thresholding import STRATEGIES
from captum_robust.models import Classifier, load_classifier

BATCH = 8
SIDE = 224
BLURS = (4, 8, 12)
FINE = 12 / 7
"""How much larger the image is for the finer class activation map: 384 px, 12×12 positions."""
SEVERAL = (9 / 7, 12 / 7, 2)
BASELINES = ("grad_cam", "robust_cam", "guided_grad_cam", "center_box", "whole_image")


@dataclass(frozen=True)
class Configuration:
    """One way to perturb. ``layers`` are blocks of EfficientNet-Lite0; 16 is the head."""

    layers: tuple[int, ...]
    snapshots: tuple[int, ...]
    """Numbers of iterations; the last is where it ends."""
    noise: float = 0.0
    samples: int = 1
    """Noisy copies, whose squared perturbations are averaged (Captum's smoothgrad_sq)."""
    settings: dict[str, Any] = field(default_factory=dict)


def blocks(first: int, last: int) -> tuple[int, ...]:
    """The numbers from first to last."""
    return tuple(range(first, last + 1))


NOISY: dict[str, Any] = {"noise": 0.1, "samples": 4}
CONFIGURATIONS = {
    "8-15": Configuration(blocks(8, 15), (4, 8, 12)),
    "8-15 noisy": Configuration(blocks(8, 15), (2, 5), **NOISY),
    "3-15": Configuration(blocks(3, 15), (4, 8, 12)),
    "11-16": Configuration(blocks(11, 16), (4, 8, 12)),
    "8-15 weight 1": Configuration(blocks(8, 15), (4, 8, 12), settings={"perceptual_weight": 1.0}),
    "8-15 weight 100": Configuration(
        blocks(8, 15), (4, 8, 12), settings={"perceptual_weight": 100.0}
    ),
    "8-15 normalized": Configuration(
        blocks(8, 15), (4, 8, 12), settings={"normalize_layers": True, "perceptual_weight": 100.0}
    ),
    "no layers": Configuration((), (4, 8, 12), settings={"perceptual_weight": 0.0}),
}
Names = Annotated[tuple[str, ...], "names, separated by commas", listed(CONFIGURATIONS)]


def folded(model: Classifier) -> Classifier:
    """The Lite model with each batch norm, and even padding, inside the convolution before it."""

    def fuse(convolution: nn.Module, norm: nn.Module) -> nn.Module:
        fused = fuse_conv_bn_eval(convolution, norm)
        padding = getattr(fused, "static_padding", None)
        if isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            fused.padding = (padding.padding[0],) * 2
            fused.static_padding = nn.Identity()
        return fused

    for block in model.module.blocks:
        for convolution, norm in (
            ("_expand_conv", "_bn0"),
            ("_depthwise_conv", "_bn1"),
            ("_project_conv", "_bn2"),
        ):
            if hasattr(block, convolution):
                setattr(block, convolution, fuse(getattr(block, convolution), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
    for stage in (model.module.stem, model.module.head):
        stage[0], stage[1] = fuse(stage[0], stage[1]), nn.Identity()
    return model


def perturb(
    model: Classifier, x: Tensor, target: Tensor, gradient: Tensor, configuration: Configuration
) -> dict[str, Tensor]:
    """N×H×W maps by kind and iteration: the root of the mean square over channels and samples."""
    stages = [*model.module.blocks, model.module.head]
    layers = [stages[i] for i in configuration.layers]
    # A tolerance that is never met makes the ball report every iteration.
    settings = BallSettings(
        max_iterations=configuration.snapshots[-1], map_tolerance=1e-30, **configuration.settings
    )
    squares: dict[str, Tensor] = {}
    for _ in range(configuration.samples):
        noisy = x + configuration.noise * torch.randn(x.shape) if configuration.noise else x
        ball = Ball(Samples(model, (noisy,), target, None, 0, len(x)), layers, settings)
        shots = {i: torch.zeros_like(x) for i in configuration.snapshots}
        ball._has_settled = _watch(noisy, shots)  # type: ignore[method-assign]
        ball.shrink()
        for iteration, moved in shots.items():
            for kind, change in (("plain", moved), ("gradient", moved * gradient)):
                key = f"{kind} {iteration}"
                squares[key] = squares.get(key, torch.zeros(())) + change.square().mean(dim=1)
    return {
        k: (s / s.amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)).sqrt()
        for k, s in squares.items()
    }


def _watch(x: Tensor, shots: dict[int, Tensor]) -> Callable[[Tensor, Tensor, list[int]], Tensor]:
    """Keep each sample's perturbation at each snapshot; one that stops early keeps its last."""

    def watch(points: Tensor, rows: Tensor, iterations: list[int]) -> Tensor:
        moved = points.reshape(len(points), *x.shape[1:]) - x[rows]
        for iteration, shot in shots.items():
            reached = [j for j, done in enumerate(iterations) if done <= iteration]
            shot[rows[reached]] = moved[reached]
        return torch.zeros(len(points), dtype=torch.bool)

    return watch


def in_halves(batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the maps of all batches by name, in half precision."""
    return harness.gathered({k: m.detach().half() for k, m in batch.items()} for batch in batches)


def maps(data: Path, out: Path, *, configurations: Names = tuple(CONFIGURATIONS)) -> None:
    """Write the maps of each configuration, and the guides: the better part of an hour."""
    model = load_classifier("efficientnet_lite0")
    shown = photographs(data)
    gradient = kept(out / "guides.safetensors", lambda: guides_of(model, shown))["gradient"]
    model = folded(model)

    def make(name: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        batches = parts(shown.images, shown.labels, gradient, size=BATCH)
        return in_halves(
            perturb(model, x, y, g.float(), CONFIGURATIONS[name]) for x, y, g in batches
        )

    for name in configurations:
        kept(out / f"{name}.safetensors", partial(make, name))


def guides_of(model: Classifier, shown: harness.Photographs) -> dict[str, Tensor]:
    """Return the normalised input gradient, class activation maps, and the baselines' maps."""
    cam = RobustCAM(model, model.cam_layer)
    cams = {"cam": cam, "fine": MultiScale(cam, (FINE,)), "several": MultiScale(cam, SEVERAL)}
    methods = {name: METHODS[name](model) for name in BASELINES}

    def guides(x: Tensor, target: Tensor) -> dict[str, Tensor]:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(leaf).gather(1, target[:, None]).sum(), leaf)
        return (
            {"gradient": g.abs() / g.abs().amax(dim=(1, 2, 3), keepdim=True)}
            | {
                name: each.attribute(x, target, k=1, upsample=True)[:, 0].clamp(min=0)
                for name, each in cams.items()
            }
            | {
                f"baseline {name}": method.explain(x, target).maps
                for name, method in methods.items()
            }
        )

    return in_halves(guides(x, y) for x, y in parts(shown.images, shown.labels, size=BATCH))


def boxes(data: Path, out: Path, *, configurations: Names = tuple(CONFIGURATIONS)) -> None:
    """Write the overlaps of every variant: minutes."""
    truth = photographs(data).boxes
    stored = load_file(out / "guides.safetensors")
    guides = {name: stored[name].float() for name in ("cam", "fine", "several")}
    # The root of a map in [0, 1] flattens it, and leaves more of the choice to the perturbation.
    guides |= {f"root-{name}": guides[name].sqrt() for name in ("fine", "several")}

    def baselines() -> dict[str, Tensor]:
        model = load_classifier("efficientnet_lite0")
        found = {k: overlaps(v, truth).half() for k, v in guides.items()}
        for name in BASELINES:
            box, own = METHODS[name](model).box, stored[f"baseline {name}"].float()
            ious = overlaps(own, truth)
            if box is not None:
                ious = best_iou(box((SIDE, SIDE)).expand(*ious.shape, 4), truth)
            found[name] = ious.half()
        return found

    def variants(source: Path) -> dict[str, Tensor]:
        found = {}
        for key, raw in load_file(source).items():
            for blur in BLURS:
                blurred = PerceptualBallPerturbation.saliency(raw.float()[:, None], blur)
                for guide, factor in {"none": None, **guides}.items():
                    guided = blurred if factor is None else blurred * factor
                    found[f"{key}, blur {blur}, {guide}"] = overlaps(guided, truth).half()
        return found

    kept(out / "boxes" / "baselines.safetensors", baselines)
    for name in configurations:
        if (source := out / f"{name}.safetensors").exists():
            kept(out / "boxes" / f"{name}.safetensors", partial(variants, source))


def choose(variants: dict[str, Tensor]) -> Any:
    """The error where variant and threshold were chosen on the other half."""
    sizes = [len(alpha_grid(s)) for s in STRATEGIES]
    ious, alphas = {}, {}
    for name, tensor in variants.items():
        for strategy, part in zip(STRATEGIES, tensor.float().split(sizes, dim=1), strict=True):
            ious[f"{name}, {strategy}"] = part
            alphas[f"{name}, {strategy}"] = alpha_grid(strategy)
    return localization_error(ious, alphas=alphas)


def table(out: Path) -> None:
    """Print the error of the baselines and of every group of variants."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, ious in load_file(out / "boxes" / "baselines.safetensors").items():
        groups[f"* {name}"] = {name: ious}
    for configuration in CONFIGURATIONS:
        file = out / "boxes" / f"{configuration}.safetensors"
        if not file.exists():
            continue
        for variant, ious in load_file(file).items():
            kind, guide = variant.split()[0], variant.split()[-1].removeprefix("root-")
            name = f"{configuration}: {variant}"
            ours = not configuration.startswith("no layers")
            keys = [f"{configuration}, {kind}, {guide}"]
            if configuration == "8-15":
                iterations = variant.split()[1].removesuffix(",")
                keys.append(f"{configuration} after {iterations:>2} iterations, {kind}, {guide}")
            if ours:
                noise = "noisy" if "noisy" in configuration else "once"
                keys += [f"any ball {noise}, {kind}, {guide}", "any ball"]
            for key in keys:
                groups.setdefault(key, {})[name] = ious
    reference = choose(groups["* grad_cam"]).per_sample_error
    folds = split_folds(len(reference))
    print(f"{'error':>22}  half 0  half 1  {'less Grad-CAM':>24}  variants  name; chosen")
    for name, variants in sorted(groups.items()):
        result = choose(variants)
        wrong = result.per_sample_error
        halves = "   ".join(f"{wrong[folds == fold].mean():.3f}" for fold in (0, 1))
        chosen = "; ".join(f"{c[0][0]} {c[0][1]:g}" for c in result.chosen)
        print(
            f"{mean(wrong)}  {halves}  {difference(wrong, reference)}  {len(variants):>8}  {name}; "
            f"{chosen}"
        )


if __name__ == "__main__":
    study(__doc__, maps, boxes, table)
