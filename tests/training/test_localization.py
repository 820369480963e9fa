from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from captum_robust.nn import CorruptionNetwork, LocalizationNetwork, SimpleConvNet, removal_loss
from captum_robust.training import (
    AreaPenalty,
    Augmented,
    CollapseWatch,
    LocalizationEvaluation,
    SegmentedImages,
    TrainingSettings,
    clean_training,
    localization_training,
)
from captum_robust.training import localization as module
from captum_robust.training.localization_evaluation import total_variation
from tests.networks import Called, ChannelMeans

SIDE = 16
NEVER = CollapseWatch(0.0, 1.0)


def paper(*values: float) -> AreaPenalty:
    """λ times the mean of the mask, whatever becomes of it."""
    return AreaPenalty(*values, target=None, power=1.0)


def squares(n: int = 24) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """A square of one of three colours, a quarter of the image, at a drawn corner, on grey.

    Images, their super-pixels (16 squares of four pixels a side), classes, boxes.
    """
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.05 * torch.rand(n, 3, SIDE, SIDE, generator=generator)
    labels = torch.arange(n) % 3
    half, boxes = SIDE // 2, []
    for i in range(n):
        top, left = (half * torch.randint(0, 2, (2,), generator=generator)).tolist()
        images[i, :, top : top + half, left : left + half] = 0.1
        images[i, labels[i], top : top + half, left : left + half] = 0.9
        boxes.append(torch.tensor([[left, top, left + half, top + half]]).float())
    cell = torch.arange(SIDE) // 4
    segments = (4 * cell[:, None] + cell).expand(n, SIDE, SIDE)
    return images, segments, labels, boxes


def data(n: int = 24) -> TensorDataset:
    return TensorDataset(*squares(n)[:3])


