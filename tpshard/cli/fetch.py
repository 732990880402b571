"""``tpshard fetch``."""

from __future__ import annotations

from pathlib import Path

import click

from tpshard.cli import options, render
from tpshard.conversion import Done, Options
from tpshard.engines.opening import Source
from tpshard.fetch import Fetch, plan_fetch, run_fetch
from tpshard.mesh import Grid


@click.command()
@click.argument("source", metavar="SRC", type=options.FOLDER)
@click.argument("target", metavar="DST", type=options.FOLDER)
@click.option("--rank", type=click.IntRange(0), required=True, metavar="R", help="The rank, counted from 0.")
@options.grid
@click.option("--policy", default="auto", show_default=True, metavar="P", help="auto, a built-in name, or a YAML file.")
@options.apply(options.config, options.max_shard_size, options.digest, options.workers, options.strict)
@options.apply(options.as_json, options.quiet)
def fetch(
    source: Path,
    target: Path,
    rank: int,
    grid: Grid,
    policy: str,
    config: Path | None,
    max_shard_size: int | None,
    digest: str,
    workers: int | None,
    strict: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Cut one rank straight from the full checkpoint SRC, here or in a store, into the new folder DST.

    Only what this rank holds is read. Its files are those that split writes for it, byte for byte, and a record of the
    rank lies beside them. When all ranks have been fetched, tpshard join makes one folder of them.

    \b
    tpshard fetch s3://models/llama-8b rank3 --tp 8 --rank 3
    tpshard fetch hf://org/llama-8b rank3 --tp 8 --rank 3
    """
    chosen = Options(max_shard_size=max_shard_size, digest=digest, workers=workers or 0)
    planned = plan_fetch(Source.given(source, None, config), target, grid, rank, policy, chosen)
    render.warn(planned.whole.warnings, strict, quiet)
    with render.progress(planned.bytes_wanted, "fetch", quiet or as_json) as update:
        chosen = Options(max_shard_size, digest, workers or 0, update)
        done = run_fetch(planned, chosen)
    if as_json:
        render.emit(_as_json(planned, done))
    elif not quiet:
        render.say(_as_text(planned, done))


def _as_text(planned: Fetch, done: Done) -> str:
    source, policy = planned.plan.source, planned.whole.policy
    total = sum(file.size for file in source.files)
    files = f"{len(done.written.files)} file{'s' if len(done.written.files) > 1 else ''}"
    assert policy is not None
    taken = f"{render.size(done.bytes_read)} of {render.size(total)} taken"
    wrote = f"{files}, {render.size(done.bytes_written)} written, policy {policy.name}"
    return (
        f"fetch {source.place} -> {planned.whole.target}\n"
        f"  rank {planned.rank} of {planned.whole.plan.ranks}: {done.tensors} tensors, {taken}; {wrote}\n"
        f"  {done.seconds:.2f} s, then {done.sync_seconds:.2f} s until the disk had it"
    )


def _as_json(planned: Fetch, done: Done) -> dict[str, object]:
    policy = planned.whole.policy
    return {
        "command": "fetch",
        "source": str(planned.plan.source.place),
        "target": str(planned.whole.target),
        "rank": planned.rank,
        "ranks": planned.whole.plan.ranks,
        "policy": policy.name if policy else None,
        "written": render.written_json(done),
        "warnings": list(planned.whole.warnings),
    }
