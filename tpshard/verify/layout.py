"""Check 3, layout: no floats. The owner of every row and column, derived again from config.json by code that shares
nothing with the policy engine, against what the manifest says.

Conventions that hold for every engine: heads, channels and words go to the ranks in ascending, balanced runs, the
first ranks taking one more where they do not divide; a key-value head is on the ranks whose query heads use it; the
consumer of a cut output (o_proj, down_proj) is cut as its producer. A block that is whole on every rank is right
too, and so is a gathered output whose runs follow the ranks. What is not cut must be whole everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.verify.axes import BY_QUERY_HEAD, Index, Part, held, parts_of
from tpshard.verify.differences import describe_difference
from tpshard.verify.families import Sizes, family_of, sizes_of
from tpshard.verify.families.translators import STACKS, stack_of
from tpshard.verify.report import CheckResult, Finding
from tpshard.verify.siblings import check_siblings
from tpshard.verify.slots import OF_ATTENTION, Slot, slot_of
from tpshard.verify.ties import check_ties


class Member(NamedTuple):
    """A tensor that may be cut: along which axis, what that counts, and what it is made of."""

    tensor: Stored
    slot: Slot
    axis: int
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class Dealing:
    """A way in which a block may be dealt: a rank's query heads; channels and words in whole units of so many, the
    last of which may be shorter; words and channels in equal, padded runs of ``padded`` (0: balanced)."""

    query_heads: Callable[[int], Index]
    channels: int = 1
    words: int = 1
    padded: int = 0


def check_layout(shards: Checkpoint, units: Sequence[int] = (), complete: bool = True) -> CheckResult:
    """Compare every tensor's recorded layout with the one that config.json asks for. ``units``: sizes of quantisation
    blocks, in which channels and words may be dealt; ``complete``: a model's tensors are all there, so that one may be
    missed."""
    model_type = str(shards.config.get("model_type", ""))
    family = family_of(shards.config)
    if family is None:
        what = f"of model_type '{model_type}'" if model_type else "without config.json"
        return CheckResult("layout", unproven=f"nothing is known apart from the policy about a model {what}")
    covered = {"tensors": len(shards.tensors), "ranks": shards.ranks}
    sizes = {stack: found for stack in ("", *STACKS) if (found := sizes_of(shards.config, stack))}
    if len(sizes) <= len(STACKS):
        return CheckResult("layout", unproven="config.json says nothing of attention heads")
    for found in sizes.values():
        if found.query % found.key_value:
            what = f"{found.query} query heads cannot share {found.key_value} key-value heads"
            return CheckResult("layout", (Finding(what, file="config.json"),), covered)
    blocks: dict[str, list[Member]] = {}
    findings: list[Finding] = []
    for tensor in shards.tensors.values():
        slot = slot_of(family, tensor.name)
        axis = slot.axis_of(tensor.shape) if slot else None
        if slot is None or axis is None:
            findings += _must_be_whole(tensor)
            continue
        try:
            member = Member(tensor, slot, axis, parts_of(tensor, slot, axis, sizes[stack_of(tensor.name)]))
        except ValueError as error:
            findings.append(Finding(str(error), tensor=tensor.name))
            continue
        if slot.may_be_whole and tensor.layout.is_replicated:
            continue
        if slot.must_be_whole:
            findings += _must_be_whole(tensor) or _check_norm(member, shards.tensors)
        else:
            blocks.setdefault(_block(tensor, slot), []).append(member)
    for block in blocks.values():
        own = sizes[stack_of(block[0].tensor.name)].for_block(block[0].slot)
        findings += _check_block(block, own, shards.ranks, units)
    named = {finding.tensor for finding in findings}
    findings += (f for f in check_siblings(shards.tensors.values()) if f.tensor not in named)
    findings += check_ties(shards, family) if complete else []
    return CheckResult("layout", tuple(findings), covered, notes=(f"{len(blocks)} blocks are cut or could be",))


def _block(tensor: Stored, slot: Slot) -> str:
    """Tensors that must be dealt alike: one layer's attention, cross-attention or feed-forward; the embedding; all of
    the output head."""
    if slot.meaning == "word":
        return "embedding" if slot.consumer else "output head"
    numbered = re.match(r"(.*\.\d+)\.", tensor.name)
    of_heads = "cross-attention" if slot.cross else "attention"
    of_channels = f"{slot.expert} experts" if slot.expert else "feed-forward"
    kind = of_heads if slot.meaning in OF_ATTENTION else "mixer" if slot.mixer else of_channels
    return f"{numbered[1] if numbered else ''}:{kind}"


# ---------------------------------------------------------------------------------------------- whole


def _must_be_whole(tensor: Stored) -> list[Finding]:
    if _whole_or_joined(tensor):
        return []
    axes = " and ".join(map(str, tensor.layout.cut_axes)) or "padding"
    return [Finding(f"is cut along axis {axes}, must be whole on every rank", tensor=tensor.name)]


def _whole_or_joined(tensor: Stored) -> bool:
    """Whether every rank has it all, or the layer's output is gathered in the order of the ranks: no later layer can
    then tell that it was cut."""
    if tensor.layout.is_replicated:
        return True
    cut = tensor.layout.cut_axes
    if tensor.role.gather != "output" or len(cut) != 1 or tensor.layout.padding:
        return False
    runs = [held(tensor, cut[0], rank) for rank in range(tensor.layout.ranks)]
    lengths = [len(run) for run in runs]
    return np.array_equal(np.concatenate(runs), np.arange(tensor.shape[cut[0]])) and max(lengths) - min(lengths) <= 1


def _check_norm(member: Member, tensors: Mapping[str, Stored]) -> list[Finding]:
    """A norm over all heads works on no rank's own heads alone: the layer before it must be whole or gathered."""
    tensor, slot, _, (part, *_) = member
    module = tensor.name.rpartition(".")[0].rpartition(".")[0]
    producer = tensors.get(f"{module}.{slot.all_of}.weight")
    if not producer or producer.layout.is_replicated:
        return []
    if producer.role.gather == "output" or tensor.role.gather == "input":
        return []
    rank, own = min(
        enumerate(len(held(producer, 0, rank)) for rank in range(producer.layout.ranks)), key=lambda x: x[1]
    )
    what = f"is over all {part.units} heads, the rank has {own // part.width}: {slot.all_of} must be gathered before it"
    return [Finding(what, tensor=tensor.name, rank=rank)]


