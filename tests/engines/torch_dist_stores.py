"""Megatron-Core's torch_dist stores, written by PyTorch's own writer in one process, laid out as megatron-core does it.

What each rank holds is the oracle's (megatron_oracle.py, proven by megatron-core). Compared by hand with stores of
megatron-core 0.16.1: the same names, shapes, chunks and objects.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

ROWS = re.compile(r"word_embeddings\.weight|output_layer\.weight|linear_(qkv|fc1)\.(weight|bias)$")
COLUMNS = re.compile(r"linear_(proj|fc2)\.weight$")


class Chunk(NamedTuple):
    at: tuple[int, ...]
    data: torch.Tensor


Chunks = dict[str, list[Chunk]]


def chunks_of(ranks: list[Mapping[str, torch.Tensor]], gated: bool, stacked: bool = True) -> Chunks:
    """All ranks' tensors in the places that they have in the store."""
    layers = 1 + max(int(m[1]) for name in ranks[0] if (m := re.search(r"layers\.(\d+)\.", name)))
    found: Chunks = {}
    for tp, own in enumerate(ranks):
        for name, tensor in own.items():
            key, numbers = name.replace(".local_experts.", ".experts."), []
            for place in (r"(layers)\.(\d+)\.", r"(experts\.experts)\.(\d+)\."):
                match = re.search(place, key)
                if match and stacked:
                    numbers.append(int(match[2]))
                    key = re.sub(place, r"\1.", key)
            axis = 0 if ROWS.search(name) else 1 if COLUMNS.search(name) else None
            if axis is None and tp:
                continue
            parts = tensor.chunk(2) if gated and "linear_fc1." in name and axis == 0 else (tensor,)
            for half, part in enumerate(parts):
                at = [0] * part.dim()
                if axis is not None:
                    at[axis] = part.shape[axis] * (tp + half * len(ranks))
                lead = (1,) * len(numbers)
                found.setdefault(key, []).append(Chunk((*numbers, *at), part.contiguous().reshape(*lead, *part.shape)))
    assert layers > 1
    return found


class _Planner(SavePlanner):
    def __init__(self, chunks: Chunks, objects: Mapping[str, bytes]) -> None:
        self.chunks, self.objects = chunks, objects

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.objects]
        for name, chunks in self.chunks.items():
            ends = [[a + s for a, s in zip(c.at, c.data.shape, strict=True)] for c in chunks]
            whole = torch.Size(max(axis) for axis in zip(*ends, strict=True))
            for at, data in chunks:
                where = ChunkStorageMetadata(torch.Size(at), data.shape)
                write = TensorWriteData(where, TensorProperties.create_from_tensor(data), whole)
                index = MetadataIndex(name, torch.Size(at))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=write))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name, at = write_item.index.fqn, write_item.index.offset
        if at is None:
            return io.BytesIO(self.objects[name])
        return next(chunk.data for chunk in self.chunks[name] if chunk.at == tuple(at))


def write_store(
    folder: Path, chunks: Chunks, args: argparse.Namespace | None, objects: Mapping[str, bytes] | None = None
) -> None:
    """``folder/iter_0000001`` and the tracker beside it."""
    store = folder / "iter_0000001"
    extra = {"decoder.layers.self_attention.linear_proj._extra_state/shard_0_4": b"state"}
    planner = _Planner(chunks, {**extra, **(objects or {})})
    writer = dcp.FileSystemWriter(store, thread_count=2)
    with warnings.catch_warnings(action="ignore"):  # that one process writes it
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    said = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    (store / "metadata.json").write_text(json.dumps(said))
    if args is not None:
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1}, store / "common.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
