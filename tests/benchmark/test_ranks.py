"""Ranks that write a file each: they read as one, and any number of them goes on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_robust.attacks import PGD
from captum_robust.benchmark import Comparison, attack_images, compare, runner
from captum_robust.benchmark.reading import Loaded, SampleReader
from captum_robust.data import Sample
from captum_robust.data.files import is_run
from captum_robust.report.attack_run import AttackRun
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow
from captum_robust.runs.store import RunStore
from tests.reliability.children import children

from .conftest import Drawn, make_classifier

AsRank = Callable[[int, int], None]
_KEYS = {
    "images": "position",
    "results": "method, attack, position",
    "attacked": "attack, position",
    "classes": "number",
}


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> AsRank:
    """``as_rank(rank, world)``: what follows is that process, which waits for no other."""

    def become(rank: int, world: int) -> None:
        @contextmanager
        def ranks() -> Iterator[tuple[int, int]]:
            yield rank, world

        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setattr(runner, "ranks", ranks)

    return become


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the images that were loaded, in their turn."""
    positions: list[int] = []
    read = SampleReader.__call__

    def noted(reader: SampleReader, position: int) -> Loaded:
        positions.append(position)
        return read(reader, position)

    monkeypatch.setattr(SampleReader, "__call__", noted)
    return positions


def work(kind: str, data: Drawn, out: Path, **options: Any) -> None:
    """A run of one kind, in batches of two; methods and attacks draw."""
    model = make_classifier()
    attacks = {"pgd 8/255": PGD(model, epsilon=8 / 255, steps=2, random_start=True)}
    options = {"batch_size": 2, "progress": False, **options}
    if kind == "attack":
        attack_images(model, data, attacks, out, keep_all=True, **options)
    else:
        compare(model, data, ["smooth_grad", "center_box"], attacks, out=out, **options)