def networks(seed: int = 0) -> LocalizationNetwork:
    """A corruption network that is not at its start, and a classifier of three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        corruption = CorruptionNetwork(width=2, input_size=(SIDE, SIDE))
        classifier = SimpleConvNet(3, width=2)
        nn.init.normal_(corruption.logits.weight, std=0.5)
    return LocalizationNetwork(corruption, classifier, fill=0.5)


def settings(**changes: Any) -> TrainingSettings:
    given = {
        "epochs": 4,
        "batch_size": 6,
        "learning_rate": 3e-3,
        "checkpoint_every": 0.0,
        "device": "cpu",
    }
    return TrainingSettings(**{**given, **changes})


def opponents(network: LocalizationNetwork, **changes: Any) -> module._Opponents:
    layers = changes.pop("layers", [network.classifier])
    given: dict[str, Any] = {"area": paper(3.0, 3.0), "watch": NEVER, "clean_share": 0.5}
    rules = module._Rules(**{**given, **changes})
    return module._Opponents(network, layers, rules, steps=100, seed=0)


@pytest.mark.parametrize("form", ["bounded", "squared", "literal"])
def test_each_network_gets_the_gradient_of_its_own_loss_alone(form: str) -> None:
    network = networks().train().double()
    images, segments, labels, _ = squares()
    images = images.double()
    other = copy.deepcopy(network)  # the pass moves the averages of batch norm
    both = opponents(other, form=form, clean_share=0.0).train()
    both(images, labels, segments, seed=7)["loss"].backward()
    found = [p.grad for p in other.parameters()]

    mask, _ = network.sample(images, segments, torch.Generator().manual_seed(7))
    removed = network.remove(images, mask)
    shown = F.cross_entropy(network.classifier(removed.detach()), labels)
    of_classifier = torch.autograd.grad(shown, list(network.classifier.parameters()))
    network.classifier.eval()
    of_scores = removal_loss(network.classifier(removed), labels, form).mean()
    wanted = torch.autograd.grad(
        of_scores + 3.0 * mask.mean(), list(network.corruption.parameters())
    )
    wanted += of_classifier
    for gradient, expected in zip(found, wanted, strict=True):
        assert gradient is not None
        # The losses are of scores in float32.
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_the_share_of_clean_images_is_what_was_asked_for() -> None:
    network = networks()
    images, segments, labels, _ = squares()
    seen: list[Tensor] = []
    network.classifier.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for share, expected in ((0.0, 0), (1.0, len(images))):
        both = opponents(network, clean_share=share).train()
        both(images, labels, segments, seed=1)
        same = (seen[-2] == images).flatten(1).all(dim=1)
        assert int(same.sum()) == expected


def test_the_corruption_network_rests_in_the_classifiers_further_steps() -> None:
    network = networks()
    images, segments, labels, _ = squares()
    both = opponents(network, steps_of_classifier=3).train()
    trained = []
    for step in range(6):
        network.zero_grad()
        both(images, labels, segments, seed=step)["loss"].backward()
        trained.append(network.corruption.logits.weight.grad is not None)
        assert network.classifier.classifier.weight.grad is not None
    assert trained == [True, False, False, True, False, False]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, None])
def test_only_the_layers_that_were_asked_for_are_trained(count: int | None) -> None:
    network = networks()
    network.classifier.block1[0].weight.requires_grad = count is None  # the caller's own choice
    before = {n: t.clone() for n, t in network.classifier.state_dict().items()}
    asking = {n: p.requires_grad for n, p in network.classifier.named_parameters()}
    localization_training(network, data(), settings(epochs=2), trainable_layers=count)
    after = network.classifier.state_dict()
    changed = {n.split(".")[0] for n, t in after.items() if not torch.equal(t, before[n])}
    names = ["block1", "block2", "block3", "block4"]
    expected = (
        set() if count == 0 else {*names[4 - (4 if count is None else count) :], "classifier"}
    )
    assert changed == expected
    assert {n: p.requires_grad for n, p in network.classifier.named_parameters()} == asking


def test_the_mask_finds_what_a_classifier_that_stands_still_looks_at() -> None:
    """The colour is all that tells the classes apart; the background need not be removed."""

    network = networks()
    network.classifier = Called(lambda x: 40 * (x - 0.5).relu().mean(dim=(2, 3)))
    images, segments, labels, boxes = squares(48)
    dataset = TensorDataset(images, segments, labels)
    evaluation = LocalizationEvaluation(network, dataset, boxes)
    result = localization_training(
        network,
        dataset,
        settings(epochs=40, batch_size=16, learning_rate=1e-2, seed=1),
        area=paper(2.0, 2.0),
        trainable_layers=0,
        validation=evaluation,
    )
    last = result.evaluations[-1]
    assert last["box_accuracy"] > 0.9  # a quarter of the image: the whole image gives 0
    assert 0.15 < last["mask"] < 0.4
    assert last["masked_accuracy"] < 0.6 < last["clean_accuracy"]


def test_the_classifier_learns_what_is_left() -> None:
    network = networks()
    result = localization_training(
        network, data(48), settings(epochs=40, batch_size=16, learning_rate=1e-2), clean_share=1.0
    )
    losses = [row["cross_entropy"] for row in result.rows]
    assert sum(losses[-6:]) < 0.3 * sum(losses[:6])


class Stop(Exception):
    pass


def run(network: LocalizationNetwork, out: Path | None, stop: int | None = None, **o: Any) -> Any:
    """Masks that are off from the start, so that a restart lies within the run."""
    nn.init.constant_(network.corruption.logits.bias, -9.0)
    calls = 0

    def evaluate(self: LocalizationEvaluation, _: nn.Module) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if stop is not None and calls > stop:
            raise Stop
        return {"mask": 0.0}

    original = LocalizationEvaluation.__call__
    LocalizationEvaluation.__call__ = evaluate  # type: ignore[method-assign,assignment]
    try:
        return localization_training(
            network,
            Augmented(data(36)),  # type: ignore[arg-type]
            settings(epochs=6, evaluate_every=5),
            watch=CollapseWatch(steps=10),
            validation=LocalizationEvaluation(network, data(4)),
            out=out,
            **o,
        )
    finally:
        LocalizationEvaluation.__call__ = original  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:step")
@pytest.mark.parametrize("options", [{}, {"superpixels": False, "steps_of_classifier": 2}])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_stopped_run_ends_with_the_weights_and_the_log_of_a_whole_one(
    tmp_path: Path, stop: int, options: dict[str, Any]
) -> None:
    whole, resumed = networks(), networks(seed=3)
    expected = run(whole, None, **options)
    assert expected.rows[-2]["restarts"] >= 1
    with pytest.raises(Stop):
        run(networks(), tmp_path, stop, **options)
    result = run(resumed, tmp_path, **options)
    assert result.rows == expected.rows
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {root!r})
from tests.training.test_localization import data, networks, settings
from captum_robust.training import localization_training
from captum_robust.training import localization as module

torch.set_num_threads(1)
loss = module._loss
def slow(*arguments):
    time.sleep(0.02)
    return loss(*arguments)
module._loss = slow
localization_training(networks(), data(36), settings(epochs=10), out={out!r}, **{options})
"""


def script(folder: Path, **options: Any) -> str:
    """A program that trains in the folder's ``run``."""
    root, out = str(Path(__file__).parents[2]), str(folder / "run")
    file = folder / "script.py"
    file.write_text(SCRIPT.format(root=root, out=out, options=options))
    return str(file)


