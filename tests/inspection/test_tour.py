"""The command ``captum-robust inspect`` and its page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from captum_robust.draw import as_rgb
from captum_robust.inspection import tour
from captum_robust.inspection.streaming import Batch, ImageStream
from captum_robust.models import Classifier
from captum_robust.report.inspection_page import write_tour
from tests.inspection.nets import BLUE, RED, block, colour_net

Run = Callable[..., tuple[int, str, str]]
MODEL = ("small_resnet", "--weights", "none", "--size", "32", "--units", "3", "--top", "2")


def save(path: Path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(as_rgb(image)).save(path)


class Tags(HTMLParser):
    """The tags of a page, and what they load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_command_writes_one_page_that_needs_nothing_else(run: Run, tmp_path: Path) -> None:
    for number in range(6):
        image = block(RED if number % 2 else BLUE, number, number, 12, 12, size=32)
        save(tmp_path / "photos" / f"{number}.png", image)
    (tmp_path / "photos" / "<script>x.png").write_bytes(b"no image")
    masks = tmp_path / "masks" / "<i>a$b$"
    save(masks / "1.png", block((1, 1, 1), 1, 1, 12, 12, size=32))
    options = ("--images", "photos", "--out", "out", "--concepts", "masks", "--layers", "stage2")
    code, out, err = run("inspect", *MODEL, *options)
    assert code == 0, err
    assert f"6 images -> {Path('out/index.html')}" in out
    assert "<script>x.png: not an image" in err
    page = Tags((tmp_path / "out" / "index.html").read_text("utf-8"))
    assert not {"script", "i", "link"} & set(page.tags)
    assert all(source.startswith(("data:image/", "#")) for source in page.sources)
    # Filters, patches, activations, neighbours and two embeddings; colours where a unit has one.
    assert page.tags.count("img") >= 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]


