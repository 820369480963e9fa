"""Processes that load images: the same weights, the same refusals, and none that is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, Subset
from torchvision.utils import save_image

from captum_robust.data import DataError, load_dataset
from captum_robust.training import (
    Augmented,
    CroppedImages,
    LabelledImages,
    TrainingSettings,
    fit,
)
from captum_robust.training.preparation import CheckedLabels
from captum_robust.training.schedule import Schedule
from tests.training.test_loop import Drawing, cross_entropy, same_weights, settings, small_net

LINUX = Path("/proc/self/task").is_dir()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of two classes, with a table of boxes."""
    generator = torch.Generator().manual_seed(0)
    rows = ["file,x0,y0,x1,y1"]
    for i in range(12):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 12, 10 + i % 3, generator=generator), file)
        rows.append(f"{file.relative_to(tmp_path / 'images').as_posix()},1,1,5,6")
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    return tmp_path


def opened(folder: Path) -> Any:
    return load_dataset("folder", folder, labels="sorted")


@pytest.fixture
def spawned() -> Iterator[None]:
    """Processes that are spawned, as on macOS and Windows, with few files open at once."""
    method, limit = multiprocessing.get_start_method(), resource.getrlimit(resource.RLIMIT_NOFILE)
    multiprocessing.set_start_method("spawn", force=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limit[1]))
    yield
    multiprocessing.set_start_method(method, force=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


class OneFile(Dataset[Any]):
    """Images of one value in a file that is open, in which it moves to each."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(range(32)))
        self.file = path.open("rb")

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        self.file.seek(index)
        time.sleep(0.005)
        return torch.tensor([index - ord(self.file.read(1))])


@pytest.mark.skipif(not LINUX, reason="processes are not forked")
def test_each_forked_worker_has_its_own_place_in_a_file_that_is_open(tmp_path: Path) -> None:
    dataset = OneFile(tmp_path / "values")
    batches = Schedule(dataset, settings(workers=2, batch_size=4)).batches(dataset, 0, 0, 1)
    assert all(not batch[0].any() for batch in batches)


def weights(dataset: Dataset[Any], workers: int) -> torch.nn.Module:
    network = small_net()
    fit(network, dataset, cross_entropy, settings(epochs=2, workers=workers))
    return network


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("memory", [2**31, 0])
def test_the_augmentation_is_the_same_for_any_number_of_workers(
    folder: Path, workers: int, memory: int
) -> None:
    whole = Augmented(LabelledImages(opened(folder), 8, memory=memory))
    parts = CroppedImages(opened(folder), 8, memory=memory)
    for dataset in (whole, Subset(parts, range(2, 12))):
        checked = CheckedLabels(dataset, 3)
        assert same_weights(weights(checked, 0), weights(checked, workers))


@pytest.mark.usefixtures("spawned")
def test_spawned_workers_get_more_images_than_files_may_be_open(folder: Path) -> None:
    images = opened(folder)
    images.ids = images.ids * 12  # 144 images, each with a box
    dataset = Augmented(LabelledImages(images, 8))
    assert len(dataset) == 144
    network, alone = small_net(), small_net()
    chosen = settings(epochs=1, batch_size=36)
    fit(alone, dataset, cross_entropy, chosen)
    fit(network, dataset, cross_entropy, TrainingSettings(**{**vars(chosen), "workers": 1}))
    assert same_weights(alone, network)


def test_images_come_out_of_a_pickle_as_they_were(folder: Path) -> None:
    for images in (LabelledImages(opened(folder), 8), CroppedImages(opened(folder), 8)):
        again = pickle.loads(pickle.dumps(images))
        assert len(again) == len(images) == 12
        assert all(torch.equal(a, b) for a, b in zip(again.boxes, images.boxes, strict=True))
        assert again.boxes[0].shape == (1, 4)
        for i in range(12):
            torch.manual_seed(i)
            expected = images[i]
            torch.manual_seed(i)
            assert torch.equal(again[i][0], expected[0])
            assert again[i][1] == expected[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_lost_in_a_training_is_named_in_one_line(
    folder: Path, workers: int
) -> None:
    images = LabelledImages(opened(folder), 8, memory=0)
    (folder / "images" / "b" / "7.png").unlink()
    dataset = _Known(images) if workers else images
    lost = r"^[^\n]*b/7\.png: No such file or directory$"
    with pytest.raises(DataError, match=lost) as error:
        fit(small_net(), dataset, cross_entropy, settings(workers=workers))
    assert not workers or "Traceback" in str(error.value.__cause__)


class _Known(Dataset[Any]):
    """Images that are only lost when the processes that load them ask for them."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset, self.process = dataset, os.getpid()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        is_worker = os.getpid() != self.process
        return self.dataset[index if is_worker else 0]


def train_forever(out: str) -> None:
    """Run by the process that is killed."""
    torch.set_num_threads(1)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.02)
        return cross_entropy(*arguments)

    fit(small_net(), Drawing(), slow, settings(epochs=1000, workers=2), out=out)


def children(process: int) -> list[int]:
    return [*map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not LINUX, reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_training(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.training.test_workers import train_forever\n"
        f"train_forever({str(tmp_path / 'run')!r})\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 200
    while not (log.is_file() and log.read_text().count("\n") >= 11):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = children(process.pid)
    assert len(workers) == 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    said = process.communicate(timeout=100)[1]
    assert process.returncode
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGINT:
        assert said.rstrip().endswith("Interrupted")
        assert "DataLoader worker" not in said
    rows = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert rows == list(range(1, len(rows) + 1))
