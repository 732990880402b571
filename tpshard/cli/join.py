"""``tpshard join``."""

from __future__ import annotations

from pathlib import Path

import click

from tpshard.cli import options, render
from tpshard.joining import join as join_ranks


@click.command()
@click.argument("folder", metavar="DIR", type=options.FOLDER)
@options.as_json
@options.quiet
def join(folder: Path, as_json: bool, quiet: bool) -> None:
    """Make a shard folder of DIR, into which the folders of all fetched ranks were copied.

    Every file is compared with its rank's record; then the records are replaced by the manifest that split would have
    written.

    \b
    tpshard join llama-8b-tp8
    """
    with render.progress(0, "join", quiet or as_json) as update:
        manifest = join_ranks(folder, update)
    if as_json:
        render.emit({"command": "join", "path": str(folder), "ranks": manifest.ranks, "policy": manifest.policy})
    elif not quiet:
        render.say(
            f"join {folder}\n  {len(manifest.tensors)} tensors, {manifest.ranks} ranks, {len(manifest.files)} files, "
            f"policy {manifest.policy}"
        )
