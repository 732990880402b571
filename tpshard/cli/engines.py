"""``tpshard engines``."""

from __future__ import annotations

from typing import Any

import click

from tpshard.cli import options, render
from tpshard.engines.profile import Engine
from tpshard.engines.shelf import engine_called, engine_text
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
        engine = engine_called(name)
        if as_json:
            render.emit({"command": "engines", "engines": [_as_json(engine)]})
        else:
            render.say(engine_text(engine).rstrip("\n"))
        return
    found = list(all_engines().values())
    if as_json:
        render.emit({"command": "engines", "engines": [_as_json(engine) for engine in found]})
        return
    head = ["engine", "", "files", "model types"]
    rows = [[e.name, e.title, e.files[0].text, str(len(e.model_types))] for e in found]
    render.say(render.table([head, *rows], right=frozenset({3})))


def _as_json(engine: Engine) -> dict[str, Any]:
    return {
        "name": engine.name,
        "title": engine.title,
        "format": engine.format,
        "files": [template.text for template in engine.files],
        "model_types": list(engine.model_types),
    }
