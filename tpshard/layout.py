"""Which rank holds which cells of one tensor, in whole numbers only.

A rank's part of a tensor is a product of index runs, one list of runs for each axis; where its own tensor is larger
than what those runs cover, the rest is padding (zeros). That is enough for plain cuts, fused blocks, replicated
units, uneven cuts and cuts along several axes at once. A full checkpoint is the case of a single rank, so there is
one notion of layout and nobody writes an inverse of anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from tpshard.errors import InputError

Shape = tuple[int, ...]


class Span(NamedTuple):
    """The half-open run ``start <= index < stop`` along one axis."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region: ``start`` inclusive, ``stop`` exclusive, one number for each axis."""

    start: Shape
    stop: Shape

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"start has {len(self.start)} dimensions, stop has {len(self.stop)}")

    @property
    def shape(self) -> Shape:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def volume(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The common region, or None where there is none (an empty region is none).

        >>> Box((0, 0), (4, 6)).intersect(Box((2, 3), (9, 9)))
        Box(start=(2, 3), stop=(4, 6))
        """
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def translate(self, by: Shape) -> Box:
        return Box(tuple(map(int.__add__, self.start, by)), tuple(map(int.__add__, self.stop, by)))

    def slices(self) -> tuple[slice, ...]:
        """For indexing an array of the same number of dimensions."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of the whole tensor (``box``) and where it begins in the rank's own tensor (``at``)."""

    box: Box
    at: Shape

    @property
    def local(self) -> Box:
        """The same cells, in the rank's own coordinates."""
        return Box(self.at, tuple(map(int.__add__, self.at, self.box.shape)))


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of one tensor.

    ``shape`` is the shape of the rank's own tensor; ``spans[axis]`` the runs of the whole tensor's indices that it
    holds along that axis, ascending, in the order in which they lie in the rank's tensor. Along each axis the runs
    may cover less than ``shape``: the rest, at the end, is padding.
    """

    shape: Shape
    spans: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.spans):
            raise ValueError(f"shape has {len(self.shape)} dimensions, spans has {len(self.spans)}")
        for axis, (size, runs) in enumerate(zip(self.shape, self.spans, strict=True)):
            edges = [0, *itertools.chain.from_iterable(runs)]
            if any(a > b for a, b in itertools.pairwise(edges)) or any(run.size <= 0 for run in runs):
                raise ValueError(f"axis {axis}: runs {[tuple(r) for r in runs]} are not ascending and apart")
            if sum(run.size for run in runs) > size:
                raise ValueError(f"axis {axis}: runs cover {sum(r.size for r in runs)} cells of a shard of {size}")

    def pieces(self) -> Iterator[Piece]:
        """The rectangular regions, in the order of the rank's own tensor.

        >>> shard = Shard((4, 5), ((Span(0, 2), Span(8, 10)), (Span(0, 5),)))
        >>> for piece in shard.pieces():
        ...     print(piece.box.start, piece.box.stop, "at", piece.at)
        (0, 0) (2, 5) at (0, 0)
        (8, 0) (10, 5) at (2, 0)
        """
        placed = []
        for runs in self.spans:
            starts = itertools.accumulate((run.size for run in runs), initial=0)
            placed.append(list(zip(runs, starts, strict=False)))
        for combination in itertools.product(*placed):
            box = Box(tuple(run.start for run, _ in combination), tuple(run.stop for run, _ in combination))
            yield Piece(box, tuple(begin for _, begin in combination))

    @property
    def volume(self) -> int:
        """Cells of the rank's own tensor, padding included."""
        return math.prod(self.shape)

    @property
    def covered(self) -> int:
        """Cells that come from the whole tensor."""
        return math.prod(sum(run.size for run in runs) for runs in self.spans)

    @classmethod
    def whole(cls, shape: Shape) -> Shard:
        return cls(shape, tuple((Span(0, n),) if n else () for n in shape))


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One tensor's distribution: the whole shape, and each rank's shard (None: the rank holds nothing of it)."""

    shape: Shape
    shards: tuple[Shard | None, ...]
    _hash: int = field(init=False, repr=False)  # thousands of tensors share a layout: it is the key of many tables

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.shape, self.shards)))
        for rank, shard in enumerate(self.shards):
            if shard is None:
                continue
            if len(shard.shape) != len(self.shape):
                raise ValueError(f"rank {rank}: {len(shard.shape)} dimensions, the tensor has {len(self.shape)}")
            for axis, (size, runs) in enumerate(zip(self.shape, shard.spans, strict=True)):
                if runs and runs[-1].stop > size:
                    raise ValueError(f"rank {rank}: axis {axis} ends at {size}, a run ends at {runs[-1].stop}")

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Layout) and self.shape == other.shape and self.shards == other.shards
        )

    @staticmethod
    @lru_cache(maxsize=1024)
    def replicated(shape: Shape, ranks: int) -> Layout:
        """Every rank holds everything; with one rank, the layout of a full checkpoint."""
        return Layout(shape, (Shard.whole(shape),) * ranks)

    @classmethod
    def along(cls, shape: Shape, axis: int, runs: list[tuple[Span, ...]], sizes: list[int]) -> Layout:
        """Cut along one axis: rank r holds ``runs[r]`` of it in a tensor of ``sizes[r]`` along that axis."""
        full = Shard.whole(shape).spans
        return cls(
            shape,
            tuple(
                Shard((*shape[:axis], size, *shape[axis + 1 :]), (*full[:axis], own, *full[axis + 1 :]))
                for own, size in zip(runs, sizes, strict=True)
            ),
        )

    @property
    def ranks(self) -> int:
        return len(self.shards)

    @property
    def cut_axes(self) -> tuple[int, ...]:
        """The axes along which some rank holds less than everything."""
        return tuple(
            axis
            for axis, size in enumerate(self.shape)
            if any(s is not None and sum(run.size for run in s.spans[axis]) < size for s in self.shards)
        )

    @property
    def is_replicated(self) -> bool:
        whole = Shard.whole(self.shape)
        return all(shard == whole for shard in self.shards)

    @property
    def padding(self) -> int:
        """Cells of padding, all ranks together."""
        return sum(shard.volume - shard.covered for shard in self.shards if shard)

    def owners(self, axis: int) -> list[tuple[Span, tuple[int, ...]]]:
        """Who holds what along one axis: ascending runs that cover it, each with its ranks.

        >>> layout = Layout.along((6,), 0, [(Span(0, 4),), (Span(2, 6),)], [4, 4])
        >>> [(tuple(run), ranks) for run, ranks in layout.owners(0)]
        [((0, 2), (0,)), ((2, 4), (0, 1)), ((4, 6), (1,))]
        """
        held = [shard.spans[axis] if shard else () for shard in self.shards]
        edges = sorted({0, self.shape[axis], *(edge for runs in held for run in runs for edge in run)})
        return [
            (Span(a, b), tuple(r for r, runs in enumerate(held) if any(s <= a and b <= e for s, e in runs)))
            for a, b in itertools.pairwise(edges)
        ]

    def tiles(self) -> list[tuple[int, Piece]]:
        """Every cell exactly once: pieces of the whole tensor, each with the lowest rank that holds it.

        Raises InputError where some cell is held by no rank.
        """
        if 0 in self.shape:
            return []
        found: list[tuple[int, Piece]] = []
        runs_of_axis = [[run for run, _ in self.owners(axis)] for axis in range(len(self.shape))]
        for combination in itertools.product(*runs_of_axis):
            box = Box(tuple(r.start for r in combination), tuple(r.stop for r in combination))
            holder = self._first_holder(box)
            if holder is None:
                raise InputError(f"cells {list(box.start)} to {[n - 1 for n in box.stop]} are held by no rank")
            found.append(holder)
        return _joined(found)

    def _first_holder(self, box: Box) -> tuple[int, Piece] | None:
        for rank, shard in enumerate(self.shards):
            for piece in shard.pieces() if shard else ():
                if piece.box.intersect(box) == box:
                    at = tuple(p + b - s for p, b, s in zip(piece.at, box.start, piece.box.start, strict=True))
                    return rank, Piece(box, at)
        return None


def _joined(tiles: list[tuple[int, Piece]]) -> list[tuple[int, Piece]]:
    """Neighbouring tiles of one rank along the last differing axis made one, so that the count stays O(pieces)."""
    out: list[tuple[int, Piece]] = []
    for rank, piece in tiles:
        if out and out[-1][0] == rank:
            last = out[-1][1]
            differ = [k for k, (a, b) in enumerate(zip(last.box.start, piece.box.start, strict=True)) if a != b]
            if len(differ) == 1:
                axis = differ[0]
                same_rest = all(
                    a == b for k, (a, b) in enumerate(zip(last.box.stop, piece.box.stop, strict=True)) if k != axis
                )
                if (
                    same_rest
                    and last.box.stop[axis] == piece.box.start[axis]
                    and last.local.stop[axis] == piece.at[axis]
                ):
                    out[-1] = (rank, Piece(Box(last.box.start, piece.box.stop), last.at))
                    continue
        out.append((rank, piece))
    return out


def in_bytes(layout: Layout, bits: int) -> Layout:
    """The same layout with the last axis counted in bytes, for a dtype of ``bits`` bits an element.

    Copies then need no dtype. A scalar becomes one axis. Raises InputError where a cut falls inside a byte.

    >>> in_bytes(Layout.replicated((3, 4), 1), 16).shape
    (3, 8)
    """
    if not layout.shape:
        if bits % 8:
            raise InputError(f"a scalar of {bits} bits does not fill its byte")
        flat = Shard.whole((bits // 8,))
        return Layout(flat.shape, tuple(shard and flat for shard in layout.shards))

    def scaled(count: int) -> int:
        if count * bits % 8:
            raise InputError(f"a cut at element {count} of the last axis falls inside a byte ({bits} bits an element)")
        return count * bits // 8

    def convert(shard: Shard | None) -> Shard | None:
        if shard is None:
            return None
        last = tuple(Span(scaled(a), scaled(b)) for a, b in shard.spans[-1])
        return Shard((*shard.shape[:-1], scaled(shard.shape[-1])), (*shard.spans[:-1], last))

    return Layout((*layout.shape[:-1], scaled(layout.shape[-1])), tuple(map(convert, layout.shards)))
