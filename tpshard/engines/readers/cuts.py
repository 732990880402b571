"""How a tensor is cut where no file says it: by all ranks' shapes, the policy's rule, and samples of the numbers.

Sizes come from the ranks' own shapes, so uneven cuts need no formula. Equal shapes may be copies or parts: copies hold
equal numbers. What stays open after that is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpshard.engines.readers.pieces import cut_in_order
from tpshard.engines.readers.reading import Held, Own
from tpshard.engines.readers.samples import Alike, Samples
from tpshard.errors import InputError, printable
from tpshard.layout import Layout, Shape
from tpshard.policy import Policy, Rule, units_of

MIXED = "were files of two runs mixed?"


@dataclass(slots=True)
class Cuts:
    """``heads``: layers whose out axis is the vocabulary, which engines cut along either axis, whatever a policy
    says."""

    policy: Policy
    config: Mapping[str, Any]
    samples: Samples
    heads: tuple[str, ...]
    _of_layers: dict[str, Layout] = field(default_factory=dict)

    def held(self, ranks: Sequence[Mapping[str, Own]]) -> dict[str, Held]:
        """All logical tensors. Raises InputError where ranks do not go together."""
        check_same_names(ranks)
        names = list(ranks[0])
        found = {}
        for name in sorted(names, key=lambda name: not name.endswith(".weight")):  # biases go by their weights
            own = [rank[name] for rank in ranks]
            dtypes = {tensor.entry.dtype for tensor in own}
            if len(dtypes) > 1:
                raise InputError(f"{printable(name)}: is {' and '.join(sorted(dtypes))} on different ranks", hint=MIXED)
            layout = self._layout(name, own)
            self._of_layers.setdefault(name.rpartition(".")[0], layout)
            found[name] = Held(own[0].entry.dtype, layout, tuple(tensor.place for tensor in own))
        return {name: found[name] for name in names}

    def _layout(self, name: str, own: Sequence[Own]) -> Layout:
        shapes = [tensor.entry.shape for tensor in own]
        rule = self.policy.match(name)
        axis = self._axis(name, shapes, rule)
        if len(set(shapes)) > 1:
            axis = _differing(name, shapes)
        else:
            alike = self.samples.compare(own)
            if alike.same and not alike.constant:
                return Layout.replicated(shapes[0], len(shapes))
            if alike.constant:
                axis = self._of_constant(name, shapes[0], axis)
            else:
                _refuse_doubtful(name, axis, alike)
            if axis is None:
                return Layout.replicated(shapes[0], len(shapes))
        assert axis is not None
        if rule is not None and rule.parts is not None:
            what = f"{printable(name)}: is several tensors in one, and the files do not say how it is cut"
            raise InputError(what, hint="convert it to a universal checkpoint first")
        layout = cut_in_order([shape[axis] for shape in shapes], shapes[0], axis)
        self._check_size(name, rule, layout, axis, [shape[axis] for shape in shapes])
        return layout

    def _axis(self, name: str, shapes: Sequence[Shape], rule: Rule | None) -> int | None:
        """The axis along which equal shapes would be cut."""
        words = self.config.get("vocab_size")
        if name.rpartition(".")[0].rpartition(".")[2] in self.heads and len(shapes[0]) == 2:
            if shapes[0][0] == words:
                return 1
            if sum(shape[0] for shape in shapes) == words:
                return 0
            what = f"{printable(name)}: {shapes[0][0]} rows on each of {len(shapes)} ranks, vocab_size is {words}"
            raise InputError(what, hint="is config.json the model's?")
        return rule.axis(shapes[0]) if rule else None

    def _of_constant(self, name: str, shape: Shape, axis: int | None) -> int | None:
        """Equal numbers tell nothing of a bias; it goes with its weight."""
        weight = self._of_layers.get(name.rpartition(".")[0])
        if axis is None:
            return None
        if weight is None or len(shape) != 1:
            what = f"{printable(name)}: is one number again and again, so whether ranks hold parts or copies is unknown"
            raise InputError(what, hint="convert it to a universal checkpoint first")
        return 0 if weight.cut_axes == (0,) else None

    def _check_size(self, name: str, rule: Rule | None, layout: Layout, axis: int, sizes: Sequence[int]) -> None:
        """The policy's units (heads) must lie whole on a rank."""
        if rule is None or axis != rule.axis(layout.shape):
            return
        count, whole = units_of(rule, self.policy, self.config), layout.shape[axis]
        if count and (whole % count or any(size % (whole // count) for size in sizes)):
            what = f"{printable(name)}: ranks hold {'+'.join(map(str, sizes))} along axis {axis}, not whole heads"
            raise InputError(f"{what} of {count}", hint="is config.json the model's?")


def check_same_names(ranks: Sequence[Mapping[str, Own]]) -> None:
    for rank, own in enumerate(ranks):
        if own.keys() != ranks[0].keys():
            name = min(own.keys() ^ ranks[0].keys())
            has, lacks = (rank, 0) if name in own else (0, rank)
            raise InputError(f"rank {has} has {printable(name)}, rank {lacks} has not", hint=MIXED)


def _differing(name: str, shapes: Sequence[Shape]) -> int:
    """The one axis along which shapes differ."""
    first = shapes[0]
    axes = {a for shape in shapes for a in range(min(len(shape), len(first))) if shape[a] != first[a]}
    if len(axes) != 1 or any(len(shape) != len(first) for shape in shapes):
        shown = ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise InputError(f"{printable(name)}: ranks hold shapes {shown}, which are no parts of one", hint=MIXED)
    return axes.pop()


def _refuse_doubtful(name: str, axis: int | None, alike: Alike) -> None:
    """Ranks hold different numbers in equal shapes: parts, if anything."""
    if axis is None:
        raise InputError(f"{printable(name)}: ranks hold different numbers of what nothing cuts", hint=MIXED)
    if alike.twins:
        some = " and ".join(map(str, alike.twins))
        raise InputError(f"{printable(name)}: ranks {some} hold the same numbers, others do not", hint=MIXED)
