"""A comparison with attackers who know the defence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from torch import Tensor

from captum_robust import Defended, RobustCAM
from captum_robust.attacks import PGD
from captum_robust.benchmark import AttackOptions, Comparison, build_attacks, compare
from captum_robust.catalog.methods import build_methods
from captum_robust.data import Sample, resize
from captum_robust.defenses import (
    DefendedModel,
    GaussianBlur,
    GaussianNoise,
    HorizontalFlip,
    adaptive_attack,
)
from captum_robust.metrics.functional import gap_closed, stability
from captum_robust.models import Classifier

from .conftest import Drawn, centre_heat, make_classifier, trios_of
from .test_report import Page

N = 3
TRANSFORMS = (HorizontalFlip(), GaussianNoise(0.1, seed=1))
ATTACKS = ["clean", "pgd 8/255", "pgd 8/255, adaptive", "pgd 32/255", "pgd 32/255, adaptive"]
EXPLANATIONS = ["explanation 8/255", "explanation 32/255"]


class Right(Drawn):
    """With the classifier's own predictions as labels, but for the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        images = [resize(Drawn(self.n)[i], (32, 32)).image for i in range(self.n)]
        with torch.no_grad():
            self.predictions = make_classifier()(torch.stack(images)).argmax(dim=1).tolist()

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        label = (self.predictions[index] + (index == 0)) % 4
        return Sample(sample.image, label, sample.boxes, sample.id)


def methods_of(model: Classifier) -> dict[str, Any]:
    cam = RobustCAM(model, model.cam_layer)
    return {
        "cam": LayerGradCam(model, model.cam_layer),
        "defended_cam": Defended(LayerGradCam(model, model.cam_layer), TRANSFORMS),
        "defended_robust": Defended(cam, TRANSFORMS),
        "other": Defended(cam, [GaussianBlur(2)]),
        "defended_saliency": Defended(Saliency(model), TRANSFORMS),
        "bright": centre_heat,
        "center_box": "center_box",
    }


def run_in(out: Path, n: int = N, **options: Any) -> Comparison:
    model = make_classifier()
    strengths = options.pop("strengths", [32])
    attacks = build_attacks(model, ["pgd"], strengths, AttackOptions(steps=2))
    arguments: dict[str, Any] = {"adaptive": True, "batch_size": 2, "progress": False, **options}
    methods = arguments.pop("methods", methods_of(model))
    data = arguments.pop("data", Right(n))
    return compare(model, data, methods, attacks, out=out, **arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return run_in(tmp_path_factory.mktemp("run"), strengths=[8, 32])


def images_of(n: int = N) -> tuple[Tensor, Tensor]:
    samples = [resize(Right(n)[i], (32, 32)) for i in range(n)]
    return torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples])


def test_beside_each_attack_stands_the_adaptive_one_and_behind_them_that_on_the_map(
    run: Comparison,
) -> None:
    assert run.attacks == [*ATTACKS, *EXPLANATIONS]
    assert list(run.error_by_attack().columns) == run.attacks


