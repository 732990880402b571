"""From a YAML document to a policy: every key checked, with its place in the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from tpshard.document import Node
from tpshard.patterns import Pattern, PatternError, parse_patterns
from tpshard.policy import KINDS, POLICY_KEYS, RULE_KEYS, Expression, Parts, Policy, Rule
from tpshard.roles import Gather, Kind
from tpshard.stages import STAGE_KEYS, Stages


def parse_policy(document: Node, *, shared: bool = False) -> Policy:
    """One YAML document as a policy of one level; ``extends`` is only noted. Raises PolicyError with the place."""
    table = document.known_keys(POLICY_KEYS)
    if "name" not in table:
        document.fail("a policy needs a name", hint="name: my-model")
    if "rules" not in table and "extends" not in table:
        document.fail("a policy needs rules, or extends another")
    rules = table["rules"].mapping() if "rules" in table else {}
    return Policy(
        name=_parse_name(table["name"]),
        mark=document.mark,
        levels=(tuple(_parse_rule(key, node, shared) for key, node in rules.items()),),
        variables={key: _expression(node) for key, node in _optional(table, "vars").items()},
        applies_to={key: values_of(node) for key, node in _optional(table, "for").items()},
        default=_parse_default(table),
        extends=table["extends"].text() if "extends" in table else None,
        description=table["description"].text() if "description" in table else "",
        stages=_parse_stages(table["stages"]) if "stages" in table else None,
        documents=(document.plain(),),
    )


def _parse_name(node: Node) -> str:
    """Names stand in messages, and are given on the command line."""
    name = node.text()
    return (
        name if re.fullmatch(r"[\w.+-]{1,100}", name) else node.fail("must be one word of letters, digits and . _ + -")
    )


def _optional(table: Mapping[str, Node], key: str) -> Mapping[str, Node]:
    return table[key].mapping() if key in table else {}


def _parse_default(table: Mapping[str, Node]) -> Kind | None:
    if "default" not in table:
        return None
    return "replicate" if table["default"].one_of(("replicate", "error")) == "replicate" else None


def values_of(node: Node) -> tuple[object, ...]:
    """One value, or any of several."""
    items = node.value if isinstance(node.value, tuple) else (node,)
    for item in items:
        if isinstance(item.value, tuple | Mapping):
            item.fail(f"must be a value to compare config.json with, is {item.kind}")
    return tuple(item.value for item in items)


def _expression(node: Node) -> Expression:
    if isinstance(node.value, bool) or not isinstance(node.value, str | int) or node.value == "":
        node.fail(f"must be a number or an expression over config keys, is {node.kind}")
    return node.value


def _parse_stages(node: Node) -> Stages:
    table = node.known_keys(STAGE_KEYS)
    if "layers" not in table:
        node.fail("needs layers: the path before a layer's number", hint="layers: model.layers")
    tied = _optional(table, "tied")
    if len(tied) > 1:
        node.fail("tied has more than one pair")
    return Stages(
        node.key or node.mark,
        layers=_keys(table["layers"]),
        first=_keys(table["first"]) if "first" in table else (),
        last=_keys(table["last"]) if "last" in table else (),
        every=_keys(table["every"]) if "every" in table else (),
        tied=tuple(pattern for key in tied for pattern in _patterns(key, table["tied"])),
        head=tuple(pattern for twin in tied.values() for pattern in _keys(twin)),
    )


def _keys(node: Node) -> tuple[Pattern, ...]:
    """One key or a list of them."""
    items = node.value if isinstance(node.value, tuple) else (node,)
    return tuple(pattern for item in items for pattern in _patterns(item.text(), item))


def _patterns(key: str, node: Node) -> tuple[Pattern, ...]:
    try:
        return parse_patterns(key)
    except PatternError as error:
        return node.fail(f"the key {error}")


def _parse_rule(key: str, node: Node, shared: bool) -> Rule:
    patterns = _patterns(key, node)
    mark = node.key or node.mark
    if not isinstance(node.value, Mapping):
        return Rule(key, patterns, mark, cast(Kind, node.one_of(KINDS)), shared=shared)
    table = node.known_keys(RULE_KEYS)
    if "rule" not in table:
        node.fail(f"needs a rule: {', '.join(KINDS)}")
    rule = Rule(
        key,
        patterns,
        mark,
        kind=cast(Kind, table["rule"].one_of(KINDS)),
        dims=_parse_dims(table["dims"]) if "dims" in table else "",
        stacked=_expression(table["stacked"]) if "stacked" in table else None,
        heads=_expression(table["heads"]) if "heads" in table else None,
        unit=_expression(table["unit"]) if "unit" in table else None,
        parts=_parse_parts(table["parts"]) if "parts" in table else None,
        gather=_parse_gather(table["gather"]) if "gather" in table else "",
        uneven=table["uneven"].flag() if "uneven" in table else False,
        pad=_expression(table["pad"]) if "pad" in table else None,
        experts=_expression(table["experts"]) if "experts" in table else None,
        shared=shared,
    )
    _refuse_combinations(rule, node)
    return rule


def _refuse_combinations(rule: Rule, node: Node) -> None:
    chosen = [key for key in ("heads", "unit", "parts", "pad") if getattr(rule, key) is not None]
    if len(chosen) > 1:
        node.fail(f"{' and '.join(chosen)} exclude one another", hint="keep one")
    if rule.stacked is not None and rule.pad is not None:
        node.fail("stacked and pad exclude one another", hint="padding would lie between the things stacked")
    if rule.gather == "output" and rule.kind != "column":
        node.fail(f"gather: true needs rule: column, is {rule.kind}", hint="a row layer ends in a sum by itself")
    idle = [*chosen, *(["stacked"] if rule.stacked is not None else []), *(["uneven"] if rule.uneven else [])]
    if rule.kind == "replicate" and not rule.gather and idle:
        node.fail(f"{', '.join(idle)} without effect: a replicated layer is not cut")
    if rule.experts is not None and "e" in rule.dims:
        node.fail("experts and the letter e in dims exclude one another", hint="experts: one module each; e: stacked")
    if rule.pad is not None and rule.uneven:
        node.fail("pad and uneven exclude one another", hint="pad makes the ranks equal")


def _parse_dims(node: Node) -> str:
    text = node.text()
    if not text or set(text) - set("oie.") or any(text.count(letter) > 1 for letter in "oie"):
        node.fail(f"'{text}' must have one letter for each axis: o out, i in, e expert, . other", hint="e.g. io")
    return text


def _parse_gather(node: Node) -> Gather:
    if node.value == "input":
        return "input"
    if isinstance(node.value, bool):
        return "output" if node.value else ""
    return node.fail(f"must be true, false or input, is {node.kind}")


def _parse_parts(node: Node) -> Parts:
    if isinstance(node.value, int) and not isinstance(node.value, bool):
        return node.value if node.value >= 1 else node.fail(f"must be at least 1, is {node.value}")
    if not isinstance(node.value, tuple) or not node.value:
        node.fail(f"must be a number, a list of heads or a list of [count, width], is {node.kind}", hint="[H, K, K]")
    items = node.value
    if all(isinstance(item.value, tuple) for item in items):
        pairs = [cast(tuple[Node, ...], item.value) for item in items]
        if any(len(pair) != 2 for pair in pairs):
            node.fail("each part must be [count, width]")
        return tuple((_expression(count), _expression(width)) for count, width in pairs)
    if any(isinstance(item.value, tuple) for item in items):
        node.fail("mixes heads and [count, width]")
    return tuple(_expression(item) for item in items)
