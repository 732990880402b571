"""Several copies of one model, run in lock step: as threads of which one runs at a time, meeting at every seam.

So the run is deterministic, models share no state at the same time, and each seam sees all copies' values at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Settle = Callable[[list[Any]], list[Any]]
_END = "the end"
_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS: dict[Any, Any] = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
}


class AllDouble(TorchFunctionMode):
    """Keeps a float64 run in float64 where the model's code says ``.float()`` or ``dtype=torch.float32``.

    Without it a norm in float32 either hides an error in its rounding or shows 1e-7 where there is none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value

        given = {key: wide(value) for key, value in (kwargs or {}).items()}
        return _CASTS.get(func, func)(*map(wide, args), **given)


@contextmanager
def double_precision() -> Iterator[None]:
    """How each copy runs: modes for functions and gradients belong to a thread, so each thread enters them itself."""
    with torch.no_grad(), AllDouble():
        yield


@contextmanager
def double_by_default() -> Iterator[None]:
    """New tensors without a dtype are float64; for all threads, so entered around them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Diverged(Exception):  # noqa: N818 - not an error of the program: the copies took different ways
    """The copies of the model are at different seams, or brought values of different shapes."""


class Stopped(Exception):  # noqa: N818 - carries another's error
    """A copy failed. ``who``: its number, None for the seam itself; ``after``: the last seam that all reached."""

    def __init__(self, who: int | None, after: str | None, error: BaseException) -> None:
        self.who, self.after, self.error = who, after, error
        super().__init__(f"copy {who} failed after {after}: {error}")


class _Released(BaseException):
    """Another copy failed: this one, which waits for it, has to end. Not an Exception, so that no model catches it."""


class Lockstep:
    """``count`` threads, each waiting for its turn; turns go round in order.

    A copy calls ``exchange`` at each seam. The last to arrive settles the seam while all others wait, so values need
    no copies: nobody changes them meanwhile. Every copy ends in a seam of its own, so that none can be left waiting
    for one that has finished; and whoever fails wakes all.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._turns = [threading.Semaphore(0) for _ in range(count)]
        self._arrived: list[tuple[str, Any]] = [("", None)] * count
        self._results: list[Any] = [None] * count
        self._failure: Stopped | None = None
        self._last_seam: str | None = None

    def run(self, copies: Sequence[Callable[[], Any]], finish: Settle) -> None:
        """Run all; ``finish`` gets what they return. Raises Stopped if one fails, once all threads have ended."""
        threads = [
            threading.Thread(target=self._body, args=(me, work, finish), daemon=True) for me, work in enumerate(copies)
        ]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interrupt: the threads must not outlive it
            self._fail(None, error)
            for thread in threads:
                thread.join()
            raise
        if self._failure:
            raise self._failure from self._failure.error

    def exchange(self, me: int, seam: str, value: Any, settle: Settle) -> Any:
        """Bring a value to a seam; returns the caller's of the values that ``settle`` makes of all of them."""
        if self._failure:
            raise _Released
        self._arrived[me] = (seam, value)
        if me == self._count - 1:
            self._meet(settle)
        self._hand_on(me)
        self._turns[me].acquire()
        if self._failure:
            raise _Released
        return self._results[me]

    def _meet(self, settle: Settle) -> None:
        seams = [seam for seam, _ in self._arrived]
        try:
            if len(set(seams)) > 1:
                other = next(who for who, seam in enumerate(seams) if seam != seams[0])
                raise Diverged(f"rank {other - 1} is at {seams[other]}, the reference at {seams[0]}")
            self._results = settle([value for _, value in self._arrived])
        except BaseException as error:
            self._fail(None, error)
            raise _Released from None
        self._last_seam = seams[0]

    def _body(self, me: int, work: Callable[[], Any], finish: Settle) -> None:
        self._turns[me].acquire()
        try:
            if not self._failure:
                self.exchange(me, _END, work(), finish)
        except _Released:
            pass
        except BaseException as error:
            self._fail(me, error)
        self._hand_on(me)

    def _hand_on(self, me: int) -> None:
        self._turns[(me + 1) % self._count].release()

    def _fail(self, who: int | None, error: BaseException) -> None:
        self._failure = self._failure or Stopped(who, self._last_seam, error)
        for turn in self._turns:
            turn.release()