def test_a_defended_method_is_shown_images_attacked_through_its_transforms(
    run: Comparison,
) -> None:
    model = make_classifier()
    images, labels = images_of()
    defended = DefendedModel(model, TRANSFORMS)
    # In batches of 2 and parts of 1, which an attack does not notice.
    expected = adaptive_attack(PGD(model, 32 / 255, 2), TRANSFORMS).perturb(images, labels)
    change = (expected - images).flatten(1)
    name = "pgd 32/255, adaptive (defended_cam)"
    rows = run.select("SELECT * FROM attacked WHERE attack = ? ORDER BY position", (name,))
    assert [r["l2"] for r in rows] == pytest.approx(change.norm(dim=1).tolist(), rel=1e-3)
    with torch.no_grad():
        before, after = defended(images).argmax(dim=1), defended(expected).argmax(dim=1)
        plain = model(expected).argmax(dim=1)
    assert [r["before"] for r in rows] == before.tolist()
    assert [r["predicted"] for r in rows] == after.tolist()
    assert [r["fooled"] for r in rows] == ((before == labels) & (after != labels)).int().tolist()
    for method in ("defended_cam", "defended_robust", "defended_saliency"):
        mine = run.select(
            "SELECT * FROM results WHERE method = ? AND attack = ? ORDER BY position",
            (method, "pgd 32/255, adaptive"),
        )
        assert {r["source"] for r in mine} == {name}
        assert [r["decided"] for r in mine] == after.tolist()
        assert [r["predicted"] for r in mine] == plain.tolist()
    sources = run.select("SELECT DISTINCT source FROM results WHERE method = 'other'")
    assert {r["source"] for r in sources} == {
        None,
        *(f"pgd {e}/255, adaptive (other)" for e in (8, 32)),
        *(f"explanation {e}/255 (other)" for e in (8, 32)),
    }


def test_a_method_without_a_defence_is_not_run_again_and_its_row_is_marked(
    run: Comparison,
) -> None:
    rows = run.select("SELECT DISTINCT attack FROM results WHERE method = 'bright'")
    assert {r["attack"] for r in rows} == {"clean", "pgd 8/255", "pgd 32/255"}
    table = run.table().set_index(["attack", "method"])
    for method in ("cam", "bright", "center_box"):
        repeated = table.loc[("pgd 8/255, adaptive", method)]
        plain = table.loc[("pgd 8/255", method)]
        assert repeated["same_as"] == "pgd 8/255"
        assert plain["same_as"] is None or plain["same_as"] != plain["same_as"]
        assert repeated.drop("same_as").equals(plain.drop("same_as"))
    of_defended = table.xs("defended_cam", level="method")["same_as"]
    assert of_defended.isna().all()
    errors = run.error_by_attack().loc["cam"]
    lines = run.to_text().split("error under attack")[1].splitlines()
    line = next(line for line in lines if line.startswith("cam "))
    assert line.split()[2:4] == [f"{errors['pgd 8/255']:.3f}", f"{errors['pgd 8/255']:.3f}="]


def test_a_map_without_gradient_has_no_row_and_the_text_says_so(run: Comparison) -> None:
    table = run.table()
    with_rows = set(table[table["attack"] == "explanation 8/255"]["method"])
    assert with_rows == {"cam", "defended_cam", "defended_robust", "other"}
    assert run.rows_of("defended_saliency", "explanation 8/255") is None
    assert math.isnan(run.error_by_attack().loc["bright", "explanation 8/255"])
    assert "-: the map has no gradient" in run.to_text()


def test_the_attack_on_a_map_moves_that_map_and_keeps_the_class(run: Comparison) -> None:
    frame = run.to_dataframe().set_index(["attack", "method"])
    for method in ("cam", "defended_cam", "defended_robust"):
        moved = frame.loc[("explanation 32/255", method)]
        kept = moved["decided"] if method != "cam" else moved["predicted"]
        right = moved["already_wrong"] == 0
        assert right.any()
        assert (kept[right] == moved["label"][right]).all()
        assert not moved["fooled"].any()
        assert moved["linf"].max() <= 32 / 255 + 1e-6
        assert moved["spearman"].min() < 0.999


def test_stability_columns_are_the_measures_of_the_maps(run: Comparison) -> None:
    model = make_classifier()
    images, labels = images_of()
    attacked = PGD(model, 32 / 255, 2).perturb(images, labels)
    explain = build_methods(model, {"m": RobustCAM(model, model.cam_layer)})["m"].explain
    single = compare(
        model, Right(N), {"m": RobustCAM(model, model.cam_layer)},
        build_attacks(model, ["pgd"], [32], AttackOptions(steps=2)), batch_size=N, progress=False,
    )  # fmt: skip
    expected = stability(explain(images, labels).maps, explain(attacked, labels).maps)
    frame = single.to_dataframe()
    frame = frame[frame["attack"] == "pgd 32/255"]
    for name, values in expected.items():
        assert frame[name].tolist() == pytest.approx(values.tolist(), abs=1e-4)
    clean = single.to_dataframe()
    assert clean[clean["attack"] == "clean"]["spearman"].isna().all()
    table = single.stability_table()
    assert table["attack"].tolist() == ["pgd 32/255"]
    assert table["spearman"].item() == pytest.approx(expected["spearman"].mean().item(), abs=1e-4)


