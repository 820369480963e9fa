from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import (
    Attribution,
    DeepLift,
    FeatureAblation,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    LayerIntegratedGradients,
    NeuronGradient,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.metrics import sensitivity_max
from torch import Tensor, nn

from captum_robust import RobustCAM
from captum_robust.attacks import ExplanationAttack
from captum_robust.attr import Defended, MultiScale, TopClasses
from captum_robust.defenses import (
    JPEG,
    CropAndRescale,
    GaussianBlur,
    GaussianNoise,
    HorizontalFlip,
    Identity,
    Resize,
    Transform,
    crop_ensemble,
    default_transforms,
)


class CountingNet(nn.Module):
    """Counts the images that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 6)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.head(self.pool(self.relu(self.conv(x))).flatten(1))


class Times(Transform):
    bounds = None

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def _apply(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.fixture
def net() -> CountingNet:
    return CountingNet().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def pixels(x: Tensor) -> Tensor:
    return x.flatten(1)


# Of image (1, 2) the gradient times the input is (1, 0) for class 0, whatever the factor, times it.
IMAGE = torch.tensor([[[[1.0, 2.0]]]])


def test_the_mean_worked_by_hand() -> None:
    defended = Defended(InputXGradient(pixels), [Times(1.0), Times(0.5), Times(0.0)])
    torch.testing.assert_close(defended.attribute(IMAGE, 0), torch.tensor([[[[0.5, 0.0]]]]))


def test_the_median_worked_by_hand() -> None:
    defended = Defended(InputXGradient(pixels), [Times(1.0), Times(9.0), Times(2.0)], "median")
    torch.testing.assert_close(defended.attribute(IMAGE, 1), torch.tensor([[[[0.0, 4.0]]]]))


def test_the_normalized_mean_worked_by_hand() -> None:
    attribution = InputXGradient(lambda x: (x**2).sum(dim=(1, 2, 3))[:, None])
    defended = Defended(attribution, [Times(1.0), Times(3.0)], "normalized_mean")
    # 2x² = (2, 8) and (18, 72), both (1, 4) / 4
    torch.testing.assert_close(defended.attribute(IMAGE), torch.tensor([[[[0.25, 1.0]]]]))


def test_the_class_is_the_best_of_the_averaged_scores() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.8]])

    def scores(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    class Swapped(Transform):
        bounds = None

        def _apply(self, x: Tensor) -> Tensor:
            return x.flip(3)

    image = torch.tensor([[[[10.0, 0.0]]]])  # class 0; swapped 1; on average 5, 5 and 8
    defended = Defended(InputXGradient(scores), [Times(1.0), Swapped()])
    torch.testing.assert_close(defended.scores(image), torch.tensor([[5.0, 5.0, 8.0]]))
    expected = torch.tensor([[[[4.0, 4.0]]]])  # (8, 0) and (0, 8)
    torch.testing.assert_close(defended.attribute(image), expected)
    # Each of the images would have another class than 2 first.
    ranked = Defended(TopClasses(InputXGradient(scores), 1), [Times(1.0), Swapped()])
    torch.testing.assert_close(ranked.attribute(image), expected / 2)  # with the weight 1/2


@pytest.mark.parametrize("one_size", [True, False])
def test_all_top_classes_come_from_the_averaged_scores(
    net: CountingNet, x: Tensor, one_size: bool
) -> None:
    transforms = [GaussianBlur(1.0), GaussianNoise(0.4), Resize(scale=2, restore=one_size)]
    options = {"k": 3, "normalize": None, "upsample": True}
    result = Defended(RobustCAM(net, net.relu), transforms).attribute(x, **options)
    top = torch.stack([net(t(x)) for t in transforms]).mean(dim=0).topk(3, dim=1).indices
    one_class = RobustCAM(net, net.relu)
    maps = torch.zeros(2, 1, 16, 24)
    for transform in transforms:
        for weight, c in zip((0.5, 0.25, 0.125), top.T, strict=True):
            m = one_class.attribute(transform(x), c, weights=[1.0], normalize=None, upsample=True)
            maps += weight * transform.align(m, (16, 24))[0] / 3
    torch.testing.assert_close(result, maps, rtol=1e-4, atol=1e-5)


def test_robust_cam_needs_one_pass_a_transform(net: CountingNet, x: Tensor) -> None:
    Defended(RobustCAM(net, net.relu), [Times(1.0), Times(0.5), Times(0.2)]).attribute(x)
    assert net.calls == [6]


def test_others_need_one_more_to_find_the_class_and_none_with_a_target(
    net: CountingNet, x: Tensor
) -> None:
    defended = Defended(Saliency(net), [Times(1.0), Times(0.5)])
    defended.attribute(x)
    assert net.calls == [4, 4]
    net.calls.clear()
    defended.attribute(x, 1)
    assert net.calls == [4]


def test_a_batch_holds_at_most_so_many_transforms(net: CountingNet, x: Tensor) -> None:
    transforms = [Times(1.0), Times(0.5), Times(0.2)]
    whole = Defended(RobustCAM(net, net.relu), transforms)
    expected = whole.attribute(x)
    net.calls.clear()
    result = Defended(whole.attribution, transforms, transforms_per_eval=2).attribute(x)
    assert set(net.calls) == {4, 2}
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("target", [None, 1])
def test_images_of_a_chunk_are_made_when_it_is_their_turn(
    net: CountingNet, x: Tensor, target: int | None
) -> None:
    happened: list[str] = []

    class Noted(Times):
        def _apply(self, x: Tensor) -> Tensor:
            happened.append("made")
            return super()._apply(x)

    transforms = [Noted(f) for f in (1.0, 0.9, 0.8, 0.7)]
    whole = Defended(LayerGradCam(net, net.conv), transforms)
    expected = whole.attribute(x, target)
    net.register_forward_hook(lambda *_: happened.append("shown"))
    happened.clear()
    found = Defended(whole.attribution, transforms, transforms_per_eval=2).attribute(x, target)
    torch.testing.assert_close(found, expected)
    passes = 2 if target is None else 1  # one more to find the class
    assert happened == ["made", "made", "shown"] * 2 * passes


def test_chunks_of_several_sizes_are_combined_in_the_order_of_the_transforms(
    net: CountingNet, x: Tensor
) -> None:
    crops = crop_ensemble(3, 0.7, seed=0)
    transforms = [Resize(0.5, restore=False), crops[0], Identity(), crops[1], crops[2]]
    attribution = RobustCAM(net, net.conv)
    whole = Defended(attribution, transforms, transforms_per_eval=5).attribute(x)
    for most in (1, 2, 3):
        found = Defended(attribution, transforms, transforms_per_eval=most).attribute(x)
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: RobustCAM(net, net.relu),
        lambda net: LayerGradCam(net, net.relu),
        lambda net: IntegratedGradients(net),
        lambda net: DeepLift(net),
        lambda net: NoiseTunnel(Saliency(net)),
        lambda net: GuidedGradCam(net, net.relu),
        lambda net: TopClasses(LayerGradCam(net, net.relu), 2),
        lambda net: MultiScale(Saliency(net), (1, 2)),
        lambda net: Defended(Saliency(net), Times(0.5)),
    ],
)
def test_it_is_around_any_attribution_with_all_default_transforms_as_batch(
    net: CountingNet, x: Tensor, make: Any
) -> None:
    attribution = make(net)
    plain = attribution.attribute(x.clone().requires_grad_(), target=1)
    transforms = [*default_transforms(), HorizontalFlip(), *crop_ensemble(2, 0.5)]
    result = Defended(attribution, transforms).attribute(x, 1)
    assert result.shape == plain.shape
    assert torch.isfinite(result).all()
    assert result.abs().amax() > 0


def test_occlusion_with_its_own_arguments(net: CountingNet, x: Tensor) -> None:
    defended = Defended(Occlusion(net), [Identity(), HorizontalFlip()])
    result = defended.attribute(x, 1, sliding_window_shapes=(3, 4, 4), strides=(3, 4, 4))
    mirrored = Occlusion(net).attribute(
        x.flip(3), sliding_window_shapes=(3, 4, 4), strides=(3, 4, 4), target=1
    )
    plain = Occlusion(net).attribute(
        x, sliding_window_shapes=(3, 4, 4), strides=(3, 4, 4), target=1
    )
    torch.testing.assert_close(result, (plain + mirrored.flip(3)) / 2, rtol=1e-4, atol=1e-6)


def test_one_transform_that_changes_nothing_changes_nothing(net: CountingNet, x: Tensor) -> None:
    for attribution in (Saliency(net), RobustCAM(net, net.relu)):
        plain = attribution.attribute(x.clone().requires_grad_(), target=2)
        torch.testing.assert_close(Defended(attribution, Identity()).attribute(x, 2), plain)


def test_a_mirrored_image_has_its_map_back_where_it_was(x: Tensor) -> None:
    brightness = InputXGradient(lambda x: x.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(Defended(brightness, HorizontalFlip()).attribute(x), x)


def test_mirroring_does_not_blur_the_map_of_a_layer(net: CountingNet, x: Tensor) -> None:
    expected = RobustCAM(net, net.relu).attribute(x.flip(3), 1).flip(3)
    result = Defended(RobustCAM(net, net.relu), HorizontalFlip()).attribute(x, 1)
    torch.testing.assert_close(result, expected)


def test_a_pixel_counts_in_the_crops_that_show_it_only() -> None:
    x = torch.ones(1, 1, 8, 8)
    brightness = InputXGradient(lambda x: x.sum(dim=(1, 2, 3)))
    left = CropAndRescale((8, 4), position=(0, 0))
    result = Defended(brightness, [left]).attribute(x)
    # Seen once, where one of it would be a half: 1 in the left half, 0 in the right one.
    torch.testing.assert_close(result[..., :4], torch.ones(1, 1, 8, 4))
    assert not result[..., 5:].any()
    both = Defended(brightness, [left, CropAndRescale((8, 4), position=(0, 1))]).attribute(x)
    torch.testing.assert_close(both, x)
    median = Defended(brightness, [left, Identity()], "median").attribute(x)
    torch.testing.assert_close(median, x)


class Forked(nn.Module):
    """A layer of two outputs, and two inputs that are added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fork = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 5, 5)})
        self.layer = Fork(self.fork["a"], self.fork["b"])
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        maps = self.layer(x if y is None else x + y)
        return self.head(torch.cat([m.square().mean(dim=(2, 3)) for m in maps], dim=1))


