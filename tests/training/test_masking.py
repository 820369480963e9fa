from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.utils import save_image

from captum_robust.data import load_dataset
from captum_robust.metrics.functional import saliency_metric
from captum_robust.nn import (
    CodeObjective,
    EvidenceRemoval,
    MaskingNetwork,
    PaperObjective,
    blend,
    upsampled,
)
from captum_robust.training import (
    CroppedImages,
    LabelledImages,
    MaskingEvaluation,
    MaskingLoss,
    TrainingSettings,
    Unlabelled,
    masking_training,
    warm_up,
)

SIDE = 16


class Colors(nn.Module):
    """Its classes are the colours of a square; by hand, so that it is right on every image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for module in (self.stem[0], self.deep[0], self.head):
                module.weight.zero_()
                module.bias.zero_()
            for c in range(3):
                others = [o for o in range(3) if o != c]
                self.stem[0].weight[c, c] = 2.0
                self.stem[0].weight[c, others] = -1.0
                self.deep[0].weight[c, c] = 1.0
                self.head.weight[c, c] = 40.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.stem(x)).mean(dim=(2, 3)))


def squares(n: int = 24) -> TensorDataset:
    """A square of one of three colours, a quarter of the image, at a drawn corner, on grey."""
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.05 * torch.rand(n, 3, SIDE, SIDE, generator=generator)
    labels = torch.arange(n) % 3
    for i in range(n):
        top, left = (SIDE // 2 * torch.randint(0, 2, (2,), generator=generator)).tolist()
        images[i, :, top : top + SIDE // 2, left : left + SIDE // 2] = 0.1
        images[i, labels[i], top : top + SIDE // 2, left : left + SIDE // 2] = 0.9
    return TensorDataset(images, labels)


def network(seed: int = 0, model: nn.Module | None = None, **options: Any) -> MaskingNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskingNetwork(
            Colors() if model is None else model, input_size=(SIDE, SIDE), **options
        )


def settings(**changes: Any) -> TrainingSettings:
    given = {
        "epochs": 10,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "checkpoint_every": 0.0,
        "device": "cpu",
    }
    return TrainingSettings(**{**given, **changes})


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    images, labels = squares(n).tensors
    return images, labels


def test_the_loss_is_the_objective_of_what_the_black_box_sees() -> None:
    net = network()
    objective = PaperObjective()
    removal = EvidenceRemoval("blur", sigma=60.0)  # nothing is drawn
    loss = MaskingLoss(net, net.encoder, objective, removal, 0.0, image_noise=0.0)
    images, labels = batch()
    net.eval()
    masks = net(images, labels)
    removed = removal.blurred(images)
    kept = net.encoder(blend(images, masks, removed))
    destroyed = net.encoder(blend(images, 1 - masks, removed))
    terms = objective(masks, kept, destroyed, labels)
    found = loss(net.decoder, (images, labels), seed=0)
    torch.testing.assert_close(found["loss"], terms["total"].mean())
    for name in ("area", "kept", "destroyed", "total_variation"):
        torch.testing.assert_close(found[name], terms[name].mean())


def test_an_unknown_class_is_what_the_black_box_sees() -> None:
    net = network().eval()
    loss = MaskingLoss(net, net.encoder, fake_probability=0.0)
    images, labels = batch()
    known = loss(net.decoder, (images, labels), 0)["loss"]
    torch.testing.assert_close(
        loss(net.decoder, (images, -torch.ones_like(labels)), 0)["loss"], known
    )
    other_box = MaskingLoss(net, Colors(), fake_probability=0.0)
    torch.testing.assert_close(
        other_box(net.decoder, (images, -torch.ones_like(labels)), 0)["loss"], known
    )


def test_for_fakes_of_the_paper_only_the_mask_counts_and_the_black_box_is_not_asked() -> None:
    net = network().eval()
    black_box = Colors()
    seen: list[int] = []
    black_box.register_forward_hook(lambda m, a, o: seen.append(len(o)))
    loss = MaskingLoss(net, black_box, fake_probability=0.99, image_noise=0.0)
    images, labels = batch(24)
    found = loss(net.decoder, (images, labels), seed=3)
    assert seen[0] < 2 * 24 / 4  # two images of each that is no fake
    assert torch.isfinite(found["loss"])
    assert found["mask_of_a_fake"] > 0


def test_for_fakes_of_the_code_the_roles_are_swapped() -> None:
    net = network().eval()
    images, labels = batch(1)
    removal = EvidenceRemoval("blur", sigma=60.0)
    loss = MaskingLoss(
        net, net.encoder, CodeObjective(), removal, 0.999, fakes="swapped", image_noise=0.0
    )
    found = loss(net.decoder, (images, labels), seed=0)["loss"]
    features, _ = net.encode(images)
    candidates = []
    for asked in {0, 1, 2} - {int(labels[0])}:
        masks = upsampled(net.decoder(features, torch.tensor([asked])), (SIDE, SIDE))
        removed = removal.blurred(images)
        kept = net.encoder(blend(images, masks, removed))
        destroyed = net.encoder(blend(images, 1 - masks, removed))
        candidates.append(CodeObjective()(masks, destroyed, kept, labels)["total"][0])
    assert any(torch.isclose(found, c) for c in candidates)


def test_the_crop_counts_what_the_saliency_metric_says_of_it() -> None:
    net, (images, labels) = network(), batch()

    def sharp(*_: object) -> Tensor:
        masks = torch.zeros(len(images), 1, SIDE, SIDE)
        masks[:, :, 4:12, 2:14] = 1
        return masks

    options = {"fake_probability": 0.0, "image_noise": 0.0}
    removal = EvidenceRemoval("color")
    with_crop = MaskingLoss(net, net.encoder, removal=removal, crop=3.0, **options)
    named = with_crop(sharp, (images, labels), seed=0)
    without = MaskingLoss(net, net.encoder, removal=removal, **options)
    boxes = torch.tensor([2, 4, 14, 12.0]).expand(len(images), 4)
    expected = 3 * saliency_metric(net.encoder, images, boxes, labels).metric.mean()
    assert named["crop"].item() == pytest.approx(expected.item(), abs=1e-3)
    rest = without(sharp, (images, labels), seed=0)
    assert (named["loss"] - rest["loss"]).item() == pytest.approx(named["crop"].item(), abs=1e-4)
    assert "crop" not in rest


def test_training_with_the_crop_makes_it_better() -> None:
    images = squares()
    results = []
    for crop in (0.0, 10.0):
        net = network()
        masking_training(net, images, settings(epochs=30), warm_up_steps=50, crop=crop)
        results.append(MaskingEvaluation(net, net.encoder, images)(net.decoder)["saliency_metric"])
    assert results[1] < results[0]


def test_what_is_drawn_depends_on_the_seed_only() -> None:
    net = network().eval()
    loss = MaskingLoss(net, net.encoder)
    images, labels = batch()
    before = torch.random.get_rng_state()
    first = loss(net.decoder, (images, labels), 5)["loss"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(loss(net.decoder, (images, labels), 5)["loss"], first)
    assert not torch.equal(loss(net.decoder, (images, labels), 6)["loss"], first)


def test_only_the_decoder_gets_gradients() -> None:
    net = network()
    loss = MaskingLoss(net, net.encoder)
    value = loss(net.decoder, batch(), 0)["loss"]
    value.backward()
    assert all(p.grad is not None for p in net.decoder.parameters())


@pytest.mark.parametrize("learned", [False, True], ids=["head", "learned"])
def test_the_warm_up_teaches_which_class_is_there(learned: bool) -> None:
    net = network(learned_classes=learned)
    images, labels = squares().tensors
    weights = [p.clone() for p in net.decoder.blocks.parameters()]
    last = warm_up(net, squares(), steps=300)
    assert last < 0.1  # of .69 for a guess
    odds = torch.stack(
        [
            net.decoder.evidence(
                net.encode(images)[0][-1].mean(dim=(2, 3), keepdim=True), torch.full_like(labels, c)
            )[:, 0, 0]
            for c in range(3)
        ],
        dim=1,
    )
    assert (odds.argmax(dim=1) == labels).all()
    assert all(
        torch.equal(a, b) for a, b in zip(weights, net.decoder.blocks.parameters(), strict=True)
    )


def test_a_trained_mask_is_where_the_class_is_and_nowhere_for_another() -> None:
    net = network()
    masking_training(net, squares(48), settings(epochs=40), fake_probability=0.3)
    images, labels = squares(12).tensors
    net.eval()
    with torch.no_grad():
        masks, others = net(images, labels), net(images, (labels + 1) % 3)
    square = (images.amax(dim=1, keepdim=True) > 0.8).float()
    inside = (masks * square).sum() / square.sum()
    outside = (masks * (1 - square)).sum() / (1 - square).sum()
    assert inside > outside + 0.3
    assert others.mean() < masks.mean() / 2


def test_the_evaluation_says_what_the_metric_says() -> None:
    net = network().eval()
    images, labels = squares(6).tensors
    found = MaskingEvaluation(net, net.encoder, squares(6), batch_size=4)(net.decoder)
    with torch.no_grad():
        masks = net(images, labels)[:, 0]
    total = 0.0
    for image, mask, label in zip(images, masks, labels, strict=True):
        rows, columns = (mask > 0.5).nonzero(as_tuple=True)
        y0, y1, x0, x1 = 0, SIDE, 0, SIDE
        if len(rows):
            y0, y1, x0, x1 = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        crop = F.interpolate(
            image[None, :, y0:y1, x0:x1], (SIDE, SIDE), mode="bilinear", antialias=True
        )
        probability = net.encoder(crop).detach().softmax(dim=1)[0, label]
        area = float((y1 - y0) * (x1 - x0)) / SIDE**2
        total += float(torch.tensor(max(area, 0.05)).log() - probability.log())
    assert found["saliency_metric"] == pytest.approx(total / 6, abs=1e-4)
    assert found["mask"] == pytest.approx(float(masks.mean()), abs=1e-5)


def test_a_run_that_is_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = network()
    masking_training(whole, squares(), settings(epochs=8), validation=squares(6))

    class Stop(Exception):
        pass

    def stopping(row: Any) -> None:
        if row[-1]["step"] >= 15 and "loss" not in row[-1]:
            raise Stop

    from captum_robust.training import masking

    halves = network()
    original = masking.board
    masking.board = lambda *_: nullcontext(stopping)  # type: ignore[assignment]
    try:
        with pytest.raises(Stop):
            masking_training(
                halves,
                squares(),
                settings(epochs=8),
                validation=squares(6),
                out=tmp_path,
                tensorboard=True,
            )
    finally:
        masking.board = original
    again = network(seed=1)  # the checkpoint replaces its weights
    result = masking_training(
        again, squares(), settings(epochs=8), validation=squares(6), out=tmp_path
    )
    assert result.resumed_from > 0
    for name, value in whole.decoder.state_dict().items():
        assert torch.equal(value, again.decoder.state_dict()[name]), name


def test_the_best_weights_are_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    net = network()
    result = masking_training(
        net,
        squares(),
        settings(epochs=30, learning_rate=3e-2),
        validation=squares(6),
        patience=2,
        out=tmp_path,
    )
    scored = [row["saliency_metric"] for row in result.evaluations]
    of_training = scored[1:]
    assert len(of_training) - 1 - of_training.index(min(of_training)) == 2
    found = MaskingEvaluation(net.eval(), net.encoder, squares(6))(net.decoder)
    assert found["saliency_metric"] == pytest.approx(min(scored), abs=1e-6)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    again = masking_training(
        network(),
        squares(),
        settings(epochs=30, learning_rate=3e-2),
        validation=squares(6),
        patience=2,
        out=tmp_path,
    )
    assert [row["step"] for row in again.rows] == steps  # it has ended, and stays so


def test_encoder_and_black_box_are_left_as_they_were() -> None:
    net = network()
    net.encoder.train()
    black_box = Colors()
    black_box.head.weight.requires_grad = False
    before = {n: t.clone() for n, t in net.encoder.state_dict().items()}
    masking_training(net, squares(), settings(epochs=1), model=black_box)
    assert all(torch.equal(t, before[n]) for n, t in net.encoder.state_dict().items())
    assert net.encoder.training
    assert all(p.requires_grad for p in net.encoder.parameters())
    assert not black_box.head.weight.requires_grad
    assert black_box.stem[0].weight.requires_grad
    assert all(p.grad is None for p in black_box.parameters())
    assert not any(m._forward_hooks for m in net.encoder.modules())


def test_losses_and_masks_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    masking_training(
        network(),
        squares(),
        settings(epochs=2),
        validation=squares(6),
        out=tmp_path,
        tensorboard=True,
    )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"training/loss", "training/area", "validation/saliency_metric"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("training/loss")] == [1, 2, 3, 4, 5, 6]
    assert "masks/0" in events.Tags()["images"]


def test_a_loss_that_is_no_number_stops_and_says_the_step(tmp_path: Path) -> None:
    images, labels = squares().tensors
    net = network()
    masking_training(net, squares(), settings(epochs=1), out=tmp_path / "good")
    broken = TensorDataset(images.clone(), labels)
    broken.tensors[0][5] = float("nan")
    with pytest.raises(ValueError, match="loss: nan in step"):
        masking_training(
            network(), broken, settings(epochs=2), warm_up_steps=0, out=tmp_path / "run"
        )
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fake_probability": 1.0}, "fake_probability"),
        ({"fakes": "none"}, "fakes: expected one of"),
        ({"image_noise": -1.0}, "image_noise"),
        ({"patience": 2}, "validation"),
        ({"tensorboard": True}, "out="),
        ({"warm_up_steps": -1}, "warm_up_steps"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masking_training(network(), squares(), settings(epochs=1), **options)


def test_a_warm_up_that_gives_no_number_stops() -> None:
    images, labels = squares(8).tensors
    broken = TensorDataset(images * float("nan"), labels)
    with pytest.raises(ValueError, match="warm-up: the loss is nan"):
        masking_training(network(), broken, settings(epochs=1))


def of_classes(count: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, count))


@pytest.mark.parametrize("count", [2, 4])
def test_a_black_box_of_other_classes_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"model: expected scores 1×3 .* got \(1, {count}\)"):
        masking_training(network(), squares(), settings(epochs=1), model=of_classes(count))


class Squares(Dataset[Any]):
    """A data set of the user's own, the last of its images with another label."""

    def __init__(self, last: int) -> None:
        self.images = squares(20)
        self.last = last

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return image, self.last if index == len(self) - 1 else int(label)


