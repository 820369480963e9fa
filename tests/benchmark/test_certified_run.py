"""``compare(certify=…)``: the rows, the columns, the page, and runs that go on."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_robust.benchmark import Certification, Comparison, RunWarning, compare
from captum_robust.catalog.methods import build_methods
from captum_robust.data import Sample, resize
from captum_robust.metrics.functional import best_certified_iou, bootstrap_interval
from captum_robust.models import Classifier
from captum_robust.report.chance import Chance
from captum_robust.report.results import USUAL_TUNING
from captum_robust.runs.store import RunStore

from .conftest import Drawn, centre_heat, make_classifier
from .test_report import Page

METHODS = {"bright": centre_heat, "cam": "robust_cam", "box": "center_box"}
HOW = Certification(0.25, 80, (0.1, 0.25))
N = 5


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("runs") / "run"
    given: dict[str, Any] = {"batch_size": 2, "progress": False, "out": out}
    return compare(make_classifier(), Drawn(n=N), METHODS, certify=HOW, **given)


def test_rows_are_what_is_proven_of_the_fitted_images(result: Comparison) -> None:
    samples = [resize(Drawn(n=N)[i], (32, 32)) for i in range(N)]
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])
    model = make_classifier()
    frame, table = result.to_dataframe(), result.table().set_index("method")
    for name, method in build_methods(model, METHODS).items():
        found = HOW.of(model, method, images, labels)
        rows = frame[frame["method"] == name]
        for one in found.at:
            least = best_certified_iou(one.inner, one.outer, [s.boxes for s in samples])
            assert rows[f"certified_iou_{one.radius}"].tolist() == pytest.approx(least.tolist())
            share = rows[f"certified_share_{one.radius}"].tolist()
            assert share == pytest.approx(one.share.tolist())
            wrong = (least <= 0.5).double()
            for what, values in (("error", wrong), ("share", one.share)):
                interval = bootstrap_interval(values)
                key = f"certified_{what}_{one.radius}"
                ends = [table.loc[name, f"{key}{end}"] for end in ("", "_low", "_high")]
                assert ends == pytest.approx([interval.mean, interval.low, interval.high])
    smoothed = frame["smoothed_iou"] <= 0.5
    means = smoothed.groupby(frame["method"]).mean()
    assert table["smoothed_error"].to_dict() == pytest.approx(means.to_dict())


def test_nothing_moves_the_centre_box_and_its_error_is_its_own(result: Comparison) -> None:
    row = result.table().set_index("method").loc["box"]
    columns = ["smoothed_error", "certified_error_0.1", "certified_error_0.25"]
    assert row[columns].tolist() == [row["error"]] * 3
    assert row["certified_share_0.25"] == 1
    assert row["forward"] == 0


def test_the_farther_the_attacker_the_less_is_proven(result: Comparison) -> None:
    table = result.table()
    assert (table["certified_share_0.25"] <= table["certified_share_0.1"]).all()
    assert (table["certified_error_0.25"] >= table["certified_error_0.1"]).all()
    assert (table["certified_error_0.1"] >= table["smoothed_error"]).all()


def test_each_copy_is_one_map_and_the_methods_passes_stay_its_own(model: Classifier) -> None:
    shown: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, x: shown.append(len(x[0])))
    methods = ["robust_cam", "center_box"]
    result = compare(model, Drawn(n=3), methods, certify=HOW, progress=False)
    handle.remove()
    # The map of each, whose pass tells the class too, and the copies; before them single ones, to
    # count the scores and to look for layers.
    assert sum(n for n in shown if n > 1) == 3 * (1 + 80)
    assert result.table().set_index("method").loc["robust_cam", "forward"] == 1


def test_images_without_a_box_are_certified_but_in_no_error(model: Classifier) -> None:
    class Unboxed(Drawn):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            boxes = sample.boxes[:0] if index == 1 else sample.boxes
            return Sample(sample.image, label=sample.label, boxes=boxes, id=sample.id)

    frame = compare(model, Unboxed(n=3), METHODS, certify=HOW, progress=False).to_dataframe()
    without = frame[frame["image"] == "1.png"]
    assert without["certified_iou_0.1"].isna().all()
    assert without["certified_share_0.1"].notna().all()
    assert frame[frame["image"] != "1.png"]["certified_iou_0.1"].notna().all()


def test_a_run_without_any_box_still_says_how_much_is_certified(
    model: Classifier, tmp_path: Path
) -> None:
    class Unboxed(Drawn):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            boxes = sample.boxes[:0]
            return Sample(sample.image, label=sample.label, boxes=boxes, id=sample.id)

    with pytest.warns(RunWarning, match="nothing was scored"):
        result = compare(model, Unboxed(n=2), {"bright": centre_heat}, certify=HOW, progress=False)
    assert "certified_error_0.1" not in result.table()
    assert "share, R 0.1" in result.to_text()
    page = Page(result.to_html(tmp_path / "report.html"))
    assert "% certified" in page.text
    assert "not proven" not in page.text


def test_text_and_page_say_what_the_table_says(result: Comparison, tmp_path: Path) -> None:
    table, text = result.table().set_index("method"), result.to_text()
    file = result.to_html(tmp_path / "report.html")
    page = Page(file)
    assert "80 copies with noise of 0.25" in text
    assert "What no attacker within a radius can move" in page.text
    assert "explained 80 times with noise of 0.25" in " ".join(page.text.split())
    for method in METHODS:
        shown = table.loc[method]
        assert f"{shown['certified_share_0.25']:.3f}" in text
        (row,) = [r for r in page.rows if r and r[0].split()[0] == method and len(r) > 9]
        cells = [cell for cell in row if f"{100 * shown['certified_share_0.25']:.1f}" in cell]
        assert cells
    heads = next(r for r in page.rows if "Certified error %, R 0.1" in r)
    assert heads.index("Certified error %, R 0.25") < heads.index("Certified %, R 0.1")
    assert page.text.count("is not proven to overlap a true one by more than half") == 1
    assert "Certified error against R. bright " in file.read_text("utf-8")


def test_the_strips_show_each_radius_with_words(result: Comparison, tmp_path: Path) -> None:
    page = Page(result.to_html(tmp_path / "report.html"))
    pictures = [
        a["alt"] for tag, a in page.elements if a.get("alt", "").startswith("What is certified")
    ]
    # Four images, two methods that are no baselines, two radii.
    assert len(pictures) == len(set(pictures)) == 4 * 2 * 2
    assert sum(" of bright on 0.png within 0.25: " in alt for alt in pictures) == 1
    assert all("% in, " in alt and "% out; " in alt and "% abstains" in alt for alt in pictures)
    for words in ("certified in", "certified out", "abstains", "inner box", "outer box"):
        assert words in page.text


def test_no_true_box_is_named_where_none_is_known(model: Classifier, tmp_path: Path) -> None:
    unknown = torch.zeros(0, 4)
    for boxes, names in ((unknown, False), (None, True)):
        drawn = [Drawn(n=2)[i] for i in range(2)]
        data = [Sample(s.image, s.label, s.boxes if boxes is None else boxes, s.id) for s in drawn]
        how = Certification(0.25, 40, (0.1,))
        result = compare(model, data, {"bright": centre_heat}, certify=how, progress=False)
        page = Page(result.to_html(tmp_path / f"{names}.html"))
        pictures = [a for _, a in page.elements if a.get("alt", "").startswith("What is certified")]
        assert len(pictures) == 2
        named = [a for _, a in page.elements if "with its true boxes" in a.get("alt", "")]
        assert bool(named) == names
        assert ("no box is known" in page.text) != names


def test_few_copies_are_said_where_they_prove_nothing(model: Classifier, tmp_path: Path) -> None:
    how = Certification(0.25, 40, (0.1, 0.25))
    result = compare(model, Drawn(n=2), {"box": "center_box"}, certify=how, progress=False)
    assert "R 0.25: no pixel is proven by 40 copies; it takes 79" in result.to_text()
    page = Page(result.to_html(tmp_path / "report.html"))
    assert "R 0.25: no pixel is proven there by 40 copies; it takes 79 at least." in page.text
    assert "R 0.1: no pixel" not in page.text
    assert not [a for _, a in page.elements if "within 0.25" in a.get("alt", "")]


def test_a_run_without_it_says_nothing_of_it_and_is_another(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    result = compare(model, drawn, METHODS, out=tmp_path / "run", progress=False)
    for columns in (result.table(), result.to_dataframe()):
        assert not [c for c in columns if "certified" in c or "smoothed" in c]
    assert "certif" not in result.to_text()
    assert "attacker within a radius" not in Page(result.to_html(tmp_path / "r.html")).text
    with pytest.raises(ValueError, match=r"settings\.certificates.*\(none\) there"):
        compare(model, drawn, METHODS, out=tmp_path / "run", certify=0.25, progress=False)


def test_a_run_goes_on_only_with_the_same_noise_and_copies(
    model: Classifier, tmp_path: Path
) -> None:
    methods = {"box": "center_box"}
    compare(model, Drawn(n=2), methods, out=tmp_path, certify=HOW, progress=False)
    for other in (0.25, Certification(0.2, 80, (0.1, 0.25)), Certification(0.25, 80, (0.1,))):
        with pytest.raises(ValueError, match=r"settings\.certificates"):
            compare(model, Drawn(n=2), methods, out=tmp_path, certify=other, progress=False)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_rows(
    result: Comparison, tmp_path: Path
) -> None:
    class Interrupted(Drawn):
        def __getitem__(self, index: int) -> Sample:
            if index >= 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    given: dict[str, Any] = {"batch_size": 2, "progress": False, "certify": HOW, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compare(make_classifier(), Interrupted(n=N), METHODS, **given)
    again = compare(make_classifier(), Drawn(n=N), METHODS, **given)
    columns = "position, method, certificate, certified_cells"
    query = f"SELECT {columns} FROM results ORDER BY position, method"
    assert result.select(query) == again.select(query)


def test_a_run_of_an_earlier_version_is_read_as_before(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    before = compare(model, drawn, METHODS, out=tmp_path, progress=False).table()
    database = sqlite3.connect(tmp_path / "rows.sqlite")
    for column in ("certificate", "certified_cells"):
        database.execute(f"ALTER TABLE results DROP COLUMN {column}")
    database.commit()
    database.close()
    assert Comparison(tmp_path).table().equals(before)


def test_only_clean_images_are_certified(model: Classifier) -> None:
    attacks = {"invert": lambda x, _: 1 - x}
    table = compare(
        model, Drawn(n=2), {"bright": centre_heat}, attacks, certify=HOW, progress=False
    ).table()
    assert table.set_index("attack")["certified_share_0.1"].notna().tolist() == [True, False]


def test_a_method_is_ahead_where_more_is_certified_beyond_chance() -> None:
    def steady(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.arange(32.0).expand(len(images), 32, 32)

    methods = {"steady": steady, "bright": centre_heat}
    how = Certification(0.25, 33, (0.1,))
    result = compare(make_classifier(), Drawn(n=50), methods, certify=how, progress=False)
    ahead = Chance(result._scoring, USUAL_TUNING).ahead
    assert ahead("certified_share_0.1", "", "steady", "bright")
    assert not ahead("certified_share_0.1", "", "bright", "steady")
    assert not ahead("certified_error_0.1", "", "bright", "bright")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("certificate", "certificate: expected 30 values, got others"),
        ("certified_cells", "certified_cells: expected a square a radius, got others"),
    ],
)
def test_certificates_of_another_form_are_refused(
    model: Classifier, tmp_path: Path, column: str, message: str
) -> None:
    result = compare(
        model, Drawn(n=2), {"b": centre_heat}, out=tmp_path / "run", certify=HOW, progress=False
    )
    result._store.close()
    with RunStore(tmp_path / "run")._transaction() as database:
        database.execute(f"UPDATE results SET {column} = ious")
    with pytest.raises(ValueError, match=message):
        Comparison(tmp_path / "run").to_html(tmp_path / "report.html")


def test_what_is_no_certification_is_refused(model: Classifier, drawn: Drawn) -> None:
    with pytest.raises(ValueError, match="certify: expected a positive number"):
        compare(model, drawn, METHODS, certify=0.0, progress=False)
    with pytest.raises(TypeError, match="certify: expected a number or a Certification, got str"):
        compare(model, drawn, METHODS, certify="much", progress=False)  # type: ignore[arg-type]


@pytest.fixture
def tab(browser: Any, result: Comparison, tmp_path: Path) -> Any:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.goto(result.to_html(tmp_path / "r.html").as_uri())
    yield opened
    context.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(tab: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    tab.emulate_media(color_scheme=scheme)
    tab.check("#columns-certificate")
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found = axe.Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.browser
def test_the_columns_are_a_group_and_the_page_is_no_wider_than_its_window(tab: Any) -> None:
    tab.check("#columns-certificate")
    heads = [t.strip() for t in tab.locator(".results thead th:visible").all_text_contents()]
    assert heads[2] == "Smoothed error %"
    assert sum(head.startswith("Certified") for head in heads) == 4
    for width in (360, 1280):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
