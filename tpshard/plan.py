"""What will be written and from where: pure data, computed lazily, the same for split, merge and reshard.

All planning passes through the whole tensor's own coordinates: the source's shards tile it once (``reads``), the
target's shards cut it up again (``writes``). So from N ranks to M there is no pairwise algebra and no inverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.errors import InputError, printable
from tpshard.header import DTYPE_BITS, DTYPE_ORDER, byte_count, header_bytes
from tpshard.layout import Layout, Piece, Shape, Shard, in_bytes


@dataclass(frozen=True, slots=True)
class Transfer:
    """One tensor between two layouts, the last axis counted in bytes.

    ``reads``: every cell of the whole tensor once, with the source rank that gives it and the shape of that rank's
    own tensor. ``writes``: each target rank's shard (None: it holds nothing).
    """

    shape: Shape
    reads: tuple[tuple[int, Piece, Shape], ...]
    writes: tuple[Shard | None, ...]


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
    shapes = [shard.shape if shard else () for shard in have.shards]
    reads = tuple((rank, piece, shapes[rank]) for rank, piece in have.tiles())
    return Transfer(have.shape, reads, want.shards)


def byte_count_of(shape: Shape, bits: int) -> int:
    cells = 1
    for n in shape:
        cells *= n
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
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor to write, with the layout wanted."""

    stored: Stored
    want: Layout

    def size(self, rank: int) -> int:
        """Bytes of one target rank's own tensor."""
        shard = self.want.shards[rank]
        try:
            return byte_count(self.stored.dtype, shard.shape) if shard else 0
        except InputError as error:
            raise InputError(f"{printable(self.stored.name)}: {error.message}") from None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will be written. ``items`` lie in the order in which every file holds its own."""

    source: Checkpoint
    items: tuple[Item, ...]
    outputs: tuple[Output, ...]
    ranks: int

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

    def header(self, output: Output) -> bytes:
        """An output file's first bytes."""
        held = (
            (item.stored.name, item.stored.dtype, shard.shape)
            for item in self.items[output.first : output.last]
            if (shard := item.want.shards[output.rank]) is not None
        )
        return header_bytes(held, output.metadata)

    def bytes_of(self, output: Output) -> int:
        """Bytes of an output file's tensors, without its header."""
        return sum(item.size(output.rank) for item in self.items[output.first : output.last])


def arrange(items: Sequence[Item], ranks: int, limit: int) -> list[tuple[Item, ...]]:
    """Items in groups, one for each part of a rank's files: in the given order, a new part where any rank's would
    outgrow ``limit`` bytes; inside a part wide dtypes first, so that every tensor is aligned to its element."""
    parts: list[list[Item]] = [[]]
    filled = [0] * ranks
    sizes: dict[tuple[Layout, str], list[int]] = {}
    for item in items:
        key = (item.want, item.stored.dtype)
        if key not in sizes:
            sizes[key] = [item.size(rank) for rank in range(ranks)]
        own = sizes[key]
        if parts[-1] and any(a + b > limit for a, b in zip(filled, own, strict=True)):
            parts.append([])
            filled = [0] * ranks
        parts[-1].append(item)
        filled = [a + b for a, b in zip(filled, own, strict=True)]
    return [tuple(sorted(part, key=lambda item: DTYPE_ORDER[item.stored.dtype])) for part in parts]
