from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from captum_robust.catalog.thresholds import Threshold
from captum_robust.models import Classifier, load_classifier, save_classifier
from captum_robust.nn import MaskingNetwork, save_masking_network
from captum_robust.show import video, video_files
from captum_robust.show.video import MethodMasks, annotate_video
from captum_robust.show.video_files import readable_frames

# The ends of matplotlib's "inferno", red, green, blue.
DARKEST, LIGHTEST = (0, 0, 4), (252, 255, 164)
RED = 2
LOSSY = 10
"""Levels, of 255, by which a codec may change a colour."""


class Stub:
    """The mask of class 0 is the red of an image, that of class 1 its opposite.

    The scores are ten times the mean green and the mean blue.
    """

    input_size = (16, 16)
    class_names = ("green", "blue")

    def __init__(self) -> None:
        self.asked: list[list[int] | None] = []

    def masks_and_scores(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.asked.append(None if classes is None else classes.tolist())
        scores = 10 * x[:, 1:].mean(dim=(2, 3))
        chosen = scores.argmax(dim=1) if classes is None else classes
        red = x[:, :1]
        return torch.where(chosen.view(-1, 1, 1, 1) == 0, red, 1 - red), scores


def flat(
    red: float = 0.0, green: float = 0.0, blue: float = 0.0, size: tuple[int, int] = (64, 96)
) -> Any:
    """A frame of one colour, in [0, 1], of H×W pixels."""
    frame = np.zeros((*size, 3), dtype=np.uint8)
    frame[:] = [round(255 * c) for c in (blue, green, red)]
    return frame


def write(path: Path, frames: Sequence[Any], rate: float = 25.0) -> Path:
    codec = "MJPG" if path.suffix == ".avi" else "mp4v"
    size = frames[0].shape[1::-1] if frames else (96, 64)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, size)
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def read(path: Path) -> list[Any]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (found := capture.read())[0]:
        frames.append(found[1])
    capture.release()
    return frames


