"""``tpshard split``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from tpshard.cli import options
from tpshard.cli.carry_out import Manner, carry_out
from tpshard.conversion import Options, without_manifest
from tpshard.convert import plan_adapter_split, plan_split
from tpshard.engines.opening import NATIVE, Source
from tpshard.errors import UsageError
from tpshard.launch import launched
from tpshard.mesh import Grid
from tpshard.verify.run import names_on_disk


@click.command()
@click.argument("source", metavar="SRC", type=options.FOLDER)
@click.argument("target", metavar="DST", type=options.FOLDER)
@options.grid
@click.option("--policy", default="auto", show_default=True, metavar="P", help="auto, a built-in name, or a YAML file.")
@options.base
@options.apply(options.source_engine, options.config, options.engine, options.no_manifest)
@options.apply(options.max_shard_size, options.digest, options.workers, options.strict, options.dry_run)
@options.apply(options.resume, options.timeout, options.as_json, options.quiet)
def split(
    source: Path,
    target: Path,
    grid: Grid,
    policy: str,
    base: Path | None,
    source_engine: str | None,
    config: Path | None,
    engine: str,
    no_manifest: bool,
    max_shard_size: int | None,
    digest: str,
    workers: int | None,
    strict: bool,
    dry_run: bool,
    resume: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
) -> int:
    """Cut the checkpoint folder SRC for N ranks and write them, with a manifest, to the new folder DST.

    DST appears complete or not at all. Config, tokenizer and other small files are carried along.

    \b
    tpshard split llama-8b llama-8b-tp4 --tp 4
    tpshard split llama-8b llama-8b-tp4 --tp 4 --dry-run
    tpshard split my-model shards --tp 2 --policy my-policy.yaml --max-shard-size 2GB
    tpshard split llama-8b llama-8b-vllm --tp 4 --engine vllm
    tpshard split step-100-universal shards --tp 4 --config llama-8b    # FP32, of DeepSpeed
    torchrun --nproc-per-node 4 -m tpshard split llama-8b llama-8b-tp8 --tp 8    # or mpirun, srun, horovodrun
    tpshard split my-lora my-lora-tp4 --tp 4 --base llama-8b    # a LoRA adapter, cut as its base
    """
    chosen = Options(max_shard_size=max_shard_size, digest=digest, workers=workers or 0, resume=resume)
    chosen = replace(chosen, launch=launched(), timeout=timeout)
    if base is None:
        given = Source.given(source, source_engine, config)
        conversion = plan_split(given, target, grid, policy, chosen, engine)
    elif engine != NATIVE:
        raise UsageError("an adapter is cut for tpshard's own shards only", hint="leave out --engine or --base")
    else:
        conversion = plan_adapter_split(source, target, grid, base, policy, chosen, names_on_disk)
    conversion = without_manifest(conversion) if no_manifest else conversion
    return carry_out("split", conversion, chosen, Manner(quiet, as_json, strict, dry_run))
