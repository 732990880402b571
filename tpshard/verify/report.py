"""What verify says: findings of each check, what was covered, one verdict.

A report never passes on nothing: a check that covered zero of anything is inconclusive, and the whole is only as
good as its worst part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from time import perf_counter
from typing import Any

from tpshard.errors import printable

LONGEST = 4000  # characters of one thing said: names come from files, and nobody reads more


class Verdict(Enum):
    """``PASS`` proven right, ``FAIL`` proven wrong, ``INCONCLUSIVE`` neither."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        return {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}[self.value]


def error_size(error: float, tolerance: float) -> str:
    """An error beside its tolerance; how many times as large it is where it is too large.

    >>> error_size(0.031, 1e-10), error_size(3e-15, 1e-10)
    ('3.1e-02, 3e+08 times the tolerance', '3.0e-15, tolerance 1e-10')
    """
    if not math.isfinite(error):
        return f"not finite, tolerance {tolerance:.0e}"
    if error <= tolerance:
        return f"{error:.1e}, tolerance {tolerance:.0e}"
    return f"{error:.1e}, {error / tolerance:.0e} times the tolerance"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. ``what`` is a whole sentence without tensor and rank, which stand beside it, and
    without the size of the error, which follows it where ``error`` and ``tolerance`` are given."""

    what: str
    tensor: str | None = None
    layer: str | None = None
    rank: int | None = None
    file: str | None = None
    error: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if (self.error is None) != (self.tolerance is None):
            raise ValueError(f"error is {self.error}, tolerance is {self.tolerance}: give both or neither")

    def __str__(self) -> str:
        where = [part for part in (self.file, self.tensor or self.layer) if part]
        if self.rank is not None:
            where.append(f"rank {self.rank}")
        what = self.what
        if self.error is not None and self.tolerance is not None:
            what += f": {error_size(self.error, self.tolerance)}"
        return printable(f"{', '.join(where)}: {what}" if where else what, LONGEST)

    def as_json(self) -> dict[str, Any]:
        where = {"tensor": self.tensor, "layer": self.layer, "rank": self.rank, "file": self.file}
        size = {"error": _as_json(self.error), "tolerance": self.tolerance}
        return {"what": self.what, **{key: value for key, value in (where | size).items() if value is not None}}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a heading, such as the error of every layer; ``head`` names the columns. People are shown
    the first rows, so the worst belong there; where all is well, ``brief`` of them. JSON has all."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    brief: int = 3

    def __post_init__(self) -> None:
        if not self.head:
            raise ValueError(f"table '{self.title}' has no columns")
        for number, row in enumerate(self.rows):
            if len(row) != len(self.head):
                raise ValueError(
                    f"row {number} of table '{self.title}' has {len(row)} cells, its head has {len(self.head)}"
                )

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "head": list(self.head), "rows": [list(row) for row in self.rows]}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of one check.

    ``covered`` counts what was looked at, by kind (``{"tensors": 104, "ranks": 4}``); ``notes`` are remarks for the
    reader; ``unproven`` says why the check could not decide, if it could not; ``figures`` are numbers worth keeping
    (errors, tolerances), for JSON; ``tables`` are for people and JSON. ``seconds`` is how long it took, and no part
    of what was found: two results that differ in nothing else are equal.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    covered: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unproven: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    seconds: float = field(default=0.0, compare=False)

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

    @property
    def coverage(self) -> str:
        """What was covered, in a line, or why that proves nothing."""
        return self.reason or ", ".join(f"{count:,} {kind}" for kind, count in self.covered.items())

    def as_json(self) -> dict[str, Any]:
        return {
            "check": self.name,
            "verdict": self.verdict.value,
            "covered": dict(self.covered),
            "findings": [finding.as_json() for finding in self.findings],
            "notes": list(self.notes),
            "reason": self.reason,
            "figures": _as_json(dict(self.figures)),
            "tables": [table.as_json() for table in self.tables],
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one run of verify."""

    checks: tuple[CheckResult, ...]

    @property
    def verdict(self) -> Verdict:
        """One failure fails; all must pass, but for what is excused."""
        if any(check.verdict is Verdict.FAIL for check in self.checks):
            return Verdict.FAIL
        counted = [check.verdict for check in self.checks if not self.excuses(check)]
        passed = bool(counted) and all(verdict is Verdict.PASS for verdict in counted)
        return Verdict.PASS if passed else Verdict.INCONCLUSIVE

    def excuses(self, check: CheckResult) -> bool:
        """Whether a check may stay undecided: only the layout check, where the model itself ran. It knows the popular
        architectures, the forward knows any."""
        ran = any(other.name == "forward" and other.verdict is Verdict.PASS for other in self.checks)
        return ran and check.name == "layout" and check.verdict is Verdict.INCONCLUSIVE

    @property
    def seconds(self) -> float:
        return sum(check.seconds for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict.value, "checks": [check.as_json() for check in self.checks]}


def _as_json(value: Any) -> Any:
    """JSON has no infinity and no NaN: a number that is not finite becomes the text inf, -inf or nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def timed(results: Iterator[CheckResult]) -> Iterator[CheckResult]:
    """Each result with the seconds that passed until it came."""
    begin = perf_counter()
    for result in results:
        end = perf_counter()
        yield replace(result, seconds=end - begin)
        begin = end