# ---------------------------------------------------------------------------------------------- dealt


def _check_block(block: list[Member], sizes: Sizes, ranks: int, units: Sequence[int]) -> list[Finding]:
    """No finding where no later layer can tell that something was cut, or all follow one way of dealing; else those
    of the way that fits best."""
    if all(member.tensor.layout.is_replicated for member in block):
        return []
    if all(_whole_or_joined(member.tensor) for member in block) and _layers_agree(block):
        return []
    ways = [*_ways(block, sizes, ranks), *(Dealing(_by_head(sizes, ranks), unit, unit) for unit in units)]
    wrong = [[member for member in block if not _fits(member, way, sizes)] for way in ways]
    way, bad = min(zip(ways, wrong, strict=True), key=lambda pair: len(pair[1]))
    right = [m for m in block if m not in bad and not m.tensor.layout.is_replicated]
    return [_finding(member, way, sizes, _partner(member, right)) for member in bad]


def _partner(member: Member, right: list[Member]) -> str | None:
    """A layer of the block that is dealt as it should be, of the same heads if there is one; its path in the block."""
    producers = [other for other in right if not other.slot.consumer]
    alike = [other for other in producers if other.slot.meaning == member.slot.meaning] or producers or right
    return re.sub(r"^.*\.\d+\.", "", alike[0].tensor.name).rpartition(".")[0] if alike else None


def _layers_agree(block: list[Member]) -> bool:
    """Whether each layer's bias is dealt as its weight."""
    seen: dict[str, list[list[int]]] = {}
    for tensor, _, axis, _ in block:
        own = [held(tensor, axis, rank).tolist() for rank in range(tensor.layout.ranks)]
        if seen.setdefault(tensor.name.rpartition(".")[0], own) != own:
            return False
    return True


def _ways(block: list[Member], sizes: Sizes, ranks: int) -> list[Dealing]:
    by_head = _by_head(sizes, ranks)
    ways = [Dealing(by_head, _channel_unit(block))]
    ways += [Dealing(by_head, padded=length) for length in sorted(_padded_lengths(block))]
    if block[0].slot.meaning in OF_ATTENTION and sizes.query % ranks:
        ways.append(Dealing(lambda rank: _heads_by_group(sizes, ranks, rank)))
    return ways


def _by_head(sizes: Sizes, ranks: int) -> Callable[[int], Index]:
    return lambda rank: balanced(sizes.query, ranks, rank)


