"""Carrying out a plan: one pass over the source, every byte read once, every digest on the way.

A worker takes a batch of slabs, reads it into its own buffer, cuts out every rank's part and writes it to its place, so
that a byte stays in one core's cache from read to write. Neither the bytes written nor the digests depend on the number
of workers, and memory does not grow with the model: it is a buffer for each worker, and a second one for what has to be
gathered.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from tpshard.dealing import Batch, Dealer, Part, Restricted, Step, Tensor
from tpshard.digest import TENSORS, TREE, hasher_factory, tree_digest, update
from tpshard.errors import InputError, printable
from tpshard.frames import Frame
from tpshard.manifest import FileRecord
from tpshard.outputs import Piece, Sink
from tpshard.plan import Item, Output, Plan, Targets, Transfer
from tpshard.share import Share, Written
from tpshard.slabs import Bytes, Contact, KnownSlabs, Rooms
from tpshard.sources import SourceFiles
from tpshard.staging import Shared
from tpshard.stores.path import StorePath
from tpshard.stores.writing import StoreStaging, new_output
from tpshard.turns import StoppedError, Turns

SLAB = 4 * 2**20  # bytes: smaller costs more calls, larger more cache; python -m tests.bench
SLAB_IN_STORE = 8 * 2**20  # of a source that is asked for each: a request costs as much as a megabyte (docs/stores.md)

Progress = Callable[[int], object]
Finished = Callable[[FileRecord, Sequence[str], Sequence[tuple[str | None, ...]]], object]


def execute(
    plan: Plan,
    staging: Shared,
    algorithm: str,
    workers: int,
    progress: Progress = lambda count: None,
    share: Share | None = None,
    finished: Finished = lambda record, digests, shards: None,
) -> Written:
    """Write all outputs of a plan, or a share of them, into the staging folder; nothing is fsynced yet.

    ``algorithm``: of the files' digests. Where the source has a manifest, every rebuilt tensor must have the digest
    recorded there. ``finished`` is called with each complete file's record and all items' digests, of which those of
    its part are known. Raises InputError, StorageError.
    """
    run = _Run(plan, staging, algorithm, workers, progress, share, finished)
    threads = [threading.Thread(target=run.work, args=(number,), daemon=True) for number in range(workers)]
    try:  # an interrupt meets the main thread: one that works could leave a lock taken, and the others waiting for ever
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        run.fail(error)
    finally:
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()
        run.close()
    run.raise_error()
    plan.source.check_unchanged()
    records = sorted(run.records, key=lambda record: (record.part, record.rank))
    return Written(tuple(records), tuple(run.digests), tuple(run.shards))


class _Run:
    """What the workers share; ``_turns`` guards it."""

    def __init__(
        self, plan: Plan, staging: Shared, algorithm: str, workers: int, progress: Progress, share: Share | None,
        finished: Finished,
    ) -> None:  # fmt: skip
        self._plan, self._staging, self._progress, self._share = plan, staging, progress, share
        self._finished = finished
        self._new_hasher = hasher_factory(TENSORS)
        self._new_file_hasher = None if algorithm == TREE else hasher_factory(algorithm)
        self._parts: list[Part] = []
        self._slab = SLAB_IN_STORE if isinstance(plan.source.folder, StorePath) else SLAB
        self._dealer = Dealer(self._streams(), workers, apart=not isinstance(staging, StoreStaging))
        self._finishing: deque[tuple[Output, Sink, bytes]] = deque()
        self._turns = Turns()
        self.fail = self._turns.fail
        self.records: list[FileRecord] = []
        self.digests = [""] * len(plan.items)
        self.shards: list[tuple[str | None, ...]] = [()] * len(plan.items)

    def raise_error(self) -> None:
        if self._turns.error:
            raise self._turns.error

    def close(self) -> None:
        """Give back what a failure left open."""
        for sink in (*(sink for part in self._parts for sink in part.sinks), *(sink for _, sink, _ in self._finishing)):
            if sink is not None:
                sink.close()

    def work(self, worker: int) -> None:
        """Take batches, and files to finish, until there are none; an error of this or another worker ends it."""
        try:
            rooms = Rooms()
            with SourceFiles(self._plan.source) as files:
                while (task := self._next(worker)) is not None:
                    if isinstance(task, Batch):
                        self._carry(task, files, rooms)
                    else:
                        self._finish(*task)
        except StoppedError:
            pass
        except BaseException as error:
            self.fail(error)

    # ------------------------------------------------------------------------------------------ dealing

    def _next(self, worker: int) -> Batch | tuple[Output, Sink, bytes] | None:
        with self._turns:
            while not self._turns.error:
                if self._finishing:
                    return self._finishing.popleft()
                if not self._dealer.is_ahead:
                    if (batch := self._dealer.next(worker)) is not None:
                        return batch
                    if self._dealer.idle and not self._finishing:  # dealing the last may have ended a part
                        return None
                if not self._finishing:
                    self._turns.wait()
            raise StoppedError

    def _streams(self) -> Iterator[Iterator[Batch]]:
        """Of each large tensor its batches; of small ones that follow one another one batch."""
        transfers, known, restricted = self._plan.transfers(), KnownSlabs(self._slab), Restricted()
        for outputs in self._plan.parts():
            part, all_targets = self._begin(outputs)
            small = Batch(part)
            for index in range(outputs[0].first, outputs[0].last):
                (item, transfer), targets = next(transfers), next(all_targets)
                if self._share is not None:
                    kept = frozenset(h.rank for h in transfer.writes if part.sinks[targets.file(h.rank)] is not None)
                    transfer = restricted.to(transfer, kept)
                tensor = self._tensor(index, item, transfer, targets)
                if small.steps and small.size + transfer.size > self._slab:
                    part.open += 1
                    yield iter([small])
                    small = Batch(part)
                if transfer.size > self._slab:
                    yield self._stream(part, tensor, transfer, known)
                    continue
                for slab in known.of(transfer, tensor.whole is not None):
                    small.add(tensor, slab)
                self._done(tensor)
            if small.steps:
                part.open += 1
                yield iter([small])
            self._end(part)

    def _stream(self, part: Part, tensor: Tensor, transfer: Transfer, known: KnownSlabs) -> Iterator[Batch]:
        part.open += 1
        for slab in known.of(transfer, tensor.whole is not None):
            batch = Batch(part)
            batch.add(tensor, slab)
            part.open += 1
            yield batch
        self._done(tensor)
        self._end(part)

    def _begin(self, outputs: Sequence[Output]) -> tuple[Part, Iterator[Targets]]:
        part, arrangement = Part(outputs), self._plan.arrangement
        self._parts.append(part)
        frames: list[Frame | None] = []
        for output in outputs:
            if self._share is not None and output.name not in self._share.outputs:
                part.sinks.append(None)
                part.heads.append(b"")
                frames.append(None)
                continue
            hasher = self._new_file_hasher() if self._new_file_hasher is not None else None
            sink = new_output(self._staging, output.name, hasher, arrangement.in_order)
            part.sinks.append(sink)
            frame = arrangement.frame(self._plan, output)
            part.heads.append(frame.head)
            frames.append(frame)
            sink.begin(frame)
        if not any(part.sinks):
            return part, itertools.repeat(Targets((), files=(0,) * self._plan.ranks))
        return part, arrangement.targets(self._plan, outputs, frames)

    def _tensor(self, index: int, item: Item, transfer: Transfer, targets: Targets) -> Tensor:
        ranks = {held.rank: self._new_hasher() for held in transfer.writes if held.rank not in transfer.whole}
        wanted = self._share is None or index in self._share.wholes or len(ranks) < len(transfer.writes)
        whole = self._new_hasher() if wanted else None
        return Tensor(index, item.stored, targets, whole, ranks, dict.fromkeys(ranks, 0))

    # ------------------------------------------------------------------------------------------ carrying

    def _carry(self, batch: Batch, files: SourceFiles, rooms: Rooms) -> None:
        """One batch from the source to all ranks."""
        buffer = rooms.get(0, batch.size)
        files.fill(((step.tensor.stored, step.slab, step.begin) for step in batch.steps), buffer)
        of_files: dict[int, list[tuple[Step, Contact]]] = {}
        for step in batch.steps:
            self._digest_whole(step, buffer)
            for contact in step.slab.writes:
                of_files.setdefault(step.tensor.targets.file(contact.rank), []).append((step, contact))
        for file, contacts in of_files.items():
            sink = batch.part.sinks[file]
            assert sink is not None
            self._deliver(sink, contacts, buffer, rooms)
        with self._turns:
            for step in batch.steps:
                self._done(step.tensor)
            self._dealer.done(batch)
            self._end(batch.part)
            self._progress(batch.size)
            self._turns.moved_on()

    def _digest_whole(self, step: Step, buffer: Bytes) -> None:
        tensor, slab = step.tensor, step.slab
        if tensor.whole is None:
            return
        if tensor.digested != slab.offset:
            self._turns.wait_until(lambda: tensor.digested == slab.offset)
        tensor.whole.update(buffer[step.begin : step.begin + slab.size].data)
        tensor.digested += slab.size
        if tensor.shared:
            self._moved_on()

    def _deliver(self, sink: Sink, contacts: Sequence[tuple[Step, Contact]], buffer: Bytes, rooms: Rooms) -> None:
        """Digest and write what one file gets of a batch."""
        gathered = rooms.get(1, sum(contact.size for _, contact in contacts if contact.begin is None))
        used, pieces = 0, []
        for step, contact in contacts:
            slab = buffer[step.begin : step.begin + step.slab.size].reshape(step.slab.shape)
            data = contact.take(slab, gathered[used:]).data
            used += contact.size if contact.begin is None else 0
            self._digest_own(step.tensor, contact, data)
            start, view = step.tensor.targets.starts[contact.rank], step.tensor.targets.view(contact.rank)
            if view is None:
                pieces.append(Piece(start + contact.offset, data, contact.lead))
            else:
                sink.write_strided(start, view, contact.offset, data, rooms)
        sink.write(pieces)

    def _digest_own(self, tensor: Tensor, contact: Contact, data: memoryview) -> None:
        rank, begin = contact.rank, contact.offset - contact.lead
        hasher = tensor.ranks.get(rank)
        if hasher is None:
            return
        if tensor.own[rank] != begin:
            self._turns.wait_until(lambda: tensor.own[rank] == begin)
        update(hasher, contact.lead, data)
        tensor.own[rank] = contact.offset + contact.size
        if tensor.shared:
            self._moved_on()

    def _moved_on(self) -> None:
        with self._turns:
            self._turns.moved_on()

    # ------------------------------------------------------------------------------------------ ending

    def _done(self, tensor: Tensor) -> None:
        """One slab of it, or its dealing."""
        tensor.open -= 1
        if tensor.open:
            return
        digest, record = tensor.whole.hexdigest() if tensor.whole else "", tensor.stored.record
        if digest and record is not None and record.digest not in ("", digest):
            raise InputError(
                f"{printable(tensor.stored.name)}: the rebuilt bytes have digest {digest}, the manifest recorded "
                f"{record.digest}",
                hint="a shard was changed or damaged; tpshard verify tells which",
            )
        own = (tensor.ranks.get(rank) for rank in range(self._plan.ranks))
        self.digests[tensor.index] = digest
        self.shards[tensor.index] = tuple(hasher.hexdigest() if hasher else None for hasher in own)

    def _end(self, part: Part) -> None:
        """One batch of it, or its dealing; its files are then for whoever comes next."""
        part.open -= 1
        if not part.open:
            each = zip(part.outputs, part.sinks, part.heads, strict=True)
            self._finishing.extend((output, sink, head) for output, sink, head in each if sink)
            self._parts.remove(part)

    def _finish(self, output: Output, sink: Sink, head: bytes) -> None:
        try:
            size, digest = sink.finish()
        finally:
            sink.close()
        if not digest:
            digest = tree_digest(head, self._digests_of(output))
        with self._turns:
            record = FileRecord(output.name, output.rank, output.part, size, digest)
            self.records.append(record)
        self._finished(record, self.digests, self.shards)

    def _digests_of(self, output: Output) -> Iterator[str]:
        """Of the tensors of a file, each as the rank holds it."""
        for index in range(output.first, output.last):
            if self._plan.items[index].want.shards[output.rank] is not None:
                yield self.shards[index][output.rank] or self.digests[index]