def test_the_worst_of_all_attacks_is_that_of_each_image(run: Comparison) -> None:
    frame = run.to_dataframe()
    mine = frame[(frame["method"] == "defended_cam") & (frame["attack"] != "clean")]
    table = run.stability_table().set_index(["attack", "method"])
    for measure in ("spearman", "box_iou"):
        lowest = mine.groupby("image")[measure].min().mean()
        assert table.loc[("worst", "defended_cam"), measure] == pytest.approx(lowest)
        assert lowest <= table.loc[("pgd 8/255", "defended_cam"), measure]
    assert "center_box" not in set(run.stability_table()["method"])


def test_the_gap_is_that_of_the_paired_failures(run: Comparison) -> None:
    frame = run.to_dataframe().set_index(["method", "attack"])

    def misses(method: str, attack: str) -> Tensor:
        return torch.tensor(1 - frame.loc[(method, attack)]["localized"].to_numpy(float))

    table = run.gap_table("cam").set_index(["attack", "method"])
    assert "cam" not in table.index.get_level_values("method")
    for attack, own in (("pgd 8/255, adaptive", "pgd 8/255"), ("pgd 32/255", "pgd 32/255")):
        for method in ("defended_cam", "other"):
            expected = gap_closed(
                misses(method, attack), misses("cam", own), misses("cam", "clean")
            )
            row = table.loc[(attack, method)]
            assert (row["n"], row["gap"]) == (expected.n, expected.gap)
            assert row["closed"] == pytest.approx(expected.value, nan_ok=True)
            assert row["low"] == pytest.approx(expected.low, nan_ok=True)
            assert (row["reason"] == expected.reason) or expected.reason is None
            assert isinstance(row["reason"], str) == math.isnan(row["closed"])
    assert run.gap_table().empty  # no method of the kind grad_cam
    with pytest.raises(ValueError, match=r"method: .*got 'cma'; did you mean 'cam'"):
        run.gap_table("cma")


def test_named_grad_cam_is_the_baseline_of_the_gap(tmp_path: Path) -> None:
    run = run_in(tmp_path / "a", methods=["grad_cam", "robust_cam", "defended_grad_cam"])
    assert set(run.gap_table()["baseline"]) == {"grad_cam"}
    assert "gap closed" in run.to_text()
    described = json.loads((tmp_path / "a" / "run.json").read_text())
    assert "JPEG" in described["settings"]["defended_methods"]


@pytest.mark.parametrize("target", ["label", "prediction"])
def test_a_defended_method_explains_the_label_or_its_own_prediction(
    tmp_path: Path, target: str
) -> None:
    run = run_in(tmp_path / "a", target=target)
    frame = run.to_dataframe()
    own = frame[frame["method"] == "defended_robust"]
    plain = frame[frame["method"] == "cam"]
    if target == "label":
        assert (frame["explained"] == frame["label"]).all()
    else:
        assert (own["explained"] == own["decided"]).all()
        assert (plain["explained"] == plain["predicted"]).all()
    assert plain["decided"].isna().all()
    model = make_classifier()
    images, labels = images_of()
    defended = methods_of(model)["defended_robust"]
    expected = defended.scores(images).argmax(dim=1)
    assert own[own["attack"] == "clean"]["decided"].tolist() == expected.tolist()
    table = run.table().set_index(["attack", "method"])
    accuracy = (expected == labels).double().mean().item()
    assert table.loc[("clean", "defended_robust"), "accuracy"] == pytest.approx(accuracy)
    assert table.loc[("clean", "cam"), "accuracy"] == pytest.approx((N - 1) / N)


