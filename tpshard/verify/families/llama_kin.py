"""Decoders that add something of their own to Llama's layers."""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.verify.families.decoders import LLAMA
from tpshard.verify.slots import IN, OUT, Slot

_SINKS = {**LLAMA, "sinks": Slot("query", 0, row_per_head=True), "softmax_offset": Slot("query", 0, row_per_head=True)}
_NANOCHAT = {**LLAMA, "fc1": Slot("channel", OUT), "fc2": Slot("channel", IN, consumer=True)}
_BITNET = {  # norms over all heads and all channels, between a column and a row layer
    **LLAMA,
    "attn_sub_norm": Slot("query", 0, all_of="v_proj"),
    "ffn_sub_norm": Slot("channel", 0, all_of="up_proj"),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    **dict.fromkeys(("internlm3", "iquestcoder", "apertus", "hyperclovax", "doge"), LLAMA),
    **dict.fromkeys(("granite_swa", "flint"), _SINKS),
    "nanochat": _NANOCHAT,
    "bitnet": _BITNET,
}
TIED_BY_DEFAULT = frozenset({"granite_swa"})
HEAD_SIZE_BY_DEFAULT: Mapping[str, int] = dict.fromkeys(("internlm3", "iquestcoder", "flint"), 128)
