"""What a plan amounts to, in numbers: by rule and by rank, for ``--dry-run`` and the reports of split and reshard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tpshard.conversion import Conversion
from tpshard.header import DTYPE_BITS, byte_count
from tpshard.plan import bytes_of_ranks
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
    """Tensors of one layout, dtype and role are counted together: large models have thousands of each kind."""
    plan, roles = conversion.plan, conversion.roles
    kinds = Counter(
        (item.want, item.stored.dtype, roles.get(item.stored.name, item.stored.role), sizes)
        for item, sizes in zip(plan.items, bytes_of_ranks(plan.items), strict=True)
    )
    per_rank = [0] * plan.ranks
    whole = padding = 0
    rows: dict[Role, list[int]] = {}
    for (layout, dtype, role, sizes), count in kinds.items():
        size, pad = byte_count(dtype, layout.shape) * count, layout.padding * DTYPE_BITS[dtype] // 8 * count
        per_rank = [total + own * count for total, own in zip(per_rank, sizes, strict=True)]
        whole, padding = whole + size, padding + pad
        row = rows.setdefault(role, [0, 0, 0, 0])
        row[:] = [row[0] + count, row[1] + size, row[2] + max(sizes) * count, row[3] + pad]
    order = {rule.key: place for place, rule in enumerate(conversion.policy.rules)} if conversion.policy else {}
    return Summary(
        tensors=len(plan.items),
        size=whole,
        per_rank=tuple(per_rank),
        padding=padding,
        replicated=sum(per_rank) - whole - padding,
        disk_needed=sum(per_rank),
        files=len(plan.outputs),
        rules=tuple(
            RuleSummary(role.pattern, _rule_text(role), *row)
            for role, row in sorted(rows.items(), key=lambda pair: order.get(pair[0].pattern, len(order)))
        ),
    )


def _rule_text(role: Role) -> str:
    return role.rule + {"": "", "output": ", gather", "input": ", gather input"}[role.gather]
