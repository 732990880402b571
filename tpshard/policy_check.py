"""Whether a policy fits a checkpoint: what each rule cuts, and at which rank counts. Headers only; nothing is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpshard.assignment import match_all
from tpshard.checkpoint import Checkpoint
from tpshard.companions import DENSE, Quantised, assign_stored
from tpshard.errors import PolicyError
from tpshard.layout import Shape
from tpshard.mesh import Grid
from tpshard.partition import ANY, LARGEST_TP_LISTED, Block, Cut, legal_ranks
from tpshard.policy import Policy, Rule, rule_cut

RUNS_SHOWN = 6


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
class Refusal:
    """Rank counts that the same rules refuse: ``uses`` are what they would have to cut."""

    ranks: tuple[int, ...]
    uses: tuple[Use, ...]

    def __str__(self) -> str:
        """``3, 5-7: self_attn.o_proj: 64 heads``: the numbers of units that do not go into these ranks."""
        return f"{in_runs(self.ranks, RUNS_SHOWN)}: {'; '.join(dict.fromkeys(map(self._reason, self.uses)))}"

    def _reason(self, use: Use) -> str:
        assert use.rule is not None
        assert use.cut is not None
        counts = [block.count for block in use.cut.blocks if block.named]
        noun = "units" if use.rule.heads is None and not isinstance(use.rule.parts, tuple) else "heads"
        doubled = not use.cut.replicable and all(ranks % count == 0 for ranks in self.ranks for count in counts)
        why = ", and a row rule may not replicate" if doubled else ""
        return f"{use.rule.key}: {' + '.join(map(str, counts))} {noun if counts != [1] else noun[:-1]}{why}"

    def as_json(self) -> dict[str, Any]:
        return {"tp": list(self.ranks), "rules": [use.as_json() for use in self.uses], "problem": str(self)}


@dataclass(frozen=True, slots=True)
class Trial:
    """Whether the checkpoint can be cut for so many ranks; ``problem`` is empty where it can."""

    ranks: int
    problem: str

    def as_json(self) -> dict[str, Any]:
        return {"tp": self.ranks, "works": not self.problem, "problem": self.problem or None}


@dataclass(frozen=True, slots=True)
class PolicyCheck:
    """``legal``: the rank counts up to 128 at which the whole checkpoint can be cut; ``refusals``: why not the others,
    the largest group first."""

    policy: Policy
    tensors: int
    uses: tuple[Use, ...]
    legal: tuple[int, ...]
    refusals: tuple[Refusal, ...]
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
            "refusals": [refusal.as_json() for refusal in self.refusals],
            "trials": [trial.as_json() for trial in self.trials],
            "warnings": list(self.warnings),
        }


def check_policy(
    policy: Policy, checkpoint: Checkpoint, ranks: Sequence[int] = (), quantised: Quantised = DENSE
) -> PolicyCheck:
    """Match every tensor of a checkpoint and try every rank count. Raises PolicyError as ``check_shapes`` does."""
    return check_shapes(policy, checkpoint.config, checkpoint.shapes, ranks, checkpoint.warnings, quantised)


def check_shapes(
    policy: Policy,
    config: Mapping[str, Any],
    stored: Mapping[str, Shape],
    ranks: Sequence[int] = (),
    warnings: Sequence[str] = (),
    quantised: Quantised = DENSE,
) -> PolicyCheck:
    """Match every tensor and try every rank count; a quantised weight counts as one tensor.

    Raises PolicyError where tensors have no rule or two, and where a rule cannot apply at any rank count (heads that
    do not divide an axis, a key that the config lacks).
    """
    # one rank takes any units: what fails here fails everywhere
    unused = assign_stored(policy, config, stored, {}, Grid.of(1), quantised).unused
    shapes = quantised.shapes(stored)
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
    uses.sort(key=lambda use: (order.get(id(use.rule), len(order)), use.cut is None))
    return PolicyCheck(
        policy=policy,
        tensors=len(shapes),
        uses=tuple(uses),
        legal=tuple(legal_ranks(use.cut for use in uses if use.cut)),
        refusals=_refusals(uses),
        trials=tuple(_trial(policy, config, stored, count, quantised) for count in ranks),
        warnings=(*warnings, *(f"{rule.mark}: rule '{rule.key}' matches no tensor" for rule in unused)),
    )


def _refusals(uses: Sequence[Use]) -> tuple[Refusal, ...]:
    legal = [set(legal_ranks([use.cut])) if use.cut else set(range(1, LARGEST_TP_LISTED + 1)) for use in uses]
    groups: dict[tuple[int, ...], list[int]] = {}
    for ranks in range(1, LARGEST_TP_LISTED + 1):
        against = tuple(place for place, fits in enumerate(legal) if ranks not in fits)
        if against:
            groups.setdefault(against, []).append(ranks)
    found = [Refusal(tuple(ranks), tuple(uses[place] for place in against)) for against, ranks in groups.items()]
    return tuple(sorted(found, key=lambda refusal: (-len(refusal.ranks), refusal.ranks)))


def _trial(
    policy: Policy, config: Mapping[str, Any], stored: Mapping[str, Shape], ranks: int, quantised: Quantised
) -> Trial:
    try:
        assign_stored(policy, config, stored, {}, Grid.of(ranks), quantised)
    except PolicyError as error:
        return Trial(ranks, error.message)
    return Trial(ranks, "")


def in_runs(numbers: Sequence[int], most: int | None = None) -> str:
    """Whole numbers in few words; of more than ``most`` runs the first ones.

    >>> in_runs([1, 2, 3, 6, 12]), in_runs(range(1, 129)), in_runs(range(1, 128, 2), 3)
    ('1-3, 6, 12', '1-128', '1, 3, 5, ...')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = runs if most is None or len(runs) <= most + 1 else runs[:most]
    return ", ".join("-".join(map(str, run)) for run in shown) + (", ..." if len(shown) < len(runs) else "")


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
