"""What a layer's cut axis counts: the words in which families of architectures are described for the layout check."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tpshard.layout import Shape

Meaning = Literal[
    "query", "key_value", "qkv", "kv", "qkv_by_head", "qkv_by_group", "qvk_in_fours",
    "channel", "gate_up", "gate_up_pairs", "word", "head_cell", "hidden", "mixer",
]  # fmt: skip
OF_ATTENTION = frozenset({"query", "key_value", "qkv", "kv", "qkv_by_head", "qkv_by_group", "qvk_in_fours"})


@dataclass(frozen=True, slots=True)
class Slot:
    """A kind of layer: what its cut axis counts, and which axis that is in the weight (in a bias it is axis 0, or
    there is none: ``consumer`` layers add their bias once).

    Fused: ``qkv`` is all of q, then all of k, of v; ``qkv_by_head`` each head's q, k and v; ``qkv_by_group`` each
    key-value head's query heads, then its k and v; ``qvk_in_fours`` four times q, v, k of a quarter of the heads.

    ``row_per_head``: the axis has one row for a head, not one for each cell of it. ``all_of``: the layer works on all
    heads together, so it is whole, and so must be the output of the layer named. ``cross``: the heads are those of
    cross-attention, a block of its own beside the layer's self-attention.

    ``width``: the config keys whose sum is the size of a head here, where heads are not all of one size. ``expert``:
    of experts that a router chooses, or of those that every token meets, each a block of their own with as many
    channels as they like; ``stacked``: all experts one after another along the axis.
    ``mixer``: the parts of an axis in a state space, linear attention or a convolution, as the config's Mixer knows
    them. ``may_be_whole``: ranks take of it what is theirs.
    """

    meaning: Meaning
    axis: int
    consumer: bool = False
    row_per_head: bool = False
    all_of: str = ""
    cross: bool = False
    width: tuple[str, ...] = ()
    expert: Literal["", "routed", "shared"] = ""
    stacked: bool = False
    mixer: tuple[str, ...] = ()
    may_be_whole: bool = False

    def axis_of(self, shape: Shape) -> int | None:
        if len(shape) >= 2:
            return self.axis
        return None if self.consumer or not shape else 0

    @property
    def must_be_whole(self) -> bool:
        return bool(self.all_of) or self.meaning in ("head_cell", "hidden")


OUT, IN = 0, 1
NUMBER = re.compile(r"\.\d+(?=\.|$)")
INSIDE_A_HEAD = Slot("head_cell", 0)  # [head size], the same for all heads


def slot_of(family: Mapping[str, Slot], tensor: str) -> Slot | None:
    """The slot of a tensor, by the longest name that ends its layer's path (or its own), as it is (``ffn.0``) or
    with # for its numbers."""
    own = (tensor.rpartition(".")[0], tensor)
    paths = [*own, *(NUMBER.sub(".#", path) for path in own)]
    found = [name for name in family for path in paths if path == name or path.endswith("." + name)]
    return family[max(found, key=len)] if found else None
