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
from tpshard.verify.layout import check_layout
from tpshard.verify.report import CheckResult, Finding


def check_adapter_layout(shards: Checkpoint, adapter: Adapter, config: Mapping[str, Any]) -> CheckResult:
    """Compare the layouts of an adapter's tensors with those that the base's config.json asks for."""
    seen: dict[str, Stored] = {}
    for target in adapter.targets:
        for name, layout in _views(target, shards.tensors, adapter.config.fan_in_fan_out):
            seen[name] = replace(shards.tensors[target.b], name=name, layout=layout)
    for name, own in adapter.replaced.items():
        seen.setdefault(name, replace(shards.tensors[own], name=name))
    result = check_layout(replace(shards, tensors=seen, config=config), complete=False)
    told = {target.weight: target for target in adapter.targets}
    findings = tuple(_of_adapter(finding, told, shards.tensors) for finding in result.findings)
    return replace(result, findings=findings)


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


def _of_adapter(finding: Finding, told: Mapping[str, Target], tensors: Mapping[str, Stored]) -> Finding:
    """A finding about a weight, as one about the part of it that is cut; about B where neither is."""
    target = told.get(finding.tensor or "")
    if target is None:
        return finding
    a_alone = tensors[target.a].layout.cut_axes and not tensors[target.b].layout.cut_axes
    return replace(finding, tensor=target.a if a_alone else target.b)
