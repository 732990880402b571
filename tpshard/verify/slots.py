"""What a layer's cut axis counts: the words in which families of architectures are described for the layout check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tpshard.layout import Shape

Meaning = Literal["query", "key_value", "qkv", "kv", "channel", "gate_up", "word", "head_cell"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A kind of layer: what its cut axis counts, and which axis that is in the weight (in a bias it is axis 0, or
    there is none: ``consumer`` layers add their bias once).

    ``row_per_head``: the axis has one row for a head, not one for each cell of it. ``all_of``: the layer works on all
    heads together, so it is whole, and so must be the output of the layer named. ``cross``: the heads are those of
    cross-attention, a block of its own beside the layer's self-attention.
    """

    meaning: Meaning
    axis: int
    consumer: bool = False
    row_per_head: bool = False
    all_of: str = ""
    cross: bool = False

    def axis_of(self, shape: Shape) -> int | None:
        if len(shape) >= 2:
            return self.axis
        return None if self.consumer or not shape else 0

    @property
    def must_be_whole(self) -> bool:
        return bool(self.all_of) or self.meaning == "head_cell"


OUT, IN = 0, 1
INSIDE_A_HEAD = Slot("head_cell", 0)  # [head size], the same for all heads


def slot_of(family: Mapping[str, Slot], tensor: str) -> Slot | None:
    """The slot of a tensor, by the longest name that ends its layer's path (or its own)."""
    layer = tensor.rpartition(".")[0]
    found = [name for name in family for path in (layer, tensor) if path == name or path.endswith("." + name)]
    return family[max(found, key=len)] if found else None
