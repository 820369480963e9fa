"""One step is the same however its batch is cut, over parts and over processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Subset, TensorDataset

from captum_robust._draws import drawn
from captum_robust.nn import CorruptionNetwork, Denoiser, LocalizationNetwork, SimpleConvNet
from captum_robust.training import (
    TrainingSettings,
    clean_training,
    denoising_training,
    fit,
    localization_training,
    masking_training,
)
from captum_robust.training.adversarial import adversarial_training
from captum_robust.training.schedule import derived_seed
from tests.networks import Net
from tests.training.test_masking import network as masking_network
from tests.training.test_masking import squares

BATCH = 16


def made(make: Callable[[], nn.Module], norms: bool = True) -> Any:
    """A network, always with the same weights; without its layers of batch norm on request."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make()
    for module in [*network.modules()] if not norms else []:
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return network


def data() -> TensorDataset:
    return squares(BATCH)


def segmented() -> TensorDataset:
    images, labels = data().tensors
    cell = torch.arange(16) // 4
    return TensorDataset(images, (4 * cell[:, None] + cell).expand(BATCH, 16, 16), labels)


def classifier(norms: bool, width: int = 2) -> Any:
    return made(lambda: SimpleConvNet(3, width), norms)


def cross_entropy(network: nn.Module, batch: tuple[Tensor, ...], _: int) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


def clean(settings: TrainingSettings, norms: bool) -> nn.Module:
    network = classifier(norms)
    clean_training(network, data(), settings)
    return network


def robust(settings: TrainingSettings, norms: bool, **options: Any) -> nn.Module:
    network = classifier(norms)
    if options.get("method") == "ensemble":
        options["static_models"] = [classifier(norms, width=3)]
    adversarial_training(network, data(), settings, epsilon=0.1, steps=2, **options)
    return network


def masking(settings: TrainingSettings, norms: bool, **options: Any) -> nn.Module:
    network = made(masking_network, norms)
    masking_training(network, data(), settings, warm_up_steps=2, **options)
    return network.decoder


def denoising(settings: TrainingSettings, norms: bool) -> nn.Module:
    denoiser, net = made(lambda: Denoiser(4), norms), made(Net)
    denoising_training(denoiser, data(), net.eval(), net.conv2, settings)
    return denoiser


def localization(settings: TrainingSettings, norms: bool, **options: Any) -> nn.Module:
    corruption = made(lambda: CorruptionNetwork(width=2, input_size=(16, 16)), norms)
    network = LocalizationNetwork(corruption, classifier(norms), fill=0.5)
    localization_training(network, segmented(), settings, **options)
    return network


TRAININGS: dict[str, Callable[[TrainingSettings, bool], nn.Module]] = {
    "clean": clean,
    "robust standard": partial(robust, method="standard"),
    "robust madry": robust,
    "robust ensemble": partial(robust, method="ensemble"),
    "masking": masking,
    "masking mostly fakes": partial(masking, fake_probability=0.9, crop=0.1),
    "masking swapped": partial(masking, fakes="swapped", crop=0.1),
    "denoising": denoising,
    "localization": localization,
    "localization resting": partial(localization, steps_of_classifier=2, clean_share=0.5),
}


