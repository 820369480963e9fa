from __future__ import annotations

import re
import sqlite3
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from PIL import Image
from torch import Tensor, nn

from captum_robust.attacks import FGSM
from captum_robust.benchmark import METHODS, Comparison, RunWarning, compare
from captum_robust.benchmark.passes import count_passes
from captum_robust.catalog.methods import SLOW, WITH_NETWORK, heat_map
from captum_robust.data import DataError, Sample, resize
from captum_robust.data.dataset import LocalizationDataset
from captum_robust.metrics import LocalizationError
from captum_robust.metrics.functional import alpha_grid, best_iou, split_folds, sweep_boxes
from captum_robust.metrics.functional.weak_localization import best_columns
from captum_robust.models import Classifier
from captum_robust.report.results import STRATEGY_ORDER, Tuning
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow
from captum_robust.runs.store import RunStore, unpack

from .conftest import Drawn, centre_heat, make_classifier

CHEAP = ["robust_cam", "saliency", "smooth_grad", "center_box", "whole_image", "random"]


def rows(comparison: Comparison) -> pd.DataFrame:
    """All that a run says but the time it took."""
    frame = pd.DataFrame(comparison.select("SELECT * FROM results ORDER BY position, method"))
    return frame.drop(columns=["seconds"])


def test_every_method_gives_one_row_an_image(model: Classifier, drawn: Drawn) -> None:
    result = compare(model, drawn, progress=False)
    # Slow; not trained for it.
    methods = set(METHODS) - {*SLOW, *WITH_NETWORK, "adversarial_localization"}
    frame = rows(result)
    assert len(frame) == 6 * len(methods)
    assert frame["error"].isna().all(), frame["error"].dropna().unique()
    assert set(frame["method"]) == methods
    table = result.table()
    assert list(table["n"]) == [6] * len(methods)
    assert table["error"].between(table["error_low"], table["error_high"]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_another_precision_is_compared(drawn: Drawn, dtype: torch.dtype) -> None:
    expected = rows(compare(make_classifier(), drawn, ["robust_cam", "saliency"], progress=False))
    for model in (
        make_classifier().to(dtype),
        Classifier(make_classifier().module.to(dtype), (0.5,) * 3, (0.5,) * 3, 32),
    ):
        frame = rows(compare(model, drawn, ["robust_cam", "saliency"], progress=False))
        assert frame["error"].isna().all()
        assert (frame["predicted"] == expected["predicted"]).all()
        np.testing.assert_allclose(frame["confidence"], expected["confidence"], rtol=0.02)


def test_a_model_of_one_channel_sees_photographs_in_grey(drawn: Drawn, tmp_path: Path) -> None:
    coloured = make_classifier()
    first = coloured.module[0]
    grey = nn.Conv2d(1, 8, 5, stride=2, padding=2)
    grey.load_state_dict({**first.state_dict(), "weight": first.weight.data.sum(1, keepdim=True)})
    model = Classifier(nn.Sequential(grey, *coloured.module[1:]), [0.5], [0.5], 32).eval()
    names = sorted(set(METHODS) - {"iterative_mask", *WITH_NETWORK, "adversarial_localization"})
    attacks = {"fgsm": FGSM(model, epsilon=0.02)}
    attacked = compare(model, drawn, ["robust_cam"], attacks, out=tmp_path, progress=False)
    assert attacked.to_html(tmp_path / "page.html")
    frame = rows(compare(model, drawn, names, progress=False))
    for errors in (rows(attacked)["error"], frame["error"]):
        assert errors.isna().all(), errors.dropna().unique()

    # The same network on three equal channels of the grey that Pillow makes, in 8 bits.
    @dataclass
    class InGrey(Drawn):
        def __getitem__(self, index: int) -> Sample:
            sample = resize(super().__getitem__(index), (32, 32))
            pixels = sample.image.mul(255).round().byte().permute(1, 2, 0).numpy()
            luminance = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L")))
            return replace(sample, image=luminance.div(255).expand(3, -1, -1))

    expected = rows(compare(coloured, InGrey(), ["robust_cam"], progress=False))
    of_cam = frame[(frame["method"] == "robust_cam") & (frame["attack"] == "clean")]
    np.testing.assert_allclose(of_cam["confidence"], expected["confidence"], atol=2e-3)


def test_a_model_of_five_channels_is_refused(drawn: Drawn) -> None:
    model = Classifier(nn.Sequential(nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(ValueError, match="model: expected one of 1 or 3 channels, got one of 5"):
        compare(model, drawn, {"bright": centre_heat}, progress=False)


def test_overlaps_are_those_of_the_metrics_on_the_resized_image(
    model: Classifier, drawn: Drawn
) -> None:
    result = compare(model, drawn, {"bright": centre_heat}, progress=False)
    stored = result.select("SELECT ious FROM results ORDER BY position")
    for i, row in enumerate(stored):
        sample = resize(drawn[i], (32, 32))
        boxes = sweep_boxes(sample.image.mean(dim=0)[None], STRATEGY_ORDER)
        expected = [best_iou(boxes[s], [sample.boxes])[0] for s in STRATEGY_ORDER]
        np.testing.assert_array_equal(unpack(row["ious"]), torch.cat(expected).numpy())


def test_a_perfect_map_makes_no_error_and_a_fixed_box_keeps_its_own(
    model: Classifier, drawn: Drawn
) -> None:
    table = compare(
        model, drawn, {"bright": centre_heat, "all": "whole_image"}, progress=False
    ).table()
    by_name = table.set_index("method")
    assert by_name.loc["bright", "error"] == 0
    assert by_name.loc["bright", "pointing"] == 1
    # The whole image overlaps each box by 18·22 / (40·48) = .206
    assert by_name.loc["all", "error"] == 1
    assert by_name.loc["all", "threshold"] == "-"


def test_passes_are_counted_for_each_image(model: Classifier, drawn: Drawn) -> None:
    methods = ["robust_cam", "grad_cam", "saliency", "integrated_gradients", "center_box"]
    table = compare(model, drawn, methods, progress=False).table().set_index("method")
    expected = {
        "robust_cam": (1, 0),
        "grad_cam": (1, 0),
        "saliency": (1, 1),
        "integrated_gradients": (20, 20),
        "center_box": (0, 0),
    }
    for method, passes in expected.items():
        assert tuple(table.loc[method, ["forward", "backward"]]) == passes


def test_a_broken_image_is_a_row_with_its_error_and_the_run_goes_on(model: Classifier) -> None:
    result = compare(model, Drawn(broken=[1, 4]), CHEAP, batch_size=3, progress=False)
    errors = rows(result).groupby("position")["error"].first()
    assert errors[1] == "1.png: truncated"
    assert errors.isna().tolist() == [True, False, True, True, False, True]
    assert "6 images: 2 could not be used, 0 without a box" in result.summary()
    assert list(result.failures()["image"]) == ["1.png", "4.png"]
    assert (result.table()["n"] == 4).all()
    assert (result.table()["failed"] == 2).all()


def test_a_data_set_with_nothing_usable_still_gives_a_table(model: Classifier) -> None:
    result = compare(model, Drawn(n=2, broken=[0, 1]), CHEAP, progress=False)
    assert (result.table()["n"] == 0).all()
    assert "2 could not be used" in result.summary()
    assert "robust_cam" in result.to_text()


def test_one_image_is_enough_and_is_said_to_be_tuned_on_itself(model: Classifier) -> None:
    result = compare(model, Drawn(n=1), ["saliency"], progress=False)
    assert list(result.table(thresholds="two-fold")["tuned"]) == ["oracle"]


def test_images_without_boxes_are_counted_and_not_scored(model: Classifier) -> None:
    class Unboxed(Drawn):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return Sample(sample.image, None, torch.zeros(0, 4), sample.id)

    result = compare(model, Unboxed(n=3), CHEAP, progress=False)
    assert "3 without a box" in result.summary()
    assert (result.table()["n"] == 0).all()


def test_a_label_that_the_model_has_no_class_for_is_that_images_error(model: Classifier) -> None:
    class Mislabelled(Drawn):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return Sample(sample.image, 4 if index == 1 else 0, sample.boxes, sample.id)

    result = compare(model, Mislabelled(n=3), ["saliency"], progress=False)
    assert list(result.failures()["error"]) == ["1.png: class index 4, but the model has 4 classes"]


def test_a_method_that_fails_on_one_image_fails_on_that_image_only(
    model: Classifier, drawn: Drawn
) -> None:
    poison = resize(drawn[2], (32, 32)).image

    def fragile(images: Tensor, target: Tensor) -> Tensor:
        if any(torch.equal(x, poison) for x in images):
            raise RuntimeError("no\nluck")
        return centre_heat(images, target)

    result = compare(model, drawn, {"fragile": fragile}, progress=False)
    failures = result.failures()
    assert list(failures["image"]) == ["2.png"]
    assert list(failures["error"]) == ["RuntimeError: no luck"]
    assert result.table()["n"].tolist() == [5]


def test_maps_of_nan_are_an_error_not_a_number(model: Classifier, drawn: Drawn) -> None:
    bad = {"nan": lambda x, t: x.mean(dim=1) * float("nan")}
    result = compare(model, drawn, bad, progress=False)
    assert result.failures()["error"].str.contains("NaN").all()
    assert result.table()["n"].tolist() == [0]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_rows(
    model: Classifier, tmp_path: Path
) -> None:
    whole = compare(model, Drawn(), CHEAP, batch_size=2, out=tmp_path / "a", progress=False)

    class Interrupted(Drawn):
        def __getitem__(self, index: int) -> Sample:
            if index >= 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        compare(model, Interrupted(), CHEAP, batch_size=2, out=tmp_path / "b", progress=False)
    assert len(rows(Comparison(tmp_path / "b"))) == 2 * len(CHEAP)
    again = compare(model, Drawn(), CHEAP, batch_size=2, out=tmp_path / "b", progress=False)
    pd.testing.assert_frame_equal(rows(whole), rows(again))


def test_a_batch_that_was_cut_between_methods_is_completed(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    whole = compare(model, drawn, CHEAP, out=tmp_path / "a", progress=False)
    compare(model, drawn, CHEAP, out=tmp_path / "b", progress=False)
    store = RunStore(tmp_path / "b")
    store._database.execute("DELETE FROM results WHERE method IN ('saliency', 'smooth_grad')")
    store.close()
    again = compare(model, drawn, CHEAP, out=tmp_path / "b", progress=False)
    pd.testing.assert_frame_equal(rows(whole), rows(again))


def test_an_error_takes_the_place_of_no_good_row(tmp_path: Path) -> None:
    store = RunStore(tmp_path, {"model": "a", "dataset": "b", "settings": "c"})
    tables = ("results", "images", "attacked")

    def write(first: str | None, second: str | None) -> list[str | None]:
        for position, error in enumerate((first, second)):
            result = ResultRow(position, "m", "clean", "i.png", error=error)
            image = ImageRow(position, "i.png", error=error)
            store.write([result], [image], [AttackRow(position, "pgd", "i.png", error=error)])
        sql = "SELECT error FROM {} ORDER BY position"
        (errors,) = {tuple(r["error"] for r in store.select(sql.format(t))) for t in tables}
        return list(errors)

    assert write(None, "torn") == [None, "torn"]
    assert write("away", "away") == [None, "away"]
    assert write("away", None) == [None, None]


def test_a_finished_run_is_not_run_again(model: Classifier, drawn: Drawn, tmp_path: Path) -> None:
    calls = []

    def counted(images: Tensor, target: Tensor) -> Tensor:
        calls.append(len(images))
        return centre_heat(images, target)

    for _ in range(2):
        compare(model, drawn, {"counted": counted}, out=tmp_path / "run", progress=False)
    assert calls == [6]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"batch_size": 2}, "settings.batch_size: 16 there, 2 here"),
        ({"methods": ["saliency"]}, "methods.robust_cam: robust_cam there, (none) here"),
        ({"limit": 3}, "dataset.samples: 6 there, 3 here"),
        ({"seed": 1}, "settings.seed: 0 there, 1 here"),
        ({"target": "prediction"}, "settings.target: label there, prediction here"),
    ],
)
def test_a_folder_with_another_run_is_refused_with_the_difference(
    model: Classifier, drawn: Drawn, tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    compare(model, drawn, ["robust_cam", "saliency"], out=tmp_path / "run", progress=False)
    arguments = {"methods": ["robust_cam", "saliency"], **change}
    with pytest.raises(ValueError, match="holds another run") as error:
        compare(model, drawn, out=tmp_path / "run", progress=False, **arguments)
    assert difference in str(error.value)
    assert "\n" not in str(error.value)


def test_other_weights_are_another_run(drawn: Drawn, tmp_path: Path) -> None:
    model = make_classifier()
    compare(model, drawn, ["saliency"], out=tmp_path / "run", progress=False)
    nn.init.zeros_(next(model.parameters()))
    with pytest.raises(ValueError, match=r"model\.weights_crc32"):
        compare(model, drawn, ["saliency"], out=tmp_path / "run", progress=False)


def test_another_layer_is_another_run(drawn: Drawn, tmp_path: Path) -> None:
    model = make_classifier()
    compare(model, drawn, ["robust_cam"], out=tmp_path / "run", progress=False)
    moved = Classifier(model.module, (0.5,) * 3, (0.5,) * 3, 32, model.class_names, cam_layer="1")
    with pytest.raises(ValueError, match=r"model\.cam_layer: 3 there, 1 here"):
        compare(moved, drawn, ["robust_cam"], out=tmp_path / "run", progress=False)


def test_a_folder_with_other_files_is_refused(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"other files \(thesis\.tex\)"):
        compare(model, drawn, ["saliency"], out=tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match="no run in"):
        Comparison(tmp_path)


def test_captums_attributions_and_functions_run_under_the_users_names(
    model: Classifier, drawn: Drawn
) -> None:
    methods = {
        "mine": centre_heat,
        "captums": Saliency(model),
        "on a layer": LayerGradCam(model, model.cam_layer),
        "by name": "grad_cam",
    }
    result = compare(model, drawn, methods, progress=False)
    assert result.failures().empty
    table = result.table().set_index("method")
    for column in ("error", "tuned", "threshold"):
        assert table[column]["on a layer"] == table[column]["by name"]
    assert table["tuned"]["captums"] == "shipped"
    assert table["tuned"]["mine"] == "usual"


def test_a_method_finds_what_every_other_finds_and_leaves_nothing_behind(
    model: Classifier, drawn: Drawn
) -> None:
    def rude(images: Tensor, target: Tensor) -> Tensor:
        images.requires_grad_()
        model(images).gather(1, target[:, None]).sum().backward()
        heat = images.grad
        model.train()
        torch.set_grad_enabled(False)
        images.zero_()
        target.zero_()
        assert heat is not None
        return heat

    alone = compare(model, drawn, {"b": rude, "c": "saliency"}, progress=False)
    after = compare(model, drawn, {"a": rude, "b": rude, "c": "saliency"}, progress=False)
    both = rows(after)
    pd.testing.assert_frame_equal(rows(alone), both[both["method"] != "a"].reset_index(drop=True))
    assert torch.is_grad_enabled()
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_around_the_call_makes_no_difference(
    model: Classifier, drawn: Drawn, mode: Any
) -> None:
    with mode():
        result = compare(model, drawn, CHEAP, progress=False)
    assert result.failures().empty


def test_an_attack_that_fails_on_one_image_is_that_images_error(
    model: Classifier, drawn: Drawn
) -> None:
    poison = resize(drawn[2], (32, 32)).image

    def fragile(images: Tensor, target: Tensor) -> Tensor:
        if any(torch.equal(x, poison) for x in images):
            raise RuntimeError("no luck")
        return images

    attacks = {"fragile": fragile, "short": lambda x, t: x[:0]}
    result = compare(model, drawn, ["saliency"], attacks, progress=False)
    failed = rows(result).groupby("attack")["error"].count()
    assert failed.to_dict() == {"clean": 0, "fragile": 1, "short": 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.rand(3, 32, 32).double()}, "not float32 in [0, 1]"),
        ({"image": torch.full((3, 32, 32), 255, dtype=torch.uint8)}, "not float32 in [0, 1]"),
        ({"image": torch.full((3, 32, 32), float("nan"))}, "not float32 in [0, 1]"),
        ({"mask": torch.zeros(32, 32)}, "the mask is torch.float32"),
        ({"label": -1}, "class index -1"),
        ({"label": 1.5}, "TypeError"),
    ],
)
def test_a_sample_that_would_spoil_its_batch_is_its_own_error(
    model: Classifier, change: dict[str, Any], message: str
) -> None:
    good = resize(Drawn()[0], (32, 32))
    result = compare(model, [good, replace(good, **change)], ["saliency"], progress=False)
    assert result.table()["n"].tolist() == [1]
    assert message in result.failures()["error"][0]


