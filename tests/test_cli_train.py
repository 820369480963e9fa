"""The options of ``captum-robust train`` are the fields of the trainings' settings."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from captum_robust.cli.options import command_of, help_of
from captum_robust.cli.train_command import app
from captum_robust.training import (
    LocalizationSettings,
    MaskingSettings,
    RobustSettings,
    TrainingSettings,
)

SETTINGS = {
    "robust": RobustSettings,
    "masking": MaskingSettings,
    "localization": LocalizationSettings,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_field_is_an_option_with_its_help_and_default(name: str) -> None:
    settings = SETTINGS[name]
    page = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"}).output
    page = " ".join(page.split())
    for one in fields(settings):
        (option, *_) = one.metadata.get("options", (f"--{one.name.replace('_', '-')}",))
        assert option.split("/")[0] in page
        assert help_of(settings)[one.name].replace("- ", "-") in page.replace("- ", "-")
        if isinstance(one.default, (int, float, str)) and not isinstance(one.default, bool):
            assert f"[default: {one.default}]" in page


def test_the_settings_of_the_loop_are_among_those_of_each_training() -> None:
    for settings in SETTINGS.values():
        own = settings(images=Path("i"), epochs=3, seed=7, device="cpu")
        assert own.training() == TrainingSettings(
            **{f.name: getattr(own, f.name) for f in fields(TrainingSettings)}
        )
        assert own.training(epochs=5).epochs == 5
    with pytest.raises(ValueError, match="epochs: expected a whole number from 1, got 0"):
        MaskingSettings(images=Path("i"), epochs=0)


def test_a_command_takes_what_its_dataclass_says() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Base:
        path: Path
        """Where
        it is."""
        size: int = 3
        """How large."""

    @dataclass(frozen=True, kw_only=True)
    class Own(Base):
        names: list[str] | None = None
        """Several."""
        size: int = 5

    assert help_of(Own) == {"path": "Where it is.", "size": "How large.", "names": "Several."}
    given: list[Any] = []
    own = typer.Typer()
    own.command()(command_of(Own)(given.append))
    result = CliRunner().invoke(own, ["--path", "x", "--names", "a", "--names", "b"])
    assert result.exit_code == 0
    assert given == [Own(path=Path("x"), names=["a", "b"])]
    assert CliRunner().invoke(own, []).exit_code == 2  # no default


def test_the_default_of_every_field_but_the_images_is_written() -> None:
    for settings in SETTINGS.values():
        assert [f.name for f in fields(settings) if f.default is MISSING] == ["images"]


@pytest.mark.parametrize("typed", ["8/254", "x"])
def test_a_strength_that_is_no_number_is_named_as_it_was_typed(typed: str) -> None:
    given = ["robust", "--images", "nowhere", "--epsilon", typed]
    error = CliRunner().invoke(app, given).exception
    assert str(error) == f"--epsilon: expected a number in (0, 255], got {typed!r}"


@pytest.mark.parametrize("command", ["", "train", *(f"train {name}" for name in SETTINGS)])
def test_help_loads_no_torch(command: str) -> None:
    code = (
        "import sys; from captum_robust.cli import app\n"
        f"try: app({[*command.split(), '--help']!r})\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"Usage:(.|\n)*False\n$", printed)
