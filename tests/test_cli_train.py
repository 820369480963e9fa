"""What the commands of ``captum-robust train`` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields

import pytest

from captum_robust.cli.train_localization import localization
from captum_robust.cli.train_masking import masking
from captum_robust.cli.train_options import settings_of
from captum_robust.cli.train_robust import robust
from captum_robust.training import TrainingSettings


@pytest.mark.parametrize("command", [robust, masking, localization])
def test_every_setting_but_the_warm_up_is_an_option(command: Callable[..., None]) -> None:
    settings = {setting.name for setting in fields(TrainingSettings)}
    assert settings - set(inspect.signature(command).parameters) == {"warmup"}


def test_settings_are_taken_from_among_the_options_of_a_command() -> None:
    found = settings_of({"out": "run", "epochs": 3, "seed": 7, "device": "cpu", "steps": 5})
    assert found == TrainingSettings(epochs=3, seed=7, device="cpu")
    with pytest.raises(ValueError, match="epochs: expected a whole number from 1, got 0"):
        settings_of({"epochs": 0})
