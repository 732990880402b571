"""Blocks: which region of a stored tensor lies where in a parameter, and what views do to that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tpshard.layout import Box, Shape

CHUNK = 2**19  # numbers of a weight that are held at a time


@dataclass(frozen=True, slots=True)
class Block:
    """A region of a stored tensor (``source``, of tensor ``name`` in ``holder``'s own file) and its place in a
    parameter (``box``). ``axes[k]``: the parameter's axis that stored axis k has become; None where an index took it
    away."""

    name: str
    holder: int
    source: Box
    axes: tuple[int | None, ...]
    box: Box

    def narrow(self, axis: int, start: int, stop: int) -> Block | None:
        """The part with ``start <= index < stop`` along one of the parameter's axes."""
        first, last = max(start, self.box.start[axis]), min(stop, self.box.stop[axis])
        if first >= last:
            return None
        source = self.source
        if axis in self.axes:
            stored = self.axes.index(axis)
            shift = source.start[stored] - self.box.start[axis]
            source = _with(source, stored, first + shift, last + shift)
        return replace(self, source=source, box=_with(self.box, axis, first, last))

    def dropped(self, axis: int) -> Block:
        """Without an axis along which it has extent 1."""
        axes = tuple(None if a == axis else a - 1 if a is not None and a > axis else a for a in self.axes)
        return replace(self, axes=axes, box=_without(self.box, axis))

    def inserted(self, axis: int, index: int) -> Block:
        """With a new axis, at ``index`` of it: what stacking does."""
        axes = tuple(a + 1 if a is not None and a >= axis else a for a in self.axes)
        start, stop = list(self.box.start), list(self.box.stop)
        start.insert(axis, index)
        stop.insert(axis, index + 1)
        return replace(self, axes=axes, box=Box(tuple(start), tuple(stop)))

    def permuted(self, order: Sequence[int]) -> Block:
        """With the axes in another order: axis k of the result is axis ``order[k]`` of this."""
        axes = tuple(None if a is None else order.index(a) for a in self.axes)
        start, stop = (tuple(edge[k] for k in order) for edge in (self.box.start, self.box.stop))
        return replace(self, axes=axes, box=Box(start, stop))

    def moved(self, axis: int, by: int) -> Block:
        return replace(self, box=_with(self.box, axis, self.box.start[axis] + by, self.box.stop[axis] + by))

    def chunks(self) -> Iterator[Block]:
        """Parts of at most CHUNK numbers, or one line, along the stored tensor's first axis that is not single."""
        size = self.box.volume
        stored = next((k for k, a in enumerate(self.axes) if a is not None and self.source.shape[k] > 1), None)
        if size <= CHUNK or stored is None:
            yield self
            return
        axis = self.axes[stored]
        assert axis is not None
        lines = max(1, CHUNK * self.box.shape[axis] // size)
        for first in range(self.box.start[axis], self.box.stop[axis], lines):
            part = self.narrow(axis, first, min(first + lines, self.box.stop[axis]))
            assert part is not None
            yield from part.chunks() if part.box.volume > CHUNK and lines == 1 else (part,)


def _with(box: Box, axis: int, start: int, stop: int) -> Box:
    def set_(edge: Shape, value: int) -> Shape:
        return (*edge[:axis], value, *edge[axis + 1 :])

    return Box(set_(box.start, start), set_(box.stop, stop))


def _without(box: Box, axis: int) -> Box:
    return Box(box.start[:axis] + box.start[axis + 1 :], box.stop[:axis] + box.stop[axis + 1 :])
