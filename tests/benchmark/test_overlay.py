from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from captum_robust.draw import (
    PREDICTED_COLOR,
    TRUTH_COLOR,
    as_rgb,
    draw_boxes,
    heat_rgb,
    overlay,
    panel,
    save_png,
)


def has(rgb: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """H×W, where a picture has exactly this colour."""
    return (rgb == color).all(axis=2)


def test_heat_colours_are_matplotlibs_inferno() -> None:
    levels = np.arange(256, dtype=np.float32)[None]
    expected = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).round()
    assert np.abs(heat_rgb(levels)[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1e-6, 0), (250, -100), (1e30, 1e30)])
def test_heat_colours_do_not_depend_on_range(scale: float, shift: float) -> None:
    heat = torch.linspace(0, 1, 256, dtype=torch.float64).view(16, 16)
    expected = heat_rgb(heat).astype(int)
    assert np.abs(heat_rgb(heat.numpy() * scale + shift).astype(int) - expected).max() <= 8


def test_a_constant_map_is_all_black() -> None:
    assert heat_rgb(torch.full((3, 5), 7.0)).max() <= 4


def test_overlay_goes_from_the_image_to_the_heat_colours() -> None:
    image = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    heat = torch.arange(96.0).view(8, 12)
    np.testing.assert_array_equal(overlay(image, heat, alpha=0), as_rgb(image))
    np.testing.assert_array_equal(overlay(image, heat, alpha=1), heat_rgb(heat))
    assert overlay(as_rgb(image), heat[:2, :3]).shape == (8, 12, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        heat_rgb(torch.tensor([[0.0, bad]]))


def test_wrong_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="heat: expected a map H×W, got shape"):
        heat_rgb(torch.rand(1, 4, 4))
    with pytest.raises(ValueError, match="image: expected a floating-point tensor 3×H×W"):
        as_rgb(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="image: expected a uint8 array"):
        as_rgb(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="alpha"):
        overlay(torch.rand(3, 4, 4), torch.rand(4, 4), alpha=1.5)
    with pytest.raises(ValueError, match="captions: expected one for each"):
        panel([np.zeros((4, 4, 3), np.uint8)], [])


@pytest.mark.parametrize("ground", [0, 120, 255])
def test_a_box_has_its_line_and_a_dark_outline_on_any_ground(ground: int) -> None:
    picture = np.full((40, 60, 3), ground, np.uint8)
    drawn = draw_boxes(picture, [[10, 8, 50, 30]], PREDICTED_COLOR)
    line, outline = has(drawn, PREDICTED_COLOR), has(drawn, (0, 0, 0))
    left = np.flatnonzero(line[19, :30])
    assert len(left) >= 2
    assert outline[19, left[0] - 1]
    assert outline[19, left[-1] + 1]
    # Nothing outside the box and nothing in its middle is touched.
    touched = (drawn != picture).any(axis=2)
    rows, columns = np.nonzero(touched | line)
    assert rows.min() >= 8
    assert rows.max() < 30
    assert columns.min() >= 10
    assert columns.max() < 50
    assert not touched[15:23, 20:40].any()
    assert (picture == ground).all()


def test_a_box_of_the_whole_image_shows_all_four_sides() -> None:
    drawn = draw_boxes(np.zeros((30, 30, 3), np.uint8), [[-5, 0, 30, 99]], TRUTH_COLOR)
    line = has(drawn, TRUTH_COLOR)
    for side in (line[:5], line[-5:], line[:, :5], line[:, -5:]):
        assert side.sum() >= 20


def test_no_boxes_and_tiny_boxes() -> None:
    picture = np.zeros((10, 10, 3), np.uint8)
    np.testing.assert_array_equal(draw_boxes(picture, torch.zeros(0, 4)), picture)
    assert has(draw_boxes(picture, [[4, 4, 5, 5]]), TRUTH_COLOR).any()


def test_a_panel_holds_every_picture_whole() -> None:
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    images = [np.full((20, 50 + i, 3), c, np.uint8) for i, c in enumerate(colors)]
    grid = panel(images, ["a", "two words that wrap around", "x" * 100], columns=2)
    for i, color in enumerate(colors):
        assert has(grid, color).sum() == 20 * (50 + i)
    # A caption stays within its column: right of the second one only the margin is left.
    assert (grid[:, -8:] == 255).all()


def test_a_png_is_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    picture = as_rgb(torch.rand(3, 7, 9))
    path = save_png(tmp_path / "new" / "a.png", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_png(tmp_path / "new", picture)


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")

    def full(*_: object) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        save_png(target, np.zeros((2, 2, 3), np.uint8))
    assert target.read_bytes() == b"old"
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_png(target, np.zeros((2, 2, 3), np.uint8))
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
