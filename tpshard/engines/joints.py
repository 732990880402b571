"""An engine's tensors made of logical ones: which, and where each rank's own part of each lies in them."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from tpshard.engines.names import Template, Values
from tpshard.engines.profile import Constant, Engine, Family, Recipe
from tpshard.errors import InputError, PolicyError, printable
from tpshard.expressions import evaluate
from tpshard.frames import Tensor
from tpshard.header import DTYPE_BITS
from tpshard.layout import Layout, Shape
from tpshard.mesh import Mesh
from tpshard.views import View, strided

LAYER = "layer"
_FLOATS = {"F32": "<f", "F64": "<d", "F16": "<e"}


class Logical(NamedTuple):
    """A tensor as Hugging Face has it, and who holds what of it."""

    name: str
    dtype: str
    layout: Layout


class Part(NamedTuple):
    """Where a logical tensor lies in the engine's: ``offset`` in bytes from its begin, ``view`` if not one run."""

    logical: int
    offset: int
    view: View | None


@dataclass(frozen=True, slots=True)
class Joint:
    """One tensor of the engine, on all ranks that have it. ``values``: of the places in its name; ``members``: indexes
    of logical tensors, for each stacked entry those of all parts."""

    recipe: Recipe
    values: Values
    members: tuple[tuple[int, ...], ...]

    @property
    def logical(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.members)


@dataclass(frozen=True, slots=True)
class Joined:
    """All logical tensors as one engine's. ``first_layers``: the number of each stage's first layer, where the engine
    counts them in each stage."""

    engine: Engine
    family: Family
    logical: Sequence[Logical]
    joints: Sequence[Joint]
    mesh: Mesh
    config: Mapping[str, Any]
    first_layers: tuple[int, ...]

    def of_rank(self, rank: int, joints: Iterable[Joint] | None = None) -> Iterator[tuple[Tensor, tuple[Part, ...]]]:
        """The engine's tensors on one rank, and where the logical ones lie in each. Constants come last."""
        chosen = self.joints if joints is None else joints
        for joint in chosen:
            found = self.on_rank(joint, rank)
            if found is not None:
                yield found
        yield from ((tensor, ()) for tensor in self.constants(chosen, rank))

    def name_of(self, template: Template, values: Values, rank: int) -> str:
        """As the engine calls it on this rank."""
        if LAYER in template.places and self.first_layers:
            first = self.first_layers[self.mesh.coordinates(rank).pp]
            values = {**values, LAYER: str(int(values[LAYER]) - first)}
        return template.fill(values)

    def on_rank(self, joint: Joint, rank: int) -> tuple[Tensor, tuple[Part, ...]] | None:
        """One of the engine's tensors; None where the rank has nothing of it."""
        shapes: list[tuple[Shape, ...]] = []
        members: list[int] = []
        for entry in joint.members:
            own = [self.logical[index].layout.shards[rank] for index in entry]
            if not any(own):
                continue
            shapes.append(tuple(shard.shape for shard in own if shard))
            members += [index for index, shard in zip(entry, own, strict=True) if shard]
            if not all(own):
                lacking = next(i for i, shard in zip(entry, own, strict=True) if not shard)
                raise InputError(
                    f"{printable(self.logical[lacking].name)}: rank {rank} lacks it, and has its neighbours"
                )
        if not members:
            return None
        first = self.logical[members[0]]
        recipe = joint.recipe
        template = recipe.name
        if self._is_last_of_several(rank):
            template = next((alias.name for alias in self.family.aliases if alias.parts == recipe.parts), template)
        try:
            groups, head = self._groups(recipe, first), self._heads(recipe, first)
            fit = fitted(recipe, tuple(shapes), first.dtype, groups, head, recipe.lengths(self.config))
        except ValueError as error:
            raise InputError(f"{printable(first.name)}: {error}") from None
        name = self.name_of(template, joint.values, rank)
        parts = tuple(Part(index, *place) for index, place in zip(members, fit.places, strict=True))
        return Tensor(name, recipe.dtype(first.dtype), fit.shape), parts

    def _is_last_of_several(self, rank: int) -> bool:
        stage, stages = self.mesh.coordinates(rank).pp, self.mesh.pp
        return stages > 1 and stage == stages - 1

    def _groups(self, recipe: Recipe, first: Logical) -> int:
        """On each rank; 0: each row is one."""
        if recipe.groups is None:
            return 1
        if recipe.groups == "rows":
            return 0
        count, tp = evaluate(str(recipe.groups), self.config), self.mesh.tp
        if count % tp:
            works = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            what = f"{self.engine.title} deals whole groups of heads: {count} do not go into {tp} ranks"
            raise PolicyError(f"{printable(first.name)}: {what}", hint=f"--tp that works: {works}")
        return count // tp

    def _heads(self, recipe: Recipe, first: Logical) -> int:
        """The rows of one head."""
        if recipe.heads is None:
            return 0
        heads = evaluate(str(recipe.heads), self.config)
        rows = first.layout.shape[0]
        if rows % (2 * heads):
            raise InputError(f"{printable(first.name)}: {rows} rows are not {heads} heads of an even size")
        return rows // heads

    def constants(self, joints: Iterable[Joint], rank: int) -> Iterator[Tensor]:
        """Those that stand beside one of the joints' tensors."""
        for joint in joints if self.family.constants else ():
            own = [self.logical[index] for index in joint.members[0]]
            for constant in self.family.constants:
                if any(t.layout.shards[rank] is not None and constant.beside.read(t.name) is not None for t in own):
                    name = self.name_of(constant.name, joint.values, rank)
                    yield Tensor(name, constant.dtype, (), constant_bytes(constant))


