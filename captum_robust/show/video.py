"""Where a network looks, on every frame of a video."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from captum_robust._checks import (
    check,
    check_choice,
    check_count,
    check_finite,
    check_number,
    check_type,
    checked_size,
    printable,
)
from captum_robust._contexts import PRECISIONS, autocast
from captum_robust._processes import device_of
from captum_robust._progress import progress_bar
from captum_robust._scores import probabilities_of
from captum_robust.catalog.methods import build_methods
from captum_robust.catalog.thresholds import Threshold
from captum_robust.draw import PREDICTED_COLOR, tag
from captum_robust.models import Classifier
from captum_robust.models.classifier import in_channels_of
from captum_robust.show.video_files import Frame, ReadFrame, VideoFile, VideoSource, read_ahead

CODECS = {".mp4": ("avc1", "mp4v"), ".webm": ("VP80",), ".avi": ("MJPG",)}
"""What a file is written with, by its suffix: the first that OpenCV has.

Browsers play avc1 and VP80. They play VP9 in .mp4 too, but it takes 100 times as long.
"""
_BATCHES_AHEAD = 2
_COLORS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)
_MASK_SHARE = 0.55
_LETTERS = 1 / 24
"""A share of the frame's height."""
_SMALLEST_LETTERS = 12
_LINE = 1 / 160
"""Width of a box's line, a share of the frame's height."""


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
        self.threshold = self._method.threshold

    def masks_and_scores(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps N×1×H×W in [0, 1], zero where nothing is positive, and scores N×K."""
        x = in_channels_of(self.encoder, x)
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
    """How many there were in the source, each annotated."""
    seconds: float
    """From the first read to the complete file."""
    size: tuple[int, int]
    """(H, W) of the source's frames."""
    frame_rate: float
    """Frames a second when the file is played."""
    codec: str
    """What the file is written with."""
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
    threshold: Threshold | None = None,
    smooth: float = 0.0,
    batch_size: int = 4,
    codec: str | None = None,
    limit: int | None = None,
    precision: str = "float32",
    progress: bool | None = None,
) -> VideoResult:
    """Write a video again with the mask of a class over each frame, and the class written on it.

    Black is 0 and yellow is 1 on every frame, so that frames can be compared. The network sees the
    whole frame, squashed to its size. Frames keep their size and rate; an odd side loses its last
    row or column, as the codecs halve the colours. Where frames come at another rate than the
    source says, or at none, they keep their times: some are repeated, or left out where they are
    shorter than one of the written file. Memory does not grow with the length. Sound is not copied.

    The file gets its name when it is complete; until then, and after an error, an older one stays.
    Ctrl-C is the way to end a camera: it completes the file, and the result says so.

    Args:
        source: a file that OpenCV reads, an address such as ``"rtsp://…"``, the pattern of a
            sequence of images such as ``"%02d.png"``, or the number of a camera, from 0.
        out: the file to write, ``.mp4``, ``.webm`` or ``.avi``. Browsers play ``.webm``, and
            ``.mp4`` where OpenCV can write H.264.
        network: is run as it is, where its parameters are.
        class_names: in the order of the scores; None: those of the network's encoder, else numbers.
        input_size: (H, W) of the images for the network; None: ``network.input_size``.
        target: the class whose mask and probability are shown; None: the predicted one.
        threshold: of the box that is drawn on each frame, around the largest part of its mask;
            None: no box.
        smooth: s in [0, 1) of the exponential average m ← s·m + (1 − s)·new over the frames, of
            the masks and of the probabilities. The predicted class is that of the averaged ones,
            so that no single frame changes it; when it does change, the masks' average begins
            anew, as the mask of another class says nothing of this one. 0: each frame by itself.
        batch_size: frames that the network gets at once.
        codec: four letters ("FourCC") of another codec.
        limit: only the first so many frames.
        precision: ``"float32"``, or ``"bfloat16"`` under autocast.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Raises:
        FileNotFoundError: no such file, or no folder for ``out``.
        OSError: the camera does not open, or the file can't be written.
        ValueError: ``source`` is no video, or none of its frames can be read; ``out`` is the source
            or has another suffix; a codec that OpenCV lacks; an argument out of its range; masks
            or scores of another shape, NaN or infinity in them.
        KeyboardInterrupt: Ctrl-C before the first frame was written.
    """
    check_count("target", target, optional=True)
    smooth = check_number("smooth", smooth, 0, 1, open_high=True)
    check_choice("precision", precision, PRECISIONS)
    check_count("batch_size", batch_size, 1)
    check_count("limit", limit, 1, optional=True)
    size = _input_size(network, input_size)
    if class_names is None:
        class_names = getattr(getattr(network, "encoder", network), "class_names", None)
    path, codecs = _checked_output(source, Path(out), codec)
    frames = VideoSource(source, limit)
    painter = Painter(network, class_names, target, threshold, smooth, precision)
    interrupted = False
    started = time.perf_counter()
    with closing(VideoFile(path, codecs, frames.rate)) as file:
        try:
            with (
                progress_bar(frames.expected, "frame", progress, "video") as advance,
                read_ahead(frames.read(size), batch_size, _BATCHES_AHEAD) as batches,
            ):
                for batch in batches:
                    for frame, painted in zip(batch, painter.painted(batch), strict=True):
                        if not frames.is_camera:
                            file.hold(frame.seconds)
                        file.write(painted, frame.seconds)
                    advance(len(batch))
                file.hold(frames.end)
        except KeyboardInterrupt:
            if not file.frames:
                raise
            interrupted = True
        check(file.frames, f"{frames.name}: {frames.why_empty()}")
        file.complete()
    return VideoResult(
        path=path,
        frames=file.frames,
        seconds=time.perf_counter() - started,
        size=file.size,
        frame_rate=frames.rate,
        codec=file.codec,
        announced=frames.announced,
        cut_short=frames.cut_short,
        resized=frames.resized,
        interrupted=interrupted,
    )


