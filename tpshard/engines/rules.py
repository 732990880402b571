"""What an engine asks of a policy: its own rules before the model's, and a vocabulary padded as it pads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tpshard.assignment import Assigned
from tpshard.engines.profile import Engine, Family, Vocabulary
from tpshard.errors import PolicyError, printable
from tpshard.layout import Layout, Shape
from tpshard.library import stack
from tpshard.mesh import Mesh
from tpshard.patterns import Pattern
from tpshard.policy import Policy, Rule

LARGEST_TP_LISTED = 128


def engine_policy(
    engine: Engine,
    family: Family,
    policy: Policy,
    shapes: Mapping[str, Shape],
    tp: int,
    rows: Mapping[str, int] | None = None,
) -> Policy:
    """The policy by which the engine holds a model; ``rows``: of a vocabulary on each rank, where they are known from
    files. Raises PolicyError where the vocabulary does not go into the ranks."""
    levels = [family.policy, policy] if family.policy else [policy]
    joint = replace(stack(levels), name=policy.name, applies_to=policy.applies_to)
    if family.vocabulary is None:
        return joint
    padded = [
        _padded(engine, family.vocabulary, joint, name, shapes[name], tp, (rows or {}).get(name))
        for name in family.vocabulary.tensors
        if name in shapes
    ]
    own = tuple(rule for rule in padded if rule is not None)
    return replace(joint, levels=(own, *joint.levels)) if own else joint


def _padded(
    engine: Engine, vocabulary: Vocabulary, policy: Policy, name: str, shape: Shape, tp: int, rows: int | None
) -> Rule | None:
    """The tensor's rule with padding; None where it is not cut."""
    rule = policy.match(name)
    axis = rule.axis(shape) if rule else None
    if rule is None or axis is None:
        return None
    if rows is not None:
        pad = max(rows, 1)
    elif vocabulary.each_rank:
        pad = vocabulary.multiple
    else:
        pad = _share(engine, vocabulary.multiple, name, shape[axis], tp)
    pattern = Pattern(tuple(name.split(".")))
    return replace(rule, patterns=(pattern,), heads=None, unit=None, parts=None, uneven=False, pad=pad, shared=True)


def _share(engine: Engine, multiple: int, name: str, size: int, tp: int) -> int:
    """Each rank's rows of a vocabulary that is padded as a whole."""
    padded = -(-size // multiple) * multiple
    if padded % tp:
        works = ", ".join(str(n) for n in range(1, LARGEST_TP_LISTED + 1) if padded % n == 0)
        what = f"{printable(name)}: {engine.title} pads {size} rows to {padded}, which do not go into {tp} ranks"
        raise PolicyError(what, hint=f"--tp that works: {works}")
    return padded // tp


def refuse_replicas(engine: Engine, assigned: Assigned, mesh: Mesh) -> None:
    """Raises PolicyError where ranks would hold copies of a part, and the engine keeps each part once."""
    if engine.replicas:
        return
    known: dict[Layout, bool] = {}
    for name, assignment in assigned.tensors.items():
        layout = assignment.layout
        if layout not in known:
            known[layout] = _has_replicas(layout, mesh)
        if known[layout]:
            what = f"{printable(name)}: {engine.title} holds each head on one rank; here several would hold copies"
            raise PolicyError(what, hint=f"a --tp that divides the number of KV heads, not {mesh.tp}")


def refuse_uneven(engine: Engine, assigned: Assigned) -> None:
    """Raises PolicyError where ranks would hold parts of different sizes: engines know their own by dividing."""
    known: dict[Layout, bool] = {}
    for name, assignment in assigned.tensors.items():
        layout = assignment.layout
        if layout not in known:
            known[layout] = len({shard.shape for shard in layout.shards if shard}) > 1
        if known[layout]:
            sizes = " and ".join(str(list(shape)) for shape in sorted({s.shape for s in layout.shards if s})[::-1])
            what = f"{printable(name)}: {list(layout.shape)} would be {sizes}, {engine.title} has equal parts"
            raise PolicyError(what, hint="another --tp; tpshard's own shards may be uneven")


def _has_replicas(layout: Layout, mesh: Mesh) -> bool:
    return any(
        len({mesh.coordinates(rank).tp for rank in ranks}) > 1
        for axis in layout.cut_axes
        for _, ranks in layout.owners(axis)
    )
