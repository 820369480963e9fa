"""Where a network looks, on every frame of a video."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captum_robust._checks import as_number, check_count, check_finite, printable, unknown_name
from captum_robust._processes import progress_bar
from captum_robust.catalog.methods import build_methods
from captum_robust.draw import tag
from captum_robust.models import Classifier

Frame: TypeAlias = npt.NDArray[np.uint8]
"""H×W×3, in OpenCV's order of colours: blue, green, red."""

CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
"""What a file is written with, by its suffix."""
USUAL_RATE = 25.0
"""Frames a second of a file or a camera that does not tell."""
_HIGHEST_RATE = 1000.0
_MASK_SHARE = 0.55
_LETTERS = 1 / 24
"""Of the frame's height."""
_SMALLEST_LETTERS = 12
_BATCHES_AHEAD = 2


class MasksAndScores(Protocol):
    """What gives the masks: a ``nn.MaskingNetwork``, or a :class:`MethodMasks`."""

    def masks_and_scores(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Masks N×1×h×w in [0, 1] and scores N×K of images N×3×H×W in [0, 1].

        ``classes`` are N; None: those with the highest scores.
        """
        ...


class MethodMasks:
    """Any attribution method, as :func:`annotate_video` takes it: maps divided by their largest.

    Args:
        model: gives the scores.
        method: a name of ``benchmark.METHODS``, a Captum attribution, or a function
            ``(images N×C×H×W, target N) -> N×H×W or N×C×H×W``.

    Raises:
        ValueError: an unknown name; a network in which the method finds no layer.
        TypeError: a method that is none of these.
    """

    def __init__(self, model: Classifier, method: Any) -> None:
        self.encoder = model
        self.input_size = model.input_size
        self._method = build_methods(model, {str(method): method})[str(method)]

    def masks_and_scores(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps N×1×H×W in [0, 1], zero where nothing is positive, and scores N×K."""
        with torch.no_grad():
            scores = self.encoder(x)
        explained = scores.argmax(dim=1) if classes is None else classes
        maps = self._method.explain(x, explained).maps.detach().float().clamp(min=0)
        largest = maps.amax(dim=(1, 2), keepdim=True)
        return (maps / largest.where(largest > 0, 1.0)).unsqueeze(1), scores


@dataclass(frozen=True)
class VideoResult:
    """What :func:`annotate_video` wrote."""

    path: Path
    frames: int
    """Of the source, each annotated."""
    seconds: float
    """From the first read to the complete file."""
    size: tuple[int, int]
    """(H, W) of the source's frames."""
    frame_rate: float
    """Frames a second when the file is played."""
    announced: int | None
    """How many frames the source says that it has, which may be an estimate; None: it does not."""
    cut_short: bool
    """Whether it ended before that number, as a torn file does."""
    resized: int
    """How many frames had another size than the first, and were resized to it."""
    interrupted: bool
    """Whether Ctrl-C ended it."""


def annotate_video(
    source: str | Path | int,
    out: str | Path,
    network: MasksAndScores,
    *,
    class_names: Sequence[str] | None = None,
    input_size: tuple[int, int] | None = None,
    target: int | None = None,
    smooth: float = 0.0,
    batch_size: int = 4,
    codec: str | None = None,
    limit: int | None = None,
    precision: str = "float32",
    progress: bool = False,
) -> VideoResult:
    """Write a video again with the mask of a class over each frame, and the class written on it.

    Black is 0 and yellow is 1 on every frame, so that frames can be compared. The network sees the
    whole frame, squashed to its size. Frames keep their size and rate; an odd side loses its last
    row or column, as the codecs halve the colours. A camera whose frames come at another rate than
    it says keeps its time: frames are left out or repeated. Memory does not grow with the length.
    Sound is not copied.

    The file gets its name when it is complete; until then, and after an error, an older one stays.
    Ctrl-C is the way to end a camera: it completes the file, and the result says so.

    Args:
        source: a file that OpenCV reads, or the number of a camera, from 0.
        out: the file to write, ``.mp4`` or ``.avi``.
        network: is run as it is, where its parameters are.
        class_names: in the order of the scores; None: those of the network's encoder, else numbers.
        input_size: (H, W) of the images for the network; None: ``network.input_size``.
        target: the class whose mask and probability are shown; None: the predicted one.
        smooth: s in [0, 1) of the exponential average m ← s·m + (1 − s)·new over the frames, of
            the masks and of the probabilities. The predicted class is that of the averaged ones,
            so that no single frame changes it; when it does change, the masks' average begins
            anew, as the mask of another class says nothing of this one. 0: each frame by itself.
        batch_size: frames that the network gets at once.
        codec: four letters ("FourCC") of another codec.
        limit: only the first so many frames.
        precision: ``"float32"``, or ``"bfloat16"`` under autocast.
        progress: a bar on standard error.

    Raises:
        FileNotFoundError: no such file, or no folder for ``out``.
        OSError: the camera does not open, or the file can't be written.
        ValueError: ``source`` is no video, or none of its frames can be read; ``out`` is the source
            or has another suffix; a codec that OpenCV lacks; an argument out of its range; masks
            or scores of another shape, NaN or infinity in them.
        KeyboardInterrupt: Ctrl-C before the first frame was written.
    """
    settings = _Settings(target, smooth, precision)
    check_count("batch_size", batch_size, 1)
    if limit is not None:
        check_count("limit", limit, 1)
    size = _input_size(network, input_size)
    names = _class_names(network, class_names)
    path, fourcc = _checked_output(source, Path(out), codec)
    frames = _Frames(source, limit)
    painter = _Painter(network, names, settings)
    # With the suffix, by which OpenCV knows the format.
    part = path.with_name(f".{os.getpid()}.{path.name}")
    writer: _Writer | None = None
    interrupted = False
    started = time.perf_counter()
    _check_writable(part, path)
    try:
        try:
            with (
                progress_bar(frames.expected, "frame", progress) as advance,
                _ReadAhead(_batches(frames, size, batch_size), _BATCHES_AHEAD) as batches,
            ):
                for batch in batches:
                    if writer is None:
                        writer = _Writer(part, path, fourcc, frames.rate, batch[0].pixels)
                    for frame, painted in zip(batch, painter.painted(batch), strict=True):
                        writer.write(painted, frame.seconds)
                    advance(len(batch))
        except KeyboardInterrupt:
            if writer is None or not writer.frames:
                raise
            interrupted = True
        if writer is None:
            raise ValueError(f"{frames.name}: {frames.why_empty()}")
        writer.release()
        readable = _readable_frames(part, writer.written)  # OpenCV tells of no full disk
        if readable:
            os.replace(part, path)
        if readable < writer.written:
            raise OSError(
                f"{printable(str(path))}: only {readable} of {writer.written} frames could be "
                "written; is the disk full?"
            )
    finally:
        if writer is not None:
            writer.release()
        part.unlink(missing_ok=True)
    return VideoResult(
        path=path,
        frames=writer.frames,
        seconds=time.perf_counter() - started,
        size=writer.size,
        frame_rate=frames.rate,
        announced=frames.announced,
        cut_short=frames.cut_short,
        resized=frames.resized,
        interrupted=interrupted,
    )


@dataclass(frozen=True)
class _Settings:
    target: int | None
    smooth: float
    precision: str

    def __post_init__(self) -> None:
        if self.target is not None:
            check_count("target", self.target, 0)
        if isinstance(self.smooth, bool) or not 0 <= as_number(self.smooth) < 1:
            raise ValueError(f"smooth: expected a number from 0, below 1, got {self.smooth!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise unknown_name("precision", self.precision, ("float32", "bfloat16"))


def _input_size(network: MasksAndScores, given: tuple[int, int] | None) -> tuple[int, int]:
    size = getattr(network, "input_size", None) if given is None else given
    if size is None:
        raise ValueError("input_size: the network does not tell its own; give (H, W)")
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"input_size: expected (H, W), got {size!r}")
    for side in size:
        check_count("input_size", side, 1)
    return size[0], size[1]


def _class_names(network: MasksAndScores, given: Sequence[str] | None) -> Sequence[str] | None:
    if given is not None:
        return given
    encoder = getattr(network, "encoder", network)
    names: Sequence[str] | None = getattr(encoder, "class_names", None)
    return names


def _checked_output(source: str | Path | int, out: Path, codec: str | None) -> tuple[Path, str]:
    """The file to write and its codec."""
    if isinstance(source, bool) or not isinstance(source, (str, Path, int)):
        raise TypeError(
            f"source: expected a file or the number of a camera, got {type(source).__name__}"
        )
    shown = printable(str(out))
    suffix = out.suffix.lower()
    if suffix not in CODECS:
        raise ValueError(f"out: expected a name that ends in {' or '.join(CODECS)}, got {shown}")
    if codec is not None and (len(codec) != 4 or not codec.isascii()):
        raise ValueError(f"codec: expected four letters such as mp4v, got {codec!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{shown}: no such folder {printable(str(out.parent))}")
    if out.is_dir():
        raise IsADirectoryError(f"{shown} is a folder; give the name of a file")
    if isinstance(source, int):
        check_count("source", source, 0)
    elif out.exists() and Path(source).exists() and out.samefile(source):
        raise ValueError(f"out: {shown} is the source itself; give another name")
    return out, codec or CODECS[suffix]


def _check_writable(part: Path, path: Path) -> None:
    try:
        part.touch()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{printable(str(path))}: could not be written ({reason})") from None


@dataclass
class _Read:
    """A frame of the source."""

    pixels: Frame
    image: Frame
    """What the network sees of it: h×w×3, red, green, blue."""
    seconds: float | None
    """Of a camera: since the first frame."""


class _Frames:
    """Reads a video file or a camera, once."""

    def __init__(self, source: str | Path | int, limit: int | None) -> None:
        self.is_camera = isinstance(source, int)
        self.name = f"camera {source}" if self.is_camera else printable(str(source))
        self._capture = _opened(source, self.name)
        self._limit = limit
        self.rate = self._told_rate()
        self.announced = self._told_count()
        self.resized = 0
        self.cut_short = False

    @property
    def expected(self) -> int | None:
        """How many frames there will be; None: nobody knows."""
        if self._limit is None or self.announced is None:
            return self._limit if self.announced is None else self.announced
        return min(self._limit, self.announced)

    def _told_rate(self) -> float:
        import cv2

        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        return rate if 0 < rate <= _HIGHEST_RATE else USUAL_RATE

    def _told_count(self) -> int | None:
        import cv2

        count = float(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return int(count) if not self.is_camera and 0 < count < 2**31 else None

    def read(self, input_size: tuple[int, int]) -> Iterator[_Read]:
        """All frames up to the first that can't be read, each of the first one's size."""
        n, first = 0, 0.0
        size: tuple[int, int] | None = None
        try:
            while self._limit is None or n < self._limit:
                found, pixels = self._capture.read()
                if not found or pixels is None:
                    # OpenCV does not tell a broken frame from the end.
                    self.cut_short = self.announced is not None and n < self.announced
                    return
                now = time.perf_counter()
                if size is None:
                    size, first = pixels.shape[:2], now
                elif pixels.shape[:2] != size:
                    pixels = _resized(pixels, size)
                    self.resized += 1
                n += 1
                seconds = now - first if self.is_camera else None
                yield _Read(pixels, _network_image(pixels, input_size), seconds)
        finally:
            self._capture.release()

    def why_empty(self) -> str:
        """Why there was no frame."""
        if self.is_camera:
            return "it gives no frames"
        told = "" if self.announced is None else f", though it announces {self.announced}"
        return f"no frame of it can be read{told}"


def _opened(source: str | Path | int, name: str) -> Any:
    """OpenCV's reader."""
    import cv2

    if not isinstance(source, int):
        path = Path(source)
        if path.is_dir():
            raise IsADirectoryError(f"{name} is a folder; give a video file")
        if not path.exists():
            raise FileNotFoundError(f"{name}: no such file")
        with path.open("rb"):  # says why not, which OpenCV does not
            pass
    if isinstance(source, int) and source >= 2**31:
        raise OSError(f"{name}: there is none")
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if capture.isOpened():
        return capture
    if isinstance(source, int):
        raise OSError(f"{name}: there is none, or another program uses it")
    raise ValueError(f"{name}: OpenCV can't read it as a video")


def _resized(pixels: Frame, size: tuple[int, int]) -> Frame:
    """The frame at another size (H, W)."""
    import cv2

    shrinks = pixels.shape[0] > size[0] or pixels.shape[1] > size[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, size[::-1], interpolation=method), dtype=np.uint8)


def _network_image(pixels: Frame, size: tuple[int, int]) -> Frame:
    """The frame at the network's size, h×w×3 in red, green, blue."""
    # Halving, which is bilinear there, several times as fast as the area method alone.
    while pixels.shape[0] >= 2 * size[0] and pixels.shape[1] >= 2 * size[1]:
        pixels = _halved(pixels)
    return _resized(pixels, size)[:, :, ::-1]


def _halved(pixels: Frame) -> Frame:
    import cv2

    half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
    return np.asarray(cv2.resize(pixels, half, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def _batches(frames: _Frames, input_size: tuple[int, int], n: int) -> Generator[list[_Read]]:
    batch: list[_Read] = []
    for frame in frames.read(input_size):
        batch.append(frame)
        if len(batch) == n:
            yield batch
            batch = []
    if batch:
        yield batch


class _ReadAhead:
    """Iterates in a thread, a few items ahead, so that reading and the network share the time."""

    def __init__(self, items: Generator[list[_Read]], ahead: int) -> None:
        self._items = items
        self._queue: queue.Queue[list[_Read] | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Iterator[list[_Read]]:
        self._thread.start()
        return self._received()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # A camera that hangs is left to itself.
        self._thread.join(timeout=5)

    def _received(self) -> Iterator[list[_Read]]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._sent(item):
                    break
            self._items.close()
            self._sent(None)
        except BaseException as error:
            self._sent(error)

    def _sent(self, item: list[_Read] | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def _device(network: MasksAndScores) -> torch.device:
    for module in (network, getattr(network, "encoder", None)):
        if isinstance(module, nn.Module):
            for parameter in module.parameters():
                return parameter.device
    return torch.device("cpu")


class _Painter:
    """Frames with masks and captions, one batch after the other."""

    def __init__(
        self, network: MasksAndScores, names: Sequence[str] | None, settings: _Settings
    ) -> None:
        import cv2

        self.network = network
        self.names = names
        self.settings = settings
        self.device = _device(network)
        levels = np.arange(256, dtype=np.uint8)[:, None]
        self._colors = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)
        # Convolutions are faster on it.
        self._layout: dict[str, Any] = {"memory_format": torch.channels_last}
        self._done = 0
        self._probabilities: Tensor | None = None
        self._mask: Tensor | None = None
        self._class: int | None = None

    def painted(self, batch: Sequence[_Read]) -> Iterator[Frame]:
        """The frames of the batch, which are painted on."""
        images = torch.from_numpy(np.stack([frame.image for frame in batch])).to(self.device)
        with torch.no_grad():
            masks, classes, shares = self._explained(images.permute(0, 3, 1, 2).float() / 255)
        levels = masks.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
        self._done += len(batch)
        for frame, level, number, share in zip(batch, levels, classes, shares, strict=True):
            # Where the frame is narrow, the end of the name is cut off.
            yield self._paint(frame.pixels, level, f"{share:.0%} {self._name(number)}")

    def _explained(self, x: Tensor) -> tuple[Tensor, list[int], list[float]]:
        """Masks N×h×w, their classes and the classes' probabilities."""
        n, target = len(x), self.settings.target
        asked = None if target is None else torch.full((n,), target, device=self.device)
        masks, scores = self._run(x, asked)
        check_finite(scores, "scores", self._done)
        averaged = self._averaged_probabilities(scores.float().softmax(dim=1))
        if asked is None:
            asked = averaged.argmax(dim=1)
            # The masks are of each frame's own class.
            others = (asked != scores.argmax(dim=1)).nonzero()[:, 0]
            if len(others):
                masks = masks.clone()
                masks[others] = self._run(x[others], asked[others])[0]
        check_finite(masks, "masks", self._done)
        classes: list[int] = asked.tolist()
        shares: list[float] = averaged.gather(1, asked[:, None])[:, 0].tolist()
        return self._averaged_masks(masks[:, 0].float(), classes), classes, shares

    def _run(self, x: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        half = self.settings.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            try:
                masks, scores = self.network.masks_and_scores(x.contiguous(**self._layout), classes)
            except RuntimeError:  # a network that calls view() on its features
                if not self._layout:
                    raise
                self._layout = {}
                masks, scores = self.network.masks_and_scores(x.contiguous(), classes)
        if masks.ndim != 4 or masks.shape[:2] != (len(x), 1):
            raise ValueError(f"network: expected masks {len(x)}×1×H×W, got {tuple(masks.shape)}")
        if scores.ndim != 2 or len(scores) != len(x):
            raise ValueError(f"network: expected scores {len(x)}×K, got {tuple(scores.shape)}")
        known = scores.shape[1]
        if (target := self.settings.target) is not None and target >= known:
            raise ValueError(f"target: expected a class from 0 to {known - 1}, got {target}")
        return masks, scores

    def _averaged_probabilities(self, probabilities: Tensor) -> Tensor:
        rows = []
        for row in probabilities:
            old = row if self._probabilities is None else self._probabilities
            self._probabilities = torch.lerp(row, old, self.settings.smooth)
            rows.append(self._probabilities)
        return torch.stack(rows)

    def _averaged_masks(self, masks: Tensor, classes: Sequence[int]) -> Tensor:
        rows = []
        for mask, number in zip(masks, classes, strict=True):
            old = mask if self._mask is None or number != self._class else self._mask
            self._mask, self._class = torch.lerp(mask, old, self.settings.smooth), number
            rows.append(self._mask)
        return torch.stack(rows)

    def _name(self, number: int) -> str:
        named = self.names is not None and number < len(self.names)
        return self.names[number] if named and self.names is not None else f"class {number}"

    def _paint(self, pixels: Frame, level: Frame, caption: str) -> Frame:
        import cv2

        height, width = pixels.shape[:2]
        enlarged = cv2.resize(level, (width, height), interpolation=cv2.INTER_LINEAR)
        colors = cv2.applyColorMap(enlarged, self._colors)
        cv2.addWeighted(pixels, 1 - _MASK_SHARE, colors, _MASK_SHARE, 0, dst=pixels)
        words = tag(caption, max(_SMALLEST_LETTERS, round(height * _LETTERS)), width)
        words = words[:height]
        pixels[: words.shape[0], : words.shape[1]] = words[:, :, None]
        return pixels


class _Writer:
    """Writes frames of one size to a video file."""

    def __init__(self, part: Path, path: Path, codec: str, rate: float, like: Frame) -> None:
        import cv2

        self.rate = rate
        self.size: tuple[int, int] = (like.shape[0], like.shape[1])
        self.frames = 0
        self.written = 0  # more or fewer: a camera's may be repeated or left out
        height, width = self.size
        self._video = cv2.VideoWriter(
            str(part), cv2.VideoWriter.fourcc(*codec), rate, (width, height)
        )
        if not self._video.isOpened():
            raise ValueError(
                f"codec: OpenCV can't write {path.suffix} with {codec!r}, {width}×{height} pixels"
            )

    def write(self, pixels: Frame, seconds: float | None) -> None:
        """Add a frame; one of a camera where ``seconds`` after the first belong."""
        copies = 1 if seconds is None else round(seconds * self.rate) + 1 - self.written
        for _ in range(copies):
            self._video.write(pixels)
            self.written += 1
        self.frames += 1

    def release(self) -> None:
        """Close the file."""
        self._video.release()


def _readable_frames(path: Path, expected: int) -> int:
    """How many frames of a file that was written can be read again."""
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        # The count alone is no proof: it stands at the beginning of some files.
        if video.get(cv2.CAP_PROP_FRAME_COUNT) >= expected:
            video.set(cv2.CAP_PROP_POS_FRAMES, expected - 1)
            if video.read()[0]:
                return expected
    finally:
        video.release()
    video = cv2.VideoCapture(str(path))
    found = 0
    while found < expected and video.grab():
        found += 1
    video.release()
    return found
