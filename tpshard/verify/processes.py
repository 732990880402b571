"""The lock step over several processes, one for each rank; the first runs the reference, too.

Everything that the runs exchange goes through torch.distributed. Before every exchange the processes tell each other
where they are, so that one that failed, or went another way, ends all of them; one that died is noticed by the
connection, or after the time-out.
"""

from __future__ import annotations

import contextlib
import datetime
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from tpshard.errors import StorageError, TpshardError
from tpshard.launch import Launch
from tpshard.verify.lockstep import Lockstep, OutOfStepError, RunError
from tpshard.verify.models import one_line
from tpshard.verify.placement import REFERENCE

T = TypeVar("T")


class LostContactError(StorageError):
    """Another process died or did not come in time."""


class Group:
    """The processes of one launch. Every method must be called by all of them, in the same order."""

    def __init__(self, launch: Launch) -> None:
        self.rank, self.size = launch.rank, launch.size

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by number."""
        values: list[Any] = [None] * self.size
        with self._contact("a step of all processes"):
            dist.all_gather_object(values, value)
        return values

    def everywhere(self, step: Callable[[], T]) -> list[T]:
        """The results of a step that every process takes; an error of one is raised in all."""
        try:
            mine: tuple[T | None, TpshardError | None] = step(), None
        except TpshardError as error:
            mine = None, error
        found = self.gathered(mine)
        for _, raised in found:
            if raised is not None:
                raise raised
        return [value for value, _ in found]  # type: ignore[misc]

    def from_first(self, value: T) -> T:
        """The first process's."""
        values: list[Any] = [value]
        with self._contact("a word from the first process"):
            dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _contact(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL tell of lost peers and of time-outs by it
            lost(self.rank, self.size, what, error)


def lost(rank: int, size: int, what: str, error: BaseException) -> NoReturn:
    hint = "one of them has died, or takes longer than --timeout"
    said = re.sub(r"\[/[^]]*\] ?", "", one_line(error))  # gloo's own file and line
    message = f"process {rank} of {size} waited for {what} in vain: {said[:120]}"
    raise LostContactError(message, hint=hint) from None


@contextlib.contextmanager
def connected(launch: Launch, device: str, timeout: float) -> Iterator[Group]:
    """Meet the other processes: over gloo, or over NCCL where each has a GPU. Raises LostContactError."""
    span = datetime.timedelta(seconds=timeout)
    on_gpu = device == "cuda" and torch.cuda.device_count() > launch.local_rank
    if on_gpu:
        torch.cuda.set_device(launch.local_rank)
    address, port = launch.meeting
    host = f"[{address}]" if ":" in address else address
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=launch.rank,
            world_size=launch.size,
            timeout=span,
        )
    except RuntimeError as error:
        lost(launch.rank, launch.size, f"the others at {address}:{port}", error)
    try:
        yield Group(launch)
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Every rank's tensor on every rank; on the way back each gets the sum of all processes' gradients for its own."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, me: int, size: int) -> Any:
        ctx.me = me
        values = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(values, own.contiguous())
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        summed = torch.stack(grads)
        dist.all_reduce(summed)
        return summed[ctx.me], None, None


class ProcessLockstep(Lockstep):
    """Rank r's run in process r, the reference's in process 0."""

    def __init__(self, group: Group) -> None:
        super().__init__((REFERENCE, 1) if group.rank == 0 else (group.rank + 1,))
        self._group, self._remote = group, False
        self._shared: Any = None

    def ranks(self, me: int, key: str, value: Any) -> list[Any]:
        local = self.here(me, key, value)
        if me == self.runs[0]:
            self._meet(key, local[-1])
            with self._group._contact("an exchange"):
                gathered: Any = _Gather.apply(local[-1], self._group.rank, self._group.size)  # type: ignore[no-untyped-call]
            self._shared = gathered
        return list(self._shared)

    def reference(self, me: int, key: str, value: Any) -> Any:
        local = self.here(me, key, value)
        if me == self.runs[0]:
            self._meet(key, value)
            self._shared = self._spread(local[0])
        return self._shared

    def agree_here(self, me: int, key: str, known: dict[Any, Any]) -> dict[Any, Any]:
        local = self.here(me, key, known)
        if me == self.runs[0]:
            self._meet(key, None)
            self._shared = {item: value for one in local for item, value in one.items()}
            self._shared = self.agree(self._shared)
        return dict(self._shared)

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        try:
            results = super().run(functions)
        except RunError as error:
            if not self._remote:
                self._say(("failed", error.run, error.key, _portable(error.cause)))
            raise
        self._meet("the end", None)
        return results

    def gathered(self, value: Any) -> list[Any]:
        return self._group.gathered(value)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._group._contact("gradients"):
            dist.all_reduce(tensor)
        return tensor

    def agree(self, known: dict[Any, Any]) -> dict[Any, Any]:
        together: dict[Any, Any] = {}
        for one in self._group.gathered(known):
            together |= one
        return together

    def _say(self, word: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return self._group.gathered(word)

    def _meet(self, key: str, value: Any) -> None:
        """Raises what ended another process; OutOfStepError where it is elsewhere."""
        said = self._say(("here", key, _shape(value)))
        for word in said:
            if word[0] == "failed":
                self._remote = True
                raise RunError(word[1], word[2], word[3])
        if len({word[1:] for word in said}) != 1:
            self._remote = True  # everybody sees it
            raise OutOfStepError(f"the ranks are at different layers: {', '.join(sorted({str(w[1]) for w in said}))}")

    def _spread(self, value: Any) -> Any:
        """The first process's tensors; the others give some of the same shapes."""
        with self._group._contact("the reference's values"):
            if isinstance(value, torch.Tensor):
                copy = value.detach().clone(memory_format=torch.contiguous_format)
                dist.broadcast(copy, src=0)
                return copy
            return [self._spread(one) for one in value]


def _shape(value: Any) -> Any:
    """What must be the same everywhere for tensors to be exchanged."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype)
    return tuple(map(_shape, value)) if isinstance(value, list | tuple) else None


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(error))
    return error
