"""Text and JSON for people and machines. Text goes to stdout, warnings and progress to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from tpshard.conversion import Conversion, Done
from tpshard.errors import UsageError, printable
from tpshard.summary import Summary


def size(count: float) -> str:
    """Bytes for people, in powers of ten as disks are sold.

    >>> size(999), size(90868376), size(7.2e9)
    ('999 B', '90.9 MB', '7.2 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Aligned columns, two spaces apart; ``right``: the columns aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def say(text: str) -> None:
    """Text on stdout; bytes of a path that are not UTF-8 as escapes, which JSON reads, too."""
    click.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def note(text: str) -> None:
    """Text on stderr, beside a result on stdout."""
    click.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"), err=True)


def emit(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    say(json.dumps(data, indent=1, ensure_ascii=False))


def warn(warnings: Sequence[str], strict: bool = False, quiet: bool = False) -> None:
    """Warnings on stderr; with ``strict`` the first is an error; with ``quiet`` they are not shown."""
    if warnings and strict:
        raise UsageError(warnings[0], hint="--strict makes warnings errors")
    for warning in () if quiet else warnings:
        click.echo(f"tpshard: warning: {printable(warning, 4000)}", err=True)


@contextlib.contextmanager
def progress(total: int, label: str, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A bar with bytes per second and time left, on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty() or os.environ.get("CI"):
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, mininterval=0.2) as bar:
        yield bar.update


def plan_text(conversion: Conversion, summary: Summary) -> str:
    """The plan, for --dry-run."""
    head = ["rule", "pattern", "tensors", "size", "per rank", "padding"]
    rows = [
        [r.rule, r.pattern, str(r.tensors), size(r.size), size(r.per_rank), size(r.padding) if r.padding else "-"]
        for r in summary.rules
    ]
    policy = f"policy {conversion.policy.name}, " if conversion.policy else ""
    return "\n".join(
        [
            table([head, *rows], right=frozenset({2, 3, 4, 5})),
            "",
            f"{policy}{conversion.plan.ranks} ranks, {summary.tensors} tensors, {summary.files} files",
            f"per rank    {size(min(summary.per_rank))} to {size(max(summary.per_rank))}"
            f" (imbalance {summary.imbalance:.1%})",
            f"replicated  {size(summary.replicated)} beyond one copy",
            f"padding     {size(summary.padding)}",
            f"disk        {size(summary.disk_needed)} needed; nothing was written",
        ]
    )


def done_text(verb: str, conversion: Conversion, done: Done) -> str:
    """What was written, for people."""
    plan = conversion.plan
    policy = f", policy {conversion.policy.name}" if conversion.policy else ""
    ranks = f"{plan.ranks} ranks" if conversion.policy else "full checkpoint"
    files = f"{len(done.written.files)} file{'s' if len(done.written.files) > 1 else ''}"
    rate = f" ({size(done.bytes_read / done.seconds)}/s)" if done.seconds and not done.resumed else ""
    resumed = f"; {done.resumed} of the files were finished before" if done.resumed else ""
    return (
        f"{verb} {plan.source.place} -> {conversion.target}\n"
        f"  {done.tensors} tensors, {size(done.bytes_read)} read; {ranks}, {files}, "
        f"{size(done.bytes_written)} written{policy}{resumed}\n"
        f"  {done.seconds:.2f} s{rate}, then {done.sync_seconds:.2f} s until the disk had it"
    )


def written_json(done: Done) -> dict[str, Any]:
    return {
        "files": [{"name": f.name, "rank": f.rank, "size": f.size, "digest": f.digest} for f in done.written.files],
        "bytes_read": done.bytes_read,
        "bytes_written": done.bytes_written,
        "seconds": round(done.seconds, 3),
        "sync_seconds": round(done.sync_seconds, 3),
        "resumed": done.resumed,
    }


def done_json(command: str, conversion: Conversion, done: Done | None, summary: Summary) -> dict[str, Any]:
    """The JSON of split, merge and reshard; ``written`` is null after --dry-run."""
    return {
        "command": command,
        "source": str(conversion.plan.source.place),
        "target": str(conversion.target),
        "ranks": conversion.plan.ranks,
        "policy": conversion.policy.name if conversion.policy else None,
        "engine": conversion.engine or ("native" if conversion.policy else None),
        "plan": summary.as_json(),
        "written": written_json(done) if done else None,
        "warnings": list(conversion.warnings),
    }
