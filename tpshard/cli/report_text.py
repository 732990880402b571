"""The report of verify as text: short where all is well, with what one needs to know where it is not."""

from __future__ import annotations

from pathlib import Path

from tpshard.cli import render
from tpshard.errors import printable
from tpshard.verify.report import LONGEST, CheckResult, Report, Table, Verdict

MOST_FINDINGS = 10
MOST_ROWS = 20
SLOW = 1.0  # seconds: a reader asks where the time went, not how little it was


def report_text(folder: Path, report: Report) -> str:
    """A line for each check with what it covered, its findings, remarks and tables below it, the verdict last."""
    width = max((len(check.name) for check in report.checks), default=0)
    lines = [line for check in report.checks for line in check_lines(check, width)]
    return "\n".join([*lines, f"{report.verdict.value}  {folder}"])


def check_lines(check: CheckResult, width: int = 0, most_findings: int = MOST_FINDINGS) -> list[str]:
    """One check, its name in ``width`` columns. Names come from files: what could steer a terminal is escaped."""
    took = f" ({check.seconds:,.1f} s)" if check.seconds >= SLOW else ""
    lines = [f"{check.name:<{max(width, 8)}} {check.verdict.value:<12} {printable(check.coverage, LONGEST)}{took}"]
    lines += [f"  - {finding}" for finding in check.findings[:most_findings]]
    if len(check.findings) > most_findings:
        lines.append(f"  - and {len(check.findings) - most_findings:,} more (--json lists all)")
    lines += [f"    {printable(note, LONGEST)}" for note in check.notes]
    for table in check.tables:
        lines += [f"    {line}" for line in _table_lines(table, most_rows(check, table))]
    return lines


def most_rows(check: CheckResult, table: Table) -> int:
    return table.brief if check.verdict is Verdict.PASS else MOST_ROWS


def _table_lines(table: Table, most: int) -> list[str]:
    if not table.rows:
        return []
    shown = [[printable(cell) for cell in row] for row in (table.head, *table.rows[:most])]
    lines = [printable(table.title), *render.table(shown).splitlines()]
    if len(table.rows) > most:
        lines.append(f"and {len(table.rows) - most:,} more (--json lists all)")
    return lines
