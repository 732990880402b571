"""What the model checks read: numbers of whole tensors and of each rank's own, a region at a time, when they are used.

Nothing is kept: a model may be larger than memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.errors import InconclusiveError, printable
from tpshard.header import DTYPE_BITS
from tpshard.layout import Box, Layout, Piece, Shape
from tpshard.roles import Role
from tpshard.slabs import linear, rows_around
from tpshard.sources import SourceFiles

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

STORED_DTYPES = TORCH_DTYPES | {"F8_E8M0": torch.uint8}  # with those whose numbers only dequantising understands

WHOLE = -1  # the holder of whole tensors: the source, or what the shards are together

Place = tuple[int, Piece]  # a holder, and which of the whole tensor's cells lie where in the holder's own


class Weights(Protocol):
    """``config`` is empty where there is no config.json."""

    ranks: int
    names: tuple[str, ...]
    config: Mapping[str, Any]
    folder: Path

    def dtype(self, name: str) -> str: ...
    def layout(self, name: str) -> Layout: ...
    def role(self, name: str) -> Role: ...

    def held(self, name: str, rank: int) -> Sequence[Place]:
        """Where a rank's cells lie: in its own tensor."""

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        """A region of a holder's own tensor, in its dtype; of the whole tensor where the holder is WHOLE."""


class StoredWeights:
    """A shard folder, and the source if it is there: without it, the reference's cells come from the shards, whose
    digests the weights check compares with the source's."""

    def __init__(self, shards: Checkpoint, source: Checkpoint | None) -> None:
        self._shards, self._source = shards, source
        self._files = SourceFiles(shards), SourceFiles(source or shards)
        self.ranks = shards.ranks
        self.names = tuple(shards.tensors)
        self.config: Mapping[str, Any] = (source or shards).config
        self.folder: Path = (source or shards).folder

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *_: object) -> None:
        for files in self._files:
            files.close()

    def dtype(self, name: str) -> str:
        return self._shards.tensors[name].dtype

    def layout(self, name: str) -> Layout:
        return self._shards.tensors[name].layout

    def role(self, name: str) -> Role:
        return self._shards.tensors[name].role

    def held(self, name: str, rank: int) -> Sequence[Place]:
        shard = self.layout(name).shards[rank]
        return [(rank, piece) for piece in shard.pieces()] if shard else []

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        dtype = self.dtype(name)
        if dtype not in TORCH_DTYPES:
            raise InconclusiveError(f"{printable(name)}: dtype {dtype} has no arithmetic here")
        return self.stored(name, holder, box)

    def stored(self, name: str, holder: int, box: Box) -> torch.Tensor:
        """The same, of what is no number by itself, too: scales that are powers of two come as bytes."""
        dtype = self.dtype(name)
        if not box.volume:
            return torch.empty(box.shape, dtype=STORED_DTYPES[dtype])
        if holder != WHOLE:
            return self._read(self._shards.tensors[name], holder, self._files[0], box)
        if self._source is not None:
            return self._read(self._source.tensors[name], 0, self._files[1], box)
        whole = torch.empty(box.shape, dtype=STORED_DTYPES[dtype])
        for rank, tile in self.layout(name).tiles():
            part = tile.box.intersect(box)
            if part is not None:
                away = tuple(own - g for own, g in zip(tile.local.start, tile.box.start, strict=True))
                inside = part.translate(tuple(-n for n in box.start))
                whole[inside.slices()] = self.stored(name, rank, part.translate(away))
        return whole

    def _read(self, stored: Stored, rank: int, files: SourceFiles, box: Box) -> torch.Tensor:
        shard = stored.layout.shards[rank]
        assert shard is not None
        width = DTYPE_BITS[stored.dtype] // 8
        cover = rows_around([box], shard.shape)
        data = np.empty(cover.volume * width, np.uint8)
        files.read(stored, rank, linear(cover.start, shard.shape) * width, data)
        rows = torch.frombuffer(data, dtype=STORED_DTYPES[stored.dtype]).reshape(cover.shape)
        return rows[box.translate(tuple(-n for n in cover.start)).slices()]


def everything(weights: Weights, name: str) -> Sequence[Place]:
    """Where the reference's cells lie."""
    shape = weights.layout(name).shape
    return [(WHOLE, Piece(Box((0,) * len(shape), shape), (0,) * len(shape)))]


def owned_index(weights: Weights, name: str, rank: int, axis: int) -> torch.Tensor:
    """The whole tensor's indices that a rank holds along one axis, in the order of its own."""
    shard = weights.layout(name).shards[rank]
    runs = [torch.arange(*run) for run in shard.spans[axis]] if shard else []
    return torch.cat([torch.arange(0), *runs])


def layer_of(name: str) -> str:
    """The path of a tensor's layer."""
    return name.rpartition(".")[0]


def added_once(weights: Weights) -> set[str]:
    """The whole tensors of row layers that are cut: a bias that every rank holds and only one may add."""
    cut = {layer_of(n) for n in weights.names if weights.role(n).rule == "row" and weights.layout(n).cut_axes}
    return {
        name
        for name in weights.names
        if weights.role(name).rule == "row" and layer_of(name) in cut and weights.layout(name).is_replicated
    }


def numbers_in(weights: Weights) -> int:
    """How many numbers the whole tensors have together."""
    return sum(math.prod(weights.layout(name).shape) for name in weights.names)


def shape_of(weights: Weights, name: str) -> Shape:
    return weights.layout(name).shape
