"""Strict YAML: only what a policy needs, every value with its place in the file.

Refused, because each has fooled somebody: anchors and aliases (bombs, loops), tags (code), duplicate keys (the last
wins), YAML 1.1's surprises (``010`` is 8, ``12:30`` is 750, ``no`` is False), deep nesting, huge files.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from tpshard.errors import PolicyError, StorageError, printable

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER_LIKE = re.compile(r"[-+.]?[0-9][0-9_.:eExXoO+-]*|[-+]?0[xX][0-9a-fA-F_]+|[-+]?\.(inf|nan)", re.IGNORECASE)
_QUOTE = "write it out; quote a key that begins with '*'"
_YAML_11_WORDS = frozenset({"yes", "no", "on", "off", "y", "n", "~", "null"})


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file, counted from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its place and the trail of keys that leads to it; ``key``: the place of its own key, if any."""

    value: str | int | bool | tuple[Node, ...] | Mapping[str, Node]
    mark: Mark
    trail: str = ""
    key: Mark | None = None

    def fail(self, what: str, *, hint: str | None = None) -> NoReturn:
        where = f"{self.mark}: {printable(self.trail)}: " if self.trail else f"{self.mark}: "
        raise PolicyError(where + what, hint=hint)

    def mapping(self) -> Mapping[str, Node]:
        return self.value if isinstance(self.value, Mapping) else self.fail(f"must be a mapping, is {self.kind}")

    def text(self) -> str:
        return self.value if isinstance(self.value, str) else self.fail(f"must be text, is {self.kind}")

    def flag(self) -> bool:
        return self.value if isinstance(self.value, bool) else self.fail(f"must be true or false, is {self.kind}")

    def integer(self) -> int:
        if isinstance(self.value, int) and not isinstance(self.value, bool):
            return self.value
        return self.fail(f"must be a whole number, is {self.kind}")

    def one_of(self, words: Sequence[str]) -> str:
        if isinstance(self.value, str) and self.value in words:
            return self.value
        shown = f"'{printable(str(self.value))}'" if isinstance(self.value, str | int) else self.kind
        return self.fail(f"must be one of {', '.join(words)}; is {shown}", hint=did_you_mean(self.value, words))

    def known_keys(self, keys: Sequence[str]) -> Mapping[str, Node]:
        """The mapping, after refusing keys that are not in ``keys``."""
        table = self.mapping()
        for key, node in table.items():
            if key not in keys:
                hint = did_you_mean(key, keys) or f"known here: {', '.join(keys)}"
                node.fail("is not a known key", hint=hint)
        return table

    @property
    def kind(self) -> str:
        match self.value:
            case bool():
                return "true" if self.value else "false"
            case int():
                return f"the number {self.value}"
            case str():
                return f"the text '{printable(self.value)}'" if self.value else "empty"
            case tuple():
                return "a list"
            case _:
                return "a mapping"

    def plain(self) -> object:
        """The value as ordinary Python data."""
        match self.value:
            case tuple():
                return [node.plain() for node in self.value]
            case Mapping():
                return {key: node.plain() for key, node in self.value.items()}
            case _:
                return self.value


def did_you_mean(word: object, words: Iterable[str]) -> str | None:
    """A hint such as ``did you mean 'column'?``, or None."""
    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f"did you mean '{close[0]}'?" if close else None


