"""Every tensor of a checkpoint meets its rule: name and shape in, layout and role out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.document import did_you_mean
from tpshard.errors import PolicyError, UsageError, printable
from tpshard.layout import Layout, Shape
from tpshard.partition import ANY, Grain, legal_ranks
from tpshard.policy import Policy, Rule, rule_cut, rule_layout
from tpshard.roles import Role

MAX_RANKS = 4096


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a policy makes of one tensor."""

    layout: Layout
    role: Role


@dataclass(frozen=True, slots=True)
class Assigned:
    """What a policy makes of a checkpoint; ``unused`` are the rules that met no tensor and should have."""

    tensors: Mapping[str, Assignment]
    unused: tuple[Rule, ...]


Rules = Mapping[str, Rule | None]
GrainsOf = Callable[[Rules], Mapping[str, Grain]]


def assign(
    policy: Policy,
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    ranks: int,
    grains_of: GrainsOf = lambda rules: {},
    rules: Rules | None = None,
) -> Assigned:
    """The layout and role of every tensor at ``ranks`` ranks. ``grains_of``: what quantisation asks of the tensors
    that have met these rules. ``rules``: what they have met, where that is known already.

    Raises PolicyError: tensors without a rule (all of them counted), two rules for one tensor, units that do not go
    into the ranks (with the rank counts that work for the whole checkpoint).
    """
    if not 1 <= ranks <= MAX_RANKS:
        raise UsageError(f"--tp must be from 1 to {MAX_RANKS}, is {ranks}")
    rules = match_all(policy, shapes) if rules is None else rules
    grains = grains_of(rules)
    cached: dict[tuple[int, Shape, Grain], Assignment] = {}
    layouts: dict[Layout, Layout] = {}  # equal ones made one: comparing them again and again takes time
    found: dict[str, Assignment] = {}
    for name, shape in shapes.items():
        rule = rules[name]
        key = id(rule), shape, grains.get(name, ANY)
        if key not in cached:
            made = _assignment(rule, policy, config, name, shapes, rules, ranks, grains)
            cached[key] = Assignment(layouts.setdefault(made.layout, made.layout), made.role)
        found[name] = cached[key]
    met = {id(rule) for rule in rules.values()}
    return Assigned(found, tuple(rule for rule in policy.rules if not rule.shared and id(rule) not in met))


def match_all(policy: Policy, shapes: Mapping[str, Shape]) -> dict[str, Rule | None]:
    """Each tensor's rule; None where the policy's default is to replicate."""
    rules = {name: policy.match(name) for name in shapes}
    missed = [name for name, rule in rules.items() if rule is None]
    if missed and policy.default is None:
        shown = ", ".join(printable(name, 80) for name in missed[:5]) + (", …" if len(missed) > 5 else "")
        keys = [rule.key for rule in policy.rules]
        hint = did_you_mean(missed[0].rpartition(".")[0].rpartition(".")[2], keys) or "add rules, or default: replicate"
        count = f"{len(missed)} tensor{'s' if len(missed) > 1 else ''}"
        raise PolicyError(f"policy {policy.name} has no rule for {count}: {shown}", hint=hint)
    return rules


def _assignment(
    rule: Rule | None,
    policy: Policy,
    config: Mapping[str, Any],
    name: str,
    shapes: Mapping[str, Shape],
    rules: Rules,
    ranks: int,
    grains: Mapping[str, Grain],
) -> Assignment:
    shape = shapes[name]
    if rule is None:
        return Assignment(Layout.replicated(shape, ranks), Role("replicate", pattern="default"))
    try:
        return Assignment(rule_layout(rule, policy, config, shape, ranks, grains.get(name, ANY)), rule.role)
    except PolicyError as error:
        hint = error.hint
        if hint and hint.startswith("--tp that works"):  # of the rule alone
            other = "".join(hint.partition(";")[1:])
            other += "" if not other or other.endswith("in the rule") else " in the rule"
            hint = f"--tp that works for this checkpoint: {_works(policy, config, shapes, rules, grains)}{other}"
        raise PolicyError(f"{printable(name)}: {error.message}", hint=hint) from None


def _works(
    policy: Policy,
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    rules: Rules,
    grains: Mapping[str, Grain],
) -> str:
    """The rank counts at which the whole checkpoint can be cut, for a hint."""
    distinct = {(rule, shapes[name], grains.get(name, ANY)) for name, rule in rules.items() if rule is not None}
    cuts = [found[1] for rule, shape, grain in distinct if (found := rule_cut(rule, policy, config, shape, grain))]
    legal = legal_ranks(cuts)
    return ", ".join(map(str, legal[:16])) + (", …" if len(legal) > 16 else "")
