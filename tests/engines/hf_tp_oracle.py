"""What each rank holds when transformers itself loads a folder for tensor parallelism, by the plan of the model.

No ranks are started: torch's ``fake`` backend says that there are N, and loading needs no message of another. The
folder is one whose every number is its own (``numbered``), so that whatever transformers does on the way, joining
experts or turning a table round, each number says where it comes from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

Cells = Mapping[str, np.ndarray]  # by name: the numbers of its cells, in the shape of the tensor

FIRST, LAST = 2**20, 2**24  # no buffer made from the config holds such numbers; F32, in which some stay, has them all


def numbered(source: Path, target: Path) -> Cells:
    """A copy of the folder with the numbers FIRST, FIRST + 1, … for weights in F64, all tensors counted together."""
    shutil.copytree(source, target)
    out, begin = {}, FIRST
    for file in sorted(target.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            if not tensor.is_floating_point():
                tensors[name] = tensor
                continue
            tensors[name] = torch.arange(begin, begin + tensor.numel(), dtype=torch.float64).view(tensor.shape)
            out[name], begin = tensors[name].numpy(), begin + tensor.numel()
            assert begin <= LAST, f"{target}: too large a model"
        save_file(tensors, file, {"format": "pt"})
    return out


@contextmanager
def pretended(rank: int, ranks: int) -> Iterator[None]:
    """As if this were one process of ``ranks``."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def has_plan(model_class: type, config: object) -> bool:
    with torch.device("meta"):
        return bool(model_class(config).tp_plan)  # type: ignore[call-arg]


def local_tensors(folder: Path, model_class: type, rank: int, ranks: int) -> Cells:
    """The rank's own part of every parameter and buffer, by transformers' names, which need not be those on disk."""
    from transformers.distributed import DistributedConfig

    with pretended(rank, ranks):
        wanted = DistributedConfig(tp_size=ranks)
        model = model_class.from_pretrained(folder, distributed_config=wanted, dtype=torch.float64)  # type: ignore[attr-defined]
        held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        return {
            name: (t.to_local() if isinstance(t, DTensor) else t).detach().numpy().copy() for name, t in held.items()
        }


def by_tensor(parameters: Cells, whole: Cells) -> dict[str, list[np.ndarray]]:
    """For each tensor on disk the numbers of it that the rank holds, in the order in which it holds them; once for each
    parameter that has any, since tied parameters share a tensor."""
    names = list(whole)
    begins = np.array([whole[name].flat[0] for name in names])
    ends = np.array([whole[name].flat[-1] for name in names])
    out: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for values in parameters.values():
        flat = values.ravel()
        index = np.searchsorted(begins, flat, side="right") - 1
        of = np.where((index >= 0) & (flat <= ends[index]) & (flat == np.rint(flat)), index, -1)
        for found in np.unique(of[of >= 0]):
            out[names[found]].append(flat[of == found])
    return out


def model_class_of(folder: Path, head: str = "") -> type:
    config = transformers.AutoConfig.from_pretrained(folder)
    name = head or (config.architectures or [""])[0]
    return getattr(transformers, name)  # type: ignore[no-any-return]
