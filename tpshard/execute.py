"""Carrying out a plan: one pass over the source, every byte read once, every output written in order.

One thread reads slabs of the whole tensors and digests them; writer threads, each owning some of the ranks, cut
the slabs up, digest and write. Each output file is written front to back by one thread, so digests come for free
and the bytes do not depend on the number of workers. Memory: a few slabs, whatever the model.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from tpshard.blocks import Bytes, extract, fill, read_exactly
from tpshard.checkpoint import Checkpoint, Stored
from tpshard.digest import Hasher, hasher_factory
from tpshard.errors import InputError, StorageError, printable
from tpshard.layout import Box, Shard, slabs
from tpshard.manifest import FileRecord
from tpshard.plan import Output, Plan, Transfer
from tpshard.staging import Staging, storage_errors

SLAB = 4 * 2**20  # bytes; larger gains nothing here and leaves the caches
MAX_OPEN = 64

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Written:
    """What a run wrote: a record for each output, and each item's digests (whole; and of each rank's own tensor,
    None where that is the whole or nothing)."""

    files: tuple[FileRecord, ...]
    digests: tuple[str, ...]
    shards: tuple[tuple[str | None, ...], ...]


@dataclass(slots=True)
class _Step:
    """A slab of one item, in memory; ``box`` is None for a tensor without cells; ``last`` ends the item."""

    item: int
    transfer: Transfer
    box: Box | None
    data: Bytes
    last: bool


@dataclass(slots=True)
class _Batch:
    """Steps that share one buffer; it returns to the reader when every writer is done with it."""

    buffer: Bytes
    steps: list[_Step] = field(default_factory=list)
    used: int = 0


class SourceFiles:
    """The source's files, open for reading, a bounded number at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def read(self, stored: Stored, rank: int, offset: int, into: memoryview) -> None:
        """Fill ``into`` from byte ``offset`` of one rank's own tensor."""
        place = stored.places[rank]
        if place is None:
            raise InputError(f"{printable(stored.name)}: rank {rank} holds nothing of it")
        path = self._checkpoint.files[place.file].path
        read_exactly(self._descriptor(place.file), place.offset + offset, into, path)

    def _descriptor(self, index: int) -> int:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        if len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        path = self._checkpoint.files[index].path
        with storage_errors(path):
            self._open[index] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[index]


def execute(
    plan: Plan, staging: Staging, algorithm: str, workers: int, progress: Progress = lambda count: None
) -> Written:
    """Write all outputs of a plan into the staging folder; nothing is fsynced yet.

    Where the source has a manifest, every rebuilt tensor must have the digest recorded there. Raises InputError,
    StorageError.
    """
    crew = _Crew(plan, staging, algorithm, max(1, min(workers, plan.ranks)))
    with crew.running():
        digests = crew.feed(_read(plan, algorithm, crew.buffers, progress))
    plan.source.check_unchanged()
    files = tuple(record for record in crew.records if record is not None)
    return Written(files, tuple(digests), tuple(crew.shard_digests))


def _read(
    plan: Plan, algorithm: str, buffers: queue.SimpleQueue[Bytes], progress: Progress
) -> Iterator[_Batch | tuple[int, str]]:
    """Full batches, and ``(item, digest)`` as each item ends."""
    new_hasher = hasher_factory(algorithm)
    batch = _Batch(buffers.get())
    with SourceFiles(plan.source) as files:
        for index, (item, transfer) in enumerate(plan.transfers()):
            hasher = new_hasher()
            boxes: list[Box | None] = list(slabs(transfer.shape, SLAB)) or [None]
            for number, box in enumerate(boxes, start=1):
                size = box.volume if box else 0
                if batch.used + size > len(batch.buffer):
                    yield batch
                    batch = _Batch(_at_least(buffers.get(), size))
                data = batch.buffer[batch.used : batch.used + size].reshape(box.shape if box else (0,))
                if box:
                    read = lambda rank, at, into: files.read(item.stored, rank, at, into)  # noqa: B023,E731
                    fill(box, transfer.reads, read, data)
                    hasher.update(data.reshape(-1).data)
                batch.steps.append(_Step(index, transfer, box, data, number == len(boxes)))
                batch.used += size
                progress(size)
            _compare(item.stored, hasher.hexdigest())
            yield index, hasher.hexdigest()
    yield batch


def _at_least(buffer: Bytes, size: int) -> Bytes:
    """The buffer, or a larger one: a single row may be longer than a slab."""
    return buffer if len(buffer) >= size else np.empty(size, np.uint8)


def _compare(stored: Stored, digest: str) -> None:
    if stored.record is not None and digest != stored.record.digest:
        raise InputError(
            f"{printable(stored.name)}: the rebuilt bytes have digest {digest}, the manifest recorded "
            f"{stored.record.digest}",
            hint="a shard was changed or damaged; tpshard verify tells which",
        )


