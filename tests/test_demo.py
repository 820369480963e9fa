"""The command ``demo``: seven photographs, five methods, clean, attacked, defended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_robust.attacks import PGD
from captum_robust.benchmark import Comparison
from captum_robust.benchmark.demo import METHODS, demonstrate
from captum_robust.data import load_dataset, resize
from captum_robust.defenses import JPEG
from captum_robust.models import Classifier, load_classifier
from captum_robust.report.demo_page import ATTACKED, DEFENDED, STATES, Demo
from tests.benchmark.test_report import Page

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model() -> Classifier:
    return load_classifier("efficientnet_lite0")


@pytest.fixture(scope="module")
def calls() -> list[int]:
    """How many images PGD attacked, a number a call."""
    return []


@pytest.fixture(scope="module")
def demo(model: Classifier, calls: list[int], tmp_path_factory: pytest.TempPathFactory) -> Demo:
    attack = PGD.perturb

    def counted(self: PGD, images: torch.Tensor, *rest: Any, **named: Any) -> Any:
        calls.append(len(images))
        return attack(self, images, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PGD, "perturb", counted)
        return Demo(demonstrate(model, tmp_path_factory.mktemp("demo")).folder)


def test_the_attack_runs_once_and_within_its_strength(
    model: Classifier, demo: Demo, calls: list[int]
) -> None:
    assert calls == [7]
    rows = Comparison(demo.results.store.folder).to_dataframe()
    sizes = rows[rows["attack"] == ATTACKED]["linf"]
    assert (255 * sizes).tolist() == pytest.approx([2.0] * 7 * len(METHODS), abs=1e-3)
    samples = load_dataset("samples")
    x = torch.stack([resize(sample, model.input_size).image for sample in samples])
    y = torch.tensor([sample.label for sample in samples])
    attacked = PGD(model, 2 / 255, steps=10, early_stop=False, seed=0).perturb(x, y)
    with torch.no_grad():
        for state, images in ((ATTACKED, attacked), (DEFENDED, JPEG(40)(attacked))):
            seen = rows[(rows["attack"] == state) & (rows["method"] == "grad_cam")]
            assert seen["predicted"].tolist() == model(images).argmax(dim=1).tolist()


def test_the_table_counts_the_misses_at_shipped_thresholds(demo: Demo) -> None:
    result = Comparison(demo.results.store.folder)
    table = result.table().set_index(["method", "attack"])
    assert set(table["tuned"]) <= {"shipped", "-"}
    for method, row in zip(METHODS, demo.table(), strict=True):
        expected = [round(7 * table.loc[(method, state), "error"]) for state in STATES]
        assert row.misses == expected
    frame = result.to_dataframe()
    one = frame[frame["method"] == "grad_cam"]
    assert demo.right() == [
        int((one[one["attack"] == s]["label"] == one[one["attack"] == s]["predicted"]).sum())
        for s in STATES
    ]
    assert demo.right()[0] == 7  # the photographs are chosen so


def test_pictures_come_first_then_the_table_then_what_to_do(demo: Demo, tmp_path: Path) -> None:
    path = demo.write(tmp_path / "report.html")
    html, page = path.read_text("utf-8"), Page(path)
    pictures = [a for tag, a in page.elements if tag == "img"]
    assert len(pictures) == 7 * 3 * (1 + len(METHODS))
    assert all(a["alt"] and a["src"].startswith("data:image/jpeg") for a in pictures)
    order = [html.index("<img"), html.rindex("<img"), html.index("n = 7 ranks nothing")]
    order.append(html.index("captum-robust compare folder"))
    assert order == sorted(order)
    assert "<script" not in html
    assert path.stat().st_size < 3e6


def test_the_command_names_the_methods_and_says_what_is_next(run: Run, demo: Demo) -> None:
    folder = demo.results.store.folder
    code, out, err = run("demo", "--out", folder)  # a finished run is not run again
    assert code == 0, err
    assert "n = 7 ranks nothing" in out
    assert "perceptual ball × CAM misses" in out
    assert "captum-robust explain PHOTOS" in out
    assert out.splitlines()[-1] == f"report: {folder / 'report.html'}"


def test_json_is_the_same_table(run: Run, demo: Demo) -> None:
    folder = demo.results.store.folder
    code, out, err = run("demo", "--out", folder, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert list(found["classifier_right"].values()) == demo.right()
    assert [list(misses.values()) for misses in found["misses"].values()] == [
        row.misses for row in demo.table()
    ]
    assert (found["photographs"], found["report"]) == (7, str(folder / "report.html"))


def test_all_compares_all_methods_on_the_clean_photographs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(model: Classifier, dataset: Any, *rest: Any, **named: Any) -> None:
        assert len(dataset) == 7
        assert rest == ()
        assert named == {"out": Path("captum-robust-demo-all")}
        raise ValueError("as it was")

    monkeypatch.setattr("captum_robust.benchmark.compare", compared)
    code, _, err = run("demo", "--all")
    assert code == 2
    assert "as it was" in err


def test_something_is_said_before_torch_is_loaded() -> None:
    text = """
import sys, typer
def first(text, **_):
    print("torch" in sys.modules, text)
    sys.exit()
typer.echo = first
sys.argv = ["captum-robust", "demo"]
from captum_robust.cli.app import main
main()
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert re.match("False seven photographs", done.stdout), done.stderr


def test_the_progress_bar_names_the_method_and_the_attack(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from captum_robust.benchmark import compare
    from tests.benchmark.conftest import Drawn, make_classifier

    attacks = {"\x1b[2Jnone": lambda images, _: images}
    compare(make_classifier(), Drawn(2), ["grad_cam"], attacks, progress=True)
    bar = capsys.readouterr().err
    assert "Grad-CAM]" in bar
    assert "Grad-CAM under \\x1b[2Jnone" in bar
    assert "\x1b[2J" not in bar
