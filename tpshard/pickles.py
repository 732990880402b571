"""Pickles read without running them: a small machine over the opcodes that builds plain values and inert records.

A pickle is a program that names functions and calls them. Here nothing that a file names is ever looked up, imported
or called. The caller says what a name means, by a function of his own; any other name is refused, or (``others``)
kept as a record that does nothing. So there is no list of dangerous names that could have a hole, and no version of a
library whose own loader must be trusted: torch.load(weights_only=True) ran code before torch 2.6 (CVE-2025-32434).

Time is linear in the pickle, and memory a multiple of it: an opcode of one byte makes one small object. Nothing in it
is copied or walked through by an opcode that costs less than that: nested tuples are no keys, numbers have a limit,
the memo is a table. The opcodes are described in Python's own pickletools. Not read are those of protocol 0 and
classes of Python 2, the extension registry, buffers outside of the pickle, and arguments by keyword.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from tpshard.errors import InputError
from tpshard.pickle_machine import Global, Machine, Meaning, decoded

LARGEST = 256 * 2**20  # bytes; a checkpoint of 250,000 tensors has 60 MB
MOST_OPERATIONS = 30_000_000  # 41 to a tensor; each may take 100 bytes of memory
LONGEST_NUMBER = 1_024  # bytes


def no_persistent(key: object) -> NoReturn:
    raise InputError("has a persistent id, which a pickle of its own cannot have")


def _empty_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise InputError("has an OrderedDict of Python 2's kind")
    return {}


ORDERED_DICT = Global("collections", "OrderedDict")
PLAIN: Mapping[Global, Meaning | None] = {ORDERED_DICT: _empty_dict}


@dataclass(frozen=True, slots=True)
class PickleReader:
    """How to read a pickle. ``where`` begins every message. ``meanings``: what a call of a name gives, from its
    arguments, by a function that trusts none of them; None: an inert record. ``others``: keep names that are not
    among them as inert records too. ``persistent`` gives what an id stands for."""

    where: str
    meanings: Mapping[Global, Meaning | None]
    persistent: Callable[[object], object] = no_persistent
    others: bool = False

    def read(self, data: bytes) -> Any:
        """The one pickle that ``data`` is. Raises InputError.

        >>> PickleReader("x", PLAIN, others=True).read(b"cposix\\nsystem\\n(U\\x02lstR.")
        Call(function=Global(module='posix', name='system'), arguments=('ls',), state=None, items=None)
        """
        value, end = self.read_at(data, 0)
        if end != len(data):
            raise InputError(f"{self.where}: {len(data) - end} bytes follow the pickle's end")
        return value

    def read_at(self, data: bytes, at: int) -> tuple[Any, int]:
        """The pickle that begins at byte ``at``, and where it ends."""
        if len(data) - at > LARGEST:
            raise InputError(f"{self.where}: a pickle of {len(data) - at} bytes, at most {LARGEST} are read")
        machine = Machine(data, at, self.meanings, self.persistent, self.others)
        try:
            return _run(machine), machine.at
        except InputError as error:
            raise InputError(f"{self.where}: {error.message} (byte {machine.at})", hint=error.hint) from None


def _run(machine: Machine) -> Any:
    data, operations = machine.data, _OPERATIONS
    try:
        for _ in range(MOST_OPERATIONS):
            code = data[machine.at]
            machine.at += 1
            if code == _STOP:
                break
            operations[code](machine)
        else:
            raise InputError(f"has more than {MOST_OPERATIONS} opcodes")
    except (IndexError, struct.error):
        raise InputError(
            "ends in the middle, or takes from an empty stack", hint="it is truncated or damaged"
        ) from None
    if machine.marks or len(machine.stack) != 1:
        raise InputError("does not end with one value", hint="it is damaged")
    return machine.stack[0]


_STOP = ord(".")
_U1, _U2, _U4, _U8 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


def _unread(machine: Machine) -> None:
    code = machine.data[machine.at - 1]
    known = _UNREAD.get(bytes([code]))
    what = f"uses the opcode {known}, which is not read; nothing was executed" if known else f"has no opcode {code}"
    raise InputError(what, hint=None if known else "is it a pickle?")


_UNREAD = {
    b"I": "INT", b"L": "LONG", b"F": "FLOAT", b"S": "STRING", b"V": "UNICODE", b"P": "PERSID", b"g": "GET",
    b"p": "PUT", b"i": "INST", b"o": "OBJ", b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4",
    b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER",
}  # fmt: skip


def _binput(machine: Machine) -> None:
    machine.memo[machine.data[machine.at]] = machine.stack[-1]
    machine.at += 1


def _binget(machine: Machine) -> None:
    _get(machine, machine.data[machine.at])
    machine.at += 1


def _get(machine: Machine, place: int) -> None:
    if place not in machine.memo:
        raise InputError(f"asks for value {place}, which was not put by", hint="it is damaged")
    machine.stack.append(machine.memo[place])


def _long_binput(machine: Machine) -> None:
    machine.memo[machine.number(_U4)] = machine.stack[-1]


def _memoize(machine: Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _text(machine: Machine, size: int) -> None:
    machine.stack.append(decoded(machine.take(size)))


def _old_text(machine: Machine, size: int) -> None:
    """Python 2's str: text, where it can be."""
    raw = machine.take(size)
    try:
        machine.stack.append(raw.decode("utf-8"))
    except UnicodeDecodeError:
        machine.stack.append(raw)


