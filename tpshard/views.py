"""Where a tensor's bytes lie in a file when they are not one run.

Engines put several tensors into one, by rows, by groups of heads, or with axes exchanged. Each of these is a view: the
tensor's own bytes as an array, with a stride in the file along each axis. So there is one notion for reading and
writing, and no code for any particular order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpshard.layout import Shape

MOST_IDLE = 3  # bytes read for nothing for each byte that is wanted, rather than a call for every run
LARGEST_COVER = 16 * 2**20  # bounds memory


@dataclass(frozen=True, slots=True)
class View:
    """A tensor's own bytes in C order, as an array of ``shape`` whose neighbours along each axis lie ``strides`` bytes
    apart in the file. The last axis counts bytes that follow one another: its stride is 1."""

    shape: Shape
    strides: Shape

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.strides):
            raise ValueError(f"shape has {len(self.shape)} dimensions, strides has {len(self.strides)}")
        if not self.strides or self.strides[-1] != 1:
            raise ValueError(f"strides {list(self.strides)} do not end in 1")
        if min(self.strides) < 1:
            raise ValueError(f"strides {list(self.strides)} are not all positive")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Bytes from the first to the last in the file."""
        return extent(self.shape, self.strides)


@dataclass(frozen=True, slots=True)
class Block:
    """Part of a view, an array of ``shape``: where it begins in the tensor's own bytes (``own``) and, counted from the
    view's begin, in the file (``at``), with the strides in either."""

    own: int
    at: int
    shape: Shape
    own_strides: Shape
    strides: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        return extent(self.shape, self.strides)


def extent(shape: Shape, strides: Shape) -> int:
    """Bytes from the first to the last, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def strided(shape: Sequence[int], strides: Sequence[int]) -> View | None:
    """A view with as few axes as will do; None where the bytes are one run.

    >>> strided((4, 3, 2), (12, 4, 1))
    View(shape=(12, 2), strides=(4, 1))
    >>> strided((4, 6), (6, 1)) is None
    True
    """
    axes: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        else:
            axes.append((size, stride))
    if not axes or axes[-1][1] != 1:
        axes.append((1, 1))
    return None if len(axes) == 1 else View(tuple(n for n, _ in axes), tuple(s for _, s in axes))


def blocks(view: View, offset: int, size: int, idle: int = 0) -> Iterator[Block]:
    """``size`` bytes of the tensor from ``offset``, as blocks that fill what they span in the file; for reading,
    ``idle`` bytes of what is spanned may be others', for each byte of the tensor. ``own`` counts from ``offset``.

    >>> [(b.own, b.at, b.size) for b in blocks(View((3, 4), (10, 1)), 2, 8)]
    [(0, 2, 2), (2, 10, 4), (6, 20, 2)]
    """
    for own, at, shape in _boxes(view, offset, offset + size, 0):
        axes = len(shape)
        own_strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(axes))
        block = Block(own - offset, at, shape, own_strides, view.strides[len(view.strides) - axes :])
        yield from _filling(block, idle)


def _boxes(view: View, begin: int, end: int, axis: int) -> Iterator[tuple[int, int, Shape]]:
    """The run from ``begin`` to ``end`` of the axes from ``axis`` on, as few regions: where each begins in the run's
    own coordinates and in the file, and its shape."""
    if begin >= end:
        return
    stride, tail = view.strides[axis], view.shape[axis + 1 :]
    inner = math.prod(tail)
    first, last = -(-begin // inner), end // inner
    if first > last:  # within one
        parts = [(last, begin - last * inner, end - last * inner)]
    else:
        parts = [(first - 1, inner - (first * inner - begin), inner)] if begin < first * inner else []
    for index, start, stop in parts:
        for own, at, shape in _boxes(view, start, stop, axis + 1):
            yield own + index * inner, at + index * stride, shape
    if first > last:
        return
    if first < last:
        yield first * inner, first * stride, (last - first, *tail)
    for own, at, shape in _boxes(view, 0, end - last * inner, axis + 1):
        yield own + last * inner, at + last * stride, shape


def _filling(block: Block, idle: int) -> Iterator[Block]:
    """The block, or its parts along the axis of the widest stride, until each fills enough of what it spans."""
    span = block.extent
    if span == block.size or (span <= (1 + idle) * block.size and span <= LARGEST_COVER):
        yield block
        return
    axis = max((a for a, n in enumerate(block.shape) if n > 1), key=lambda a: block.strides[a])
    shape = (*block.shape[:axis], 1, *block.shape[axis + 1 :])
    for index in range(block.shape[axis]):
        own, at = block.own + index * block.own_strides[axis], block.at + index * block.strides[axis]
        yield from _filling(Block(own, at, shape, block.own_strides, block.strides), idle)
