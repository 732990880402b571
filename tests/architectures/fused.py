"""Decoders of other lines than Llama's: fused q, k, v in all their orders, plain feed-forwards, odd names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.architectures import PLAIN, Architecture
from tpshard.checkpoint import Checkpoint
from tpshard.layout import Shape

TP = (2, 4, 3)
WORDS: Mapping[str, Any] = {"vocab_size": 211, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OF_GPT2 = {**WORDS, "n_embd": 84, "n_layer": 2, "n_head": 12, "n_positions": 40, "n_inner": 52}
FALCON = {
    **WORDS, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "ffn_hidden_size": 52,
    "alibi": False, "bias": False, "parallel_attn": True, "multi_query": True, "new_decoder_architecture": False,
}  # fmt: skip

ARCHITECTURES = (
    Architecture("gptj", "gptj", OF_GPT2 | {"n_embd": 96, "rotary_dim": 6}, TP),
    Architecture("codegen", "codegen", OF_GPT2 | {"n_embd": 96, "rotary_dim": 6}, (2, 4)),  # four blocks of heads
    Architecture(
        "gpt_neo",
        "gpt_neo",
        {
            **WORDS, "hidden_size": 84, "num_layers": 2, "num_heads": 12, "attention_types": [[["global", "local"], 1]],
            "window_size": 5, "max_position_embeddings": 40, "intermediate_size": 52,
        },
        TP,
    ),
    Architecture("bloom", "bloom", {**WORDS, "hidden_size": 84, "n_layer": 2, "n_head": 12}, TP),
    Architecture("gpt_neox", "gpt_neox", PLAIN | {"rotary_pct": 0.6, "hidden_size": 120}, TP),
    Architecture(
        "gpt_neox_japanese",
        "gpt_neox",
        {
            **WORDS, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12,
            "intermediate_multiple_size": 3, "rotary_pct": 0.5, "max_position_embeddings": 40,
        },
        TP,
    ),
    Architecture("persimmon", "persimmon", PLAIN | {"hidden_size": 96}, TP),
    Architecture(
        "fuyu",
        "fuyu",
        {
            "text_config": PLAIN | {"hidden_size": 96, "model_type": "persimmon"},
            "patch_size": 5, "num_channels": 3, "image_token_id": 209,
            **{key: PLAIN[key] for key in ("vocab_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")},
            "hidden_size": 96,
        },
        TP,
    ),
    Architecture(
        "falcon",
        "falcon-rw",
        FALCON | {"multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
        TP,
        variant="RW",
    ),
    Architecture("falcon", "falcon-7b", FALCON, (2, 4, 5), variant="7B"),
    Architecture(
        "falcon", "falcon-40b", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 4}, (2, 4), variant="40B"
    ),
    Architecture("gpt_bigcode", "gpt_bigcode", OF_GPT2, TP, variant="multi-query"),
    Architecture("gpt_bigcode", "gpt_bigcode-mha", OF_GPT2 | {"multi_query": False}, TP, variant="multi-head"),
    Architecture(
        "ctrl", "ctrl", {**WORDS, "n_embd": 84, "n_layer": 2, "n_head": 12, "n_positions": 40, "dff": 52}, TP
    ),
    Architecture("openai-gpt", "openai-gpt", {**WORDS, "n_embd": 84, "n_layer": 2, "n_head": 12, "n_positions": 40}, TP),
    Architecture(
        "opt",
        "opt",
        {
            **WORDS, "hidden_size": 84, "ffn_dim": 52, "num_hidden_layers": 2, "num_attention_heads": 12,
            "max_position_embeddings": 40, "word_embed_proj_dim": 26,
        },
        TP,
    ),
    Architecture(
        "xglm",
        "xglm",
        {
            **WORDS, "d_model": 84, "ffn_dim": 52, "num_layers": 2, "attention_heads": 12,
            "max_position_embeddings": 40,
        },
        TP,
    ),
    Architecture("biogpt", "xglm", PLAIN, TP),
    Architecture("mpt", "mpt", {**WORDS, "d_model": 84, "n_heads": 12, "n_layers": 2, "max_seq_len": 40}, TP),
)  # fmt: skip

# What files of older versions hold beside the weights: the layer by which to find an attention, and its buffers.
_MASKS: Mapping[str, Shape] = {"bias": (1, 1, 40, 40), "masked_bias": ()}
_ROTARY: Mapping[str, Shape] = {"rotary_emb.inv_freq": (5,)}
_OLD: Mapping[str, tuple[str, Mapping[str, Shape]]] = {
    "gptj": ("q_proj", _MASKS),
    "gpt_neo": ("q_proj", _MASKS),
    "codegen": ("qkv_proj", {**_MASKS, "causal_mask": (1, 1, 40, 40)}),
    "gpt_neox": ("query_key_value", _MASKS | _ROTARY),
    "gpt_neox_japanese": ("query_key_value", _ROTARY),
    "falcon": ("query_key_value", _ROTARY),
}


def old_buffers(checkpoint: Checkpoint) -> dict[str, Shape]:
    if checkpoint.config.get("model_type") == "openai-gpt":
        return {"transformer.position_ids": (1, 40)}
    layer, buffers = _OLD.get(str(checkpoint.config.get("model_type")), ("", {}))
    places = {name.partition(f".{layer}.")[0] for name in checkpoint.tensors if f".{layer}." in name}
    return {f"{place}.{name}": shape for place in places for name, shape in buffers.items()}
