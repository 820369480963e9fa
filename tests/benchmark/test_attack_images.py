"""Adversarial images as files: what they hold, what is said of them, and that a run goes on."""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from captum_robust.attacks import FGSM, PGD, Attack, DeepFool, LBFGSAttack
from captum_robust.benchmark import AttackRun, attack_images, build_attacks, robust_accuracy
from captum_robust.benchmark.attack_images import Photographs
from captum_robust.data import DataError, Sample, load_image, resize
from captum_robust.data.image_lists import png_names
from captum_robust.models import Classifier, load_classifier

from .conftest import Drawn, make_classifier


def attack(
    out: Path, data: Any = None, attacks: Mapping[str, Attack] | None = None, **options: Any
) -> AttackRun:
    model = options.pop("model", None) or make_classifier()
    built = build_attacks(model, ["fgsm"], [1, 64]) if attacks is None else attacks
    options = {"progress": False, "batch_size": 4, **options}
    return attack_images(model, Drawn() if data is None else data, built, out, **options)


class Unlabelled(Drawn):
    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return Sample(sample.image, None, sample.boxes, sample.id)


def files(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*.png"))


def test_every_file_fools_when_it_is_read_and_stays_in_the_ball(tmp_path: Path) -> None:
    result = attack(tmp_path / "run", Unlabelled())
    frame = result.to_dataframe()
    assert len(frame) == 12
    assert set(frame["fooled"]) == {0, 1}
    model = make_classifier()
    for row in frame.to_dict("records"):
        if not row["fooled"]:
            assert pd.isna(row["file"])
            continue
        pixels = np.array(Image.open(result.folder / row["file"]))
        assert pixels.shape == (32, 32, 3)
        with torch.no_grad():
            scores = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        assert scores.argmax() == row["after"] != row["label"]
        assert float(scores.softmax(dim=1).max()) == pytest.approx(row["confidence"], abs=1e-5)
        sample = resize(Drawn()[int(row["image"][0])], (32, 32))
        clean = (sample.image * 255).round().permute(1, 2, 0).numpy()
        change = pixels.astype(float) - clean
        assert np.abs(change).max() == round(255 * row["linf"]) <= round(255 * row["epsilon"])
        assert np.linalg.norm(change) / 255 == pytest.approx(row["l2"], rel=1e-4)
    assert len(files(result.folder)) == frame["fooled"].sum()


def test_the_table_counts_the_rows(tmp_path: Path) -> None:
    result = attack(tmp_path / "run")  # labels 0, 1, 2, 3, 0, 1, of which the model gives only 3
    table, frame = result.table().set_index("attack"), result.to_dataframe()
    assert list(table.index) == ["fgsm 1/255", "fgsm 64/255"]
    assert table["epsilon"].tolist() == [1 / 255, 64 / 255]
    for name, row in table.iterrows():
        part = frame[frame["attack"] == name]
        assert (row["n"], row["n_right"], row["already_wrong"]) == (6, 1, 5)
        assert part["already_wrong"].sum() == 5
        assert row["robust_accuracy"] == pytest.approx((1 - part["fooled"].sum()) / 6)
    wrong = frame[frame["already_wrong"] == 1]
    assert (wrong["after"] == wrong["before"]).all()
    assert (wrong["linf"] == 0).all()
    assert not wrong["fooled"].any()


def test_all_images_are_written_on_request(tmp_path: Path) -> None:
    result = attack(tmp_path / "run", Unlabelled(), keep_all=True)
    assert len(files(result.folder)) == 12
    with pytest.raises(ValueError, match=r"settings\.written: all there, fooled here"):
        attack(tmp_path / "run", Unlabelled())


def test_the_csv_and_the_curves_lie_beside_them(tmp_path: Path) -> None:
    result = attack(tmp_path / "run", Unlabelled(3))
    read = pd.read_csv(result.write_csv())
    assert read["image"].tolist() == [f"{i}.png" for i in range(3) for _ in range(2)]
    assert read["attack"].tolist() == ["fgsm 1/255", "fgsm 64/255"] * 3
    assert set(read["after_name"]) <= {"tench", "goldfish", "shark", "ray"}
    assert Image.open(result.write_curves()).width > 400


def everything(out: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    rows = AttackRun(out).to_dataframe().to_dict("records")
    return [{k: str(v) for k, v in row.items()} for row in rows], {
        name: (out / name).read_bytes() for name in files(out)
    }


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    attack(tmp_path / "a", Unlabelled(), batch_size=2)

    class Interrupted(Unlabelled):
        def __getitem__(self, index: int) -> Sample:
            if index >= 4:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        attack(tmp_path / "b", Interrupted(), batch_size=2)
    assert len(AttackRun(tmp_path / "b").to_dataframe()) == 8
    attack(tmp_path / "b", Unlabelled(), batch_size=2)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    class Counted(FGSM):
        calls = 0

        def perturb(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super().perturb(*args, **kwargs)

    model = make_classifier()
    for _ in range(2):
        attack(tmp_path / "run", Unlabelled(), {"a": Counted(model, 0.5)}, model=model)
    assert Counted.calls == 2  # batches of 4 and 2


def test_a_file_that_is_gone_is_written_again_when_the_run_goes_on(tmp_path: Path) -> None:
    attack(tmp_path / "run", Unlabelled())
    before = everything(tmp_path / "run")
    (tmp_path / "run" / files(tmp_path / "run")[-1]).unlink()
    attack(tmp_path / "run", Unlabelled())
    assert everything(tmp_path / "run") == before


def test_no_row_is_there_before_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    module = importlib.import_module("captum_robust.benchmark.attack_images")
    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(OSError, match="no space left"):
        attack(tmp_path / "run", Unlabelled())
    early = AttackRun(tmp_path / "run").to_dataframe()
    assert not early["fooled"].any()
    monkeypatch.undo()
    attack(tmp_path / "run", Unlabelled())
    whole = attack(tmp_path / "other", Unlabelled())
    assert everything(tmp_path / "run") == everything(whole.folder)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"batch_size": 2}, "settings.batch_size: 4 there, 2 here"),
        ({"limit": 3}, "dataset.samples: 6 there, 3 here"),
        ({"target": 1}, "settings.target: None there, 1 here"),
        ({"data": Drawn(kind="other")}, "dataset.kind: drawn there, other here"),
        ({"steps": 4}, "(attacks.p, steps: 3 there, 4 here)"),
    ],
)
def test_a_folder_with_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    model = make_classifier()

    def run(steps: int = 3, **options: Any) -> None:
        attack(tmp_path / "run", attacks={"p": PGD(model, steps=steps)}, model=model, **options)

    run()
    with pytest.raises(ValueError, match="holds another run") as error:
        run(**change)
    assert difference in str(error.value)


