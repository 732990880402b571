"""TensorRT-LLM's checkpoints, the slow obvious way: a Llama or Mixtral of transformers to every rank's tensors.

Compared with TensorRT-LLM's own reading of a folder of safetensors, run by hand. Ranks count the tensor ranks of a
pipeline stage first; layers are numbered from zero in each stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Ranks:
    """``embedding``: the axis on which the table of words is cut; None: all ranks of the first stage hold it whole.
    ``moe_tp * moe_ep == tp``: of the tensor ranks, those that follow one another hold different experts."""

    tp: int
    pp: int = 1
    moe_ep: int = 1
    embedding: int | None = None

    @property
    def moe_tp(self) -> int:
        return self.tp // self.moe_ep


def part(tensor: torch.Tensor, ranks: int, rank: int, axis: int = 0) -> torch.Tensor:
    return tensor.chunk(ranks, axis)[rank].contiguous()


def padded(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    """Rows of zeros at the end, until all ranks have the same number."""
    rows = -tensor.shape[0] % ranks
    return torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])


def for_all(keys: torch.Tensor, heads: int, ranks: int) -> torch.Tensor:
    """Each key-value head as many times in a row as it takes for every rank to have one."""
    times = max(1, ranks // heads)
    return keys.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)


def layer_tensors(
    whole: Tensors, at: str, config: Mapping[str, Any], ranks: Ranks, rank: int
) -> dict[str, torch.Tensor]:
    """Of the layer whose names begin with ``at``, for tensor rank ``rank``."""
    heads, out = config["num_key_value_heads"], {}
    for kind in ("weight", "bias"):
        if f"{at}.self_attn.q_proj.{kind}" in whole:
            q, k, v = (whole[f"{at}.self_attn.{letter}_proj.{kind}"] for letter in "qkv")
            k, v = (for_all(tensor, heads, ranks.tp) for tensor in (k, v))
            out[f"attention.qkv.{kind}"] = torch.cat([part(tensor, ranks.tp, rank) for tensor in (q, k, v)])
    out["attention.dense.weight"] = part(whole[f"{at}.self_attn.o_proj.weight"], ranks.tp, rank, 1)
    if f"{at}.self_attn.o_proj.bias" in whole:  # added once, after the sum
        out["attention.dense.bias"] = whole[f"{at}.self_attn.o_proj.bias"]
    out["input_layernorm.weight"] = whole[f"{at}.input_layernorm.weight"]
    out["post_layernorm.weight"] = whole[f"{at}.post_attention_layernorm.weight"]
    if not config.get("num_local_experts"):
        out["mlp.fc.weight"] = part(whole[f"{at}.mlp.gate_proj.weight"], ranks.tp, rank)
        out["mlp.gate.weight"] = part(whole[f"{at}.mlp.up_proj.weight"], ranks.tp, rank)
        out["mlp.proj.weight"] = part(whole[f"{at}.mlp.down_proj.weight"], ranks.tp, rank, 1)
        return out
    out["mlp.router.weight"] = whole[f"{at}.block_sparse_moe.gate.weight"].float()
    held = torch.arange(config["num_local_experts"]).chunk(ranks.moe_ep)[rank % ranks.moe_ep].tolist()
    up_then_gate, down = [], []
    for expert in held:
        w1, w2, w3 = (whole[f"{at}.block_sparse_moe.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
        up_then_gate.append(torch.cat([part(w, ranks.moe_tp, rank // ranks.moe_ep) for w in (w3, w1)]))
        down.append(part(w2, ranks.moe_tp, rank // ranks.moe_ep, 1))
    return out | {"mlp.fc.weight": torch.stack(up_then_gate), "mlp.proj.weight": torch.stack(down)}


def rank_tensors(whole: Tensors, config: Mapping[str, Any], ranks: Ranks) -> list[dict[str, torch.Tensor]]:
    """Every rank's; rank = stage * tp + tensor rank. Stages that come first take the layers left over."""
    table = whole["model.embed_tokens.weight"]
    stages = torch.arange(config["num_hidden_layers"]).tensor_split(ranks.pp)
    out = []
    for stage, layers in enumerate(stages):
        for rank in range(ranks.tp):
            held = {}
            for number, layer in enumerate(layers.tolist()):
                found = layer_tensors(whole, f"model.layers.{layer}", config, ranks, rank)
                held |= {f"transformer.layers.{number}.{name}": tensor for name, tensor in found.items()}
            if stage == 0:
                words = table if ranks.embedding is None else part(table, ranks.tp, rank, ranks.embedding)
                held["transformer.vocab_embedding.weight"] = words
            if stage == ranks.pp - 1:
                head = padded(whole.get("lm_head.weight", table), ranks.tp)
                held["lm_head.weight"] = part(head, ranks.tp, rank)
                held["transformer.ln_f.weight"] = whole["model.norm.weight"]
            out.append(held)
    return out


def config_json(config: Mapping[str, Any], dtype: str, ranks: Ranks) -> dict[str, Any]:
    """What their reader asks for; it has defaults for what is left out."""
    rope = config.get("rope_parameters") or {}
    experts = config.get("num_local_experts", 0)
    return {
        "architecture": config["architectures"][0],
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "head_size": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "hidden_act": "swiglu" if experts else config["hidden_act"],
        "norm_epsilon": config["rms_norm_eps"],
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config["max_position_embeddings"],
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "attn_bias": config.get("attention_bias", False),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "use_parallel_embedding": ranks.embedding is not None,
        "embedding_sharding_dim": ranks.embedding or 0,
        "moe": {"num_experts": experts, "top_k": config.get("num_experts_per_tok", 0) if experts else 0},
        "mapping": {
            "world_size": ranks.tp * ranks.pp,
            "gpus_per_node": 8,
            "cp_size": 1,
            "tp_size": ranks.tp,
            "pp_size": ranks.pp,
            "moe_tp_size": ranks.moe_tp,
            "moe_ep_size": ranks.moe_ep,
        },
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }


def write(whole: Tensors, config: Mapping[str, Any], dtype: str, ranks: Ranks, folder: Path) -> None:
    folder.mkdir(parents=True)
    for rank, tensors in enumerate(rank_tensors(whole, config, ranks)):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / f"rank{rank}.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(config, dtype, ranks), indent=4))
