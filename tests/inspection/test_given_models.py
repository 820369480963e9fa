"""Networks and arguments of others: answers that were wrong without a word, or tracebacks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from captum_robust.data import DataError, Sample
from captum_robust.inspection import (
    activations,
    dissect,
    embedding,
    first_layer_filters,
    maximal_patches,
    neighbours,
    penultimate_features,
    receptive_field,
    tour,
    with_attacked,
)
from captum_robust.models import Classifier
from tests.inspection.nets import RED, block, colour_net

IMAGES = list(torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    body = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def model() -> Classifier:
    return Classifier(net(), input_size=32)


class Returning(nn.Module):
    """The scores in another form."""

    input_size = 32  # for a square

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = net(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, None),
    "list": lambda y: [y],
    "dictionary": lambda y: {"logits": y, "loss": None},
    "ordered": lambda y: OrderedDict(out=y),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_features_are_those_of_the_plain_scores(form: Callable[[Tensor], Any]) -> None:
    plain, given = (penultimate_features(m, IMAGES) for m in (model(), Returning(form)))
    assert given.values.equal(plain.values)
    assert given.source == "the input of net.6"
    assert tour(Returning(form), IMAGES[:2], ["net.2"]).images == 2


class Backwards(nn.Module):
    """Layers in another order than they run in, one that never runs, and a head by keyword."""

    input_size = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.head, self.old = nn.Linear(8, 4), nn.Conv2d(3, 2, 7)
        self.mix, self.stem = nn.Conv2d(6, 8, 3), nn.Conv2d(3, 6, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(input=self.mix(self.stem(x).relu()).mean((2, 3)))


def test_the_first_layer_is_the_one_that_runs_first() -> None:
    filters = first_layer_filters(Backwards())
    assert filters.layer == "stem"
    assert filters.weights.shape == (6, 3, 5, 5)
    features = penultimate_features(Backwards(), IMAGES)
    assert features.source == "the means of the maps of mix"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_receptive_field_does_not_depend_on_the_precision(dtype: torch.dtype) -> None:
    field = receptive_field(Classifier(net().to(dtype), input_size=32), "2")
    assert (field.size, field.stride, field.start) == ((7, 7), (4, 4), (-3, -3))


def test_an_image_of_activations_is_in_0_to_1_or_bytes() -> None:
    floats, levels = IMAGES[0], (255 * IMAGES[0]).round().byte()
    exact = activations(model(), floats, ["2"]).maps["2"]
    torch.testing.assert_close(
        activations(model(), levels, ["2"]).maps["2"], exact, atol=0.01, rtol=0
    )
    grey = activations(model(), floats[:1], ["2"]).maps["2"]
    assert grey.equal(activations(model(), floats[:1].expand(3, -1, -1), ["2"]).maps["2"])
    for wrong, said in ((255 * floats, "got .* to 25"), (floats * torch.nan, "got nan to nan")):
        with pytest.raises(DataError, match=f"image: expected pixels in .*{said}"):
            activations(model(), wrong)


@pytest.mark.parametrize("units", [[0.7], "12", [True], 3, [], torch.tensor([0.5])])
def test_units_are_whole_numbers(units: Any) -> None:
    for call in (maximal_patches, dissect):
        with pytest.raises(ValueError, match="units: expected different numbers from 0 to 7, of 2"):
            call(model(), "2", IMAGES, units=units)
    chosen = maximal_patches(model(), "2", IMAGES, units=torch.tensor([5, 2])).units
    assert chosen == [5, 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"queries": [1.7]}, "queries: expected numbers from 0 to 3"),
        ({"queries": "1"}, "queries: expected numbers from 0 to 3"),
        ({"labels": [1, None, 1, 0]}, "labels: expected class indices"),
        ({"labels": [1.5, 1.2, 1.9, 0.1]}, "labels: expected class indices"),
    ],
)
def test_queries_and_labels_are_whole_numbers(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        neighbours(torch.rand(4, 4), **arguments)


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_images_with_the_same_features_are_one_point(method: Any) -> None:
    """Scikit-learn's t-SNE ends the process there."""
    result = embedding(torch.full((6, 3), 0.1), method)
    assert result.points.equal(torch.zeros(6, 2))
    assert result.notes == ["All 6 images have the same features, and one point."]
    assert result.plot().axes[0].get_title() == "PCA"


