"""The page of a tour, opened in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from captum_robust.attacks import PGD
from captum_robust.inspection import tour
from captum_robust.report.inspection_page import write_tour
from tests.inspection.nets import BLUE, RED, block, colour_net

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with every section, also that of attacked images and of one that is unusable."""
    folder = tmp_path_factory.mktemp("tour")
    images = [(block(RED if i % 2 else BLUE, i, i, 5, 6), i % 2) for i in range(8)]
    model = colour_net()
    found = tour(model, images, ["conv", "units"], concepts="objects", attack=PGD(model, 0.1))
    found.unusable["x" * 300] = "x" * 300 + ".png: not an image"
    return write_tour(found, folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = playwright.chromium.launch(executable_path=chromium, args=quiet)
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_no_error_no_overflow_and_no_barrier(
    browser: Any, address: str, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # A picture can be enlarged without a script; it is looked at through its own window.
    page.locator(".zoomed input").first.check()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    window = page.locator(".zoomed .window").first
    assert window.evaluate("e => e.scrollWidth > e.clientWidth")
    assert not said
    found = Axe().run(page)
    assert found.response["passes"]
    assert found.violations_count == 0, found.generate_report()
    page.close()


def test_the_page_says_what_an_attack_does(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    assert page.get_by_role("heading", name="The same images, attacked").count() == 1
    assert "PGD of 25.5/255" in page.locator("main").inner_text()
    page.close()
