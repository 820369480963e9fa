"""A box that several maps vote for, by hand; what it costs; where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import GuidedGradCam
from torch import Tensor

from captum_robust import RealTimeMasking, locate
from captum_robust._resize import blurred, resize_image
from captum_robust.benchmark import compare
from captum_robust.benchmark.passes import count_passes
from captum_robust.catalog import methods as known
from captum_robust.catalog.box_vote import BEST, FAST, BoxVote, Votes
from captum_robust.catalog.thresholds import Threshold
from captum_robust.draw import as_rgb, encode_png
from captum_robust.models import Classifier
from captum_robust.nn import MaskingNetwork
from captum_robust.show.explain import explain_image
from tests.benchmark.conftest import Drawn, make_classifier

IMAGES = torch.stack([Drawn(n=4, size=(32, 32))[i].image for i in range(4)])
CLASSES = torch.tensor([0, 1, 2, 3])
SMALL = Votes(
    (1.0, 0.75),
    ((1.0, False, (0.0, 4.0)), (1.0, True, (0.0,))),
    Threshold("value", 0.4),
    Threshold("energy", 0.7),
    Threshold("mean", 1.5),
)


def network_of(model: Classifier, **options: Any) -> MaskingNetwork:
    torch.manual_seed(1)
    network = MaskingNetwork(model, **options)
    torch.nn.init.normal_(network.decoder.two_channels.weight)  # zeros give the gate alone
    return network.eval()


def brightness(images: Tensor, _: Tensor) -> Tensor:
    return images.mean(dim=1)


@pytest.mark.parametrize("learned", [False, True])
def test_boxes_are_the_means_of_those_of_each_kind(learned: bool) -> None:
    model = make_classifier()
    network = network_of(model, learned_classes=learned)
    masking, guided = RealTimeMasking(network), GuidedGradCam(model, model.cam_layer)

    def mask(x: Tensor) -> Tensor:
        return masking.attribute(x, CLASSES)[:, 0]

    def guide(x: Tensor) -> Tensor:
        return guided.attribute(x.clone(), CLASSES).abs().sum(dim=1).detach()

    flip, small = IMAGES.flip(3), resize_image(IMAGES, (24, 24))

    def large(maps: Tensor) -> Tensor:
        return network.decoder(network.encode(maps)[0], CLASSES)

    def enlarged(maps: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(maps, (32, 32), mode="bilinear")[:, 0]

    masks = [mask(IMAGES), mask(flip).flip(2), enlarged(large(small))]
    masks.append(enlarged(large(small.flip(3))).flip(2))
    guides = [guide(IMAGES), blurred(guide(IMAGES), 4 * 32 / 224), guide(flip).flip(2)]
    kinds = [
        (masks, SMALL.masks),
        (guides, SMALL.guided),
        ([brightness(IMAGES, CLASSES)], SMALL.ball),
    ]
    expected = torch.stack(
        [torch.stack([t.boxes(m) for m in maps]).mean(dim=0) for maps, t in kinds]
    ).mean(dim=0)
    maps, boxes = BoxVote(model, network, SMALL, brightness)(IMAGES, CLASSES)
    torch.testing.assert_close(boxes, expected)
    assert maps.shape == (4, 32, 32)
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_the_fast_vote_takes_three_forward_passes_and_one_backward() -> None:
    model = make_classifier()
    vote = BoxVote(model, network_of(model), FAST)
    with count_passes(model) as passes:
        maps, boxes = vote(IMAGES, CLASSES)
    assert (passes.forward, passes.backward) == (3 * 4, 4)
    with count_passes(model) as passes:
        again = vote(IMAGES, CLASSES, vote.encode(IMAGES)[0])
    assert (passes.forward, passes.backward) == (3 * 4, 4)
    assert again[0].equal(maps)
    assert again[1].equal(boxes)


def test_no_image_sees_another() -> None:
    model = make_classifier()
    vote = BoxVote(model, network_of(model), SMALL, brightness)
    together = vote(IMAGES, CLASSES)[1]
    alone = [vote(IMAGES[i : i + 1], CLASSES[i : i + 1])[1] for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.fixture
def with_votes(monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """A model that a masking network comes for."""
    model = make_classifier()
    network = network_of(model)
    monkeypatch.setattr(
        RealTimeMasking, "from_pretrained", lambda *_, **__: RealTimeMasking(network)
    )
    for module in (known, __import__("captum_robust.show.locate", fromlist=["locate"])):
        monkeypatch.setattr(module, "pretrained", lambda: {model.name: Path()})
    return model


def test_a_row_of_compare_has_the_voted_box_whatever_the_threshold(with_votes: Classifier) -> None:
    result = compare(with_votes, Drawn(n=5, size=(32, 32)), ["box_vote_fast"], progress=False)
    vote = known.build_methods(with_votes, ["box_vote_fast"])["box_vote_fast"].vote
    assert vote is not None
    table, frame = result.table(), result.to_dataframe()
    assert table.loc[0, ["tuned", "threshold"]].tolist() == ["-", "-"]
    assert table.loc[0, ["forward", "backward"]].tolist() == [3, 1]
    for i, row in frame.iterrows():
        sample = Drawn(n=5, size=(32, 32))[int(str(i))]
        boxes = vote(sample.image[None], torch.tensor([sample.label]))[1]
        assert row[["x0", "y0", "x1", "y1"]].tolist() == boxes[0].round().tolist()
    assert "box_vote_fast" in result.to_text()
    settings = result.configuration["settings"]
    assert settings["box_vote_fast"] == repr(FAST)


def test_explain_draws_the_voted_box(with_votes: Classifier, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(as_rgb(IMAGES[0])))
    methods = known.build_methods(with_votes, ["box_vote_fast"])
    said = explain_image(with_votes, tmp_path / "a.png", methods, tmp_path / "b.png", target=2)
    vote = methods["box_vote_fast"].vote
    assert vote is not None
    pixels = (IMAGES[:1] * 255).round() / 255
    expected = vote(pixels, torch.tensor([2]))[1][0]
    assert said.boxes["box_vote_fast"] == pytest.approx(expected.tolist(), abs=0.5)


@pytest.mark.parametrize("method", ["fast", "best"])
def test_locate_has_the_scores_from_the_pass_of_the_masks(
    with_votes: Classifier, method: str
) -> None:
    with count_passes(with_votes) as passes:
        found = locate(with_votes, IMAGES, method=method, confidence=1.0)
    method = "box_vote" if method == "best" else "box_vote_fast"
    vote = known.build_methods(with_votes, [method])[method].vote
    assert vote is not None
    boxes = vote(IMAGES, with_votes(IMAGES).argmax(dim=1))[1]
    for one, box in zip(found, boxes, strict=True):
        torch.testing.assert_close(one["boxes"][0], box)
        rows, columns = one["masks"][0].any(dim=1).nonzero(), one["masks"][0].any(dim=0).nonzero()
        assert box[0] - 1 <= columns.min()
        assert columns.max() <= box[2]
        assert box[1] - 1 <= rows.min()
        assert rows.max() <= box[3]
    if method == "box_vote_fast":
        parts = sum(len(one["boxes"]) - 1 for one in found)
        assert parts == 0 or passes.forward > 12
        assert passes.backward == 4


def test_votes_are_left_out_where_no_masking_network_comes_for_the_model() -> None:
    model = make_classifier()
    assert not {"box_vote", "box_vote_fast"} & set(known.usual_methods(model))
    with pytest.raises(ValueError, match=r"box_vote.*trained masking network"):
        known.build_methods(model, ["box_vote"])
    assert BEST.scales[0] == FAST.scales[0] == 1
