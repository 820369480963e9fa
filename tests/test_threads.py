"""Several threads on one model, as it is served: each gets what it gets alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from captum.attr import GuidedBackprop, LayerGradCam, Saliency
from torch import Tensor, nn

from captum_robust._contexts import evaluation, resting
from captum_robust.attacks import PGD, ExplanationAttack, recorded_gradients, smooth_activations
from captum_robust.attr import Defended, MultiScale, RobustCAM, TopClasses
from captum_robust.benchmark.passes import count_passes
from tests.attr.test_contract import CASES, Darker, Mirrored
from tests.networks import PixelNet

THREADS, CALLS = 4, 4
Explain = Callable[[Tensor, Tensor], Any]

MORE: dict[str, Callable[[nn.Module, nn.Module], Explain]] = {
    "cam": lambda f, _: RobustCAM(f, f[0].relu, base="cam").attribute,
    "defended_guided": lambda f, _: Defended(GuidedBackprop(f), [Darker(), Mirrored()]).attribute,
    "multi_scale_grad_cam": lambda f, layer: MultiScale(LayerGradCam(f, layer), (1, 2)).attribute,
    "top_classes_grad_cam": lambda f, layer: TopClasses(LayerGradCam(f, layer), 2).attribute,
    "explanation_attack": lambda f, _: ExplanationAttack(Saliency(f), steps=2).perturb,
    "random_starts": lambda f, _: (
        PGD(f, steps=2, transform=lambda x: x + 0.01 * torch.randn_like(x), samples=2).perturb
    ),
}
KINDS = {case.name: (lambda f, layer, c=case: c.make(f, layer).attribute) for case in CASES} | MORE


@pytest.mark.parametrize("name", KINDS)
def test_each_thread_gets_what_it_gets_alone(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(PixelNet(), nn.Dropout(0.5))  # in evaluation mode by the user
    net.eval()
    layer = net[0].conv2
    x = torch.rand(THREADS, 2, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1])
    made = [KINDS[name](net, layer) for _ in range(THREADS)]
    expected = [call(images, y) for call, images in zip(made, x, strict=True)]
    scores = [net(images).detach() for images in x]

    def calls(i: int) -> list[Any]:
        return [made[i](x[i], y) for _ in range(CALLS)]

    def passes(i: int) -> list[Any]:
        with torch.no_grad():
            return [net(x[i]) for _ in range(20 * CALLS)]

    with ThreadPoolExecutor(2 * THREADS) as pool:
        found = [pool.submit(calls, i) for i in range(THREADS)]
        plain = [pool.submit(passes, i) for i in range(THREADS)]
        for future, values in zip(found, expected, strict=True):
            for each in future.result():
                torch.testing.assert_close(each, values)
        for future, values in zip(plain, scores, strict=True):
            for each in future.result():
                torch.testing.assert_close(each, values)
                assert not each.requires_grad
    assert not net.training
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_modes_are_put_back_by_the_last() -> None:
    net = nn.Linear(2, 2)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with evaluation(net), resting(net.parameters()):
            inside.set()
            leave.wait(30)

    with ThreadPoolExecutor(1) as pool:
        with evaluation(net), resting(net.parameters()):
            future = pool.submit(other)
            inside.wait(30)
        assert not net.training
        assert not net.weight.requires_grad
        leave.set()
        future.result()
    assert net.training
    assert net.weight.requires_grad


def test_a_mode_that_was_set_inside_is_put_back_inside() -> None:
    net = nn.Linear(2, 2)
    with evaluation(net):
        net.train()
        with evaluation(net):
            assert not net.training
        assert net.training


def test_what_is_changed_for_one_thread_is_not_for_another() -> None:
    relu = nn.ReLU()
    zero = torch.zeros(1, requires_grad=True)

    def elsewhere() -> tuple[float, bool]:
        value = relu(zero)
        (gradient,) = torch.autograd.grad(value, zero)
        return float(value), gradient.requires_grad

    with (
        ThreadPoolExecutor(1) as pool,
        smooth_activations(relu, beta=1.0),
        recorded_gradients(),
        count_passes(relu) as passes,
    ):
        assert pool.submit(elsewhere).result() == (0.0, False)
        assert float(relu(zero)) > 0
        assert passes.forward == 1
    assert elsewhere() == (0.0, False)


def test_a_replica_that_runs_in_another_thread_is_named() -> None:
    """As ``nn.DataParallel`` on several GPUs runs them."""

    class Elsewhere(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(copy.copy(self.net), x).result()

    net = Elsewhere(PixelNet().eval())
    with pytest.raises(ValueError, match=r"in this thread.*DataParallel"):
        RobustCAM(net, net.net.conv2).attribute(torch.rand(1, 3, 12, 16), 0)


OF_CAPTUM = {"cam", "multi_scale_grad_cam", "top_classes_grad_cam"}
"""Captum tells the copies by their devices, which are one here; the first has another layer."""


class Parallel(nn.DataParallel):
    """``nn.DataParallel`` over several devices, all of them the CPU: its copies, in its threads."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module, self.device_ids = module, [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(2)
        copies = [_replica(self.module) for _ in parts]
        is_on = torch.is_grad_enabled()

        def run(net: nn.Module, part: Tensor) -> Tensor:
            with torch.set_grad_enabled(is_on):
                return net(part)

        if len(parts) == 1:  # in the thread of the caller
            return run(copies[0], x)
        with ThreadPoolExecutor(2) as pool:
            return torch.cat(list(pool.map(run, copies, parts)))


def _replica(module: nn.Module) -> nn.Module:
    """As ``torch.nn.parallel.replicate`` makes it, with the hooks of the module."""
    copied = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        copied._modules[name] = _replica(child)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(copied, name, parameter.view_as(parameter))
    return copied


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", sorted(KINDS.keys() - OF_CAPTUM))
def test_copies_on_several_devices_give_the_same_or_are_named(name: str, n: int) -> None:
    net = PixelNet().eval()
    x = torch.rand(n, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    target = torch.arange(n) % 2

    def explained(model: nn.Module) -> Any:
        torch.manual_seed(0)
        return KINDS[name](nn.Sequential(model), net.conv2)(x, target)

    refusal, got = "", None
    try:
        got = explained(Parallel(net))
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "nn.DataParallel runs copies" in refusal
        assert "module, model.module" in refusal
    else:
        torch.testing.assert_close(got, explained(net), rtol=1e-4, atol=1e-5)
