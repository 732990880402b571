"""What the model checks read: whole tensors for the reference, each rank's own bytes for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.execute import SLAB
from tpshard.header import DTYPE_BITS, byte_count
from tpshard.layout import Layout
from tpshard.plan import plan
from tpshard.roles import Role
from tpshard.slabs import cut_into_slabs
from tpshard.sources import SourceFiles


class Bytes:
    """A shard folder, and the source if it is there: without it, the reference is rebuilt from the shards, whose
    digests the weights check compares with the source's."""

    def __init__(self, shards: Checkpoint, source: Checkpoint | None) -> None:
        self._shards, self._source = shards, source
        self.ranks = shards.ranks
        self.names = tuple(shards.tensors)
        self.config: Mapping[str, Any] = (source or shards).config
        self.folder: Path = (source or shards).folder

    def dtype(self, name: str) -> str:
        return self._shards.tensors[name].dtype

    def layout(self, name: str) -> Layout:
        return self._shards.tensors[name].layout

    def role(self, name: str) -> Role:
        return self._shards.tensors[name].role

    def whole(self, name: str) -> bytearray:
        """The whole tensor's bytes, in C order."""
        checkpoint = self._source or self._shards
        stored = checkpoint.tensors[name]
        transfer = plan(stored.layout, Layout.replicated(stored.shape, 1), DTYPE_BITS[stored.dtype])
        data = np.empty(transfer.size, np.uint8)
        with SourceFiles(checkpoint) as files:
            files.fill([(stored, slab, slab.offset) for slab in cut_into_slabs(transfer, SLAB)], data)
        return bytearray(data)

    def shard(self, name: str, rank: int) -> bytearray:
        """One rank's own tensor, padding included, in C order; empty where it holds nothing."""
        stored: Stored = self._shards.tensors[name]
        shard = stored.layout.shards[rank]
        own = bytearray(byte_count(stored.dtype, shard.shape) if shard else 0)
        with SourceFiles(self._shards) as files:
            files.read(stored, rank, 0, np.frombuffer(own, np.uint8))
        return own