def constant_bytes(constant: Constant) -> bytes:
    return struct.pack(_FLOATS[constant.dtype], constant.value)


# ------------------------------------------------------------------------------------------- names


def join(engine: Engine, family: Family, logical: Sequence[Logical], mesh: Mesh, config: Mapping[str, Any]) -> Joined:
    """Every logical tensor in its place. Raises InputError where the engine has no place for one, or one is missing."""
    names = {tensor.name for tensor in logical}
    if family.tied and family.tied.head not in names and family.tied.embedding in names:
        family = family.when_tied()
    found: dict[tuple[str, str], dict[tuple[int, int], int]] = {}  # engine's name: stacked entry and part: index
    recipes: dict[tuple[str, str], tuple[Recipe, Values]] = {}
    for index, tensor in enumerate(logical):
        try:
            match = family.logical_names.find(tensor.name)
        except ValueError as error:
            raise InputError(f"{printable(tensor.name)}: {error}") from None
        meaning, values = match if match else (None, {})
        if meaning is None:
            what = f"{printable(tensor.name)}: {engine.title} has no place for it in a {family.name} model"
            raise InputError(what, hint="tpshard engines shows what it can hold")
        recipe, part = meaning
        entry = int(values[recipe.stacked]) if recipe.stacked else 0
        key = recipe.name.text, recipe.name.fill(values)
        recipes.setdefault(key, (recipe, {place: values[place] for place in recipe.name.places}))
        found.setdefault(key, {})[entry, part] = index
    joints = [Joint(*recipes[key], _members(engine, recipes[key][0], key[1], places)) for key, places in found.items()]
    first_layers = _first_layers(joints, logical, mesh) if engine.local_layers else ()
    return Joined(engine, family, logical, joints, mesh, config, first_layers)


def _members(
    engine: Engine, recipe: Recipe, name: str, places: Mapping[tuple[int, int], int]
) -> tuple[tuple[int, ...], ...]:
    entries = sorted({entry for entry, _ in places})
    if recipe.stacked and entries != list(range(len(entries))):
        missing = next(n for n, entry in enumerate(entries) if n != entry)
        raise InputError(f"{printable(name)}: {recipe.stacked} {missing} is missing, {entries[-1]} is there")
    for entry, part in itertools.product(entries, range(len(recipe.parts))):
        if (entry, part) not in places:
            what = f"{engine.title} joins {len(recipe.parts)} tensors in it, '{recipe.parts[part].text}' is missing"
            raise InputError(f"{printable(name)}: {what}")
    return tuple(tuple(places[entry, part] for part in range(len(recipe.parts))) for entry in entries)


def _first_layers(joints: Iterable[Joint], logical: Sequence[Logical], mesh: Mesh) -> tuple[int, ...]:
    """The lowest layer that any rank of a stage holds."""
    first = [2**31] * mesh.pp
    for joint in joints:
        if LAYER not in joint.values:
            continue
        layer, shards = int(joint.values[LAYER]), logical[joint.members[0][0]].layout.shards
        for stage in {mesh.coordinates(rank).pp for rank, shard in enumerate(shards) if shard is not None}:
            first[stage] = min(first[stage], layer)
    return tuple(first)


# ------------------------------------------------------------------------------------------- shapes


class Fit(NamedTuple):
    """An engine's tensor on one rank: its shape, and the place of each member in the order of members."""

    shape: Shape
    places: tuple[tuple[int, View | None], ...]


Arranged = tuple[Shape, list[tuple[int, View | None]], int]  # shape, places, bytes of one stacked entry


