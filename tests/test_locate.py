"""Boxes in torchvision's detection format, from any classifier and any method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from captum_robust import ClassActivationMap, RobustCAM, cli, locate
from captum_robust.attr.real_time_masking import pretrained
from captum_robust.catalog.box_vote import BEST, FAST
from captum_robust.catalog.methods import METHODS, build_methods
from captum_robust.catalog.thresholds import USUAL_THRESHOLD, shipped_facts, shipped_threshold
from captum_robust.data import DataError
from captum_robust.draw import as_rgb, encode_png
from captum_robust.metrics.functional import STRATEGIES, alpha_grid
from captum_robust.models import Classifier, load_classifier
from captum_robust.nn import MaskingNetwork, save_masking_network
from captum_robust.show.locate import USUAL, Locator
from captum_robust.show.located_files import CocoFile, located_files, run_lengths
from tests.benchmark.conftest import make_classifier

NAMES = ["red", "green", "blue"]
RED, GREEN, BLUE = range(3)


class Colours(nn.Module):
    """Scores of three classes: the logarithm of how much of each colour is in the image."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        return 2 * (x.mean(dim=(2, 3)) + 1e-4).log()


def colours() -> Classifier:
    return Classifier(Colours(), input_size=32, class_names=NAMES).eval()


def of_class(images: Tensor, target: Tensor | None) -> Tensor:
    """The map of a class is its colour."""
    assert target is not None
    return images[torch.arange(len(images)), target]


def painted(*squares: tuple[int, tuple[int, int, int, int]], size: tuple[int, int]) -> Tensor:
    """Squares (colour, (x0, y0, x1, y1)) on black."""
    image = torch.zeros(3, *size)
    for colour, (x0, y0, x1, y1) in squares:
        image[colour, y0:y1, x0:x1] = 1
    return image