def _input_size(network: MasksAndScores, given: tuple[int, int] | None) -> tuple[int, int]:
    size: Any = getattr(network, "input_size", None) if given is None else given
    check(size is not None, "input_size: the network does not tell its own; give (H, W)")
    check(not isinstance(size, int), f"input_size: expected (H, W), got {size!r}")
    return checked_size("input_size", size)


def _checked_output(
    source: str | Path | int, out: Path, codec: str | None
) -> tuple[Path, Sequence[str]]:
    """The file to write and the codecs to try."""
    kinds = () if isinstance(source, bool) else (str, Path, int)
    check_type("source", source, kinds, "a file or the number of a camera")
    name = printable(str(out))
    suffix = out.suffix.lower()
    ends = ".webm, or a name that ends in .mp4 or .avi"
    check(suffix in CODECS, f"out: expected {ends}, got {name}")
    is_code = codec is None or (len(codec) == 4 and codec.isascii())
    check(is_code, f"codec: expected four letters such as mp4v, got {codec!r}")
    folder = printable(str(out.parent))
    check(out.parent.is_dir(), f"{name}: no such folder {folder}", FileNotFoundError)
    check(not out.is_dir(), f"{name} is a folder; give the name of a file", IsADirectoryError)
    if isinstance(source, int):
        check_count("source", source)
    else:
        is_source = out.exists() and Path(source).exists() and out.samefile(source)
        check(not is_source, f"out: {name} is the source itself; give another name")
    return out, (codec,) if codec else CODECS[suffix]


