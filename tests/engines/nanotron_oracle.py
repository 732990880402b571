"""nanotron's checkpoints, the slow obvious way: a Llama of transformers, one safetensors file a parameter and rank.

Each file says itself which cells of the whole it has, so nothing about the model is needed to read it. Written from
nanotron's code; it was not run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VERSION = "1.5"


def text(slices: Sequence[slice]) -> str:
    """One side of a pair of slices.

    >>> text([slice(0, 10), slice(None)])
    '0,10,None|None,None,None'
    """
    return "|".join(f"{s.start},{s.stop},{s.step}" for s in slices)


def write_cut(folder: Path, name: str, tensor: torch.Tensor, axis: int, chunks: Sequence[int], ranks: int) -> None:
    """``chunks``: sizes along ``axis`` of the parts of a joined tensor, each of which is cut among all ranks."""
    *path, last = name.split(".")
    place = folder.joinpath("model", *path)
    place.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        pairs, pieces, start, own = [], [], 0, 0
        for chunk in chunks:
            size = chunk // ranks
            of_whole = slice(start + rank * size, start + (rank + 1) * size)
            sides = [[slice(None)] * tensor.ndim for _ in range(2)]
            sides[0][axis], sides[1][axis] = (slice(None) if len(chunks) == 1 else slice(own, own + size)), of_whole
            pairs.append("#".join(text(side) for side in sides))
            pieces.append(tensor[tuple(sides[1])])
            start, own = start + chunk, own + size
        metadata = {
            "version": VERSION,
            "local_global_slices_pairs": ";".join(pairs),
            "unsharded_shape": str(tuple(tensor.shape)),
        }
        file = f"model_{last}_pp-rank-0-of-1_tp-rank-{rank}-of-{ranks}.safetensors"
        save_file({"data": torch.cat(pieces, axis)}, place / file, metadata)


def write_whole(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """What no rank shares, such as norms: one file, which says nothing of itself."""
    *path, last = name.split(".")
    place = folder.joinpath("model", *path)
    place.mkdir(parents=True, exist_ok=True)
    save_file({"data": tensor}, place / f"model_{last}.safetensors")


def write(whole: Mapping[str, torch.Tensor], config: Mapping[str, Any], ranks: int, folder: Path) -> None:
    words = whole["model.embed_tokens.weight"]
    table = "model.token_position_embeddings.pp_block.token_embedding.weight"
    write_cut(folder, table, words, 0, [len(words)], ranks)
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{index}", f"model.decoder.{index}.pp_block"
        joined = {
            "attn.qkv_proj": [f"self_attn.{letter}_proj" for letter in "qkv"],
            "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        }
        for name, parts in joined.items():
            tensors = [whole[f"{theirs}.{part}.weight"] for part in parts]
            rows = [len(tensor) for tensor in tensors]
            write_cut(folder, f"{ours}.{name}.weight", torch.cat(tensors), 0, rows, ranks)
        for name, part in {"attn.o_proj": "self_attn.o_proj", "mlp.down_proj": "mlp.down_proj"}.items():
            tensor = whole[f"{theirs}.{part}.weight"]
            write_cut(folder, f"{ours}.{name}.weight", tensor, 1, [tensor.shape[1]], ranks)
        for name in ("input_layernorm", "post_attention_layernorm"):
            write_whole(folder, f"{ours}.{name}.weight", whole[f"{theirs}.{name}.weight"])
    write_whole(folder, "model.final_layer_norm.pp_block.weight", whole["model.norm.weight"])
    if "lm_head.weight" in whole:
        head = whole["lm_head.weight"]
        write_cut(folder, "model.lm_head.pp_block.weight", head, 0, [len(head)], ranks)
    (folder / "model_config.json").write_text(json.dumps(dict(config)))
