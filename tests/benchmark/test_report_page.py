"""The report as its reader meets it: the first screen, the marks, the tables, the script."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from torch import Tensor

from captum_robust.benchmark import METHODS, Comparison, build_attacks, compare
from captum_robust.catalog.words import words_of
from captum_robust.report.chance import Chance
from captum_robust.report.first_screen import dots_of, first_shots, leading, sentence_of
from captum_robust.report.line_charts import choices_of, line_chart
from captum_robust.report.plots import method_styles
from captum_robust.report.results import GALLERY_POOL

from .conftest import Drawn, centre_heat, make_classifier
from .test_report import Page

HOSTILE = '"><script>alert(1)</script>.png'


def dark(images: Tensor, _: Tensor) -> Tensor:
    return 1 - images.mean(dim=1)


def run_of(folder: Path, n: int, methods: Any, attacks: Any = None) -> Comparison:
    data = Drawn(n, ids=[HOSTILE, *(f"{i}.png" for i in range(1, n))])
    return compare(make_classifier(), data, methods, attacks, out=folder, progress=False)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Sixty images; one method is clearly best."""
    methods = {"bright": centre_heat, "dark": dark, "grad_cam": "grad_cam", "random": "random"}
    return run_of(tmp_path_factory.mktemp("many"), 60, methods)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Eight images under an attack, and more methods than lines can be told apart."""
    methods: dict[str, Any] = {f"own {i}": centre_heat for i in range(4)}
    for name in ("grad_cam", "robust_cam", "saliency", "perceptual_ball", "perceptual_ball_guided"):
        methods[name] = name
    methods |= {name: name for name in ("smallest_perturbation", "center_box", "random")}
    attacks = build_attacks(make_classifier(), ["fgsm"], [16])
    return run_of(tmp_path_factory.mktemp("few"), 8, methods, attacks)


def test_every_method_has_words_of_its_own() -> None:
    words = [words_of(name) for name in METHODS]
    assert len(set(words)) == len(METHODS)
    assert not [word for word in words if "_" in word]
    assert words_of("one of mine_") == "one of mine_"


def test_names_of_ones_own_stay_and_those_that_two_methods_share_too(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", 2, {"cam": "grad_cam", "grad_cam": "grad_cam"})
    assert run._results.words == {"cam": "cam", "grad_cam": "Grad-CAM"}
    run = run_of(tmp_path / "b", 2, {"Grad-CAM": centre_heat, "grad_cam": "grad_cam"})
    assert run._results.words == {"Grad-CAM": "Grad-CAM", "grad_cam": "grad_cam"}


def test_a_method_is_ahead_only_beyond_chance(many: Comparison, few: Comparison) -> None:
    tables = many._tables()
    ahead = Chance(tables.scoring, tables.tuning).ahead
    misses = {m: tables.scoring.misses(m, "clean")[1] for m in ("bright", "dark")}
    better = sum(misses["dark"][p] > misses["bright"][p] for p in range(60))
    worse = sum(misses["dark"][p] < misses["bright"][p] for p in range(60))
    # Sign test: of so many discordant images none or few are worse.
    assert better - worse > 3 * (better + worse) ** 0.5
    assert ahead("error", "clean", "bright", "dark")
    assert not ahead("error", "clean", "dark", "bright")
    assert not ahead("error", "clean", "bright", "bright")
    assert not ahead("maxboxacc", "clean", "bright", "dark")  # no mean over images
    tables = few._tables()
    assert not Chance(tables.scoring, tables.tuning).ahead("error", "clean", "own 0", "saliency")


def marked(run: Comparison, folder: Path) -> list[str]:
    html = run.to_html(folder / "r.html").read_text("utf-8")
    return re.findall(r'<strong><data value="([^"]*)"', html)


def test_only_what_is_better_beyond_chance_is_marked(many: Comparison, tmp_path: Path) -> None:
    table = many.table().set_index("method")
    assert marked(many, tmp_path) == [str(table.loc["bright", "error"])]
    twice = run_of(tmp_path / "run", 60, {"a": centre_heat, "b": centre_heat, "c": dark})
    assert marked(twice, tmp_path) == []  # two are equally good


def test_few_images_rank_nothing_and_nothing_is_marked(few: Comparison, tmp_path: Path) -> None:
    tables = few._tables()
    said = sentence_of(tables, Chance(tables.scoring, tables.tuning).ahead)
    assert said.startswith("8 images rank nothing. The boxes of ")
    assert re.search(r"then the boxes of .* miss \d of 8\.$", said)
    text = " ".join(Page(few.to_html(tmp_path / "r.html")).text.split())
    assert "Fewer than 50 images rank nothing" in text
    assert marked(few, tmp_path) == []


def test_many_images_name_the_best_and_what_may_be_chance(many: Comparison) -> None:
    tables = many._tables()
    said = sentence_of(tables, Chance(tables.scoring, tables.tuning).ahead)
    best = many.table().iloc[0]
    low, high = 100 * best["error_low"], 100 * best["error_high"]
    assert said.startswith(f"bright places the object best: {100 * best['error']:.1f} % of its")
    assert f"(95 % interval {low:.1f} to {high:.1f} %, 60 images)" in said
    assert "fewer than those of any other method, beyond chance" in said
    assert "The best baseline, the random map, misses" in said


def test_the_dots_are_the_errors_best_first_with_those_under_attack(few: Comparison) -> None:
    table = few.table().set_index(["method", "attack"])
    rows = dots_of(few._tables(), "fgsm 16/255")
    values = [row.clean.value for row in rows]
    assert values == sorted(values)
    assert len(rows) == len(few.methods)
    for row in rows:
        for dot, attack in ((row.clean, "clean"), (row.attacked, "fgsm 16/255")):
            expected = table.loc[row.method, attack]
            assert dot is not None
            assert dot.value == pytest.approx(100 * expected["error"])
            assert dot.low == pytest.approx(100 * expected["error_low"])
            assert dot.high == pytest.approx(100 * expected["error_high"])
        assert row.baseline == (row.method in ("center_box", "random"))


def test_the_six_pictures_are_the_first_images_by_the_best_method(
    many: Comparison, few: Comparison
) -> None:
    shots = first_shots(many._tables(), many.to_dataframe(first=GALLERY_POOL))
    assert [shot.position for shot in shots] == list(range(6))
    assert {shot.clean.method for shot in shots} == {"bright"}
    assert all(shot.attacked is None for shot in shots)
    shots = first_shots(few._tables(), few.to_dataframe(first=GALLERY_POOL))
    right = few._results.right_before(6)
    assert [shot.position for shot in shots] == right
    frame = few.to_dataframe().set_index(["image", "attack", "method"])
    for shot in shots:
        assert shot.attacked is not None
        under = frame.loc[(shot.image, "fgsm 16/255", shot.attacked.method)]
        assert shot.attacked.iou == under["iou"]
        assert shot.attacked.decided_class == few.class_name(int(under["predicted"]))


def test_lines_are_those_of_the_best_five_and_the_baselines_at_first(
    few: Comparison, tmp_path: Path
) -> None:
    shown = leading(few._tables())
    ranked = [
        m for m in few.table().query("attack == 'clean'")["method"] if m in METHODS or "own" in m
    ]
    best = [m for m in ranked if m not in ("center_box", "random")][:5]
    assert shown == [*best, "center_box", "random"]
    page = Page(few.to_html(tmp_path / "r.html"))
    picks = [a for tag, a in page.elements if tag == "input" and "pick-" in a.get("class", "")]
    assert len(picks) == len(few.methods)
    assert sum("checked" in a for a in picks) == 7
    lines = [a["class"] for tag, a in page.elements if tag == "polyline"]
    assert sorted(lines) == sorted(f"line-{i}" for i in range(len(few.methods)) for _ in range(4))


def test_a_line_has_the_points_of_its_curve() -> None:
    styles = method_styles({"a": "grad_cam", "b": "saliency"})
    curves = {"b": ([0.0, 0.5, 1.0], [0.0, 1.0, 0.5])}
    chart = line_chart("t", "x", "said", curves, styles)
    (line,) = chart.lines
    # 34 to 332 across, 190 (0 %) to 8 (100 %) upwards.
    assert line.points == "34,190 183,8 332,99"
    assert line.number == 1
    assert [text for _, text in chart.y_ticks] == ["0", "25", "50", "75", "100"]
    assert [text for _, text in chart.x_ticks][::4] == ["0", "1"]
    choices = choices_of(styles, {"a": "A", "b": "B"}, ["b"])
    assert [(c.number, c.name, c.shown) for c in choices] == [(1, "B", True), (0, "A", False)]


def test_a_perturbation_that_methods_share_is_shown_once(few: Comparison, tmp_path: Path) -> None:
    html = few.to_html(tmp_path / "r.html").read_text("utf-8")
    gallery = html[html.index('id="gallery"') :]
    images = gallery.count("<article")
    assert images > 0
    # The ball and the guided ball have one; the smallest perturbation another.
    assert gallery.count("its perturbation ×") == 2 * images
    text = " ".join(gallery.split())
    once = 'its perturbation is that of <span class="name">perceptual ball</span>'
    assert text.count(once) == images


def test_the_pictures_are_bounded(few: Comparison, tmp_path: Path) -> None:
    page = Page(few.to_html(tmp_path / "r.html"))
    assert sum(tag == "img" for tag, _ in page.elements) <= 340  # at 13 kB below 5 MB


def test_a_link_leads_to_something_that_is_there_once(few: Comparison, tmp_path: Path) -> None:
    page = Page(few.to_html(tmp_path / "r.html"))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for tag, a in page.elements if tag == "a"}
    assert links <= set(ids)
    assert {f"method-{i}" for i in range(10)} <= links  # not the two baselines
    assert "image-0" in links


@pytest.fixture
def tab(browser: Any, few: Comparison, tmp_path: Path) -> Any:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(few.to_html(tmp_path / "r.html").as_uri())
    yield opened
    assert complaints == []
    context.close()


def first_cells(tab: Any, column: int) -> list[str]:
    script = """(column) => [...document.querySelectorAll(".results table tbody")[0].rows]
        .filter((row) => row.cells.length > 1 && !row.hidden)
        .map((row) => row.cells[column].firstChild.textContent)"""
    cells: list[str] = tab.evaluate(script, column)
    return cells


@pytest.mark.browser
def test_a_column_sorts_by_its_numbers(tab: Any, few: Comparison) -> None:
    button = tab.locator(".results th", has_text="ms / image").locator("button")
    tab.check("#columns-cost")
    button.focus()
    tab.keyboard.press("Enter")
    times = few.table().query("attack == 'clean'").sort_values("ms_per_image", kind="stable")
    names = [words_of(m) for m in times["method"]]
    assert first_cells(tab, 0) == names
    assert tab.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"
    button.click()
    assert first_cells(tab, 0) == names[::-1]


@pytest.mark.browser
def test_a_table_is_filtered_by_name_and_by_attack(tab: Any) -> None:
    tab.fill("input[type=search]", "CAM")
    assert set(first_cells(tab, 0)) == {"Grad-CAM", "RobustCAM"}
    assert tab.locator("output").text_content() == "4 rows"
    tab.select_option("select", label="fgsm 16/255")
    assert tab.locator("output").text_content() == "2 rows"
    assert tab.locator(".results tbody:visible").count() == 1


@pytest.mark.browser
def test_columns_are_shown_by_group(tab: Any) -> None:
    def heads() -> list[str]:
        shown = tab.locator(".results thead th:visible").all_text_contents()
        return [text.strip() for text in shown]

    assert "MaxBoxAcc %" in heads()
    assert "Forward" not in heads()
    tab.check("#columns-cost")
    assert heads() == ["Method", "Error %", "Forward", "Backward", "ms / image", "Scored", "Failed"]


@pytest.mark.browser
def test_a_methods_name_opens_its_gallery(tab: Any) -> None:
    tab.locator(".results tbody a", has_text="Grad-CAM").first.click()
    shown = tab.locator("#gallery ~ .entries .tiles figure:visible figcaption")
    texts = {text.split("\n")[0].strip() for text in shown.all_text_contents()}
    assert texts == {"true boxes", "Grad-CAM"}
    tab.locator(".of-method:visible a").click()
    assert tab.locator("#gallery ~ .entries .of-m-0:visible").count() > 0


@pytest.mark.browser
def test_a_slider_moves_from_clean_to_attacked(tab: Any) -> None:
    slider = tab.locator(".versus input").first
    assert "clean to attacked" in slider.get_attribute("aria-label")
    cut = "getComputedStyle(document.querySelector('.versus img + img')).clipPath"
    assert tab.evaluate(cut) == "inset(0px 0px 0px 50%)"
    slider.focus()
    tab.keyboard.press("End")
    assert tab.evaluate(cut) == "inset(0px 0px 0px 0%)"


@pytest.mark.browser
def test_a_line_is_shown_when_it_is_chosen(tab: Any) -> None:
    hidden = tab.locator(".choices details input").first
    line = hidden.get_attribute("class").replace("pick", "line")
    assert not tab.locator(f".{line}").first.is_visible()
    tab.locator(".choices summary").click()
    hidden.check()
    assert tab.evaluate(f"getComputedStyle(document.querySelector('.{line}')).display") == "inline"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 1920, 2560])
def test_no_table_is_wider_than_its_page(tab: Any, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    for group in ("localization", "attack", "cost"):
        tab.check(f"#columns-{group}")
        script = (
            "[...document.querySelectorAll('.scroll')].map((s) => s.scrollWidth - s.clientWidth)"
        )
        assert set(tab.evaluate(script)) == {0}
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_on_paper_everything_is_open_and_within_the_page(tab: Any) -> None:
    tab.set_viewport_size({"width": 760, "height": 1075})
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.locator(".columns dt").first.is_visible()
    assert not tab.locator(".versus input").first.is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 760


@pytest.mark.browser
def test_without_script_all_is_there_to_read(browser: Any, few: Comparison, tmp_path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(few.to_html(tmp_path / "r.html").as_uri())
    assert tab.locator(".dots li").count() == len(few.methods)
    assert tab.locator(".versus img:visible").count() == 2 * len(few._results.right_before(6))
    assert not tab.locator(".tools").is_visible()
    tab.check("#columns-cost")
    assert tab.locator("th", has_text="ms / image").is_visible()
    context.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(tab: Any, scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()


def test_the_seed_of_the_drawn_images_gives_right_ones(few: Comparison) -> None:
    assert len(few._results.right_before(6)) >= 2
    assert torch.tensor(few.table()["n"].tolist()).eq(8).all()
