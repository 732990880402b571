"""The tensors that make up one quantised weight, and how their layouts follow the weight's.

A policy speaks of weights. A quantised weight is stored as several tensors: packed numbers, scales, zero points. Each
of their axes follows an axis of the weight, so many of whose cells share one stored cell: eight in a packed word, 128
in a block. So one division turns the weight's layout into each tensor's, and one multiplication turns it back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from tpshard.assignment import Assigned, Assignment
from tpshard.grid import assign_to_grid
from tpshard.layout import Layout, Shape, Shard, Span
from tpshard.mesh import Grid
from tpshard.partition import Grain
from tpshard.policy import Policy, Rule, channels
from tpshard.roles import Role

Part = Literal["numbers", "scale", "zero", "group", "multiplier", "divisor", "note"]
Packing = Literal["", "words", "awq", "nibbles"]


@dataclass(frozen=True, slots=True)
class Axis:
    """A stored axis that follows axis ``of`` of the weight: one cell for ``per`` of the weight's.

    ``indexed``: which cells share one is not ``i // per`` but is said by a group index. Then any rank may need any of
    them, and the axis stays whole.
    """

    of: int
    per: int = 1
    indexed: bool = False


@dataclass(frozen=True, slots=True)
class Companion:
    """One stored tensor of a weight: ``leaf`` is the last part of its name.

    ``axes``: None for an axis that does not follow the weight (a single scale, the bytes within a block).
    ``packing`` along axis ``packed``: ``words`` of 32 bits, the lowest bits first; ``awq``, the same with its own
    order; ``nibbles`` of bytes, the low one first, for FP4. ``signed``: the packed numbers are moved up by half their
    range. ``plus`` and ``over``: what is added to the stored zero point, what the stored scale is divided by.
    """

    leaf: str
    dtype: str
    part: Part
    shape: Shape
    axes: tuple[Axis | None, ...]
    packing: Packing = ""
    packed: int = -1
    bits: int = 0
    signed: bool = False
    plus: int = 0
    over: int = 1

    def follows(self, stored: int, whole: Shape) -> Axis | None:
        """The weight's axis by which a stored axis is cut. One cell for the whole axis is on every rank, unless it is
        a packed word."""
        axis = self.axes[stored]
        if axis is None or axis.indexed:
            return None
        single = axis.per > 1 and axis.per >= whole[axis.of] and stored != self.packed
        return None if single else axis


@dataclass(frozen=True, slots=True)
class Form:
    """How weights of one shape are stored; the first of the companions holds the numbers. Thousands share a form.

    ``multiples``: for each axis, what every boundary between ranks has to be a multiple of.
    """

    shape: Shape
    companions: tuple[Companion, ...]
    multiples: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        per = [1] * len(self.shape)
        for companion in self.companions:
            for stored in range(len(companion.axes)):
                axis = companion.follows(stored, self.shape)
                if axis is not None:
                    per[axis.of] = math.lcm(per[axis.of], axis.per)
        object.__setattr__(self, "multiples", tuple(per))

    @property
    def numbers(self) -> Companion:
        return self.companions[0]


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as the policy and the model speak of it; ``prefix`` is what its companions' names begin with."""

    name: str
    prefix: str
    form: Form

    @property
    def shape(self) -> Shape:
        return self.form.shape

    def stored(self, companion: Companion) -> str:
        """A companion's whole name."""
        return self.prefix + companion.leaf

    @property
    def stored_names(self) -> list[str]:
        return [self.prefix + companion.leaf for companion in self.form.companions]


@lru_cache(maxsize=4096)
def divided(layout: Layout, companion: Companion) -> Layout:
    """A companion's layout, where its weight has ``layout``.

    >>> weight = Layout.along((6, 64), 1, [(Span(0, 32),), (Span(32, 64),)], [32, 32])
    >>> scales = Companion("scales", "F16", "scale", (4, 6), (Axis(1, 16), Axis(0)))
    >>> [shard.spans[0] for shard in divided(weight, scales).shards]
    [(Span(start=0, stop=2),), (Span(start=2, stop=4),)]
    """
    return Layout(companion.shape, tuple(shard and _divided(shard, layout.shape, companion) for shard in layout.shards))


