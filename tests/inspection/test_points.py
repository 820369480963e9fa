"""Filters, activations, features, neighbours and embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from captum_robust.inspection import (
    Features,
    activations,
    embedding,
    first_layer_filters,
    neighbours,
    penultimate_features,
    with_attacked,
)
from captum_robust.models import Classifier
from tests.inspection.nets import BLUE, RED, block, colour_net
from tests.networks import Net, classifier_of, drawn


def test_filters_of_three_channels_are_coloured_and_scaled_each() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 2, bias=False))
    net[0].weight.data[0] = torch.arange(12.0).view(3, 2, 2)
    net[0].weight.data[1] = 7.0
    filters = first_layer_filters(net)
    assert filters.layer == "0"
    assert filters.tiles.shape == (2, 2, 2, 3)
    assert torch.allclose(filters.tiles[0, 1, 0], torch.tensor([2.0, 6, 10]) / 11)
    assert (filters.tiles[1] == 0.5).all()
    assert len(filters.plot().axes) == 2


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_filters_of_other_channels_are_grey_side_by_side(channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(channels, 4, (3, 2)))
    tiles = first_layer_filters(net).tiles
    assert tiles.shape == (4, 3, channels * 2, 3)
    assert torch.equal(tiles[..., 0], tiles[..., 2])


def test_a_linear_layer_on_pixels_has_filters_too() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 6))
    assert first_layer_filters(Classifier(net, input_size=(4, 5))).tiles.shape == (6, 4, 5, 3)
    with pytest.raises(ValueError, match="model: expected a first layer"):
        first_layer_filters(nn.Sequential(nn.ReLU()))


def test_activations_are_those_of_the_layers_before_they_are_overwritten() -> None:
    torch.manual_seed(0)
    net, image = Net(), drawn(1)[0]
    found = activations(Classifier(net, input_size=(22, 17)), image, ["conv1", "conv2"])
    with torch.no_grad():
        first = net.conv1(image[None])
        second = net.conv2(first.relu())
    torch.testing.assert_close(found.maps["conv1"], first[0])
    torch.testing.assert_close(found.maps["conv2"], second[0])
    assert found.strongest("conv2", 1) == [int(second[0].amax((1, 2)).argmax())]
    assert found.plot().axes


def test_activations_without_layers_are_of_each_scale() -> None:
    found = activations(classifier_of(), drawn(1, height=30, width=40)[0])
    sizes = [tuple(maps.shape[1:]) for maps in found.maps.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 2


class Painter:
    """An attack that makes red images blue, and blue ones red."""

    def perturb(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        # They are led away from the class that the network sees, not from the label.
        assert torch.equal(classes, (x[:, 2].amax((1, 2)) > 0).long())
        return x[:, [2, 1, 0]]


def test_attacked_images_are_among_those_that_they_look_like() -> None:
    model = colour_net()
    images = [block(RED if i < 3 else BLUE, 0, 0, 4, i + 2) for i in range(6)]
    clean = penultimate_features(model, [(x, int(i > 2)) for i, x in enumerate(images)])
    attacked = with_attacked(clean, model, [0, 5], torch.stack([images[0], images[5]]), Painter())
    assert attacked.ids[6:] == ["0, attacked", "5, attacked"]
    assert attacked.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 1]
    assert attacked.is_clean.tolist() == [True] * 6 + [False] * 2
    # Red of 4×2 pixels is now blue.
    assert attacked.values[6].tolist() == [0, 8 / 256, 0]
    assert attacked.thumbnails is not None
    assert attacked.thumbnails[6, 2].amax() == 255
    found = neighbours(attacked, queries=[0, 6, 7], k=2)
    near = [set(row) for row in found.indices.tolist()]
    assert near[0] == {1, 2}
    assert near[1] < {3, 4, 5}  # no attacked image is a neighbour
    assert near[2] < {0, 1, 2}
    assert set(found.within[1].tolist()) < {0, 1, 2}
    # By hand: the attacked one has 8 blue pixels, the first images 8 and 12 red, or 20 blue ones.
    far = neighbours(attacked, queries=[6], k=2, metric="euclidean")
    assert far.indices[0].tolist() == [0, 3]
    plane = embedding(attacked, "pca")
    assert plane.points.shape == (8, 2)
    (axes,) = plane.plot().axes
    assert sum(line.get_marker() == "X" for line in axes.lines) == 2
    assert len(axes.texts) == 2  # the arrows


def test_features_are_what_the_head_is_given() -> None:
    images = [block(RED, 0, 0, 4, 4), block(BLUE, 0, 0, 8, 4)]
    found = penultimate_features(colour_net(), [(images[0], 0), (images[1], 1)])
    # Means of the maps: 16 and 32 of 256 pixels.
    assert found.values.tolist() == [[1 / 16, 0, 0], [0, 1 / 8, 0]]
    assert found.labels.tolist() == [0, 1]
    assert found.source == "the input of head.fc"
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pooled = penultimate_features(Classifier(bare, input_size=16), images)
    assert pooled.values.shape == (2, 4)
    assert "the means of the maps" in pooled.source


POINTS = torch.tensor([[0.0, 0], [1, 0], [3, 0], [10, 0], [10, 1]])
LABELS = [0, 0, 1, 1, -1]


def test_neighbours_are_as_worked_by_hand() -> None:
    found = neighbours(POINTS, k=2, labels=LABELS, metric="euclidean")
    assert found.indices.tolist() == [[1, 2], [0, 2], [1, 0], [4, 2], [3, 2]]
    assert found.distances[0].tolist() == [1, 3]
    assert found.within.tolist() == [[1, -1], [0, -1], [3, -1], [2, -1], [-1, -1]]
    assert found.across.tolist() == [[2, 3], [2, 3], [1, 0], [1, 0], [-1, -1]]
    assert found.notes == ["Without a known class: 1 image."]
    # Of the known ones: 1 yes, 2 no; 0 yes, 2 no; 1, 0 no; 2 yes.
    assert found.same_class == pytest.approx(3 / 7)


def test_cosine_distances_and_equal_points() -> None:
    points = torch.tensor([[1.0, 0], [2, 0], [5, 0], [0, 3]])
    found = neighbours(points, queries=[3, 1], k=3)
    assert found.distances[0].tolist() == pytest.approx([1, 1, 1])
    assert set(found.indices[1].tolist()) == {0, 2, 3}
    assert found.distances[1].tolist() == pytest.approx([0, 0, 1])


def test_one_image_has_no_neighbours_and_that_is_said() -> None:
    images = [block(RED, 0, 0, 4, 4)]
    found = neighbours(colour_net(), images)
    assert found.indices.shape == (1, 0)
    assert found.notes[0] == "Each of the images has 0 neighbours, not 5."
    assert found.plot().axes


def test_wrong_features_and_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="queries: expected numbers from 0 to 4"):
        neighbours(POINTS, queries=[5])
    with pytest.raises(ValueError, match="features: expected N×D, got 2×2×2"):
        neighbours(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="features: NaN"):
        embedding(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="images: a model needs those"):
        neighbours(colour_net())
    with pytest.raises(ValueError, match="metric: expected one of"):
        neighbours(POINTS, metric="l1")


def test_pca_is_that_of_the_singular_vectors() -> None:
    values = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    found = embedding(values, "pca")
    centred = (values - values.mean(0)).double().numpy()
    left, strengths, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * strengths[:2]
    np.testing.assert_allclose(found.points.abs().numpy(), np.abs(expected), atol=1e-5)
    assert found.explained == pytest.approx((strengths[:2] ** 2).sum() / (strengths**2).sum())


def test_tsne_keeps_two_groups_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 5, generator=generator) + 20 * (torch.arange(40) % 2)[:, None]
    found = embedding(Features(values, torch.arange(40) % 2, [str(i) for i in range(40)]))
    points = found.points
    far = torch.cdist(points, points)
    far.fill_diagonal_(torch.inf)
    assert (far.argmin(1) % 2 == torch.arange(40) % 2).all()
    assert torch.equal(points, embedding(values).points)
    assert found.notes == ["Perplexity 13 instead of 30, for 40 images."]
    assert found.plot().axes


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_images_are_embedded_and_that_is_said(n: int) -> None:
    found = embedding(torch.rand(n, 8))
    assert found.points.shape == (n, 2)
    assert found.points.isfinite().all()
    said = "Perplexity 1.33 instead of 30, for 5 images." if n == 5 else "Too few for t-SNE"
    assert said in found.notes[0]
    assert found.method == ("tsne" if n == 5 else "pca")
    assert found.plot().axes
