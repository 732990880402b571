"""DeepSeek-V3's inference checkpoint, the slow obvious way: every rank's tensors, by name.

The same mapping as the converter of DeepSeek's inference code, which was run beside it: same files, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ENDS = {  # what a layer is called -> its name here, the axis that ranks share (None: all hold the whole)
    "embed_tokens": ("embed", 0), "lm_head": ("head", 0), "norm": ("norm", None),
    "input_layernorm": ("attn_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0), "q_a_proj": ("wq_a", None), "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None), "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1), "gate": ("gate", None), "gate_proj": ("w1", 0), "down_proj": ("w2", 1), "up_proj": ("w3", 0),
}  # fmt: skip
OWN = {"weight": "weight", "bias": "bias", "weight_scale_inv": "scale", "e_score_correction_bias": "bias"}
BLOCKS = {"self_attn": "attn", "mlp": "ffn"}


def rank_tensors(
    whole: Mapping[str, torch.Tensor], experts: int, ranks: int, mtp: int = 61
) -> list[dict[str, torch.Tensor]]:
    """``mtp``: the layer that predicts further words, which inference leaves out. An expert stays whole and keeps its
    number: rank r has the r-th run of ``experts / ranks``. A scale is cut as its weight is."""
    out: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in whole.items():
        *path, layer, kind = name.removeprefix("model.").split(".")
        if path[:2] == ["layers", str(mtp)]:
            continue
        end, axis = ENDS[layer]
        new = ".".join([*(BLOCKS.get(part, part) for part in path), end, OWN[kind]])
        if "experts" in path:
            out[int(path[-1]) * ranks // experts][new] = tensor
        else:
            parts = [tensor] * ranks if axis is None else tensor.tensor_split(ranks, axis)
            for rank, part in enumerate(parts):
                out[rank][new] = part.contiguous()
    return out


def write(source: Path, target: Path, experts: int, ranks: int) -> None:
    whole = {name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    target.mkdir(parents=True)
    for rank, tensors in enumerate(rank_tensors(whole, experts, ranks)):
        save_file(tensors, target / f"model{rank}-mp{ranks}.safetensors")
    for file in source.glob("*token*"):
        (target / file.name).write_bytes(file.read_bytes())