def test_a_comparison_and_other_files_are_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds no run but other files"):
        attack(tmp_path)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


def test_a_broken_image_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    result = attack(tmp_path / "run", Unlabelled(broken=[1, 4]))
    assert result.failures() == [("1.png", "1.png: truncated"), ("4.png", "4.png: truncated")]
    assert "6 images: 2 could not be used" in result.summary()
    assert result.table()["n"].tolist() == [4, 4]
    assert result.table()["failed"].tolist() == [0, 0]
    assert result.used() == 4
    none = attack(tmp_path / "none", Unlabelled(2, broken=[0, 1]))
    assert none.used() == 0
    assert none.to_text(10) == ""
    none.write_csv()
    none.write_curves()


def test_an_attack_that_fails_on_one_image_is_that_images_error(tmp_path: Path) -> None:
    model = make_classifier()
    poison = (resize(Drawn()[2], (32, 32)).image * 255).round() / 255

    class Fragile(FGSM):
        def perturb(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
            if any(torch.equal(x, poison) for x in inputs):
                raise RuntimeError("no luck")
            return super().perturb(inputs, *args, **kwargs)

    result = attack(tmp_path / "run", Unlabelled(), {"a": Fragile(model, 0.25)}, model=model)
    assert result.failures() == [("2.png", "RuntimeError: no luck")]
    assert result.table()[["n", "failed"]].to_numpy().tolist() == [[5, 1]]


def sharp() -> Classifier:
    """Four classes that any change of the colours reaches: the mean of R, G, B, or none."""
    net = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4, bias=False)
    )
    net[2].weight.data = torch.cat([torch.eye(3), torch.zeros(1, 3)]) * 50
    return Classifier(net, input_size=8, class_names=["red", "green", "blue", "none"]).eval()


