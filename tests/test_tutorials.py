"""The tutorials run, and what is committed of them is what a run gave."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
SIZE_LIMIT = 2 * 2**20
# Home folders, temporary folders, installed packages and the checkout; not a path in a URL.
MACHINE_PATH = re.compile(
    r"(?<![\w:/.])/(?:home|root|Users|tmp|var|opt|usr|mnt|work|private)/\w|\b[A-Z]:\\\\?\w"
    r"|site-packages"
)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)


def test_there_are_tutorials() -> None:
    if not TUTORIALS.is_dir():
        pytest.skip("the tests run outside of the source tree")
    assert NOTEBOOKS


@every_notebook
def test_the_committed_outputs_are_those_of_one_clean_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@every_notebook
def test_no_path_of_a_machine_is_committed(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    texts = [json.dumps(notebook["metadata"], ensure_ascii=False)]
    for cell in notebook["cells"]:
        texts.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            parts = [output.get("text", [])]
            parts += [v for kind, v in output.get("data", {}).items() if kind.startswith("text/")]
            texts += ["".join(part) for part in parts]
    assert not [match.group() for text in texts for match in MACHINE_PATH.finditer(text)]
    assert path.stat().st_size < SIZE_LIMIT


@pytest.mark.parametrize(
    "text", ["/home/me/x.png", "at /root/a", "C:\\\\Users", "lib/site-packages/captum", "'/tmp/r1'"]
)
def test_a_machine_path_is_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://a.org/home/me", "runs/first", "C×H×W", "and/or/work"])
def test_other_text_is_no_machine_path(text: str) -> None:
    assert not MACHINE_PATH.search(text)


@pytest.mark.notebook
@pytest.mark.timeout(900)
@every_notebook
def test_the_tutorial_runs(path: Path, tmp_path: Path, kernel: str) -> None:
    # Run elsewhere: a tutorial reads and writes nothing beside itself.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    nbclient.NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=300,
        kernel_name=kernel,
        resources={"metadata": {"path": str(elsewhere)}},
    ).execute()
    assert not list(elsewhere.iterdir())
