"""Layers whose channels are last, and tokens: maps equal those of an explicit permutation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from captum.attr import (
    Attribution,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    LayerGradCam,
    NoiseTunnel,
)
from torch import Tensor, nn

from captum_robust import Defended, Guided, MultiScale, RobustCAM, TopClasses
from captum_robust.attacks import ExplanationAttack
from captum_robust.benchmark import compare
from captum_robust.catalog.methods import build_methods
from captum_robust.data import Sample
from captum_robust.models import Classifier, tokens_to_map

Place = Callable[[Tensor], Tensor]


def as_is(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def tokens(before: int, h: int, w: int) -> Place:
    def place(x: Tensor) -> Tensor:
        return x[:, before : before + h * w].permute(0, 2, 1).reshape(len(x), -1, h, w)

    return place


def by_hand(net: nn.Module, layer: nn.Module, x: Tensor, place: Place, target: int = 1) -> Tensor:
    """Grad-CAM (Selvaraju et al., equations 1 and 2) without the ReLU, N×C×h×w by ``place``."""
    outputs: list[Tensor] = []

    def replace(_: nn.Module, __: object, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    with layer.register_forward_hook(replace):
        scores = net(x)
    (gradient,) = torch.autograd.grad(scores[:, target].sum(), outputs[0])
    weights = place(gradient).mean(dim=(2, 3), keepdim=True)
    return (weights * place(outputs[0]).detach()).sum(dim=1, keepdim=True)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def with_head(net: nn.Module) -> nn.Module:
    """The network in evaluation mode; a head that begins at zero has random weights."""
    for m in net.modules():
        if isinstance(m, nn.Linear) and not m.weight.any():
            nn.init.normal_(m.weight, std=0.1)
    return net.eval()


def map_of_one(net: Callable[..., Tensor], layer: nn.Module, x: Tensor) -> Tensor:
    cam = RobustCAM(net, layer, base="gradcam")
    result = cam.attribute(x, 1, weights=[1.0], normalize=None)
    assert isinstance(result, Tensor)
    return result


TORCHVISION = [
    ("swin_t", {}, "features.7", channels_last, "permute"),
    ("swin_v2_t", {}, "norm", channels_last, "permute"),
    (
        "vit_b_16",
        {"image_size": 64},
        "encoder.layers.encoder_layer_11.ln_1",
        tokens(1, 4, 4),
        "encoder.layers.encoder_layer_11.ln_1",
    ),
    ("convnext_tiny", {}, "features.7", as_is, "features"),
    # Inside of a block of ConvNeXt, between its two permutations.
    ("convnext_tiny", {}, "features.7.2.block.2", channels_last, "features"),
]


@pytest.mark.parametrize(("name", "options", "layer", "place", "found"), TORCHVISION)
def test_torchvisions_networks(
    name: str, options: dict[str, int], layer: str, place: Place, found: str
) -> None:
    torch.manual_seed(0)
    net = with_head(tv.get_model(name, weights=None, num_classes=4, **options))
    x = torch.rand(2, 3, 64, 64)
    expected = by_hand(net, net.get_submodule(layer), x, place)
    result = map_of_one(net, net.get_submodule(layer), x)
    assert result.shape == expected.shape
    assert correlation(result, expected) > 0.999
    assert Classifier(net, input_size=64).cam_layer is net.get_submodule(found)


TIMM = [
    ("swin_tiny_patch4_window7_224", "norm", channels_last, "norm"),
    ("deit_tiny_patch16_224", "blocks.11.norm1", tokens(1, 14, 14), "blocks.11.norm1"),
    ("deit_tiny_distilled_patch16_224", "blocks.3", tokens(2, 14, 14), "blocks.11.norm1"),
    ("mixer_s32_224", "norm", tokens(0, 7, 7), "norm"),
    ("convnext_atto", "stages.3", as_is, "norm_pre"),
]


@pytest.mark.parametrize(("name", "layer", "place", "found"), TIMM)
def test_timms_networks(name: str, layer: str, place: Place, found: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = with_head(timm.create_model(name, num_classes=4))
    x = torch.rand(1, 3, 224, 224)
    expected = by_hand(net, net.get_submodule(layer), x, place)
    result = map_of_one(net, net.get_submodule(layer), x)
    assert result.shape == expected.shape
    assert correlation(result, expected) > 0.999
    assert Classifier(net).cam_layer is net.get_submodule(found)


class PatchNet(nn.Module):
    """A transformer of its own: patches by a reshape or a convolution, a class token or none."""

    def __init__(
        self,
        *,
        convolution: bool = True,
        token: str = "before",
        mean: bool = False,
        by_columns: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.mean, self.by_columns = token, mean, by_columns
        self.embed = nn.Conv2d(3, 16, 4, stride=4) if convolution else nn.Linear(48, 16)
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.embed, nn.Conv2d):
            x = self.embed(x)
            x = (x.transpose(2, 3) if self.by_columns else x).flatten(2).transpose(1, 2)
        else:
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 4, 4, w // 4, 4)
            x = x.permute(0, 4, 2, 1, 3, 5) if self.by_columns else x.permute(0, 2, 4, 1, 3, 5)
            x = self.embed(x.reshape(n, h * w // 16, 16 * c))
        x = self.joined(x, self.class_token.expand(len(x), -1, -1))
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = self.norm(x + self.mlp(self.norm2(x)))
        pooled = x[:, -1] if self.token == "behind" else x[:, 0]
        scores: Tensor = self.head(x.mean(dim=1) if self.mean else pooled)
        return scores

    def joined(self, x: Tensor, token: Tensor) -> Tensor:
        half = x.shape[1] // 2
        parts = {
            "none": (x,),
            "before": (token, x),
            "behind": (x, token),
            "middle": (x[:, :half], token, x[:, half:]),
        }
        if self.token in parts:
            return torch.cat(parts[self.token], dim=1)
        n, t, c = x.shape
        rows, columns = x.transpose(0, 1), x.transpose(1, 2)
        written = x.new_zeros(n, t + 1, c)
        written[:, :1], written[:, 1:] = token, x
        order = x.norm(dim=2, keepdim=True).argsort(dim=1)
        others: dict[str, Callable[[], Tensor]] = {
            "hstack": lambda: torch.hstack([token, x]),
            "hstack_behind": lambda: torch.hstack([x, token]),
            "row_stack_behind": lambda: torch.row_stack([rows, token.transpose(0, 1)]).transpose(
                0, 1
            ),
            "cat_2_behind": lambda: torch.cat([columns, token.transpose(1, 2)], 2).mT,
            "written": lambda: written,
            "padded": lambda: nn.functional.pad(x, (0, 0, 0, 1)),
            "sorted": lambda: x.gather(1, order.expand(n, t, c)),
            "shuffled": lambda: x[:, torch.rand(t).argsort()],
            "through_numpy": lambda: torch.from_numpy(x.detach().numpy()) + 0 * token,
        }
        return others[self.token]()


def without_middle(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, half + 1 :]], dim=1)


JOINED = {"hstack": True, "hstack_behind": False, "row_stack_behind": False, "cat_2_behind": False}
JOINED |= {"written": True, "padded": False}


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("convolution", [True, False])
@pytest.mark.parametrize("token", ["none", "before", "behind", "middle", *JOINED])
def test_own_transformers(token: str, convolution: bool, size: tuple[int, int]) -> None:
    net = PatchNet(token=token, mean=token != "before", convolution=convolution).eval()
    x = torch.rand(2, 3, *size)
    place = tokens(token == "before" or JOINED.get(token, False), size[0] // 4, size[1] // 4)

    def placed(t: Tensor) -> Tensor:
        return place(without_middle(t) if token == "middle" else t)

    expected = by_hand(net, net.norm1, x, placed)
    torch.testing.assert_close(map_of_one(net, net.norm1, x), expected)
    found = Classifier(net, input_size=size).cam_layer
    assert found is (net.norm1 if token == "before" else net.norm)


@pytest.mark.parametrize("transposed", ["map", "patches"])
def test_tokens_column_by_column(transposed: str) -> None:
    net = PatchNet(convolution=transposed == "map", by_columns=True, mean=True).eval()
    x = torch.rand(2, 3, 8, 24)

    def place(t: Tensor) -> Tensor:
        return tokens(1, 6, 2)(t).transpose(2, 3)

    expected = by_hand(net, net.norm1, x, place)
    torch.testing.assert_close(map_of_one(net, net.norm1, x), expected)


class SequenceFirst(nn.Module):
    """T×N×C inside, as in CLIP's own code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.class_token.expand(-1, x.shape[1], -1), x])
        scores: Tensor = self.head(self.norm(self.block(x)).mean(dim=0))
        return scores


