"""The scripts that measure how the cost grows, and what a GPU is asked: nothing is forgotten."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import torch

STUDIES = Path(__file__).parent.parent / "studies"
ROOMS = ("", ".attacks", ".attr", ".benchmark", ".data", ".defenses", ".inspection", ".interop")
ROOMS += (".metrics", ".metrics.functional", ".models", ".nn", ".optim", ".show", ".training")
ROOMS += (".transforms",)
EXPLAINED = {"explain", "video", "report", "embedding, pca"}
"""Operations that have no public name of their own."""


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of `studies`."""
    monkeypatch.syspath_prepend(str(STUDIES))
    return import_module


def test_each_public_name_is_timed_or_said_to_be_no_operation(study: Any) -> None:
    operations = study("operations")
    public = {n for room in ROOMS for n in import_module(f"captum_robust{room}").__all__}
    timed, covered = set(operations.OPERATIONS), set(operations.COVERED)
    assert timed & covered == set()
    assert (timed | covered) - EXPLAINED == public
    assert all(
        axis in vars(operations.LEAST) for o in operations.OPERATIONS.values() for axis in o.axes
    )
    assert all("images" in o.axes for o in operations.OPERATIONS.values())
    assert {name for name, _ in operations.REASONS} <= timed
    parts = {reason.split()[-1] for reason in operations.COVERED.values() if "as a part" in reason}
    assert parts <= timed


def test_rooms_are_all_that_have_public_names() -> None:
    package = Path(import_module("captum_robust").__file__ or "").parent
    found = {
        "." + ".".join(file.parent.relative_to(package).parts)
        for file in package.rglob("__init__.py")
        if "__all__" in file.read_text(encoding="utf-8") and file.parent != package
    }
    assert found - {".cli"} == set(ROOMS) - {""}


@pytest.mark.parametrize(
    ("power", "verdict"), [(0.0, "below"), (1.0, "linear"), (2.0, "above"), (1.2, "linear")]
)
def test_the_exponent_is_the_slope_at_the_large_end(study: Any, power: float, verdict: str) -> None:
    scaling = study("scaling")
    points = [
        scaling.Point(n, 1e-3 * (n**power if n > 4 else 7), 0.0) for n in (1, 2, 4, 8, 16, 32)
    ]
    curve = scaling.Curve("PGD", "images", tuple(points))
    assert curve.exponent == pytest.approx(power)
    assert curve.verdict == verdict
    sides = [scaling.Point(p.size, p.seconds**2, 0.0) for p in points]
    assert scaling.Curve("PGD", "side", tuple(sides)).exponent == pytest.approx(power)


def test_what_grows_too_fast_is_found_and_named(
    study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling, operations = study("scaling"), study("operations")

    def pairs(w: Any) -> None:
        torch.arange(1000 * (w.sizes.images // 4) ** 2, dtype=torch.float64).sin()

    made = {"pairs": operations.Operation(pairs, ("images",))}
    monkeypatch.setattr(scaling, "OPERATIONS", made)
    assert scaling.scaling(only=("pairs",), seconds=0.003) == 1
    said = capsys.readouterr().out
    assert "above: NO REASON IS KNOWN" in said
    assert said.endswith("grow faster than the work, without a reason: pairs (images)\n")
    monkeypatch.setitem(scaling.REASONS, ("pairs", "images"), "each with each")
    assert scaling.scaling(only=("pairs",), seconds=0.003) == 0
    assert "above: each with each" in capsys.readouterr().out


def test_the_time_in_which_a_gpu_is_busy_is_the_union_of_its_kernels(study: Any) -> None:
    harness = study("harness")
    assert harness.covered([(0, 2), (5, 6), (1, 3), (1.5, 2)]) == 4
    assert harness.covered([]) == 0
    assert harness.busy(lambda: None, "cpu") == "not measured"


def test_a_precision_ends_with_its_block(study: Any) -> None:
    harness, backends = study("harness"), (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    product = torch.eye(2)
    with harness.precision_of("tf32", "cpu"):
        assert all(backend.allow_tf32 for backend in backends)
        assert (product @ product).dtype == torch.float32
    with harness.precision_of("bfloat16", "cpu"):
        assert (product @ product).dtype == torch.bfloat16
    assert [backend.allow_tf32 for backend in backends] == before


def options_of(script: ModuleType, stage: str) -> set[str]:
    parameters = inspect.signature(getattr(script, stage)).parameters.values()
    return {"--" + p.name.replace("_", "-") for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("quick", [False, True])
def test_all_studies_of_a_gpu_take_what_they_are_given(study: Any, quick: bool) -> None:
    for name, command in study("gpu").commands(Path("DATA"), "cuda", quick).items():
        script = study(name)
        stage = command[1] if command[1] in ("speed", "cost") else name
        assert {text for text in command if re.match("--", text)} <= options_of(script, stage)
        assert command[-2:] == ["--device", "cuda"]


def test_on_a_cpu_it_is_said_that_no_gpu_was_measured(
    study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(*, device: str = "cpu") -> None:
        del device

    monkeypatch.setattr("sys.argv", ["study"])
    with pytest.raises(SystemExit):
        study("command_line").study(None, stage)
    assert "NO GPU WAS MEASURED" in capsys.readouterr().out


def test_the_help_of_a_study_may_say_a_percentage(
    study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A percent sign is none of argparse's formats, wherever the line breaks behind it."""

    def first(*, share: Annotated[float, "kept, such as 95 % of all, or 5%"] = 95.0) -> None:
        """Take the best 95 %
        of all, and 5% s of the others."""
        del share

    def second() -> None:
        """Take 100 %"""

    monkeypatch.setattr("sys.argv", ["study", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        study("command_line").study("At 10 %\nof all.", first, second)
    assert "Take the best 95 %\n" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["study", "first", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        study("command_line").study("At 10 %\nof all.", first, second)
    assert "kept, such as 95 % of all, or 5%" in " ".join(capsys.readouterr().out.split())
