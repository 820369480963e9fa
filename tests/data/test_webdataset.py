"""Tars of images and classes: their samples by key, in any order, and what is wrong with them."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from captum_robust.data import DataError, load_dataset
from captum_robust.data.webdataset import WebDataset

Run = Callable[..., tuple[int, str, str]]


def png(seed: int, side: int = 8) -> bytes:
    pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(seed))
    out = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path, count: int = 12, per_tar: int = 5, side: int = 8) -> Path:
    """Images of three classes, in tars of five."""
    folder.mkdir(exist_ok=True)
    for first in range(0, count, per_tar):
        members: dict[str, bytes] = {}
        for i in range(first, min(first + per_tar, count)):
            members[f"{i:04}.png"] = png(i, side)
            members[f"{i:04}.cls"] = str(i % 3).encode()
            members[f"{i:04}.json"] = b"{}"
        write_tar(folder / f"train-{first // per_tar:06}.tar", members)
    return folder


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


def test_images_and_classes_come_by_key_in_any_order(tmp_path: Path) -> None:
    dataset = load_dataset("webdataset", shards(tmp_path))
    assert len(dataset) == 12
    assert dataset.class_names == ["0", "1", "2"]
    assert dataset.ids[:2] == ["train-000000.tar/0000", "train-000000.tar/0001"]
    for i in (11, 3, 7, 0):
        expected = torch.tensor(list(Image.open(io.BytesIO(png(i))).tobytes())).view(8, 8, 3)
        assert torch.equal((dataset[i].image * 255).round().long(), expected.permute(2, 0, 1))
        assert dataset[i].label == i % 3
        assert len(dataset[i].boxes) == 0
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[5].image, dataset[5].image)


def test_a_lone_tar_a_compressed_one_and_names_of_classes(tmp_path: Path) -> None:
    members = {"a/1.JPG": png(1), "a/1.cls": b" 1\n", "b/1.png": png(2), "b/1.cls": b"0"}
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    plain = WebDataset(write_tar(tmp_path / "x.tar", members))
    packed = WebDataset(write_tar(tmp_path / "x.tar.gz", members, "w:gz"))
    assert plain.class_names == packed.class_names == ["cat", "dog"]
    assert plain.ids == ["x.tar/a/1", "x.tar/b/1"]
    assert [s.label for s in plain] == [s.label for s in packed] == [1, 0]
    assert torch.equal(plain[1].image, packed[1].image)


def test_other_members_are_left_alone_and_no_pickle_is_loaded(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb())
    members = {"1.png": png(1), "1.seg.png": png(2), "1.pkl": bomb, "1.pyd": bomb, "1.pth": bomb}
    dataset = WebDataset(write_tar(tmp_path / "x.tar", {**members, "._2.png": b"", "3.npy": bomb}))
    assert dataset.ids == ["x.tar/1"]
    assert dataset[0].label is None
    # Nor where a class is expected.
    dataset = WebDataset(write_tar(tmp_path / "y.tar", {"1.png": png(1), "1.cls": bomb}))
    with pytest.raises(DataError, match=r"y\.tar:1\.cls"):
        dataset[0]


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("1.png", png(1)[:-30], r"x\.tar:1\.png: damaged"),
        ("1.png", b"", r"x\.tar:1\.png: the file is empty"),
        ("1.cls", b"cat", r"x\.tar:1\.cls: expected the number of a class, got 'cat'"),
        ("1.cls", b"-1", r"x\.tar:1\.cls: expected the number of a class"),
        ("1.cls", b"99999999999", r"x\.tar:1\.cls: expected the number of a class"),
        ("1.cls", b"7", r"x\.tar/1: class 7, but classnames\.txt has 2"),
    ],
)
def test_a_broken_member_is_named_and_costs_its_sample_only(
    tmp_path: Path, member: str, data: bytes, message: str
) -> None:
    whole = {"1.png": png(1), "1.cls": b"1", "2.png": png(2), "2.cls": b"0"}
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    dataset = WebDataset(write_tar(tmp_path / "x.tar", whole | {member: data}))
    with pytest.raises(DataError, match=message):
        dataset[0]
    assert dataset[1].label == 0


def test_what_is_no_set_of_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tars; expected files such as"):
        WebDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        WebDataset(tmp_path / "none.tar")
    with pytest.raises(ValueError, match=r"no images; expected members such as 000000\.jpg"):
        WebDataset(write_tar(tmp_path / "x.tar", {"1.cls": b"0"}))
    with pytest.raises(ValueError, match=r"x\.tar: expected one image of a key, got 1\.png and"):
        WebDataset(write_tar(tmp_path / "x.tar", {"1.png": png(1), "1.jpg": png(2)}))
    cut = shards(tmp_path / "cut") / "train-000001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"train-000001\.tar: cannot be read as"):
        WebDataset(cut.parent)


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{000000..000002}.tar", "train-00000?.*"])
def test_a_pattern_leaves_other_tars_of_the_folder_out(pattern: str, tmp_path: Path) -> None:
    every = load_dataset("webdataset", shards(tmp_path))
    write_tar(tmp_path / "val-000000.tar", {"1.png": png(1)})
    dataset = load_dataset("webdataset", str(tmp_path / pattern))
    assert dataset.ids == every.ids
    assert dataset.root == every.root == tmp_path
    assert len(load_dataset("webdataset", tmp_path)) == 13
    odd = write_tar(tmp_path / "[1]{1..2}*.tar", {"1.png": png(1)})
    assert load_dataset("webdataset", odd).ids == [f"{odd.name}/1"]


def test_a_pattern_of_which_a_tar_is_missing_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    for pattern, got in (
        ("train-{000000..999999999999}.tar", r"train-000003\.tar: no such file; expected a tar, a"),
        ("val-*.tar", r"val-\*\.tar: no such file"),
        ("train-{000002..000001}.tar", r"no tars; expected files such as"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=got):
            load_dataset("webdataset", tmp_path / pattern)


def test_a_training_takes_tars_and_goes_on(run: Run, tmp_path: Path) -> None:
    images, out = shards(tmp_path / "tars", 24, 10, side=16), tmp_path / "run"
    bad = write_tar(images / "z.tar", {"1.png": b"no image", "1.cls": b"1"})
    command = ["train", "robust", "--kind", "webdataset", "--images", images, "--out", out]
    command += ["--method", "standard", "--epochs", "2", "--batch-size", "8", "--workers", "1"]
    command += ["--size", "32", "--held-out", "0", "--device", "cpu", "--micro-batch-size", "4"]
    code, said, errors = run(*map(str, command))
    assert code == 0, errors
    assert "24 images to train on" in said
    assert "3 classes" in said
    assert bad.name in said + errors
    first = (out / "model.safetensors").read_bytes()
    code, said, errors = run(*map(str, command))
    assert code == 0, errors
    assert (out / "model.safetensors").read_bytes() == first
