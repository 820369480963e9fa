"""Trainings that are killed, damaged, started twice, or have no room for their files.

Whatever happens, a run that goes on ends as an undisturbed one, bit by bit; or it is refused.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from captum_robust.training import loop
from tests.reliability import trainings
from tests.reliability.children import children
from tests.reliability.trainings import COMMANDS, LAST, TRAININGS, Wound

TryOften = Callable[..., None]
FILES = ("checkpoint.safetensors", "best.safetensors", "log.jsonl")
DAMAGES = [
    *itertools.product(FILES, ("deleted", "other run", "cut", "byte", "byte", "byte")),
    *itertools.product(["log.jsonl"], ("reordered", "doubled", "doubled", "NaN", "NaN")),
    *itertools.product(["checkpoint.safetensors"], ("step 999999", "step -5")),
    *itertools.product(["run.json"], ("deleted", "other run", "cut", "byte", "byte", "byte")),
]
"""Files of a run, and what may have happened to each."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Whole:
    """Undisturbed runs, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        drawing = children.Process(target=trainings.photographs, args=(folder / "photographs",))
        drawing.start()  # in a child: the server of children is there before the first run
        drawing.join()

    def new(self, name: str, label: object) -> Path:
        """The folder of another run, with the images of the commands beside it."""
        parent = self.folder / f"{name.replace(' ', '-')}-{label}"
        parent.mkdir()
        (parent / "photographs").symlink_to(self.folder / "photographs")
        return parent / "run"

    def of(self, name: str) -> Path:
        """The folder of the undisturbed run of this name."""
        if name not in self.seconds:
            out = self.new(name, "whole")
            start = time.monotonic()
            end(name, out)
            self.seconds[name] = time.monotonic() - start
        return self.folder / f"{name.replace(' ', '-')}-whole" / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the children, for the same sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def begin(
    name: str, out: Path, wound: Wound | None = None, start: float = 0.0
) -> ForkServerProcess:
    """Let a child begin the run, or go on with it."""
    child = children.Process(target=trainings.run, args=(name, out, wound, start))
    child.start()
    return child


def said(child: ForkServerProcess, out: Path) -> str:
    """The last line that the child said, when it has ended."""
    child.join()
    text = (out.parent / f"said-{child.pid}.txt").read_text()
    return text.strip().rpartition("\n")[2]


def end(name: str, out: Path) -> None:
    """Let the run go on to its end."""
    child = begin(name, out)
    words = said(child, out)
    assert child.exitcode == 0, words


def content(path: Path) -> object:
    """What has to be the same in two runs: all but the run's own id and what follows from it."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k not in ("run", "crc32")}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return metadata, {n: (t.dtype, t.shape, t.numpy().tobytes()) for n, t in tensors.items()}


def results(out: Path) -> dict[str, Path]:
    """What a run is judged by: all that is in its folder, and its last weights."""
    files = {str(f.relative_to(out)): f for f in out.rglob("*")}
    files[LAST] = out.parent / LAST
    return {name: file for name, file in files.items() if file.name != "run.json"}


def check_same(out: Path, expected: Path, trouble: str = "") -> None:
    """Hold a run to the undisturbed one: the same files, the same weights, the same log."""
    own, theirs = results(out), results(expected)
    assert own.keys() == theirs.keys(), f"{trouble}{sorted(own)}, expected {sorted(theirs)}"
    other = [n for n, f in theirs.items() if f.is_file() and content(own[n]) != content(f)]
    assert not other, f"{trouble}{', '.join(other)} differ from those of an undisturbed run"


def kill_at_random(name: str, whole: Whole, seed: int) -> int:
    """Kill a run up to three times, each at a moment of a whole one; it ends as that; the kills."""
    expected, drawn = whole.of(name), random.Random(seed)
    out, kills = whole.new(name, f"killed-{seed}"), 0
    for _ in range(drawn.randint(1, 3)):
        child = begin(name, out)
        child.join(drawn.uniform(0, whole.seconds[name]))
        if child.exitcode is not None:
            break
        os.kill(child.pid or 0, drawn.choice(SIGNALS))
        child.join()
        kills += 1
    end(name, out)
    check_same(out, expected)
    shutil.rmtree(out.parent)
    return kills


def test_a_killed_training_ends_as_an_undisturbed_one(whole: Whole, try_often: TryOften) -> None:
    names = list(TRAININGS)

    def one(seed: int) -> int:
        return kill_at_random(names[seed % len(names)], whole, seed)

    try_often("trainings killed at any moment", one, quick=1, long=77)


