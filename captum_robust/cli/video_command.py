"""The command ``captum-robust video``: parsing and printing only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_robust._checks import check, printable
from captum_robust._plurals import amount
from captum_robust.cli.model_options import ModelOptions, class_number, load_model
from captum_robust.cli.options import argument, command_of, option
from captum_robust.cli.printing import echo, print_json, warn

if TYPE_CHECKING:
    from captum_robust.show.video import VideoResult


@dataclass(frozen=True, kw_only=True)
class VideoOptions(ModelOptions):
    """The options of the command."""

    source: str = field(metadata=argument(metavar="IN"))
    """A video file, the address of a stream, a pattern such as %02d.png, or the number of a
    camera."""
    out: Path = field(metadata=argument(metavar="OUT"))
    """The file to write, .mp4, .webm or .avi."""
    network: Path | None = None
    """File of a masking network for the model, from captum-robust train masking; else the one that
    comes with the package."""
    method: str | None = None
    """Instead of a masking network a method of captum-robust methods, such as robust_cam; each map
    is divided by its largest value."""
    target: str | None = None
    """The class to show, by name or number; else the predicted one."""
    smooth: float = 0.0
    """Share of the frames before in the average over masks and probabilities, such as 0.8; 0 shows
    each frame by itself. The masks' average begins anew with the class."""
    no_box: bool = field(default=False, metadata=option("--no-box"))
    """Draw no box around the largest part of the mask."""
    batch_size: int = 4
    """Frames that the network gets at once."""
    codec: str | None = None
    """Four letters; VP80 for .webm, MJPG for .avi, avc1 or else mp4v for .mp4 by default."""
    limit: int | None = None
    """Only the first so many frames."""
    precision: str = "float32"
    json: bool = field(default=False, metadata=option("--json"))
    """Print one JSON object instead: the file, its frames and how many a second were annotated."""


@command_of(VideoOptions)
def video(options: VideoOptions) -> None:
    """Write a video with the mask of the class over each frame: where the network looks.

    Class and probability stand on each frame; sound is not copied. A camera is recorded
    until Ctrl-C, which completes the file; so it does with a video file.
    """
    # Before OpenCV is loaded: what it finds wrong with a file is said in a line of ours.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

    from captum_robust.catalog.thresholds import shipped_threshold
    from captum_robust.cli.shared_options import MASKING
    from captum_robust.show.video import annotate_video

    source = options.source
    masks = _masks(options)
    threshold = getattr(masks, "threshold", None) or shipped_threshold(MASKING)
    result = annotate_video(
        int(source) if source.isdecimal() else source,
        options.out,
        masks,
        target=class_number(masks.encoder, options.target, "target"),
        threshold=None if options.no_box else threshold,
        smooth=options.smooth,
        batch_size=options.batch_size,
        codec=options.codec,
        limit=options.limit,
        precision=options.precision,
        progress=True,
    )
    _say_result(result, options)
    if result.interrupted:
        raise SystemExit(130)


def _masks(options: VideoOptions) -> Any:
    """Return what gives the masks, on its device."""
    network, method = options.network, options.method
    check(network is None or method is None, "--network and --method: give one of them")
    classifier = load_model(options)
    if method is not None:
        from captum_robust.show.video import MethodMasks

        return MethodMasks(classifier, method)
    if network is not None:
        from captum_robust.nn import load_masking_network

        return load_masking_network(network, classifier)
    from captum_robust.attr import RealTimeMasking

    return RealTimeMasking.from_pretrained(options.model, model=classifier).network


def _say_result(result: VideoResult, options: VideoOptions) -> None:
    """Print what was written, and warn of what is not as expected."""
    source, (height, width) = options.source, result.size
    a_second = result.frames / result.seconds
    if options.json:
        print_json(vars(result) | {"annotated_a_second": a_second})
    else:
        echo(
            printable(
                f"{result.path}: {amount(result.frames, 'frame')} of {width}×{height}, "
                f"{result.frame_rate:g} a second; {a_second:.1f} a second were annotated"
            )
        )
    if result.resized:
        warn(f"resized to the first one's size: {amount(result.resized, 'frame')} of another")
    if result.cut_short:
        warn(f"{source} announces {result.announced} frames, {result.frames} could be read")
    if result.interrupted:
        warn(f"stopped; {result.path} holds the frames so far")
