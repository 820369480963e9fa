"""Heat maps over images, boxes and captioned panels, for the report and for ``explain``.

Pictures are RGB, uint8, H×W×3 everywhere in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_robust._checks import (
    check,
    check_count,
    check_floating,
    check_number,
    check_shape,
    check_type,
    known_name,
)
from captum_robust._files import write_whole
from captum_robust._orientation import orientation_of, turned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RGB: TypeAlias = npt.NDArray[np.uint8]

# Green and sky blue are told apart in all common kinds of colour blindness, also by lightness, and
# neither occurs in the heat colours.
TRUTH_COLOR = (0, 190, 90)
PREDICTED_COLOR = (120, 210, 255)
_OUTLINE = (0, 0, 0)

# Dark, middle and light, so that they are told apart without colours too.
CERTIFIED_COLORS = {"out": (45, 45, 45), "abstains": (245, 205, 90), "in": (0, 114, 178)}
INNER_COLOR = (255, 255, 255)
OUTER_COLOR = (255, 120, 200)
_CERTIFIED_SHARE = 0.62
"""Of the colour, in :func:`draw_certificate`."""

_CAPTION_SIZE = 14
_GAP = 8
_LEAST_CHANGE = 1e-30
"""Of pixels: the factor of smaller ones would be infinite."""
_WIDEST_LINE = 1000
COLORMAPS = ("inferno", "magma", "plasma", "viridis", "cividis", "turbo", "jet", "hot", "bone")
"""What :func:`overlay` knows; of *turbo* and *jet* see :func:`heat_rgb`."""
_SLACK = 1e-3
"""So far pixels may lie outside of [0, 1]."""


def as_rgb(image: Tensor | npt.NDArray[Any]) -> RGB:
    """A picture from a tensor 3×H×W or 1×H×W in [0, 1], or from an array H×W×3 that is one already.

    Raises:
        ValueError: any other shape or type of numbers.

    >>> as_rgb(torch.ones(3, 2, 4)).shape
    (2, 4, 3)
    """
    return _picture("image", image)


def _picture(name: str, image: Any) -> RGB:
    """A picture, of the argument ``name``."""
    check_type(name, image, Tensor | np.ndarray, "a tensor or an array")
    got = f"{image.dtype} of shape {tuple(image.shape)}"
    if isinstance(image, Tensor):
        fits = image.ndim == 3 and image.shape[0] in (1, 3) and image.is_floating_point()
        fits = fits and image.numel() > 0 and not image.is_meta
        check(fits, f"{name}: expected a floating-point tensor 3×H×W in [0, 1], got {got}")
        check(image.isfinite().all(), f"{name}: it holds NaN or infinity")
        pixels = image.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
        return np.ascontiguousarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
    fits = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    check(fits, f"{name}: expected a uint8 array H×W×3, got {got}")
    return np.ascontiguousarray(image)


def heat_rgb(heat: Tensor | npt.NDArray[Any]) -> RGB:
    """A heat map H×W of any range in colours, from black (its smallest value) to yellow.

    The colours are matplotlib's *inferno*: equal steps of the map look equally large, more is
    always lighter (so it also reads in grey and to colour-blind eyes), and black darkens what the
    classifier does not look at. Rainbow maps show edges where the map has none. A constant map is
    all black.

    Raises:
        ValueError: not H×W, or NaN or infinity in it.

    >>> heat_rgb(torch.tensor([[0.0, 1.0]])).tolist()
    [[[0, 0, 4], [252, 255, 164]]]
    """
    return _colors(_levels(heat))


def overlay(
    image: Any,
    heat: Tensor | npt.NDArray[Any],
    alpha: float = 0.55,
    colormap: str = "inferno",
) -> RGB:
    """A heat map of any size and range over an image, uint8 H×W×3; of a batch N×H×W×3.

    Args:
        image: a tensor 3×H×W or 1×H×W in [0, 1], an image of PIL of 8 bits, or an array H×W×3 or
            H×W×1, uint8 or in [0, 1]; or a batch N×C×H×W. That of PIL is turned upright as its
            EXIF tag says, and laid over white where it is transparent, as all images here are.
        heat: h×w, 1×h×w or 1×1×h×w; of a batch N×h×w or N×1×h×w. It is resized to the image, over
            the whole of which it lies. An attribution of several channels is summed first.
        alpha: the heat map's share of the colour, in [0, 1].
        colormap: one of :data:`COLORMAPS`.

    Raises:
        ValueError: another shape, NaN or infinity, pixels outside of [0, 1], as of an image that is
            normalised for a network, or an unknown colour map.
        TypeError: an image that is none of these.

    >>> overlay(torch.zeros(3, 8, 8), torch.rand(1, 1, 2, 2)).shape
    (8, 8, 3)
    """
    import cv2

    check_number("alpha", alpha, 0, 1)
    colormap = known_name("colormap", colormap, COLORMAPS)
    if isinstance(image, Tensor) and image.ndim == 4:
        got, n = tuple(np.shape(heat)), len(image)
        fits = len(got) in (3, 4) and got[0] == n
        check(fits, f"heat: expected {n} maps N×1×H×W, one for each image, got shape {got}")
        check(n > 0, "image: expected at least one, got none")
        pairs = zip(image, heat, strict=True)
        return np.stack([overlay(x, each, alpha, colormap) for x, each in pairs])
    picture = as_rgb(_given_pixels(image))
    height, width = picture.shape[:2]
    levels = cv2.resize(_levels(_one_map(heat)), (width, height), interpolation=cv2.INTER_LINEAR)
    colors = _colors(levels.astype(np.uint8), colormap)
    return cv2.addWeighted(picture, 1 - alpha, colors, alpha, 0).astype(np.uint8)


def _given_pixels(image: Any) -> Any:
    """The image in one of the forms that :func:`as_rgb` takes."""
    if hasattr(image, "convert"):  # of PIL
        from PIL import Image

        advice = "give it as captum_robust.data.load_image gives it"
        is_usual = not image.mode.startswith(("I", "F"))  # Pillow would cut the range off at 255
        check(is_usual, f"image: expected 8 bits a channel, got the mode {image.mode}; {advice}")
        image.load()  # a TIFF is turned upright here
        above = image.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        return turned(pixels, orientation_of(image)).permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray) and image.ndim == 3:
        image = image.repeat(3, axis=2) if image.shape[2] == 1 else image
        if image.dtype.kind == "f":
            image = torch.as_tensor(image).permute(2, 0, 1)
    is_real = isinstance(image, Tensor) and image.is_floating_point() and not image.is_meta
    if is_real and image.numel():
        low, high = (float(end) for end in image.detach().aminmax())
        advice = "give the image before it is normalised"
        is_unit = not (low < -_SLACK or high > 1 + _SLACK)  # NaN is another error
        check(is_unit, f"image: expected pixels in [0, 1], got {low:.3g} to {high:.3g}; {advice}")
    return image


def _one_map(heat: Any) -> npt.NDArray[np.float64]:
    """The map h×w of one image, of which other dimensions have the length 1."""
    values = _numbers("heat", heat)
    got = f"got shape {values.shape}"
    if values.ndim in (3, 4):
        is_one = all(length == 1 for length in values.shape[:-2])
        advice = "sum an attribution over its channels first, as by .abs().sum(dim=1)"
        check(is_one, f"heat: expected one map H×W, 1×H×W or 1×1×H×W, {got}; {advice}")
        values = values.reshape(values.shape[-2:])
    return values


def amplified(change: Tensor) -> tuple[RGB, float]:
    """A signed change 3×H×W or 1×H×W of an image as a picture, and how far it is amplified.

    A channel is 0.5 + factor · change: grey is unchanged, brighter is increased. The factor takes
    the 99.9th percentile of the magnitudes to black or white; by the largest of all, one pixel
    could leave the rest in grey.

    >>> picture, factor = amplified(torch.tensor([0.0, 0.1, -0.1]).view(3, 1, 1))
    >>> picture.tolist(), round(factor, 3)
    ([[[128, 255, 0]]], 5.0)
    """
    check_floating("change", change)
    check_shape("change", change, "C×H×W")
    check(len(change) in (1, 3), f"change: expected 1 or 3 channels, got {len(change)}")
    fits = change.numel() > 0 and not change.is_meta
    check(fits, f"change: expected pixels, got none, of shape {tuple(change.shape)}")
    values = change.detach().float().cpu()
    check(values.isfinite().all(), "change: it holds NaN or infinity")
    magnitudes = values.abs().numpy()
    # Where less than 0.1 % of the pixels changed, the percentile is 0.
    strongest = float(np.quantile(magnitudes, 0.999)) or float(magnitudes.max())
    factor = 0.5 / strongest if strongest > _LEAST_CHANGE else 1.0
    return as_rgb(0.5 + factor * values), factor


def factor_text(factor: float) -> str:
    """An amplification, as it is printed.

    >>> factor_text(1342.3), factor_text(3.14159)
    ('×1,342', '×3.1')
    """
    return f"×{factor:,.0f}" if factor >= 10 else f"×{factor:.2g}"


def verdict(flipped: bool, was_first: bool, wanted: str | None = None) -> tuple[str, str]:
    """What a change did, a mark and words, which the name of the new class follows.

    Args:
        flipped: as in ``Perturbation``.
        was_first: whether the explained class was the prediction, so that there was a label to
            flip.
        wanted: the name of the counterfactual class, if there is one.
    """
    if wanted is not None:
        return ("✓", "flipped to") if flipped else ("✗", f"not yet {wanted}, but")
    if not was_first:
        return "", "was not the prediction; now"
    return ("✓", "flipped to") if flipped else ("✗", "not flipped, still")


def draw_boxes(
    rgb: RGB,
    boxes: Tensor | npt.NDArray[Any] | Sequence[Sequence[float]],
    color: tuple[int, int, int] = TRUTH_COLOR,
    width: int = 2,
) -> RGB:
    """The picture with boxes on it, each with a dark outline so that it is seen on any ground.

    Args:
        rgb: H×W×3 uint8; left as it is.
        boxes: M×4 (x0, y0, x1, y1) in pixels, half-open; M may be 0. Parts outside are clipped.
        color: of the line, R, G, B.
        width: of the line, in pixels; the outline adds one on each side.
    """
    import cv2

    drawn = _picture("rgb", rgb).copy()
    corners = _numbers("boxes", boxes)
    is_list = corners.size == 0 or (corners.ndim == 2 and corners.shape[1] == 4)
    check(is_list, f"boxes: expected M×4, got shape {corners.shape}")
    check(not np.isnan(corners).any(), "boxes: expected numbers, got NaN")
    corners = corners.reshape(-1, 4)
    is_ordered = (corners[:, :2] <= corners[:, 2:]).all()
    check(is_ordered, "boxes: expected x0 ≤ x1 and y0 ≤ y1, got others")
    check_count("width", width, 1, _WIDEST_LINE)
    is_color = isinstance(color, tuple | list) and len(color) == 3
    check(is_color, f"color: expected (R, G, B), got {color!r}")
    for level in color:
        check_count("color", level, 0, 255)
    height, span = drawn.shape[:2]
    # The middle of the line lies so far inside that a box along the border is seen whole.
    inset = width // 2 + 1
    for line, thickness in ((_OUTLINE, width + 2), (color, width)):
        for x0, y0, x1, y1 in corners.clip(0, [span, height, span, height]):
            first = (round(x0) + inset, round(y0) + inset)
            last = (round(x1) - 1 - inset, round(y1) - 1 - inset)
            last = (max(first[0], last[0]), max(first[1], last[1]))
            cv2.rectangle(drawn, first, last, line, thickness)
    return drawn


def draw_certificate(
    rgb: RGB,
    cells: Tensor | npt.NDArray[Any],
    inner: Sequence[float] | None = None,
    outer: Sequence[float] | None = None,
) -> RGB:
    """What is certified of a map, over the picture in grey, with the two boxes.

    Args:
        rgb: H×W×3 uint8; left as it is.
        cells: h×w of 0 for certified out, 1 for abstains and 2 for certified in, in the order of
            ``CERTIFIED_COLORS``; over the whole picture.
        inner: the box that lies within that of every image in the ball, (x0, y0, x1, y1) in pixels
            of the picture; None: there is none.
        outer: the box around all of them, likewise.
    """
    import cv2

    picture = _picture("rgb", rgb)
    states = _numbers("cells", cells)
    check(states.ndim == 2 and states.size, f"cells: expected h×w, got shape {states.shape}")
    check(np.isin(states, (0, 1, 2)).all(), "cells: expected 0, 1 and 2, got others")
    colors = np.array(list(CERTIFIED_COLORS.values()), dtype=np.uint8)[states.astype(int)]
    size = picture.shape[1], picture.shape[0]
    large = cv2.resize(colors, size, interpolation=cv2.INTER_NEAREST)
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    drawn = cv2.addWeighted(grey, 1 - _CERTIFIED_SHARE, large, _CERTIFIED_SHARE, 0)
    boxes: RGB = drawn.astype(np.uint8)
    for box, color in ((outer, OUTER_COLOR), (inner, INNER_COLOR)):
        boxes = draw_boxes(boxes, [] if box is None else [box], color)
    return boxes


def panel(images: Sequence[RGB], captions: Sequence[str], columns: int | None = None) -> RGB:
    """Pictures in a grid on white, each with its caption below, wrapped to the picture's width.

    Args:
        images: each H×W×3 uint8; the cells are as large as the largest.
        captions: one a picture; may hold line breaks.
        columns: how many beside each other; None: all.

    Raises:
        ValueError: no images, or not one caption for each.
    """
    from PIL import Image, ImageDraw

    check_type("images", images, Sequence, "a list of pictures")
    check_type("captions", captions, Sequence, "a list of texts")
    are_texts = all(isinstance(caption, str) for caption in captions)
    check(are_texts, "captions: expected texts, got others", TypeError)
    check_count("columns", columns, 1, optional=True)
    images = [_picture("images", image) for image in images]
    fit = 0 < len(images) == len(captions)
    got = f"{len(captions)} for {len(images)}"
    check(fit, f"captions: expected one for each of at least one image, got {got}")
    columns = min(columns or len(images), len(images))
    rows = -(-len(images) // columns)
    cell_width = max(image.shape[1] for image in images)
    cell_height = max(image.shape[0] for image in images)
    font = _font()
    wrapped = [_wrap(caption, font, cell_width) for caption in captions]
    line = _CAPTION_SIZE + 4
    lines = max(text.count("\n") + 1 for text in wrapped)
    step_x, step_y = cell_width + _GAP, cell_height + lines * line + _GAP
    canvas = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (image, text) in enumerate(zip(images, wrapped, strict=True)):
        x, y = _GAP + i % columns * step_x, _GAP + i // columns * step_y
        canvas.paste(Image.fromarray(image), (x, y))
        for row, words in enumerate(text.split("\n")):
            pen.text((x, y + cell_height + 3 + row * line), words, fill="black", font=font)
    return np.asarray(canvas)


@lru_cache(maxsize=256)
def tag(text: str, size: int, width: int) -> RGB:
    """One line of text in white on black, grey levels H×W, to be laid over a picture.

    Args:
        text: shortened where it is too long.
        size: of the letters, in pixels.
        width: of the picture, in pixels, which the tag does not exceed.
    """
    from PIL import Image, ImageDraw

    font = _font(size)
    margin = max(2, size // 3)
    words = _shorten(text, font, max(1, width - 2 * margin))
    # At least one pixel: nothing of the text may fit.
    length = min(width, round(font.getlength(words)) + 2 * margin)
    canvas = Image.new("L", (max(1, length), size + 2 * (margin // 2)))
    ImageDraw.Draw(canvas).text((margin, margin // 2), words, fill=255, font=font)
    return np.asarray(canvas)


def encode_jpeg(rgb: RGB, quality: int) -> bytes:
    """The picture as JPEG in full colour resolution; else the thin lines of boxes turn grey."""
    import cv2

    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    _, data = cv2.imencode(
        ".jpg", _picture("rgb", rgb)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling]
    )
    return data.tobytes()


def save_png(path: str | Path, rgb: RGB) -> Path:
    """Write a PNG, whole or not at all, and return its path; parent folders are made."""
    return write_whole(Path(path), encode_png(rgb))


def encode_png(rgb: RGB) -> bytes:
    """The picture as PNG, which loses nothing."""
    import cv2

    _, data = cv2.imencode(".png", _picture("rgb", rgb)[:, :, ::-1])
    return data.tobytes()


def _levels(heat: Tensor | npt.NDArray[Any]) -> RGB:
    """H×W of any range as uint8 H×W from 0 to 255."""
    values = _numbers("heat", heat)
    is_map = values.ndim == 2 and values.size > 0
    check(is_map, f"heat: expected a map H×W, got shape {values.shape}")
    check(np.isfinite(values).all(), "heat: it holds NaN or infinity")
    values = values / max(1, abs(values).max() / 1e300)  # their range is finite too
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low or 1)  # a constant map becomes zeros
    levels: RGB = (scaled * 255).round().astype(np.uint8)
    return levels


def _numbers(name: str, values: Any) -> npt.NDArray[np.float64]:
    """Real numbers as an array; ``TypeError`` for what are none."""
    if isinstance(values, Tensor):
        fits = not (values.is_complex() or values.is_meta)
        check(fits, f"{name}: expected real numbers, got {values.dtype}", TypeError)
        values = values.detach().double().cpu().numpy()
    try:
        array = np.asarray(values)
        is_real = array.size == 0 or array.dtype.kind in "biuf"
    except ValueError:  # rows of several lengths
        is_real = False
    check(is_real, f"{name}: expected real numbers, got {type(values).__name__}", TypeError)
    return array.astype(np.float64) if array.size else np.zeros(array.shape)


def _colors(levels: RGB, colormap: str = "inferno") -> RGB:
    import cv2

    table = getattr(cv2, f"COLORMAP_{colormap.upper()}")
    return np.ascontiguousarray(cv2.applyColorMap(levels, table)[:, :, ::-1])


def _font(size: int = _CAPTION_SIZE) -> Any:
    """DejaVu Sans, which knows ✓, ✗ and ε, from matplotlib where it is installed."""
    from PIL import ImageFont

    package = find_spec("matplotlib")
    for folder in (package.submodule_search_locations or []) if package else []:
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(file, size - 1)
    return ImageFont.load_default(size)


def _wrap(caption: str, font: Any, width: int) -> str:
    lines: list[str] = []
    for paragraph in caption.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = _shorten(longer, font, width)
        lines.append(line)
    return "\n".join(lines)


def _shorten(word: str, font: Any, width: int) -> str:
    if font.getlength(word) <= width:
        return word
    while word and font.getlength(word + "…") > width:
        word = word[:-1]
    return word + "…"


def blank_figure(**options: Any) -> Figure:
    """Return a figure that pyplot knows nothing of.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            'plots need matplotlib: pip install matplotlib (or: pip install "captum-robust[demo]")'
        ) from None
    return Figure(**options)
