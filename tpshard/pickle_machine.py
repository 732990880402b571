"""What a pickle's opcodes work on: a stack, what was put by, and values that do nothing.

Nothing here is copied or walked through by an opcode that costs less than that: nested tuples are no keys (Python
would hash them again and again), whole numbers have a limit, the memo is a table.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.errors import InputError, printable

MOST_TUPLE_KEYS = 10_000  # their hashes are not random: a file may have them all collide
LONGEST_KEY = 16  # parts of a tuple
MOST_HASHED = 2**61 - 1  # whole numbers below it are their own hash, so that they do not collide
LONGEST_NAME = 1_024


@dataclass(frozen=True, slots=True)
class Global:
    """A name in the file, of a class or function; it stands for itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Call:
    """What would have been called or made: kept, never done. ``state`` is what it would have been given afterwards,
    ``items`` what would have been put into it: values, or pairs. Filled while a pickle is read, unchanged after."""

    function: Global
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] | None = None


Meaning = Callable[[tuple[Any, ...]], Any]


class Machine:
    """One pickle being read: the stack since the last mark, those before it, and what was put by for later use."""

    __slots__ = ("at", "data", "known", "marks", "meanings", "memo", "others", "persistent", "stack", "tuples")

    def __init__(
        self,
        data: bytes,
        at: int,
        meanings: Mapping[Global, Meaning | None],
        persistent: Callable[[object], object],
        others: bool,
    ) -> None:
        self.data, self.at = data, at
        self.meanings, self.persistent, self.others = meanings, persistent, others
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.known: dict[Global, Global] = {}
        self.tuples = 0

    # ------------------------------------------------------------------------------------------ operands

    def take(self, count: int) -> bytes:
        begin = self.at
        if count > len(self.data) - begin:
            raise InputError(
                f"promises {count} bytes, {len(self.data) - begin} are left", hint="it is truncated or damaged"
            )
        self.at = begin + count
        return self.data[begin : self.at]

    def number(self, form: struct.Struct) -> int:
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value  # type: ignore[no-any-return]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + LONGEST_NAME)
        if end < 0 and self.at + LONGEST_NAME > len(self.data):
            raise IndexError
        if end < 0:
            raise InputError(f"has a name of more than {LONGEST_NAME} bytes", hint="it is damaged")
        raw, self.at = self.data[self.at : end], end + 1
        return decoded(raw)

    def items(self) -> list[Any]:
        """All since the last mark."""
        if not self.marks:
            raise InputError("closes what was not opened", hint="it is damaged")
        items, self.stack = self.stack, self.marks.pop()
        return items

    # ------------------------------------------------------------------------------------------ names and calls

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > LONGEST_NAME:
            raise InputError("has a name that is no text, or too long", hint="it is damaged")
        found = Global(module, name)
        if found not in self.meanings and not self.others:
            raise InputError(f"needs {printable(str(found))}, which is not read; nothing was executed")
        self.stack.append(self.known.setdefault(found, found))

    def call(self, arguments: object, function: object) -> None:
        if type(function) is not Global or type(arguments) is not tuple:
            raise InputError(f"calls what is no name: {_kind(function)}, {_kind(arguments)}; nothing was executed")
        meaning = self.meanings.get(function)
        self.stack.append(Call(function, arguments) if meaning is None else meaning(arguments))

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is Call and made.state is None:
            made.state = state
        elif type(made) is not dict or type(state) is not dict:  # else an OrderedDict's attributes: module versions
            raise InputError(f"gives a state to {_kind(made)}; nothing was executed")

    # ------------------------------------------------------------------------------------------ containers

    def put(self, values: list[Any]) -> None:
        made = self.stack[-1]
        if type(made) is list:
            made.extend(values)
        elif type(made) is Call:
            made.items = made.items or []
            made.items.extend(values)
        else:
            raise InputError(f"puts values into {_kind(made)}", hint="it is damaged")

    def put_pairs(self, flat: list[Any]) -> None:
        made = self.stack[-1]
        if len(flat) % 2:
            raise InputError("has a key without a value", hint="it is damaged")
        if type(made) is Call:
            made.items = made.items or []
            made.items.extend(zip(flat[::2], flat[1::2], strict=True))
            return
        if type(made) is not dict:
            raise InputError(f"puts pairs into {_kind(made)}", hint="it is damaged")
        before, keys = len(made), flat[::2]
        for key in keys:
            if type(key) is not str:
                self.check_key(key)
        made.update(zip(keys, flat[1::2], strict=True))
        if len(made) != before + len(keys):
            raise InputError("has a key twice", hint="it is damaged")

    def put_members(self, values: list[Any]) -> None:
        made = self.stack[-1]
        if type(made) is not set:
            raise InputError(f"puts members into {_kind(made)}", hint="it is damaged")
        for value in values:
            self.check_key(value)
        made.update(values)

    def check_key(self, key: object) -> None:
        """Refuse what cannot be hashed, and what could be made to take long."""
        if type(key) is tuple and len(key) <= LONGEST_KEY:
            self.tuples += 1
            if self.tuples > MOST_TUPLE_KEYS:
                raise InputError(f"has more than {MOST_TUPLE_KEYS} tuples as keys")
            parts: tuple[object, ...] = key
        else:
            parts = (key,)
        for part in parts:
            if type(part) not in _KEYS or (type(part) is int and abs(part) >= MOST_HASHED):
                raise InputError(f"has {_kind(part)} as a key, which is not read")


_KEYS = {str, bytes, int, float, bool, type(None), Global, Call}


def _kind(value: object) -> str:
    return str(value) if type(value) is Global else f"a value of kind {type(value).__name__}"


def decoded(raw: bytes) -> str:
    """A text of the file. Raises InputError."""
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise InputError("has a text that is not UTF-8", hint="it is damaged") from None
