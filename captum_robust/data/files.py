"""Reading files from a folder, or from an archive without unpacking it."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from posixpath import basename
from typing import Any, BinaryIO, Literal

from captum_robust._checks import check
from captum_robust.data.sample import DataError

LARGEST = 2**30
"""Bytes of one sample's file."""


def existing(path: str | Path, kind: Literal["file", "folder"], expected: str) -> Path:
    """The path, or ``FileNotFoundError`` that says what was expected there."""
    path = Path(path)
    there = path.is_dir() if kind == "folder" else path.is_file()
    check(there, f"{path}: no such {kind}; expected {expected}", FileNotFoundError)
    return path


def stem_of(name: str) -> str:
    """The name of a file without folders and suffix.

    >>> stem_of("val/images/val_0.JPEG")
    'val_0'
    """
    return basename(name).rsplit(".", 1)[0]


def read_bytes(path: Path, name: str | None = None) -> bytes:
    """The file of one sample; :class:`DataError` that names it where it cannot be read.

    A pipe or a device, which may never end, is not read, nor more than ``LARGEST`` bytes.
    """
    name = name or str(path)
    try:
        facts = path.stat()
        is_file = stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)
        check(is_file, "a pipe or a device, no file", OSError)
        fits = facts.st_size <= LARGEST
        check(fits, f"expected at most {LARGEST} bytes, got {facts.st_size}", OSError)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from None
    except ValueError as error:  # a zero byte, or what the file system's encoding cannot hold
        raise DataError(f"{name}: no name of a file: {error}") from None


def read_text(path: Path, errors: str = "backslashreplace") -> str:
    """A text file of the whole data set, see :func:`decode_text`.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it isn't text.
    """
    return decode_text(path.read_bytes(), str(path), errors)


def decode_text(data: bytes, name: str, errors: str = "backslashreplace") -> str:
    """Text in UTF-8, with or without a byte order mark; ``ValueError`` that names what is none.

    A byte that isn't UTF-8 is written as ``\\xNN``, as in the names of :func:`list_images`: one odd
    name spoils its own sample only.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_text = b"\0" not in data
        check(is_text, f"{name}: not a text file in UTF-8 (byte {error.start})")
        return data.decode("utf-8-sig", errors)


class FileTree(ABC):
    """Files by their path below a root, read at random.

    A tree can be pickled, and read from threads and forked processes.
    """

    path: Path
    names: list[str]
    """Paths of all files, with ``/``; in order of the folder or archive."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file; :class:`DataError` where it cannot be read."""

    def where(self, name: str) -> str:
        """The file's name for messages."""
        return f"{self.path}:{name}"


def open_tree(path: Path) -> FileTree:
    """The files of a folder, a tar archive (plain or compressed), or a zip archive.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file that is no archive, or a damaged one.
    """
    if path.is_dir():
        return _Folder(path)
    existing(path, "file", "a folder, a .tar[.gz] or a .zip")
    try:
        return _Zip(path) if zipfile.is_zipfile(path) else _Tar(path)
    # A damaged gzip stream raises EOFError or zlib.error, depending on where it breaks.
    except Exception as error:
        kinds = "a folder, .tar[.gz] or .zip"
        raise ValueError(f"{path}: cannot be read as {kinds}: {error}") from None


class _Folder(FileTree):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = [
            Path(folder, file).relative_to(path).as_posix()
            for folder, _, files in os.walk(path, followlinks=True)
            for file in files
        ]

    def read(self, name: str) -> bytes:
        return read_bytes(self.path / name)

    def where(self, name: str) -> str:
        return str(self.path / name)


class _Tar(FileTree):
    """A tar archive, by the place of each file in it.

    A compressed one has no random access: it is held in memory, uncompressed, once a process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with tarfile.open(path) as tar:
            self._is_plain = isinstance(tar.fileobj, io.BufferedReader)
        with self._open() as file, tarfile.open(fileobj=file) as tar:
            self._spans = {  # offset and size
                member.name.removeprefix("./"): (member.offset_data, member.size)
                for member in tar
                if member.isreg() and not member.issparse()
            }
        self.names = list(self._spans)

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._is_plain else io.BytesIO(self._uncompressed)

    @cached_property
    def _uncompressed(self) -> bytes:
        with tarfile.open(self.path) as tar:
            stream = tar.fileobj
            assert stream is not None
            stream.seek(0)
            return bytes(stream.read(-1))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_uncompressed"}

    def read(self, name: str) -> bytes:
        offset, size = self._spans[name]
        try:
            with self._open() as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{self.where(name)}: {error.strerror or error}") from None
        whole = len(data) == size
        check(whole, f"{self.where(name)}: the archive ends before the file does", DataError)
        return data


class _Zip(FileTree):
    """A zip archive, opened once a process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        members = (member for member in self._zip().infolist() if not member.is_dir())
        self._members = {m.filename.removeprefix("./"): m.filename for m in members}
        self.names = list(self._members)

    def _zip(self) -> zipfile.ZipFile:
        # A forked process shares the parent's file position, so it must open its own.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def read(self, name: str) -> bytes:
        try:
            return self._zip().read(self._members[name])
        # Besides BadZipFile: OSError, zlib.error, RuntimeError for an encrypted member, …
        except Exception as error:
            raise DataError(f"{self.where(name)}: {error}") from None