def test_labels_of_other_integer_types_and_empty_masks_are_no_obstacle(model: Classifier) -> None:
    sample = resize(Drawn()[0], (32, 32))
    empty = replace(sample, label=np.int64(1), mask=torch.zeros(32, 32, dtype=torch.bool))
    table = compare(model, [empty, replace(sample, label=torch.tensor(2))], ["saliency"]).table()
    assert table["n"].tolist() == [2]
    assert "pxap" not in table


@dataclass
class Shift:
    """An attack with a setting."""

    amount: float

    def perturb(self, images: Tensor, target: Tensor) -> Tensor:
        return (images + self.amount).clamp(0, 1)


def test_an_attack_of_another_strength_is_another_run(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    compare(model, drawn, ["saliency"], {"shift": Shift(0.1)}, out=out, progress=False)
    with pytest.raises(ValueError, match=r"attacks\.shift, amount: 0\.1 there, 0\.2 here"):
        compare(model, drawn, ["saliency"], {"shift": Shift(0.2)}, out=out, progress=False)


def test_a_comparison_of_a_run_that_goes_on_reads_it_anew(
    model: Classifier, tmp_path: Path
) -> None:
    class Interrupted(Drawn):
        def __getitem__(self, index: int) -> Sample:
            if index >= 4:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        compare(model, Interrupted(), ["saliency"], batch_size=2, out=out, progress=False)
    early = Comparison(out)
    assert early.table()["n"].tolist() == [4]
    compare(model, Drawn(), ["saliency"], batch_size=2, out=out, progress=False)
    assert early.table()["n"].tolist() == [6]
    assert len(early.to_dataframe()) == 6


def test_a_reused_input_counts_once_a_pass(model: Classifier) -> None:
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    with count_passes(model) as passes:
        for c in range(3):
            torch.autograd.grad(model(x)[:, c].sum(), x)
        with torch.no_grad():
            model(x)
    assert (passes.forward, passes.backward) == (8, 6)


def test_processes_that_start_together_share_a_folder(tmp_path: Path) -> None:
    def start(folder: Path) -> int:
        store = RunStore(folder, {"model": "a", "dataset": "b", "settings": "c"})
        rows = len(list(store.select("SELECT 1 FROM results")))
        store.close()
        return rows

    with ThreadPoolExecutor(8) as pool:
        for i in range(20):
            assert list(pool.map(start, [tmp_path / str(i)] * 8)) == [0] * 8


def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(tmp_path: Path) -> None:
    store = RunStore(tmp_path, {"model": "a", "dataset": "b", "settings": "c"})
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    rows = [ResultRow(i, "m", "clean", "i.png", heat=bytes(10_000)) for i in range(100)]
    store._database.execute(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(OSError, match=r"rows\.sqlite: cannot .* \(database or disk is full"):
        store.write(rows)
    assert not list(store.select("SELECT 1 FROM results"))
    store._database.execute(f"PRAGMA max_page_count = {pages + 10_000}")
    store.write(rows)
    assert len(list(store.select("SELECT 1 FROM results"))) == 100


def test_attacks_add_rows_and_every_method_runs_on_clean_images_too(
    model: Classifier, drawn: Drawn
) -> None:
    class Invert:
        def perturb(self, images: Tensor, target: Tensor) -> Tensor:
            return 1 - images

    result = compare(model, drawn, {"bright": centre_heat}, {"invert": Invert()}, progress=False)
    table = result.table().set_index("attack")
    assert list(table.index) == ["clean", "invert"]
    assert table.loc["clean", "error"] == 0
    assert table.loc["invert", "error"] == 1
    assert "invert" in result.to_text()


def test_the_prediction_is_explained_on_request(model: Classifier, drawn: Drawn) -> None:
    frame = compare(model, drawn, ["saliency"], target="prediction", progress=False).to_dataframe()
    assert (frame["explained"] == frame["predicted"]).all()
    frame = compare(model, drawn, ["saliency"], target="label", progress=False).to_dataframe()
    assert (frame["explained"] == frame["label"]).all()


def test_the_frame_says_what_the_table_says(model: Classifier, drawn: Drawn) -> None:
    result = compare(model, drawn, CHEAP, progress=False)
    frame, table = result.to_dataframe(), result.table().set_index("method")
    assert len(frame) == 6 * len(CHEAP)
    for method, part in frame.groupby("method"):
        assert 1 - part["localized"].mean() == pytest.approx(table.loc[method, "error"])
        assert ((part["iou"] > 0.5) == part["localized"]).all()
        top1 = (part["localized"] & (part["label"] == part["predicted"])).mean()
        assert 1 - top1 == pytest.approx(table.loc[method, "top1_error"])


def test_the_frame_of_the_first_images_is_the_start_of_the_whole_one(
    model: Classifier, drawn: Drawn
) -> None:
    result = compare(model, drawn, CHEAP, progress=False)
    whole = result.to_dataframe()
    pd.testing.assert_frame_equal(result.to_dataframe(first=4), whole[whole["position"] < 4])


def test_two_fold_tuning_scores_each_half_with_the_others_best_threshold(
    model: Classifier, drawn: Drawn
) -> None:
    result = compare(model, Drawn(n=9), ["saliency"], progress=False)
    packed = result.select("SELECT ious FROM results ORDER BY position")
    correct = np.stack([unpack(row["ious"]) for row in packed]) > 0.5
    folds = split_folds([f"{i}.png" for i in range(9)]).numpy()
    assert min(np.bincount(folds)) > 0
    wrong = 0
    for fold in (0, 1):
        best = correct[folds != fold].sum(axis=0).argmax()
        wrong += (~correct[folds == fold, best]).sum()
    assert result.table()["error"][0] == pytest.approx(wrong / 9)
    oracle = result.table(oracle=True)
    assert oracle["error"][0] == pytest.approx(1 - correct.mean(axis=0).max())
    assert oracle["tuned"][0] == "oracle"


def test_the_table_is_what_the_metric_class_says_of_the_same_maps(
    model: Classifier, drawn: Drawn
) -> None:
    def noisy(images: Tensor, _: Tensor) -> Tensor:
        return images.mean(dim=1).flip(2) * images[:, 0]

    result = compare(model, Drawn(n=9), {"noisy": noisy}, progress=False)
    metric = LocalizationError(STRATEGY_ORDER)
    for i in range(9):
        sample = resize(Drawn(n=9)[i], (32, 32))
        metric.update(noisy(sample.image[None], torch.zeros(1)), [sample.boxes], [f"{i}.png"])
    names = [f"{s} {a:g}" for s in STRATEGY_ORDER for a in alpha_grid(s)]
    best = best_columns(metric.correct, metric.overlaps, metric.samples, single=False)
    table = result.table(thresholds="two-fold")
    assert table["tuned"][0] == "two-fold"
    assert 0 < table["error"][0] == pytest.approx(float(metric.compute()))
    chosen = dict.fromkeys(names[column] for (column,) in best)
    assert table["threshold"][0] == ", ".join(chosen)


def test_one_family_of_thresholds_gives_its_own_error(model: Classifier, drawn: Drawn) -> None:
    result = compare(model, drawn, ["saliency"], progress=False)
    packed = result.select("SELECT ious FROM results ORDER BY position")
    value = np.stack([unpack(row["ious"]) for row in packed])[:, : len(alpha_grid("value"))]
    table = result.table(oracle=True, strategies=["value"])
    assert table["error"][0] == pytest.approx(1 - (value > 0.5).mean(axis=0).max())
    assert table["threshold"][0].startswith("value ")
    with pytest.raises(ValueError, match=r"family of thresholds: .*got 'valeu'"):
        result.table(strategies=["valeu"])


def test_another_seed_gives_all_methods_the_same_other_halves(model: Classifier) -> None:
    result = compare(model, Drawn(n=9, broken=[3]), ["saliency", "robust_cam"], progress=False)
    result._store._database.execute(
        "UPDATE results SET ious = NULL WHERE method = 'saliency' AND position = 0"
    )
    halves = split_folds([f"{i}.png" for i in range(9)], seed=1)
    assert halves.tolist() != split_folds([f"{i}.png" for i in range(9)]).tolist()
    for method in ("saliency", "robust_cam"):
        scored = result._scoring.score(method, "clean", Tuning(seed=1))
        assert scored is not None
        assert scored.folds.tolist() == [halves[int(p)] for p in scored.positions]


def test_curves_give_the_error_at_every_threshold(model: Classifier, drawn: Drawn) -> None:
    curves = compare(model, drawn, ["saliency"], progress=False).curves()
    assert len(curves) == sum(len(alpha_grid(s)) for s in STRATEGY_ORDER)
    assert curves["error"].between(0, 1).all()


def test_the_callers_world_is_left_as_it_was(model: Classifier, drawn: Drawn) -> None:
    model.train()
    before = torch.get_rng_state()
    compare(model, drawn, CHEAP, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bfloat16_runs(model: Classifier, drawn: Drawn) -> None:
    result = compare(model, drawn, CHEAP, precision="bfloat16", progress=False)
    assert result.failures().empty


def test_a_centre_crop_moves_the_boxes(model: Classifier, drawn: Drawn) -> None:
    table = compare(model, drawn, {"bright": centre_heat}, fit="crop", progress=False).table()
    assert table["error"][0] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"methods": ["robust_can"]},
            ValueError,
            r"method: .*got 'robust_can'; did you mean",
        ),
        ({"methods": []}, ValueError, "methods: expected at least one"),
        ({"methods": ["saliency", "saliency"]}, ValueError, "methods: expected each name once"),
        ({"methods": 3}, TypeError, "methods: expected names, or a mapping"),
        ({"methods": [centre_heat]}, TypeError, "methods: expected names, or a mapping"),
        ({"batch_size": 2.5}, ValueError, "batch_size: expected a whole number"),
        ({"methods": {"a": 3}}, TypeError, "method 'a': expected a name"),
        ({"attacks": {"a": 3}}, TypeError, "attack 'a': expected an object"),
        ({"attacks": {"clean": centre_heat}}, ValueError, "attacks: 'clean'"),
        ({"limit": 0}, ValueError, "limit: expected a whole number from 1"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"target": "dog"}, ValueError, "target: expected one of"),
        ({"fit": "stretch"}, ValueError, "fit: expected one of"),
        ({"precision": "int8"}, ValueError, "precision: expected one of"),
    ],
)
def test_wrong_arguments_are_named_before_the_first_image(
    model: Classifier, arguments: dict[str, Any], error: type, message: str
) -> None:
    class Unread(Drawn):
        def __getitem__(self, index: int) -> Sample:
            raise AssertionError("read too early")

    with pytest.raises(error, match=message):
        compare(model, Unread(), progress=False, **arguments)