@pytest.mark.parametrize("warm_up_steps", [0, 5])
def test_a_label_that_is_no_class_is_refused(warm_up_steps: int) -> None:
    with pytest.raises(ValueError, match="has class 3, but there are 3 classes"):
        masking_training(
            network(), Squares(last=3), settings(epochs=1), warm_up_steps=warm_up_steps
        )
    masking_training(network(), Squares(last=-1), settings(epochs=1), warm_up_steps=warm_up_steps)


def test_labels_that_are_known_are_checked_before_an_image_is_read(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        for i in range(4):
            save_image(torch.rand(3, SIDE, SIDE), tmp_path / name / f"{i}.png")
    found = load_dataset("folder", tmp_path, labels="sorted")
    net = network()
    net.encoder.forward = lambda x: pytest.fail("an image was read")  # type: ignore[assignment]
    tensors = TensorDataset(squares(8).tensors[0], torch.tensor([0, 1, 2, 0, 1, 2, 0, 3]))
    cropped = CroppedImages(found, SIDE)
    for data in (LabelledImages(found, SIDE), cropped, Subset(cropped, range(8, 16)), tensors):
        with pytest.raises(ValueError, match="has class 3, but there are 3 classes"):
            masking_training(net, data, settings(epochs=1), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_of_images_that_are_not_trained_on_do_not_matter() -> None:
    images, labels = squares(12).tensors
    data = TensorDataset(images, torch.cat([labels[:8], labels[8:] + 9]))
    masking_training(network(), Subset(data, range(8)), settings(epochs=1))
    masking_training(network(), Unlabelled(data), settings(epochs=1))


def test_too_few_images_are_refused_before_the_warm_up() -> None:
    net = network()
    before = net.decoder.scale.detach().clone()
    with pytest.raises(ValueError, match="batch_size: 8, but there are 4 samples"):
        masking_training(net, squares(4), settings(epochs=1))
    assert torch.equal(net.decoder.scale, before)


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(TypeError, match="network: expected a MaskingNetwork, got Colors"):
        masking_training(Colors(), squares(), settings(epochs=1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        masking_training(network(), squares(), model=lambda x: x)  # type: ignore[arg-type]


def test_the_evaluation_leaves_the_global_generator_alone() -> None:
    net = network()
    state = torch.get_rng_state()
    MaskingEvaluation(net, net.encoder, squares(4))(net.decoder)
    assert torch.equal(torch.get_rng_state(), state)


def test_unlabelled_hides_the_classes() -> None:
    hidden = Unlabelled(squares(3))
    assert [hidden[i][1] for i in range(len(hidden))] == [-1, -1, -1]
    assert torch.equal(hidden[1][0], squares(3)[1][0])