@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_that_is_none_of_the_classes_is_an_error_of_its_image(label: int) -> None:
    named = Classifier(net(), input_size=32, class_names=["a", "b", "c", "d"])
    boxes = torch.tensor([[2.0, 2, 20, 20]])
    samples = [Sample(IMAGES[0], 1, boxes, "right"), Sample(IMAGES[1], label, boxes, "wrong")]
    result = dissect(named, "2", samples, "objects")
    assert result.concepts == ["b"]
    assert list(result.unusable.values()) == [f"wrong: expected a label from 0 to 3, got {label}"]


def test_a_tour_of_few_points_takes_images_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"broken")
    for i, image in enumerate(IMAGES):
        pixels = (255 * image).byte().permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"b{i}.png")
    result = tour(model(), tmp_path, ["2"], points=1)
    assert result.images == 6
    assert result.features.ids == ["b0.png"]


def test_features_that_are_not_finite_are_refused() -> None:
    class Overflowing(nn.Module):
        input_size = 32

        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Any:
            return self.net(x / 0 - x / 0)

    with pytest.raises(ValueError, match=r"features: the input of net\.6: NaN or infinity"):
        penultimate_features(Overflowing(), IMAGES)


@pytest.mark.parametrize("size", [None, 16, 8, (8, 16), (32, 8)])
def test_a_known_detector_is_one_at_every_size(size: Any) -> None:
    """Whose map of 16×16 is larger than the masks at most of them."""
    image = block(RED, 2, 3, 7, 6)
    sample = Sample(image, 0, torch.zeros(0, 4), "a", image[0] > 0)
    result = dissect(colour_net(), "units", [sample], "objects", size=size, quantile=0.01)
    expected = 1 if size != (32, 8) else pytest.approx(1, abs=0.2)  # whose edges are enlarged
    assert result.iou[0].item() == expected


def test_activations_that_are_not_told_apart_are_said() -> None:
    class Large(nn.Module):
        input_size = 16

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 1, 1), nn.Linear(1, 3)
            nn.init.constant_(self.conv.weight, 1e5)

        def forward(self, x: Tensor) -> Any:
            return self.fc(self.conv(x).mean((2, 3)))

    result = dissect(Large(), "conv", IMAGES)
    said = "Of 1 unit more than the quantile is active: activations above 4,032 are not told apart."
    assert said in result.notes
    assert result.shares.item() > 0.9


@pytest.mark.parametrize(
    ("numbers", "pixels", "said"),
    [
        ([0], torch.rand(2, 3, 32, 32), "pixels: expected 1×3×32×32, got 2×3×32×32"),
        ([0, 1], torch.rand(2, 3, 48, 48), "pixels: expected 2×3×32×32, got 2×3×48×48"),
        ([0, 9], torch.rand(2, 3, 32, 32), "numbers: expected some from 0 to 5, got"),
        ([0, -1], torch.rand(2, 3, 32, 32), "numbers: expected some from 0 to 5, got"),
    ],
)
def test_attacked_images_are_those_of_the_features(
    numbers: list[int], pixels: Tensor, said: str
) -> None:
    class Darker:
        def perturb(self, x: Tensor, _: Tensor) -> Tensor:
            return x / 2

    features = penultimate_features(model(), IMAGES)
    with pytest.raises(ValueError, match=said):
        with_attacked(features, model(), numbers, pixels, Darker())
    made = with_attacked(features, model(), [2, 1], torch.rand(2, 3, 32, 32), Darker())
    assert len(made.values) == len(made.labels) == len(made.ids) == 8


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_features_moves_no_neighbour(metric: str, scale: float) -> None:
    values = torch.rand(9, 5, generator=torch.Generator().manual_seed(3))
    plain, scaled = (neighbours(v, k=3, metric=metric) for v in (values, scale * values))
    assert scaled.indices.equal(plain.indices)
    unit = 1 if metric == "cosine" else scale
    torch.testing.assert_close(scaled.distances / unit, plain.distances, atol=1e-6, rtol=1e-4)