def test_processes_that_share_a_run_need_its_folder(
    model: Classifier, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="out: the processes"):
        compare(model, drawn, ["saliency"], progress=False)


def test_a_plain_module_and_an_empty_data_set_are_refused(model: Classifier, drawn: Drawn) -> None:
    with pytest.raises(TypeError, match=r"wrap yours with Classifier"):
        compare(model.module, drawn)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no samples"):
        compare(model, Drawn(n=0))


def test_heat_maps_by_hand() -> None:
    layer = torch.tensor([[[[2.0, -1.0]]]])
    # align_corners=False: the middle of the output lies between the two pixels
    torch.testing.assert_close(heat_map(layer, (1, 4)), torch.tensor([[[2.0, 1.5, 0.5, 0.0]]]))
    signed = torch.tensor([[[[3.0]], [[-5.0]]]])
    assert heat_map(signed, (1, 1)).item() == 8
    assert heat_map(signed, (1, 1), signed=True).item() == 0
    assert heat_map(-signed, (1, 1), signed=True).item() == 1
    with pytest.raises(ValueError, match="expected N×H×W"):
        heat_map(torch.zeros(3), (1, 1))


def broken(_: Tensor, __: Tensor) -> Tensor:
    raise RuntimeError("no luck today")


def test_a_method_that_fails_everywhere_is_said_with_its_reason(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    def often(images: Tensor, target: Tensor) -> Tensor:
        if float(target[0]) != 1:
            raise ValueError(f"class {int(target[0])} is none")
        return centre_heat(images, target)

    methods = {"broken": broken, "often": often, "bright": centre_heat}
    with pytest.warns(RunWarning, match="broken failed on each of the 6 images") as said:
        result = compare(model, drawn, methods, progress=False)
    reason = "broken failed on each of the 6 images: RuntimeError: no luck today (6×)"
    assert [str(one.message) for one in said] == [reason] == result.complete_failures()
    # Labels are 0 1 2 3 0 1, of which 1 succeeds: the reasons differ in a number only.
    text = result.to_text().split("what failed")[1].splitlines()[1:]
    assert text == [
        "  6× broken: RuntimeError: no luck today",
        "  4× often: ValueError: class 0 is none",
    ]
    page = result.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "6× broken: RuntimeError: no luck today" in page
    assert "4× often: ValueError: class 0 is none" in page


def test_a_run_that_was_stopped_does_not_say_that_a_method_failed_on_images_it_has_not_seen(
    model: Classifier, drawn: Drawn, tmp_path: Path
) -> None:
    with pytest.warns(RunWarning):
        compare(model, drawn, {"broken": broken}, out=tmp_path, progress=False)
    with sqlite3.connect(tmp_path / "rows.sqlite") as rows:
        rows.execute("DELETE FROM results WHERE position = 5")
    assert Comparison(tmp_path).complete_failures() == []


def test_an_attack_that_fails_everywhere_is_said_once(model: Classifier, drawn: Drawn) -> None:
    attacks = {"short": lambda x, t: x[:0]}
    with pytest.warns(RunWarning) as said:
        compare(model, drawn, ["saliency", "random"], attacks, progress=False)
    (one,) = [one for one in said if one.category is RunWarning]
    assert "saliency, random failed on each of the 6 images under short: " in str(one.message)
    assert "(6×)" in str(one.message)


def test_a_run_without_a_usable_image_is_said_with_the_most_frequent_reason(
    model: Classifier,
) -> None:
    with pytest.warns(RunWarning) as said:
        result = compare(model, Drawn(n=3, broken=[0, 1, 2]), CHEAP, progress=False)
    (one,) = [one for one in said if one.category is RunWarning]
    assert str(one.message) == "none of the 3 images could be used: 0.png: truncated (3×)"
    assert "3× (all): 0.png: truncated" in result.to_text()


def test_a_run_without_a_box_says_that_nothing_was_scored(model: Classifier) -> None:
    class Unboxed(Drawn):
        def __getitem__(self, index: int) -> Sample:
            return replace(super().__getitem__(index), boxes=torch.zeros(0, 4))

    with pytest.warns(RunWarning, match="nothing was scored, for no image has a box"):
        result = compare(model, Unboxed(n=3, broken=[1]), CHEAP, progress=False)
    assert result.summary().endswith("2 without a box; nothing was scored, for no image has a box")
    assert "nothing was scored, for no image has a box" in result.to_text()
    assert "share of boxes" not in result.to_text()


def test_a_run_that_went_well_says_nothing(model: Classifier, drawn: Drawn) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunWarning)
        result = compare(model, drawn, {"bright": centre_heat}, progress=False)
    assert result.complete_failures() == []
    assert "failed" not in result.to_text()
    assert "scored" not in result.summary()


