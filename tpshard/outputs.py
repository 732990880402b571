"""An output file being written: bytes go to their places in any order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tpshard.digest import Hasher
from tpshard.errors import StorageError
from tpshard.frames import Frame
from tpshard.slabs import Rooms
from tpshard.staging import Shared, storage_errors
from tpshard.views import View, blocks

READ_BACK = 2**20  # bytes
MOST_BYTES = 2**20  # of one write: larger ones ask the kernel for larger pages than it has at hand
MOST_AT_ONCE = 512  # pieces in one write; Linux allows 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes at their place in a file; ``lead``: so many zeros before them are the file's, too."""

    place: int
    data: memoryview | bytes
    lead: int = 0


class Sink(Protocol):
    """Where an output file goes. Used by several threads."""

    def begin(self, frame: Frame) -> None:
        """Take what is known before the tensors."""

    def write(self, pieces: Sequence[Piece]) -> None:
        """Take pieces in ascending order; what no piece covers is zeros."""

    def write_strided(self, place: int, view: View, offset: int, data: memoryview, rooms: Rooms) -> None:
        """Take ``data``, a tensor's own bytes from ``offset``, where a view from ``place`` on has them."""

    def finish(self) -> tuple[int, str]:
        """Close the complete file; its size, and its digest where that is wanted."""

    def close(self) -> None:
        """Give the file back after a failure."""


class OutputFile:
    """A file in a folder. What is not written is a hole, and reads as zeros. A digest of the whole file is taken at the
    end, from what the page cache still has: several files are on their way at a time, and none of them in order."""

    def __init__(self, staging: Shared, name: str, hasher: Hasher | None) -> None:
        self._hasher = hasher
        self._file = staging.create(name, buffering=0)
        self._frame = Frame((), (), 0)

    def begin(self, frame: Frame) -> None:
        self._frame = frame
        with storage_errors(self._file.name):
            os.ftruncate(self._file.fileno(), frame.size)
        for place, data in frame.fixed:
            self._write(place, [data])

    def write(self, pieces: Sequence[Piece]) -> None:
        begin = end = 0
        together: list[memoryview | bytes] = []
        for piece in pieces:
            if piece.place != end or len(together) == MOST_AT_ONCE:
                self._write(begin, together)
                begin, end, together = piece.place, piece.place, []
            together.append(piece.data)
            end += len(piece.data)
        self._write(begin, together)

    def write_strided(self, place: int, view: View, offset: int, data: memoryview, rooms: Rooms) -> None:
        for block in blocks(view, offset, len(data)):
            room = rooms.get(2, block.size)
            there = np.ndarray(block.shape, np.uint8, room.data, 0, block.strides)
            there[...] = np.ndarray(block.shape, np.uint8, data, block.own, block.own_strides)
            self._write(place + block.at, [room.data])

    def _write(self, place: int, pieces: list[memoryview | bytes]) -> None:
        fd, left = self._file.fileno(), [memoryview(piece) for piece in pieces if len(piece)]
        while left:
            with storage_errors(self._file.name):
                count = os.pwritev(fd, left if len(left) > 1 else [left[0][:MOST_BYTES]], place)
            place += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def finish(self) -> tuple[int, str]:
        for place, data in self._frame.seal(self._read):
            self._write(place, [data])
        if self._hasher is not None:
            for begin in range(0, self._frame.size, READ_BACK):
                self._hasher.update(self._read(begin, min(READ_BACK, self._frame.size - begin)))
        with storage_errors(self._file.name):
            self._file.close()
        return self._frame.size, self._hasher.hexdigest() if self._hasher is not None else ""

    def _read(self, offset: int, count: int) -> bytes:
        """Of the written file."""
        with storage_errors(self._file.name):
            data = os.pread(self._file.fileno(), count, offset)
        if len(data) != count:
            raise StorageError(
                f"{self._file.name}: ends at byte {offset + len(data)}, it was written to {offset + count}"
            )
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
