"""``tpshard policy``."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import click

from tpshard.checkpoint import open_checkpoint
from tpshard.cli import options, render
from tpshard.library import builtin_policies, builtin_text, choose_policy, policy_as_data
from tpshard.partition import LARGEST_TP_LISTED
from tpshard.policy import Policy
from tpshard.policy_check import PolicyCheck, Use, check_policy, in_runs, in_words
from tpshard.policy_schema import policy_schema
from tpshard.quantised import read_quantised


@click.group()
def policy() -> None:
    """List, show and check policies: which axis of which layer is cut, and in what units.

    \b
    tpshard policy list
    tpshard policy show llama
    tpshard policy check my-policy.yaml my-model --tp 2,4,8
    tpshard policy schema > policy.schema.json
    """


@policy.command("list")
@options.as_json
def list_(as_json: bool) -> None:
    """List the built-in policies and their models.

    --policy auto takes a policy for the model types shown (model_type in config.json).

    \b
    tpshard policy list
    tpshard policy list --json
    """
    found = builtin_policies().values()
    if as_json:
        render.emit({"command": "policy list", "policies": [_as_json(item) for item in found]})
    else:
        head = ["policy", "for model_type", "description"]
        rows = [row for item in found for row in _listed(item)]
        render.say(render.table([head, *rows]))


@policy.command()
@click.argument("name")
@options.as_json
def show(name: str, as_json: bool) -> None:
    """Show a built-in policy as it is written.

    It is a model for your own, which can also extend it.

    \b
    tpshard policy show llama
    tpshard policy show phi3 > my-policy.yaml
    """
    text = builtin_text(name)
    found = builtin_policies()[name]
    if as_json:
        render.emit({"command": "policy show", **_as_json(found), "text": text, "documents": policy_as_data(found)})
    else:
        render.say(text.rstrip("\n"))


@policy.command()
@click.argument("wanted", metavar="POLICY")
@click.argument("folder", metavar="CHECKPOINT", type=options.FOLDER)
@click.option(
    "--tp", "ranks", callback=options.counts, default="", metavar="N,...", help="Rank counts that have to work."
)
@options.apply(options.strict, options.as_json)
def check(wanted: str, folder: Path, ranks: tuple[int, ...], strict: bool, as_json: bool) -> int:
    """Say whether a policy fits a checkpoint.

    POLICY (auto, a built-in name, or a YAML file) is matched with every tensor of CHECKPOINT. Shown are what each
    rule cuts and the rank counts that work. Exit code 2 where the policy does not fit, or not at a --tp asked for.
    Only headers are read, nothing is written.

    \b
    tpshard policy check llama llama-8b
    tpshard policy check my-policy.yaml my-model --tp 2,4,8
    tpshard policy check auto llama-8b --tp 16 --json
    """
    checkpoint = open_checkpoint(folder)
    found = check_policy(choose_policy(wanted, checkpoint.config), checkpoint, ranks, read_quantised(checkpoint))
    render.warn(found.warnings, strict)
    if as_json:
        render.emit({"command": "policy check", "path": str(folder), **found.as_json()})
        return found.refusal.exit_code if found.refusal else 0
    render.say(_as_text(found))
    if found.refusal:
        raise found.refusal
    return 0


@policy.command()
@click.option("--json", "as_json", is_flag=True, expose_value=False, help="A schema is JSON with or without it.")
def schema() -> None:
    """Print the JSON Schema of policy files.

    Editors complete and check YAML by it.

    \b
    tpshard policy schema > policy.schema.json
    """
    render.say(json.dumps(policy_schema(), indent=2, ensure_ascii=False))


def _as_json(found: Policy) -> dict[str, Any]:
    return {
        "name": found.name,
        "description": found.description,
        "for": {key: list(values) for key, values in found.applies_to.items()},
        "extends": found.extends,
        "file": found.mark.file,
    }


def _listed(found: Policy, width: int = 60) -> list[list[str]]:
    """Name, model types and description; more rows where the model types are longer than ``width``."""
    types = ", ".join(map(str, found.applies_to.get("model_type", ())))
    first, *more = textwrap.wrap(types, width, break_on_hyphens=False) or [""]
    return [[found.name, first, found.description], *(["", line, ""] for line in more)]


def _as_text(found: PolicyCheck) -> str:
    head = ["rule", "pattern", "tensors", "axis", "units"]
    rows = [_row(use) for use in found.uses]
    trials = [f"--tp {trial.ranks:<4} {trial.problem or 'works'}" for trial in found.trials]
    return "\n".join(
        [
            render.table([head, *rows], right=frozenset({2, 3})),
            "",
            f"policy {found.policy.name} has a rule for each of {found.tensors} tensors",
            f"--tp that works, up to {LARGEST_TP_LISTED}: {in_runs(found.legal)}",
            *trials,
        ]
    )


def _row(use: Use) -> list[str]:
    kind, gather = (use.rule.kind, use.rule.gather) if use.rule else ("replicate", "")
    said = {"": "", "output": ", gather", "input": ", gather input"}[gather]
    axis = "-" if use.axis is None else str(use.axis)
    return [f"{kind}{said}", use.rule.key if use.rule else "(default)", str(use.tensors), axis, in_words(use.cut)]
