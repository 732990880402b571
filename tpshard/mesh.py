"""Ranks as a grid of named axes: pipeline stages, groups of experts, tensor parallelism.

A rule deals a tensor to the tensor-parallel ranks of one group; this module places that layout in the grid: whole
experts go to groups, layers to stages, everything else to all. A rank that has no part in a tensor holds nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tpshard.errors import PolicyError
from tpshard.layout import Layout, Shard, Span

AXES = ("pp", "ep", "tp")


class Coordinates(NamedTuple):
    """Where a rank stands, each counted from 0."""

    pp: int
    ep: int
    tp: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """``pp`` stages of ``ep`` groups of ``tp`` ranks; a rank's number counts tp fastest, then ep, then pp.

    >>> mesh = Mesh(tp=4, ep=2)
    >>> mesh.ranks, mesh.coordinates(6)
    (8, Coordinates(pp=0, ep=1, tp=2))
    """

    tp: int
    ep: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.pp * self.ep * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        return Coordinates(rank // (self.ep * self.tp), rank // self.tp % self.ep, rank % self.tp)

    @property
    def is_grid(self) -> bool:
        """Whether there is more than tensor parallelism."""
        return self.ep > 1 or self.pp > 1

    def as_data(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def place(self, rank: int) -> Mapping[str, int]:
        """A rank's coordinates along the axes that are longer than one, and along tp.

        >>> Mesh(tp=2, pp=3).place(5)
        {'pp': 2, 'tp': 1}
        """
        at = self.coordinates(rank)
        return {axis: getattr(at, axis) for axis in AXES if axis == "tp" or getattr(self, axis) > 1}


@dataclass(frozen=True, slots=True)
class Grid:
    """How a checkpoint is dealt. ``whole_experts``: the tensor-parallel ranks, too, get whole experts rather than a
    part of each; ``layers``: how many layers each stage has (empty: balanced by bytes)."""

    mesh: Mesh
    whole_experts: bool = False
    layers: tuple[int, ...] = field(default=())

    @classmethod
    def of(cls, wanted: int | Grid) -> Grid:
        """A number alone is of tensor-parallel ranks."""
        return wanted if isinstance(wanted, Grid) else cls(Mesh(wanted))

    @property
    def groups(self) -> int:
        """Into how many the experts are dealt."""
        return self.mesh.ep * (self.mesh.tp if self.whole_experts else 1)

    @property
    def deals_experts(self) -> bool:
        return self.groups > 1


@dataclass(frozen=True, slots=True)
class Experts:
    """Of a tensor that belongs to experts: how many there are, and which one it is, or the axis that counts them."""

    count: int
    number: int | None = None
    axis: int | None = None


def group_of(expert: int, count: int, groups: int) -> int:
    """Experts go to groups in ascending runs of equal length. Raises PolicyError where they cannot."""
    if count % groups:
        works = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise PolicyError(
            f"{count} experts cannot be dealt to {groups} groups", hint=f"numbers of groups that work: {works}"
        )
    return expert // (count // groups)


def place(layout: Layout, grid: Grid, experts: Experts | None, stages: Sequence[int] | None) -> Layout:
    """The layout in the grid of one that deals a tensor to the ranks of a group.

    ``experts``: None for what belongs to no expert; ``stages``: those that hold the tensor, None for all of them.
    With whole experts on tensor-parallel ranks, ``layout`` must be that of a single rank for tensors of experts.
    """
    mesh = grid.mesh
    if experts is None or not grid.deals_experts:
        group = layout.shards * mesh.ep
    elif experts.number is not None:
        group = _one_expert(layout, grid, group_of(experts.number, experts.count, grid.groups))
    else:
        group = _stacked(layout, grid, experts)
    nothing: tuple[Shard | None, ...] = (None,) * len(group)
    shards = (group if stages is None or stage in stages else nothing for stage in range(mesh.pp))
    return Layout(layout.shape, tuple(shard for stage in shards for shard in stage))


def _one_expert(layout: Layout, grid: Grid, owner: int) -> tuple[Shard | None, ...]:
    nothing: tuple[Shard | None, ...] = (None,) * layout.ranks
    return tuple(shard for group in range(grid.groups) for shard in (layout.shards if group == owner else nothing))


def _stacked(layout: Layout, grid: Grid, experts: Experts) -> tuple[Shard | None, ...]:
    """Of experts in one tensor each group has a run along their axis."""
    assert experts.axis is not None
    group_of(0, experts.count, grid.groups)  # refuses
    each = experts.count // grid.groups
    return tuple(
        shard and _only(shard, experts.axis, Span(group * each, (group + 1) * each))
        for group in range(grid.groups)
        for shard in layout.shards
    )


def _only(shard: Shard, axis: int, run: Span) -> Shard:
    shape = (*shard.shape[:axis], run.size, *shard.shape[axis + 1 :])
    return Shard(shape, (*shard.spans[:axis], (run,), *shard.spans[axis + 1 :]))
