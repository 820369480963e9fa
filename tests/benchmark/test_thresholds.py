"""How a threshold is chosen: on the other half, before, or on boxes that methods agree on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from captum_robust.benchmark import Comparison, compare
from captum_robust.catalog import methods as known
from captum_robust.catalog import thresholds
from captum_robust.catalog.thresholds import Threshold, shipped_threshold
from captum_robust.data import Sample, load_dataset
from captum_robust.metrics.functional import best_iou, largest_component, mask_to_box
from captum_robust.models import Classifier, load_classifier
from captum_robust.report import scoring
from captum_robust.report.pseudo_boxes import agreed_boxes
from captum_robust.show.explain import explain_image
from tests.benchmark.conftest import Drawn, centre_heat


class Unboxed(Drawn):
    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), boxes=torch.zeros(0, 4))


def blurry(images: Tensor, _: Tensor | None) -> Tensor:
    return torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 9, 1, 4)[:, 0]


def soft(images: Tensor, _: Tensor | None) -> Tensor:
    return images[:, 0] ** 0.5


METHODS = {"robust_cam": "robust_cam", "bright": centre_heat, "blurry": blurry, "soft": soft}


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Threshold:
    """That of ``robust_cam``, whatever the file says."""
    one = {"strategy": "energy", "alpha": 0.35}
    monkeypatch.setattr(thresholds, "shipped_facts", lambda: {"methods": {"robust_cam": one}})
    return Threshold("energy", 0.35, True)


@pytest.mark.parametrize(("n", "way"), [(49, "shipped"), (50, "two-fold")])
def test_few_images_are_scored_at_the_thresholds_that_ship(
    model: Classifier, shipped: Threshold, n: int, way: str
) -> None:
    result = compare(model, Drawn(n=n), METHODS, progress=False)
    table = result.table().set_index("method")
    assert table.loc["robust_cam", "tuned"] == way
    assert table.loc["bright", "tuned"] == ("usual" if way == "shipped" else way)
    if way == "shipped":
        assert table.loc["robust_cam", "threshold"] == str(shipped) == "energy 0.35"
        assert table.loc["bright", "threshold"] == "value 0.2"
        text = result.to_text()
        assert "as they ship for each method" in text
        assert "at a fifth of the map's range, where none ships" in text
    assert set(result.table(thresholds="shipped")["tuned"]) == {"shipped", "usual"}
    assert set(result.table(thresholds="two-fold")["tuned"]) == {"two-fold"}
    assert set(result.table(strategies=["value"])["tuned"]) == {"two-fold"}


def test_the_boxes_of_the_shipped_threshold_are_the_ones_of_explain_and_of_the_table(
    model: Classifier, shipped: Threshold
) -> None:
    result = compare(model, Drawn(n=4, size=(32, 32)), ["robust_cam"], progress=False)
    frame = result.to_dataframe()
    method = known.build_methods(model, ["robust_cam"])["robust_cam"]
    assert method.threshold == shipped
    for i, row in frame.iterrows():
        sample = Drawn(n=4, size=(32, 32))[int(str(i))]
        maps = method.explain(sample.image[None], torch.tensor([sample.label])).maps
        box = mask_to_box(largest_component(shipped.kept(maps)))
        assert row[["x0", "y0", "x1", "y1"]].tolist() == box[0].tolist()
        assert row["iou"] == pytest.approx(best_iou(box[:, None], [sample.boxes]).item())


@pytest.mark.data
def test_thresholds_that_ship_suit_a_larger_classifier_too(real_data: Path, tmp_path: Path) -> None:
    model = load_classifier("efficientnet_lite2")
    data = load_dataset("imagenet", real_data / "imagenet-val-400")
    kinds = ["robust_cam", "grad_cam"]
    result = compare(model, data, kinds, limit=64, out=tmp_path / "run", progress=False)
    errors = {
        way: result.table(thresholds=way).set_index("method")["error"]
        for way in ("shipped", "two-fold")
    }
    # Those chosen on EfficientNet-Lite0 alone were .2 worse.
    assert (errors["shipped"] - errors["two-fold"]).max() <= 0.08


def test_a_run_of_one_image_of_an_unknown_way_is_refused(model: Classifier) -> None:
    result = compare(model, Drawn(n=3), ["robust_cam"], progress=False)
    with pytest.raises(ValueError, match=r"thresholds.*pseudo"):
        result.table(thresholds="guess")


def test_of_agreed_boxes_the_one_nearest_to_all_is_taken() -> None:
    boxes = torch.tensor(
        [
            [[0.0, 0, 10, 10], [0.0, 0, 9, 10], [0.0, 0, 8, 10], [20.0, 20, 30, 30]],
            [[5.0, 5, 9, 9], [0.0, 0, 3, 3], [5.0, 5, 9, 8], [5.0, 5, 9, 8]],
        ]
    )
    assert agreed_boxes(boxes).tolist() == [[0, 0, 9, 10], [5, 5, 9, 8]]
    with pytest.raises(ValueError, match="at least 2 other methods, got those of 1"):
        agreed_boxes(boxes[:, :1])
    with pytest.raises(ValueError, match="expected N×M×4"):
        agreed_boxes(boxes[0])


@pytest.mark.parametrize("kind", [Drawn, Unboxed])
def test_pseudo_boxes_choose_a_threshold_without_a_true_box(
    model: Classifier, kind: type[Drawn], shipped: Threshold
) -> None:
    result = compare(model, kind(n=12), METHODS, progress=False)
    table = result.table(thresholds="pseudo").set_index("method")
    assert set(table["tuned"]) == {"pseudo"}
    assert ("error" in table) == (kind is Drawn)
    with_boxes = compare(model, Drawn(n=12), METHODS, progress=False)
    same = with_boxes.table(thresholds="pseudo").set_index("method")
    assert table["threshold"].to_dict() == same["threshold"].to_dict()
    # By hand: the boxes of the others at their thresholds, and of "soft" at all.
    others = [result._scoring._pseudo_threshold(m, "clean") for m in ("bright", "blurry")]
    assert all(other.strategy in ("value", "mean", "energy", "percentile") for other in others)
    assert not any(other.is_shipped for other in others)


def test_pseudo_boxes_need_other_methods(model: Classifier) -> None:
    result = compare(model, Drawn(n=4), ["robust_cam", "saliency", "center_box"], progress=False)
    with pytest.raises(ValueError, match=r"^thresholds: .*at least 2 methods beside .* got 1"):
        result.table(thresholds="pseudo")


def test_explain_draws_at_the_shipped_threshold_unless_told(
    model: Classifier, shipped: Threshold, tmp_path: Path
) -> None:
    from captum_robust.draw import as_rgb, encode_png

    sample = Drawn()[0]
    (tmp_path / "a.png").write_bytes(encode_png(as_rgb(sample.image)))
    methods = known.build_methods(model, ["robust_cam"])

    def box(**options: float) -> list[float]:
        said = explain_image(model, tmp_path / "a.png", methods, tmp_path / "b.png", **options)  # type: ignore[arg-type]
        heat = said.maps["robust_cam"]
        scale = torch.tensor([48 / 32, 40 / 32] * 2)
        one = Threshold("value", options["threshold"]) if options else shipped
        assert said.boxes["robust_cam"] == (one.boxes(heat[None])[0] * scale).tolist()
        return said.boxes["robust_cam"]

    assert box() != box(threshold=0.9)
    assert shipped_threshold("robust_cam") == shipped


def test_the_best_crop_is_the_best_of_each_image(model: Classifier) -> None:
    result = compare(
        model, Drawn(n=6), {"bright": centre_heat}, saliency_metric=True, progress=False
    )
    rows = result.select("SELECT crops FROM results")
    each = []
    for row in rows:
        area, log_p = torch.from_numpy(scoring.unpack(row["crops"]).copy()).reshape(2, -1).double()
        each.append((area.clamp(min=0.05).log() - log_p).min())
    table = result.saliency_table().set_index("method")
    assert table.loc["bright", "best_crop"] == pytest.approx(torch.stack(each).mean().item())
    assert table.loc["bright", "best_crop"] <= table.loc["bright", "saliency"]
    assert "best crop" in result.to_text()


def test_the_report_of_a_run_without_boxes_says_nothing_of_them(
    model: Classifier, tmp_path: Path
) -> None:
    result = compare(model, Unboxed(n=3), METHODS, progress=False)
    page = Comparison(result.folder).to_html(tmp_path / "r.html", thresholds="pseudo")
    assert "pseudo" in page.read_text("utf-8")
