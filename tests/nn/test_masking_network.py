"""The masking network: its scales, its untrained mask worked by hand, and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from captum_robust.benchmark.passes import count_passes
from captum_robust.models import load_classifier
from captum_robust.nn import (
    MaskingNetwork,
    load_masking_network,
    save_masking_network,
    upsampled,
)
from captum_robust.nn.mask_decoder import DecoderShape, MaskDecoder
from captum_robust.nn.scales import find_scales


class Tiny(nn.Module):
    """Three stages, each half the size, with in-place ReLUs; the mean is classified."""

    input_size = (32, 32)

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.stage1 = self.stage(channels, 4)
        self.stage2 = self.stage(4, 6)
        self.stage3 = self.stage(6, 8)
        self.head = nn.Linear(8, classes)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage3(self.stage2(self.stage1(x))).mean(dim=(2, 3)))


@pytest.fixture
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained(encoder: nn.Module, **kwargs: Any) -> MaskingNetwork:
    """A network whose weights and statistics are none of the initial ones."""
    torch.manual_seed(3)
    network = MaskingNetwork(encoder, **kwargs)
    with torch.no_grad():
        for p in network.decoder.parameters():
            p.add_(0.2 * torch.randn_like(p))
        network.decoder.two_channels.weight.mul_(0.1)  # masks neither 0 nor 1
        for name, b in network.decoder.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn_like(b))
    return network.eval()


# The scales


def names_of(encoder: nn.Module, layers: tuple[nn.Module, ...]) -> list[str]:
    names = {id(module): name for name, module in encoder.named_modules()}
    return [names[id(layer)] for layer in layers]


def test_the_last_layer_of_each_scale_is_found(tiny: Tiny) -> None:
    assert names_of(tiny, find_scales(tiny, (32, 32))) == ["stage1", "stage2", "stage3"]


class Shared(nn.Module):
    """One ReLU for all; in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace)
        self.last = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.conv1(x))))
        return self.head(self.last(x).mean(dim=(2, 3)))


def test_an_encoder_that_normalises_in_place_is_given_a_copy(x: Tensor) -> None:
    class InPlace(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(4).sub_(2))

    net, plain = InPlace(inplace=False), Shared(inplace=False)
    plain.load_state_dict(net.state_dict())
    network = MaskingNetwork(net, input_size=(32, 32))
    before = x.clone()
    torch.testing.assert_close(network.encode(x)[1], plain(4 * before - 2))
    assert torch.equal(x, before)


def test_a_layer_that_runs_twice_is_none(x: Tensor) -> None:
    net = Shared(inplace=False)
    assert names_of(net, find_scales(net, (32, 32))) == ["conv1", "last"]


def test_a_map_that_is_overwritten_is_none(x: Tensor) -> None:
    net = Shared(inplace=True)
    assert names_of(net, find_scales(net, (32, 32))) == ["last"]
    with pytest.raises(ValueError, match="two or more scales, found 1 in Shared"):
        MaskingNetwork(net, input_size=(32, 32))


def test_a_map_that_does_not_depend_on_the_image_is_none(tiny: Tiny) -> None:
    class Positions(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.grid = nn.Conv2d(2, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            features = self.stage2(self.stage1(x))
            features = features + self.grid(torch.ones(1, 2, *features.shape[2:]))
            return self.head(self.stage3(features).mean(dim=(2, 3)))

    net = Positions()
    assert names_of(net, find_scales(net, (32, 32))) == ["stage1", "stage2", "stage3"]


def test_what_is_inside_of_a_block_that_ends_coarser_is_none() -> None:
    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.expand = nn.Conv2d(inputs, 2 * inputs, 1)  # still at the finer scale
            self.down = nn.Conv2d(2 * inputs, outputs, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.expand(x).relu()).relu()

    net = nn.Sequential(Block(3, 4), Block(4, 6), Block(6, 8), nn.AdaptiveAvgPool2d(1))
    assert names_of(net, find_scales(net, (32, 32))) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "size", [(61, 75), (64, 96), (65, 63)], ids=lambda s: "×".join(map(str, s))
)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_scales_are_found_up_to_rounding(size: tuple[int, int], padding: int) -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 3, 3, stride=2, padding=padding) for _ in range(3)), nn.AdaptiveAvgPool2d(1)
    )
    assert names_of(net, find_scales(net, size)) == ["0", "1", "2"]


