"""DeepSeek's inference code keeps no configuration beside its files; its own is a file that the user gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpshard.engines.settings.kind import Settings
from tpshard.errors import InputError

NAMES = {  # its name: config.json's
    "vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads", "n_routed_experts": "n_routed_experts", "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok", "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim", "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
}  # fmt: skip
DEFAULTS: Mapping[str, tuple[str, Any]] = {  # of its code
    "n_expert_groups": ("n_group", 1), "n_limited_groups": ("topk_group", 1),
    "route_scale": ("routed_scaling_factor", 1.0), "score_func": ("scoring_func", "softmax"),
    "rope_theta": ("rope_theta", 10000.0),
}  # fmt: skip
TURNS = {
    "original_seq_len": ("original_max_position_embeddings", 4096), "rope_factor": ("factor", 40),
    "beta_fast": ("beta_fast", 32), "beta_slow": ("beta_slow", 1), "mscale": ("mscale", 1.0),
}  # fmt: skip
BLOCK = 128  # a constant of its kernels


class DeepSeek(Settings):
    def given(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json, or a file of inference/configs."""
        if "n_dense_layers" not in config or "model_type" in config:
            return dict(config)
        missing = [name for name in NAMES if name not in config]
        if missing:
            raise InputError(f"the configuration of DeepSeek's inference code lacks '{missing[0]}'")
        out: dict[str, Any] = {ours: config[name] for name, ours in NAMES.items()}
        out |= {ours: config.get(name, default) for name, (ours, default) in DEFAULTS.items()}
        scaling = {ours: config.get(name, default) for name, (ours, default) in TURNS.items()}
        out |= {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": config["n_heads"],
            "q_lora_rank": config.get("q_lora_rank") or None,
            "rope_scaling": {"rope_type": "yarn", "mscale_all_dim": scaling["mscale"], **scaling},
            "max_position_embeddings": scaling["original_max_position_embeddings"] * int(scaling["factor"]),
            "num_nextn_predict_layers": 0,
            "norm_topk_prob": out["scoring_func"] == "sigmoid",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        if config.get("dtype") == "fp8":
            blocks = {"weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3", "activation_scheme": "dynamic"}
            out["quantization_config"] = {"quant_method": "fp8", **blocks}
        return out
