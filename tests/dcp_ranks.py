"""Distributed checkpoints as PyTorch itself writes and loads them, by ranks that really run: forked, over gloo.

``python -m tests.dcp_ranks save FOLDER`` writes the fixtures, ``load FOLDER…`` loads folders into DTensors of another
mesh and compares. PyTorch is imported once and then forked.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

SHAPES = {
    "model.layers.0.q.weight": (torch.float32, (7, 5)),  # 7 rows over 3 ranks: 3, 3, 1
    "model.layers.0.o.weight": (torch.bfloat16, (6, 11)),
    "model.few.weight": (torch.float16, (4, 3)),  # over 3 ranks: 2, 2, 0
    "model.norm.weight": (torch.float32, (9,)),
    "model.scale": (torch.float8_e4m3fn, (8, 10)),
    "model.count": (torch.int64, ()),
    "model.none": (torch.float32, (0, 13)),
}
PLACES = {
    "model.layers.0.q.weight": ("S0", "S0R"), "model.layers.0.o.weight": ("S1", "S0S1"), "model.few.weight": ("S0", "S1S0"),
    "model.norm.weight": ("R", "RR"), "model.scale": ("S1", "S1R"),
}  # fmt: skip


def whole() -> dict[str, torch.Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randint(-40, 40, shape, generator=generator).to(dtype) if shape else torch.tensor(2**40 + 3)
        for name, (dtype, shape) in SHAPES.items()
    }


def sharded(ranks: int, axes: int) -> dict[str, Any]:
    """DTensors over a mesh of one or two axes."""
    mesh = init_device_mesh("cpu", (ranks,) if axes == 1 else (ranks // 2, 2))
    found: dict[str, Any] = whole()
    for name, places in PLACES.items():
        place, words = [], places[axes - 1]
        while words:
            place.append(Replicate() if words[0] == "R" else Shard(int(words[1])))
            words = words[1 if words[0] == "R" else 2 :]
        found[name] = distribute_tensor(found[name], mesh, place, src_data_rank=None)
    return found


def forked(ranks: int, store: str, work: Callable[[int], None]) -> None:
    """Run on so many ranks; ends the program where one fails."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            code = 1
            try:
                torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
                work(rank)
                torch.distributed.destroy_process_group()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a rank failed")


def save(folder: Path, ranks: int, axes: int) -> None:
    """Flat, nested with an optimiser, and as safetensors."""
    own = sharded(ranks, axes)
    dcp.save(own, storage_writer=dcp.FileSystemWriter(folder / "flat"))
    optimiser = {"state": {"a": {"exp_avg": torch.ones(3)}}, "lr": 0.5}
    nested = {"app": {"model": own, "optim": optimiser}, "step": torch.tensor(3), "rng": b"abc"}
    dcp.save(nested, storage_writer=dcp.FileSystemWriter(folder / "nested", thread_count=2))
    dcp.save(own, storage_writer=dcp.HuggingFaceStorageWriter(str(folder / "hf"), save_distributed=True))


def load(folder: Path) -> None:
    """Into DTensors of this mesh, filled with other values before."""
    own = sharded(2, 1)
    there = {name: value.clone().fill_(1) for name, value in own.items()}
    native = (folder / ".metadata").exists()
    dcp.load(
        there, storage_reader=dcp.FileSystemReader(folder) if native else dcp.HuggingFaceStorageReader(str(folder))
    )
    for name, value in own.items():
        mine, loaded = (getattr(t, "_local_tensor", t) for t in (value, there[name]))
        assert mine.shape == loaded.shape, name
        assert torch.equal(mine.flatten().view(torch.uint8), loaded.flatten().view(torch.uint8)), name


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if words[0] == "save":
        folder = Path(words[1])
        for ranks, axes in ((3, 1), (4, 2)):
            own = folder / f"{ranks}"
            own.mkdir()
            forked(ranks, str(own / "store"), lambda rank: save(own, ranks, axes))  # noqa: B023
    else:
        forked(2, f"{words[1]}.store", lambda rank: [load(Path(word)) for word in words[1:]] and None)


if __name__ == "__main__":
    main(sys.argv[1:])
