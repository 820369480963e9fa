"""The drop-in contract. An attribution class joins by one line in CASES."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from captum.attr import Attribution, InputXGradient, NoiseTunnel, Saliency
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from captum_robust import (
    RISE,
    AdversarialLocalization,
    ClassActivationMap,
    IterativeMask,
    PerceptualBallPerturbation,
    RealTimeMasking,
    RobustCAM,
    ScoreCAM,
)
from captum_robust.attacks import FGSM
from captum_robust.attr import BallSettings, Certified, Defended, Guided, MultiScale, TopClasses
from captum_robust.attr.class_activation_map import KINDS
from captum_robust.defenses import Transform
from captum_robust.nn import CorruptionNetwork, LocalizationNetwork, MaskingNetwork
from tests.devices import ELSEWHERE, another_device, moved
from tests.networks import (
    Called,
    ChannelsLastNet,
    CheckpointedNet,
    Grid,
    InPlaceNet,
    Net,
    PixelNet,
    quantised,
)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[..., Attribution]  # (forward_func, layer) -> attribution
    on_layer: bool  # the result mirrors the layer, one channel; else it mirrors the inputs
    bfloat16_tolerance: float = 0.1
    constant_is_an_error: bool = False  # a model that ignores its input has no answer
    takes_gradients: bool = True  # a part of the model that has none is refused
    is_trained: bool = False  # what it gives of a model that ignores its input was learned
    weighs_classes: bool = False  # against others, so that one score is that of two classes
    changes_inputs: bool = False  # the model sees other images, and more at once
    of_pixels: bool = False  # the result is N×1×H×W, whatever it is made of


class Darker(Transform):
    bounds = None

    def _apply(self, x: Tensor) -> Tensor:
        return x / 2


class Mirrored(Transform):
    bounds = None
    moves_pixels = True

    def _apply(self, x: Tensor) -> Tensor:
        return x.flip(3)

    def align(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, None]:
        return nn.functional.interpolate(maps.flip(3), size, mode="bilinear"), None


class Doubled(Transform):
    bounds = None
    moves_pixels = True

    def _apply(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=2)

    def align(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, None]:
        return nn.functional.interpolate(maps, size, mode="bilinear"), None


def masking_of(f: Callable[..., Tensor], layer: nn.Module) -> RealTimeMasking:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MaskingNetwork(
            f if isinstance(f, nn.Module) else Called(f),
            layers=[layer],
            learned_classes=True,
            input_size=(12, 16),
        )
        weight = network.decoder.two_channels.weight
        weight.data.copy_(torch.randn(weight.shape))  # on the CPU, the same for every device
    return RealTimeMasking(network)


class Halved(nn.Module):
    """A trunk of two scales, for grey images and for coloured ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.coarse(self.fine(x.mean(dim=1, keepdim=True)).relu()).mean(dim=(2, 3))


def localization_of(f: Callable[..., Tensor], layer: nn.Module) -> AdversarialLocalization:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        corruption = CorruptionNetwork(Halved(), input_size=(12, 16), width=4)
        corruption.logits.weight.data.normal_(std=0.3)
        corruption.to(next(layer.parameters(), torch.empty(0)).device)
        classifier = f if isinstance(f, nn.Module) else Called(f)
        network = LocalizationNetwork(corruption, classifier, n_segments=12)
    return AdversarialLocalization(network)


