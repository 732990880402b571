"""Carrying out a plan: one pass over the source, every byte read once, every digest on the way.

Workers take batches of slabs in turn. Each reads its batch into its own buffer, cuts out every rank's part and writes
it to its place, so that a byte stays in one core's cache from read to write. Digests need the bytes in order: there a
worker waits for the one before it. So the bytes written do not depend on the number of workers, nor memory on the
model: it is a buffer for each worker, and a second one for what has to be gathered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tpshard.checkpoint import Stored
from tpshard.digest import Hasher, hasher_factory
from tpshard.errors import InputError, printable
from tpshard.manifest import FileRecord
from tpshard.outputs import OutputFile, update
from tpshard.plan import Item, Output, Plan, Targets, Transfer
from tpshard.slabs import Bytes, Contact, KnownSlabs, Rooms, Slab
from tpshard.sources import SourceFiles
from tpshard.staging import Staging

SLAB = 4 * 2**20  # bytes: measured against 0.5 to 8 MiB; smaller costs more calls, larger more cache

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Written:
    """What a run wrote: a record for each output, and each item's digests (whole; and of each rank's own tensor,
    None where that is the whole or nothing)."""

    files: tuple[FileRecord, ...]
    digests: tuple[str, ...]
    shards: tuple[tuple[str | None, ...], ...]


@dataclass(slots=True)
class _Tensor:
    """A tensor on its way. ``ranks``: hashers of those whose own is not the whole; ``digested``: how far the whole's
    digest has come, ``own`` each rank's; ``open``: slabs that are not done, and one more until all are dealt."""

    index: int
    stored: Stored
    targets: Targets
    whole: Hasher
    ranks: dict[int, Hasher]
    own: dict[int, int]
    digested: int = 0
    open: int = 1


@dataclass(slots=True)
class _Part:
    """The output files of all ranks that are written together; ``open``: as of a tensor, counting batches."""

    outputs: Sequence[Output]
    files: list[OutputFile]
    open: int = 1


@dataclass(frozen=True, slots=True)
class _Step:
    """A slab of a tensor, and where it lies in its batch's buffer."""

    tensor: _Tensor
    slab: Slab
    begin: int


@dataclass(slots=True)
class _Batch:
    part: _Part
    steps: list[_Step] = field(default_factory=list)
    size: int = 0


class _StoppedError(Exception):
    """Another worker failed."""


def execute(
    plan: Plan, staging: Staging, algorithm: str, workers: int, progress: Progress = lambda count: None
) -> Written:
    """Write all outputs of a plan into the staging folder; nothing is fsynced yet.

    Where the source has a manifest, every rebuilt tensor must have the digest recorded there. Raises InputError,
    StorageError.
    """
    run = _Run(plan, staging, algorithm, progress)
    threads = [threading.Thread(target=run.work, daemon=True) for _ in range(workers - 1)]
    for thread in threads:
        thread.start()
    try:
        run.work()
        for thread in threads:
            thread.join()
    except BaseException as error:  # an interrupt that met the main thread waiting
        run.fail(error)
    finally:
        for thread in threads:
            thread.join()
        run.close()
    run.raise_error()
    plan.source.check_unchanged()
    return Written(tuple(run.records), tuple(run.digests), tuple(run.shards))


