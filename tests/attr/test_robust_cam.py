from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from captum.attr import LayerGradCam
from captum.testing.attr.helpers.gen_test_utils import get_target_layer
from captum.testing.attr.helpers.test_config import config
from captum.testing.helpers.basic_models import BasicModelWithReusedModules
from torch import Tensor, nn

from captum_robust import PerceptualBallPerturbation, RobustCAM
from captum_robust.models import load_classifier
from tests.networks import Called


class Cam(nn.Module):
    """Global average pooling and a linear layer behind an identity."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(len(weight[0]), len(weight))
        self.fc.weight.data = torch.tensor(weight)
        self.fc.bias.data = torch.tensor([0.1 * i for i in range(len(weight))])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.layer(x)).flatten(1))


WEIGHT = [[1.0, 0.0], [0.0, 2.0], [1.0, -1.0]]
F1 = [[4.0, 0.0], [0.0, 0.0]]  # channel means 1 and 0.5
F2 = [[0.0, 0.0], [0.0, 2.0]]
# scores: 1 + 0, 1 + .1, .5 + .2 -> order of the classes 1, 0, 2
X = torch.tensor([[F1, F2]])
M = [torch.tensor(F1), 2 * torch.tensor(F2), torch.tensor(F1) - torch.tensor(F2)]


def test_equation_2_worked_by_hand() -> None:
    net = Cam(WEIGHT)
    raw = RobustCAM(net, net.layer, base="cam").attribute(X, k=3, normalize=None)
    # 1/2·M_1 + 1/4·M_0 + 1/8·M_2
    expected = [[0.25 * 4 + 0.125 * 4, 0.0], [0.0, 0.5 * 4 + 0.125 * -2]]
    torch.testing.assert_close(raw, torch.tensor([[expected]]))
    normalised = RobustCAM(net, net.layer).attribute(X, k=3)
    torch.testing.assert_close(normalised, torch.tensor([[expected]]) / 1.75)


def test_a_given_target_comes_first_and_the_other_top_classes_follow() -> None:
    net = Cam(WEIGHT)
    raw = RobustCAM(net, net.layer, base="cam").attribute(X, 2, k=2, normalize=None)
    torch.testing.assert_close(raw[0, 0], M[2] / 2 + M[1] / 4)


def test_k_1_is_the_class_activation_map() -> None:
    net = Cam(WEIGHT)
    for c in range(3):
        cam = RobustCAM(net, net.layer, base="cam").attribute(X, c, weights=[1.0], normalize=None)
        torch.testing.assert_close(cam[0, 0], M[c])


def test_more_classes_than_the_model_has_are_all_of_them() -> None:
    net = Cam(WEIGHT)
    method = RobustCAM(net, net.layer)
    assert torch.equal(method.attribute(X), method.attribute(X, k=3))


def test_the_first_index_of_the_exponent_vanishes_after_normalisation() -> None:
    net = Cam(WEIGHT)
    method = RobustCAM(net, net.layer)
    from_one, from_zero = (
        method.attribute(X, weights=[2.0**-i for i in r]) for r in ((1, 2, 3), (0, 1, 2))
    )
    torch.testing.assert_close(from_one, from_zero)


def test_gradcam_is_the_class_activation_map_divided_by_its_size() -> None:
    torch.manual_seed(0)
    net, x = Cam(torch.randn(7, 5).tolist()), torch.rand(2, 5, 6, 4)
    cam, gradcam = (
        RobustCAM(net, net.layer, base=b).attribute(x, normalize=None) for b in ("cam", "gradcam")
    )
    torch.testing.assert_close(cam / 24, gradcam)


def test_a_map_with_nothing_positive_becomes_zeros() -> None:
    net = Cam([[-1.0, -1.0], [-2.0, -1.0]])
    for normalize in ("max", "minmax_each"):
        result = RobustCAM(net, net.layer).attribute(torch.ones(1, 2, 3, 3), normalize=normalize)
        assert torch.equal(result, torch.zeros(1, 1, 3, 3))


def test_minmax_each_scales_every_class_before_averaging() -> None:
    net = Cam(WEIGHT)
    raw = RobustCAM(net, net.layer).attribute(X, k=3, normalize="minmax_each")
    scaled = [(m - m.min()) / (m.max() - m.min()) for m in M]
    average = scaled[1] / 2 + scaled[0] / 4 + scaled[2] / 8
    expected = (average - average.min()) / (average.max() - average.min())
    torch.testing.assert_close(raw[0, 0], expected)


def test_max_is_one_after_upsampling_and_nothing_is_below_zero() -> None:
    torch.manual_seed(0)
    net, x = Cam(torch.randn(7, 5).tolist()), torch.rand(2, 5, 6, 4)
    trunk = nn.Sequential(nn.AvgPool2d(2), net)
    result = RobustCAM(trunk, net.layer).attribute(x, upsample=True)
    assert result.shape == (2, 1, 6, 4)
    torch.testing.assert_close(result.flatten(1).amax(1), torch.ones(2))
    assert result.min() >= 0


def test_scores_that_are_no_longer_linear_are_not_taken_for_a_class_activation_map() -> None:
    torch.manual_seed(0)
    net, x = Cam(torch.randn(7, 5).tolist()), torch.rand(2, 5, 6, 4)
    changed = nn.Sequential(net, nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="use base='gradcam'"):
        RobustCAM(changed, net.layer, base="cam").attribute(x)
    auto, gradcam = (RobustCAM(changed, net.layer, base=b) for b in ("auto", "gradcam"))
    torch.testing.assert_close(auto.attribute(x, k=7), gradcam.attribute(x, k=7))


class Cosine(nn.Linear):
    """A linear layer by its class only."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input))


