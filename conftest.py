"""What the tests of all rooms share: the real images, for those with the mark ``data``."""

import os
import signal
from pathlib import Path

import pytest

REAL_DATA = Path(__file__).parent / os.environ.get("CAPTUM_ROBUST_DATA", "../shared/data")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often the tests of reliability try to break what they test."""
    parser.addoption("--reliability", choices=("quick", "long"), default="quick")


def pytest_configure() -> None:
    """Share the cores between workers; take the signals that a shell in the background ignores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for commands
    usual = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    for name, handler in usual.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the notebooks first: they take minutes, and no worker shall end alone with them."""
    items.sort(key=lambda item: item.get_closest_marker("notebook") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs real images where there are none, and say where that is."""
    if item.get_closest_marker("data") and not REAL_DATA.is_dir():
        pytest.skip(f"no real images at {REAL_DATA} (set CAPTUM_ROBUST_DATA)")


@pytest.fixture
def real_data() -> Path:
    """The folder of the real images."""
    return REAL_DATA


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of what the tests of reliability tried, and what was lost."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = [
        row for report in reports for name, row in report.user_properties if name == "reliability"
    ]
    if not rows:
        return
    terminalreporter.section("tries")
    terminalreporter.write_line(f"{'area':<44}{'tries':>10}{'survived':>10}{'lost':>6}")
    for area, tries, lost in rows:
        terminalreporter.write_line(f"{area:<44}{tries:>10,}{tries - lost:>10,}{lost:>6}")
