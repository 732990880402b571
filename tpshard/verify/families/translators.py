"""Encoder-decoders: two stacks, whose heads and feed-forwards may differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpshard.verify.families.decoders import LLAMA
from tpshard.verify.slots import IN, OUT, Slot

_WORDS = {
    "shared": Slot("word", 0, consumer=True),
    "embed_tokens": Slot("word", 0, consumer=True),
    "lm_head": Slot("word", 0),
}
_BIAS_OF_HEADS = Slot("query", 1, row_per_head=True)  # a table [buckets, heads]


def _attention(path: str, query: str, key: str, value: str, out: str, cross: bool = False) -> dict[str, Slot]:
    return {
        f"{path}.{query}": Slot("query", OUT, cross=cross),
        f"{path}.{key}": Slot("key_value", OUT, cross=cross),
        f"{path}.{value}": Slot("key_value", OUT, cross=cross),
        f"{path}.{out}": Slot("query", IN, consumer=True, cross=cross),
    }


_SELF = "SelfAttention", "LocalSelfAttention", "TransientGlobalSelfAttention"
_T5 = {
    **_WORDS,
    **dict.fromkeys(("relative_attention_bias", "global_relative_attention_bias"), _BIAS_OF_HEADS),
    **{name: slot for kind in _SELF for name, slot in _attention(kind, "q", "k", "v", "o").items()},
    **_attention("EncDecAttention", "q", "k", "v", "o", cross=True),
    **dict.fromkeys(("wi", "wi_0", "wi_1"), Slot("channel", OUT)),
    "wo": Slot("channel", IN, consumer=True),
}
_PROJECTIONS = "q_proj", "k_proj", "v_proj", "out_proj"
_BART = {
    **_WORDS,
    **_attention("self_attn", *_PROJECTIONS),
    **_attention("encoder_attn", *_PROJECTIONS, cross=True),
    **_attention("cross_attention", *_PROJECTIONS, cross=True),
    "fc1": Slot("channel", OUT),
    "fc2": Slot("channel", IN, consumer=True),
}
_LED = {
    **_BART,
    **_attention("longformer_self_attn", "query", "key", "value", "nothing"),
    **_attention("longformer_self_attn", "query_global", "key_global", "value_global", "nothing"),
    "self_attn.output": Slot("query", IN, consumer=True),
}
_BIGBIRD = {
    **_BART,
    **_attention("self_attn.self", "query", "key", "value", "nothing"),
    "self_attn.output": Slot("query", IN, consumer=True),
}
_PROPHETNET = {
    **_attention("self_attn", "query_proj", "key_proj", "value_proj", "out_proj"),
    **_attention("cross_attn", "query_proj", "key_proj", "value_proj", "out_proj", cross=True),
    "word_embeddings": Slot("word", 0, consumer=True),
    "feed_forward.intermediate": Slot("channel", OUT),
    "feed_forward.output": Slot("channel", IN, consumer=True),
    "lm_head": Slot("word", 0),
}
_T5GEMMA = {
    **LLAMA,
    **_attention("cross_attn", "q_proj", "k_proj", "v_proj", "o_proj", cross=True),
    "lm_head.out_proj": Slot("word", 0),
}
_BARTS = (
    "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mvp", "nllb-moe", "pegasus", "pegasus_x",
    "plbart",
)  # fmt: skip
_T5S = "t5", "longt5", "mt5", "umt5", "switch_transformers"

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    **dict.fromkeys(_T5S, _T5),
    **dict.fromkeys(_BARTS, _BART),
    "led": _LED,
    "bigbird_pegasus": _BIGBIRD,
    "prophetnet": _PROPHETNET,
    "t5gemma": _T5GEMMA,
}
TIED_BY_DEFAULT = frozenset(FAMILIES)

STACKS = "encoder", "decoder"


def stack_of(tensor: str) -> str:
    """encoder, decoder, or nothing of what both share."""
    return next((segment for segment in tensor.split(".") if segment in STACKS), "")


def config_of(config: Mapping[str, Any], stack: str) -> Mapping[str, Any]:
    """The sizes of one stack under the keys that models of one stack have; of other models the config itself.

    >>> config_of({"model_type": "bart", "d_model": 6, "decoder_attention_heads": 3}, "decoder")["num_attention_heads"]
    3
    """
    model_type, stack = config.get("model_type"), stack or "decoder"
    if model_type not in FAMILIES:
        return config
    if model_type == "t5gemma":
        own = config.get(stack)
        return {**(own if isinstance(own, Mapping) else {}), "vocab_size": config.get("vocab_size")}
    if model_type in _T5S:
        keys = {"num_attention_heads": "num_heads", "head_dim": "d_kv", "intermediate_size": "d_ff"}
    elif model_type == "prophetnet":
        keys = {"num_attention_heads": f"num_{stack}_attention_heads", "intermediate_size": f"{stack}_ffn_dim"}
    else:
        keys = {"num_attention_heads": f"{stack}_attention_heads", "intermediate_size": f"{stack}_ffn_dim"}
    return {**config, **{plain: config.get(key) for plain, key in keys.items()}}
