"""A training run on disk: what tells it from another, its state in one file, its log."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from captum_robust._checks import check, printable
from captum_robust._facts import Fact, Form, checked_facts, listed
from captum_robust._files import check_same_run, checksum, read_tensors, write_tensors, write_whole
from captum_robust.nn.saved_networks import check_numbers
from captum_robust.training.schedule import SeededItems
from captum_robust.training.settings import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

_NETWORK, _OPTIMIZER = "network.", "optimizer."
_CHECKSUM = "crc32"
_FORM: Form = {
    "step": Fact("a whole number", lambda _: True),  # its message says of how many
    "optimizer": Fact(
        "fields by number",
        lambda value: (
            isinstance(value, dict)
            and all(map(str.isdecimal, value))
            and all(isinstance(inner, dict) for inner in value.values())
        ),
    ),
    "groups": listed(Fact("fields", lambda value: isinstance(value, dict))),
}


def save_checkpoint(
    path: Path,
    network: nn.Module,
    optimizer: Optimizer,
    step: int,
    run: str = "",
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the whole state after ``step`` steps; it takes the place of the last one at once.

    ``run`` is the run's id, ``rows`` the log so far: the file names what belongs to it.

    Raises:
        OSError: it cannot be written; the last one stays.
    """
    state = optimizer.state_dict()
    tensors = {_NETWORK + name: t for name, t in network.state_dict().items()}
    plain: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{number}.{name}"] = value
            else:
                plain.setdefault(str(number), {})[name] = value
    facts = {"step": step, "optimizer": plain, "groups": state["param_groups"]}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    write_state(path, tensors, {**metadata, "run": run, "log": _mark(rows)})


def write_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors with a checksum of all that is in the file.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    write_tensors(path, tensors, {**metadata, _CHECKSUM: _checksum_of(tensors, metadata)})


def _check_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Refuse a file in which a byte has changed; one of an earlier version has no checksum."""
    rest = {name: text for name, text in metadata.items() if name != _CHECKSUM}
    is_whole = "run" not in rest or metadata.get(_CHECKSUM) == _checksum_of(tensors, rest)
    check(is_whole, f"{path} is damaged: its content has another checksum")


def _checksum_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    named = sorted(tensors.items())
    kinds = [[name, str(t.dtype), list(t.shape)] for name, t in named]
    facts = json.dumps([kinds, sorted(metadata.items())])
    return f"{zlib.crc32(facts.encode()):08x} {checksum(t for _, t in named):08x}"


def load_checkpoint(
    path: Path, network: nn.Module, optimizer: Optimizer, steps: int | None = None
) -> int:
    """Put network and optimiser into the state that was saved; return its number of steps.

    ``steps`` is how many the run has; None: nobody knows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, a damaged one, one of another network, or of a step
            that the run does not have.
    """
    tensors, metadata = read_tensors(path)
    where = printable(str(path))
    try:
        facts = {key: json.loads(metadata[key]) for key in _FORM}
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"{where} is no checkpoint of a training run") from None
    step, plain, groups = checked_facts(where, "checkpoint", facts, _FORM).values()
    is_step = type(step) is int and 0 <= step <= (step if steps is None else steps)
    expected = "0 or more" if steps is None else f"0 to {steps}"
    check(is_step, f"{where}: step: expected {expected}, got {step!r}")
    _check_state(path, tensors, metadata)
    weights = {n.removeprefix(_NETWORK): t for n, t in tensors.items() if n.startswith(_NETWORK)}
    check_numbers(where, network, weights)
    _check_groups(where, groups, optimizer)
    state: dict[int, dict[str, Any]] = {int(place): dict(v) for place, v in plain.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        if key.startswith(_NETWORK):
            continue
        place, _, name = key.removeprefix(_OPTIMIZER).partition(".")
        is_known = place.isdecimal() and int(place) < len(parameters)
        fits = is_known and tensor.numel() <= parameters[int(place)].numel()
        other = f"{printable(key)}: expected finite numbers, no more than the weight has"
        check(fits and tensor.isfinite().all(), f"{where} is of another optimiser: {other}")
        state.setdefault(int(place), {})[name] = tensor
    try:
        network.load_state_dict(weights)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"{where} is of another network or optimiser: {first}") from None
    return int(step)


def _check_groups(where: str, groups: list[dict[str, Any]], optimizer: Optimizer) -> None:
    """``ValueError`` for settings of an optimiser that it does not have, or none of their kind."""
    own = json.loads(json.dumps(optimizer.state_dict()["param_groups"]))
    fits = len(groups) == len(own)
    for group, mine in zip(groups, own, strict=False):
        names = {*group, *mine} - {"initial_lr"}  # which a schedule adds
        wrong = sorted(n for n in names if _kind_of(group.get(n)) != _kind_of(mine.get(n)))
        other = f"groups, {printable(''.join(wrong[:1]))}: expected one like {mine!r}"
        check(not wrong, f"{where} is of another network or optimiser: {other}")
    check(fits, f"{where} is of another network or optimiser: groups: expected {len(own)}")


def _kind_of(value: Any) -> Any:
    """What two values must have in common to be of the same setting; NaN is a kind of its own."""
    if isinstance(value, list):
        return [_kind_of(one) for one in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return abs(value) <= 1e300 if is_number else type(value)


def identity_of(
    network: nn.Module,
    dataset: Any,
    optimizer: Optimizer,
    settings: TrainingSettings,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return the part of a run's configuration that is the same for whatever is trained."""
    facts = asdict(settings)
    for name in ("workers", "checkpoint_every", "device"):  # the weights do not depend on these
        del facts[name]
    shapes = {name: list(t.shape) for name, t in network.state_dict().items()}
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
        | {"lr": group.get("initial_lr", group["lr"])}  # "lr" may be what a schedule left
        for group in optimizer.param_groups
    ]
    return {
        **facts,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "draws": "of each image",  # in version 0.2.0 of a batch
        "data": _data_checksum(dataset, settings.seed),
        "network": f"{type(network).__name__} {zlib.crc32(json.dumps(shapes).encode()):08x}",
        "optimizer": f"{type(optimizer).__name__} {groups}",
    }


