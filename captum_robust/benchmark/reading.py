"""Images of a run on their way from the files: read in worker processes or a thread, ahead."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import pickle
import random
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from operator import index as as_index
from queue import Full, Queue
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from captum_robust._checks import check, printable
from captum_robust._contexts import seeded, seeded_elsewhere
from captum_robust._processes import begin_worker
from captum_robust._threads import begin_thread
from captum_robust.data import DataError, LocalizationDataset, Sample, fitted
from captum_robust.data.given import SampleSource
from captum_robust.data.images import without_pillow_notes
from captum_robust.data.renumbered import Renumbered
from captum_robust.draw import as_rgb
from captum_robust.runs.machine import MachineError, is_of_files, is_of_machine, is_out_of_memory

_THREADS = 2
"""That read in the process of the model; Pillow decodes without the interpreter's lock."""
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Loaded:
    """One position of a batch: a sample that fits the model, or why there is none."""

    position: int
    image: str
    sample: Sample | None
    error: str | None = None
    is_away: bool = False
    """The file itself could not be read, whatever is in it."""
    picture: bytes | None = None
    """A JPEG file, where one was asked for."""


@dataclass(frozen=True)
class SampleReader:
    """Reads the samples of a run at the size of its model; holds no model, so it can be sent.

    Args:
        dataset: the samples.
        size: (H, W) that the model takes.
        classes: how many the model scores.
        others: how many classes the labels count, where these are others than the model's; else 0.
        fit, eight_bit, seed, pictured: as of
            :class:`captum_robust.benchmark.batches.BatchReader`.
    """

    dataset: SampleSource
    size: tuple[int, int]
    classes: int
    others: int
    fit: str
    eight_bit: bool
    seed: int
    pictured: int = 0

    def __call__(self, position: int) -> Loaded:
        """The sample at a position, or what is wrong with it.

        Raises:
            Exception: the errors that :func:`is_of_machine` knows.
        """
        ids = getattr(self.dataset, "ids", None)
        image = str(position) if ids is None else str(ids[position])
        try:
            sample = self.dataset[position]
            image = image if ids is not None else sample.id
            sample = self._fitted(sample)
            picture = as_jpeg(sample.image) if position < self.pictured else None
        except Exception as error:  # whatever is wrong with one image, the run goes on
            if is_of_machine(error):
                raise
            return Loaded(position, image, None, one_line(error), is_of_files(error))
        return Loaded(position, image, sample, picture=picture)

    def drawn(self, position: int) -> tuple[Loaded, bool]:
        """The same with the global generators seeded by the position; and whether it drew."""
        seed = zlib.crc32(f"{self.seed} {position}".encode())
        with seeded(seed, None), seeded_elsewhere(seed):
            before = _states()
            loaded = self(position)
            return loaded, before != _states()

    def _fitted(self, sample: Sample) -> Sample:
        """The sample at the model's size; ``DataError`` for what would spoil its batch."""
        image, mask, label = sample.image, sample.mask, sample.label
        in_range = image.dtype == torch.float32 and image.amin() >= 0 and image.amax() <= 1
        check(in_range, f"{sample.id}: the image is not float32 in [0, 1]", DataError)
        kind = torch.bool if mask is None else mask.dtype
        check(kind == torch.bool, f"{sample.id}: the mask is {kind}, not Boolean", DataError)
        if label is not None:
            label, count = as_index(label), self.classes
            known = f"the model has {count} classes"
            check(0 <= label < count, f"{sample.id}: class index {label}, but {known}", DataError)
            others = f"class {label} of the {self.others}, but {known}; give both the same names"
            check(not self.others, f"{sample.id}: {others} (class_names)", DataError)
        sample = fitted(replace(sample, label=label), self.size, self.fit)
        return replace(sample, image=to_levels(sample.image)) if self.eight_bit else sample


