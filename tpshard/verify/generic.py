"""Generic weights: numbers that depend on a tensor's name and a cell's place in the whole tensor, and on nothing else.

Real weights can hide a fault: zero biases, norms of ones, equal heads. These hide none, and say of every rank's cells
which they should be without reading any. A rearrangement gives the ranks other cells than theirs, to see it found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tpshard.layout import Box, Layout, Shape
from tpshard.roles import Role
from tpshard.verify.values import TORCH_DTYPES, WHOLE, Place, Weights

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rearrangement:
    """For some tensors, an axis and which index a rank has in place of its own."""

    moved: Mapping[str, tuple[int, Callable[[int, Index], Index]]] = field(default_factory=dict)


class GenericWeights:
    """The same names, shapes and layouts as the weights that it stands for; whole numbers are theirs."""

    def __init__(self, weights: Weights, rearranged: Rearrangement | None = None) -> None:
        self._weights = weights
        self._rearranged = rearranged or Rearrangement()
        self.ranks, self.names = weights.ranks, weights.names
        self.config: Mapping[str, Any] = weights.config
        self.folder: Path = weights.folder

    def dtype(self, name: str) -> str:
        return self._weights.dtype(name)

    def layout(self, name: str) -> Layout:
        return self._weights.layout(name)

    def role(self, name: str) -> Role:
        return self._weights.role(name)

    def held(self, name: str, rank: int) -> Sequence[Place]:
        return self._weights.held(name, rank)

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        if not self._is_generic(name):
            return self._weights.read(name, holder, box)
        if holder == WHOLE:
            return torch.from_numpy(self._numbers(name, holder, box))
        values = np.zeros(box.shape)
        shard = self.layout(name).shards[holder]
        for piece in shard.pieces() if shard else ():
            part = piece.local.intersect(box)
            if part is not None:
                away = tuple(g - own for g, own in zip(piece.box.start, piece.local.start, strict=True))
                inside = part.translate(tuple(-n for n in box.start))
                values[inside.slices()] = self._numbers(name, holder, part.translate(away))
        return torch.from_numpy(values)

    def _is_generic(self, name: str) -> bool:
        return TORCH_DTYPES.get(self.dtype(name), torch.bool).is_floating_point

    def _numbers(self, name: str, holder: int, box: Box) -> NDArray[np.float64]:
        """Those of a region of the whole tensor; of a rank, from where the rearrangement says."""
        shape = self.layout(name).shape
        lines = [np.arange(start, stop) for start, stop in zip(box.start, box.stop, strict=True)]
        if holder != WHOLE and name in self._rearranged.moved:
            axis, moved = self._rearranged.moved[name]
            lines[axis] = moved(holder, lines[axis])
        place = np.zeros((1,) * len(shape), np.uint64)
        for axis, line in enumerate(lines):
            stride = int(np.prod(shape[axis + 1 :], dtype=np.int64))
            place = place + (line.astype(np.uint64) * np.uint64(stride)).reshape(
                [-1 if k == axis else 1 for k in range(len(shape))]
            )
        middle, spread = _scale(name, shape)
        return np.asarray(middle + spread * _uniform(name, place))


def _scale(name: str, shape: Shape) -> tuple[float, float]:
    """Matrices keep the size of what they multiply; biases lie around 0, norms and other lines around 1."""
    if len(shape) >= 2:
        fan = shape[-1] if len(shape) == 2 else max(shape[-1], shape[-2])
        return 0.0, max(1, fan) ** -0.5
    return (0.0 if "bias" in name.rpartition(".")[2] else 1.0), 0.2


def _uniform(name: str, place: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers of variance 1 from a tensor's name and a cell's number (the mixing steps of splitmix64)."""
    seed = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    with np.errstate(over="ignore"):  # of a scalar numpy would warn
        x = place + seed
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x ^= x >> np.uint64(shift)
            x *= np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * (2 * 3**0.5 / 2**53) - 3**0.5
