"""Attacks by name, what a comparison says of them, robust accuracy."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from captum_robust.attacks import FGSM, PGD, GradientStep, UniversalPerturbation
from captum_robust.benchmark import (
    ATTACKS,
    AttackOptions,
    Comparison,
    attack_images,
    build_attacks,
    compare,
    plot_robust_accuracy,
    robust_accuracy,
    summarize_attack,
)
from captum_robust.benchmark.robust_accuracy import rounded_attack
from captum_robust.catalog.attacks import parse_epsilons, strength_name, strength_of
from captum_robust.data import Sample, resize
from captum_robust.models import Classifier

from .conftest import Drawn, centre_heat, make_classifier


class Predicted(Drawn):
    """Drawn images with the tiny classifier's own predictions as labels, but for two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        images = torch.stack([resize(Drawn(self.n)[i], (32, 32)).image for i in range(self.n)])
        with torch.no_grad():
            self.predictions = make_classifier()(images).argmax(dim=1).tolist()

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        label = (self.predictions[index] + (index < 2)) % 4
        return Sample(sample.image, label, sample.boxes, sample.id)


def shift(amount: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, _: (images + amount).clamp(0, 1)


def test_strengths_are_levels_of_an_8_bit_image(model: Classifier) -> None:
    built = build_attacks(model, ["fgsm", "pgd", "least_likely"], [1, 8], AttackOptions(steps=3))
    assert list(built) == [
        *("fgsm 1/255", "fgsm 8/255", "pgd 1/255", "pgd 8/255"),
        *("least_likely 1/255", "least_likely 8/255"),
    ]
    assert built["pgd 8/255"].epsilon == 8 / 255
    assert built["pgd 8/255"].early_stop
    whole = build_attacks(model, ["pgd"], [8], AttackOptions(all_steps=True))
    assert not whole["pgd 8/255"].early_stop
    assert built["pgd 8/255"].steps == built["least_likely 1/255"].steps == 3
    assert build_attacks(model, ["pgd"], [1], AttackOptions(seed=7))["pgd 1/255"].seed == 7


def test_an_attack_without_strength_runs_once(model: Classifier) -> None:
    assert list(build_attacks(model, ["deepfool"], [1, 8])) == ["deepfool"]


def test_a_saved_universal_perturbation_is_an_attack(model: Classifier, tmp_path: Path) -> None:
    images = torch.stack([resize(Drawn()[i], (32, 32)).image for i in range(4)])
    fitted = UniversalPerturbation(model, 8 / 255).fit([images], passes=2)
    fitted.save(tmp_path / "v.safetensors")
    options = AttackOptions(universal=tmp_path / "v.safetensors")
    attack = build_attacks(model, ["universal"], [1], options)["universal"]
    expected = (images + fitted.perturbation).clamp(0, 1)
    torch.testing.assert_close(attack.perturb(images), expected)
    assert fitted.perturbation.abs().max() > 0
    with pytest.raises(ValueError, match="universal: this attack needs the file"):
        build_attacks(model, ["universal"], [1])


@pytest.mark.parametrize("name", ["fgsm", "pgd", "least_likely", "deepfool", "lbfgs"])
def test_every_named_attack_keeps_to_the_contract(model: Classifier, name: str) -> None:
    (attack,) = build_attacks(model, [name], [8]).values()
    images = torch.stack([resize(Drawn()[i], (32, 32)).image for i in range(3)])
    found = attack.perturb(images)
    assert found.shape == images.shape
    assert 0 <= found.min() <= found.max() <= 1
    if ATTACKS[name].has_strength:
        assert (found - images).abs().max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize(
    ("names", "epsilons", "message"),
    [
        (["pdg"], [1], r"attack: .*got 'pdg'; did you mean 'pgd'"),
        ([], [1], "attack: expected at least one"),
        (["pgd", "pgd"], [1], "attack: expected at least one, and each once"),
        (["pgd"], [2, 2.0], "epsilon: expected at least one, and each once"),
        (["pgd"], [-1], "epsilon: expected numbers from 0 to 255"),
        (["pgd"], [256], "epsilon: expected numbers from 0 to 255"),
        (["pgd"], [math.nan], "epsilon: expected numbers from 0 to 255"),
    ],
)
def test_wrong_names_and_strengths_are_refused(
    model: Classifier, names: list[str], epsilons: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_attacks(model, names, epsilons)


@pytest.mark.parametrize("text", ["", "1,,2", "a", "-1", "255.5", "nan", "inf", "1;2"])
def test_strengths_that_are_no_numbers_in_range_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="epsilon: expected numbers from 0 to 255"):
        parse_epsilons(text)


@pytest.mark.parametrize("epsilon", [0, 0.5, 2, 8.25, 255, 1e-05])
def test_a_name_says_its_strength(epsilon: float) -> None:
    assert strength_of(strength_name("my attack", epsilon)) == ("my attack", epsilon)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    model = make_classifier()
    attacks = {**build_attacks(model, ["fgsm"], [1, 64]), "shift": shift(0.1)}
    methods = {"bright": centre_heat, "saliency": "saliency"}
    out = tmp_path_factory.mktemp("run")
    return compare(model, Predicted(), methods, attacks, out=out, progress=False)


def test_an_image_is_fooled_if_it_was_right_and_is_not_any_more(run: Comparison) -> None:
    model = make_classifier()
    frame = run.to_dataframe()
    for strength in (1, 64):
        part = frame[(frame["attack"] == f"fgsm {strength}/255") & (frame["method"] == "saliency")]
        attack = FGSM(model, strength / 255)
        images = torch.stack([resize(Predicted()[i], (32, 32)).image for i in range(6)])
        labels = torch.tensor([Predicted()[i].label for i in range(6)])
        changed = attack.perturb(images, labels)
        with torch.no_grad():
            lost = model(changed).argmax(dim=1) != labels
        wrong = torch.arange(6) < 2
        assert part["already_wrong"].tolist() == wrong.int().tolist()
        assert part["fooled"].tolist() == (lost & ~wrong).int().tolist()
        change = (changed - images).flatten(1)
        assert part["linf"].tolist() == pytest.approx(change.abs().amax(dim=1).tolist())
        assert part["l2"].tolist() == pytest.approx(change.norm(dim=1).tolist())
    assert frame[frame["attack"] == "clean"][["fooled", "linf"]].isna().all(axis=None)
    assert frame["fooled"].sum() > 0


def test_the_table_of_attacks_counts_the_rows(run: Comparison) -> None:
    table = run.attack_table().set_index("attack")
    assert list(table.index) == ["fgsm 1/255", "fgsm 64/255", "shift"]
    assert table["epsilon"].tolist()[:2] == [1 / 255, 64 / 255]
    frame = run.to_dataframe()
    for attack, row in table.iterrows():
        part = frame[(frame["attack"] == attack) & (frame["method"] == "bright")]
        assert (row["n"], row["n_right"], row["already_wrong"]) == (6, 4, 2)
        assert row["clean_accuracy"] == pytest.approx(4 / 6)
        assert row["fooled"] == pytest.approx(part["fooled"].sum() / 4)
        assert row["robust_accuracy"] == pytest.approx((4 - part["fooled"].sum()) / 6)
        assert row["robust_low"] <= row["robust_accuracy"] <= row["robust_high"]
    assert table.loc["shift", "linf"] == pytest.approx(0.1, abs=1e-6)


def test_the_table_of_methods_says_it_too(run: Comparison) -> None:
    table = run.table()
    shared = ["n_right", "already_wrong", "fooled", "robust_accuracy"]
    assert table[table["attack"] == "clean"][shared].isna().all(axis=None)
    expected = run.attack_table().set_index("attack")
    for row in table[table["attack"] != "clean"].to_dict("records"):
        assert [row[c] for c in shared] == expected.loc[row["attack"], shared].tolist()


def test_the_text_has_a_table_of_attacks_and_the_error_under_each(run: Comparison) -> None:
    text = run.to_text()
    fooled = run.attack_table().set_index("attack").loc["fgsm 64/255", "fooled"]
    assert f"{fooled:.3f} of 4" in text
    errors = run.error_by_attack()
    assert list(errors.columns) == run.attacks
    records = run.table().set_index(["method", "attack"])["error"]
    for method in run.methods:
        for attack in run.attacks:
            assert errors.loc[method, attack] == records[(method, attack)]
    assert "error under attack" in text


def test_without_attacks_nothing_is_said_of_them(model: Classifier, drawn: Drawn) -> None:
    result = compare(model, drawn, ["saliency"], progress=False)
    assert not {"fooled", "robust_accuracy", "already_wrong"} & set(result.table())
    assert result.attack_table().empty
    assert "robust" not in result.to_text()


def test_without_labels_the_prediction_is_the_label(model: Classifier) -> None:
    class Unlabelled(Drawn):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return Sample(sample.image, None, sample.boxes, sample.id)

    attacks = build_attacks(model, ["fgsm"], [64])
    result = compare(model, Unlabelled(), ["saliency"], attacks, progress=False)
    row = result.attack_table().iloc[0]
    assert (row["clean_accuracy"], row["already_wrong"], row["unlabelled"]) == (1, 0, 6)
    assert "without a label: 6" in result.to_text()


def test_a_batch_is_attacked_once_whatever_the_methods_also_on_resume(
    model: Classifier, tmp_path: Path
) -> None:
    calls: list[int] = []

    def counted(images: Tensor, _: Tensor) -> Tensor:
        calls.append(len(images))
        return (images + 0.2 * torch.rand_like(images)).clamp(0, 1)

    methods = ["saliency", "grad_cam", "robust_cam"]
    arguments: dict[str, Any] = {"batch_size": 4, "progress": False}
    whole = compare(model, Drawn(), methods, {"n": counted}, out=tmp_path / "a", **arguments)
    assert calls == [4, 2]
    alone = compare(model, Drawn(), methods[:1], {"n": counted}, **arguments)
    columns = "position, fooled, linf, l2, picture, change"
    query = f"SELECT {columns} FROM attacked ORDER BY position"
    assert alone.select(query) == whole.select(query)  # its draws do not depend on the methods
    before = whole.select("SELECT * FROM attacked ORDER BY position")
    whole._store._database.execute(
        "DELETE FROM results WHERE method <> 'saliency' AND attack = 'n' AND position >= 4"
    )
    calls.clear()
    again = compare(model, Drawn(), methods, {"n": counted}, out=tmp_path / "a", **arguments)
    assert calls == [2]
    assert again.select("SELECT * FROM attacked ORDER BY position") == before
    assert again.select("SELECT count(*) AS n FROM results")[0]["n"] == 6 * 3 * 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda m: PGD(m, 1 / 255, 10), lambda m: PGD(m, 1 / 255, 20)),
        (lambda m: PGD(m, 1 / 255), lambda m: PGD(m, 2 / 255)),
        (lambda m: PGD(m, seed=0), lambda m: PGD(m, seed=1)),
        (lambda m: PGD(m), lambda m: PGD(m, loss_func=lambda s, c: -s.gather(1, c[:, None])[:, 0])),
    ],
    ids=["steps", "epsilon", "seed", "loss"],
)
def test_another_setting_of_an_attack_is_another_run(
    model: Classifier, drawn: Drawn, tmp_path: Path, first: Any, second: Any
) -> None:
    compare(model, drawn, ["saliency"], {"a": first(model)}, out=tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match=r"holds another run \(attacks\.a"):
        compare(
            model, drawn, ["saliency"], {"a": second(model)}, out=tmp_path / "a", progress=False
        )