def test_for_the_prediction_the_map_is_attacked_for_the_methods_own_class(tmp_path: Path) -> None:
    run = run_in(tmp_path / "a", target="prediction")
    rows = run.select("SELECT * FROM attacked WHERE attack LIKE 'explanation%defended_cam)'")
    clean = run.select(
        "SELECT position, decided FROM results WHERE method = 'defended_cam' AND attack = 'clean'"
    )
    decided = {r["position"]: r["decided"] for r in clean}
    assert rows
    assert all(r["predicted"] == decided[r["position"]] for r in rows)


def everything(run: Comparison) -> list[dict[str, Any]]:
    """All rows; of what is measured only the time differs."""
    skipped = {"seconds"}
    return [
        {k: v for k, v in row.items() if k not in skipped}
        for table in ("results", "attacked", "images")
        for row in run.select(f"SELECT * FROM {table} ORDER BY 1, 2, 3")
    ]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_rows(
    tmp_path: Path,
) -> None:
    class Stopped(Right):
        reads = 0

        def __getitem__(self, index: int) -> Sample:
            type(self).reads += 1
            if type(self).reads > 2:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "a", data=Stopped(N))
    resumed = run_in(tmp_path / "a", data=Right(N))
    assert everything(resumed) == everything(run_in(tmp_path / "b"))


def test_a_batch_that_was_cut_anywhere_is_completed(tmp_path: Path) -> None:
    methods = {k: v for k, v in methods_of(make_classifier()).items() if "cam" in k}
    first = run_in(tmp_path / "a", methods=methods)
    whole = everything(first)
    for lost in ("method = 'defended_cam'", "attack LIKE '%adaptive'", "attack <> 'clean'"):
        first._store._database.execute(f"DELETE FROM results WHERE {lost}")
        assert everything(run_in(tmp_path / "a", methods=methods)) == whole


def test_with_and_without_it_are_two_runs(tmp_path: Path) -> None:
    run_in(tmp_path / "a", adaptive=False)
    with pytest.raises(ValueError, match="holds another run"):
        run_in(tmp_path / "a")


def test_memory_holds_one_transformed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_classifier()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    compare(
        model, Right(6), {"d": Defended(RobustCAM(model, model.cam_layer), TRANSFORMS)},
        build_attacks(model, ["pgd"], [8], AttackOptions(steps=2)), batch_size=6,
        adaptive=True, progress=False,
    )  # fmt: skip
    # The method's own batch of all transforms; the attacks hold no more than one plain batch.
    assert max(sizes) == 6 * 2
    assert sorted(set(sizes))[-2] <= 6


def test_an_attack_that_cannot_be_adapted_stands_alone(tmp_path: Path) -> None:
    model = make_classifier()
    attacks: dict[str, Callable[..., Tensor]] = {"shift": lambda x, _: (x + 0.1).clamp(0, 1)}
    run = compare(
        model, Right(3), methods_of(model), attacks, adaptive=True, progress=False,
        out=tmp_path / "a",
    )  # fmt: skip
    assert run.attacks == ["clean", "shift"]


