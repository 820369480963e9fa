"""Processes that share a run wait for each other, and not for one that has ended."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from captum_robust._processes import ranks, together

LIMIT = timedelta(seconds=1)
"""What PyTorch waits for; by default half an hour."""
LONGER = 2


def shares(late: int, end: Callable[[], None]) -> None:
    """What a run does; the rank ``late`` works for longer than PyTorch waits, and ends it."""
    with ranks() as (rank, _):
        if rank == late:
            time.sleep(LONGER)
            end()


def trains(late: int, end: Callable[[], None]) -> None:
    """A training in which the first process evaluates, and one may die."""
    from captum_robust.training import fit
    from tests.training.test_loop import cross_entropy, drawn, plain_net, settings

    def evaluate(_: torch.nn.Module) -> dict[str, float]:
        time.sleep(LONGER)
        if late == 0:
            end()
        return {"error": 1.0}

    def loss(*arguments: Any) -> torch.Tensor:
        if late == int(os.environ["RANK"]):
            end()
        return cross_entropy(*arguments)

    given = settings(epochs=1, evaluate_every=6, device="cpu")
    fit(plain_net(), drawn(), loss if late else cross_entropy, given, evaluate=evaluate)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise LookupError("of one process")


def nothing() -> None:
    pass


def one_process(rank: int, port: int, sender: Any, run: Any, *arguments: Any) -> None:
    """Run it as ``torchrun`` would, with little time to wait, and send how it ended."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    join = dist.init_process_group

    def joined(*args: Any, **options: Any) -> None:
        join(*args, **options)
        dist.distributed_c10d._set_pg_timeout(LIMIT)

    dist.init_process_group = joined
    torch.set_num_threads(1)
    try:
        run(*arguments)
        sender.send("done")
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
        time.sleep(LONGER)  # it lives on with its error, as a notebook does


def ends(run: Any, *arguments: Any) -> list[str]:
    """How each of two processes ends that run it together."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tests.training.test_loop"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    both = [
        context.Process(target=one_process, args=(i, port, pipes[i][1], run, *arguments))
        for i in range(2)
    ]
    for process in both:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        return [_end(receiver) for receiver, _ in pipes]
    finally:
        for process in both:
            process.kill()
            process.join()


def _end(receiver: Any) -> str:
    if not receiver.poll(120):
        return "hangs"
    try:
        return str(receiver.recv())
    except EOFError:
        return "died"


@pytest.mark.parametrize(("run", "late"), [(shares, 0), (shares, 1), (trains, 0)])
def test_one_that_works_for_longer_is_waited_for(run: Any, late: int) -> None:
    assert ends(run, late, nothing) == ["done", "done"]


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize(("run", "end"), [(shares, die), (shares, fail), (trains, die)])
def test_one_that_has_ended_is_not_waited_for(run: Any, late: int, end: Any) -> None:
    how = ends(run, late, end)
    assert how[late] == ("died" if end is die else "LookupError: of one process")
    assert how[1 - late].startswith("ConnectionError: another process of this run has ended")
    assert "the same command goes on" in how[1 - late]


def test_one_process_waits_for_nobody() -> None:
    with together() as wait:
        wait()
