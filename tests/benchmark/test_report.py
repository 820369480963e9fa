from __future__ import annotations

import base64
import hashlib
import json
import re
import sqlite3
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_robust.benchmark import Comparison, compare
from captum_robust.catalog.words import words_of
from captum_robust.data import Sample
from captum_robust.metrics.functional import pxap
from captum_robust.report.tables import COLUMNS

from .conftest import Drawn, centre_heat, gallery_of, make_classifier, strips_of

IDS = [
    "<script>alert(1)</script>.png",
    '"><img src=x onerror=alert(2)>.png',
    "x" * 200 + ".png",
    "\u202egnp.olleh.png",
    "{{ 7 * 7 }}.png",
    "plain.png",
    "cut off.png",
]
CLASSES = ['<b>&"', "javascript:alert(3)", "<script>alert(5)</script>", "</title></style>ray"]
METHODS = {
    "<i onclick=alert(4)>": "grad_cam",
    "saliency": "saliency",
    "bright": centre_heat,
    "m" * 70: "robust_cam",
    "</figcaption>ball": "smallest_perturbation",
    "center_box": "center_box",
    "random": "random",
}


class Page(HTMLParser):
    """What a browser would see: elements, attributes, and the text of each element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.numbers: list[list[float | None]] = []
        self.text = ""
        self._stack: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self._stack.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.numbers.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.numbers[-1].append(None)
        elif tag == "data":
            self.numbers[-1][-1] = float(attributes["value"])

    def handle_endtag(self, tag: str) -> None:
        while self._stack and self._stack.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._stack or "script" in self._stack:
            return
        self.text += data
        if "td" in self._stack or "th" in self._stack:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two attacks, hostile names, one broken image."""
    model = make_classifier()
    model.class_names = list(CLASSES)
    attacks = {"<noise>": lambda x, _: (x + 0.2 * torch.rand_like(x)).clamp(0, 1)}
    data = Drawn(len(IDS), ids=IDS, broken=(6,))
    folder = tmp_path_factory.mktemp("run")
    return compare(model, data, METHODS, attacks, out=folder, progress=False)


@pytest.fixture(scope="module")
def path(run: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.to_html(tmp_path_factory.mktemp("report") / "new" / "report.html")


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path)


def charts_of(page: Page) -> list[dict[str, str]]:
    return [a for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]


def report_of(tmp_path: Path, data: Any, methods: Any = ("saliency", "center_box")) -> Page:
    result = compare(make_classifier(), data, methods, out=tmp_path / "run", progress=False)
    return Page(result.to_html(tmp_path / "report.html"))


def test_the_page_holds_one_script_no_handler_and_no_address(page: Page) -> None:
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "main", "section"}
    allowed |= {"h1", "h2", "h3", "h4", "p", "dl", "dt", "dd", "div", "span", "strong", "br", "wbr"}
    allowed |= {"table", "thead", "tbody", "tr", "th", "td", "data", "details", "summary"}
    allowed |= {"ul", "ol", "li", "article", "figure", "figcaption", "img", "a", "nav", "code"}
    allowed |= {"fieldset", "legend", "label", "input", "select", "option", "output", "script"}
    allowed |= {"svg", "path", "polyline", "text"}
    tags = [tag for tag, _ in page.elements]
    assert set(tags) <= allowed
    assert tags.count("script") == 1
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("srcset", "action", "formaction", "data"), (tag, name)
            if name == "href":
                assert re.fullmatch(r"#[a-z]+(-[0-9]+)?", value)
            if name == "src":
                assert value.startswith(("data:image/jpeg;base64,", "data:image/svg+xml;base64,"))
            assert "url(" not in value
            if name not in ("alt", "aria-label", "content", "data-image"):
                assert not re.search(r"(?i)https?:|javascript:|//", value.split(",")[0]), value


