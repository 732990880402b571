"""Decoders that add something of their own to Llama's layers."""

from __future__ import annotations

from tests.architectures import GROUPED, PLAIN, Architecture

FREE = GROUPED | {"hidden_size": 56, "head_dim": 6}  # eight heads of 6 are 48, not 56
LATENT = PLAIN | {
    "hidden_size": 84, "num_attention_heads": 12, "num_key_value_heads": 12, "q_lora_rank": 18, "kv_lora_rank": 14,
    "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 7,
}  # fmt: skip
OF_GEMMA = FREE | {"vocab_size_per_layer_input": 211, "hidden_size_per_layer_input": 10, "tie_word_embeddings": True}
GEMMA4 = OF_GEMMA | {"global_head_dim": 12, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4_SHARED = GEMMA4 | {
    "num_key_value_heads": 4, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
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
    Architecture(
        "gemma3n_text",
        "gemma3n_text",
        OF_GEMMA
        | {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "laurel_rank": 9,
            "altup_num_inputs": 3,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.7, 0.0, 0.8, 0.0],
        },
    ),
    Architecture("gemma4_text", "gemma4_text", GEMMA4 | {"num_kv_shared_layers": 0}),
    Architecture("gemma4_text", "gemma4_text-shared", GEMMA4_SHARED, variant="shared keys"),
    Architecture("gemma4_unified_text", "gemma4_unified_text", GEMMA4_SHARED),
    Architecture("hrm_text", "hrm_text", PLAIN | {"hidden_size": 84, "head_dim": 8}, (2, 4, 3)),
    Architecture("minicpm3", "minicpm3", LATENT, (2, 4, 3)),
    Architecture("youtu", "minicpm3", LATENT, (2, 4, 3)),
)
