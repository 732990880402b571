"""Boxes of a tensor, each kept apart: what PyTorch's distributed checkpoints have instead of a rank's own tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tpshard.errors import InputError
from tpshard.layout import Box, Layout, Shape, Shard, Span

MOST_CELLS = 10_000_000  # of the grid that the boxes' edges make; bounds memory


def shard_of(box: Box) -> Shard:
    """A shard that holds exactly one box, which is not empty."""
    return Shard(box.shape, tuple((Span(a, b),) for a, b in zip(box.start, box.stop, strict=True)))


@lru_cache(maxsize=1024)
def stored_once(layout: Layout) -> tuple[Layout, tuple[int, ...]]:
    """Every cell once, in boxes: a layout with each box as a rank of its own, and the rank that has it in ``layout``.
    Of copies the lowest rank's is taken, and no padding. An empty tensor is one box.

    >>> halves = Layout.along((6,), 0, [(Span(0, 4),), (Span(2, 6),)], [8, 8])
    >>> boxes, owners = stored_once(halves)
    >>> [shard.spans for shard in boxes.shards], owners
    ([((Span(start=0, stop=4),),), ((Span(start=4, stop=6),),)], (0, 1))
    """
    if 0 in layout.shape:
        return Layout(layout.shape, (Shard.whole(layout.shape),)), (0,)
    tiles = sorted(layout.tiles(), key=lambda tile: tile[0])
    return Layout(layout.shape, tuple(shard_of(piece.box) for _, piece in tiles)), tuple(rank for rank, _ in tiles)


def box_of(shard: Shard) -> Box:
    """Of a layout of ``stored_once``."""
    return Box(
        tuple(runs[0].start if runs else 0 for runs in shard.spans),
        tuple(runs[0].stop if runs else 0 for runs in shard.spans),
    )


def check_tiled(shape: Shape, boxes: Sequence[Box], where: str) -> None:
    """Raises InputError where boxes leave a hole in a tensor, or overlap.

    >>> check_tiled((4, 3), [Box((0, 0), (2, 3)), Box((1, 0), (4, 3))], "x")
    Traceback (most recent call last):
    tpshard.errors.InputError: x: cells [1, 0] to [1, 2] of shape [4, 3] are in 2 chunks
    """
    if 0 in shape:
        return
    edges = [
        sorted({0, size, *(edge for box in boxes for edge in (box.start[axis], box.stop[axis]))})
        for axis, size in enumerate(shape)
    ]
    cells = [len(own) - 1 for own in edges]
    if np.prod(cells, dtype=float) > MOST_CELLS:
        raise InputError(f"{where}: its {len(boxes)} chunks have edges at {cells} places, which is not read")
    number = [{edge: index for index, edge in enumerate(own)} for own in edges]
    held = np.zeros(cells, np.int32)
    for box in boxes:
        held[tuple(slice(at[a], at[b]) for at, a, b in zip(number, box.start, box.stop, strict=True))] += 1
    wrong = np.argwhere(held != 1)
    if not len(wrong):
        return
    first = tuple(wrong[0].tolist())
    start = [own[at] for own, at in zip(edges, first, strict=True)]
    last = [own[at + 1] - 1 for own, at in zip(edges, first, strict=True)]
    count = int(held[first])
    raise InputError(
        f"{where}: cells {start} to {last} of shape {list(shape)} are in {f'{count} chunks' if count else 'no chunk'}",
        hint=None if count else "a file is missing, or the run that saved it was cut off",
    )
