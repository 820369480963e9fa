"""What the report says of attacks."""

from __future__ import annotations

import base64
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_robust.benchmark import Comparison, build_attacks, compare
from captum_robust.catalog.words import words_of
from captum_robust.data import Sample

from .conftest import Drawn, centre_heat, make_classifier, strips_of
from .test_report import Page

HOSTILE = "</table><script>alert(6)</script>"
METHODS = {"bright": centre_heat, "saliency": "saliency", "center_box": "center_box"}


class Unlabelled(Drawn):
    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), label=None)


class Unboxed(Unlabelled):
    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), boxes=torch.zeros(0, 4))


def unchanged(images: Tensor, _: Tensor) -> Tensor:
    return images


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    model = make_classifier()
    attacks: dict[str, Any] = {**build_attacks(model, ["fgsm"], [64, 1]), HOSTILE: unchanged}
    out = tmp_path_factory.mktemp("run")
    return compare(model, Unlabelled(8, broken=[3]), METHODS, attacks, out=out, progress=False)


@pytest.fixture(scope="module")
def page(run: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(run.to_html(tmp_path_factory.mktemp("report") / "report.html"))


def test_each_attack_has_its_row(run: Comparison, page: Page) -> None:
    header = next(i for i, row in enumerate(page.rows) if row[0] == "Attack")
    rows = page.rows[header + 1 : header + 4]
    for row, record in zip(rows, run.attack_table().to_dict("records"), strict=True):
        assert row[0] == record["attack"]
        assert row[1:3] == ["100.0", "0of 7"]
        assert row[3] == f"{100 * record['fooled']:.1f}of 7"
        low, high = 100 * record["robust_low"], 100 * record["robust_high"]
        assert row[4] == f"{100 * record['robust_accuracy']:.1f}{low:.1f} to {high:.1f}"
        assert row[5] == f"{255 * record['linf']:.1f}"
    assert [row[0] for row in rows] == ["fgsm 64/255", "fgsm 1/255", HOSTILE]
    assert rows[0][5] == "64.0"
    assert "The label of 7 of the images is not known" in " ".join(page.text.split())


def test_the_error_of_each_method_stands_under_each_attack(run: Comparison, page: Page) -> None:
    header = next(i for i, row in enumerate(page.rows) if row[0] == "Error %")
    assert page.rows[header][1:] == run.attacks
    errors = run.error_by_attack()
    for row, (method, expected) in zip(page.rows[header + 1 :], errors.iterrows(), strict=False):
        assert row[0].startswith(words_of(method))
        assert [float(cell.split("to")[0][: cell.index(".") + 2]) for cell in row[1:]] == [
            pytest.approx(100 * e, abs=0.05) for e in expected
        ]


def test_the_chart_runs_from_the_clean_accuracy_to_the_strongest_attack(page: Page) -> None:
    (chart,) = [a for tag, a in page.elements if "Robust accuracy" in a.get("alt", "")]
    assert "fgsm: 100.0 at 0, " in chart["alt"]
    assert " at 64" in chart["alt"]
    assert HOSTILE not in chart["alt"]  # its name says no strength
    assert HOSTILE in page.text
    assert [tag for tag, _ in page.elements].count("script") == 1  # its own


def test_without_matplotlib_the_page_says_so_and_tells_the_chart_in_words(
    run: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Page(run.to_html(tmp_path / "report.html"))
    assert "matplotlib is not installed" in page.text
    assert "Robust accuracy in % against the strength of the attack." in page.text


def test_a_chart_holds_no_script_and_loads_nothing(page: Page) -> None:
    charts = [a["src"] for tag, a in page.elements if tag == "img" and "svg+xml" in a["src"]]
    assert charts
    for source in charts:
        drawing = base64.b64decode(source.partition(",")[2]).decode()
        assert drawing.startswith("<?xml")
        assert "<script" not in drawing
        assert not re.search(r"""(?:href|src)=["'](?!#)|url\((?!#)|@import""", drawing)


def test_the_strips_show_the_first_images_that_were_right(run: Comparison) -> None:
    entries = strips_of(run)
    assert [e.image for e in entries] == [f"{i}.png" for i in (0, 1, 2, 4, 5, 6)]
    frame = run.to_dataframe().set_index(["image", "attack", "method"])
    for entry in entries:
        assert [s.attack for s in entry.strips] == run.attacks
        clean, *attacked = entry.strips
        assert clean.fooled is None
        assert not clean.change
        for strip in attacked:
            row = frame.loc[(entry.image, strip.attack, "saliency")]
            assert strip.fooled == row["fooled"]
            assert strip.predicted_class == run.class_name(int(row["predicted"]))
            assert [t.method for t in strip.tiles] == ["bright", "saliency"]
            assert strip.tiles[1].iou == row["iou"]
            assert all(t.picture for t in strip.tiles)


def test_many_attacks_and_methods_show_fewer_images(tmp_path: Path) -> None:
    model = make_classifier()
    attacks = {f"a{i}": unchanged for i in range(16)}
    methods = {f"m{i}": centre_heat for i in range(12)}
    run = compare(model, Unlabelled(3), methods, attacks, out=tmp_path, progress=False)
    assert len(strips_of(run)) == 1


def test_images_without_boxes_are_attacked_and_shown_too(tmp_path: Path) -> None:
    model = make_classifier()
    attacks = build_attacks(model, ["fgsm"], [64])
    run = compare(model, Unboxed(3), ["saliency"], attacks, out=tmp_path / "a", progress=False)
    page = Page(run.to_html(tmp_path / "report.html"))
    assert [row[0] for row in page.rows].count("fgsm 64/255") == 3  # results, attacks, stability
    assert "Error %" not in [row[0] for row in page.rows]
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 3 * (2 + 3)
    assert run.attack_table().loc[0, "n"] == 3
    assert "fgsm 64/255" in run.to_text()


def test_nothing_but_mistakes_is_said_to_be_so(tmp_path: Path) -> None:
    class Wrong(Drawn):
        def __getitem__(self, index: int) -> Sample:
            return replace(super().__getitem__(index), label=0)  # the model says 3

    model = make_classifier()
    attacks = build_attacks(model, ["fgsm"], [1, 2])
    run = compare(model, Wrong(3), ["saliency"], attacks, out=tmp_path / "a", progress=False)
    page = Page(run.to_html(tmp_path / "report.html"))
    row = next(row for row in page.rows if row[0] == "fgsm 1/255" and len(row) > 1)
    assert row[1:6] == ["0.0", "3of 3", "–of 0", "0.00.0 to 0.0", "–"]
    assert "No image of which a picture is kept was classified right" in page.text


def test_a_run_without_attacks_has_no_such_section(tmp_path: Path) -> None:
    run = compare(make_classifier(), Drawn(2), ["saliency"], out=tmp_path / "a", progress=False)
    page = Page(run.to_html(tmp_path / "report.html"))
    assert "Robust accuracy" not in page.text


def test_an_attack_that_failed_everywhere_leaves_gaps_and_no_error(tmp_path: Path) -> None:
    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("no luck")

    attacks = {"broken 1/255": broken, "broken 2/255": broken}
    run = compare(
        make_classifier(), Drawn(2), ["saliency"], attacks, out=tmp_path / "a", progress=False
    )
    page = Page(run.to_html(tmp_path / "report.html"))
    row = next(row for row in page.rows if row[0] == "broken 1/255" and len(row) > 1)
    assert row[1:] == ["–", "0of 0", "–of 0", "–", "–", "–", "0", "2"]
    assert "no luck" in page.text
    assert "broken 1/255" in run.to_text()