CASES = [
    Case("robust_cam", RobustCAM, on_layer=True),
    Case("robust_cam_gradcam", lambda f, layer: RobustCAM(f, layer, base="gradcam"), on_layer=True),
    Case("guided_saliency", lambda f, layer: Guided(Saliency(f)), on_layer=False),
    Case(
        "guided_by_robust_cam",
        lambda f, layer: Guided(InputXGradient(f), RobustCAM(f, layer)),
        on_layer=False,
    ),
    Case(
        "multi_scale",
        lambda f, layer: MultiScale(Saliency(f), (1, 2)),
        on_layer=False,
        bfloat16_tolerance=0.2,  # its results are enlarged to a peak of 1
    ),
    Case("top_classes", lambda f, layer: TopClasses(Saliency(f), 3), on_layer=False),
    Case(
        "top_classes_of_grad_cam",
        lambda f, layer: TopClasses(RobustCAM(f, layer, base="gradcam")),
        on_layer=True,
    ),
    Case(
        "defended_robust_cam",
        lambda f, layer: Defended(RobustCAM(f, layer), [Darker(), Mirrored()]),
        on_layer=True,
        changes_inputs=True,
    ),
    Case(
        "defended_robust_cam_of_two_sizes",
        lambda f, layer: Defended(RobustCAM(f, layer), [Doubled(), Darker()]),
        on_layer=True,
        changes_inputs=True,
    ),
    Case(
        "defended_top_classes",
        lambda f, layer: Defended(TopClasses(Saliency(f), 2), [Darker(), Mirrored()], "median"),
        on_layer=False,
    ),
    Case(
        "defended_saliency",
        lambda f, layer: Defended(
            Saliency(f), [Darker(), Doubled()], "normalized_mean", transforms_per_eval=1
        ),
        on_layer=False,
        bfloat16_tolerance=0.2,  # as multi_scale
    ),
    # Rounding grows with every iteration, so few; many are compared in test_perceptual_ball.py.
    Case(
        "perceptual_ball",
        lambda f, layer: PerceptualBallPerturbation(
            f, layer, settings=BallSettings(max_iterations=3)
        ),
        on_layer=False,
        constant_is_an_error=True,
        weighs_classes=True,
    ),
    Case(
        "iterative_mask",
        lambda f, layer: IterativeMask(f, steps=5),
        on_layer=False,
        constant_is_an_error=True,
        weighs_classes=True,
    ),
    Case("real_time_masking", masking_of, on_layer=False, is_trained=True, weighs_classes=True),
    Case(
        "adversarial_localization",
        localization_of,
        on_layer=False,
        is_trained=True,
        weighs_classes=True,
    ),
    Case(
        "rise",
        lambda f, layer: RISE(f, n_masks=40, s=3),
        on_layer=False,
        constant_is_an_error=True,
        takes_gradients=False,
    ),
    *[
        Case(
            kind,
            lambda f, layer, kind=kind: ClassActivationMap(f, layer, kind),
            on_layer=True,
            takes_gradients=kind != "eigen_cam",
        )
        for kind in KINDS
    ],
    Case("score_cam", ScoreCAM, on_layer=True, takes_gradients=False, changes_inputs=True),
    Case(
        "certified_robust_cam",
        lambda f, layer: Certified(RobustCAM(f, layer), 0.1, 0.3, 50, 0.99),
        on_layer=True,
        bfloat16_tolerance=0.3,  # a pixel that is hardly certified may abstain
        changes_inputs=True,
        of_pixels=True,
    ),
    Case(
        "certified_saliency",
        lambda f, layer: Certified(Saliency(f), 0.1, 0.3, 50, 0.99, size=(6, 8)),
        on_layer=False,
        bfloat16_tolerance=0.3,  # a pixel that is hardly certified may abstain
        changes_inputs=True,
        of_pixels=True,
    ),
]

cases = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 12, 16, generator=torch.Generator().manual_seed(1))


def check_result(case: Case, result: Tensor, x: Tensor) -> None:
    of_layer = (len(x), 1, x.shape[2] // 2, x.shape[3] // 2)
    expected = of_layer if case.on_layer else tuple(x.shape)
    expected = (len(x), 1, *x.shape[2:]) if case.of_pixels else expected
    assert result.shape == expected
    assert not result.requires_grad
    assert result.grad_fn is None
    assert result.is_contiguous()
    assert torch.isfinite(result).all()


@cases
def test_is_an_attribution_with_captums_keywords(case: Case, net: Net) -> None:
    attribution = case.make(net, net.conv2)
    assert isinstance(attribution, Attribution)
    names = list(inspect.signature(attribution.attribute).parameters)
    assert names[:3] == ["inputs", "target", "additional_forward_args"]
    assert hasattr(type(attribution).attribute, "__wrapped__")  # @log_usage


@cases
def test_result_mirrors_inputs_or_layer(case: Case, net: Net, x: Tensor) -> None:
    check_result(case, case.make(net, net.conv2).attribute(x, 1), x)


@cases
def test_without_a_target_it_explains_the_prediction(case: Case, net: Net, x: Tensor) -> None:
    check_result(case, case.make(net, net.conv2).attribute(x), x)


@cases
def test_every_form_of_target_means_the_same(case: Case, net: Net, x: Tensor) -> None:
    attribution = case.make(net, net.conv2)
    expected = attribution.attribute(x, 2)
    for target in (torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2, 2]), [2, 2, 2], (2,)):
        torch.testing.assert_close(attribution.attribute(x, target), expected)
    each = attribution.attribute(x, torch.tensor([0, 3, 5]))
    for i, t in enumerate((0, 3, 5)):
        torch.testing.assert_close(each[i : i + 1], attribution.attribute(x[i : i + 1], t))


