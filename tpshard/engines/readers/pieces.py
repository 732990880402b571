"""A rank's part of a tensor from the boxes that a file lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tpshard.layout import Layout, Piece, Shape, Shard, Span


def shard_of(own: Shape, pieces: Iterable[Piece]) -> Shard:
    """The shard of shape ``own`` that consists of these pieces. Raises ValueError where they are no product of runs
    along the axes, or leave a cell of it out.

    >>> from tpshard.layout import Box
    >>> pieces = [Piece(Box((6, 0), (8, 5)), (2, 0)), Piece(Box((0, 0), (2, 5)), (0, 0))]
    >>> shard_of((4, 5), pieces).spans[0]
    (Span(start=0, stop=2), Span(start=6, stop=8))
    """
    found = {piece for piece in pieces if piece.box.volume}
    spans = []
    for axis in range(len(own)):
        runs = sorted({(p.at[axis], p.box.start[axis], p.box.stop[axis]) for p in found})
        spans.append(tuple(Span(start, stop) for _, start, stop in runs))
    shard = Shard(own, tuple(spans))
    if found and set(shard.pieces()) != found:
        raise ValueError(f"its {len(found)} pieces are no product of runs along each axis")
    if (shard.covered if found else 0) != shard.volume:
        raise ValueError(f"its pieces cover {shard.covered if found else 0} of {shard.volume} cells")
    return shard


def cut_in_order(sizes: Sequence[int], shape: Shape, axis: int) -> Layout:
    """Ranks one after another along ``axis``, each with its own size; ``shape`` is any rank's.

    >>> [shard.spans[0] for shard in cut_in_order([3, 2], (3, 7), 0).shards]
    [(Span(start=0, stop=3),), (Span(start=3, stop=5),)]
    """
    ends = [sum(sizes[: rank + 1]) for rank in range(len(sizes))]
    runs: list[tuple[Span, ...]] = [
        (Span(end - size, end),) if size else () for size, end in zip(sizes, ends, strict=True)
    ]
    return Layout.along((*shape[:axis], ends[-1], *shape[axis + 1 :]), axis, runs, list(sizes))
