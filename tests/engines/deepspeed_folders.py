"""Folders in the shapes in which DeepSpeed 0.19.8 saves them (keys, kinds of values, names of files), the slow obvious
way. The same structures were seen in folders that DeepSpeed itself saved; merged, those were equal to their source."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]
COLUMN = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
ROW = ("o_proj.weight", "down_proj.weight")


def training_axis(name: str) -> int | None:
    """Where tensor-parallel training cuts: embeddings and norms stay whole."""
    if name.endswith((*COLUMN, "q_proj.bias", "k_proj.bias", "v_proj.bias", "lm_head.weight")):
        return 0
    return 1 if name.endswith(ROW) else None


def inference_sizes(name: str, size: int, ranks: int, kv_heads: int) -> list[int]:
    """Attention by key-value heads, the first ranks taking one more; the rest in blocks of 64, the last rank taking
    what is left over."""
    if "self_attn" in name:
        each = [kv_heads // ranks + (rank < kv_heads % ranks) for rank in range(ranks)]
        return [size // kv_heads * n for n in each]
    if size % 64 == 0 or size < 64 * ranks:
        return [size // ranks + (rank < size % ranks) for rank in range(ranks)]
    grains = size // 64
    sizes = [(grains // ranks + (rank < grains % ranks)) * 64 for rank in range(ranks)]
    sizes[-1] += size % 64
    return sizes


def map_entry(shape: Sequence[int], axis: int | None, ranks: int) -> dict[str, Any]:
    strides = [torch.empty(*shape).stride(a) for a in range(len(shape))]
    of_ranks, start = {}, 0
    for rank in range(ranks):
        own = list(shape)
        if axis is not None:
            own[axis] //= ranks
        piece = {
            "shape": own,
            "source": [0 if axis is None else start * strides[axis], strides],
            "dest": [0, [torch.empty(*own).stride(a) for a in range(len(own))]],
            "locations": list(range(ranks)) if axis is None else [rank],
        }
        of_ranks[rank] = {"shape": own, "pieces": [piece]}
        of_ranks[rank]["shard_shape"] = of_ranks[rank].pop("shape")
        start += own[axis or 0]
    return {"logical_shape": list(shape), "ranks": of_ranks}


def states(own: Tensors, whole: Tensors, ranks: int, record: bool) -> dict[str, Any]:
    said: dict[str, Any] = {
        "module": OrderedDict(own),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in own.items())],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": 1,
        "global_samples": 2,
        "dp_world_size": 1,
        "mp_world_size": ranks,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": ranks},
        "ds_config": {"zero_optimization": {"stage": 1}},
        "ds_version": "0.19.8",
    }
    if record:
        params = {
            f"^{re.escape(name)}$": map_entry(tensor.shape, training_axis(name), ranks)
            for name, tensor in whole.items()
        }
        said["universal_checkpoint_info"] = {
            "universal_checkpoint_version": 0.4,
            "affine_map": {"version": 1, "params": params},
        }
    return said


def training(whole: Tensors, ranks: int, folder: Path, record: bool = True) -> Path:
    """The step's folder."""
    step = folder / "global_step1"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    (folder / "zero_to_fp32.py").write_text("pass\n")
    for rank in range(ranks):
        own = {}
        for name, tensor in whole.items():
            axis = training_axis(name) if ranks > 1 else None
            own[name] = tensor if axis is None else tensor.chunk(ranks, axis)[rank].clone()
        torch.save(states(own, whole, ranks, record and ranks > 1), step / f"mp_rank_{rank:02d}_model_states.pt")
        torch.save({"optimizer_state_dict": {}}, step / f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt")
    return step


def universal(whole: Tensors, folder: Path) -> Path:
    step = folder / "global_step1_universal"
    step.mkdir(parents=True)
    (folder / "latest_universal").write_text("global_step1_universal")
    torch.save(states(whole, whole, 1, record=False), step / "mp_rank_00_model_states.pt")
    torch.save({}, step / "zero_optimizer_state.pt")
    for name, tensor in whole.items():
        place = step / "zero" / name
        place.mkdir(parents=True)
        torch.save({"cat_dim": 0, "param": tensor.float()}, place / "fp32.pt")
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.save({"cat_dim": 0, "param": torch.zeros_like(tensor, dtype=torch.float32)}, place / f"{moment}.pt")
        torch.save(torch.tensor(1.0), place / "step.pt")
    return step


def inference_rank(whole: Tensors, rank: int, ranks: int, kv_heads: int) -> dict[str, torch.Tensor]:
    own = {}
    for name, tensor in whole.items():
        axis = 1 if name == "lm_head.weight" else training_axis(name)
        if axis is None:
            own[name] = tensor
            continue
        sizes = inference_sizes(name, tensor.shape[axis], ranks, kv_heads)
        own[name] = tensor.split(sizes, axis)[rank].clone()
    return own


def inference(whole: Tensors, ranks: int, kv_heads: int, folder: Path, parts: int = 8) -> None:
    folder.mkdir(parents=True)
    names, each = list(whole), len(whole) // parts + 1
    for rank in range(ranks):
        own = inference_rank(whole, rank, ranks, kv_heads)
        for part in range(parts):
            some = OrderedDict((name, own[name]) for name in names[part * each : (part + 1) * each])
            torch.save(some, folder / f"tp_{rank:02d}_{part:02d}.pt")
    torch.save(OrderedDict(), folder / "non-tp.pt")
    files = [f"tp_{rank:02d}_{part:02d}.pt" for part in range(parts) for rank in range(ranks)]
    record = {
        "type": "ds_model",
        "base_dir": str(folder),
        "checkpoints": {"non_tp": ["non-tp.pt"], "tp": files},
        "version": 1.0,
        "parallelization": "tp",
        "tp_size": ranks,
        "dtype": "bfloat16",
    }
    (folder / "ds_inference_config.json").write_text(json.dumps(record))
