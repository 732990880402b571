"""Layouts the slow, obvious way: for each rank and axis an array of indices; NumPy does the rest.

Nothing here calls the code under test but to build the ``Layout`` that is compared with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tpshard.layout import Layout, Shard, Span

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """What each rank holds along one axis: indices in ascending order, and the size of its own axis."""

    held: tuple[Indices, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Deal:
    """Of each rank the own axes, or None where it holds nothing; over a whole tensor of ``shape``."""

    shape: tuple[int, ...]
    ranks: tuple[tuple[tuple[Indices, int], ...] | None, ...]

    def shard(self, whole: np.ndarray, rank: int) -> np.ndarray | None:
        """A rank's own tensor of ``whole``, padding zero."""
        axes = self.ranks[rank]
        if axes is None:
            return None
        own = np.zeros([size for _, size in axes], whole.dtype)
        own[tuple(slice(len(indices)) for indices, _ in axes)] = whole[np.ix_(*[indices for indices, _ in axes])]
        return own

    def holders(self) -> np.ndarray:
        """How many ranks hold each cell."""
        count = np.zeros(self.shape, int)
        for axes in self.ranks:
            if axes is not None:
                count[np.ix_(*[indices for indices, _ in axes])] += 1
        return count

    def layout(self) -> Layout:
        """The same as the code under test says it."""
        return Layout(
            self.shape,
            tuple(
                None
                if axes is None
                else Shard(tuple(size for _, size in axes), tuple(spans(indices) for indices, _ in axes))
                for axes in self.ranks
            ),
        )


def spans(indices: Indices) -> tuple[Span, ...]:
    """Ascending indices as runs."""
    runs: list[Span] = []
    for index in indices:
        if runs and runs[-1].stop == index:
            runs[-1] = Span(runs[-1].start, index + 1)
        else:
            runs.append(Span(index, index + 1))
    return tuple(runs)


def whole_axis(size: int, ranks: int) -> Axis:
    """Every rank holds all of it."""
    return Axis((tuple(range(size)),) * ranks, (size,) * ranks)


def even(size: int, ranks: int) -> Axis:
    """Dealt as evenly as it goes, the first ranks one more."""
    held = tuple(tuple(part.tolist()) for part in np.array_split(np.arange(size), ranks))
    return Axis(held, tuple(map(len, held)))


def padded(size: int, ranks: int, pad: int) -> Axis:
    """Dealt in equal parts of a multiple of ``pad``, zeros at the end."""
    each = math.ceil(size / (pad * ranks)) * pad
    return Axis(tuple(tuple(i for i in range(size) if i // each == r) for r in range(ranks)), (each,) * ranks)


def blocks(parts: list[tuple[int, int]], ranks: int, copied: bool = True) -> Axis:
    """Fused blocks of ``count`` units of ``width``; fewer units than ranks are copied to neighbours where they fit;
    if not ``copied``, only one unit beside blocks of more."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    base = 0
    for count, width in parts:
        units = np.array_split(np.arange(count), ranks)
        one_for_many = count == 1 and max(other for other, _ in parts) > 1
        if (copied or one_for_many) and count and count < ranks and ranks % count == 0:
            units = [np.array([unit]) for unit in np.repeat(np.arange(count), ranks // count)]
        for rank in range(ranks):
            held[rank] += [base + unit * width + i for unit in units[rank].tolist() for i in range(width)]
        base += count * width
    return Axis(tuple(map(tuple, held)), tuple(map(len, held)))


@st.composite
def axes(draw: st.DrawFn, size: int, ranks: int) -> Axis:
    """Any way to deal an axis so that every index is held by some rank."""
    kind = draw(st.sampled_from(["whole", "even", "padded", "blocks", "blocks", "owners"]))
    if kind == "whole":
        return whole_axis(size, ranks)
    if kind == "even":
        return even(size, ranks)
    if kind == "padded":
        return padded(size, ranks, draw(st.integers(1, 4)))
    if kind == "blocks":
        return blocks(draw(block_lists(size)), ranks)
    owners = [draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=3)) for _ in range(size)]
    held = tuple(tuple(i for i in range(size) if r in owners[i]) for r in range(ranks))
    return Axis(held, tuple(len(indices) + draw(st.integers(0, 2)) for indices in held))


@st.composite
def block_lists(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Counts and widths of one to four blocks that make up an axis."""
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True) if b > a] or [0]
    counts = [draw(st.sampled_from([n for n in range(1, length + 1) if length % n == 0] or [0])) for length in lengths]
    return [(count, length // count if count else 1) for count, length in zip(counts, lengths, strict=True)]


@st.composite
def deals(draw: st.DrawFn, shape: tuple[int, ...], max_ranks: int = 8) -> Deal:
    """Any layout of a tensor: one axis cut, or two at once over a grid of ranks; some ranks may hold nothing."""
    order = draw(st.permutations(range(len(shape))))
    grid = draw(st.integers(1, max_ranks)), draw(st.integers(1, 3))
    if grid[0] * grid[1] > max_ranks:
        grid = grid[0], 1
    axis_of = {axis: draw(axes(shape[axis], grid[place])) for place, axis in enumerate(order[:2])}
    whole = [((tuple(range(n)), n)) for n in shape]
    ranks: list[tuple[tuple[Indices, int], ...] | None] = []
    for first in range(grid[0]):
        for second in range(grid[1]):
            own = list(whole)
            for axis, place in zip(order[:2], (first, second), strict=False):
                own[axis] = axis_of[axis].held[place], axis_of[axis].sizes[place]
            ranks.append(tuple(own))
    if draw(st.booleans()):
        ranks.insert(draw(st.integers(0, len(ranks))), draw(st.sampled_from([None, tuple(whole)])))
    return Deal(shape, tuple(ranks))


shapes = st.lists(st.integers(0, 7), max_size=5).map(tuple).filter(lambda shape: math.prod(shape) <= 2500)
