"""Gradients, sharded against unsharded: every rank's own, added up where ranks share a cell, against the reference's.

A product's weight gradient is never held whole: it is made of the inputs and output gradients that the tape noted, a
few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tpshard.layout import Shape
from tpshard.verify.block_tensor import BlockTensor, Tape
from tpshard.verify.blocks import CHUNK

Uses = list[tuple[torch.Tensor, torch.Tensor]]
Noted = tuple[BlockTensor, Uses] | None  # of one run


class Processes(Protocol):
    """What several processes know and have together; with one, what it has."""

    def total(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def agree(self, known: dict[Any, Any]) -> dict[Any, Any]: ...


@dataclass(frozen=True, slots=True)
class Difference:
    """One gradient: squared norms of the difference and of the reference, and how many numbers."""

    key: str
    apart: float
    size: float
    count: int

    @classmethod
    def between(cls, key: str, got: torch.Tensor, want: torch.Tensor) -> Difference:
        return cls(key, float((got - want).square().sum()), float(want.square().sum()), want.numel())

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.key, self.apart + other.apart, self.size + other.size, self.count + other.count)


class Comparison:
    """The tapes of one process's ranks, and the reference's: None in a process that has it not, whose differences mean
    nothing."""

    def __init__(self, reference: Tape | None, ranks: Sequence[Tape], processes: Processes) -> None:
        self.reference, self.ranks, self.processes = reference, ranks, processes
        self._numbers = ranks[0].anchor

    def differences(self) -> Iterator[Difference]:
        """Every parameter's gradient since the tapes were cleared."""
        for (kind, *rest), shape in sorted(self.processes.agree(self._keys()).items(), key=str):
            key = tuple(rest)
            match kind:
                case "product":
                    yield self._product(key, shape)
                case "lookup":
                    yield self._lookup(key, shape)
                case _:
                    yield self._leaf(key, shape)

    def _keys(self) -> dict[Any, Shape]:
        """What was used, with its shape; of a table, the rows that were looked up."""
        keys: dict[Any, Shape] = {}
        tapes = [*self.ranks, *([self.reference] if self.reference is not None else [])]
        for tape in tapes:
            keys |= {("product", *key): tuple(weight.shape) for key, (weight, _) in tape.products.items()}
            keys |= {("leaf", *key): tuple(leaf.shape) for key, (_, leaf) in tape.leaves.items()}
            for key, (weight, uses) in tape.lookups.items():
                rows = {row for tokens, _ in uses for row in tokens.tolist()}
                known = set(keys.get(("lookup", *key), ())[1:])
                keys["lookup", *key] = (weight.shape[1], *sorted(rows | known))
        return keys

    def _product(self, key: Any, shape: Shape) -> Difference:
        out = key[2]
        rows, columns = shape[out], shape[1 - out]
        whole: Noted = self.reference.products.get(key) if self.reference else None
        found = Difference(key[0], 0.0, 0.0, 0)
        step = max(1, CHUNK // max(1, columns))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            summed = self._numbers.new_zeros(last - first, columns)
            for tape in self.ranks:
                if (entry := tape.products.get(key)) is not None:
                    _add_own(summed, *entry, out, first, last)
            want = torch.zeros_like(summed)
            for x, grad in whole[1] if whole else ():
                want += grad[:, first:last].T @ x
            found += Difference.between(key[0], self.processes.total(summed), want)
        return found

    def _lookup(self, key: Any, shape: Shape) -> Difference:
        columns, *rows = shape
        place = {row: n for n, row in enumerate(rows)}
        summed = self._numbers.new_zeros(len(rows), columns)
        want = torch.zeros_like(summed)
        for tape in self.ranks:
            weight, uses = tape.lookups.get(key, (None, []))
            for block in weight.blocks if weight is not None else ():
                (first, last), along = (block.box.start[0], block.box.stop[0]), block.box.slices()[1]
                for tokens, grad in uses:
                    inside = (tokens >= first) & (tokens < last)
                    index = torch.tensor([place[row] for row in tokens[inside].tolist()], dtype=torch.int64)
                    summed[:, along] = summed[:, along].index_add(0, index.to(grad.device), grad[inside][:, along])
        for tokens, grad in self.reference.lookups.get(key, (None, []))[1] if self.reference else ():
            want.index_add_(0, torch.tensor([place[row] for row in tokens.tolist()], device=grad.device), grad)
        return Difference.between(key[0], self.processes.total(summed), want)

    def _leaf(self, key: Any, shape: Shape) -> Difference:
        summed = self._numbers.new_zeros(shape)
        want = torch.zeros_like(summed)
        for tape in self.ranks:
            parameter, leaf = tape.leaves.get(key, (None, None))
            if parameter is not None and leaf is not None and leaf.grad is not None:
                summed += leaf.grad * parameter.own_cells()
        _, leaf = self.reference.leaves.get(key, (None, None)) if self.reference else (None, None)
        if leaf is not None and leaf.grad is not None:
            want += leaf.grad
        return Difference.between(key[0], self.processes.total(summed), want)


def _add_own(summed: torch.Tensor, weight: BlockTensor, uses: Uses, out: int, first: int, last: int) -> None:
    """The rows from ``first`` of one rank's gradient, where it holds something of the weight."""
    for block in weight.blocks:
        part = block.narrow(out, first, last)
        if part is not None:
            rows, columns = part.box.slices()[out], part.box.slices()[1 - out]
            for x, grad in uses:
                summed[rows.start - first : rows.stop - first, columns] += grad[:, rows].T @ x[:, columns]
