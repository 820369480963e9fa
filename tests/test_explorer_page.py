"""The page of the explorer, in a browser and behind its command."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe

from captum_robust.cli import app_command
from captum_robust.cli.app_command import AppOptions, app
from captum_robust.draw import as_rgb, encode_png
from captum_robust.models import load_classifier, save_classifier
from captum_robust.nn import (
    CorruptionNetwork,
    LocalizationNetwork,
    MaskingNetwork,
    save_localization_network,
    save_masking_network,
)
from captum_robust.show import explorer
from captum_robust.show.exploration import Exploration, Explorer, Question
from captum_robust.show.explorer_page import rendered
from tests.networks import classifier_of, drawn

pytest.importorskip("gradio", reason="gradio is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LOOPBACK = ("127.0.0.1", "::1", "localhost")
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses other than this machine's that Python connects to or looks up."""
    left: list[Any] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def noted(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            left.append(address)
        connect(self, address)

    def looked_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in (*LOOPBACK, None):
            left.append(host)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", noted)
    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    return left


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outside: list[Any]) -> Iterator[Any]:
    """The page of a small network, whose first class has the name of an attack on pages."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setattr("captum_robust.show.explorer_page.LARGEST", 100_000)
    model = classifier_of()
    model.class_names = [EVIL, "bee", "cat"]
    opened = explorer(model, ["grad_cam", "robust_cam"])
    yield opened
    opened.close()


def test_the_page_is_for_this_machine_only(page: Any, outside: list[Any]) -> None:
    servers = page.page.server.servers
    (bound,) = {s.getsockname()[0] for server in servers for s in server.sockets}
    assert bound == "127.0.0.1"
    assert repr(page) == f"explorer at {page.url}"
    assert page.page.share_url is None
    assert outside == []


def test_a_port_that_is_taken_is_one_line(page: Any) -> None:
    port = int(page.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"^port {port} is taken; give another$"):
        explorer(classifier_of(), ["saliency"], port=port)


@contextmanager
def chromium(url: str) -> Iterator[Any]:
    """A tab of Chromium; a request to another place than ``url`` fails, as a complaint does."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    quiet += ["--disable-component-update", "--disable-sync", "--disable-quic"]
    quiet += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    requests: list[str] = []
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=quiet)
        tab = opened.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(120_000)
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        yield tab
        opened.close()
    assert [u for u in requests if not u.startswith((url, "data:", "blob:"))] == []
    assert complaints == []


@pytest.fixture
def tab(page: Any) -> Iterator[Any]:
    """The page in Chromium."""
    with chromium(page.url) as tab:
        tab.goto(page.url)
        yield tab


def upload(tab: Any, data: bytes, name: str = "a photo.png") -> None:
    tab.set_input_files("input[type=file]", {"name": name, "mimeType": "image/png", "buffer": data})


def press(tab: Any, *keys: str) -> None:
    for key in keys:
        tab.keyboard.press(key)


def a_photo() -> bytes:
    return encode_png(as_rgb(drawn(1, 3, 80, 120)[0]))


