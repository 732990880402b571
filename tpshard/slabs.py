"""A transfer cut into slabs: contiguous regions of the whole tensor that fit into a buffer, with all that is to be
copied into and out of them.

Plain bytes, no dtypes, no files. A rank's own tensor touches a slab in a **contact**: a contiguous region of that
tensor, and where its cells lie in the slab. A contact serves both directions, so there is one geometry for reading
and writing, and where a region is contiguous on both sides nothing is copied twice.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tpshard.layout import Box, Piece, Shape
from tpshard.plan import Holding, Transfer

if TYPE_CHECKING:  # takes 20 ms to import, a tenth of the start
    from numpy.typing import NDArray

MOST_KEPT = 32768  # contacts of recent transfers: about 16 MB

Bytes: TypeAlias = "NDArray[np.uint8]"
Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Contact:
    """A contiguous region of a rank's own tensor, ``size`` bytes from ``offset``, and its place in a slab.

    ``begin``: where the region begins in the slab, if it is contiguous there as well; else None, and ``moves`` are
    the parts of the region, an array of ``shape``, with their places in the slab. ``covered``: whether the parts
    fill the region; what they leave is padding. ``lead``: bytes of padding in the rank's own tensor between the end
    of its contact before and this one.
    """

    rank: int
    offset: int
    size: int
    begin: int | None
    shape: Shape
    moves: tuple[tuple[Slices, Slices], ...] = ()
    covered: bool = True
    lead: int = 0

    def take(self, slab: Bytes, room: Bytes) -> Bytes:
        """The region's bytes out of a slab: a view of it where they are contiguous, else gathered in ``room``."""
        if self.begin is not None:
            return slab.reshape(-1)[self.begin : self.begin + self.size]
        flat = room[: self.size]
        region = flat.reshape(self.shape)
        if not self.covered:
            flat[:] = 0
        for there, here in self.moves:
            region[there] = slab[here]
        return flat

    def put(self, region: Bytes, slab: Bytes) -> None:
        """Scatter the region's bytes into a slab; for a contact that is not contiguous there."""
        shaped = region[: self.size].reshape(self.shape)
        for there, here in self.moves:
            slab[here] = shaped[there]


@dataclass(frozen=True, slots=True)
class Slab:
    """``size`` bytes of the whole tensor from ``offset``, as an array of ``shape``.

    ``writes`` has at most two contacts of a rank: one with cells, and, in the last slab, one of size 0 whose
    ``lead`` is the padding that ends the rank's own tensor.
    """

    offset: int
    size: int
    shape: Shape
    reads: tuple[Contact, ...]
    writes: tuple[Contact, ...]


def cut_into_slabs(transfer: Transfer, limit: int, whole: bool = True) -> Iterator[Slab]:
    """A transfer's slabs in order, each of at most ``limit`` bytes; at least one, even for a tensor without cells.
    ``whole``: they cover the whole tensor; else only what is written, each of them from its first to its last row."""
    offset = 0
    ends = {holding.rank: 0 for holding in transfer.writes}
    boxes = list(regions(transfer.shape, limit)) or [Box((0,) * len(transfer.shape), (0,) * len(transfer.shape))]
    for number, given in enumerate(boxes, start=1):
        box = given if whole else _written(transfer, given)
        size = box.volume if box and 0 not in transfer.shape else 0
        writes = [c for held in transfer.writes for c in (_contacts(held, box, ends[held.rank]) if box else ())]
        for contact in writes:
            ends[contact.rank] = contact.offset + contact.size
        if number == len(boxes):
            writes += [
                Contact(h.rank, h.volume, 0, 0, (0,), lead=h.volume - ends[h.rank])
                for h in transfer.writes
                if ends[h.rank] < h.volume
            ]
        if not box:
            if not writes:
                continue
            box = Box(given.start, given.start)
        reads = tuple(contact for holding in transfer.reads for contact in _separate_contacts(holding, box))
        yield Slab(offset, size, box.shape, reads, tuple(writes))
        offset += size


def _written(transfer: Transfer, box: Box) -> Box | None:
    """The rows of a box that are written anywhere."""
    parts = [piece.box.intersect(box) for holding in transfer.writes for piece in holding.pieces]
    found = [part for part in parts if part is not None]
    return rows_around(found, transfer.shape) if found else None


