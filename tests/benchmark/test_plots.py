from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from captum_robust.benchmark import METHODS, Comparison, compare
from captum_robust.catalog.methods import WITH_NETWORK
from captum_robust.metrics.functional import STRATEGIES
from captum_robust.report.plots import Style, method_styles, plot_curves

from .conftest import Drawn, centre_heat, make_classifier


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    methods = {
        "_hidden": "grad_cam",
        "$costs$": centre_heat,
        "a_name_that_is_longer_than_any_label_should_be": "saliency",
        "center_box": "center_box",
        "whole_image": "whole_image",
        "random": "random",
    }
    noise = {"noise": lambda x, _: (x + 0.2 * torch.rand_like(x)).clamp(0, 1)}
    folder = tmp_path_factory.mktemp("run")
    return compare(make_classifier(), Drawn(), methods, noise, out=folder, progress=False)


def styles_of(run: Comparison) -> dict[str, Style]:
    return method_styles(run.configuration["methods"])


def axes_of(figure: Figure) -> list[Any]:
    figure.canvas.draw()
    return figure.get_axes()


def test_rows_are_those_of_the_table_in_its_order(run: Comparison) -> None:
    left = axes_of(run.plot())[0]
    labels = [t.get_text() for t in left.get_yticklabels()]
    methods = list(run.table()["method"])
    assert [label[:20] for label in labels] == [method[:20] for method in methods]
    shown = [t.get_text() for t in left.texts]
    expected = [f"{100 * e:.1f} %" for e in run.table()["error"]]
    assert [t for t in shown if t.endswith(" %")] == expected
    assert [t for t in shown if not t.endswith(" %")] == ["clean", "noise"]


def test_curves_are_those_of_the_comparison(run: Comparison) -> None:
    panels = axes_of(run.plot())[1:]
    assert [a.get_title() for a in panels] == list(STRATEGIES)
    curves = run.curves()
    for axes, strategy in zip(panels, STRATEGIES, strict=True):
        for line, method in zip(axes.lines, run.methods, strict=True):
            one = curves[(curves["method"] == method) & (curves["strategy"] == strategy)]
            np.testing.assert_allclose(line.get_xdata(), one["alpha"])
            np.testing.assert_allclose(line.get_ydata(), 100 * one["error"])


def test_every_method_is_in_the_legend_under_its_own_name(run: Comparison) -> None:
    figure = plot_curves(run.curves("noise"), styles_of(run), "value")
    figure.canvas.draw()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["_hidden", "$costs$"]
    assert len(names) == len(run.methods)


def test_no_label_covers_another(run: Comparison) -> None:
    figure = run.plot()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    left = figure.get_axes()[0]
    labels = [*left.get_yticklabels(), *left.texts, *figure.subfigs[0].texts]
    assert len(figure.subfigs[0].texts) == 2
    legend = figure.subfigs[1].legends[0]
    labels += legend.get_texts()
    boxes = [label.get_window_extent(renderer) for label in labels]
    for (a, first), (b, second) in combinations(zip(labels, boxes, strict=True), 2):
        assert not first.overlaps(second), (a.get_text(), b.get_text())
    width, height = canvas.get_width_height()
    assert min(b.x0 for b in boxes) >= 0
    assert min(b.y0 for b in boxes) >= 0
    assert max(b.x1 for b in boxes) <= width
    assert max(b.y1 for b in boxes) <= height


def test_all_methods_differ_in_line_and_only_baselines_are_grey(tmp_path: Path) -> None:
    # Of this classifier nobody has trained masks; only the names count here.
    untrained = dict.fromkeys((*WITH_NETWORK, "adversarial_localization"), centre_heat)
    methods = {**{name: name for name in METHODS}, **untrained}
    run = compare(make_classifier(), Drawn(2), methods, out=tmp_path, progress=False)
    styles = method_styles(run.configuration["methods"])
    assert len({(s.color, s.dash) for s in styles.values()}) == len(METHODS)
    grey = {m for m, s in styles.items() if len({s.color[i : i + 2] for i in (1, 3, 5)}) == 1}
    assert grey == {"center_box", "whole_image", "random"}
    assert {m for m, s in styles.items() if s.fixed} == {"center_box", "whole_image"}


def test_nothing_of_the_callers_matplotlib_changes(run: Comparison) -> None:
    import matplotlib.pyplot as plt

    before, figures = dict(mpl.rcParams), plt.get_fignums()
    run.plot().canvas.draw()
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == figures


def test_without_boxes_the_figure_says_so(tmp_path: Path) -> None:
    run = compare(make_classifier(), Drawn(2, broken=(0, 1)), ["saliency"], out=tmp_path,
                  progress=False)  # fmt: skip
    figure = run.plot()
    figure.canvas.draw()
    assert "No image" in figure.texts[0].get_text()


def test_without_matplotlib_the_error_says_what_to_install(
    run: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        run.plot()


def test_unknown_names_are_refused(run: Comparison) -> None:
    with pytest.raises(ValueError, match=r"strategy: .*got 'energie'.*'energy'"):
        plot_curves(run.curves(), styles_of(run), "energie")
    with pytest.raises(ValueError, match=r"attack: .*got 'nois'.*'noise'"):
        run.curves("nois")
