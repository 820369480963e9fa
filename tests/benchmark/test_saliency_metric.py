"""``compare(saliency_metric=True)``: the rows, the halves, the table, the page."""

from __future__ import annotations

import math
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_robust.benchmark import Comparison, compare
from captum_robust.data import Sample, resize
from captum_robust.metrics.functional import (
    SALIENCY_THRESHOLDS,
    center_box,
    mask_to_box,
    split_folds,
    threshold,
)
from captum_robust.models import Classifier
from captum_robust.runs.store import unpack

from .conftest import Drawn, centre_heat
from .test_report import Page

METHODS = {"bright": centre_heat, "box": "center_box", "all": "whole_image"}
TRIED = [(family, alpha) for family, alphas in SALIENCY_THRESHOLDS.items() for alpha in alphas]


@pytest.fixture
def result(model: Classifier) -> Comparison:
    return compare(model, Drawn(n=9), METHODS, saliency_metric=True, progress=False)


def cropped(model: Classifier, image: Tensor, box: Tensor, label: int) -> tuple[float, float]:
    """Area and log probability of one crop, sliced and resized by torch."""
    x0, y0, x1, y1 = (int(v) for v in box.round())
    crop = F.interpolate(
        image[None, :, y0:y1, x0:x1],
        (32, 32),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    with torch.no_grad():
        log_p = model(crop)[0].log_softmax(dim=0)[label].item()
    return (x1 - x0) * (y1 - y0) / 32**2, log_p


def test_crops_are_those_of_the_thresholded_map_of_the_fitted_image(
    model: Classifier, result: Comparison
) -> None:
    stored = result.select("SELECT * FROM results WHERE method = 'bright' ORDER BY position")
    for i, row in enumerate(stored):
        sample = resize(Drawn(n=9)[i], (32, 32))
        heat = centre_heat(sample.image[None], torch.zeros(1))
        area, log_p = unpack(row["crops"]).reshape(2, -1)
        for column, (family, alpha) in enumerate(TRIED):
            box = mask_to_box(threshold(heat, family, alpha))[0]
            expected = cropped(model, sample.image, box, i % 4)
            assert (area[column], log_p[column]) == pytest.approx(expected, abs=1e-5)


def test_each_half_has_the_threshold_with_the_best_mean_of_the_other(result: Comparison) -> None:
    stored = result.select("SELECT crops FROM results WHERE method = 'bright' ORDER BY position")
    values = []
    for row in stored:
        area, log_p = torch.from_numpy(unpack(row["crops"]).copy()).reshape(2, -1).double()
        values.append(area.clamp(min=0.05).log() - log_p)
    each = torch.stack(values)
    folds = split_folds([f"{i}.png" for i in range(9)])
    assert folds.bincount().min() > 0
    expected = torch.zeros(9, dtype=torch.float64)
    for fold in (0, 1):
        best = each[folds != fold].mean(dim=0).argmin()
        expected[folds == fold] = each[folds == fold, best]
    table = result.saliency_table().set_index("method")
    assert table.loc["bright", "saliency"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert table.loc["bright", "tuned"] == "two-fold"
    assert table.loc["bright", "low"] <= expected.mean() <= table.loc["bright", "high"]
    oracle = result.saliency_table(oracle=True).set_index("method")
    assert oracle.loc["bright", "saliency"] == pytest.approx(
        each.mean(dim=0).min().item(), abs=1e-5
    )
    assert oracle.loc["bright", "tuned"] == "oracle"
    frame = result.to_dataframe()
    bright = frame[frame["method"] == "bright"]
    assert bright["saliency"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    again = bright["crop_area"].clip(lower=0.05).map(math.log)
    again -= bright["crop_probability"].map(math.log)
    assert again.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_boxes_that_are_fixed_and_the_true_box_are_rows_with_nothing_to_choose(
    model: Classifier, result: Comparison
) -> None:
    table = result.saliency_table().set_index("method")
    assert set(table.index) == {*METHODS, "true box"}
    samples = [resize(Drawn(n=9)[i], (32, 32)) for i in range(9)]
    boxes = {
        "box": [center_box((32, 32))] * 9,
        "all": [torch.tensor([0.0, 0.0, 32.0, 32.0])] * 9,
        "true box": [s.boxes[0] for s in samples],
    }
    for name, each in boxes.items():
        crops = torch.tensor(
            [cropped(model, samples[i].image, box, i % 4) for i, box in enumerate(each)]
        )
        metric = (crops[:, 0].clamp(min=0.05).log() - crops[:, 1]).mean().item()
        assert table.loc[name, "saliency"] == pytest.approx(metric, abs=1e-5), name
        assert table.loc[name, "area"] == pytest.approx(crops[:, 0].mean().item())
        assert table.loc[name, "probability"] == pytest.approx(crops[:, 1].exp().mean().item())
        assert tuple(table.loc[name, ["n", "tuned", "threshold"]]) == (9, "-", "-")


def test_of_several_true_boxes_the_largest_counts(model: Classifier) -> None:
    sample = resize(Drawn()[0], (32, 32))
    two = replace(sample, boxes=torch.tensor([[1.0, 2.0, 5.0, 6.0], [3.0, 3.0, 30.0, 20.0]]))
    result = compare(model, [two], ["whole_image"], saliency_metric=True, progress=False)
    table = result.saliency_table().set_index("method")
    expected = cropped(model, sample.image, two.boxes[1], 0)
    assert table.loc["true box", "area"] == pytest.approx(expected[0])


def test_images_without_a_box_have_the_metric_too(model: Classifier) -> None:
    class Unboxed(Drawn):
        def __getitem__(self, index: int) -> Sample:
            return replace(super().__getitem__(index), boxes=torch.zeros(0, 4), label=None)

    result = compare(model, Unboxed(n=4), METHODS, saliency_metric=True, progress=False)
    table = result.saliency_table()
    assert table["n"].tolist() == [4, 4, 4]
    assert result.table()["saliency"].notna().all()
    assert "saliency metric" in result.to_text()


def test_the_class_is_the_one_that_is_explained(model: Classifier) -> None:
    result = compare(
        model, Drawn(n=4), METHODS, target="prediction", saliency_metric=True, progress=False
    )
    frame = result.to_dataframe()
    whole = frame[frame["method"] == "all"]
    assert whole["crop_probability"].tolist() == pytest.approx(whole["confidence"].tolist())


def test_tables_say_one_thing(result: Comparison) -> None:
    alone = result.saliency_table().set_index("method")
    table = result.table().set_index("method")
    for method in METHODS:
        assert table.loc[method, "saliency_n"] == 9
        for column, other in (("saliency", "saliency"), ("saliency_low", "low")):
            assert table.loc[method, column] == alone.loc[method, other]
    text = result.to_text()
    for method in (*METHODS, "true box"):
        assert f"{alone.loc[method, 'saliency']:.3f} [" in text


def test_the_page_shows_the_metric_and_the_true_box(result: Comparison, tmp_path: Path) -> None:
    page = Page(result.to_html(tmp_path / "report.html"))
    alone = result.saliency_table().set_index("method")
    assert "How small a crop the class survives" in page.text
    (row,) = [row for row in page.rows if row and row[0] == "true box baseline"]
    shown = alone.loc["true box"]
    low, high = f"{shown['low']:.2f}", f"{shown['high']:.2f}"
    assert row[1] == f"{shown['saliency']:.3f}{low} to {high}"
    shares = [f"{100 * shown[name]:.1f}" for name in ("area", "probability")]
    assert row[2:] == [*shares, f"{shown['best_crop']:.3f}", "9", "–"]
    of_methods = [row[0].replace(" baseline", "") for row in page.rows if row and row[-1] == "–"]
    assert {"box", "all"} <= set(of_methods)


def test_a_run_without_it_says_nothing_of_it(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    result = compare(model, drawn, METHODS, out=tmp_path / "run", progress=False)
    assert result.saliency_table().empty
    assert "saliency" not in result.table()
    assert "saliency" not in result.to_dataframe()
    assert "saliency metric" not in result.to_text()
    page = Page(result.to_html(tmp_path / "report.html"))
    assert "How small a crop" not in page.text
    with pytest.raises(ValueError, match=r"settings\.saliency_metric.*\(none\) there"):
        compare(model, drawn, METHODS, out=tmp_path / "run", saliency_metric=True, progress=False)


def test_only_clean_images_are_measured(model: Classifier, drawn: Drawn) -> None:
    attacks = {"invert": lambda x, _: 1 - x}
    result = compare(model, drawn, METHODS, attacks, saliency_metric=True, progress=False)
    table = result.table()
    assert table.loc[table["attack"] == "clean", "saliency"].notna().all()
    assert table.loc[table["attack"] != "clean", "saliency"].isna().all()
    assert "saliency metric" in result.to_text()


def test_the_passes_of_a_method_are_its_own(model: Classifier, drawn: Drawn) -> None:
    methods = ["saliency", "center_box"]
    table = compare(model, drawn, methods, saliency_metric=True, progress=False).table()
    assert table.set_index("method")["forward"].to_dict() == {"saliency": 1, "center_box": 0}


def rows(result: Comparison) -> list[dict[str, Any]]:
    return result.select("SELECT position, method, crops FROM results ORDER BY position, method")


def test_an_interrupted_run_goes_on_and_ends_with_the_same_crops(
    model: Classifier, tmp_path: Path
) -> None:
    class Interrupted(Drawn):
        def __getitem__(self, index: int) -> Sample:
            if index >= 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    whole = compare(
        model,
        Drawn(),
        METHODS,
        batch_size=2,
        out=tmp_path / "a",
        saliency_metric=True,
        progress=False,
    )
    arguments: Any = {"batch_size": 2, "out": tmp_path / "b", "saliency_metric": True}
    with pytest.raises(KeyboardInterrupt):
        compare(model, Interrupted(), METHODS, progress=False, **arguments)
    database = sqlite3.connect(tmp_path / "b" / "rows.sqlite")
    database.execute("DELETE FROM results WHERE method = 'bright' AND position < 2")
    database.commit()
    database.close()
    again = compare(model, Drawn(), METHODS, progress=False, **arguments)
    assert rows(whole) == rows(again)
    pd.testing.assert_frame_equal(whole.saliency_table(), again.saliency_table())


def test_a_broken_image_has_no_crop(model: Classifier) -> None:
    data = Drawn(n=5, broken=[1])
    result = compare(model, data, METHODS, saliency_metric=True, progress=False)
    assert result.saliency_table()["n"].tolist() == [4] * 4


def test_an_image_whose_true_box_is_outside_of_it_is_left_out(model: Classifier) -> None:
    class Outside(Drawn):
        def __getitem__(self, index: int) -> Sample:
            sample = resize(super().__getitem__(index), (32, 32))
            far = torch.tensor([[40.0, 40.0, 50.0, 50.0]])
            return replace(sample, boxes=far) if index else sample

    result = compare(model, Outside(2), METHODS, saliency_metric=True, progress=False)
    table = result.saliency_table().set_index("method")
    assert table["n"].to_dict() == {"bright": 1, "box": 1, "all": 1, "true box": 1}
    assert "lies outside the image of 32×32 pixels" in result.failures()["error"][0]