class _Run:
    """What the workers share; ``_moved`` guards it, and is notified when a digest has moved on."""

    def __init__(self, plan: Plan, staging: Staging, algorithm: str, progress: Progress) -> None:
        self._plan, self._staging, self._progress = plan, staging, progress
        self._new_hasher = hasher_factory(algorithm)
        self._parts: list[_Part] = []
        self._batches = self._deal()
        self._dealing = threading.Lock()
        self._moved = threading.Condition()
        self._error: BaseException | None = None
        self.records: list[FileRecord] = []
        self.digests = [""] * len(plan.items)
        self.shards: list[tuple[str | None, ...]] = [()] * len(plan.items)

    def fail(self, error: BaseException) -> None:
        with self._moved:
            self._error = self._error or error
            self._moved.notify_all()

    def raise_error(self) -> None:
        if self._error:
            raise self._error

    def close(self) -> None:
        """Give back what a failure left open."""
        for part in self._parts:
            for file in part.files:
                file.close()

    def work(self) -> None:
        """Take batches until there are none; an error of this or another worker ends it."""
        try:
            rooms = Rooms()
            with SourceFiles(self._plan.source) as files:
                while (batch := self._next()) is not None:
                    self._carry(batch, files, rooms)
        except _StoppedError:
            pass
        except BaseException as error:
            self.fail(error)

    # ------------------------------------------------------------------------------------------ dealing

    def _next(self) -> _Batch | None:
        with self._dealing:
            if self._error:
                raise _StoppedError
            return next(self._batches, None)

    def _deal(self) -> Iterator[_Batch]:
        """All slabs in order, in batches of up to SLAB bytes, or one slab where that is larger (a row may be)."""
        transfers, known = self._plan.transfers(), KnownSlabs(SLAB)
        for outputs in self._plan.parts():
            part, all_targets = self._begin(outputs)
            batch = _Batch(part)
            for index in range(outputs[0].first, outputs[0].last):
                item, transfer = next(transfers)
                tensor = self._tensor(index, item, transfer, next(all_targets))
                for slab in known.of(transfer):
                    if batch.steps and batch.size + slab.size > SLAB:
                        yield self._dealt(batch)
                        batch = _Batch(part)
                    batch.steps.append(_Step(tensor, slab, batch.size))
                    batch.size += slab.size
                    tensor.open += 1
                self._done(tensor)
            yield self._dealt(batch)
            self._end(part)

    def _begin(self, outputs: Sequence[Output]) -> tuple[_Part, Iterator[Targets]]:
        part, arrangement = _Part(outputs, []), self._plan.arrangement
        self._parts.append(part)
        frames = []
        for output in outputs:
            part.files.append(OutputFile(self._staging, output.name, self._new_hasher()))
            frames.append(arrangement.frame(self._plan, output))
            part.files[-1].begin(frames[-1], arrangement.in_order)
        return part, arrangement.targets(self._plan, outputs, frames)

    def _tensor(self, index: int, item: Item, transfer: Transfer, targets: Targets) -> _Tensor:
        ranks = {held.rank: self._new_hasher() for held in transfer.writes if held.rank not in transfer.whole}
        return _Tensor(index, item.stored, targets, self._new_hasher(), ranks, dict.fromkeys(ranks, 0))

    def _dealt(self, batch: _Batch) -> _Batch:
        with self._moved:
            batch.part.open += 1
        return batch

    # ------------------------------------------------------------------------------------------ carrying

    def _carry(self, batch: _Batch, files: SourceFiles, rooms: Rooms) -> None:
        """One batch from the source to all ranks."""
        buffer = rooms.get(0, batch.size)
        files.fill(((step.tensor.stored, step.slab, step.begin) for step in batch.steps), buffer)
        self._digest_whole(batch, buffer)
        of_ranks: dict[int, list[tuple[_Step, Contact]]] = {}
        for step in batch.steps:
            for contact in step.slab.writes:
                of_ranks.setdefault(contact.rank, []).append((step, contact))
        for rank in sorted(of_ranks):
            self._deliver(batch.part, rank, of_ranks[rank], buffer, rooms)
        with self._moved:
            for step in batch.steps:
                self._done(step.tensor)
            self._end(batch.part)
            self._progress(batch.size)

    def _digest_whole(self, batch: _Batch, buffer: Bytes) -> None:
        for step in batch.steps:
            tensor = step.tensor
            self._wait_until(lambda: tensor.digested == step.slab.offset)  # noqa: B023
            tensor.whole.update(buffer[step.begin : step.begin + step.slab.size].data)
            tensor.digested += step.slab.size
        with self._moved:
            self._moved.notify_all()

    def _deliver(
        self, part: _Part, rank: int, contacts: list[tuple[_Step, Contact]], buffer: Bytes, rooms: Rooms
    ) -> None:
        """Digest and write what one rank gets of a batch."""
        gathered = rooms.get(1, sum(contact.size for _, contact in contacts if contact.begin is None))
        used, parts = 0, []
        for step, contact in contacts:
            slab = buffer[step.begin : step.begin + step.slab.size].reshape(step.slab.shape)
            parts.append(contact.take(slab, gathered[used:]).data)
            used += contact.size if contact.begin is None else 0
        if not self._plan.arrangement.in_order:
            for (step, contact), data in zip(contacts, parts, strict=True):
                self._deliver_apart(part, step.tensor, contact, data, rooms)
            return
        file = part.files[rank]
        step, contact = contacts[0]
        start = step.tensor.targets.starts[rank] + contact.offset - contact.lead
        self._wait_until(lambda: file.digested == start)
        for (step, contact), data in zip(contacts, parts, strict=True):
            file.digest(contact.lead, data, step.tensor.ranks.get(rank))
        with self._moved:
            self._moved.notify_all()
        places = [step.tensor.targets.starts[rank] + contact.offset for step, contact in contacts]
        file.write(zip(places, parts, strict=True))

    def _deliver_apart(self, part: _Part, tensor: _Tensor, contact: Contact, data: memoryview, rooms: Rooms) -> None:
        """One contact to a file whose bytes come in any order; only its tensor's own digest needs the one before."""
        rank, targets = contact.rank, tensor.targets
        hasher = tensor.ranks.get(rank)
        if hasher is not None:
            self._wait_until(lambda: tensor.own[rank] == contact.offset - contact.lead)
            update(hasher, contact.lead, data)
            with self._moved:
                tensor.own[rank] = contact.offset + contact.size
                self._moved.notify_all()
        file, view = part.files[targets.file(rank)], targets.view(rank)
        if view is None:
            file.write([(targets.starts[rank] + contact.offset, data)])
        else:
            file.write_strided(targets.starts[rank], view, contact.offset, data, rooms)

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        if ready():
            return
        with self._moved:
            while not ready():
                if self._error:
                    raise _StoppedError
                self._moved.wait()

    # ------------------------------------------------------------------------------------------ ending

    def _done(self, tensor: _Tensor) -> None:
        with self._moved:
            tensor.open -= 1
            if tensor.open:
                return
            digest, record = tensor.whole.hexdigest(), tensor.stored.record
            if record is not None and record.digest not in ("", digest):
                raise InputError(
                    f"{printable(tensor.stored.name)}: the rebuilt bytes have digest {digest}, the manifest recorded "
                    f"{record.digest}",
                    hint="a shard was changed or damaged; tpshard verify tells which",
                )
            own = (tensor.ranks.get(rank) for rank in range(self._plan.ranks))
            self.digests[tensor.index] = digest
            self.shards[tensor.index] = tuple(hasher.hexdigest() if hasher else None for hasher in own)

    def _end(self, part: _Part) -> None:
        with self._moved:
            part.open -= 1
            if not part.open:
                for output, file in zip(part.outputs, part.files, strict=True):
                    size, digest = file.finish()
                    self.records.append(FileRecord(output.name, output.rank, output.part, size, digest))
                self._parts.remove(part)
