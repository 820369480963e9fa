"""What the README and the pages of the documentation print runs as printed."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import cv2
import pytest
import typer.main

from captum_robust.cli import app
from captum_robust.data import load_dataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md"))]
API = sorted((ROOT / "docs" / "api").glob("*.md"))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """The words behind ``captum-robust`` of each command of a page."""
    lines = "\n".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    words = [shlex.split(part.replace("-m captum_robust", "captum-robust"), True) for part in parts]
    found = [w[w.index("captum-robust") + 1 :] for w in words if "captum-robust" in w]
    in_text = re.findall(r"`captum-robust ([^`]+)`", page.read_text(encoding="utf-8"))
    return found + [shlex.split(text) for text in in_text]


@pytest.fixture
def files_of_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages take for granted in the current folder: a video."""
    monkeypatch.chdir(tmp_path)
    frame = (load_dataset("samples")[0].image * 255).byte().permute(1, 2, 0).numpy()[..., ::-1]
    size = (frame.shape[1], frame.shape[0])
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, size)
    for _ in range(2):
        writer.write(frame.copy())
    writer.release()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p, "python")], ids=name_of)
@pytest.mark.usefixtures("files_of_a_reader")
def test_the_python_of_a_page_runs_as_printed(page: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    if page.stem == "query":  # no requirement of the package, but of its tests
        pytest.importorskip("pyarrow")
        pytest.importorskip("duckdb")
    for block in blocks_of(page, "python"):
        exec(compile(block, name_of(page), "exec"), names)


def test_the_readme_is_short_and_shows_each_part() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert len(blocks_of(PAGES[0], "python")) == 5
    assert 'pip install ".[demo]" && captum-robust demo' in text
    assert 'pip install -e ".[test]" && pytest -n auto' in text


@pytest.mark.parametrize("page", [p for p in PAGES if commands_of(p)], ids=name_of)
def test_the_commands_of_a_page_have_their_options(page: Path) -> None:
    for words in commands_of(page):
        command = typer.main.get_command(app)
        rest = list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        known = {o for p in command.params for o in [*p.opts, *p.secondary_opts]}
        assert not hasattr(command, "commands"), f"no command: {words}"
        options = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert options <= known, words


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]*)[^)]*\)", text):
        assert (page.parent / target).exists(), target
    for script in re.findall(r"studies/\w+\.py", text):
        assert (ROOT / script).is_file(), script


def test_each_public_name_is_in_the_reference() -> None:
    rooms = {"attr", "attacks", "benchmark", "data", "defenses", "inspection", "interop"}
    rooms |= {"metrics", "metrics.functional", "models", "nn", "optim", "training"}
    assert rooms <= {page.stem for page in API}
    for page in API:
        assert f".. automodule:: captum_robust.{page.stem}\n" in page.read_text(encoding="utf-8")
    rooms_of = [import_module(f"captum_robust.{page.stem}") for page in API]
    documented = {name for room in rooms_of for name in getattr(room, "__all__", ())}
    transforms = set(import_module("captum_robust.transforms").__all__)
    top = set(import_module("captum_robust").__all__) - {"__version__", "locate", "overlay"}
    assert top | transforms <= documented
