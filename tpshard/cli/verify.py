"""``tpshard verify``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import click

from tpshard.cli import options, render
from tpshard.cli.report_files import append_summary, junit_file
from tpshard.cli.report_text import report_text
from tpshard.errors import StorageError, TpshardError
from tpshard.launch import launched
from tpshard.verify.request import LEVELS, Level, Request
from tpshard.verify.run import verify as run_checks

FORMAT, VERSION = "tpshard-verify", 1  # of --json: docs/verify.schema.json


@click.command()
@click.argument("folder", metavar="DST", type=options.FOLDER)
@click.option("--against", metavar="SRC", type=options.FOLDER, help="The full checkpoint that was cut.")
@options.base
@click.option("--engine", metavar="E", help="Whose files DST has; default: recorded, or recognised.")
@options.config
@click.option("--level", type=click.Choice(LEVELS), help="The deepest check to run; default: all that can be run.")
@click.option("--model", "factory", metavar="PKG.MOD:FUNC", help="Makes the model, where transformers cannot.")
@click.option("--isolate", is_flag=True, help="List every faulty layer: ranks go on from the right numbers.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where the model runs.")
@options.timeout
@click.option("--junit", type=options.FILE, metavar="FILE", help="Write the report as JUnit XML, too.")
@options.apply(options.workers, options.as_json, options.quiet)
def verify(
    folder: Path,
    against: Path | None,
    base: Path | None,
    engine: str | None,
    config: Path | None,
    level: str | None,
    factory: str | None,
    isolate: bool,
    device: str,
    timeout: float,
    junit: Path | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Prove that the shards in DST are right: files, weights, layout, and the model itself run sharded.

    Exit codes: 0 PASS, 1 FAIL, 4 INCONCLUSIVE (not proven either way). Nothing is written but
    what --junit names, and a section in the step summary where GitHub Actions asks for one.

    \b
    tpshard verify llama-8b-tp4 --against llama-8b
    tpshard verify llama-8b-tp4                          # the source is gone: its recorded digests
    tpshard verify llama-8b-tp4 --level weights --json
    tpshard verify llama-8b-tp4 --isolate                # every faulty layer, not only the first
    tpshard verify llama-8b-tp4 --junit verify.xml       # what is not proven turns a build red
    tpshard verify shards --model my_package.models:build
    tpshard verify my-lora-tp4 --against my-lora --base llama-8b    # an adapter, merged into its base
    torchrun --nproc-per-node 4 -m tpshard verify llama-8b-tp4 --against llama-8b    # a process for each rank
    """
    chosen = cast("Level | None", level)
    launch = launched()
    request = Request(folder, against, chosen, factory, workers or 0, isolate=isolate, device=device, launch=launch)
    request = replace(request, timeout=timeout, base=base, engine=engine, config=config)
    if launch is not None and launch.rank > 0:
        return _silently(request)
    with junit_file(junit, folder) as write:
        with render.progress(0, "verify", quiet or as_json) as update:
            report = run_checks(replace(request, progress=update))
        write(report)
    render.warn(append_summary(folder, report), quiet=quiet)
    if as_json:
        head = {"command": "verify", "format": FORMAT, "version": VERSION, "target": str(folder)}
        render.emit({**head, **report.as_json()})
    elif not quiet:
        render.say(report_text(folder, report))
    return report.verdict.exit_code


def _silently(request: Request) -> int:
    """Another process than the first: it only speaks where it has lost the others."""
    try:
        return run_checks(request).verdict.exit_code
    except StorageError:
        raise
    except TpshardError as error:  # the first process has the same, and says it
        return error.exit_code
