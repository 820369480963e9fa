"""Progress bars: who sees which, and that all that takes more than two seconds has one."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import captum_robust as cr
from captum_robust import _progress, attacks, inspection
from captum_robust._progress import counted, progress_bar, without_bars
from captum_robust.benchmark import compare, robust_accuracy
from captum_robust.data import cached_superpixels
from captum_robust.defenses import ROC, SafetyNet
from captum_robust.metrics import functional as F
from captum_robust.nn import DenseAssociativeMemory
from captum_robust.show.explain import explain_image
from captum_robust.transforms import JPEG, Quilting
from tests.benchmark.conftest import Drawn, make_classifier

MODEL = make_classifier()
LAYER = MODEL.module[2]
DRAWN = Drawn()
X = torch.stack([DRAWN[i].image for i in range(6)])[..., :40]
CLASSES = torch.tensor([0, 1, 2, 3, 0, 1])


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


class Notebook(io.StringIO):
    """Standard error as that of a notebook, which says that it is no terminal."""


Notebook.__module__ = "ipykernel.iostream"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], str]:
    """What a call says on a terminal if two seconds were none."""

    def of(call: Callable[[], Any], stream: io.StringIO | None = None) -> str:
        stream = Terminal() if stream is None else stream
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(_progress, "PATIENCE", 0.0)
        call()
        return stream.getvalue()

    return of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two methods, clean and attacked, with all that it can measure."""
    return compare(
        MODEL,
        DRAWN,
        ["grad_cam", "robust_cam"],
        attacks={f"fgsm {n}/255": attacks.FGSM(MODEL, n / 255) for n in (2, 8)},
        out=tmp_path_factory.mktemp("run"),
        saliency_metric=True,
        faithfulness=True,
        progress=False,
    )


def net() -> SafetyNet:
    return SafetyNet(MODEL, LAYER, batch_size=2)


def explained(folder: Path) -> None:
    from captum_robust.catalog.methods import build_methods
    from captum_robust.draw import as_rgb, encode_png

    (file := folder / "image.png").write_bytes(encode_png(as_rgb(X[0])))
    explain_image(MODEL, file, build_methods(MODEL, ["grad_cam", "robust_cam"]), folder / "out.jpg")


MAPS = X.mean(dim=1)
BALL = cr.PerceptualBallPerturbation(MODEL, [LAYER])
CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "RISE": ("RISE", lambda: cr.RISE(MODEL, n_masks=8).attribute(X[:1], 0)),
    "ScoreCAM": ("Score-CAM", lambda: cr.ScoreCAM(MODEL, LAYER).attribute(X, CLASSES)),
    "IterativeMask": ("mask", lambda: cr.IterativeMask(MODEL, steps=3).attribute(X[:1], 0)),
    "PerceptualBall": ("L-BFGS", lambda: BALL.attribute(X[:1])),
    "PerceptualBall, in parts": (
        "attribution",
        lambda: BALL.attribute(X, internal_batch_size=2),
    ),
    "MultiScale": (
        "attribution",
        lambda: cr.MultiScale(cr.RobustCAM(MODEL, LAYER), [0.5, 1.0]).attribute(X),
    ),
    "Defended": (
        "defended",
        lambda: cr.Defended(
            cr.RobustCAM(MODEL, LAYER), [JPEG(50)] * 2, transforms_per_eval=1
        ).attribute(X),
    ),
    "PGD": ("attack", lambda: attacks.PGD(MODEL, steps=3).perturb(X, CLASSES)),
    "DeepFool": ("DeepFool", lambda: attacks.DeepFool(MODEL).perturb(X, CLASSES)),
    "LBFGSAttack": ("L-BFGS", lambda: attacks.LBFGSAttack(MODEL, searches=2).perturb(X, CLASSES)),
    "ExplanationAttack": (
        "attack",
        lambda: attacks.ExplanationAttack(cr.RobustCAM(MODEL, LAYER), steps=2).perturb(X, CLASSES),
    ),
    "SubstituteAttack": (
        "substitute",
        lambda: attacks.SubstituteAttack(MODEL).fit(X, make_classifier(), rounds=2, epochs=1),
    ),
    "UniversalPerturbation": (
        "pass 1",
        lambda: attacks.UniversalPerturbation(MODEL).fit([X, X], passes=1),
    ),
    "fooling_rate": ("pass 1", lambda: attacks.fooling_rate(MODEL, torch.zeros(3, 40, 40), [X, X])),
    "rank_analysis": ("ranks", lambda: attacks.rank_analysis(MODEL, X, 1 - X, batch_size=2)),
    "map_elites": (
        "evolving",
        lambda: attacks.map_elites(MODEL, (3, 8, 8), generations=2, batch_size=2),
    ),
    "SafetyNet.fit": ("activations, clean", lambda: net().fit(X, 1 - X)),
    "SafetyNet.fit, its machine": ("SafetyNet", lambda: net().fit(X, 1 - X)),
    "ROC": ("bootstrap", lambda: ROC.of(torch.rand(2000), torch.rand(2000))),
    "Quilting.fit": ("patches", lambda: Quilting.fit(X, 20, 5)),
    "Quilting": ("quilting", lambda: Quilting.fit(X, 20, 5)(X)),
    "DenseAssociativeMemory": (
        "memory",
        lambda: DenseAssociativeMemory(4, 3, 4).fit(
            torch.rand(8, 4), torch.arange(8) % 3, epochs=2
        ),
    ),
    "cached_superpixels": ("super-pixels", lambda: cached_superpixels(X, None, 4)),
    "bootstrap_interval": ("bootstrap", lambda: F.bootstrap_interval(torch.rand(3000))),
    "deletion_curve": ("removing pixels", lambda: F.deletion_curve(MODEL, X, MAPS, CLASSES)),
    "road": ("removing pixels", lambda: F.road(MODEL, X, MAPS, CLASSES, shares=[0.1, 0.5])),
    "infidelity": ("removing pixels", lambda: F.infidelity(MODEL, X, MAPS, CLASSES)),
    "sensitivity": ("sensitivity", lambda: F.sensitivity(lambda x, _: x[:, 0], X, CLASSES)),
    "model_randomization": (
        "randomization",
        lambda: F.model_randomization(make_classifier(), lambda x, _: x[:, 0], X, CLASSES),
    ),
    "smallest_sufficient_region": (
        "regions",
        lambda: F.smallest_sufficient_region(MODEL, X, MAPS, CLASSES),
    ),
    "saliency_metric": ("crops", lambda: F.saliency_metric(MODEL, X, MAPS, CLASSES, batch_size=2)),
    "maximal_patches": ("looking", lambda: inspection.maximal_patches(MODEL, "0", DRAWN, top=1)),
    "embedding": ("embedding by t-SNE", lambda: inspection.embedding(torch.rand(6, 3))),
    "locate": ("locate", lambda: cr.locate(MODEL, list(X), method="grad_cam")),
    "robust_accuracy": (
        "attacking",
        lambda: robust_accuracy(MODEL, attacks.FGSM(MODEL), DRAWN, [0.01], batch_size=2),
    ),
}

READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "table": ("scoring", lambda run: run.table()),
    "attack_table": ("attacks", lambda run: run.attack_table()),
    "saliency_table": ("crops", lambda run: run.saliency_table()),
    "stability_table": ("stability", lambda run: run.stability_table()),
    "gap_table": ("gaps", lambda run: run.gap_table()),
    "curves": ("curves", lambda run: run.curves()),
    "to_dataframe": ("boxes", lambda run: run.to_dataframe()),
    "to_html": ("pictures", lambda run: run.to_html(run.folder / "report.html")),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_takes_a_while_has_a_bar_on_a_terminal(name: str, shown: Callable[..., str]) -> None:
    expected, call = CALLS[name]
    assert re.search(rf"(^|[\r\n]){re.escape(expected)}[^\n\r]*(:|…)", shown(call))


@pytest.mark.parametrize("name", READERS)
def test_who_reads_a_big_run_has_a_bar(name: str, run: Any, shown: Callable[..., str]) -> None:
    expected, call = READERS[name]
    fresh = type(run)(run.folder)  # what was scored is kept
    assert re.search(rf"(^|[\r\n]){expected}: ", shown(lambda: call(fresh)))


def test_explain_counts_its_methods(tmp_path: Path, shown: Callable[..., str]) -> None:
    assert re.search(r"explain: .*\b0/2 ", shown(lambda: explained(tmp_path)))


def loop(show: bool | None = None, steps: int = 2) -> None:
    for _ in counted(range(steps), "step", show, "outer"):
        for _ in counted(range(2), "step", None, "inner"):
            pass


def test_of_loops_in_each_other_the_outer_one_has_the_bar(shown: Callable[..., str]) -> None:
    assert "outer: " in (text := shown(loop))
    assert "inner" not in text
    assert "inner: " in (text := shown(lambda: loop(steps=1)))  # one step says nothing
    assert "outer" not in text
    assert shown(lambda: loop(show=False)) == ""
    assert "inner: " in shown(lambda: next(counted([1, 2], "step", None, "inner")))  # as before


def test_nobody_sees_a_bar_that_nobody_asked_for_but_who_watches(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "outer: " in shown(loop, Notebook())
    assert shown(loop, io.StringIO()) == ""  # a file, or a pipe
    with without_bars():  # the option -q
        assert shown(loop) == ""
    monkeypatch.setenv("RANK", "1")  # of several processes the first one says it
    assert shown(loop) == ""


def test_a_bar_comes_after_two_seconds_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress_bar(3, "step", None, "slow") as advance:
        advance.doing("first")
        for seconds, expected in ((1.9, False), (0.2, True)):
            now[0] += seconds
            advance(1)
            assert ("slow: " in terminal.getvalue()) is expected
    assert terminal.getvalue().endswith("\r")  # cleared: the next text begins the line
    assert terminal.getvalue().split("\r")[-2].strip() == ""


def test_a_loader_of_unknown_length_is_counted_without_a_total(shown: Callable[..., str]) -> None:
    class Endless(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([1, 2])

    loader = torch.utils.data.DataLoader(Endless())
    text = shown(lambda: [*counted(loader, "batch", None, "reading")])
    assert re.search(r"reading: 0 ?batch", text)