def test_run_json_holds_name_strength_steps_and_seed(model: Classifier, tmp_path: Path) -> None:
    attacks = build_attacks(model, ["pgd"], [2], AttackOptions(steps=5, seed=3))
    compare(model, Drawn(2), ["saliency"], attacks, out=tmp_path / "run", progress=False)
    described = json.loads((tmp_path / "run" / "run.json").read_text())["attacks"]["pgd 2/255"]
    for setting in (f"epsilon={2 / 255!r}", "steps=5", "seed=3"):
        assert setting in described


def test_an_attack_that_fails_on_an_image_is_counted(model: Classifier, drawn: Drawn) -> None:
    poison = resize(drawn[2], (32, 32)).image

    def fragile(images: Tensor, _: Tensor) -> Tensor:
        if any(torch.equal(x, poison) for x in images):
            raise RuntimeError("no luck")
        return images

    result = compare(model, Drawn(broken=[5]), ["saliency"], {"fragile": fragile}, progress=False)
    row = result.attack_table().iloc[0]
    assert (row["n"], row["failed"]) == (4, 1)


def test_a_summary_by_hand() -> None:
    already = torch.tensor([True, False, False, False, False])
    fooled = torch.tensor([False, True, True, True, False])
    linf, l2 = torch.tensor([9.0, 1, 2, 3, 4]), torch.tensor([9.0, 2, 4, 6, 8])
    summary = summarize_attack(already, fooled, linf, l2)
    assert (summary.n, summary.n_right, summary.already_wrong) == (5, 4, 1)
    assert (summary.clean_accuracy, summary.fooled) == (0.8, 0.75)
    assert summary.robust_accuracy == pytest.approx(0.2)
    assert (summary.linf, summary.l2) == (2.5, 5.0)  # without the one that was wrong before
    assert math.isnan(summarize_attack(already[:0], fooled[:0], linf[:0], l2[:0]).robust_accuracy)