class Coloured:
    """Nearly grey images whose label is the strongest colour."""

    kind = "coloured"

    def __init__(self, *labels: int) -> None:
        self.labels = labels
        self.ids = [f"{i}.png" for i in range(len(labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = torch.full((3, 8, 8), 100 / 255)
        image[self.labels[index]] = 104 / 255
        return Sample(image, self.labels[index], torch.zeros(0, 4), self.ids[index])


def test_a_targeted_attack_moves_towards_the_class_and_skips_those_of_it(tmp_path: Path) -> None:
    model = sharp()
    attacks = build_attacks(model, ["pgd"], [1, 3])
    result = attack(tmp_path / "run", Coloured(0, 1, 2, 2), attacks, model=model, target=2)
    table = result.table().set_index("attack")
    # Towards blue from 104 to 100: 2 levels in both colours suffice, 1 does not.
    assert table["fooled"].tolist() == [0, 1]
    assert table["skipped"].tolist() == [2, 2]
    assert table["n"].tolist() == [2, 2]
    # At strength 1 red 104 and blue 100 become 103 and 101: still red.
    assert table["robust_accuracy"].tolist() == [1, 0]
    assert "right before, and now blue" in result.table_text()
    fooled = result.to_dataframe().query("fooled == 1")
    assert fooled["after"].tolist() == [2, 2]
    assert fooled["image"].tolist() == ["0.png", "1.png"]


def test_a_label_that_is_lost_to_a_third_class_is_not_robust_and_not_fooled(
    tmp_path: Path,
) -> None:
    model = sharp()

    class Astray(FGSM):
        """Makes every image green, whatever it is aimed at."""

        def perturb(self, inputs: Tensor, *_: Any, **__: Any) -> Any:
            green = torch.zeros_like(inputs)
            green[:, 1] = 1
            return green

    attacks = {"astray": Astray(model, 1.0)}
    result = attack(tmp_path / "run", Coloured(0, 0), attacks, model=model, target=2)
    row = result.table().iloc[0]
    assert (row["n_right"], row["fooled"], row["robust_accuracy"]) == (2, 0, 0)
    assert files(result.folder) == []


def test_a_target_that_all_images_are_of_is_an_error_and_leaves_no_folder(tmp_path: Path) -> None:
    model = sharp()
    attacks = build_attacks(model, ["pgd"], [1])
    with pytest.raises(ValueError, match="target: all 2 images are of class blue already"):
        attack(tmp_path / "run", Coloured(2, 2), attacks, model=model, target=2)
    with pytest.raises(ValueError, match="target: expected a class from 0 to 3, got 4"):
        attack(tmp_path / "run", Coloured(2, 2), attacks, model=model, target=4)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["a.jpg", "b.png"], ["a.png", "b.png"]),
        (["a.jpg", "a.png"], ["a.jpg.png", "a.png.png"]),
        (["A.jpg", "a.png"], ["A.jpg.png", "a.png.png"]),
        (["x/a.jpg", "y/a.jpg"], ["x/a.png", "y/a.png"]),
        (["val_00000001", "v1.2"], ["val_00000001.png", "v1.2.png"]),
        (["../../etc/passwd"], ["etc/passwd.png"]),
        (["/etc/passwd"], ["etc/passwd.png"]),
        (["..\\c:\\x.jpg"], ["_._c__x.png"]),
        (["nonutf\\xff.png"], ["nonutf_xff.png"]),
        ([".hidden.png", "a\nb\x00.png"], ["_hidden.png", "a_b_.png"]),
        (["x.jpg", "x.jpg.webp", "x.png"], ["x.jpg.png", "x.jpg.webp.png", "x.png.png"]),
        (["..", ""], ["0-image.png", "1-image.png"]),
        (["a:b.jpg", "a?b.jpg"], ["0-a_b.jpg.png", "1-a_b.jpg.png"]),
        (["a.jpg", "a.png/b.jpg"], ["0-a.jpg.png", "1-b.jpg.png"]),
    ],
)
def test_file_names_stay_inside_and_never_meet(ids: list[str], expected: list[str]) -> None:
    assert png_names(ids) == expected


def test_a_long_name_still_is_a_file(tmp_path: Path) -> None:
    ids = ["é" * 120 + ".png", "x" * 250 + ".png"]
    result = attack(tmp_path / "run", Unlabelled(2, ids=ids), keep_all=True)
    assert len(files(result.folder)) == 4


