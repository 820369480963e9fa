"""Whole data sets of which a file is damaged: it is named, and what is whole stays right."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from captum_robust.data import LocalizationDataset, Sample

from .damage import NAMES, check_sample, damaged, damaged_text, damaged_value, read, tries_in_child
from .data_sets import COCO, KINDS, SECRET, content_of, open_set, write_set

TryOften = Callable[..., None]
LISTS = (".json", ".csv", ".txt")
"""Files that the whole data set follows from."""


def samples_of(data: LocalizationDataset, *names: str) -> dict[str, Sample]:
    """Those that can be loaded, each checked; the others are refused by name."""
    samples = {}
    for index, id in enumerate(data.ids):
        sample = read(lambda index=index: data[index], id, *names)
        if sample is not None:
            check_sample(sample, 1000)
            colour = (255 * sample.image[:, 0, 0]).round().tolist()
            assert tuple(colour) != SECRET, f"{id}: read outside of the folder"
            samples[id] = sample
    return samples


def test_undamaged_sets_are_read_whole(in_memory: Path) -> None:
    """Else all that follows could not fail."""
    boxes = {"folder": 3, "coco": 2, "voc": 6, "imagenet": 3, "tiny-imagenet": 3}
    for kind, expected in boxes.items():
        write_set(kind, in_memory / kind)
        data = open_set(kind, in_memory / kind)
        samples = samples_of(data)
        assert samples.keys() == set(data.ids)
        assert sum(len(sample.boxes) for sample in samples.values()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file(kind: str, try_often: TryOften, in_memory: Path) -> None:
    """Samples of other files stay as they are, unless it is the list of all."""
    root = in_memory / "set"
    write_set(kind, root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    lists = [path for path in files if path.suffix in LISTS]
    whole = {id: content_of(s) for id, s in samples_of(open_set(kind, root)).items()}

    def one(rng: random.Random) -> None:
        path = rng.choice(rng.choice((files, lists)))
        before = path.read_bytes()
        is_text = path.suffix in (*LISTS, ".xml")
        path.write_bytes(damaged_text(before.decode(), rng) if is_text else damaged(before, rng))
        try:
            data = read(lambda: open_set(kind, root), str(root))
            if path.suffix in LISTS:
                samples_of(data, str(root)) if data else None
                return
            assert data is not None, "one damaged file, and the set does not open"
            for id, sample in samples_of(data, str(root)).items():
                is_other = path.stem not in (id.split("#")[0], Path(id.split("#")[0]).stem)
                assert not is_other or content_of(sample) == whole[id], f"{id} is another"
        finally:
            path.write_bytes(before)

    try_often(f"data sets: {kind}", tries_in_child(one, 100), quick=1, long=20)


def test_coco_fields(try_often: TryOften, in_memory: Path) -> None:
    root = in_memory / "set"
    write_set("coco", root)
    path = root / "annotations" / "instances_val2017.json"

    def one(rng: random.Random) -> None:
        path.write_text(json.dumps(damaged_value(COCO, rng)))
        if data := read(lambda: open_set("coco", root), str(root)):
            samples_of(data, str(root))

    try_often("COCO fields", tries_in_child(one, 200), quick=1, long=40)


def odd_archive(path: Path, files: dict[str, bytes], rng: random.Random) -> None:
    """A tar or zip with an odd member more, or damaged as a whole."""
    names = [name for name in NAMES if "\ud800" not in name]
    name = rng.choice((*names, "val/images/val_1.JPEG", "val/images", "val/../../x.png"))
    target = rng.choice(("../../x.png", "/etc/passwd", "val_0.JPEG", "..", ".", "", "val", "a\0b"))
    kind = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE))
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        with zipfile.ZipFile(buffer, "w", rng.choice((0, 8, 12, 14))) as archive:
            for inner, data in files.items():
                archive.writestr(inner, data)
            member = zipfile.ZipInfo(name.encode("utf-8", "replace").decode()[:60000] or "x")
            member.external_attr = (0o120777 if kind != tarfile.FIFOTYPE else 0o010644) << 16
            archive.writestr(member, target)
    else:
        with tarfile.open(fileobj=buffer, mode=rng.choice(("w:", "w:gz", "w:bz2", "w:xz"))) as tar:
            for inner, data in files.items():
                entry = tarfile.TarInfo(inner)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            odd = tarfile.TarInfo(name)
            odd.type, odd.linkname = kind, target
            tar.addfile(odd)
    data = buffer.getvalue()
    path.write_bytes(damaged(data, rng) if rng.random() < 0.7 else data)


def test_archives(try_often: TryOften, in_memory: Path) -> None:
    files = {
        name: content if isinstance(content, bytes) else content.encode()
        for name, content in KINDS["tiny-imagenet"][0]().items()
    }
    path = in_memory / "tiny.archive"

    def one(rng: random.Random) -> None:
        odd_archive(path, files, rng)
        if data := read(lambda: open_set("tiny-imagenet", path), str(path)):
            samples_of(data, str(path))

    try_often("archives: tar, zip", tries_in_child(one, 100), quick=1, long=50)


def put_oddity(folder: Path, rng: random.Random) -> Path | None:
    """A file, link or pipe with an odd name; None: the file system has no such name."""
    name = rng.choice(NAMES[4:-1]).replace("/", "-") or "x"
    path = folder / f"{name}{rng.choice(('.png', '.jpg', '.xml', '.txt', '', '.JPEG'))}"
    targets = ("/dev/zero", "/etc/passwd", "..", path.name, "nothing", ".")
    try:
        if rng.random() < 0.3:
            os.mkfifo(path)
        elif rng.random() < 0.5:
            path.symlink_to(rng.choice(targets))
        else:
            path.write_bytes(b"\xff\xd8\xff" * rng.randrange(3))
    except (OSError, ValueError):
        return None
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_odd_names(kind: str, try_often: TryOften, in_memory: Path) -> None:
    """Links, pipes and files with odd names among the images: the others stay as they are."""
    root = in_memory / "set"
    write_set(kind, root)
    folders = sorted(path for path in root.rglob("*") if path.is_dir())
    whole = {id: content_of(s) for id, s in samples_of(open_set(kind, root)).items()}

    def one(rng: random.Random) -> None:
        path = put_oddity(rng.choice(folders), rng)
        try:
            data = open_set(kind, root)
            samples = samples_of(data, str(root))
            assert all(content_of(samples[id]) == content for id, content in whole.items())
        finally:
            if path is not None:
                path.unlink()

    try_often(f"odd names: {kind}", tries_in_child(one, 100), quick=1, long=10)
