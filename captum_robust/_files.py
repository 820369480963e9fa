"""Files that are there whole or not at all: text, tensors with facts; whether a run is the same."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from captum_robust._checks import check, check_shape, printable, refusal
from captum_robust._facts import Form, checked_facts

Record = TypeVar("Record", bound="TensorRecord")

PICKLES = {".pt", ".pth", ".pkl", ".bin", ".ckpt"}
"""Suffixes of files that may be pickles, which are never opened."""
_SPECIAL = {
    **{stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"},
    **{stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"},
}
_CARD = "card"
_PART = re.compile(r"\.[0-9a-f]{16}\.part")
_used: set[Path] = set()
"""Folders that this process writes to: the lock of a file does not tell its threads apart."""
_claiming = threading.Lock()


def special_file(path: Path) -> str | None:
    """What lies at the path, such as "a pipe", where it is no file, folder or nothing."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "a link that leads to no file" if path.is_symlink() else None
    return _SPECIAL.get(stat.S_IFMT(mode))


def check_regular(path: Path) -> None:
    """``OSError`` if a device, pipe or socket is there, which a file would take the place of."""
    what = special_file(path)
    is_free = what is None or not path.exists()  # a link that leads nowhere may be replaced
    check(is_free, f"{path} is {what}; give the name of a file", OSError)


def write_whole(path: Path, content: bytes | str, *, keep: bool = False) -> Path:
    """Write a file under another name, and put it in the place of what was there.

    Text is written in UTF-8; what that cannot hold, such as a broken file name, is written out.
    With ``keep`` a file that is there stays, also one that another process has just written.

    Raises:
        IsADirectoryError: the path is a folder.
        OSError: it cannot be written, because the disk is full, say; the old file stays. Or a
            device, pipe or socket is there.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{printable(str(path))} is a folder; give the name of a file")
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    return write_by(path, lambda part: part.write_bytes(data), keep=keep)


def check_folder(path: Path) -> None:
    """``ValueError`` if the folder ``out``, there or not, is a file or lies below one."""
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    got = f"{printable(str(there))}, which is none"
    check(there.is_dir(), f"out: expected a folder, got {got}; give another")


@contextmanager
def sole_user(folder: Path | None) -> Iterator[None]:
    """Inside, no other process or thread gets the folder, which is made; None: nothing is done.

    Raises:
        ValueError: another one has it.
        OSError: the folder can't be made.
    """
    if folder is None:
        yield
        return
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place, taken = folder.resolve(), f"{printable(str(folder))} is used by another run now"
    with _claiming:
        check(place not in _used, f"{taken}; wait for its end or give another folder")
        _used.add(place)
    try:
        with (folder / ".lock").open("wb") as file:
            check(_lock(file), f"{taken}; wait for its end or give another folder")
            yield
    finally:
        _used.discard(place)


def _lock(file: BinaryIO) -> bool:
    """Whether the file is locked now, until it is closed or the process ends; no child has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def write_by(path: Path, write: Callable[[Path], object], *, keep: bool = False) -> Path:
    """Let ``write`` make the file in a folder beside it, and move it when it is on the disk."""
    check_regular(path)
    try:
        with _part_beside(path) as part:
            part.touch()
            mode = part.stat().st_mode
            write(part)
            part.chmod(mode)  # safetensors makes files that nobody else can read
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # on the disk before the name is: power may fail
            if not (keep and _is_linked(part, path)):
                os.replace(part, path)
            _sync_folder(path.parent)
    except OSError as error:
        raise OSError(f"{printable(str(path))}: could not be written ({error})") from None
    return path


@contextmanager
def _part_beside(path: Path) -> Iterator[Path]:
    """A file in a new folder beside it, which :func:`remove_parts` leaves alone until the end."""
    while True:
        folder = path.with_name(f".{secrets.token_hex(8)}.part")  # names may be as long as can be
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _lock_folder(folder, stack, sole=False)
            if folder.exists():  # else one that removes parts came before the lock
                yield folder / "part"
                return


