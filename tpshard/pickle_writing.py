"""Plain values, names and records as a pickle of protocol 2, the one that PyTorch writes: same values, same bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable

from tpshard.pickle_machine import Call, Global

_ENCODE = Global("_codecs", "encode")


def pickled(value: object, special: Callable[[object], object | None] = lambda value: None) -> bytes:
    """A pickle of None, bool, int, float, str, bytes, list, tuple, dict, Global, Call and Persistent. ``special`` says
    what stands for a value of another kind. Raises TypeError for what has none.

    >>> import pickle
    >>> pickle.loads(pickled({"a": [1, -2.5, None, ("x", b"y")], "b": Call(Global("builtins", "complex"), (1, 2))}))
    {'a': [1, -2.5, None, ('x', b'y')], 'b': (1+2j)}
    """
    writer = _Writer(special)
    writer.value(value)
    return b"\x80\x02" + b"".join(writer.parts) + b"."


class Persistent:
    """What a pickle holds by its id alone."""

    def __init__(self, key: tuple[object, ...]) -> None:
        self.key = key


class _Writer:
    """Names and short texts that come again are put by and asked for: a checkpoint says 'storage' for each tensor."""

    def __init__(self, special: Callable[[object], object | None]) -> None:
        self.parts: list[bytes] = []
        self._special = special
        self._places: dict[object, bytes] = {}

    def value(self, value: object) -> None:
        match value:
            case None:
                self.parts.append(b"N")
            case bool():
                self.parts.append(b"\x88" if value else b"\x89")
            case int():
                self.parts.append(_whole(value))
            case float():
                self.parts.append(b"G" + struct.pack(">d", value))
            case str():
                self._once(value, lambda: _text(value))
            case Global(module, name):
                self._once(value, lambda: b"c%s\n%s\n" % (module.encode(), name.encode()))
            case list():
                self._filled(b"]", value, b"e")
            case dict():
                self._filled(b"}", [part for pair in value.items() for part in pair], b"u")
            case tuple():
                self._tuple(value)
            case bytes():  # protocol 2 has none: as Python writes them
                self.value(Call(_ENCODE, (value.decode("latin-1"), "latin1")))
            case Call():
                self._call(value)
            case Persistent():
                self.value(value.key)
                self.parts.append(b"Q")
            case _:
                self._other(value)

    def _other(self, value: object) -> None:
        stands = self._special(value)
        if stands is None:
            raise TypeError(f"a value of kind {type(value).__name__} has no pickle here")
        self.value(stands)

    def _once(self, value: object, written: Callable[[], bytes]) -> None:
        if value in self._places:
            self.parts.append(self._places[value])
            return
        place = len(self._places)
        put, get = (b"q%c", b"h%c") if place < 256 else (b"r%s", b"j%s")
        number = place if place < 256 else struct.pack("<I", place)
        self._places[value] = get % number
        self.parts += (written(), put % number)

    def _tuple(self, values: tuple[object, ...]) -> None:
        marked = len(values) > 3
        self.parts.append(b"(" if marked else b"")
        for value in values:
            self.value(value)
        self.parts.append(b"t" if marked else (b")", b"\x85", b"\x86", b"\x87")[len(values)])

    def _filled(self, empty: bytes, values: list[object], fill: bytes) -> None:
        self.parts.append(empty)
        if values:
            self.parts.append(b"(")
            for value in values:
                self.value(value)
            self.parts.append(fill)

    def _call(self, call: Call) -> None:
        """A function's call, or an object made without arguments and then given its state, as most classes are."""
        if call.items is not None:
            raise TypeError(f"{call.function} with items has no pickle here")
        self.value(call.function)
        self.value(call.arguments)
        self.parts.append(b"R" if call.state is None else b"\x81")
        if call.state is not None:
            self.value(call.state)
            self.parts.append(b"b")


def _whole(value: int) -> bytes:
    if 0 <= value < 2**8:
        return b"K%c" % value
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a%c" % size + value.to_bytes(size, "little", signed=True)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw
