"""From bytes to the tensors of the model checks: whole ones for the reference, a rank's own among zeros for the rest.

Everything is float64: BF16, F16, F32 and FP8 values convert exactly, so a verdict needs no arithmetic in low precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tpshard.errors import InconclusiveError, printable
from tpshard.layout import Layout
from tpshard.roles import Role

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MEMORY_FILE = Path("/proc/meminfo")
BITS_OF_CODE = 20  # ranks in one code: float32, which a model may insist on, counts exactly to 2**24


class Weights(Protocol):
    """A sharded checkpoint and the whole that it has to equal, as bytes."""

    @property
    def ranks(self) -> int: ...

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names on disk."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json; empty where there is none."""
        ...

    @property
    def folder(self) -> Path:
        """Where config.json lies."""
        ...

    def dtype(self, name: str, /) -> str:
        """As safetensors names it: ``BF16``."""
        ...

    def layout(self, name: str, /) -> Layout: ...

    def role(self, name: str, /) -> Role: ...

    def whole(self, name: str, /) -> bytearray:
        """The whole tensor in C order: the reference."""
        ...

    def shard(self, name: str, rank: int, /) -> bytearray:
        """The rank's own tensor in C order, padding included; empty where it holds nothing."""
        ...


def decode(data: bytearray, dtype: str, shape: Sequence[int], name: str) -> torch.Tensor:
    """Floating numbers as float64, all else as stored. Raises InconclusiveError for a dtype without arithmetic."""
    if dtype not in TORCH_DTYPES:
        raise InconclusiveError(f"{printable(name)}: a model of dtype {dtype} cannot be run")
    if math.prod(shape) == 0:
        return widened(torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype]))
    return widened(torch.frombuffer(data, dtype=TORCH_DTYPES[dtype])).reshape(tuple(shape))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def reference_tensor(weights: Weights, name: str) -> torch.Tensor:
    """The whole tensor. Raises InconclusiveError where it has NaN or Inf: nothing could be compared with that."""
    tensor = decode(weights.whole(name), weights.dtype(name), weights.layout(name).shape, name)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
        raise InconclusiveError(f"{printable(name)}: the reference weights hold {kind}, so nothing can be compared")
    return tensor


def own_tensor(weights: Weights, name: str, rank: int) -> torch.Tensor | None:
    """The rank's own tensor as it lies in its file; None where it holds nothing."""
    shard = weights.layout(name).shards[rank]
    if shard is None:
        return None
    return decode(weights.shard(name, rank), weights.dtype(name), shard.shape, name)


def rank_tensor(weights: Weights, name: str, rank: int) -> torch.Tensor:
    """The rank's own cells at their places in the whole tensor, zeros elsewhere; padding is left out."""
    layout = weights.layout(name)
    own = own_tensor(weights, name, rank)
    kind = widened(torch.empty(0, dtype=TORCH_DTYPES[weights.dtype(name)])).dtype if own is None else own.dtype
    placed = torch.zeros(layout.shape, dtype=kind)
    shard = layout.shards[rank]
    if own is not None and shard is not None:
        for piece in shard.pieces():
            placed[piece.box.slices()] = own[piece.local.slices()]
    return placed


def ownership_code(layout: Layout, ranks: range) -> torch.Tensor:
    """For each cell of the whole tensor, who holds it: -1, less 2**k for the k-th of ``ranks`` that does.

    Negative whole numbers are what no initialisation of a parameter gives, so a parameter that holds them was loaded.
    """
    code = torch.full(layout.shape, -1.0, dtype=torch.float64)
    for bit, rank in enumerate(ranks):
        shard = layout.shards[rank]
        for piece in shard.pieces() if shard else ():
            code[piece.box.slices()] -= 2.0**bit
    return code


def rank_groups(ranks: int) -> list[range]:
    """The ranks, so many at a time as a code can tell apart."""
    return [range(first, min(first + BITS_OF_CODE, ranks)) for first in range(0, ranks, BITS_OF_CODE)]


def added_once(weights: Weights, names: Iterable[str]) -> frozenset[str]:
    """What a row layer holds besides its cut weight (a bias): whole everywhere, added by rank 0 only.

    Only beside a weight that is cut: a row layer that is cut nowhere is no row layer, and sums up to too much.
    """
    rows = {name for name in names if weights.role(name).rule == "row"}
    cut_layers = {name.rpartition(".")[0] for name in rows if weights.layout(name).cut_axes}
    return frozenset(n for n in rows if weights.layout(n).is_replicated and n.rpartition(".")[0] in cut_layers)


def require_memory(needed: int, what: str) -> None:
    """Raises InconclusiveError where ``needed`` bytes are more than the system can give; silent where it cannot tell."""
    available = _available_memory()
    if available is not None and needed > available:
        gigabytes = f"{needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
        raise InconclusiveError(f"{what} needs {gigabytes}", hint="run verify on a larger machine")


def _available_memory() -> int | None:
    try:
        lines = MEMORY_FILE.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def float64_bytes(weights: Weights) -> int:
    """The bytes of all tensors together, as float64."""
    return sum(8 * math.prod(weights.layout(name).shape) for name in weights.names)
