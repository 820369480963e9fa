from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def draw() -> Callable[..., Path]:
    """Write an image of a grey gradient, size (W, H), and return its path."""

    def write(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = size
        ramp = np.linspace(0, 255, width * height).astype(np.uint8).reshape(height, width)
        Image.fromarray(ramp).convert("RGB").save(path)
        return path

    return write


@pytest.fixture
def write() -> Callable[[Path, str], Path]:
    """Write a text file and return its path."""

    def write_text(path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_text


@pytest.fixture
def voc_xml() -> Callable[..., str]:
    """The XML of objects (name, xmin, ymin, xmax, ymax[, difficult]); size is (W, H)."""

    def build(*objects: tuple, size: tuple[int, int] | None = (40, 30)) -> str:
        lines = ["<annotation>"]
        if size:
            lines.append(f"<size><width>{size[0]}</width><height>{size[1]}</height></size>")
        for name, x0, y0, x1, y1, *difficult in objects:
            lines += ["<object>", f"<name>{name}</name>"]
            lines.append(f"<difficult>{difficult[0] if difficult else 0}</difficult>")
            # Files differ in the order of the corners, and VOC's people have parts with boxes.
            lines.append("<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>")
            lines.append("<xmax>2</xmax><ymax>2</ymax></bndbox></part>")
            lines.append(f"<bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin>")
            lines.append(f"<ymax>{y1}</ymax><ymin>{y0}</ymin></bndbox></object>")
        return "\n".join([*lines, "</annotation>"])

    return build
