"""Runs in lock step: who gets what at an exchange, and how a run that fails ends the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tpshard.errors import InconclusiveError, StorageError
from tpshard.verify.lockstep import Lockstep, OutOfStepError, RunError, no_fault_of_the_model


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def together(count: int, body: Callable[[Lockstep, int], Any]) -> list[Any]:
    lock = Lockstep(range(count))
    return lock.run([lambda me=me: body(lock, me) for me in lock.runs])  # type: ignore[misc]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_everybody_gets_the_references(count: int) -> None:
    def body(lock: Lockstep, me: int) -> list[Any]:
        return [lock.reference(me, f"step {step}", (me, step)) for step in range(3)]

    assert together(count, body) == [[(0, step) for step in range(3)]] * count


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_any_run_knows_all_know(count: int) -> None:
    def body(lock: Lockstep, me: int) -> dict[Any, Any]:
        mine = {me: True, "same": 7} if me % 2 == 0 else {}
        known = lock.agree_here(me, "known", mine)
        assert set(mine) in ({me, "same"}, set())  # what was handed in is left alone
        return known

    assert together(count, body) == [{**dict.fromkeys(range(0, count, 2), True), "same": 7}] * count


def test_one_process_has_the_total_and_knows_all() -> None:
    lock, value, known = Lockstep(range(3)), torch.arange(3.0), {"a": 1}
    assert torch.equal(lock.total(value), value)
    assert lock.agree(known) == {"a": 1}
    assert list(lock.runs) == [0, 1, 2]


def test_values_of_one_exchange_are_not_those_of_the_next() -> None:
    """A quick run hands in its next value while a slow one still reads."""

    def body(lock: Lockstep, me: int) -> list[list[int]]:
        return [list(lock.here(me, f"{step}", 10 * step + me)) for step in range(50)]

    want = [[10 * step + me for me in range(3)] for step in range(50)]
    assert together(3, body) == [want] * 3


def test_only_one_run_is_awake_at_a_time() -> None:
    awake: list[int] = []
    order: list[int] = []

    def body(lock: Lockstep, me: int) -> None:
        for step in range(20):
            awake.append(me)
            order.append(me)
            torch.zeros(1000).sum()
            assert awake == [me]
            awake.remove(me)
            lock.here(me, f"{step}", None)

    together(3, body)
    assert order == [0, 1, 2] * 20


@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 2])
def test_who_fails_is_told_with_the_last_exchange(who: int, after: int) -> None:
    ended: list[int] = []

    def body(lock: Lockstep, me: int) -> None:
        try:
            for step in range(4):
                if me == who and step == after:
                    raise ValueError("mine")
                lock.here(me, f"step {step}", me)
        finally:
            ended.append(me)

    with pytest.raises(RunError) as caught:
        together(3, body)
    assert (caught.value.run, str(caught.value.cause)) == (who, "mine")
    assert caught.value.key == (f"step {after - 1}" if after else None)
    if after:
        assert sorted(ended) == [0, 1, 2]  # nobody is left waiting


@pytest.mark.parametrize("stops", [0, 1, 2])
def test_a_run_that_ends_early_is_out_of_step(stops: int) -> None:
    def body(lock: Lockstep, me: int) -> None:
        for step in range(1 if me == stops else 3):
            lock.here(me, f"step {step}", me)

    with pytest.raises(RunError) as caught:
        together(3, body)
    assert isinstance(caught.value.cause, OutOfStepError)
    assert "the ranks are at different layers: step 1, the end" in str(caught.value.cause)


def test_a_run_that_leaves_does_not_hang_the_others() -> None:
    def body(lock: Lockstep, me: int) -> None:
        lock.here(me, "first", me)
        if me == 1:
            raise SystemExit(3)
        lock.here(me, "second", me)

    with pytest.raises(RunError) as caught:
        together(3, body)
    assert isinstance(caught.value.cause, SystemExit)


def test_errors_that_say_nothing_about_the_model() -> None:
    of_files, unproven = StorageError("gone"), InconclusiveError("no")
    assert no_fault_of_the_model(of_files) is of_files
    assert no_fault_of_the_model(unproven) is unproven
    for error in (
        MemoryError("none"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ):
        assert isinstance(no_fault_of_the_model(error), MemoryError)
    for other in (RuntimeError("shapes"), ValueError("x"), SystemExit(1), AssertionError()):
        assert no_fault_of_the_model(other) is None
