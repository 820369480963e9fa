"""The three forms of the corruption loss, worked by hand."""

from __future__ import annotations

import pytest
import torch

from captum_robust.nn import removal_loss

# L of the rows: 6 - (0 + 3)/2 = 4.5; -1 - (1 + 3)/2 = -3; 2 - (2 + 2)/2 = 0.
SCORES = torch.tensor([[6.0, 0.0, 3.0], [1.0, 3.0, -1.0], [2.0, 2.0, 2.0]])
CLASSES = torch.tensor([0, 2, 1])


@pytest.mark.parametrize(
    ("form", "expected"),
    [("literal", [4.5, -3.0, 0.0]), ("bounded", [4.5, 0.0, 0.0]), ("squared", [20.25, 9.0, 0.0])],
)
def test_each_form_by_hand(form: str, expected: list[float]) -> None:
    assert removal_loss(SCORES, CLASSES, form).tolist() == expected


def test_bounded_is_the_default() -> None:
    assert removal_loss(SCORES, CLASSES).tolist() == [4.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("form", "factors"), [("literal", [1, 1]), ("bounded", [1, 0]), ("squared", [9, -6])]
)
def test_gradients_by_hand(form: str, factors: list[float]) -> None:
    # ∂L/∂l is 1 for the class and -1/2 for the two others; times 1, [L > 0] and 2 L.
    scores = SCORES[:2].clone().requires_grad_()
    removal_loss(scores, CLASSES[:2], form).sum().backward()
    direction = torch.tensor([[1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]])
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, direction * torch.tensor(factors)[:, None])


def test_only_the_literal_form_has_no_lower_bound() -> None:
    scores = torch.tensor([[-1000.0, 0.0]])
    classes = torch.tensor([0])
    assert removal_loss(scores, classes, "literal") == -1000
    assert removal_loss(scores, classes, "bounded") == 0
    assert removal_loss(scores, classes, "squared") == 1e6


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"form: .*got 'boundd'; did you mean 'bounded'"):
        removal_loss(SCORES, CLASSES, "boundd")
    with pytest.raises(ValueError, match=r"at least two classes, got \(3, 1\)"):
        removal_loss(SCORES[:, :1], CLASSES * 0)
    with pytest.raises(ValueError, match=r"scores: .*got \(3,\)"):
        removal_loss(SCORES[0], CLASSES)
    with pytest.raises(TypeError, match=r"scores: .*floating point, got torch\.int64"):
        removal_loss(SCORES.long(), CLASSES)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"classes: .*numbers from 0 to 2, got {wrong}"):
            removal_loss(SCORES, torch.tensor([0, wrong, 1]))
    with pytest.raises(ValueError, match="classes: expected one for each of 3 images"):
        removal_loss(SCORES, CLASSES[:2])
    with pytest.raises(TypeError, match=r"classes: .*integers, got torch\.float32"):
        removal_loss(SCORES, CLASSES.float())
