"""A policy proven on no weights at all: the architecture at its own head counts, generic numbers, the model checks."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpshard.assignment import Assignment, assign
from tpshard.checkpoint import Checkpoint, Stored
from tpshard.errors import InconclusiveError, PolicyError
from tpshard.layout import Box, Layout
from tpshard.manifest import TensorRecord
from tpshard.policy import Policy
from tpshard.policy_check import PolicyCheck, check_shapes
from tpshard.roles import Role
from tpshard.verify.blueprint import Architecture, Blueprint
from tpshard.verify.execution import Way, execute
from tpshard.verify.forward import backward_result, forward_result
from tpshard.verify.generic import GenericWeights
from tpshard.verify.layout import check_layout
from tpshard.verify.preparation import Choice, default_dtype, prepare
from tpshard.verify.report import CheckResult, Report, Verdict
from tpshard.verify.sections import outermost_blocks
from tpshard.verify.sensitivity import self_test
from tpshard.verify.values import Place


class Unwritten:
    """What ``Weights`` asks for, of a blueprint cut by a policy; whole numbers (positions, counters) are its own."""

    def __init__(self, blueprint: Blueprint, made: Mapping[str, Assignment], ranks: int, folder: Path) -> None:
        self._tensors, self._made = blueprint.tensors, made
        self.ranks, self.names, self.folder = ranks, tuple(blueprint.tensors), folder
        self.config: Mapping[str, Any] = blueprint.config

    def dtype(self, name: str) -> str:
        tensor = self._tensors[name]
        if tensor.is_floating_point():
            return "F64"
        return "BOOL" if tensor.dtype == torch.bool else "I64"

    def layout(self, name: str) -> Layout:
        return self._made[name].layout

    def role(self, name: str) -> Role:
        return self._made[name].role

    def held(self, name: str, rank: int) -> Sequence[Place]:
        shard = self.layout(name).shards[rank]
        return [(rank, piece) for piece in shard.pieces()] if shard else []

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        """Of whole numbers: floats are generic, and read nowhere."""
        own = self._tensors[name]
        if not self.layout(name).is_replicated:
            raise InconclusiveError(f"{name}: whole numbers that are cut have no generic form", hint="replicate them")
        return own[box.slices()].to(torch.bool if own.dtype == torch.bool else torch.int64)


@dataclass(frozen=True, slots=True)
class Proof:
    """What the checks found at one rank count."""

    ranks: int
    report: Report

    @property
    def worst(self) -> float | None:
        """The largest relative error of forward and backward; None where neither ran."""
        errors = [check.figures.get("worst_relative_error") for check in self.report.checks]
        return max((error for error in errors if isinstance(error, float)), default=None)

    @property
    def reason(self) -> str:
        """The first thing found wrong, or why nothing is proven; empty where all is well."""
        for check in self.report.checks:
            if check.findings and check.name == "forward":
                return str(check.findings[0])
        for check in self.report.checks:
            if check.findings:
                return f"{check.name}: {check.findings[0]}"
        undecided = [check for check in self.report.checks if check.reason and not self.report.excuses(check)]
        return f"{undecided[0].name}: {undecided[0].reason}" if undecided else ""

    def as_json(self) -> dict[str, Any]:
        return {"tp": self.ranks, "worst_relative_error": self.worst, "reason": self.reason or None,
                **self.report.as_json()}  # fmt: skip


def prove(
    policy: Policy, architecture: Architecture, blueprint: Blueprint, ranks: int, *, quick: bool = False
) -> Proof:
    """All checks that need no weights, at one rank count; ``quick``: forward alone, every faulty layer of it.

    Raises PolicyError where the smaller model cannot be cut so, InconclusiveError where it cannot be run.
    """
    made = assign(policy, blueprint.config, blueprint.shapes, ranks).tensors
    with tempfile.TemporaryDirectory(prefix="tpshard-") as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(architecture.written(blueprint)), "utf-8")
        weights = GenericWeights(Unwritten(blueprint, made, ranks, folder))
        weights.config = architecture.written(blueprint)
        checks = [] if quick else [check_layout(_as_shards(blueprint, made, ranks))]
        try:
            checks += _model_checks(weights, quick)
        except InconclusiveError as error:
            checks.append(CheckResult("forward", unproven=str(error)))
    return Proof(ranks, Report(tuple(checks)))


def _model_checks(weights: GenericWeights, quick: bool) -> Iterator[CheckResult]:
    with default_dtype(torch.float64):
        subject = prepare(weights, Choice())
        way = Way(backward=not quick, isolate=quick)
        no_way_back = ""
        try:
            outcome = execute(subject, weights, way)
        except InconclusiveError as error:
            if quick:
                raise
            no_way_back = str(error)
            outcome = execute(subject, weights, Way())
        yield forward_result(subject, weights, outcome, quick, None)
        if quick:
            return
        if no_way_back:
            yield CheckResult("backward", unproven=no_way_back)
        else:
            yield backward_result(subject, weights, outcome, None)
        yield self_test(subject, weights, outcome.record.visited)


def _as_shards(blueprint: Blueprint, made: Mapping[str, Assignment], ranks: int) -> Checkpoint:
    """The layouts in the form in which the layout check reads them from a manifest."""
    tensors = {}
    for name, assignment in made.items():
        record = TensorRecord(name, "F64", assignment.layout, assignment.role, 0, 0, "", (None,) * ranks)
        tensors[name] = Stored(name, "F64", assignment.layout, (None,) * ranks, 0, record)
    return Checkpoint(Path(), ranks, (), tensors, blueprint.config, ())


class Candidates:
    """Smaller models, made when they are asked for; the first that can be cut and run is used from then on."""

    def __init__(self, blueprints: Iterator[Blueprint]) -> None:
        self._coming = blueprints
        self._made: list[Blueprint] = []
        self.used: Blueprint | None = None

    def _all(self) -> Iterator[Blueprint]:
        if self.used is not None:
            yield self.used
        yield from (blueprint for blueprint in self._made if blueprint is not self.used)
        for blueprint in self._coming:
            self._made.append(blueprint)
            yield blueprint

    def first_that_runs(self, policy: Policy, architecture: Architecture, ranks: int, *, quick: bool = False) -> Proof:
        """The proof on the first that can be cut and run; where none can, what the first said.

        Raises InconclusiveError where none can even be cut."""
        idle: list[tuple[Proof, Blueprint]] = []
        refusals: list[str] = []
        for blueprint in self._all():
            try:
                proof = prove(policy, architecture, blueprint, ranks, quick=quick)
            except PolicyError as error:
                refusals.append(error.message)
                continue
            if not _did_not_run(proof):
                self.used = blueprint
                return proof
            idle.append((proof, blueprint))
        if not idle:
            raise InconclusiveError(f"the smaller model cannot be cut as the real one: {refusals[0]}")
        return idle[0][0]


def _did_not_run(proof: Proof) -> bool:
    return any(check.name == "forward" and check.unproven and not check.covered for check in proof.report.checks)


# ---------------------------------------------------------------------------------------------- policy check --config


@dataclass(frozen=True, slots=True)
class ProofTrial:
    """One rank count that was asked for: ``problem`` where the policy does not fit it, else its proof, or why there is
    none."""

    ranks: int
    problem: str = ""
    proof: Proof | None = None
    unproven: str = ""

    @property
    def verdict(self) -> Verdict:
        return self.proof.report.verdict if self.proof else Verdict.INCONCLUSIVE

    @property
    def exit_code(self) -> int:
        return PolicyError.exit_code if self.problem else self.verdict.exit_code

    @property
    def line(self) -> str:
        """The verdict in a line."""
        if self.problem:
            return self.problem
        if self.proof is None:
            return f"INCONCLUSIVE  {self.unproven}"
        if self.verdict is not Verdict.PASS:
            return f"{self.verdict.value}  {self.proof.reason}"
        names = [check.name for check in self.proof.report.checks if check.verdict is Verdict.PASS]
        return f"PASS  largest error {self.proof.worst or 0.0:.1e} ({', '.join(names)})"

    def as_json(self) -> dict[str, Any]:
        proof = self.proof.as_json() if self.proof else {"tp": self.ranks, "reason": self.unproven or None}
        return {**proof, "works": not self.problem, "problem": self.problem or None}


@dataclass(frozen=True, slots=True)
class Proven:
    """``fit``: the policy against the names and shapes of the real sizes; ``model_line``: what the proofs ran on."""

    fit: PolicyCheck
    trials: tuple[ProofTrial, ...]
    model_line: str

    @property
    def exit_code(self) -> int:
        """A wrong layout weighs most, then one that does not fit, then what is not proven."""
        codes = {trial.exit_code for trial in self.trials}
        return next((code for code in (1, 2, 4) if code in codes), 0)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.fit.as_json(),
            "model": self.model_line,
            "trials": [trial.as_json() for trial in self.trials],
        }


def prove_without_weights(policy: Policy, config: Mapping[str, Any], ranks: Sequence[int]) -> Proven:
    """Match the policy with the architecture at its real sizes, and prove it on a smaller one; without ``ranks``, at
    the fewest that work.

    Raises PolicyError where it fits at no rank count, InputError and InconclusiveError where there is no such model.
    """
    architecture = Architecture(config)
    real = architecture.real()
    fit = check_shapes(policy, config, real.shapes, ranks, architecture.warnings)
    wanted = tuple(ranks) or tuple(count for count in fit.legal if count > 1)[:1]
    if not wanted:
        raise PolicyError(f"policy {policy.name} works at no --tp from 2 to 128", hint=f"not {fit.refusals[0]}")
    problems = {trial.ranks: trial.problem for trial in fit.trials}
    smaller = architecture.smaller(math.lcm(*(count for count in wanted if count in fit.legal)))
    blueprints = Candidates(smaller)
    trials = tuple(
        ProofTrial(count, problems[count])
        if problems.get(count)
        else proof_trial(policy, architecture, blueprints, count)
        for count in wanted
    )
    return Proven(fit, trials, told(architecture, real, blueprints.used))


def proof_trial(policy: Policy, architecture: Architecture, blueprints: Candidates, ranks: int) -> ProofTrial:
    """The proof at one rank count, or why there is none."""
    try:
        return ProofTrial(ranks, proof=blueprints.first_that_runs(policy, architecture, ranks))
    except InconclusiveError as error:
        return ProofTrial(ranks, unproven=str(error))


def told(architecture: Architecture, real: Blueprint, used: Blueprint | None) -> str:
    if used is None:
        return f"{architecture.name} was not run"
    layers, of = len(outermost_blocks(used.module)), len(outermost_blocks(real.module))
    return (
        f"run: a smaller {architecture.name}, {layers} of {of} blocks, {used.numbers:,} of {real.numbers:,} numbers, "
        "the same heads, generic weights"
    )


# ---------------------------------------------------------------------------------------------- policy init


class ForwardJudge:
    """Whether a policy is right, by one forward of a smaller model at the fewest ranks; ``wholly``: by all checks, at
    all ranks."""

    def __init__(self, architecture: Architecture, candidates: Candidates, *, wholly: bool = False) -> None:
        self._architecture, self._candidates, self._wholly = architecture, candidates, wholly

    def right(self, policy: Policy, ranks: Sequence[int]) -> bool:
        return all(self._is_right(policy, count) for count in (ranks if self._wholly else ranks[:1]))

    def _is_right(self, policy: Policy, ranks: int) -> bool:
        try:
            proof = self._candidates.first_that_runs(policy, self._architecture, ranks, quick=not self._wholly)
        except InconclusiveError:
            return False
        return proof.report.verdict is Verdict.PASS
