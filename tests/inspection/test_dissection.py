"""Dissection of units whose concept is known by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from captum_robust.data import Sample
from captum_robust.inspection import dissect
from captum_robust.inspection.sketch import BINS, RELATIVE_ERROR, Sketch, bins_of, edges
from captum_robust.models import Classifier
from tests.inspection.nets import BLUE, RED, block, colour_net
from tests.networks import Net, drawn


def samples(boxes_only: bool = False) -> list[Sample]:
    """A red object on two images, a blue one on the third."""
    made = []
    for i, (color, y, x) in enumerate([(RED, 2, 3), (RED, 8, 0), (BLUE, 4, 4)]):
        image = block(color, y, x, 4, 5)
        box = torch.tensor([[x, y, x + 5.0, y + 4.0]])
        mask = None if boxes_only else image.amax(0) > 0
        made.append(Sample(image, int(color == BLUE), box, f"{i}.png", mask))
    return made


def test_a_known_detector_has_an_overlap_of_one() -> None:
    result = dissect(colour_net(), "units", samples(), "objects", size=16)
    assert result.concepts == ["blue", "red"]
    assert result.iou[:2].tolist() == [[0, 1], [1, 0]]
    assert [(d.unit, d.concept, d.iou) for d in result.detectors] == [(0, "red", 1), (1, "blue", 1)]
    assert result.histogram() == {"blue": 1, "red": 1}
    # 40 of 3·256 positions are red, all at 1.
    assert result.thresholds[0] == 1
    assert float(result.shares[0]) == pytest.approx(40 / 768)
    # The third unit is never above 0.
    assert result.shares[2] == 0
    assert result.iou[2].tolist() == [0, 0]


def test_boxes_stand_in_for_masks_and_that_is_said() -> None:
    result = dissect(colour_net(), "units", samples(boxes_only=True), "objects", size=16)
    assert result.iou[0].tolist() == [0, 1]
    assert result.notes == ["Where an object has a box only, it is its mask."]


def test_an_overlap_that_is_worked_by_hand() -> None:
    # The unit answers to 4×5 red pixels, of which the mask holds 2×5, and 2×5 more beside.
    image = block(RED, 4, 4, 4, 5)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[6:10, 4:9] = True
    sample = Sample(image, 0, torch.zeros(0, 4), "a", mask)
    result = dissect(colour_net(), "units", [sample], "objects", size=16)
    assert float(result.iou[0, 0]) == pytest.approx(10 / 30)


def test_images_without_annotation_do_not_count() -> None:
    bare = Sample(block(RED, 0, 0, 8, 8), 0, torch.zeros(0, 4), "bare")
    result = dissect(colour_net(), "units", [*samples(), bare], "objects", size=16)
    assert result.iou[0].tolist() == [0, 1]
    assert result.images == 3
    assert "for the thresholds only: 1 image." in result.notes[-1]
    with pytest.raises(ValueError, match="concepts: none of the images is annotated"):
        dissect(colour_net(), "units", [bare], "objects")


def test_colours_need_no_labels() -> None:
    images = [s.image for s in samples()]
    result = dissect(colour_net(), "units", images, size=16)
    assert [(d.unit, d.concept, d.iou) for d in result.detectors] == [(0, "red", 1), (1, "blue", 1)]
    assert "pink" in result.absent
    assert result.notes[-1].startswith("Concepts that never occur: grey, white, orange")
    assert result.plot().axes


def write(path: Path, mask: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(path)


def test_folders_of_masks(tmp_path: Path) -> None:
    for sample in samples():
        assert sample.mask is not None
        write(tmp_path / ("blue" if sample.label else "crimson") / sample.id, sample.mask)
    write(tmp_path / "never" / "9.png", torch.ones(4, 4, dtype=torch.bool))
    result = dissect(colour_net(), "units", samples(), tmp_path, size=16)
    assert result.concepts == ["blue", "crimson"]
    assert result.iou[:2].tolist() == [[0, 1], [1, 0]]
    assert result.absent == ["never"]
    only = dissect(colour_net(), "units", samples(), {"blue": tmp_path / "blue"}, size=16)
    assert (only.images, only.iou[1].tolist()) == (1, [1])


def test_a_mask_of_another_size_names_its_file(tmp_path: Path) -> None:
    write(tmp_path / "red" / "0.png", torch.ones(4, 4, dtype=torch.bool))
    write(tmp_path / "red" / "1.png", torch.ones(16, 16, dtype=torch.bool))
    result = dissect(colour_net(), "units", samples(), tmp_path, size=16)
    (why,) = result.unusable.values()
    assert "0.png: the mask has 4×4 pixels, its image 16×16" in why
    with pytest.raises(ValueError, match=r"concepts: .* has no sub-folders"):
        dissect(colour_net(), "units", samples(), tmp_path / "red")
    with pytest.raises(FileNotFoundError):
        dissect(colour_net(), "units", samples(), {"a": tmp_path / "none"})
    known = "colours, textures, objects, or a file or folder of masks"
    expected = f"concepts: expected one of {known}, got 'colors'"
    with pytest.raises(ValueError, match=expected):
        dissect(colour_net(), "units", samples(), "colors")


def test_a_folder_does_not_hide_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "colours").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "red" in dissect(colour_net(), "units", samples(), "colours", size=16).concepts


def test_it_is_what_all_images_at_once_give() -> None:
    torch.manual_seed(0)
    model, images = Classifier(Net(), input_size=32), list(drawn(24, height=32, width=32))
    masks = [image[0] > 0.6 for image in images]
    given = [
        Sample(x, 1, torch.zeros(0, 4), str(i), m)
        for i, (x, m) in enumerate(zip(images, masks, strict=True))
    ]
    result = dissect(model, "conv2", given, "objects", quantile=0.02, size=32, batch_size=3)
    with torch.no_grad():
        maps = model.module.conv2(torch.relu(model.module.conv1(torch.stack(images))))
    exact = maps.transpose(0, 1).flatten(1).quantile(0.98, dim=1)
    above = exact / result.thresholds - 1
    is_positive = exact > 2**-12
    assert is_positive.sum() > 2
    assert ((above >= 0) & (above <= RELATIVE_ERROR))[is_positive].all()
    large = nn.functional.interpolate(maps, (32, 32), mode="bilinear")
    active = large >= result.thresholds[:, None, None]
    both = torch.stack(masks)[:, None]
    iou = (active & both).sum((0, 2, 3)) / (active | both).sum((0, 2, 3))
    torch.testing.assert_close(result.iou[:, 0], iou)


def test_bins_are_in_the_order_of_numbers_and_as_wide_as_stated() -> None:
    lower = edges()
    assert torch.equal(bins_of(lower)[1:], torch.arange(1, BINS))
    assert torch.equal(bins_of(lower[2:] * (1 - 1e-6)), torch.arange(1, BINS - 1))
    assert (lower[2:] / lower[1:-1] - 1).max() <= RELATIVE_ERROR
    assert bins_of(torch.tensor([-3.0, 0.0, 2.0**-13, 1e9])).tolist() == [0, 0, 0, BINS - 1]


def test_a_quantile_of_the_sketch_is_within_its_error() -> None:
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)).exp()
    sketch = Sketch(3)
    for part in torch.split(values, 700, dim=1):
        sketch.add(part)
    for share in (0.005, 0.1, 0.5):
        found = edges()[sketch.top_bins(share)]
        exact = values.sort(1, descending=True)[0][:, int(5000 * share) - 1]
        assert ((exact / found >= 1) & (exact / found <= 1 + RELATIVE_ERROR)).all()
