"""What threads that work together share: one lock, waiting for one another, and the error that ends all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class StoppedError(Exception):
    """Another thread failed."""


class Turns:
    """Use as a context manager to hold the lock. ``error``: the first of any thread."""

    def __init__(self) -> None:
        self._moved, self._waiting = threading.Condition(), 0
        self.error: BaseException | None = None

    def __enter__(self) -> None:
        self._moved.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._moved.release()

    def fail(self, error: BaseException) -> None:
        with self._moved:
            self.error = self.error or error
            self._moved.notify_all()

    def moved_on(self) -> None:
        """Have those look again who wait; with the lock held."""
        if self._waiting:
            self._moved.notify_all()

    def wait(self) -> None:
        """Until something has moved on; with the lock held. Raises StoppedError."""
        self._waiting += 1
        self._moved.wait()
        self._waiting -= 1
        if self.error:
            raise StoppedError

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises StoppedError."""
        with self._moved:
            while not ready():
                if self.error:
                    raise StoppedError
                self.wait()