class Fork(nn.Module):
    def __init__(self, *ways: nn.Module) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(way(x) for way in self.ways)


@pytest.mark.parametrize("combine", ["mean", "median"])
def test_all_maps_of_a_layer_with_several_outputs_move_back(x: Tensor, combine: str) -> None:
    net = Forked()
    attribution = LayerGradCam(net, net.layer)
    result = Defended(attribution, HorizontalFlip(), combine).attribute(x, 1)
    mirrored = attribution.attribute(x.flip(-1), 1)
    assert isinstance(result, tuple)
    torch.testing.assert_close(result, tuple(m.flip(-1) for m in mirrored))


@pytest.mark.parametrize("combine", ["mean", "normalized_mean", "median"])
def test_the_convergence_delta_of_a_layer_is_none_of_its_maps(x: Tensor, combine: str) -> None:
    net = Forked()
    options: dict[str, Any] = {"n_steps": 3, "return_convergence_delta": True}
    for layer, inputs in ((net.fork["a"], (x, 0.5 * x)), (net.layer, x)):
        attribution = LayerIntegratedGradients(net, layer)
        result, delta = Defended(attribution, [HorizontalFlip()] * 2, combine).attribute(
            inputs, 1, **options
        )
        mirrored = tuple(i.flip(-1) for i in inputs) if isinstance(inputs, tuple) else x.flip(-1)
        maps, expected = attribution.attribute(mirrored, target=1, **options)
        torch.testing.assert_close(delta.double(), expected.double())
        assert isinstance(result, tuple) == isinstance(maps, tuple)
        if combine != "normalized_mean":
            pairs = zip(result, maps, strict=True) if isinstance(maps, tuple) else [(result, maps)]
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs.flip(-1).to(ours))


