"""The layout check of an adapter: its base's layers, dealt as its own tensors are.

B's out axis and A's in axis are those of the base's weight. So each pair is looked at as a weight that is dealt along
both, and config.json decides as for the base itself. Which way round a weight lies is PEFT's word, not the policy's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tpshard.adapter import Adapter, Target
from tpshard.checkpoint import Checkpoint, Stored
from tpshard.layout import Layout, Shard
from tpshard.verify.families import family_of
from tpshard.verify.layout import check_layout
from tpshard.verify.report import CheckResult, Finding
from tpshard.verify.slots import Slot, slot_of


def check_adapter_layout(shards: Checkpoint, adapter: Adapter, config: Mapping[str, Any]) -> CheckResult:
    """Compare the layouts of an adapter's tensors with those that the base's config.json asks for."""
    seen: dict[str, Stored] = {}
    for target in adapter.targets:
        for name, layout in _views(target, shards.tensors, adapter.config.fan_in_fan_out):
            seen[name] = replace(shards.tensors[target.b], name=name, layout=layout)
    for name, own in adapter.replaced.items():
        seen.setdefault(name, replace(shards.tensors[own], name=name))
    result = check_layout(replace(shards, tensors=seen, config=config), complete=False)
    if result.unproven:
        return result
    family = family_of(config) or {}
    told = {
        target.weight: _at_fault(target, slot_of(family, target.weight), shards.tensors) for target in adapter.targets
    }
    findings = [replace(finding, tensor=told.get(finding.tensor or "", finding.tensor)) for finding in result.findings]
    for target in adapter.targets:
        findings += _rank_findings(target, shards.tensors)
    return replace(result, findings=tuple(findings))


def _views(target: Target, tensors: Mapping[str, Stored], fan_in_fan_out: bool) -> Iterator[tuple[str, Layout]]:
    """The weight as A and B are dealt, and what else has a number for each output, under the layer's path."""
    a, b = tensors[target.a].layout, tensors[target.b].layout
    turned = target.embedding or (fan_in_fan_out and not target.kernel)
    yield target.weight, _product(a, b, turned)
    for name in (target.magnitude, target.bias):
        if name and not target.kernel:
            yield f"{target.layer}.{'magnitude' if name == target.magnitude else 'added'}", tensors[name].layout


def _product(a: Layout, b: Layout, turned: bool) -> Layout:
    """The layout of B A, or of its transpose."""

    def axes(of_b: Any, of_a: Any) -> tuple[Any, ...]:
        return (of_a[1], of_b[0]) if turned else (of_b[0], *of_a[1:])

    def product(own_a: Shard | None, own_b: Shard | None) -> Shard | None:
        if own_a is None or own_b is None:
            return None
        return Shard(axes(own_b.shape, own_a.shape), axes(own_b.spans, own_a.spans))

    return Layout(axes(b.shape, a.shape), tuple(map(product, a.shards, b.shards)))


def _at_fault(target: Target, slot: Slot | None, tensors: Mapping[str, Stored]) -> str:
    """Of a weight that is dealt wrongly, the part that is: the one that must be whole and is not, else the other."""
    cut, whole = (target.a, target.b) if slot is not None and slot.consumer else (target.b, target.a)
    return whole if tensors[whole].layout.cut_axes else cut


def _rank_findings(target: Target, tensors: Mapping[str, Stored]) -> Iterator[Finding]:
    """The axis that A and B share belongs to neither side of the layer."""
    for name, axis in ((target.a, 0), (target.b, 1)):
        if axis in tensors[name].layout.cut_axes:
            yield Finding(f"is cut along axis {axis}, the adapter's rank, which must be whole", tensor=name)