def test_the_style_sheet_loads_nothing(path: Path) -> None:
    style = re.search(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert style
    assert not re.search(r"url\(|@import|@font-face|https?:", style[1])


def test_the_policy_forbids_everything_but_inline_pictures_styles_and_the_one_script(
    path: Path, page: Page
) -> None:
    policies = [a["content"] for tag, a in page.elements if "http-equiv" in a]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    (script,) = re.findall(r"<script>(.*?)</script>", path.read_text("utf-8"), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^;]*)", policies[0]) == [f"'sha256-{digest}'"]


def test_every_name_stands_as_it_is(page: Page) -> None:
    for name in (*IDS, *METHODS, "<noise>"):
        assert name in page.text, name
    shown = [name for name in CLASSES if name in page.text]
    assert '<b>&"' in shown
    assert len(shown) >= 3


def test_every_number_of_the_table_is_that_of_the_comparison(run: Comparison, page: Page) -> None:
    table = run.table()
    columns = [c for c in COLUMNS if c.key in table]
    assert {"error", "top1_error", "maxboxacc", "maxboxacc_v2", "pointing", "forward"} <= {
        c.key for c in columns
    }
    header = next(i for i, row in enumerate(page.rows) if row[0] == "Method")
    assert page.rows[header][1:] == [c.label for c in columns]
    pairs = zip(page.rows[header + 1 :], page.numbers[header + 1 :], strict=True)
    body = [(texts, numbers) for texts, numbers in pairs if len(texts) == len(columns) + 1]
    assert len(body) == len(table)
    for (texts, numbers), record in zip(body, table.to_dict("records"), strict=True):
        assert texts[0].startswith(words_of(record["method"]))
        assert ("baseline" in texts[0]) == (record["method"] in ("center_box", "random"))
        for column, text, number in zip(columns, texts[1:], numbers[1:], strict=True):
            value = record[column.key]
            if column.form == "text":
                assert text == value
            elif value != value:  # a column that this method has no value in
                assert (number, text) == (None, "–")
            else:
                assert number == pytest.approx(value, rel=1e-12)
            if column.form == "percent" and value == value:
                assert text.startswith(f"{100 * value:.1f}")
        low, high = 100 * record["error_low"], 100 * record["error_high"]
        assert texts[1].endswith(f"{low:.1f} to {high:.1f}")


def test_rows_are_grouped_by_attack(page: Page) -> None:
    groups = [row[0] for row in page.rows if len(row) == 1]
    assert groups == ["clean", "<noise>", "<noise>"]  # the last of the table of stability
    assert sum(a.get("scope") == "rowgroup" for _, a in page.elements) == 3


def test_what_flipped_says_of_how_many(run: Comparison, page: Page) -> None:
    table = run.table()
    ball = table[(table["method"] == "</figcaption>ball") & (table["attack"] == "clean")].iloc[0]
    frame = run.to_dataframe()
    frame = frame[(frame["method"] == "</figcaption>ball") & (frame["attack"] == "clean")]
    asked = frame[frame["predicted"] == frame["explained"]]
    assert ball["flippable"] == len(asked) > 0
    column = [c.key for c in COLUMNS if c.key in table].index("flipped") + 1
    row = next(row for row in page.rows if row[0].startswith("</figcaption>ball"))
    assert row[column] == f"{100 * ball['flipped']:.1f}of {len(asked)}"
    assert f"{ball['flipped']:.3f} of {len(asked)}" in run.to_text()


def test_tables_and_pictures_are_described(page: Page) -> None:
    assert all(a.get("scope") for tag, a in page.elements if tag == "th")
    assert all(a["alt"] for tag, a in page.elements if tag == "img")
    charts = charts_of(page)
    assert len(charts) == 4
    assert all("Lowest: " in a["aria-label"] for a in charts)