@pytest.mark.parametrize("change", ["subclass", "hook"])
def test_a_linear_layer_that_does_more_is_not_taken_for_a_class_activation_map(change: str) -> None:
    torch.manual_seed(0)
    net, x = Cam(torch.randn(7, 5).tolist()), torch.rand(2, 5, 6, 4)
    if change == "hook":
        net.fc.register_forward_hook(lambda m, a, output: output.tanh())
    else:
        weight = net.fc.weight
        net.fc = Cosine(5, 7)
        net.fc.weight = weight
    with pytest.raises(ValueError, match="use base='gradcam'"):
        RobustCAM(net, net.layer, base="cam").attribute(x)
    auto, gradcam = (RobustCAM(net, net.layer, base=b) for b in ("auto", "gradcam"))
    torch.testing.assert_close(auto.attribute(x), gradcam.attribute(x))


LAYER_CONFIGS = [c for c in config if LayerGradCam in c["algorithms"]]


@pytest.mark.parametrize("entry", LAYER_CONFIGS, ids=lambda c: c["name"])
def test_agrees_with_captum_on_its_own_table_of_models(entry: dict[str, Any]) -> None:
    model, arguments = entry["model"], entry["attribute_args"]
    layer = get_target_layer(model, entry["layer"])
    expected = LayerGradCam(model, layer).attribute(**arguments)
    method = RobustCAM(model, layer, base="gradcam")
    result = method.attribute(**arguments, weights=[1.0], normalize=None)
    assert type(result) is type(expected)
    for r, e in zip(
        result if isinstance(result, tuple) else (result,),
        expected if isinstance(expected, tuple) else (expected,),
        strict=True,
    ):
        torch.testing.assert_close(r, e, rtol=1e-5, atol=1e-5)


def test_the_layers_input_is_explained_on_request() -> None:
    net = Cam(WEIGHT)
    trunk = nn.Sequential(nn.Conv2d(2, 2, 1), net)
    x = torch.rand(2, 2, 4, 4)
    expected = LayerGradCam(trunk, net.pool).attribute(x, 1, attribute_to_layer_input=True)
    method = RobustCAM(trunk, net.pool, base="gradcam")
    result = method.attribute(x, 1, None, True, weights=[1], normalize=None)
    torch.testing.assert_close(result, expected)


def test_a_reused_layer_counts_as_in_captum() -> None:
    net = BasicModelWithReusedModules()
    x = torch.rand(4, 3)
    expected = LayerGradCam(net, net.relu).attribute(x, 1)
    result = RobustCAM(net, net.relu).attribute(x, 1, weights=[1.0], normalize=None)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "vgg11", "mobilenet_v3_small", "swin_t"]
)
def test_agrees_with_captum_on_torchvision_models(name: str) -> None:
    torch.manual_seed(0)
    model = load_classifier(name, weights=None)
    x = torch.rand(2, 3, 64, 64)
    classes = model(x).detach().topk(3).indices
    each = [LayerGradCam(model, model.cam_layer).attribute(x, classes[:, i]) for i in range(3)]
    expected = sum(m / 2 ** (i + 1) for i, m in enumerate(each))
    result = RobustCAM(model, model.cam_layer, base="gradcam").attribute(x, k=3, normalize=None)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


class NoBatchingRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        assert float(g.sum()) < math.inf  # a read of the values, which batching can't do
        return 3 * g


