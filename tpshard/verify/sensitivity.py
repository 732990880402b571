"""Generic weights, and the proof in every run that the comparison sees faults and does not see noise.

Large models are shortened for this: of blocks of one make the first is run, the others hand their input on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tpshard.errors import InconclusiveError
from tpshard.verify.block_tensor import Context
from tpshard.verify.canaries import Canary, canaries
from tpshard.verify.execution import Outcome, Subject, Way, call, execute, on_device, tensors_of, with_stubs
from tpshard.verify.generic import generic_of
from tpshard.verify.lockstep import AllDouble
from tpshard.verify.models import copy_with
from tpshard.verify.placement import REFERENCE
from tpshard.verify.preparation import kind_of_block
from tpshard.verify.record import TOLERANCE, difference
from tpshard.verify.report import CheckResult, Table
from tpshard.verify.values import Weights, numbers_in

NOISE = TOLERANCE / 100
SEEN = 1000 * TOLERANCE
LONG = 5 * 10**7  # numbers: larger models are shortened


@dataclass(frozen=True, slots=True)
class Trial:
    """A canary and the largest error that it made, with the tensor in which it was planted."""

    name: str
    error: float = 0.0
    tensor: str = ""
    absent: str = ""

    @property
    def seen(self) -> bool:
        return self.error >= SEEN


def shortened(subject: Subject, weights: Weights) -> Subject:
    """Without blocks of a make that was there before, where the model is large."""
    if numbers_in(weights) <= LONG:
        return subject
    seen: set[object] = set()
    skipped = []
    meeting = {layer.path for layer in subject.layers if layer.task != "whole"}  # the ranks meet after the block itself
    for path in subject.blocks:
        kind = kind_of_block(subject, weights, path)
        if kind in seen and path in subject.stubs and path not in meeting:
            skipped.append(path)
        seen.add(kind)
    return replace(subject, skipped=frozenset(skipped))


def run_generic(subject: Subject, weights: Weights, way: Way) -> Outcome:
    return execute(subject, generic_of(weights), replace(way, sound=False))


def self_test(subject: Subject, weights: Weights, visited: set[str]) -> CheckResult:
    """Noise below the tolerance by a hundred times, every canary above it by a thousand."""
    try:
        noise = noise_of(subject, weights)
        trials = list(_trials(subject, weights, visited))
    except InconclusiveError as error:
        return CheckResult("self-test", unproven=f"with generic weights: {error}")
    planted = [trial for trial in trials if not trial.absent]
    missed = [trial for trial in planted if not trial.seen]
    reason = None
    if not noise <= NOISE:
        reason = f"another summation order alone makes an error of {noise:.1e}, more than {NOISE:.0e}"
    elif missed:
        first = missed[0]
        reason = f"a planted {first.name} in {first.tensor} made an error of {first.error:.1e}, less than {SEEN:.0e}"
    notes = [f"noise {noise:.1e}; smallest planted fault {min((t.error for t in planted), default=0.0):.1e}"]
    return CheckResult(
        "self-test",
        covered={"planted faults": len(planted), "seen": len(planted) - len(missed)},
        notes=tuple(notes),
        tables=(_table(trials),),
        unproven=reason,
        figures={
            "noise": noise,
            "canaries": {t.name: {"tensor": t.tensor, "error": t.error} for t in planted},
            "not_applicable": {t.name: t.absent for t in trials if t.absent},
        },
    )


def _table(trials: Sequence[Trial]) -> Table:
    rows = tuple(
        (
            t.name,
            t.tensor or "-",
            f"{t.error:.1e}, {t.error / TOLERANCE:.0e} times the tolerance" if t.tensor else f"not planted: {t.absent}",
        )
        for t in trials
    )
    return Table("planted faults", ("fault", "in", "error"), rows, brief=len(rows))


def _trials(subject: Subject, weights: Weights, visited: set[str]) -> Iterator[Trial]:
    for canary in canaries(subject, weights, visited):
        yield _try(subject, weights, canary) if canary.plants else Trial(canary.name, absent=canary.absent)


def _try(subject: Subject, weights: Weights, canary: Canary) -> Trial:
    best = Trial(canary.name)
    for plant in canary.plants:
        way = Way(stop_above=SEEN, doubled=plant.doubled)
        outcome = execute(subject, generic_of(weights, plant.rearrangement), way)
        error = float("inf") if outcome.failure else outcome.record.worst
        if error >= best.error:
            best = Trial(canary.name, error, plant.tensor)
        if best.seen:
            break
    return best


def noise_of(subject: Subject, weights: Weights) -> float:
    """The unsharded model twice, the second time its sums in another order."""
    outputs = []
    generic = generic_of(weights)
    for backwards in (False, True):
        context = Context(generic, torch.float64, subject.device, backwards=backwards)
        module = copy_with(subject.model.skeleton, subject.parameters.of_run(REFERENCE, context), subject.device)
        with_stubs(subject, module)
        with torch.no_grad(), AllDouble():
            outputs.append([*tensors_of(call(module, on_device(subject.inputs, subject.device)))])
    return max(difference(other, one)[0] for one, other in zip(*outputs, strict=True))
