"""Decoders that add something of their own to Llama's layers."""

from __future__ import annotations

from tests.architectures import GROUPED, PLAIN, Architecture

FREE = GROUPED | {"hidden_size": 56, "head_dim": 6}  # eight heads of 6 are 48, not 56
LATENT = PLAIN | {
    "hidden_size": 84, "num_attention_heads": 12, "num_key_value_heads": 12, "q_lora_rank": 18, "kv_lora_rank": 14,
    "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 7,
}  # fmt: skip

ARCHITECTURES = (
    Architecture("internlm3", "llama", FREE, head="LlamaForCausalLM"),
    Architecture("iquestcoder", "llama", FREE, head="LlamaForCausalLM"),
    Architecture("apertus", "apertus", FREE),
    Architecture("granite_swa", "sinks", FREE),
    Architecture("flint", "sinks", FREE | {"layer_types": ["sliding_attention", "full_attention"]}),
    Architecture("hyperclovax", "hyperclovax", FREE),
    Architecture("nanochat", "nanochat", FREE),
    Architecture("bitnet", "bitnet", FREE | {"hidden_size": 48, "head_dim": 6, "num_attention_heads": 8}),
    Architecture("diffllama", "diffllama", FREE | {"num_attention_heads": 16, "num_key_value_heads": 4}, (2, 4, 8)),
    Architecture("doge", "doge", FREE),
    Architecture("hrm_text", "hrm_text", PLAIN | {"hidden_size": 84, "head_dim": 8}, (2, 4, 3)),
    Architecture("minicpm3", "minicpm3", LATENT, (2, 4, 3)),
    Architecture("youtu", "minicpm3", LATENT, (2, 4, 3)),
)
