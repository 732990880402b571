"""A policy for a model that has none: a built-in one that fits it, or one of its own, as text.

What runs the model is not here: ``Judge`` is asked. Without one the likeliest guesses are written down, and that
nothing has been proven.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tpshard.errors import PolicyError
from tpshard.layout import Shape
from tpshard.library import builtin_policies, policies_of_text
from tpshard.policy import Policy, rule_cut
from tpshard.policy_check import PolicyCheck, check_shapes
from tpshard.policy_draft import Draft, draft
from tpshard.policy_search import Found, likeliest, search
from tpshard.policy_text import Head, Layers, policy_text
from tpshard.policy_ways import Drafted

MOST_MISSED = 0.25  # of the layers with matrices: a built-in policy without rules for more is no base
MOST_BASES = 4
ALMOST = 0.02
MOST_RANKS = 16


class Judge(Protocol):
    """Says of a policy whether the model, cut by it for so many ranks (the fewest first), computes what it should."""

    def right(self, policy: Policy, ranks: Sequence[int]) -> bool: ...


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of a model without its weights. ``full``: config.json with the defaults that it leaves out;
    ``modules``: classes by path; ``plan``: which modules transformers cuts, and how."""

    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]
    full: Mapping[str, Any]
    modules: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Made:
    """``share``: of the numbers in matrices, how many are in tensors that are cut; ``tried``: policies that were run;
    ``rejected``: blocks that no way of cutting was right for."""

    head: Head
    rules: Mapping[str, Drafted]
    layers: Layers
    policy: Policy
    fit: PolicyCheck
    share: float
    tried: int = 0
    rejected: tuple[str, ...] = ()

    @property
    def unsure(self) -> int:
        return sum(bool(rule.unsure) for rule in self.rules.values())

    def text(self, remarks: Sequence[str] = ()) -> str:
        return policy_text(replace(self.head, remarks=tuple(remarks)), self.rules, self.layers)


def make_policy(source: Source, judge: Judge | None) -> Made:
    """The policy that cuts most of what is found right. Raises PolicyError where not even whole tensors fit."""
    drafted = draft(source.shapes, source.config, source.full, source.modules, source.plan)
    base = _with_base(source, drafted, judge)
    if base is not None and (base.share >= 0.9 or judge is None):
        return base
    own = _own(source, drafted, judge)
    return base if base is not None and base.share >= own.share - ALMOST else own


# ---------------------------------------------------------------------------------------------- of its own


def _own(source: Source, drafted: Draft, judge: Judge | None) -> Made:
    head = _head(source, drafted, "")

    def right(rules: Mapping[str, Drafted]) -> bool:
        return judge is not None and _is_right(source, drafted, head, rules, judge)

    found = search(drafted, right) if judge else Found(likeliest(drafted), 0, ())
    made = _made(source, drafted, head, drafted.rules(found.chosen))
    if made is None:  # no weights can be cut by the likeliest
        found = Found({}, found.tried, tuple(block.name for block in drafted.blocks))
        made = _made(source, drafted, head, drafted.whole)
    if made is None:
        raise PolicyError("no policy could be written for these tensors", hint="write one: docs/policy.md")
    return replace(made, tried=found.tried, rejected=found.rejected)


def _head(source: Source, drafted: Draft, extends: str) -> Head:
    model_type = source.config.get("model_type")
    model_type = model_type if isinstance(model_type, str) else ""
    word = re.sub(r"[^\w.+-]", "-", model_type)[:80] or "model"
    return Head(f"my-{word}", f"drafted for {word}", model_type, drafted.heads.variables, extends)


def _is_right(source: Source, drafted: Draft, head: Head, rules: Mapping[str, Drafted], judge: Judge) -> bool:
    made = _made(source, drafted, head, rules)
    if made is None:
        return False
    ranks = ranks_to_prove(made.fit.legal)
    return bool(ranks) and judge.right(made.policy, ranks)


def _made(source: Source, drafted: Draft, head: Head, rules: Mapping[str, Drafted]) -> Made | None:
    """The policy of such rules; None where it does not fit at any rank count."""
    layers = {layer.path: tuple(layer.shapes) for layer in drafted.layers}
    text = policy_text(head, rules, layers)
    try:
        (policy,) = policies_of_text(text, "draft")
        fit = check_shapes(policy, source.config, source.shapes)
    except PolicyError:
        return None
    return Made(head, rules, layers, policy, fit, _share(policy, source))


def _share(policy: Policy, source: Source) -> float:
    cut = whole = 0
    for name, shape in source.shapes.items():
        if len(shape) > 1:
            rule = policy.match(name)
            is_cut = rule is not None and rule_cut(rule, policy, source.config, shape) is not None
            cut, whole = cut + is_cut * math.prod(shape), whole + math.prod(shape)
    return cut / whole if whole else 0.0


# ---------------------------------------------------------------------------------------------- built in


def _with_base(source: Source, drafted: Draft, judge: Judge | None) -> Made | None:
    """The built-in policy that cuts most, with rules for what it does not have; None where none is right."""
    found: list[Made] = []
    tried = 0
    for made in sorted(_bases(source, drafted), key=lambda made: (len(made.rules), -made.share))[:MOST_BASES]:
        if judge is None:
            return made if not made.rules else None
        tried += 1
        if _is_right(source, drafted, made.head, made.rules, judge):
            found.append(made)
            if made.share >= 0.9:
                break
    best = max(found, key=lambda made: made.share, default=None)
    return replace(best, tried=tried) if best else None


def _bases(source: Source, drafted: Draft) -> Iterator[Made]:
    matrices = {layer.path for layer in drafted.layers if len(layer.weight) > 1}
    ways = drafted.rules(likeliest(drafted))
    for name, policy in builtin_policies().items():
        try:
            missed = {drafted.layer_of[tensor] for tensor in source.shapes if policy.match(tensor) is None}
        except PolicyError:
            continue
        if len(missed & matrices) > MOST_MISSED * len(matrices) or not _same_style(policy, source):
            continue
        head = _head(source, drafted, name)
        for rules in (ways, drafted.whole):
            made = _made(source, drafted, head, {path: rule for path, rule in rules.items() if path in missed})
            if made is not None:
                yield made
            if not missed:
                break


def _same_style(policy: Policy, source: Source) -> bool:
    """Whether the base cuts anything here."""
    try:
        return _share(policy, source) > 0
    except PolicyError:
        return False


def ranks_to_prove(legal: Sequence[int]) -> tuple[int, ...]:
    """The fewest ranks at which the policy works, and the most that can be run in little time: a unit that is too
    small (CodeGen's heads are fused four by four) is only seen where it is cut from its neighbours.

    >>> ranks_to_prove([1, 2, 4, 8, 16]), ranks_to_prove([1, 3, 9, 71]), ranks_to_prove([1, 71]), ranks_to_prove([1])
    ((2, 16), (3, 9), (71,), ())
    """
    several = [count for count in legal if count > 1]
    most = max((count for count in several if count <= MOST_RANKS), default=0)
    return tuple(dict.fromkeys([*several[:1], *([most] if most else [])]))
