"""An output file being written: bytes go to their places in any order, its digest takes them front to back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

import numpy as np

from tpshard.digest import Hasher
from tpshard.errors import StorageError
from tpshard.frames import Frame
from tpshard.slabs import Rooms
from tpshard.staging import Staging, storage_errors
from tpshard.views import View, blocks

PIECE = 2**18  # of what two hashers take: the second finds it in the core's cache
ZEROS = memoryview(bytes(2**16))
READ_BACK = 2**20  # of a file whose tensors did not come in its order
MOST_AT_ONCE = 512  # pieces in one write; Linux allows 1024


def update(hasher: Hasher, zeros: int, data: memoryview | bytes) -> None:
    """Take so many zeros, then the data."""
    for done in range(0, zeros, len(ZEROS)):
        hasher.update(ZEROS[: zeros - done])
    hasher.update(data)


class OutputFile:
    """``digested``: how far the digest has come, in bytes. What is not written is a hole, and reads as zeros."""

    def __init__(self, staging: Staging, name: str, hasher: Hasher) -> None:
        self._hasher = hasher
        self._file = staging.create(name, buffering=0)
        self._frame, self._in_order = Frame((), (), 0), True
        self.digested = 0

    def begin(self, frame: Frame, in_order: bool) -> None:
        """Write what is known before the tensors. ``in_order``: the digest takes them as they come, else all at the
        end."""
        self._frame, self._in_order = frame, in_order
        if in_order:
            self.digest(0, frame.head, None)
        self.write(frame.fixed)

    def digest(self, zeros: int, data: memoryview | bytes, also: Hasher | None) -> None:
        """Take so many zeros, then the data; ``also``: another hasher that takes the same."""
        hashers = (self._hasher, also) if also else (self._hasher,)
        for hasher in hashers:
            update(hasher, zeros, b"")
        for done in range(0, len(data), PIECE):
            for hasher in hashers:
                hasher.update(data[done : done + PIECE])
        self.digested += zeros + len(data)

    def write_strided(self, place: int, view: View, offset: int, data: memoryview, rooms: Rooms) -> None:
        """Write ``data``, the tensor's own bytes from ``offset``, where a view from ``place`` on has them."""
        for block in blocks(view, offset, len(data)):
            room = rooms.get(2, block.size)
            there = np.ndarray(block.shape, np.uint8, room.data, 0, block.strides)
            there[...] = np.ndarray(block.shape, np.uint8, data, block.own, block.own_strides)
            self._write(place + block.at, [room.data])

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
            os.ftruncate(self._file.fileno(), self._frame.size)
            if not self._in_order:
                self.write(self._frame.seal(self._read))
                for begin in range(0, self._frame.size, READ_BACK):
                    self.digest(0, self._read(begin, min(READ_BACK, self._frame.size - begin)), None)
            self._file.close()
        return self.digested, self._hasher.hexdigest()

    def _read(self, offset: int, count: int) -> bytes:
        """Of the written file."""
        data = os.pread(self._file.fileno(), count, offset)
        if len(data) != count:
            raise StorageError(
                f"{self._file.name}: ends at byte {offset + len(data)}, it was written to {offset + count}"
            )
        return data

    def close(self) -> None:
        """Give the file back after a failure."""
        with contextlib.suppress(OSError):
            self._file.close()
