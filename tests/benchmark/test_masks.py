"""The masks of Dabkowski & Gal, and of Fan et al., among the methods of ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from captum_robust.attr import AdversarialLocalization, IterativeMask, RealTimeMasking
from captum_robust.benchmark import METHODS, compare
from captum_robust.catalog.methods import WITH_NETWORK, build_methods, heat_map, usual_methods
from captum_robust.models import Classifier
from captum_robust.nn import (
    CodeObjective,
    CorruptionNetwork,
    LocalizationNetwork,
    MaskingNetwork,
)

from .conftest import Drawn, make_classifier


def masking(model: Classifier, confidence: float = 0.0) -> RealTimeMasking:
    """Untrained, with what it draws drawn the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return RealTimeMasking(MaskingNetwork(model), confidence=confidence)


def localization(
    model: Classifier, seed: int = 3, n_segments: int | None = 20
) -> AdversarialLocalization:
    """Untrained, but for weights and statistics that tell one pixel from another."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        corruption = CorruptionNetwork(width=4)
        torch.nn.init.normal_(corruption.logits.weight)
        for module in corruption.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        corruption.train()(torch.rand(4, 3, 32, 32))
    return AdversarialLocalization(
        LocalizationNetwork(corruption.eval(), model, n_segments=n_segments)
    )


def test_masks_are_maps_of_the_explained_class(model: Classifier) -> None:
    methods: dict[str, Any] = {
        "network": masking(model),
        "iterative": IterativeMask(model, steps=5),
        "localization": localization(model),
    }
    x, target = torch.rand(3, 3, 32, 32), torch.tensor([2, 0, 1])
    for name, method in build_methods(model, methods).items():
        expected = methods[name].attribute(x, target)
        maps = method.explain(x, target).maps
        torch.testing.assert_close(maps, heat_map(expected, (32, 32)))
        torch.testing.assert_close(maps, 3 * expected[:, 0])  # alike in three channels


def test_compare_knows_both(model: Classifier, drawn: Drawn) -> None:
    methods = {"network": masking(model), "iterative_mask": "iterative_mask"}
    result = compare(model, drawn, methods, limit=2, saliency_metric=True, progress=False)
    assert result.failures().empty
    table = result.table().set_index("method")
    assert (table["n"] == 2).all()
    # The trunk of the masking network is the classifier; a step takes a kept and a destroyed image.
    assert table.loc["network", "forward"] == 1
    assert table.loc["iterative_mask", "forward"] == 2 * 200
    assert set(result.saliency_table()["method"]) == {*methods, "true box"}


def test_a_model_without_a_trained_network_is_told_how_to_train_one(
    model: Classifier, drawn: Drawn
) -> None:
    with pytest.raises(ValueError, match=r"real_time_masking.*captum-robust train masking"):
        compare(model, drawn, ["real_time_masking"], progress=False)


def test_what_runs_without_being_named_is_neither_slow_nor_untrained(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = {"iterative_mask", "rise", "score_cam", "adversarial_localization"}
    assert set(METHODS) - set(usual_methods(model)) == {*never, *WITH_NETWORK}
    monkeypatch.setattr(
        "captum_robust.catalog.methods.pretrained", lambda: {model.name: Path("w.safetensors")}
    )
    assert set(METHODS) - set(usual_methods(model)) == never


def test_the_attack_on_a_mask_moves_it_and_keeps_the_class(model: Classifier) -> None:
    attribution = masking(model)
    (method,) = build_methods(model, {"network": attribution}).values()
    assert method.attack_map is not None
    x = torch.stack([Drawn()[i].image[:, :32, :32] for i in range(3)])
    label = model(x).argmax(dim=1)
    attack = method.attack_map(8 / 255, 8)
    attacked, details = attack.perturb(x, label, return_details=True)
    assert (attacked - x).abs().max() <= 8 / 255 + 1e-6
    assert torch.equal(model(attacked).argmax(dim=1), label)
    assert (details.moved > 0).any()
    # What is moved is the mask that attribute gives.
    before, after = (attribution.attribute(image, label)[:, 0] for image in (x, attacked))
    assert not torch.allclose(before, after)
    mass = [m.flatten(1) / m.flatten(1).sum(dim=1, keepdim=True) for m in (before, after)]
    top = mass[0].topk(round(0.1 * 32 * 32), dim=1).indices
    lost = (mass[0].gather(1, top) - mass[1].gather(1, top)).sum(dim=1)
    torch.testing.assert_close(lost, details.moved, atol=1e-4, rtol=0)


def test_the_attack_on_a_localization_network_moves_its_map(model: Classifier) -> None:
    attribution = localization(model)
    (method,) = build_methods(model, {"network": attribution}).values()
    assert method.attack_map is not None
    x = torch.stack([Drawn()[i].image[:, :32, :32] for i in range(3)])
    label = model(x).argmax(dim=1)
    attacked, details = method.attack_map(8 / 255, 8).perturb(x, label, return_details=True)
    assert (attacked - x).abs().max() <= 8 / 255 + 1e-6
    assert torch.equal(model(attacked).argmax(dim=1), label)
    assert (details.moved > 0).any()
    moved = attribution.attribute(attacked, superpixels=False)
    assert not torch.allclose(moved, attribution.attribute(x, superpixels=False))


def test_adaptive_rows_come_with_the_other_attacks(model: Classifier, drawn: Drawn) -> None:
    from captum_robust.attacks import PGD

    result = compare(
        model,
        drawn,
        {"network": masking(model)},
        {"pgd 2/255": PGD(model, 2 / 255, steps=2)},
        adaptive=True,
        limit=2,
        progress=False,
    )
    assert result.failures().empty
    assert "explanation 2/255" in set(result.table()["attack"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda m: masking(m), lambda m: masking(m, confidence=2.0)),
        (lambda m: masking(m), lambda m: RealTimeMasking(MaskingNetwork(m))),
        (lambda m: IterativeMask(m, steps=3), lambda m: IterativeMask(m, steps=4)),
        (
            lambda m: IterativeMask(m, steps=3),
            lambda m: IterativeMask(m, steps=3, objective=CodeObjective(area=5.0)),
        ),
        (lambda m: localization(m), lambda m: localization(m, seed=4)),
        (lambda m: localization(m), lambda m: localization(m, n_segments=30)),
    ],
    ids=["confidence", "weights", "steps", "objective", "localization", "segments"],
)
def test_other_masks_are_another_run(drawn: Drawn, tmp_path: Path, one: Any, other: Any) -> None:
    model = make_classifier()
    run: dict[str, Any] = {"out": tmp_path / "run", "limit": 1, "progress": False}
    compare(model, drawn, {"mask": one(model)}, **run)
    compare(model, drawn, {"mask": one(model)}, **run)
    with pytest.raises(ValueError, match=r"holds another run .*methods\.mask"):
        compare(model, drawn, {"mask": other(model)}, **run)
