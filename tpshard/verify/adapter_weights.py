"""An adapter and its base as one model's weights: ``W' = W + s B A``, region by region, in float64.

The reference's come of the whole A, B and W. A rank's come of its own A and B and of its region of W, as the policy
cuts it: local rows and columns are added as an engine would add them, so a shard of B that holds other rows than the
base's does not go unseen. DoRA scales each output by its magnitude over the norm of ``W'`` along the in axis; where
that axis is cut, the ranks' squares are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tpshard.adapter_layout import Placed
from tpshard.assignment import Assignment
from tpshard.layout import Box, Layout, Shape
from tpshard.roles import Role
from tpshard.verify.blocks import CHUNK
from tpshard.verify.generic import GenericWeights, Rearrangement
from tpshard.verify.values import WHOLE, Place, Weights


class BaseWeights:
    """A base model's tensors, each with the layout that the policy gives it. ``whole``: where its numbers are; without
    it there are none, and only what GenericWeights puts in their place is read."""

    def __init__(
        self,
        dtypes: Mapping[str, str],
        assigned: Mapping[str, Assignment],
        ranks: int,
        config: Mapping[str, Any],
        folder: Path,
        whole: Weights | None = None,
    ) -> None:
        self._dtypes, self._assigned, self._whole = dtypes, assigned, whole
        self.ranks, self.names, self.config, self.folder = ranks, tuple(dtypes), config, folder

    def dtype(self, name: str) -> str:
        return self._dtypes[name]

    def layout(self, name: str) -> Layout:
        return self._assigned[name].layout

    def role(self, name: str) -> Role:
        return self._assigned[name].role

    def held(self, name: str, rank: int) -> Sequence[Place]:
        shard = self.layout(name).shards[rank]
        return [(rank, piece) for piece in shard.pieces()] if shard else []

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        assert self._whole is not None
        if holder == WHOLE:
            return self._whole.read(name, WHOLE, box)
        own: torch.Tensor | None = None
        for _, piece in self.held(name, holder):
            part = piece.local.intersect(box)
            if part is None:
                continue
            there = part.translate(_minus(piece.box.start, piece.local.start))
            values = self._whole.read(name, WHOLE, there)
            own = torch.zeros(box.shape, dtype=values.dtype) if own is None else own
            own[part.translate(_minus((0,) * len(box.start), box.start)).slices()] = values
        return torch.zeros(box.shape, dtype=torch.float64) if own is None else own


class MergedWeights:
    """A base's weights with an adapter's merged into them."""

    def __init__(self, base: Weights, adapter: Weights, placed: Sequence[Placed], replaced: Mapping[str, str]) -> None:
        self._base, self._adapter, self._replaced = base, adapter, replaced
        self._placed = {place.name: place for place in placed}
        self._biases = {f"{place.name.rpartition('.')[0]}.bias": place.target for place in placed if place.target.bias}
        self._norms: dict[tuple[str, int], torch.Tensor] = {}
        self.names = tuple(dict.fromkeys((*base.names, *replaced)))
        self.ranks, self.config, self.folder = adapter.ranks, base.config, base.folder

    def dtype(self, name: str) -> str:
        return self._holder_of(name).dtype(self._replaced.get(name, name))

    def layout(self, name: str) -> Layout:
        return self._holder_of(name).layout(self._replaced.get(name, name))

    def role(self, name: str) -> Role:
        return self._holder_of(name).role(self._replaced.get(name, name))

    def held(self, name: str, rank: int) -> Sequence[Place]:
        return self._holder_of(name).held(self._replaced.get(name, name), rank)

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        place, target = self._placed.get(name), self._biases.get(name)
        if not box.volume or (place is None and target is None):
            return self._plain(name, holder, box)
        if target is not None:
            own = self._adapter.read(target.bias, holder, box).double()
            return self._plain(name, holder, box).double() + target.scaling * own
        assert place is not None
        merged = self._sum(place, holder, box)
        if not place.target.magnitude:
            return merged
        return merged * self._factor(place, holder, box)

    def generic(self, rearranged: Rearrangement | None) -> MergedWeights:
        """The same with numbers that hide nothing for those of both, so that an adapter whose B is zero does not. A
        rearrangement of an adapted weight is one of A or B: faults there must show without any in the base."""
        base, adapter = {}, {}
        for name, (axis, moved) in (rearranged.moved if rearranged else {}).items():
            place = self._placed.get(name)
            if place is not None and axis in (place.out_axis, place.in_axis):
                which = (place.target.b, 0) if axis == place.out_axis else (place.target.a, 1)
                adapter[which[0]] = (which[1], moved)
            elif name in self._replaced:
                adapter[self._replaced[name]] = (axis, moved)
            else:
                base[name] = (axis, moved)
        return MergedWeights(
            GenericWeights(self._base, Rearrangement(base)),
            GenericWeights(self._adapter, Rearrangement(adapter)),
            tuple(self._placed.values()),
            self._replaced,
        )

    def _holder_of(self, name: str) -> Weights:
        return self._adapter if name in self._replaced else self._base

    def _plain(self, name: str, holder: int, box: Box) -> torch.Tensor:
        return self._holder_of(name).read(self._replaced.get(name, name), holder, box)

    def _sum(self, place: Placed, holder: int, box: Box) -> torch.Tensor:
        """``W + s B A`` of a region of a holder's own weight."""
        target, out, into = place.target, place.out_axis, place.in_axis
        rank = self._adapter.layout(target.a).shape[0]
        kernel = [(box.start[axis], box.stop[axis]) for axis in range(2, len(box.start))]
        ins, outs = (box.start[into], box.stop[into]), (box.start[out], box.stop[out])
        a = self._adapter.read(target.a, holder, _box([(0, rank), ins, *kernel])).double()
        b = self._adapter.read(target.b, holder, _box([outs, (0, rank), *[(0, 1)] * len(kernel)])).double()
        product = (b.reshape(-1, rank) @ a.reshape(rank, -1)).reshape(b.shape[0], *a.shape[1:])
        if out == 1:
            product = product.T
        return self._plain(place.name, holder, box).double() + target.scaling * product

    def _factor(self, place: Placed, holder: int, box: Box) -> torch.Tensor:
        """DoRA's: magnitude over norm, for the outputs of a region, so shaped that it multiplies the region."""
        out = place.out_axis
        first, last = box.start[out], box.stop[out]
        shape = self._adapter.layout(place.target.magnitude).shape
        where = _box([(first, last) if size != 1 else (0, 1) for size in shape])
        magnitude = self._adapter.read(place.target.magnitude, holder, where).double().reshape(-1)
        factor = magnitude / self._norm(place, holder)[first:last]
        return factor.reshape([-1 if axis == out else 1 for axis in range(len(box.start))])

    def _norm(self, place: Placed, holder: int) -> torch.Tensor:
        """The norms of all outputs that a holder has; of all ranks together where the in axis is cut."""
        together = holder != WHOLE and place.in_axis in self.layout(place.name).cut_axes
        key = place.name, self.ranks if together else holder
        if key not in self._norms:
            holders = range(self.ranks) if together else (holder,)
            self._norms[key] = torch.stack([self._squares(place, own) for own in holders]).sum(0).sqrt()
        return self._norms[key]

    def _squares(self, place: Placed, holder: int) -> torch.Tensor:
        out = place.out_axis
        shape = own_shape(self, place.name, holder)
        lines = max(1, CHUNK * shape[out] // max(1, torch.Size(shape).numel()))
        found = [torch.zeros(0, dtype=torch.float64)]
        for first in range(0, shape[out], lines):
            edges = [(0, size) for size in shape]
            edges[out] = first, min(first + lines, shape[out])
            found.append(self._sum(place, holder, _box(edges)).movedim(out, 0).flatten(1).square().sum(1))
        return torch.cat(found)


def own_shape(weights: Weights, name: str, holder: int) -> Shape:
    """Of a holder's own tensor; all axes 0 where a rank holds nothing."""
    layout = weights.layout(name)
    if holder == WHOLE:
        return layout.shape
    shard = layout.shards[holder]
    return shard.shape if shard else (0,) * len(layout.shape)


def misfits(base: Weights, adapter: Weights, placed: Sequence[Placed]) -> Iterator[tuple[str, int, str]]:
    """Where a rank's A or B cannot be multiplied into its region of the base: tensor, rank, and the numbers."""
    for place in placed:
        target, sizes = place.target, adapter.layout(place.target.a).shape
        for rank in range(adapter.ranks):
            of_base = own_shape(base, place.name, rank)
            out = of_base[place.out_axis]
            wanted: list[tuple[str, Shape]] = [
                (target.a, (sizes[0], of_base[place.in_axis])),
                (target.b, (out, sizes[0])),
            ]
            wanted += [(name, (out,)) for name in (target.bias, target.magnitude) if name and not target.kernel]
            for name, want in wanted:
                own = own_shape(adapter, name, rank)[: len(want)]
                if own != want:
                    there = f"the rank's {place.name} {list(of_base)}"
                    yield name, rank, f"is {list(own)}, with {there} it must be {list(want)}"


def _box(edges: Sequence[tuple[int, int]]) -> Box:
    return Box(tuple(start for start, _ in edges), tuple(stop for _, stop in edges))


def _minus(one: Shape, other: Shape) -> Shape:
    return tuple(a - b for a, b in zip(one, other, strict=True))
