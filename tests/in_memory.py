"""Weights and models for the engine that were never on disk: a module's own parameters, cut as a test says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tpshard.layout import Box, Layout, Span
from tpshard.roles import Role
from tpshard.verify.execution import Subject
from tpshard.verify.models import Recipe, without_parameters
from tpshard.verify.preparation import Choice, default_dtype, prepare
from tpshard.verify.values import WHOLE, Place

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


@dataclass(frozen=True)
class Cut:
    """A rule, the axis, and each rank's run of it."""

    rule: str
    axis: int
    runs: Sequence[tuple[int, int]]
    gather: str = ""


def evenly(rule: str, axis: int, size: int, ranks: int, gather: str = "") -> Cut:
    edges = [size * rank // ranks for rank in range(ranks + 1)]
    return Cut(rule, axis, list(itertools.pairwise(edges)), gather)


@dataclass
class InMemory:
    """What ``Weights`` asks for; ``own``: a rank's whole tensor where it is not what its layout says."""

    tensors: dict[str, torch.Tensor]
    ranks: int
    cuts: Mapping[str, Cut]
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path("nowhere")
    own: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    _layouts: dict[str, Layout] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def dtype(self, name: str) -> str:
        return NAMES[self.tensors[name].dtype]

    def layout(self, name: str) -> Layout:
        if name not in self._layouts:
            self._layouts[name] = self._layout(name)
        return self._layouts[name]

    def _layout(self, name: str) -> Layout:
        shape = tuple(self.tensors[name].shape)
        if name not in self.cuts:
            return Layout.replicated(shape, self.ranks)
        cut = self.cuts[name]
        runs = [(Span(*run),) if run[0] < run[1] else () for run in cut.runs]
        return Layout.along(shape, cut.axis, runs, [b - a for a, b in cut.runs])

    def role(self, name: str) -> Role:
        cut = self.cuts.get(name)
        return Role(cut.rule, cut.gather) if cut else Role(self._rule_of_bias(name))  # type: ignore[arg-type]

    def _rule_of_bias(self, name: str) -> str:
        """A bias that is whole and stands beside a weight that is cut as a row is a row layer's."""
        twin = self.cuts.get(name.removesuffix("bias") + "weight")
        return "row" if name.endswith(".bias") and twin is not None and twin.rule == "row" else "replicate"

    def held(self, name: str, rank: int) -> Sequence[Place]:
        shard = self.layout(name).shards[rank]
        return [(rank, piece) for piece in shard.pieces()] if shard else []

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        if holder == WHOLE:
            return self.tensors[name][box.slices()].clone()
        if (name, holder) in self.own:
            return self.own[name, holder][box.slices()].clone()
        shard = self.layout(name).shards[holder]
        assert shard is not None
        own = torch.zeros(shard.shape, dtype=self.tensors[name].dtype)
        for piece in shard.pieces():
            own[piece.local.slices()] = self.tensors[name][piece.box.slices()]
        return own[box.slices()].clone()


@dataclass
class Given:
    """A model that a test has made."""

    skeleton: nn.Module
    recipes: Mapping[str, Recipe]
    given: dict[str, Any]
    name: str = "given"
    unused: tuple[str, ...] = ()

    def inputs(self, ranks: int, seed: int) -> dict[str, Any]:
        return self.given


def random_state(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers, floats replaced by random ones; twins once."""
    generator = torch.Generator().manual_seed(seed)
    kept = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]} & set(module.state_dict())
    return {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.3
        if value.is_floating_point()
        else value
        for name, value in module.state_dict().items()
        if name in kept
    }


def subject_of(
    make: Callable[[], nn.Module], weights: InMemory, inputs: dict[str, Any], patch: pytest.MonkeyPatch
) -> Subject:
    """What ``prepare`` makes of a module that is not imported by name."""
    with default_dtype(torch.float64), without_parameters():
        skeleton = make().double().eval()
    recipes = {name: Recipe((name,), lambda source, name=name: source(name)) for name in weights.names}  # type: ignore[misc]
    patch.setattr("tpshard.verify.preparation.make_model", lambda *_: Given(skeleton, recipes, inputs))
    with default_dtype(torch.float64):
        return prepare(weights, Choice())