def test_a_head_without_batching_rule_gives_the_same() -> None:
    torch.manual_seed(0)
    net, x = Cam(torch.randn(7, 5).tolist()), torch.rand(2, 5, 6, 4)
    plain = RobustCAM(lambda a: 3 * net(a), net.layer).attribute(x)
    special = RobustCAM(lambda a: NoBatchingRule.apply(net(a)), net.layer).attribute(x)
    torch.testing.assert_close(plain, special)


def count_passes(net: nn.Module) -> list[str]:
    log: list[str] = []
    net.register_forward_hook(lambda *_: log.append("forward"))
    return log


@pytest.mark.parametrize("base", ["cam", "gradcam", "auto"])
def test_one_forward_pass_and_no_gradient_before_the_layer(base: str) -> None:
    net = Cam(WEIGHT)
    trunk = nn.Conv2d(2, 2, 3, padding=1)
    recorded: list[bool] = []
    trunk.register_forward_hook(lambda m, a, output: recorded.append(output.requires_grad))
    log = count_passes(net)
    RobustCAM(nn.Sequential(trunk, net), net.layer, base=base).attribute(torch.rand(2, 2, 4, 4))
    assert log == ["forward"]
    assert recorded == [False]


def test_vision_transformers_work_without_further_arguments() -> None:
    torch.manual_seed(0)
    model = load_classifier("vit_b_32", weights=None)
    # A random head is zero in torchvision's vision transformers.
    nn.init.normal_(model.module.heads.head.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an operation without a batching rule would warn
        result = RobustCAM(model, model.cam_layer).attribute(
            torch.rand(2, 3, 224, 224), upsample=True
        )
    assert result.shape == (2, 1, 224, 224)
    assert result.flatten(1).amax(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected a whole number from 1, or None, got 0"),
        ({"k": 2.5}, "k: expected a whole number"),
        ({"k": 3, "weights": [1, 2]}, "weights: expected k=3 of them, got 2"),
        ({"weights": []}, "weights: expected at least one"),
        ({"weights": [math.nan]}, "weights: expected at least one finite"),
        ({"weights": "linear"}, "weights: expected 'exponential'"),
        ({"normalize": "softmax"}, "normalize: expected one of"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    net = Cam(WEIGHT)
    with pytest.raises(ValueError, match=message):
        RobustCAM(net, net.layer).attribute(X, **arguments)


def test_wrong_layers_are_named() -> None:
    net = Cam(WEIGHT)
    with pytest.raises(ValueError, match="layer: it did not run"):
        RobustCAM(net, nn.ReLU()).attribute(X)
    with pytest.raises(TypeError, match=r"layer: expected a torch\.nn\.Module or its .*, got int"):
        RobustCAM(net, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forward_func: expected a tensor of scores, got tuple"):
        RobustCAM(lambda x: (net(x), x), net.layer).attribute(X)
    with pytest.raises(ValueError, match="base: expected one of"):
        RobustCAM(net, net.layer, base="scorecam")
    with pytest.raises(ValueError, match="scores do not depend"):
        RobustCAM(lambda x: net(x).detach(), net.layer).attribute(X)
    head = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="use base='gradcam'"):
        RobustCAM(head, head[0], base="cam").attribute(X)
    with pytest.raises(ValueError, match="upsample"):
        RobustCAM(head, head[1]).attribute(X, upsample=True)


def test_no_memory_is_kept_after_the_call() -> None:
    import gc
    import weakref

    net = Cam(WEIGHT)
    net.layer = nn.Conv2d(2, 2, 1)
    seen: list[Any] = []
    net.layer.register_forward_hook(lambda m, a, o: seen.append(weakref.ref(o)))
    method = RobustCAM(net, net.layer, base="gradcam")
    method.attribute(X)
    gc.collect()
    assert [ref() for ref in seen] == [None]


@pytest.mark.parametrize("base", ["cam", "auto", "gradcam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_over_channels_is_not_taken_in_half_precision(base: str, dtype: torch.dtype) -> None:
    # 512 channels of 200 add up to 102400, where float16 ends at 65504; the scores are finite.
    net = Cam([[1.0] * 512, [0.5] * 512]).to(dtype)
    x = torch.zeros(1, 512, 7, 7, dtype=dtype)
    x[:, :, 2, 3] = 200
    assert torch.isfinite(net(x)).all()
    expected = torch.zeros(1, 1, 7, 7, dtype=dtype)
    expected[0, 0, 2, 3] = 1
    assert torch.equal(RobustCAM(net, net.layer, base=base).attribute(x), expected)


def test_a_map_that_half_precision_cannot_hold_is_refused() -> None:
    net = Cam([[1.0] * 512, [0.5] * 512]).half()
    x = torch.zeros(2, 512, 7, 7, dtype=torch.float16)
    x[1, :, 2, 3] = 200
    cam = RobustCAM(net, net.layer, base="cam")
    with pytest.raises(ValueError, match=r"in torch.float16: NaN or infinity in sample 1"):
        cam.attribute(x, k=1, weights=[1.0], normalize=None)


class Pair(NamedTuple):
    features: Tensor
    rest: Any


class Packed(nn.Module):
    """Gives its input inside of something else."""

    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(x)


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda x: (x, None), lambda o: o[0]),
        (lambda x: Pair(x, None), lambda o: o.features),
        (lambda x: Pair(x, torch.zeros(len(x), dtype=torch.long)), lambda o: o.features),
        (lambda x: {"out": x, "aux": None}, lambda o: o["out"]),
        (lambda x: OrderedDict(out=x, size=2), lambda o: o["out"]),
        (lambda x: [x], lambda o: o[0]),
        (lambda x: {"all": (x, [None])}, lambda o: o["all"][0]),
    ],
)
@pytest.mark.parametrize("base", ["auto", "gradcam", "cam"])
def test_the_tensor_of_a_layer_may_be_in_a_tuple_or_dictionary(
    pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor], base: str
) -> None:
    plain = Cam(WEIGHT)
    packed = Cam(WEIGHT)
    packed.layer = Packed(pack)
    packed.pool = nn.Sequential(Packed(unpack), packed.pool)
    expected = RobustCAM(plain, plain.layer, base=base).attribute(X)
    assert torch.equal(RobustCAM(packed, packed.layer, base=base).attribute(X), expected)
    inside = RobustCAM(packed, packed.pool, base=base)
    assert torch.equal(inside.attribute(X, attribute_to_layer_input=True), expected)
    ball = PerceptualBallPerturbation(packed, packed.layer).attribute(X, 0, max_iterations=2)
    assert torch.equal(
        ball, PerceptualBallPerturbation(plain, plain.layer).attribute(X, 0, max_iterations=2)
    )


def test_what_holds_no_tensor_is_named_and_scores_in_a_dictionary_are_found() -> None:
    net = Cam(WEIGHT)
    empty = nn.Sequential(Packed(lambda x: (x, {"none": None})), Packed(lambda o: o[0]), net)
    odd = nn.Sequential(Packed(lambda _: {"n": 3}), Packed(lambda _: X), net)
    with pytest.raises(TypeError, match=r"layer: expected floating-point tensors, .* got dict"):
        RobustCAM(odd, odd[0]).attribute(X)
    with pytest.raises(TypeError, match=r"got dict; give .* lambda x: model\(x\)\['logits'\]"):
        RobustCAM(lambda x: {"loss": None, "logits": empty(x)}, net.layer).attribute(X)


def test_equation_1_through_a_function() -> None:
    net = Cam(WEIGHT)
    expected = RobustCAM(net, net.layer, base="cam").attribute(X, k=2, normalize=None)
    found = RobustCAM(lambda x: net(x), net.layer, base="cam").attribute(X, k=2, normalize=None)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="base: 'cam' needs"):
        RobustCAM(lambda x: 2 * net(x), net.layer, base="cam").attribute(X)
    assert not torch.nn.modules.module._has_any_global_hook()


class CalledByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.act(input=self.conv(x)))
        return scores


def test_the_input_of_a_layer_that_is_called_by_name_is_the_output_before_it() -> None:
    net, x = CalledByName().eval(), torch.rand(2, 3, 8, 8)
    expected = RobustCAM(net, net.conv).attribute(x)
    result = RobustCAM(net, net.act).attribute(x, attribute_to_layer_input=True)
    torch.testing.assert_close(result, expected)


def test_images_of_bytes_are_for_models_that_take_them() -> None:
    net, x = CalledByName().eval(), torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(TypeError, match="inputs: expected floating point, got"):
        RobustCAM(net, net.conv).attribute(x)
    own = RobustCAM(lambda z: net(z.float() / 255), net.conv).attribute(x)
    assert own.shape == (2, 1, 6, 6)


@pytest.mark.parametrize("scores", [lambda s: s.sum(), lambda s: s[:, :0]])
def test_scores_of_no_class_are_refused(scores: Callable[[Tensor], Tensor]) -> None:
    net = CalledByName().eval()
    net.head.append(Called(scores))
    for model in (net, lambda x: net(x)):
        with pytest.raises(ValueError, match="forward_func: expected scores 2×K for a batch of 2"):
            RobustCAM(model, net.conv).attribute(torch.rand(2, 3, 8, 8))
