"""The names that a policy's keys stand for.

A key names the tail of a layer's path, or of a tensor's whole name, at a dot: ``mlp.c_proj`` meets
``h.0.mlp.c_proj.weight``. ``*`` stands for anything within one segment, ``**`` for any number of segments,
``{a,b}`` for either. Matching takes time in proportion to name and pattern, whatever they are: no regular
expressions, so no pattern can hang.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from tpshard.errors import printable

MAX_LENGTH = 1_000
MAX_ALTERNATIVES = 256

Value = TypeVar("Value")


class PatternError(ValueError):
    """What is wrong with a pattern, without its place."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One alternative of a key, split at the dots."""

    segments: tuple[str, ...]

    def matches(self, name: str) -> bool:
        """Whether the pattern is the tail of ``name``, at a dot.

        >>> Pattern(("layer", "*", "output", "dense")).matches("encoder.layer.11.output.dense")
        True
        >>> Pattern(("layer", "*", "output", "dense")).matches("encoder.layer.11.attention.output.dense")
        False
        """
        parts = name.split(".")
        if "**" not in self.segments:
            tail = parts[len(parts) - len(self.segments) :] if len(parts) >= len(self.segments) else None
            return tail is not None and all(map(_segment_matches, self.segments, tail))
        # reachable[k]: the first k pattern segments can end here; the tail may begin anywhere.
        reachable = _closure([True] + [False] * len(self.segments), self.segments)
        for part in parts:
            following = [True] + [False] * len(self.segments)
            for k, segment in enumerate(self.segments):
                if segment == "**":
                    following[k + 1] = reachable[k + 1]
                else:
                    following[k + 1] = reachable[k] and _segment_matches(segment, part)
            reachable = _closure(following, self.segments)
        return reachable[-1]


def _closure(reachable: list[bool], segments: tuple[str, ...]) -> list[bool]:
    """``**`` may stand for nothing."""
    for k, segment in enumerate(segments):
        if segment == "**" and reachable[k]:
            reachable[k + 1] = True
    return reachable


def _segment_matches(pattern: str, text: str) -> bool:
    if "*" not in pattern:
        return pattern == text
    first, *middle, last = pattern.split("*")
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for piece in middle:
        found = text.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True


class Index(Generic[Value]):
    """Patterns with what they stand for, found by the last segment of a name: a policy's hundred patterns are tried on
    a hundred thousand names."""

    def __init__(self, entries: Iterable[tuple[Pattern, Value]]) -> None:
        self._by_last: dict[str, list[tuple[Pattern, Value]]] = {}
        self._anywhere: list[tuple[Pattern, Value]] = []
        for pattern, value in entries:
            last = pattern.segments[-1]
            place = self._anywhere if "*" in last else self._by_last.setdefault(last, [])
            place.append((pattern, value))

    def matching(self, name: str) -> Iterator[Value]:
        """What stands for a name; a value may come more than once."""
        candidates = self._by_last.get(name.rpartition(".")[2], ())
        for pattern, value in itertools.chain(candidates, self._anywhere):
            if pattern.matches(name):
                yield value


def parse_patterns(key: str) -> tuple[Pattern, ...]:
    """All alternatives of a key.

    >>> [".".join(p.segments) for p in parse_patterns("mlp.{up,down}_proj")]
    ['mlp.up_proj', 'mlp.down_proj']
    """
    if len(key) > MAX_LENGTH:
        raise PatternError(f"has {len(key)} characters, at most {MAX_LENGTH} are read")
    texts = list(_alternatives(key))
    for text in texts:
        if any(not segment for segment in text.split(".")):
            raise PatternError("has an empty segment")
        if set(text) & set("[]?!\\ ") or printable(text, MAX_LENGTH) != text:
            raise PatternError("uses a character that is not part of a name; only * ** and {a,b} are special")
    return tuple(Pattern(tuple(text.split("."))) for text in texts)


def _alternatives(key: str) -> Iterator[str]:
    pending, done = [key], 0
    while pending:
        text = pending.pop(0)
        opening = text.find("{")
        if opening < 0:
            if "}" in text:
                raise PatternError("has a '}' without its '{'")
            done += 1
            yield text
            continue
        closing = text.find("}", opening)
        if closing < 0 or "{" in text[opening + 1 : closing]:
            raise PatternError("has a '{' without its '}', or one inside another")
        choices = text[opening + 1 : closing].split(",")
        pending[:0] = [text[:opening] + choice.strip() + text[closing + 1 :] for choice in choices]
        if done + len(pending) > MAX_ALTERNATIVES:
            raise PatternError(f"stands for more than {MAX_ALTERNATIVES} alternatives")
