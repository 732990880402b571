"""Whether ranks hold the same numbers, by a few of them: where shapes do not tell a copy from a part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored, WeightFile
from tpshard.engines.readers.reading import Own
from tpshard.header import DTYPE_BITS
from tpshard.layout import Layout
from tpshard.sources import SourceFiles

SAMPLE = 2048  # bytes, at the begin, the middle and the end: two different matrices do not agree in all of them


class Alike(NamedTuple):
    """``same``: all ranks' samples are equal; ``twins``: two ranks whose samples are, where others' differ;
    ``constant``: every rank's sample is one number again and again, which tells nothing."""

    same: bool
    twins: tuple[int, int] | None
    constant: bool


class Samples:
    """Reads samples of own tensors; use as a context."""

    def __init__(self, folder: Path, files: Sequence[WeightFile]) -> None:
        self._files = SourceFiles(Checkpoint(folder, 1, tuple(files), {}, {}, ()))

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def compare(self, ranks: Sequence[Own]) -> Alike:
        """Of tensors of one shape, one on each rank."""
        samples = [self._sample(own) for own in ranks]
        item = max(1, DTYPE_BITS[ranks[0].entry.dtype] // 8)
        constant = all(sample == sample[:item] * (len(sample) // item) for sample in samples)
        first: dict[bytes, int] = {}
        twins = None
        for rank, sample in enumerate(samples):
            other = first.setdefault(sample, rank)
            if other != rank:
                twins = twins or (other, rank)
        return Alike(len(first) == 1, twins if len(first) > 1 else None, constant)

    def _sample(self, own: Own) -> bytes:
        entry, size = own.entry, own.entry.size
        stored = Stored("", entry.dtype, Layout.replicated(entry.shape, 1), (own.place,), 0)
        starts = [0] if size <= 3 * SAMPLE else [0, (size - SAMPLE) // 2 // 16 * 16, size - SAMPLE]
        into = np.empty(min(size, SAMPLE) if len(starts) > 1 else size, np.uint8)
        found = b""
        for start in starts:
            self._files.read(stored, 0, start, into)
            found += into.tobytes()
        return found
