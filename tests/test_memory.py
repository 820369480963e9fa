"""Memory that a run keeps: the system clears no page anew for each activation."""

import os
import subprocess
import sys

import pytest

_COUNTED = """
import ctypes, resource
from captum_robust._memory import kept_memory

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

usual = faults()
with kept_memory():
    with kept_memory():
        faults()
    inside = faults()
behind = faults()
size = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
print(usual, inside, behind, size)
"""
_PAGES = 10 * 2**26 // 4096


def counted(**environment: str) -> list[int]:
    """Page faults before, inside and behind, and the MiB that are left at the end."""
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
    usual, inside, behind, size = counted()
    assert usual > _PAGES / 2
    assert inside < usual / 20
    assert behind > usual / 2
    assert size < 60, "the last of it is given back"


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_what_the_environment_says_holds():
    usual, inside, _, _ = counted(MALLOC_TRIM_THRESHOLD_="131072")
    assert inside > usual / 2
    kept = counted(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="2147483647")
    assert kept[2] < usual / 20
