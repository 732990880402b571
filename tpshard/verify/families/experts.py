"""Decoders with mixtures of experts, and those with multi-head latent attention."""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.verify.families.decoders import LLAMA, OLMO2
from tpshard.verify.slots import IN, OUT, Slot

_UP = Slot("channel", OUT, expert="routed")
_DOWN = Slot("channel", IN, consumer=True, expert="routed")
_SHARED = {
    f"{name}.{layer}": slot
    for name in ("shared_expert", "shared_experts", "shared_mlp")
    for layer, slot in {
        "gate_proj": Slot("channel", OUT, expert="shared"),
        "up_proj": Slot("channel", OUT, expert="shared"),
        "down_proj": Slot("channel", IN, consumer=True, expert="shared"),
    }.items()
}
_EXPERTS = {
    **dict.fromkeys(("experts.#.gate_proj", "experts.#.up_proj", "experts.#.w1", "experts.#.w3"), _UP),
    **dict.fromkeys(("experts.#.down_proj", "experts.#.w2"), _DOWN),
    "mlp.experts.gate_up_proj": Slot("gate_up", 1, expert="routed"),  # in stacks, [experts, out, in]
    "mlp.experts.down_proj": Slot("channel", 2, consumer=True, expert="routed"),
    "shared_head.head": Slot("word", 0),  # of layers that predict further tokens
    **_SHARED,
}
_MOE = {
    **LLAMA,
    **_EXPERTS,
    "self_attn.gate_proj": Slot("query", OUT),
    "self_attn.g_proj": Slot("query", OUT, row_per_head=True),
}
_OLMOE = {**OLMO2, **_EXPERTS}
# Each head: a plain and a rotary part of the query; from the latent its plain key and its value.
_LATENT = {
    **{name: slot for name, slot in _MOE.items() if not name.endswith("norm")},  # those that there are, are no head's
    **dict.fromkeys(("q_proj", "q_b_proj"), Slot("query", OUT, width=("qk_nope_head_dim", "qk_rope_head_dim"))),
    "kv_b_proj": Slot("query", OUT, width=("qk_nope_head_dim", "v_head_dim")),
    "o_proj": Slot("query", IN, consumer=True, width=("v_head_dim",)),
}
_GRANITE = {
    **LLAMA,
    "block_sparse_moe.input_linear": Slot("gate_up", 1, expert="routed"),
    "block_sparse_moe.output_linear": Slot("channel", 2, consumer=True, expert="routed"),
    "shared_mlp.input_linear": Slot("gate_up", OUT, expert="shared"),
    "shared_mlp.output_linear": Slot("channel", IN, consumer=True, expert="shared"),
}
_GPT_OSS = {  # stacks [experts, in, out]; gate and up in turn
    **LLAMA,
    "self_attn.sinks": Slot("query", 0, row_per_head=True),
    "experts.gate_up_proj": Slot("gate_up_pairs", 2, expert="routed"),
    "experts.gate_up_proj_bias": Slot("gate_up_pairs", 1, expert="routed"),
    "experts.down_proj": Slot("channel", 1, consumer=True, expert="routed"),
    "experts.down_proj_bias": Slot("hidden", 1, expert="routed"),
}
_LLAMA4 = {  # stacks [experts, in, out]; gate | up
    **LLAMA,
    **_SHARED,
    "experts.gate_up_proj": Slot("gate_up", 2, expert="routed"),
    "experts.down_proj": Slot("channel", 1, consumer=True, expert="routed"),
}
_JETMOE = {  # every expert of the attention has as many query heads as there are key-value heads
    **LLAMA,
    "kv_proj": Slot("kv", OUT),
    "self_attention.experts.input_linear": Slot("key_value", 1),
    "self_attention.experts.output_linear": Slot("key_value", 2, consumer=True),
    "mlp.input_linear": Slot("gate_up", 1, expert="routed"),
    "mlp.output_linear": Slot("channel", 2, consumer=True, expert="routed"),
}
_DBRX = {
    "wte": Slot("word", 0, consumer=True),
    "Wqkv": Slot("qkv", OUT),
    "out_proj": Slot("query", IN, consumer=True),
    "experts.mlp.w1": Slot("channel", 0, expert="routed", stacked=True),
    "experts.mlp.v1": Slot("channel", 0, expert="routed", stacked=True),
    "experts.mlp.w2": Slot("channel", 0, consumer=True, expert="routed", stacked=True),
    "lm_head": Slot("word", 0),
}
_MINIMAX = {
    **_MOE,
    "self_attn.qkv_proj": Slot("query", OUT, width=("head_dim",) * 3),  # of each head q, k and v
    "self_attn.output_gate": Slot("query", OUT),
    "self_attn.out_proj": Slot("query", IN, consumer=True),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    **dict.fromkeys(("mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "dots1", "solar_open"), _MOE),
    **dict.fromkeys(("exaone_moe", "ernie4_5_moe", "hunyuan_v1_moe", "hy_v3", "afmoe", "laguna", "mellum"), _MOE),
    "cohere2_moe": _MOE,
    **dict.fromkeys(("olmoe", "flex_olmo", "minimax_m2"), _OLMOE),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "mistral4"), _LATENT),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), _GRANITE),
    "gpt_oss": _GPT_OSS,
    "llama4_text": _LLAMA4,
    "jetmoe": _JETMOE,
    "dbrx": _DBRX,
    "minimax": _MINIMAX,
}
TIED_BY_DEFAULT = frozenset({"cohere2_moe", "ernie4_5_moe", "jetmoe"})
HEAD_SIZE_BY_DEFAULT: Mapping[str, int] = {
    **dict.fromkeys(("solar_open", "hy_v3", "afmoe", "laguna", "mellum", "cohere2_moe", "minimax_m2"), 128),
    **dict.fromkeys(("llama4_text", "jetmoe"), 128),
    "gpt_oss": 64,
}
