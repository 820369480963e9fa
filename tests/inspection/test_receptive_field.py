"""Receptive fields against hand-worked ones, and against the support of a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

from captum_robust.inspection import receptive_field


class Branches(nn.Module):
    """A 3×3 and a dilated 5×5 convolution beside each other, then a step of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, 2, 3, padding=1)
        self.wide = nn.Conv2d(3, 2, 5, padding=4, dilation=2)
        self.joined = nn.Identity()
        self.step = nn.Conv2d(4, 2, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.joined(torch.cat([self.small(x), self.wide(x)], dim=1)).relu())


def test_a_chain_is_as_worked_by_hand() -> None:
    # 7 by step 2; + 2·2 by the pooling, step 4; + 2·2·4 by the dilated one, which begins at
    # -3 - 1·2 - 2·4 = -13.
    net = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, 1, 2, 2)
    )
    field = receptive_field(net, "3", 64)
    assert (field.size, field.stride, field.start) == ((27, 27), (4, 4), (-13, -13))
    assert field.whole == (False, False)
    assert str(field) == "3: 27×27 pixels, every 4×4"


def test_no_padding_and_other_numbers_for_rows_and_columns() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, (3, 5), stride=(1, 2)), nn.Conv2d(2, 2, (1, 3)))
    field = receptive_field(net, "1", (12, 31))
    assert (field.size, field.stride, field.start) == ((3, 9), (1, 2), (0, 0))
    assert field.grid == (10, 12)


def test_the_widest_branch_counts() -> None:
    # 9 by the dilated branch, + 2 by the step; it begins at -4 - 1.
    field = receptive_field(Branches(), "step", 32)
    assert (field.size, field.stride, field.start) == ((11, 11), (2, 2), (-5, -5))


def test_zero_weights_and_dead_units_count_all_the_same() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 5, padding=2), nn.ReLU())
    nn.init.zeros_(net[0].weight)
    nn.init.constant_(net[0].bias, -1.0)
    assert receptive_field(net, net[1], 16).size == (5, 5)


def test_a_field_larger_than_half_of_the_image() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 21, padding=10))
    field = receptive_field(net, "0", 16)
    assert (field.size, field.start) == ((21, 21), (-10, -10))


def test_the_whole_image_is_said() -> None:
    squeezed = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(1, 4))
    field = receptive_field(squeezed, "1", 16)
    assert field.is_whole
    assert (field.size, field.stride, field.start) == ((16, 16), (0, 0), (0, 0))
    assert str(field) == "1: the whole image"
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))
    assert receptive_field(pooled, "1", 16).is_whole


def test_fields_of_several_sizes_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Upsample(scale_factor=3))
    with pytest.raises(ValueError, match="no receptive fields of one size and step"):
        receptive_field(net, "1", 32)


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    receptive_field(net, "2", 16)
    assert net.training
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


def test_a_layer_without_maps_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 8))
    with pytest.raises(ValueError, match="layer: expected maps N×C×h×w, got 1×8 from Linear '2'"):
        receptive_field(net, "2", 8)
    with pytest.raises(ValueError, match="layer: expected one of 0, 1, 2, got '3'"):
        receptive_field(net, "3", 8)


def averaging(net: nn.Module) -> nn.Module:
    """The network with weights that are positive and means instead of maxima: no gradient is 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.abs_().div_(module.weight[0].numel() ** 0.5)
        for name, part in module.named_children():
            if isinstance(part, nn.MaxPool2d):
                mean = nn.AvgPool2d(part.kernel_size, part.stride, part.padding, part.ceil_mode)
                setattr(module, name, mean)
            elif isinstance(part, (nn.ReLU, nn.ReLU6, nn.Hardswish)):
                setattr(module, name, nn.Softplus())
    return net.double().eval()


def support(net: nn.Module, layer: nn.Module, size: int, at: tuple[int, int]) -> list[int]:
    """(y0, y1, x0, x1) of the pixels for which a position's activation has a gradient."""
    outputs: list[Tensor] = []
    image = torch.rand(1, 3, size, size, dtype=torch.float64).requires_grad_()
    with layer.register_forward_hook(lambda _, __, output: outputs.append(output)):
        net(image)
    outputs[0][0, :, at[0], at[1]].sum().backward()
    assert image.grad is not None
    seen = image.grad[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
    return [int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1]


ARCHITECTURES: list[tuple[str, Callable[..., nn.Module], str, int]] = [
    ("alexnet", tv.alexnet, "features.10", 127),
    ("vgg11", tv.vgg11, "features.7", 48),
    ("resnet18", tv.resnet18, "layer2", 112),
    ("wide_resnet50_2", tv.wide_resnet50_2, "layer1.1", 64),
    ("squeezenet1_1", tv.squeezenet1_1, "features.7", 112),
    ("densenet121", tv.densenet121, "features.denseblock1.denselayer3", 64),
    ("googlenet", lambda **o: tv.googlenet(**o, init_weights=False), "inception3b", 128),
    ("shufflenet_v2_x0_5", tv.shufflenet_v2_x0_5, "stage2.1", 112),
    ("mobilenet_v2", tv.mobilenet_v2, "features.6", 112),
    ("mnasnet0_5", tv.mnasnet0_5, "layers.8", 96),
]


@pytest.mark.parametrize(
    ("make", "layer", "size"), [a[1:] for a in ARCHITECTURES], ids=[a[0] for a in ARCHITECTURES]
)
def test_it_is_the_support_of_the_gradient(
    make: Callable[..., nn.Module], layer: str, size: int
) -> None:
    torch.manual_seed(0)
    net = make(weights=None)
    net.eval()
    field = receptive_field(net, layer, size)
    assert not any(field.whole)
    module = averaging(net).get_submodule(layer)
    at = [count // 2 for count in field.grid]
    expected = []
    for axis in (0, 1):
        first = field.start[axis] + field.stride[axis] * at[axis]
        expected += [max(0, first), min(size, first + field.size[axis])]
    assert support(net, module, size, (at[0], at[1])) == expected