def _lock_folder(folder: Path, stack: ExitStack, *, sole: bool) -> bool:
    """Whether its lock is held now, until the stack or the process ends, by one alone or more."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        number = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, number)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB if sole else fcntl.LOCK_SH)
    except OSError:  # it is gone, another has it, or the file system knows no locks
        return False
    return True


def remove_parts(folder: Path, *, shared: bool = False, below: bool = False) -> None:
    """Remove what killed processes left of files in a folder, and ``below`` it too if asked.

    If it is ``shared`` with processes that write now, what they write stays.
    """
    for place, folders, _ in os.walk(folder):  # what goes away meanwhile is passed over
        parts = [name for name in folders if _PART.fullmatch(name)]
        folders[:] = [name for name in folders if name not in parts] if below else []
        for part in parts:
            with ExitStack() as stack:
                if _lock_folder(Path(place, part), stack, sole=True) or not shared:
                    shutil.rmtree(Path(place, part), ignore_errors=True)


def _is_linked(part: Path, path: Path) -> bool:
    """Whether the file has its name now, or another has it; not where there are no links."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    if sys.platform == "win32":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have it for files only
            os.fsync(number)
    finally:
        os.close(number)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; equal content gives equal bytes.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Clones: the format takes no two tensors that share memory, as tied weights do.
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}

    def write(part: Path) -> None:
        try:
            save_file(own, part, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from None
        with part.open("rb+") as file:
            _sort_metadata(file)

    write_by(path, write)


def write_facts(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    kind: str,
    facts: Mapping[str, Any],
    card: str | None = None,
) -> None:
    """Write tensors with facts about them.

    Args:
        path: the file.
        tensors: by name.
        kind: what the file holds, such as ``"captum_robust.superpixels"``.
        facts: anything that JSON holds.
        card: a text for who gets the file.

    Raises:
        OSError: the file cannot be written; one that was there before stays.
    """
    metadata = {kind: json.dumps(facts)} | ({} if card is None else {_CARD: card})
    write_tensors(Path(path), tensors, metadata)


def write_network(
    path: str | Path,
    weights: Mapping[str, Tensor],
    kind: str,
    facts: Mapping[str, Any],
    *,
    half: bool = False,
    card: str | None = None,
) -> None:
    """Write the weights of a network with what it takes to build it, see :func:`write_facts`.

    With ``half`` those weights that it can hold are in half precision.

    Raises:
        ValueError: the path does not end in ``.safetensors``.
        OSError: the file cannot be written; one that was there before stays.
    """
    suffix = Path(path).suffix
    check(suffix == ".safetensors", f"path: expected a .safetensors file, got {Path(path).name}")
    write_facts(path, {n: _halved(t) if half else t for n, t in weights.items()}, kind, facts, card)


@dataclass(frozen=True)
class TensorRecord:
    """Named tensors that go to a device and into a file together, and what else is to be known."""

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, in their order."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self: Record, device: torch.device) -> Record:
        """The same on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def check_shapes(self, *shapes: str) -> None:
        """``ValueError`` unless the tensors have these shapes, see :func:`check_shape`."""
        for (name, tensor), shape in zip(self.tensors().items(), shapes, strict=True):
            check_shape(name, tensor, shape)


class TensorFile:
    """A safetensors file that a user handed over, read once for all who look at it.

    Args:
        path: of the file; its text is that of this object.
        any_suffix: whether it may have the name of a pickle; it is never opened as one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file, a torn one, or by its name a pickle.
    """

    def __init__(self, path: str | Path, *, any_suffix: bool = False) -> None:
        self.path = Path(path)
        is_pickle = self.path.suffix in PICKLES and not any_suffix
        may_be = "may be a pickle, which can run code; expected .safetensors"
        check(not is_pickle, f"{path} {may_be}")
        self.tensors, self._metadata = read_tensors(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def holds(self, kind: str) -> bool:
        """Whether there are facts under ``kind``, whatever they say."""
        return kind in self._metadata or self._metadata.get("format") == kind

    def facts(self, kind: str, what: str, form: Form) -> dict[str, Any]:
        """The facts that :func:`write_facts` wrote under ``kind``, a new dictionary each time.

        Raises:
            ValueError: there are none, or others than ``form`` says, or a tensor holds NaN or
                infinity; the file "holds no ``what``".
        """
        checked = facts_of(str(self), self._metadata, kind, what, form)
        for name, tensor in self.tensors.items():
            wrong = f"{printable(str(self))}: NaN or infinity in {printable(name)}"
            check(tensor.isfinite().all(), f"{wrong}: expected finite numbers")
        return checked


def read_facts(
    path: str | Path | TensorFile, kind: str, what: str, form: Form, *, any_suffix: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of a file that a user was handed.

    Args:
        path: a file by :func:`write_facts`, or one that was read already.
        kind: as it was written.
        what: what the file should hold, for messages: "localization network".
        form: what each fact may be.
        any_suffix: whether it may have the name of a pickle; it is never opened as one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file, a torn one, by its name a pickle, of another kind,
            or with facts or tensors that cannot be.
    """
    file = path if isinstance(path, TensorFile) else TensorFile(path, any_suffix=any_suffix)
    return file.tensors, file.facts(kind, what, form)


def facts_of(
    where: str, metadata: Mapping[str, str], kind: str, what: str, form: Form
) -> dict[str, Any]:
    """The facts in the metadata of a file, see :meth:`TensorFile.facts`; ``where`` names it."""
    try:
        facts = json.loads(_facts_text(metadata, kind))
    except (KeyError, ValueError, RecursionError):
        facts = None
    return checked_facts(where, what, facts, form)


def _facts_text(metadata: Mapping[str, str], kind: str) -> str:
    """The facts as JSON, also as version 0.1 wrote them for some kinds, under "format"."""
    if kind in metadata or metadata["format"] != kind:
        return metadata[kind]
    rest = {n: json.loads(text or "null") for n, text in metadata.items() if n != "format"}
    return json.dumps(rest.get("facts", rest))


def _halved(tensor: Tensor) -> Tensor:
    half = tensor.half() if tensor.is_floating_point() else tensor
    return half if bool((half.isfinite() == tensor.isfinite()).all()) else tensor


def _sort_metadata(file: BinaryIO) -> None:
    """Put the metadata in order, which safetensors leaves to chance: equal content, equal bytes."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    if metadata := header.get("__metadata__"):
        header = {**header, "__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= size:  # behind it spaces may stand
        file.seek(8)
        file.write(text.ljust(size))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file, or a torn one.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(refusal(f"{path}: no such file"))
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(refusal(f"{path} is not a safetensors file ({error})")) from None


def checksum(tensors: Iterable[Tensor]) -> int:
    """The CRC-32 of their bytes, one after another."""
    crc = 0
    for tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        crc = zlib.crc32(raw.numpy().data, crc)
    return crc


def check_same_run(
    folder: Path,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    ignored: str | tuple[str, ...] = (),
) -> None:
    """Hold a run's configuration to the one its folder was begun with.

    Args:
        folder: of the run, for the message.
        there: what its file says.
        here: what was asked for.
        ignored: the key of a part that is only for the record, or the keys of several.

    Raises:
        ValueError: they differ; the message shows where.
    """
    before, after = _flat(there), _flat(json.loads(json.dumps(here)))
    parts = (ignored,) if isinstance(ignored, str) else ignored
    differing = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.partition(".")[0] not in parts
    ]
    lines = "; ".join(_difference(key, before, after) for key in differing)
    message = f"{printable(str(folder))} holds another run ({lines}); give another folder"
    check(not differing, message)


def _difference(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What differs: of a described object the settings that do, each by its name."""
    there, here = (_settings_in(str(side.get(key, "(none)"))) for side in (before, after))
    is_same = there[""] == here[""]
    names = (n for n in dict.fromkeys([*there, *here]) if there.get(n) != here.get(n))
    return "; ".join(
        _two_values(f"{key}, {name}" if name else key, there.get(name), here.get(name))
        for name in (names if is_same else ("",))
    )


def _settings_in(text: str) -> dict[str, str]:
    """The settings in the description of an object, "package.Class(name=value, …)".

    Its class, or a text that describes none, has the name "".

    >>> _settings_in("Attack(bounds=(0, 1), steps=3)")
    {'': 'Attack', 'bounds': '(0, 1)', 'steps': '3'}
    """
    described = re.fullmatch(r"([\w.]+)\((\w+=.*)\)", text, re.DOTALL)
    if described is None:
        return {"": text}
    settings, depth, start = {"": described[1]}, 0, 0
    listed = described[2] + ", "
    # Of equal length, so that brackets and commas in quotes are none.
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", lambda quoted: "_" * len(quoted[0]), listed)
    for i, letter in enumerate(plain):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and re.match(r", (\w+=|$)", plain[i:]):
            name, _, value = listed[start:i].partition("=")
            settings[name] = value
            start = i + 2
    return settings if start == len(listed) else {"": text}


def _two_values(name: str, there: str | None, here: str | None) -> str:
    there, here = there or "(none)", here or "(none)"
    # Of long ones the part where they begin to differ, character by character.
    start = max(0, len(os.path.commonprefix([there, here])) - 60)  # noqa: RUF071
    stop = start + 120
    there, here = (
        ("…" if start else "") + text[start:stop] + ("…" if len(text) > stop else "")
        for text in (there, here)
    )
    return f"{name}: {there} there, {here} here"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}{key}."))
    return flat
