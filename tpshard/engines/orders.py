"""How the axes of one tensor lie in the engine's, as text: ``i (3 h d) -> (h 3 d) i``.

Left the logical tensor, right the engine's; a group in parentheses is one axis made of several, the first the slowest;
a number is its own length. One length in each group may be left open. (The notation is einops'.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from tpshard.layout import Shape
from tpshard.views import View, strided

Axes = tuple[tuple[str, ...], ...]
_TOKEN = re.compile(r"\s*(\(|\)|[a-z]+|[0-9]+)")


@dataclass(frozen=True, slots=True)
class AxisOrder:
    """The axes of either side, each made of one or more lengths."""

    logical: Axes
    engine: Axes

    def fit(self, shape: Shape, lengths: Mapping[str, int], item: int) -> tuple[Shape, View | None]:
        """Of a logical tensor of ``shape``, with ``item`` bytes a cell: the engine's shape, and where the logical
        cells lie in it. Raises ValueError where the shape does not fit.

        >>> order = parse_order("i (3 h d) -> (h 3 d) i")
        >>> order.fit((5, 12), {"d": 2}, 1)
        ((12, 5), View(shape=(5, 3, 2, 2, 1), strides=(1, 10, 30, 5, 1)))
        """
        found = self._lengths(shape, lengths)
        flat = [name for axis in self.engine for name in axis]
        pitch = {name: math.prod(found[later] for later in flat[place + 1 :]) for place, name in enumerate(flat)}
        names = [name for axis in self.logical for name in axis]
        view = strided((*(found[name] for name in names), item), (*(pitch[name] * item for name in names), 1))
        return tuple(math.prod(found[name] for name in axis) for axis in self.engine), view

    def back(self, shape: Shape, lengths: Mapping[str, int]) -> Shape:
        """The logical shape of an engine's tensor."""
        found = AxisOrder(self.engine, self.logical)._lengths(shape, lengths)
        return tuple(math.prod(found[name] for name in axis) for axis in self.logical)

    def _lengths(self, shape: Shape, lengths: Mapping[str, int]) -> dict[str, int]:
        if len(shape) != len(self.logical):
            raise ValueError(f"{list(shape)} has not the {len(self.logical)} axes of its order")
        found: dict[str, int] = {}
        for axis, size in zip(self.logical, shape, strict=True):
            known = {name: int(name) if name.isdecimal() else lengths.get(name, 0) for name in axis}
            unknown = [name for name, length in known.items() if not length]
            rest = math.prod(length for length in known.values() if length)
            if size % rest or len(unknown) > 1 or (not unknown and size != rest):
                raise ValueError(
                    f"an axis of {size} is not made of {' x '.join(str(n or '?') for n in known.values())}"
                )
            found |= known
            if unknown:
                found[unknown[0]] = size // rest
        return found


@lru_cache
def parse_order(text: str) -> AxisOrder:
    """Raises ValueError where the text is no order, or its sides have other lengths."""
    sides = text.split("->")
    if len(sides) != 2:
        raise ValueError(f"'{text}' has not two sides with '->' between them")
    logical, engine = (_axes(side) for side in sides)
    one, other = (sorted(name for axis in side for name in axis) for side in (logical, engine))
    if one != other or len(set(one)) != len(one):
        raise ValueError(f"'{text}': both sides must have the same lengths, each once")
    return AxisOrder(logical, engine)


def _axes(text: str) -> Axes:
    axes: list[tuple[str, ...]] = []
    group: list[str] | None = None
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None or (match[1] in "()" and (match[1] == "(") == (group is not None)):
            raise ValueError(f"'{text.strip()}' is no list of axes")
        at, token = match.end(), match[1]
        if token == "(":
            group = []
        elif token == ")":
            axes.append(tuple(group or ()))
            group = None
        elif group is not None:
            group.append(token)
        else:
            axes.append((token,))
    if group is not None:
        raise ValueError(f"'{text.strip()}' has a '(' without its ')'")
    return tuple(axes)
