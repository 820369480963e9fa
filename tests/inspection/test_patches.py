"""Maximal patches of units that are known by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_robust.inspection import maximal_patches
from captum_robust.inspection.streaming import ImageStream
from captum_robust.models import Classifier
from tests.inspection.nets import BLUE, RED, block, colour_net
from tests.networks import Net, drawn


def shaded(strength: float, y: int, x: int) -> Tensor:
    """One red pixel of a strength at (y, x)."""
    return block((strength, 0, 0), y, x, 1, 1)


def test_the_best_images_come_first_and_positions_are_right() -> None:
    images = [shaded(0.25, 3, 4), shaded(1.0, 7, 1), block(BLUE, 2, 2, 3, 3), shaded(0.5, 15, 0)]
    found = maximal_patches(colour_net(), "units", images, top=3, batch_size=2)
    assert found.values[0].tolist() == [1.0, 0.5, 0.25]
    assert found.images[0] == ["1", "3", "0"]
    assert found.positions[0].tolist() == [[7, 1], [15, 0], [3, 4]]
    assert found.field is not None
    assert found.field.size == (1, 1)
    # Patches of one pixel: red of those strengths, in bytes.
    assert found.patches[0].flatten(1).tolist() == [[255, 0, 0], [128, 0, 0], [64, 0, 0]]
    assert found.heats[0].flatten().tolist() == [255, 255, 255]
    assert found.dead == [2]
    assert "Dead: 1 of 3 units," in found.notes[-1]


def test_a_patch_is_the_receptive_field_and_grey_outside() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 5, stride=2, padding=2, bias=False))
    nn.init.zeros_(net[0].weight)
    net[0].weight.data[0, 0, 2, 2] = 1  # the middle of the field
    image = torch.rand(3, 16, 16)
    image[0] = 0
    image[0, 0, 6] = 1  # position (0, 3): rows -2 to 2, columns 4 to 8
    found = maximal_patches(Classifier(net, input_size=16), "0", [image], top=1)
    assert found.positions[0, 0].tolist() == [0, 3]
    (patch,) = found.patches[0]
    assert patch.shape == (3, 5, 5)
    assert (patch[:, :2] == 128).all()  # half of 255, rounded to even
    assert torch.equal(patch[:, 2:], (image[:, :3, 4:9] * 255).round().to(torch.uint8))
    # The map falls to 0 one position away, two pixels: half of it one pixel away.
    assert found.heats[0, 0, 2].tolist() == [0, 128, 255, 128, 0]
    assert (found.heats[0, 0, :2] == 0).all()


def test_a_large_patch_is_the_receptive_field_reduced() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 5, padding=48, dilation=24, bias=False))  # of 97 pixels
    nn.init.zeros_(net[0].weight)
    net[0].weight.data[0, 0, 2, 2] = 1
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    image = torch.stack([torch.exp(-((y - 30) ** 2 + (x - 70) ** 2) / 800), y / 120, x / 120])
    found = maximal_patches(Classifier(net, input_size=120), "0", [image], top=1)
    assert found.positions[0, 0].tolist() == [30, 70]
    (patch,) = found.patches[0]
    assert patch.shape == (3, 64, 64)
    field = nn.functional.pad(image, (48, 48, 48, 48), value=0.5)[:, 30:127, 70:167]
    expected = nn.functional.interpolate(field[None], (64, 64), mode="bilinear", antialias=True)[0]
    # At most a pixel aside, which counts at the border of the image only.
    assert (patch / 255 - expected).abs().mean() < 0.02


def test_histograms_count_every_position_once() -> None:
    images = [shaded(0.5, 1, 1), shaded(1.0, 2, 2)]
    found = maximal_patches(colour_net(), "units", images)
    assert found.histograms.sum(dim=1).tolist() == [2 * 256] * 3
    above = {float(found.edges[b]): int(found.histograms[0, b]) for b in range(1, 769)}
    assert {edge: count for edge, count in above.items() if count} == {0.5: 1, 1.0: 1}


def test_batches_and_choice_of_units_change_nothing() -> None:
    torch.manual_seed(0)
    model = Classifier(Net(), input_size=(22, 17))
    images = list(drawn(7))
    whole = maximal_patches(model, "conv2", images, top=4, batch_size=7)
    for size in (1, 3):
        some = maximal_patches(model, "conv2", images, [5, 2], top=4, batch_size=size)
        torch.testing.assert_close(some.values, whole.values[[5, 2]])
        assert some.images == [whole.images[5], whole.images[2]]
        assert torch.equal(some.patches, whole.patches[[5, 2]])
        assert torch.equal(some.histograms, whole.histograms[[5, 2]])
    # Against the maps of all images at once.
    with torch.no_grad():
        maps = model.module.conv2(torch.relu(model.module.conv1(torch.stack(images))))
    assert torch.equal(whole.values, maps.flatten(2).amax(2).T.sort(1, descending=True)[0][:, :4])


def test_fewer_images_than_patches() -> None:
    found = maximal_patches(colour_net(), "units", [shaded(1.0, 0, 0)], top=3)
    assert found.images[0] == ["0"]
    assert found.values[0].isnan().tolist() == [False, True, True]
    assert found.plot([0]).axes


def test_a_layer_that_sees_the_whole_image_shows_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(1, 4))
    found = maximal_patches(Classifier(net, input_size=16), "1", list(drawn(2)), top=2)
    assert found.patches.shape == (4, 2, 3, 16, 16)
    assert (
        found.notes[0]
        == "The receptive field is the whole image, so each patch is the whole image."
    )


def test_units_out_of_range_are_refused() -> None:
    for units in ([3], [-1], [0, 0], []):
        with pytest.raises(ValueError, match="units: expected different numbers from 0 to 2"):
            maximal_patches(colour_net(), "units", [shaded(1, 0, 0)], units)
    found = maximal_patches(colour_net(), "units", [shaded(1, 0, 0)], [0])
    with pytest.raises(ValueError, match="units: expected some of the 1 looked at"):
        found.plot([1])


def test_no_images_and_broken_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        maximal_patches(colour_net(), "units", [])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 1 could be used: .*broken\.png"):
        maximal_patches(colour_net(), "units", tmp_path)


def test_the_model_is_left_as_it_was() -> None:
    model = colour_net().train()
    maximal_patches(model, "units", [shaded(1, 0, 0)])
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_a_stopped_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captum_robust.inspection.progress.SAVED_EVERY", 1)
    images = [shaded(0.1 * i, i, i) for i in range(1, 10)]
    whole = maximal_patches(colour_net(), "units", images, top=3)
    batches = ImageStream.batches
    seen: list[int] = []

    def stopping(stream: ImageStream, first: int = 0) -> Any:
        for batch in batches(stream, first):
            seen.append(int(batch.positions[0]))
            if seen == [0, 2, 4]:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(ImageStream, "batches", stopping)
    options: dict[str, Any] = {"top": 3, "batch_size": 2, "folder": tmp_path / "state"}
    with pytest.raises(KeyboardInterrupt):
        maximal_patches(colour_net(), "units", images, **options)
    found = maximal_patches(colour_net(), "units", images, **options)
    assert seen == [0, 2, 4, 4, 6, 8]
    assert found.images == whole.images
    for name in ("values", "positions", "patches", "heats", "histograms"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    with pytest.raises(ValueError, match="holds another run"):
        maximal_patches(colour_net(), "units", images, [0], **options)


def test_red_is_seen_by_its_unit() -> None:
    found = maximal_patches(colour_net(), "units", [block(RED, 0, 0, 4, 4)], [0], top=1)
    assert found.strip(0).shape == (2, 1, 3)
