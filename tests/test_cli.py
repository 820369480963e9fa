from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from captum_robust.attr import AdversarialLocalization, RealTimeMasking
from captum_robust.benchmark import Comparison, compare
from captum_robust.benchmark.reading import SampleReader
from captum_robust.cli.model_options import class_names
from captum_robust.data import load_dataset
from captum_robust.models import load_classifier, save_classifier
from captum_robust.nn import (
    CorruptionNetwork,
    LocalizationNetwork,
    MaskingNetwork,
    SimpleConvNet,
    load_masking_network,
    save_localization_network,
    save_masking_network,
)

Run = Callable[..., tuple[int, str, str]]


def draw(folder: Path, n: int = 4) -> Path:
    """Images with a bright square, and boxes.csv."""
    folder.mkdir(parents=True)
    lines = ["file,x0,y0,x1,y1,label"]
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 90, (60, 80, 3), dtype=np.uint8)
        pixels[10:40, 20:60] = 200
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,20,10,60,40,{i}")
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    return folder


def one_line(err: str) -> str:
    """The error of a run: exactly one line, and no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("captum-robust")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_compare_prints_the_table_and_counts_what_it_could_not_use(
    run: Run, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0torn")
    (folder / "<script>.png").write_bytes((folder / "0.png").read_bytes())
    code, out, _ = run("compare", "folder", folder, "--methods", "robust_cam, center_box")
    assert code == 0
    assert "robust_cam" in out
    assert "center_box" in out
    assert "6 images: 1 could not be used, 1 without a box" in out
    assert "torn.jpg" in out
    report = (tmp_path / "captum-robust-compare" / "report.html").read_text(encoding="utf-8")
    assert "<script>.png" not in report


def test_thresholds_are_chosen_as_asked(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images")
    named = ("compare", "folder", folder, "--methods", "robust_cam,saliency,guided_backprop")
    for way, said in (
        ("shipped", "as they ship for each method"),
        ("pseudo", "tuned on boxes that the other methods agree on"),
        ("two-fold", "tuned on the"),
    ):
        code, out, _ = run(*named, "--thresholds", way)
        assert code == 0
        assert said in out
        assert way in (tmp_path / "captum-robust-compare/report.html").read_text("utf-8")
    code, _, err = run(*named, "--thresholds", "guess")
    assert code == 2
    assert "--thresholds: expected one of" in err
    code, _, err = run(*named, "--thresholds", "shipped", "--oracle")
    assert code == 2
    assert "give one of them" in err


def test_faithfulness_adds_its_columns_and_makes_another_run(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=2)
    named = ("compare", "folder", folder, "--model", "small_resnet", "--weights", "none")
    named += ("--methods", "center_box")
    named += ("--sensitivity", "--randomization", "--faithfulness")
    code, out, _ = run(*named)
    assert code == 0
    assert {"deletion", "insertion", "road", "infidelity", "sensitivity"} <= set(out.split())
    assert "randomized rank" in out
    code, _, err = run(*named[:-1])
    assert code == 2
    assert "settings.faithfulness" in one_line(err)


def test_a_run_in_which_a_method_fails_on_every_image_ends_with_its_reason(
    run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(2):
        (folder / f"{k}.jpg").write_bytes(b"\xff\xd8\xff\xe0torn")
    code, out, err = run("compare", "folder", folder, "--methods", "center_box")
    assert code == 2
    assert "none of the 2 images could be used" in one_line(err)
    assert "(2×)" in err
    assert "2× (all): " in out
    assert "report.html" in out


def test_a_folder_without_a_box_says_that_nothing_was_scored(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=2)
    (folder / "boxes.csv").unlink()
    code, out, _ = run("compare", "folder", folder, "--methods", "center_box")
    assert code == 0
    assert "2 without a box; nothing was scored, for no image has a box" in out


def test_strange_images_and_boxes_are_handled_or_rows_with_their_error(
    run: Run, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images", n=1)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels[:, :, 0]).save(folder / "grey.png")
    Image.fromarray(np.dstack([pixels, pixels[:, :, :1]])).save(folder / "rgba.png")
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(pixels[:1, :1]).save(folder / "dot.png")
    Image.fromarray(pixels).save(folder / "outside.png")
    Image.fromarray(pixels).save(folder / "flat.png")
    Image.fromarray(pixels).save(folder / "whole.jpg")
    torn = (folder / "whole.jpg").read_bytes()
    (folder / "torn.jpg").write_bytes(torn[: len(torn) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    with (folder / "boxes.csv").open("a") as table:
        for name in ("grey.png", "rgba.png", "sixteen.png", "whole.jpg", "torn.jpg"):
            table.write(f"{name},5,5,40,40,1\n")
        table.write("dot.png,0,0,1,1,1\n")
        table.write("outside.png,5,5,400,40,1\nflat.png,5,5,5,40,1\nmissing.png,5,5,40,40,1\n")
    code, out, err = run("compare", "folder", folder, "--methods", "robust_cam,saliency")
    assert code == 0, err
    assert "Traceback" not in out + err
    failures = Comparison(tmp_path / "captum-robust-compare").failures().set_index("image")["error"]
    assert set(failures.index) == {
        "outside.png",
        "flat.png",
        "missing.png",
        "torn.jpg",
        "empty.jpg",
    }
    assert "boxes.csv:9" in failures["outside.png"]
    assert "boxes.csv:10" in failures["flat.png"]
    assert "11 images: 5 could not be used" in out


def test_explain_draws_one_picture_an_image(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=2)
    code, out, _ = run("explain", folder, "--methods", "robust_cam,saliency", "--top", 3)
    assert code == 0
    assert out.count("%") == 6
    for name in ("0.png", "1.png"):
        with Image.open(tmp_path / "captum-robust-explain" / name) as picture:
            assert picture.width > 3 * 300
    code, out, _ = run("explain", folder / "0.png", "--target", "tabby", "--out", "one")
    assert code == 0
    assert (tmp_path / "one" / "0.png").is_file()


def test_explain_certifies_maps_and_boxes(run: Run, tmp_path: Path) -> None:
    file = draw(tmp_path / "images", n=1) / "0.png"
    named = ("explain", file, "--methods", "robust_cam,center_box", "--certify", "0.25")
    named += ("--certify-samples", 40, "--certify-radii", "0.1", "--save-maps")
    code, out, err = run(*named, "--json")
    assert code == 0
    assert "certify" in err
    said = json.loads(out)
    proof = said["certificates"]["robust_cam"]
    assert (proof["sigma"], proof["samples"], proof["confidence"]) == (0.25, 40, 0.999)
    (within,) = proof["radii"]
    assert (within["radius"], within["least_samples"]) == (0.1, 33)
    states = np.load(said["maps"]["robust_cam.certified"])
    assert states.shape[0] == 1
    assert set(np.unique(states)) <= {0, 0.5, 1}
    assert np.load(said["maps"]["robust_cam"]).shape == states.shape[1:]
    assert within["inside"] + within["outside"] == pytest.approx(within["certified_share"])
    assert within["inside"] == pytest.approx((states == 1).mean(), abs=1e-6)
    x0, y0, x1, y1 = within["outer_box"]
    assert -0.01 <= x0 <= proof["box"][0]
    assert proof["box"][2] <= x1 <= 80.01
    assert -0.01 <= y0 < y1 <= 60.01
    (of_box,) = said["certificates"]["center_box"]["radii"]
    assert of_box["inner_box"] == of_box["outer_box"] == said["boxes"]["center_box"]
    assert of_box["certified_share"] == 1
    # One row for each method: the map, and what is certified of it.
    with Image.open(said["picture"]) as picture:
        assert picture.size[0] == 2 * 360 + 3 * 8
    before = Path(said["picture"]).stat().st_mtime_ns
    code, again, err = run(*named)  # nothing is made again
    assert code == 0
    assert Path(said["picture"]).stat().st_mtime_ns == before
    assert "center_box within 0.1: 100% of the pixels are certified; the box between [" in again
    code, plain, _ = run("explain", file, "--methods", "center_box", "--json", "--out", "plain")
    assert "certificates" not in json.loads(plain)


def test_compare_certifies_from_the_command(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=2)
    named = ("compare", "folder", folder, "--boxes", folder / "boxes.csv")
    named += ("--methods", "center_box", "--certify", "0.25", "--json")
    code, out, _ = run(*named)
    assert code == 0
    rows = json.loads(out)["table"]
    assert [row["certified_share_0.1"] for row in rows] == [1, 1]
    assert all(row["certified_error_0.5"] == row["error"] for row in rows)
    code, _, err = run(*named, "--certify-samples", "200")
    assert code == 2
    assert "settings.certificates" in one_line(err)


def test_explain_says_what_a_perturbation_made_of_the_image(run: Run, tmp_path: Path) -> None:
    file = draw(tmp_path / "images", n=1) / "0.png"
    code, out, _ = run("explain", file, "--methods", "smallest_perturbation,robust_cam")
    assert code == 0
    first = out.splitlines()[1].split("%")[1].strip()
    (said,) = [line for line in out.splitlines() if line.startswith("  smallest_perturbation: ")]
    assert said.split(": ")[1].startswith("flipped to ")
    assert not said.endswith(f"to {first}")
    code, out, _ = run("explain", file, "--counterfactual", "lynx", "--top", 1)
    assert code == 0
    assert "  perceptual_ball: " in out
    assert "lynx" in out
    code, _, err = run("explain", file, "--counterfactual", first)
    assert code == 2
    assert f"the counterfactual class, {first}, is the prediction already" in one_line(err)


def test_compare_and_explain_run_on_the_sample_photographs(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("compare", "samples", "--methods", "robust_cam,center_box", "--limit", 3)
    assert code == 0
    assert "3 images: 0 could not be used, 0 without a box" in out
    skimage = pytest.importorskip("skimage")
    coffee = Path(skimage.__file__).parent / "data" / "coffee.png"
    code, out, _ = run("explain", coffee, "--layer", "blocks.15")
    assert code == 0
    assert "%  espresso" in out.splitlines()[1]


def test_every_table_has_the_baselines(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("compare", "folder", draw(tmp_path / "images"), "--methods", "robust_cam")
    assert code == 0
    assert Comparison(tmp_path / "captum-robust-compare").methods == [
        "robust_cam",
        "center_box",
        "whole_image",
    ]
    assert "whole_image" in out


@pytest.fixture
def masking(tmp_path: Path) -> tuple[str, ...]:
    """Options that name a small classifier, for which masks.safetensors is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_classifier("small_resnet", None, class_names=list("abcd"), input_size=32)
        network = MaskingNetwork(model)
        torch.nn.init.normal_(network.decoder.two_channels.weight)
    save_classifier(model, tmp_path / "model.safetensors")
    save_masking_network(network, tmp_path / "masks.safetensors")
    torch.nn.init.ones_(network.decoder.two_channels.weight)
    save_masking_network(network, tmp_path / "others.safetensors")
    return "--model", "small_resnet", "--weights", "model.safetensors"


