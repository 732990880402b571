"""Meta's consolidated checkpoints, the slow obvious way: a Llama of transformers to every rank's tensors, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]
LAYER = {  # Meta's name -> transformers', the axis that ranks share (None: all hold the whole)
    "attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0), "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0), "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}  # fmt: skip
SCALED = {  # the only values that Meta's code knows: they are constants there, and params.json has a mere flag
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
ROUNDED = ((256, None), (4096, 1.3), (1024, 1.3), (4096, 1.2), (256, 1.5), (256, 1.0))  # of the models Meta released


def feed_forward_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Two thirds of four times ``dim``, both cut to whole numbers, times the multiplier, cut again, rounded up.

    >>> feed_forward_size(4096, 256, None), feed_forward_size(8192, 4096, 1.3), feed_forward_size(4096, 1024, 1.3)
    (11008, 28672, 14336)
    """
    size = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        size = int(ffn_dim_multiplier * size)
    return -(-size // multiple_of) * multiple_of


def rounding(dim: int, intermediate: int) -> tuple[int, float | None]:
    """``multiple_of`` and ``ffn_dim_multiplier`` that make ``intermediate``; those of a released model where they do."""
    for multiple_of, multiplier in ROUNDED:
        if feed_forward_size(dim, multiple_of, multiplier) == intermediate:
            return multiple_of, multiplier
    return 1, (intermediate + 0.5) / int(8 * dim / 3)


def params(config: Mapping[str, Any]) -> dict[str, Any]:
    """What params.json says of a model whose config.json is ``config``."""
    multiple_of, multiplier = rounding(config["hidden_size"], config["intermediate_size"])
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    out = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "use_scaled_rope": True if rope.get("rope_type") == "llama3" else None,
    }
    return {key: value for key, value in out.items() if value is not None}


def config(params: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """What config.json says of a model whose params.json is ``params``; ``vocabulary``: rows of all ranks' heads, for
    Llama 1 and 2 have -1 there."""
    rope = {"rope_theta": params.get("rope_theta", 10000.0), "rope_type": "default"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "vocab_size": vocabulary,
        "intermediate_size": feed_forward_size(
            params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier")
        ),
        "rms_norm_eps": params["norm_eps"],
        "rope_parameters": rope | SCALED if params.get("use_scaled_rope") else rope,
        "tie_word_embeddings": False,
    }


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers turns rows i and i + d/2 of a head together, Meta rows 2i and 2i + 1.

    >>> interleaved(torch.arange(12).view(12, 1), heads=2).flatten().tolist()
    [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    """
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The other way."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def rank_tensors(
    whole: Tensors, config: Mapping[str, Any], ranks: int, embedding_axis: int
) -> list[dict[str, torch.Tensor]]:
    """``embedding_axis``: 1 for Llama 1 and 2, 0 for Llama 3. A tied head is written out."""
    heads = {"attention.wq": config["num_attention_heads"], "attention.wk": config["num_key_value_heads"]}
    embedding = whole["model.embed_tokens.weight"]
    all_of: list[tuple[str, torch.Tensor, int | None]] = [("tok_embeddings.weight", embedding, embedding_axis)]
    for index in range(config["num_hidden_layers"]):
        for name, (theirs, axis) in LAYER.items():
            tensor = whole[f"model.layers.{index}.{theirs}.weight"]
            tensor = interleaved(tensor, heads[name]) if name in heads else tensor
            all_of.append((f"layers.{index}.{name}.weight", tensor, axis))
    all_of.append(("norm.weight", whole["model.norm.weight"], None))
    all_of.append(("output.weight", whole.get("lm_head.weight", embedding), 0))
    out: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, tensor, axis in all_of:
        for rank in range(ranks):
            out[rank][name] = tensor if axis is None else tensor.chunk(ranks, axis)[rank].contiguous()
    return out


def whole_tensors(ranks: Sequence[Tensors], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """transformers' tensors. The axis of the embedding follows from its shape: Llama 1 and 2 have all its rows in
    every rank. ``rope.freqs`` of old files follows from the config, and is left out."""
    heads = {"attention.wq": config["num_attention_heads"], "attention.wk": config["num_key_value_heads"]}
    plain = {"norm.weight": ("model.norm.weight", None), "output.weight": ("lm_head.weight", 0)}
    embedding_axis = 1 if ranks[0]["tok_embeddings.weight"].shape[0] == config["vocab_size"] else 0
    plain["tok_embeddings.weight"] = "model.embed_tokens.weight", embedding_axis
    out = {}
    for name in ranks[0]:
        if name == "rope.freqs":
            continue
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
            theirs, axis = LAYER[match[2]]
            new, count = f"model.layers.{match[1]}.{theirs}.weight", heads.get(match[2])
        else:
            (new, axis), count = plain[name], None
        tensor = ranks[0][name] if axis is None else torch.cat([rank[name] for rank in ranks], axis)
        out[new] = halves(tensor, count) if count else tensor
    return out


def write(ranks: Sequence[Tensors], params: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True)
    for rank, tensors in enumerate(ranks):
        torch.save(dict(tensors), folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