@cases
def test_tuple_targets_index_scores_of_more_dimensions(case: Case, x: Tensor) -> None:
    torch.manual_seed(0)
    grid = Grid(Net(classes=24)).eval()
    attribution = case.make(grid, grid.net.conv2)
    flat = case.make(lambda x: grid(x)[:, :, 1, 2], grid.net.conv2)
    expected = flat.attribute(x, 3)
    torch.testing.assert_close(attribution.attribute(x, (3, 1, 2)), expected)
    torch.testing.assert_close(attribution.attribute(x, [(3, 1, 2)] * 3), expected)


@cases
@pytest.mark.parametrize(
    "target",
    [
        99,
        [1],
        torch.tensor([1, 2]),
        torch.tensor([[1], [1], [1]]),
        "dog",
        [1, 99, 1],
        ("a", "b", "c"),
    ],
    ids=str,
)
def test_a_bad_target_raises_what_captum_raises(
    case: Case, net: Net, x: Tensor, target: Any
) -> None:
    with pytest.raises(Exception) as captums:  # noqa: PT011
        Saliency(net).attribute(x.clone(), target)
    with pytest.raises(captums.type):
        case.make(net, net.conv2).attribute(x, target)


@cases
def test_tuples_and_additional_arguments_go_through(case: Case, net: Net, x: Tensor) -> None:
    attribution = case.make(net, net.conv2)
    both = attribution.attribute((x, x.flip(0)), 1, additional_forward_args=0.5)
    if case.on_layer:
        check_result(case, both, x)
        if case.changes_inputs:
            return
        moved = case.make(lambda a: net(a, x.flip(0), 0.5), net.conv2).attribute(x, 1)
        torch.testing.assert_close(both, moved)
    else:
        assert isinstance(both, tuple)
        assert len(both) == 2
        for part in both:
            check_result(case, part, x)


@cases
def test_batch_equals_one_by_one(case: Case, net: Net, x: Tensor) -> None:
    if case.name == "perceptual_ball":  # its line search takes other turns where sums round
        net, x = net.double(), x.double()
    attribution = case.make(net, net.conv2)
    x = torch.cat([x, 100 * x[:1], torch.zeros_like(x[:1])])  # one large, one black
    batch = attribution.attribute(x, 1)
    single = torch.cat([attribution.attribute(x[i : i + 1], 1) for i in range(len(x))])
    torch.testing.assert_close(batch, single, rtol=1e-4, atol=1e-5)


def world(net: nn.Module, x: Tensor) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state: list[Any] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    state += [torch.get_rng_state().tolist(), x.tolist(), x.requires_grad, x.grad is None]
    for m in net.modules():
        state += [m.training, *[list(getattr(m, h)) for h in hooks], list(m.__dict__)]
    for p in (*net.parameters(), *net.buffers()):
        state += [p.detach().tolist(), p.requires_grad, None if p.grad is None else p.grad.tolist()]
    return state


@cases
@pytest.mark.parametrize("grad_of_input", [False, True])
def test_the_callers_world_is_left_as_it_was(
    case: Case, net: Net, x: Tensor, grad_of_input: bool
) -> None:
    net.conv1.weight.requires_grad_(False)
    net.conv2.weight.grad = torch.ones_like(net.conv2.weight)
    net.conv1.register_forward_hook(lambda *_: None)
    net.pool.train()
    x.requires_grad_(grad_of_input)
    before = world(net, x)
    case.make(net, net.conv2).attribute(x, 1)
    assert world(net, x) == before