def test_a_noise_tunnel_around_a_neuron_takes_no_target(net: CountingNet, x: Tensor) -> None:
    tunnel = NoiseTunnel(NeuronGradient(net, net.relu))
    options: dict[str, Any] = {"neuron_selector": (0, 1, 1), "nt_samples": 2, "stdevs": 0.0}
    expected = tunnel.attribute(x, **options)
    torch.testing.assert_close(Defended(tunnel, Identity()).attribute(x, **options), expected)
    with pytest.raises(ValueError, match="takes no target"):
        TopClasses(tunnel)


def test_inputs_of_a_tuple_have_as_many_samples(x: Tensor) -> None:
    defended = Defended(IntegratedGradients(Forked()), [Identity(), Identity()])
    with pytest.raises(ValueError, match="inputs: batches of 2 and 1 samples"):
        defended.attribute((x, x[:1]), 1)


@pytest.mark.parametrize("combine", ["mean", "normalized_mean", "median"])
def test_maps_in_half_precision_are_moved_back(x: Tensor, combine: str) -> None:
    moving = [CropAndRescale(0.5), Resize(scale=0.5, restore=False), HorizontalFlip()]
    half, full = CountingNet().eval().bfloat16(), CountingNet().eval()
    x = x.bfloat16()
    result = Defended(RobustCAM(half, half.relu), moving, combine).attribute(x, 1, k=1)
    expected = Defended(RobustCAM(full, full.relu), moving, combine).attribute(x.float(), 1, k=1)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.05)
    aligned, _ = moving[0].align(x, (20, 30))
    assert aligned.dtype == torch.bfloat16