def regions(shape: Shape, limit: int) -> Iterator[Box]:
    """The whole tensor in order, as consecutive contiguous regions of at most ``limit`` cells.

    (C order; a region varies along one axis, is single before it and full after it.)

    >>> [(b.start, b.stop) for b in regions((5, 3), 6)]
    [((0, 0), (2, 3)), ((2, 0), (4, 3)), ((4, 0), (5, 3))]
    """
    if 0 in shape:
        return
    inner, axis = 1, len(shape)
    while axis > 0 and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield Box((0,) * len(shape), shape)
        return
    axis -= 1
    rows = max(1, limit // inner)
    tail = shape[axis + 1 :]
    for lead in itertools.product(*map(range, shape[:axis])):
        for begin in range(0, shape[axis], rows):
            start = (*lead, begin, *(0,) * len(tail))
            stop = (*(i + 1 for i in lead), min(begin + rows, shape[axis]), *tail)
            yield Box(start, stop)


def linear(index: Shape, shape: Shape) -> int:
    """The position of ``index`` in C order."""
    position = 0
    for i, n in zip(index, shape, strict=True):
        position = position * n + i
    return position


def is_contiguous(box: Box, shape: Shape) -> bool:
    """Whether a region of an array of ``shape`` is one run in C order.

    >>> is_contiguous(Box((2, 0), (4, 5)), (9, 5)), is_contiguous(Box((2, 0), (4, 3)), (9, 5))
    (True, False)
    """
    single = True  # whether all axes so far have extent 1
    for extent, size in zip(box.shape, shape, strict=True):
        if not single and extent != size:
            return False
        single = single and extent == 1
    return True


def _parts(holding: Holding, slab: Box) -> list[tuple[Box, Box]]:
    """What a rank's own tensor and a slab have in common: boxes in the one's coordinates and in the other's."""
    back = tuple(-n for n in slab.start)
    return [
        (box.translate(_shift(piece)), box.translate(back))
        for piece in holding.pieces
        if (box := piece.box.intersect(slab)) is not None
    ]


def _shift(piece: Piece) -> Shape:
    return tuple(a - s for a, s in zip(piece.at, piece.box.start, strict=True))


def _contacts(holding: Holding, slab: Box, end: int) -> Iterator[Contact]:
    """One contact with all parts, or none; ``end``: of the rank's contact before."""
    if parts := _parts(holding, slab):
        yield _contact(holding, slab, parts, end)


def _separate_contacts(holding: Holding, slab: Box) -> Iterator[Contact]:
    """Parts that need no copy each on its own, so that they are read straight into the slab; the others together."""
    strided = []
    for own, inside in _parts(holding, slab):
        if is_contiguous(inside, slab.shape) and is_contiguous(own, holding.shape):
            yield _contact(holding, slab, [(own, inside)], 0)
        else:
            strided.append((own, inside))
    if strided:
        yield _contact(holding, slab, strided, 0)


def _contact(holding: Holding, slab: Box, parts: Sequence[tuple[Box, Box]], end: int) -> Contact:
    if len(parts) == 1:
        own, inside = parts[0]
        if is_contiguous(inside, slab.shape) and is_contiguous(own, holding.shape):
            offset, begin = linear(own.start, holding.shape), linear(inside.start, slab.shape)
            return Contact(holding.rank, offset, own.volume, begin, (own.volume,), lead=offset - end)
    cover = rows_around([own for own, _ in parts], holding.shape)
    back = tuple(-n for n in cover.start)
    offset = linear(cover.start, holding.shape)
    return Contact(
        holding.rank,
        offset,
        cover.volume,
        None,
        cover.shape,
        moves=tuple((own.translate(back).slices(), inside.slices()) for own, inside in parts),
        covered=sum(own.volume for own, _ in parts) == cover.volume,
        lead=offset - end,
    )


def rows_around(boxes: Iterable[Box], shape: Shape) -> Box:
    """The smallest contiguous region of an array of ``shape`` that holds all boxes."""
    starts, stops = zip(*((box.start, box.stop) for box in boxes), strict=True)
    start, stop = [min(axis) for axis in zip(*starts, strict=True)], [max(axis) for axis in zip(*stops, strict=True)]
    first = next((axis for axis in range(len(shape)) if stop[axis] - start[axis] > 1), len(shape))
    for axis in range(first + 1, len(shape)):
        start[axis], stop[axis] = 0, shape[axis]
    return Box(tuple(start), tuple(stop))


class Rooms:
    """Buffers that are used again and again, and grow: fresh memory costs more than a copy."""

    def __init__(self) -> None:
        self._buffers: dict[int, Bytes] = {}

    def get(self, number: int, size: int) -> Bytes:
        """Buffer ``number``, at this size; what it held is lost at the next call for it."""
        if number not in self._buffers or len(self._buffers[number]) < size:
            self._buffers[number] = np.empty(size, np.uint8)
        return self._buffers[number][:size]


class KnownSlabs:
    """Slabs of recent transfers: thousands of tensors share a few. The largest are cut anew each time: they are rare,
    and their slabs would take more memory than they are worth."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: OrderedDict[tuple[int, bool], tuple[Transfer, tuple[Slab, ...], int]] = OrderedDict()
        self._kept = 0

    def of(self, transfer: Transfer, whole: bool) -> Iterable[Slab]:
        key = id(transfer), whole
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key][1]
        if transfer.size // self._limit * len(transfer.writes) > MOST_KEPT:
            return cut_into_slabs(transfer, self._limit, whole)
        slabs = tuple(cut_into_slabs(transfer, self._limit, whole))
        weight = sum(1 + len(slab.reads) + len(slab.writes) for slab in slabs)
        self._known[key] = transfer, slabs, weight
        self._kept += weight
        while self._kept > MOST_KEPT and len(self._known) > 1:
            self._kept -= self._known.popitem(last=False)[1][2]
        return slabs
