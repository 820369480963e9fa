"""Share, pointing, order and grids of certificates, worked by hand and beside other rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from captum_robust.metrics import CertifiedLocalizationError, CertifiedPointing
from captum_robust.metrics import functional as F


def masks_of(*rows: str) -> Tensor:
    """One mask 1×H×W, of rows of dots and crosses."""
    return torch.tensor([[[c == "x" for c in row] for row in rows]])


def test_share_and_pointing_are_worked_by_hand() -> None:
    inside = masks_of("xx..", "x...", "....", "...x")
    outside = masks_of("...x", "...x", "....", "....")
    assert F.certified_share(inside, outside).item() == 6 / 16
    assert F.certified_share(inside[:, None], outside[:, None]).item() == 6 / 16
    boxes = F.grid_boxes((4, 4))
    assert F.certified_pointing(inside.expand(4, 4, 4), boxes[:, None]).tolist() == [
        0.75,
        0,
        0,
        0.25,
    ]
    assert F.certified_pointing(inside, masks_of("x...", "x...", "x...", "x...")).item() == 0.5
    both = [torch.cat([boxes[:1], boxes[3:]])]  # the union of two boxes
    assert F.certified_pointing(inside, both).item() == 1


def test_where_nothing_is_certified_in_nothing_points() -> None:
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    assert F.certified_pointing(nothing, F.grid_boxes((4, 4))[:2, None]).isnan().all()
    metric = CertifiedPointing()
    metric.update(nothing, F.grid_boxes((4, 4))[:2, None])
    assert metric.compute().isnan()
    metric.update(masks_of("x...", "....", "....", "...."), F.grid_boxes((4, 4))[:1, None])
    assert (metric.compute().item(), metric.images.item()) == (1, 1)


def test_the_order_is_in_abstain_out_and_by_frequency_within_each() -> None:
    inside, outside = masks_of("x..x.."), masks_of(".x..x.")
    frequency = torch.tensor([[[0.95, 0.0, 1.0, 1.0, 0.04, 0.5]]])
    order = F.certified_order(inside, outside, frequency).flatten().argsort(descending=True)
    assert order.tolist() == [3, 0, 2, 5, 4, 1]


def test_deletion_on_certified_pixels_takes_them_in_that_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 16, 3)).eval()
    image = torch.rand(1, 1, 6, 6)
    frequency = torch.rand(1, 6, 6)
    inside, outside = frequency > 0.8, frequency < 0.4
    classes = torch.tensor([1])
    curve = F.certified_deletion(model, image, inside, outside, frequency, classes, steps=36)
    # Frequencies that the certificates agree with rank the pixels alike.
    same = F.deletion_curve(model, image, frequency, classes, steps=36)
    assert torch.equal(curve.probability, same.probability)
    # Without a certificate out, what abstains comes before what is certified out.
    swapped = F.certified_deletion(model, image, outside, inside, frequency, classes, steps=36)
    first = torch.where(outside, frequency, -1.0).flatten().argmax()
    gone = image.clone().flatten()
    gone[first] = image.mean()
    with torch.no_grad():
        expected = model(gone.view_as(image)).softmax(dim=1)[0, 1]
    assert swapped.probability[0, 1].item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_grid_is_that_of_torchvision_and_its_boxes_are_its_cells() -> None:
    images = torch.rand(8, 3, 4, 6)
    grids = F.image_grid(images)
    for i in range(2):
        assert torch.equal(grids[i], make_grid(images[4 * i : 4 * i + 4], nrow=2, padding=0))
    assert torch.equal(F.image_grid(images[:1], 1), images[:1])
    for cell, box in enumerate(F.grid_boxes((8, 12)).int().tolist()):
        assert torch.equal(grids[1, :, box[1] : box[3], box[0] : box[2]], images[4 + cell])
    nine = F.image_grid(torch.rand(9, 1, 2, 2), 3)
    assert F.grid_boxes((nine.shape[2], nine.shape[3]), 3)[5].tolist() == [4, 2, 6, 4]


def test_an_image_whose_box_is_not_proven_is_wrong_and_one_without_boxes_left_out() -> None:
    inner = torch.tensor([[2.0, 2, 8, 8], [torch.nan] * 4, [0.0, 0, 1, 1]])
    outer = torch.tensor([[1.0, 1, 9, 9], [torch.nan] * 4, [0.0, 0, 1, 1]])
    truth = [torch.tensor([[2.0, 2, 8, 8]]), torch.tensor([[0.0, 0, 4, 4]]), torch.zeros(0, 4)]
    metric = CertifiedLocalizationError()
    metric.update(inner, outer, truth)
    assert (metric.compute().item(), metric.images.item()) == (0.5, 2)


X, O = masks_of("x."), masks_of(".x")  # noqa: E741


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.certified_share(X, X), "outside: expected no pixel that is certified in"),
        (lambda: F.certified_share(X, O.mT), "outside: expected the shape of inside"),
        (lambda: F.certified_pointing(X, [torch.zeros(0, 4)] * 2), "expected one for each of 1"),
        (lambda: F.certified_pointing(X, O.mT), "ground_truth: expected the shape of inside"),
        (lambda: F.certified_order(X, O, 2.0 * X), r"frequency: expected numbers in \[0, 1\]"),
        (lambda: F.image_grid(torch.rand(3, 1, 2, 2)), "images: expected 4 for each grid, got 3"),
        (lambda: F.image_grid(torch.rand(4, 2, 2)), "images: expected N×C×H×W"),
        (lambda: F.grid_boxes((5, 4)), "size: expected multiples of 2"),
        (lambda: CertifiedLocalizationError(1.0), "iou_threshold"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_are_no_certificates() -> None:
    with pytest.raises(TypeError, match="inside: expected Boolean"):
        F.certified_share(torch.rand(1, 2, 2), O)
