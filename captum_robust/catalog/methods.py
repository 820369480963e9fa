"""The methods that ``compare`` and ``explain`` know by name: ours, Captum's, and the baselines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import captum.attr
import torch
from captum.attr import Attribution, LayerGradCam
from torch import Tensor

from captum_robust._checks import check, check_type, known_name
from captum_robust._resize import resized
from captum_robust.attacks import Attack, ExplanationAttack
from captum_robust.attr import (
    AdversarialLocalization,
    BallSettings,
    ClassActivationMap,
    Defended,
    Guided,
    IterativeMask,
    MultiScale,
    PerceptualBallPerturbation,
    RealTimeMasking,
    RobustCAM,
    TopClasses,
)
from captum_robust.attr._layer_maps import attributed
from captum_robust.attr.real_time_masking import pretrained
from captum_robust.catalog.attributions import ATTRIBUTIONS, SLOW_ATTRIBUTIONS, Made
from captum_robust.catalog.box_vote import VOTES, BoxVote, Votes
from captum_robust.catalog.method import Explanation as Explanation
from captum_robust.catalog.method import Method as Method
from captum_robust.catalog.method import Perturbation as Perturbation
from captum_robust.catalog.relevance import RelevancePropagation
from captum_robust.catalog.thresholds import shipped_threshold
from captum_robust.defenses import DefendedModel, default_transforms
from captum_robust.metrics import functional as metrics
from captum_robust.models import Classifier, takes_size
from captum_robust.nn import MaskingNetwork
from captum_robust.nn.layout import ONE_POSITION

OCCLUSION_WINDOW = 64
OCCLUSION_STRIDE = 32
"""For 224 px: 6×6 positions, 36 forward passes. The window is the side that hides a typical part,
not the whole, of an object of half the image; half-window steps are the coarsest that leave no
pixel to one window alone. Other sizes scale both."""

INTEGRATED_GRADIENTS_STEPS = 20
SMOOTH_GRAD_SAMPLES = 8

BALL_SETTINGS = BallSettings(max_iterations=8)
BALL_BLUR = 8.0
"""Pixels of 224; other sizes scale it."""
FINE_CAM_SCALE = 12 / 7
"""The guide's class activation map is that of the image at 384 px, 12×12 instead of 7×7; of a
network that takes one size only, the map of the image as it is."""
FINE_CAM_POWER = 0.5
COUNTERFACTUAL_SETTINGS = BallSettings(perceptual_weight=1.0, max_iterations=30)
"""For balls that move towards a class: few images get there with the features kept as above."""


def heat_map(attribution: Tensor, size: tuple[int, int], *, signed: bool = False) -> Tensor:
    """What an attribution says of each pixel, N×H×W.

    A layer attribution (one channel, or another size than the image) keeps its positive part and
    is upsampled bilinearly. An input attribution N×C×H×W is summed over the channels by magnitude,
    or, with ``signed``, keeps the positive part of its channel mean.

    >>> heat_map(torch.tensor([[[[1.0]], [[-2.0]]]]), (1, 1))
    tensor([[[3.]]])
    """
    if attribution.ndim == 3:
        attribution = attribution.unsqueeze(1)
    shape = tuple(attribution.shape)
    check(len(shape) == 4, f"attribution: expected N×H×W or N×C×H×W, got {shape}")
    attribution = attribution.float()
    if attribution.shape[1] == 1 or attribution.shape[2:] != size:
        positive = attribution.mean(dim=1, keepdim=True).clamp(min=0)
        return resized(positive, size, antialias=False)[:, 0]
    if signed:
        return attribution.mean(dim=1).clamp(min=0)
    return attribution.abs().sum(dim=1)


def from_function(
    attribute: Callable[[Tensor, Tensor | None], Tensor], *, signed: bool = False, **facts: Any
) -> Method:
    """A method out of a function of images and classes; ``facts`` are fields of the method."""

    def explain(images: Tensor, target: Tensor | None) -> Explanation:
        size = (images.shape[2], images.shape[3])
        maps = heat_map(attribute(images, target).detach(), size, signed=signed)
        n = len(images)
        check(len(maps) == n, f"expected maps {n}×{size[0]}×{size[1]}, got {tuple(maps.shape)}")
        return Explanation(maps)

    return Method(explain, **facts)


def from_attribution(attribution: Attribution, **arguments: Any) -> Method:
    """A method out of any Captum attribution; ``arguments`` go to its ``attribute``."""

    def attribute(images: Tensor, target: Tensor | None) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Captum's notes on the hooks and gradients it sets
            warnings.filterwarnings("default", message=ONE_POSITION)
            maps: Tensor | tuple[Tensor, ...]
            maps = attributed(attribution, images, target=target, **arguments)
        return maps[0] if isinstance(maps, tuple) else maps

    transforms = attribution.transforms if isinstance(attribution, Defended) else ()
    attack_map = _map_attack(attribution, arguments)
    is_plain = type(attribution) in (RobustCAM, LayerGradCam)
    scored_by = attribution.forward_func if is_plain else None
    facts: dict[str, Any] = {"attack_map": attack_map, "scored_by": scored_by}
    return from_function(attribute, transforms=transforms, **facts)


_MapAttack: TypeAlias = Callable[[float, int], Attack]


def _map_attack(attribution: Attribution, arguments: Mapping[str, Any]) -> _MapAttack | None:
    """How the map of a class activation map, or of a defended one, or a mask is attacked."""
    # A mask is no gradient. Of a class activation map of a rectified network the weights are
    # constant nearly everywhere: its exact gradient is that of the layer's output.
    attack = partial(ExplanationAttack, forward_func=attribution.forward_func, beta=None)
    if isinstance(attribution, RealTimeMasking):
        network, confidence = attribution.network, attribution.confidence
        return partial(attack, lambda x, target: network(x, target, confidence))
    if isinstance(attribution, AdversarialLocalization):
        # The map of pixels: super-pixels have no gradient.
        return partial(attack, lambda x, **_: attribution.network(x))
    is_defended = isinstance(attribution, Defended)
    inner = attribution.attribution if is_defended else attribution
    if not isinstance(inner, (RobustCAM, LayerGradCam)):
        return None
    kept = {k: v for k, v in arguments.items() if k != "upsample"}
    # Captum's own detaches its map and takes the layer's dimension 1 for the channels; with one
    # class this is the same, and has a gradient.
    same = RobustCAM(inner.forward_func, inner.layer, base="gradcam")
    if not is_defended and isinstance(inner, LayerGradCam):
        return partial(attack, same, attribution_arguments=kept | {"k": 1})
    attack = partial(attack, attribution, attribution_arguments=kept)
    if not is_defended:
        return attack
    if isinstance(inner, LayerGradCam):
        surrogate = Defended(same, attribution.transforms, attribution.combine)
        attack = partial(attack, surrogate=surrogate, surrogate_arguments={"k": 1})
    return lambda epsilon, steps: attack(
        epsilon, steps, forward_func=DefendedModel(inner.forward_func, attribution.transforms)
    )


class _Searched(Attribution):  # type: ignore[misc]  # Captum's classes are untyped to mypy
    """A perturbation of an earlier search, as the attribution that ``Guided`` multiplies."""

    def __init__(self, forward_func: Callable[..., Tensor], change: Tensor) -> None:
        super().__init__(forward_func)
        self.change = change

    def attribute(self, *_: Any, **__: Any) -> Tensor:
        return self.change


def from_perturbation(
    attribution: PerceptualBallPerturbation | Guided,
    counterfactual: int | None = None,
    settings_towards: BallSettings | None = None,
) -> Method:
    """A method whose map is how much each pixel changed, and that gives the change itself.

    Args:
        attribution: a perceptual ball, or one that is guided: then the map is of the product, and
            the change that of the ball alone. The ball is searched once for both.
        counterfactual: the class to move towards; None: away from the explained one.
        settings_towards: those of the ball where there is such a class; None: its own.
    """
    ball = attribution.attribution if isinstance(attribution, Guided) else attribution
    if counterfactual is not None and settings_towards is not None:
        ball = PerceptualBallPerturbation(ball.forward_func, ball.layers, settings=settings_towards)

    def explain(images: Tensor, target: Tensor | None) -> Explanation:
        change, details = ball.attribute(
            images, target=target, counterfactual=counterfactual, return_details=True
        )
        pointed = change
        if isinstance(attribution, Guided):
            guided = Guided(
                _Searched(ball.forward_func, change), attribution.guide, power=attribution.power
            )
            pointed = guided.attribute(images, target=target)
        blur = BALL_BLUR * min(images.shape[2:]) / 224
        return Explanation(
            PerceptualBallPerturbation.saliency(pointed, blur),
            Perturbation(change, details.new_class, details.flipped, details.margin),
        )

    def towards(number: int) -> Method:
        return from_perturbation(attribution, number, settings_towards)

    return Method(explain, towards=towards)


def _ball(model: Classifier) -> PerceptualBallPerturbation:
    return PerceptualBallPerturbation(model, model.perceptual_layers, settings=BALL_SETTINGS)


def _named(attribution: PerceptualBallPerturbation | Guided) -> Method:
    return from_perturbation(attribution, settings_towards=COUNTERFACTUAL_SETTINGS)


def _ball_and_cam(model: Classifier) -> Method:
    cam: Attribution = LayerGradCam(model, model.cam_layer)
    height, width = (round(FINE_CAM_SCALE * side) for side in model.input_size)
    # A reshape of tokens is made for one size of image.
    if model.reshape_transform is None and takes_size(model, (height, width)):
        cam = MultiScale(cam, (FINE_CAM_SCALE,))
    return _named(Guided(_ball(model), cam, power=FINE_CAM_POWER))


def voting(model: Classifier, votes: Votes, network: MaskingNetwork | None = None) -> Method:
    """The method whose boxes maps vote for; without a network that which comes for the model."""
    if network is None:
        network = RealTimeMasking.from_pretrained(model.name, model=model).network
    ball = _ball_and_cam(model) if votes.ball is not None else None
    of_ball = None if ball is None else lambda images, target: ball.explain(images, target).maps
    vote = BoxVote(model, network, votes, of_ball)

    def explain(images: Tensor, target: Tensor | None) -> Explanation:
        features, scores = vote.encode(images)
        target = scores.argmax(dim=1) if target is None else target
        maps, boxes = vote(images, target, features)
        return Explanation(maps, boxes=boxes)

    return Method(explain, vote=vote)


def _smallest_perturbation(model: Classifier) -> Method:
    settings = replace(BALL_SETTINGS, perceptual_weight=0.0)
    return from_perturbation(PerceptualBallPerturbation(model, (), settings=settings))


def _occlusion(model: Classifier) -> Method:
    occlusion = captum.attr.Occlusion(model)

    def attribute(images: Tensor, target: Tensor | None) -> Tensor:
        n, channels, *size = images.shape

        def block(length: int) -> tuple[int, ...]:
            return (channels, *(max(1, length * side // 224) for side in size))

        with torch.no_grad():
            return occlusion.attribute(  # type: ignore[no-any-return]
                images,
                sliding_window_shapes=block(OCCLUSION_WINDOW),
                strides=block(OCCLUSION_STRIDE),
                baselines=images.mean(dim=(2, 3), keepdim=True).expand_as(images),
                target=target,
                perturbations_per_eval=max(1, 64 // n),
            )

    return from_function(attribute, signed=True)


def _made(model: Classifier, make: Callable[[Classifier], Made]) -> Method:
    attribution, arguments = make(model)
    return from_attribution(attribution, **arguments)


def _localization(_: Classifier) -> Method:
    raise ValueError(
        "there is no trained network for it; train one with captum-robust train localization, and "
        "give it: --network FILE, or AdversarialLocalization.from_file(FILE) under this name"
    )


def _baseline(
    make: Callable[..., Tensor], box: Callable[[tuple[int, int]], Tensor] | None = None
) -> Method:
    def maps(images: Tensor, _: Tensor | None) -> Tensor:
        return make(len(images), (images.shape[2], images.shape[3])).to(images.device)

    return from_function(maps, box=box)


def _random_map(n: int, size: tuple[int, int]) -> Tensor:
    # From the global generator, which the runner seeds for each batch.
    seed = int(torch.randint(2**31, ()).item())
    return metrics.random_map(n, size, torch.Generator().manual_seed(seed))


METHODS: dict[str, Callable[[Classifier], Method]] = {
    "robust_cam": lambda m: from_attribution(RobustCAM(m, m.cam_layer), upsample=True),
    "perceptual_ball": lambda m: _named(_ball(m)),
    "perceptual_ball_guided": lambda m: _named(Guided(_ball(m), "gradient")),
    "perceptual_ball_cam": _ball_and_cam,
    "smallest_perturbation": _smallest_perturbation,
    "defended_robust_cam": lambda m: from_attribution(
        Defended(RobustCAM(m, m.cam_layer), default_transforms()), upsample=True
    ),
    "grad_cam": lambda m: _grad_cam(m),
    "defended_grad_cam": lambda m: _grad_cam(m, defended=True),
    "guided_grad_cam": lambda m: from_attribution(captum.attr.GuidedGradCam(m, m.cam_layer)),
    "integrated_gradients": lambda m: from_attribution(
        captum.attr.IntegratedGradients(m),
        n_steps=INTEGRATED_GRADIENTS_STEPS,
        internal_batch_size=32,
    ),
    "top_classes_ig": lambda m: from_attribution(
        TopClasses(captum.attr.IntegratedGradients(m), 3),
        n_steps=INTEGRATED_GRADIENTS_STEPS // 2,
        internal_batch_size=32,
    ),
    "occlusion": _occlusion,
    "real_time_masking": lambda m: from_attribution(
        RealTimeMasking.from_pretrained(m.name, model=m)
    ),
    **{name: partial(voting, votes=votes) for name, votes in VOTES.items()},
    "adversarial_localization": _localization,
    "iterative_mask": lambda m: from_attribution(IterativeMask(m)),
    "saliency": lambda m: from_attribution(captum.attr.Saliency(m)),
    "smooth_grad": lambda m: from_attribution(
        captum.attr.NoiseTunnel(captum.attr.Saliency(m)),
        nt_type="smoothgrad",
        nt_samples=SMOOTH_GRAD_SAMPLES,
        nt_samples_batch_size=2,
        stdevs=0.15,
    ),
    "guided_backprop": lambda m: from_attribution(captum.attr.GuidedBackprop(m)),
    "deconvolution": lambda m: from_attribution(captum.attr.Deconvolution(m)),
    "lrp": lambda m: from_function(RelevancePropagation(m), signed=True),
    "input_x_gradient": lambda m: from_attribution(captum.attr.InputXGradient(m)),
    **{name: partial(_made, make=make) for name, make in ATTRIBUTIONS.items()},
    "center_box": lambda _: _baseline(metrics.center_box_map, metrics.center_box),
    "whole_image": lambda _: _baseline(metrics.whole_image_map, metrics.whole_image_box),
    "random": lambda _: _baseline(_random_map),
}
"""The methods that commands know: name -> what makes the method of a classifier."""

SLOW = ("iterative_mask", *SLOW_ATTRIBUTIONS)
"""They run only where they are named: hundreds of passes an image."""
FIXED_BOXES = ("center_box", "whole_image")
WITH_NETWORK = ("real_time_masking", *VOTES)
"""They need the masking network that comes for the model."""
BASELINES = (*FIXED_BOXES, "random")
"""Names of what stands beside the methods in tables: boxes and maps that see no image."""
_BALLS = ("perceptual_ball", "perceptual_ball_guided", "perceptual_ball_cam")
WITH_PERCEPTUAL_LAYERS = (*_BALLS, "layer_cam_fused")
DEFENDED = ("defended_robust_cam", "defended_grad_cam")
PERTURBING = (*_BALLS, "smallest_perturbation")


def _grad_cam(model: Classifier, defended: bool = False) -> Method:
    cam: Attribution = LayerGradCam(model, model.cam_layer)
    if defended:  # the graph of a batch of images is large: one transform at a time
        cam = Defended(cam, default_transforms(), transforms_per_eval=1)
    return from_attribution(cam)


def usual_methods(model: Classifier) -> list[str]:
    """The names of ``METHODS`` but slow ones and those that lack a network, or layers for LRP."""
    left_out = [*SLOW, "adversarial_localization"]
    if model.name not in pretrained():
        left_out += WITH_NETWORK
    try:
        RelevancePropagation(model)
    except ValueError:
        left_out.append("lrp")
    return [name for name in METHODS if name not in left_out]


def named_methods(methods: str | Iterable[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """Name -> method, of what :func:`build_methods` takes; names as in :data:`METHODS`.

    Raises:
        ValueError: an unknown name, no method, or one name twice.
        TypeError: it is no mapping, and not all are names.
    """
    known = partial(known_name, "method", choices=METHODS)
    if not isinstance(methods, Mapping):
        is_one = isinstance(methods, str) or not isinstance(methods, Iterable)
        names = [methods] if is_one else list(methods)
        are_names = all(isinstance(name, str) for name in names)
        expected = "names, or a mapping from your names to names, attributions and functions"
        check(are_names, f"methods: expected {expected}, got {methods!r:.80}", TypeError)
        names = [known(name) for name in names]
        check(len(set(names)) == len(names), f"methods: expected each name once, got {names}")
        methods = {name: name for name in names}
    check(methods, "methods: expected at least one")
    return {key: known(m) if isinstance(m, str) else m for key, m in methods.items()}


def build_methods(
    model: Classifier, methods: str | Iterable[str] | Mapping[str, Any]
) -> dict[str, Method]:
    """Name -> method, from names, or from a mapping to names, attributions and functions.

    A value of a mapping is a name of ``METHODS``, any Captum ``Attribution``, or a function
    ``(images N×C×H×W, target N) -> N×H×W or N×C×H×W``.

    Raises:
        ValueError: an unknown name, no method, or one name twice; a network in which a method
            finds no layer.
        TypeError: a value that is none of these.
    """
    return {name: _build(model, name, value) for name, value in named_methods(methods).items()}


_KINDS: dict[type, str] = {
    RobustCAM: "robust_cam",
    LayerGradCam: "grad_cam",
    RealTimeMasking: "real_time_masking",
    captum.attr.GuidedGradCam: "guided_grad_cam",
    captum.attr.IntegratedGradients: "integrated_gradients",
    captum.attr.Saliency: "saliency",
    captum.attr.GuidedBackprop: "guided_backprop",
    captum.attr.Deconvolution: "deconvolution",
    captum.attr.InputXGradient: "input_x_gradient",
}


def kind_of(value: Any) -> str:
    """The name in the catalogue of what a value for ``build_methods`` is; "" where it has none."""
    if isinstance(value, str):
        return value
    if isinstance(value, PerceptualBallPerturbation):
        return "perceptual_ball"
    if isinstance(value, Guided) and kind_of(value.attribution) == "perceptual_ball":
        return "perceptual_ball_guided"
    if isinstance(value, ClassActivationMap):
        return value.kind if len(value.layers) == 1 else ""
    return _KINDS.get(type(value), "")


def _build(model: Classifier, name: str, value: Any) -> Method:
    if isinstance(value, str):
        try:
            return replace(METHODS[value](model), threshold=shipped_threshold(value))
        except ValueError as error:
            raise ValueError(f"method {name!r}: {error}") from None
    if isinstance(value, Attribution):
        ball = value.attribution if isinstance(value, Guided) else value
        perturbs = isinstance(ball, PerceptualBallPerturbation)
        made = from_perturbation(value) if perturbs else from_attribution(value)
        return replace(made, threshold=shipped_threshold(kind_of(value)))
    of_method = f"method {name!r}"
    check_type(of_method, value, Callable, "a name, a Captum Attribution or a function")

    def attribute(images: Tensor, target: Tensor | None) -> Tensor:
        result = value(images, target)
        check_type(of_method, result, Tensor, "a tensor")
        return result  # type: ignore[no-any-return]

    return from_function(attribute)
