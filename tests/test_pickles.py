"""Pickles: what plain ones hold, by Python's own; hostile ones, which must end in one line and do nothing."""

from __future__ import annotations

import argparse
import collections
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.errors import InputError
from tpshard.pickle_machine import MOST_TUPLE_KEYS, Call, Global
from tpshard.pickle_writing import pickled
from tpshard.pickles import PLAIN, PickleReader

READER = PickleReader("x.pt", PLAIN)
TOLERANT = PickleReader("x.pt", PLAIN, others=True)

atoms = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.none() | st.text() | st.integers(-(2**60), 2**60) | st.binary()
values = st.recursive(
    atoms,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner) | st.sets(st.text()),
    max_leaves=30,
)


def refusal(data: bytes, reader: PickleReader = READER) -> str:
    with pytest.raises(InputError) as caught:
        reader.read(data)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x.pt: ")
    return str(caught.value).removeprefix("x.pt: ")


# ---------------------------------------------------------------------------------------------- plain values


@given(values, st.integers(4, 5))
def test_plain_values_are_what_python_reads(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert READER.read(data) == pickle.loads(data) == value
    assert READER.read(pickletools.optimize(data)) == value


@given(
    st.recursive(
        atoms,
        lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner, inner, inner),
        max_leaves=20,
    )
)
def test_what_is_written_python_reads(value: Any) -> None:
    assert pickle.loads(pickled(value)) == value
    assert pickled(value) == pickled(value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_shared_and_frozen(protocol: int) -> None:
    shared = [1, 2, 3]
    value = [shared, shared, {"again": shared}, bytearray(b"xyz") if protocol == 5 else b""]
    found = (TOLERANT if protocol == 2 else READER).read(pickle.dumps(value, protocol))
    assert found[0] is found[1] is found[2]["again"]
    if protocol >= 4:
        assert READER.read(pickle.dumps(frozenset("abc"), protocol)) == frozenset("abc")


def test_a_value_that_holds_itself() -> None:
    value: list[Any] = [1]
    value.append(value)
    found = READER.read(pickle.dumps(value, 2))
    assert found[1] is found


def test_an_ordered_dict_is_a_dict_whatever_its_attributes() -> None:
    value = collections.OrderedDict(b=1, a=2)
    value._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    found = READER.read(pickle.dumps(value, 2))
    assert type(found) is dict
    assert list(found.items()) == [("b", 1), ("a", 2)]


def test_records() -> None:
    names = argparse.Namespace(hidden_size=48, tensor=[1])
    found = TOLERANT.read(pickle.dumps(names, 2))
    assert isinstance(found, Call)
    assert (found.function, found.arguments, found.state) == (Global("argparse", "Namespace"), (), vars(names))
    found = TOLERANT.read(pickle.dumps(np.arange(3), 2))
    assert found.function.name == "_reconstruct"
    assert TOLERANT.read(pickle.dumps(collections.defaultdict(list, a=[3]), 2)).items == [("a", [3])]
    assert TOLERANT.read(pickle.dumps(collections.deque([3, 4]), 2)).items == [3, 4]
    assert TOLERANT.read(pickle.dumps(Path("/a"), 4)).arguments == ("/", "a")
    assert pickle.loads(pickled(Call(Global("argparse", "Namespace"), (), {"hidden_size": 48, "tensor": [1]}))) == names


def test_a_meaning_makes_what_it_returns() -> None:
    reader = PickleReader("x", {Global("builtins", "complex"): lambda arguments: ("complex", arguments)})
    assert reader.read(pickle.dumps(3 + 4j, 3)) == ("complex", (3.0, 4.0))


# ---------------------------------------------------------------------------------------------- hostile

CANARY = "canary"
WRITE = f"__import__('os').mkdir('{CANARY}')".encode()


def u(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


def called(module: bytes, name: bytes, *arguments: bytes) -> bytes:
    return b"\x80\x02c" + module + b"\n" + name + b"\n(" + b"".join(map(u, arguments)) + b"tR."


# Ways in which a pickle runs code, by those that scanners and restricted unpicklers were found to miss.
RUNNING = {
    "os.system": called(b"os", b"system", b"mkdir canary"),
    "posix.system": called(b"posix", b"system", b"mkdir canary"),
    "builtins.eval": called(b"builtins", b"eval", WRITE),
    "Python 2's builtins": called(b"__builtin__", b"eval", WRITE),
    "builtins.exec": called(b"builtins", b"exec", WRITE),
    "builtins.getattr": called(b"builtins", b"getattr", b"a", b"b"),
    "a dotted name": called(b"tpshard.folder", b"os.system", b"mkdir canary"),
    "torch.load": called(b"torch", b"load", b"x.pt"),
    "torch.hub": called(b"torch.hub", b"load", b"x/y"),
    "torch.utils.collect_env.run": called(b"torch.utils.collect_env", b"run", b"mkdir canary"),
    "torch._inductor compile": called(b"torch._inductor.codecache", b"compile_file", b"x"),
    "numpy _reconstruct": called(b"numpy.core.multiarray", b"_reconstruct", b"x"),
    "numpy runstring": called(b"numpy.testing._private.utils", b"runstring", WRITE),
    "functools.partial": b"\x80\x02cfunctools\npartial\ncos\nsystem\n" + u(b"mkdir canary") + b"\x86R)R.",
    "runpy": called(b"runpy", b"_run_code", WRITE),
    "timeit": called(b"timeit", b"timeit", WRITE),
    "pip": called(b"pip", b"main", b"install"),
    "idlelib": called(b"idlelib.pyshell", b"ModifiedInterpreter.runcode", WRITE),
    "pickle.loads": called(b"pickle", b"loads", b"cos"),
    "copyreg._reconstructor": called(b"copyreg", b"_reconstructor", b"x"),
    "copyreg.add_extension": called(b"copyreg", b"add_extension", b"os", b"system"),
    "types.CodeType": called(b"types", b"CodeType", b"x"),
    "ctypes": called(b"ctypes", b"CDLL", b"libc.so.6"),
    "subprocess": b"\x80\x04" + b"\x8c\x0asubprocess\x8c\x05Popen\x93" + u(b"mkdir canary") + b"\x85R.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + u(b"mkdir canary") + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n" + u(b"mkdir canary") + b"\x85}\x92.",
    "INST": b"(S'mkdir canary'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + u(b"mkdir canary") + b"o.",
    "GLOBAL alone": b"cantigravity\nx\n.",
    "__setstate__": b"\x80\x02cargparse\nNamespace\n)\x81}" + u(b"__setstate__") + b"cos\nsystem\nsb" + u(b"mkdir canary") + b"b.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "a persistent id": b"\x80\x02" + u(b"../../canary") + b"Q.",
    "an old persistent id": b"Pcanary\n.",
    "a dict's state": b"\x80\x02}cos\nsystem\nb.",
    "a call of a text": b"\x80\x02" + u(b"os.system") + u(b"mkdir canary") + b"\x85R.",
    "a call of a list": b"\x80\x02])R.",
}  # fmt: skip


@pytest.mark.parametrize("name", RUNNING)
def test_nothing_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(RUNNING[name])
    try:
        made = TOLERANT.read(RUNNING[name])
    except InputError:
        made = Call(Global("", ""), ())
    assert isinstance(made, Call | Global)
    assert not list(tmp_path.iterdir())


def test_these_pickles_do_run_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "builtins.exec", "functools.partial", "INST", "OBJ"):
        pickle.loads(RUNNING[name])
        assert Path(CANARY).exists(), name
        Path(CANARY).rmdir()


def test_a_refused_name_is_told() -> None:
    assert (
        refusal(called(b"posix", b"system", b"x"))
        == "needs posix.system, which is not read; nothing was executed (byte 16)"
    )
    assert "\\x1b[2J" in refusal(called(b"a\x1b[2J", b"b"))


BROKEN = {
    "empty": (b"", "ends in the middle"),
    "no stop": (b"\x80\x02}", "ends in the middle"),
    "nothing on the stack": (b"\x80\x02.", "does not end with one value"),
    "two values": (b"\x80\x02NN.", "does not end with one value"),
    "an open mark": (b"\x80\x02(N.", "does not end with one value"),
    "bytes after it": (b"\x80\x02N.N.", "2 bytes follow"),
    "a tuple of nothing": (b"\x80\x02\x86.", "takes from an empty stack"),
    "a mark that is not there": (b"\x80\x02t.", "closes what was not opened"),
    "protocol 6": (b"\x80\x06N.", "protocol 6, at most 5"),
    "an opcode that is none": (b"\x80\x02\xff.", "has no opcode 255 (byte 3) (is it a pickle?)"),
    "text numbers": (b"I1\n.", "opcode INT, which is not read"),
    "a frame beyond the end": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "frame of 18446744073709551615 bytes, 2 are left"),
    "BINBYTES8 beyond the end": (b"\x80\x04\x8e" + b"\xff" * 8 + b"N.", "promises 18446744073709551615 bytes, 2 are left"),
    "BINUNICODE beyond the end": (b"\x80\x02X\xff\xff\xff\xffa.", "promises 4294967295 bytes"),
    "a number of 4 GB": (b"\x80\x02\x8b\xff\xff\xff\xff.", "number of 4294967295 bytes, at most 1024"),
    "a memo that was not put": (b"\x80\x02h\x07.", "asks for value 7"),
    "a text that is none": (b"\x80\x02X\x01\x00\x00\x00\xff.", "not UTF-8"),
    "a key twice": (b"\x80\x02}(" + u(b"a") + b"N" + u(b"a") + b"Nu.", "has a key twice"),
    "a key twice in another call": (b"\x80\x02}" + u(b"a") + b"Ns" + u(b"a") + b"Ns.", "has a key twice"),
    "1 and True": (b"\x80\x02}(K\x01N\x88Nu.", "has a key twice"),
    "a key without a value": (b"\x80\x02}(Nu.", "a key without a value"),
    "a list as key": (b"\x80\x02}]Ns.", "kind list as a key"),
    "a tuple of tuples as key": (b"\x80\x02})\x85Ns.", "kind tuple as a key"),
    "a huge number as key": (b"\x80\x02}\x8a\x09" + b"\xff" * 8 + b"\x7fNs.", "kind int as a key"),
    "pairs into a list": (b"\x80\x02]NNs.", "puts pairs into a value of kind list"),
    "values into a dict": (b"\x80\x02}Na.", "puts values into a value of kind dict"),
    "members into a list": (b"\x80\x04](N\x90.", "puts members into a value of kind list"),
    "a name without an end": (b"\x80\x02c" + b"a" * 2000, "a name of more than 1024 bytes"),
    "a name that is a number": (b"\x80\x04K\x01K\x02\x93.", "a name that is no text"),
    "an OrderedDict with values": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "OrderedDict of Python 2's kind"),
    "keywords": (b"\x80\x04ccollections\nOrderedDict\n)}" + u(b"a") + b"Ns\x92.", "by keywords"),
    "buffers outside": (b"\x80\x05\x97.", "NEXT_BUFFER"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickles(name: str) -> None:
    data, message = BROKEN[name]
    assert message in refusal(data)


NESTED = {
    "lists in lists": (b"\x80\x02" + b"]" * 60_000 + b"a" * 59_999 + b".", list),
    "tuples in tuples": (b"\x80\x02)" + b"\x85" * 60_000 + b".", tuple),
    "marks": (b"\x80\x02" + b"(" * 60_000 + b"t" * 60_000 + b".", tuple),
    "a tree of 2^300": (b"\x80\x02N" + b"2\x86" * 300 + b".", tuple),
    "memo far away": (b"\x80\x02Nr\xff\xff\xff\xff0j\xff\xff\xff\xff.", type(None)),
    "memo of each": (b"\x80\x04" + b"N\x94" * 60_000 + b"0" * 59_999 + b".", type(None)),
    "a long text many times": (b"\x80\x02](" + u(b"a" * 100_000) + b"q\x00" + b"h\x00" * 100_000 + b"e.", list),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_depth_and_sharing_cost_what_they_take_in_the_file(name: str) -> None:
    data, kind = NESTED[name]
    tracemalloc.start()
    assert type(READER.read(data)) is kind
    assert tracemalloc.get_traced_memory()[1] < 200 * len(data) + 10**5
    tracemalloc.stop()


def test_what_hashes_slowly_is_no_key() -> None:
    nested = b"\x80\x02}N" + b"2\x86" * 300 + b"Ns."
    assert "kind tuple as a key" in refusal(nested)
    many = b"\x80\x02}(" + b"".join(b"M" + struct.pack("<H", n) + b"\x85N" for n in range(MOST_TUPLE_KEYS + 1)) + b"u."
    assert "more than 10000 tuples as keys" in refusal(many)


@given(st.data())
def test_a_changed_pickle_is_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(
        pickle.dumps(
            {"a": [1, 2.5, ("b", b"c")], "n": argparse.Namespace(x=1), "d": collections.OrderedDict(k=1)},
            data.draw(st.integers(2, 4)),
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    try:
        TOLERANT.read(bytes(raw))
    except InputError as error:
        assert "\n" not in str(error)