@cache
def trained(name: str, micro_batch_size: int | None, norms: bool) -> dict[str, Tensor]:
    """The gradients of the first step, and the weights after three."""
    settings = TrainingSettings(
        epochs=3,
        batch_size=BATCH,
        micro_batch_size=micro_batch_size,
        learning_rate=1e-3,
        warmup=0.5,
        device="cpu",
    )
    gradients: dict[str, Tensor] = {}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradients or len(parameters) < 4:  # the warm-up's
            return
        for number, parameter in enumerate(parameters):
            gradient = torch.zeros(1) if parameter.grad is None else parameter.grad
            gradients[f"gradient {number}"] = gradient.clone(memory_format=torch.contiguous_format)

    hook = register_optimizer_step_pre_hook(note)
    try:
        network = TRAININGS[name](settings, norms)
    finally:
        hook.remove()
    weights = {n: t.clone() for n, t in network.state_dict().items() if n != "_extra_state"}
    return {**gradients, **weights}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """What differs by more than rounding; nothing: "" (pytest would write out all tensors)."""
    assert found.keys() == expected.keys()
    scale = max(float(t.abs().max()) for n, t in expected.items() if n.startswith("gradient"))
    assert scale > 1e-3
    for name, value in expected.items():
        far = float((found[name].double() - value.double()).abs().max())
        if name.startswith("gradient"):
            is_same = far < 1e-5 * scale
        elif name.endswith("num_batches_tracked"):
            continue  # of the passes, which nothing depends on
        else:
            # Adam moves a weight whose gradient is but rounding by up to its rate a step.
            is_same = far < 2e-3
        if not is_same:
            return f"{name}: {far} of {float(value.abs().max())}"
    return ""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made, each of which takes four images at once."""
    out = tmp_path_factory.mktemp("two")
    script = out / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        f"from tests.training.test_micro_batches import write\nwrite({str(out)!r})\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(script)]
    subprocess.run(command, env=environment, timeout=300, check=True)
    return out


def write(out: str) -> None:
    """Run by each of the two processes."""
    for name, norms in product(TRAININGS, (True, False)):
        found = trained(name, 4, norms)
        if os.environ["RANK"] == "0":
            save_file({n: t.contiguous() for n, t in found.items()}, f"{out}/{name} {norms}")


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("size", [1, 6])
def test_a_batch_in_parts_gives_the_step_of_the_whole(name: str, size: int) -> None:
    """Where a step is the mean of what its images give, one by one."""
    assert not difference(trained(name, size, False), trained(name, None, False))


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_with_parts_give_the_step_of_one_with_the_whole(
    name: str, shared: Path
) -> None:
    assert not difference(load_file(shared / f"{name} False"), trained(name, None, False))


@pytest.mark.parametrize("name", TRAININGS)
def test_with_batch_norm_two_processes_give_the_step_of_one_with_the_same_parts(
    name: str, shared: Path
) -> None:
    assert not difference(load_file(shared / f"{name} True"), trained(name, 4, True))


def test_with_batch_norm_the_size_of_a_part_counts() -> None:
    assert difference(trained("clean", 4, True), trained("clean", 8, True))


def test_running_averages_move_once_a_step_by_the_mean_over_the_parts() -> None:
    images, _ = data().tensors
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    settings = TrainingSettings(epochs=1, batch_size=BATCH, micro_batch_size=4, device="cpu")
    fit(network, data(), cross_entropy, settings)
    generator = torch.Generator().manual_seed(derived_seed(0, "order", 0))
    parts = images[torch.randperm(BATCH, generator=generator)].reshape(4, 4, 3, -1)
    parts = parts.transpose(1, 2).flatten(2)  # parts, channels, pixels
    norm = network[0]
    torch.testing.assert_close(norm.running_mean, 0.1 * parts.mean(dim=2).mean(dim=0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * parts.var(dim=2).mean(dim=0))


def test_the_schedule_counts_steps_of_the_optimiser(tmp_path: Path) -> None:
    rows = []
    for size in (None, 2):
        settings = TrainingSettings(
            epochs=4, batch_size=8, micro_batch_size=size, learning_rate=0.1, device="cpu"
        )
        network = classifier(True)
        out = tmp_path / str(size)
        fit(network, data(), cross_entropy, settings, out=out)
        rows.append([json.loads(line) for line in (out / "log.jsonl").open()])
    assert [row["step"] for row in rows[1]] == list(range(1, 9))
    for name in ("learning_rate", "epoch"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]


def test_a_run_in_other_parts_is_another_run(tmp_path: Path) -> None:
    def run(size: int) -> None:
        settings = TrainingSettings(
            epochs=1, batch_size=8, micro_batch_size=size, learning_rate=0.1, device="cpu"
        )
        fit(
            classifier(True), Subset(data(), range(8)),
            cross_entropy, settings, out=tmp_path,
        )  # fmt: skip

    run(4)
    with pytest.raises(ValueError, match="micro_batch_size: 4 there, 2 here"):
        run(2)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_size_of_parts_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        TrainingSettings(micro_batch_size=size)


def test_a_generator_for_each_sample_gives_the_same_in_any_batch() -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    for draw in (torch.rand, torch.randn):
        whole = drawn(draw, (3, 2, 5), generators(1, 2, 3))
        assert torch.equal(whole[1:], drawn(draw, (2, 2, 5), generators(2, 3)))
        assert drawn(draw, (0, 2, 5), []).shape == (0, 2, 5)
    # Images with fewer super-pixels than others in their batch: theirs are the first numbers.
    assert torch.equal(
        drawn(torch.rand, (1, 40), generators(1))[:, :33], drawn(torch.rand, (1, 33), generators(1))
    )
    with pytest.raises(ValueError, match="generator: expected one, or one for each of 3 samples"):
        drawn(torch.rand, (3, 2), generators(1, 2))
