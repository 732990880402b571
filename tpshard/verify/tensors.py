"""From bytes to tensors: the reference's whole ones, and each rank's own put at their places among zeros."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from tpshard.errors import InconclusiveError, printable
from tpshard.layout import Layout, Shape, Shard
from tpshard.roles import Role
from tpshard.verify.models import State

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
BITS_A_PASS = 50  # whole numbers up to 2^53 are exact in float64


class Weights(Protocol):
    """What the model checks read. ``config`` is empty where there is no config.json; ``whole`` and ``shard`` give
    bytes in C order, of the whole tensor and of one rank's own, padding included."""

    ranks: int
    names: tuple[str, ...]
    config: Mapping[str, Any]
    folder: Path

    def dtype(self, name: str) -> str: ...
    def layout(self, name: str) -> Layout: ...
    def role(self, name: str) -> Role: ...
    def whole(self, name: str) -> bytearray: ...
    def shard(self, name: str, rank: int) -> bytearray: ...


def layer_of(name: str) -> str:
    """The path of a tensor's layer."""
    return name.rpartition(".")[0]


def to_tensor(data: bytearray, dtype: str, shape: Shape) -> torch.Tensor:
    """Floating numbers become float64, exactly; whole numbers stay."""
    if dtype not in TORCH_DTYPES:
        raise InconclusiveError(f"dtype {dtype} has no arithmetic here")
    if not data:
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    else:
        tensor = torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).reshape(shape)
    return tensor.double() if tensor.is_floating_point() else tensor


def reference_state(weights: Weights) -> State:
    """Every whole tensor. Raises InconclusiveError where one has NaN or infinite values: nothing could be compared."""
    state = {}
    for name in weights.names:
        tensor = to_tensor(weights.whole(name), weights.dtype(name), weights.layout(name).shape)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InconclusiveError(f"{printable(name)}: the source holds NaN or infinite values")
        state[name] = tensor
    return state


def rank_states(weights: Weights) -> list[State]:
    """For each rank, its own bytes at their global places, zeros elsewhere.

    A row layer's bias is whole on every rank and is added once: rank 0 has it, the others zeros.
    """
    once = _added_once(weights)
    states: list[State] = [{} for _ in range(weights.ranks)]
    for name in weights.names:
        layout, dtype = weights.layout(name), weights.dtype(name)
        first: tuple[bytearray, torch.Tensor] | None = None
        for rank, shard in enumerate(layout.shards):
            own = weights.shard(name, rank)
            if first is not None and layout.is_replicated and own == first[0] and name not in once:
                states[rank][name] = first[1]  # equal replicas share memory among the ranks, never with the reference
                continue
            tensor = placed(to_tensor(own, dtype, shard.shape), shard, layout.shape) if shard else None
            if tensor is None or (name in once and rank):
                tensor = torch.zeros(layout.shape, dtype=torch.float64)
            states[rank][name] = tensor
            first = first or (own, tensor)
    return states


def _added_once(weights: Weights) -> set[str]:
    """The whole tensors of row layers that are cut."""
    cut = {layer_of(n) for n in weights.names if weights.role(n).rule == "row" and weights.layout(n).cut_axes}
    return {
        name
        for name in weights.names
        if weights.role(name).rule == "row" and layer_of(name) in cut and weights.layout(name).is_replicated
    }


def placed(own: torch.Tensor, shard: Shard, shape: Shape) -> torch.Tensor:
    """A rank's own tensor at its global place among zeros; padding is left out."""
    if own.shape == shape and shard == Shard.whole(shape):
        return own
    whole = torch.zeros(shape, dtype=own.dtype)
    for piece in shard.pieces():
        whole[piece.box.slices()] = own[piece.local.slices()]
    return whole


def ownership_states(weights: Weights) -> list[State]:
    """For every 50 ranks a state whose cells say, as a sum of powers of two, which of those ranks hold them.

    Whatever a library does to bring tensors from disk into its modules (renaming, stacking, joining, transposing)
    moves these numbers in the same way, so that they can be read off its parameters.
    """
    states: list[State] = []
    for begin in range(0, weights.ranks, BITS_A_PASS):
        state: State = {}
        for name in weights.names:
            layout = weights.layout(name)
            cells = torch.zeros(layout.shape, dtype=torch.float64)
            for bit, shard in enumerate(layout.shards[begin : begin + BITS_A_PASS]):
                for piece in shard.pieces() if shard else ():
                    cells[piece.box.slices()] += 2.0**bit
            state[name] = cells
        states.append(state)
    return states
