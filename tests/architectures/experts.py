"""Decoders with mixtures of experts, and those with multi-head latent attention: five experts, two for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.architectures import BASE, GROUPED, Architecture

FREE = GROUPED | {"hidden_size": 44, "head_dim": 6}  # eight heads of 6 are 48, not 44
BOUND = GROUPED | {"hidden_size": 80}  # where hidden must be heads x head size
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
CHOSEN = {"num_experts": 5, "num_experts_per_tok": 2}
MOE = CHOSEN | {"moe_intermediate_size": 38}
# The first layer dense, the second of experts.
ROUTED = MOE | {
    "n_routed_experts": 5, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT: Mapping[str, Any] = {
    **BASE,
    **ROUTED,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "hidden_size": 84,
    "kv_lora_rank": 18,
    "q_lora_rank": 25,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
}
INDEXED = LATENT | {"index_head_dim": 8, "index_n_heads": 3, "index_topk": 7}
TP = (2, 4, 3)  # of twelve heads
DBRX = {
    "vocab_size": 211, "d_model": 80, "n_heads": 8, "n_layers": 2, "max_seq_len": 40,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 52, "moe_num_experts": 5, "moe_top_k": 2, "hidden_size": 80},
}  # fmt: skip

ARCHITECTURES = (
    Architecture("mixtral", "moe", FREE | LOCAL),
    Architecture("phimoe", "moe", BOUND | LOCAL | {"attention_bias": True, "lm_head_bias": True}),
    Architecture("qwen2_moe", "moe", FREE | MOE | {"shared_expert_intermediate_size": 34}),
    Architecture("qwen3_moe", "moe", FREE | MOE),
    Architecture("glm4_moe", "moe", FREE | ROUTED | {"use_qk_norm": True, "attention_bias": True}),
    Architecture("dots1", "moe", FREE | ROUTED),
    Architecture("solar_open", "moe", FREE | ROUTED),
    Architecture("exaone_moe", "moe", FREE | ROUTED | {"num_shared_experts": 1}),
    Architecture(
        "ernie4_5_moe",
        "moe",
        FREE | MOE | {"moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    Architecture("hunyuan_v1_moe", "moe", FREE | {"num_experts": 5, "moe_topk": 2, "num_shared_expert": 1}),
    Architecture("hy_v3", "moe", FREE | MOE),
    Architecture("afmoe", "moe", FREE | MOE | {"num_dense_layers": 1, "num_shared_experts": 1}),
    Architecture("laguna", "moe", FREE | MOE | {"shared_expert_intermediate_size": 34}),
    Architecture("mellum", "moe", FREE | MOE),
    Architecture("cohere2_moe", "moe", BOUND | CHOSEN | {"head_dim": 10, "num_shared_experts": 1}),
    Architecture("olmoe", "olmoe", BOUND | CHOSEN),
    Architecture("flex_olmo", "olmoe", BOUND | CHOSEN),
    Architecture("minimax_m2", "olmoe", FREE | LOCAL),
    Architecture("deepseek_v2", "deepseek", LATENT, TP),
    Architecture("deepseek_v2", "deepseek", LATENT | {"q_lora_rank": None}, TP, variant="lite"),
    Architecture("deepseek_v3", "deepseek", LATENT, TP, also=("kimi_k2",)),
    Architecture("deepseek_v32", "deepseek", INDEXED, TP),
    Architecture("glm4_moe_lite", "deepseek", LATENT, TP),
    Architecture("glm_moe_dsa", "deepseek", INDEXED, TP),
    Architecture("mistral4", "deepseek", LATENT, TP),
    Architecture("gpt_oss", "gpt-oss", FREE | LOCAL | {"layer_types": ["sliding_attention", "full_attention"]}),
    Architecture("llama4_text", "llama4", FREE | LOCAL | {"intermediate_size_mlp": 46, "interleave_moe_layer_step": 2}),
    Architecture("granitemoe", "granitemoe", BOUND | LOCAL),
    Architecture("granitemoeshared", "granitemoe", BOUND | LOCAL | {"shared_intermediate_size": 34}),
    Architecture(
        "jetmoe",
        "jetmoe",
        BASE | LOCAL | {"hidden_size": 44, "num_key_value_heads": 12, "kv_channels": 6},
        TP,
    ),
    Architecture("dbrx", "dbrx", DBRX),
    Architecture(
        "minimax",
        "minimax",
        FREE | LOCAL | {"layer_types": ["linear_attention", "full_attention"], "block_size": 7},
    ),
)