class _Crew:
    """The writer threads. Rank r belongs to thread r modulo their number, for the whole run."""

    def __init__(self, plan: Plan, staging: Staging, algorithm: str, threads: int) -> None:
        self.plan, self.staging, self.new_hasher = plan, staging, hasher_factory(algorithm)
        self.buffers: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for _ in range(threads + 2):
            self.buffers.put(np.empty(SLAB, np.uint8))
        self.records: list[FileRecord | None] = [None] * len(plan.outputs)
        self.shard_digests: list[tuple[str | None, ...]] = []
        self._queues: list[queue.SimpleQueue[_Batch | None]] = [queue.SimpleQueue() for _ in range(threads)]
        self._threads = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(threads)]
        self._digests: list[list[str | None]] = [[] for _ in range(plan.ranks)]
        self._unfinished: dict[int, int] = {}
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            for channel in self._queues:
                channel.put(None)
            for thread in self._threads:
                thread.join()
        if self._error:
            raise self._error
        self.shard_digests = list(zip(*self._digests, strict=True))

    def feed(self, read: Iterator[_Batch | tuple[int, str]]) -> list[str]:
        """Hand every batch to every thread; returns the items' digests."""
        digests: list[str] = []
        for event in read:
            if self._error:
                raise self._error
            if isinstance(event, _Batch):
                self._unfinished[id(event)] = len(self._queues)
                for channel in self._queues:
                    channel.put(event)
            else:
                digests.append(event[1])
        return digests

    def note(self, rank: int, digest: str | None) -> None:
        """The digest of a rank's own tensor, in the items' order; None where it is the whole one's, or no tensor."""
        self._digests[rank].append(digest)

    def _work(self, number: int) -> None:
        lanes = [_Lane(self, rank) for rank in range(number, self.plan.ranks, len(self._queues))]
        while (batch := self._queues[number].get()) is not None:
            try:
                if self._error is None:
                    for step in batch.steps:
                        for lane in lanes:
                            lane.take(step)
            except BaseException as error:
                self._error = self._error or error
            with self._lock:
                self._unfinished[id(batch)] -= 1
                if not self._unfinished[id(batch)]:
                    del self._unfinished[id(batch)]
                    self.buffers.put(batch.buffer)
        for lane in lanes:
            lane.close()


class _Lane:
    """One rank's files, written front to back."""

    def __init__(self, crew: _Crew, rank: int) -> None:
        self.crew, self.rank = crew, rank
        numbered = [(n, output) for n, output in enumerate(crew.plan.outputs) if output.rank == rank]
        self.waiting = sorted(numbered, key=lambda pair: pair[1].first)
        self.file: BinaryIO | None = None
        self.file_hash: Hasher = crew.new_hasher()
        self.written = 0
        self.tensor_hash: Hasher | None = None  # of the current tensor, where it is not the whole one
        self.cursor = 0  # bytes of the current tensor written so far

    def take(self, step: _Step) -> None:
        """Write this rank's part of a slab, padding before it included; end the tensor, and the file, where due."""
        output = self.waiting[0][1]
        if self.file is None:
            self._begin(output)
        shard = step.transfer.writes[self.rank]
        if shard is not None:
            if self.tensor_hash is None and shard != Shard.whole(step.transfer.shape):
                self.tensor_hash = self.crew.new_hasher()
            if step.box is not None and (found := extract(shard, step.box, step.data)) is not None:
                self._put_zeros(found[0] - self.cursor)
                self._put(found[1])
            if step.last:
                self._put_zeros(shard.volume - self.cursor)
        if step.last:
            self.crew.note(self.rank, self.tensor_hash.hexdigest() if self.tensor_hash else None)
            self.tensor_hash, self.cursor = None, 0
            if step.item + 1 == output.last:
                self._end_file(*self.waiting.pop(0))

    def close(self) -> None:
        """Give the file back after a failure."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()

    def _begin(self, output: Output) -> None:
        self.file = self.crew.staging.create(output.name)
        self.file_hash, self.written = self.crew.new_hasher(), 0
        self._emit(self.crew.plan.header(output))

    def _put(self, data: memoryview | bytes) -> None:
        if self.tensor_hash is not None:
            self.tensor_hash.update(data)
        self.cursor += len(data)
        self._emit(data)

    def _put_zeros(self, count: int) -> None:
        while count > 0:
            chunk = min(count, SLAB)
            self._put(bytes(chunk))
            count -= chunk

    def _emit(self, data: memoryview | bytes) -> None:
        assert self.file is not None
        self.file_hash.update(data)
        with storage_errors(self.file.name):
            self.file.write(data)
        self.written += len(data)

    def _end_file(self, number: int, output: Output) -> None:
        assert self.file is not None
        if self.written != len(self.crew.plan.header(output)) + self.crew.plan.bytes_of(output):
            raise StorageError(f"{output.name}: {self.written} bytes were written, not what was planned")
        with storage_errors(self.file.name):
            self.file.close()
        self.file = None
        self.crew.records[number] = FileRecord(
            output.name, self.rank, output.part, self.written, self.file_hash.hexdigest()
        )
