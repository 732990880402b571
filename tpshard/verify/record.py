"""What a run compares with the reference, and how far apart is too far."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

TOLERANCE = 1e-10  # relative L2, of a seam and of each position: clean runs stay below 1e-14, real faults exceed 4e-4
LARGEST = 1e-9  # of the reference's root mean square, for a single number
OWN_PART = "own part of the output"  # of a column layer; everything else that is compared is whole


@dataclass(frozen=True, slots=True)
class Seam:
    """One comparison. ``error`` is relative to the reference, infinite where a number is not finite."""

    layer: str
    what: str
    rank: int
    error: float
    wrong: bool
    producers: tuple[str, ...] = ()


class EnoughError(Exception):
    """An error was found that is large enough to end the run."""


@dataclass(slots=True)
class Record:
    """What a run has compared, in order; ``positions`` counts positions of all comparisons."""

    seams: list[Seam] = field(default_factory=list)
    positions: int = 0
    gathers: int = 0
    visited: set[str] = field(default_factory=set)
    stop_above: float | None = None  # an error that is enough in what is whole: the run ends there
    followed: bool = True  # to what is whole; not where layers are isolated or a rank broke down
    open_cuts: list[str] = field(default_factory=list)  # column layers since the ranks last met

    def compare(self, layer: str, what: str, rank: int, got: torch.Tensor, want: torch.Tensor) -> None:
        """Note how far ``got`` is from ``want``; the last axis is one position's features."""
        error, wrong = difference(got.detach(), want.detach())
        self.positions += want.numel() // max(1, want.shape[-1]) if want.ndim else 1
        self.seams.append(Seam(layer, what, rank, error, wrong, tuple(self.open_cuts[-4:]) if wrong else ()))
        if self.stop_above is not None and error >= self.stop_above and what != OWN_PART:
            raise EnoughError

    @property
    def moved(self) -> tuple[str, ...]:
        """Layers of which ranks hold other numbers than the reference at the same places, while all that is whole is
        the reference's: cells that changed places together, such as channels of up and down. The function is equal
        (that the bytes differ, the weights check says)."""
        wrong = [seam for seam in self.seams if seam.wrong]
        if not self.followed or any(seam.what != OWN_PART for seam in wrong):
            return ()
        return tuple(dict.fromkeys(seam.layer for seam in wrong))

    @property
    def counted(self) -> list[Seam]:
        """The comparisons that decide: where cells only moved, those of what is whole."""
        return [seam for seam in self.seams if seam.what != OWN_PART] if self.moved else self.seams

    @property
    def worst(self) -> float:
        return max((seam.error for seam in self.counted), default=0.0)


def together(records: Sequence[Record]) -> Record:
    """The records of several processes as one, step by step."""
    first, *others = records
    if not others:
        return first
    steps = itertools.zip_longest(*(record.seams for record in records))
    return Record(
        seams=[seam for step in steps for seam in step if seam is not None],
        positions=sum(record.positions for record in records),
        gathers=first.gathers,
        visited=set().union(*(record.visited for record in records)),
        followed=all(record.followed for record in records),
    )


def difference(got: torch.Tensor, want: torch.Tensor) -> tuple[float, bool]:
    """The larger of the relative L2 error of the whole and of the worst position; and whether it is too large.

    Every comparison is written so that NaN is too large.
    """
    if got.shape != want.shape:
        return float("inf"), True
    if not want.numel():
        return 0.0, False
    rows, apart = (
        want.reshape(-1, want.shape[-1] if want.ndim else 1),
        (got - want).reshape(-1, got.shape[-1] if got.ndim else 1),
    )
    scale = rows.norm() / len(rows) ** 0.5  # a typical position; a position near zero is measured by it
    if not bool(scale > 0):
        wrong = not bool((apart == 0).all())
        return (float("inf") if wrong else 0.0), wrong
    small = 1e-6 if rows.shape[1] > 1 else 1e-2  # one number alone (a gate of a head) comes near zero by chance
    of_rows = apart.norm(dim=1) / rows.norm(dim=1).clamp(min=small * float(scale))
    error = float(torch.maximum(of_rows.max(), apart.norm() / rows.norm()))
    root_mean_square = scale / rows.shape[1] ** 0.5
    within = error <= TOLERANCE and bool(apart.abs().max() <= LARGEST * root_mean_square)
    return (error if error == error else float("inf")), not within