class Brightness(torch.nn.Module):
    """Class 1 where the mean is above a half."""

    def forward(self, x: Tensor) -> Tensor:
        above = x.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-above, above], dim=1)


def grey(*levels: int) -> Tensor:
    return (torch.tensor(levels) / 255).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def test_robust_accuracy_of_a_threshold_by_hand() -> None:
    # 120 and 125 are class 0 by 7.5 and 2.5 levels, 140 class 1 by 12.5; the last is mislabelled.
    images, labels = grey(120, 125, 140, 200), torch.tensor([0, 0, 1, 0])
    model = Brightness()
    frame = robust_accuracy(
        model, FGSM(model), [(images[:3], labels[:3]), (images[3:], labels[3:])],
        [0, 2 / 255, 3 / 255, 8 / 255, 13 / 255],
    )  # fmt: skip
    assert frame["robust_accuracy"].tolist() == [0.75, 0.75, 0.5, 0.25, 0.0]
    assert frame["fooled"].tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert (frame["clean_accuracy"] == 0.75).all()
    assert (frame["already_wrong"] == 1).all()
    assert frame["linf"].tolist() == pytest.approx([0, 2 / 255, 3 / 255, 8 / 255, 13 / 255])
    loader = DataLoader(TensorDataset(images, labels), batch_size=3)
    pd.testing.assert_frame_equal(
        frame.iloc[[3]].reset_index(drop=True),
        robust_accuracy(model, FGSM(model), loader, [8 / 255]),
    )