def _divided(shard: Shard, whole: Shape, companion: Companion) -> Shard:
    shape: list[int] = []
    spans: list[tuple[Span, ...]] = []
    for stored, size in enumerate(companion.shape):
        axis = companion.follows(stored, whole)
        if axis is None:
            shape.append(size)
            spans.append((Span(0, size),) if size else ())
            continue
        runs, length = shard.spans[axis.of], whole[axis.of]
        for edge in (edge for run in runs for edge in run):
            if edge % axis.per and edge != length:
                raise ValueError(f"{companion.leaf}: a boundary at {edge} is not a multiple of {axis.per}")
        shape.append(-(-shard.shape[axis.of] // axis.per))
        spans.append(tuple(Span(a // axis.per, -(-b // axis.per)) for a, b in runs))
    return Shard(tuple(shape), tuple(spans))


@lru_cache(maxsize=4096)
def multiplied(layout: Layout, form: Form) -> Layout:
    """The weight's layout, where its numbers have ``layout``."""

    def convert(shard: Shard | None) -> Shard | None:
        if shard is None:
            return None
        shape, spans = list(form.shape), list(Shard.whole(form.shape).spans)
        for stored, axis in enumerate(form.numbers.axes):
            if axis is not None:
                per, size = axis.per, form.shape[axis.of]
                runs = tuple(Span(a * per, min(b * per, size)) for a, b in shard.spans[stored])
                short = runs[-1].stop % per if runs and runs[-1].stop == size else 0
                shape[axis.of] = shard.shape[stored] * per - (per - short if short else 0)
                spans[axis.of] = runs
        return Shard(tuple(shape), tuple(spans))

    return Layout(form.shape, tuple(map(convert, layout.shards)))


@dataclass(frozen=True, slots=True)
class Quantised:
    """What is quantised in a checkpoint: the weights by their names, and scalars beside them that are no weight's own
    (of a key-value cache). Empty for a dense one. ``method`` as config.json says it."""

    method: str
    weights: Mapping[str, Weight]
    scalars: frozenset[str] = frozenset()

    def names(self, stored: Iterable[str]) -> list[str]:
        """Weights in place of their companions, in the order of their first."""
        owner = {stored: weight.name for weight in self.weights.values() for stored in weight.stored_names}
        return list(dict.fromkeys(owner.get(name, name) for name in stored))

    def shapes(self, stored: Mapping[str, Shape]) -> dict[str, Shape]:
        """Of everything that has to meet a rule."""
        own = {name: weight.shape for name, weight in self.weights.items()}
        names = self.names(name for name in stored if name not in self.scalars)
        return {name: own[name] if name in own else stored[name] for name in names}

    def together(self) -> dict[str, int]:
        """For each stack of blocks, the least common multiple of all that its boundaries must be multiples of."""
        found: dict[str, int] = {}
        distinct = {(stack_of(weight.name), id(weight.form)): weight.form for weight in self.weights.values()}
        for (stack, _), form in distinct.items():
            found[stack] = math.lcm(found.get(stack, 1), *form.multiples)
        return found

    def grains(
        self, policy: Policy, config: Mapping[str, Any], shapes: Mapping[str, Shape], rules: Mapping[str, Rule | None]
    ) -> dict[str, Grain]:
        """Of every name, with the rule that it met: what its boundaries must be multiples of, and how many of its
        channels go together.

        A column layer that leaves its channels cut and the row layer that takes them must be dealt alike, whichever of
        them is quantised and along whichever axis. So the channels of one stack of blocks (``model.layers.*``) are
        dealt in one number, where a column and a row of it have equally many: then they are the same. Others are
        dealt as ever; if a boundary is inside a block, that is refused.
        """
        if not self.weights:
            return {}
        together = self.together()
        known: dict[tuple[int, Shape], int | None] = {}
        counts: dict[str, int] = {}
        sides: dict[tuple[str, int], set[tuple[str, bool]]] = {}
        stacks = {name: stack_of(name) for name in rules}
        for name, rule in rules.items():
            if rule is None or together.get(stacks[name], 1) == 1:
                continue
            key = id(rule), shapes[name]
            if key not in known:
                known[key] = channels(rule, policy, config, shapes[name])
            count = known[key]
            if count is not None:
                counts[name] = count
                sides.setdefault((stacks[name], count), set()).add((rule.kind, rule.unit is None))
        paired = {side for side, found in sides.items() if _are_paired(found)}
        grains = {}
        for name, stack in stacks.items():
            joined = name in counts and (stack, counts[name]) in paired
            multiples = self.weights[name].form.multiples if name in self.weights else ()
            grains[name] = _grain(together[stack] if joined else 1, multiples)
        return grains


_grain = lru_cache(maxsize=1024)(Grain)  # equal ones made one: they are keys of tables


def _are_paired(sides: Collection[tuple[str, bool]]) -> bool:
    """Whether columns and rows have as many channels, and not all of them are called units: those may be heads."""
    return len({kind for kind, _ in sides}) == 2 and any(plain for _, plain in sides)


DENSE = Quantised("", {})


def stack_of(name: str) -> str:
    """The path before a tensor's first number; empty where there is none: embeddings, heads, the last norm.

    >>> stack_of("model.layers.3.mlp.down_proj.weight"), stack_of("lm_head.weight")
    ('model.layers', '')
    """
    first = _NUMBER.search(name)
    return name[: first.start()] if first else ""


_NUMBER = re.compile(r"(?:^|\.)\d+(?:\.|$)")


def assign_stored(
    policy: Policy,
    config: Mapping[str, Any],
    stored: Mapping[str, Shape],
    sizes: Mapping[str, int],
    grid: Grid,
    quantised: Quantised,
) -> Assigned:
    """The layout and role of every stored tensor: of companions those of their weight. Raises PolicyError."""
    shapes = quantised.shapes(stored)
    bytes_of = dict(sizes)
    for own in quantised.weights.values():
        bytes_of[own.name] = sum(sizes.get(name, 0) for name in own.stored_names)
    assigned = assign_to_grid(
        policy, config, shapes, bytes_of, grid, lambda rules: quantised.grains(policy, config, shapes, rules)
    )
    if not quantised.weights:
        return assigned
    found: dict[str, Assignment] = {}
    known: dict[tuple[int, int], list[Assignment]] = {}  # by assignment and form
    for name, assignment in assigned.tensors.items():
        weight = quantised.weights.get(name)
        if weight is None:
            found[name] = assignment
            continue
        key = id(assignment), id(weight.form)
        if key not in known:
            layouts = [divided(assignment.layout, companion) for companion in weight.form.companions]
            known[key] = [Assignment(layout, assignment.role) for layout in layouts]
        found.update(zip(weight.stored_names, known[key], strict=True))
    for name in quantised.scalars:
        found[name] = Assignment(
            Layout.replicated(stored[name], grid.mesh.ranks), Role("replicate", pattern="quantisation")
        )
    return Assigned({name: found[name] for name in stored}, assigned.unused)
