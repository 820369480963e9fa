"""Methods that perturb the image: their rows, their pictures, and what is said of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from PIL import Image
from torch import Tensor, nn

from captum_robust import RobustCAM
from captum_robust.attr import BallSettings, Guided, PerceptualBallPerturbation
from captum_robust.benchmark import Comparison, compare
from captum_robust.benchmark.measure import picture_of_change
from captum_robust.benchmark.passes import count_passes
from captum_robust.catalog import methods
from captum_robust.catalog.methods import (
    BALL_BLUR,
    BALL_SETTINGS,
    Method,
    build_methods,
)
from captum_robust.data import DataError, Sample, resize
from captum_robust.draw import amplified, verdict
from captum_robust.models import Classifier
from captum_robust.show.explain import explain_image

from .conftest import Drawn, gallery_of, make_classifier


def make_sharp() -> Classifier:
    """Untrained scores are too alike for a margin of 2: these are spread further."""
    model = make_classifier()
    with torch.no_grad():
        model.module[-1].weight.mul_(100)
    return model


@pytest.fixture
def sharp() -> Classifier:
    return make_sharp()


def batch(model: Classifier, n: int = 3) -> tuple[Tensor, Tensor]:
    images = torch.stack([resize(Drawn()[i], (32, 32)).image for i in range(n)])
    with torch.no_grad():
        return images, model(images).argmax(dim=1)


def test_rows_hold_what_the_attribution_says_of_each_image(sharp: Classifier) -> None:
    result = compare(sharp, Drawn(), ["smallest_perturbation", "saliency"], progress=False)
    assert result.failures().empty
    samples = [resize(Drawn()[i], (32, 32)) for i in range(6)]
    settings = replace(BALL_SETTINGS, perceptual_weight=0.0)
    _, details = PerceptualBallPerturbation(sharp, (), settings=settings).attribute(
        torch.stack([s.image for s in samples]),
        target=torch.tensor([s.label for s in samples]),
        return_details=True,
    )
    frame = result.to_dataframe().set_index("method")
    ball = frame.loc["smallest_perturbation"]
    assert ball["new_class"].tolist() == details.new_class.tolist()
    assert ball["flipped"].tolist() == details.flipped.tolist()
    assert ball["margin"].tolist() == pytest.approx(details.margin.tolist())
    assert details.flipped.any()
    saliency = frame.loc["saliency"]
    assert saliency[["new_class", "flipped", "margin"]].isna().all(axis=None)


@pytest.mark.parametrize("guide", [None, "gradient", "cam"])
def test_one_search_gives_the_map_and_the_perturbation(
    sharp: Classifier, guide: str | None
) -> None:
    images, target = batch(sharp)
    ball = PerceptualBallPerturbation(sharp, sharp.perceptual_layers, settings=BALL_SETTINGS)
    change, details = ball.attribute(images, target=target, return_details=True)
    product = change
    if guide is not None:
        by = guide if guide == "gradient" else RobustCAM(sharp, sharp.cam_layer)
        product = Guided(ball, by).attribute(images, target=target)
    expected = PerceptualBallPerturbation.saliency(product, BALL_BLUR * 32 / 224)
    name = {None: "perceptual_ball", "gradient": "perceptual_ball_guided"}.get(guide, "mine")
    own = Guided(ball, RobustCAM(sharp, sharp.cam_layer))
    method = build_methods(sharp, {name: own if name == "mine" else name})[name]
    with count_passes(sharp) as passes:
        found = method.explain(images, target)
    torch.testing.assert_close(found.maps, expected)
    assert found.perturbation is not None
    torch.testing.assert_close(found.perturbation.change, change)
    assert passes.forward == int(details.evaluations.sum()) + (3 if guide else 0)


def test_the_ball_with_a_map_is_guided_by_that_of_the_larger_image(sharp: Classifier) -> None:
    images, target = batch(sharp)
    found = build_methods(sharp, "perceptual_ball_cam")["perceptual_ball_cam"].explain(
        images, target
    )
    side = round(32 * methods.FINE_CAM_SCALE)
    larger = F.interpolate(
        images, (side, side), mode="bilinear", align_corners=False, antialias=True
    )
    cam = LayerGradCam(sharp, sharp.cam_layer).attribute(larger, target)
    cam = F.interpolate(cam, (32, 32), mode="bilinear", align_corners=False, antialias=True)
    cam = cam.clamp(min=0) / cam.amax(dim=(1, 2, 3), keepdim=True)
    ball = PerceptualBallPerturbation(sharp, sharp.perceptual_layers, settings=BALL_SETTINGS)
    change = ball.attribute(images, target=target)
    product = change * cam**methods.FINE_CAM_POWER
    expected = PerceptualBallPerturbation.saliency(product, BALL_BLUR * 32 / 224)
    torch.testing.assert_close(found.maps, expected, rtol=1e-4, atol=1e-7)
    assert found.perturbation is not None
    torch.testing.assert_close(found.perturbation.change, change)


def test_of_a_network_of_one_size_the_map_is_that_of_the_image_itself() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)]
    model = Classifier(nn.Sequential(*layers).train(), input_size=8)
    images, target = torch.rand(2, 3, 8, 8), torch.tensor([1, 3])
    method = build_methods(model, "perceptual_ball_cam")["perceptual_ball_cam"]
    assert model.module.training
    ball = PerceptualBallPerturbation(model, model.perceptual_layers, settings=BALL_SETTINGS)
    cam = LayerGradCam(model, model.cam_layer)
    product = Guided(ball, cam, power=methods.FINE_CAM_POWER).attribute(images, target=target)
    expected = PerceptualBallPerturbation.saliency(product, BALL_BLUR * 8 / 224)
    torch.testing.assert_close(method.explain(images, target).maps, expected)


def test_a_ball_of_the_users_own_gives_its_perturbation_too(sharp: Classifier) -> None:
    images, target = batch(sharp)
    ball = PerceptualBallPerturbation(sharp, (), settings=BallSettings(max_iterations=3))
    built = build_methods(sharp, {"plain": ball, "guided": Guided(ball, "gradient")})
    plain, guided = (m.explain(images, target) for m in built.values())
    assert plain.perturbation is not None
    assert guided.perturbation is not None
    torch.testing.assert_close(plain.perturbation.change, ball.attribute(images, target=target))
    torch.testing.assert_close(plain.perturbation.change, guided.perturbation.change)
    assert not torch.allclose(plain.maps, guided.maps)


def test_a_named_ball_of_other_constants_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        compare(make_sharp(), Drawn(2), ["smallest_perturbation"], out=tmp_path, progress=False)

    run()
    run()
    monkeypatch.setattr(methods, "BALL_SETTINGS", BallSettings(max_iterations=3))
    with pytest.raises(ValueError, match=r"settings\.perturbing_methods.*max_iterations"):
        run()


def test_a_named_ball_is_let_go_further_towards_a_class(sharp: Classifier) -> None:
    images, target = batch(sharp)
    wanted = int((target[0] + 1) % 4)
    others = target != wanted
    method = build_methods(sharp, "perceptual_ball")["perceptual_ball"]
    assert method.towards is not None
    found = method.towards(wanted).explain(images[others], target[others])
    ball = PerceptualBallPerturbation(
        sharp, sharp.perceptual_layers, settings=methods.COUNTERFACTUAL_SETTINGS
    )
    change = ball.attribute(images[others], target=target[others], counterfactual=wanted)
    assert found.perturbation is not None
    torch.testing.assert_close(found.perturbation.change, change)


def test_other_settings_or_layers_are_another_run(tmp_path: Path) -> None:
    def run(out: str, methods: object, layers: list[str] | None = None) -> None:
        net = make_classifier().module
        model = Classifier(net, (0.5,) * 3, (0.5,) * 3, 32, perceptual_layers=layers).eval()
        if callable(methods):
            methods = {"mine": methods(model)}
        compare(model, Drawn(2), methods, out=tmp_path / out, progress=False)

    def mine(iterations: int) -> Callable[[Classifier], PerceptualBallPerturbation]:
        settings = BallSettings(max_iterations=iterations)
        return lambda model: PerceptualBallPerturbation(model, (), settings=settings)

    run("a", mine(2))
    with pytest.raises(ValueError, match=r"methods\.mine.*: .*max_iterations=2.* there, "):
        run("a", mine(3))
    run("guided", lambda model: Guided(mine(2)(model)))
    with pytest.raises(ValueError, match=r"methods\.mine.*: .*max_iterations=2.* there, "):
        run("guided", lambda model: Guided(mine(3)(model)))
    run("b", ["perceptual_ball"], ["1"])
    with pytest.raises(ValueError, match=r"model\.perceptual_layers: 1 there, 1, 3 here"):
        run("b", ["perceptual_ball"], ["1", "3"])


def test_a_network_without_perceptual_layers_is_said_with_the_methods_name() -> None:
    flat = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)), None, None, 8)
    with pytest.raises(ValueError, match="method 'perceptual_ball': perceptual_layers: none found"):
        compare(flat, Drawn(2), ["perceptual_ball"], progress=False)


def test_a_stored_picture_is_the_perturbation_amplified(sharp: Classifier) -> None:
    result = compare(sharp, Drawn(2), ["smallest_perturbation"], progress=False)
    images = torch.stack([resize(Drawn()[i], (32, 32)).image for i in range(2)])
    found = build_methods(sharp, "smallest_perturbation")["smallest_perturbation"].explain(
        images, torch.tensor([0, 1])
    )
    assert found.perturbation is not None
    rows = result.select("SELECT perturbation, amplification FROM results ORDER BY position")
    for row, change in zip(rows, found.perturbation.change, strict=True):
        drawn = cv2.imdecode(np.frombuffer(row["perturbation"], np.uint8), 1)[:, :, ::-1] / 255
        expected = (0.5 + row["amplification"] * change).clamp(0, 1).permute(1, 2, 0).numpy()
        # JPEG takes some of the colour of a single pixel.
        assert np.corrcoef(drawn.ravel(), expected.ravel())[0, 1] > 0.8
        assert abs(drawn.mean() - expected.mean()) < 0.01
        assert 0.5 / row["amplification"] == pytest.approx(float(change.abs().max()), rel=0.1)


@pytest.mark.parametrize("shape", [(3, 448, 300), (3, 224, 224), (3, 1, 500)])
def test_a_picture_of_noise_stays_below_20_kb(shape: tuple[int, int, int]) -> None:
    change = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5
    columns = picture_of_change(change)
    drawn = cv2.imdecode(np.frombuffer(columns["perturbation"], np.uint8), 1)
    scale = min(1, 224 / max(shape[1:]))
    assert drawn.shape == (max(1, round(shape[1] * scale)), round(shape[2] * scale), 3)
    assert len(columns["perturbation"]) <= 20_000


def test_pictures_are_kept_for_the_gallery_only_and_outcomes_of_all(
    sharp: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captum_robust.benchmark.measure.GALLERY_POOL", 2)
    result = compare(sharp, Drawn(4), ["smallest_perturbation"], progress=False)
    rows = result.select(
        "SELECT heat IS NULL AS heat, perturbation IS NULL AS picture, new_class IS NULL AS class "
        "FROM results ORDER BY position"
    )
    assert [tuple(row.values()) for row in rows] == [(0, 0, 0)] * 2 + [(1, 1, 0)] * 2


def rows(comparison: Comparison) -> pd.DataFrame:
    frame = pd.DataFrame(comparison.select("SELECT * FROM results ORDER BY position, method"))
    return frame.drop(columns=["seconds"])


def test_an_interrupted_run_keeps_its_perturbations(tmp_path: Path) -> None:
    methods = ["perceptual_ball_guided", "smallest_perturbation", "saliency"]
    whole = compare(make_sharp(), Drawn(), methods, batch_size=2, out=tmp_path / "a")

    class Interrupted(Drawn):
        def __getitem__(self, index: int) -> Sample:
            if index >= 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    out = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        compare(make_sharp(), Interrupted(), methods, batch_size=2, out=out, progress=False)
    again = compare(make_sharp(), Drawn(), methods, batch_size=2, out=out, progress=False)
    pd.testing.assert_frame_equal(rows(whole), rows(again))


def test_the_flipped_share_counts_images_whose_explained_class_came_first(
    sharp: Classifier,
) -> None:
    result = compare(sharp, Drawn(), ["smallest_perturbation", "saliency"], progress=False)
    frame = result.to_dataframe().query("method == 'smallest_perturbation'")
    assert (frame["predicted"] != frame["explained"]).any()
    first = frame[frame["predicted"] == frame["explained"]]
    assert len(first)
    shares = result.table().set_index("method")["flipped"]
    assert shares["smallest_perturbation"] == pytest.approx(first["flipped"].astype(float).mean())
    assert np.isnan(shares["saliency"])


def test_the_gallery_shows_each_perturbation_with_its_outcome(
    sharp: Classifier, tmp_path: Path
) -> None:
    sharp.class_names = ["<script>alert(1)</script>"] * 4
    methods = ["smallest_perturbation", "saliency"]
    result = compare(sharp, Drawn(), methods, target="prediction", out=tmp_path, progress=False)
    gallery = gallery_of(result)
    frame = result.to_dataframe().set_index(["image", "method"])
    scales = {
        row["image"]: row["amplification"]
        for row in result.select("SELECT image, amplification FROM results WHERE new_class >= 0")
    }
    for entry in (*gallery.best, *gallery.worst):
        ball, saliency = entry.tiles
        assert saliency.change is None
        assert ball.change is not None
        flipped = bool(frame.loc[(entry.image, ball.method), "flipped"])
        assert ball.change.mark == ("✓" if flipped else "✗")
        assert float(ball.change.factor[1:].replace(",", "")) == pytest.approx(
            scales[entry.image], rel=0.05
        )
    html = result.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count('<div class="pair of-m-0">') == 6
    assert html.count("<script") == 1  # its own
    captions = re.findall(r"flipped to\s+<strong[^>]*>([^<]*)</strong>", html)
    assert captions
    assert set(captions) == {"&lt;script&gt;alert(1)&lt;/script&gt;"}


def test_a_report_without_perturbations_does_not_speak_of_them(
    sharp: Classifier, tmp_path: Path
) -> None:
    result = compare(sharp, Drawn(2), ["saliency"], out=tmp_path, progress=False)
    html = result.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    body = html[html.index("<body>") :].lower()
    assert "perturb" not in body
    assert "flipped" not in body


def test_amplified_is_grey_where_nothing_changed_and_clips_one_outlier() -> None:
    change = torch.zeros(3, 50, 50)
    picture, factor = amplified(change)
    assert factor == 1
    assert (picture == 128).all()
    change[:, :25] = 0.01
    change[:, 25:] = -0.01
    change[0, 0, 0] = 0.4
    picture, factor = amplified(change)
    assert factor == pytest.approx(50, rel=1e-3)
    assert (picture[:25] == 255).all()
    assert (picture[25:] == 0).all()
    change.zero_()[1, 3, 4] = -0.1  # fewer than one in a thousand
    picture, factor = amplified(change)
    assert factor == pytest.approx(5)
    assert picture[3, 4].tolist() == [128, 0, 128]


def test_verdicts() -> None:
    assert verdict(True, True) == ("✓", "flipped to")
    assert verdict(False, True) == ("✗", "not flipped, still")
    assert verdict(True, False) == ("", "was not the prediction; now")
    assert verdict(True, True, "lynx") == ("✓", "flipped to")
    assert verdict(False, True, "lynx") == ("✗", "not yet lynx, but")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = (Drawn()[0].image * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_explain_draws_the_perturbation_beside_its_map(
    sharp: Classifier, photo: Path, tmp_path: Path
) -> None:
    methods = build_methods(sharp, ["smallest_perturbation", "saliency"])
    explained = explain_image(sharp, photo, methods, tmp_path / "out.png")
    assert list(explained.verdicts) == ["smallest_perturbation"]
    name = explained.classes[0][0]
    words = explained.verdicts["smallest_perturbation"]
    assert words.startswith("flipped to ")
    assert words != f"flipped to {name}"
    with Image.open(explained.picture) as picture:
        panels = np.asarray(picture)
    assert panels.shape[1] == 4 * (360 + 8) + 8  # image, map, perturbation, map
    third = panels[8 : 8 + 300, 8 + 2 * 368 : 8 + 2 * 368 + 360].astype(float)
    assert abs(np.median(third) - 128) < 30


@pytest.mark.parametrize(
    ("names", "cells"),
    [
        (["perceptual_ball"], (3, 1)),
        (["smallest_perturbation", "perceptual_ball"], (3, 2)),
        (["saliency", "smallest_perturbation", "perceptual_ball"], (2, 3)),
    ],
)
def test_a_map_and_its_perturbation_stand_in_one_row(
    sharp: Classifier, photo: Path, tmp_path: Path, names: list[str], cells: tuple[int, int]
) -> None:
    explained = explain_image(sharp, photo, build_methods(sharp, names), tmp_path / "out.png")
    with Image.open(explained.picture) as picture:
        assert picture.width == cells[0] * 368 + 8
        assert picture.height // 300 == cells[1]


def test_a_counterfactual_class_is_moved_towards(
    sharp: Classifier, photo: Path, tmp_path: Path
) -> None:
    methods = build_methods(sharp, ["smallest_perturbation", "saliency"])
    names = sharp.class_names
    assert names is not None
    first = explain_image(sharp, photo, methods, tmp_path / "out.png").classes[0][0]
    said = []
    for wanted in sorted(set(range(4)) - {names.index(first)}):
        explained = explain_image(
            sharp, photo, methods, tmp_path / "out.png", counterfactual=wanted
        )
        said.append(explained.verdicts["smallest_perturbation"])
        name = names[wanted]
        assert said[-1] == f"flipped to {name}" or said[-1].startswith(f"not yet {name}, but ")
    assert sum(words.startswith("flipped to") for words in said) > 1


def test_the_same_command_draws_the_same_picture(
    sharp: Classifier, photo: Path, tmp_path: Path
) -> None:
    drawing = build_methods(sharp, ["smooth_grad", "random"])
    state = torch.get_rng_state()
    one = explain_image(sharp, photo, drawing, tmp_path / "1.png")
    two = explain_image(sharp, photo, drawing, tmp_path / "2.png")
    assert one.picture.read_bytes() == two.picture.read_bytes()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_counterfactual_that_asks_nothing_is_refused(
    sharp: Classifier, photo: Path, tmp_path: Path
) -> None:
    def explain(methods: dict[str, Method], **classes: int) -> None:
        explain_image(sharp, photo, methods, tmp_path / "out.png", **classes)

    ball = build_methods(sharp, "smallest_perturbation")
    first = explain_image(sharp, photo, ball, tmp_path / "out.png").classes[0][0]
    predicted = (sharp.class_names or []).index(first)
    other = (predicted + 1) % 4
    with pytest.raises(DataError, match=f"{first}, is the prediction already"):
        explain(ball, counterfactual=predicted)
    with pytest.raises(DataError, match="is the explained class already"):
        explain(ball, target=other, counterfactual=other)
    with pytest.raises(ValueError, match="only methods that perturb the image know it"):
        explain(build_methods(sharp, "saliency"), counterfactual=other)
