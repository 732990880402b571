"""What split, merge and reshard share: show the plan, or carry it out and tell."""

from __future__ import annotations

import dataclasses

from tpshard.cli import render
from tpshard.conversion import Conversion, Options, run
from tpshard.summary import summarise


@dataclasses.dataclass(frozen=True, slots=True)
class Manner:
    """How a command talks."""

    quiet: bool
    as_json: bool
    strict: bool = False
    dry_run: bool = False


def carry_out(command: str, conversion: Conversion, options: Options, manner: Manner) -> None:
    render.warn(conversion.warnings, manner.strict, manner.quiet)
    summary = summarise(conversion)
    done = None
    if not manner.dry_run:
        total = sum(file.size for file in conversion.plan.source.files)
        with render.progress(total, command, manner.quiet or manner.as_json) as update:
            done = run(conversion, dataclasses.replace(options, progress=update))
    if manner.as_json:
        render.emit(render.done_json(command, conversion, done, summary))
    elif not manner.quiet:
        render.say(render.done_text(command, conversion, done) if done else render.plan_text(conversion, summary))
