"""The layouts of an adapter's tensors: the base layer's own cut, on the axes where A and B have it.

B has the base's out axis, A its in axis, and each has the rank as the other, which is never cut. So ``column`` leaves
A whole and cuts B, ``row`` cuts A and leaves B whole, in the base's own units, parts and replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.adapter import Adapter, Target
from tpshard.assignment import MAX_RANKS, Assigned, Assignment, match_all
from tpshard.errors import InputError, PolicyError, UsageError, printable
from tpshard.layout import Layout, Shape
from tpshard.policy import Policy, Rule, rule_layout
from tpshard.roles import Role

_ANOTHER_BASE = "is this the adapter's base?"


@dataclass(frozen=True, slots=True)
class Placed:
    """A target and its base layer's weight: name on disk, shape, out and in axis. ``known``: the base's own header
    says so; else the name is the module's, and the shape what A and B make of it."""

    target: Target
    name: str
    shape: Shape
    out_axis: int
    in_axis: int
    known: bool


def assign_adapter(
    policy: Policy,
    config: Mapping[str, Any],
    adapter: Adapter,
    shapes: Mapping[str, Shape],
    ranks: int,
    base: Mapping[str, Shape] | None,
    disk: Names,
) -> Assigned:
    """The layout and role of every tensor of an adapter, by the base's policy and config. ``base``: the shapes of the
    base's tensors, where they are known; ``disk``: their names.

    Raises PolicyError as ``assign`` does, InputError where the adapter is not of this base.
    """
    if not 1 <= ranks <= MAX_RANKS:
        raise UsageError(f"--tp must be from 1 to {MAX_RANKS}, is {ranks}")
    placed = place_targets(policy, adapter, base, disk)
    found: dict[str, Assignment] = {}
    for place in placed:
        rule = policy.match(place.name)
        whole = _layout(rule, policy, config, place.name, place.shape, ranks)
        if not set(whole.cut_axes) <= {place.out_axis, place.in_axis}:
            raise PolicyError(f"{printable(place.name)}: is cut along axis {whole.cut_axes[0]}, which A and B share")
        role = rule.role if rule else Role("replicate", pattern="default")
        for name, axis, own in _tensors(place):
            found[name] = Assignment(carried_over(whole, axis, shapes[name], own), role)
    replaced = {name: disk.find(base_name) or base_name for base_name, name in adapter.replaced.items()}
    rules = match_all(policy, {base_name: shapes[name] for name, base_name in replaced.items()})
    for name, base_name in replaced.items():
        if base is not None and base.get(base_name, shapes[name]) != shapes[name]:
            raise InputError(_misfit(f"{name}:", shapes[name], base_name, base[base_name]), hint=_ANOTHER_BASE)
        rule = rules[base_name]
        role = rule.role if rule else Role("replicate", pattern="default")
        found[name] = Assignment(_layout(rule, policy, config, base_name, shapes[name], ranks), role)
    return Assigned(found, ())


def place_targets(policy: Policy, adapter: Adapter, base: Mapping[str, Shape] | None, disk: Names) -> list[Placed]:
    """Each target's base layer. Raises PolicyError where one meets no rule, InputError where the sizes differ."""
    names = {target: disk.find(target.weight) for target in adapter.targets}
    rules = match_all(policy, {names[target] or target.weight: () for target in adapter.targets})
    fan_in_fan_out, placed = adapter.config.fan_in_fan_out, []
    for target in adapter.targets:
        name = names[target]
        known = base.get(name) if base is not None and name else None
        placed.append(_place(target, name, known, rules[name or target.weight], fan_in_fan_out))
    return placed


