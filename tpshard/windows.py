"""Bytes that lie somewhere, as a file that is read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any


class Window(io.RawIOBase):
    """``size`` bytes; ``fill(offset, room)`` fills as much of the room as it can, and tells how much."""

    def __init__(self, size: int, fill: Callable[[int, memoryview], int]) -> None:
        super().__init__()
        self._size, self._fill, self._at = size, fill, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        count = self._fill(self._at, room) if len(room) else 0
        self._at += count
        return count
