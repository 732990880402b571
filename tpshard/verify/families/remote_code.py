"""Decoders whose code is not part of transformers. Not the first Qwen: its config counts channels twice."""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.verify.families.decoders import LLAMA
from tpshard.verify.slots import IN, OUT, Slot

_INTERNLM2 = {
    "tok_embeddings": Slot("word", 0, consumer=True),
    "wqkv": Slot("qkv_by_group", OUT),
    "attention.wo": Slot("query", IN, consumer=True),
    "feed_forward.w1": Slot("channel", OUT),
    "feed_forward.w3": Slot("channel", OUT),
    "feed_forward.w2": Slot("channel", IN, consumer=True),
    "output": Slot("word", 0),
}
_BAICHUAN = {**LLAMA, "W_pack": Slot("qkv", OUT)}
_CHATGLM = {
    "embedding.word_embeddings": Slot("word", 0, consumer=True),
    "query_key_value": Slot("qkv", OUT),
    "self_attention.dense": Slot("query", IN, consumer=True),
    "dense_h_to_4h": Slot("gate_up", OUT),
    "dense_4h_to_h": Slot("channel", IN, consumer=True),
    "output_layer": Slot("word", 0),
}
_EXAONE = {
    "wte": Slot("word", 0, consumer=True),
    "q_proj": Slot("query", OUT),
    "k_proj": Slot("key_value", OUT),
    "v_proj": Slot("key_value", OUT),
    "out_proj": Slot("query", IN, consumer=True),
    "c_fc_0": Slot("channel", OUT),
    "c_fc_1": Slot("channel", OUT),
    "c_proj": Slot("channel", IN, consumer=True),
    "lm_head": Slot("word", 0),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    "internlm2": _INTERNLM2,
    "baichuan": _BAICHUAN,
    "chatglm": _CHATGLM,
    "exaone": _EXAONE,
}
TIED_BY_DEFAULT: frozenset[str] = frozenset()
