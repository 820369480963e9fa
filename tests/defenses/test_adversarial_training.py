from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from captum_robust import cli
from captum_robust.attacks import FGSM, PGD
from captum_robust.defenses import (
    EnsembleLoss,
    InnerAttack,
    MadryLoss,
    RobustAccuracy,
    adversarial_training,
    standard_loss,
)
from captum_robust.models import load_classifier, save_classifier
from captum_robust.training import TrainingSettings, fit

Run = Callable[..., tuple[int, str, str]]


def small_net(seed: int = 0, classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(24, classes),
        )


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, 8, 8, generator=g), torch.arange(n) % 3


def trained_a_little() -> nn.Sequential:
    """A network whose averages of batch norm are not the initial ones."""
    network = small_net()
    with torch.no_grad():
        for _ in range(5):
            network(images()[0] * 2)
    return network


def test_from_the_image_itself_it_takes_the_steps_of_pgd() -> None:
    x, y = images()
    network = trained_a_little()
    found = InnerAttack(8 / 255, steps=5, random_start=False)(network, x, y, seed=0)
    expected = PGD(
        network.eval(),
        8 / 255,
        5,
        loss="cross_entropy",
        early_stop=False,
        keep_best=False,
        quantize=False,
    ).perturb(x, y)
    torch.testing.assert_close(found, expected)


def test_one_step_of_epsilon_from_the_image_is_the_fast_gradient_sign_method() -> None:
    x, y = images()
    network = trained_a_little()
    found = InnerAttack(8 / 255, 1, 8 / 255, random_start=False)(network, x, y, seed=0)
    step = FGSM(network.eval(), 8 / 255, loss="cross_entropy", early_stop=False)
    torch.testing.assert_close(found, step.perturb(x, y))


