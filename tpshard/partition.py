"""How one axis is dealt to the ranks: blocks, units that may not be cut, replication, padding.

Pure arithmetic: no YAML, no names, no files. An axis is a row of blocks (``q | k | v``), each of ``count``
indivisible units of ``width`` cells; every block is dealt on its own and each rank holds its units of every block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tpshard.errors import PolicyError
from tpshard.layout import Layout, Shape, Span

LARGEST_TP_LISTED = 128


@dataclass(frozen=True, slots=True)
class Block:
    """``count`` indivisible units of ``width`` cells. ``named``: the policy speaks of these units (heads, unit,
    parts), so they may be replicated but not dealt unevenly without being told. ``short``: the last unit lacks so many
    cells."""

    count: int
    width: int
    named: bool = True
    short: int = 0

    @property
    def cells(self) -> int:
        return self.count * self.width - self.short


@dataclass(frozen=True, slots=True)
class Grain:
    """What quantisation asks of a tensor's cut: so many channels that no rule names go ``together``, and along each
    axis every boundary is a multiple of ``multiples`` (empty: of one)."""

    together: int = 1
    multiples: tuple[int, ...] = ()


ANY = Grain()


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rule says of one axis.

    ``replicable``: fewer units than ranks may be copied to neighbours (column rules; a row rule would add them
    twice). ``uneven``: ranks may get one unit more than others. ``pad``: the axis is padded to a multiple of
    ``pad * ranks`` cells. ``multiple``: boundaries between ranks must be multiples of it, or the axis's end: cells of
    one quantisation block or packed word stay together.
    """

    blocks: tuple[Block, ...]
    replicable: bool = True
    uneven: bool = False
    pad: int = 0
    multiple: int = 1


def cut_layout(shape: Shape, axis: int, cut: Cut, ranks: int) -> Layout:
    """The layout of a tensor whose ``axis`` is dealt by ``cut``.

    Raises PolicyError, with the rank counts that would work, where the units do not go into the ranks.
    """
    size = shape[axis]
    covered = sum(block.cells for block in cut.blocks)
    if covered != size:
        raise PolicyError(f"parts cover {covered} of {size} along axis {axis}")
    runs = _padded(size, cut, ranks) if cut.pad else [_runs(cut, ranks, rank) for rank in range(ranks)]
    _check_boundaries(runs, axis, size, cut)
    lengths = [sum(run.size for run in own) for own in runs]
    return Layout.along(shape, axis, runs, [_per_rank(size, cut, ranks)] * ranks if cut.pad else lengths)


def _runs(cut: Cut, ranks: int, rank: int) -> tuple[Span, ...]:
    """What a rank holds of the axis."""
    own: list[Span] = []
    base = 0
    for block in cut.blocks:
        first, last = _units(block, cut, ranks, rank)
        stop = min(last * block.width, block.cells)
        if first * block.width < stop:
            own.append(Span(base + first * block.width, base + stop))
        base += block.cells
    return _merged(own)


def _check_boundaries(runs: list[tuple[Span, ...]], axis: int, size: int, cut: Cut) -> None:
    """Raises PolicyError where ranks would share a quantisation block or a packed word."""
    for rank, own in enumerate(runs):
        for edge in (edge for run in own for edge in run):
            if _is_inside(edge, size, cut):
                unit = math.lcm(cut.multiple, *(block.width for block in cut.blocks if block.named))
                first = edge // cut.multiple * cut.multiple
                what = (
                    f"rank {rank} would have a boundary at {edge} of axis {axis}, inside the quantised block "
                    f"{first} to {min(first + cut.multiple, size)}"
                )
                other = "" if size % unit else f"; or set unit: {unit} in the rule"
                raise PolicyError(what, hint=f"--tp that works: {listed(legal_ranks([cut]))}{other}")


def _is_inside(edge: int, size: int, cut: Cut) -> bool:
    return edge % cut.multiple != 0 and edge != size


def _units(block: Block, cut: Cut, ranks: int, rank: int) -> tuple[int, int]:
    """The half-open range of a block's units that a rank holds."""
    count = block.count
    if count % ranks == 0:
        return rank * count // ranks, (rank + 1) * count // ranks
    copied = not cut.uneven or (count == 1 and any(other.count > 1 for other in cut.blocks))  # one head for many
    if count and ranks % count == 0 and block.named and cut.replicable and copied:
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
    return f"--tp that works: {listed(legal)}; or set uneven: true"


def listed(legal: list[int]) -> str:
    return ", ".join(map(str, legal[:12])) + (" …" if len(legal) > 12 else "")


def legal_ranks(cuts: Iterable[Cut], most: int = LARGEST_TP_LISTED) -> list[int]:
    """The rank counts up to ``most`` at which every cut can be dealt."""
    cuts = list(cuts)
    return [ranks for ranks in range(1, most + 1) if all(_fits(cut, ranks) for cut in cuts)]


def _fits(cut: Cut, ranks: int) -> bool:
    dealt = bool(cut.uneven or cut.pad) or all(
        not block.named or block.count % ranks == 0 or (cut.replicable and block.count > 0 and ranks % block.count == 0)
        for block in cut.blocks
    )
    if not dealt or cut.multiple == 1:
        return dealt
    size = sum(block.cells for block in cut.blocks)
    runs = _padded(size, cut, ranks) if cut.pad else (_runs(cut, ranks, rank) for rank in range(ranks))
    return not any(_is_inside(edge, size, cut) for own in runs for run in own for edge in run)


def _per_rank(size: int, cut: Cut, ranks: int) -> int:
    return -(-size // (cut.pad * ranks)) * cut.pad


def _padded(size: int, cut: Cut, ranks: int) -> list[tuple[Span, ...]]:
    per_rank = _per_rank(size, cut, ranks)
    runs: list[tuple[Span, ...]] = []
    for rank in range(ranks):
        run = Span(min(rank * per_rank, size), min((rank + 1) * per_rank, size))
        runs.append((run,) if run.size else ())
    return runs


def _merged(runs: list[Span]) -> tuple[Span, ...]:
    """Touching runs made one: a copy is then as long as it can be."""
    out: list[Span] = []
    for run in runs:
        if out and out[-1].stop == run.start:
            out[-1] = Span(out[-1].start, run.stop)
        else:
            out.append(run)
    return tuple(out)