class Painter:
    """Paints masks and captions on frames, one batch after the other, as :func:`annotate_video`."""

    def __init__(
        self,
        network: MasksAndScores,
        names: Sequence[str] | None,
        target: int | None,
        threshold: Threshold | None,
        smooth: float,
        precision: str,
    ) -> None:
        self.network, self.names, self.target = network, names or (), target
        self.threshold = threshold
        self.device = _device(network)
        self._autocast = autocast(self.device, precision)
        self._layout = torch.channels_last  # convolutions are faster on it
        self._done = 0
        self._average_probabilities = _Average(smooth)
        self._average_masks = _Average(smooth)

    def painted(self, batch: Sequence[ReadFrame]) -> Iterator[Frame]:
        """The frames of the batch, which are painted on."""
        images = torch.from_numpy(np.stack([frame.image for frame in batch])).to(self.device)
        with torch.no_grad():
            masks, classes, shares = self._explained(images.permute(0, 3, 1, 2).float() / 255)
        boxes = [None] * len(batch) if self.threshold is None else self._boxes(masks)
        levels = masks.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
        self._done += len(batch)
        every = zip(batch, levels, classes, shares, boxes, strict=True)
        for frame, level, number, share, box in every:
            name = self.names[number] if number < len(self.names) else f"class {number}"
            # Where the frame is narrow, the end of the name is cut off.
            yield self._paint(frame.pixels, level, box, f"{share:.0%} {name}")

    def _boxes(self, masks: Tensor) -> list[list[float] | None]:
        """In shares of the sides of each of the masks N×h×w."""
        assert self.threshold is not None
        sides = torch.tensor([masks.shape[2], masks.shape[1]] * 2)
        shares: list[list[float] | None] = (self.threshold.boxes(masks).cpu() / sides).tolist()
        return shares

    def _explained(self, x: Tensor) -> tuple[Tensor, list[int], list[float]]:
        """Masks N×h×w, their classes and the classes' probabilities."""
        n, target = len(x), self.target
        asked = None if target is None else torch.full((n,), target, device=self.device)
        masks, scores = self._run(x, asked)
        check_finite(scores, "scores", self._done)
        probabilities = probabilities_of(scores)
        averaged = self._average_probabilities(probabilities, [None] * n)
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
        return self._average_masks(masks[:, 0].float(), classes), classes, shares

    def _run(self, x: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        try:
            with self._autocast:
                laid_out = x.contiguous(memory_format=self._layout)
                masks, scores = self.network.masks_and_scores(laid_out, classes)
        except RuntimeError:  # a network that calls view() on its features
            if self._layout == torch.contiguous_format:
                raise
            self._layout = torch.contiguous_format
            return self._run(x, classes)
        n, got, scored = len(x), tuple(masks.shape), tuple(scores.shape)
        is_mask = len(got) == 4 and got[:2] == (n, 1)
        check(is_mask, f"network: expected masks {n}×1×H×W, got {got}")
        check(len(scored) == 2 and scored[0] == n, f"network: expected scores {n}×K, got {scored}")
        last, target = scored[1] - 1, self.target
        is_class = target is None or target <= last
        check(is_class, f"target: expected a class from 0 to {last}, got {target}")
        return masks, scores

    def _paint(
        self, pixels: Frame, level: Frame, box: Sequence[float] | None, caption: str
    ) -> Frame:
        height, width = pixels.shape[:2]
        enlarged = cv2.resize(level, (width, height), interpolation=cv2.INTER_LINEAR)
        colors = cv2.applyColorMap(enlarged, _COLORS)
        cv2.addWeighted(pixels, 1 - _MASK_SHARE, colors, _MASK_SHARE, 0, dst=pixels)
        if box is not None:
            corners = [round(s * side) for s, side in zip(box, (width, height) * 2, strict=True)]
            width_of_line = max(1, round(height * _LINE))
            last = (corners[2] - 1, corners[3] - 1)
            color = PREDICTED_COLOR[::-1]  # OpenCV has blue first
            cv2.rectangle(pixels, tuple(corners[:2]), last, color, width_of_line)
        words = tag(caption, max(_SMALLEST_LETTERS, round(height * _LETTERS)), width)[:height]
        pixels[: words.shape[0], : words.shape[1]] = words[:, :, None]
        return pixels


class _Average:
    """The exponential average m ← s·m + (1 − s)·new, which begins anew with another class."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._last: Tensor | None = None
        self._class: int | None = None

    def __call__(self, rows: Tensor, classes: Sequence[int | None]) -> Tensor:
        """The average at each of the rows."""
        averages = []
        for row, number in zip(rows, classes, strict=True):
            old = row if self._last is None or number != self._class else self._last
            self._last, self._class = torch.lerp(row, old, self.share), number
            averages.append(self._last)
        return torch.stack(averages)


def _device(network: object) -> torch.device:
    parts = (network, getattr(network, "encoder", None))
    return device_of(nn.ModuleList(part for part in parts if isinstance(part, nn.Module)))