def test_a_network_without_maps_is_an_error() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    with pytest.raises(ValueError, match="no layer of Sequential gives an N×C×h×w map"):
        find_scales(net, (8, 8))


@pytest.mark.parametrize(
    ("name", "channels", "finest"),
    [
        ("resnet18", [64, 64, 128, 256, 512], 32),
        ("densenet121", [64, 128, 256, 512, 1024], 32),
        ("mobilenet_v3_small", [16, 16, 24, 48, 576], 32),
        ("convnext_tiny", [96, 192, 384, 768], 16),
        ("googlenet", [64, 192, 480, 832, 1024], 32),
        ("efficientnet_b0", [16, 24, 40, 112, 1280], 32),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_the_scales_of_torchvisions_networks(
    name: str, channels: list[int], finest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in ("trunc_normal_", "kaiming_normal_", "normal_", "kaiming_uniform_"):
        monkeypatch.setattr(nn.init, draw, lambda tensor, *_, **__: tensor)  # seconds of drawing
    model = getattr(torchvision.models, name)(weights=None).eval()
    shapes: list[tuple[int, ...]] = []
    for layer in find_scales(model, (64, 64)):
        layer.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    expected = [(1, c, finest // 2**i, finest // 2**i) for i, c in enumerate(channels)]
    assert shapes == expected


# The untrained mask


def test_an_untrained_network_gives_the_gate_of_the_class_activation_map(
    tiny: Tiny, x: Tensor
) -> None:
    classes = torch.tensor([4, 0, 2])
    masks = MaskingNetwork(tiny).eval()(x, classes)
    with torch.no_grad():
        features = tiny.stage3(tiny.stage2(tiny.stage1(x)))
        cam = torch.stack(
            [
                (tiny.head.weight[c][:, None, None] * f).sum(dim=0) + tiny.head.bias[c]
                for f, c in zip(features, classes, strict=True)
            ]
        )
        odds = 4 * torch.tanh((0.5 * cam - 2) / 4)[:, None]
        half = F.interpolate(odds, (16, 16), mode="bilinear") / 2
        at_finest = half.exp() / (half.exp() + (-half).exp() + 1e-4)
        expected = F.interpolate(at_finest, (32, 32), mode="bilinear")
    torch.testing.assert_close(masks, expected)


def test_the_evidence_of_a_class_has_its_score_as_mean(tiny: Tiny, x: Tensor) -> None:
    network = MaskingNetwork(tiny)
    features, scores = network.encode(x)
    torch.testing.assert_close(scores, tiny(x))
    evidence = network.decoder.evidence(features[-1], torch.tensor([1, 1, 1]))
    torch.testing.assert_close(evidence.mean(dim=(1, 2)), 0.5 * scores[:, 1] - 2)


def test_a_head_that_does_not_take_the_mean_of_the_features_is_not_used(tiny: Tiny) -> None:
    """As in ConvNeXt: the shapes fit, the numbers do not."""

    class Normalised(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            features = self.stage3(self.stage2(self.stage1(x)))
            return self.head(F.layer_norm(features.mean(dim=(2, 3)), (8,)))

    assert MaskingNetwork(tiny).decoder.shape.head
    network = MaskingNetwork(Normalised())
    assert not network.decoder.shape.head
    assert network.decoder.embedding is not None
    assert network.decoder.embedding.weight.shape == (5, 8)


def test_vectors_of_the_classes_are_learned_where_asked_or_of_another_number(tiny: Tiny) -> None:
    for network in (
        MaskingNetwork(tiny, learned_classes=True),
        MaskingNetwork(tiny, num_classes=7),
    ):
        assert network.decoder.embedding is not None
        assert network.decoder.head_weight is None
    assert MaskingNetwork(tiny, num_classes=7).decoder.shape.num_classes == 7


def test_more_confidence_shows_less(tiny: Tiny, x: Tensor) -> None:
    network = MaskingNetwork(tiny).eval()
    classes = torch.tensor([0, 1, 2])
    assert (network(x, classes, confidence=6.0) < network(x, classes)).all()


# Masks of any network


def test_masks_are_between_zero_and_one_and_of_the_images_size(tiny: Tiny) -> None:
    network = trained(tiny)
    for size in ((32, 32), (61, 75), (40, 24)):
        x = torch.rand(2, 3, *size)
        masks = network(100 * x, torch.tensor([0, 1])).detach()
        assert masks.shape == (2, 1, *size)
        assert float(masks.min()) >= 0
        assert float(masks.max()) <= 1
        assert float(masks.std()) > 0


@pytest.mark.parametrize("bias", [(-1e6, -1e6), (1e6, 1e6), (-1e6, 1e6)])
def test_channels_of_any_size_give_a_finite_mask_and_gradient(
    tiny: Tiny, x: Tensor, bias: tuple[float, float]
) -> None:
    network = MaskingNetwork(tiny).eval()
    with torch.no_grad():
        network.decoder.shift.fill_(1000)
        network.decoder.two_channels.bias.copy_(torch.tensor(bias))
    masks = network(x, torch.tensor([0, 1, 2]))
    assert torch.isfinite(masks).all()
    if bias[0] < 0:
        assert masks.max() < 1e-4  # both vanish, or the first does
    masks.sum().backward()
    for p in network.decoder.parameters():
        assert p.grad is None or torch.isfinite(p.grad).all()


def test_one_pass_of_the_encoder_serves_masks_and_scores(tiny: Tiny, x: Tensor) -> None:
    network = trained(tiny)
    with count_passes(tiny) as passes:
        masks, scores = network.masks_and_scores(x, torch.tensor([0, 1, 2]))
    assert (passes.forward, passes.backward) == (3, 0)
    torch.testing.assert_close(scores, tiny(x))
    torch.testing.assert_close(masks, network(x, torch.tensor([0, 1, 2])))


def test_without_classes_the_predicted_ones_are_asked_for(tiny: Tiny, x: Tensor) -> None:
    network = trained(tiny)
    masks, scores = network.masks_and_scores(x)
    torch.testing.assert_close(masks, network(x, scores.argmax(dim=1)))


def test_batch_equals_one_by_one(tiny: Tiny, x: Tensor) -> None:
    network = trained(tiny)
    classes = torch.tensor([3, 0, 1])
    single = [network(x[i : i + 1], classes[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(network(x, classes), torch.cat(single))


def test_another_class_gives_another_mask(tiny: Tiny, x: Tensor) -> None:
    with torch.no_grad():
        tiny.head.weight.mul_(20)
    network = trained(tiny)
    one, other = network(x, torch.tensor([0, 0, 0])), network(x, torch.tensor([1, 1, 1]))
    assert (one - other).abs().mean() > 1e-3


def test_grey_images_go_through() -> None:
    torch.manual_seed(0)
    network = MaskingNetwork(Tiny(channels=1).eval())
    assert network.decoder.shape.head
    masks = network(torch.rand(2, 1, 32, 40), torch.tensor([0, 1]))
    assert masks.shape == (2, 1, 32, 40)


def test_layers_can_be_given(tiny: Tiny, x: Tensor) -> None:
    network = MaskingNetwork(tiny, layers=[tiny.stage1, tiny.stage3])
    assert network.decoder.shape.channels == (4, 8)
    assert network(x, torch.tensor([0, 1, 2])).shape == (3, 1, 32, 32)


def test_the_finest_of_five_scales_is_left_out() -> None:
    stages = [Tiny.stage(a, b) for a, b in ((3, 4), (4, 5), (5, 6), (6, 7), (7, 8))]
    net = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    assert MaskingNetwork(net.eval(), input_size=(64, 64)).decoder.shape.channels == (5, 6, 7, 8)


# The encoder


def state_of(encoder: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state: list[Any] = [torch.get_rng_state().tolist()]
    for m in encoder.modules():
        state += [m.training, *(list(getattr(m, h)) for h in hooks), list(m.__dict__)]
    for t in (*encoder.parameters(), *encoder.buffers()):
        state += [t.detach().tolist(), t.requires_grad, t.grad is None]
    return state


def test_the_encoder_is_left_as_it_was(x: Tensor) -> None:
    encoder = Tiny()
    encoder.stage2.eval()
    encoder.head.weight.requires_grad_(False)
    before = state_of(encoder)
    find_scales(encoder, (32, 32))
    assert state_of(encoder) == before
    network = MaskingNetwork(encoder.eval(), layers=[encoder.stage1, encoder.stage3])
    before = state_of(encoder)
    network(x, torch.tensor([0, 1, 2])).sum().backward()
    assert state_of(encoder) == before


def test_the_encoder_is_left_as_it_was_when_it_raises(x: Tensor) -> None:
    class Broken(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            if x.any():
                super().forward(x)
                raise RuntimeError("broken head")
            return super().forward(x)

    encoder = Broken()
    layers = [encoder.stage1, encoder.stage3]
    before = state_of(encoder)
    with pytest.raises(RuntimeError, match="broken head"):
        MaskingNetwork(encoder, layers=layers)
    assert state_of(encoder) == before


def test_the_encoder_stays_in_evaluation_mode_when_the_decoder_is_trained(
    tiny: Tiny, x: Tensor
) -> None:
    network = MaskingNetwork(tiny).train()
    assert network.decoder.training
    assert not any(m.training for m in tiny.modules())
    statistics = [b.clone() for b in tiny.buffers()]
    network(x, torch.tensor([0, 1, 2])).sum().backward()
    for b, was in zip(tiny.buffers(), statistics, strict=True):
        assert torch.equal(b, was)
    assert all(p.grad is None for p in tiny.parameters())
    assert network.decoder.two_channels.weight.grad is not None


def test_an_encoder_in_training_mode_runs_in_evaluation_mode_and_is_put_back(x: Tensor) -> None:
    encoder = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1)
    ).append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    network = MaskingNetwork(encoder.train())
    state = {name: t.clone() for name, t in encoder.state_dict().items()}
    network.decoder.eval()
    masks = network(x, torch.zeros(len(x), dtype=torch.int64))
    assert encoder.training
    assert encoder[1].training
    assert all(torch.equal(t, state[name]) for name, t in encoder.state_dict().items())
    assert torch.equal(masks, network.eval()(x, torch.zeros(len(x), dtype=torch.int64)))


def test_a_gradient_reaches_the_image_where_it_is_asked_for(tiny: Tiny, x: Tensor) -> None:
    network = trained(tiny)
    x.requires_grad_()
    network(x, torch.tensor([0, 1, 2])).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


# Files


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"learned_classes": True}, {"num_classes": 7}], ids=str)
def test_a_saved_network_is_loaded_as_it_was(
    tiny: Tiny, x: Tensor, tmp_path: Path, kwargs: dict[str, Any], half: bool
) -> None:
    network = trained(tiny, **kwargs)
    path = tmp_path / "masks.safetensors"
    save_masking_network(network, path, half=half, card="Trained on nothing.")
    loaded = load_masking_network(path, tiny)
    assert not loaded.training
    assert loaded.decoder.shape == network.decoder.shape
    classes = torch.tensor([0, 1, 4])
    tolerance = 0.02 if half else 0
    torch.testing.assert_close(
        loaded(x, classes), network(x, classes), rtol=tolerance, atol=tolerance
    )
    assert all(p.dtype == torch.float32 for p in loaded.decoder.parameters())


def test_half_precision_halves_the_file(tiny: Tiny, tmp_path: Path) -> None:
    network = trained(tiny)
    save_masking_network(network, tmp_path / "half.safetensors", half=True)
    save_masking_network(network, tmp_path / "full.safetensors")
    weights = sum(t.numel() for t in network.decoder.state_dict().values() if t.is_floating_point())
    saved = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    assert saved[0] - saved[1] == pytest.approx(2 * weights, rel=0.01)


def test_what_is_too_large_for_half_precision_stays_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    network = MaskingNetwork(tiny)
    network.decoder.filter[1].running_var.fill_(1e6)
    save_masking_network(network, tmp_path / "masks.safetensors", half=True)
    loaded = load_masking_network(tmp_path / "masks.safetensors", tiny)
    assert loaded.decoder.filter[1].running_var.eq(1e6).all()


def test_a_file_is_loaded_at_another_precision_of_the_encoder(tiny: Tiny, tmp_path: Path) -> None:
    save_masking_network(MaskingNetwork(tiny), tmp_path / "masks.safetensors")
    loaded = load_masking_network(tmp_path / "masks.safetensors", tiny.bfloat16())
    masks = loaded(torch.rand(1, 3, 32, 32).bfloat16(), torch.tensor([2]))
    assert masks.shape == (1, 1, 32, 32)


def test_a_network_of_given_layers_is_loaded_with_them(
    tiny: Tiny, x: Tensor, tmp_path: Path
) -> None:
    layers = [tiny.stage1[0], tiny.stage2[0]]
    network = trained(tiny, layers=layers)
    save_masking_network(network, tmp_path / "masks.safetensors")
    loaded = load_masking_network(tmp_path / "masks.safetensors", tiny, layers=layers)
    classes = torch.tensor([0, 1, 2])
    assert torch.equal(loaded(x, classes), network(x, classes))


def test_the_classifiers_weights_are_not_in_the_file(tiny: Tiny, tmp_path: Path) -> None:
    assert not [n for n in MaskingNetwork(tiny).decoder.state_dict() if n.startswith("head")]


def test_the_same_network_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    network = MaskingNetwork(tiny)
    found = set()
    for i in range(12):
        save_masking_network(network, tmp_path / f"{i}.safetensors", card="ä\n")
        found.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(found) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata()["card"] == "ä\n"


def test_a_name_that_is_no_safetensors_name_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a \.safetensors file, got masks\.pt"):
        save_masking_network(MaskingNetwork(tiny), tmp_path / "masks.pt")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="may be a pickle"):
        load_masking_network(tmp_path / "masks.pt", tiny)


def other_encoder(_: Path) -> nn.Module:
    class Other(Tiny):
        pass

    return Other()


def other_classes(_: Path) -> nn.Module:
    return Tiny(classes=9)


def torn(path: Path) -> nn.Module:
    path.write_bytes(path.read_bytes()[:-100])
    return Tiny()


def text(path: Path) -> nn.Module:
    path.write_text("no tensors at all")
    return Tiny()


def no_masking_network(path: Path) -> nn.Module:
    save_file({"a": torch.zeros(2)}, path)
    return Tiny()


def no_json(path: Path) -> nn.Module:
    save_file({"a": torch.zeros(2)}, path, {"captum_robust.masking_network": "{"})
    return Tiny()


def list_for_facts(path: Path) -> nn.Module:
    save_file({"a": torch.zeros(2)}, path, {"captum_robust.masking_network": "[1]"})
    return Tiny()


def facts_changed(**changes: Any) -> Callable[[Path], nn.Module]:
    def change(path: Path) -> nn.Module:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["captum_robust.masking_network"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = json.dumps({**facts, **changes})
        save_file(tensors, path, {"captum_robust.masking_network": text})
        return tiny_again()

    return change


def number_for_facts(path: Path) -> nn.Module:
    save_file({"a": torch.zeros(2)}, path, {"captum_robust.masking_network": "1"})
    return Tiny()


def other_weights(_: Path) -> nn.Module:
    torch.manual_seed(1)
    return Tiny()


def tiny_again() -> nn.Module:
    torch.manual_seed(0)
    return Tiny()


def other_tensors(path: Path) -> nn.Module:
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    save_file({"a": torch.zeros(2)}, path, facts)
    return Tiny()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_encoder, "is for the encoder Tiny, not Other"),
        (other_classes, "with 5 classes.* last layer; this one has no such"),
        (torn, "is not a safetensors file"),
        (text, "is not a safetensors file"),
        (no_masking_network, "holds no masking network"),
        (no_json, "holds no masking network"),
        (list_for_facts, "holds no masking network"),
        (other_tensors, "does not fit the encoder Tiny"),
        (number_for_facts, "holds no masking network"),
        (other_weights, "is for an encoder Tiny of other weights"),
        (facts_changed(encoder="\x1b[31mred"), r"is for the encoder \\x1b\[31mred, not"),
        (facts_changed(widths=[1.5, 2.5]), "holds no masking network"),
        (facts_changed(widths=[-1, 32]), "holds no masking network"),
        (facts_changed(widths=[1]), "holds no masking network"),
        (facts_changed(widths=[10**7, 10**7]), "does not fit the encoder Tiny: blocks"),
        (
            facts_changed(num_classes=10**12, head=False),
            "num_classes: expected a whole number from 1 to .*, got 1000000000000",
        ),
        (
            facts_changed(num_classes=10**7, head=False),
            "does not fit .*: embedding.weight is miss",
        ),
    ],
)
def test_a_file_of_something_else_is_a_clear_error(
    tiny: Tiny, tmp_path: Path, change: Callable[[Path], nn.Module], message: str
) -> None:
    path = tmp_path / "masks.safetensors"
    save_masking_network(MaskingNetwork(tiny), path)
    encoder = change(path)
    with pytest.raises(ValueError, match=message):
        load_masking_network(path, encoder.eval())


def test_a_file_that_is_not_there_is_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: no such file"):
        load_masking_network(tmp_path / "gone.safetensors", tiny)


# Bad input


def test_what_is_no_network_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(TypeError, match=r"encoder: expected a torch\.nn\.Module, got function"):
        MaskingNetwork(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"decoder: is for features of \(4, 9\) channels"):
        MaskingNetwork(tiny, MaskDecoder(DecoderShape((4, 9), 5, False, (16,))))
    with pytest.raises(ValueError, match="widths: expected 1 for 2 scales"):
        MaskDecoder(DecoderShape((4, 9), 5, False, (16, 32)))
    with pytest.raises(ValueError, match="head"):
        MaskDecoder(DecoderShape((4, 9), 5, True, (16,)))

    class NoScores(Tiny):
        def forward(self, x: Tensor) -> Any:
            return {"scores": super().forward(x)}

    with pytest.raises(ValueError, match="expected scores N×K, got dict"):
        MaskingNetwork(NoScores())


@pytest.mark.parametrize("learned", [False, True], ids=["head", "learned"])
@pytest.mark.parametrize("wrong", [5, 99, -1])
def test_a_class_that_the_masks_do_not_have_is_named(
    tiny: Tiny, x: Tensor, learned: bool, wrong: int
) -> None:
    network = MaskingNetwork(tiny, learned_classes=learned).eval()
    message = f"classes: expected numbers from 0 to 4, got {wrong}"
    for call in (network, network.masks_and_scores):
        with pytest.raises(ValueError, match=message):
            call(x, torch.tensor([0, wrong, 4]))


def test_classes_are_integers_one_an_image(tiny: Tiny, x: Tensor) -> None:
    network = MaskingNetwork(tiny).eval()
    with pytest.raises(ValueError, match=r"classes: expected one for each of 3 images, got \(2,\)"):
        network(x, torch.tensor([0, 1]))
    with pytest.raises(
        TypeError, match=r"classes: expected a tensor of integers, got torch\.float"
    ):
        network(x, torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(TypeError, match="classes: expected a tensor of integers, got list"):
        network(x, [0, 1, 2])  # type: ignore[arg-type]


def test_no_images_give_no_masks(tiny: Tiny, x: Tensor) -> None:
    found = MaskingNetwork(tiny).eval()(x[:0], torch.zeros(0, dtype=torch.long))
    assert found.shape == (0, 1, 32, 32)


def test_masks_of_other_classes_than_the_encoders_need_to_be_told_which(
    tiny: Tiny, x: Tensor
) -> None:
    network = MaskingNetwork(tiny, num_classes=2).eval()
    with pytest.raises(ValueError, match="masks are of 2 classes, but the encoder has 5 others"):
        network.masks_and_scores(x)


def test_a_new_decoder_is_where_its_encoder_is(tiny: Tiny) -> None:
    decoder = MaskingNetwork(tiny.to("meta"), learned_classes=True).decoder
    tensors = [*decoder.parameters(), *decoder.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}


def test_a_new_decoder_is_in_full_precision_whatever_its_encoder_is(tiny: Tiny) -> None:
    decoder = MaskingNetwork(tiny.bfloat16()).decoder
    assert decoder.head_weight is not None
    tensors = [*decoder.parameters(), *decoder.buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_encoder_on_a_gpu_gives_masks_there(tiny: Tiny, x: Tensor) -> None:
    found = MaskingNetwork(tiny.cuda()).eval()(x.cuda(), torch.tensor([0, 1, 2], device="cuda"))
    assert found.is_cuda


def test_layers_that_give_no_maps_are_refused(tiny: Tiny) -> None:
    for layers in ([nn.Conv2d(3, 3, 1)], [tiny], []):
        with pytest.raises(ValueError, match=r"layers: expected|two or more scales"):
            MaskingNetwork(tiny, layers=layers)


def test_masks_are_enlarged_bilinearly() -> None:
    masks = torch.tensor([[[[0.0, 1.0]]]])
    assert upsampled(masks, (1, 4)).flatten().tolist() == [0, 0.25, 0.75, 1]


def test_what_is_even_stays_even_when_it_is_enlarged() -> None:
    block = MaskingNetwork(load_classifier("small_resnet", None)).decoder.blocks[0].eval()
    x = torch.ones(1, block.reduce[0].in_channels, 9, 9)
    found = block(x, torch.ones(1, block.skip[0].in_channels, 18, 18))
    inside = found[..., 6:-6, 6:-6]  # away from the zeros around the image
    torch.testing.assert_close(inside, inside[..., :1, :1].expand_as(inside))
