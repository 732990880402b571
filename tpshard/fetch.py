"""One rank alone, cut straight from a full checkpoint: only what the rank holds is read.

To the plan, the part of a tensor that a rank holds is a tensor of its own, which lies in pieces in the source's file.
The files are those that split writes for this rank, byte for byte. Instead of a manifest, which says more than one
rank can know, the folder gets a record of the rank; ``tpshard join`` makes a manifest of the records of all.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tpshard.carrying import carry_all
from tpshard.checkpoint import Place, Stored
from tpshard.conversion import Conversion, Done, Options, file_digest_of, manifest_of
from tpshard.convert import plan_split
from tpshard.engines.opening import NATIVE, Source
from tpshard.errors import UsageError, printable
from tpshard.execute import execute
from tpshard.header import DTYPE_BITS
from tpshard.journal import Head
from tpshard.layout import Layout, Shape, Shard, Span, in_bytes
from tpshard.manifest import FileRecord, rank_record_bytes, rank_record_name
from tpshard.mesh import Grid
from tpshard.plan import Item, Output, Plain, Plan, bytes_of_ranks
from tpshard.share import Written
from tpshard.slabs import linear
from tpshard.staging import Staging, check_space, check_target
from tpshard.stores.path import StorePath
from tpshard.stores.writing import StoreStaging
from tpshard.views import strided


@dataclass(frozen=True, slots=True)
class Fetch:
    """A planned fetch. ``whole``: the split of which this is one rank; ``held``: the items of it that the rank has."""

    whole: Conversion
    rank: int
    plan: Plan
    held: tuple[int, ...]

    @property
    def bytes_wanted(self) -> int:
        """Of the source's tensors."""
        return sum(math.prod(in_bytes(i.stored.layout, DTYPE_BITS[i.stored.dtype]).shape) for i in self.plan.items)


def plan_fetch(
    source: Path | Source,
    target: Path,
    ranks: int | Grid,
    rank: int,
    policy: str = "auto",
    options: Options = Options(),
) -> Fetch:
    """Plan to cut one rank of what ``plan_split`` plans; reads headers only. Raises any TpshardError."""
    whole = plan_split(source, target, ranks, policy, options, NATIVE)
    plan = whole.plan
    if not 0 <= rank < plan.ranks:
        raise UsageError(f"--rank {rank}: the ranks are 0 to {plan.ranks - 1}")
    assert isinstance(plan.arrangement, Plain)
    held = tuple(index for index, item in enumerate(plan.items) if item.want.shards[rank] is not None)
    files = {output.part: output for output in plan.outputs if output.rank == rank}
    outputs, first = [], 0
    for part, output in files.items():
        last = first + sum(output.first <= index < output.last for index in held)
        outputs.append(Output(output.name, 0, part, first, last))
        first = last
    describe = plan.arrangement.describe
    arrangement = Plain(lambda output: describe(files[output.part]))
    items = tuple(_own(plan.items[index], rank) for index in held)
    return Fetch(whole, rank, Plan(plan.source, items, tuple(outputs), 1, arrangement), held)


def _own(item: Item, rank: int) -> Item:
    """What a rank holds of a tensor as a tensor by itself: its padding apart, which is written and not read."""
    shard, stored = item.want.shards[rank], item.stored
    assert shard is not None
    if shard == Shard.whole(stored.shape):
        return Item(stored, Layout(stored.shape, (shard,)))
    shape = tuple(sum(run.size for run in runs) for runs in shard.spans)
    pieces = list(shard.pieces())
    spans = [tuple(Span(a, a + n) for a, n in zip(piece.at, piece.box.shape, strict=True)) for piece in pieces]
    have = Layout(
        shape, tuple(Shard(p.box.shape, tuple((run,) for run in own)) for p, own in zip(pieces, spans, strict=True))
    )
    place = _only_place(stored)
    bits = DTYPE_BITS[stored.dtype]
    counted = in_bytes(Layout(stored.shape, (shard,)), bits)
    own = counted.shards[0]
    assert own is not None
    places = tuple(_piece(place, counted.shape, piece.box.start, piece.box.shape) for piece in own.pieces())
    return Item(
        replace(stored, layout=have, places=places), Layout(shape, (Shard(shard.shape, Shard.whole(shape).spans),))
    )


def _only_place(stored: Stored) -> Place:
    place = stored.places[0]
    if len(stored.places) != 1 or place is None or place.view is not None:
        what = f"{printable(stored.name)}: does not lie in one run in the source"
        raise UsageError(what, hint="fetch reads full checkpoints as they were saved; tpshard split reads all")
    return place


def _piece(place: Place, whole: Shape, start: Shape, shape: Shape) -> Place:
    """Where a region of a tensor lies, all in bytes."""
    strides = tuple(math.prod(whole[axis + 1 :]) for axis in range(len(whole)))
    return Place(place.file, place.offset + linear(start, whole), strided(shape, strides))


def run_fetch(fetch: Fetch, options: Options = Options()) -> Done:
    """Carry out a planned fetch. The target is complete afterwards, or as it was before."""
    plan, target = fetch.plan, fetch.whole.target
    check_target(target, plan.source.place)
    check_space(target, sum(map(sum, bytes_of_ranks(plan.items))))
    begin = time.monotonic()
    algorithm = file_digest_of(fetch.whole, options)
    record_name = rank_record_name(fetch.rank, fetch.whole.plan.ranks)
    names = [*(output.name for output in plan.outputs), *plan.source.carried, *fetch.whole.beside, record_name]
    staging = StoreStaging(target, 1) if isinstance(target, StorePath) else Staging(target, Head({}, tuple(names)))
    with staging:
        workers = options.threads_from(plan.source.folder)
        written = execute(plan, staging, algorithm, workers, options.progress)
        carried = carry_all(plan.source, fetch.whole.beside, staging, algorithm)
        copied = time.monotonic()
        staging.sync()
        manifest = manifest_of(fetch.whole, _as_one_of_all(fetch, written), carried, algorithm)
        staging.write(record_name, rank_record_bytes(manifest, fetch.rank))
        staging.commit()
    end = time.monotonic()
    size = sum(record.size for record in written.files)
    return Done(written, len(plan.items), fetch.bytes_wanted, size, copied - begin, end - copied)


def _as_one_of_all(fetch: Fetch, written: Written) -> Written:
    """What split would say of this rank; of the others nothing."""
    items, ranks = fetch.whole.plan.items, fetch.whole.plan.ranks
    digests, shards = [""] * len(items), [[None] * ranks for _ in items]  # type: list[str], list[list[str | None]]
    for own, index in enumerate(fetch.held):
        item = items[index]
        digest = written.shards[own][0] or written.digests[own]
        if item.want.shards[fetch.rank] == Shard.whole(item.stored.shape):
            digests[index] = digest
        else:
            shards[index][fetch.rank] = digest
    files = tuple(FileRecord(f.name, fetch.rank, f.part, f.size, f.digest) for f in written.files)
    return Written(files, tuple(digests), tuple(map(tuple, shards)))