def test_a_run_that_is_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole, resumed = networks(), networks(seed=3)
    localization_training(whole, data(36), settings(epochs=10))
    process = subprocess.Popen([sys.executable, script(tmp_path)])
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 200
    while not (log.is_file() and log.read_text().count("\n") >= 15):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = localization_training(resumed, data(36), settings(epochs=10), out=tmp_path / "run")
    torch.set_num_threads(threads)
    assert 0 < result.resumed_from < result.steps
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_two_processes_share_the_batches_also_where_one_network_rests(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", script(tmp_path, steps_of_classifier=2)]
    subprocess.run(command, env=environment, timeout=300, check=True, capture_output=True)
    rows = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"]


@pytest.mark.parametrize(("bias", "word", "factor"), [(-12.0, "nothing", 0.5), (12.0, "all", 2.0)])
def test_masks_that_collapse_are_told_of_and_recover(bias: float, word: str, factor: float) -> None:
    network = networks()
    nn.init.constant_(network.corruption.logits.bias, bias)
    with pytest.warns(RuntimeWarning, match=rf"step 20: the masks removed {word} .* for 20 steps"):
        result = localization_training(
            network, data(), settings(epochs=6), area=paper(3.0, 3.0),
            watch=CollapseWatch(steps=20),
        )  # fmt: skip
    rows = result.rows
    assert [row["restarts"] for row in rows] == [0.0] * 20 + [1.0] * 4
    assert [row["area_weight"] for row in rows] == [3.0] * 20 + [3.0 * factor] * 4
    assert 0.2 < rows[-1]["area"] < 0.8


def test_masks_that_do_not_collapse_start_nothing_anew() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = localization_training(
            networks(), data(), settings(epochs=6), watch=CollapseWatch(steps=10)
        )
    assert result.rows[-1]["restarts"] == 0


def test_the_weight_of_the_area_rises_and_stays() -> None:
    result = localization_training(
        networks(), data(), settings(epochs=5), area=paper(6.0, 2.0, 0.5)
    )
    weights = [row["area_weight"] for row in result.rows]
    assert weights[0] == 2.0
    assert weights[5] == pytest.approx(4.0)
    assert weights[10:] == [6.0] * 10
    assert [paper(6.0).at(step, 20) for step in (0, 5, 19)] == [6.0] * 3


def test_the_weight_of_the_area_follows_a_target() -> None:
    # Ten steps in which the masks cover 1 and then 0: λ·exp(10·gain·(mean - target)) each time.
    network = networks()
    penalty = AreaPenalty(2.0, 2.0, target=0.25, gain=0.1, power=1.0)
    asked = opponents(network, area=penalty).train()
    images, segments, labels, _ = squares()
    for bias, expected in ((50.0, 2.0 * math.exp(0.75)), (-50.0, 2.0 * math.exp(0.75 - 0.25))):
        with torch.no_grad():
            network.corruption.logits.weight.zero_()
            network.corruption.logits.bias.fill_(bias)  # type: ignore[union-attr]
        for seed in range(10):
            asked(images, labels, segments, seed)
        weight = asked(images, labels, segments, 0)["area_weight"]
        asked.area_sum = None
        asked.step -= 1
        assert float(weight) == pytest.approx(expected, rel=1e-5)


def test_the_cost_of_the_area_is_the_power_of_each_images_share() -> None:
    # All of one image is removed and nothing of the other: (1 + 0) / 2 for every power; half of
    # each: 1/2 to the power. The classifier gives all classes the same, so nothing else is left.
    network = networks()
    nn.init.zeros_(network.classifier.classifier.weight)
    nn.init.zeros_(network.classifier.classifier.bias)
    images, segments, labels, _ = squares(2)
    for power, expected in ((1.0, 2.0 * 0.5), (3.0, 2.0 * 0.125)):
        asked = opponents(network, layers=[], area=AreaPenalty(2.0, 2.0, target=None, power=power))
        all_of_one, half_of_each = torch.zeros(2, 2, 1, SIDE, SIDE)
        all_of_one[0] = 1
        half_of_each[..., : SIDE // 2] = 1
        for shares, cost in ((half_of_each, expected), (all_of_one, 1.0)):
            asked.network.sample = lambda *_, m=shares, **__: (m, m)  # type: ignore[method-assign]
            found = asked(images, labels, segments, 0)
            assert float(found["loss"]) == pytest.approx(cost, abs=1e-6)


def test_the_masks_come_near_the_area_that_is_aimed_at() -> None:
    areas = {}
    for target in (0.1, 0.3):
        result = localization_training(
            networks(),
            data(),
            settings(epochs=30),
            area=AreaPenalty(2.0, 2.0, target=target, gain=0.2, power=1.0),
        )
        areas[target] = sum(row["area"] for row in result.rows[-12:]) / 12
    assert areas == pytest.approx({0.1: 0.1, 0.3: 0.3}, abs=0.12)
    assert areas[0.3] > areas[0.1] + 0.1


class Fixed(CorruptionNetwork):
    """Finds what is not grey."""

    def forward(self, x: Tensor) -> Tensor:
        return 100 * ((x - 0.425).abs().amax(dim=1, keepdim=True) - 0.15)


def test_the_evaluation_says_what_hand_counting_says() -> None:
    images, segments, labels, boxes = squares(12)
    labels = labels.clone()
    labels[:3] = (labels[:3] + 1) % 3  # three that the classifier gets wrong
    boxes[:4] = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])] * 4  # four that the mask misses
    network = LocalizationNetwork(Fixed(width=2), ChannelMeans(), fill=0.5)
    dataset = TensorDataset(images, segments, labels)
    found = LocalizationEvaluation(network, dataset, boxes, batch_size=5)()
    assert found["clean_accuracy"] == pytest.approx(9 / 12)
    assert found["box_accuracy"] == pytest.approx(8 / 12)
    assert found["box_and_class_accuracy"] == pytest.approx(
        8 / 12
    )  # the three wrong ones are missed as well
    assert found["mask"] == pytest.approx(0.25, abs=0.02)
    # A square of 8 in a corner has two sides of 8 within the image, of 256 pixels.
    assert found["total_variation"] == pytest.approx(16 / 256, rel=0.05)
    # What is left is grey and noise.
    assert found["masked_accuracy"] < found["clean_accuracy"]


