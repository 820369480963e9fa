"""Memory that a run keeps: the system clears no page anew for each activation."""

import os
import subprocess
import sys

import pytest

_COUNTED = """
import ctypes, resource
from captum_robust._memory import kept_memory
from captum_robust._progress import counted

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = libc.malloc(2**26)
        ctypes.memset(block, 1, 2**26)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def size():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

list(counted("ab", "turn"))  # which imports
usual = faults()
before = size()
with kept_memory():
    for _ in counted("ab", "turn"):
        faults()
    inside = faults()
for _ in counted("ab", "turn"):
    counting = faults()
behind = faults()
print(usual, inside, counting, behind, size() - before)
"""
_PAGES = 10 * 2**26 // 4096


def faults(**environment: str) -> list[int]:
    """Page faults before, inside, in a loop and behind, and the MiB that stay."""
    whole = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    ran = subprocess.run(
        [sys.executable, "-c", _COUNTED],
        env=whole | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in ran.stdout.split()]


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_inside_no_page_is_cleared_twice_and_behind_it_all_is_as_before():
    usual, inside, counting, behind, kept = faults()
    assert usual > _PAGES / 2
    assert inside < usual / 20
    assert counting < usual / 5, "but for those of the first time"
    assert behind > usual / 2
    assert kept < 10


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_what_the_environment_says_holds():
    usual, inside, *_ = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert inside > usual / 2
    kept = faults(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="2147483647")
    assert kept[3] < usual / 20
