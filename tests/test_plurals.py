"""Numbers with their nouns, wherever one is said of a single thing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import captum_robust
from captum_robust._plurals import amount

SOURCES = Path(captum_robust.__file__).parent


@pytest.mark.parametrize(
    ("noun", "one", "two"),
    [
        ("image", "1 image", "2 images"),
        ("class", "1 class", "2 classes"),
        ("box", "1 box", "2 boxes"),
        ("patch", "1 patch", "2 patches"),
        ("copy", "1 copy", "2 copies"),
        ("day", "1 day", "2 days"),
        ("dead unit", "1 dead unit", "2 dead units"),
    ],
)
def test_one_is_singular(noun: str, one: str, two: str) -> None:
    assert (amount(1, noun), amount(2, noun)) == (one, two)


def begins_with_a_number_of_images(text: ast.JoinedStr) -> bool:
    """Whether it says "{…} images" at its beginning, of any number, also of one."""
    if len(text.values) < 2 or not isinstance(text.values[0], ast.FormattedValue):
        return False
    second = text.values[1]
    said = second.value if isinstance(second, ast.Constant) else ""
    return re.match(r" (images|photographs|units|rows|frames)\b", str(said)) is not None


def test_no_result_counts_images_without_the_helper() -> None:
    """What is said of a run begins with its number of images, which may be one."""
    rooms = ["benchmark", "cli", "inspection"]
    files = [file for room in rooms for file in sorted((SOURCES / room).glob("*.py"))]
    wrong = [
        f"{file.name}:{node.lineno}"
        for file in [*files, SOURCES / "report/comparison.py", SOURCES / "report/attack_run.py"]
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.JoinedStr) and begins_with_a_number_of_images(node)
    ]
    assert wrong == []
