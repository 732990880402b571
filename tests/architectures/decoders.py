"""Decoders with separate or fused q, k, v and one feed-forward in each layer."""

from __future__ import annotations

from tests.architectures import GROUPED, PLAIN, Architecture

FREE = GROUPED | {"hidden_size": 44, "head_dim": 6}  # eight heads of 6 are 48, not 44
MULTIPLE = FREE | {"hidden_size": 56}  # where hidden must be a multiple of the heads
BOUND = GROUPED | {"hidden_size": 80}  # where hidden must be heads x head size, and the latter even

_LLAMA_FREE = "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "smollm3", "seed_oss"
_LLAMA_MULTIPLE = "llama", "arcee", "cwm", "jais2", "gemma2", "gemma3_text", "vaultgemma"

ARCHITECTURES = (
    *(Architecture(kind, "llama", FREE) for kind in _LLAMA_FREE),
    *(Architecture(kind, "llama", FREE) for kind in ("exaone4", "ernie4_5", "nemotron", "hunyuan_v1_dense")),
    *(Architecture(kind, "llama", MULTIPLE) for kind in _LLAMA_MULTIPLE),
    *(Architecture(kind, "llama", BOUND) for kind in ("granite", "olmo")),
    Architecture("helium", "llama", BOUND | {"head_dim": 10}),
    Architecture("glm", "glm", FREE),
    Architecture("glm4", "glm", FREE),
    Architecture("phi3", "phi3", FREE),
    Architecture("olmo2", "olmo2", BOUND),
    Architecture("olmo3", "olmo2", BOUND),
    Architecture("starcoder2", "starcoder2", BOUND),
    Architecture("cohere", "cohere", BOUND | {"use_qk_norm": True}),
    Architecture("cohere2", "cohere", BOUND | {"head_dim": 10}),
    Architecture("phi", "phi", BOUND | {"qk_layernorm": True, "partial_rotary_factor": 0.4}),
    Architecture(
        "stablelm", "stablelm", BOUND | {"qk_layernorm": True, "use_qkv_bias": True, "partial_rotary_factor": 0.4}
    ),
    Architecture(
        "gpt2",
        "gpt2",
        {
            "vocab_size": PLAIN["vocab_size"], "n_embd": 84, "n_layer": 2, "n_head": 12, "n_positions": 40,
            "n_inner": 52, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        tp=(2, 4, 3),
    ),
)  # fmt: skip
