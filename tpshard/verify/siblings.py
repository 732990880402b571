"""Experts of one layer are siblings: whatever is proven of one holds for another that is cut in the same way.

A router may send no token to an expert, and then no number tells that it is cut otherwise than the others. So the
layout check compares siblings, and the forward proves an expert that it did not reach only by one like it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tpshard.checkpoint import Stored
from tpshard.layout import Layout, Shard
from tpshard.verify.report import Finding

_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")


def shares(layout: Layout) -> tuple[Shard, ...]:
    """What the ranks that hold something hold of it, whichever ranks they are."""
    return tuple(shard for shard in layout.shards if shard is not None)


def by_expert(names: Sequence[str], count: int) -> Mapping[int, list[str]]:
    """Tensors of a stack that stand once for each expert on disk, by its number: the last in their names. Empty where
    the stack is stored as one: then all its matrices are cut alike."""
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        found.setdefault(int(numbers[-1]) if numbers else 0, []).append(name)
    return found if len(found) == count > 1 else {}


def check_siblings(tensors: Iterable[Stored]) -> list[Finding]:
    """A finding for every tensor of an expert that is cut otherwise than most of its siblings of that layer."""
    families: dict[tuple[str, str], dict[int, Stored]] = {}
    for tensor in tensors:
        if found := _EXPERT.fullmatch(tensor.name):
            families.setdefault((found[1], found[3]), {})[int(found[2])] = tensor
    return [finding for siblings in families.values() for finding in _unlike(siblings)]


def _unlike(siblings: Mapping[int, Stored]) -> list[Finding]:
    usual, _ = Counter(shares(tensor.layout) for tensor in siblings.values()).most_common(1)[0]
    alike = next(number for number, tensor in siblings.items() if shares(tensor.layout) == usual)
    return [
        Finding(f"is cut otherwise than the same layer of expert {alike}", tensor=tensor.name)
        for tensor in siblings.values()
        if shares(tensor.layout) != usual
    ]
