"""Refusals: one dialect, which names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from captum_robust._checks import (
    check,
    check_callable,
    check_choice,
    check_count,
    check_finite,
    check_number,
    check_shape,
    check_type,
    unknown_name,
)
from captum_robust.data import DataError


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        (math.nan, {}, "a finite number"),
        (math.inf, {}, "a finite number"),
        (True, {}, "a finite number"),
        ("1", {}, "a finite number"),
        (torch.ones(2), {}, "a finite number"),
        (-0.1, {"low": 0}, "a number from 0"),
        (0, {"low": 0, "open_low": True}, "a positive number"),
        (2, {"low": 2, "open_low": True}, "a number above 2"),
        (1.1, {"low": 0, "high": 1}, r"a number in \[0, 1\]"),
        (0, {"low": 0, "high": 1, "open_low": True, "open_high": True}, r"a number in \(0, 1\)"),
    ],
)
def test_numbers_out_of_range_are_refused(
    value: Any, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=f"^share: expected {expected}, got "):
        check_number("share", value, **options)


def test_numbers_in_range_are_returned_as_floats() -> None:
    assert check_number("x", torch.tensor(0.5), 0, 1) == 0.5
    assert check_number("x", 1, 0, 1) == 1.0


@pytest.mark.parametrize("value", [1.0, True, "2", 0, None])
def test_counts_are_whole_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^k: expected a whole number from 1, got "):
        check_count("k", value, 1)
    check_count("k", None, 1, optional=True)


def test_shapes_are_letters_and_numbers() -> None:
    check_shape("x", torch.zeros(2, 3, 4, 4), "N×3×H×H")
    for shape, expected in [((2, 3, 4, 5), "N×3×H×H"), ((2, 3), "M×4"), ((2,), "N×H×W")]:
        got = "×".join(map(str, shape))
        with pytest.raises(ValueError, match=f"^x: expected {expected}, got {got}$"):
            check_shape("x", torch.zeros(shape), expected)
    with pytest.raises(TypeError, match=r"^x: expected a tensor N×H×W, got list$"):
        check_shape("x", [1], "N×H×W")


def test_types_choices_and_functions_are_named() -> None:
    with pytest.raises(TypeError, match=r"^model: expected a module, got int$"):
        check_type("model", 1, torch.nn.Module, "a module")
    with pytest.raises(ValueError, match=r"^fit: expected one of crop, squash, got 'squach'; did"):
        check_choice("fit", "squach", ("squash", "crop"))
    with pytest.raises(ValueError, match=r"^connectivity: expected one of 4, 8, got 6$"):
        check_choice("connectivity", 6, (4, 8))
    with pytest.raises(TypeError, match=r"^loss: expected a function or None, got str$"):
        check_callable("loss", "mse", optional=True)
    check_callable("loss", None, optional=True)
    with pytest.raises(TypeError, match=r"^no$"):
        check(False, "no", TypeError)
    check(True, "no")


@pytest.mark.parametrize("kind", [ValueError, DataError, FileNotFoundError])
def test_a_refusal_is_one_short_line_that_a_terminal_can_show(kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        check(False, f"a.json: got {'9' * 3_000_000}\n\x1b[31m\ud800.png", kind)
    text = str(caught.value)
    assert len(text) <= 2000
    assert text.startswith("a.json: got 999")
    assert text.endswith("999 \\x1b[31m\\ud800.png")
    assert text.isprintable()


def test_the_name_of_nothing_may_be_long_and_odd() -> None:
    text = str(unknown_name("class", "\x1b" + "k" * 10**6, ["cat", "dog"]))
    assert len(text) <= 2000
    assert text.startswith("class: expected one of cat, dog, got")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_samples_pass_though_their_sum_overflows(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    check_finite(torch.full((2, 3, 8), largest, dtype=dtype), "maps")
    check_finite(torch.tensor([[largest, -largest, largest]], dtype=dtype), "maps")


@pytest.mark.parametrize("wrong", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_sample_with_nan_or_infinity_is_named(wrong: list[float], dtype: torch.dtype) -> None:
    maps = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    maps[1, : len(wrong)] = torch.tensor(wrong)
    with pytest.raises(ValueError, match=r"maps: NaN or infinity in sample 6 \(1 of 3 samples\)"):
        check_finite(maps, "maps", first_sample=5)
