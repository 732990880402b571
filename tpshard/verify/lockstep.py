"""Several runs of a model in lock step: threads of which one runs at a time, in a fixed order.

Deterministic, without data races on the Python objects that the runs share. At an exchange every run hands in a value
and gets everybody's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tpshard.errors import TpshardError


class RunError(Exception):
    """A run raised; ``run`` is its number, ``key`` the last exchange that it passed, ``cause`` what it raised."""

    def __init__(self, run: int, key: str | None, cause: BaseException) -> None:
        super().__init__(f"run {run} failed: {cause}")
        self.run, self.key, self.cause = run, key, cause


class OutOfStepError(Exception):
    """The runs came to different exchanges: the model took another way in one of them."""


class _Released(BaseException):
    """Ends a run whose fellow has failed."""


def no_fault_of_the_model(error: BaseException) -> BaseException | None:
    """What to raise instead, where an error says nothing about the model: a file or memory has failed. (Of memory,
    torch on a CPU tells in words only.)"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return MemoryError(str(error))
    return error if isinstance(error, TpshardError) else None


class AllDouble(TorchFunctionMode):
    """Keeps a float64 run in float64 where the model's code asks for float32 (norms, softmax, routers)."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        keywords = {key: _doubled(value) for key, value in (kwargs or {}).items()}
        return func(*map(_doubled, args), **keywords)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Lockstep:
    """``runs``: the numbers of the runs in this process, ascending. Use ``run`` once; the functions call ``exchange``
    with their own number."""

    def __init__(self, runs: Sequence[int]) -> None:
        self.runs = tuple(runs)
        count = self._count = len(self.runs)
        self._turn = [threading.Semaphore(0) for _ in range(count)]
        self._values: list[Any] = [None] * count
        self._keys: list[str | None] = [None] * count
        self._ended = [False] * count
        self._failure: RunError | None = None

    def here(self, me: int, key: str, value: Any) -> list[Any]:
        """Hand in a value at the point ``key``; returns the values of all runs of this process once every one has come
        there. Who has the lowest number goes on first, alone until it comes to
        the next exchange."""
        place = self.runs.index(me)
        self._values[place], self._keys[place] = value, key
        # Two turns: in the first everybody hands in, in the second everybody takes all. Without the second, a quick
        # run could hand in its next value before a slow one has read this one.
        self._pass_on(place)
        if len(set(self._keys)) != 1:
            raise OutOfStepError(f"the ranks are at different layers: {', '.join(sorted(map(str, set(self._keys))))}")
        values = list(self._values)
        self._pass_on(place)
        self._values[place] = None  # which may be large
        return values

    def ranks(self, me: int, key: str, value: Any) -> list[Any]:
        """The ranks' tensors, which stay parts of one graph; run 0 hands in anything."""
        return self.here(me, key, value)[1:]

    def reference(self, me: int, key: str, value: Any) -> Any:
        """Hand in a value at the point ``key``; returns that of run 0, which is detached from its graph."""
        return self.here(me, key, value)[0]

    def agree_here(self, me: int, key: str, known: dict[Any, Any]) -> dict[Any, Any]:
        """What any run knows."""
        together: dict[Any, Any] = {}
        for one in self.here(me, key, known):
            together |= one
        return together

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, which must all call this; here there is one."""
        return [value]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; here there is one."""
        return tensor

    def agree(self, known: dict[Any, Any]) -> dict[Any, Any]:
        """What any process knows; here there is one."""
        return known

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """The functions' results. Raises RunError where one raised; the others are then ended."""
        results: list[Any] = [None] * self._count

        def body(me: int) -> None:
            self._turn[me].acquire()
            try:
                if self._failure is None:
                    results[me] = functions[me]()
            except _Released:
                pass
            except RunError as error:  # another process's
                self._failure = self._failure or error
            except BaseException as error:
                self._failure = self._failure or RunError(self.runs[me], self._keys[me], error)
            finally:
                self._ended[me], self._keys[me] = True, "the end"
                for other in range(self._count) if self._failure else [self._next(me)]:
                    self._turn[other].release()

        threads = [threading.Thread(target=body, args=(me,), daemon=True) for me in range(self._count)]
        for thread in threads:
            thread.start()
        self._turn[0].release()
        for thread in threads:
            thread.join()
        if self._failure:
            raise self._failure
        return results

    def _next(self, me: int) -> int:
        """The run whose turn comes after: one that has not ended, itself if it is the last."""
        following = ((me + step) % self._count for step in range(1, self._count + 1))
        return next((run for run in following if not self._ended[run]), me)

    def _pass_on(self, me: int) -> None:
        self._turn[self._next(me)].release()
        self._turn[me].acquire()
        if self._failure is not None:
            raise _Released