@pytest.mark.parametrize("n", [1, 3, 17])  # 17 tokens
def test_sequence_first(n: int) -> None:
    net = SequenceFirst().eval()
    x = torch.rand(n, 3, 16, 16)

    def place(t: Tensor) -> Tensor:
        return tokens(1, 4, 4)(t.transpose(0, 1))

    expected = by_hand(net, net.norm, x, place)
    assert Classifier(net, input_size=16).cam_layer is net.norm
    torch.testing.assert_close(map_of_one(net, net.norm, x), expected)
    cam = RobustCAM(net, net.norm, base="gradcam", reshape_transform=place)
    torch.testing.assert_close(cam.attribute(x, 1, weights=[1.0], normalize=None), expected)


@pytest.mark.parametrize("block", [0, 1, 3, 11])
def test_units_of_hiera(block: int) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net: Any = with_head(timm.create_model("hiera_tiny_224", num_classes=4))
    x = torch.rand(1, 3, 224, 224)

    def place(t: Tensor) -> Tensor:  # by the network's own order
        result: Tensor = net.reroll(t, block).permute(0, 3, 1, 2)
        return result

    expected = by_hand(net, net.blocks[block], x, place)
    assert correlation(map_of_one(net, net.blocks[block], x), expected) > 0.999


def test_blocks_of_nest() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net: Any = with_head(timm.create_model("nest_tiny", num_classes=4))
    x = torch.rand(1, 3, 224, 224)
    layer = net.levels[0].transformer_encoder

    def place(t: Tensor) -> Tensor:  # 4×4 blocks of 14×14
        t = t.reshape(len(t), 4, 4, 14, 14, -1).permute(0, 5, 1, 3, 2, 4)
        return t.reshape(*t.shape[:2], 56, 56)

    assert correlation(map_of_one(net, layer, x), by_hand(net, layer, x, place)) > 0.999