@pytest.mark.browser
def test_upload_choose_attack_defend_and_export(
    tab: Any, tmp_path: Path, outside: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(tab, a_photo())
    tab.wait_for_selector(".explored")
    assert tab.locator(".explored .panel").count() == 2 + 2
    assert tab.locator("img[src=x]").count() == 0  # a class's name is no markup
    assert EVIL in tab.inner_text(".explored .said")
    # From here on by keyboard alone: the class, the attack, its strength, the defence.
    tab.get_by_label("what it sees").focus()
    press(tab, "Tab", "Tab", "Space")
    tab.wait_for_selector("figcaption:has-text('as it is, of bee')")
    tab.get_by_label("none", exact=True).focus()
    press(tab, "Tab", "Space")
    tab.wait_for_selector(".explored.attacked")
    assert tab.locator(".explored img").count() == 3 + 2 * 2
    tab.locator("input[type=range]").focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector("text=No pixel changes by more than 3 of 255 levels")
    tab.get_by_label("Defend").focus()
    tab.keyboard.press("Space")
    tab.wait_for_selector("text=On average over five")
    for width in (400, 1280):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    seen = Axe().run(tab)
    assert seen.violations_count == 0, seen.generate_report()
    saved = {}
    for link in tab.locator(".exports a").all():
        with tab.expect_download() as download:
            link.press("Enter")
        suffix = Path(download.value.suggested_filename).suffix
        saved[suffix] = tmp_path / f"saved{suffix}"
        download.value.save_as(saved[suffix])
    assert saved[".png"].read_bytes().startswith(b"\x89PNG")
    facts = json.loads(saved[".json"].read_text())
    assert (facts["target"], facts["attack"], facts["levels"]) == (1, "pgd", 3)
    assert facts["defended"] is True
    monkeypatch.chdir(tmp_path)
    Path("a photo.png").write_bytes(a_photo())
    names: dict[str, Any] = {"model": classifier_of()}
    exec(saved[".py"].read_text(), names)
    assert names["boxes"] == facts["attacked"]["boxes"]
    # Nothing was kept, and nothing left the machine.
    assert [f for f in (tmp_path / "gradio").rglob("*") if f.is_file()] == []
    assert outside == []


CELLS = (
    "from captum_robust.show import explorer\n"
    "from tests.networks import classifier_of\n"
    "opened = explorer(classifier_of(), ['grad_cam', 'robust_cam'])\n"
    "opened",
    "opened.close()",
)


@pytest.fixture
def cell(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The cell of a notebook that has opened the explorer; its kernel runs until the test ends."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    # Captum's import of tqdm.auto warns where ipywidgets is not installed.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
    client = nbclient.NotebookClient(
        nbformat.v4.new_notebook(cells=cells), timeout=120, kernel_name=kernel
    )
    with client.setup_kernel():
        client.execute_cell(cells[0], 0)
        yield cells[0]
        client.execute_cell(cells[1], 1)
    assert cells[1].outputs == []


def test_a_notebook_shows_it_below_the_cell(cell: Any) -> None:
    frame, said = cell.outputs  # and nothing on standard error
    (url,) = re.findall(r'<iframe src="(http://127\.0\.0\.1:\d+/)"', frame.data["text/html"])
    assert said.data["text/plain"] == f"explorer at {url}"
    with urlopen(f"{url}config") as answer:
        titles = [part["props"].get("label") for part in json.load(answer)["components"]]
    assert {"Photograph", "Camera", "Attack"} <= set(titles)


@pytest.mark.browser
def test_below_the_cell_a_photograph_is_explained_and_attacked(cell: Any) -> None:
    html = cell.outputs[0].data["text/html"]
    with chromium(re.findall(r'src="([^"]+)"', html)[0]) as tab:
        tab.set_content(f"<body style='width: 800px'>{html}")
        frame = tab.frame_locator("iframe")
        photo = {"name": "a photo.png", "mimeType": "image/png", "buffer": a_photo()}
        frame.locator("input[type=file]").set_input_files(photo)
        frame.locator(".explored .panel").nth(3).wait_for()
        frame.get_by_text("another class (PGD)").click()
        frame.locator(".explored.attacked").wait_for()
        width = frame.locator("html").evaluate("page => page.scrollWidth")
        assert width <= 800


@pytest.mark.browser
def test_what_is_no_photograph_is_one_sentence(tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(tab, b"no image", EVIL + ".png")
    alert = tab.locator("[role=alert]", has_text="not an image")
    alert.wait_for()
    assert tab.locator("img[src=x]").count() == 0
    upload(tab, b"x" * 100_001, "large.png")
    tab.wait_for_selector("text=large.png: a photograph may have 100000 bytes")
    monkeypatch.setenv("CAPTUM_ROBUST_MAX_MEGAPIXELS", "0.001")
    upload(tab, a_photo(), "bomb.png")
    tab.wait_for_selector("text=may be a decompression bomb")
    monkeypatch.delenv("CAPTUM_ROBUST_MAX_MEGAPIXELS")
    upload(tab, a_photo())
    tab.wait_for_selector(".explored")


@pytest.mark.browser
def test_the_camera_shows_the_mask(tab: Any, tmp_path: Path) -> None:
    tab.get_by_role("tab", name="Camera").click()
    tab.get_by_text("Click to Access Webcam").click()
    tab.get_by_label("capture photo").click()
    tab.wait_for_selector("img[alt='The last frame of the camera with the mask']")
    assert [f for f in (tmp_path / "gradio").rglob("*") if f.is_file()] == []


def test_names_in_the_page_are_no_markup() -> None:
    model = classifier_of()
    model.class_names = [EVIL] * 3
    one = Explorer(model, {EVIL: "saliency"})
    photograph = one.photograph(a_photo(), EVIL)
    html = rendered(one.explore(photograph, Question()), one.python(photograph, Question()))
    assert "onerror" in html
    assert "<img src=x" not in html


def test_gradio_is_an_extra(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = run("app", "--model", "small_resnet", "--weights", "none")
    assert code == 2
    assert err == (
        'captum-robust: error: the explorer needs gradio: pip install "captum-robust[app]"\n'
    )


def test_the_command_says_the_address_until_ctrl_c(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    visited = []

    class CtrlC:
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(app_command, "threading", SimpleNamespace(Event=CtrlC))
    monkeypatch.setattr(app_command, "webbrowser", SimpleNamespace(open=visited.append))
    small = ("--model", "small_resnet", "--weights", "none", "--methods", "grad_cam")
    code, out, err = run("app", *small, "--open")
    assert code == 130
    (address,) = visited
    assert out == f"{address}  (Ctrl-C closes it)\n"
    assert err == "captum-robust: stopped\n"
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConnectionError), socket.socket() as probe:
        probe.connect(("127.0.0.1", port))


SMALL = {"model": "small_resnet", "weights": "none"}


def explored(
    monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Explorer, Exploration, dict[str, Any]]:
    """What the command explores with these options, and what its lines of Python make of it."""
    made: list[Explorer] = []

    def opened(model: Any, methods: Any, port: Any, source: Any) -> Any:
        made.append(Explorer(model, methods, source))
        raise KeyboardInterrupt

    monkeypatch.setattr("captum_robust.show.explorer_page.explorer", opened)
    with pytest.raises(KeyboardInterrupt):
        app(**vars(AppOptions(**options)))
    (one,) = made
    Path("a photo.png").write_bytes(a_photo())
    photograph = one.photograph(a_photo(), "a photo.png")
    names: dict[str, Any] = {}
    exec(one.python(photograph, Question()), names)
    return one, one.explore(photograph, Question()), names


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        SMALL | {"classes": "ant,bee,cat", "methods": "saliency,grad_cam"},
        SMALL | {"mean": "0.4,0.5,0.6", "std": "0.2,0.2,0.2", "layer": "stage1", "size": 48},
        {"model": "small_resnet", "weights": "weights.safetensors", "methods": "saliency"},
    ],
)
def test_the_lines_load_the_model_of_the_options(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    own = load_classifier("small_resnet", None, class_names=["x", "y"])
    save_classifier(own, "weights.safetensors")
    one, found, names = explored(monkeypatch, **options)
    assert names["boxes"] == found.clean.boxes
    assert names["model"].class_names == one.model.class_names
    for mine, theirs in zip(names["model"].parameters(), one.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["masking", "localization", "with its classifier"])
def test_the_lines_load_the_network_of_the_options(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = dict(SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        like = load_classifier("small_resnet", None, class_names=["x", "y", "z"]).eval()
        options["classes"] = "x,y,z"
        if kind == "masking":
            save_masking_network(MaskingNetwork(like), "network.safetensors")
        else:
            network = LocalizationNetwork(CorruptionNetwork(width=2), like, n_segments=4)
            save_localization_network(network, "network.safetensors")
    if kind == "with its classifier":
        del options["classes"]
        options["weights"] = "DEFAULT"
    name = "real_time_masking" if kind == "masking" else "adversarial_localization"
    one, found, names = explored(monkeypatch, **options, network=Path("network.safetensors"))
    assert list(one.methods)[-1] == name
    assert names["boxes"] == found.clean.boxes
