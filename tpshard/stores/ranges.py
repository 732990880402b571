"""Many ranges of objects at once: near ones in one request, the others beside each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tpshard.stores.path import StorePath

GAP = 2**20  # bytes of others' that are read rather than asking again: what a request costs (docs/stores.md)
MOST_AT_ONCE = 16 * 2**20  # of one request with gaps; bounds memory
ASKING = 32  # requests of the process at the same time, beside one of each worker
_pool: list[ThreadPoolExecutor] = []
_starting = threading.Lock()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A range of a file, and where its bytes go."""

    path: Path
    offset: int
    into: memoryview


def read_ranges(wanted: Sequence[Wanted]) -> None:
    """Fill all; they may come in any order. Raises StorageError."""
    groups = list(_groups(sorted(wanted, key=lambda part: (str(part.path), part.offset))))
    if len(groups) == 1:
        _read(groups[0])
    elif groups:
        list(_threads().map(_read, groups))


def _groups(parts: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Parts that are read together; they come in the order of their places."""
    group: list[Wanted] = []
    for part in parts:
        if not len(part.into):
            continue
        if group:
            first, last = group[0], group[-1]
            gap, span = part.offset - last.offset - len(last.into), part.offset + len(part.into) - first.offset
            if part.path != first.path or gap < 0 or gap > GAP or span > MOST_AT_ONCE:
                yield group
                group = []
        group.append(part)
    if group:
        yield group


def _read(group: Sequence[Wanted]) -> None:
    first, last = group[0], group[-1]
    assert isinstance(first.path, StorePath)
    if len(group) == 1:
        first.path.fill(first.offset, first.into)
        return
    room = memoryview(bytearray(last.offset + len(last.into) - first.offset))
    first.path.fill(first.offset, room)
    for part in group:
        begin = part.offset - first.offset
        part.into[:] = room[begin : begin + len(part.into)]


def _threads() -> ThreadPoolExecutor:
    with _starting:
        if not _pool:
            _pool.append(ThreadPoolExecutor(ASKING, "tpshard-store"))
        return _pool[0]