@pytest.mark.parametrize("token", ["sorted", "shuffled", "through_numpy"])
def test_tokens_in_an_unknown_order_are_refused(token: str) -> None:
    net = PatchNet(token=token).eval()
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"layer: expected N×C×h×w.*reshape_transform"):
        RobustCAM(net, net.norm1).attribute(x)
    with pytest.raises(ValueError, match="layer: expected"):
        build_methods(Classifier(net), {"a": LayerGradCam(net, net.norm1)})["a"].explain(
            x, torch.tensor([1])
        )
    with pytest.raises(ValueError, match=r"cam_layer: none found.*reshape_transform"):
        _ = Classifier(net, input_size=16).cam_layer

    place = tokens(0, 4, 4)
    torch.manual_seed(0)
    cam = RobustCAM(net, net.norm1, base="gradcam", reshape_transform=place)
    result = cam.attribute(x, 1, weights=[1.0], normalize=None)
    torch.manual_seed(0)
    torch.testing.assert_close(result, by_hand(net, net.norm1, x, place))


def test_a_layer_behind_the_last_attention_is_refused() -> None:
    net = PatchNet().eval()
    with pytest.raises(ValueError, match="class token"):
        RobustCAM(net, net.norm).attribute(torch.rand(1, 3, 16, 16))