def test_one_image_has_no_interval(model: Classifier, tmp_path: Path) -> None:
    attacks = {"fgsm 8/255": FGSM(model, epsilon=8 / 255)}
    result = compare(model, Drawn(n=1), {"bright": centre_heat}, attacks, progress=False)
    table = result.table()
    assert table["error"].tolist() == [0, 0]
    assert table[["error_low", "error_high"]].isna().all(axis=None)
    assert result.attack_table()[["robust_low", "robust_high"]].isna().all(axis=None)
    assert "nan" not in result.to_text().lower()
    page = result.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "one image, so there is no interval" in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page.split("</head>")[1]).lower().split()
    assert result.plot()
    assert result.plot_attacks()


def test_names_that_utf8_cannot_hold_are_written_out_in_the_rows(
    model: Classifier, tmp_path: Path
) -> None:
    class Odd(LocalizationDataset):
        def __init__(self) -> None:
            self.ids = ["a\ud800.png", "b\udcff.png"]
            self.class_names = ["\ud801", "cat"]

        def _load(self, index: int) -> Sample:
            if index:
                raise DataError("torn \ud802")
            return Sample(torch.rand(3, 8, 8), None, torch.tensor([[0.0, 0, 4, 4]]), self.ids[0])

    compare(model, Odd(), ["saliency"], out=tmp_path / "run")
    store, names = RunStore(tmp_path / "run"), ["a\\ud800.png", "b\\xff.png"]
    assert [row["image"] for row in store.select("SELECT image FROM results ORDER BY 1")] == names
    for odd in {"methods": {"\ud800": "saliency"}}, {"attacks": {"\ud800": FGSM(model)}}:
        given: Any = {"methods": ["saliency"]} | odd
        with pytest.raises(ValueError, match=r"name: expected valid Unicode, got '\\ud800'"):
            compare(model, Odd(), out=tmp_path / "other", **given)
