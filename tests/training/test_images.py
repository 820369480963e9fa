from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from captum_robust.benchmark.batches import BatchReader
from captum_robust.data import load_dataset
from captum_robust.models import Classifier
from captum_robust.training import Augmented, LabelledImages, held_out_split


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.full((20, 30, 3), 20 * (number * each + i), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def opened(root: Path, **options: object) -> LabelledImages:
    return LabelledImages(load_dataset("folder", root, labels="sorted"), 8, **options)


def test_images_come_at_one_size_with_the_class_of_their_folder(tmp_path: Path) -> None:
    images = opened(folder(tmp_path))
    assert images.class_names == ["cat", "dog"]
    assert images.ids[4] == "dog/1.png"
    image, label = images[4]
    assert image.shape == (3, 8, 8)
    assert label == 1
    torch.testing.assert_close(image, torch.full((3, 8, 8), 80 / 255))


def test_what_does_not_fit_in_memory_is_decoded_again_to_the_same_pixels(tmp_path: Path) -> None:
    root = folder(tmp_path)
    kept, decoded = opened(root), opened(root, memory=0)
    for a, b in zip((kept[i] for i in range(6)), (decoded[i] for i in range(6)), strict=True):
        assert torch.equal(a[0], b[0])
        assert a[1] == b[1]
    (root / "cat" / "0.png").unlink()
    assert len(kept[0][0]) == 3
    with pytest.raises(ValueError, match=r"0\.png"):
        decoded[0]


def test_broken_images_are_left_out_and_listed_once(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "cat" / "0.png").write_bytes((root / "cat" / "0.png").read_bytes()[:40])
    (root / "dog" / "3.jpg").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(root / "of no class.png")
    images = opened(root)
    assert len(images) == 5
    assert set(images.unusable) == {"cat/0.png", "dog/3.jpg", "of no class.png"}
    assert "0 bytes" in images.unusable["dog/3.jpg"]
    assert "no class" in images.unusable["of no class.png"]


def test_chosen_classes_count_anew_in_the_given_order(tmp_path: Path) -> None:
    root = folder(tmp_path, ("ant", "bee", "cat"))
    images = opened(root, classes=[2, 0])
    assert images.class_names == ["cat", "ant"]
    assert images.labels == [1, 1, 1, 0, 0, 0]
    for wrong in ([0, 3], [1, 1], [-1, 0]):
        with pytest.raises(ValueError, match="classes: expected different numbers from 0 to 2"):
            opened(root, classes=wrong)


def test_fewer_than_two_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two classes, found 1"):
        opened(folder(tmp_path / "one", ("cat",)))
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (4, 4)).save(flat / "a.png")
    with pytest.raises(ValueError, match="at least two classes, found 0"):
        opened(flat)
    broken = folder(tmp_path / "broken")
    for file in (broken / "dog").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="of which 3 could not be used"):
        opened(broken)


def test_a_crop_takes_the_centre_and_squashing_the_whole(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        pixels = np.zeros((16, 32, 3), np.uint8)
        pixels[:, 8:24] = 255
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    # Without the border, to which antialiasing brings some of what is outside.
    assert bool((opened(tmp_path, fit="crop")[0][0][:, :, 1:-1] == 1).all())
    assert 0.4 < float(opened(tmp_path, fit="squash")[0][0].mean()) < 0.6
    with pytest.raises(ValueError, match=r"fit: .*got 'pad'"):
        opened(tmp_path, fit="pad")


def ramp() -> tuple[Tensor, int]:
    column = torch.arange(20.0) / 20
    return column.expand(3, 20, 20).contiguous(), 1


def test_augmented_images_are_shifted_or_mirrored_copies() -> None:
    image, label = ramp()
    augmented = Augmented(TensorDataset(image[None], torch.tensor([label])))
    assert len(augmented) == 1
    shifts, mirrored = set(), set()
    torch.manual_seed(0)
    for _ in range(60):
        changed, same = augmented[0]
        assert changed.shape == image.shape
        assert int(same) == label
        row = changed[0, 10]
        rises = bool(row[12] > row[8])
        whole = row if rises else row.flip(0)
        shifts.add(round(float(whole[10] - image[0, 10, 10]) * 20))
        mirrored.add(rises)
    assert mirrored == {True, False}
    assert shifts == {-2, -1, 0, 1, 2}  # a tenth of 20 pixels


def test_the_held_out_part_has_its_share_of_each_class() -> None:
    labels = [0] * 40 + [1] * 20 + [2] * 3
    training, held_out = held_out_split(labels, 0.25, seed=0)
    assert sorted(training + held_out) == list(range(63))
    assert [sum(labels[i] == c for i in held_out) for c in range(3)] == [10, 5, 0]
    assert held_out_split(labels, 0.25, seed=0)[1] == held_out
    assert held_out_split(labels, 0.25, seed=1)[1] != held_out
    assert held_out_split(labels, 0, seed=0)[1] == []
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="held_out"):
            held_out_split(labels, wrong, seed=0)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (300, 200)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_training_and_comparison_see_the_same_pixels(
    tmp_path: Path, shape: tuple[int, int], fit: str
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    dataset = load_dataset("folder", tmp_path, labels="sorted")
    trained_on = LabelledImages(dataset, 32, fit=fit)[0][0]
    model = Classifier(nn.Flatten(), input_size=32, class_names=["cat", "dog"])
    judged_on = BatchReader(model, dataset, fit=fit, eight_bit=True).samples(0)
    assert judged_on.sample is not None
    assert torch.equal(trained_on, judged_on.sample.image)
