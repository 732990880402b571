"""Every tensor meets its rule and its place in the grid of ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tpshard.assignment import MAX_RANKS, Assigned, Assignment, GrainsOf, Rules, assign, match_all
from tpshard.errors import PolicyError, UsageError, printable
from tpshard.layout import Layout, Shape
from tpshard.mesh import Experts, Grid, place
from tpshard.policy import Policy, expert_count, rule_experts
from tpshard.stages import deal_stages


def assign_to_grid(
    policy: Policy,
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    sizes: Mapping[str, int],
    grid: Grid,
    grains_of: GrainsOf = lambda rules: {},
) -> Assigned:
    """The layout and role of every tensor on all ranks of ``grid``; ``sizes`` in bytes; ``grains_of`` as ``assign``
    has it.

    Raises PolicyError as ``assign`` does, and where experts or stages are to be dealt and the policy or the checkpoint
    has none, or they do not go into the groups.
    """
    if grid.mesh.is_grid and grid.mesh.ranks > MAX_RANKS:
        shown = " x ".join(f"{axis} {size}" for axis, size in grid.mesh.as_data().items())
        raise UsageError(f"{shown} is {grid.mesh.ranks} ranks, at most {MAX_RANKS} are written")
    if not grid.mesh.is_grid and not grid.whole_experts:
        return assign(policy, config, shapes, grid.mesh.tp, grains_of)
    rules = match_all(policy, shapes)
    experts = _experts(policy, config, shapes, rules) if grid.deals_experts else {}
    if grid.deals_experts and not experts:
        what = f"policy {policy.name} knows no experts in this checkpoint"
        raise PolicyError(what, hint="leave out --ep and --expert-parallel")
    dealt_whole = experts if grid.whole_experts else {}

    def part(names: Collection[str], ranks: int, grains: GrainsOf) -> Assigned:
        own = {name: rules[name] for name in names}
        return assign(policy, config, {name: shapes[name] for name in names}, ranks, grains, own)

    parts = [part([name for name in shapes if name not in dealt_whole], grid.mesh.tp, grains_of)]
    if dealt_whole:
        parts.append(part(dealt_whole, 1, lambda rules: {}))
    stages = deal_stages(policy.stages, policy.name, sizes, grid.mesh.pp, grid.layers)
    found = {name: assignment for part in parts for name, assignment in part.tensors.items()}
    placed: dict[tuple[Layout, Experts | None, tuple[int, ...] | None], Layout] = {}
    tensors = {}
    for name in shapes:
        key = found[name].layout, experts.get(name), stages[name]
        if key not in placed:
            try:
                placed[key] = place(key[0], grid, key[1], key[2])
            except PolicyError as error:
                raise PolicyError(f"{printable(name)}: {error.message}", hint=error.hint) from None
        tensors[name] = Assignment(placed[key], found[name].role)
    unmet = set.intersection(*({id(rule) for rule in part.unused} for part in parts))
    return Assigned(tensors, tuple(rule for rule in parts[0].unused if id(rule) in unmet))


def _experts(
    policy: Policy, config: Mapping[str, Any], shapes: Mapping[str, Shape], rules: Rules
) -> dict[str, Experts]:
    """The tensors that belong to experts."""
    counts: dict[int, int] = {}
    found = {}
    for name, rule in rules.items():
        if rule is None:
            continue
        if id(rule) not in counts:
            counts[id(rule)] = expert_count(rule, policy, config)
        experts = rule_experts(rule, counts[id(rule)], name, shapes[name])
        if experts is not None:
            found[name] = experts
    return found