def rows_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of a run but for seconds, and for the start that a row is of."""
    run = Comparison(out)
    rows = {t: run.select(f"SELECT * FROM {t} ORDER BY {key}") for t, key in _KEYS.items()}
    run._store.close()
    for row in [row for table in rows.values() for row in table]:
        row.pop("seconds", None)
        row.pop("turn", None)
    return rows


def positions_in(file: Path) -> list[int]:
    with sqlite3.connect(file) as database:
        found = database.execute("SELECT position FROM images ORDER BY 1").fetchall()
    database.close()
    return [position for (position,) in found]


def files_in(out: Path) -> set[str]:
    return {path.name for path in out.glob("rows*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of each kind by one process."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        work(kind, Drawn(12), folder / kind)
    return folder


KINDS = ("compare", "attack")


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_writes_its_own_file_and_they_read_as_the_one_of_one_process(
    kind: str, whole: Path, tmp_path: Path, as_rank: AsRank
) -> None:
    for rank in (1, 2, 0):
        as_rank(rank, 3)
        work(kind, Drawn(12), tmp_path)
    # Of a rollback journal, which needs no memory that machines would have to share.
    assert files_in(tmp_path) == {"rows.sqlite", "rows.1.sqlite", "rows.2.sqlite"}
    assert {(tmp_path / name).read_bytes()[18:20] for name in files_in(tmp_path)} == {b"\1\1"}
    assert positions_in(tmp_path / "rows.sqlite") == [0, 1, 6, 7]
    assert positions_in(tmp_path / "rows.1.sqlite") == [2, 3, 8, 9]
    assert rows_of(tmp_path) == rows_of(whole / kind)
    if kind == "compare":
        table, expected = (Comparison(out).table() for out in (tmp_path, whole / kind))
        same = [name for name in table if "ms" not in name]
        assert table[same].equals(expected[same])
        frames = (Comparison(out).to_dataframe() for out in (tmp_path, whole / kind))
        assert next(frames).drop(columns="seconds").equals(next(frames).drop(columns="seconds"))
    else:
        assert AttackRun(tmp_path).table().equals(AttackRun(whole / kind).table())
        assert {f.name for f in tmp_path.rglob("*.png")} == {
            f.name for f in (whole / kind).rglob("*.png")
        }


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_under_any_number_of_ranks_and_makes_each_row_once(
    kind: str, whole: Path, tmp_path: Path, as_rank: AsRank, loaded: list[int]
) -> None:
    class Stopped(Drawn):
        def __getitem__(self, index: int) -> Sample:
            if index == 4:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        work(kind, Stopped(12), tmp_path)
    loaded.clear()  # of the next image too, which another thread may have read
    with sqlite3.connect(tmp_path / "rows.sqlite") as database:  # as an earlier version left it
        for table in ("images", "results", "attacked"):
            database.execute(f"ALTER TABLE {table} DROP COLUMN turn")
        assert database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    database.close()
    for rank, world in ((0, 2), (2, 3), (0, 1)):
        as_rank(rank, world)
        work(kind, Drawn(12), tmp_path)
    assert positions_in(tmp_path / "rows.2.sqlite") == [10, 11]
    assert sorted(loaded) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert rows_of(tmp_path) == rows_of(whole / kind)
    for rank, world in ((0, 1), (1, 5)):
        as_rank(rank, world)
        work(kind, Drawn(12), tmp_path)
    assert len(loaded) == 8


@pytest.mark.parametrize("lost", ["rows.sqlite", "rows.1.sqlite"])
def test_a_lost_file_costs_only_its_rows(
    lost: str, whole: Path, tmp_path: Path, as_rank: AsRank, loaded: list[int]
) -> None:
    for rank in (0, 1):
        as_rank(rank, 2)
        work("compare", Drawn(12), tmp_path)
    positions = positions_in(tmp_path / lost)
    (tmp_path / lost).unlink()
    assert is_run(os.listdir(tmp_path))
    left = Comparison(tmp_path)
    assert len(left) == 6
    assert {row["position"] for row in left.select("SELECT position FROM images")} == (
        {*range(12)} - {*positions}
    )
    as_rank(0, 1)
    loaded.clear()
    work("compare", Drawn(12), tmp_path)
    assert sorted(loaded) == sorted(positions)
    assert rows_of(tmp_path) == rows_of(whole / "compare")


def test_rows_of_more_files_than_can_be_open_are_read(
    tmp_path: Path, as_rank: AsRank, loaded: list[int]
) -> None:
    def one(rank: int, world: int) -> Comparison:
        as_rank(rank, world)
        options: dict[str, Any] = {"batch_size": 1, "progress": False}
        return compare(make_classifier(), Drawn(13), ["center_box"], out=tmp_path, **options)

    for rank in range(13):
        run = one(rank, 13)
    assert len(files_in(tmp_path)) == 13
    assert run.to_dataframe()["position"].tolist() == list(range(13))
    one(0, 1)
    assert sorted(loaded) == list(range(13))


A, B = "no such file", "truncated"


@pytest.mark.parametrize("many", [0, 10])
@pytest.mark.parametrize(
    ("writes", "left"),
    [
        *([([(0, A), (1, None)], None), ([(1, A), (0, None)], None)]),
        *([([(0, None), (1, A)], None), ([(1, None), (0, A)], None)]),
        *([([(0, A), (1, B)], B), ([(1, A), (0, B)], B)]),
        *([([(0, A), (1, B), (0, A)], A), ([(1, A), (2, B), (1, A), (0, B)], B)]),
    ],
)
def test_a_row_that_another_rank_makes_again_takes_the_place_of_the_old_one_with_an_error(
    writes: Sequence[tuple[int, str | None]],
    left: str | None,
    many: int,
    tmp_path: Path,
    as_rank: AsRank,
) -> None:
    """Good before bad, then the newest, as in one file; also ``many`` files further on."""
    compare(make_classifier(), Drawn(1), ["center_box"], out=tmp_path, progress=False)
    described = RunStore(tmp_path).configuration
    described = {name: value for name, value in described.items() if name != "threads"}
    for rank in range(1, many):
        as_rank(rank, 99)
        RunStore(tmp_path, described).close()
    is_good = False
    for rank, error in writes:
        as_rank(rank + many, 99)
        store, key = RunStore(tmp_path, described), ("pgd", "i.png")
        store.begin()
        store.write_classes(())
        result = ResultRow(1, "m", *key, error=error)
        store.write(
            [result], [ImageRow(1, "i.png", error=error)], [AttackRow(1, *key, error=error)]
        )
        is_good |= error is None
        rows = store.of_positions("results", "", 1, 2, [{"method": "m", "attack": "pgd"}])
        rows += store.of_positions("attacked", "", 1, 2, [{"attack": "pgd"}])
        assert [row["error"] is None for row in rows] == [is_good, is_good]
        store.close()
    run = RunStore(tmp_path)
    for table in ("images", "results", "attacked"):
        rows = list(run.select(f"SELECT error FROM {table} WHERE position = 1"))
        assert [row["error"] for row in rows] == [left], table


def test_a_damaged_file_is_named(tmp_path: Path, as_rank: AsRank) -> None:
    for rank in (0, 1):
        as_rank(rank, 2)
        work("compare", Drawn(4), tmp_path)
    with sqlite3.connect(tmp_path / "rows.1.sqlite") as database:
        database.execute("UPDATE results SET confidence = 7 WHERE position = 3")
    database.close()
    with pytest.raises(ValueError, match=r"rows\.1\.sqlite: damaged, .* \(a value in its results"):
        Comparison(tmp_path)
    (tmp_path / "rows.1.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=r"rows\.1\.sqlite: no rows of a run"):
        Comparison(tmp_path)
    as_rank(0, 1)
    with pytest.raises(ValueError, match=r"rows\.1\.sqlite: no rows of a run"):
        work("compare", Drawn(4), tmp_path)
    (tmp_path / "rows.1.sqlite").write_bytes(b"")  # killed before it had made its tables
    assert len(Comparison(tmp_path)) == 2


def test_what_a_killed_rank_had_half_written_is_taken_back(
    whole: Path, tmp_path: Path, as_rank: AsRank
) -> None:
    for rank in (0, 1):
        as_rank(rank, 2)
        work("compare", Drawn(12), tmp_path / "run")
    file, copied = tmp_path / "run" / "rows.1.sqlite", tmp_path / "killed"
    database = sqlite3.connect(file, isolation_level=None)
    database.execute("PRAGMA cache_size=1")  # so that pages are written before the commit
    database.execute("BEGIN")
    database.execute("DELETE FROM results")
    database.execute("UPDATE images SET picture = zeroblob(100000)")
    assert Path(f"{file}-journal").stat().st_size
    shutil.copytree(tmp_path / "run", copied)
    database.close()
    assert (copied / file.name).read_bytes() != file.read_bytes()
    assert rows_of(copied) == rows_of(whole / "compare")


def test_parts_of_files_are_removed_by_the_first_rank_before_any_other_writes(
    tmp_path: Path, as_rank: AsRank
) -> None:
    part = tmp_path / "pgd-8" / ".0123456789abcdef.part"
    as_rank(1, 2)
    work("attack", Drawn(4), tmp_path)
    part.mkdir(parents=True, exist_ok=True)
    work("attack", Drawn(4), tmp_path)
    assert part.exists()
    as_rank(0, 2)
    work("attack", Drawn(4), tmp_path)
    assert not part.exists()


def share(out: Path, killed: int = 0, calls: int = 0) -> None:
    """A rank's work, in which rank ``killed`` dies in so many calls of its second method."""
    torch.set_num_threads(1)
    left = calls if killed == int(os.environ.get("RANK", "0")) else 0

    def noted(images: Tensor, _: Tensor) -> Tensor:
        with (out.parent / f"{out.name}.log").open("a") as log:
            log.write("".join(f"{image.double().sum().item()!r}\n" for image in images))
        return images.mean(dim=1)

    def deadly(images: Tensor, _: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return images.amax(dim=1)

    methods = {"noted": noted, "deadly": deadly, "smooth_grad": "smooth_grad"}
    options: dict[str, Any] = {"batch_size": 2, "progress": False}
    compare(make_classifier(), Drawn(19), methods, out=out, **options)


def machines(count: int, ranks: int, *task: Any) -> list[int | None]:
    """The exit codes of ``torchrun`` on so many machines, all of them here, with so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    words = [f"--nnodes={count}", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    words += [f"--rdzv-endpoint={place}", "--local-addr=127.0.0.1", "share"]
    agents = [children.Process(target=agent, args=(words, *task)) for _ in range(count)]
    for one in agents:
        one.start()
    try:
        for one in agents:
            one.join(100)
        return [one.exitcode for one in agents]
    finally:
        for one in agents:
            one.kill()


def agent(words: list[str], *task: Any) -> None:
    """What ``torchrun`` does on one machine; its ranks are forked, as to import takes seconds."""
    from torch.distributed.run import config_from_args, elastic_launch, parse_args

    config, _, _ = config_from_args(parse_args(words))
    config.start_method = "fork"
    elastic_launch(config, share)(*task)


def test_two_machines_of_which_one_dies_and_then_three_ranks_give_the_rows_of_one_process(
    tmp_path: Path,
) -> None:
    share(tmp_path / "one")
    out = tmp_path / "many"
    assert all(machines(2, 1, out, 1, 2))
    assert {"rows.sqlite", "rows.1.sqlite"} <= files_in(out)
    assert 2 <= len(positions_in(out / "rows.1.sqlite")) <= 4
    assert all(machines(2, 1, out, 1, 2))  # the same command again
    before = len(Comparison(out))
    assert before < 19
    assert machines(1, 3, out) == [0]
    assert {"rows.sqlite", "rows.1.sqlite", "rows.2.sqlite"} == files_in(out)
    assert rows_of(out) == rows_of(tmp_path / "one")
    explained = [sorted((tmp_path / f"{n}.log").read_text().split()) for n in ("many", "one")]
    assert explained[0] == explained[1]  # none twice, and none missing
    assert len(set(explained[0])) == 19
