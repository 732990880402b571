"""Decoders without experts: separate or fused q, k, v, a gated or plain feed-forward."""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.verify.slots import IN, INSIDE_A_HEAD, OUT, Slot

LLAMA = {
    "embed_tokens": Slot("word", 0, consumer=True),
    "q_proj": Slot("query", OUT),
    "k_proj": Slot("key_value", OUT),
    "v_proj": Slot("key_value", OUT),
    "o_proj": Slot("query", IN, consumer=True),
    "gate_proj": Slot("channel", OUT),
    "up_proj": Slot("channel", OUT),
    "down_proj": Slot("channel", IN, consumer=True),
    "lm_head": Slot("word", 0),
    **dict.fromkeys(("q_norm", "k_norm", "query_layernorm", "key_layernorm"), INSIDE_A_HEAD),
}
_COHERE = {  # one module over [heads, head size]: the weight has a row for each head
    **LLAMA,
    "q_norm": Slot("query", 0, row_per_head=True),
    "k_norm": Slot("key_value", 0, row_per_head=True),
}
_OLMO2 = {  # q_norm(q_proj(x)), before the heads are told apart: the root mean square is over all of them
    **LLAMA,
    "q_norm": Slot("query", 0, all_of="q_proj"),
    "k_norm": Slot("key_value", 0, all_of="k_proj"),
}
_PHI = {
    **LLAMA,
    "self_attn.dense": Slot("query", IN, consumer=True),
    "fc1": Slot("channel", OUT),
    "fc2": Slot("channel", IN, consumer=True),
    **dict.fromkeys(("q_layernorm", "k_layernorm"), INSIDE_A_HEAD),
}
_STARCODER2 = {**LLAMA, "mlp.c_fc": Slot("channel", OUT), "mlp.c_proj": Slot("channel", IN, consumer=True)}
GLM = {**LLAMA, "gate_up_proj": Slot("gate_up", OUT)}
_PHI3 = {**GLM, "qkv_proj": Slot("qkv", OUT)}
_GPT2 = {  # Conv1D: [in, out]
    "wte": Slot("word", 0, consumer=True),
    "attn.c_attn": Slot("qkv", 1),
    "attn.c_proj": Slot("query", 0, consumer=True),
    "crossattention.q_attn": Slot("query", 1, cross=True),
    "crossattention.c_attn": Slot("kv", 1, cross=True),
    "crossattention.c_proj": Slot("query", 0, consumer=True, cross=True),
    "mlp.c_fc": Slot("channel", 1),
    "mlp.c_proj": Slot("channel", 0, consumer=True),
    "lm_head": Slot("word", 0),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "cwm", "seed_oss"), LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "vaultgemma", "granite", "helium", "stablelm"), LLAMA),
    **dict.fromkeys(("smollm3", "olmo", "ernie4_5", "exaone4", "hunyuan_v1_dense"), LLAMA),
    **dict.fromkeys(("arcee", "jais2", "nemotron"), LLAMA),  # without gate_proj
    **dict.fromkeys(("cohere", "cohere2"), _COHERE),
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO2),
    **dict.fromkeys(("glm", "glm4"), GLM),
    "phi": _PHI,
    "phi3": _PHI3,
    "starcoder2": _STARCODER2,
    "gpt2": _GPT2,
}
# What the architecture's config class says where config.json is silent.
TIED_BY_DEFAULT = frozenset(
    {
        "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gpt2", "smollm3", "starcoder2",
        "vaultgemma",
    }
)  # fmt: skip
HEAD_SIZE_BY_DEFAULT: Mapping[str, int] = {  # elsewhere hidden size / heads
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "vaultgemma"), 256),
    **dict.fromkeys(("cwm", "ernie4_5", "glm", "glm4", "helium", "ministral3", "qwen3", "seed_oss"), 128),
}
