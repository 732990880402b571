"""Copies of the same part on several ranks have to be equal, where no manifest vouches for them.

Files of two runs look alike: names, shapes, ranks. What every rank has a copy of (norms, routers, shared heads) tells.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.errors import InputError, printable
from tpshard.header import byte_count
from tpshard.layout import Shard
from tpshard.slabs import Rooms
from tpshard.sources import SourceFiles

CHUNK = 4 * 2**20


def require_equal_copies(checkpoint: Checkpoint) -> None:
    """Raises InputError where two ranks hold the same part of a tensor, and not the same bytes."""
    rooms = Rooms()
    with SourceFiles(checkpoint) as files:
        for tensor in checkpoint.tensors.values():
            for first, other, shard in _copies(tensor):
                size = byte_count(tensor.dtype, shard.shape)
                for begin in range(0, size, CHUNK):
                    one, two = (rooms.get(number, min(CHUNK, size - begin)) for number in (0, 1))
                    files.read(tensor, first, begin, one)
                    files.read(tensor, other, begin, two)
                    if not np.array_equal(one, two):
                        what = f"{printable(tensor.name)}: ranks {first} and {other} hold copies that differ"
                        raise InputError(f"{checkpoint.folder}: {what}", hint="were files of two runs mixed?")


def _copies(tensor: Stored) -> Iterator[tuple[int, int, Shard]]:
    """Each rank that has what an earlier one has, with that one."""
    seen: dict[Shard, int] = {}
    for rank, shard in enumerate(tensor.layout.shards):
        if shard is None:
            continue
        first = seen.setdefault(shard, rank)
        if first != rank:
            yield first, rank, shard
