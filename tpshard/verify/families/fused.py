"""Decoders of other lines than Llama's: fused q, k, v in all their orders, plain feed-forwards, odd names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpshard.verify.families.decoders import GPT2
from tpshard.verify.slots import IN, INSIDE_A_HEAD, OUT, Slot

_GPTJ = {
    "wte": Slot("word", 0, consumer=True),
    "q_proj": Slot("query", OUT),
    "k_proj": Slot("key_value", OUT),
    "v_proj": Slot("key_value", OUT),
    "out_proj": Slot("query", IN, consumer=True),
    "fc_in": Slot("channel", OUT),
    "fc_out": Slot("channel", IN, consumer=True),
    "lm_head": Slot("word", 0),
}
_CODEGEN = {**_GPTJ, "qkv_proj": Slot("qvk_in_fours", OUT)}
_GPT_NEO = {**_GPTJ, "mlp.c_fc": Slot("channel", OUT), "mlp.c_proj": Slot("channel", IN, consumer=True)}
_CTRL = {
    "w": Slot("word", 0, consumer=True),
    "Wq": Slot("query", OUT),
    "Wk": Slot("key_value", OUT),
    "Wv": Slot("key_value", OUT),
    "multi_head_attention.dense": Slot("query", IN, consumer=True),
    "ffn.0": Slot("channel", OUT),
    "ffn.2": Slot("channel", IN, consumer=True),
    "lm_head": Slot("word", 0),
}
_OPT = {
    **_GPTJ,
    "embed_tokens": Slot("word", 0, consumer=True),
    "fc1": Slot("channel", OUT),
    "fc2": Slot("channel", IN, consumer=True),
    "output_projection": Slot("word", 0),
}
_BLOOM = {
    "word_embeddings": Slot("word", 0, consumer=True),
    "self_attention.query_key_value": Slot("qkv_by_head", OUT),
    "self_attention.dense": Slot("query", IN, consumer=True),
    "dense_h_to_4h": Slot("channel", OUT),
    "dense_4h_to_h": Slot("channel", IN, consumer=True),
    "lm_head": Slot("word", 0),
}
_FALCON_ONE_KEY = {**_BLOOM, "self_attention.query_key_value": Slot("qkv", OUT)}
_FALCON_GROUPS = {**_BLOOM, "self_attention.query_key_value": Slot("qkv_by_group", OUT)}
_GPT_NEOX = {
    **_BLOOM,
    "embed_in": Slot("word", 0, consumer=True),
    "attention.query_key_value": Slot("qkv_by_head", OUT),
    "attention.dense": Slot("query", IN, consumer=True),
    "embed_out": Slot("word", 0),
}
_PERSIMMON = {
    **_BLOOM,
    "embed_tokens": Slot("word", 0, consumer=True),
    "self_attn.query_key_value": Slot("qkv_by_head", OUT),
    "self_attn.dense": Slot("query", IN, consumer=True),
    **dict.fromkeys(("q_layernorm", "k_layernorm"), INSIDE_A_HEAD),
}
_BIGCODE = {  # Linear, not GPT-2's Conv1D
    "wte": Slot("word", 0, consumer=True),
    "attn.c_attn": Slot("qkv", OUT),
    "attn.c_proj": Slot("query", IN, consumer=True),
    "mlp.c_fc": Slot("channel", OUT),
    "mlp.c_proj": Slot("channel", IN, consumer=True),
    "lm_head": Slot("word", 0),
}
_BIGCODE_BY_HEAD = {**_BIGCODE, "attn.c_attn": Slot("qkv_by_head", OUT)}
_MPT = {
    "wte": Slot("word", 0, consumer=True),
    "Wqkv": Slot("qkv", OUT),
    "out_proj": Slot("query", IN, consumer=True),
    "up_proj": Slot("channel", OUT),
    "down_proj": Slot("channel", IN, consumer=True),
    "lm_head": Slot("word", 0),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    "gptj": _GPTJ,
    "codegen": _CODEGEN,
    "gpt_neo": _GPT_NEO,
    **dict.fromkeys(("opt", "xglm", "biogpt"), _OPT),
    "ctrl": _CTRL,
    "openai-gpt": GPT2 | {"tokens_embed": Slot("word", 0, consumer=True)},
    "bloom": _BLOOM,
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), _GPT_NEOX),
    **dict.fromkeys(("persimmon", "fuyu"), _PERSIMMON),
    "falcon": _FALCON_GROUPS,
    "gpt_bigcode": _BIGCODE,
    "mpt": _MPT,
}
TIED_BY_DEFAULT = frozenset(FAMILIES) - {"gptj", "codegen", "gpt_neox", "persimmon", "fuyu"}


def variant_of(config: Mapping[str, Any]) -> Mapping[str, Slot] | None:
    """The family where one model_type has had several layouts; None where it has one."""
    match config.get("model_type"), config.get("new_decoder_architecture"), config.get("multi_query"):
        case "falcon", True, _:
            return _FALCON_GROUPS
        case "falcon", _, multi_query:
            return _FALCON_ONE_KEY if multi_query else _BLOOM
        case "gpt_bigcode", _, multi_query:
            return _BIGCODE if multi_query else _BIGCODE_BY_HEAD
        case _:
            return None
