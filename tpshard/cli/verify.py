"""``tpshard verify``."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

from tpshard.cli import options, render
from tpshard.verify.report import Report
from tpshard.verify.run import LEVELS, Level, Request
from tpshard.verify.run import verify as run_checks


@click.command()
@click.argument("folder", metavar="DST", type=options.FOLDER)
@click.option("--against", metavar="SRC", type=options.FOLDER, help="The full checkpoint that was cut.")
@click.option("--level", type=click.Choice(LEVELS), help="The deepest check to run; default: all that can be run.")
@click.option("--model", "factory", metavar="PKG.MOD:FUNC", help="Makes the model, where transformers cannot.")
@options.apply(options.workers, options.as_json, options.quiet)
def verify(
    folder: Path,
    against: Path | None,
    level: str | None,
    factory: str | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Prove that the shards in DST are right: files, weights, layout, and the model itself run sharded.

    Exit codes: 0 PASS, 1 FAIL, 4 INCONCLUSIVE (not proven either way). Nothing is written.

    \b
    tpshard verify llama-8b-tp4 --against llama-8b
    tpshard verify llama-8b-tp4                          # the source is gone: its recorded digests
    tpshard verify llama-8b-tp4 --level weights --json
    tpshard verify shards --model my_package.models:build
    """
    chosen = cast("Level | None", level)
    with render.progress(0, "verify", quiet or as_json) as update:
        report = run_checks(Request(folder, against, chosen, factory, workers or 0, update))
    if as_json:
        render.emit({"command": "verify", "target": str(folder), **report.as_json()})
    elif not quiet:
        click.echo(report_text(folder, report))
    return report.verdict.exit_code


def report_text(folder: Path, report: Report) -> str:
    """A line for each check with what it covered, its findings below it, the verdict last."""
    lines = []
    for check in report.checks:
        covered = ", ".join(f"{count:,} {kind}" for kind, count in check.covered.items())
        lines.append(f"{check.name:<8} {check.verdict.value:<12} {check.reason or covered}")
        shown = check.findings[:MOST_SHOWN]
        lines += [f"  - {finding}" for finding in shown]
        if len(check.findings) > len(shown):
            lines.append(f"  - and {len(check.findings) - len(shown)} more (--json lists all)")
        lines += [f"    {note}" for note in check.notes]
    lines.append(f"{report.verdict.value}  {folder}")
    return "\n".join(lines)


MOST_SHOWN = 10
