"""``tpshard engines``."""

from __future__ import annotations

from typing import Any

import click

from tpshard.cli import options, render
from tpshard.engines.finding import source_called
from tpshard.engines.profile import Engine
from tpshard.engines.readers.kind import Reader
from tpshard.engines.readers.of import READERS
from tpshard.engines.shelf import engine_text
from tpshard.engines.shelf import engines as all_engines


@click.command()
@click.argument("name", metavar="[NAME]", required=False)
@options.as_json
def engines(name: str | None, as_json: bool) -> None:
    """List the engines whose folders are read and written, or show one's profile as it is written.

    A name here is what --engine, --from and --to take.

    \b
    tpshard engines
    tpshard engines vllm
    """
    if name is not None:
        engine = source_called(name)
        if as_json:
            render.emit({"command": "engines", "engines": [_as_json(engine)]})
        elif isinstance(engine, Reader):
            how = f"written by --engine {' or '.join(engine.written_as)}" if engine.written_as else "read only"
            render.say(f"{engine.name}: {engine.title} ({how})\n{engine.files}\n{engine.description}")
        else:
            render.say(engine_text(engine).rstrip("\n"))
        return
    found: list[Engine | Reader] = [*all_engines().values(), *READERS.values()]
    if as_json:
        render.emit({"command": "engines", "engines": [_as_json(engine) for engine in found]})
        return
    head = ["engine", "", "files", "model types"]
    rows = [_row(engine) for engine in found]
    render.say(render.table([head, *rows], right=frozenset({3})))


def _row(engine: Engine | Reader) -> list[str]:
    if isinstance(engine, Reader):
        name = ", ".join(engine.written_as) or engine.name
        return [name, engine.title + ("" if engine.written_as else " (read only)"), engine.files, ""]
    return [engine.name, engine.title, engine.files[0].text, str(len(engine.model_types))]


def _as_json(engine: Engine | Reader) -> dict[str, Any]:
    if isinstance(engine, Reader):
        return {
            "name": engine.name,
            "title": engine.title,
            "format": "pytorch" if engine.written_as else "read only",
            "files": [engine.files],
            "model_types": [],
        }
    return {
        "name": engine.name,
        "title": engine.title,
        "format": engine.format,
        "files": [template.text for template in engine.files],
        "model_types": list(engine.model_types),
    }