def test_one_image_is_enough(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", block(RED, 0, 0, 16, 16, size=32))
    code, out, err = run("inspect", *MODEL, "--images", "photos", "--layers", "stage2")
    assert code == 0, err
    assert "1 image -> captum-robust-inspect" in out
    page = (tmp_path / "captum-robust-inspect" / "index.html").read_text("utf-8")
    assert "Each of the images has 0 neighbours, not 5." in page
    assert "Too few for t-SNE: 1 image; PCA instead." in page
    assert page.count('alt="images in the plane, by pca') == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--images", "none"), "none"),
        (("--images", "empty"), "no images"),
        (("--images", "photos", "--layers", "nothing"), "--layers: expected one of"),
        (("--images", "photos", "--layers", "classifier"), "--layers: expected maps N×C×h×w"),
        (("--images", "photos", "--concepts", "colors"), "--concepts: expected one of"),
    ],
)
def test_wrong_options_are_one_line(
    run: Run, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    save(tmp_path / "photos" / "a.png", block(RED, 0, 0, 16, 16, size=32))
    (tmp_path / "empty").mkdir()
    code, _, err = run("inspect", *MODEL, *options)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("captum-robust: error")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in err


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom captum_robust.cli.app import app\n"
        "try: app(['inspect', '--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "Folder of images" in result.stdout
    assert result.stdout.splitlines()[-1] == "False"


def test_the_tour_agrees_with_its_parts(tmp_path: Path) -> None:
    images = [block(RED, i, i, 4, 4) for i in range(5)] + [
        block(BLUE, 2, i, 8, 4) for i in range(5)
    ]
    data = [(image, int(number > 4)) for number, image in enumerate(images)]
    found = tour(colour_net(), data, ["units"], points=5, batch_size=3)
    (stop,) = found.stops
    assert stop.patches.values[0, :6].tolist() == [1, 1, 1, 1, 1, 0]
    best = {d.unit: d.concept for d in stop.dissections["colours"].detectors}
    assert best == {0: "red", 1: "blue"}
    assert found.features.ids == ["0", "2", "4", "6", "8"]
    assert found.features.labels.tolist() == [0, 0, 0, 1, 1]
    assert found.notes == ["5 of 10 images are embedded and compared."]
    assert found.neighbours.same_class == pytest.approx(8 / 20)
    page = write_tour(found, tmp_path / "tour.html").read_text("utf-8")
    assert "40 % of the nearest neighbours are of the same class" in page
    assert "A frame has the colour of its class." in page
    bare = tour(colour_net(), images, ["units"], points=5, batch_size=3)
    page = write_tour(bare, tmp_path / "tour.html").read_text("utf-8")
    assert "Near images are alike to the network." in page
    assert "colour of its class" not in page  # none is known


def test_concepts_that_never_occur_are_said(tmp_path: Path) -> None:
    save(tmp_path / "masks" / "red" / "another.png", torch.ones(3, 16, 16))
    found = tour(colour_net(), [block(RED, 0, 0, 4, 4)], ["units"], concepts=tmp_path / "masks")
    assert "The concepts that were given occur on none of the images." in found.notes
    assert list(found.stops[0].dissections) == ["colours", "textures"]


def stopping(monkeypatch: pytest.MonkeyPatch, seen: list[int], *, after: int) -> None:
    """Stop the program, as if it were killed, when so many images were seen."""
    batches = ImageStream.batches

    def some(stream: ImageStream, first: int = 0) -> Iterator[Batch]:
        for batch in batches(stream, first):
            if len(seen) == after:
                seen.append(-1)
                raise KeyboardInterrupt
            seen.append(int(batch.positions[0]))
            yield batch

    monkeypatch.setattr(ImageStream, "batches", some)


def test_a_stopped_tour_goes_on_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captum_robust.inspection.progress.SAVED_EVERY", 2)
    images = [tmp_path / "photos" / f"{i}.png" for i in range(9)]
    images[0].parent.mkdir()
    images[0].write_bytes(b"no image")
    for i, path in enumerate(images[1:]):
        image = block(RED if i % 3 else BLUE, i, 2 * i % 8, 6, 5)
        save(path, image)
        save(tmp_path / "masks" / ("thing" if i % 2 else "other") / path.name, image)
    options: dict[str, Any] = {"layers": ["units"], "top": 3, "points": 5, "batch_size": 1}
    options |= {"concepts": tmp_path / "masks", "images": tmp_path / "photos"}
    whole = tour(colour_net(), **options)
    seen: list[int] = []
    stopping(monkeypatch, seen, after=5)
    options["folder"] = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tour(colour_net(), **options)
    found = tour(colour_net(), **options)
    # Images 1 to 5 had been taken in, and 1 to 4 written.
    assert seen == [1, 2, 3, 4, 5, -1, 5, 6, 7, 8]
    assert (found.photograph, found.images, found.notes) == ("1.png", 8, whole.notes)
    assert found.unusable == whole.unusable
    assert list(found.unusable) == ["0.png"]
    (stop,), (expected,) = found.stops, whole.stops
    for name in ("values", "positions", "patches", "heats", "histograms"):
        got, want = (getattr(one.patches, name) for one in (stop, expected))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert stop.patches.images == expected.patches.images
    assert list(stop.dissections) == ["colours", "textures", "concepts"]
    for kind, got in stop.dissections.items():
        want = expected.dissections[kind]
        assert (got.concepts, got.notes, got.images) == (want.concepts, want.notes, want.images)
        assert torch.equal(got.iou, want.iou)
        assert torch.equal(got.thresholds, want.thresholds)
    assert found.features.ids == whole.features.ids
    assert torch.equal(found.features.values, whole.features.values)
    for got, want in zip(found.embeddings, whole.embeddings, strict=True):
        assert torch.equal(got.points, want.points)
    # All was written: once more, no image is looked at.
    tour(colour_net(), **options)
    assert seen[-1] == 8
    for other in ({"top": 4}, {"units": 2}, {"concepts": None}, {"points": 6}):
        with pytest.raises(ValueError, match=r"out holds another run"):
            tour(colour_net(), **options | other)
    normalised = Classifier(colour_net().module, mean=[0.5] * 3, std=[0.5] * 3, input_size=16)
    with pytest.raises(ValueError, match=r"mean: None there, \[0\.5, 0\.5, 0\.5\] here"):
        tour(normalised, **options)
    save(tmp_path / "masks" / "more" / "1.png", torch.ones(3, 16, 16))
    with pytest.raises(ValueError, match="names of concepts: "):
        tour(colour_net(), **options)


def test_a_tour_begins_anew_where_an_image_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captum_robust.inspection.progress.SAVED_EVERY", 1)
    for i in range(4):
        save(tmp_path / "photos" / f"{i}.png", block(RED, i, i, 6, 5))
    options: dict[str, Any] = {"layers": ["units"], "top": 3, "batch_size": 1}
    options |= {"images": tmp_path / "photos", "folder": tmp_path / "out"}
    seen: list[int] = []
    stopping(monkeypatch, seen, after=2)
    with pytest.raises(KeyboardInterrupt):
        tour(colour_net(), **options)
    save(tmp_path / "photos" / "0.png", block(BLUE, 3, 3, 9, 9))
    with pytest.warns(UserWarning, match=r"^images: their files have changed; begun anew$"):
        found = tour(colour_net(), **options)
    assert seen == [0, 1, -1, 0, 1, 2, 3]
    expected = tour(colour_net(), **options | {"folder": None})
    values = [one.stops[0].patches.values for one in (found, expected)]
    torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)
    assert values[0][1, 0] == 1  # blue is in the image that came


def test_the_command_goes_on_and_leaves_the_page_only(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        save(tmp_path / "photos" / f"{i}.png", block(RED, i, i, 12, 12, size=32))
    monkeypatch.setattr("captum_robust.inspection.progress.SAVED_EVERY", 1)
    seen: list[int] = []
    options = ("--images", "photos", "--out", "out", "--layers", "stage2", "--batch-size", "1")
    with monkeypatch.context() as patched:
        stopping(patched, seen, after=3)
        run("inspect", *MODEL, *options)
    assert seen[:4] == [0, 1, 2, -1]
    assert (tmp_path / "out" / "unfinished" / "tour.safetensors").is_file()
    code, _, err = run("inspect", *MODEL, *options, "--units", "2")
    assert code == 2
    assert "unfinished holds another run" in err
    code, out, err = run("inspect", *MODEL, *options)
    assert code == 0, err
    assert "4 images -> " in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]


def test_a_network_without_filters_that_are_pictures() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    net = nn.Sequential(Scaled(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = tour(Classifier(net, input_size=8), [block(RED, 0, 0, 4, 4, size=8)], ["0"])
    assert found.filters is None
    assert found.notes[0].startswith("There are no filters to show: model: expected a first layer")
