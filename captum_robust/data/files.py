"""Reading files from a folder, or from an archive without unpacking it."""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from posixpath import basename, dirname, join, normpath
from typing import Any, BinaryIO, Literal, TypeVar

from captum_robust._checks import check, printable, refusal, valid_unicode
from captum_robust._files import special_file
from captum_robust._progress import counted
from captum_robust.data.sample import DataError
from captum_robust.runs.rank_files import holds_rows

Place = TypeVar("Place")
_USUAL_RATIO = 20
"""Times its size that an archive may unpack to, also where that is more than ``largest()``."""
BLANKS = " \t\r\n\f\v"
"""What stands between the words of a list; other spaces and separators may belong to names."""
_LONGEST_LINK = 4096
"""Bytes of the path that a link in an archive leads to."""


_SYSTEM_FOLDERS = (
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),  # of a NAS
    *("__macosx", "$recycle.bin", "system volume information", "lost+found"),
)


def is_hidden(name: str) -> bool:
    """Whether a part of a path is hidden, or a folder that a system keeps beside one's own.

    >>> is_hidden("cat/._1.jpg"), is_hidden("@eaDir/1.jpg"), is_hidden("cat/1.jpg")
    (True, True, False)
    """
    parts = name.split("/")
    return any(part.startswith(".") or part.casefold() in _SYSTEM_FOLDERS for part in parts)


def is_run(names: Sequence[str]) -> bool:
    """Whether a folder with files of these names is that of a run of this package."""
    return "run.json" in names and holds_rows(names)


def files_below(root: Path, *, without: Path | None = None) -> Iterator[Path]:
    """The files at any depth, in order of their paths, but for those in the folder ``without``.

    Links to folders are followed, but for those that lead up again. Hidden names are passed over,
    see :func:`is_hidden` (macOS leaves ``._*.jpg`` files in archives), as are folders that a run of
    this package wrote. A folder that cannot be read is warned of.
    """
    entered = tuple(os.path.realpath(f) for f in (without, root) if f is not None)
    if len(set(entered)) == len(entered):  # else all is left out
        yield from _below(root, entered, set(), linked=False)


