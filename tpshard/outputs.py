"""An output file being written: bytes go to their places in any order, its digest takes them front to back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from tpshard.digest import Hasher
from tpshard.staging import Staging, storage_errors

PIECE = 2**18  # of what two hashers take: the second finds it in the core's cache
ZEROS = memoryview(bytes(2**16))
MOST_AT_ONCE = 512  # pieces in one write; Linux allows 1024


class OutputFile:
    """``digested``: how far the digest has come, in bytes. What is not written is a hole, and reads as zeros."""

    def __init__(self, staging: Staging, name: str, hasher: Hasher) -> None:
        self._hasher = hasher
        self._file = staging.create(name, buffering=0)
        self.digested = 0

    def begin(self, header: bytes) -> None:
        self.digest(0, header, None)
        self.write([(0, header)])

    def digest(self, zeros: int, data: memoryview | bytes, also: Hasher | None) -> None:
        """Take so many zeros, then the data; ``also``: another hasher that takes the same."""
        hashers = (self._hasher, also) if also else (self._hasher,)
        for hasher in hashers:
            for done in range(0, zeros, len(ZEROS)):
                hasher.update(ZEROS[: zeros - done])
        for done in range(0, len(data), PIECE):
            for hasher in hashers:
                hasher.update(data[done : done + PIECE])
        self.digested += zeros + len(data)

    def write(self, parts: Iterable[tuple[int, memoryview | bytes]]) -> None:
        """Write each part at its place; those that follow one another together."""
        begin = end = 0
        pieces: list[memoryview | bytes] = []
        for place, data in parts:
            if place != end or len(pieces) == MOST_AT_ONCE:
                self._write(begin, pieces)
                begin, end, pieces = place, place, []
            pieces.append(data)
            end += len(data)
        self._write(begin, pieces)

    def _write(self, place: int, pieces: list[memoryview | bytes]) -> None:
        fd, left = self._file.fileno(), [memoryview(piece) for piece in pieces if len(piece)]
        while left:
            with storage_errors(self._file.name):
                count = os.pwritev(fd, left, place)
            place += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def finish(self) -> tuple[int, str]:
        """Close the complete file; its size and digest."""
        with storage_errors(self._file.name):
            os.ftruncate(self._file.fileno(), self.digested)
            self._file.close()
        return self.digested, self._hasher.hexdigest()

    def close(self) -> None:
        """Give the file back after a failure."""
        with contextlib.suppress(OSError):
            self._file.close()
