"""``compare(faithfulness=True)``: the rows, the columns, the page, and runs that go on."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from torch import nn
from torch.nn import functional as F

from captum_robust.benchmark import Comparison, compare
from captum_robust.data import Sample, resize
from captum_robust.metrics.functional import (
    bootstrap_interval,
    center_box_map,
    infidelity,
    model_randomization,
    road,
    sensitivity,
)
from captum_robust.metrics.functional.regions import blurred_images
from captum_robust.models import Classifier
from captum_robust.runs.store import RunStore, unpack

from .conftest import Drawn, centre_heat
from .test_report import Page


def noisy_heat(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=1) + torch.rand(images.shape[2:])


def turned(images: torch.Tensor, _: torch.Tensor, *, turns: int) -> torch.Tensor:
    return images.mean(dim=1).roll(3 * turns, dims=2)


METHODS = {"bright": centre_heat, "box": "center_box"}
AREAS = ("deletion", "insertion")
MEASURED = (
    *("removal", "road", "infidelity", "sensitivity"),
    *("randomized_spearman", "randomized_ssim"),
)
"""Columns of the rows."""


@pytest.fixture
def result(model: Classifier) -> Comparison:
    return compare(model, Drawn(n=7), METHODS, faithfulness=True, progress=False)


def areas_by_hand(model: Classifier, sample: Sample, heat: torch.Tensor) -> tuple[float, float]:
    """Both areas over the 1024 pixels of an image, 32 at a step, one image at a time."""
    image = sample.image
    order = heat.flatten().argsort(descending=True, stable=True)
    mean = image.mean(dim=(1, 2), keepdim=True).expand_as(image)
    blurred = blurred_images(image[None])[0]
    curves: tuple[list[float], list[float]] = ([], [])
    for step in range(33):
        largest = torch.zeros(1024, dtype=torch.bool)
        largest[order[: 32 * step]] = True
        largest = largest.view(32, 32)
        shown = torch.where(largest, mean, image), torch.where(largest, image, blurred)
        for curve, x in zip(curves, shown, strict=True):
            with torch.no_grad():
                curve.append(F.softmax(model(x[None]), dim=1)[0, sample.label].item())
    deletion, insertion = ((sum(c) - (c[0] + c[-1]) / 2) / 32 for c in curves)
    return deletion, insertion


def test_areas_are_those_of_the_map_of_the_fitted_image(
    model: Classifier, result: Comparison
) -> None:
    samples = [resize(Drawn(n=7)[i], (32, 32)) for i in range(7)]
    heats = {
        "bright": [centre_heat(s.image[None], torch.zeros(1))[0] for s in samples],
        "box": list(center_box_map(7, (32, 32))),
    }
    frame = result.to_dataframe()
    table = result.table().set_index("method")
    for method, maps in heats.items():
        expected = [areas_by_hand(model, s, m) for s, m in zip(samples, maps, strict=True)]
        for name, each in zip(AREAS, zip(*expected, strict=True), strict=True):
            rows = frame[frame["method"] == method]
            assert rows[name].tolist() == pytest.approx(list(each), abs=1e-5)
            interval = bootstrap_interval(torch.tensor(each))
            found = [table.loc[method, n] for n in (name, f"{name}_low", f"{name}_high")]
            assert found == pytest.approx([interval.mean, interval.low, interval.high], abs=1e-5)


def test_infidelity_is_that_of_the_map_and_all_methods_share_its_passes(
    model: Classifier, result: Comparison
) -> None:
    samples = [resize(Drawn(n=7)[i], (32, 32)) for i in range(7)]
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])
    heats = {"bright": centre_heat(images, labels), "box": center_box_map(7, (32, 32))}
    frame, table = result.to_dataframe(), result.table().set_index("method")
    for method, maps in heats.items():
        each = infidelity(model, images, maps, labels)
        rows = frame[frame["method"] == method]
        assert rows["infidelity"].tolist() == pytest.approx(each.tolist(), abs=1e-5)
        interval = bootstrap_interval(each)
        found = [table.loc[method, f"infidelity{end}"] for end in ("", "_low", "_high")]
        assert found == pytest.approx([interval.mean, interval.low, interval.high], abs=1e-5)
    shown: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, x: shown.append(len(x[0])))
    compare(model, Drawn(n=7), METHODS, faithfulness=True, progress=False)
    handle.remove()
    # The images themselves; both curves and ROAD of each method; each square, and none, once.
    # Before them one image, to count the scores.
    assert sum(shown) == 7 * (1 + 2 * (65 + 10) + 33) + 1


def test_road_is_that_of_the_map(model: Classifier, result: Comparison) -> None:
    samples = [resize(Drawn(n=7)[i], (32, 32)) for i in range(7)]
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])
    heats = {"bright": centre_heat(images, labels), "box": center_box_map(7, (32, 32))}
    frame, table, curves = result.to_dataframe(), result.table(), result._tables().removal
    for method, maps in heats.items():
        shares = [0.1, 0.3, 0.5, 0.7, 0.9]
        expected = road(model, images, maps, labels, shares=shares)
        each = frame[frame["method"] == method]["road"]
        assert each.tolist() == pytest.approx(expected.combined.tolist(), abs=1e-5)
        row = table.set_index("method").loc[method]
        interval = bootstrap_interval(expected.combined)
        found = [row[name] for name in ("road", "road_low", "road_high")]
        assert found == pytest.approx([interval.mean, interval.low, interval.high], abs=1e-5)
        for name, probability in (("most", expected.most), ("least", expected.least)):
            one = curves[(curves["method"] == method) & (curves["curve"] == f"road_{name}")]
            assert one["share"].tolist() == pytest.approx(shares)
            mean = probability.mean(dim=0).tolist()
            assert one["probability"].tolist() == pytest.approx(mean, abs=1e-5)


def test_randomization_is_that_of_the_method_and_leaves_the_classifier_as_it_was(
    model: Classifier,
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    methods = {"saliency": "saliency", "box": "center_box"}
    result = compare(model, Drawn(n=5), methods, randomization=True, progress=False)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    samples = [resize(Drawn(n=5)[i], (32, 32)) for i in range(5)]
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])

    def explain(x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return Saliency(model).attribute(x, classes).sum(dim=1)

    same = model_randomization(model, explain, images, labels, stages=3)
    frame, table = result.to_dataframe(), result.table().set_index("method")
    for name, values in (("spearman", same.spearman), ("ssim", same.ssim)):
        found = frame[frame["method"] == "saliency"][f"randomized_{name}"]
        assert found.tolist() == pytest.approx(values.mean(dim=0).tolist(), abs=1e-4)
        assert table.loc["saliency", f"randomized_{name}"] == pytest.approx(found.mean())
        assert found.mean() < 0.9
        assert table.loc["box", f"randomized_{name}"] == pytest.approx(1, abs=1e-4)  # of no model
    assert "randomized: how far the map is the same" in result.to_text()
    assert table.loc["saliency", "backward"] == 1  # its own passes alone
    plain = compare(model, Drawn(n=5), methods, progress=False).table()
    assert table["error"].tolist() == plain["error"].tolist()


def test_a_model_that_is_too_small_for_the_randomization_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for size, layers in ((32, net), (8, nn.Sequential(net, nn.Linear(2, 2), nn.Linear(2, 2)))):
        small = Classifier(layers, input_size=(size, size))
        with pytest.raises(ValueError, match="randomization: expected a classifier with an input"):
            compare(small, Drawn(), METHODS, randomization=True, progress=False)


def test_sensitivity_is_that_of_the_method(model: Classifier) -> None:
    methods = {"noise": noisy_heat, "saliency": "saliency", "box": "center_box"}
    given: dict[str, Any] = {"progress": False, "batch_size": 3}
    result = compare(model, Drawn(n=5), methods, sensitivity=True, **given)
    samples = [resize(Drawn(n=5)[i], (32, 32)) for i in range(5)]
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])

    def explain(x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        # What the catalogue makes of Captum's attribution, without the noise's own draws.
        return Saliency(model).attribute(x, classes).sum(dim=1)

    frame, table = result.to_dataframe(), result.table().set_index("method")
    found = frame[frame["method"] == "saliency"]["sensitivity"]
    assert found.tolist() == pytest.approx(sensitivity(explain, images, labels).tolist(), rel=1e-3)
    assert table.loc["saliency", "sensitivity"] == pytest.approx(found.mean())
    # A method that draws meets the same draws: only the images differ.
    assert table.loc["noise", "sensitivity"] < 0.1
    assert table.loc["box", "sensitivity"] == 0
    assert "sensitivity: how far noise" in result.to_text()
    assert table.loc["saliency", "backward"] == 1  # its own passes alone
    assert "deletion" not in table


def test_text_and_page_say_what_the_table_says(result: Comparison, tmp_path: Path) -> None:
    table, text = result.table().set_index("method"), result.to_text()
    page = Page(result.to_html(tmp_path / "report.html"))
    assert "area under the probability of the class" in text
    assert "Whether the class goes and comes with the map" in page.text
    for name in AREAS:
        shown = table.loc["bright"]
        assert f"{shown[name]:.3f} [{shown[f'{name}_low']:.3f}, " in text
        ends = f"{shown[f'{name}_low']:.2f} to {shown[f'{name}_high']:.2f}"
        (row,) = [row for row in page.rows if row and row[0] == "bright"]
        assert f"{shown[name]:.3f}{ends}" in row
        assert f"Areas below the curves of {name}: " in (tmp_path / "report.html").read_text()
    assert "road: probability of the class without the smallest pixels" in text
    assert "ROAD, largest first" in page.text
    assert (
        f"ROAD: bright {table.loc['bright', 'road']:.3f}" in (tmp_path / "report.html").read_text()
    )


def test_the_curves_are_means_over_the_images(result: Comparison) -> None:
    rows = result.select("SELECT removal FROM results WHERE method = 'bright'")
    each = torch.stack([torch.tensor(unpack(r["removal"])).view(3, 33) for r in rows])
    curves = result._tables().removal
    for i, name in enumerate(AREAS):
        one = curves[(curves["method"] == "bright") & (curves["curve"] == name)]
        assert one["share"].tolist() == pytest.approx([step / 32 for step in range(33)])
        assert one["probability"].tolist() == pytest.approx(each[:, i + 1].mean(dim=0).tolist())


def test_a_run_without_it_says_nothing_of_it_and_is_another(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    result = compare(model, drawn, METHODS, out=tmp_path / "run", progress=False)
    for columns in (result.table(), result.to_dataframe()):
        assert not {*AREAS, "deletion_low"} & set(columns)
    assert "deletion" not in result.to_text()
    page = Page(result.to_html(tmp_path / "report.html"))
    assert "Whether the class goes" not in page.text
    with pytest.raises(ValueError, match=r"settings\.faithfulness.*\(none\) there"):
        compare(model, drawn, METHODS, out=tmp_path / "run", faithfulness=True, progress=False)


def test_a_run_of_a_version_without_road_is_read_and_not_gone_on_with(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"out": tmp_path, "faithfulness": True, "progress": False}
    compare(model, drawn, METHODS, **given)._store.close()
    described = tmp_path / "run.json"
    facts = json.loads(described.read_text("utf-8"))
    del facts["settings"]["faithfulness"]["road"]
    described.write_text(json.dumps(facts), encoding="utf-8")
    with sqlite3.connect(tmp_path / "rows.sqlite") as database:
        database.execute("ALTER TABLE results DROP COLUMN road")
    database.close()
    old = Comparison(tmp_path)
    assert "road" not in old.table()
    assert old.table()["deletion"].notna().all()
    old.to_html(tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"settings\.faithfulness\.road.*\(none\) there"):
        compare(model, drawn, METHODS, **given)


def test_a_run_of_an_earlier_version_is_read_as_before(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    before = compare(model, drawn, METHODS, out=tmp_path, progress=False).table()
    database = sqlite3.connect(tmp_path / "rows.sqlite")
    for column in MEASURED:
        database.execute(f"ALTER TABLE results DROP COLUMN {column}")
    database.commit()
    database.close()
    assert Comparison(tmp_path).table().equals(before)


def test_only_clean_images_are_measured_and_passes_are_the_methods_own(
    model: Classifier, drawn: Drawn
) -> None:
    attacks = {"invert": lambda x, _: 1 - x}
    methods = ["saliency", "center_box"]
    table = compare(model, drawn, methods, attacks, faithfulness=True, progress=False).table()
    clean = table[table["attack"] == "clean"]
    assert clean["deletion"].notna().all()
    assert table.loc[table["attack"] != "clean", "deletion"].isna().all()
    assert clean.set_index("method")["forward"].to_dict() == {"saliency": 1, "center_box": 0}


def test_an_interrupted_run_goes_on_and_ends_with_the_same_curves(
    model: Classifier, tmp_path: Path
) -> None:
    class Interrupted(Drawn):
        def __getitem__(self, index: int) -> Sample:
            if index >= 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    given: dict[str, Any] = {"batch_size": 2, "progress": False}
    given |= {"faithfulness": True, "sensitivity": True, "randomization": True}
    whole = compare(model, Drawn(), METHODS, out=tmp_path / "a", **given)
    with pytest.raises(KeyboardInterrupt):
        compare(model, Interrupted(), METHODS, out=tmp_path / "b", **given)
    again = compare(model, Drawn(), METHODS, out=tmp_path / "b", **given)
    query = f"SELECT position, method, {', '.join(MEASURED)} FROM results ORDER BY position, method"
    assert whole.select(query) == again.select(query)


def test_curves_of_another_form_are_refused(model: Classifier, tmp_path: Path) -> None:
    result = compare(model, Drawn(2), METHODS, out=tmp_path, faithfulness=True, progress=False)
    result._store.close()
    store = RunStore(tmp_path)
    with store._transaction() as database:
        database.execute("UPDATE results SET removal = ious WHERE position = 1")
    with pytest.raises(ValueError, match="removal: expected three values a step, got others"):
        Comparison(tmp_path).table()
