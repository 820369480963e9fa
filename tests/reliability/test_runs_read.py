"""Damaged folders of runs and trainings, and files of tensors: each is refused by its name."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from captum_robust import _facts
from captum_robust._files import TensorFile, write_facts
from captum_robust.attacks import FGSM
from captum_robust.benchmark import Comparison, compare
from captum_robust.runs.store import RunStore
from captum_robust.training.checkpoints import (
    Log,
    check_best,
    check_log,
    has_begun,
    load_checkpoint,
    run_id,
    save_checkpoint,
)
from tests.benchmark.conftest import Drawn, make_classifier

from .damage import damaged, damaged_text, damaged_value, read, tries_in_child

TryOften = Callable[..., None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of five images, of which one is broken."""
    folder, model = tmp_path_factory.mktemp("runs") / "run", make_classifier()
    attack = {"fgsm 8/255": FGSM(model, epsilon=8 / 255)}
    methods, options = ["robust_cam", "center_box"], {"saliency_metric": True, "progress": False}
    compare(model, Drawn(n=5, broken=(3,)), methods, attack, out=folder, **options)
    return folder


def in_range(comparison: Comparison) -> None:
    """Shares and errors are from 0 to 1, or unknown."""
    table = comparison.table()
    shares = table[[name for name in table if "error" in name or name in ("top1", "pxap")]]
    assert ((shares >= 0) & (shares <= 1) | shares.isna()).all(axis=None), shares


def test_descriptions_of_runs(try_often: TryOften, run: Path, in_memory: Path) -> None:
    folder = in_memory / "run"
    shutil.copytree(run, folder)
    path = folder / "run.json"
    text = path.read_text()

    def one(rng: random.Random) -> None:
        if rng.random() < 0.4:
            path.write_bytes(damaged_text(text, rng))
        else:
            path.write_text(json.dumps(damaged_value(json.loads(text), rng)))
        comparison = read(lambda: Comparison(folder), str(path))
        if comparison is not None:
            read(lambda: in_range(comparison), str(folder), "rows.sqlite")
            if rng.random() < 0.2:  # which takes the longest
                read(comparison.to_text, str(folder), "rows.sqlite")
            comparison._store.close()
        store = read(lambda: RunStore(folder, json.loads(text)), str(folder), "rows.sqlite")
        if store is not None:
            store.close()

    try_often("run.json", tries_in_child(one, 30), quick=1, long=20)


def test_rows_of_runs(try_often: TryOften, run: Path, in_memory: Path) -> None:
    rows = (run / "rows.sqlite").read_bytes()
    tables = ("images", "results", "attacked", "classes")

    def one(rng: random.Random) -> None:
        folder = in_memory / str(rng.random())  # SQLite keeps files beside the one that is open
        folder.mkdir()
        shutil.copy(run / "run.json", folder)
        path = folder / "rows.sqlite"
        path.write_bytes(damaged(rows, rng) if rng.random() < 0.8 else rows)
        if path.read_bytes() == rows:
            with sqlite3.connect(path) as database:
                database.execute(f"DROP TABLE {rng.choice(tables)}")
            database.close()
        comparison = read(lambda: Comparison(folder), str(folder), "rows.sqlite")
        if comparison is not None:
            read(lambda: in_range(comparison), str(folder), "rows.sqlite")
            if rng.random() < 0.2:
                read(comparison.to_text, str(folder), "rows.sqlite")
            read(comparison.to_dataframe, str(folder), "rows.sqlite")
            comparison._store.close()
        shutil.rmtree(folder)

    try_often("rows.sqlite", tries_in_child(one, 30), quick=1, long=20)


def damaged_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header, or size of it, is another one."""
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size]
    kind = rng.randrange(3)
    if kind == 0:
        header = damaged(header, rng)
    elif kind == 1:
        header = json.dumps(damaged_value(json.loads(header), rng)).encode()
    else:
        return damaged(data, rng)
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, size - 1, 2**32, 2**63))
    return struct.pack("<Q", size) + header + data[8 + len(header) :]


def test_tensor_files(try_often: TryOften, in_memory: Path) -> None:
    path = in_memory / "own.safetensors"
    tensors = {"weight": torch.arange(12.0).reshape(3, 4), "count": torch.tensor([3])}
    write_facts(path, tensors, "own", {"classes": 3, "names": ["cat", "dog", "cow"]})
    data = path.read_bytes()
    form = {"classes": _facts.whole(0), "names": _facts.listed(_facts.text())}

    def one(rng: random.Random) -> None:
        path.write_bytes(damaged_header(data, rng))
        file = read(lambda: TensorFile(path), str(path))
        if file is not None:
            read(lambda: file.facts("own", "things", form), str(path))

    try_often("safetensors files", tries_in_child(one, 1000), quick=1, long=200)


def test_checkpoints(try_often: TryOften, in_memory: Path) -> None:
    """Checkpoint, best weights, log and description of a training."""
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    paths = {n: in_memory / n for n in ("state.safetensors", "log.jsonl", "run.json")}
    state, log, described = paths.values()
    entries = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    save_checkpoint(state, network, optimizer, 3, "id", entries)
    Log(log, 0).add(entries)
    described.write_text(json.dumps({"id": "id", "configuration": {"lr": 0.1, "steps": 9}}))
    whole = {path: path.read_bytes() for path in paths.values()}

    def one(rng: random.Random) -> None:
        path = rng.choice([*whole])
        change = damaged_header if path == state else damaged
        path.write_bytes(change(whole[path], rng))
        try:
            if read(lambda: has_begun(described, {"lr": 0.1, "steps": 9}), str(in_memory)):
                run_id(described)
            step = read(lambda: load_checkpoint(state, network, optimizer, 9), str(state))
            assert step is None or 0 <= step <= 9
            read(lambda: check_log(log, state, "id", 3), str(state), str(log))
            read(lambda: check_best(state, network, "id", 3, 3), str(state))
            steps = [row["step"] for row in Log(log, 3).rows]
            assert all(type(step) is int and 0 <= step <= 3 for step in steps), steps
        finally:
            path.write_bytes(whole[path])

    try_often("checkpoints and logs", tries_in_child(one, 200), quick=1, long=150)