def read_documents(path: Path) -> list[Node]:
    """All documents of a policy file. Raises PolicyError, or StorageError where the file cannot be read."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise PolicyError(f"{path}: is not a regular file")
        if info.st_size > MAX_BYTES:
            raise PolicyError(f"{path}: has {info.st_size} bytes, a policy may have {MAX_BYTES}")
        with path.open("rb") as file:
            raw = os.read(file.fileno(), MAX_BYTES + 1)
    except FileNotFoundError:
        raise PolicyError(f"{path}: is not there", hint="built-in policies: tpshard policy list") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    try:
        return parse_documents(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: is not UTF-8 (byte {error.start})") from None


def parse_documents(text: str, file: str, *, trusted: bool = False) -> list[Node]:
    """All documents of a YAML text as trees of Node; ``file`` is the name for messages. ``trusted``: a text of our own,
    which the tests have read strictly; libyaml reads it in a tenth of the time."""
    loader = yaml.CSafeLoader if trusted and yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        if not trusted:
            _refuse_features(text, file)
        roots = [root for root in yaml.compose_all(text, Loader=loader) if root is not None]
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        place = f"{file}:{at.line + 1}:{at.column + 1}" if at else file
        hint = _QUOTE if "alias" in (error.context or "") else None
        raise PolicyError(f"{place}: is not YAML: {error.problem or error.context}", hint=hint) from None
    except yaml.YAMLError as error:
        raise PolicyError(f"{file}: is not YAML: {printable(str(error).splitlines()[0])}") from None
    documents = [_convert(root, file, "") for root in roots]
    documents = [node for node in documents if node.value != ""]
    if not documents:
        raise PolicyError(f"{file}: is empty", hint="a policy has at least: name, rules")
    return documents


def _refuse_features(text: str, file: str) -> None:
    """Look at the tokens first: what follows recurses, and must not meet an alias or a thousand levels."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        mark = Mark(file, token.start_mark.line + 1, token.start_mark.column + 1)
        match token:
            case yaml.AliasToken() | yaml.AnchorToken():
                raise PolicyError(f"{mark}: anchors and aliases are not allowed in a policy", hint=_QUOTE)
            case yaml.TagToken() | yaml.DirectiveToken():
                raise PolicyError(f"{mark}: tags and directives are not allowed in a policy")
            case (
                yaml.BlockMappingStartToken()
                | yaml.BlockSequenceStartToken()
                | yaml.FlowMappingStartToken()
                | yaml.FlowSequenceStartToken()
            ):
                depth += 1
                if depth > MAX_DEPTH:
                    raise PolicyError(f"{mark}: nested deeper than {MAX_DEPTH} levels")
            case yaml.BlockEndToken() | yaml.FlowMappingEndToken() | yaml.FlowSequenceEndToken():
                depth -= 1


def _convert(node: yaml.Node, file: str, trail: str) -> Node:
    mark = Mark(file, node.start_mark.line + 1, node.start_mark.column + 1)
    match node:
        case yaml.ScalarNode():
            return Node(_scalar(node, mark, trail), mark, trail)
        case yaml.SequenceNode():
            items = (_convert(item, file, f"{trail}[{i}]") for i, item in enumerate(node.value))
            return Node(tuple(items), mark, trail)
        case yaml.MappingNode():
            return Node(dict(_pairs(node, file, trail)), mark, trail)
        case _:
            raise AssertionError(f"YAML has no fourth kind of node: {node}")


def _pairs(node: yaml.MappingNode, file: str, trail: str) -> Iterator[tuple[str, Node]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        mark = Mark(file, key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            raise PolicyError(f"{mark}: a key must be text", hint="quote keys that begin with '{', '[' or '*'")
        key = _encodable(str(key_node.value), mark)
        if key in seen:
            raise PolicyError(f"{mark}: key '{printable(key)}' appears twice, first at line {seen[key]}")
        seen[key] = mark.line
        value = _convert(value_node, file, f"{trail}.{key}" if trail else key)
        yield key, Node(value.value, mark if isinstance(value.value, Mapping) else value.mark, value.trail, mark)


def _encodable(text: str, mark: Mark) -> str:
    """A text that can be written out again: the escapes of a quoted text may spell half a character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PolicyError(f"{mark}: '{printable(text)}' is not Unicode text")
    return text


def _scalar(node: yaml.ScalarNode, mark: Mark, trail: str) -> str | int | bool:
    text = _encodable(str(node.value), mark)
    if node.style:  # quoted
        return text
    if text in ("true", "false"):
        return text == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    where = f"{mark}: {printable(trail)}: " if trail else f"{mark}: "
    if _NUMBER_LIKE.fullmatch(text):
        raise PolicyError(f"{where}'{text}' is not a plain whole number", hint="write it in decimal, or quote it")
    if text.lower() in _YAML_11_WORDS or text in ("True", "False", "TRUE", "FALSE"):
        raise PolicyError(
            f"{where}'{text}' means different things in different YAML versions", hint="use true or false, or quote it"
        )
    return text
