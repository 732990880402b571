"""Check 3, layout: no floats. The owner of every row and column, derived again from config.json by code that shares
nothing with the policy engine, against what the manifest says.

Conventions that hold for every engine: heads, channels and words go to the ranks in ascending, balanced runs, the
first ranks taking one more where they do not divide; a key-value head is on the ranks whose query heads use it; the
consumer of a cut output (o_proj, down_proj) is cut as its producer. A block that is whole on every rank is right
too, and so is a gathered output whose runs follow the ranks. What is not cut must be whole everywhere.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.verify.families import FAMILIES, Heads, Slot, heads_of, slot_of
from tpshard.verify.report import CheckResult, Finding

Index = NDArray[np.int64]
Part = tuple[str, int, int]  # what the cells are called, how many units there are, cells of one unit
_OF_ATTENTION = frozenset({"query", "key_value", "qkv"})


@dataclass(frozen=True, slots=True)
class Dealing:
    """A way in which a block may be dealt: a rank's query heads; channels in whole units of so many; words in equal,
    padded runs of ``padded`` (0: balanced)."""

    query_heads: Callable[[int], Index]
    channels: int = 1
    padded: int = 0


def check_layout(shards: Checkpoint) -> CheckResult:
    """Compare every tensor's recorded layout with the one that config.json asks for."""
    model_type = str(shards.config.get("model_type", ""))
    family, heads = FAMILIES.get(model_type), heads_of(shards.config)
    if family is None or heads is None:
        what = f"of model_type '{model_type}'" if model_type else "without config.json"
        return CheckResult("layout", unproven=f"nothing is known apart from the policy about a model {what}")
    blocks: dict[str, list[tuple[Stored, Slot, int]]] = {}
    findings: list[Finding] = []
    for tensor in shards.tensors.values():
        slot = slot_of(family, tensor.name)
        axis = slot.axis_of(tensor.shape) if slot else None
        if slot is None or axis is None:
            findings += _must_be_whole(tensor)
        elif slot.meaning != "word" or not (tensor.layout.is_replicated or _joined_in_order(tensor)):
            blocks.setdefault(_block(tensor, slot), []).append((tensor, slot, axis))
    for block in blocks.values():
        findings += _check_block(block, heads, shards.ranks)
    covered = {"tensors": len(shards.tensors), "ranks": shards.ranks}
    return CheckResult("layout", tuple(findings), covered, notes=(f"{len(blocks)} blocks are cut or could be",))


def _block(tensor: Stored, slot: Slot) -> str:
    """Tensors that must be dealt alike: one layer's attention or feed-forward, or all that counts words."""
    if slot.meaning == "word":
        return "padded words" if tensor.layout.padding else "words"
    numbered = re.match(r"(.*\.\d+)\.", tensor.name)
    kind = "attention" if slot.meaning in _OF_ATTENTION else "feed-forward"
    return f"{numbered[1] if numbered else ''}:{kind}"


def _must_be_whole(tensor: Stored) -> list[Finding]:
    if tensor.layout.is_replicated or _joined_in_order(tensor):
        return []
    axes = " and ".join(map(str, tensor.layout.cut_axes)) or "padding"
    return [Finding(f"is cut along axis {axes}, must be whole on every rank", tensor=tensor.name)]


def _joined_in_order(tensor: Stored) -> bool:
    """Whether the layer's output is gathered along another axis than its words, in the order of the ranks."""
    cut = tensor.layout.cut_axes
    if tensor.role.gather != "output" or len(cut) != 1 or tensor.layout.padding:
        return False
    held = np.concatenate([_held(tensor, cut[0], rank) for rank in range(tensor.layout.ranks)])
    balanced_sizes = {len(_held(tensor, cut[0], rank)) for rank in range(tensor.layout.ranks)}
    return np.array_equal(held, np.arange(tensor.shape[cut[0]])) and max(balanced_sizes) - min(balanced_sizes) <= 1


def _held(tensor: Stored, axis: int, rank: int) -> Index:
    """The indices along an axis that the manifest gives a rank, in the order of the rank's own tensor."""
    shard = tensor.layout.shards[rank]
    runs = [np.arange(*run) for run in shard.spans[axis]] if shard else []
    return np.concatenate([np.arange(0), *runs])


def _check_block(block: list[tuple[Stored, Slot, int]], heads: Heads, ranks: int) -> list[Finding]:
    """No finding where all are whole, or all follow one way of dealing; else those of the way that fits best."""
    if all(tensor.layout.is_replicated for tensor, _, _ in block):
        return []
    found = [
        [finding for tensor, slot, axis in block if (finding := _check_tensor(tensor, slot, axis, heads, way))]
        for way in _ways(block, heads, ranks)
    ]
    return min(found, key=len)


def _ways(block: list[tuple[Stored, Slot, int]], heads: Heads, ranks: int) -> list[Dealing]:
    by_head = Dealing(lambda rank: balanced(heads.query, ranks, rank), _channel_unit(block), _padded_run(block))
    if block[0][1].meaning in _OF_ATTENTION and heads.query % ranks:
        return [by_head, Dealing(lambda rank: _heads_by_group(heads, ranks, rank))]
    return [by_head]


