"""One of several tensors whose rows follow one another in a joined one."""

from __future__ import annotations

from tpshard.checkpoint import Place
from tpshard.engines.readers.reading import Held
from tpshard.errors import InputError, printable
from tpshard.header import byte_count
from tpshard.layout import Layout, Shard, Span
from tpshard.views import strided


def rows_between(name: str, joined: Held, start: int, stop: int, head: int = 0) -> Held:
    """Rows ``start`` to ``stop`` of the joined tensor as one of its own. ``head``: the rows of one head, where its two
    halves are rows in turn. Raises InputError where a rank's part is not one run of its rows, or not whole heads."""
    rest = joined.layout.shape[1:]
    if (start, stop, head) == (0, joined.layout.shape[0] if joined.layout.shape else 0, 0) or not joined.layout.shape:
        return joined
    shards: list[Shard | None] = []
    places: list[Place | None] = []
    for shard, place in zip(joined.layout.shards, joined.places, strict=True):
        if shard is None or place is None:
            shards.append(None)
            places.append(None)
            continue
        first, runs = _own_rows(name, shard, start, stop)
        size = sum(run.size for run in runs)
        width = byte_count(joined.dtype, (1, *shard.shape[1:]))
        if head and any(edge % head for run in runs for edge in run):
            raise InputError(f"{printable(name)}: ranks hold parts of heads of {head} rows, which are in turn")
        axes, steps = (size // head if head else 0, 2, head // 2, width), (head * width, width, 2 * width, 1)
        shards.append(Shard((size, *shard.shape[1:]), (runs, *shard.spans[1:])))
        places.append(Place(place.file, place.offset + first * width, strided(axes, steps) if head and size else None))
    return Held(joined.dtype, Layout((stop - start, *rest), tuple(shards)), tuple(places))


def _own_rows(name: str, shard: Shard, start: int, stop: int) -> tuple[int, tuple[Span, ...]]:
    """Where a rank's rows of the part begin in its own tensor, and which they are."""
    found: list[tuple[int, Span]] = []
    at = 0
    for run in shard.spans[0]:
        own = Span(max(run.start, start), min(run.stop, stop))
        if own.size > 0:
            found.append((at + own.start - run.start, Span(own.start - start, own.stop - start)))
        at += run.size
    end = found[0][0] if found else 0
    for begin, run in found:
        if begin != end:
            raise InputError(f"{printable(name)}: its rows on a rank are not one run")
        end += run.size
    if shard.spans[0] and sum(run.size for run in shard.spans[0]) != shard.shape[0]:
        raise InputError(f"{printable(name)}: is padded, and joined with others")
    return (found[0][0] if found else 0), tuple(run for _, run in found)
