"""Who carries what: a plan's slabs in batches, dealt so that workers stay apart.

Two threads that write to one file wait for each other in the kernel, and digests need a tensor's bytes in order. So a
worker takes whole tensors, small ones several at a time; only when none is left it helps with another's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from tpshard.checkpoint import Stored
from tpshard.digest import Hasher
from tpshard.outputs import Sink
from tpshard.plan import Output, Targets, Transfer
from tpshard.slabs import Slab

MOST_AHEAD = 2  # batches for each worker, where files take their bytes in order only: what comes early is kept


@dataclass(slots=True)
class Tensor:
    """A tensor on its way. ``whole``: the whole's hasher, where it is wanted; ``ranks``: those of the ranks whose own
    is not the whole; ``digested``: how far the whole's digest has come, ``own`` each rank's; ``open``: slabs that are
    not done, and one more until all are dealt; ``shared``: whether several workers carry it."""

    index: int
    stored: Stored
    targets: Targets
    whole: Hasher | None
    ranks: dict[int, Hasher]
    own: dict[int, int]
    digested: int = 0
    open: int = 1
    shared: bool = False


@dataclass(slots=True)
class Part:
    """The output files that are written together, None for those that this run does not write. ``open``: as of a
    tensor, counting batches."""

    outputs: Sequence[Output]
    sinks: list[Sink | None] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    open: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """A slab of a tensor, and where it lies in its batch's buffer."""

    tensor: Tensor
    slab: Slab
    begin: int


@dataclass(slots=True)
class Batch:
    """Steps that are read and written together."""

    part: Part
    steps: list[Step] = field(default_factory=list)
    size: int = 0
    number: int = 0

    def add(self, tensor: Tensor, slab: Slab) -> None:
        self.steps.append(Step(tensor, slab, self.size))
        self.size += slab.size
        tensor.open += 1


class Dealer:
    """Streams of batches, each for one worker. ``apart``: whether the workers may be in several streams at a time;
    not where files take their bytes in order only."""

    def __init__(self, streams: Iterator[Iterator[Batch]], workers: int, apart: bool) -> None:
        self._streams, self._shared = streams, workers > 1 and not apart
        self._lanes: list[Iterator[Batch]] = [iter(())] * (workers if apart else 1)
        self._most_ahead = None if apart else MOST_AHEAD * workers
        self._dealt, self._open = 0, set[int]()

    @property
    def idle(self) -> bool:
        """Whether all that was dealt is done."""
        return not self._open

    @property
    def is_ahead(self) -> bool:
        """Whether the oldest batch has to be done first."""
        return self._most_ahead is not None and self._dealt - min(self._open, default=self._dealt) >= self._most_ahead

    def done(self, batch: Batch) -> None:
        self._open.discard(batch.number)

    def next(self, worker: int) -> Batch | None:
        """The worker's next batch; None where all are dealt."""
        batch = self._next(worker)
        if batch is not None:
            batch.number = self._dealt
            self._open.add(self._dealt)
            self._dealt += 1
        return batch

    def _next(self, worker: int) -> Batch | None:
        own = worker % len(self._lanes)
        while True:
            batch = next(self._lanes[own], None)
            if batch is not None:
                return self._lent(batch) if self._shared else batch
            stream = next(self._streams, None)
            if stream is None:
                break
            self._lanes[own] = stream
        for lane in self._lanes:
            if (batch := next(lane, None)) is not None:
                return self._lent(batch)
        return None

    def _lent(self, batch: Batch) -> Batch:
        for step in batch.steps:
            step.tensor.shared = True
        return batch


class Restricted:
    """Transfers with only those writes that go to some of the ranks; equal ones are made once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, frozenset[int]], tuple[Transfer, Transfer]] = {}

    def to(self, transfer: Transfer, ranks: frozenset[int]) -> Transfer:
        if all(holding.rank in ranks for holding in transfer.writes):
            return transfer
        key = id(transfer), ranks
        if key not in self._known:
            writes = tuple(holding for holding in transfer.writes if holding.rank in ranks)
            self._known[key] = transfer, replace(transfer, writes=writes)  # kept alive, so that its id stays its own
        return self._known[key][1]
