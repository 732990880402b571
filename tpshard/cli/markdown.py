"""The report of verify as Markdown, for the step summary of GitHub Actions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tpshard.cli.report_text import MOST_FINDINGS, most_rows
from tpshard.errors import printable
from tpshard.verify.report import CheckResult, Report

LONGEST = 1000  # characters of one cell: GitHub refuses a summary of more than a mebibyte
SPECIAL = re.compile(r"[\\`*_\[\]<>&|~!$@:#]")


def report_markdown(folder: Path, report: Report) -> str:
    """A section: the verdict, a line for each check, the first findings, and tables to unfold."""
    head = ("check", "verdict", "covered")
    parts = [
        f"## tpshard verify: {report.verdict.value}",
        f"Shards: {escaped(str(folder))}",
        _table(head, [(escaped(check.name), check.verdict.value, _covered(check)) for check in report.checks]),
    ]
    for check in report.checks:
        parts += _details(check)
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    r"""Text that Markdown shows as it is, in a cell of a table, too: what could mean something to it (or to GitHub: $,
    @, :) is written as a number.

    >>> escaped("a|b <i> `c`\n")
    'a&#124;b &#60;i&#62; &#96;c&#96;&#92;n'
    """
    return SPECIAL.sub(lambda match: f"&#{ord(match[0])};", printable(text, LONGEST))


def _covered(check: CheckResult) -> str:
    """A cell: what was covered, the remarks below it."""
    return "<br>".join(map(escaped, (check.coverage, *check.notes)))


def _details(check: CheckResult) -> Iterator[str]:
    if check.findings:
        shown = [[escaped(str(finding))] for finding in check.findings[:MOST_FINDINGS]]
        if len(check.findings) > MOST_FINDINGS:
            shown.append([f"and {len(check.findings) - MOST_FINDINGS:,} more"])
        yield _table([f"{escaped(check.name)}: findings"], shown)
    for table in check.tables:
        most = most_rows(check, table)
        rows = [[escaped(cell) for cell in row] for row in table.rows[:most]]
        more = f"\n\nand {len(table.rows) - most:,} more" if len(table.rows) > most else ""
        title = f"{escaped(check.name)}: {escaped(table.title)}"
        body = _table([escaped(cell) for cell in table.head], rows)
        yield f"<details><summary>{title}</summary>\n\n{body}{more}\n\n</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
