"""What only a tensor's bytes can tell, where no manifest recorded it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.digest import hasher_factory
from tpshard.execute import SLAB
from tpshard.header import DTYPE_BITS
from tpshard.layout import Layout
from tpshard.plan import plan
from tpshard.slabs import Bytes, cut_into_slabs
from tpshard.sources import SourceFiles


def are_equal(checkpoint: Checkpoint, *tensors: Stored) -> bool:
    """Whether tensors, put together, have the same bytes. (By digest: they may be cut otherwise.)"""
    digests = set()
    for tensor in tensors:
        hasher = hasher_factory("xxh3-128")()
        for piece in _whole(checkpoint, tensor):
            hasher.update(piece.data)
        digests.add((tensor.dtype, tensor.shape, hasher.hexdigest()))
    return len(digests) == 1


def is_widened(checkpoint: Checkpoint, tensor: Stored) -> bool:
    """Whether numbers of F32 are all BF16: their lower halves are zero."""
    return tensor.dtype == "F32" and not any(piece.view("<u2")[::2].any() for piece in _whole(checkpoint, tensor))


def _whole(checkpoint: Checkpoint, tensor: Stored) -> Iterator[Bytes]:
    """A tensor's bytes in order."""
    transfer = plan(tensor.layout, Layout.replicated(tensor.shape, 1), DTYPE_BITS[tensor.dtype])
    with SourceFiles(checkpoint) as files:
        for slab in cut_into_slabs(transfer, SLAB):
            room = np.empty(slab.size, np.uint8)
            files.fill([(tensor, slab, 0)], room)
            yield room