@cases
def test_the_callers_world_is_left_as_it_was_when_the_model_raises(
    case: Case, net: Net, x: Tensor
) -> None:
    class Broken(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            raise RuntimeError("broken head")

    net.head = Broken()
    before = world(net, x)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(RuntimeError, match="broken head"):
            case.make(net, net.conv2).attribute(x, 1)
    assert world(net, x) == before


@cases
def test_grad_mode_around_the_call_makes_no_difference(case: Case, net: Net, x: Tensor) -> None:
    attribution = case.make(net, net.conv2)
    expected = attribution.attribute(x, 1)
    with torch.no_grad():
        torch.testing.assert_close(attribution.attribute(x, 1), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        torch.testing.assert_close(attribution.attribute(x, 1).clone(), expected)
    for p in net.parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(attribution.attribute(x, 1), expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.on_layer], ids=lambda c: c.name)
def test_a_trunk_with_its_own_no_grad_is_no_obstacle(case: Case, net: Net, x: Tensor) -> None:
    # Of layers only: an input attribution needs the gradient through the trunk.
    def frozen(x: Tensor) -> Tensor:
        with torch.no_grad():
            # In place: a second pass, with gradients on, must not find it normalised already.
            features = net.relu(net.conv2(net.relu(net.conv1(x.mul_(4).sub_(2)))))
        return net.head(net.pool(features).flatten(1))

    plain = case.make(lambda a: net(4 * a - 2), net.conv2).attribute(x, 1)
    torch.testing.assert_close(case.make(frozen, net.conv2).attribute(x, 1), plain)


@cases
def test_a_reused_in_place_layer_counts_with_its_last_call(case: Case, net: Net, x: Tensor) -> None:
    reused = case.make(net, net.relu).attribute(x, 1)
    own = Net().eval()
    own.load_state_dict(net.state_dict())
    own.relu2 = nn.ReLU()
    own.forward = lambda x: own.head(  # type: ignore[method-assign]
        own.pool(own.relu2(own.conv2(own.relu(own.conv1(x))))).flatten(1)
    )
    torch.testing.assert_close(reused, case.make(own, own.relu2).attribute(x, 1))


@cases
def test_channels_last_gives_the_same(case: Case, net: Net, x: Tensor) -> None:
    expected = case.make(net, net.conv2).attribute(x, 1)
    net.to(memory_format=torch.channels_last)
    result = case.make(net, net.conv2).attribute(x.to(memory_format=torch.channels_last), 1)
    check_result(case, result, x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@cases
def test_a_model_that_normalises_in_place_is_given_copies(case: Case, net: Net, x: Tensor) -> None:
    plain, in_place = PixelNet().eval(), InPlaceNet().eval()
    plain.load_state_dict(net.state_dict())
    in_place.load_state_dict(net.state_dict())
    before = x.clone()

    def function(images: Tensor) -> Tensor:
        return net(images.mul_(4).sub_(2))

    for target in (1, None):
        expected = case.make(plain, plain.conv2).attribute(x, target)
        for model, layer in ((in_place, in_place.conv2), (function, net.conv2)):
            result = case.make(model, layer).attribute(x, target)
            torch.testing.assert_close(result, expected)
            assert torch.equal(x, before)


@cases
def test_a_compiled_model_gives_the_same(case: Case, net: Net, x: Tensor) -> None:
    expected = case.make(net, net.conv2).attribute(x, 1)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():  # compiled without any hook, for each way in which it may be called
        compiled(x)
    compiled(x)
    FGSM(compiled, 0.1, bounds=None).perturb(x)
    torch.testing.assert_close(case.make(compiled, net.conv2).attribute(x, 1), expected)
    of_function = case.make(lambda images: compiled(images), net.conv2).attribute(x, 1)
    torch.testing.assert_close(of_function, expected)
    assert torch.compiler.is_compiling() is False


class OnTwoDevices(PixelNet):
    """As :class:`PixelNet`; its parts are moved to ``places``, where the images follow."""

    places: Sequence[str | torch.device] = ("cpu", "cpu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(self.normalized(x).to(self.places[0])))
        x = self.relu(self.conv2(x)).to(self.places[1])
        return self.head(self.pool(x).flatten(1))


@cases
@pytest.mark.parametrize("trunk_is_elsewhere", [False, True])
def test_a_network_on_two_devices_gives_the_same(
    case: Case, x: Tensor, trunk_is_elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = OnTwoDevices().eval()
    split = copy.deepcopy(net)
    split.places = (ELSEWHERE, "cpu") if trunk_is_elsewhere else ("cpu", ELSEWHERE)
    for part in (split.conv1, split.conv2) if trunk_is_elsewhere else (split.head,):
        moved(part)
    for target in (1, None):
        expected = case.make(net, net.conv2).attribute(x, target)
        with another_device(monkeypatch):
            result = case.make(split, split.conv2).attribute(x, target).to("cpu")
        torch.testing.assert_close(result, expected)


@cases
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_in_a_checkpointed_segment_gives_the_same(
    case: Case, x: Tensor, use_reentrant: bool
) -> None:
    torch.manual_seed(0)
    net = CheckpointedNet().eval()
    expected = case.make(net, net.conv2).attribute(x, 1)
    net.use_reentrant = use_reentrant
    attribution = case.make(net, net.conv2)
    if case.name == "iterative_mask" and use_reentrant:  # torch says what to do
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            attribution.attribute(x, 1)
    else:
        torch.testing.assert_close(attribution.attribute(x, 1), expected)
    assert torch.utils.checkpoint.CheckpointFunction is CheckpointFunction


@cases
def test_a_layer_with_the_channels_last_gives_the_same(case: Case, x: Tensor) -> None:
    torch.manual_seed(0)
    net = ChannelsLastNet().eval()
    expected = case.make(net, net.first).attribute(x, 1)
    if case.name == "real_time_masking":  # its decoder is made of convolutions
        with pytest.raises(ValueError, match="layers"):
            case.make(net, net.norm)
        return
    result = case.make(net, net.norm).attribute(x, 1)
    check_result(case, result, x)
    torch.testing.assert_close(result, expected)


@cases
def test_one_logit_is_explained_itself_or_as_that_of_class_1(case: Case, x: Tensor) -> None:
    torch.manual_seed(0)
    one = Net(classes=1).eval()

    def two(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(one(x)), one(x)], dim=1)

    expected = case.make(two, one.conv2).attribute(x, 1)
    row = case.make(lambda x: one(x)[:, 0], one.conv2)
    if case.weighs_classes:
        torch.testing.assert_close(case.make(one, one.conv2).attribute(x, 1), expected)
        torch.testing.assert_close(row.attribute(x, 1), expected)
        return
    for target in (None, 0):  # as by Captum
        torch.testing.assert_close(case.make(one, one.conv2).attribute(x, target), expected)
    torch.testing.assert_close(row.attribute(x), expected)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_models_of_other_precisions_give_nearly_the_same(
    case: Case, net: Net, x: Tensor, dtype: torch.dtype
) -> None:
    expected = case.make(net, net.conv2).attribute(x, 1)
    other = copy.deepcopy(net).to(dtype)
    result = case.make(other, other.conv2).attribute(x.to(dtype), 1)
    check_result(case, result, x)
    assert result.dtype == dtype
    # A ball's line search takes other turns, as its tests on one precision say.
    if case.name != "perceptual_ball":
        # Half precision moves a pixel's gradient across a ReLU, of which there are few here.
        tolerance = 1e-5 if dtype == torch.float64 else 2 * case.bfloat16_tolerance
        torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)


@cases
def test_bfloat16_autocast_gives_nearly_the_same(case: Case, net: Net, x: Tensor) -> None:
    expected = case.make(net, net.conv2).attribute(x, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = case.make(net, net.conv2).attribute(x, 1)
    check_result(case, result, x)
    assert result.dtype == x.dtype
    tolerance = case.bfloat16_tolerance
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@cases
def test_grey_odd_sized_images_and_a_batch_of_one_work(case: Case) -> None:
    torch.manual_seed(0)
    grey = Net(channels=1).eval()
    x = torch.rand(1, 1, 10, 26)
    check_result(case, case.make(grey, grey.conv2).attribute(x, 1), x)


@cases
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_quantised_head_works_or_is_refused_by_name(
    case: Case, net: Net, x: Tensor, is_frozen: bool
) -> None:
    net.head = quantised(net.head)
    net.requires_grad_(not is_frozen)
    if case.takes_gradients and not case.is_trained:
        # The last are Captum's own words.
        refusal = "no gradient|differentiably|not have been used in the graph"
        with pytest.raises((ValueError, RuntimeError), match=refusal):
            case.make(net, net.conv2).attribute(x, 1)
        return
    result = case.make(net, net.conv2).attribute(x, 1)
    check_result(case, result, x)
    assert not torch.equal(result[0], result[1])


@cases
def test_an_empty_batch_is_a_clear_error(case: Case, net: Net, x: Tensor) -> None:
    with pytest.raises(ValueError, match="batch is empty"):
        case.make(net, net.conv2).attribute(x[:0], 1)


@cases
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_or_infinity_in_the_input_names_the_sample(
    case: Case, net: Net, x: Tensor, bad: float
) -> None:
    x[1, 0, 2, 3] = bad
    with pytest.raises(ValueError, match=r"inputs.*sample 1"):
        case.make(net, net.conv2).attribute(x, 1)


@cases
def test_nan_in_the_scores_names_the_sample(case: Case, net: Net, x: Tensor) -> None:
    def nan_for_last(x: Tensor) -> Tensor:
        scores = net(x)
        return torch.cat([scores[:-1], scores[-1:] * float("nan")])

    with pytest.raises(ValueError, match=r"scores.*sample 2"):
        case.make(nan_for_last, net.conv2).attribute(x, 1)


@cases
def test_a_model_that_ignores_the_input_gives_zeros_or_an_error(
    case: Case, net: Net, x: Tensor
) -> None:
    nn.init.zeros_(net.conv2.weight)
    nn.init.zeros_(net.conv2.bias)
    if case.constant_is_an_error:
        with pytest.raises(ValueError, match="constant"):
            case.make(net, net.conv2).attribute(x, 1)
        return
    result = case.make(net, net.conv2).attribute(x, 1)
    check_result(case, result, x)
    assert case.is_trained or not result.any()


@cases
def test_the_same_call_gives_the_same_result(case: Case, net: Net, x: Tensor) -> None:
    attribution = case.make(net, net.conv2)
    assert torch.equal(attribution.attribute(x, 1), attribution.attribute(x, 1))


@cases
def test_noise_tunnel_runs_around_it(case: Case, net: Net, x: Tensor) -> None:
    tunnel = NoiseTunnel(case.make(net, net.conv2))
    smooth = tunnel.attribute(x, nt_samples=4, nt_samples_batch_size=2, stdevs=0.1, target=1)
    assert smooth.shape == case.make(net, net.conv2).attribute(x, 1).shape


@cases
def test_captums_metrics_run_on_it(case: Case, net: Net, x: Tensor) -> None:
    attribution = case.make(net, net.conv2)

    def on_input(inputs: Tensor | tuple[Tensor, ...], **kwargs: Any) -> Any:
        result = attribution.attribute(inputs, **kwargs)
        if case.on_layer or case.of_pixels:
            # Brought to the input's shape, and to a tuple where the input is one.
            result = result[0] if isinstance(result, tuple) else result
            result = nn.functional.interpolate(result, x.shape[2:])
            result = result.expand(-1, 3, -1, -1).contiguous()
            result = (result,) if isinstance(inputs, tuple) else result
        return result

    def noise(inputs: Tensor) -> tuple[Tensor, Tensor]:
        shift = 0.01 * torch.randn_like(inputs)
        return shift, inputs - shift

    torch.manual_seed(0)
    sensitivity = sensitivity_max(on_input, x, n_perturb_samples=2, target=1)
    infidelities = infidelity(net, noise, x, on_input(x, target=1), target=1)
    assert sensitivity.shape == infidelities.shape == (3,)
    assert torch.isfinite(sensitivity).all()