def test_compare_measures_the_masking_network_of_a_file(
    run: Run, masking: tuple[str, ...], tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images")
    given = ("compare", "folder", folder, *masking, "--out", "run", "--batch-size", "2")
    named = ("--methods", "real_time_masking", "--network")
    code, _, err = run(*given, *named, "masks.safetensors")
    assert code == 0, err
    model = load_classifier("small_resnet", "model.safetensors")
    method = RealTimeMasking(load_masking_network("masks.safetensors", model))
    dataset = load_dataset("folder", folder, class_names=model.class_names)
    methods = {"real_time_masking": method}
    compare(model, dataset, methods, out="library", batch_size=2, progress=False)

    def rows(out: Path) -> list[tuple[Any, ...]]:
        return [row for row in stored(out) if "real_time_masking" in row]

    assert len(rows(tmp_path / "run")) == 4
    assert rows(tmp_path / "run") == rows(tmp_path / "library")
    code, _, err = run(*given, *named, "others.safetensors")
    assert code == 2
    assert "run holds another run (methods.real_time_masking" in one_line(err)


def test_with_a_masking_network_compare_runs_it_among_all_methods(
    run: Run, masking: tuple[str, ...], tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images", n=1)
    given = ("compare", "folder", folder, *masking)
    assert run(*given, "--out", "without")[0] == 0
    assert run(*given, "--out", "with", "--network", "masks.safetensors")[0] == 0
    without = Comparison(tmp_path / "without").methods
    assert Comparison(tmp_path / "with").methods == [*without, "real_time_masking"]


def test_explain_draws_the_masking_network_of_a_file(
    run: Run, masking: tuple[str, ...], tmp_path: Path
) -> None:
    image = draw(tmp_path / "images", n=1) / "0.png"
    pictures = []
    for name in ("masks", "others"):
        code, _, err = run(
            "explain", image, *masking, "--methods", "real_time_masking", "--out", name,
            "--network", f"{name}.safetensors",
        )  # fmt: skip
        assert code == 0, err
        pictures.append((tmp_path / name / "0.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.fixture
def localization(tmp_path: Path) -> tuple[str, ...]:
    """Options that name a small classifier, for which localization.safetensors is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_classifier("simple_convnet", None, class_names=list("abcd"), input_size=32)
        network = LocalizationNetwork(CorruptionNetwork(width=4), model, n_segments=20)
        torch.nn.init.normal_(network.corruption.logits.weight)
    save_classifier(model, tmp_path / "simple.safetensors")
    save_localization_network(network, tmp_path / "localization.safetensors")
    return "--model", "simple_convnet", "--weights", "simple.safetensors"


def test_a_network_of_a_file_is_certified_as_any_method(
    run: Run, localization: tuple[str, ...], tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images", n=1)
    named = ("--methods", "adversarial_localization", "--network", "localization.safetensors")
    named += ("--certify", "0.25", "--certify-samples", "33", "--certify-radii", "0.1", "--json")
    code, out, err = run("explain", folder, *localization, *named)
    assert code == 0, err
    (within,) = json.loads(out)["certificates"]["adversarial_localization"]["radii"]
    code, out, err = run("compare", "folder", folder, *localization, *named)
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads(out)["table"]}
    # The one image, squashed to the same pixels.
    share = rows["adversarial_localization"]["certified_share_0.1"]
    assert share == pytest.approx(within["certified_share"])
    assert 0 < share <= 1


def test_every_method_of_a_classifier_can_be_certified(
    run: Run, localization: tuple[str, ...], tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images", n=1)
    few = ("--certify", "0.25", "--certify-samples", "33", "--certify-radii", "0.1")
    code, out, err = run("compare", "folder", folder, *localization, *few, "--json")
    assert code == 0, err
    rows = json.loads(out)["table"]
    assert len(rows) > 15
    assert [row["method"] for row in rows if row["certified_share_0.1"] is None] == []


def test_compare_measures_the_localization_network_of_a_file(
    run: Run, localization: tuple[str, ...], tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images")
    given = ("compare", "folder", folder, *localization, "--batch-size", "2")
    named = ("--methods", "adversarial_localization,lrp")
    network = ("--network", "localization.safetensors")
    code, _, err = run(*given, *named, *network, "--out", "run")
    assert code == 0, err
    model = load_classifier("simple_convnet", "simple.safetensors")
    method = AdversarialLocalization.from_file("localization.safetensors", model=model)
    dataset = load_dataset("folder", folder, class_names=model.class_names)
    methods = {"adversarial_localization": method, "lrp": "lrp"}
    compare(model, dataset, methods, out="library", batch_size=2, progress=False)

    def rows(out: Path) -> list[tuple[Any, ...]]:
        return [row for row in stored(out) if set(methods) & set(row)]

    assert len(rows(tmp_path / "run")) == 8
    assert rows(tmp_path / "run") == rows(tmp_path / "library")
    code, _, err = run(*given, *named)
    assert code == 2
    assert "captum-robust train localization" in one_line(err)
    code, _, err = run(*given, "--methods", "real_time_masking", *network)
    assert code == 2
    assert "holds no masking network" in one_line(err)


@pytest.mark.parametrize("command", ["compare", "explain"])
@pytest.mark.parametrize(
    "named", [(), ("--model", "simple_convnet", "--weights", "simple.safetensors")]
)
def test_the_networks_file_is_read_once(
    run: Run,
    localization: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    named: tuple[str, ...],
) -> None:
    opened: list[str] = []
    safe_open = safetensors.safe_open

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return safe_open(path, *arguments, **options)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    folder = draw(tmp_path / "images", n=1)
    images = (folder,) if command == "explain" else ("folder", folder)
    network = ("--methods", "adversarial_localization", "--network", "localization.safetensors")
    code, _, err = run(command, *images, *named, *network)
    assert code == 0, err
    assert opened.count("localization.safetensors") == 1


def test_compare_and_explain_take_a_localization_network_with_a_trunk(
    run: Run, localization: tuple[str, ...], tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images", n=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = load_classifier("small_resnet", None, class_names=["day", "night"])
        model = load_classifier("simple_convnet", "simple.safetensors")
        corruption = CorruptionNetwork(trunk.requires_grad_(False), width=2, trunk_size=48)
        torch.nn.init.normal_(corruption.logits.weight)
    network = LocalizationNetwork(corruption, model, n_segments=20)
    save_localization_network(network, tmp_path / "trunk.safetensors")
    given = (*localization, "--methods", "adversarial_localization", "--network")
    code, out, err = run("compare", "folder", folder, *given, "trunk.safetensors")
    assert code == 0, err
    assert "adversarial_localization" in out
    code, _, err = run("explain", folder, *given, "trunk.safetensors", "--out", "maps")
    assert code == 0, err
    assert (tmp_path / "maps" / "0.png").is_file()
    corruption = CorruptionNetwork(SimpleConvNet(2, 2), width=2)
    network = LocalizationNetwork(corruption, model, n_segments=20)
    save_localization_network(network, tmp_path / "nameless.safetensors")
    code, _, err = run("explain", folder, *given, "nameless.safetensors", "--out", "others")
    assert code == 2
    assert "model: expected one of" in err
    assert "got 'SimpleConvNet'" in one_line(err)


@pytest.mark.parametrize("named", [(), ("--model", "simple_convnet")])
def test_a_classifier_without_published_weights_is_that_of_the_networks_file(
    run: Run, localization: tuple[str, ...], tmp_path: Path, named: tuple[str, ...]
) -> None:
    folder = draw(tmp_path / "images", n=2)
    given = ("--network", "localization.safetensors", "--methods")
    given = (*given, "adversarial_localization,grad_cam")
    code, out, err = run("explain", folder, *localization, *given, "--out", "told")
    assert code == 0, err
    code, own, err = run("explain", folder, *named, *given, "--out", "own")
    assert code == 0, err
    assert own.replace("own", "told") == out
    assert (tmp_path / "own" / "0.png").read_bytes() == (tmp_path / "told" / "0.png").read_bytes()
    code, _, err = run("explain", folder, *named, *given, "--layer", "block9", "--out", "layer")
    assert code == 2
    assert "block9" in one_line(err)


def test_tiny_imagenet_has_the_classes_of_a_model_that_was_trained_on_it(
    run: Run, tmp_path: Path
) -> None:
    # ImageNet numbers goldfish 1 and tench 0; wnids.txt has them the other way round.
    root = tmp_path / "tiny"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n01443537\nn01440764\n")
    lines = []
    for i, wnid in enumerate(["n01443537", "n01440764", "n01443537", "n01440764"]):
        grey = Image.new("RGB", (64, 64), (60 * i, 80, 80))
        grey.save(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t8\t8\t40\t40")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))
    for names, file in ((["goldfish", "tench"], "own"), (["tench", "goldfish"], "other")):
        model = load_classifier("simple_convnet", None, class_names=names)
        save_classifier(model, tmp_path / f"{file}.safetensors")
    given = ("compare", "tiny-imagenet", root, "--model", "simple_convnet", "--methods", "grad_cam")
    code, _, err = run(*given, "--weights", "own.safetensors", "--out", "run")
    assert code == 0, err
    with sqlite3.connect(tmp_path / "run" / "rows.sqlite") as rows:
        labels = [row[0] for row in rows.execute("SELECT label FROM images ORDER BY position")]
    assert labels == [0, 1, 0, 1]
    code, _, err = run(*given, "--weights", "other.safetensors", "--out", "others")
    assert code == 2
    assert "the 2 classes of the model are not its first ones" in one_line(err)


def test_the_file_says_which_method_its_network_is_for(
    run: Run, localization: tuple[str, ...], tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images", n=1)
    network = ("--network", "localization.safetensors")
    code, _, err = run("compare", "folder", folder, *localization, *network, "--out", "all")
    assert code == 0, err
    methods = Comparison(tmp_path / "all").methods
    assert "adversarial_localization" in methods
    assert "lrp" in methods
    assert "real_time_masking" not in methods


@pytest.mark.parametrize("command", [("compare", "folder", "images"), ("explain", "images")])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("robust_cam", "--network", "masks.safetensors"),
            "--network is for the methods real_time",
        ),
        (("real_time_masking", "--network", "gone.safetensors"), "gone.safetensors: no such file"),
        (("real_time_masking", "--network", "model.safetensors"), "holds no masking network"),
        (("real_time_masking", "--network", "images/0.png"), "images/0.png"),
        (("real_time_masking", "--network", "foreign.safetensors"), "for an encoder small_resnet"),
        (("real_time_masking",), "train one with: captum-robust train masking"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_a_masking_network_that_does_not_fit_is_one_line(
    run: Run,
    masking: tuple[str, ...],
    tmp_path: Path,
    command: tuple[str, ...],
    options: tuple[str, ...],
    message: str,
) -> None:
    draw(tmp_path / "images", n=1)
    foreign = load_classifier("small_resnet", None, class_names=list("abc"), input_size=32)
    save_masking_network(MaskingNetwork(foreign), tmp_path / "foreign.safetensors")
    code, _, err = run(*command, *masking, "--methods", *options)
    assert code == 2
    assert all(part in one_line(err) for part in message.split(".*"))


def test_explain_goes_on_behind_a_broken_image(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=1)
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0torn")
    code, out, err = run("explain", folder)
    assert code == 0
    assert "torn.jpg" in one_line(err)
    assert "1 could not be used" in out
    code, out, err = run("explain", folder / "torn.jpg")
    assert code == 2
    assert "torn.jpg" in one_line(err)


WRONG: list[tuple[list[str], str]] = [
    (
        ["compare", "imagnet", "x"],
        r"kind of data set: .*got 'imagnet'; did you mean 'imagenet'",
    ),
    (["compare", "imagenet"], "needs the path"),
    (["compare", "imagenet", "nowhere"], "nowhere"),
    (
        ["compare", "folder", "nowhere"],
        "error: nowhere: no such folder; expected a folder of images",
    ),
    (["compare", "samples", "--methods", "robust_can"], "did you mean 'robust_cam'"),
    (["compare", "samples", "--methods", ","], "methods: expected at least one"),
    (["compare", "samples", "--model", "resnet5"], "did you mean 'resnet50'"),
    (
        ["compare", "samples", "--weights", "nowhere.safetensors"],
        "error: --weights: no file nowhere.safetensors",
    ),
    (["compare", "samples", "--weights", "images"], "--weights: expected a file, got the folder"),
    (["compare", "samples", "--weights", "V7"], "--weights of efficientnet_lite0: expected one"),
    (
        ["compare", "samples", "--weights", "a.txt"],
        "--weights: a.txt: expected a safetensors file or a state dict of torch.save, got another",
    ),
    (["compare", "samples", "--weights", "model.pth"], "no file model.pth"),
    (["compare", "samples", "--weights", "images/0.png"], "may be a pickle"),
    (
        ["compare", "samples", "--layer", "haed"],
        r"layer: .*got 'haed'; did you mean 'head'",
    ),
    (["compare", "samples", "--device", "warp"], "device 'warp' is not available"),
    (["compare", "samples", "--precision", "int8"], "precision: expected one of"),
    (["compare", "samples", "--limit", "0"], "limit: expected a whole number from 1"),
    (["compare", "samples", "--limit", "many"], "Invalid value for '--limit'"),
    (["compare", "samples", "--split", "val"], "does not take all of: --split"),
    (["explain", "nowhere.png"], "nowhere.png: no such image or folder"),
    (
        ["explain", "images", "--target", "taby"],
        r"error: --target: expected .*got 'taby'; did you mean 'tabby'",
    ),
    (["explain", "images", "--target", "1000"], "classes 0 to 999"),
    (["explain", "images", "--target", "CARDIGAN"], "error: --target: expected the name of one"),
    (["explain", "pipe.jpg"], "pipe.jpg: a pipe"),
    (["explain", "images", "--out", "images"], "--out: images is the folder of the images"),
    (["explain", "images", "--out", "a.txt/out"], r"--out: expected a folder, got .*a.txt"),
    *(
        ([*command, "--out", "a.txt"], "--out: expected a folder, got a.txt, which is none")
        for command in (
            *(["compare", "samples"], ["compare", "folder", "images"], ["explain", "images"]),
            *(["attack", "images"], ["attack", "images/0.png"], ["demo"]),
        )
    ),
    (["attack", "/dev/null"], "/dev/null: a device"),
    (["attack", "images", "pipe.jpg"], "pipe.jpg: a pipe"),
    (["explain", "socket.png"], "socket.png: a socket"),
    (["explain", "nowhere.jpg"], "nowhere.jpg: a link that leads to no file"),
    (["compare", "folder", "images", "--boxes", "pipe.jpg"], "pipe.jpg: a pipe; expected a CSV"),
    (["compare", "tiny-imagenet", "pipe.jpg"], "pipe.jpg: a pipe; expected a folder, a .tar"),
    (["video", "socket.png", "out.avi"], "socket.png is a socket; give a video file"),
    (
        ["explain", "images", "--counterfactual", "lynxx"],
        r"error: --counterfactual: expected .*got 'lynxx'; did you mean",
    ),
    (["explain", "images", "--counterfactual", "1000"], "counterfactual: the model has the"),
    (
        ["explain", "images", "--methods", "saliency", "--counterfactual", "lynx"],
        "counterfactual: only methods that perturb the image know it",
    ),
    (["explain", "images/0.png", "--threshold", "2"], "threshold"),
    (["explain", "images", "--threshold", "nan"], "threshold: expected a number in [0, 1]"),
    *(
        ([*command, *options], message)
        for command in (["explain", "images"], ["compare", "samples"])
        for options, message in (
            (["--certify", "0"], "error: --certify: expected a positive number, got 0"),
            (["--certify", "-0.1"], "error: --certify: expected a positive number"),
            (["--certify", "nan"], "error: --certify: expected"),
            (["--certify", "much"], "Invalid value for '--certify'"),
            (
                ["--certify", ".25", "--certify-samples", "20"],
                "error: --certify-samples: expected at least 33 for noise of 0.25",
            ),
            (["--certify", ".25", "--certify-samples", "0"], "for '--certify-samples'"),
            (
                ["--certify", ".25", "--certify-radii", ".1,x"],
                "error: --certify-radii: expected numbers separated by commas, got '.1,x'",
            ),
            (["--certify", ".25", "--certify-radii", "-1"], "--certify-radii: expected a positive"),
            (
                ["--certify", ".25", "--certify-radii", "1e-20"],
                "--certify-radii: 1e-20 is too near",
            ),
            (["--certify-samples", "50"], "--certify-samples is for --certify: give it too"),
            (["--certify-radii", ".1"], "--certify-radii is for --certify: give it too"),
            (["--certify-denoiser"], "--certify-denoiser is for --certify: give it too"),
        )
    ),
    (
        ["compare", "samples", "--attack", "pdg"],
        r"attack: .*got 'pdg'; did you mean 'pgd'",
    ),
    (["compare", "samples", "--attack", ","], "attack: expected at least one"),
    (["compare", "samples", "--epsilon", "1"], "--epsilon is for attacks: give --attack too"),
    (["compare", "samples", "--adaptive"], "--adaptive is for attacks: give --attack too"),
    (["compare", "samples", "--all-steps"], "--all-steps is for attacks: give --attack too"),
    (["compare", "samples", "--attack", "pgd", "--epsilon", "-1"], "numbers from 0 to 255"),
    (["compare", "samples", "--attack", "pgd", "--epsilon", "256"], "numbers from 0 to 255"),
    (["compare", "samples", "--attack", "pgd", "--epsilon", "1,x"], "separated by commas, got 'x'"),
    (["compare", "samples", "--attack", "pgd", "--epsilon", "2,2"], "epsilon: expected at least"),
    (["compare", "samples", "--attack", "pgd", "--steps", "0"], "Invalid value for '--steps'"),
    (
        ["compare", "samples", "--attack", "deepfool", "--epsilon", "1"],
        "deepfool takes no strength",
    ),
    (["compare", "samples", "--attack", "universal"], "universal: this attack needs the file"),
    (
        ["compare", "samples", "--attack", "pgd", "--universal", "v.safetensors"],
        "--universal is for --attack universal",
    ),
    (["attack"], "give an image, a folder of images, or --kind samples"),
    (["attack", "nowhere.png"], "nowhere.png: no such image or folder"),
    (["attack", "images", "--attack", "pdg"], r"attack: .*got 'pdg'; did you mean 'pgd'"),
    (["attack", "images", "--epsilon", "0.5"], "an image file holds whole levels"),
    (["attack", "images", "--epsilon", "nan"], "numbers from 0 to 255"),
    (
        ["attack", "images", "--target", "taby"],
        r"error: --target: expected .*got 'taby'; did you mean 'tabby'",
    ),
    (
        ["attack", "images", "--target", "tabby", "--attack", "least_likely"],
        "least_likely cannot move towards a given class",
    ),
    (
        ["attack", "images", "--kind", "imagnet"],
        r"kind of data set: .*got 'imagnet'; did you mean",
    ),
    (["attack", "images/0.png", "--boxes", "b.csv"], "a single image does not take: --boxes"),
    (["cmpare"], "No such command 'cmpare'"),
    (["demo", "--ot", "x"], "No such option: --ot"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: " ".join(v)[:60])
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    draw(tmp_path / "images", n=1)
    os.mkfifo("pipe.jpg")
    Path("a.txt").write_text("text", encoding="utf-8")
    Path("nowhere.jpg").symlink_to("elsewhere.jpg")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.png")
    code, _, err = run(*arguments)
    assert code == 2
    assert all(part in one_line(err) for part in message.split(".*"))


def test_a_file_that_is_skipped_is_one_plain_line(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=1)
    (folder / "\x1b[31mred.qq\n").write_bytes(b"none")
    for arguments in (("attack", folder, "--epsilon", 1, "--steps", 1), ("explain", folder)):
        _, _, err = run(*arguments)
        said = f"{folder}: files left out, as Pillow sees no image in them: 1 .qq"
        lines = [line for line in err.splitlines() if "left out" in line]
        assert lines == [f"captum-robust: {said}"]
        assert "Warning" not in err
        assert "\x1b" not in err


def test_no_escape_of_a_name_reaches_the_terminal(run: Run, tmp_path: Path) -> None:
    folder, names = draw(tmp_path / "a\x1b[2J", n=2), tmp_path / "names.txt"
    names.write_text("".join(f"\x1b[3{i % 8}m{i}\n" for i in range(1000)))
    (folder / "torn\x1b[31m.png").write_bytes(b"none")
    given = ("--weights", "none", "--classes", names)
    for arguments in (
        ("compare", "folder", folder, "--methods", "saliency", "--target", "prediction"),
        ("explain", folder, "--methods", "saliency,smallest_perturbation"),
    ):
        out_folder = tmp_path / f"out\x1b]0;{arguments[0]}"
        code, out, err = run(*arguments, *given, "--out", out_folder)
        assert code == 0, err
        assert "\x1b" not in out + err
        assert "\\x1b" in out


def test_another_strength_of_an_attack_is_said_in_words(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=1)
    given = ("attack", folder, "--epsilon", 1, "--weights", "none", "--out", "run")
    run(*given, "--steps", 1)
    _, _, err = run(*given, "--steps", 2)
    assert "run holds another run (attacks.pgd 1/255, steps: 1 there, 2 here)" in err
    assert "PGD(" not in err


def test_compare_runs_every_method_under_every_attack(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images")
    arguments = ("compare", "folder", folder, "--methods", "robust_cam", "--attack", "pgd,fgsm")
    arguments = (*arguments, "--epsilon", "1, 8", "--steps", 2)
    code, out, _ = run(*arguments)
    assert code == 0
    attacks = ["pgd 1/255", "pgd 8/255", "fgsm 1/255", "fgsm 8/255"]
    result = Comparison(tmp_path / "captum-robust-compare")
    assert result.attacks == ["clean", *attacks]
    assert (result.table().groupby("attack").size() == 3).all()
    for name in attacks:
        assert out.count(name) >= 2
    assert "robust accuracy" in out
    report = (tmp_path / "captum-robust-compare" / "report.html").read_text(encoding="utf-8")
    assert "pgd 8/255" in report
    code, _, err = run(*arguments[:-1], 3)
    assert code == 2
    assert "(attacks.pgd 1/255, steps: 2 there, 3 here; " in one_line(err)


def test_compare_puts_the_attacker_who_knows_beside_the_defence(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=1)
    code, out, _ = run(
        *("compare", "folder", folder, "--methods", "grad_cam,defended_robust_cam"),
        *("--attack", "pgd", "--epsilon", "8", "--steps", 1, "--all-steps", "--adaptive"),
    )
    assert code == 0
    result = Comparison(tmp_path / "captum-robust-compare")
    assert result.attacks[:3] == ["clean", "pgd 8/255", "pgd 8/255, adaptive"]
    assert "pgd 8/255, adaptive" in out
    assert "explanation 8/255" in out


def test_labels_of_a_folder_are_classes_of_the_model(run: Run, tmp_path: Path) -> None:
    model = load_classifier("small_resnet", None, class_names=["circle", "square"])
    save_classifier(model, tmp_path / "two.safetensors")
    for name in ("circle", "square"):
        draw(tmp_path / "shapes" / name, n=1)
    code, _, _ = run(
        *("compare", "folder", tmp_path / "shapes", "--model", "small_resnet"),
        *("--weights", tmp_path / "two.safetensors", "--methods", "robust_cam"),
    )
    assert code == 0
    frame = Comparison(tmp_path / "captum-robust-compare").to_dataframe()
    labels = dict(zip(frame["image"], frame["label"], strict=True))
    assert labels == {"circle/0.png": 0, "square/0.png": 1}


def test_attack_writes_files_that_fool_a_table_and_curves(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=3)
    (folder / "boxes.csv").unlink()
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0torn")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    arguments = ("attack", folder, "--epsilon", "2,4", "--steps", 3, "--out", "out")
    code, out, err = run(*arguments)
    assert code == 0
    assert "torn.jpg" in one_line(err)
    assert "4 images: 1 could not be used; 6 files written" in out
    assert "without a label: 3; there the prediction counts as the label" in out
    assert out.count(" fooled") >= 6
    for strength in (2, 4):
        for i in range(3):
            with Image.open(tmp_path / "out" / f"pgd-{strength}" / f"{i}.png") as picture:
                assert picture.size == (224, 224)
    assert (tmp_path / "out" / "attacked.csv").read_text().startswith("image,attack,epsilon,label")
    assert (tmp_path / "out" / "curves.png").is_file()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    code, again, _ = run(*arguments)  # a finished run is not run again
    assert (code, again) == (0, out)
    code, _, err = run(*arguments, "--seed", 1)
    assert code == 2
    assert "settings.seed: 0 there, 1 here" in one_line(err)


def test_attack_passes_over_what_it_wrote_itself(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=2)
    (folder / "boxes.csv").unlink()
    os.rename(folder / "1.png", folder / os.fsdecode(b"nonutf\xff.png"))
    os.chdir(folder)
    quick = ("--attack", "fgsm", "--epsilon", "8/255", "--all")
    for out in ("captum-robust-attack", "captum-robust-attack", "second"):
        code, printed, err = run("attack", ".", *quick, "--out", out)
        assert code == 0, err
        assert "2 images: 0 could not be used; 2 files written" in printed
        written = {p.relative_to(folder / out).as_posix() for p in (folder / out).glob("*/*.png")}
        assert written == {"fgsm-8/0.png", "fgsm-8/nonutf_xff.png"}
    paths = sorted(folder.iterdir())  # as * gives them
    code, printed, err = run("attack", *paths, *quick, "--out", folder / "third")
    assert code == 0, err
    assert "2 images: 0 could not be used; 2 files written" in printed
    code, _, err = run("attack", *paths[:2], "--kind", "folder")
    assert code == 2
    assert "--kind folder: expected one path, got 2" in one_line(err)


def test_explain_takes_several_paths(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=2)
    shutil.copytree(folder, tmp_path / "others")
    paths = (folder / "0.png", tmp_path / "others")
    for _ in range(2):
        code, out, err = run("explain", *paths, tmp_path / "captum-robust-explain", "--top", 1)
        if not (tmp_path / "captum-robust-explain").exists():
            assert code == 2  # there is none yet
            assert "no such image or folder" in one_line(err)
            code, out, err = run("explain", *paths, "--top", 1)
        assert code == 0, err
        assert out.count(" -> ") == 3
    written = (tmp_path / "captum-robust-explain").rglob("*.png")
    names = {p.relative_to(tmp_path / "captum-robust-explain").as_posix() for p in written}
    assert names == {"images/0.png", "others/0.png", "others/1.png"}


def test_attack_takes_one_photograph_and_a_target(run: Run, tmp_path: Path) -> None:
    file = draw(tmp_path / "images", n=1) / "0.png"
    arguments = ("attack", file, "--epsilon", 8, "--target", "lynx")
    code, out, _ = run(*arguments)
    assert code == 0
    assert "lynx" in out
    with Image.open(tmp_path / "captum-robust-attack" / "pgd-8" / "0.png") as picture:
        picture.load()
    code, out, _ = run("explain", tmp_path / "captum-robust-attack" / "pgd-8" / "0.png")
    assert out.splitlines()[1].endswith("lynx")
    own = run("explain", file, "--top", 1)[1].split("%")[1].strip()
    code, _, err = run(*arguments[:-1], own, "--out", "third")
    assert code == 2
    assert f"target: the image is of class {own} already" in one_line(err)
    assert not (tmp_path / "third").exists()


def test_attack_on_nothing_but_broken_images_fails(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0torn")
    code, out, err = run("attack", folder / "torn.jpg")
    assert code == 2
    assert "torn.jpg" in one_line(err)
    assert "1 image: 1 could not be used" in out


def test_attack_where_no_image_is_classified_right_says_so(run: Run, tmp_path: Path) -> None:
    draw(tmp_path / "images" / "n02124075", n=1)  # drawings, labelled Egyptian cat
    code, out, err = run("attack", tmp_path / "images", "--epsilon", 1, "--steps", 1)
    assert code == 2
    assert "already wrong" in out
    assert "classifies none of the 1 images right" in one_line(err)


def test_other_boxes_are_another_run(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images")
    arguments = ("compare", "folder", folder, "--methods", "center_box")
    assert run(*arguments)[0] == 0
    table = (folder / "boxes.csv").read_text()
    (folder / "boxes.csv").write_text(table.replace("20,10,60,40", "20,10,60,50"))
    code, _, err = run(*arguments)
    assert code == 2
    assert "dataset.options.table" in one_line(err)


def test_explain_never_overwrites_an_image_or_a_picture(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=1)
    before = (folder / "0.png").read_bytes()
    code, _, err = run("explain", folder / "0.png", "--out", folder)
    assert code == 2
    assert "would overwrite the image itself" in one_line(err)
    assert (folder / "0.png").read_bytes() == before
    (folder / "sub").mkdir()
    Image.open(folder / "0.png").save(folder / "0.jpg")
    Image.open(folder / "0.png").save(folder / "sub" / "0.png")
    for _ in range(2):  # the second time it does not explain its own pictures
        code, _out, _ = run("explain", folder, "--out", folder / "out")
        assert code == 0
        pictures = sorted(
            str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*.png")
        )
        assert pictures == ["0.jpg.png", "0.png.png", "sub/0.png"]


def test_explain_writes_one_picture_and_map_an_image_whatever_the_names(
    run: Run, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images", n=1)
    names = ["0.jpg", "0.jpg.webp", "x" * 250 + ".png", "x" * 250 + ".jpg"]
    for name in names:
        Image.open(folder / "0.png").save(folder / name)
    given = ("explain", folder, "--methods", "saliency", "--save-maps", "--out", "out")
    code, out, err = run(*given)
    assert code == 0, err
    assert out.count(" -> ") == 5
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    assert len(list((tmp_path / "out").glob("*.npy"))) == 5


def test_names_of_255_bytes_are_no_error_of_any_command(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=1)
    (folder / "boxes.csv").unlink()
    (folder / "0.png").rename(folder / ("ü" * 125 + "n.png"))
    for command in (
        ("explain", folder, "--methods", "saliency,robust_cam", "--save-maps"),
        ("attack", folder, "--attack", "fgsm", "--epsilon", "8", "--all"),
        ("compare", "folder", folder, "--methods", "center_box"),
    ):
        code, _, err = run(*command, "--out", tmp_path / command[0] / ("o" * 255))
        assert code == 0, err
    assert len(list((tmp_path / "explain").rglob("*.npy"))) == 2
    assert len(list((tmp_path / "attack").rglob("fgsm-8/*.png"))) == 1


def test_random_weights_are_the_same_each_time_and_swapped_images_are_not(
    run: Run, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "images", n=2)
    given = ("compare", "folder", folder, "--model", "small_resnet", "--weights", "none")
    given += ("--methods", "saliency", "--classes", "bright,dark")
    for out in ("one", "one", "two"):
        code, _, err = run(*given, "--out", tmp_path / out)
        assert code == 0, err
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    (folder / "0.png").rename(folder / "other")
    (folder / "1.png").rename(folder / "0.png")
    (folder / "other").rename(folder / "1.png")
    code, _, err = run(*given, "--out", tmp_path / "one")
    assert code == 2
    assert "one holds another run (dataset.checksums.images: " in one_line(err)


@pytest.mark.parametrize("content", [b"garbage" * 1000, b""])
def test_a_damaged_run_is_one_line(run: Run, tmp_path: Path, content: bytes) -> None:
    folder = draw(tmp_path / "images", n=1)
    arguments = ("compare", "folder", folder, "--methods", "center_box")
    assert run(*arguments)[0] == 0
    for file in (tmp_path / "captum-robust-compare").glob("rows.sqlite-*"):
        file.unlink()
    name = "rows.sqlite" if content else "run.json"
    (tmp_path / "captum-robust-compare" / name).write_bytes(content)
    code, _, err = run(*arguments)
    assert code == 2
    assert name in one_line(err)


def test_a_full_disk_stops_a_run_with_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = draw(tmp_path / "images", n=2)
    for command in (("compare", "folder", folder, "--methods", "center_box"), ("attack", folder)):
        with monkeypatch.context() as patched:
            patched.setattr(SampleReader, "_fitted", full)
            code, _, err = run(*command)
        assert code == 2
        assert "No space left on device" in one_line(err)
    code, _, err = run("compare", "folder", folder, "--methods", "center_box", "--no-retry")
    assert code == 0, err


def test_a_file_name_that_is_no_text_is_a_row_with_its_error(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=1)
    (folder / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"junk")
    code, out, err = run("compare", "folder", folder, "--methods", "center_box")
    assert code == 0, err
    assert "2 images: 1 could not be used" in out


def test_without_arguments_it_prints_its_help(run: Run) -> None:
    code, out, err = run()
    assert code == 0
    assert "Commands:" in out
    assert err == ""


def test_the_report_is_written_also_when_the_output_closes_early(tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=1)
    command = f"{sys.executable} -m captum_robust compare folder {folder} --methods center_box"
    subprocess.run(
        f"{command} --out {tmp_path / 'out'} | true", shell=True, env=ONE_THREAD, check=True
    )
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_folder_with_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images")
    assert run("compare", "folder", folder, "--methods", "center_box")[0] == 0
    code, _, err = run("compare", "folder", folder, "--methods", "center_box", "--limit", 2)
    assert code == 2
    assert "dataset.samples: 4 there, 2 here" in one_line(err)


def test_help_names_every_command_and_argument(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "compare", "explain", "attack", "methods"):
        assert command in out
        assert run(command, "--help")[0] == 0
    code, out, _ = run("methods")
    assert out.split()[0] == "robust_cam"
    assert "center_box  (baseline)" in out
    assert "iterative_mask  (slow: runs only where it is named)" in out
    assert "pgd  (attack: " in out


def test_help_loads_no_torch() -> None:
    program = """
import sys
from typer.main import get_command
from typer.testing import CliRunner
from captum_robust.cli.app import app

def check_help(command, names):
    assert CliRunner().invoke(app, [*names, "--help"]).exit_code == 0, names
    assert "torch" not in sys.modules, names
    for name, inner in getattr(command, "commands", {}).items():
        check_help(inner, [*names, name])
    print(*names)

check_help(get_command(app), [])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"compare", "video", "train masking"} <= set(done.stdout.splitlines())


def test_ctrl_c_says_that_the_run_can_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder = draw(tmp_path / "images")
    monkeypatch.setattr("captum_robust.benchmark.compare", interrupted)
    monkeypatch.setattr("captum_robust.benchmark.attack_images", interrupted)
    for command in (["compare", "folder"], ["attack"]):
        code, _, err = run(*command, folder)
        assert code == 130
        assert "the same command goes on" in one_line(err)


def stored(out: Path) -> list[tuple[Any, ...]]:
    """All rows of a run, without the time that they took, and the start that made them."""
    rows: list[tuple[Any, ...]] = []
    for file in out.glob("rows*.sqlite"):
        with sqlite3.connect(file) as database:
            cursor = database.execute("SELECT * FROM results")
            kept = [i for i, d in enumerate(cursor.description) if d[0] not in ("seconds", "turn")]
            rows += [tuple(row[i] for i in kept) for row in cursor]
    return sorted(rows, key=itemgetter(0, 1))


COMPARE = [sys.executable, "-m", "captum_robust", "compare"]
QUICK = ["--methods", "robust_cam,saliency,smooth_grad,center_box", "--batch-size", "2"]
# Threads split sums, so the last digits depend on their number.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(command: list[str]) -> str:
    """Run to the end; what it printed."""
    result = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_killed_compare_goes_on_and_ends_with_the_same_rows(tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=12)
    command = [*COMPARE, "folder", str(folder), *QUICK]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    finish([*command, "--out", str(whole)])
    process = subprocess.Popen(
        [*command, "--out", str(killed)],
        env=ONE_THREAD,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if len(stored(killed)) >= 6:
                break
        except sqlite3.OperationalError:  # not there yet
            pass
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(stored(killed))
    assert 0 < before < 60
    finish([*command, "--out", str(killed)])
    assert stored(killed) == stored(whole)


def test_a_killed_attack_goes_on_and_ends_with_the_same_files(tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=4)
    (folder / "boxes.csv").unlink()
    command = [sys.executable, "-m", "captum_robust", "attack", str(folder), "--batch-size", "1"]
    command += ["--attack", "fgsm", "--epsilon", "8", "--all", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    finish([*command, str(whole)])
    process = subprocess.Popen(
        [*command, str(killed)],
        env=ONE_THREAD,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list(killed.glob("fgsm-8/[!.]*.png")):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "attacked.csv").exists()
    finish([*command, str(killed)])

    def content(out: Path) -> dict[str, bytes]:
        kept = [*out.glob("fgsm-8/[!.]*.png"), out / "attacked.csv"]
        return {str(p.relative_to(out)): p.read_bytes() for p in kept}

    assert content(killed) == content(whole)
    assert len(content(whole)) == 5


def test_two_processes_under_torchrun_give_the_table_of_one(tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", n=5)
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["compare", "folder", str(folder), *QUICK, "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    finish([sys.executable, "-m", "captum_robust", *arguments, str(one)])
    printed = finish([*torchrun, "-m", "captum_robust", *arguments, str(two)])
    assert stored(one) == stored(two)
    assert printed.count("report: ") == 1
    assert (two / "report.html").is_file()


def test_the_console_script_is_installed() -> None:
    script = shutil.which("captum-robust", path=str(Path(sys.executable).parent))
    assert script is not None
    result = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "compare" in result.stdout


def test_names_of_classes_may_be_many_or_odd(tmp_path: Path) -> None:
    many = [f"class {i}" for i in range(1000)]  # longer than the path of a file can be
    assert class_names(",".join(many)) == many
    odd = ["a\u2028b", "a\x85b", "a\x1cb", "last"]
    (tmp_path / "names.txt").write_bytes("\r\n".join(odd).encode())
    assert class_names(str(tmp_path / "names.txt")) == odd
