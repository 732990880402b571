"""``tpshard merge``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from tpshard.cli import options
from tpshard.cli.carry_out import Manner, carry_out
from tpshard.conversion import Options
from tpshard.convert import plan_merge
from tpshard.engines.opening import Source
from tpshard.launch import launched


@click.command()
@click.argument("source", metavar="SRC", type=options.FOLDER)
@click.argument("target", metavar="DST", type=options.FOLDER)
@options.apply(options.source_engine, options.config)
@options.apply(options.max_shard_size, options.workers, options.dry_run)
@options.apply(options.resume, options.timeout, options.as_json, options.quiet)
def merge(
    source: Path,
    target: Path,
    source_engine: str | None,
    config: Path | None,
    max_shard_size: int | None,
    workers: int | None,
    dry_run: bool,
    resume: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
) -> int:
    """Rebuild the full checkpoint from the shard folder SRC into the new folder DST.

    Every tensor must have the digest that was recorded when it was cut. Without --max-shard-size the files are those
    of the original checkpoint; with it, Hugging Face names and an index.

    \b
    tpshard merge llama-8b-tp4 llama-8b-again
    tpshard merge llama-8b-tp4 llama-8b-again --max-shard-size 5GB
    tpshard merge llama-8b-tp4 llama-8b-again --resume    # go on where it was interrupted
    """
    chosen = Options(max_shard_size=max_shard_size, workers=workers or 0, resume=resume)
    chosen = replace(chosen, launch=launched(), timeout=timeout)
    ranks = Source.given(source, source_engine, config)
    return carry_out("merge", plan_merge(ranks, target, chosen), chosen, Manner(quiet, as_json, dry_run=dry_run))
