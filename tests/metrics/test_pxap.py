import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from captum_robust.metrics.functional import pxap, pxap_from_histograms, pxap_histograms


def some_maps(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(n, 20, 30, generator=generator)
    masks = torch.rand(n, 20, 30, generator=generator) < maps.sigmoid()
    ignore = torch.rand(n, 20, 30, generator=generator) < 0.1
    return maps, masks, ignore


def scaled(maps):
    maps = maps.double().numpy()
    maps = maps - maps.min(axis=(1, 2), keepdims=True)
    return maps / maps.max(axis=(1, 2), keepdims=True)


def test_histograms_are_those_of_numpy():
    maps, masks, ignore = some_maps()
    # Values on the edges of bins, where rounding decides.
    maps[0].flatten()[:] = torch.arange(600) / 599 * 0.599
    maps[0, 0, 0], maps[0, -1, -1] = 0.0, 1.0
    found = pxap_histograms(maps, masks, ignore)
    edges = np.append(np.arange(0, 1, 0.001), [1.0, 2.0])
    for i in range(4):
        for on in (0, 1):
            pixels = scaled(maps)[i][((masks[i] == on) & ~ignore[i]).numpy()]
            assert (found[i, on].numpy() == np.histogram(pixels, edges)[0]).all()


def test_pxap_is_sklearn_s_average_precision_of_the_binned_scores():
    maps, masks, ignore = some_maps(seed=1)
    scores = np.floor(scaled(maps) * 1000)
    kept = ~ignore.numpy()
    expected = average_precision_score(masks.numpy()[kept], scores[kept])
    assert pxap(maps, masks, ignore).item() == pytest.approx(expected, abs=1e-9)


def test_a_map_that_is_the_mask_scores_one():
    masks = torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[:, 2:4, 1:5] = True
    assert pxap(masks.float(), masks) == 1


def test_a_constant_map_scores_the_share_of_the_object():
    masks = torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[0, :3] = True
    assert pxap(torch.full((1, 10, 10), 7.0), masks).item() == pytest.approx(0.3)


def test_histograms_add_up_over_images():
    maps, masks, ignore = some_maps()
    parts = [pxap_histograms(maps[i:j], masks[i:j], ignore[i:j]) for i, j in ((0, 1), (1, 4))]
    total = parts[0].sum(0) + parts[1].sum(0)
    assert pxap_from_histograms(total) == pxap(maps, masks, ignore)


def test_a_set_without_object_pixels_is_refused():
    with pytest.raises(ValueError, match="histograms: expected a pixel on an object"):
        pxap(torch.rand(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))


def test_wrong_arguments_are_named():
    maps, masks, _ = some_maps()
    with pytest.raises(TypeError, match="masks: expected Boolean"):
        pxap_histograms(maps, masks.int())
    with pytest.raises(ValueError, match="ignore: expected the shape of maps"):
        pxap_histograms(maps, masks, masks[:1])
    with pytest.raises(ValueError, match="N×2×1001"):
        pxap_from_histograms(torch.zeros(3, 7))
