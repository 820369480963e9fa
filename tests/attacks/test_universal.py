from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.robust import MinParamPerturbation
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_robust.attacks import (
    UniversalPerturbation,
    fooling_rate,
    fooling_rates,
    transfer_matrix,
    universal,
)
from tests.networks import Called

EPSILON = 0.125


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    net = nn.Linear(len(weight[0]), len(weight))
    net.weight.data = torch.tensor(weight)
    net.bias.data = torch.tensor(bias or [0.0] * len(weight))
    return net.eval()


# Class 0 wins where the first pixel exceeds the second; the third does not matter.
TWO = linear([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
CLASS_0 = torch.tensor([[0.6, 0.4, 0.5], [0.5, 0.3, 0.5], [0.9, 0.2, 0.1], [0.4, 0.3, 0.9]])


def images(n: int = 40, size: int = 10, seed: int = 1) -> Tensor:
    """Noise, each image in a colour of its own."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(n, 3, 1, 1, generator=generator)
    return (0.7 * colours + 0.3 * torch.rand(n, 3, size, size, generator=generator)).clamp(0, 1)


def network(seed: int = 0) -> nn.Sequential:
    """Random, but for a bias that makes it use all of its classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(24, 5),
        ).eval()
    with torch.no_grad():
        net[-1].bias -= net(images(100, seed=3)).mean(dim=0)
    return net


def batches(n: int = 40, of: int = 10) -> list[Tensor]:
    return list(images(n).split(of))


def shuffled() -> DataLoader[Any]:
    labels = torch.zeros(40, dtype=torch.long)
    return DataLoader(TensorDataset(images(), labels), batch_size=8, shuffle=True)


def fitted(norm: str = "Linf", epsilon: float = EPSILON, **options: Any) -> UniversalPerturbation:
    attack = UniversalPerturbation(network(), epsilon, norm)
    return attack.fit(batches(), **{"passes": 4, "batch_size": 4, **options})


def test_on_a_linear_model_v_is_epsilon_times_the_sign_of_the_weights() -> None:
    # All are of class 0; the scores of class 1 minus class 0 change by -v1 + v2.
    attack = UniversalPerturbation(TWO, EPSILON).fit([CLASS_0], passes=30)
    torch.testing.assert_close(attack.perturbation, torch.tensor([-EPSILON, EPSILON, 0.0]))
    # Margins are .2, .2, .7 and .1: a shift of .25 in sum turns three of the four.
    assert attack.rates[-1] == 0.75
    assert fooling_rate(TWO, attack, [CLASS_0]).rate == 0.75


def test_on_a_linear_model_the_l2_v_points_along_the_weights() -> None:
    net = linear([[4.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    attack = UniversalPerturbation(net, EPSILON, "L2").fit([CLASS_0], passes=30)
    along = torch.tensor([-0.8, 0.6, 0.0])
    torch.testing.assert_close(attack.perturbation, EPSILON * along)


def test_steps_follow_the_accumulated_scaled_gradients() -> None:
    sure, unsure = torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([[0.4, 0.5, 0.5]])
    steep = linear([[9.0, -9.0, 0.0], [0.0, 0.0, 0.0]])
    # The gradients, g, g and -g once each is scaled, add up to g, 1.9 g and 0.71 g: three steps one
    # way. Unscaled, the image that is sure would weigh next to nothing against the other.
    attack = UniversalPerturbation(steep, EPSILON)
    attack.fit([sure, sure, unsure], passes=1, step_size=0.1)
    expected = 0.3 * EPSILON * torch.tensor([-1.0, 1.0, 0.0])
    torch.testing.assert_close(attack.perturbation, expected)


def test_the_loss_of_an_image_ends_at_10() -> None:
    scores = torch.tensor([[0.0, 50.0], [0.0, 9.0]], requires_grad=True)
    loss = universal._clipped_cross_entropy(scores, torch.tensor([0, 0]))
    torch.testing.assert_close(loss, torch.tensor([10.0, 9.0 + math.log1p(math.exp(-9))]))
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.any(dim=1).tolist() == [False, True]


def test_deepfool_on_a_linear_model_takes_the_step_to_the_boundary() -> None:
    # The margin .2 over |w|² = 2, overshot by 2 %: v = 1.02·.1·(-1, 1, 0); then it stops.
    one = torch.tensor([[0.6, 0.4, 0.5]])
    attack = UniversalPerturbation(TWO, 0.5, "L2").fit([one], method="deepfool", passes=5)
    expected = torch.tensor([-0.102, 0.102, 0.0])
    torch.testing.assert_close(attack.perturbation, expected, atol=1e-3, rtol=0)
    assert attack.rates == (0.0, 1.0)


def test_deepfool_projects_what_leaves_the_ball() -> None:
    attack = UniversalPerturbation(TWO, 0.05).fit([CLASS_0], method="deepfool", passes=3)
    torch.testing.assert_close(attack.perturbation, torch.tensor([-0.05, 0.05, 0.0]))


def test_a_target_is_what_most_images_become() -> None:
    net = network()
    clean = net(images()).argmax(dim=1)
    rare = int(torch.bincount(clean, minlength=5).argmin())
    attack = UniversalPerturbation(net, 0.5).fit(batches(), target=rare, passes=10, batch_size=4)
    assert (net(attack.perturb(images())).argmax(dim=1) == rare).float().mean() > 0.9


@pytest.mark.parametrize("method", ["gradient", "deepfool"])
@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 0.02), ("L2", 0.3)])
def test_v_stays_in_the_ball_and_the_result_in_the_bounds(
    method: str, norm: str, epsilon: float
) -> None:
    attack = fitted(norm, epsilon, method=method)
    v = attack.perturbation
    assert v.shape == (3, 10, 10)
    assert 0 < (v.abs().max() if norm == "Linf" else v.norm()) <= epsilon * (1 + 1e-6)
    x = images()
    y = attack.perturb(x)
    torch.testing.assert_close(y, (x + v).clamp(0, 1))


def test_another_epsilon_scales_v() -> None:
    attack, x = fitted(), torch.full((2, 3, 10, 10), 0.5)
    half = attack.perturb(x, epsilon=EPSILON / 2) - x
    torch.testing.assert_close(half, (attack.perturbation / 2).expand_as(x))
    assert torch.equal(attack.perturb(x, epsilon=0), x)
    attack.epsilon = 2 * EPSILON
    torch.testing.assert_close(attack.perturb(x) - x, (2 * attack.perturbation).expand_as(x))


def test_captum_sweeps_epsilon() -> None:
    net = linear([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    attack = UniversalPerturbation(net, 0.5).fit([CLASS_0], passes=30)
    x = torch.tensor([[0.6, 0.4, 0.5]])  # turns where 2ε > .2
    sweep = MinParamPerturbation(
        net,
        attack,
        "epsilon",
        arg_min=0.0,
        arg_max=0.2,
        arg_step=0.02,
        correct_fn=lambda scores, target: bool(scores.argmax(dim=1) == target),
    )
    _, least = sweep.evaluate(x, correct_fn_kwargs={"target": 0})
    assert least == pytest.approx(0.12)


def test_a_mask_keeps_what_is_outside_of_it() -> None:
    attack, x = fitted(), images(2)
    mask = torch.zeros(1, 1, 10, 10)
    mask[..., :5] = 1
    y = attack.perturb(x, mask=mask)
    assert torch.equal(y[..., 5:], x[..., 5:])
    torch.testing.assert_close(y[..., :5], attack.perturb(x)[..., :5])


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", EPSILON), ("L2", 0.3)])
@pytest.mark.parametrize("size", [(5, 7), (23, 16)])
def test_images_of_another_size_get_v_resized_within_its_ball(
    norm: str, epsilon: float, size: tuple[int, int]
) -> None:
    x = torch.full((2, 3, *size), 0.5)
    change = fitted(norm, epsilon).perturb(x) - x
    length = change.abs().amax() if norm == "Linf" else change[0].norm()
    assert 0.1 * epsilon < length <= epsilon + 1e-6


def test_shrinking_averages_v() -> None:
    stripes = EPSILON * torch.tensor([1.0, -1.0]).repeat(6).expand(3, 12, 12)
    assert fooling_rates.sized_as(stripes, torch.Size((3, 4, 4))).abs().max() < 0.5 * EPSILON


def test_details_tell_what_became_of_each_sample() -> None:
    attack = UniversalPerturbation(TWO, EPSILON).fit([CLASS_0], passes=30)
    y, details = attack.perturb(CLASS_0, target=torch.tensor([0, 0, 0, 1]), return_details=True)
    assert details.already.tolist() == [False, False, False, True]
    assert details.fooled.tolist() == [True, True, False, False]
    torch.testing.assert_close(details.linf, torch.full((4,), EPSILON))
    assert not details.forward_passes.any()
    assert not details.backward_passes.any()
    assert torch.equal(y, attack.perturb(CLASS_0))


def test_a_tuple_comes_back_as_a_tuple_and_a_batch_equals_one_by_one() -> None:
    attack, x = fitted(), images(3)
    (y,) = attack.perturb((x,))
    assert torch.equal(y, torch.cat([attack.perturb(one[None]) for one in x]))
    _, details = attack.perturb((x,), return_details=True)
    assert details.label.shape == (3,)


def test_perturbing_takes_no_pass_through_the_model() -> None:
    attack = fitted()

    def never(_: Tensor) -> Tensor:
        raise AssertionError

    attack.forward_func = never
    assert attack.perturb(images(2), target=1).shape == (2, 3, 10, 10)


def test_the_fit_raises_the_fooling_rate_on_other_images() -> None:
    net, other = network(), [images(60, seed=7)]
    attack = fitted(passes=8)
    random = EPSILON * torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(0)).sign()
    assert fooling_rate(net, attack, other).rate > 0.5 > fooling_rate(net, random, other).rate


def test_a_mini_batch_costs_one_forward_and_one_backward_pass() -> None:
    net = network()
    calls = []
    forward = [0, 0]  # with gradients, without

    def count(x: Tensor) -> Tensor:
        forward[0 if x.requires_grad else 1] += len(x)
        calls.append(len(x))
        return net(x)

    UniversalPerturbation(count).fit(batches(), passes=3, batch_size=5)
    assert forward == [3 * 40, 40]  # the clean classes once
    assert max(calls) == 5


def test_clean_classes_are_remembered_by_the_image_though_the_order_changes() -> None:
    net = network()
    clean = [0]

    def count(x: Tensor) -> Tensor:
        clean[0] += 0 if x.requires_grad else len(x)
        return net(x)

    UniversalPerturbation(count).fit(shuffled(), passes=3)
    assert clean == [40]


def test_new_images_among_known_ones_get_their_own_clean_classes() -> None:
    x = images(12)
    fit = universal._Fit(UniversalPerturbation(network()), {}, None, nn.functional.nll_loss)
    expected = network()(x).argmax(dim=1)
    assert len(expected.unique()) > 1
    for rows in (range(0, 12, 3), range(11, -1, -1), range(1, 12, 2)):
        assert torch.equal(fit._labels(x[list(rows)]), expected[list(rows)])


def test_images_of_the_same_pixels_in_another_place_are_others() -> None:
    x = images(1)
    assert len({*universal._keys(x), *universal._keys(x.flip(-1)), *universal._keys(x + 1e-6)}) == 3
    as_channels_last = x.contiguous(memory_format=torch.channels_last)
    assert universal._keys(x) == universal._keys(as_channels_last)


def test_rates_are_those_of_v_as_it_met_the_images() -> None:
    # One batch a pass: pass 2 meets the images with the v of pass 1.
    net = network()
    first = UniversalPerturbation(net, 0.5).fit([images()], passes=1, batch_size=40, step_size=1)
    assert first.rates == (0.0,)
    again = UniversalPerturbation(net, 0.5)
    again.fit([images()], passes=2, batch_size=40, step_size=1)
    assert again.rates[1] == fooling_rate(net, first, [images()]).rate


def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Steps that fool 1, 3 and 2 of 4, with v = .01, .02 and .03; records the step sizes."""
    sizes: list[float] = []

    def step(self: Any, x: Tensor, labels: Tensor, size: float) -> Tensor:
        sizes.append(size)
        self.v = torch.full_like(self.v, len(sizes) / 100)
        return torch.arange(len(x)) < [1, 3, 2][len(sizes) - 1]

    monkeypatch.setattr(universal._Fit, "gradient_step", step)
    return sizes


def test_the_best_pass_is_kept_and_steps_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = scripted(monkeypatch)
    attack = UniversalPerturbation(TWO, EPSILON).fit([CLASS_0], passes=3, step_size=0.2)
    assert attack.rates == (0.25, 0.75, 0.5)
    assert torch.equal(attack.perturbation, torch.full((3,), 0.02))
    assert sizes == pytest.approx([0.2, 0.15, 0.05])  # (1 + cos(π k/3)) / 10


def test_the_best_pass_outlives_an_interruption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class StopsAtThird(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            if len(sizes) == 2:
                raise KeyboardInterrupt
            return super().__iter__()

    sizes = scripted(monkeypatch)
    attack, path = UniversalPerturbation(TWO, EPSILON), tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        attack.fit(StopsAtThird([CLASS_0]), passes=3, checkpoint=path)
    attack.fit([CLASS_0], passes=3, checkpoint=path)
    assert attack.rates == (0.25, 0.75, 0.5)
    assert torch.equal(attack.perturbation, torch.full((3,), 0.02))


def test_each_pass_shuffles_anew() -> None:
    seen: list[Tensor] = []

    class Watched:
        def __iter__(self) -> Iterator[Any]:
            for x, labels in shuffled():
                seen.append(x)
                yield x, labels

    UniversalPerturbation(network()).fit(Watched(), passes=2)
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert not torch.equal(first, second)
    assert torch.equal(first.sum(dim=(1, 2, 3)).sort()[0], second.sum(dim=(1, 2, 3)).sort()[0])


def test_a_target_rate_ends_the_fit() -> None:
    attack = UniversalPerturbation(TWO, 0.5).fit([CLASS_0], passes=30, target_rate=0.5)
    assert len(attack.rates) < 30
    assert attack.rates[-1] >= 0.5 > max(attack.rates[:-1])


def test_what_cannot_be_fooled_ends_after_the_given_passes() -> None:
    constant = linear([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [2.0, 0.0])  # class 0 in all of [0, 1]
    for method in ("gradient", "deepfool"):
        attack = UniversalPerturbation(constant).fit([CLASS_0], method=method, passes=3)
        assert attack.rates == (0.0, 0.0, 0.0)
        # DeepFool that does not get anywhere adds nothing.
        assert attack.perturbation.any() == (method == "gradient")


@pytest.mark.parametrize("method", ["gradient", "deepfool"])
def test_the_same_seed_gives_the_same_v_and_leaves_torchs_generator_alone(method: str) -> None:
    net = network()

    def fit(seed: int) -> Tensor:
        attack = UniversalPerturbation(net, EPSILON)
        return attack.fit(shuffled(), method=method, passes=2, seed=seed).perturbation

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = fit(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, fit(0))
    assert not torch.equal(first, fit(1))


@pytest.mark.parametrize("method", ["gradient", "deepfool"])
def test_the_model_and_the_images_stay_as_they_were(method: str) -> None:
    net, loader = network().train(), batches()
    for module in net.modules():  # updated in training mode, and rightly so
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    modes = [m.training for m in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    copies = [x.clone() for x in loader]
    with torch.no_grad():
        attack = UniversalPerturbation(net).fit(loader, method=method, passes=2)
        assert not torch.is_grad_enabled()
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(loader, copies, strict=True))
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())
    assert not attack.perturbation.requires_grad


def test_it_works_with_frozen_parameters_and_inference_tensors() -> None:
    net = network().requires_grad_(False)
    with torch.inference_mode():
        loader = batches()
    attack = UniversalPerturbation(net, EPSILON).fit(loader, passes=4, batch_size=4)
    assert torch.equal(attack.perturbation, fitted().perturbation)


@pytest.mark.parametrize("method", ["gradient", "deepfool"])
def test_it_is_fitted_in_inference_mode(method: str) -> None:
    expected = fitted(method=method, passes=2).perturbation
    attack = UniversalPerturbation(network(), EPSILON)
    with torch.inference_mode():
        attack.fit(batches(), method=method, passes=2, batch_size=4)
    assert torch.equal(attack.perturbation, expected)


@pytest.mark.parametrize("method", ["gradient", "deepfool"])
def test_images_of_half_precision_stay_so(method: str) -> None:
    seen = set()

    def noted(x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return network()(x.float())

    attack = UniversalPerturbation(noted, EPSILON)
    attack.fit([batch.bfloat16() for batch in batches()], method=method, passes=2)
    assert attack.perturbation.any()
    assert attack.perturb(images(2).bfloat16()).dtype == torch.bfloat16
    assert seen == {torch.bfloat16}


def test_a_model_may_write_to_its_images() -> None:
    model = network()
    x = images(8)
    before = x.clone()

    def writing(images: Tensor) -> Tensor:
        return model(images.mul_(0.5))

    def plain(images: Tensor) -> Tensor:
        return model(images * 0.5)

    found = UniversalPerturbation(writing, EPSILON).fit([x], passes=2).perturbation
    expected = UniversalPerturbation(plain, EPSILON).fit([x], passes=2).perturbation
    assert torch.equal(found, expected)
    assert fooling_rate(writing, found, [x]) == fooling_rate(plain, found, [x])
    assert torch.equal(x, before)


def test_a_missing_folder_is_noticed_before_the_fit(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "v.safetensors"
    passes = 0

    class Counted(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal passes
            passes += 1
            return super().__iter__()

    with pytest.raises(FileNotFoundError, match=r"missing: no such folder"):
        UniversalPerturbation(network()).fit(Counted(batches()), checkpoint=path)
    assert passes == 0
    with pytest.raises(FileNotFoundError, match=r"missing: no such folder"):
        fitted(passes=1).save(path)


def test_a_model_that_takes_no_channels_last_is_fitted_too() -> None:
    net = network()

    viewing = Called(lambda x: net(x.view(len(x), -1).view(x.shape)))
    attack = UniversalPerturbation(viewing, EPSILON).fit(batches(), passes=2)
    assert attack.perturbation.any()


class Interrupted:
    """Batches that Ctrl-C ends before the given one, counted over all passes."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in shuffled():
            if self.seen == self.at:
                raise KeyboardInterrupt
            self.seen += 1
            yield batch


@pytest.mark.parametrize("at", [2, 8])
def test_ctrl_c_keeps_what_was_found_so_far(at: int) -> None:
    attack = UniversalPerturbation(network(), EPSILON)
    with pytest.raises(KeyboardInterrupt):
        attack.fit(Interrupted(at), passes=4)
    assert attack.perturbation.any()
    assert len(attack.rates) == at // 5


def test_a_fit_that_fails_at_once_leaves_what_was_there() -> None:
    attack = UniversalPerturbation(network(), EPSILON)
    with pytest.raises(ValueError, match="target: class 9"):
        attack.fit(batches(), target=9)
    with pytest.raises(RuntimeError, match="no perturbation yet"):
        _ = attack.perturbation
    v = attack.fit(batches(), passes=1).perturbation
    with pytest.raises(ValueError, match="target: class 9"):
        attack.fit(batches(), target=9)
    assert torch.equal(attack.perturbation, v)


@pytest.mark.parametrize("method", ["gradient", "deepfool"])
@pytest.mark.parametrize("at", [7, 10])
def test_an_interrupted_fit_resumes_bit_for_bit(at: int, method: str, tmp_path: Path) -> None:
    net = network()
    options: dict[str, Any] = {"passes": 4, "method": method, "target_rate": 1.0}
    whole = UniversalPerturbation(net, 0.02).fit(shuffled(), **options)
    path = tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        UniversalPerturbation(net, 0.02).fit(Interrupted(at), checkpoint=path, **options)
    clean = [0]

    def count(x: Tensor) -> Tensor:
        clean[0] += 0 if x.requires_grad or method == "deepfool" else len(x)
        return net(x)

    resumed = UniversalPerturbation(count, 0.02).fit(shuffled(), checkpoint=path, **options)
    assert clean == [0]  # the clean classes are in the checkpoint
    assert len(whole.rates) == 4
    assert resumed.rates == whole.rates
    assert torch.equal(resumed.perturbation, whole.perturbation)
    assert [p.name for p in tmp_path.iterdir()] == ["fit.safetensors"]


def test_a_finished_checkpoint_needs_no_images_and_loads_as_a_perturbation(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    attack = fitted(checkpoint=path)
    again = UniversalPerturbation(network(), EPSILON)
    again.fit(Interrupted(0), passes=4, batch_size=4, checkpoint=path)
    assert torch.equal(again.perturbation, attack.perturbation)
    loaded = UniversalPerturbation.load(path, network())
    assert torch.equal(loaded.perturbation, attack.perturbation)


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    fitted(checkpoint=path)
    with pytest.raises(ValueError, match="fit with passes=4, not 5"):
        fitted(checkpoint=path, passes=5)
    fitted().save(path)
    with pytest.raises(ValueError, match="finished perturbation, no checkpoint"):
        fitted(checkpoint=path)


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", EPSILON), ("L2", 0.3)])
def test_a_saved_perturbation_comes_back(norm: str, epsilon: float, tmp_path: Path) -> None:
    attack = fitted(norm, epsilon)
    path = tmp_path / "v.safetensors"
    attack.save(path)
    loaded = UniversalPerturbation.load(path, network())
    assert (loaded.epsilon, loaded.norm, loaded.bounds) == (epsilon, norm, (0.0, 1.0))
    assert loaded.rates == attack.rates
    assert torch.equal(loaded.perturbation, attack.perturbation)
    assert torch.equal(loaded.perturb(images()), attack.perturb(images()))
    assert list(load_file(path)) == ["perturbation"]


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    attack, path = fitted(), tmp_path / "v.safetensors"
    attack.save(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match=r"v\.safetensors: could not be written"):
            attack.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_version_0_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    facts = {"norm": '"L2"', "epsilon": "0.5", "bounds": "[0.0, 1.0]", "rates": "[0.25, 0.75]"}
    metadata = {"format": "captum_robust.UniversalPerturbation", **facts}
    v = torch.full((3, 4, 4), 0.01)
    save_file({"perturbation": v}, path, metadata=metadata)
    loaded = UniversalPerturbation.load(path, network())
    assert (loaded.epsilon, loaded.norm, loaded.bounds) == (0.5, "L2", (0.0, 1.0))
    assert loaded.rates == (0.25, 0.75)
    assert torch.equal(loaded.perturbation, v)


def test_a_checkpoint_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    attack = fitted(checkpoint=path)
    again = fitted(checkpoint=path)
    assert torch.equal(again.perturbation, attack.perturbation)
    assert torch.equal(
        UniversalPerturbation.load(path, network()).perturbation, attack.perturbation
    )


def test_files_that_hold_no_perturbation_are_refused_by_name(tmp_path: Path) -> None:
    net, path = network(), tmp_path / "v.safetensors"
    with pytest.raises(FileNotFoundError, match=r"v\.safetensors: no such file"):
        UniversalPerturbation.load(path, net)
    torch.save({"perturbation": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"v\.safetensors is not a safetensors file"):
        UniversalPerturbation.load(path, net)
    save_file({"perturbation": torch.zeros(3, 4, 4)}, path)
    with pytest.raises(ValueError, match=r"v\.safetensors holds no universal perturbation"):
        UniversalPerturbation.load(path, net)
    facts = {"format": universal._KIND, "epsilon": "0.1", "norm": '"Linf"', "rates": "[]"}
    save_file({"perturbation": torch.zeros(3, 4, 4)}, path, metadata=facts)
    with pytest.raises(ValueError, match=r"v\.safetensors holds no .* no 'bounds'"):
        UniversalPerturbation.load(path, net)
    facts["bounds"] = "[0, 1]"
    save_file({"v": torch.zeros(3, 4, 4)}, path, metadata=facts)
    with pytest.raises(ValueError, match=r"v\.safetensors holds no .* no 'perturbation'"):
        UniversalPerturbation.load(path, net)
    save_file({"perturbation": torch.ones(3, 4, 4)}, path, metadata=facts)
    with pytest.raises(ValueError, match=r"v\.safetensors holds no .*exceeds its epsilon"):
        UniversalPerturbation.load(path, net)
    save_file({"perturbation": torch.full((3, 4, 4), math.nan)}, path, metadata=facts)
    with pytest.raises(ValueError, match=r"v\.safetensors: NaN"):
        UniversalPerturbation.load(path, net)


def test_the_fooling_rate_counts_changed_classes_and_knows_no_labels() -> None:
    v = torch.tensor([-0.06, 0.06, 0.0])  # turns margins below .12: the last of the four
    loader = [(CLASS_0, torch.ones(4)), (CLASS_0[:1], torch.ones(1))]
    found = fooling_rate(TWO, v, loader)
    assert (found.rate, found.n) == (0.2, 5)
    # Wilson's interval of 1 in 5, as statsmodels' proportion_confint(1, 5, method="wilson") has it
    assert (found.low, found.high) == pytest.approx((0.03622, 0.62447), abs=1e-5)


def test_the_transfer_matrix_of_two_models_worked_by_hand() -> None:
    other = linear([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [0.0, 0.4])  # class 0 above .4 in the third
    seen = {"two": 0, "other": 0}

    def two(x: Tensor) -> Tensor:
        seen["two"] += 1
        return TWO(x)

    def third(x: Tensor) -> Tensor:
        seen["other"] += 1
        return other(x)

    on_two = UniversalPerturbation(TWO, EPSILON).fit([CLASS_0], passes=30)
    on_other = torch.tensor([0.0, 0.0, -0.2])
    table = transfer_matrix(
        {"two": on_two, "other": on_other, "none": lambda x: x},
        {"two": two, "other": third},
        [CLASS_0[:3], CLASS_0[3:]],
    )
    # Third pixels .5, .5, .1, .9: minus .2 turns two of four; the other v does not touch them.
    assert table.to_dict("index") == {
        "two": {"two": 0.75, "other": 0.0},
        "other": {"two": 0.0, "other": 0.5},
        "none": {"two": 0.0, "other": 0.0},
    }
    assert (table.index.name, table.columns.name) == ("source", "attacked")
    assert seen == {"two": 8, "other": 8}  # for each batch: clean, and three sources


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"passes": 0}, ValueError, "passes: expected a whole number from 1"),
        ({"passes": 1.5}, ValueError, "passes"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
        (
            {"method": "gradeint"},
            ValueError,
            r"method: .*got 'gradeint'; did you mean 'gradient'",
        ),
        ({"target_rate": 0}, ValueError, "target_rate"),
        ({"target_rate": 1.1}, ValueError, "target_rate"),
        ({"step_size": 0}, ValueError, "step_size"),
        ({"step_size": "big"}, ValueError, "step_size"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"target": -1}, ValueError, "target"),
        ({"target": 5}, ValueError, "target: class 5, but the model has the classes 0 to 4"),
        ({"target": 1, "method": "deepfool"}, ValueError, "target: .* only the method 'gradient'"),
        ({"loss_func": nn.CrossEntropyLoss()}, ValueError, "loss_func: expected 4 losses"),
    ],
)
def test_wrong_arguments_of_fit_are_named(
    arguments: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        fitted(**arguments)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader: no images"),
        (images(4), TypeError, "loader: expected an iterable of image batches"),
        (None, TypeError, "loader: expected an iterable of image batches"),
        ([{"image": images(4)}], TypeError, "loader, batch 0: expected images N×C×H×W, got dict"),
        ([()], TypeError, "loader, batch 0: expected images N×C×H×W, got tuple"),
        ([torch.tensor(1.0)], ValueError, "loader, batch 0: expected images N×C×H×W, got shape"),
        ([images(4), images(0)], ValueError, "loader, batch 1, inputs: the batch is empty"),
        ([(255 * images(4)).byte()], TypeError, "loader, batch 0, inputs: expected floating point"),
        ([images(4), 1 + images(4)], ValueError, "loader, batch 1, inputs: .* outside of the boun"),
        ([images(4) * math.nan], ValueError, "loader, batch 0, inputs: NaN"),
        ([images(4), images(4, size=12)], ValueError, r"loader: .* one size, .*10, 10.* and .*12"),
        (iter([images(4)]), ValueError, "loader: list_iterator is exhausted after one pass"),
        ((x for x in [images(4)]), ValueError, "loader: generator is exhausted after one pass"),
    ],
)
def test_bad_loaders_are_named(loader: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        UniversalPerturbation(network()).fit(loader)


def test_an_iterator_serves_for_one_pass_and_one_in_disguise_is_found_out() -> None:
    class Once:
        def __init__(self) -> None:
            self.inside = iter(batches())

        def __iter__(self) -> Iterator[Tensor]:
            yield from self.inside

    attack = UniversalPerturbation(network())
    assert attack.fit(iter(batches()), passes=1).perturbation.any()
    with pytest.raises(ValueError, match="loader: exhausted, no images in pass 2"):
        attack.fit(Once(), passes=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon: expected a number from 0 to 1"),
        ({"epsilon": 1.5}, ValueError, "epsilon: expected a number from 0 to 1"),
        ({"epsilon": None}, ValueError, "epsilon"),
        ({"norm": "L1"}, ValueError, "norm"),
        ({"bounds": (1, 0)}, ValueError, "bounds"),
        ({"forward_func": "resnet50"}, TypeError, "forward_func"),
    ],
)
def test_wrong_arguments_of_the_class_are_named(
    arguments: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        UniversalPerturbation(**{"forward_func": TWO, **arguments})


def test_before_the_fit_there_is_nothing_to_add_or_save(tmp_path: Path) -> None:
    attack = UniversalPerturbation(network())
    for use in (
        lambda: attack.perturb(images(2)),
        lambda: attack.perturbation,
        lambda: attack.save(tmp_path / "v.safetensors"),
    ):
        with pytest.raises(RuntimeError, match="call fit"):
            use()
    assert not list(tmp_path.iterdir())


def test_images_that_v_does_not_fit_are_refused() -> None:
    attack = fitted()
    with pytest.raises(ValueError, match=r"inputs: images of shape \(1, 10, 10\)"):
        attack.perturb(images(2)[:, :1])
    with pytest.raises(ValueError, match="one v is added to it, got 2"):
        attack.perturb((images(2), images(2)))
    with pytest.raises(ValueError, match="outside of the bounds"):
        attack.perturb(2 * images(2))
    with pytest.raises(ValueError, match="epsilon"):
        attack.perturb(images(2), epsilon=-1)


def test_models_that_cannot_be_attacked_say_why() -> None:
    net = network()
    cases: list[tuple[Any, str]] = [
        (lambda x: net(x).detach(), "no gradient flows"),
        (lambda x: net(x)[1:], "expected scores 10×K"),
        (lambda x: net(x) * math.nan, "scores: NaN"),
    ]
    for forward_func, message in cases:
        with pytest.raises(ValueError, match=f"forward_func.*{message}"):
            UniversalPerturbation(forward_func).fit(batches())


def test_rates_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="loader: no images"):
        fooling_rate(TWO, torch.zeros(3), [])
    with pytest.raises(ValueError, match="models: expected at least one"):
        transfer_matrix({"v": torch.zeros(3)}, {}, [CLASS_0])
    with pytest.raises(ValueError, match="perturbations: expected at least one"):
        transfer_matrix({}, {"two": TWO}, [CLASS_0])
    with pytest.raises(TypeError, match="perturbation 'v': expected a tensor or an attack"):
        transfer_matrix({"v": "v"}, {"two": TWO}, [CLASS_0])  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"perturbation 'v': expected \(4, 3\) as it came"):
        transfer_matrix({"v": lambda x: x[:1]}, {"two": TWO}, [CLASS_0])