def test_a_name_from_disk_stands_on_one_line(tmp_path: Path) -> None:
    result = attack(tmp_path / "run", Unlabelled(1, ids=["a\nb\x1b[31m.png"]))
    assert "a b" in result.to_text(10)
    assert len(result.to_text(10).splitlines()) == 3


def test_no_cell_of_the_table_is_a_formula(tmp_path: Path) -> None:
    ids = [
        '=HYPERLINK("x").png',
        "+1.png",
        "-1.png",
        "@a.png",
        "\t=1.png",
        "\uff1d1.png",
        "a=1.png",
    ]
    images = Unlabelled(7, ids=ids)
    with attack(tmp_path / "run", images).write_csv().open(newline="") as file:
        cells = {row["image"] for row in csv.DictReader(file)}
    assert cells == {"a=1.png", *(f"'{id}" for id in ids[:-1])}


def test_a_name_with_the_end_of_a_line_is_one_cell(tmp_path: Path) -> None:
    ids = ["a\rb.png", "a\nb.png", "a\u2028b.png", "a\x85b.png", 'a"b,c.png']
    path = attack(tmp_path / "run", Unlabelled(5, ids=ids)).write_csv()
    with path.open(newline="", encoding="utf-8") as file:
        assert {row["image"] for row in csv.DictReader(file)} == set(ids)
    assert set(pd.read_csv(path)["image"]) == set(ids)


def test_the_text_shows_the_first_rows_and_counts_the_others(tmp_path: Path) -> None:
    text = attack(tmp_path / "run", Unlabelled()).to_text(5)
    assert len(text.splitlines()) == 7
    assert text.endswith("and 7 rows more, all in the table")
    assert re.search(r"0\.png +fgsm 64/255 +ray +ray +\w+ +0\.\d+ +64/255 .* fooled", text)


def test_a_photograph_is_a_data_set_of_one(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30, 3), 128, dtype=np.uint8)).save(tmp_path / "p.png")
    out = tmp_path / "out"
    data = Photographs([tmp_path / "p.png"], without=out)
    assert (len(data), data.ids, data[0].label, data[0].size) == (1, ["p.png"], None, (20, 30))
    with pytest.raises(FileNotFoundError, match="no such image or folder"):
        Photographs([tmp_path / "q.png"], without=out)
    (tmp_path / "torn.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="torn"):
        Photographs([tmp_path / "torn.png"], without=out)[0]


def test_several_photographs_have_names_that_tell_them_apart(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((20, 30, 3), 128, dtype=np.uint8))
    for folder in ("a", "b", "out"):
        (tmp_path / folder).mkdir()
        grey.save(tmp_path / folder / "p.png")
    grey.save(tmp_path / "q.png")
    paths = [tmp_path / "q.png", tmp_path / "a" / "p.png", tmp_path / "b", tmp_path / "out"]
    data = Photographs(paths, without=tmp_path / "out")
    assert data.ids == ["q.png", "a/p.png", "b/p.png"]
    assert data[2].source == str(tmp_path / "b" / "p.png")
    assert Photographs(paths[1:2] * 2, without=tmp_path / "out").ids == ["p.png"]


@pytest.mark.data
def test_attacked_photographs_fool_efficientnet_after_reading(
    real_data: Path, tmp_path: Path
) -> None:
    from captum_robust.data import load_dataset

    model = load_classifier("efficientnet_lite0")
    attacks = build_attacks(model, ["pgd"], [1])
    data = load_dataset("imagenet", real_data / "imagenet-val-400")
    result = attack(tmp_path / "run", data, attacks, model=model, limit=4)
    frame = result.to_dataframe()
    fooled = frame[frame["fooled"] == 1]
    assert len(fooled) >= 2
    for row in fooled.to_dict("records"):
        with torch.no_grad():
            scores = model(load_image(result.folder / row["file"])[None])[0]
        assert int(scores.argmax()) == row["after"] != row["label"]
    assert fooled["linf"].max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("attack", [DeepFool, LBFGSAttack])
def test_the_smallest_change_is_looked_for_among_the_images_that_are_judged(attack: Any) -> None:
    """Without a word about bytes: the smallest change of floats is gone when it is rounded."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = net(images).argmax(dim=1)
    table = robust_accuracy(net, attack(net), [(images, labels)], [1.0])
    assert table["robust_accuracy"].item() == 0.0
