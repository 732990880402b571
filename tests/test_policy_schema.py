"""The JSON Schema of policies: fresh, true of every built-in policy, and as strict as the reader of policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tpshard.cli.main import _run
from tpshard.document import parse_documents
from tpshard.errors import PolicyError
from tpshard.library import builtin_policies
from tpshard.policy import KINDS, POLICY_KEYS, RULE_KEYS
from tpshard.policy_parsing import parse_policy
from tpshard.policy_schema import KIND_DESCRIPTIONS, POLICY_PROPERTIES, RULE_PROPERTIES, policy_schema

ROOT = Path(__file__).parent.parent
SCHEMA = jsonschema.Draft202012Validator(policy_schema())

RIGHT = [
    "{name: a, rules: {}}",
    "{name: a, extends: llama}",
    "{name: a, rules: {fc: row, '{a,b}.**.c*': {rule: column, gather: true}}}",
    "{name: a, rules: {fc: {rule: column, parts: 2, uneven: true}}}",
    "{name: a, rules: {fc: {rule: column, parts: [H, 2]}}}",
    "{name: a, rules: {fc: {rule: column, stacked: E, parts: 2, uneven: true}}}",
    "{name: a, rules: {fc: {rule: column, parts: [[H, 2], [3, 'a | b']]}}}",
    "{name: a, rules: {fc: {rule: replicate, gather: input}}}",
    "{name: a, rules: {fc: {rule: row, heads: H / 2, gather: false}}}",
    "{name: a, rules: {fc: {rule: column, pad: 64, uneven: false, dims: eo.i}}}",
    "{name: a, default: replicate, vars: {H: n_head, K: 3}, rules: {}}",
    "{name: a, for: {model_type: [a, b], flag: true, count: 3}, rules: {}}",
]
WRONG = [
    "[]",
    "{rules: {}}",
    "{name: a}",
    "{name: 3, rules: {}}",
    "{name: two words, rules: {}}",
    "{name: a, rules: []}",
    "{name: a, rule: {}}",
    "{name: a, extends: [llama]}",
    "{name: a, default: row, rules: {}}",
    "{name: a, vars: {H: true}, rules: {}}",
    "{name: a, vars: {H: ''}, rules: {}}",
    "{name: a, for: llama, rules: {}}",
    "{name: a, for: {model_type: {a: b}}, rules: {}}",
    "{name: a, rules: {fc: colum}}",
    "{name: a, rules: {fc: [column]}}",
    "{name: a, rules: {fc: {heads: 2}}}",
    "{name: a, rules: {fc: {rule: row, head: 2}}}",
    "{name: a, rules: {fc: {rule: row, heads: true}}}",
    "{name: a, rules: {fc: {rule: row, heads: [1]}}}",
    "{name: a, rules: {fc: {rule: row, heads: 2, unit: 2}}}",
    "{name: a, rules: {fc: {rule: row, parts: 2, pad: 2}}}",
    "{name: a, rules: {fc: {rule: row, stacked: 2, pad: 2}}}",
    "{name: a, rules: {fc: {rule: replicate, stacked: 2}}}",
    "{name: a, rules: {fc: {rule: row, pad: 2, uneven: true}}}",
    "{name: a, rules: {fc: {rule: row, gather: true}}}",
    "{name: a, rules: {fc: {rule: column, gather: output}}}",
    "{name: a, rules: {fc: {rule: replicate, heads: 2}}}",
    "{name: a, rules: {fc: {rule: replicate, uneven: true}}}",
    "{name: a, rules: {fc: {rule: column, uneven: 1}}}",
    "{name: a, rules: {fc: {rule: column, dims: xy}}}",
    "{name: a, rules: {fc: {rule: column, dims: oo}}}",
    "{name: a, rules: {fc: {rule: column, dims: ''}}}",
    "{name: a, rules: {fc: {rule: column, parts: 0}}}",
    "{name: a, rules: {fc: {rule: column, parts: []}}}",
    "{name: a, rules: {fc: {rule: column, parts: [[1, 2, 3]]}}}",
    "{name: a, rules: {fc: {rule: column, parts: [1, [2, 3]]}}}",
    "{name: a, rules: {'a[0]': column}}",
    "{name: a, rules: {'': column}}",
]


def test_the_published_schema_is_fresh() -> None:
    published = (ROOT / "docs/policy.schema.json").read_text("utf-8")
    assert json.loads(published) == policy_schema(), "run: tpshard policy schema > docs/policy.schema.json"


def test_the_command_prints_the_published_schema(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["policy", "schema"], ["policy", "schema", "--json"]):
        assert _run(line) == 0
        assert capsys.readouterr().out == (ROOT / "docs/policy.schema.json").read_text("utf-8")


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(policy_schema())


def test_the_schema_knows_the_words_of_policies_and_no_others() -> None:
    assert set(KIND_DESCRIPTIONS) == set(KINDS)
    assert set(RULE_PROPERTIES) == set(RULE_KEYS)
    assert set(POLICY_PROPERTIES) == set(POLICY_KEYS)
    assert all(entry["description"] for entry in [*RULE_PROPERTIES.values(), *POLICY_PROPERTIES.values()])


@pytest.mark.parametrize("name", builtin_policies())
def test_built_in_policies_are_valid(name: str) -> None:
    for document in builtin_policies()[name].documents:
        SCHEMA.validate(document)


@pytest.mark.parametrize("text", RIGHT)
def test_right_policies_are_valid_and_can_be_read(text: str) -> None:
    SCHEMA.validate(plain(text))
    parse_policy(parse_documents(text, "p.yaml")[0])


@pytest.mark.parametrize("text", WRONG)
def test_wrong_policies_are_neither(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(plain(text))
    with pytest.raises(PolicyError):
        parse_policy(parse_documents(text, "p.yaml")[0])


def plain(text: str) -> Any:
    return parse_documents(text, "p.yaml")[0].plain()
