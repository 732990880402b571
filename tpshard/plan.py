"""What will be written and from where: pure data, computed lazily, the same for split, merge and reshard.

All planning passes through the whole tensor's own coordinates: the source's shards tile it once (``reads``), the
target's shards cut it up again (``writes``). So from N ranks to M there is no pairwise algebra and no inverse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.errors import InputError, printable
from tpshard.frames import Frame, Tensor, safetensors_frame
from tpshard.header import DTYPE_BITS, DTYPE_ORDER, byte_count
from tpshard.layout import Layout, Piece, Shape, Shard, in_bytes
from tpshard.views import View


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank gives or takes: pieces of the whole tensor, and the shape of the rank's own."""

    rank: int
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def volume(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One tensor between two layouts, the last axis counted in bytes.

    ``reads``: of the source's ranks, every cell of the whole tensor once. ``writes``: of the target's ranks what each
    takes; ``whole`` are those of them that take exactly the whole tensor.
    """

    shape: Shape
    reads: tuple[Holding, ...]
    writes: tuple[Holding, ...]
    whole: frozenset[int]

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape)


def plan(have: Layout, want: Layout, bits: int) -> Transfer:
    """How a tensor of ``bits`` an element gets from one layout to the other.

    Raises ValueError where the two are not of one tensor, InputError where ``have`` lacks a cell.

    >>> transfer = plan(Layout.replicated((4, 3), 1), Layout.replicated((4, 3), 2), 16)
    >>> transfer.shape, len(transfer.reads), len(transfer.writes)
    ((24,), 1, 2)
    """
    if have.shape != want.shape:
        raise ValueError(f"a tensor of {list(have.shape)} cannot become one of {list(want.shape)}")
    if have.is_replicated and want.is_replicated:
        flat = (byte_count_of(have.shape, bits),)  # nothing is cut, so rows do not matter: one run
        have, want = Layout.replicated(flat, have.ranks), Layout.replicated(flat, want.ranks)
    else:
        have, want = in_bytes(have, bits), in_bytes(want, bits)
    whole = Shard.whole(want.shape)
    return Transfer(
        shape=have.shape,
        reads=tuple(_givers(have)),
        writes=tuple(Holding(r, s.shape, tuple(s.pieces())) for r, s in enumerate(want.shards) if s is not None),
        whole=frozenset(rank for rank, shard in enumerate(want.shards) if shard == whole),
    )


def _givers(have: Layout) -> Iterator[Holding]:
    pieces: dict[int, list[Piece]] = {}
    for rank, piece in have.tiles():
        pieces.setdefault(rank, []).append(piece)
    for rank, own in pieces.items():
        shard = have.shards[rank]
        assert shard is not None
        yield Holding(rank, shard.shape, tuple(own))


def byte_count_of(shape: Shape, bits: int) -> int:
    cells = math.prod(shape)
    if cells * bits % 8:
        raise InputError(f"shape {list(shape)} of {bits} bits an element does not fill its last byte")
    return cells * bits // 8


@dataclass(frozen=True, slots=True)
class Output:
    """A file to write: rank ``rank``'s tensors ``plan.items[first:last]``, in that order."""

    name: str
    rank: int
    part: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor to write, with the layout wanted."""

    stored: Stored
    want: Layout


@dataclass(frozen=True, slots=True)
class Targets:
    """Where one item's shards go, by rank: the byte at which each begins in its file; ``views``: of those that are not
    one run there; ``files``: which of the outputs written together each is in (None: the one of its number)."""

    starts: tuple[int, ...]
    views: tuple[View | None, ...] | None = None
    files: tuple[int, ...] | None = None

    def view(self, rank: int) -> View | None:
        return self.views[rank] if self.views else None

    def file(self, rank: int) -> int:
        return self.files[rank] if self.files else rank


class Arrangement(Protocol):
    """How items lie in output files. ``in_order``: a file's bytes are its head, then its items' one after another."""

    @property
    def in_order(self) -> bool: ...

    def frame(self, plan: Plan, output: Output) -> Frame:
        """What the file's format puts around its tensors."""

    def targets(self, plan: Plan, outputs: Sequence[Output], frames: Sequence[Frame | None]) -> Iterator[Targets]:
        """Of each item of the outputs written together, in their order; a frame is None where the file is not
        written, and its places mean nothing."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Safetensors files with each item under its own name, one after another. ``describe`` gives their metadata."""

    describe: Callable[[Output], Mapping[str, str]]
    in_order: bool = True

    def frame(self, plan: Plan, output: Output) -> Frame:
        held = [
            Tensor(item.stored.name, item.stored.dtype, shard.shape)
            for item in plan.items[output.first : output.last]
            if (shard := item.want.shards[output.rank]) is not None
        ]
        return safetensors_frame(held, self.describe(output))

    def targets(self, plan: Plan, outputs: Sequence[Output], frames: Sequence[Frame | None]) -> Iterator[Targets]:
        ends = np.array([len(frame.head) if frame else 0 for frame in frames], np.int64)
        items = plan.items[outputs[0].first : outputs[0].last]
        for sizes in bytes_of_ranks(items):
            yield Targets(tuple(ends.tolist()))
            ends += np.array(sizes, np.int64)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will be written. ``items`` lie in the order in which every file holds its own; ``outputs`` come
    part by part, those of one part are written together and have the same items."""

    source: Checkpoint
    items: tuple[Item, ...]
    outputs: tuple[Output, ...]
    ranks: int
    arrangement: Arrangement

    def transfers(self) -> Iterator[tuple[Item, Transfer]]:
        cached: dict[tuple[Layout, Layout, int], Transfer] = {}
        for item in self.items:
            key = (item.stored.layout, item.want, DTYPE_BITS[item.stored.dtype])
            if key not in cached:
                try:
                    cached[key] = plan(*key)
                except InputError as error:
                    raise InputError(f"{printable(item.stored.name)}: {error.message}", hint=error.hint) from None
            yield item, cached[key]

    def parts(self) -> Iterator[tuple[Output, ...]]:
        """The outputs that are written together."""
        for _, group in itertools.groupby(self.outputs, key=lambda output: output.part):
            yield tuple(group)


def bytes_of_ranks(items: Iterable[Item]) -> Iterator[tuple[int, ...]]:
    """For each item the bytes of every rank's own tensor; equal layouts are counted once."""
    known: dict[tuple[Layout, str], tuple[int, ...]] = {}
    for item in items:
        dtype, key = item.stored.dtype, (item.want, item.stored.dtype)
        if key not in known:
            try:
                known[key] = tuple(byte_count(dtype, shard.shape) if shard else 0 for shard in item.want.shards)
            except InputError as error:
                raise InputError(f"{printable(item.stored.name)}: {error.message}") from None
        yield known[key]


def arrange(items: Sequence[Item], ranks: int, limit: int) -> list[tuple[Item, ...]]:
    """Items in groups, one for each part of a rank's files: in the given order, a new part where any rank's would
    outgrow ``limit`` bytes; inside a part wide dtypes first, so that every tensor is aligned to its element."""
    parts: list[list[Item]] = [[]]
    filled = np.zeros(ranks, np.int64)
    for item, sizes in zip(items, bytes_of_ranks(items), strict=True):
        own = np.array(sizes, np.int64)
        if parts[-1] and bool((filled + own > limit).any()):
            parts.append([])
            filled[:] = 0
        parts[-1].append(item)
        filled += own
    return [tuple(sorted(part, key=lambda item: DTYPE_ORDER[item.stored.dtype])) for part in parts]
