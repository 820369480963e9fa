"""Threads beside the one that runs the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from captum_robust._threads import begin_thread, copied, stacked
from captum_robust.benchmark import reading
from captum_robust.benchmark.beside import Pool, Turns
from captum_robust.transforms import jpeg


def in_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.fixture(params=[2, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads the model has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "_", range(10)
)  # threads that begin at once are seldom in each other's way
def test_a_thread_computes_by_itself_and_others_are_left_as_they_are(threads: int, _: int) -> None:
    with ThreadPoolExecutor(4, initializer=begin_thread) as pool:
        barrier = threading.Barrier(4)

        def counted() -> int:
            barrier.wait()
            return torch.get_num_threads()

        asked = [pool.submit(counted) for _ in range(4)]
        assert [one.result() for one in asked] == [1] * 4
        assert torch.get_num_threads() == threads
        assert in_a_new_thread() == threads


def test_what_measures_beside_the_model_computes_by_itself() -> None:
    with Pool(Turns(torch.device("cpu"))) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1


def test_what_reads_ahead_computes_by_itself() -> None:
    with reading.ahead(torch.get_num_threads() for _ in range(2)) as counts:
        assert list(counts) == [1, 1]


def test_what_codes_images_computes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    coded = jpeg.JPEG._coded

    def noted(self: jpeg.JPEG, image: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return coded(self, image)

    monkeypatch.setattr(jpeg.JPEG, "_coded", noted)
    jpeg.JPEG()(torch.rand(3, 3, 16, 16))
    assert seen == [1, 1, 1]


def test_copies_are_those_of_pytorch() -> None:
    parts = [torch.rand(3, 5, 4), torch.rand(3, 5, 4)]
    batch = stacked(parts)
    assert batch.equal(torch.stack(parts))
    parts[0][0, 0, 0] = 7
    assert batch.amax() < 7
    for x in (batch, batch.contiguous(memory_format=torch.channels_last), batch[:, ::2]):
        copy = copied(x)
        assert copy.equal(x)
        assert copy.stride() == x.clone().stride()
        copy.zero_()
        assert x.amax() > 0
