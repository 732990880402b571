"""Finding the policy: built in, in a file, or picked by config.json."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from tpshard.document import Mark, Node, did_you_mean, parse_documents, read_documents
from tpshard.errors import PolicyError, printable
from tpshard.keras_policy import keras_policy
from tpshard.policy import Policy
from tpshard.policy_parsing import parse_policy

MAX_LEVELS = 16


@cache
def builtin_policies() -> Mapping[str, Policy]:
    """All built-in policies by name, with what they extend resolved."""
    documents: list[Node] = []
    for item in sorted(resources.files("tpshard").joinpath("policies").iterdir(), key=lambda entry: entry.name):
        if item.name.endswith(".yaml"):
            documents += parse_documents(item.read_text("utf-8"), item.name, trusted=True)
    return _resolved([parse_policy(document, shared=True) for document in documents], {})


def builtin_text(name: str) -> str:
    """The YAML file that holds a built-in policy, as written."""
    return resources.files("tpshard").joinpath("policies", _known(name).mark.file).read_text("utf-8")


def choose_policy(wanted: str, config: Mapping[str, Any]) -> Policy:
    """``auto``, a built-in policy's name, or a YAML file. Raises PolicyError where none or several apply."""
    if wanted == "auto" and str(config.get("model_type")) in ("keras_sequential", "keras_functional"):
        return policy_from_data(keras_policy(config), "the Keras model's configuration")
    if wanted == "auto":
        return _pick(builtin_policies().values(), config, "built-in policies")
    if wanted.endswith((".yaml", ".yml")) or "/" in wanted or os.path.isfile(wanted):
        policies = read_policies(Path(wanted))
        return policies[0] if len(policies) == 1 else _pick(policies, config, wanted)
    return _known(wanted)


def read_policies(path: Path) -> Sequence[Policy]:
    """The policies of a YAML file, in its order."""
    return _with_builtin(read_documents(path))


def policies_of_text(text: str, file: str) -> Sequence[Policy]:
    """The policies of a YAML text; ``file`` is its name for messages."""
    return _with_builtin(parse_documents(text, file))


def _with_builtin(documents: Sequence[Node]) -> Sequence[Policy]:
    own = [parse_policy(document) for document in documents]
    return list(_resolved(own, builtin_policies()).values())


def policy_as_data(policy: Policy) -> list[object]:
    """The documents that make up a policy, the most particular first, as plain data for the manifest."""
    return list(policy.documents)


def policy_from_data(documents: Sequence[object], file: str) -> Policy:
    """The inverse of policy_as_data. Raises PolicyError where the data is no policy."""
    if not documents:
        raise PolicyError(f"{file}: no policy is recorded", hint="give one with --policy")
    levels = [parse_policy(_node(document, Mark(file, 1, 1), "policy"), shared=True) for document in documents]
    return stack(levels)


def _node(value: object, mark: Mark, trail: str) -> Node:
    match value:
        case Mapping():
            return Node({str(k): _node(v, mark, f"{trail}.{k}") for k, v in value.items()}, mark, trail)
        case list():
            return Node(tuple(_node(item, mark, f"{trail}[{i}]") for i, item in enumerate(value)), mark, trail)
        case str() | int():
            return Node(value, mark, trail)
        case _:
            raise PolicyError(f"{mark.file}: {trail}: {value!r} has no place in a policy")


def _known(name: str) -> Policy:
    policies = builtin_policies()
    if name not in policies:
        hint = did_you_mean(name, policies) or "built-in policies: tpshard policy list; a file needs its .yaml"
        raise PolicyError(f"no built-in policy is called '{printable(name)}'", hint=hint)
    return policies[name]


def _resolved(own: Sequence[Policy], known: Mapping[str, Policy]) -> dict[str, Policy]:
    """Each policy with the levels of what it extends behind its own, by name."""
    raw: dict[str, Policy] = {}
    for policy in own:
        if policy.name in raw:
            raise PolicyError(f"{policy.mark}: a second policy called '{policy.name}'", hint="rename one")
        raw[policy.name] = policy

    def resolve(policy: Policy, seen: tuple[str, ...]) -> Policy:
        if policy.extends is None:
            return policy
        if policy.extends in seen:
            raise PolicyError(f"{policy.mark}: policies extend one another in a circle: {' → '.join(seen)}")
        if len(seen) > MAX_LEVELS:
            raise PolicyError(f"{policy.mark}: policies extend one another more than {MAX_LEVELS} times")
        if policy.extends in raw:
            base = resolve(raw[policy.extends], (*seen, policy.extends))
        elif policy.extends in known:
            base = known[policy.extends]
        else:
            hint = did_you_mean(policy.extends, [*raw, *known])
            raise PolicyError(f"{policy.mark}: extends '{policy.extends}', which does not exist", hint=hint)
        return stack([policy, base])

    return {name: resolve(policy, (name,)) for name, policy in raw.items()}


def stack(policies: Sequence[Policy]) -> Policy:
    """The first policy, with the rules, variables, stages and default of the others behind its own."""
    first = policies[0]
    variables = {key: value for policy in reversed(policies) for key, value in policy.variables.items()}
    return dataclasses.replace(
        first,
        levels=tuple(level for policy in policies for level in policy.levels),
        variables=variables,
        default=next((policy.default for policy in policies if policy.says_default), None),
        stages=next((policy.stages for policy in policies if policy.stages), None),
        documents=tuple(document for policy in policies for document in policy.documents),
    )


def _pick(policies: Iterable[Policy], config: Mapping[str, Any], where: str) -> Policy:
    found = [policy for policy in policies if policy.applies(config)]
    model_type = printable(str(config.get("model_type")))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(policy.name for policy in found)
        raise PolicyError(f"several {where} apply to model_type '{model_type}': {names}", hint="name one with --policy")
    if not config:
        raise PolicyError("there is no config.json to pick a policy by", hint="name one with --policy")
    near = [policy for policy in policies if config.get("model_type") in policy.applies_to.get("model_type", ())]
    if near:
        names = ", ".join(policy.name for policy in near)
        keys = ", ".join(sorted({key for policy in near for key in policy.applies_to} - {"model_type"}))
        raise PolicyError(
            f"none of the {where} for model_type '{model_type}' applies to this config.json: {names}",
            hint=f"they go by {keys}; name one with --policy",
        )
    known = [str(value) for policy in policies for value in policy.applies_to.get("model_type", ())]
    hint = did_you_mean(model_type, known)
    raise PolicyError(
        f"none of the {where} applies to model_type '{model_type}'",
        hint=(f"{hint} " if hint else "") + "name one with --policy NAME, or write one: --policy FILE.yaml",
    )