def test_boxes_are_in_pixels_of_images_of_any_size() -> None:
    sizes = ((32, 32), (64, 96), (32, 160))
    squares = [(w // 4, h // 8, 5 * w // 8, h // 2) for h, w in sizes]
    images = [painted((RED, box), size=s) for box, s in zip(squares, sizes, strict=True)]
    found = locate(colours(), images, None, of_class)
    for image, box, one in zip(images, squares, found, strict=True):
        assert one["boxes"].tolist() == [list(box)]
        assert one["labels"].tolist() == [RED]
        assert one["masks"].equal(image[:1] > 0.5)
        assert one["scores"][0] > 0.99


def test_no_object_is_without_a_pixel_in_an_image_smaller_than_its_map() -> None:
    def dot(images: Tensor, _: Tensor | None) -> Tensor:
        maps = torch.zeros(len(images), 32, 32)
        maps[:, 21:23, 5:7] = 1
        return maps

    (one,) = locate(colours(), torch.full((1, 3, 2, 3), 0.5), None, dot)
    assert one["masks"].tolist() == [[[False] * 3, [True, False, False]]]


def test_each_class_and_each_part_is_an_object_of_its_own() -> None:
    red, green = (0, 0, 10, 10), (20, 0, 30, 10)
    image = painted((RED, red), (RED, (0, 20, 8, 30)), (GREEN, green), size=(32, 32))
    (one,) = locate(colours(), image[None], None, of_class)
    found = set(zip(one["labels"].tolist(), map(tuple, one["boxes"].tolist()), strict=True))
    assert found == {(RED, red), (RED, (0, 20, 8, 30)), (GREEN, green)}
    assert one["scores"].tolist() == sorted(one["scores"].tolist(), reverse=True)


def test_a_part_that_the_classifier_does_not_confirm_is_no_object() -> None:
    image = painted((RED, (0, 0, 16, 16)), (BLUE, (20, 20, 30, 30)), size=(32, 32))

    def wrong(images: Tensor, _: Tensor | None) -> Tensor:
        return images.amax(dim=1)

    (one,) = locate(colours(), image[None], RED, wrong)
    assert one["boxes"].tolist() == [[0, 0, 16, 16]]


def test_one_object_has_one_box_under_its_most_certain_class() -> None:
    image = torch.zeros(3, 32, 32)
    image[RED, 4:20, 4:20], image[GREEN, 4:20, 4:20] = 0.8, 0.7
    (one,) = locate(colours(), image[None], None, of_class)
    assert one["labels"].tolist() == [RED]
    assert 0.5 < one["scores"][0] < 0.6


def test_an_object_costs_a_pass_beside_those_of_the_method() -> None:
    model = colours()
    images = torch.stack([painted((c, (8, 4, 20, 16)), size=(32, 32)) for c in range(3)])
    locate(model, images, None, of_class, rounds=1)
    assert model.module.passes == 3


class Peaks(nn.Module):
    """Scores of three classes: ten times the brightest pixel of each colour."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * x.amax(dim=(2, 3))


def test_what_is_left_is_looked_at_again_once_more_certain_objects_are_found() -> None:
    model = Classifier(Peaks(), input_size=32, class_names=NAMES).eval()
    image = painted((RED, (0, 0, 16, 16)), size=(32, 32))
    image[GREEN, 20:30, 18:28], image[BLUE, 2:8, 20:30] = 0.8, 0.6
    (first,) = locate(model, image[None], None, of_class, rounds=1)
    assert first["labels"].tolist() == [RED]
    (two,) = locate(model, image[None], None, of_class, rounds=2)
    assert two["labels"].tolist() == [GREEN, RED]
    (all_,) = locate(model, image[None], None, of_class)
    pairs = zip(all_["labels"].tolist(), map(tuple, all_["boxes"].tolist()), strict=True)
    assert set(pairs) == {(RED, (0, 0, 16, 16)), (GREEN, (18, 20, 28, 30)), (BLUE, (20, 2, 30, 8))}
    assert all_["scores"].tolist() == sorted(all_["scores"].tolist(), reverse=True)


def test_a_long_image_keeps_its_shape_if_the_model_takes_that() -> None:
    seen: list[tuple[int, ...]] = []

    class Watched(Colours):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape[2:]))
            return super().forward(x)

    class OneSize(Watched):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2:] != (32, 32):
                raise RuntimeError("the size of tensor a must match")
            return super().forward(x)

    sizes = {(32, 96): (32, 96), (40, 40): (32, 32), (300, 20): (128, 32), (40, 50): (32, 32)}
    images = [painted((RED, (4, 4, 12, 12)), size=size) for size in sizes]
    for kind, wanted in ((Watched, set(sizes.values())), (OneSize, {(32, 32)})):
        seen.clear()
        model = Classifier(kind(), input_size=32, class_names=NAMES).eval()
        found = locate(model, images, None, of_class, rounds=1)
        assert set(seen) == wanted
        assert [tuple(one["masks"].shape[1:]) for one in found] == list(sizes)
        torch.testing.assert_close(
            found[0]["boxes"], torch.tensor([[4.0, 4, 12, 12]]), atol=3, rtol=0
        )


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_no_image_sees_another(batch_size: int) -> None:
    model = make_classifier()
    images = list(torch.rand(5, 3, 40, 48, generator=torch.Generator().manual_seed(1)))
    together = locate(model, images, method="robust_cam", batch_size=batch_size)
    for image, one in zip(images, together, strict=True):
        (alone,) = locate(model, [image], method="robust_cam")
        assert alone["boxes"].equal(one["boxes"])
        assert alone["labels"].equal(one["labels"])
        torch.testing.assert_close(alone["scores"], one["scores"])


def test_the_format_is_that_of_torchvision_and_torchmetrics() -> None:
    images = torch.stack([painted((c, (8, 4, 20, 16)), size=(32, 32)) for c in (RED, BLUE)])
    found = locate(colours(), images, None, of_class)
    truth = [
        {"boxes": torch.tensor([[8.0, 4, 20, 16]]), "labels": torch.tensor([c]), "masks": m}
        for c, m in ((RED, images[0, :1] > 0), (BLUE, images[1, 2:] > 0))
    ]
    for kind in ("bbox", "segm"):
        metric = MeanAveragePrecision(iou_type=kind)
        metric.update(found, truth)
        assert metric.compute()["map"] == 1
    drawn = draw_bounding_boxes(images[0], found[0]["boxes"], colors="white")
    assert drawn[:, 4, 8:20].eq(1).all()
    assert draw_segmentation_masks(images[0], found[0]["masks"]).shape == images[0].shape


def test_target_says_which_class() -> None:
    image = painted((RED, (0, 0, 16, 16)), (BLUE, (20, 20, 30, 30)), size=(32, 32))
    for target in (BLUE, [BLUE], torch.tensor([BLUE])):
        (one,) = locate(colours(), image[None], target, of_class)
        assert one["labels"].tolist() == [BLUE]
        assert one["boxes"].tolist() == [[20, 20, 30, 30]]


def test_any_attribution_is_taken_and_the_mode_of_the_model_stays() -> None:
    model = make_classifier().train()
    images = torch.rand(2, 1, 40, 48)
    for method in (RobustCAM(model, model.cam_layer), "grad_cam", "center_box", "fast", "best"):
        assert [len(one["boxes"]) > 0 for one in locate(model, images, None, method)] == [True] * 2
    assert model.training
    (one,) = locate(model, images[:1], 0, "center_box", threshold=0.5)
    assert one["masks"].flatten(1).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 3}, r"classes: expected numbers? .*3"),
        ({"target": [0]}, "one for each of 2 images"),
        ({"target": "red"}, "target"),
        ({"threshold": 2}, r"threshold: expected a number in \[0, 1\]"),
        ({"confidence": -1}, "confidence"),
        ({"batch_size": 0}, "batch_size"),
        ({"method": "robust_cma"}, "robust_cam"),
        ({"method": 3}, "method"),
        ({"images": torch.rand(2, 3, 8)}, r"images\[0\]: expected C×H×W"),
        ({"images": torch.rand(2, 4, 8, 8)}, r"images\[0\]: expected 3 channels"),
        ({"images": torch.ones(2, 3, 8, 8, dtype=torch.uint8)}, r"images\[0\]: expected pixels"),
        ({"images": torch.full((2, 3, 8, 8), torch.nan)}, r"images\[0\]: expected finite"),
        ({"images": 3}, "images"),
        ({"images": "a.png"}, "images: .*got one str"),
        ({"images": torch.full((2, 3, 8, 8), 255.0)}, r"images\[0\]: expected pixels in \[0, 1\]"),
        ({"images": torch.randn(2, 3, 8, 8)}, r"images\[0\]: .*the normalisation belongs"),
        ({"images": torch.rand(2, 3, 0, 8)}, r"images\[0\]: expected 1×H×W or 3×H×W"),
        ({"method": lambda x, target: x[:1, 0]}, "expected maps 2×32×32, got"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"images": torch.rand(2, 3, 8, 8), "method": of_class} | change
    with pytest.raises((ValueError, TypeError), match=message):
        locate(colours(), given.pop("images"), **given)


def test_a_model_that_does_not_fit_is_refused_by_name() -> None:
    images = torch.rand(2, 3, 8, 8)
    nameless = Classifier(Colours(), input_size=32)
    with pytest.raises(ValueError, match="classes: expected numbers from 0 to 2, got 3"):
        locate(nameless, images, 3, of_class)
    with pytest.raises(TypeError, match=r"model: expected a captum_robust\.models"):
        locate(Colours(), images, None, of_class)  # type: ignore[arg-type]
    mapped = Classifier(nn.Sequential(Colours(), nn.Unflatten(1, (3, 1, 1))), input_size=32)
    with pytest.raises(ValueError, match=r"model: expected scores N×K, got \(2, 3, 1, 1\)"):
        locate(mapped, images, None, of_class)


def test_files_are_read_and_a_broken_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encode_png(as_rgb(painted((RED, (8, 4, 20, 16)), size=(32, 64)))))
    (one,) = locate(colours(), [file], None, of_class)
    assert one["boxes"].tolist() == [[8, 4, 20, 16]]
    file.write_bytes(b"torn")
    with pytest.raises(DataError, match=r"a\.png"):
        locate(colours(), [file], None, of_class)


def test_scores_that_are_not_finite_are_refused() -> None:
    class Infinite(Colours):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.inf

    model = Classifier(Infinite(), input_size=32)
    with pytest.raises(ValueError, match=r"no finite scores for image\(s\) \[0, 1\]"):
        locate(model, torch.rand(2, 3, 32, 32), None, of_class)


def test_a_coco_file_is_what_pycocotools_reads(tmp_path: Path) -> None:
    files = {}
    for name, square in (("a.png", (8, 4, 20, 16)), ("b/c.png", (0, 0, 10, 32))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        files[name] = tmp_path / name
        files[name].write_bytes(encode_png(as_rgb(painted((GREEN, square), size=(32, 32)))))
    (tmp_path / "d.png").write_bytes(b"torn")
    files["d.png"] = tmp_path / "d.png"
    coco = CocoFile(NAMES)
    found = list(located_files(Locator(colours(), of_class), files, batch_size=2))
    assert [bool(one.error) for one in found] == [False, False, True]
    for one in found:
        coco.add(one)
    coco.write(tmp_path / "found.json")
    read = COCO(str(tmp_path / "found.json"))
    results = read.loadRes(read.loadAnns(read.getAnnIds()))
    assert [image["file_name"] for image in read.loadImgs([1, 2])] == ["a.png", "b/c.png"]
    assert [read.cats[a["category_id"]]["name"] for a in results.anns.values()] == ["green"] * 2
    for one, annotation in zip(found, read.loadAnns(read.getAnnIds()), strict=False):
        assert one.located is not None
        mask = one.located["masks"][0]
        assert torch.from_numpy(read.annToMask(annotation)).bool().equal(mask)
        assert annotation["area"] == mask.sum()


def test_run_lengths_by_hand() -> None:
    assert run_lengths(torch.zeros(2, 3, dtype=torch.bool)) == [6]
    assert run_lengths(torch.ones(2, 3, dtype=torch.bool)) == [0, 6]


def test_thresholds_that_ship_are_of_the_catalogue_and_on_the_grid() -> None:
    facts = shipped_facts()
    assert facts["methods"].keys() <= METHODS.keys()
    for one in facts["methods"].values():
        assert one["strategy"] in STRATEGIES
        assert one["alpha"] in alpha_grid(one["strategy"])
        assert one["n_chosen_on"] >= 50
        assert one["n_scored"] >= 50
        assert len(one["errors"]) == len(one["models"]) > 0
        assert all(0 < error < 1 for error in one["errors"])
    assert shipped_threshold("mine") is USUAL_THRESHOLD


def test_a_method_of_the_catalogue_has_its_threshold_also_as_an_attribution() -> None:
    model = make_classifier()
    given = {"named": "robust_cam", "own": RobustCAM(model, model.cam_layer), "mine": of_class}
    methods = build_methods(model, given)
    assert methods["named"].threshold == methods["own"].threshold == shipped_threshold("robust_cam")
    assert methods["mine"].threshold is USUAL_THRESHOLD
    for kind in ("grad_cam", "layer_cam", "eigen_cam"):
        (own,) = build_methods(
            model, {"own": ClassActivationMap(model, model.cam_layer, kind)}
        ).values()
        assert own.threshold == shipped_threshold(kind) != USUAL_THRESHOLD
    several = ClassActivationMap(model, [model.module[0], model.module[2]])
    assert build_methods(model, {"own": several})["own"].threshold is USUAL_THRESHOLD


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["captum-robust", "locate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_the_command_prints_boxes_and_goes_on_after_a_broken_file(run: Run, tmp_path: Path) -> None:
    (folder := tmp_path / "images").mkdir()
    for number in range(3):
        image = 0.2 * torch.rand(3, 40, 48)
        (folder / f"{number}.png").write_bytes(encode_png(as_rgb(image)))
    (folder / "torn.png").write_bytes(b"torn")
    model = ("--model", "tests.benchmark.conftest:make_classifier", "--method", "robust_cam")
    code, out, err = run(folder, *model, "--json", "--coco", "found.json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(folder / f"{n}.png") for n in range(3)]
    assert {(line["width"], line["height"]) for line in lines} == {(48, 40)}
    assert all(line["objects"][0]["name"] in make_classifier().class_names for line in lines)
    assert "torn.png" in err
    assert "4 images: 1 could not be used" in err
    assert len(COCO("found.json").imgs) == 3
    code, out, _ = run(folder / "0.png", *model, "--target", "ray")
    assert code == 0
    assert "ray  [" in out
    code, out, err = run(folder / "torn.png", *model)
    assert (code, out) == (2, "")
    said = [line for line in err.splitlines() if line.startswith("captum-robust: ")]
    assert said == [
        f"captum-robust: error: {folder / 'torn.png'}: not an image that Pillow can read (4 bytes)"
    ]
    code, _, err = run(folder, *model, "--coco", folder / "0.png")
    assert code == 2
    assert "is one of the images" in err


def test_best_and_fast_are_methods_that_the_model_can_have() -> None:
    assert pretrained()
    for method in ("best", "fast"):
        with pytest.warns(UserWarning, match="no masking network comes for Sequential"):
            found = Locator(make_classifier(), method)
        assert found.method.threshold == shipped_threshold("grad_cam")
    lite = load_classifier("efficientnet_lite0")
    assert {Locator(lite, method).method.vote.votes for method in USUAL} == {BEST, FAST}


def test_own_masking_network_votes_too(run: Run, tmp_path: Path) -> None:
    model = make_classifier()
    model.name = "tests.benchmark.conftest:make_classifier"
    save_masking_network(MaskingNetwork(model), tmp_path / "own.safetensors")
    image = tmp_path / "a.png"
    image.write_bytes(encode_png(as_rgb(torch.rand(3, 40, 48))))
    named = ("--model", model.name)
    for method in ("best", "fast", "box_vote_fast", "real_time_masking"):
        code, out, err = run(image, *named, "--network", "own.safetensors", "--method", method)
        assert (code, err) == (0, ""), err
        assert "[" in out
    code, _, err = run(image, *named, "--network", "own.safetensors", "--method", "grad_cam")
    assert code == 2
    assert "--network" in err
