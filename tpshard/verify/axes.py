"""What an axis is made of, by config.json, and which of its cells a rank holds, by the manifest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpshard.checkpoint import Stored
from tpshard.verify.families import Sizes
from tpshard.verify.slots import Slot

Index = NDArray[np.int64]


class Part(NamedTuple):
    """A stretch of an axis: so many units called ``label``, of ``width`` cells each."""

    label: str
    units: int
    width: int

    @property
    def cells(self) -> int:
        return self.units * self.width


def held(tensor: Stored, axis: int, rank: int) -> Index:
    """The indices along an axis that the manifest gives a rank, in the order of the rank's own tensor."""
    shard = tensor.layout.shards[rank]
    runs = [np.arange(*run) for run in shard.spans[axis]] if shard else []
    return np.concatenate([np.arange(0), *runs])


def parts_of(tensor: Stored, slot: Slot, axis: int, sizes: Sizes) -> list[Part]:
    """The parts that make up an axis. Raises ValueError where config.json asks for another size."""
    size = tensor.shape[axis]
    query, key_value = sizes.query, sizes.key_value
    match slot.meaning:
        case "channel" | "word":
            parts = [Part(slot.meaning, sizes.of(slot.meaning) or size, 1)]
        case "gate_up":
            half = sizes.channels or (size + 1) // 2
            parts = [Part("gate channel", half, 1), Part("up channel", half, 1)]
        case "head_cell":
            parts = [Part("head cell", sizes.head or size, 1)]
        case "query":
            parts = _heads([("query head", query)], slot, size, sizes)
        case "key_value":
            parts = _heads([("key-value head", key_value)], slot, size, sizes)
        case "qkv":
            counts = [("query head", query), ("key head", key_value), ("value head", key_value)]
            parts = _heads(counts, slot, size, sizes)
        case "kv":
            parts = _heads([("key head", key_value), ("value head", key_value)], slot, size, sizes)
    if sum(part.cells for part in parts) != size:
        raise ValueError(_misfit(axis, size, parts, tensor.layout.ranks))
    return parts


def _heads(counts: list[tuple[str, int]], slot: Slot, size: int, sizes: Sizes) -> list[Part]:
    """Parts of whole heads; where config.json is silent about the size of one, what the axis has room for."""
    width = 1 if slot.row_per_head else sizes.head or size // sum(count for _, count in counts)
    return [Part(label, count, width) for label, count in counts]


def _misfit(axis: int, size: int, parts: list[Part], ranks: int) -> str:
    """The two sizes, and what is behind it where that shows."""
    said = " and ".join(
        f"{part.units} {part.label}{'s' * (part.units != 1)}" + (f" of {part.width}" if part.width > 1 else "")
        for part in parts
    )
    asked = sum(part.cells for part in parts)
    divided = ranks > 1 and size == asked * ranks
    why = f"; is it one rank's config.json, already divided by {ranks}?" if divided else ""
    return f"has {size} cells along axis {axis}, config.json says {said}: {asked}{why}"
