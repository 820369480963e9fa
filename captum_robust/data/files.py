"""Reading files from disk, or from an archive without unpacking it."""

from __future__ import annotations

from pathlib import Path

from captum_robust.data.sample import DataError


def read_bytes(path: Path) -> bytes:
    """The file of one sample; :class:`DataError` that names it where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def read_text(path: Path) -> str:
    """A text file of the whole data set, in UTF-8 with or without a byte order mark.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it isn't UTF-8.
    """
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 text, or ``ValueError`` that names the file."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not a text file in UTF-8 (byte {error.start})") from None
