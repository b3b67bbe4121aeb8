"""Freed memory is kept: a large array is taken a second time without a page of it being mapped anew."""

import platform
import subprocess
import sys

import pytest

SIZE = 200 * 2**20  # bytes; far above glibc's largest block that is no mapping of its own, 32 MiB
PROGRAM = f"""
import ctypes, resource, sys, threading
from biomass_jax import memory

kept = memory.keep_freed() if sys.argv[1] == "kept" else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
faults = []

def take():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc({SIZE})
    ctypes.memset(block, 1, {SIZE})
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

for _ in range(3):  # threads of their own, as XLA's
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
size = int(open("/proc/self/statm").read().split()[1])
memory.give_back()
left = int(open("/proc/self/statm").read().split()[1])
page = resource.getpagesize()
print(kept, faults[-1] * page, (size - left) * page)
"""


def run(how):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    kept, mapped, given = done.stdout.split()
    return kept, int(mapped), int(given)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_used_again_and_given_back_when_asked():
    kept, mapped, given = run("kept")
    assert kept == "True"
    assert mapped < SIZE / 100
    assert given > SIZE * 0.9
    _, mapped, given = run("as it is")
    assert mapped > SIZE * 0.9
    assert given < SIZE / 10
