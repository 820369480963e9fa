"""The documentation site: ``sphinx-build -W --keep-going -c docs . build/site`` in the root.

External links are looked up by ``sphinx-build -b linkcheck -c docs . build/links``, with a network.
"""

import logging
import sys
import tempfile
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer

import captum_robust

project = "captum_robust"
author = copyright = "the captum_robust contributors"
version = release = captum_robust.__version__

# The root of the repository is the source: pages link to notebooks, scripts and each other by the
# same relative paths on the site and where the repository is read, and nothing is copied.
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "tutorials/*.ipynb",
    "captum_robust/weights/README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "build", "dist"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
nb_execution_mode = "off"  # notebooks are shown as they are committed; the tests execute them
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"no-value": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "captum_robust"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # leads from the first page of the site to docs/

intersphinx_timeout = 10
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
    "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable/", None),
}

# References within the package must lead somewhere. Not those to types in signatures, which may
# be other packages' or private.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(?!captum_robust\.).*|captum_robust(\._.*|(\.\w+){3,})"),
    ("py:.*", r"(torch|torchmetrics|captum|python)\..*"),
]

# Captum publishes no inventory, so here is one: its name in an annotation, and its page.
CAPTUM = {
    "captum.attr._utils.attribution.Attribution": "base_classes.html#captum.attr.Attribution",
    "captum.attr._utils.attribution.GradientAttribution": (
        "base_classes.html#captum.attr.GradientAttribution"
    ),
    "captum.attr._utils.attribution.LayerAttribution": (
        "base_classes.html#captum.attr.LayerAttribution"
    ),
    "captum.robust._core.perturbation.Perturbation": "robust.html",
}


def write_inventory(pages: dict[str, str]) -> str:
    """Write an inventory of classes as intersphinx reads it; return its path."""
    head = "# Sphinx inventory version 2\n# Project: {}\n# Version:\n# compressed using zlib\n"
    lines = "".join(f"{name} py:class 1 {page} -\n" for name, page in pages.items())
    path = Path(tempfile.mkdtemp()) / "objects.inv"
    path.write_bytes(head.format("Captum").encode() + zlib.compress(lines.encode()))
    return str(path)


intersphinx_mapping["captum"] = ("https://captum.ai/api/", write_inventory(CAPTUM))


class _Unreachable(logging.Filter):
    """Without a network there are no links to other projects; that is no fault of these pages."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("failed to reach any of the inventories")


logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(_Unreachable())


# In these docstrings what stands before a colon is part of the sentence, and no type.
def _attribute(self: Any) -> tuple[str, list[str]]:
    return "", self._consume_to_end()


def _returns(self: Any, **_: Any) -> list[tuple[str, str, list[str]]]:
    return [("", "", self._dedent(self._consume_to_next_section()))]


GoogleDocstring._consume_inline_attribute = _attribute
GoogleDocstring._consume_returns_section = _returns


def share_comments(_: Sphinx) -> None:
    """A constant that a room takes from one of its files has its docstring in that file."""
    pages = Path(__file__).parent.glob("api/*.md")
    rooms = [import_module(f"captum_robust.{page.stem}") for page in pages]
    comments: dict[tuple[str, str], list[str]] = {}
    for name in [name for name in sys.modules if name.startswith("captum_robust.")]:
        analyzer = ModuleAnalyzer.for_module(name)
        analyzer.analyze()
        comments.update(analyzer.attr_docs)
    for room in rooms:
        own = ModuleAnalyzer.for_module(room.__name__)
        keys = [("", name) for name in getattr(room, "__all__", ())]
        own.attr_docs.update({key: comments[key] for key in keys if key in comments})


def write_formula(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers draw without a script from elsewhere."""
    is_block = isinstance(node, nodes.math_block)
    translator.body.append(tex2mathml(node.astext(), as_block=is_block))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    renderers = (write_formula, None), (write_formula, None)
    app.add_html_math_renderer("mathml", *renderers)
    app.connect("builder-inited", share_comments)
