"""``overlay``, and how our maps go into Captum's and pytorch-grad-cam's pictures."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from captum.attr import visualization
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import captum_robust
from captum_robust import PerceptualBallPerturbation, RobustCAM, overlay
from captum_robust.draw import COLORMAPS

CORNER = torch.zeros(6, 8)
CORNER[:2, 5:] = 1.0
"""Bright above on the right: an order of axes that is not H, W shows it elsewhere."""


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))


def forms(image: torch.Tensor) -> dict[str, Any]:
    """One image of whole levels in all forms."""
    levels = (image * 255).round()
    array = levels.permute(1, 2, 0).numpy().astype(np.uint8)
    return {
        "tensor": levels / 255,
        "uint8": array,
        "float": array.astype(np.float32) / 255,
        "PIL": Image.fromarray(array),
    }


@pytest.mark.parametrize("form", ["tensor", "uint8", "float", "PIL"])
def test_all_forms_of_an_image_and_a_map_give_one_picture(image: torch.Tensor, form: str) -> None:
    given = forms(image)
    expected = overlay(given["uint8"], CORNER)
    assert (expected.dtype, expected.shape) == (np.uint8, (6, 8, 3))
    for heat in (CORNER, CORNER[None], CORNER[None, None], CORNER.numpy(), CORNER[None].numpy()):
        np.testing.assert_array_equal(overlay(given[form], heat), expected)


def test_the_colours_are_those_of_opencv(image: torch.Tensor) -> None:
    picture = forms(image)["uint8"]
    for name in COLORMAPS:
        table = getattr(cv2, f"COLORMAP_{name.upper()}")
        colors = cv2.applyColorMap((CORNER.numpy() * 255).astype(np.uint8), table)[:, :, ::-1]
        found = overlay(picture, CORNER, alpha=0.4, colormap=name.title())
        expected = 0.6 * picture.astype(float) + 0.4 * colors
        assert np.abs(found - expected).max() <= 0.5001


def test_grey_images_and_small_maps(image: torch.Tensor) -> None:
    grey = image[:1]
    three = overlay(grey.expand(3, -1, -1), CORNER)
    np.testing.assert_array_equal(overlay(grey, CORNER), three)
    levels = (grey * 255).byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(overlay(levels, CORNER), overlay(levels.repeat(3, 2), CORNER))
    assert overlay(image, torch.rand(1, 1, 2, 2)).shape == (6, 8, 3)  # as a layer's map


def test_a_batch_is_its_images(image: torch.Tensor) -> None:
    images, maps = torch.stack([image, image.flip(2)]), torch.stack([CORNER, 1 - CORNER])
    expected = np.stack([overlay(x, m) for x, m in zip(images, maps, strict=True)])
    for heat in (maps, maps[:, None], maps.numpy()):
        np.testing.assert_array_equal(overlay(images, heat), expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"heat": torch.rand(3, 6, 8)}, ValueError, r"heat: .*got shape \(3, 6, 8\); sum an attr"),
        ({"heat": torch.rand(6)}, ValueError, "heat: expected a map"),
        ({"heat": torch.full((6, 8), torch.nan)}, ValueError, "heat: it holds NaN or infinity"),
        ({"heat": "map"}, TypeError, "heat: expected real numbers"),
        ({"image": torch.randn(3, 6, 8) * 2}, ValueError, r"image: expected pixels in \[0, 1\]"),
        ({"image": np.full((6, 8, 3), 9.0)}, ValueError, r"image: expected pixels in \[0, 1\]"),
        ({"image": torch.rand(5, 6, 8)}, ValueError, "image: expected a floating-point tensor"),
        ({"image": np.zeros((6, 8, 4), np.uint8)}, ValueError, "image: expected a uint8 array"),
        ({"image": "a.png"}, TypeError, "image: expected a tensor or an array"),
        ({"image": torch.rand(2, 3, 6, 8)}, ValueError, "heat: expected 2 maps"),
        ({"image": Image.new("I;16", (8, 6))}, ValueError, "image: expected 8 bits a channel"),
        ({"image": Image.new("F", (8, 6))}, ValueError, "image: expected 8 bits a channel"),
        ({"image": torch.rand(0, 3, 6, 8), "heat": torch.rand(0, 2, 2)}, ValueError, "at least"),
        ({"colormap": "rainbow"}, ValueError, "colormap: expected one of"),
        ({"alpha": -0.1}, ValueError, "alpha: expected a number"),
    ],
)
def test_what_does_not_fit_is_named(
    image: torch.Tensor, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        overlay(**{"image": image, "heat": CORNER} | given)


def test_it_is_public_without_being_loaded() -> None:
    assert captum_robust.overlay is overlay
    assert "overlay" in dir(captum_robust)


# --- others' pictures ---


class Bright(nn.Module):
    """Its one feature is the brightness, so its class activation map is the image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 1 / 3)
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight.data = torch.tensor([[1.0], [0.0]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).mean(dim=(2, 3)))


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image that is bright in the corner, its map N×1×H×W, and a perturbation N×3×H×W."""
    x = CORNER.expand(1, 3, -1, -1) * 0.9
    model = Bright().eval()
    cam = RobustCAM(model, "layer").attribute(x, 0, upsample=True)
    return x, cam, PerceptualBallPerturbation(model, "layer").attribute(x, 0)


@pytest.mark.parametrize("method", ["heat_map", "blended_heat_map", "masked_image"])
def test_captums_visualization_takes_our_maps(maps: tuple[torch.Tensor, ...], method: str) -> None:
    x, cam, change = maps
    original = x[0].permute(1, 2, 0).numpy()
    for attribution in (cam, change):
        attr = attribution[0].permute(1, 2, 0).numpy()
        figure, axes = visualization.visualize_image_attr(
            attr, original, method=method, sign="absolute_value", use_pyplot=False
        )
        assert isinstance(figure, Figure)
        shown = np.asarray(axes.images[-1].get_array(), dtype=float)
        shown = shown.mean(axis=2) if shown.ndim == 3 else shown
        assert shown.shape == (6, 8)
    figure, axes = visualization.visualize_image_attr(
        cam[0].permute(1, 2, 0).numpy(), original, method="heat_map", use_pyplot=False
    )
    shown = np.asarray(axes.images[-1].get_array(), dtype=float)
    assert shown[0, 7] == 1
    assert shown[5, 0] == 0


def test_pytorch_grad_cams_overlay_takes_our_maps(maps: tuple[torch.Tensor, ...]) -> None:
    utils = pytest.importorskip("pytorch_grad_cam.utils.image")
    x, cam, _ = maps
    rgb, heat = x[0].permute(1, 2, 0).numpy(), cam[0, 0].numpy()
    theirs = utils.show_cam_on_image(rgb, heat, use_rgb=True, image_weight=0.5)
    # They divide the sum by its largest value, we do not.
    ours = overlay(x[0], cam, 0.5, "jet").astype(float)
    expected = (ours / ours.max() * 255).clip(0, 255)
    assert np.abs(theirs - expected).max() <= 3
    assert theirs[0, 7, 0] > theirs[5, 0, 0]  # red where the map is


def test_no_figure_is_made_by_pyplot_which_would_show_it() -> None:
    for file in Path(captum_robust.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            assert "pyplot" not in f"{getattr(node, 'module', '')} {names}", file