def test_images_without_a_box_are_not_scored() -> None:
    images, segments, labels, boxes = squares(12)
    network = LocalizationNetwork(Fixed(width=2), ChannelMeans(), fill=0.5)
    boxes[1::2] = [torch.zeros(0, 4)] * 6
    boxes[0] = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    found = LocalizationEvaluation(network, TensorDataset(images, segments, labels), boxes)()
    assert found["box_accuracy"] == found["box_and_class_accuracy"] == pytest.approx(5 / 6)


def test_clean_training_teaches_the_classes(tmp_path: Path) -> None:
    classifier = networks().classifier
    images, _, labels, _ = squares(48)
    pairs = TensorDataset(images, labels)
    given = settings(epochs=30, batch_size=16, learning_rate=1e-2)
    result = clean_training(classifier, pairs, given, held_out=pairs, out=tmp_path)
    accuracies = [row["clean_accuracy"] for row in result.evaluations]
    assert accuracies[0] < 0.6
    assert accuracies[-1] > 0.95
    again = networks(seed=2).classifier
    assert clean_training(again, pairs, given, held_out=pairs, out=tmp_path).resumed_from == 90
    assert torch.equal(again.classifier.weight, classifier.classifier.weight)


def test_clean_training_names_what_is_wrong() -> None:
    images, _, labels, _ = squares()
    with pytest.raises(TypeError, match="classifier: expected a torch"):
        clean_training(3, TensorDataset(images, labels))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has class 3, but there are 3 classes"):
        clean_training(
            networks().classifier, TensorDataset(images, torch.full_like(labels, 3)), settings()
        )
    with pytest.raises(ValueError, match="has class 2, but there are 2 classes"):
        clean_training(SimpleConvNet(1, width=2), TensorDataset(images, labels), settings())
    with pytest.raises(TypeError, match=r"expected scores N×K, got \(1, 3, 16, 16\)"):
        clean_training(nn.Conv2d(3, 3, 1), TensorDataset(images, labels), settings())
    with pytest.raises(ValueError, match="batch_size: 30, but there are 24"):
        clean_training(ChannelMeans(), TensorDataset(images, labels), settings(batch_size=30))


def test_without_boxes_it_says_that_it_cannot_score() -> None:
    network = networks()
    with_none = LocalizationEvaluation(network, data(4), [torch.zeros(0, 4)] * 4)
    for evaluation in (LocalizationEvaluation(network, data(4)), with_none):
        assert not evaluation.can_score
        assert set(evaluation()) == {
            "mask", "total_variation", "clean_accuracy", "masked_accuracy"
        }  # fmt: skip
    assert network.training