def test_a_weaker_attack_that_fools_says_nothing_of_a_stronger_one() -> None:
    class Moody:
        """Fools at the weaker strength only."""

        def perturb(self, images: Tensor, _: Tensor, epsilon: float) -> Tensor:
            return 1 - images if epsilon < 0.1 else images

    frame = robust_accuracy(Brightness(), Moody(), [(grey(50), torch.tensor([0]))], [0.05, 0.2])
    assert frame["robust_accuracy"].tolist() == [0, 1]


def test_what_the_rounding_to_8_bits_undoes_does_not_count() -> None:
    class Slight:
        def perturb(self, images: Tensor, _: Tensor, epsilon: float) -> Tensor:
            return images + 0.6 / 255 * epsilon

    model, data = Brightness(), [(grey(127), torch.tensor([0]))]
    assert model(grey(127) + 0.6 / 255).argmax() == 1
    frame = robust_accuracy(model, Slight(), data, [0.5, 1.0])
    assert frame["fooled"].tolist() == [0, 1]


def test_rounding_leaves_no_ball() -> None:
    images = grey(100)
    attacked = images + 1.5 / 255
    assert (rounded_attack(images, attacked, 1.5 / 255) * 255).round().unique().tolist() == [101]
    assert (rounded_attack(images, attacked, None) * 255).round().unique().tolist() == [102]
    for level in range(1, 256):
        full = rounded_attack(grey(0), grey(0) + level / 255, level / 255)
        assert (full * 255).round().unique().tolist() == [level]


