"""``tpshard reshard``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from tpshard.cli import options
from tpshard.cli.carry_out import Manner, carry_out
from tpshard.conversion import Options, without_manifest
from tpshard.convert import plan_reshard
from tpshard.engines.opening import NATIVE, Source
from tpshard.launch import launched
from tpshard.mesh import Grid


@click.command()
@click.argument("source", metavar="SRC", type=options.FOLDER)
@click.argument("target", metavar="DST", type=options.FOLDER)
@options.grid
@click.option("--policy", metavar="P", help="auto, a name or a YAML file; default: the policy SRC was cut with.")
@options.apply(options.source_engine, options.config)
@click.option("--to", "engine", metavar="E", help="Whose files are written; default: tpshard's own.", default=NATIVE)
@options.no_manifest
@options.apply(options.max_shard_size, options.workers, options.strict, options.dry_run)
@options.apply(options.resume, options.timeout, options.as_json, options.quiet)
def reshard(
    source: Path,
    target: Path,
    grid: Grid,
    policy: str | None,
    source_engine: str | None,
    config: Path | None,
    engine: str,
    no_manifest: bool,
    max_shard_size: int | None,
    workers: int | None,
    strict: bool,
    dry_run: bool,
    resume: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
) -> int:
    """Recut the shard folder SRC for N ranks, or for another engine, straight from shards to shards.

    Every tensor passes its recorded digest on the way. The result is the same as splitting the full checkpoint.

    \b
    tpshard reshard llama-8b-tp8 llama-8b-tp4 --tp 4
    tpshard reshard megatron-tp4 llama-8b-vllm --tp 2 --to vllm
    """
    chosen = Options(max_shard_size=max_shard_size, workers=workers or 0, resume=resume)
    chosen = replace(chosen, launch=launched(), timeout=timeout)
    ranks = Source.given(source, source_engine, config)
    conversion = plan_reshard(ranks, target, grid, policy, chosen, engine)
    conversion = without_manifest(conversion) if no_manifest else conversion
    return carry_out("reshard", conversion, chosen, Manner(quiet, as_json, strict, dry_run))
