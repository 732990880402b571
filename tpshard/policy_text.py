"""From a drafted policy to YAML: few rules, with patterns, in the order of the model, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tpshard.patterns import Pattern
from tpshard.policy_ways import Drafted

LONGEST = 100  # characters of a key
MOST_JOINED = 12  # alternatives of a key


@dataclass(frozen=True, slots=True)
class Head:
    """What stands above the rules."""

    name: str
    description: str
    model_type: str
    variables: Mapping[str, str]
    extends: str = ""
    remarks: tuple[str, ...] = ()


Layers = Mapping[str, Sequence[str]]  # by path, the last words of its tensors' names


def policy_text(head: Head, rules: Mapping[str, Drafted], layers: Layers) -> str:
    """``rules`` by layer (``*`` for numbers); ``layers``: all there are, of which a base may have rules for some."""
    lines = [f"# {remark}" for remark in head.remarks]
    lines += [f"name: {head.name}", f"description: {quoted(head.description)}"]
    if head.model_type:
        lines.append(f"for: {{model_type: {quoted(head.model_type)}}}")
    if head.extends:
        lines.append(f"extends: {head.extends}")
    used = {word for rule in rules.values() for _, value in rule.options for word in re.findall(r"\w+", value)}
    variables = {name: expression for name, expression in head.variables.items() if name in used}
    if variables:
        lines += ["vars:", *(f"  {name}: {expression}" for name, expression in variables.items())]
    if rules:
        lines += ["rules:", *_rule_lines(rules, layers)]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A YAML scalar that is read as text, whatever it looks like."""
    plain = re.fullmatch(r"[A-Za-z][\w .,()/-]*", text) and not text.endswith(" ")
    words = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}
    return text if plain and text.lower() not in words else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _rule_lines(rules: Mapping[str, Drafted], layers: Layers) -> Iterator[str]:
    for rule, keys in _grouped(rules, layers):
        body = rule.kind
        if rule.options:
            options = ", ".join(f"{key}: {value}" for key, value in rule.options)
            body = f"{{rule: {rule.kind}, {options}}}"  # type: ignore[assignment]
        remark = f"unsure: {rule.unsure}" if rule.unsure else rule.comment
        for key in _joined(keys):
            shown = f'"{key}"' if key[0] in "{*" or not re.match(r"[A-Za-z_]", key) else key
            yield f"  {shown}: {body}{f'  # {remark}' if remark else ''}"


def _grouped(rules: Mapping[str, Drafted], layers: Layers) -> list[tuple[Drafted, list[str]]]:
    """Each different rule with the tails that mean its layers and no others, in the order of the first."""
    keys = keys_for(rules, layers)
    groups: dict[Drafted, list[str]] = {}
    for key, path in keys.items():
        groups.setdefault(rules[path], []).append(key)
    return list(groups.items())


def keys_for(rules: Mapping[str, Drafted], layers: Layers) -> dict[str, str]:
    """Keys, each with one layer that it stands for: together they meet every layer of ``rules`` once, each by its own
    rule, and no other."""
    keys: dict[str, str] = {}
    met: set[str] = set()
    for path, rule in rules.items():
        if path in met:
            continue
        for key in _tails(path, rule):
            found = [other for other, leaves in layers.items() if meets(key, other, leaves)]
            if all(rules.get(other) == rule and other not in met for other in found):
                break
        else:
            key, found = path, [path]
        keys[key] = path
        met |= set(found)
    return keys


def _tails(path: str, rule: Drafted) -> Iterator[str]:
    """Ends of a path, the shortest first: of what is cut in a block, with a word before the last."""
    parts = path.split(".")
    plain = rule.kind == "replicate" or "*" not in parts
    shortest = 1 if plain and len(parts[-1]) > 3 and parts[-1] not in ("weight", "bias") else 2
    for length in range(min(shortest, len(parts)), len(parts) + 1):
        tail = parts[-length:]
        if not tail[0].isdigit() and (tail[0] != "*" or length == len(parts)):
            yield ".".join(tail)


def meets(key: str, path: str, leaves: Sequence[str]) -> bool:
    """Whether a key is met by a layer whose numbers are ``*``, or by one of its tensors."""
    pattern = Pattern(tuple(key.split(".")))
    return any(pattern.matches(name) for name in (path, *(f"{path}.{leaf}" for leaf in leaves if leaf)))


def _joined(keys: Sequence[str]) -> list[str]:
    """Keys that differ in their last segment made one; those of a single segment, too."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        above, _, last = key.rpartition(".")
        groups.setdefault(above, []).append(last)
    made: list[str] = []
    for above, lasts in groups.items():
        for some in _chunks(lasts):
            ending = some[0] if len(some) == 1 else "{" + ",".join(some) + "}"
            made.append(f"{above}.{ending}" if above else ending)
    return made


def _chunks(words: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for word in words:
        if chunk and (len(chunk) == MOST_JOINED or len(",".join([*chunk, word])) > LONGEST - 30):
            yield chunk
            chunk = []
        chunk.append(word)
    yield chunk
