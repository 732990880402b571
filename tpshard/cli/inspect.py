"""``tpshard inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.cli import options, render
from tpshard.engines.opening import Source, open_any
from tpshard.errors import UsageError, printable
from tpshard.header import byte_count
from tpshard.layout import Layout, Shard
from tpshard.manifest import Manifest, layout_as_data
from tpshard.patterns import PatternError, parse_patterns
from tpshard.policy_check import in_runs


@click.command()
@click.argument("folder", metavar="PATH", type=options.FOLDER)
@click.option("--filter", "pattern", metavar="PATTERN", help="Only layers or tensors like this, as in a policy's keys.")
@click.option("--engine", metavar="E", help="Whose files PATH has; default: recorded, or recognised.")
@options.config
@options.as_json
def inspect(folder: Path, pattern: str | None, engine: str | None, config: Path | None, as_json: bool) -> None:
    """Show the tensors of a checkpoint or shard folder: dtype, shape, size, and which rank holds what.

    Only headers are read.

    \b
    tpshard inspect llama-8b
    tpshard inspect llama-8b-tp4 --filter 'self_attn.{q_proj,k_proj}'
    tpshard inspect llama-8b-tp4 --filter 'layers.0.**' --json
    """
    checkpoint = open_any(Source.given(folder, engine, config))
    render.warn(checkpoint.warnings)
    chosen = _chosen(checkpoint, pattern)
    if as_json:
        render.emit(_as_json(checkpoint, chosen))
    else:
        click.echo(_as_text(checkpoint, chosen))


def _chosen(checkpoint: Checkpoint, pattern: str | None) -> list[Stored]:
    if pattern is None:
        return list(checkpoint.tensors.values())
    try:
        patterns = parse_patterns(pattern)
    except PatternError as error:
        raise UsageError(f"--filter '{printable(pattern)}' {error}") from None
    found = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if any(p.matches(name) or p.matches(name.rpartition(".")[0]) for p in patterns)
    ]
    if not found:
        raise UsageError(f"no tensor of {checkpoint.place} is like '{printable(pattern)}'")
    return found


def _as_text(checkpoint: Checkpoint, tensors: list[Stored]) -> str:
    head = ["tensor", "dtype", "shape", "size", "held"]
    rows = [
        [t.name, t.dtype, "x".join(map(str, t.shape)) or "scalar", render.size(byte_count(t.dtype, t.shape)), _held(t)]
        for t in tensors
    ]
    total = render.size(sum(byte_count(t.dtype, t.shape) for t in tensors))
    policy = f", policy {checkpoint.manifest.policy}" if checkpoint.manifest else ""
    kind = f"{_ranks(checkpoint.manifest)}{policy}" if checkpoint.manifest else "full checkpoint"
    return f"{render.table([head, *rows], right=frozenset({3}))}\n\n{len(tensors)} tensors, {total}; {kind}"


def _ranks(manifest: Manifest) -> str:
    mesh = manifest.mesh
    grid = f" ({mesh.pp} stages of {mesh.ep} groups of {mesh.tp})" if mesh.is_grid else ""
    return f"{mesh.ranks} ranks{grid}"


def _held(tensor: Stored) -> str:
    """Who holds what, in a few words."""
    layout: Layout = tensor.layout
    holders = [rank for rank, shard in enumerate(layout.shards) if shard is not None]
    some = "" if len(holders) == layout.ranks else f" on rank{'s' * (len(holders) != 1)} {in_runs(holders)}"
    shards = [shard for shard in layout.shards if shard is not None]
    if all(shard == Shard.whole(layout.shape) for shard in shards):
        return f"whole{some}" if some or layout.ranks == 1 else f"whole on each of {layout.ranks} ranks"
    words: list[str] = [f"{tensor.role.rule}{some}"]
    for axis in layout.cut_axes:
        held = ["+".join(f"{a}-{b - 1}" for a, b in shard.spans[axis]) or "none" for shard in shards]
        shown = held if len(held) <= 4 else [*held[:3], f"... {held[-1]}"]
        words.append(f"axis {axis}: {' | '.join(shown)}")
    if layout.padding:
        words.append("padded")
    return ", ".join(words)


def _as_json(checkpoint: Checkpoint, tensors: list[Stored]) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "command": "inspect",
        "path": str(checkpoint.place),
        "ranks": checkpoint.ranks,
        "mesh": manifest.mesh.as_data() if manifest else None,
        "policy": manifest.policy if manifest else None,
        "files": [{"name": file.name, "size": file.size} for file in checkpoint.files],
        "tensors": [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "bytes": byte_count(t.dtype, t.shape),
                "rule": t.role.rule if manifest else None,
                "shards": layout_as_data(t.layout)["shards"],
                "files": [checkpoint.files[place.file].name if place else None for place in t.places],
            }
            for t in tensors
        ],
        "warnings": list(checkpoint.warnings),
    }