def _bytes(machine: Machine, size: int) -> None:
    machine.stack.append(machine.take(size))


def _close(machine: Machine, kind: Callable[[list[Any]], object]) -> None:
    items = machine.items()
    machine.stack.append(kind(items))


def _long(machine: Machine, size: int) -> None:
    if size > LONGEST_NUMBER:
        raise InputError(f"has a number of {size} bytes, at most {LONGEST_NUMBER} are read")
    machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))


def _mark(machine: Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop(machine: Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.items()


def _pop_mark(machine: Machine) -> None:
    machine.items()


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        stack = machine.stack
        if len(stack) < count:
            raise IndexError
        stack[-count:] = [tuple(stack[-count:])]

    return operation


def _push(value: object) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(value)


def _push_new(kind: Callable[[], object]) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(kind())


def _sized(form: struct.Struct, then: Callable[[Machine, int], None]) -> Callable[[Machine], None]:
    """An operation on the number that follows its opcode."""
    return lambda machine: then(machine, machine.number(form))


def _integer(form: struct.Struct) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(machine.number(form))


def _put_one(machine: Machine) -> None:
    value = machine.stack.pop()
    machine.put([value])


def _put_pair(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.put_pairs([key, value])


def _new_dict(machine: Machine) -> None:
    flat = machine.items()
    machine.stack.append({})
    machine.put_pairs(flat)


def _new_frozenset(machine: Machine) -> None:
    members = machine.items()
    machine.stack.append(set())
    machine.put_members(members)
    machine.stack.append(frozenset(machine.stack.pop()))


def _frame(machine: Machine, size: int) -> None:
    """A frame says how much a reader may fetch at once; all is here."""
    if size > len(machine.data) - machine.at:
        raise InputError(f"has a frame of {size} bytes, {len(machine.data) - machine.at} are left")


def _protocol(machine: Machine, number: int) -> None:
    if number > 5:
        raise InputError(f"is a pickle of protocol {number}, at most 5 is read")


def _persistent(machine: Machine) -> None:
    machine.stack.append(machine.persistent(machine.stack.pop()))


def _new_with_keywords(machine: Machine) -> None:
    keywords, arguments, kind = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    if type(keywords) is not dict or keywords:
        raise InputError("makes an object by keywords, which is not read; nothing was executed")
    machine.call(arguments, kind)


def _global(machine: Machine) -> None:
    module = machine.line()
    machine.name(module, machine.line())


def _stack_global(machine: Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, name)


_READ: Mapping[bytes, Callable[[Machine], None]] = {
    b"\x80": _sized(_U1, _protocol),
    b"\x95": _sized(_U8, _frame),
    b"(": _mark,
    b"0": _pop,
    b"1": _pop_mark,
    b"2": lambda machine: machine.stack.append(machine.stack[-1]),
    b"q": _binput,
    b"r": _long_binput,
    b"\x94": _memoize,
    b"h": _binget,
    b"j": _sized(_U4, _get),
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"K": _integer(_U1),
    b"M": _integer(_U2),
    b"J": _integer(_I4),
    b"\x8a": _sized(_U1, _long),
    b"\x8b": _sized(_U4, _long),
    b"G": _integer(_F8),
    b"X": _sized(_U4, _text),
    b"\x8c": _sized(_U1, _text),
    b"\x8d": _sized(_U8, _text),
    b"U": _sized(_U1, _old_text),
    b"T": _sized(_U4, _old_text),
    b"C": _sized(_U1, _bytes),
    b"B": _sized(_U4, _bytes),
    b"\x8e": _sized(_U8, _bytes),
    b"\x96": _sized(_U8, _bytes),
    b")": _push(()),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"t": lambda machine: _close(machine, tuple),
    b"]": _push_new(list),
    b"l": lambda machine: _close(machine, list),
    b"a": _put_one,
    b"e": lambda machine: machine.put(machine.items()),
    b"}": _push_new(dict),
    b"d": _new_dict,
    b"s": _put_pair,
    b"u": lambda machine: machine.put_pairs(machine.items()),
    b"\x8f": _push_new(set),
    b"\x90": lambda machine: machine.put_members(machine.items()),
    b"\x91": _new_frozenset,
    b"c": _global,
    b"\x93": _stack_global,
    b"R": lambda machine: machine.call(machine.stack.pop(), machine.stack.pop()),
    b"\x81": lambda machine: machine.call(machine.stack.pop(), machine.stack.pop()),
    b"\x92": _new_with_keywords,
    b"b": lambda machine: machine.build(),
    b"Q": _persistent,
}
_OPERATIONS = tuple(_READ.get(bytes([code]), _unread) for code in range(256))
