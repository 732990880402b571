"""``tpshard policy``."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click

from tpshard.cli import options, render
from tpshard.cli.policy_check import check
from tpshard.cli.policy_init import init
from tpshard.library import builtin_policies, builtin_text, policy_as_data
from tpshard.policy import Policy
from tpshard.policy_schema import policy_schema


@click.group()
def policy() -> None:
    """List, show, check and draft policies: which axis of which layer is cut, and in what units.

    \b
    tpshard policy list
    tpshard policy show llama
    tpshard policy check my-policy.yaml my-model --tp 2,4,8
    tpshard policy check llama --config llama-70b/config.json --tp 2,4,8
    tpshard policy init my-model -o my-policy.yaml
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


policy.add_command(check)
policy.add_command(init)
