"""How checkpoints are usually cut, to compare with: ``python -m tests.bench.usual loop|held SRC DST TP``.

``loop`` gathers one rank at a time with get_slice and saves it; ``held`` loads the checkpoint once and holds every
rank's tensors until the end. Both know Llama's names only, cut plainly and check nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
ROW = ("o_proj", "down_proj")


def axis_of(name: str) -> int | None:
    layer = name.split(".")[-2]
    return 0 if layer in COLUMN else 1 if layer in ROW else None


def cut(axis: int | None, shape: list[int], rank: int, ranks: int) -> tuple[slice, ...]:
    if axis is None:
        return (slice(None),)
    each = shape[axis] // ranks
    return (*(slice(None),) * axis, slice(rank * each, (rank + 1) * each))


def loop(source: Path, target: Path, ranks: int) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: safe_open(source / name, "pt") for name in set(index.values())}
    for rank in range(ranks):
        own: dict[str, torch.Tensor] = {}
        for name, file in index.items():
            part = files[file].get_slice(name)  # type: ignore[no-untyped-call]
            own[name] = part[cut(axis_of(name), part.get_shape(), rank, ranks)].contiguous()
        save_file(own, target / f"rank-{rank}.safetensors")


def held(source: Path, target: Path, ranks: int) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    own: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for file in sorted(set(index.values())):
        with safe_open(source / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                whole = tensors.get_tensor(name)
                for rank in range(ranks):
                    own[rank][name] = whole[cut(axis_of(name), list(whole.shape), rank, ranks)].clone()
    for rank in range(ranks):
        save_file(own[rank], target / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    way, source, target, ranks = sys.argv[1:]
    ways: dict[str, Callable[[Path, Path, int], None]] = {"loop": loop, "held": held}
    Path(target).mkdir()
    ways[way](Path(source), Path(target), int(ranks))