@lru_cache(maxsize=4096)
def fitted(
    recipe: Recipe,
    shapes: tuple[tuple[Shape, ...], ...],
    dtype: str,
    groups: int = 1,
    head: int = 0,
    lengths: tuple[tuple[str, int], ...] = (),
) -> Fit:
    """How tensors of these shapes (by stacked entry and part) lie in the engine's one; ``groups`` on this rank (0:
    each row is one), ``head``: rows of one, ``lengths``: of the axes of the recipe's order. Raises ValueError where
    they do not fit together.

    >>> from tpshard.engines.names import Template
    >>> qkv = Recipe(Template("qkv"), (Template("q"), Template("k"), Template("v")), groups=2)
    >>> fit = fitted(qkv, (((8, 3), (4, 3), (4, 3)),), "F16", groups=2)
    >>> fit.shape, fit.places[1]
    ((16, 3), (24, View(shape=(2, 12), strides=(48, 1))))
    """
    entry = shapes[0]
    if any(other != entry for other in shapes):
        raise ValueError(f"the stacked tensors have other shapes: {list(map(list, entry))} and others")
    bits = DTYPE_BITS[dtype]
    if recipe.axes is not None:
        inner, view = recipe.axes.fit(entry[0], dict(lengths), _bytes(1, bits))
        size = _bytes(math.prod(inner), bits)
        places: list[tuple[int, View | None]] = [(0, view)]
    elif len(entry) == 1 and (not recipe.order or (recipe.order == "widened" and dtype == "F32")):
        inner, size = entry[0], _bytes(math.prod(entry[0]), bits)
        places = [(0, None)]
    elif recipe.order == "transposed":
        inner, places, size = _transposed(entry, bits)
    elif recipe.order == "widened":
        inner, places, size = _widened(entry, dtype)
    else:
        inner, places, size = _rows(entry, bits, groups, head)
    if recipe.stacked is None:
        return Fit(inner, tuple(places))
    stacked = [(number * size + offset, view) for number in range(len(shapes)) for offset, view in places]
    return Fit((len(shapes), *inner), tuple(stacked))


def _rows(
    entry: tuple[Shape, ...], bits: int, groups: int, head: int
) -> tuple[Shape, list[tuple[int, View | None]], int]:
    """Rows of all parts, group by group."""
    rest = entry[0][1:]
    if any(not shape or shape[1:] != rest for shape in entry):
        raise ValueError(f"tensors of {', '.join(str(list(shape)) for shape in entry)} have no rows of one length")
    rows, width = [shape[0] for shape in entry], _bytes(math.prod(rest), bits)
    count = groups or min(rows)
    if any(n % count for n in rows):
        raise ValueError(f"{rows} rows do not go into {count} groups")
    pitch = sum(rows) // count * width
    places, before = [], 0
    for n in rows:
        if head:
            axes, steps = (n // head, 2, head // 2, width), (head * width, width, 2 * width, 1)
            view = strided(axes, steps)
        else:
            view = strided((count, n // count * width), (pitch, 1))
        places.append((before, view))
        before += n // count * width
    return (sum(rows), *rest), places, sum(rows) * width


def _transposed(entry: tuple[Shape, ...], bits: int) -> Arranged:
    """The last two axes exchanged: the rows of all parts are columns, side by side."""
    item = _bytes(1, bits)
    if any(len(shape) < 2 or (*shape[:-2], shape[-1]) != (*entry[0][:-2], entry[0][-1]) for shape in entry):
        raise ValueError(f"tensors of {', '.join(str(list(shape)) for shape in entry)} are not matrices of one width")
    lead, inner, outer = entry[0][:-2], entry[0][-1], sum(shape[-2] for shape in entry)
    pitch = outer * inner * item
    places: list[tuple[int, View | None]] = []
    before = 0
    for shape in entry:
        view = strided((math.prod(lead), shape[-2], inner, item), (pitch, item, outer * item, 1))
        places.append((before * item, view))
        before += shape[-2]
    return (*lead, inner, outer), places, math.prod(lead) * pitch


def _widened(entry: tuple[Shape, ...], dtype: str) -> Arranged:
    """BF16 in the upper halves of F32, whose lower halves are zero: the same numbers."""
    if len(entry) != 1 or dtype != "BF16":
        raise ValueError(f"is {dtype}, and only one BF16 tensor can be widened to F32 without changing its numbers")
    cells = math.prod(entry[0])
    return entry[0], [(2, strided((cells, 2), (4, 1)))], 4 * cells


def _bytes(cells: int, bits: int) -> int:
    if cells * bits % 8:
        raise ValueError(f"{cells} cells of {bits} bits are not whole bytes")
    return cells * bits // 8
