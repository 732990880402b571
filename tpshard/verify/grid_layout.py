"""The layout check of a grid: which stage has which layer, which group which expert, then each group by itself.

Conventions that hold for every engine: layers go to stages, and experts to groups, in ascending runs; a layer is on
one stage as a whole; words come in at the first stage and are predicted at the last; what belongs to no expert is the
same in every group. Derived from names and config.json by code that shares nothing with the policy engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.layout import Layout, Shard, Span
from tpshard.mesh import Mesh
from tpshard.policy_check import in_runs
from tpshard.verify.families import are_tied, family_of
from tpshard.verify.layout import check_layout
from tpshard.verify.report import CheckResult, Finding
from tpshard.verify.slots import Slot, slot_of

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def check_layout_of_grid(shards: Checkpoint, units: Sequence[int] = ()) -> CheckResult:
    """``check_layout`` with these ``units``, and the places of layers and experts where there are stages, groups or
    whole experts."""
    assert shards.manifest is not None
    mesh = shards.manifest.mesh
    found = _Grid(shards, mesh, _experts_in(shards), family_of(shards.config))
    if not mesh.is_grid and not found.deals_experts():
        return check_layout(shards, units)
    findings = [*found.experts(), *found.groups(), *found.stages()]
    if findings:
        return CheckResult("layout", tuple(findings), {"tensors": len(shards.tensors), "ranks": shards.ranks})
    result = check_layout(found.one_group(), units)
    note = f"{mesh.pp} stages, {mesh.ep} groups of experts, {mesh.tp} ranks in each"
    covered = {**result.covered, "ranks": shards.ranks} if result.covered else result.covered
    return replace(result, covered=covered, notes=(note, *result.notes))


@dataclass(frozen=True, slots=True)
class _Grid:
    """``count``: of experts, None where there are none; ``family``: None where nothing is known of it."""

    shards: Checkpoint
    mesh: Mesh
    count: int | None
    family: Mapping[str, Slot] | None

    @property
    def tensors(self) -> Mapping[str, Stored]:
        return self.shards.tensors

    # ---------------------------------------------------------------------------------------- experts

    def deals_experts(self) -> bool:
        """Whether ranks of one group have experts of their own: tensors, or runs of stacked ones."""
        return any(
            not all(tensor.layout.shards)
            or (self.family is not None and len(set(self._stacked(tensor, self._groups(tensor, 0)) or ())) > 1)
            for tensor in self.tensors.values()
        )

    def experts(self) -> Iterator[Finding]:
        """Each expert on one group's ranks, in ascending runs; of stacked experts each group's run of their axis."""
        for tensor in self.tensors.values():
            number, count = _expert(tensor.name), self.count
            if number is None or count is None:
                continue
            here = sorted({rank % (self.mesh.ep * self.mesh.tp) for rank in _holders(tensor)})
            wanted = [self._ranks_of(number, count, groups) for groups in self._ways()]
            if here not in wanted:
                says = f"expert {number} of {count} is on ranks {_runs(here)} of its stage"
                yield Finding(f"{says}, belongs on {_runs(wanted[0])}", tensor=tensor.name)

    def _ways(self) -> list[int]:
        """Into how many groups experts may have been dealt: all ranks of a group have them, or each has its own."""
        return [self.mesh.ep, self.mesh.ep * self.mesh.tp]

    def _ranks_of(self, number: int, count: int, groups: int) -> list[int]:
        each = self.mesh.ep * self.mesh.tp // groups
        owner = next(g for g, run in enumerate(np.array_split(np.arange(count), groups)) if number in run)
        return list(range(owner * each, (owner + 1) * each))

    # ---------------------------------------------------------------------------------------- groups

    def groups(self) -> Iterator[Finding]:
        """What belongs to no expert: the same in every group."""
        for tensor in self.tensors.values():
            if _expert(tensor.name) is not None:
                continue
            for stage in _stages(tensor, self.mesh):
                groups = self._groups(tensor, stage)
                runs = self._stacked(tensor, groups)
                if runs is not None and len(set(runs)) > 1:
                    if runs != _equal_runs(tensor.shape[0], len(runs)):
                        said = " | ".join(_runs(range(*run)) for run in runs)
                        yield Finding(f"experts are dealt {said}: not in equal, ascending runs", tensor=tensor.name)
                elif any(group != groups[0] for group in groups):
                    number = next(n for n, group in enumerate(groups) if group != groups[0])
                    yield Finding(
                        f"group {number} does not hold what group 0 holds, and it is of no expert", tensor=tensor.name
                    )

    def _groups(self, tensor: Stored, stage: int) -> list[tuple[Shard | None, ...]]:
        begin = stage * self.mesh.ep * self.mesh.tp
        shards = tensor.layout.shards
        starts = range(begin, begin + self.mesh.ep * self.mesh.tp, self.mesh.tp)
        return [shards[start : start + self.mesh.tp] for start in starts]

    def _stacked(self, tensor: Stored, groups: list[tuple[Shard | None, ...]]) -> list[Span] | None:
        """The runs of axis 0 where it counts experts and groups, or all ranks, have one run each and differ in nothing
        else; else None."""
        if len(tensor.shape) < 2 or tensor.shape[0] != self.count:
            return None
        if self.family is not None:
            slot = slot_of(self.family, tensor.name)
            if slot is None or slot.expert != "routed":
                return None
        for pieces in (groups, [(shard,) for group in groups for shard in group]):
            runs = [{shard.spans[0] if shard else () for shard in piece} for piece in pieces]
            rest = [[_without_axis_0(shard) for shard in piece] for piece in pieces]
            if all(len(run) == 1 and len(next(iter(run))) == 1 for run in runs) and rest == [rest[0]] * len(rest):
                return [next(iter(run))[0] for run in runs]
        return None

    # ---------------------------------------------------------------------------------------- stages

    def stages(self) -> Iterator[Finding]:
        """Layers ascend with the stages; each stage that has a tensor has it alike."""
        last = 0
        seen: dict[int, int] = {}
        family = self.family or {}
        numbered = {name: int(m[1]) for name in self.tensors if (m := re.search(r"\.(\d+)\.", f".{name}"))}
        for name in sorted(numbered, key=lambda name: numbered[name]):
            stages = _stages(self.tensors[name], self.mesh)
            stage = seen.setdefault(numbered[name], stages[0] if stages else 0)
            if stages != [stage]:
                yield Finding(f"is on stages {_runs(stages)}, its layer on stage {stage}", tensor=name)
            elif stage < last:
                yield Finding(f"is on stage {stage}, a layer before it on stage {last}", tensor=name)
            last = max(last, stage)
        for name, tensor in self.tensors.items():
            stages, slot = _stages(tensor, self.mesh), slot_of(family, name)
            if any(self._groups(tensor, stage) != self._groups(tensor, stages[0]) for stage in stages):
                yield Finding(f"is not the same on stages {_runs(stages)}", tensor=name)
            elif slot is not None and slot.meaning == "word" and self.mesh.pp > 1:
                yield from self._of_words(tensor, stages, slot.consumer)

    def _of_words(self, tensor: Stored, stages: list[int], embedding: bool) -> Iterator[Finding]:
        final = self.mesh.pp - 1
        wanted = [[0], [0, final]] if embedding else [[final]]
        family = self.family or {}
        others = (slot_of(family, name) for name in self.tensors)
        if (
            embedding
            and are_tied(self.shards.config)
            and not any(slot and slot.meaning == "word" and not slot.consumer for slot in others)
        ):
            wanted = [[0, final]]  # it predicts words, too
        if stages not in wanted:
            yield Finding(f"is on stages {_runs(stages)}, belongs on {_runs(wanted[-1])}", tensor=tensor.name)

    # ---------------------------------------------------------------------------------------- one group

    def one_group(self) -> Checkpoint:
        """The checkpoint as one group of one stage would have it that had all layers and experts."""
        tensors = {name: self._in_one_group(tensor) for name, tensor in self.tensors.items()}
        return replace(self.shards, ranks=self.mesh.tp, tensors=tensors)

    def _in_one_group(self, tensor: Stored) -> Stored:
        groups = self._groups(tensor, _stages(tensor, self.mesh)[0])
        group = next((group for group in groups if any(group)), groups[0])
        if self._stacked(tensor, groups) is not None:
            group = tuple(shard and _with_all_of_axis_0(shard, tensor.shape[0]) for shard in group)
        elif not all(group):
            group = tuple(next(filter(None, group)) for _ in group)  # whole experts
        return replace(tensor, layout=Layout(tensor.shape, group), places=tensor.places[: self.mesh.tp])


def _experts_in(shards: Checkpoint) -> int | None:
    """How many experts there are by config.json, or else by the names."""
    found = [shards.config.get(key) for key in _COUNTS]
    numbers = [n for name in shards.tensors if (n := _expert(name)) is not None]
    return next((n for n in found if isinstance(n, int) and n > 0), max(numbers) + 1 if numbers else None)


def _expert(name: str) -> int | None:
    """The number of the expert that a tensor belongs to."""
    found = re.search(r"experts?\.(\d+)\.", name)
    return int(found[1]) if found else None


def _holders(tensor: Stored) -> list[int]:
    return [rank for rank, shard in enumerate(tensor.layout.shards) if shard is not None]


def _stages(tensor: Stored, mesh: Mesh) -> list[int]:
    return sorted({rank // (mesh.ep * mesh.tp) for rank in _holders(tensor)})


def _equal_runs(size: int, count: int) -> list[Span]:
    return [Span(n * size // count, (n + 1) * size // count) for n in range(count)]


def _without_axis_0(shard: Shard | None) -> Any:
    return shard and (shard.shape[1:], shard.spans[1:])


def _with_all_of_axis_0(shard: Shard, size: int) -> Shard:
    return Shard((size, *shard.shape[1:]), ((Span(0, size),), *shard.spans[1:]))


def _runs(numbers: Sequence[int]) -> str:
    return in_runs(numbers) or "none"
