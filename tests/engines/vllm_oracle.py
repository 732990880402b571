"""vLLM's tensors on each rank, the slow obvious way: whole Hugging Face tensors joined, stacked and cut, one rule for
each kind of name. For Llama and its kin, mixtures of experts, and DeepSeek's latent attention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
SCALES = "_k_scale", "_v_scale", "_q_scale", "_prob_scale"
EXPERTS = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
ROUTER_INSIDE = "qwen3_moe", "deepseek_v2", "deepseek_v3"


def heads(tensor: torch.Tensor, count: int, tp: int, rank: int) -> torch.Tensor:
    """The rows of a rank's heads; where there are fewer than ranks, several have the same one."""
    size, own = tensor.shape[0] // count, max(count // tp, 1)
    first = rank * count // tp
    return tensor[first * size : (first + own) * size]


def rows(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    return tensor.chunk(tp, 0)[rank]


def columns(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    return tensor.chunk(tp, 1)[rank]


def words(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """Padded with zeros to a multiple of 64 before it is cut."""
    padded = torch.zeros(-(-tensor.shape[0] // 64) * 64, tensor.shape[1], dtype=tensor.dtype)
    padded[: tensor.shape[0]] = tensor
    return rows(padded, tp, rank)


def rank_of(hf: Mapping[str, torch.Tensor], config: Mapping[str, Any], tp: int, rank: int) -> Tensors:
    out: Tensors = {}
    tied = "lm_head.weight" not in hf
    out["lm_head.weight"] = words(hf["model.embed_tokens.weight" if tied else "lm_head.weight"], tp, rank)
    if not tied:
        out["model.embed_tokens.weight"] = words(hf["model.embed_tokens.weight"], tp, rank)
    out["model.norm.weight"] = hf["model.norm.weight"]
    for layer in sorted({int(name.split(".")[2]) for name in hf if name.startswith("model.layers.")}):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in hf.items() if name.startswith(prefix)}
        made = {name: tensor for name, tensor in own.items() if "norm" in name and "q_a_" not in name}
        attention = latent if "self_attn.kv_b_proj.weight" in own else plain
        made |= attention(own, config, tp, rank)
        made |= feed_forward(own, str(config["model_type"]), tp, rank)
        out |= {prefix + name: tensor.contiguous() for name, tensor in made.items()}
    return out


def plain(own: Tensors, config: Mapping[str, Any], tp: int, rank: int) -> Tensors:
    counts = config["num_attention_heads"], *[config["num_key_value_heads"]] * 2
    made = {f"self_attn.attn.{scale}": torch.tensor(1.0) for scale in SCALES}
    for leaf in ("weight", "bias"):
        parts = [own.get(f"self_attn.{part}_proj.{leaf}") for part in "qkv"]
        if parts[0] is not None:
            cut = [heads(part, count, tp, rank) for part, count in zip(parts, counts, strict=True) if part is not None]
            made[f"self_attn.qkv_proj.{leaf}"] = torch.cat(cut)
    made["self_attn.o_proj.weight"] = columns(own["self_attn.o_proj.weight"], tp, rank)
    if "self_attn.o_proj.bias" in own:
        made["self_attn.o_proj.bias"] = own["self_attn.o_proj.bias"]
    return made


def latent(own: Tensors, config: Mapping[str, Any], tp: int, rank: int) -> Tensors:
    made = {f"self_attn.mla_attn.mla_attn.{scale}": torch.tensor(1.0) for scale in SCALES}
    made["self_attn.kv_b_proj.weight"] = rows(own["self_attn.kv_b_proj.weight"], tp, rank)
    made["self_attn.mla_attn.o_proj.weight"] = columns(own["self_attn.o_proj.weight"], tp, rank)
    made["self_attn.mla_attn.q_b_proj.weight"] = rows(own["self_attn.q_b_proj.weight"], tp, rank)
    down = [own[f"self_attn.{name}.weight"] for name in ("q_a_proj", "kv_a_proj_with_mqa")]
    made["self_attn.fused_qkv_a_proj.weight"] = torch.cat(down)
    made["self_attn.mla_attn.q_a_layernorm.weight"] = own["self_attn.q_a_layernorm.weight"]
    return made


def gated(own: Tensors, prefix: str, tp: int, rank: int, leaf: str = "weight") -> torch.Tensor:
    return torch.cat([rows(own[f"{prefix}{part}_proj.{leaf}"], tp, rank) for part in ("gate", "up")])


def feed_forward(own: Tensors, model_type: str, tp: int, rank: int) -> Tensors:
    made: Tensors = {}
    block, gate, up, down = EXPERTS.get(model_type, ("mlp", "gate_proj", "up_proj", "down_proj"))
    numbers = {int(found[1]) for name in own if (found := re.match(rf"{block}\.experts\.(\d+)\.", name))}
    if not numbers:
        for leaf in ("weight", "bias"):
            if f"mlp.gate_proj.{leaf}" in own:
                made[f"mlp.gate_up_proj.{leaf}"] = gated(own, "mlp.", tp, rank, leaf)
        made["mlp.down_proj.weight"] = columns(own["mlp.down_proj.weight"], tp, rank)
        if "mlp.down_proj.bias" in own:
            made["mlp.down_proj.bias"] = own["mlp.down_proj.bias"]
        return made
    routed = f"{block}.experts.routed_experts."
    of = [[own[f"{block}.experts.{n}.{part}.weight"] for part in (gate, up, down)] for n in sorted(numbers)]
    made[routed + "w13_weight"] = torch.stack([torch.cat([rows(g, tp, rank), rows(u, tp, rank)]) for g, u, _ in of])
    made[routed + "w2_weight"] = torch.stack([columns(d, tp, rank) for *_, d in of])
    inside = "experts." if model_type in ROUTER_INSIDE else ""
    made[f"{block}.{inside}gate.weight"] = own[f"{block}.gate.weight"]
    if "mlp.gate.e_score_correction_bias" in own:
        made["mlp.experts.gate.e_score_correction_bias"] = own["mlp.gate.e_score_correction_bias"].float()
    if "mlp.shared_experts.down_proj.weight" in own:
        shared = "mlp.experts._shared_experts._layer."
        made[shared + "gate_up_proj.weight"] = gated(own, "mlp.shared_experts.", tp, rank)
        made[shared + "down_proj.weight"] = columns(own["mlp.shared_experts.down_proj.weight"], tp, rank)
    return made