def _data_checksum(dataset: Any, seed: int) -> str:
    """Return how many samples there are and a checksum of 16: enough to notice other data."""
    count, items = len(dataset), SeededItems(dataset, seed)
    parts: list[Any] = []
    for number in sorted({i * (count - 1) // 15 for i in range(16)}):
        item = items[0, number]
        parts += item if isinstance(item, (list, tuple)) else [item]
    return f"{count} samples {checksum(map(torch.as_tensor, parts)):08x}"


def has_begun(path: Path, configuration: Mapping[str, Any]) -> bool:
    """Whether the file holds this run's configuration; False: there is none yet.

    Raises:
        ValueError: it holds that of another run; says what differs.
    """
    if not path.is_file():
        return False
    try:
        there: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["configuration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{printable(str(path))} is damaged; give another folder") from None
    check_same_run(path.parent, there, configuration)
    return True


def run_id(path: Path) -> str:
    """Return the id in the file that :func:`has_begun` took; "": a run of an earlier version."""
    return str(json.loads(path.read_text(encoding="utf-8")).get("id", ""))


def check_log(path: Path, checkpoint: Path, run: str, step: int) -> list[dict[str, Any]]:
    """Return the rows that a checkpoint was written with, ``step`` being its step.

    Raises:
        ValueError: it is of another run, or the log is not that; says which file is wrong.
    """
    metadata = read_tensors(checkpoint)[1]
    is_own = metadata.get("run", "") == run
    check(is_own, f"{checkpoint} is of another run than run.json beside it")
    rows = list(_whole_rows(path))
    if "log" not in metadata:  # of an earlier version
        return [row for row in rows if row["step"] <= step]
    marked = metadata["log"].partition(" ")[0]
    wrong = f"{printable(str(checkpoint))}: log: expected how many rows and their checksum"
    check(marked.isdecimal(), f"{wrong}, got {printable(metadata['log'][:100])}")
    count = int(marked)
    wrong = f"{printable(str(path))} is not the log that {checkpoint.name} was written with"
    check(len(rows) >= count, f"{wrong}: expected {count} whole rows, got {len(rows)}")
    is_same = _mark(rows[:count]) == metadata["log"]
    check(is_same, f"{wrong}: its first {count} rows were changed or reordered")
    return rows[:count]


def check_not_begun(out: Path, is_known: bool) -> None:
    """Refuse a folder without a checkpoint whose other files say that there was one.

    Raises:
        FileNotFoundError: says which file is missing.
    """
    log = out / "log.jsonl"
    if is_known:
        missing, has_steps = "checkpoint.safetensors", any("loss" in r for r in _whole_rows(log))
        left = [log.name] if has_steps else []
    else:
        missing, names = "run.json", (log.name, "checkpoint.safetensors", "best.safetensors")
        left = [name for name in names if (out / name).exists()]
    trouble = f"no such file, but {', '.join(left)} of a run; give another folder"
    check(not left, f"{out / missing}: {trouble}", FileNotFoundError)


def check_best(path: Path, network: nn.Module, run: str, step: int, best_step: int) -> None:
    """Refuse best weights that are not those of this run.

    Args:
        path: the file.
        network: whose weights it holds.
        run: the id of the run.
        step: where the run goes on; weights of this or a later one are found again.
        best_step: the best one by the log.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged, of another run, network or step.
    """
    weights, metadata = read_tensors(path)
    name = printable(str(path))
    check(metadata.get("run", "") == run, f"{name} is of another run than run.json beside it")
    own = {key: t.shape for key, t in network.state_dict().items()}
    check({key: t.shape for key, t in weights.items()} == own, f"{name} is of another network")
    _check_state(path, weights, metadata)
    check_numbers(name, network, weights)
    there = metadata.get("step", "")
    is_known = there.isdecimal() and (int(there) == best_step or int(there) >= step)
    check(is_known, f"{name}: step: expected {best_step}, the best of the log, got {there!r}")


def _mark(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many rows, and a checksum of them."""
    return f"{len(rows)} {zlib.crc32(_lines(rows).encode()):08x}"


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class Log:
    """Rows of a run, one JSON object a line, each with its ``step``.

    Args:
        path: None keeps the rows in memory only.
        until: rows of later steps are dropped: the run goes on from there.
        count: and all behind so many rows; None: no others.
    """

    def __init__(self, path: Path | None, until: int, count: int | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        self.rows = [r for r in islice(_whole_rows(path), count) if r["step"] <= until]
        write_whole(path, _lines(self.rows))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; they are on the disk when this returns.

        Raises:
            OSError: they cannot be written.
        """
        new = [dict(row) for row in rows]
        self.rows += new
        if self.path is None or not new:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines(new))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{printable(str(self.path))}: could not be written ({error})") from None


def _whole_rows(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the rows up to the first that a kill has torn; of no file none."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            index(row["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        yield row