def heat(frame: Any) -> Any:
    """The colour of the lower half, where no caption is, as R, G, B."""
    return frame[frame.shape[0] // 2 :].reshape(-1, 3).mean(axis=0)[::-1]


def over(frame: Any, color: tuple[float, float, float]) -> Any:
    """The frame's colour under 55 % of another, as R, G, B."""
    return 0.45 * frame[-1, -1, ::-1].astype(float) + 0.55 * np.asarray(color)


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written on the frames."""
    said: list[str] = []
    drawn = video.tag

    def listening(text: str, size: int, width: int) -> Any:
        said.append(text)
        return drawn(text, size, width)

    monkeypatch.setattr(video, "tag", listening)
    return said


@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_each_frame_keeps_size_rate_and_order_and_lies_under_its_mask(
    tmp_path: Path, suffix: str
) -> None:
    frames = [flat(red=r, green=0.5) for r in (0, 1, 0, 0, 1, 1, 0)]
    source = write(tmp_path / "in.avi", frames, rate=12.5)
    result = annotate_video(source, tmp_path / f"out{suffix}", Stub())
    assert (result.frames, result.size, result.frame_rate) == (7, (64, 96), 12.5)
    assert (result.announced, result.resized) == (7, 0)
    assert not result.cut_short
    assert not result.interrupted
    written = read(result.path)
    assert [f.shape for f in written] == [f.shape for f in frames]
    assert cv2.VideoCapture(str(result.path)).get(cv2.CAP_PROP_FPS) == 12.5
    for before, after in zip(frames, written, strict=True):
        expected = over(before, LIGHTEST if before[0, 0, RED] else DARKEST)
        assert heat(after) == pytest.approx(expected, abs=LOSSY)
    assert sorted(tmp_path.iterdir()) == sorted([source, result.path])


def test_the_mask_lies_where_the_network_put_it(tmp_path: Path) -> None:
    frame = flat(green=0.5)
    frame[:, :48, RED] = 255
    result = annotate_video(write(tmp_path / "in.avi", [frame]), tmp_path / "out.avi", Stub())
    (written,) = read(result.path)
    left, right = written[40:, 2:36], written[40:, 60:94]
    assert left[..., RED].mean() == pytest.approx(0.45 * 255 + 0.55 * LIGHTEST[0], abs=LOSSY)
    assert right[..., RED].mean() == pytest.approx(0.55 * DARKEST[0], abs=LOSSY)


def test_a_box_is_drawn_around_the_largest_part_of_the_mask(tmp_path: Path) -> None:
    frame = flat(green=0.5)
    frame[16:48, 48:, RED] = 255
    source = write(tmp_path / "in.avi", [frame])
    result = annotate_video(source, tmp_path / "out.avi", Stub(), threshold=Threshold("value", 0.5))
    (written,) = read(result.path)
    (plain,) = read(annotate_video(source, tmp_path / "plain.avi", Stub()).path)
    changed = np.abs(written.astype(int) - plain).max(axis=2) > 60
    rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
    assert (rows[0], rows[-1]) == pytest.approx((16, 47), abs=1)
    assert (columns[0], columns[-1]) == pytest.approx((48, 95), abs=1)
    assert not changed[22:42, 54:90].any()


def test_an_odd_side_loses_its_last_row_or_column(tmp_path: Path) -> None:
    # The source itself has to be even; the network's frames are of the odd size.
    frames = [flat(green=0.5, size=(64, 96))[:63, :95]]
    source = write(tmp_path / "in.avi", frames)
    assert read(annotate_video(source, tmp_path / "out.avi", Stub()).path)[0].shape == (62, 94, 3)


def test_class_and_probability_are_written_on_the_frame(
    tmp_path: Path, captions: list[str]
) -> None:
    source = write(tmp_path / "in.avi", [flat(green=0.2, blue=0.1), flat(blue=0.2)])
    result = annotate_video(source, tmp_path / "out.avi", Stub())
    # Scores 2 and 1, 0 and 2: 1/(1 + exp(-1)) and 1/(1 + exp(-2)), up to the codec's rounding.
    assert [c.split()[1] for c in captions] == ["green", "blue"]
    assert [int(c.split()[0][:-1]) for c in captions] == pytest.approx([73, 88], abs=3)
    for written in read(result.path):
        corner = written[:14, :60]
        assert corner.max() > 200  # white letters
        assert np.median(corner) < 40  # on black


def test_without_class_names_the_number_is_written(tmp_path: Path, captions: list[str]) -> None:
    network = Stub()
    network.class_names = None  # type: ignore[assignment]
    source = write(tmp_path / "in.avi", [flat(blue=1)])
    annotate_video(source, tmp_path / "out.avi", network)
    annotate_video(source, tmp_path / "out.avi", network, class_names=["a", "sky"])
    assert captions == ["100% class 1", "100% sky"]


def test_a_long_name_on_a_tiny_frame_is_shortened(tmp_path: Path) -> None:
    frame = flat(green=0.5, size=(8, 10))
    result = annotate_video(
        write(tmp_path / "in.avi", [frame]),
        tmp_path / "out.avi",
        Stub(),
        class_names=["x" * 90] * 2,
    )
    assert read(result.path)[0].shape == frame.shape


def test_smoothing_is_the_exponential_average(tmp_path: Path) -> None:
    frames = [flat(red=r, green=0.5) for r in (1, 0, 0, 0)]
    source = write(tmp_path / "in.avi", frames)
    written = read(annotate_video(source, tmp_path / "out.avi", Stub(), smooth=0.5).path)
    levels = np.array([[255, 128, 64, 32]], dtype=np.uint8)  # 1, 1/2, 1/4, 1/8
    colors = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[0, :, ::-1]
    for before, after, color in zip(frames, written, colors, strict=True):
        assert heat(after) == pytest.approx(over(before, color), abs=LOSSY)


def test_one_frame_of_another_class_changes_neither_class_nor_mask(
    tmp_path: Path, captions: list[str]
) -> None:
    green, blue = flat(red=1, green=0.6, blue=0.3), flat(red=1, green=0.3, blue=0.6)
    source = write(tmp_path / "in.avi", [green, green, blue, green])
    network = Stub()
    result = annotate_video(source, tmp_path / "out.avi", network, smooth=0.8)
    assert [c.split()[1] for c in captions] == ["green"] * 4
    assert network.asked == [None, [0]]  # the mask of "green" was asked for on that frame
    for before, after in zip([green, green, blue, green], read(result.path), strict=True):
        assert heat(after) == pytest.approx(over(before, LIGHTEST), abs=LOSSY)


def test_where_the_class_changes_the_average_of_masks_begins_anew(
    tmp_path: Path, captions: list[str]
) -> None:
    green, blue = flat(red=1, green=1), flat(red=1, blue=1)
    source = write(tmp_path / "in.avi", [green] * 3 + [blue] * 6)
    result = annotate_video(source, tmp_path / "out.avi", Stub(), smooth=0.8)
    # 0.8³ > 1/2 > 0.8⁴: the fourth blue frame is the first whose average is blue.
    assert [c.split()[1] for c in captions] == ["green"] * 6 + ["blue"] * 3
    assert captions[6] == "59% blue"  # 1 − 0.8⁴
    written = read(result.path)
    assert heat(written[5]) == pytest.approx(over(blue, LIGHTEST), abs=LOSSY)
    assert heat(written[6]) == pytest.approx(over(blue, DARKEST), abs=LOSSY)


def test_a_target_is_shown_whatever_is_predicted(tmp_path: Path, captions: list[str]) -> None:
    network = Stub()
    source = write(tmp_path / "in.avi", [flat(green=0.2, blue=0.1)] * 3)
    result = annotate_video(source, tmp_path / "out.avi", network, target=1, batch_size=2)
    assert network.asked == [[1, 1], [1]]
    assert all(re.fullmatch(r"2.% blue", c) for c in captions)  # 1 − 73 %
    assert heat(read(result.path)[0]) == pytest.approx(over(flat(0, 0.2, 0.1), LIGHTEST), abs=LOSSY)


@pytest.mark.parametrize("smooth", [0.0, 0.8])
def test_the_batch_size_changes_nothing(tmp_path: Path, smooth: float) -> None:
    draw = np.random.default_rng(0)
    frames = [cv2.resize(draw.integers(0, 255, (4, 6, 3), np.uint8), (96, 64)) for _ in range(11)]
    source = write(tmp_path / "in.avi", frames)
    videos = []
    for n in (1, 4, 20):
        result = annotate_video(source, tmp_path / f"{n}.avi", Stub(), batch_size=n, smooth=smooth)
        videos.append(np.stack(read(result.path)))
    assert (videos[0] == videos[1]).all()
    assert (videos[0] == videos[2]).all()


def test_the_network_sees_the_whole_frame_in_red_green_blue(tmp_path: Path) -> None:
    seen = []

    class Looking(Stub):
        input_size = (10, 20)

        def masks_and_scores(
            self, x: Tensor, classes: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            seen.append(x)
            return super().masks_and_scores(x, classes)

    frame = flat(red=0.25, green=0.5, blue=0.75, size=(480, 640))
    frame[:, 320:] = 255
    annotate_video(write(tmp_path / "in.avi", [frame]), tmp_path / "out.avi", Looking())
    (x,) = seen
    assert x.shape == (1, 3, 10, 20)
    assert x.dtype == torch.float32
    assert x[0, :, :, :9].mean(dim=(1, 2)).tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.02)
    assert x[0, :, :, 11:].min() > 0.97


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_of_a_torn_file_what_can_be_read_is_written(tmp_path: Path, share: float) -> None:
    draw = np.random.default_rng(0)
    frames = [draw.integers(0, 255, (64, 96, 3), np.uint8) for _ in range(40)]
    whole = write(tmp_path / "in.avi", frames).read_bytes()
    torn = tmp_path / "torn.avi"
    torn.write_bytes(whole[: int(share * len(whole))])
    readable = len(read(torn))
    assert 0 < readable < 40
    result = annotate_video(torn, tmp_path / "out.mp4", Stub())
    assert result.cut_short
    assert (result.frames, result.announced) == (readable, 40)
    assert len(read(result.path)) == readable


def test_a_limit_cuts_nothing_short(tmp_path: Path) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1)] * 9)
    result = annotate_video(source, tmp_path / "out.avi", Stub(), limit=5)
    assert result.frames == len(read(result.path)) == 5
    assert not result.cut_short


class Camera:
    """In the place of OpenCV's reader: frames at their times, for any number of a camera."""

    def __init__(self, frames: Sequence[Any], times: Sequence[float], rate: float) -> None:
        self.frames, self.times, self.rate = list(frames), list(times), rate
        self.reads = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = cv2.VideoCapture
        monkeypatch.setattr(
            cv2, "VideoCapture", lambda source: self if isinstance(source, int) else real(source)
        )
        monkeypatch.setattr(video_files, "time", self)

    def perf_counter(self) -> float:
        return self.times[min(max(self.reads, 1), len(self.times)) - 1]

    def read(self) -> tuple[bool, Any]:
        if self.reads == len(self.frames):
            return False, None
        self.reads += 1
        return True, self.frames[self.reads - 1].copy()

    def get(self, fact: int) -> float:
        return self.rate if fact == cv2.CAP_PROP_FPS else -1.0

    def isOpened(self) -> bool:
        return True

    def release(self) -> None:
        pass


def test_a_camera_keeps_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [flat(green=1, red=r) for r in (0, 1, 0, 1)]
    # At 10 a second: the second comes late by two frames, the last at once with the third.
    Camera(frames, [7.0, 7.3, 7.4, 7.41], rate=10.0).install(monkeypatch)
    result = annotate_video(0, tmp_path / "out.avi", Stub())
    assert result.announced is None
    assert not result.cut_short
    assert result.frames == 4
    written = [heat(f)[0] > 100 for f in read(result.path)]
    assert written == [False, True, True, True, False]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address that the files of the folder are served under."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("is_served", [False, True], ids=["file", "served"])
def test_a_source_of_variable_rate_keeps_its_times(
    tmp_path: Path, served: str, is_served: bool
) -> None:
    # Ten frames of a tenth of a second, ten of a second; black and white in turn.
    frames = [Image.fromarray(np.full((64, 96, 3), 255 * (i % 2), np.uint8)) for i in range(20)]
    source = tmp_path / "in.gif"
    durations = [100] * 10 + [1000] * 10
    frames[0].save(source, save_all=True, append_images=frames[1:], duration=durations)
    given = f"{served}/in.gif" if is_served else source
    result = annotate_video(given, tmp_path / "out.avi", Stub())
    assert (result.frames, result.frame_rate) == (20, 10.0)
    written = [f[60:, 90:].mean() for f in read(result.path)]
    shown = [*range(10), *(i for i in range(10, 20) for _ in range(10))]
    assert len(shown) == 110  # 11 seconds
    if is_served:  # a stream does not tell how long its last frame stays
        shown = shown[:101]
    assert len(written) == len(shown)
    assert [w > np.mean(written) for w in written] == [i % 2 == 1 for i in shown]


class TimedFile(Camera):
    """In the place of OpenCV's reader of a file: frames and the times that it tells."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = cv2.VideoCapture

        def opened(source: Any) -> Any:
            is_source = str(source).endswith("in.avi")
            return TimedFile(self.frames, self.times, self.rate) if is_source else real(source)

        monkeypatch.setattr(cv2, "VideoCapture", opened)

    def grab(self) -> bool:
        return self.read()[0]

    def get(self, fact: int) -> float:
        return (
            1000 * self.times[self.reads - 1]
            if fact == cv2.CAP_PROP_POS_MSEC
            else super().get(fact)
        )


@pytest.mark.parametrize(
    ("times", "rate", "shown"),
    [
        ([0, 0.04, 0.08, 0.12], 25.0, [0, 1, 2, 3]),
        ([5, 5.04, 5.08, 5.12], 25.0, [0, 1, 2, 3]),
        ([0, 0.033, 0.067, 0.1], 30.0, [0, 1, 2, 3]),  # rounded to milliseconds
        ([0, 0.08, 0.16, 0.24], 12.5, [0, 1, 2, 3]),  # constant, and not what it says
        ([0, 0.04, 0.16, 0.2], 25.0, [0, 1, 1, 1, 2, 3]),
        ([0, 0.12, 0.04, 0.08], 25.0, [0, 1, 2, 3]),  # in the order of decoding: no times
        ([0, 0, 0, 0], 25.0, [0, 1, 2, 3]),
        ([0, 0.04, 1e9, 1e9 + 0.04], 25.0, [0, 1, 2, 3]),  # broken
        ([0, 0.001, 1, 2], 60.0, [0] + [1] * 59 + [2] * 60 + [3]),
    ],
)
def test_the_times_of_a_file_decide(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: list[float],
    rate: float,
    shown: list[int],
) -> None:
    frames = [flat(green=1, red=r) for r in (0, 1, 0, 1)]
    source = write(tmp_path / "in.avi", frames)
    TimedFile(frames, times, 30.0 if rate == 30 else 25.0).install(monkeypatch)
    result = annotate_video(source, tmp_path / "out.avi", Stub())
    assert (result.frames, result.frame_rate) == (4, rate)
    written = [heat(f)[0] > 100 for f in read(result.path)]
    assert written == [i % 2 == 1 for i in shown]


def test_addresses_and_sequences_of_images_are_for_opencv(tmp_path: Path, served: str) -> None:
    frames = [flat(green=1, red=r) for r in (0, 1, 0)]
    source = write(tmp_path / "in.avi", frames)
    for i, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / f"{i:02d}.png"), frame)
    for given in (f"file://{source}", f"{served}/in.avi", str(tmp_path / "%02d.png")):
        result = annotate_video(given, tmp_path / "out.avi", Stub())
        assert [heat(f)[0] > 100 for f in read(result.path)] == [False, True, False]
    addresses = ("rtsp://127.0.0.1:1/none", "http://127.0.0.1:1/in.avi", f"{served}/none.avi")
    for given in addresses:
        with pytest.raises(ValueError, match=r"OpenCV can't read it .*; does the address answer"):
            annotate_video(given, tmp_path / "out.avi", Stub())
    for given in ("unknown://in.avi", str(tmp_path / "no%02d.png")):
        with pytest.raises(ValueError, match="OpenCV can't read it"):
            annotate_video(given, tmp_path / "out.avi", Stub())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in.avi")
    with pytest.raises(ValueError, match=r"in\.avi is a pipe"):
        annotate_video(tmp_path / "in.avi", tmp_path / "out.avi", Stub())


def test_webm_is_for_browsers(tmp_path: Path) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1, red=r) for r in (0, 1, 0)])
    result = annotate_video(source, tmp_path / "out.webm", Stub())
    assert result.codec == "VP80"
    assert result.path.read_bytes()[:4] == b"\x1a\x45\xdf\xa3"  # EBML, the container's mark
    assert [heat(f)[0] > 100 for f in read(result.path)] == [False, True, False]
    assert annotate_video(source, tmp_path / "out.mp4", Stub()).codec in ("avc1", "mp4v")


def test_a_camera_without_a_rate_gets_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Camera([flat(green=1)], [0.0], rate=0.0).install(monkeypatch)
    assert annotate_video(3, tmp_path / "out.avi", Stub()).frame_rate == 25.0


def test_frames_of_another_size_are_resized_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [flat(green=1), flat(green=1, red=1, size=(32, 48)), flat(green=1, size=(128, 64))]
    Camera(frames, [0.0, 0.1, 0.2], rate=10.0).install(monkeypatch)
    result = annotate_video(0, tmp_path / "out.avi", Stub())
    assert (result.frames, result.resized, result.size) == (3, 2, (64, 96))
    written = read(result.path)
    assert len(written) == 3
    assert heat(written[1]) == pytest.approx(over(frames[1], LIGHTEST), abs=LOSSY)


def test_reading_stays_a_few_batches_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    camera = Camera([flat(green=1)] * 200, np.arange(100) / 10, rate=10.0)
    camera.install(monkeypatch)
    ahead = []

    class Slow(Stub):
        def masks_and_scores(
            self, x: Tensor, classes: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            ahead.append(camera.reads - 2 * len(self.asked))
            return super().masks_and_scores(x, classes)

    annotate_video(0, tmp_path / "out.avi", Slow(), batch_size=2)
    # Two of the batch in hand, two batches in the queue, one that waits to enter it.
    assert max(ahead) <= 2 * 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells the memory in use")
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    in_use: list[int] = []

    class Weighing(Stub):
        def masks_and_scores(
            self, x: Tensor, classes: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            in_use.append(pages * os.sysconf("SC_PAGE_SIZE"))
            return super().masks_and_scores(x, classes)

    frame = cv2.resize(np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8), (192, 144))
    source = write(tmp_path / "in.avi", [np.roll(frame, i, axis=1) for i in range(1000)])
    annotate_video(source, tmp_path / "out.avi", Weighing(), smooth=0.8)
    assert len(in_use) >= 250
    # The 800 frames between take 66 MB.
    assert max(in_use[50:]) - in_use[50] < 15e6


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("missing.mp4", FileNotFoundError, r"missing\.mp4: no such file"),
        ("folder.avi", IsADirectoryError, r"folder\.avi is a folder"),
        ("text.mp4", ValueError, r"text\.mp4: OpenCV can't read it as a video"),
        ("empty.avi", ValueError, r"empty\.avi: OpenCV can't read it as a video"),
        ("torn.mp4", ValueError, r"torn\.mp4: OpenCV can't read it as a video"),
        ("frameless.avi", ValueError, r"frameless\.avi: no frame of it can be read"),
        (99, OSError, "camera 99: there is none"),
        (10**20, ValueError, "source: .*10000+"),
        (-1, ValueError, "source: .*-1"),
        (True, TypeError, "source: .*bool"),
        (None, TypeError, "source: .*NoneType"),
    ],
)
def test_a_bad_source_is_named_and_an_older_file_stays(
    tmp_path: Path, source: Any, error: type[Exception], message: str
) -> None:
    (tmp_path / "folder.avi").mkdir()
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    (tmp_path / "empty.avi").touch()
    write(tmp_path / "frameless.avi", [])
    whole = write(tmp_path / "torn.mp4", [flat()] * 9).read_bytes()
    (tmp_path / "torn.mp4").write_bytes(whole[: len(whole) // 2])  # its index is at its end
    (tmp_path / "out.avi").write_text("older")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        annotate_video(
            tmp_path / source if isinstance(source, str) else source, tmp_path / "out.avi", Stub()
        )
    assert (tmp_path / "out.avi").read_text() == "older"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("out.mov", ValueError, r"ends in \.mp4 or \.avi, got .*out\.mov"),
        ("out", ValueError, r"ends in \.mp4 or \.avi"),
        ("missing/out.mp4", FileNotFoundError, "no such folder .*missing"),
        ("folder.avi", IsADirectoryError, "is a folder"),
        ("in.avi", ValueError, "is the source itself"),
        ("link.avi", ValueError, "is the source itself"),
        ("x" * 260 + ".avi", OSError, "(?i)too long|could not be written"),
    ],
)
def test_a_bad_output_is_named(
    tmp_path: Path, out: str, error: type[Exception], message: str
) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1)])
    (tmp_path / "folder.avi").mkdir()
    (tmp_path / "link.avi").symlink_to(source)
    before = source.read_bytes()
    with pytest.raises(error, match=message):
        annotate_video(source, tmp_path / out, Stub())
    assert source.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smooth": 1.0}, "smooth: .*1.0"),
        ({"smooth": -0.1}, "smooth: .*-0.1"),
        ({"smooth": float("nan")}, "smooth: .*nan"),
        ({"smooth": "much"}, "smooth: .*'much'"),
        ({"batch_size": 0}, "batch_size: .*0"),
        ({"limit": 0}, "limit: .*0"),
        ({"target": -1}, "target: .*-1"),
        ({"target": 2}, "target: .*0 to 1, got 2"),
        ({"codec": "mpeg4"}, "codec: .*'mpeg4'"),
        ({"codec": "ZZZZ"}, r"codec: OpenCV can't write \.avi with 'ZZZZ'"),
        ({"precision": "half"}, "precision: .*'half'"),
        ({"input_size": 16}, "input_size: .*16"),
        ({"input_size": (16, 0)}, "input_size: .*0"),
    ],
)
def test_a_bad_argument_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1)])
    with pytest.raises(ValueError, match=message):
        annotate_video(source, tmp_path / "out.avi", Stub(), **options)
    assert list(tmp_path.iterdir()) == [source]


class Wrong(Stub):
    """The third batch is something else."""

    def __init__(self, third: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.third = third

    def masks_and_scores(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        right = super().masks_and_scores(x, classes)
        return self.third(*right) if len(self.asked) == 3 else right


@pytest.mark.parametrize(
    ("third", "message"),
    [
        (lambda m, s: (m * float("nan"), s), "masks: NaN or infinity in sample 4"),
        (lambda m, s: (m, s / 0), "scores: NaN or infinity in sample 4"),
        (lambda m, s: (m[:, 0], s), "masks 2×1×H×W, got"),
        (lambda m, s: (m, s[0]), "scores 2×K, got"),
    ],
)
def test_what_the_network_gives_is_checked_and_an_older_file_stays(
    tmp_path: Path, third: Any, message: str
) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1)] * 9)
    out = tmp_path / "out.avi"
    out.write_text("older")
    with pytest.raises(ValueError, match=message):
        annotate_video(source, out, Wrong(third), batch_size=2)
    assert out.read_text() == "older"
    assert sorted(tmp_path.iterdir()) == [source, out]


def test_a_network_of_unknown_input_size_needs_one(tmp_path: Path) -> None:
    class Bare:
        masks_and_scores = Stub.masks_and_scores
        asked: list[Any] = []  # noqa: RUF012

    source = write(tmp_path / "in.avi", [flat(green=1)])
    with pytest.raises(ValueError, match=r"input_size: .*give \(H, W\)"):
        annotate_video(source, tmp_path / "out.avi", Bare())
    assert annotate_video(source, tmp_path / "out.avi", Bare(), input_size=(8, 8)).frames == 1


def stopping(*_: Tensor) -> tuple[Tensor, Tensor]:
    raise KeyboardInterrupt


def test_ctrl_c_completes_the_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1)] * 9)
    out = tmp_path / "out.mp4"
    out.write_text("older")
    result = annotate_video(source, out, Wrong(stopping), batch_size=2)
    assert result.interrupted
    assert not result.cut_short
    assert result.frames == len(read(out)) == 4
    assert sorted(tmp_path.iterdir()) == [source, out]


def test_a_name_as_long_as_it_can_be_is_written_and_a_pipe_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1)] * 3)
    out = tmp_path / ("n" * 251 + ".avi")
    assert annotate_video(source, out, Stub()).frames == len(read(out)) == 3
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.avi")
        with pytest.raises(OSError, match=r"pipe\.avi is a pipe; give the name of a file"):
            annotate_video(source, tmp_path / "pipe.avi", Stub())
        assert (tmp_path / "pipe.avi").is_fifo()


def test_ctrl_c_before_the_first_frame_leaves_an_older_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1)] * 9)
    out = tmp_path / "out.mp4"
    out.write_text("older")
    network = Wrong(stopping)
    network.asked = [None, None]
    with pytest.raises(KeyboardInterrupt):
        annotate_video(source, out, network)
    assert out.read_text() == "older"
    assert sorted(tmp_path.iterdir()) == [source, out]


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_full_disk_is_said_and_what_is_readable_stays(tmp_path: Path, suffix: str) -> None:
    resource = pytest.importorskip("resource")
    draw = np.random.default_rng(0)
    frames = [draw.integers(0, 255, (64, 96, 3), np.uint8) for _ in range(60)]
    source = write(tmp_path / "in.avi", frames)
    out = tmp_path / f"out{suffix}"
    out.write_text("older")
    handled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file may be larger than 50 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        with pytest.raises(OSError, match=r"out.*: only \d+ of 60 frames could be") as caught:
            annotate_video(source, out, Stub())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handled)
    n = int(str(caught.value).split("only ")[1].split()[0])
    if n:
        assert len(read(out)) == n
    else:  # the index of an MP4 file, at its end, is missing
        assert out.read_text() == "older"
    assert sorted(tmp_path.iterdir()) == sorted([source, out])


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
@pytest.mark.parametrize("rate", [0.5, 12.5, 23.976, 29.97, 60.0])
def test_a_whole_file_is_taken_for_whole(tmp_path: Path, suffix: str, rate: float) -> None:
    for n in (1, 2, 13, 40):
        written = write(tmp_path / f"{n}{suffix}", [flat(red=i / n) for i in range(n)], rate)
        assert readable_frames(written, n) == n


def tiny() -> Classifier:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    return Classifier(net, input_size=32, class_names=["a", "b", "c"]).eval()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_masking_network_annotates(tmp_path: Path, precision: str, captions: list[str]) -> None:
    network = MaskingNetwork(tiny()).eval()
    source = write(tmp_path / "in.avi", [flat(green=1)] * 3)
    result = annotate_video(source, tmp_path / "out.avi", network, precision=precision)
    assert len(read(result.path)) == 3
    predicted = "abc"[
        int(
            network.encoder(
                torch.tensor([0.0, 1, 0]).view(1, 3, 1, 1).expand(-1, -1, 32, 32)
            ).argmax()
        )
    ]
    assert {c.split()[1] for c in captions} == {predicted}


def test_a_network_that_needs_contiguous_features_gets_them(tmp_path: Path) -> None:
    class Viewing(Stub):
        def masks_and_scores(
            self, x: Tensor, classes: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            return super().masks_and_scores(x.view(len(x), -1).view(x.shape), classes)

    source = write(tmp_path / "in.avi", [flat(green=1, red=1)] * 5)
    result = annotate_video(source, tmp_path / "out.avi", Viewing(), batch_size=2)
    assert heat(read(result.path)[4]) == pytest.approx(over(flat(1, 1), LIGHTEST), abs=LOSSY)


@pytest.mark.parametrize("method", ["robust_cam", "saliency", "center_box"])
def test_a_method_annotates(tmp_path: Path, method: str) -> None:
    network = MethodMasks(tiny(), method)
    masks, scores = network.masks_and_scores(torch.rand(2, 3, 32, 32))
    assert masks.shape == (2, 1, 32, 32)
    assert scores.shape == (2, 3)
    assert masks.amax(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1])
    assert masks.min() >= 0
    source = write(tmp_path / "in.avi", [flat(green=1)] * 3)
    assert annotate_video(source, tmp_path / "out.avi", network).frames == 3


def test_a_map_with_nothing_positive_is_a_mask_of_zeros() -> None:
    network = MethodMasks(tiny(), lambda images, _: -images[:, 0])
    masks, _ = network.masks_and_scores(torch.rand(2, 3, 32, 32))
    assert masks.count_nonzero() == 0


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="robust_can"):
        MethodMasks(tiny(), "robust_can")


@pytest.fixture
def run(run: Any) -> Any:
    return lambda *arguments: run("video", *arguments)


SMALL = ("--model", "small_resnet", "--weights", "none", "--method", "center_box")


def test_the_command_says_what_it_wrote(run: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1)] * 3)
    out = tmp_path / "out.mp4"
    code, said, errors = run(source, out, *SMALL, "--smooth", "0.8", "--target", "tench")
    assert code == 0
    assert said.startswith(f"{out}: 3 frames of 96×64, 25 a second;")
    assert "3/3" in errors  # the progress bar
    assert len(read(out)) == 3


def test_the_command_says_it_in_json(run: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.avi", [flat(green=1)] * 3), tmp_path / "out.avi"
    code, said, _ = run(source, out, *SMALL, "--json")
    assert code == 0
    facts = json.loads(said)
    assert (facts["path"], facts["frames"], facts["size"]) == (str(out), 3, [64, 96])
    assert facts["annotated_a_second"] == pytest.approx(3 / facts["seconds"])


def test_the_command_says_that_a_file_is_torn(run: Any, tmp_path: Path) -> None:
    whole = write(tmp_path / "in.avi", [flat(green=1)] * 30).read_bytes()
    torn = tmp_path / "torn.avi"
    torn.write_bytes(whole[: len(whole) // 2])
    readable = len(read(torn))
    code, said, errors = run(torn, tmp_path / "out.avi", *SMALL)
    assert code == 0
    assert f"{readable} frames" in said
    assert f"captum-robust: {torn} announces 30 frames, {readable} could be read" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.avi", "out.mp4", *SMALL), "no such file"),
        (("98", "out.mp4", *SMALL), "camera 98"),
        (("in.avi", "out.gif", *SMALL), ".mp4 or .avi"),
        (("in.avi", "out.mp4", *SMALL, "--smooth", "2"), "smooth"),
        (("in.avi", "out.mp4", *SMALL, "--target", "tenhc"), "did you mean 'tench'"),
        (("in.avi", "out.mp4", *SMALL, "--network", "x.safetensors"), "give one of them"),
        (("in.avi", "out.mp4", *SMALL[:4], "--network", "x.safetensors"), "x.safetensors"),
        (("in.avi", "out.mp4", *SMALL[:4]), "captum-robust train masking"),
        (("in.avi", "out.mp4", *SMALL, "--device", "cuda:77"), "not available"),
    ],
)
def test_the_command_says_an_error_in_one_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.avi", [flat(green=1)])
    code, _, errors = run(*arguments)
    assert code == 2
    (line,) = [x for x in errors.splitlines() if x.startswith("captum-robust")]
    assert all(part in line for part in message.split(".*"))
    assert [p.name for p in tmp_path.iterdir()] == ["in.avi"]


def test_the_command_takes_the_file_of_a_masking_network(run: Any, tmp_path: Path) -> None:
    model = load_classifier("small_resnet", None)
    save_classifier(model, tmp_path / "model.safetensors")
    save_masking_network(MaskingNetwork(model), tmp_path / "masks.safetensors")
    source = write(tmp_path / "in.avi", [flat(green=1)] * 3)
    weights = ["--model", "small_resnet", "--weights", tmp_path / "model.safetensors"]
    options = [*weights, "--network", tmp_path / "masks.safetensors"]
    code, said, _ = run(source, tmp_path / "out.avi", *options)
    assert code == 0
    assert "3 frames" in said


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for another process")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_command_with_its_code_and_a_playable_file(
    tmp_path: Path, name: str, code: int
) -> None:
    source = write(tmp_path / "in.avi", [flat(green=1)] * 4000)
    out = tmp_path / "out.avi"
    command = [sys.executable, "-m", "captum_robust", "video", str(source), str(out), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        said = ""
        while not re.search(r" [1-9]\d*/4000", said):  # the progress bar
            said += process.stderr.read(1)
            assert process.poll() is None, said
        process.send_signal(signal.Signals[name])
        said += process.stderr.read()
    assert process.returncode == code
    assert "Traceback" not in said
    assert "holds the frames so far" in said
    assert 0 < len(read(out)) < 4000
    assert sorted(tmp_path.iterdir()) == [source, out]
