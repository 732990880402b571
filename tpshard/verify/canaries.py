"""Faults to plant in memory, to prove in every run that the comparison would have seen them.

Each gives the ranks some cells that are not theirs, in one tensor. What a model has not (no key-value heads shared by
ranks, no bias after a sum) is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from tpshard.verify.execution import Subject
from tpshard.verify.families import sizes_of
from tpshard.verify.generic import Index, Rearrangement
from tpshard.verify.values import Weights, added_once, layer_of, owned_index

ATTENTION = re.compile(r"att(n|ention)|q_proj|query|qkv", re.IGNORECASE)
CANDIDATES = 3  # tensors that a fault is planted in, one after another, until it is seen


@dataclass(frozen=True, slots=True)
class Canary:
    """A fault's name and where it may be planted; ``absent``: why nowhere."""

    name: str
    plants: tuple[Plant, ...]
    absent: str = ""


@dataclass(frozen=True, slots=True)
class Plant:
    tensor: str
    rearrangement: Rearrangement | None = None
    doubled: frozenset[str] = frozenset()


def canaries(subject: Subject, weights: Weights, visited: set[str]) -> Iterator[Canary]:
    """All faults of the list, for layers that the run has ``visited``."""
    found = _Planter(subject, weights, visited)
    yield _canary("head swap", found.head_swaps(), "no attention heads are cut")
    yield _canary("channel swap", found.channel_swaps(), "no matrix is called")
    yield _canary("row bias added by every rank", found.doubled_biases(), "no row layer has a bias")
    yield _canary("ranks in reverse order", found.reversed_ranks(), "no row layer is cut")
    yield _canary("wrong key-value replica", found.wrong_replicas(), "no heads are shared by some of the ranks")
    yield _canary("shifted vocabulary range", found.shifted_words(), "no table is cut")


def _canary(name: str, plants: Iterator[Plant], absent: str) -> Canary:
    some = tuple(plant for plant, _ in zip(plants, range(CANDIDATES), strict=False))
    return Canary(name, some, "" if some else absent)


class _Planter:
    def __init__(self, subject: Subject, weights: Weights, visited: set[str]) -> None:
        self.weights = weights
        order = {layer.name: place for place, layer in enumerate(subject.layers) if layer.path in visited}
        reached = [name for name in weights.names if layer_of(name) in order]
        self.names = sorted(reached, key=lambda name: order[layer_of(name)])  # as they are run: faults show early
        modules = dict(subject.model.skeleton.named_modules())
        self.tables = {
            name
            for parameter, recipe in subject.model.recipes.items()
            for name in recipe.names
            if isinstance(modules[layer_of(parameter)], nn.Embedding)
        }

    def head_swaps(self) -> Iterator[Plant]:
        """The first rank's first head and the last rank's last."""
        sizes = sizes_of(self.weights.config)
        for name, axis in self._cut("column"):
            unit = (sizes.head if sizes else None) or self._unit(name, axis)
            if ATTENTION.search(name) and self._last(name) % unit == 0:
                yield from self._exchange(name, axis, unit)

    def channel_swaps(self) -> Iterator[Plant]:
        """The first rank's first row or column and the last rank's last; where nothing is cut, of the whole."""
        for name, axis in self._cut("column"):
            if not ATTENTION.search(name):
                yield from self._exchange(name, axis, 1)
        if self.weights.ranks == 1 or not any(True for _ in self._cut("column")):
            for name in self.names:
                if len(self.weights.layout(name).shape) >= 2 and name not in self.tables:
                    yield from self._exchange(name, 0, 1)

    def doubled_biases(self) -> Iterator[Plant]:
        once = added_once(self.weights)
        return (Plant(name, doubled=frozenset({name})) for name in self.names if name in once)

    def reversed_ranks(self) -> Iterator[Plant]:
        for name, axis in self._cut("row"):
            ranks = self._holders(name)
            if name not in self.tables and len(ranks) > 1:
                yield self._from_other(name, axis, dict(zip(ranks, reversed(ranks), strict=True)))

    def wrong_replicas(self) -> Iterator[Plant]:
        """The first rank has the last rank's."""
        for name, axis in self._cut("column"):
            shared = {len(ranks) for _, ranks in self.weights.layout(name).owners(axis)}
            ranks = self._holders(name)
            first, last = (owned_index(self.weights, name, rank, axis).tolist() for rank in (ranks[0], ranks[-1]))
            if max(shared) > 1 and first != last:
                yield self._from_other(name, axis, {ranks[0]: ranks[-1]})

    def shifted_words(self) -> Iterator[Plant]:
        for name in self.names:
            layout = self.weights.layout(name)
            if name in self.tables and layout.cut_axes:
                (axis, *_), size = layout.cut_axes, layout.shape[layout.cut_axes[0]]
                yield _moved(name, axis, lambda _, index, size=size: (index + 1) % size)  # type: ignore[misc]

    def _cut(self, rule: str) -> Iterator[tuple[str, int]]:
        """Matrices of a rule that are cut along one axis, and the axis."""
        for name in self.names:
            layout = self.weights.layout(name)
            if self.weights.role(name).rule == rule and len(layout.shape) >= 2 and len(layout.cut_axes) == 1:
                yield name, layout.cut_axes[0]

    def _holders(self, name: str) -> list[int]:
        return [rank for rank, shard in enumerate(self.weights.layout(name).shards) if shard is not None]

    def _unit(self, name: str, axis: int) -> int:
        """The largest run that no rank's edge falls into."""
        shards = self.weights.layout(name).shards
        return math.gcd(*(edge for shard in shards if shard for run in shard.spans[axis] for edge in run)) or 1

    def _last(self, name: str) -> int:
        return self.weights.layout(name).shape[self.weights.layout(name).cut_axes[0]]

    def _exchange(self, name: str, axis: int, unit: int) -> Iterator[Plant]:
        ranks = self._holders(name)
        first = owned_index(self.weights, name, ranks[0], axis)[:unit].numpy()
        last = owned_index(self.weights, name, ranks[-1], axis)[-unit:].numpy()
        if len(first) == len(last) == unit and not set(first.tolist()) & set(last.tolist()):
            order = np.arange(self.weights.layout(name).shape[axis])
            order[first], order[last] = last, first
            yield _moved(name, axis, lambda _, index: order[index])

    def _from_other(self, name: str, axis: int, other: Mapping[int, int]) -> Plant:
        """Ranks have what another should have, as far as that goes."""
        own = [owned_index(self.weights, name, rank, axis).numpy() for rank in range(self.weights.ranks)]

        def moved(rank: int, index: Index) -> Index:
            places = np.argsort(own[rank])
            at = places[np.searchsorted(own[rank], index, sorter=places)]
            theirs = own[other.get(rank, rank)]
            return theirs[np.minimum(at, len(theirs) - 1)] if len(theirs) else index

        return _moved(name, axis, moved)


def _moved(name: str, axis: int, moved: Callable[[int, Index], Index]) -> Plant:
    return Plant(name, Rearrangement({name: (axis, moved)}))
