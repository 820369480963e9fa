"""Video files: read frame by frame, a few batches ahead, and written whole or not at all."""

from __future__ import annotations

import math
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from captum_robust._checks import check, printable
from captum_robust._files import check_regular, special_file

Frame: TypeAlias = npt.NDArray[np.uint8]
"""H×W×3, in OpenCV's order of colours: blue, green, red."""

USUAL_RATE = 25.0
"""Frames a second of a file or a camera that does not tell."""
_HIGHEST_RATE = 1000.0
_PROBED = 500
"""First frames of a file, by whose times its rate is checked."""
_WAITED_FOR = 25
"""The same of a stream, which are kept meanwhile."""
_PROBED_RATE = 60
"""The highest that is taken from them, unless the file's own is higher."""
_LONGEST = 3600.0
"""Seconds that a frame may stay; what tells more is no time."""


@dataclass
class ReadFrame:
    """A frame of the source."""

    pixels: Frame
    image: Frame
    """What the network sees of it: h×w×3, red, green, blue."""
    seconds: float
    """How long after the first frame it is shown, or came from a camera."""


class VideoSource:
    """Reads a video file, a stream, a sequence of images or a camera, once.

    Args:
        source: a file, an address such as ``rtsp://…``, a pattern such as ``%02d.png``, or the
            number of a camera.
        limit: only the first so many frames.

    Raises:
        FileNotFoundError: no such file.
        OSError: the camera does not open, or the file can't be read.
        ValueError: the file is no video.
    """

    def __init__(self, source: str | Path | int, limit: int | None) -> None:
        self.is_camera = isinstance(source, int)
        self.name = f"camera {source}" if self.is_camera else printable(str(source))
        self._capture = _opened(source, self.name)
        self._limit = limit
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.rate = rate if 0 < rate <= _HIGHEST_RATE else USUAL_RATE
        count = float(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.announced = int(count) if not self.is_camera and 0 < count < 2**31 else None
        self._tells_times = True
        self._waiting: list[tuple[Frame, float]] = []  # frames that were read, and their times
        if not self.is_camera:
            if self.announced or Path(str(source)).is_file():
                times = _first_times(str(source), min(_PROBED, limit or _PROBED))
            else:  # a stream can be read once, and one waits for its frames
                self._waiting = list(islice(self._captured(), min(_WAITED_FOR, limit or _PROBED)))
                times = np.array([told for _, told in self._waiting])
                times = times - times[:1]
            self._tells_times = len(times) > 1 and bool((np.diff(times) > 0).all())
            if self._tells_times:
                self.rate = _rate_of(times, self.rate)
        self.duration = self.announced / rate if self.announced and rate > 0 else 0.0
        """Seconds that the file says it takes; 0: it does not."""
        self.resized = 0
        self.cut_short = False
        self.end = 0.0
        """When the last frame of one that was read to its end is over; 0: nobody knows."""

    @property
    def expected(self) -> int | None:
        """How many frames there will be; None: nobody knows."""
        return min((n for n in (self._limit, self.announced) if n is not None), default=None)

    def read(self, input_size: tuple[int, int]) -> Generator[ReadFrame]:
        """All frames up to the first that can't be read, each of the first one's size."""
        n, first, last, longest = 0, 0.0, 0.0, 0.0
        size: tuple[int, int] | None = None
        try:
            for pixels, told in chain(self._waiting, self._captured()):
                now = told if self._tells_times else n / self.rate
                if size is None:
                    size, first = pixels.shape[:2], now
                elif pixels.shape[:2] != size:
                    pixels = _resized(pixels, size)
                    self.resized += 1
                if n and not 0 < now - first - last <= _LONGEST:  # a broken time
                    first = now - last - 1 / self.rate
                last, longest = now - first, max(longest, now - first - last)
                n += 1
                yield ReadFrame(pixels, _network_image(pixels, input_size), last)
                if n == self._limit:
                    return
            # OpenCV does not tell a broken frame from the end.
            self.cut_short = self.announced is not None and n < self.announced
            if last < self.duration <= last + longest and not self.cut_short:
                self.end = self.duration
        finally:
            self._capture.release()

    def _captured(self) -> Iterator[tuple[Frame, float]]:
        """The frames, each with its time in seconds, up to the first that can't be read."""
        while True:
            is_read, pixels = self._capture.read()
            if not is_read or pixels is None:
                return
            told = float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000
            yield pixels, time.perf_counter() if self.is_camera else told

    def why_empty(self) -> str:
        """Why there was no frame."""
        if self.is_camera:
            return "it gives no frames"
        but = "" if self.announced is None else f", though it announces {self.announced}"
        return f"no frame of it can be read{but}"


def _opened(source: str | Path | int, name: str) -> Any:
    """OpenCV's reader."""
    if isinstance(source, int):
        check(source < 2**31, f"{name}: there is none", OSError)
        capture = cv2.VideoCapture(source)
        check(capture.isOpened(), f"{name}: there is none, or another program uses it", OSError)
        return capture
    path = Path(source)
    check(not path.is_dir(), f"{name} is a folder; give a video file", IsADirectoryError)
    what = None if "://" in str(source) else special_file(path)
    check(what is None, f"{name} is {what}; give a video file")
    if path.exists() or not re.search(r"://|%\d*d", str(source)):
        check(path.exists(), f"{name}: no such file", FileNotFoundError)
        with path.open("rb"):  # says why not, which OpenCV does not
            pass
    capture = cv2.VideoCapture(str(source))
    why = "; does the address answer, within half a minute?" if "://" in str(source) else ""
    check(capture.isOpened(), f"{name}: OpenCV can't read it as a video{why}")
    return capture


def _first_times(source: str, n: int) -> npt.NDArray[np.float64]:
    """When up to n frames of a file are shown, in seconds after the first."""
    capture = cv2.VideoCapture(source)
    times: list[float] = []
    while len(times) < n and capture.grab():
        times.append(float(capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000)
    capture.release()
    return np.array(times) - times[0] if times else np.zeros(0)


def _rate_of(times: npt.NDArray[np.float64], rate: float) -> float:
    """The rate at which each frame has its time: the file's own or another, if one does."""
    n = len(times)
    for constant in (rate, round((n - 1) / float(times[-1]), 2)):
        if np.abs(times * constant - np.arange(n)).max() < 0.2:
            return constant
    # So many that the shortest frame is one of the written file.
    shortest = float(np.diff(times).min())
    return float(min(math.ceil(1 / shortest - 1e-3), max(math.ceil(rate), _PROBED_RATE)))


def _resized(pixels: Frame, size: tuple[int, int]) -> Frame:
    """The frame at another size (H, W)."""
    shrinks = pixels.shape[0] > size[0] or pixels.shape[1] > size[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, size[::-1], interpolation=method), dtype=np.uint8)


def _network_image(pixels: Frame, size: tuple[int, int]) -> Frame:
    """The frame at the network's size, h×w×3 in red, green, blue."""
    # Halving, which is bilinear there, several times as fast as the area method alone.
    while pixels.shape[0] >= 2 * size[0] and pixels.shape[1] >= 2 * size[1]:
        half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
        pixels = np.asarray(cv2.resize(pixels, half, interpolation=cv2.INTER_LINEAR), np.uint8)
    return _resized(pixels, size)[:, :, ::-1]


@contextmanager
def read_ahead(
    frames: Generator[ReadFrame], n: int, batches: int
) -> Iterator[Iterator[list[ReadFrame]]]:
    """Batches of n frames, read in a thread some batches ahead: reading and network share the time.

    What reading raises is raised where its batch would come.
    """
    waiting: queue.Queue[list[ReadFrame] | BaseException] = queue.Queue(batches)
    stop = threading.Event()

    def send(item: list[ReadFrame] | BaseException) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            while not stop.is_set():
                batch = list(islice(frames, n))
                send(batch)
                if not batch:
                    break
            frames.close()
        except BaseException as error:
            send(error)

    def received() -> Iterator[list[ReadFrame]]:
        while item := waiting.get():
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield received()
    finally:
        stop.set()
        thread.join(timeout=5)  # a camera that hangs is left to itself


class VideoFile:
    """A video file of frames of one size, which gets its name when it is complete.

    Until then, and after an error, an older one stays.

    Args:
        path: the file to write.
        codecs: of four letters each; the first is taken that OpenCV has.
        rate: frames a second.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, path: Path, codecs: Sequence[str], rate: float) -> None:
        self.path, self.rate, self._codecs = path, rate, codecs
        self.codec = codecs[-1]
        """The one that is taken."""
        self.size = (0, 0)
        """(H, W) of the frames."""
        self.frames = 0
        self._written = 0  # more or fewer: they may be repeated or left out, to be in time
        self._video: Any = None
        self._last: Any = None
        check_regular(path)
        # With the suffix, by which OpenCV knows the format.
        self._part = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
        try:
            self._part.touch()
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"{printable(str(path))}: could not be written ({reason})") from None

    def write(self, pixels: Frame, seconds: float) -> None:
        """Add the frame that begins ``seconds`` after the first, also where others are missing.

        Raises:
            ValueError: OpenCV lacks the codec.
        """
        if self._video is None:
            self._open(pixels)
        self._last = pixels
        self._repeat(math.floor(seconds * self.rate + 0.5) + 1)
        self.frames += 1

    def hold(self, seconds: float) -> None:
        """Let the last frame stay until ``seconds`` after the first."""
        self._repeat(math.floor(seconds * self.rate + 0.5))

    def _repeat(self, count: int) -> None:
        while self._written < count:
            self._video.write(self._last)
            self._written += 1

    def _open(self, like: Frame) -> None:
        self.size = (like.shape[0], like.shape[1])
        height, width = self.size
        for codec in self._codecs:
            fourcc = cv2.VideoWriter.fourcc(*codec)
            self._video = cv2.VideoWriter(str(self._part), fourcc, self.rate, (width, height))
            if self._video.isOpened():
                self.codec = codec
                return
        what = f"{self.path.suffix} with {self.codec!r}, {width}×{height} pixels"
        raise ValueError(f"codec: OpenCV can't write {what}")

    def complete(self) -> None:
        """Give the file its name.

        Raises:
            OSError: not all frames that were written can be read again.
        """
        self._video.release()
        readable = readable_frames(self._part, self._written)  # OpenCV tells of no full disk
        if readable:
            os.replace(self._part, self.path)
        check(
            readable == self._written,
            f"{printable(str(self.path))}: only {readable} of {self._written} frames could be "
            "written; is the disk full?",
            OSError,
        )

    def close(self) -> None:
        """Leave nothing of a file that is not complete."""
        if self._video is not None:
            self._video.release()
        self._part.unlink(missing_ok=True)


def readable_frames(path: Path, expected: int) -> int:
    """How many frames of a file that was written can be read again."""
    video = cv2.VideoCapture(str(path))
    # The count alone is no proof: it stands at the beginning of some files.
    if video.get(cv2.CAP_PROP_FRAME_COUNT) >= expected:
        video.set(cv2.CAP_PROP_POS_FRAMES, expected - 1)
        if video.read()[0]:
            return expected
    video.open(str(path))  # from the first again
    count = 0
    while count < expected and video.grab():
        count += 1
    return count