def _channel_unit(block: list[tuple[Stored, Slot, int]]) -> int:
    """Feed-forward channels may be dealt in units (quantisation blocks): the largest that all edges allow."""
    edges = [
        edge
        for tensor, _, axis in block
        for shard in tensor.layout.shards
        if shard
        for run in shard.spans[axis]
        for edge in run
    ]
    return math.gcd(*edges) or 1


def _padded_run(block: list[tuple[Stored, Slot, int]]) -> int:
    """The length of each rank's own axis where the block is padded to equal lengths; else 0."""
    sizes = {shard.shape[axis] for tensor, _, axis in block for shard in tensor.layout.shards if shard}
    padded = any(tensor.layout.padding for tensor, _, _ in block)
    return sizes.pop() if padded and len(sizes) == 1 else 0


def balanced(count: int, ranks: int, rank: int) -> Index:
    """The rank's run of ``count`` things dealt evenly, the first ranks taking one more.

    >>> [balanced(7, 3, rank).tolist() for rank in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    return np.asarray(np.array_split(np.arange(count, dtype=np.int64), ranks)[rank])


def _heads_by_group(heads: Heads, ranks: int, rank: int) -> Index:
    """Query heads where whole groups (a key-value head and its query heads) are dealt."""
    per_group = heads.query // heads.key_value
    groups = balanced(heads.key_value, ranks, rank)
    return np.concatenate([groups[:0], *(np.arange(g * per_group, (g + 1) * per_group) for g in groups)])


def _check_tensor(tensor: Stored, slot: Slot, axis: int, heads: Heads, way: Dealing) -> Finding | None:
    cut = tensor.layout.cut_axes
    if cut and cut != (axis,):
        shown = " and ".join(map(str, cut))
        return Finding(f"is cut along axis {shown}, config.json asks for axis {axis}", tensor=tensor.name)
    try:
        parts = _parts(tensor, slot, axis, heads)
    except ValueError as error:
        return Finding(str(error), tensor=tensor.name)
    for rank in range(tensor.layout.ranks):
        have = _held(tensor, axis, rank)
        want = _wanted(parts, slot, heads, way, rank, tensor.layout.ranks)
        if not np.array_equal(have, want):
            if tensor.layout.is_replicated:
                return Finding(
                    f"is whole on every rank, but its block is cut: along axis {axis} here", tensor=tensor.name
                )
            return _mismatch(tensor, parts, rank, have, want)
    return None


def _parts(tensor: Stored, slot: Slot, axis: int, heads: Heads) -> list[Part]:
    """The blocks that make up the axis. Raises ValueError where they do not."""
    size = tensor.shape[axis]
    match slot.meaning:
        case "channel" | "word":
            return [(slot.meaning, size, 1)]
        case "gate_up":
            return [("gate channel", size // 2, 1), ("up channel", size - size // 2, 1)]
        case "query":
            counts = [("query head", heads.query)]
        case "key_value":
            counts = [("key-value head", heads.key_value)]
        case "qkv":
            counts = [("query head", heads.query), ("key head", heads.key_value), ("value head", heads.key_value)]
    total = sum(count for _, count in counts)
    width = heads.size or size // total
    if width * total != size:
        raise ValueError(f"axis {axis} has {size} cells, config.json says {total} heads of {width}")
    return [(label, count, width) for label, count in counts]


def _wanted(parts: list[Part], slot: Slot, heads: Heads, way: Dealing, rank: int, ranks: int) -> Index:
    """The indices that a rank should hold, in order."""
    cells, base = [], 0
    for label, count, width in parts:
        if slot.meaning == "word" and way.padded:
            units = np.arange(min(rank * way.padded, count), min((rank + 1) * way.padded, count))
        elif slot.meaning == "word":
            units = balanced(count, ranks, rank)
        elif slot.meaning not in _OF_ATTENTION:
            blocks = balanced(count // way.channels, ranks, rank)
            units = (blocks[:, None] * way.channels + np.arange(way.channels)).reshape(-1)
        elif label == "query head":
            units = way.query_heads(rank)
        else:  # those that the rank's query heads use
            units = np.unique(way.query_heads(rank) // (heads.query // heads.key_value))
        cells.append(base + (units[:, None] * width + np.arange(width)).reshape(-1))
        base += count * width
    return np.concatenate(cells)


def _mismatch(tensor: Stored, parts: list[Part], rank: int, have: Index, want: Index) -> Finding:
    """The first cell that differs, in words."""
    for place, (a, b) in enumerate(itertools.zip_longest(have.tolist(), want.tolist())):
        if a != b:
            is_, should = _describe(parts, a), _describe(parts, b)
            what = f"cell {place} of the rank's cut axis is {is_}, config.json asks for {should}"
            return Finding(what, tensor=tensor.name, rank=rank)
    raise AssertionError("the two do not differ")


def _describe(parts: list[Part], index: int | None) -> str:
    if index is None:
        return "nothing more"
    for label, count, width in parts:
        if index < count * width:
            unit = f"{label} {index // width}"
            return unit if width == 1 else f"{unit} (cell {index % width} of {width})"
        index -= count * width
    raise AssertionError("beyond the axis")
