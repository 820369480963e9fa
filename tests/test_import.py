"""What an import costs, and what it must not load."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from functools import cache

import pytest

import captum_robust

HEAVY = {
    "cv2",
    "jinja2",
    "numba",
    "pandas",
    "skimage",
    "sklearn",
    "torchmetrics",
    "torchvision",
    "typer",
}


@cache
def loaded_by(module: str) -> frozenset[str]:
    """The names in ``sys.modules`` of a fresh interpreter behind ``import module``."""
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return frozenset(run.stdout.split())


def top_level(modules: frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def third_party(module: str) -> set[str]:
    return top_level(loaded_by(module)) - set(sys.stdlib_module_names)


def test_the_package_loads_nothing_that_captum_does_not() -> None:
    assert third_party("captum_robust") - third_party("captum.attr") == {"captum_robust"}
    assert not third_party("captum_robust") & HEAVY


def test_the_metric_functions_load_without_compilers_and_frameworks() -> None:
    assert not third_party("captum_robust.metrics.functional") & {"cv2", "numba", "torchmetrics"}


def test_the_benchmark_loads_without_tables_and_plots() -> None:
    assert not third_party("captum_robust.benchmark") & {"cv2", "numba", "pandas"}
    plots = {m for m in loaded_by("captum_robust.benchmark") if m.startswith("matplotlib")}
    assert plots <= loaded_by("captum.attr")


@pytest.mark.parametrize("room", ["attr", "benchmark", "data", "metrics", "metrics.functional"])
def test_all_public_names_exist(room: str) -> None:
    module = importlib.import_module(f"captum_robust.{room}")
    assert module.__all__
    for name in module.__all__:
        assert hasattr(module, name), name


def test_the_names_at_the_top_are_those_of_attr() -> None:
    attr = importlib.import_module("captum_robust.attr")
    for name in set(captum_robust.__all__) - {"__version__", "locate", "overlay"}:
        assert getattr(captum_robust, name) is getattr(attr, name)


def test_one_version() -> None:
    assert captum_robust.__version__ == importlib.metadata.version("captum-robust")
