"""How one axis is dealt to the ranks: blocks, units that may not be cut, replication, padding.

Pure arithmetic: no YAML, no names, no files. An axis is a row of blocks (``q | k | v``), each of ``count``
indivisible units of ``width`` cells; every block is dealt on its own and each rank holds its units of every block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tpshard.errors import PolicyError
from tpshard.layout import Layout, Shape, Span

LARGEST_TP_LISTED = 128


@dataclass(frozen=True, slots=True)
class Block:
    """``count`` indivisible units of ``width`` cells. ``named``: the policy speaks of these units (heads, unit,
    parts), so they may be replicated but not dealt unevenly without being told."""

    count: int
    width: int
    named: bool = True


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rule says of one axis.

    ``replicable``: fewer units than ranks may be copied to neighbours (column rules; a row rule would add them
    twice). ``uneven``: ranks may get one unit more than others. ``pad``: the axis is padded to a multiple of
    ``pad * ranks`` cells.
    """

    blocks: tuple[Block, ...]
    replicable: bool = True
    uneven: bool = False
    pad: int = 0


def cut_layout(shape: Shape, axis: int, cut: Cut, ranks: int) -> Layout:
    """The layout of a tensor whose ``axis`` is dealt by ``cut``.

    Raises PolicyError, with the rank counts that would work, where the units do not go into the ranks.
    """
    size = shape[axis]
    covered = sum(block.count * block.width for block in cut.blocks)
    if covered != size:
        raise PolicyError(f"parts cover {covered} of {size} along axis {axis}")
    if cut.pad:
        return _padded(shape, axis, cut, ranks)
    runs: list[tuple[Span, ...]] = []
    for rank in range(ranks):
        own: list[Span] = []
        base = 0
        for block in cut.blocks:
            first, last = _units(block, cut, ranks, rank)
            if first < last and block.width:
                own.append(Span(base + first * block.width, base + last * block.width))
            base += block.count * block.width
        runs.append(_merged(own))
    return Layout.along(shape, axis, runs, [sum(run.size for run in own) for own in runs])


def _units(block: Block, cut: Cut, ranks: int, rank: int) -> tuple[int, int]:
    """The half-open range of a block's units that a rank holds."""
    count = block.count
    if count % ranks == 0:
        return rank * count // ranks, (rank + 1) * count // ranks
    if count and ranks % count == 0 and block.named and cut.replicable and not cut.uneven:
        unit = rank // (ranks // count)  # repeat-interleave: neighbours share a unit
        return unit, unit + 1
    if cut.uneven or not block.named:
        share, extra = divmod(count, ranks)
        first = rank * share + min(rank, extra)
        return first, first + share + (rank < extra)
    raise PolicyError(_misfit(cut, count, ranks), hint=_legal_hint(legal_ranks([cut])))


def _misfit(cut: Cut, count: int, ranks: int) -> str:
    noun = "unit" if count == 1 else "units"
    if not cut.replicable and ranks % count == 0:
        return f"{count} {noun} cannot be dealt to {ranks} ranks: a row rule may not replicate"
    return f"{count} {noun} cannot be dealt to {ranks} ranks"


def _legal_hint(legal: list[int]) -> str:
    shown = ", ".join(map(str, legal[:12])) + (" …" if len(legal) > 12 else "")
    return f"--tp that works: {shown}; or set uneven: true"


def legal_ranks(cuts: Iterable[Cut], most: int = LARGEST_TP_LISTED) -> list[int]:
    """The rank counts up to ``most`` at which every cut can be dealt."""
    cuts = list(cuts)
    return [ranks for ranks in range(1, most + 1) if all(_fits(cut, ranks) for cut in cuts)]


def _fits(cut: Cut, ranks: int) -> bool:
    return bool(cut.uneven or cut.pad) or all(
        not block.named or block.count % ranks == 0 or (cut.replicable and block.count > 0 and ranks % block.count == 0)
        for block in cut.blocks
    )


def _padded(shape: Shape, axis: int, cut: Cut, ranks: int) -> Layout:
    (block,) = cut.blocks
    size = block.count * block.width
    per_rank = -(-size // (cut.pad * ranks)) * cut.pad
    runs: list[tuple[Span, ...]] = []
    for rank in range(ranks):
        run = Span(min(rank * per_rank, size), min((rank + 1) * per_rank, size))
        runs.append((run,) if run.size else ())
    return Layout.along(shape, axis, runs, [per_rank] * ranks)


def _merged(runs: list[Span]) -> tuple[Span, ...]:
    """Touching runs made one: a copy is then as long as it can be."""
    out: list[Span] = []
    for run in runs:
        if out and out[-1].stop == run.start:
            out[-1] = Span(out[-1].start, run.stop)
        else:
            out.append(run)
    return tuple(out)