class Viewing(nn.Module):
    """Flattens its features with view(), which takes no channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).view(len(x), -1))


def test_a_network_that_views_its_features_is_attacked_alike() -> None:
    x, y = images()
    network = Viewing()
    found = InnerAttack(8 / 255, steps=3, random_start=False)(network, x, y, seed=0)
    expected = PGD(
        network, 8 / 255, 3, loss="cross_entropy", early_stop=False, keep_best=False, quantize=False
    ).perturb(x, y)
    torch.testing.assert_close(found, expected)
    MadryLoss()(network, (x, y), 0).backward()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_attacked_images_stay_in_ball_and_range_and_raise_the_loss(norm: str) -> None:
    x, y = images(64)
    network = trained_a_little()
    epsilon = 16 / 255 if norm == "Linf" else 1.0
    found = InnerAttack(epsilon, norm=norm)(network, x, y, seed=0)
    change = (found - x).flatten(1)
    lengths = change.abs().amax(dim=1) if norm == "Linf" else change.norm(dim=1)
    assert float(lengths.max()) <= epsilon + 1e-6
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    network.eval()
    before, after = (F.cross_entropy(network(i), y, reduction="none") for i in (x, found))
    assert bool((after > before).all())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_each_image_starts_at_a_point_of_its_own_in_the_ball(norm: str) -> None:
    x = torch.full((200, 3, 8, 8), 0.5)
    # Steps of almost nothing leave the images where they start.
    attack = InnerAttack(0.25, 1, 1e-9, norm=norm)
    found = attack(trained_a_little(), x, torch.zeros(200, dtype=torch.long), seed=0)
    change = (found - x).flatten(1)
    assert len({round(float(c), 6) for c in change[:, 0]}) > 190
    if norm == "Linf":  # uniform on [-ε, ε]
        assert float(change.abs().max()) <= 0.25
        assert float(change.std()) == pytest.approx(0.25 / 3**0.5, rel=0.02)
    else:
        # In d dimensions the radius is ε u^(1/d), of mean ε d / (d + 1).
        assert float(change.norm(dim=1).mean()) == pytest.approx(0.25 * 192 / 193, rel=0.01)
    again = attack(trained_a_little(), x, torch.zeros(200, dtype=torch.long), seed=0)
    other = attack(trained_a_little(), x, torch.zeros(200, dtype=torch.long), seed=1)
    assert torch.equal(found, again)
    assert not torch.equal(found, other)


def test_the_attack_leaves_modes_averages_and_gradients_alone() -> None:
    network = trained_a_little().train()
    network[5].eval()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    x, y = images()
    InnerAttack()(network, x, y, seed=0)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert network.training
    assert network[1].training
    assert not network[5].training


def test_the_attack_uses_the_averages_of_batch_norm_so_no_image_sees_another() -> None:
    x, y = images()
    network = trained_a_little().train()
    attack = InnerAttack(random_start=False)
    together = attack(network, x, y, seed=0)
    alone = torch.cat([attack(network, x[i : i + 1], y[i : i + 1], seed=0) for i in range(6)])
    torch.testing.assert_close(together, alone)


def test_madrys_loss_is_that_of_the_attacked_images_in_training_mode() -> None:
    x, y = images()
    network = trained_a_little()
    network[5].p = 0.0
    attack = InnerAttack()
    attacked = attack(network, x, y, 3)
    value = MadryLoss(attack)(network.train(), (x, y), 3)
    torch.testing.assert_close(value, F.cross_entropy(network(attacked), y))
    value.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network[0].parameters())


def test_the_ensemble_draws_each_network_equally_often() -> None:
    network, static = small_net(), [small_net(1), small_net(2)]
    loss = EnsembleLoss(static)
    sources = [loss.source(network, seed) for seed in range(600)]
    for each in (network, *static):
        assert sum(s is each for s in sources) == pytest.approx(200, abs=40)
    assert loss.source(network, 5) is loss.source(network, 5)


def test_the_ensembles_loss_is_half_of_clean_and_half_of_attacked_images() -> None:
    x, y = images()
    network, static = trained_a_little().eval(), small_net(1).eval()
    loss = EnsembleLoss([static], 8 / 255)
    drawn = set()
    for seed in range(12):
        source = loss.source(network, seed)
        drawn.add(id(source))
        attacked = FGSM(source, 8 / 255, loss="cross_entropy", early_stop=False).perturb(x, y)
        expected = (F.cross_entropy(network(x), y) + F.cross_entropy(network(attacked), y)) / 2
        torch.testing.assert_close(loss(network, (x, y), seed), expected)
    assert len(drawn) == 2


def squares(n: int = 120) -> TensorDataset:
    """Two classes that a faint pattern tells apart, and a bold one with some mistakes.

    A network that looks at the faint pattern only is right everywhere, and falls to a change of its
    size.
    """
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    sign = (2.0 * labels - 1).reshape(-1, 1, 1, 1)
    checker = ((torch.arange(8)[:, None] + torch.arange(8)) % 2) * 2.0 - 1
    x = 0.5 + 0.02 * sign * checker + 0.05 * torch.randn(n, 1, 1, 1, generator=g)
    x = x.expand(n, 3, 8, 8).clone()
    bold = torch.where(torch.rand(n, generator=g) < 0.1, -1.0, 1.0).reshape(-1, 1, 1, 1)
    x[:, :, :, :4] += 0.15 * sign * bold
    x[:, :, :, 4:] -= 0.15 * sign * bold
    return TensorDataset(x.clamp(0, 1), labels)


def linear() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


def test_madrys_training_withstands_the_attack_to_which_the_standard_one_falls() -> None:
    data = squares()
    kept: dict[str, dict[str, float]] = {}
    for method in ("standard", "madry"):
        network = linear()
        result = adversarial_training(
            network,
            data,
            TrainingSettings(
                epochs=25,
                batch_size=20,
                learning_rate=0.5,
                weight_decay=0.0,
                evaluate_every=100,
            ),
            method=method,
            epsilon=10 / 255,
            steps=3,
            held_out=data,
        )
        assert [e["step"] for e in result.evaluations] == [0, 100, 150]
        kept[method] = result.evaluations[-1]
    assert kept["standard"]["clean_accuracy"] > 0.85
    assert kept["madry"]["clean_accuracy"] > 0.85
    assert kept["madry"]["robust_accuracy"] > kept["standard"]["robust_accuracy"] + 0.3


def test_robust_accuracy_counts_what_pgd_leaves_right() -> None:
    x, y = squares(50).tensors
    network = linear().eval()
    found = RobustAccuracy(TensorDataset(x, y), 4 / 255, batch_size=20)(network)
    details = PGD(network, 4 / 255, random_start=True).perturb(x, y, return_details=True)[1]
    clean = (network(x).argmax(dim=1) == y).float().mean()
    assert found["clean_accuracy"] == pytest.approx(float(clean))
    left = (~details.already & ~details.fooled).float().mean()
    assert found["robust_accuracy"] == pytest.approx(float(left), abs=1e-6)


@pytest.mark.parametrize("method", ["madry", "ensemble"])
def test_a_stopped_robust_training_goes_on_to_the_same_weights(tmp_path: Path, method: str) -> None:
    class Stop(Exception):
        pass

    def train(network: nn.Module, calls: int, out: Path) -> None:
        left = iter(range(calls))

        def count(*_: Any) -> None:
            if network.training and next(left, None) is None:
                raise Stop

        network.register_forward_pre_hook(count)
        data = TensorDataset(*images(24))
        adversarial_training(
            network,
            data,
            TrainingSettings(epochs=4, batch_size=4, checkpoint_every=0),
            method=method,
            static_models=[small_net(1)] if method == "ensemble" else [],
            steps=2,
            held_out=data,
            out=out,
        )

    whole, resumed = small_net(), small_net(3)
    train(whole, 1000, tmp_path / "whole")
    with pytest.raises(Stop):
        train(small_net(), 15, tmp_path / "cut")
    train(resumed, 1000, tmp_path / "cut")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_static_models_are_left_as_they_are() -> None:
    static = small_net(1).train()
    before = {name: t.clone() for name, t in static.state_dict().items()}
    adversarial_training(
        small_net(),
        TensorDataset(*images(8)),
        TrainingSettings(epochs=4, batch_size=4),
        method="ensemble",
        static_models=[static],
    )
    assert static.training
    assert all(torch.equal(t, before[name]) for name, t in static.state_dict().items())
    assert all(p.grad is None for p in static.parameters())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": 8}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"steps": 0}, "steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"norm": "L1"}, "norm"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
    ],
)
def test_wrong_numbers_of_the_inner_attack_are_named(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        InnerAttack(**arguments)


def test_wrong_arguments_of_the_training_are_named() -> None:
    data = TensorDataset(*images(8))
    settings = TrainingSettings(epochs=1, batch_size=4)

    def train(model: Any = None, **arguments: Any) -> None:
        adversarial_training(model or small_net(), data, settings, **arguments)

    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        train(lambda x: x)
    with pytest.raises(ValueError, match=r"method: .*got 'madri'; did you mean 'madry'"):
        train(method="madri")
    with pytest.raises(ValueError, match="static_models: the method 'madry' takes none"):
        train(static_models=[small_net()])
    with pytest.raises(ValueError, match="static_models: the ensemble variant needs"):
        train(method="ensemble")
    with pytest.raises(TypeError, match=r"static_models: expected torch\.nn\.Module, got function"):
        train(method="ensemble", static_models=[lambda x: x])
    with pytest.raises(ValueError, match="static_models: one has 5 classes, the model in tr"):
        train(method="ensemble", static_models=[small_net(classes=5)])
    with pytest.raises(ValueError, match="evaluation_images"):
        train(evaluation_images=0)
    with pytest.raises(TypeError, match="model: expected scores 4×K"):
        train(nn.Sequential(nn.Conv2d(3, 2, 3)))
    with pytest.raises(ValueError, match="epsilon"):
        train(epsilon=8)


def test_what_is_no_image_in_the_unit_range_with_a_class_is_refused() -> None:
    x, y = images(8)
    settings = TrainingSettings(epochs=1, batch_size=4)
    for data, error, words in (
        (TensorDataset(2 * x - 1, y), ValueError, r"image 0 has pixels from -\S+ to \S+, expected"),
        (TensorDataset(x / 0, y), ValueError, "image 0 has pixels from"),
        (TensorDataset((255 * x).byte(), y), TypeError, r"got torch\.uint8"),
        (TensorDataset(x, y.float()), TypeError, "class number"),
        (TensorDataset(x), TypeError, "pairs"),
    ):
        with pytest.raises(error, match=words):
            adversarial_training(small_net(), data, settings)


@pytest.mark.parametrize("loss", [MadryLoss(), EnsembleLoss([small_net(1)]), standard_loss])
def test_labels_are_taken_as_whole_numbers_of_classes_that_there_are(loss: Any) -> None:
    x, y = images()
    network = trained_a_little().eval()
    value = loss(network, (x, y), 0)
    assert torch.equal(loss(network, (x, y.to(torch.uint8)), 0), value)
    for wrong in (-100, 77):  # before: a loss of NaN, and an IndexError
        with pytest.raises(
            ValueError, match=rf"labels: expected numbers from 0 to \d+, got {wrong}"
        ):
            loss(network, (x, torch.full_like(y, wrong)), 0)
    with pytest.raises(TypeError, match=r"labels: expected whole numbers, got torch\.float32"):
        loss(network, (x, y.float()), 0)


def test_the_inner_attack_takes_labels_of_any_whole_numbers() -> None:
    x, y = images()
    network = trained_a_little().eval()
    attack = InnerAttack()
    assert torch.equal(attack(network, x, y.to(torch.uint8), 0), attack(network, x, y, 0))


def test_a_network_that_detaches_is_named() -> None:
    class Detaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.detach())

    x, y = images()
    with pytest.raises(ValueError, match=r"Detaching\.forward breaks the graph itself"):
        MadryLoss()(Detaching(), (x, y), 0)


def test_any_loss_of_the_three_fits_the_loop() -> None:
    data = TensorDataset(*images(8))
    for loss in (standard_loss, MadryLoss(), EnsembleLoss([small_net(1)])):
        result = fit(small_net(), data, loss, TrainingSettings(epochs=1, batch_size=4))
        assert len(result.rows) == 2


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command in this process: exit code, what it printed, what it said on standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["captum-robust", "train", "robust", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 6) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.random.default_rng(i).integers(0, 90, (20, 20, 3), dtype=np.uint8)
            pixels[:, :, number] += 100
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


QUICK = ("--size", 16, "--epochs", 2, "--batch-size", 4, "--steps", 2, "--held-out", 0.34)


def test_the_command_trains_on_a_folder_and_its_model_loads_by_name(
    run: Run, tmp_path: Path
) -> None:
    root = folder(tmp_path / "images")
    (root / "dog" / "5.png").write_bytes(b"no image")
    code, out, err = run("--images", root, "--out", "run", "--epsilon", 4, *QUICK)
    assert code == 0, err
    assert "8 images to train on, 3 held out, 2 classes" in out
    assert "12 images: 1 could not be used" in err
    assert err.count("5.png") == 1
    assert "under PGD at 4/255" in out
    assert "--model small_resnet --weights run/model.safetensors" in out
    model = load_classifier("small_resnet", tmp_path / "run" / "model.safetensors")
    assert model.class_names == ["cat", "dog"]
    assert model.input_size == (16, 16)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 2)
    with safe_open(tmp_path / "run" / "checkpoint.safetensors", "pt") as checkpoint:
        assert checkpoint.metadata()["step"] == "4"
        kept = checkpoint.get_tensor("network.module.classifier.weight")
    assert torch.equal(kept, model.module.classifier.weight)
    # The same command again: nothing is left to do.
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    code, out, _ = run("--images", root, "--out", "run", "--epsilon", 4, *QUICK)
    assert code == 0
    assert "went on from step 4 of 4" in out
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_the_command_trains_against_models_that_were_trained_before(
    run: Run, tmp_path: Path
) -> None:
    root = folder(tmp_path / "images")
    code, _, err = run("--images", root, "--out", "a", "--method", "standard", *QUICK)
    assert code == 0, err
    static = ("--method", "ensemble", "--static", "small_resnet=a/model.safetensors")
    code, _, err = run("--images", root, "--out", "b", *static, *QUICK)
    assert code == 0, err
    # And goes on from weights that are given.
    weights = ("--weights", "a/model.safetensors")
    code, _, err = run("--images", root, "--out", "c", *weights, *QUICK)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--images", "nowhere"), "nowhere: no such folder"),
        (("--images", "one"), "at least two classes, found 1"),
        (("--images", "images", "--epsilon", 0), "epsilon: expected a number in (0, 255]"),
        (("--images", "images", "--epsilon", 256), "epsilon: expected a number in (0, 255]"),
        (("--images", "images", "--epsilon", "nan"), "epsilon"),
        (("--images", "images", "--out", "images/run"), "lies inside"),
        (("--images", "images", "--model", "small_resne"), "did you mean 'small_resnet'"),
        (("--images", "images", "--weights", "x.pth"), "no file x.pth"),
        (("--images", "images", "--weights", "images/cat/0.png"), "may be a pickle"),
        (("--images", "images", "--epsilon", "8/256"), "epsilon"),
        (("--images", "images", "--weights", "x.safetensors"), "no file x.safetensors"),
        (("--images", "images", "--weights", "DEFAULT"), "has no published ones"),
        (("--images", "images", "--method", "trades"), r"method: .*got 'trades'"),
        (("--images", "images", "--method", "ensemble"), "needs at least one"),
        (("--images", "images", "--static", "small_resnet=no.safetensors"), "no file"),
        (("--images", "images", "--kind", "coco"), r"kind of data set: .*got 'coco'"),
        (("--images", "images", "--classes", 3), "classes: expected a number from 2 to 2"),
        (("--images", "images", "--batch-size", 100), "--batch-size: 100, but there are"),
        (("--images", "images", "--held-out", 1), "--held-out: expected a number in [0, 1)"),
        (("--images", "images", "--steps", 0), "steps: expected a whole number from 1"),
        (("--images", "images", "--precision", "half"), r"precision: .*got 'half'"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    run: Run, tmp_path: Path, arguments: tuple[object, ...], word: str
) -> None:
    folder(tmp_path / "images")
    folder(tmp_path / "one", ("cat",))
    code, _, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("captum-robust")]
    assert code == 2
    assert len(lines) == 1, err
    assert all(part in lines[0] for part in word.split(".*"))
    assert "Traceback" not in err


def test_a_folder_of_another_run_is_refused_with_what_differs(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "images")
    assert run("--images", root, "--out", "run", "--epsilon", 4, *QUICK)[0] == 0
    code, _, err = run("--images", root, "--out", "run", "--epsilon", 8, *QUICK)
    assert code == 2
    assert "run holds another run" in err
    assert "epsilon" in err
    assert "attack" in err


def test_other_weights_in_a_file_of_the_same_name_are_another_run(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "images")
    start = tmp_path / "start.safetensors"
    plain = ("--images", root, "--method", "standard", *QUICK)
    model = load_classifier("small_resnet", None, class_names=["cat", "dog"], input_size=16)
    save_classifier(model, start)
    assert run(*plain, "--weights", start, "--out", "run")[0] == 0
    assert run(*plain, "--weights", start, "--out", "run")[0] == 0
    nn.init.ones_(model.module.classifier.weight)
    save_classifier(model, start)
    code, _, err = run(*plain, "--weights", start, "--out", "run")
    assert code == 2
    assert "run holds another run (weights_crc32" in err


def test_without_accelerate_the_error_names_the_pip_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "images")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    code, _, err = run("--images", root, *QUICK)
    assert code == 2
    assert 'pip install "captum-robust[train]"' in err


def test_importing_the_defences_does_not_import_accelerate() -> None:
    code = (
        "import sys, captum_robust.defenses, captum_robust.cli; print('accelerate' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