def _channel_unit(block: list[Member]) -> int:
    """Feed-forward channels may be dealt in units (quantisation blocks): the largest that all edges allow."""
    edges = {
        edge // parts[0].width
        for tensor, _, axis, parts in block
        for shard in tensor.layout.shards
        if shard
        for run in shard.spans[axis]
        for edge in run
    }
    ends = {part.units for member in block for part in member.parts}
    return math.gcd(*edges, *ends) or 1


def _padded_lengths(block: list[Member]) -> set[int]:
    """The lengths of ranks' own axes in tensors that are padded."""
    padded = [member for member in block if member.tensor.layout.padding]
    return {shard.shape[axis] for tensor, _, axis, _ in padded for shard in tensor.layout.shards if shard}


def balanced(count: int, ranks: int, rank: int) -> Index:
    """The rank's run of ``count`` things dealt evenly, the first ranks taking one more.

    >>> [balanced(7, 3, rank).tolist() for rank in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    return np.asarray(np.array_split(np.arange(count, dtype=np.int64), ranks)[rank])


def _heads_by_group(sizes: Sizes, ranks: int, rank: int) -> Index:
    """Query heads where whole groups (a key-value head and its query heads) are dealt."""
    per_group = sizes.query // sizes.key_value
    groups = balanced(sizes.key_value, ranks, rank)
    return np.concatenate([groups[:0], *(np.arange(g * per_group, (g + 1) * per_group) for g in groups)])


def _fits(member: Member, way: Dealing, sizes: Sizes) -> bool:
    tensor, slot, axis, parts = member
    for rank, shard in enumerate(tensor.layout.shards):
        want = _wanted(parts, slot, sizes, way, rank, tensor.layout.ranks)
        own = (*tensor.shape[:axis], _own_length(slot, way, want), *tensor.shape[axis + 1 :])
        if tensor.layout.cut_axes not in ((), (axis,)) or not np.array_equal(held(tensor, axis, rank), want):
            return False
        if (shard.shape if shard else ()) != own:
            return False
    return True


def _own_length(slot: Slot, way: Dealing, want: Index) -> int:
    return way.padded if way.padded and slot.meaning in ("word", "channel") else len(want)


def _wanted(parts: list[Part], slot: Slot, sizes: Sizes, way: Dealing, rank: int, ranks: int) -> Index:
    """The indices that a rank should hold, in order."""
    cells, base = [], 0
    for label, count, width, first in parts:
        if way.padded and slot.meaning in ("word", "channel"):
            units = np.arange(min(rank * way.padded, count), min((rank + 1) * way.padded, count))
        elif slot.meaning not in OF_ATTENTION and not label.endswith(("head", "group")):
            of = way.words if slot.meaning == "word" else way.channels
            blocks = balanced(-(-count // of), ranks, rank)
            units = (blocks[:, None] * of + np.arange(of)).reshape(-1)
            units = units[units < count]
        else:
            units = way.query_heads(rank)
            by_group = label.endswith("group") if slot.mixer else label not in BY_QUERY_HEAD
            if by_group:  # those that the rank's query heads use
                units = np.unique(units // (sizes.query // sizes.key_value))
            units = units[(units >= first) & (units < first + count)] - first
        cells.append(base + (units[:, None] * width + np.arange(width)).reshape(-1))
        base += count * width
    return np.concatenate(cells)


def _finding(member: Member, way: Dealing, sizes: Sizes, partner: str | None) -> Finding:
    """What is wrong with a tensor that does not fit."""
    tensor, slot, axis, parts = member
    cut, layout = tensor.layout.cut_axes, tensor.layout
    if cut and cut != (axis,):
        shown = " and ".join(map(str, cut))
        return Finding(f"is cut along axis {shown}, config.json asks for axis {axis}", tensor=tensor.name)
    want = [_wanted(parts, slot, sizes, way, rank, layout.ranks) for rank in range(layout.ranks)]
    if layout.is_replicated:
        heads = f": it has {parts[0].units} heads, rank 0 has {len(want[0])}"
        where = heads if slot.row_per_head else f": along axis {axis} here"
        return Finding(f"is whole on every rank, but its block is cut{where}", tensor=tensor.name)
    have = [held(tensor, axis, rank) for rank in range(layout.ranks)]
    if all(map(np.array_equal, have, want)):
        own = [list(shard.shape) if shard else None for shard in layout.shards]
        lengths = [_own_length(slot, way, cells) for cells in want]
        what = f"the ranks' own tensors are {own}, along axis {axis} they must be {lengths} long"
        return Finding(what, tensor=tensor.name)
    return describe_difference(tensor, axis, parts, have, want, partner)
