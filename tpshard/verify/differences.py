"""Where a rank holds other cells than it should: what went wrong, and the first wrong cell, in words."""

from __future__ import annotations

import itertools

import numpy as np

from tpshard.checkpoint import Stored
from tpshard.verify.axes import Index, Part
from tpshard.verify.report import Finding


def describe_difference(
    tensor: Stored, axis: int, parts: list[Part], have: list[Index], want: list[Index], partner: str | None
) -> Finding:
    """The finding for a tensor of which at least one rank holds other cells than it should.

    ``have`` and ``want`` are the ranks' indices along ``axis``; ``partner`` is a tensor of the same block that is
    dealt as it should be, if there is one.
    """
    rank = next(r for r, (a, b) in enumerate(zip(have, want, strict=True)) if not np.array_equal(a, b))
    first = _first_cell(parts, have[rank], want[rank])
    order = _rank_order(have, want)
    inside = _cut_inside(tensor, axis, parts)
    if order:
        other = f"differs from {partner}" if partner else f"must be {sorted(order)}"
        what = f"rank order {order} {other}: {_range(parts, have[rank], want[rank]) or first}"
    elif inside:
        rank, what = inside
    else:
        what = _absent(parts, have[rank], want[rank], first) or _range(parts, have[rank], want[rank]) or first
    return Finding(what, tensor=tensor.name, rank=rank)


def _rank_order(have: list[Index], want: list[Index]) -> list[int]:
    """Whose part each rank holds, where the parts are right and only the ranks are not; else empty."""
    order: list[int] = []
    free = set(range(len(want)))
    for rank, own in enumerate(have):
        fitting = [r for r in (rank, *sorted(free)) if r in free and np.array_equal(own, want[r])]
        if not fitting:
            return []
        order.append(fitting[0])
        free.discard(fitting[0])
    return order


def _cut_inside(tensor: Stored, axis: int, parts: list[Part]) -> tuple[int, str] | None:
    """The first rank with an edge between two cells of one unit."""
    for rank, shard in enumerate(tensor.layout.shards):
        for edge in itertools.chain.from_iterable(shard.spans[axis] if shard else ()):
            base = 0
            for part in parts:
                unit, cell = divmod(edge - base, part.width)
                if 0 <= edge - base < part.cells and cell:
                    line = "column" if axis else "row"
                    kind = part.label.split()[-1]
                    inside = f"{part.label} {unit + part.first} ({kind} size {part.width})"
                    return rank, f"cut at {line} {edge} is inside {inside}"
                base += part.cells
    return None


def _absent(parts: list[Part], have: Index, want: Index, first: str) -> str | None:
    """A part of which the rank should hold something and holds nothing."""
    base = 0
    for part in parts:
        if _meets(want, base, base + part.cells) and not _meets(have, base, base + part.cells):
            return f"holds no {part.label}s: {first}"
        base += part.cells
    return None


def _meets(cells: Index, start: int, stop: int) -> bool:
    return bool(np.any((cells >= start) & (cells < stop)))


def _range(parts: list[Part], have: Index, want: Index) -> str | None:
    """Both ranges, where the axis simply counts and each rank has one run of it."""
    if len(parts) > 1 or parts[0].width > 1 or not all(len(x) and x[-1] - x[0] == len(x) - 1 for x in (have, want)):
        return None
    return f"holds {parts[0].label}s {have[0]} to {have[-1]}, must hold {want[0]} to {want[-1]}"


def _first_cell(parts: list[Part], have: Index, want: Index) -> str:
    pairs = enumerate(itertools.zip_longest(have.tolist(), want.tolist()))
    place, (a, b) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    return f"cell {place} of the rank's cut axis is {_cell(parts, a)}, config.json asks for {_cell(parts, b)}"


def _cell(parts: list[Part], index: int | None) -> str:
    if index is None:
        return "nothing more"
    for part in parts:
        if index < part.cells:
            unit = f"{part.label} {index // part.width + part.first}"
            return unit if part.width == 1 else f"{unit} (cell {index % part.width} of {part.width})"
        index -= part.cells
    raise AssertionError("beyond the axis")