def test_total_variation_counts_each_edge_once() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, 1:3] = 1.0
    assert total_variation(mask).tolist() == [8 / 16]
    with pytest.raises(ValueError, match=r"masks: expected N×1×H×W, got 4×4"):
        total_variation(mask[0, 0])


def test_segments_move_with_the_augmented_image() -> None:
    images, segments, labels, _ = squares(4)
    as_image = segments[:, None].expand(-1, 3, -1, -1).float() / 15
    augmented = Augmented(SegmentedImages(TensorDataset(as_image, labels), segments))  # type: ignore[arg-type]
    for i in range(8):
        torch.manual_seed(i)
        image, moved, label = augmented[i % 4]
        assert moved.dtype == torch.int64
        assert torch.equal((image[0] * 15).round().long(), moved)
        assert int(label) == i % 4 % 3
    assert len(images) == len(augmented)


def test_segments_of_other_images_are_refused() -> None:
    images, segments, labels, _ = squares(4)
    with pytest.raises(ValueError, match=r"segments: expected 4×H×W.* got \(3, 16, 16\)"):
        SegmentedImages(TensorDataset(images, labels), segments[:3])  # type: ignore[arg-type]


def test_modes_and_random_state_are_left_as_they_were() -> None:
    network = networks().eval()
    network.corruption.train()
    state = torch.get_rng_state()
    localization_training(network, data(), settings(epochs=1), trainable_layers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.corruption.training
    assert not network.classifier.training
    assert not any(m.training for m in network.classifier.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "bound"}, r"form: .*got 'bound'; did you mean 'bounded'"),
        ({"clean_share": 1.5}, r"clean_share: expected a number in \[0, 1\]"),
        ({"steps_of_classifier": 0}, "steps_of_classifier: expected a whole number from 1"),
        ({"trainable_layers": 5}, "the classifier has 4 layers, got 5"),
        ({"trainable_layers": -1}, "trainable_layers: expected a whole number from 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        localization_training(networks(), data(), settings(epochs=1), **options)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (AreaPenalty, {"weight": -1.0}, "weight: expected a number from 0"),
        (AreaPenalty, {"start": math.inf}, "start: expected"),
        (AreaPenalty, {"rise": 2.0}, r"rise: expected a number in \[0, 1\]"),
        (AreaPenalty, {"power": 0.5}, "power: expected a number from 1"),
        (AreaPenalty, {"target": 1.0}, r"target: expected a number in \(0, 1\)"),
        (AreaPenalty, {"gain": -1.0}, "gain: expected a number from 0"),
        (CollapseWatch, {"low": 0.9, "high": 0.1}, "low and high"),
        (CollapseWatch, {"steps": 0}, "steps: expected"),
        (CollapseWatch, {"factor": 1.0}, "factor: expected"),
    ],
)
def test_wrong_settings_are_named(kind: Any, values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_a_network_or_data_set_that_is_none_is_refused() -> None:
    images, segments, labels, _ = squares()
    with pytest.raises(TypeError, match="network: expected a LocalizationNetwork, got Sequential"):
        localization_training(nn.Sequential(), data())  # type: ignore[arg-type]
    pairs = TensorDataset(images, labels)
    with pytest.raises(ValueError, match="superpixels: the data set has no segments"):
        localization_training(networks(), pairs, settings())
    with pytest.raises(TypeError, match="dataset: expected items"):
        localization_training(networks(), TensorDataset(images), settings())
    for label in (3, -1):
        bad = TensorDataset(images, segments, torch.full_like(labels, label))
        with pytest.raises(ValueError, match=f"has class {label}, but there are 3 classes"):
            localization_training(networks(), bad, settings())
    one = LocalizationNetwork(CorruptionNetwork(width=2), SimpleConvNet(1, width=2))
    with pytest.raises(ValueError, match="has class 2, but there are 2 classes"):
        localization_training(one, data(), settings())
    with pytest.raises(ValueError, match="does not name its layers"):
        localization_training(
            LocalizationNetwork(Fixed(width=2), ChannelMeans()),
            data(),
            settings(),
            trainable_layers=2,
        )
    with pytest.raises(ValueError, match="boxes: expected those of 24 images, got 1"):
        LocalizationEvaluation(networks(), data(), [torch.zeros(1, 4)])


def test_a_classifier_that_normalises_in_place_leaves_the_images_as_they_are() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mul_(2).sub_(1).mean(dim=(2, 3)))

    images, _, labels, _ = squares()
    before = images.clone()
    dataset = TensorDataset(images, labels)  # its images are views of the tensor
    clean_training(InPlace(), dataset, settings(epochs=1))
    assert torch.equal(images, before)
