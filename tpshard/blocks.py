"""Moving regions between files, slabs and shards: plain bytes, no dtypes.

A slab is a contiguous region of the whole tensor in memory. ``fill`` reads it from the source's shards; ``extract``
gives a target shard's part of it, in the shard's own order. Where a region is contiguous on both sides nothing is
copied twice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tpshard.errors import StorageError
from tpshard.layout import Box, Piece, Shape, Shard

Bytes = NDArray[np.uint8]


class RankReader(Protocol):
    """Reads bytes of one source rank's own tensor."""

    def __call__(self, rank: int, offset: int, into: memoryview) -> None: ...


def read_exactly(fd: int, offset: int, into: memoryview, path: object) -> None:
    """Fill ``into`` from a file. Raises StorageError where the file ends before."""
    done = 0
    while done < len(into):
        try:
            count = os.preadv(fd, [into[done:]], offset + done)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from None
        if count == 0:
            raise StorageError(f"{path}: ends at byte {offset + done}, {len(into) - done} more were expected")
        done += count


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


def fill(slab: Box, reads: Sequence[tuple[int, Piece, Shape]], read: RankReader, into: Bytes) -> None:
    """Fill ``into`` (the slab's shape, contiguous) with the slab's cells."""
    back = tuple(-n for n in slab.start)
    flat = into.reshape(-1).data
    strided: dict[int, list[tuple[Box, Box, Shape]]] = {}
    for rank, piece, own_shape in reads:
        box = piece.box.intersect(slab)
        if box is None:
            continue
        inside = box.translate(back)
        own = box.translate(tuple(a - s for a, s in zip(piece.at, piece.box.start, strict=True)))
        if is_contiguous(inside, into.shape) and is_contiguous(own, own_shape):
            begin = linear(inside.start, into.shape)
            read(rank, linear(own.start, own_shape), flat[begin : begin + box.volume])
        else:
            strided.setdefault(rank, []).append((inside, own, own_shape))
    for rank, parts in strided.items():
        _fill_strided(rank, parts, read, into)


def _fill_strided(rank: int, parts: list[tuple[Box, Box, Shape]], read: RankReader, into: Bytes) -> None:
    """One read of the rows that hold all of the rank's parts, then strided copies."""
    own_shape = parts[0][2]
    cover = _rows_around([own for _, own, _ in parts], own_shape)
    rows = np.empty(cover.shape, np.uint8)
    read(rank, linear(cover.start, own_shape), rows.reshape(-1).data)
    back = tuple(-n for n in cover.start)
    for inside, own, _ in parts:
        into[inside.slices()] = rows[own.translate(back).slices()]


def _rows_around(boxes: list[Box], shape: Shape) -> Box:
    """The smallest contiguous region of an array of ``shape`` that holds all boxes."""
    start = list(map(min, *(box.start for box in boxes))) if len(boxes) > 1 else list(boxes[0].start)
    stop = list(map(max, *(box.stop for box in boxes))) if len(boxes) > 1 else list(boxes[0].stop)
    first = next((axis for axis in range(len(shape)) if stop[axis] - start[axis] > 1), len(shape))
    for axis in range(first + 1, len(shape)):
        start[axis], stop[axis] = 0, shape[axis]
    return Box(tuple(start), tuple(stop))


def extract(shard: Shard, slab: Box, data: Bytes) -> tuple[int, memoryview] | None:
    """A shard's part of a slab: its byte position in the shard's own tensor, and its bytes in that order.

    None where the shard holds nothing of the slab. The bytes may be a view of ``data``.
    """
    back = tuple(-n for n in slab.start)
    found: list[tuple[Box, Box]] = []
    for piece in shard.pieces():
        box = piece.box.intersect(slab)
        if box is not None:
            shift = tuple(a - s for a, s in zip(piece.at, piece.box.start, strict=True))
            found.append((box.translate(back), box.translate(shift)))
    if not found:
        return None
    if len(found) == 1:
        inside, own = found[0]
        if is_contiguous(inside, data.shape) and is_contiguous(own, shard.shape):
            begin = linear(inside.start, data.shape)
            return linear(own.start, shard.shape), data.reshape(-1).data[begin : begin + inside.volume]
    cover = _rows_around([own for _, own in found], shard.shape)
    covered = sum(own.volume for _, own in found)
    block = np.empty(cover.shape, np.uint8) if covered == cover.volume else np.zeros(cover.shape, np.uint8)
    shift = tuple(-n for n in cover.start)
    for inside, own in found:
        block[own.translate(shift).slices()] = data[inside.slices()]
    return linear(cover.start, shard.shape), block.reshape(-1).data