def test_a_factor_of_the_gradient_is_no_ball() -> None:
    model = Brightness()
    data = [(grey(100), torch.tensor([0]))]
    frame = robust_accuracy(model, GradientStep(model), data, [1e-9, 1e3])
    assert frame["fooled"].tolist() == [0, 1]


def test_samples_are_resized_and_those_without_label_measured_against_the_prediction(
    model: Classifier,
) -> None:
    frame = robust_accuracy(model, FGSM(model), Predicted(), [64 / 255], batch_size=4)
    unlabelled = [
        Sample(s.image, None, s.boxes, s.id) for s in map(Predicted().__getitem__, [0, 1])
    ]
    assert frame.loc[0, "n_right"] == 4
    alone = robust_accuracy(model, FGSM(model), unlabelled, [64 / 255])
    assert alone.loc[0, "n_right"] == 2
    limited = robust_accuracy(model, FGSM(model), Predicted(), [64 / 255], batch_size=4, limit=3)
    assert limited.loc[0, "n"] == 3


def test_no_image_that_is_classified_right_is_an_error() -> None:
    model = Brightness()
    with pytest.raises(ValueError, match="none of the 2 images right, so there is nothing"):
        robust_accuracy(model, FGSM(model), [(grey(10, 20), torch.tensor([1, 1]))], [0.1])
    with pytest.raises(ValueError, match="data: expected images, got none"):
        robust_accuracy(model, FGSM(model), [], [0.1])
    with pytest.raises(ValueError, match="epsilons: expected at least one"):
        robust_accuracy(model, FGSM(model), [(grey(10), torch.tensor([0]))], [])
    with pytest.raises(TypeError, match="expected samples, or batches"):
        robust_accuracy(model, FGSM(model), [grey(10)], [0.1])


def test_pixels_that_are_not_in_the_unit_range_are_refused() -> None:
    model, labels = Brightness(), torch.tensor([0])
    for images in (255 * grey(100), (255 * grey(100)).to(torch.uint8), grey(100) - 1):
        with pytest.raises(ValueError, match=r"data: expected pixels in \[0, 1\]"):
            robust_accuracy(model, FGSM(model), [(images, labels)], [0.1])


def test_any_function_can_be_measured() -> None:
    model = Brightness()
    data = [(grey(100), torch.tensor([0]))]
    frame = robust_accuracy(lambda x: model(x), PGD(model), data, [0, 64 / 255])
    assert frame["fooled"].tolist() == [0, 1]


def test_the_model_is_left_in_its_mode(model: Classifier) -> None:
    model.train()
    robust_accuracy(model, FGSM(model), Predicted(4), [0.5])
    assert model.training


def test_curves_begin_with_the_clean_accuracy() -> None:
    rows = pd.DataFrame(
        {
            "epsilon": [8 / 255, 1 / 255],
            "n": [10, 10],
            "clean_accuracy": [0.9, 0.9],
            "robust_accuracy": [0.1, 0.5],
            "robust_low": [0.0, 0.3],
            "robust_high": [0.2, 0.7],
        }
    )
    figure = plot_robust_accuracy({"_pgd$": rows, "fgsm": rows})
    figure.canvas.draw()
    (axes,) = figure.get_axes()
    lines = [line for line in axes.lines if line.get_marker() == "o"]
    assert len(lines) == 2
    assert list(lines[0].get_xdata()) == pytest.approx([0, 1, 8])
    assert list(lines[0].get_ydata()) == pytest.approx([90, 50, 10])
    bars = [bar for bars in axes.collections for bar in bars.get_segments()]
    assert sorted(tuple(map(round, bar[:, 1])) for bar in bars) == [(0, 20)] * 2 + [(30, 70)] * 2
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["_pgd$", "fgsm"]