def test_a_defence_that_fails_on_an_image_is_that_images_error(tmp_path: Path) -> None:
    model = make_classifier()
    poison = resize(Right(3)[1], (32, 32)).image

    def fragile(x: Tensor) -> Tensor:
        if any(torch.equal(image, poison) for image in x):
            raise RuntimeError("no luck")
        return x

    methods = {"d": Defended(RobustCAM(model, model.cam_layer), [fragile])}
    run = run_in(tmp_path / "a", n=3, methods=methods)
    failed = run.to_dataframe()
    failed = failed[failed["error"].notna()]
    assert set(failed["image"]) == {"1.png"}
    assert set(failed["attack"]) >= {"clean", "pgd 32/255, adaptive"}
    assert run.to_html(tmp_path / "report.html").is_file()


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    model = make_classifier()
    with pytest.raises(ValueError, match="adaptive: there is no attack to adapt"):
        compare(model, Right(2), ["grad_cam"], adaptive=True, progress=False)
    attacks = {"pgd": PGD(model), "pgd, adaptive": PGD(model)}
    methods = {"d": Defended(RobustCAM(model, model.cam_layer), TRANSFORMS)}
    with pytest.raises(ValueError, match="'pgd, adaptive' is the name of an adaptive attack"):
        compare(model, Right(2), methods, attacks, adaptive=True, progress=False)


@pytest.fixture(scope="module")
def page(run: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(run.to_html(tmp_path_factory.mktemp("report") / "report.html"))


def rows_below(page: Page, heading: str, wanted: int = 1) -> list[list[str]]:
    """The rows of the table whose first cell this is; the header first."""
    at = [i for i, row in enumerate(page.rows) if row[0] == heading]
    start = at[wanted - 1]
    return page.rows[start:]


def test_the_report_marks_what_is_repeated_and_leaves_gaps(run: Comparison, page: Page) -> None:
    header, *rows = rows_below(page, "Error %")
    assert header[1:] == run.attacks
    errors = run.error_by_attack()
    cells = {row[0]: row[1:] for row in rows[: len(run.methods)]}
    for attack, cell in zip(run.attacks, cells["cam"], strict=True):
        shown = f"{100 * errors.loc['cam', attack]:.1f}"
        assert cell.startswith(shown + (" =" if "adaptive" in attack else ""))
        assert ("=" in cell) == ("adaptive" in attack)
    assert not any("=" in cell for cell in cells["defended_cam"])
    assert cells["bright"][-2:] == ["–", "–"]
    assert "the attacker knows how a method defends itself" in " ".join(page.text.split())


def test_the_results_show_a_repeated_row_once(page: Page) -> None:
    names = [row[0] for row in page.rows]
    start = names.index("pgd 8/255, adaptive")  # the block among the results
    block = page.rows[start + 1 : start + 6]
    assert {row[0] for row in block[:4]} == {
        "defended_cam", "defended_robust", "defended_saliency", "other",
    }  # fmt: skip
    assert block[4] == ["pgd 32/255"]


def test_error_curves_run_from_the_clean_error_an_attack_a_chart(
    run: Comparison, page: Page
) -> None:
    series = run.error_series()
    assert list(series) == ["pgd", "pgd, adaptive", "explanation"]
    labels = [a["alt"] for _, a in page.elements if "Localization" in a.get("alt", "")]
    assert len(labels) == 3
    errors = run.error_by_attack()
    for name, label in zip(series, labels, strict=True):
        assert f"under {name} " in label
        rows = series[name][series[name]["method"] == "defended_cam"]
        assert (255 * rows["epsilon"]).tolist() == pytest.approx([0, 8, 32])
        said = ", ".join(
            f"{100 * e:.1f} at {s:g}" for e, s in zip(rows["error"], (0, 8, 32), strict=True)
        )
        assert f"defended_cam: {said}" in label
        assert rows["error"].iloc[0] == errors.loc["defended_cam", "clean"]
    assert "bright" not in set(series["explanation"]["method"])


def test_the_figure_of_errors_has_a_panel_an_attack(run: Comparison) -> None:
    figure = run.plot_errors()
    figure.canvas.draw()
    panels = figure.get_axes()
    assert [axes.get_title() for axes in panels] == ["pgd", "pgd, adaptive", "explanation"]
    for axes in panels:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "8", "32"]
    lines = [line for line in panels[0].lines if line.get_marker() == "o"]
    assert len(lines) == len(run.methods) - 1  # the centre box is a line without dots
    assert list(lines[0].get_xdata()) == pytest.approx([0, 8, 32], abs=1)
    # Beside each other, so that an interval hides no other.
    starts = [line.get_xdata()[0] for line in lines]
    assert len({round(x, 3) for x in starts}) == len(lines)
    expected = 100 * run.error_by_attack().loc["cam", ["clean", "pgd 8/255", "pgd 32/255"]]
    assert list(lines[0].get_ydata()) == pytest.approx(expected.tolist())


