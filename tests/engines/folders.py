"""Tiny Hugging Face folders that engines' own code can take: their sizes divide as those engines ask.

No two sizes are equal and norms are random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny_models import build

LLAMA: dict[str, Any] = {
    "vocab_size": 212, "hidden_size": 48, "intermediate_size": 140, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 40, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL: dict[str, Any] = LLAMA | {"intermediate_size": 68, "num_local_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 220, "hidden_size": 40, "intermediate_size": 192, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 2,
    "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    "q_lora_rank": 26, "kv_lora_rank": 20, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "max_position_embeddings": 36, "num_nextn_predict_layers": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BLOCK = 8  # the side of a scale's square: small, so that small tensors have many


def llama_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    config = transformers.LlamaConfig(**{**LLAMA, **changes})
    build(config, "LlamaForCausalLM").to(dtype).save_pretrained(folder)


def mixtral_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    config = transformers.MixtralConfig(**{**MIXTRAL, **changes})
    build(config, "MixtralForCausalLM").to(dtype).save_pretrained(folder)


def deepseek_folder(folder: Path, fp8: bool = False, **changes: Any) -> None:
    """BF16, but for the router's bias (F32); with ``fp8`` the layers' matrices are F8_E4M3 with a scale a block."""
    config = transformers.DeepseekV3Config(**{**DEEPSEEK, **changes})
    build(config, "DeepseekV3ForCausalLM").to(torch.bfloat16).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.linspace(-0.02, 0.03, len(tensors[name]))
        elif fp8 and name.endswith(("proj.weight", "with_mqa.weight")):
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    if fp8:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """F8_E4M3 and the F32 scale of each block of BLOCK x BLOCK, the last ones smaller."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scales = torch.empty(rows, columns)
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = weight[block].float().abs().max() / 448.0  # the largest E4M3
            out[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return out, scales
