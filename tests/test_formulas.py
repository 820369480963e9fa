"""Formulas of the documentation: readers without a network see them too."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

nodes = pytest.importorskip("docutils.nodes")
pytest.importorskip("sphinx")
ROOT = Path(__file__).parent.parent


def test_each_formula_is_written_as_mathml_without_a_script() -> None:
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    assert conf["html_math_renderer"] == "mathml"
    texts = [file.read_text("utf-8") for file in (ROOT / "captum_robust").rglob("*.py")]
    formulas = [each for text in texts for each in re.findall(r":math:`([^`]+)`", text)]
    assert len(formulas) > 5
    for formula in formulas:
        for kind in (nodes.math, nodes.math_block):
            page = SimpleNamespace(body=[])
            with pytest.raises(nodes.SkipNode):
                conf["write_formula"](page, kind(formula, formula))
            assert page.body[0].lstrip().startswith("<math")
