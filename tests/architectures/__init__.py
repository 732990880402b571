"""Every architecture that a built-in policy is for, at a small size, and the rank counts at which it is proven.

Sizes follow one rule: no two are equal, and nothing is square. Twelve heads go into 2, 3 and 4 ranks; of eight query
heads and two key-value heads, 4 and 8 ranks share the latter; channels and words go into none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BASE: Mapping[str, Any] = {
    "vocab_size": 211,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PLAIN: Mapping[str, Any] = {**BASE, "num_attention_heads": 12, "hidden_size": 84}
GROUPED: Mapping[str, Any] = {**BASE, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 80}


@dataclass(frozen=True)
class Architecture:
    """One of the rows of the table in the docs.

    ``sizes``: what its config is made of; ``head``: the class, else the one that predicts words; ``tp``: the rank
    counts, the last of which replicates or deals unevenly; ``variant``: what tells it from others of its
    ``model_type``; ``policy``: the one that ``auto`` must pick; ``also``: other names of the model's type whose
    checkpoints hold the same tensors, and which transformers does not know.
    """

    model_type: str
    policy: str
    sizes: Mapping[str, Any]
    tp: tuple[int, ...] = (2, 4, 8)
    head: str = ""
    variant: str = ""
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model_type} ({self.variant})" if self.variant else self.model_type


# Of these policies one architecture is proven whenever the tests run: one for each way of cutting. The sweep has all.
ALWAYS = frozenset(
    {
        "albert", "bart", "bert", "bitnet", "bloom", "clip", "codegen", "cohere", "dbrx", "deberta-v2", "deepseek",
        "falcon-40b", "falcon-7b", "gemma3", "glm", "gpt-oss", "gpt2", "gpt_bigcode", "gpt_neox", "granitemoe", "jamba",
        "llama", "llama4", "llava", "mamba", "mamba2", "moe", "modernbert", "olmo2", "phi3", "qwen2_vl", "qwen3_next",
        "resnet", "rwkv", "stablelm", "swin", "t5", "vit", "wav2vec2", "whisper",
    }
)  # fmt: skip


def architectures() -> tuple[Architecture, ...]:
    from tests.architectures import decoders, encoders, experts, fused, llama_kin, recurrent, senses, translators

    modules = decoders, encoders, experts, fused, llama_kin, recurrent, senses, translators
    return tuple(found for module in modules for found in module.ARCHITECTURES)