def test_a_killed_command_ends_as_an_undisturbed_one(whole: Whole, try_often: TryOften) -> None:
    names = list(COMMANDS)

    def one(seed: int) -> int:
        return kill_at_random(names[seed % len(names)], whole, seed)

    try_often("train commands killed at any moment", one, quick=1, long=18)


def wounded(whole: Whole, seed: int, *, kills: bool) -> tuple[Path, int | None, str]:
    """A run with a wound in a write of one of its files: its folder, exit code, last words."""
    drawn = random.Random(seed)
    file = FILES[seed % 3]
    number = drawn.randint(1, 3) + (file == "log.jsonl")  # that one begins with nothing in it
    out = whole.new("loop", f"{'torn' if kills else 'full'}-{seed}")
    child = begin("loop", out, Wound(file, number, drawn.random(), kills))
    words = said(child, out)
    return out, child.exitcode, words


def test_a_kill_in_the_midst_of_a_write_tears_nothing(whole: Whole, try_often: TryOften) -> None:
    expected = whole.of("loop")

    def one(seed: int) -> None:
        out, code, words = wounded(whole, seed, kills=True)
        assert code == -signal.SIGXFSZ, words
        end("loop", out)
        check_same(out, expected)

    try_often("trainings killed in a write", one, quick=1, long=45)


def test_a_full_disk_is_named_and_harms_nothing(whole: Whole, try_often: TryOften) -> None:
    """A limit of the file's size stands in for it, which also fails in the midst of a write."""
    expected = whole.of("loop")

    def one(seed: int) -> None:
        out, code, words = wounded(whole, seed, kills=False)
        assert code == 1
        assert f"{FILES[seed % 3]}: could not be written (" in words, words
        assert not list(out.glob(".*.part"))
        end("loop", out)
        check_same(out, expected)

    try_often("no room in a write of a training", one, quick=1, long=15)


def test_of_two_trainings_in_a_folder_one_is_refused(whole: Whole, try_often: TryOften) -> None:
    expected = whole.of("loop")

    def one(seed: int) -> None:
        out = whole.new("loop", f"raced-{seed}")
        start = time.monotonic() + 0.3
        racers = [begin("loop", out, start=start) for _ in range(2)]
        ends = [(said(racer, out), racer.exitcode) for racer in racers]
        words = {code: text for text, code in ends}
        assert words.keys() == {0, 1}, words
        assert re.search("ValueError: .* is used by another run now", words[1]), words[1]
        check_same(out, expected)

    try_often("two trainings in one folder", one, quick=1, long=15)


class Stop(Exception):
    """A run ends before a step."""


class Steps:
    """Counts the steps that are made in this process, and ends a run before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.most = 0, 0
        one_step = loop._Run._one_step

        def counted(*arguments: Any) -> None:
            if self.made == self.most:
                raise Stop
            self.made += 1
            one_step(*arguments)

        monkeypatch.setattr(loop._Run, "_one_step", counted)

    def train(self, out: Path, most: int) -> None:
        """Make so many steps at most."""
        self.made, self.most = 0, most
        trainings.train("loop", out)


@pytest.mark.usefixtures("one_thread")
def test_a_damaged_folder_is_refused_or_does_no_harm(
    whole: Whole, try_often: TryOften, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, steps = whole.of("loop"), Steps(monkeypatch)
    base, other = (whole.new("loop", label) for label in ("base", "other"))
    for out in (base, other):
        with pytest.raises(Stop):
            steps.train(out, 17)  # a checkpoint after 10, measurements after 5, 10 and 15

    def refusal(out: Path) -> str | None:
        try:
            steps.train(out, 24)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def one(seed: int) -> None:
        file, how = DAMAGES[seed % len(DAMAGES)]
        out = whole.new("loop", f"damaged-{seed}")
        shutil.copytree(base, out)
        trainings.damage(out / file, how, random.Random(seed), other / file)
        before = {f.name: f.read_bytes() for f in out.iterdir()}
        error = refusal(out)
        if error is None:
            check_same(out, expected, f"{file}, {how}: ")
            return
        assert file in error or "holds another run (" in error, error
        assert steps.made == 0, f"{file}, {how}: found after {steps.made} steps"
        assert {f.name: f.read_bytes() for f in out.iterdir()} == before, f"{file}, {how}"

    try_often("damaged folders of trainings", one, quick=len(DAMAGES), long=10 * len(DAMAGES))
