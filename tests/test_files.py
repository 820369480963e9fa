"""Files are there whole or not at all; facts beside tensors; whether a run is the same."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from captum_robust._facts import listed, or_none, text, whole
from captum_robust._files import (
    check_same_run,
    read_facts,
    read_tensors,
    remove_parts,
    write_facts,
    write_network,
    write_whole,
)

TENSORS = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.int64)}
FORM = {"width": whole(1), "names": listed(text()), "none": or_none(text())}
FACTS = {"width": 3, "names": ["x", "ü"], "none": None}


def test_text_and_bytes_are_written_with_their_folder(tmp_path: Path) -> None:
    assert write_whole(tmp_path / "new" / "a.txt", "ü\udcff").read_text("utf-8") == "ü\\udcff"
    assert write_whole(tmp_path / "a.bin", b"\x00").read_bytes() == b"\x00"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "new"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_was_there_stays_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "a.safetensors"
    write_facts(file, TENSORS, "kind", FACTS)
    before = file.read_bytes()
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"a\.safetensors: could not be written.*No space"):
        write_facts(file, {"a": torch.zeros(9)}, "kind", {})
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "text")
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_kill_while_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    file = write_whole(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="parts of others are not told from left ones")
def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".0123456789abcdef.part").mkdir()
    (tmp_path / ".0123456789abcdef.part/part").write_text("torn")
    (tmp_path / ".own.part").mkdir()
    sync = os.fsync

    def beside(number: int) -> None:
        remove_parts(tmp_path, shared=True)  # as another that starts while the file is written
        sync(number)

    monkeypatch.setattr(os, "fsync", beside)
    assert write_whole(tmp_path / "a.txt", "text").read_text() == "text"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".own.part", "a.txt"]


def test_parts_that_go_away_while_they_are_looked_for_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()

    def write(_: int) -> None:
        for folder in (tmp_path, tmp_path / "below"):
            write_whole(folder / "a.txt", "text")
            remove_parts(tmp_path, shared=True, below=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "a.txt", "below"]


def test_a_part_that_is_removed_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, made = Path.mkdir, []

    def removed_once(folder: Path, **options: bool) -> None:
        mkdir(folder, **options)
        made.append(folder)
        if len(made) == 1:
            remove_parts(tmp_path)

    monkeypatch.setattr(Path, "mkdir", removed_once)
    assert write_whole(tmp_path / "a.txt", "text").read_text() == "text"
    assert len(made) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_who_may_read_a_file_does_not_depend_on_its_kind(tmp_path: Path) -> None:
    (plain := tmp_path / "plain").touch()
    write_facts(tmp_path / "a.safetensors", TENSORS, "kind", FACTS)
    for file in (tmp_path / "a.safetensors", write_whole(tmp_path / "a.txt", "text")):
        assert file.stat().st_mode == plain.stat().st_mode


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_whole(tmp_path, "text")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "full").symlink_to("/dev/full")
    for path, what in ((Path("/dev/full"), "device"), (tmp_path / "pipe", "pipe")):
        before = path.stat()
        for write in (lambda p: write_whole(p, "text"), lambda p: write_facts(p, TENSORS, "k", {})):
            with pytest.raises(OSError, match=f"{path} is a {what}; give the name of a file"):
                write(path)
        assert path.stat()[:3] == before[:3]
    with pytest.raises(OSError, match="is a device"):
        write_whole(tmp_path / "full", "text")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    assert write_whole(tmp_path / "nowhere", "text").read_text() == "text"


def test_a_file_that_is_there_is_kept_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_whole(tmp_path / "a.txt", "first", keep=True)
    assert write_whole(file, "second", keep=True).read_text() == "first"

    def without_links(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", without_links)
    assert write_whole(tmp_path / "b.txt", "text", keep=True).read_text() == "text"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_names_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 251 + ".txt", "ü" * 125 + ".txt"):
        assert write_whole(tmp_path / name, "text").name == name


def test_facts_come_back_and_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write_facts(one, TENSORS, "kind", FACTS, card="a card")
    write_facts(two, TENSORS, "kind", FACTS, card="a card")
    tensors, facts = read_facts(one, "kind", "thing", FORM)
    assert facts == FACTS
    assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    assert one.read_bytes() == two.read_bytes()
    assert read_tensors(one)[1]["card"] == "a card"


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "kind", "facts": json.dumps(FACTS)},
        {"format": "kind", **{name: json.dumps(value) for name, value in FACTS.items()}},
        {"format": "kind", "width": "3", "names": json.dumps(FACTS["names"]), "none": ""},
    ],
)
def test_files_of_version_0_1_are_read(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata)
    assert read_facts(tmp_path / "a.safetensors", "kind", "thing", FORM)[1] == FACTS


@pytest.mark.parametrize(
    "metadata", [{}, {"format": "other"}, {"kind": "{"}, {"kind": "[1]"}, {"kind": "[" * 100_000}]
)
def test_files_of_another_kind_are_named(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match=r"a\.safetensors holds no thing"):
        read_facts(tmp_path / "a.safetensors", "kind", "thing", FORM)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="may be a pickle"):
        read_facts(tmp_path / "a.pt", "kind", "thing", FORM)


def test_a_network_in_half_precision_keeps_what_that_cannot_hold(tmp_path: Path) -> None:
    weights = {"small": torch.tensor([0.5]), "large": torch.tensor([1e6])}
    write_network(tmp_path / "n.safetensors", weights, "kind", {}, half=True)
    tensors, _ = read_facts(tmp_path / "n.safetensors", "kind", "thing", {})
    assert tensors["small"].dtype == torch.float16
    assert torch.equal(tensors["large"], weights["large"])
    with pytest.raises(ValueError, match=r"path: expected a \.safetensors file, got n\.bin"):
        write_network(tmp_path / "n.bin", weights, "kind", {})


def test_a_run_of_another_configuration_is_refused_by_what_differs(tmp_path: Path) -> None:
    there = {"model": {"name": "a", "size": [1, 2]}, "versions": {"torch": "1"}, "seed": 0}
    check_same_run(tmp_path, there, {**there, "versions": {"torch": "2"}}, ignored="versions")
    check_same_run(tmp_path, there, {**there, "model": {"name": "a", "size": (1, 2)}})
    with pytest.raises(ValueError, match=r"holds another run \(model\.name: a there, b here\)"):
        check_same_run(tmp_path, there, {**there, "model": {"name": "b", "size": [1, 2]}})
    with pytest.raises(ValueError, match=r"seed: 0 there, \(none\) here; versions\.torch: 1"):
        check_same_run(tmp_path, there, {"model": there["model"]})
    attack = "p.PGD(bounds=(0.0, 1.0), loss='a, b=(', steps=3, transform=None)"
    others = {"pgd 1/255": attack, "pgd 2/255": attack}
    with pytest.raises(ValueError, match=r"run \(attacks\.pgd 1/255, steps: 3 there, 40 here\);"):
        check_same_run(
            tmp_path,
            {"attacks": others},
            {"attacks": {**others, "pgd 1/255": attack.replace("3", "40")}},
        )
    with pytest.raises(
        ValueError, match=r"run \(attacks\.pgd 2/255: p.PGD there, \(none\) here\);"
    ):
        check_same_run(tmp_path, {"attacks": others}, {"attacks": {"pgd 1/255": attack}})
    long = {"text": "x" * 500 + "old" + "y" * 500}
    with pytest.raises(ValueError, match=r"…x+oldy+… there, …x+newy+… here"):
        check_same_run(tmp_path, long, {"text": long["text"].replace("old", "new")})