def _read_together(
    read: SampleReader, positions: Iterable[int], turn: Callable[[], AbstractContextManager[Any]]
) -> list[Loaded]:
    """The samples of some positions, each inside of a ``turn()``.

    Two threads read data sets of this package. One of a user may hold an open file, in which they
    would share a place.
    """

    def one(position: int) -> Loaded:
        with turn():
            return read(position)

    threads = _THREADS if _takes_threads(read.dataset) else 1
    with ThreadPoolExecutor(threads, initializer=begin_thread) as pool:
        return list(pool.map(one, positions))


def _takes_threads(dataset: Any) -> bool:
    """Whether several threads may read a data set at once."""
    if type(dataset) is ConcatDataset:
        return all(map(_takes_threads, dataset.datasets))
    if type(dataset) is Subset:
        return _takes_threads(dataset.dataset)
    if type(dataset) is Renumbered:
        return _takes_threads(dataset.samples)
    return isinstance(dataset, LocalizationDataset)


@contextmanager
def read_ahead(
    read: SampleReader,
    batches: Sequence[range],
    workers: int,
    turn: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[Iterator[list[Loaded]]]:
    """The samples of each batch in turn; while one is used, the next is read.

    Without workers threads of this process read it, two where they may. A data set that draws
    from the global generators is read in turn then, so that it draws nothing from under a
    method; what it draws depends on seed and position only, as in a worker.

    Args:
        read: of one sample.
        batches: the positions of each.
        workers: processes that read; 0: none.
        turn: what a thread of this process is inside of while it reads an image.

    Raises:
        ValueError: the data set can't be sent to a process, or uses a GPU in it.
        MachineError: a worker was killed.
    """
    if workers:
        loader = _started(read, batches, workers)
        with ahead(_received(loader)) as items, _refused_losses():
            yield items
        return
    with without_pillow_notes(), closing(_read_here(read, batches, turn)) as items:
        yield items


def _read_here(
    read: SampleReader, batches: Sequence[range], turn: Callable[[], AbstractContextManager[Any]]
) -> Generator[list[Loaded], None, None]:
    """In turn until an image is read, which shows whether the data set draws; then ahead."""
    draws = False
    for number, batch in enumerate(batches, 1):
        read_now = [read.drawn(position) for position in batch]
        draws |= any(drew for _, drew in read_now)
        is_known = any(item.sample is not None for item, _ in read_now)
        items = [[item for item, _ in read_now]]
        del read_now  # a batch that was given is not held
        if is_known and not draws:
            with ahead(_read_together(read, rest, turn) for rest in batches[number:]) as coming:
                yield items.pop()
                yield from coming
            return
        yield items.pop()


@contextmanager
def ahead(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """The items, of which a thread makes the next one, and one more, while one is used.

    An error of theirs is raised at its place. The thread has ended when this is left.
    """
    ready: Queue[tuple[bool, Any]] = Queue(1)
    left = threading.Event()

    def put(is_item: bool, value: Any) -> None:
        while not left.is_set():
            try:
                ready.put((is_item, value), timeout=0.1)
                return
            except Full:
                continue

    def work() -> None:
        begin_thread()
        try:
            for item in items:
                put(True, item)
                if left.is_set():
                    return
            put(False, None)
        except BaseException as error:  # for the thread that waits for the item
            put(False, error)

    def given() -> Iterator[Item]:
        while True:
            is_item, value = ready.get()
            if not is_item:
                if value is None:
                    return
                raise value
            yield value
            del value

    thread = threading.Thread(target=work, name="captum-robust-reading", daemon=True)
    thread.start()
    try:
        yield given()
    finally:
        left.set()
        thread.join()


# -- Worker processes -----------------------------------------------------------------------------


class _Sent(Dataset["Loaded | Exception"]):
    """The samples of a run, as a worker reads them: an error of the machine is an item too."""

    def __init__(self, read: SampleReader) -> None:
        self._read = read

    def __getitem__(self, position: int) -> Loaded | Exception:
        try:
            with without_pillow_notes():
                loaded, _ = self._read.drawn(position)
        except Exception as error:
            return _sendable(error)
        is_lost = loaded.error is not None and "re-initialize CUDA in forked" in loaded.error
        remedy = "workers: the data set uses the GPU, which a worker can't; give workers=0"
        return ValueError(remedy) if is_lost else loaded


def _started(read: SampleReader, batches: Sequence[range], workers: int) -> Iterator[bytes]:
    """The packed batches of a loader whose processes run."""
    is_child = multiprocessing.current_process().daemon
    check(not is_child, "workers: a daemonic process can have none; give workers=0")
    loader: DataLoader[Any] = DataLoader(
        _Sent(read),
        batch_sampler=[list(batch) for batch in batches],
        num_workers=workers,
        collate_fn=_packed,
        worker_init_fn=_begin,
        generator=torch.Generator().manual_seed(read.seed % 2**63),
    )
    try:
        return iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        how = "define its classes and functions at the top of a module, or give workers=0"
        kind = type(getattr(read.dataset, "dataset", read.dataset)).__name__
        message = f"workers: the data set {kind} can't be sent to a process ({error}); {how}"
        raise ValueError(printable(message)) from None


def _received(loader: Iterator[bytes]) -> Iterator[list[Loaded]]:
    for packed in loader:
        yield _unpacked(packed)


@contextmanager
def _refused_losses() -> Iterator[None]:
    """Give the end of a worker its name."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MachineError(
            "the run stopped: a worker that reads images was killed, as where memory runs out; the "
            f"rows are kept. It needs fewer workers ({printable(str(error)).splitlines()[0]})"
        ) from error


def _begin(worker: int) -> None:
    """Let a worker end when the process that it works for is gone, however that ended."""
    begin_worker(worker)
    parent, number = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        while parent is not None and parent.is_alive() and os.getppid() == number:
            wait([parent.sentinel], timeout=1)
        os._exit(1)  # what it has to send, nobody takes

    threading.Thread(target=watch, daemon=True).start()


def _packed(items: Sequence[Loaded | Exception]) -> bytes:
    """The items as bytes: shared memory for the tensors may be small, and files may be few."""
    return pickle.dumps([_plain(item) for item in items], protocol=5)


def _plain(item: Loaded | Exception) -> Any:
    if isinstance(item, Exception):
        return item
    facts = None
    if item.sample is not None:
        facts = {
            name: value.numpy() if isinstance(value, Tensor) else value
            for name, value in vars(item.sample).items()
        }
    return (item.position, item.image, facts, item.error, item.is_away, item.picture)


def _unpacked(packed: bytes) -> list[Loaded]:
    """The items of :func:`_packed`; raises the first of the errors."""
    loaded = []
    for item in pickle.loads(packed):
        if isinstance(item, Exception):
            raise item
        position, image, facts, *rest = item
        sample = None
        if facts is not None:
            tensors = {k: torch.from_numpy(v) for k, v in facts.items() if type(v) is np.ndarray}
            sample = Sample(**(facts | tensors))
        loaded.append(Loaded(position, image, sample, *rest))
    return loaded


def _sendable(error: Exception) -> Exception:
    """An error of the machine as one of Python's own, without what it was raised for."""
    if is_out_of_memory(error):
        return MemoryError(str(error) or type(error).__name__)
    one: BaseException | None = error
    while one is not None and getattr(one, "errno", None) is None:
        one = one.__cause__ or one.__context__
    return OSError(getattr(one, "errno", errno.ENOSPC), getattr(one, "strerror", str(error)))


def _states() -> tuple[bytes, Any, bytes]:
    """Where the global generators of PyTorch, Python and NumPy are."""
    legacy = pickle.dumps(np.random.get_state())  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), legacy


def as_jpeg(image: Tensor) -> bytes:
    """An image 3×H×W, or 1×H×W, in [0, 1] as a JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(as_rgb(image)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def to_levels(images: Tensor) -> Tensor:
    """Pixels in [0, 1] rounded to the 256 levels of an 8-bit image.

    >>> (to_levels(torch.tensor([0.3, 0.501])) * 255).tolist()
    [76.0, 128.0]
    """
    return images.mul(255).round().div(255)


def one_line(error: Exception) -> str:
    """What an image's row says of an error."""
    text = printable(str(error))
    return text if isinstance(error, DataError) else f"{type(error).__name__}: {text}"[:500]