def test_without_matplotlib_the_curves_are_drawn_all_the_same(
    run: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert len(charts_of(Page(run.to_html(tmp_path / "report.html")))) == 4


def test_the_gallery_ranks_by_mean_overlap_of_the_methods(run: Comparison) -> None:
    gallery = gallery_of(run)
    frame = run.to_dataframe()
    frame = frame[(frame["attack"] == "clean") & ~frame["method"].isin(["center_box", "random"])]
    means = frame.groupby("image")["iou"].mean().dropna().sort_values(ascending=False)
    assert gallery.pool == 6
    assert [e.image for e in (*gallery.best, *gallery.worst[::-1])] == list(means.index)
    for entry in (*gallery.best, *gallery.worst):
        assert entry.mean_iou == pytest.approx(means[entry.image])
        one = frame[frame["image"] == entry.image].set_index("method")
        assert [t.method for t in entry.tiles] == list(gallery.ranked_by)
        for tile in entry.tiles:
            assert tile.iou == pytest.approx(one.loc[tile.method, "iou"])
            assert tile.localized == (one.loc[tile.method, "iou"] > 0.5)
        assert entry.mistaken == (one["label"].iloc[0] != one["predicted"].iloc[0])


def test_mistakes_of_the_classifier_are_marked(run: Comparison, page: Page) -> None:
    gallery = gallery_of(run)
    mistakes = sum(e.mistaken for e in (*gallery.best, *gallery.worst))
    assert mistakes > 0
    assert page.text.count("classifier wrong") == mistakes


def test_the_broken_image_is_listed_with_its_reason(page: Page) -> None:
    assert ["cut off.png", "(all)", "cut off.png: truncated"] in page.rows
    assert "7 read, 1 not usable, 0 without box" in page.text


def test_many_broken_images_are_counted_and_the_first_fifty_shown(tmp_path: Path) -> None:
    page = report_of(tmp_path, Drawn(60, broken=range(60)), ["center_box"])
    assert "60 failures; the first 50" in page.text
    assert sum(row[-1].endswith("truncated") for row in page.rows) == 50
    assert "No image has a box that could be scored" in page.text
    assert not [tag for tag, _ in page.elements if tag == "img"]


class Unboxed(Drawn):
    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), boxes=torch.zeros(0, 4))


def test_images_without_boxes_give_a_report_without_ranks(tmp_path: Path) -> None:
    page = report_of(tmp_path, Unboxed(3))
    assert "No image has a box that could be scored" in page.text
    assert "3 images have no box and are not scored" in page.text
    assert "No scored image has a picture to show" in page.text


class Masked(Drawn):
    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, mask=sample.image.mean(dim=0) > 0.5, label=None)


def test_masks_add_their_column_and_unknown_classes_do_no_harm(tmp_path: Path) -> None:
    data = Masked(4, size=(32, 32))  # the model's input size, so that nothing is resized
    page = report_of(tmp_path, data, {"bright": centre_heat})
    maps = torch.stack([data[i].image.mean(dim=0) for i in range(4)])
    masks = torch.stack([data[i].mask for i in range(4)])
    expected = float(pxap(maps, masks))
    assert page.numbers[1][page.rows[0].index("PxAP %")] == pytest.approx(expected)
    assert "Top-1 %" not in page.rows[0]
    assert "classifier wrong" not in page.text