class Cube(nn.Module):
    """C = h = w = 8: the lengths say nothing of where the channels are."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.layer, self.head = nn.Identity(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.kind == "conv":
            return self.score(torch.relu(self.layer(x)), (2, 3))
        y = self.norm(x.permute(0, 2, 3, 1))
        if self.kind == "norm_of_channels":  # as ConvNeXt's LayerNorm2d
            y = self.layer(y.permute(0, 3, 1, 2))
            return self.score(torch.relu(y), (2, 3))
        return self.score(torch.relu(self.layer(y + self.linear(y).relu())), (1, 2))

    def score(self, x: Tensor, places: tuple[int, int]) -> Tensor:
        scores: Tensor = self.head(x.mean(dim=places))
        return scores


@pytest.mark.parametrize(
    ("kind", "place"),
    [("conv", as_is), ("norm_of_channels", as_is), ("channels_last", channels_last)],
)
def test_equal_lengths_are_told_apart(kind: str, place: Place) -> None:
    net = Cube(kind).eval()
    x = torch.rand(2, 3, 8, 8)
    expected = by_hand(net, net.layer, x, place)
    torch.testing.assert_close(map_of_one(net, net.layer, x), expected)
    torch.testing.assert_close(map_of_one(net, net.layer, x), expected)
    guided = Guided(InputXGradient(net), LayerGradCam(net, net.layer)).attribute(x, 1)
    x = x.requires_grad_()
    guide = expected.clamp(min=0)
    guide = guide / guide.amax(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(guided, InputXGradient(net).attribute(x, 1).detach() * guide)


@pytest.mark.parametrize("explicit", [False, True])
def test_captums_maps_go_by_the_layout_in_compare_and_in_wrappers(explicit: bool) -> None:
    torch.manual_seed(0)
    net = PatchNet().eval()
    own = {"cam_layer": net.norm1, "reshape_transform": tokens_to_map} if explicit else {}
    model = Classifier(net, input_size=16, **own)
    x = torch.rand(2, 3, 16, 16)
    target = torch.tensor([1, 1])
    expected = by_hand(net, net.norm1, x, tokens(1, 4, 4))
    positive = expected.clamp(min=0)
    large = nn.functional.interpolate(positive, (16, 16), mode="bilinear", align_corners=False)
    cam = LayerGradCam(model, net.norm1)
    methods: dict[str, str | Attribution] = {"a": "grad_cam", "b": cam, "c": TopClasses(cam, 1)}
    for name, method in build_methods(model, methods).items():
        maps = method.explain(x, target).maps.unsqueeze(1)
        # TopClasses scales the map of each class.
        assert correlation(maps[0], large[0]) > 0.999, name
        assert correlation(maps[1], large[1]) > 0.999, name
    torch.testing.assert_close(Defended(cam, as_is).attribute(x, 1), expected)
    assert MultiScale(cam, (1,)).attribute(x, 1).shape == (2, 1, 16, 16)
    blocks = nn.functional.interpolate(positive, (16, 16))
    product = blocks * GuidedBackprop(model).attribute(x.clone().requires_grad_(), 1).detach()
    result = Defended(GuidedGradCam(model, net.norm1), as_is).attribute(x, 1)
    torch.testing.assert_close(result, product)
    with pytest.raises(ValueError, match="take RobustCAM"):
        Guided(InputXGradient(model), NoiseTunnel(cam)).attribute(x, 1)


def test_an_explicit_reshape_wins() -> None:
    net = PatchNet().eval()
    x = torch.rand(2, 3, 16, 16)

    def turned(t: Tensor) -> Tensor:
        return tokens_to_map(t).transpose(2, 3)

    cam = RobustCAM(net, net.norm1, base="gradcam", reshape_transform=turned)
    result = cam.attribute(x, 1, weights=[1.0], normalize=None)
    torch.testing.assert_close(result, by_hand(net, net.norm1, x, turned))


def test_compare_scores_token_networks() -> None:
    model = Classifier(PatchNet().eval(), input_size=16)
    boxes = torch.tensor([[2.0, 2, 12, 12]])
    data = [Sample(torch.rand(3, 16, 16), i, boxes, str(i)) for i in range(2)]
    results = compare(model, data, ["robust_cam", "grad_cam", "guided_grad_cam"], progress=False)
    assert {row.failed for row in results.table().itertuples()} == {0}


def test_a_map_of_one_position_is_warned_of_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.rand(1, 3, 8, 8)
    cam = RobustCAM(net, net[1])
    with pytest.warns(UserWarning, match="layer: its output has one position"):
        cam.attribute(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cam.attribute(x)
        RobustCAM(net, net[0]).attribute(x)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    model = Classifier(other, input_size=8)
    method = build_methods(model, {"cam": LayerGradCam(model, other[1])})["cam"]
    with pytest.warns(UserWarning, match="one position"):
        method.explain(x, torch.tensor([1]))


class SeriesNet(nn.Module):
    """A batch-first transformer of series N×T×F or numbers N×T."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = embed, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.block(self.embed(x))).mean(dim=1))
        return scores


@pytest.mark.parametrize(
    ("embed", "x"),
    [(nn.Linear(5, 8), torch.rand(2, 9, 5)), (nn.Embedding(20, 8), torch.randint(20, (2, 9)))],
)
def test_the_channels_of_series_may_be_last(embed: nn.Module, x: Tensor) -> None:
    net = SeriesNet(embed).eval()

    def place(t: Tensor) -> Tensor:
        return t.transpose(1, 2).unsqueeze(2)

    expected = by_hand(net, net.norm, x, place).squeeze(2)
    torch.testing.assert_close(map_of_one(net, net.norm, x), expected)


def test_series_with_the_channels_first_stay_as_captum_takes_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(42, 3)).eval()
    x = torch.rand(2, 5, 9)
    expected = LayerGradCam(net, net[1]).attribute(x, 1)
    torch.testing.assert_close(map_of_one(net, net[1], x), expected)


def test_a_compiled_trunk_runs() -> None:
    net = PatchNet().eval()
    x = torch.rand(1, 3, 16, 16)
    expected = by_hand(net, net.norm1, x, tokens(1, 4, 4))
    net.mlp = torch.compile(net.mlp, backend="eager")  # type: ignore[assignment]
    torch.testing.assert_close(map_of_one(net, net.norm1, x), expected)


@pytest.mark.parametrize("made", [lambda x: (x, None), lambda x: {"maps": x}])
def test_captums_maps_of_what_is_no_tensor_name_robust_cam(made: Callable[[Tensor], Any]) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return made(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.layer, self.head = nn.Conv2d(3, 4, 3), Wrapped(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.layer(self.conv(x))
            maps = parts["maps"] if isinstance(parts, dict) else parts[0]
            scores: Tensor = self.head(maps.mean(dim=(2, 3)))
            return scores

    net, x = Net().eval(), torch.rand(2, 3, 8, 8)
    cam = LayerGradCam(net, net.layer)
    for explain in (
        lambda: ExplanationAttack(cam, 0.03, steps=1).perturb(x, torch.tensor([0, 1])),
        lambda: Defended(cam, as_is).attribute(x, 1),
    ):
        with pytest.raises(TypeError, match=r"layer: expected a tensor .* take RobustCAM"):
            explain()