def missing_in_base(adapter: Adapter, base: Mapping[str, Shape] | None, disk: Names) -> list[str]:
    """Warnings of targets whose weight the base, where it is known, has under no such name: they were not compared."""
    missed = [target.weight for target in adapter.targets if disk.find(target.weight) is None]
    if base is None or not missed:
        return []
    shown = ", ".join(map(printable, missed[:3])) + (", ..." if len(missed) > 3 else "")
    return [f"not in the base under this name (tied, or renamed), so its sizes were not compared: {shown}"]


def carried_over(base: Layout, axis: int, shape: Shape, own: int) -> Layout:
    """The layout of a tensor of ``shape`` that has the base's ``axis`` as its axis ``own``.

    >>> base = Layout.replicated((6, 4), 2)
    >>> carried_over(base, 0, (6, 2), 0) == Layout.replicated((6, 2), 2)
    True
    """
    runs = [shard.spans[axis] if shard else () for shard in base.shards]
    sizes = [shard.shape[axis] if shard else 0 for shard in base.shards]
    made = Layout.along(shape, own, runs, sizes)
    return Layout(shape, tuple(shard if held else None for shard, held in zip(made.shards, base.shards, strict=True)))


class Names:
    """The base's names on disk. PEFT's are the module's: what is loaded from disk may stand one module deeper, or
    less deep (GPT-2's ``transformer.h.0`` is ``h.0`` on disk). ``renamed``: what else the library calls otherwise."""

    def __init__(self, names: Iterable[str], renamed: Mapping[str, str] | None = None) -> None:
        self._names, self._renamed = frozenset(names), renamed or {}
        self._deeper: dict[str, str | None] = {}
        for name in self._names:
            tail = name.partition(".")[2]
            self._deeper[tail] = None if tail in self._deeper else name

    def find(self, name: str) -> str | None:
        """The one name on disk, or None."""
        if name in self._renamed:
            return self._renamed[name]
        if name in self._names:
            return name
        tail = name.partition(".")[2]
        return tail if tail in self._names else self._deeper.get(name)


def _place(target: Target, name: str | None, known: Shape | None, rule: Rule | None, fan_in_fan_out: bool) -> Placed:
    """Which way round the base's weight is: as the rule says; of a layer that is not cut, as PEFT says."""
    plain = (target.out_size, target.in_size, *target.kernel)
    turned = not target.kernel and _is_turned(target, rule, fan_in_fan_out)
    shape = (target.in_size, target.out_size) if turned else plain
    if known is not None and known != shape:
        what = _misfit(f"{target.layer}: A and B make", shape, name or "", known)
        raise InputError(what, hint=_ANOTHER_BASE)
    return Placed(target, name or target.weight, shape, int(turned), int(not turned), known is not None)


def _is_turned(target: Target, rule: Rule | None, fan_in_fan_out: bool) -> bool:
    """Whether the weight is [in, out], as that of an embedding always is."""
    if target.embedding:
        return True
    axis = rule.axis((target.out_size, target.in_size)) if rule else None
    if rule is None or axis is None:
        return fan_in_fan_out
    return axis == (1 if rule.kind == "column" else 0)


def _tensors(place: Placed) -> Iterable[tuple[str, int, int]]:
    """A target's tensors: which axis of the base they share, and as which of their own."""
    target, out = place.target, place.out_axis
    yield target.a, place.in_axis, 1
    yield target.b, out, 0
    if target.magnitude:
        yield target.magnitude, out, 1 if target.kernel else 0
    if target.bias:
        yield target.bias, out, 0


def _layout(
    rule: Rule | None, policy: Policy, config: Mapping[str, Any], name: str, shape: Shape, ranks: int
) -> Layout:
    if rule is None:
        return Layout.replicated(shape, ranks)
    try:
        return rule_layout(rule, policy, config, shape, ranks)
    except PolicyError as error:
        raise PolicyError(f"{printable(name)}: {error.message}", hint=error.hint) from None


def _misfit(what: str, shape: Shape, name: str, known: Shape) -> str:
    return f"{printable(what)} {list(shape)}, the base's {printable(name)} is {list(known)}"
