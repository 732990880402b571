"""What split, merge and reshard share: show the plan, or carry it out and tell."""

from __future__ import annotations

import dataclasses

from tpshard.cli import render
from tpshard.conversion import Conversion, Options, run
from tpshard.crew import CODES, INTERRUPTED, ToldError
from tpshard.summary import summarise


@dataclasses.dataclass(frozen=True, slots=True)
class Manner:
    """How a command talks."""

    quiet: bool
    as_json: bool
    strict: bool = False
    dry_run: bool = False


def carry_out(command: str, conversion: Conversion, options: Options, manner: Manner) -> int:
    """The exit code. Of several processes the first speaks for all."""
    if options.launch is not None and options.launch.rank > 0:
        return _take_part(conversion, options, manner)
    render.warn(conversion.warnings, manner.strict, manner.quiet)
    summary = summarise(conversion)
    done = None
    if not manner.dry_run:
        total = sum(file.size for file in conversion.plan.source.files) // (
            options.launch.size if options.launch else 1
        )
        with render.progress(total, command, manner.quiet or manner.as_json) as update:
            done = run(conversion, dataclasses.replace(options, progress=update))
    if manner.as_json:
        render.emit(render.done_json(command, conversion, done, summary))
    elif not manner.quiet:
        render.say(render.done_text(command, conversion, done) if done else render.plan_text(conversion, summary))
    return 0


def _take_part(conversion: Conversion, options: Options, manner: Manner) -> int:
    render.warn(conversion.warnings, manner.strict, quiet=True)
    try:
        if not manner.dry_run:
            run(conversion, options)
    except ToldError as error:
        return error.exit_code
    except KeyboardInterrupt:
        return CODES[INTERRUPTED]
    return 0
