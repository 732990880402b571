"""What verify says: findings of each check, what was covered, one verdict.

A report never passes on nothing: a check that covered zero of anything is inconclusive, and the whole is only as
good as its worst part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Verdict(Enum):
    """``PASS`` proven right, ``FAIL`` proven wrong, ``INCONCLUSIVE`` neither."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        return {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}[self.value]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. ``what`` is a whole sentence without tensor and rank, which stand beside it."""

    what: str
    tensor: str | None = None
    layer: str | None = None
    rank: int | None = None
    file: str | None = None

    def __str__(self) -> str:
        where = [part for part in (self.file, self.tensor or self.layer) if part]
        if self.rank is not None:
            where.append(f"rank {self.rank}")
        return f"{', '.join(where)}: {self.what}" if where else self.what

    def as_json(self) -> dict[str, Any]:
        fields = {"tensor": self.tensor, "layer": self.layer, "rank": self.rank, "file": self.file}
        return {"what": self.what, **{key: value for key, value in fields.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of one check.

    ``covered`` counts what was looked at, by kind (``{"tensors": 104, "ranks": 4}``); ``notes`` are remarks for the
    reader; ``unproven`` says why the check could not decide, if it could not; ``figures`` are numbers worth keeping
    (errors, tolerances), for JSON.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    covered: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unproven: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        if self.findings:
            return Verdict.FAIL
        if self.unproven or not self.covered or not all(self.covered.values()):
            return Verdict.INCONCLUSIVE
        return Verdict.PASS

    @property
    def reason(self) -> str | None:
        """Why the check is inconclusive; None where it is not."""
        if self.verdict is not Verdict.INCONCLUSIVE:
            return None
        empty = [kind for kind, count in self.covered.items() if not count]
        return self.unproven or (f"covered no {', no '.join(empty)}" if empty else "covered nothing")

    def as_json(self) -> dict[str, Any]:
        return {
            "check": self.name,
            "verdict": self.verdict.value,
            "covered": dict(self.covered),
            "findings": [finding.as_json() for finding in self.findings],
            "notes": list(self.notes),
            "reason": self.reason,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one run of verify."""

    checks: tuple[CheckResult, ...]

    @property
    def verdict(self) -> Verdict:
        """One failure fails; all must pass. Only the layout check may stay undecided, where the model itself ran:
        it knows the popular architectures, the forward knows any."""
        verdicts = {check.name: check.verdict for check in self.checks}
        if Verdict.FAIL in verdicts.values():
            return Verdict.FAIL
        if verdicts.get("forward") is Verdict.PASS:
            verdicts.pop("layout", None)
        passed = bool(verdicts) and all(verdict is Verdict.PASS for verdict in verdicts.values())
        return Verdict.PASS if passed else Verdict.INCONCLUSIVE

    def as_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict.value, "checks": [check.as_json() for check in self.checks]}