def test_a_layers_map_keeps_its_resolution_where_the_image_is_resized(
    net: CountingNet, x: Tensor
) -> None:
    for transforms in ([Resize(scale=2, restore=False)], [Resize(scale=0.5, restore=False)]):
        result = Defended(LayerGradCam(net, net.relu), transforms).attribute(x, 1)
        assert result.shape == (2, 1, 8, 12)


def test_targets_arguments_and_baselines_of_each_sample_go_to_all_of_its_images(x: Tensor) -> None:
    def scores(x: Tensor, scale: Tensor) -> Tensor:
        return (x * scale).flatten(1)

    attribution = IntegratedGradients(scores)
    scale = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    baseline = torch.stack([torch.zeros(3, 16, 24), torch.ones(3, 16, 24)])
    result, delta = Defended(attribution, [Times(1.0), Times(0.0)]).attribute(
        x, [5, 7], scale, baselines=baseline, return_convergence_delta=True
    )
    assert delta.shape == (2,)
    flat = result.flatten(1)
    expected = torch.stack([x.flatten(1)[0, 5] / 2, 3 * (x.flatten(1)[1, 7] - 2) / 2])
    torch.testing.assert_close(flat[[0, 1], [5, 7]], expected)


def test_the_same_numbers_each_time_and_the_callers_generator_as_it_was(
    net: CountingNet, x: Tensor
) -> None:
    defended = Defended(RobustCAM(net, net.relu), default_transforms())
    state = torch.get_rng_state()
    first = defended.attribute(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(defended.attribute(x), first)
    torch.testing.assert_close(defended.attribute(x[1:]), first[1:], rtol=1e-4, atol=1e-5)


def test_the_map_can_be_differentiated_through_the_surrogates(net: CountingNet, x: Tensor) -> None:
    defended = Defended(RobustCAM(net, net.relu), [JPEG(40), GaussianBlur(1.0), HorizontalFlip()])
    leaf = x.clone().requires_grad_()
    result = defended.differentiable(leaf, 1, normalize=None)
    torch.testing.assert_close(
        result.detach(), defended.attribute(x, 1, normalize=None), rtol=1e-4, atol=1e-5
    )
    (gradient,) = torch.autograd.grad(result.sum(), leaf)
    assert gradient.abs().sum() > 0


def test_of_a_differentiable_transform_the_gradient_is_that_of_finite_differences(
    net: CountingNet, x: Tensor
) -> None:
    net, x = net.double(), x.double()
    defended = Defended(RobustCAM(net, net.relu), [GaussianBlur(1.0), HorizontalFlip()])
    leaf = x.clone().requires_grad_()
    options: dict[str, Any] = {"normalize": None}
    result = defended.differentiable(leaf, 1, **options)
    (gradient,) = torch.autograd.grad(result.sum(), leaf)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    step = 1e-6
    up = defended.attribute((x + step * direction).clamp(0, 1), 1, **options).sum()
    down = defended.attribute((x - step * direction).clamp(0, 1), 1, **options).sum()
    torch.testing.assert_close(
        (gradient * direction).sum(), (up - down) / (2 * step), rtol=1e-3, atol=1e-6
    )


def test_the_explanation_attack_goes_through_it(net: CountingNet, x: Tensor) -> None:
    defended = Defended(RobustCAM(net, net.relu), [GaussianBlur(1.0), Identity()])
    attack = ExplanationAttack(defended, epsilon=8 / 255, steps=5, beta=None)
    _, details = attack.perturb(x, return_details=True)
    assert (details.objective_after > details.objective_before).all()


def test_what_cannot_be_differentiated_says_so(net: CountingNet, x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"LayerGradCam has no method differentiable.*RobustCAM"):
        Defended(LayerGradCam(net, net.relu), Identity()).differentiable(x)


class Smaller(Transform):
    def _apply(self, x: Tensor) -> Tensor:
        return x[..., ::2, ::2]


class Lost(Smaller):
    moves_pixels = True


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attribution": nn.ReLU()}, TypeError, "attribution: expected an Attribution, got ReLU"),
        ({"attribution": Saliency}, TypeError, "got the class Saliency"),
        ({"combine": "max"}, ValueError, "combine: expected one of .*mean.*got 'max'"),
        ({"transforms": []}, ValueError, "transforms: expected at least one"),
        ({"transforms": ["jpeg"]}, TypeError, "transforms: expected a Transform or a function"),
        ({"transforms": None}, TypeError, "expected a Transform or a function, got NoneType"),
        ({"transforms": [JPEG]}, TypeError, "got the class JPEG"),
        ({"transforms": default_transforms}, TypeError, "default_transforms is not one"),
        ({"transforms": GaussianNoise(0.1, seed=None)}, ValueError, "give it a seed"),
        ({"transforms": lambda x: x[..., ::2]}, ValueError, "does not say how maps get back"),
        ({"transforms": torch.rand_like}, ValueError, "another result each time"),
        ({"transforms": Lost()}, ValueError, r"Lost.*align\(\)"),
        ({"transforms_per_eval": 0}, ValueError, "transforms_per_eval: expected a whole number"),
        ({"transforms_per_eval": True}, ValueError, "transforms_per_eval: .* got True"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_made(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    usual: dict[str, Any] = {"attribution": Saliency(pixels), "transforms": Identity()}
    with pytest.raises(error, match=message):
        Defended(**usual | arguments)


def test_a_layer_without_positions_and_a_transform_that_moves_are_refused_when_made(
    net: CountingNet,
) -> None:
    for attribution in (LayerActivation(net, net.head), LayerGradCam(net, net.head)):
        with pytest.raises(ValueError, match=r"HorizontalFlip.*Linear, has no positions"):
            Defended(attribution, [Identity(), HorizontalFlip()])
        Defended(attribution, Identity())
    with pytest.raises(ValueError, match="the neuron of NeuronGradient stays where it is"):
        Defended(NeuronGradient(net, net.relu), HorizontalFlip())


def test_a_transform_that_lies_about_its_size_is_refused_when_it_runs(
    net: CountingNet, x: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"Smaller.*makes \(2, 3, 8, 12\) of \(2, 3, 16, 24\)"):
        Defended(Saliency(net), Smaller()).attribute(x, 1)


def test_pixels_out_of_range_and_what_is_no_image_are_refused(net: CountingNet, x: Tensor) -> None:
    with pytest.raises(ValueError, match="sample 1 has values from"):
        Defended(Saliency(net), JPEG()).attribute(torch.cat([x[:1], 3 * x[1:]]), 1)
    with pytest.raises(ValueError, match="inputs: expected N×C×H×W"):
        Defended(Saliency(pixels), Identity()).attribute(torch.rand(2, 5), 1)


def test_noise_around_it_is_clamped_to_the_pixels_that_transforms_take(
    net: CountingNet, x: Tensor
) -> None:
    noisy = x + 0.15 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert noisy.min() < 0
    assert noisy.max() > 1
    jpeg = JPEG()
    result = Defended(Saliency(net), [jpeg]).attribute(noisy, 1)
    expected = Saliency(net).attribute(jpeg(noisy.clamp(0, 1)).requires_grad_(), 1)
    torch.testing.assert_close(result, expected)
    with pytest.raises(ValueError, match="outside of the bounds"):
        Defended(Saliency(net), [jpeg], clamp=0).attribute(noisy, 1)
    with pytest.raises(ValueError, match="sample 0 has values from"):
        Defended(Saliency(net), [jpeg]).attribute(255 * x, 1)
    with pytest.raises(ValueError, match="clamp: expected a number from 0"):
        Defended(Saliency(net), [jpeg], clamp=-1)
    defended = Defended(Saliency(net), [jpeg])
    smooth = NoiseTunnel(defended).attribute(x, nt_samples=3, stdevs=0.2, target=1)
    assert torch.isfinite(smooth).all()
    white = torch.ones_like(x)
    assert torch.isfinite(sensitivity_max(defended.attribute, white, target=1)).all()


def test_a_baseline_of_the_inputs_size_does_not_fit_resized_images(
    net: CountingNet, x: Tensor
) -> None:
    defended = Defended(IntegratedGradients(net), Resize(scale=0.5, restore=False))
    with pytest.raises(ValueError, match=r"baselines: it has the size of the inputs"):
        defended.attribute(x, 1, baselines=torch.zeros_like(x))


def test_a_mask_or_baseline_that_would_have_to_move_is_refused(net: CountingNet, x: Tensor) -> None:
    halves = (torch.arange(24) < 6).long().expand(1, 1, 16, 24)
    features, path = FeatureAblation(net), IntegratedGradients(net)
    with pytest.raises(ValueError, match=r"feature_mask: it differs .* HorizontalFlip"):
        Defended(features, [Identity(), HorizontalFlip()]).attribute(x, 1, feature_mask=halves)
    with pytest.raises(ValueError, match=r"baselines: it differs .* CropAndRescale"):
        Defended(path, crop_ensemble(2, 0.5)).attribute(x, 1, baselines=0.5 * x)
    Defended(features, Identity()).attribute(x, 1, feature_mask=halves)
    Defended(path, HorizontalFlip()).attribute(x, 1, baselines=torch.zeros_like(x), n_steps=2)


def test_an_argument_of_the_inputs_size_is_named_before_the_model_runs(x: Tensor) -> None:
    net = Forked()
    defended = Defended(Saliency(net), Resize(scale=0.5, restore=False))
    with pytest.raises(ValueError, match="additional_forward_args: it has the size of the inputs"):
        defended.attribute(x, None, torch.zeros_like(x))


def test_nan_out_of_the_attribution_names_the_sample(x: Tensor) -> None:
    class Broken(Attribution):
        def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
            return torch.cat([inputs[:-1], torch.nan * inputs[-1:]])

    with pytest.raises(ValueError, match="attribution: NaN or infinity in sample 1"):
        Defended(Broken(pixels), [Identity(), Identity()]).attribute(x, 1)


def test_top_classes_worked_by_hand() -> None:
    weight = torch.tensor([[8.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
    attribution = InputXGradient(lambda x: x @ weight.T)
    x = torch.ones(2, 2)
    top = TopClasses(attribution, 2)  # classes 0 and 1: (8, 0)/2 + (0, 4)/4
    torch.testing.assert_close(top.attribute(x), torch.tensor([[4.0, 1.0]] * 2))
    # A target comes first: (1, 1)/2 + (8, 0)/4, and for each sample its own
    torch.testing.assert_close(top.attribute(x, 2), torch.tensor([[2.5, 0.5]] * 2))
    each = top.attribute(x, [2, 1])
    torch.testing.assert_close(each, torch.tensor([[2.5, 0.5], [2.0, 2.0]]))
    own = TopClasses(attribution, weights=[1.0, -1.0]).attribute(x)
    torch.testing.assert_close(own, torch.tensor([[8.0, -4.0]] * 2))


def test_top_classes_of_a_class_activation_map_are_robust_cam(net: CountingNet, x: Tensor) -> None:
    expected = RobustCAM(net, net.relu).attribute(x, normalize=None)
    options = {"relu_attributions": False}
    result = TopClasses(LayerGradCam(net, net.relu)).attribute(x, **options)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)
    assert TopClasses(LayerGradCam(net, net.relu), 3).k == 3


def test_top_classes_take_no_more_than_there_are(net: CountingNet, x: Tensor) -> None:
    net.calls.clear()
    TopClasses(Saliency(net), 50).attribute(x)
    assert len(net.calls) == 1 + 6


def test_convergence_deltas_are_summed_as_the_maps_are(x: Tensor) -> None:
    attribution = IntegratedGradients(lambda x: (x**3).flatten(1)[:, :2], multiply_by_inputs=True)
    options: dict[str, Any] = {"n_steps": 2, "return_convergence_delta": True}
    result, delta = TopClasses(attribution, weights=[0.5, 2.0]).attribute(x, 1, **options)
    one, of_one = attribution.attribute(x, target=1, **options)
    other, of_other = attribution.attribute(x, target=0, **options)
    torch.testing.assert_close(result, 0.5 * one + 2 * other)
    torch.testing.assert_close(delta, 0.5 * of_one + 2 * of_other)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attribution": 3}, TypeError, "attribution: expected an Attribution, got int"),
        ({"k": 0}, ValueError, "k: expected a whole number from 1, or None, got 0"),
        ({"weights": "linear"}, ValueError, "weights: expected 'exponential'"),
        ({"weights": [1.0, 2.0], "k": 3}, ValueError, "weights: expected k=3"),
        ({"weights": ["half"]}, ValueError, "weights: expected at least one finite number"),
        ({"weights": 3}, ValueError, "weights: expected at least one finite number, got 3"),
    ],
)
def test_top_classes_refuse_what_does_not_fit(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TopClasses(**{"attribution": Saliency(pixels)} | arguments)


def test_a_ranking_that_does_not_rank_is_refused(net: CountingNet, x: Tensor) -> None:
    for attribution in (TopClasses(Saliency(net)), RobustCAM(net, net.relu)):
        with pytest.raises(ValueError, match=r"ranking: expected numbers \(2, 6\), got \(2, 1\)"):
            attribution.attribute(x, ranking=lambda scores: scores[:, :1])
        with pytest.raises(TypeError, match="ranking: expected a function, got int"):
            attribution.attribute(x, ranking=5)  # type: ignore[arg-type]


def test_top_classes_refuse_an_attribution_without_classes(net: CountingNet) -> None:
    with pytest.raises(ValueError, match="LayerActivation takes no target"):
        TopClasses(LayerActivation(net, net.relu))