def test_the_plot_of_a_run_has_a_line_an_attack_with_strengths(run: Comparison) -> None:
    figure = run.plot_attacks()
    figure.canvas.draw()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["fgsm"]


class Rounded(torch.nn.Module):
    """Brightness in steps of a tenth, through which no gradient flows; dark images are smooth."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        above = torch.where(mean < 0.3, mean, mean.detach().mul(10).round().div(10) + 0 * mean)
        return torch.stack([0.29 - above, above - 0.29], dim=1)


def grey_samples(*levels: float) -> list[Sample]:
    """Images of one level each, 0 where it is below .29, else 1; the last of the wrong class."""
    labels = [int(level > 0.29) for level in levels[:-1]] + [0]
    return [
        Sample(torch.full((3, 8, 8), v), y, torch.tensor([[1.0, 1, 5, 5]]), str(i))
        for i, (v, y) in enumerate(zip(levels, labels, strict=True))
    ]


# By hand: two bright ones without a gradient, one dark one that 8/255 takes beyond .29, one that is
# too dark for that, one bright one that is wrong to begin with.
GREY = grey_samples(0.6, 0.8, 0.28, 0.1, 0.7)


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_images_without_a_gradient_are_counted_and_said(tmp_path: Path) -> None:
    model = Classifier(Rounded(), input_size=8)
    attack = PGD(model, 8 / 255, steps=3)
    attacks = {"pgd 8/255": attack, "wrapped": lambda x, y: attack.perturb(x, y)}
    run = compare(model, GREY, ["center_box"], attacks, out=tmp_path / "run", progress=False)
    table = run.attack_table()
    assert table["without_gradient"].tolist() == [2, 2]
    assert table[["n", "n_right", "already_wrong"]].to_numpy().tolist() == [[5, 4, 1]] * 2
    assert table["robust_accuracy"].tolist() == [0.2, 0.2]
    rows = run.select("SELECT * FROM attacked ORDER BY attack, position")
    assert [row["without_gradient"] for row in rows] == [1, 1, 0, 0, 0] * 2
    assert [row["fooled"] for row in rows] == [0, 0, 1, 0, 0] * 2
    frame = run.to_dataframe()
    assert frame[frame["attack"] == "wrapped"]["without_gradient"].tolist() == [1, 1, 0, 0, 0]
    text = run.to_text()
    assert "no gradient" in text.splitlines()[text.splitlines().index("attacks") + 1]
    assert "the attack could not try, as their gradient was zero" in text
    page = run.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No gradient" in page
    assert "the attack could not try, as their gradient was zero" in page
    assert page.count("no gradient to attack by") == 4  # two images under two attacks
    # A run of an earlier version has no such column.
    database = sqlite3.connect(tmp_path / "run" / "rows.sqlite", isolation_level=None)
    database.execute("ALTER TABLE attacked DROP COLUMN without_gradient")
    database.close()
    assert Comparison(tmp_path / "run").attack_table()["without_gradient"].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_robust_accuracy_and_attacked_files_count_images_without_a_gradient(tmp_path: Path) -> None:
    model = Classifier(Rounded(), input_size=8)
    attack = PGD(model, 8 / 255, steps=3)
    table = robust_accuracy(model, attack, GREY, [0.0, 8 / 255])
    assert table["without_gradient"].tolist()[1] == 2
    run = attack_images(model, GREY, {"pgd 8/255": attack}, tmp_path, progress=False)
    assert run.table()["without_gradient"].tolist() == [2]
    assert run.to_dataframe()["without_gradient"].tolist() == [1, 1, 0, 0, 0]
    assert run.to_text(9).count("no gradient") == 2
    assert "the attack could not try, as their gradient was zero" in run.table_text()
    smooth = attack_images(
        model, GREY[2:], {"pgd 8/255": attack}, tmp_path / "smooth", progress=False
    )
    assert "gradient" not in smooth.table_text()
