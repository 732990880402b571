"""What a plan amounts to, in numbers: by rule and by rank, for ``--dry-run`` and the reports of split and reshard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.convert import Conversion
from tpshard.header import DTYPE_BITS, byte_count
from tpshard.layout import Layout
from tpshard.plan import Item
from tpshard.roles import Role


@dataclass(frozen=True, slots=True)
class RuleSummary:
    """All tensors of one rule; sizes in bytes, ``per_rank`` of the fullest rank."""

    pattern: str
    rule: str
    tensors: int
    size: int
    per_rank: int
    padding: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Sizes in bytes. ``replicated``: what all ranks together hold beyond one copy, padding apart."""

    tensors: int
    size: int
    per_rank: tuple[int, ...]
    padding: int
    replicated: int
    disk_needed: int
    files: int
    rules: tuple[RuleSummary, ...]

    @property
    def imbalance(self) -> float:
        """How much the fullest rank holds above the mean, as a fraction."""
        mean = sum(self.per_rank) / len(self.per_rank)
        return max(self.per_rank) / mean - 1 if mean else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "bytes": self.size,
            "bytes_per_rank": list(self.per_rank),
            "imbalance": round(self.imbalance, 6),
            "padding_bytes": self.padding,
            "replicated_bytes": self.replicated,
            "disk_needed": self.disk_needed,
            "files": self.files,
            "rules": [
                {
                    "pattern": r.pattern,
                    "rule": r.rule,
                    "tensors": r.tensors,
                    "bytes": r.size,
                    "bytes_per_rank": r.per_rank,
                    "padding_bytes": r.padding,
                }
                for r in self.rules
            ],
        }


def summarise(conversion: Conversion) -> Summary:
    plan = conversion.plan
    ranks = range(plan.ranks)
    sizes: dict[tuple[Layout, str], tuple[tuple[int, ...], int, int]] = {}
    per_rank = [0] * plan.ranks
    whole = padding = 0
    rows: dict[Role, list[int]] = {}
    for item in plan.items:
        key = (item.want, item.stored.dtype)
        if key not in sizes:
            sizes[key] = (tuple(item.size(rank) for rank in ranks), _whole(item), _padding(item))
        own, size, pad = sizes[key]
        per_rank = [a + b for a, b in zip(per_rank, own, strict=True)]
        whole, padding = whole + size, padding + pad
        row = rows.setdefault(_role(conversion.roles, item), [0, 0, 0, 0])
        row[:] = [row[0] + 1, row[1] + size, row[2] + max(own), row[3] + pad]
    return Summary(
        tensors=len(plan.items),
        size=whole,
        per_rank=tuple(per_rank),
        padding=padding,
        replicated=sum(per_rank) - whole - padding,
        disk_needed=conversion.disk_needed,
        files=len(plan.outputs),
        rules=tuple(RuleSummary(role.pattern, _rule_text(role), *row) for role, row in rows.items()),
    )


def _role(roles: Mapping[str, Role], item: Item) -> Role:
    return roles.get(item.stored.name, item.stored.role)


def _rule_text(role: Role) -> str:
    return role.rule + {"": "", "output": ", gather", "input": ", gather input"}[role.gather]


def _whole(item: Item) -> int:
    return byte_count(item.stored.dtype, item.stored.shape)


def _padding(item: Item) -> int:
    return item.want.padding * DTYPE_BITS[item.stored.dtype] // 8
