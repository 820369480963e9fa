"""What a comparison shows of itself in a notebook."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust.attacks import FGSM
from captum_robust.benchmark import Comparison, compare
from captum_robust.data import Sample
from captum_robust.models import Classifier

SCRIPT = "<script>alert(1)</script>&\x1b[2J"


class Cells(HTMLParser):
    """The texts of each row of a table, and all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.rows += [[]] if tag == "tr" else []
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.inside = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def middle(images: Tensor, target: Tensor) -> Tensor:
    maps = torch.zeros(len(images), 16, 16)
    maps[:, 4:12, 4:12] = 1
    return maps


@pytest.fixture
def result() -> Comparison:
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Classifier(nn.Sequential(*parts), input_size=16).eval()
    boxes = torch.tensor([[4.0, 4, 12, 12]])
    samples = [Sample(torch.rand(3, 16, 16), i % 3, boxes, str(i)) for i in range(4)]
    methods = {SCRIPT: middle, "whole": "whole image"}
    attacks = {"fgsm 8/255": FGSM(model, 8 / 255)}
    return compare(model, samples, methods, attacks, progress=False)


def test_it_is_the_table_with_n_and_intervals(result: Comparison) -> None:
    head, *rows = Cells(result._repr_html_()).rows
    assert head[:4] == ["attack", "method", "n", "error"]
    table = result.table()
    assert len(rows) == len(table) == 4
    for cells, record in zip(rows, table.to_dict("records"), strict=True):
        interval = f"[{record['error_low']:.3f}, {record['error_high']:.3f}]"
        assert cells[0] == record["attack"]
        assert cells[2:4] == [str(record["n"]), f"{record['error']:.3f} {interval}"]


def test_names_are_escaped(result: Comparison) -> None:
    text = result._repr_html_()
    cells = Cells(text)
    assert not cells.tags - {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert "<script>alert(1)</script>&\\x1b[2J" in {cell for row in cells.rows for cell in row}
    assert "\x1b" not in text
    assert "4 images: 0 could not be used" in text


def test_a_run_that_was_not_scored_says_so(tmp_path: Path) -> None:
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), input_size=4).eval()
    with pytest.warns(UserWarning, match="no image has a box"):
        result = compare(model, [torch.rand(3, 4, 4)], ["whole_image"], progress=False)
    assert "no image has a box" in result._repr_html_()
