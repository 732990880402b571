"""Keeping a virtual machine's free memory: ``python -m tests.bench.hold BYTES`` holds it until stdin closes.

A host may take back what a guest leaves free and give it again page by page: on such a machine the same copy takes
0.6 or 6 seconds. It takes back large free blocks only. So all memory is touched and let go again, except for one page
in 256, which keeps the free rest in blocks that are too small.
"""

from __future__ import annotations

import mmap
import sys

import numpy as np

PAGE = 4096
STEP = 256 * PAGE


def hold(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = np.frombuffer(memory, np.uint8)[::PAGE]
    pages[:] = 1
    for at in range(0, size - STEP + 1, STEP):
        memory.madvise(mmap.MADV_DONTNEED, at + PAGE, STEP - PAGE)
    return memory


if __name__ == "__main__":
    kept = hold(int(sys.argv[1]) // STEP * STEP)
    print("held", flush=True)
    sys.stdin.read()