def test_a_method_that_fails_on_an_image_leaves_a_gap(tmp_path: Path) -> None:
    def shy(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if (target == 1).any():
            raise RuntimeError("<b>no</b> goldfish")
        return images.mean(dim=1)

    run = compare(
        make_classifier(), Drawn(4), {"shy": shy, "saliency": "saliency"},
        out=tmp_path / "run", progress=False,
    )  # fmt: skip
    page = Page(run.to_html(tmp_path / "report.html"))
    assert "no map" in page.text
    assert ["1.png", "shy", "RuntimeError: <b>no</b> goldfish"] in page.rows


def test_only_baselines_are_said_to_be_so(tmp_path: Path) -> None:
    page = report_of(tmp_path, Drawn(3), ["center_box", "whole_image"])
    assert "Only baselines were scored" in page.text
    assert "over all methods, at" in " ".join(page.text.split())


def test_a_stopped_run_says_that_it_is_not_finished(tmp_path: Path) -> None:
    compare(make_classifier(), Drawn(3), ["saliency"], out=tmp_path / "run", progress=False)
    described = tmp_path / "run" / "run.json"
    configuration = json.loads(described.read_text())
    configuration["dataset"]["samples"] = 100
    described.write_text(json.dumps(configuration))
    page = Page(Comparison(tmp_path / "run").to_html(tmp_path / "report.html"))
    assert "the run is not finished (100 planned)" in page.text


def test_before_the_first_row_there_is_a_report_too(tmp_path: Path) -> None:
    compare(make_classifier(), Drawn(2), ["saliency"], out=tmp_path / "run", progress=False)
    with sqlite3.connect(tmp_path / "run" / "rows.sqlite") as rows:
        rows.execute("DELETE FROM results")
        rows.execute("DELETE FROM images")
    page = Page(Comparison(tmp_path / "run").to_html(tmp_path / "report.html"))
    assert "0 read" in page.text


def test_pictures_keep_the_shape_of_the_original(tmp_path: Path) -> None:
    import cv2
    import numpy as np

    run = compare(
        make_classifier(), Drawn(1, size=(40, 80)), ["saliency"], out=tmp_path, progress=False
    )
    entry = gallery_of(run).best[0]
    data = base64.b64decode(entry.picture.partition(",")[2])
    height, width = cv2.imdecode(np.frombuffer(data, np.uint8), 1).shape[:2]
    assert width == 2 * height


def test_the_gallery_of_many_images_is_bounded(tmp_path: Path) -> None:
    run = compare(make_classifier(), Drawn(30), ["saliency"], out=tmp_path, progress=False)
    gallery = gallery_of(run)
    assert (len(gallery.best), len(gallery.worst), gallery.pool) == (12, 12, 30)
    images = [entry.image for entry in (*gallery.best, *gallery.worst)]
    assert len(set(images)) == 24


def test_the_file_is_replaced_whole(run: Comparison, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    assert run.to_html(target) == target
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_in_the_place_of_the_file_is_refused(run: Comparison, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        run.to_html(tmp_path)


# Text whose colour has less than 4.5 : 1 against the nearest ground behind it (WCAG AA).
FAINT_TEXT = """
() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const faint = [];
  let seen = 0;
  for (const e of document.body.querySelectorAll("*")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own) continue;
    const style = getComputedStyle(e);
    const inSvg = e.tagName.toLowerCase() === "text";
    const a = light(parse(inSvg ? style.fill : style.color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < 4.5) faint.push([e.tagName, e.textContent.slice(0, 30), ratio]);
  }
  return { seen, faint };
}
"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(360, 800), (1280, 900)], ids=["phone", "desktop"])
def test_the_page_in_a_browser(
    browser: Any, run: Comparison, path: Path, size: tuple[int, int], scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
    )
    context.set_offline(True)
    tab = context.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    tab.goto(path.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert complaints == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= size[0]
    widths = tab.evaluate(
        "[...document.images].filter((i) => i.closest('.tiles')).map((i) => i.naturalWidth)"
    )
    strips = [strip for entry in strips_of(run) for strip in entry.strips]
    assert strips
    under_attack = sum(1 + bool(strip.change) + len(strip.tiles) for strip in strips)
    assert len(widths) == 6 * (1 + 5 + 1) + under_attack
    assert min(widths) > 0
    text = tab.evaluate(FAINT_TEXT)
    assert text["seen"] > 100
    assert text["faint"] == []
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    # The table is scrolled in its own box, its method names stay in sight, and the page stays put.
    tab.evaluate("document.querySelector('.scroll').scrollLeft = 400")
    name = tab.locator("table th[scope=row]").first.bounding_box()
    assert 0 <= name["x"] < 60
    assert name["width"] <= 0.45 * size[0]
    context.close()
