"""State-space models, linear attention, short convolutions, and hybrids of these with attention and experts."""

from __future__ import annotations

from tests.architectures import BASE, GROUPED, Architecture

TP = (2, 8, 4)  # four ranks share two key-value heads, groups or key heads, as eight do, and take half the time
FREE = GROUPED | {"hidden_size": 44, "head_dim": 6}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 26}
BOTH = {"layer_types": ["linear_attention", "full_attention"]}
CHANNELS = (2, 4, 3)  # where no heads bind

_STATES = {key: value for key, value in BASE.items() if key != "intermediate_size"}  # it follows from expand
_MAMBA = _STATES | {"hidden_size": 44, "state_size": 6, "expand": 2, "time_step_rank": 5, "conv_kernel": 3}
# Eight Mamba heads of 14 (here) are 112 channels; two groups of B and C are shared by 4 and by 8 ranks.
_MAMBA2 = _STATES | {"hidden_size": 56, "num_heads": 8, "head_dim": 14, "state_size": 6, "n_groups": 2, "chunk_size": 5}
_BAMBA = GROUPED | {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 5}
_GRANITE = _BAMBA | {
    "layer_types": ["mamba", "attention"], "num_local_experts": 3, "num_experts_per_tok": 2,
    "shared_intermediate_size": 34,
}  # fmt: skip
_JAMBA = GROUPED | {
    "mamba_d_state": 6, "mamba_dt_rank": 5, "mamba_expand": 3, "use_mamba_kernels": False, "attn_layer_period": 2,
    "attn_layer_offset": 1, "num_experts": 3, "num_experts_per_tok": 2, "expert_layer_period": 2,
    "expert_layer_offset": 1,
}  # fmt: skip
_ZAMBA = BASE | {
    "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 3,
    "layers_block_type": ["mamba", "hybrid", "hybrid"], "mamba_d_state": 6, "use_mamba_kernels": False,
}  # fmt: skip
_ZAMBA2 = _ZAMBA | {
    "n_mamba_heads": 8, "mamba_ngroups": 2, "num_mem_blocks": 1, "use_mem_rope": True, "adapter_rank": 5,
    "use_shared_attention_adapter": True, "chunk_size": 5,
}  # fmt: skip
_NEMOTRON_H = FREE | {
    "mamba_num_heads": 8, "mamba_head_dim": 14, "n_groups": 2, "ssm_state_size": 4, "use_mamba_kernels": False,
    "chunk_size": 5, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "n_routed_experts": 3,
    "moe_intermediate_size": 26, "moe_shared_expert_intermediate_size": 34, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_NEXT = GROUPED | BOTH | {
    "hidden_size": 44, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 8,
    "linear_key_head_dim": 6, "linear_value_head_dim": 10,
}  # fmt: skip
_NEXT_EXPERTS = _NEXT | EXPERTS | {"shared_expert_intermediate_size": 34}
_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 38, "num_heads": 8, "patch_size": 4, "temporal_patch_size": 2,
    "out_hidden_size": 44, "num_position_embeddings": 16,
}  # fmt: skip
_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
_IMAGES = {
    "vision_config": _VISION, "image_token_id": 9, "video_token_id": 10, "vision_start_token_id": 11,
    "vision_end_token_id": 12,
}  # fmt: skip
_OLMO_HYBRID = GROUPED | BOTH | {  # as many cells in keys as in values: else transformers saves the kernels wrong
    "linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_key_head_dim": 24, "linear_value_head_dim": 6,
}  # fmt: skip
_KIMI_LINEAR = BASE | EXPERTS | BOTH | {
    "hidden_size": 44, "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 14, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 10, "linear_attn_config": {"num_heads": 16, "head_dim": 3},
}  # fmt: skip
_LFM2 = GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_bias": True}
_RECURRENT_GEMMA = GROUPED | {
    "num_key_value_heads": 1, "num_hidden_layers": 3, "lru_width": 72, "attention_window_size": 16,
}  # fmt: skip
_XLSTM = _STATES | {
    "hidden_size": 40, "num_heads": 8, "qk_dim_factor": 1.4, "v_dim_factor": 3.0, "ffn_proj_factor": 1.7,
    "ffn_round_up_to_multiple_of": 26, "chunk_size": 8,
}  # fmt: skip

ARCHITECTURES = (
    Architecture("mamba", "mamba", _MAMBA, CHANNELS),
    Architecture("falcon_mamba", "mamba", _MAMBA, CHANNELS),
    Architecture("jamba", "jamba", _JAMBA, TP),
    Architecture("zamba", "zamba", _ZAMBA | {"n_mamba_heads": 2, "mamba_dt_rank": 5}, tp=(2,)),
    Architecture("mamba2", "mamba2", _MAMBA2, TP),
    Architecture("mamba2", "mamba2", _MAMBA2 | {"n_groups": 1}, TP, variant="one group"),
    Architecture("bamba", "bamba", _BAMBA | {"attn_layer_indices": [1]}, TP),
    Architecture("falcon_h1", "bamba", _BAMBA | {"mamba_d_ssm": 96, "mamba_rms_norm": True}, TP),
    Architecture("granitemoehybrid", "granitemoehybrid", _GRANITE, TP),
    Architecture("zamba2", "zamba2", _ZAMBA2, TP),
    Architecture("nemotron_h", "nemotron_h", _NEMOTRON_H, TP),
    Architecture("nemotron_h", "nemotron_h", _NEMOTRON_H | {"moe_latent_size": 18}, TP, variant="latent experts"),
    Architecture("recurrent_gemma", "recurrent_gemma", _RECURRENT_GEMMA, TP),
    Architecture("rwkv", "rwkv", BASE | {"hidden_size": 44, "attention_hidden_size": 68}, CHANNELS),
    Architecture("xlstm", "xlstm", _XLSTM, TP),
    Architecture("qwen3_next", "qwen3_next", _NEXT_EXPERTS, TP),
    Architecture("qwen3_5_text", "qwen3_5", _NEXT, TP),
    Architecture("qwen3_5_moe_text", "qwen3_5", _NEXT_EXPERTS, TP),
    Architecture(
        "qwen3_5",
        "qwen3_5",
        _IMAGES | {"text_config": _NEXT | {"rope_parameters": _ROTARY}},
        TP,
        head="Qwen3_5ForConditionalGeneration",
    ),
    Architecture(
        "qwen3_5_moe",
        "qwen3_5",
        _IMAGES | {"text_config": _NEXT_EXPERTS | {"rope_parameters": _ROTARY}},
        TP,
        head="Qwen3_5MoeForConditionalGeneration",
    ),
    Architecture("olmo_hybrid", "olmo_hybrid", _OLMO_HYBRID, TP),
    Architecture("kimi_linear", "kimi_linear", _KIMI_LINEAR, TP),
    Architecture("lfm2", "lfm2", _LFM2, TP),
    Architecture("lfm2_moe", "lfm2", _LFM2 | EXPERTS | {"num_dense_layers": 1}, TP),
    Architecture("lfm3", "lfm2", _LFM2 | {"head_dim": 10}, TP),
)