def _below(
    folder: Path, entered: tuple[str, ...], seen: set[str], *, linked: bool
) -> Iterator[Path]:
    """``entered``: the real folders on the way here, to which a link has led if ``linked``."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        warnings.warn(printable(f"{folder}: left out: {error.strerror}"), stacklevel=3)
        return
    if seen and is_run([entry.name for entry in entries]):
        return
    seen.add(entered[-1])
    for entry in entries:
        if is_hidden(entry.name):
            continue
        is_link = entry.is_symlink()
        if not (os.path.isdir(entry.path) if is_link else entry.is_dir()):
            yield Path(entry.path)
            continue
        real = os.path.realpath(entry.path)
        # Behind a link, links are followed to new folders only: where all folders link to all
        # others, there would be more paths than one can wait for.
        if real not in entered and not (linked and is_link and real in seen):
            inside = (*entered, real)
            yield from _below(Path(entry.path), inside, seen, linked=linked or is_link)


def by_name(
    files: Mapping[str, Place], name_of: Callable[[str], str], where: object
) -> dict[str, Place]:
    """The files by what ``name_of`` makes of their paths, as valid text.

    Raises:
        ValueError: two files of one name.
    """
    paths: dict[str, str] = {}
    for path in files:
        other = paths.setdefault(valid_unicode(name_of(path)), path)
        check(other == path, f"{where}: expected one file of a name, got {other} and {path}")
    return {name: files[path] for name, path in paths.items()}


def limit(name: str, usual: float) -> float:
    """A limit, which the environment variable ``name`` may set to another ("inf" for none)."""
    given = os.environ.get(name, str(usual))
    try:
        number = float(given)
    except ValueError:
        number = 0.0
    check(number > 0, f"{name}: expected a positive number, got {given!r}")
    return number


def largest() -> float:
    """Bytes of one sample's file, and of what an archive unpacks to: 1 GiB.

    The environment variable ``CAPTUM_ROBUST_MAX_GIGABYTES`` sets another.
    """
    return limit("CAPTUM_ROBUST_MAX_GIGABYTES", 1) * 2**30


def _check_length(size: int, name: str) -> None:
    expected = f"{name}: expected at most {largest():.0f} bytes, got {size}"
    fits = 0 <= size <= largest()
    check(fits, f"{expected}; CAPTUM_ROBUST_MAX_GIGABYTES sets the limit", DataError)


def _check_unpacked(size: int, path: Path) -> None:
    """Refuse an archive that is a bomb: images hardly shrink when they are packed."""
    most = max(largest(), _USUAL_RATIO * path.stat().st_size)
    expected = f"expected at most {most:.0f} bytes unpacked, got {size} or more"
    check(size <= most, f"{expected}; CAPTUM_ROBUST_MAX_GIGABYTES sets the limit")


def existing(path: str | Path, kind: Literal["file", "folder"], expected: str) -> Path:
    """The path, or ``FileNotFoundError`` that says what was expected there."""
    path = Path(path)
    there = path.is_dir() if kind == "folder" else path.is_file()
    what = special_file(path) or f"no such {kind}"
    check(there, f"{path}: {what}; expected {expected}", FileNotFoundError)
    return path


def stem_of(name: str) -> str:
    """The name of a file without folders and suffix.

    >>> stem_of("val/images/val_0.JPEG")
    'val_0'
    """
    return basename(name).rsplit(".", 1)[0]


def read_bytes(path: Path, name: str | None = None) -> bytes:
    """The file of one sample; :class:`DataError` that names it where it cannot be read.

    A pipe or a device, which may never end, is not read, nor more than :func:`largest` bytes.
    """
    name = name or str(path)
    try:
        size, what = path.stat().st_size, special_file(path)
        check(what is None, f"{what}, no file", OSError)
        _check_length(size, name)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from None
    except DataError:
        raise
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


def lines_of(text: str, *, with_ends: bool = False) -> list[str]:
    r"""The lines of a file, which names may not end: they may hold other separators.

    >>> lines_of("a\u2028b\r\nc\n")
    ['a\u2028b', 'c']
    """
    lines = list(io.StringIO(text, newline=""))
    return lines if with_ends else [line.rstrip("\r\n") for line in lines]


def words_of(line: str, most: int = 0) -> list[str]:
    r"""The words of a line, or so many and the rest: names may hold other spaces than these.

    >>> words_of(" a\u2028b.png\t1 2\n"), words_of("n01440764 tench, Tinca tinca", most=1)
    (['a\u2028b.png', '1', '2'], ['n01440764', 'tench, Tinca tinca'])
    """
    inner = line.strip(BLANKS)
    return re.split(f"[{BLANKS}]+", inner, maxsplit=most) if inner else []


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
        ValueError: a file that is no archive, or a damaged one; one that unpacks to more than
            :func:`largest` bytes and to 20 times its own size.
    """
    if path.is_dir():
        return _Folder(path)
    existing(path, "file", "a folder, a .tar[.gz] or a .zip")
    try:
        return _Zip(path) if zipfile.is_zipfile(path) else _Tar(path)
    # A damaged gzip stream raises EOFError or zlib.error, depending on where it breaks.
    except Exception as error:
        kinds = "a folder, .tar[.gz] or .zip"
        raise ValueError(refusal(f"{path}: cannot be read as {kinds}: {error}")) from None


