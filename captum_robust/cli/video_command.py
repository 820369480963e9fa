"""The command ``captum-robust video``: parsing and printing only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_robust._checks import check, printable
from captum_robust.cli.model_options import Device, Model, Weights, class_number, load_model
from captum_robust.cli.shared_options import USUAL_MODEL

if TYPE_CHECKING:
    from captum_robust.show.video import VideoResult


def video(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A video file, or the number of a camera.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, .mp4 or .avi.")],
    model: Model = USUAL_MODEL,
    weights: Weights = "DEFAULT",
    network: Annotated[
        Path | None,
        typer.Option(
            help="File of a masking network for the model, from captum-robust train masking; else "
            "the one that comes with the package."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Instead of a masking network a method of captum-robust methods, such as "
            "robust_cam; each map is divided by its largest value."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The class to show, by name or number; else the predicted one."),
    ] = None,
    smooth: Annotated[
        float,
        typer.Option(
            help="Share of the frames before in the average over masks and probabilities, such as "
            "0.8; 0 shows each frame by itself. The masks' average begins anew with the class."
        ),
    ] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Frames that the network gets at once.")] = 4,
    codec: Annotated[
        str | None, typer.Option(help="Four letters; mp4v for .mp4 and MJPG for .avi by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many frames.")] = None,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Write a video with the mask of the class over each frame: where the network looks.

    Class and probability stand on each frame; sound is not copied. A camera is recorded
    until Ctrl-C, which completes the file; so it does with a video file.
    """
    # Before OpenCV is loaded: what it finds wrong with a file is said in a line of ours.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

    from captum_robust.show.video import annotate_video

    masks = _masks(model, weights, network, method, device)
    result = annotate_video(
        int(source) if source.isdecimal() else source,
        out,
        masks,
        target=None if target is None else class_number(masks.encoder, target, "target"),
        smooth=smooth,
        batch_size=batch_size,
        codec=codec,
        limit=limit,
        precision=precision,
        progress=True,
    )
    _say_result(result, source)
    if result.interrupted:
        # Not typer.Exit, which would add that the same command goes on from here.
        raise SystemExit(130)


def _masks(model: str, weights: str, network: Path | None, method: str | None, device: str) -> Any:
    """Return what gives the masks, on its device."""
    check(network is None or method is None, "--network and --method: give one of them")
    classifier = load_model(model, weights, device)
    if method is not None:
        from captum_robust.show.video import MethodMasks

        return MethodMasks(classifier, method)
    if network is not None:
        from captum_robust.nn import load_masking_network

        return load_masking_network(network, classifier)
    from captum_robust.attr import RealTimeMasking

    return RealTimeMasking.from_pretrained(model, model=classifier).network


def _say_result(result: VideoResult, source: str) -> None:
    """Print what was written, and warn of what is not as expected."""
    height, width = result.size
    typer.echo(
        printable(
            f"{result.path}: {result.frames} frames of {width}×{height}, {result.frame_rate:g} a "
            f"second; {result.frames / result.seconds:.1f} a second were annotated"
        )
    )
    if result.resized:
        _warn(f"{result.resized} frames of another size were resized to the first one's")
    if result.cut_short:
        _warn(f"{source} announces {result.announced} frames, {result.frames} could be read")
    if result.interrupted:
        _warn(f"stopped; {result.path} holds the frames so far")


def _warn(text: str) -> None:
    typer.echo(f"captum-robust: {printable(text)}", err=True)