def test_the_report_says_where_there_is_no_gap_to_close(tmp_path: Path) -> None:
    attacks = {"nothing": lambda x, _: x, "as little": lambda x, _: x}
    methods = ["grad_cam", "robust_cam", "center_box"]
    run = compare(make_classifier(), Right(N), methods, attacks, out=tmp_path, progress=False)
    assert (run.gap_table()["gap"] == 0).all()
    text = " ".join(Page(run.to_html(tmp_path / "report.html")).text.split())
    assert (
        "The error of Grad-CAM under “nothing” and “as little” is not above that on the clean "
        "images, so there is no gap to close." in text
    )


def test_the_report_names_every_attack_and_what_an_adaptive_one_goes_through(
    run: Comparison, page: Page
) -> None:
    text = " ".join(page.text.split())
    assert "; ".join(run.attacks[1:]) in text
    assert "goes through the transforms of a defended method" in text


def test_the_report_shows_how_stable_maps_are(run: Comparison, page: Page) -> None:
    table = run.stability_table()
    start = next(i for i, row in enumerate(page.rows) if row[1:2] == ["Spearman"])
    shown: dict[tuple[str, str], list[str]] = {}
    attack = ""
    for row in page.rows[start + 1 :]:
        if len(row) == 1:
            attack = row[0]
        elif len(row) == 6:
            shown[attack, row[0]] = row[1:]
    for record in table.to_dict("records"):
        cells = shown[record["attack"], record["method"]]
        assert cells == [
            f"{record[m]:.3f}" for m in ("spearman", "pearson", "ssim", "top_k", "box_iou")
        ]


def test_the_report_has_the_strip_of_clean_attacked_and_defended(run: Comparison) -> None:
    entries = trios_of(run)
    assert [e.image for e in entries] == [f"{i}.png" for i in range(1, N)]
    frame = run.to_dataframe().set_index(["image", "attack", "method"])
    defended = ["defended_cam", "defended_robust", "other"]  # those with a class of their own
    for entry in entries:
        assert [strip.attack for strip in entry.strips] == ["pgd 8/255", "pgd 32/255"]
        for strip in entry.strips:
            attack = strip.attack
            assert [(tile.attack, tile.method) for tile in strip.tiles] == [
                ("clean", "cam"),
                (attack, "cam"),
                *((attack, m) for m in defended),
                *((f"{attack}, adaptive", m) for m in defended),
            ]
            for tile in strip.tiles:
                row = frame.loc[(entry.image, tile.attack, tile.method)]
                assert tile.picture
                assert tile.iou == row["iou"]
                number = row["predicted"] if tile.method == "cam" else row["decided"]
                assert tile.decided_class == run.class_name(int(number))


def test_names_from_disk_are_escaped_in_the_strip(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>.png"
    data = Right(2)
    data.ids = ["0.png", hostile]
    model = make_classifier()
    methods = {"<b>cam": LayerGradCam(model, model.cam_layer), "d": Defended(
        RobustCAM(model, model.cam_layer), [GaussianBlur(1)]
    )}  # fmt: skip
    run = run_in(tmp_path / "a", data=data, methods=methods)
    page = Page(run.to_html(tmp_path / "report.html"))
    assert [e.image for e in trios_of(run)] == [hostile]
    assert [tag for tag, _ in page.elements].count("script") == 1  # its own
    assert "b" not in {tag for tag, _ in page.elements}
    assert page.text.count(hostile) >= 2
