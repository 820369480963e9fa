"""Where a pass over images has come to: a file from which the same call goes on after a stop."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from captum_robust._facts import named, parts, text, whole
from captum_robust._files import TensorFile, check_same_run, checksum, read_facts, write_facts
from captum_robust.inspection.streaming import Batch, ImageStream
from captum_robust.models import Classifier

_KIND = "captum_robust.inspection"
_FORM = {
    "run": parts({}, others=True),
    "next": whole(0),
    "unusable": named(text()),
    "parts": named(parts({}, others=True)),
}

SAVED_EVERY = 50
"""Batches, of which a call that is killed loses at most so many."""
Saved = tuple[dict[str, Tensor], dict[str, Any]]


def text_checksum(text: str) -> int:
    """The CRC-32 of a text."""
    return zlib.crc32(text.encode("utf-8", "surrogateescape"))


class Part(Protocol):
    """What takes in one batch after another."""

    def saved(self) -> Saved:
        """The tensors, and what JSON can hold, that all so far is in."""

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take up what was saved."""


class Progress:
    """The state of a call that looks at images one after another.

    Args:
        path: of the file.
        model: whose weights and normalisation belong to the call.
        stream: the images, which belong to it by their names; where files of these names have
            changed, the call begins anew.
        collected: what the state consists of, by name.
        run: what else belongs to the call.
    """

    def __init__(
        self,
        path: Path,
        model: Classifier,
        stream: ImageStream,
        collected: Mapping[str, Part],
        run: Mapping[str, Any],
    ) -> None:
        self._path, self._stream, self._parts = path, stream, collected
        names = "\n".join(stream.name_of(i) for i in range(len(stream)))
        self._run = {
            **run,
            "images": len(stream),
            "ids": text_checksum(names),
            "files": stream.checksums(),
            "weights": checksum(model.state_dict().values()),
            "input_size": list(model.input_size),
            "mean": None if model.mean is None else model.mean.flatten().tolist(),
            "std": None if model.std is None else model.std.flatten().tolist(),
        }

    def load(self) -> int:
        """Take up the state that is there, and return the number of the next image.

        Raises:
            ValueError: it is that of another call.
        """
        if not self._path.exists():
            return 0
        tensors, facts = read_facts(TensorFile(self._path), _KIND, "inspection", _FORM)
        check_same_run(self._path.parent, facts["run"], self._run, ignored="files")
        if self._have_changed(facts["run"].get("files")):
            warnings.warn("images: their files have changed; begun anew", stacklevel=5)
            return 0
        for name, part in self._parts.items():
            own = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}.")
            }
            part.restore(own, facts["parts"][name])
        self._stream.unusable.update(facts["unusable"])
        return int(facts["next"])

    def _have_changed(self, before: Any) -> bool:
        """Whether images are others than when the state was written, as far as can be said."""
        known = before if isinstance(before, dict) else {}
        both = [(known.get(key), now) for key, now in self._run["files"].items()]
        return any(then != now for then, now in both if None not in (then, now))

    def save(self, following: int) -> None:
        """Write the state, of all images before the number ``following``."""
        tensors: dict[str, Tensor] = {}
        said: dict[str, dict[str, Any]] = {}
        for name, part in self._parts.items():
            own, said[name] = part.saved()
            tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        facts = {"run": self._run, "next": following, "parts": said}
        write_facts(self._path, tensors, _KIND, facts | {"unusable": self._stream.unusable})


def resumed(stream: ImageStream, progress: Progress | None) -> Iterator[Batch]:
    """The batches that are left, after each ``SAVED_EVERY`` of which the state is written."""
    first = 0 if progress is None else progress.load()
    for number, batch in enumerate(stream.batches(first), start=1):
        yield batch
        if progress is not None and number % SAVED_EVERY == 0:
            progress.save(int(batch.positions[-1]) + 1)
    if progress is not None:
        progress.save(len(stream))
