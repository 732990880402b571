"""``tpshard policy init``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpshard.checkpoint import open_checkpoint
from tpshard.cli import options, render
from tpshard.errors import InconclusiveError, InputError, PolicyError, StorageError, TpshardError, UsageError
from tpshard.folder import config_of
from tpshard.layout import Shape
from tpshard.policy_check import in_runs
from tpshard.quantised import read_quantised

if TYPE_CHECKING:
    from tpshard.verify.policy_drafting import Drafting


@click.command()
@click.argument("source", metavar="SRC", type=options.FOLDER)
@click.option("-o", "--output", type=options.FILE, metavar="FILE", help="Where to write; else on standard output.")
@options.as_json
def init(source: Path, output: Path | None, as_json: bool) -> int:
    """Draft a policy for a model that has none, and prove it.

    SRC is a checkpoint folder (its headers and config.json are read) or a config.json (then transformers says what
    the tensors are called). Roles are guessed from names and shapes; what is guessed is tried on a smaller model of
    the same architecture with random numbers. What no cut is right for is replicated and marked "unsure".

    Exit codes: 0 proven, 2 nothing that works at any --tp, 4 not proven: read the draft with care. An existing file
    is never overwritten.

    \b
    tpshard policy init my-model -o my-policy.yaml
    tpshard policy init config.json > my-policy.yaml
    """
    if output is not None and (output.exists() or output.is_symlink()):
        raise UsageError(f"{output}: is already there", hint="init does not overwrite: name another file")
    found = _drafted(*_read(source))
    text = found.made.text(_remarks(found))
    render.warn(found.warnings)
    if output is not None:
        _write(output, text)
    if as_json:
        render.emit(_as_json(found, source, output, text))
    elif output is None:
        render.say(text.rstrip("\n"))
        render.note(_summary(found, None))
    else:
        render.say(_summary(found, output))
    error = _error(found)
    if error is not None and not as_json:
        raise error
    return error.exit_code if error else 0


def _read(source: Path) -> tuple[Mapping[str, Any], Mapping[str, Shape]]:
    """config.json, and the shapes of a checkpoint's tensors if there is one."""
    if not source.exists():
        raise InputError(f"{source}: is not there", hint="a checkpoint folder or a config.json")
    config = config_of(source)
    if not source.is_dir() or not any(source.glob("*.safetensors*")):
        return config, {}
    checkpoint = open_checkpoint(source)
    return config, read_quantised(checkpoint).shapes(checkpoint.shapes)


def _drafted(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Drafting:
    if importlib.util.find_spec("torch") is None:
        raise InconclusiveError("torch is not installed, nothing can be tried", hint="pip install 'tpshard[hf]'")
    from tpshard.verify.policy_drafting import draft_and_prove

    return draft_and_prove(config, shapes)


def _write(output: Path, text: str) -> None:
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{output}: {error.strerror}") from None


def _remarks(found: Drafting) -> list[str]:
    """What the reader of the file should know of how it came to be."""
    made = found.made
    lines = [f"Drafted by tpshard policy init from config.json and the names and shapes of {made.fit.tensors} tensors."]
    if found.unproven:
        lines.append("NOT PROVEN: no model could be run. Compare it with the model's code before you use it.")
    else:
        proven = [str(trial.ranks) for trial in found.trials if trial.verdict.value == "PASS"]
        right = f"right at --tp {' and '.join(proven)}" if proven else "NOT PROVEN"
        lines.append(f"Tried on a smaller model with the same heads and random numbers: {right}.")
    if made.unsure:
        lines.append(
            'What is "unsure" is whole on every rank: right, but it saves nothing. Cut it if you know how, then'
        )
        lines.append("tpshard policy check THIS --config config.json --tp 2,4")
    return lines


def _summary(found: Drafting, output: Path | None) -> str:
    made = found.made
    based = f", which extends {made.head.extends}" if made.head.extends else ""
    where = f"{output}: " if output else ""
    lines = [
        f"{where}policy {made.policy.name}{based}: {len(made.policy.levels[0])} rules for {made.fit.tensors} tensors, "
        f"{made.share:.1%} of the numbers in matrices are cut",
        f"tried {made.tried} {'policy' if made.tried == 1 else 'policies'}; "
        + (f"unsure of {made.unsure} layers, which are replicated" if made.unsure else "unsure of none"),
        f"--tp that works, up to 128: {in_runs(made.fit.legal)}",
        *([found.model_line] if found.model_line else []),
        *(f"--tp {trial.ranks:<4} {trial.line}" for trial in found.trials),
    ]
    if found.trials and not _error(found):
        lines.append(f"next: tpshard split SRC DST --tp {found.trials[0].ranks} --policy {output or 'FILE.yaml'}")
    return "\n".join(lines)


def _error(found: Drafting) -> TpshardError | None:
    made = found.made
    hint = "docs/policy.md has what may be written instead"
    if not made.share:
        return InconclusiveError("the draft cuts nothing: no layer was understood", hint=hint)
    if len(made.fit.legal) < 2:
        return PolicyError("the draft works at no --tp from 2 to 128", hint=str(made.fit.refusals[0])[:200])
    if found.reason:
        return InconclusiveError(f"the draft is not proven: {found.reason}", hint=hint)
    return None


def _as_json(found: Drafting, source: Path, output: Path | None, text: str) -> dict[str, Any]:
    made = found.made
    return {
        "command": "policy init",
        "path": str(source),
        "output": str(output) if output else None,
        "verdict": found.verdict.value,
        "reason": found.reason or None,
        "extends": made.head.extends or None,
        "share_cut": round(made.share, 4),
        "unsure": [path for path, rule in made.rules.items() if rule.unsure],
        "tried": made.tried,
        "model": found.model_line or None,
        "text": text,
        **made.fit.as_json(),
        "trials": [trial.as_json() for trial in found.trials],
        "warnings": list(found.warnings),
    }
