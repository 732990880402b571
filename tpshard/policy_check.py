"""Whether a policy fits a checkpoint: what each rule cuts, and at which rank counts. Headers only; nothing is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpshard.assignment import match_all
from tpshard.checkpoint import Checkpoint
from tpshard.companions import DENSE, Quantised, assign_stored
from tpshard.errors import PolicyError
from tpshard.mesh import Grid
from tpshard.partition import ANY, Block, Cut, legal_ranks
from tpshard.policy import Policy, Rule, rule_cut


@dataclass(frozen=True, slots=True)
class Use:
    """Tensors that a rule treats alike: cut along ``axis`` as ``cut`` says, or whole (both None).

    ``rule`` is None for tensors that no rule meets and the policy's default replicates.
    """

    rule: Rule | None
    tensors: int
    axis: int | None
    cut: Cut | None

    def as_json(self) -> dict[str, Any]:
        return {
            "pattern": self.rule.key if self.rule else None,
            "rule": self.rule.kind if self.rule else "replicate",
            "gather": (self.rule.gather or None) if self.rule else None,
            "place": str(self.rule.mark) if self.rule else None,
            "tensors": self.tensors,
            "axis": self.axis,
            "units": [{"count": block.count, "width": block.width} for block in self.cut.blocks] if self.cut else [],
            "uneven": bool(self.cut and self.cut.uneven),
            "pad": self.cut.pad if self.cut else 0,
        }


@dataclass(frozen=True, slots=True)
class Trial:
    """Whether the checkpoint can be cut for so many ranks; ``problem`` is empty where it can."""

    ranks: int
    problem: str

    def as_json(self) -> dict[str, Any]:
        return {"tp": self.ranks, "works": not self.problem, "problem": self.problem or None}


@dataclass(frozen=True, slots=True)
class PolicyCheck:
    """``legal``: the rank counts up to 128 at which the whole checkpoint can be cut."""

    policy: Policy
    tensors: int
    uses: tuple[Use, ...]
    legal: tuple[int, ...]
    trials: tuple[Trial, ...]
    warnings: tuple[str, ...]

    @property
    def refusal(self) -> PolicyError | None:
        """The first rank count asked for that does not work."""
        for trial in self.trials:
            if trial.problem:
                what = f"policy {self.policy.name} does not fit at --tp {trial.ranks}: {trial.problem}"
                return PolicyError(what, hint=f"--tp that works: {in_runs(self.legal)}")
        return None

    def as_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy.name,
            "tensors": self.tensors,
            "rules": [use.as_json() for use in self.uses],
            "legal_tp": list(self.legal),
            "trials": [trial.as_json() for trial in self.trials],
            "warnings": list(self.warnings),
        }


def check_policy(
    policy: Policy, checkpoint: Checkpoint, ranks: Sequence[int] = (), quantised: Quantised = DENSE
) -> PolicyCheck:
    """Match every tensor and try every rank count; a quantised weight counts as one tensor.

    Raises PolicyError where tensors have no rule or two, and where a rule cannot apply at any rank count (heads that
    do not divide an axis, a key that the config lacks).
    """
    config = checkpoint.config
    # one rank takes any units: what fails here fails everywhere
    unused = assign_stored(policy, config, checkpoint.shapes, {}, Grid.of(1), quantised).unused
    shapes = quantised.shapes(checkpoint.shapes)
    counted: Counter[tuple[Rule | None, int | None, Cut | None]] = Counter()
    rules = match_all(policy, shapes)
    grains = quantised.grains(policy, config, shapes, rules)
    for name, rule in rules.items():
        axis, cut = (rule_cut(rule, policy, config, shapes[name], grains.get(name, ANY)) if rule else None) or (
            None,
            None,
        )
        counted[rule, axis, cut] += 1
    order = {id(rule): place for place, rule in enumerate(policy.rules)}
    uses = [Use(rule, count, axis, cut) for (rule, axis, cut), count in counted.items()]
    return PolicyCheck(
        policy=policy,
        tensors=len(shapes),
        uses=tuple(sorted(uses, key=lambda use: (order.get(id(use.rule), len(order)), use.cut is None))),
        legal=tuple(legal_ranks(cut for _, _, cut in counted if cut)),
        trials=tuple(_trial(policy, checkpoint, count, quantised) for count in ranks),
        warnings=(*checkpoint.warnings, *(f"{rule.mark}: rule '{rule.key}' matches no tensor" for rule in unused)),
    )


def _trial(policy: Policy, checkpoint: Checkpoint, ranks: int, quantised: Quantised) -> Trial:
    try:
        assign_stored(policy, checkpoint.config, checkpoint.shapes, {}, Grid.of(ranks), quantised)
    except PolicyError as error:
        return Trial(ranks, error.message)
    return Trial(ranks, "")


def in_runs(numbers: Sequence[int]) -> str:
    """Whole numbers in few words.

    >>> in_runs([1, 2, 3, 6, 12]), in_runs(range(1, 129))
    ('1-3, 6, 12', '1-128')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def in_words(cut: Cut | None) -> str:
    """How an axis is dealt: ``6 x 10 | 3 x 10`` for blocks of heads, ``52`` for cells that may be dealt one by one,
    ``3 x 32 (the last 10)`` for those of which 32 go together.

    >>> in_words(Cut((Block(6, 10), Block(3, 10)))), in_words(Cut((Block(52, 1, named=False),), pad=8))
    ('6 x 10 | 3 x 10', '52, padded by 8')
    """
    if cut is None:
        return "whole"
    blocks = (_block_in_words(block) for block in cut.blocks)
    return " | ".join(blocks) + (", uneven" if cut.uneven else "") + (f", padded by {cut.pad}" if cut.pad else "")


def _block_in_words(block: Block) -> str:
    if block.width == 1:
        return str(block.count)
    return f"{block.count} x {block.width}" + (f" (the last {block.width - block.short})" if block.short else "")
