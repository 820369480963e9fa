"""Photographs that come with installed packages: a data set without a download."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from captum_robust.data.classes import imagenet_names
from captum_robust.data.dataset import AnnotatedImages, Truth
from captum_robust.data.fit import crop_to
from captum_robust.data.sample import Sample


class SampleSet(AnnotatedImages):
    """Seven photographs from scikit-image, matplotlib and scikit-learn, of seven classes.

    Each class is what EfficientNet-Lite0 sees at 224×224, and what the photograph shows; the boxes
    were drawn by hand around every instance. ``samples.json`` lists file, crop, class, boxes (in
    pixels of the whole photograph) and credit. Too few to measure with; enough to try with.

    Raises:
        FileNotFoundError: a package, or its photograph, isn't installed.
    """

    kind = "samples"
    class_names = imagenet_names()

    def __init__(self) -> None:
        self._entries = {entry["id"]: entry for entry in sample_entries()}
        self._paths = {id: _photograph(e["package"], e["file"]) for id, e in self._entries.items()}
        self.root = Path(str(files("captum_robust.data"))) / "samples.json"
        self.ids = list(self._entries)

    def _image_file(self, id: str) -> tuple[Path | bytes, str]:
        return self._paths[id], str(self._paths[id])

    def _truth(self, id: str, _: tuple[int, int]) -> Truth:
        entry = self._entries[id]
        return Truth(entry["class_index"], [(tuple(b), "samples.json") for b in entry["boxes"]])

    def _load(self, index: int) -> Sample:
        whole, crop = super()._load(index), self._entries[self.ids[index]]["crop"]
        if crop is None:
            return whole
        cropped = crop_to(whole, tuple(crop))
        return replace(cropped, original_size=cropped.size)

    def credits(self) -> dict[str, str]:
        """Photographer and licence by id."""
        return {id: entry["credit"] for id, entry in self._entries.items()}


@cache
def sample_entries() -> list[dict[str, Any]]:
    """The content of ``samples.json``."""
    text = (files("captum_robust.data") / "samples.json").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = json.loads(text)
    return entries


def _photograph(package: str, file: str) -> Path:
    """Where the photograph is, without importing its package."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (path := Path(folder, file)).is_file():
            return path
    missing = f"{package}/{file}, which is not installed"
    raise FileNotFoundError(f'the sample set needs {missing}: pip install "captum-robust[demo]"')
