"""Tensors on disk: safetensors files that are there whole or not at all; and checksums."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from captum_robust._checks import printable


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file under another name, and put it in the place of what was there.

    Raises:
        OSError: it cannot be written, because the disk is full, say; the old file stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f".{path.name}.part")
    # Clones: the format takes no two tensors that share memory, as tied weights do.
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(own, part, dict(metadata))
        with part.open("rb+") as file:
            _sort_metadata(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name is: power may fail
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # there may be no such folder
            part.unlink(missing_ok=True)
        raise OSError(f"{printable(str(path))}: could not be written ({error})") from None


def write_network(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, half: bool = False
) -> None:
    """Write the weights of a network; with ``half`` in half precision those that it can hold.

    Raises:
        ValueError: the path does not end in ``.safetensors``.
        OSError: the file cannot be written; one that was there before stays.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a name that ends in .safetensors, got {path.name}")
    write_tensors(path, {n: _halved(t) if half else t for n, t in tensors.items()}, metadata)


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
        raise FileNotFoundError(f"{printable(str(path))}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{printable(str(path))} is not a safetensors file ({error})") from None


def read_network(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`read_tensors` gives of a file that a user was handed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file, a torn one, or by its name a pickle.
    """
    if path.suffix in {".pt", ".pth", ".pkl", ".bin", ".ckpt"}:
        shown = printable(str(path))
        raise ValueError(f"{shown} may be a pickle, which can run code; expected .safetensors")
    return read_tensors(path)


def checksum(tensors: Iterable[Tensor]) -> int:
    """The CRC-32 of their bytes, one after another."""
    found = 0
    for tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(raw.numpy().data, found)
    return found
