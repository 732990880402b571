"""Names with places to fill: ``decoder.layers.<layer>.mlp.linear_fc1.<leaf>``.

``<layer>``, ``<expert>`` and every other word stand for a whole number, but for ``<leaf>``, which is ``weight`` or
``bias`` (not what quantisation puts beside them: what is packed does not join by rows), and ``<rest>``, any segments;
``<tp:02>`` for a number of at least two digits.
A template reads names and makes them, so a rule that relates two templates serves both directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Values = Mapping[str, str]
Meaning = TypeVar("Meaning")

_PLACE = re.compile(r"<([a-z]+)(?::0([1-9]))?>")
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
_TEXTS = {"leaf": "weight|bias", "rest": "[^/]+"}


@dataclass(frozen=True, slots=True)
class Template:
    """A name or a file name with places; each place stands at most once.

    >>> Template("layers.<layer>.wq.<leaf>").read("layers.3.wq.weight")
    {'layer': '3', 'leaf': 'weight'}
    """

    text: str
    places: tuple[str, ...] = field(init=False)
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        places = tuple(match[1] for match in _PLACE.finditer(self.text))
        if len(set(places)) != len(places):
            raise ValueError(f"'{self.text}' has a place twice")
        pattern, end = "", 0
        for match in _PLACE.finditer(self.text):
            number = rf"[0-9]{{{match[2]},9}}" if match[2] else "0|[1-9][0-9]{0,8}"
            pattern += re.escape(self.text[end : match.start()])
            pattern += f"(?P<{match[1]}>{_TEXTS.get(match[1], number)})"
            end = match.end()
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "_pattern", re.compile(pattern + re.escape(self.text[end:])))

    def read(self, name: str) -> dict[str, str] | None:
        """What stands in the places of a name; None where it is another kind of name."""
        match = self._pattern.fullmatch(name)
        return match.groupdict() if match else None

    @property
    def vagueness(self) -> tuple[int, int]:
        """Less for what says more of a name: fewer places, more text."""
        return len(self.places), -len(self.text)

    def fill(self, values: Values) -> str:
        """The name with these values in its places.

        >>> Template("mp_rank_<tp:02>").fill({"tp": "3"})
        'mp_rank_03'
        """
        return _PLACE.sub(lambda match: values[match[1]].zfill(int(match[2] or 1)), self.text)


class Dictionary(Generic[Meaning]):
    """Templates with what they mean. A checkpoint's 100,000 names are of a few kinds, which are looked up once."""

    def __init__(self, entries: Iterable[tuple[Template, Meaning]]) -> None:
        self._entries: Sequence[tuple[Template, Meaning]] = tuple(entries)
        self._kinds: dict[str, tuple[tuple[Template, Meaning], ...]] = {}

    def find(self, name: str) -> tuple[Meaning, dict[str, str]] | None:
        """What a name means, and what stands in its places: by the template that says most of it. Raises
        ValueError where two say as much."""
        kind = _NUMBER.sub("#", name)
        if kind not in self._kinds:
            reading = [entry for entry in self._entries if entry[0].read(name) is not None]
            best = min((template.vagueness for template, _ in reading), default=(0, 0))
            self._kinds[kind] = tuple(entry for entry in reading if entry[0].vagueness == best)
        found = self._kinds[kind]
        if len(found) > 1:
            raise ValueError(f"'{found[0][0].text}' and '{found[1][0].text}' both read it")
        for template, meaning in found:
            values = template.read(name)
            if values is not None:
                return meaning, values
        return None
