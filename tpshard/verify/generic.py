"""Generic weights: numbers that depend on a tensor's name and a cell's place in the whole tensor, and on nothing else.

Real weights can hide a fault: zero biases, norms of ones, equal heads. These hide none, and say of every rank's cells
which they should be without reading any. A rearrangement gives the ranks other cells than theirs, to see it found.
"""

from __future__ import annotations

import functools
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
LINE = 2**20


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
        rows = np.zeros((1,), np.int64)
        for axis, line in enumerate(lines[:-1]):
            rows = (rows[:, None] * shape[axis] + line).reshape(-1)
        middle, spread = _scale(name, shape)
        values = middle + spread * _windows(name, rows, lines[-1] if lines else np.zeros(1, np.int64))
        return values.reshape(box.shape)


def generic_of(weights: Weights, rearranged: Rearrangement | None = None) -> Weights:
    """Generic weights in the place of ``weights``; those that are made of others make themselves of generic ones."""
    make = getattr(weights, "generic", None)
    made: Weights = make(rearranged) if make else GenericWeights(weights, rearranged)
    return made


def _scale(name: str, shape: Shape) -> tuple[float, float]:
    """Matrices keep the size of what they multiply; biases lie around 0, norms and other lines around 1."""
    if len(shape) >= 2:
        fan = shape[-1] if len(shape) == 2 else max(shape[-1], shape[-2])
        return 0.0, max(1, fan) ** -0.5
    leaf = name.rpartition(".")[2]
    # What corrects a router's scores must not outweigh them, else some experts are never chosen.
    return (0.0 if "bias" in leaf else 1.0), 0.05 if "correction_bias" in leaf or "expert_bias" in leaf else 0.2


def _windows(name: str, rows: Index, columns: Index) -> NDArray[np.float64]:
    """Numbers of variance 1: a row is a part of one long random line, which begins where name and row say."""
    begins = _mixed(rows.astype(np.uint64) + _seed(name)) % np.uint64(LINE)
    last = int(columns.max(initial=0))
    line = _line(LINE * (1 + last // LINE + 1))
    if len(columns) and last - int(columns[0]) == len(columns) - 1:  # side by side, as a rule
        windows = np.lib.stride_tricks.sliding_window_view(line, len(columns))
        return np.asarray(windows[begins.astype(np.int64) + columns[0]])
    return np.asarray(line[begins.astype(np.int64)[:, None] + columns])


@functools.lru_cache(maxsize=2)
def _line(length: int) -> NDArray[np.float64]:
    x = _mixed(np.arange(length, dtype=np.uint64))
    return (x >> np.uint64(11)).astype(np.float64) * (2 * 3**0.5 / 2**53) - 3**0.5


def _seed(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The steps of splitmix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