class _Folder(FileTree):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = [file.relative_to(path).as_posix() for file in files_below(path)]

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
        spans: dict[str, tuple[int, int]] = {}  # offset and size
        links: dict[str, str] = {}
        self._unread: dict[str, str] = {}
        with self._open() as file, tarfile.open(fileobj=file) as tar:
            for member in counted(tar, "file", None, f"reading {path.name}"):
                name = normpath(member.name)
                for those in (spans, links, self._unread):
                    those.pop(name, None)  # of two members of one name the later counts
                if member.issym() or member.islnk():
                    links[name] = _target(name, member.linkname, is_hard=member.islnk())
                elif member.isreg() and not member.issparse():
                    spans[name] = (member.offset_data, member.size)
                elif not member.isdir():
                    self._unread[name] = "it is a device or a sparse file, which are not read"
        self._spans, broken = _with_links(spans, links)
        self._unread |= broken
        self.names = [*self._spans, *self._unread]

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._is_plain else io.BytesIO(self._uncompressed)

    @cached_property
    def _uncompressed(self) -> bytes:
        with tarfile.open(self.path) as tar:
            stream = tar.fileobj
            assert stream is not None
            stream.seek(0)
            unpacked = io.BytesIO()
            while block := stream.read(2**20):
                unpacked.write(block)
                _check_unpacked(unpacked.tell(), self.path)
        return unpacked.getvalue()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_uncompressed"}

    def read(self, name: str) -> bytes:
        check(name not in self._unread, f"{self.where(name)}: {self._unread.get(name)}", DataError)
        offset, size = self._spans[name]
        _check_length(size, self.where(name))
        try:
            with self._open() as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{self.where(name)}: {error.strerror or error}") from None
        whole = len(data) == size
        check(whole, f"{self.where(name)}: the archive ends before the file does", DataError)
        return data


def _target(name: str, link: str, *, is_hard: bool = False) -> str:
    """The path in the archive that a link leads to; a hard link's is one from the root."""
    return normpath(link if is_hard else join(dirname(name), link))


def _with_links(
    files: dict[str, Place], links: dict[str, str]
) -> tuple[dict[str, Place], dict[str, str]]:
    """All files, also those that links to files and folders lead to; why others lead nowhere."""
    if not links:
        return files, {}
    targets = {name: _resolved(target, links) for name, target in links.items()}
    led_to = files | {name: files[target] for name, target in targets.items() if target in files}
    below: dict[str, list[str]] = {}
    for name in led_to:
        for folder in PurePosixPath(name).parents:
            below.setdefault(str(folder), []).append(name)
    every, broken = dict(led_to), {}
    for name, target in targets.items():
        if target in below and not PurePosixPath(name).is_relative_to(target):  # it leads not up
            every |= {name + inner.removeprefix(target): led_to[inner] for inner in below[target]}
        elif target not in below and target not in files:
            broken[name] = f"it is a link to {target!r}, which is no file of the archive"
    return every, broken


def _resolved(path: str, links: dict[str, str]) -> str:
    """Where a path leads through links; as far as after 40 of them, which go in a circle."""
    for _ in range(40):
        ways = (path, *map(str, PurePosixPath(path).parents))
        link = next((way for way in reversed(ways) if way in links), None)
        if link is None:
            break
        path = normpath(links[link] + path.removeprefix(link))
    return path


class _Zip(FileTree):
    """A zip archive, opened once a process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        members: dict[str, str] = {}
        links: dict[str, str] = {}
        listed = self._zip().infolist()
        _check_unpacked(sum(member.file_size for member in listed), path)
        for member in listed:
            name = normpath(member.filename)
            is_short = member.file_size <= _LONGEST_LINK
            if stat.S_ISLNK(member.external_attr >> 16) and is_short:
                links[name] = _target(name, os.fsdecode(self._zip().read(member)))
            elif not member.is_dir():
                members[name] = member.filename
        self._members, self._unread = _with_links(members, links)
        self.names = [*self._members, *self._unread]

    def _zip(self) -> zipfile.ZipFile:
        # A forked process shares the parent's file position, so it must open its own.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def read(self, name: str) -> bytes:
        check(name not in self._unread, f"{self.where(name)}: {self._unread.get(name)}", DataError)
        member = self._members[name]
        _check_length(self._zip().getinfo(member).file_size, self.where(name))
        try:
            return self._zip().read(member)
        # Besides BadZipFile: OSError, zlib.error, RuntimeError for an encrypted member, …
        except Exception as error:
            raise DataError(f"{self.where(name)}: {error}") from None
