from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust.nn import DenseAssociativeMemory

POWERS = [2, 3, 10, 20, 30]


def two_memories(n: int = 2, beta: float = 1.0) -> DenseAssociativeMemory:
    """Memories along the axes of the plane, one of each class."""
    memory = DenseAssociativeMemory(2, classes=2, memories=2, n=n, beta=beta)
    memory.patterns.data = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    memory.classes_of_patterns.data = torch.tensor([[1.0, -1.0], [-1.0, 0.5]])
    return memory


def clusters(n: int, seed: int, classes: int = 3, features: int = 20) -> tuple[Tensor, Tensor]:
    """Points around one direction a class, far from the origin, as behind a ReLU."""
    means = torch.randn(classes, features, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % classes
    return 4 + means[target] + 0.3 * torch.randn(n, features, generator=g), target


def test_potentials_are_those_worked_by_hand() -> None:
    # The cosines of (3, 4) with the axes are 0.6 and 0.8; squared 0.36 and 0.64, times β = 2.
    found = two_memories(beta=2.0).potentials(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([[2 * (0.36 - 0.64), 2 * (0.32 - 0.36)]]))


def test_outputs_are_the_tanh_of_potentials() -> None:
    found = two_memories(n=3)(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    first = [math.tanh(0.6**3 - 0.8**3), math.tanh(0.5 * 0.8**3 - 0.6**3)]
    torch.testing.assert_close(found, torch.tensor([first, [math.tanh(1), -math.tanh(1)]]))


def test_a_memory_that_points_away_does_not_answer() -> None:
    found = two_memories().potentials(torch.tensor([[-3.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([[-0.64, 0.32]]))


def test_neither_the_length_of_features_nor_that_of_memories_counts() -> None:
    memory, v = two_memories(n=5), torch.tensor([[3.0, 4.0]])
    expected = memory.potentials(v)
    memory.patterns.data *= torch.tensor([[7.0], [0.1]])
    torch.testing.assert_close(memory.potentials(1000 * v), expected)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_loss_is_the_sum_of_powers_of_the_distances(m: int) -> None:
    memory = two_memories()
    outputs, target = torch.tensor([[0.5, -0.25], [-1.0, 1.0]]), torch.tensor([0, 0])
    expected = torch.tensor([0.5 ** (2 * m) + 0.75 ** (2 * m), 2.0 ** (2 * m) * 2])
    torch.testing.assert_close(memory.loss(outputs, target, m), expected)


@pytest.mark.parametrize("n", POWERS)
def test_gradients_are_those_of_finite_differences(n: int) -> None:
    torch.manual_seed(0)
    memory = DenseAssociativeMemory(4, classes=3, memories=6, n=n, beta=1.7).double()
    v = torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    target = torch.tensor([0, 1, 2, 0, 1])
    assert torch.autograd.gradcheck(lambda v: memory.loss(memory(v), target, 2), (v,))
    assert torch.autograd.gradcheck(
        lambda p: torch.func.functional_call(memory, {"patterns": p}, (v.detach(),)),
        (memory.patterns.detach().requires_grad_(),),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("beta", [1e-20, 1.0, 1e30])
@pytest.mark.parametrize("n", [1, *POWERS])
def test_values_and_gradients_are_finite(n: int, beta: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    memory = DenseAssociativeMemory(64, classes=3, memories=50, n=n, beta=beta).to(dtype)
    v = torch.randn(9, 64).to(dtype)
    v[0] = 0  # no direction
    v[1] = memory.patterns.data[0]  # a cosine of 1
    v.requires_grad_()
    outputs = memory(v)
    assert outputs.dtype == torch.float32
    assert outputs.isfinite().all()
    assert memory.potentials(v).isfinite().all()
    # 2^60, the largest loss, has a gradient beyond half precision.
    m = 1 if dtype == torch.float16 else 30
    memory.loss(outputs, torch.arange(9) % 3, m).sum().backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in memory.parameters())


def test_autocast_does_not_round_the_powers() -> None:
    torch.manual_seed(0)
    memory, v = (
        DenseAssociativeMemory(64, classes=3, memories=50, n=30, beta=1e9),
        torch.rand(9, 64),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = memory.potentials(v)
    torch.testing.assert_close(found, memory.potentials(v), rtol=0, atol=0)


@pytest.mark.parametrize("n", POWERS)
def test_a_fit_learns_classes_of_features_that_all_point_one_way(n: int) -> None:
    memory = DenseAssociativeMemory(20, classes=3, memories=30, n=n)
    memory.fit(*clusters(300, seed=0), epochs=5)
    v, target = clusters(90, seed=1)
    assert (memory(v).argmax(dim=1) == target).float().mean() > 0.95


def test_a_fit_lowers_the_loss_of_what_was_stored() -> None:
    v, target = clusters(120, seed=0)
    losses = []
    for epochs in (0, 10):
        memory = DenseAssociativeMemory(20, classes=3, memories=12, n=5)
        memory.fit(v, target, epochs=epochs, m=2)
        losses.append(memory.loss(memory(v), target, 2).mean().item())
    assert losses[1] < 0.5 * losses[0]


def test_without_epochs_the_memories_are_features_of_each_class_in_turn() -> None:
    v, target = clusters(60, seed=0)
    memory = DenseAssociativeMemory(20, classes=3, memories=7, n=5).fit(v, target, epochs=0)
    mean = v.mean(dim=0)
    torch.testing.assert_close(memory.center, mean)
    shown = nn.functional.normalize(v - mean, dim=1) * 20**0.5
    places = (memory.patterns[:, None] - shown).norm(dim=2).argmin(dim=1)
    torch.testing.assert_close(memory.patterns.data, shown[places])
    assert sorted(torch.bincount(target[places]).tolist()) == [2, 2, 3]
    assert len(places.unique()) == 7
    assert memory.classes_of_patterns.argmax(dim=0).tolist() == target[places].tolist()
    assert set(memory.classes_of_patterns.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("n", POWERS)
def test_beta_makes_the_activations_of_the_median_feature_add_up_to_one(n: int) -> None:
    v, target = clusters(61, seed=0)
    memory = DenseAssociativeMemory(20, classes=3, memories=20, n=n).fit(v, target, epochs=0)
    directions = nn.functional.normalize(v - v.mean(dim=0), dim=1)
    cosines = directions @ nn.functional.normalize(memory.patterns.detach(), dim=1).T
    is_stored = (cosines > 0.9999).any(dim=1)
    assert int(is_stored.sum()) == 20
    sums = (memory.beta * cosines[~is_stored].relu() ** n).sum(dim=1)
    assert sums.median() == pytest.approx(1, rel=1e-3)


def test_the_same_seed_gives_the_same_memory_and_leaves_torchs_generator() -> None:
    v, target = clusters(60, seed=0)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    made = [
        DenseAssociativeMemory(20, 3, 9).fit(v, target, epochs=2, seed=seed) for seed in (4, 4, 5)
    ]
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(made[0].patterns, made[1].patterns)
    assert not torch.equal(made[0].patterns, made[2].patterns)


def test_a_fit_leaves_the_features_and_no_gradients_behind() -> None:
    v, target = clusters(60, seed=0)
    v.requires_grad_()
    before = v.detach().clone()
    memory = DenseAssociativeMemory(20, 3, 9)
    with torch.no_grad():
        memory.fit(v, target, epochs=1)
    assert v.grad is None
    assert torch.equal(v, before)
    assert all(p.grad is None and p.requires_grad for p in memory.parameters())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_classes_of_any_whole_number_type_fit_alike(dtype: torch.dtype) -> None:
    features, target = clusters(20, seed=1, classes=2)
    wide, narrow = (DenseAssociativeMemory(20, 2, memories=6) for _ in range(2))
    wide.fit(features, target, epochs=1)
    narrow.fit(features, target.to(dtype), epochs=1)
    assert torch.equal(wide.patterns, narrow.patterns)


def test_a_fit_works_in_inference_mode() -> None:
    memory = DenseAssociativeMemory(20, 3, 9)
    with torch.inference_mode():
        v, target = clusters(60, seed=0)
        memory.fit(v, target, epochs=1)
    v, target = clusters(60, seed=0)
    again = DenseAssociativeMemory(20, 3, 9).fit(v, target, epochs=1)
    assert torch.equal(memory(v), again(v))


def test_identical_features_do_no_harm() -> None:
    memory = DenseAssociativeMemory(4, 2, 3, n=30)
    memory.fit(torch.ones(10, 4), torch.arange(10) % 2, epochs=1)
    assert memory(torch.ones(2, 4)).isfinite().all()
    assert memory(torch.randn(2, 4)).isfinite().all()


def test_the_state_dict_holds_all_that_a_memory_knows() -> None:
    v, target = clusters(60, seed=0)
    memory = DenseAssociativeMemory(20, 3, 9, n=7).fit(v, target, epochs=1)
    again = DenseAssociativeMemory(20, 3, 9, n=7)
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again(v), memory(v))


def test_it_is_a_head_on_frozen_features() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(2, 3, 9, 9, requires_grad=True)
    model = nn.Sequential(trunk.requires_grad_(False), DenseAssociativeMemory(8, 4, 12, n=3))
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features: .* from 1, got 0"),
        ({"classes": 1}, "classes: .* from 2, got 1"),
        ({"memories": 0}, "memories: .* from 1, got 0"),
        ({"n": 0}, "n: .* from 1, got 0"),
        ({"n": 2.5}, "n: .* got 2.5"),
        ({"n": True}, "n: .* got True"),
        ({"beta": 0.0}, "beta: .* got 0.0"),
        ({"beta": float("nan")}, "beta: .* got nan"),
        ({"beta": 1e31}, "beta: .* got 1e\\+31"),
        ({"seed": -1}, "seed: .* got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseAssociativeMemory(**{"in_features": 4, "classes": 2, "memories": 3} | arguments)


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        (torch.rand(2, 5), ValueError, "features: expected N×4, got"),
        (torch.rand(4), ValueError, "features: expected N×4, got"),
        (torch.rand(0, 4), ValueError, "features: the batch is empty"),
        (torch.full((2, 4), torch.nan), ValueError, "features: NaN or infinity in sample 0"),
        (torch.ones(2, 4, dtype=torch.long), TypeError, "features: .* got torch.int64"),
        ([1.0], TypeError, "features: .* got list"),
    ],
)
def test_wrong_features_are_named(v: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DenseAssociativeMemory(4, 2, 3)(v)


@pytest.mark.parametrize(
    ("outputs", "target", "m", "error", "message"),
    [
        (torch.rand(2, 3), torch.tensor([0, 1]), 1, ValueError, "outputs: expected N×2"),
        (torch.rand(2, 2), torch.tensor([0]), 1, ValueError, "target: expected 2 classes"),
        (torch.rand(2, 2), torch.tensor([0, 2]), 1, ValueError, "target: .* from 0 to 1, got 2"),
        (torch.rand(2, 2), torch.tensor([-1, 0]), 1, ValueError, "target: .* got -1"),
        (torch.rand(2, 2), torch.tensor([0.0, 1.0]), 1, TypeError, "target: .* torch.float32"),
        (torch.rand(2, 2), torch.tensor([0, 1]), 0, ValueError, "m: .* from 1, got 0"),
    ],
)
def test_wrong_arguments_of_the_loss_are_named(
    outputs: Tensor, target: Tensor, m: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DenseAssociativeMemory(4, 2, 3).loss(outputs, target, m)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": -1}, "epochs: .* from 0, got -1"),
        ({"batch_size": 0}, "batch_size: .* from 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: .* got 0.0"),
        ({"m": 0}, "m: .* from 1, got 0"),
        ({"seed": -1}, "seed: .* from 0, got -1"),
        ({"features": torch.rand(2, 4)}, "target: expected 2 classes, got"),
        ({"features": torch.rand(2, 4), "target": torch.tensor([0, 1])}, "as many as memories, 3"),
    ],
)
def test_wrong_arguments_of_a_fit_are_named(arguments: dict[str, Any], message: str) -> None:
    given = {"features": torch.rand(6, 4), "target": torch.arange(6) % 2} | arguments
    with pytest.raises(ValueError, match=message):
        DenseAssociativeMemory(4, 2, 3).fit(**given)
