"""What breaks is counted: kills, full disks, races, damaged files, wrong calls, threads.

``pytest tests/reliability`` makes a few tries of each, ``--reliability long`` all that are quoted;
both end with a table: area, tries, survived, lost. A try is known by its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@pytest.fixture
def try_often(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[..., None]:
    """``try_often(area, one, quick=, long=)`` calls ``one(seed)`` so often, and counts.

    A call that raises is lost. One that makes several tries returns their number. The test fails
    after the last try if any was lost, with the first few.
    """
    is_long = request.config.getoption("--reliability") == "long"

    def often(area: str, one: Callable[[int], int | None], *, quick: int, long: int) -> None:
        tries, lost = 0, []
        for seed in range(long if is_long else quick):
            try:
                tries += one(seed) or 1
            except Exception as error:  # a loss is counted, and the next seed is tried
                tries += 1
                lost.append(f"seed {seed}: {type(error).__name__}: {error}"[:1000])
        record_property("reliability", (area, tries, len(lost)))
        assert not lost, "\n".join(lost[:5])

    return often


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder for files that each try writes again, which takes milliseconds on a disk."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        yield Path(folder)
