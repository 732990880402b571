"""``tpshard statement``."""

from __future__ import annotations

from pathlib import Path

import click

from tpshard.cli import options, render
from tpshard.statement import statement as statement_of


@click.command()
@click.argument("folder", metavar="SHARDS", type=options.FOLDER)
def statement(folder: Path) -> None:
    """Print an in-toto Statement of a shard folder, for signing: every file with its SHA-256.

    It is made of the manifest, so no large file is read. SHARDS must have been split with --digest sha256.

    \b
    tpshard statement llama-8b-tp4 > llama-8b-tp4.statement.json
    """
    render.emit(statement_of(folder))
