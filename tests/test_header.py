"""The format in literal bytes: what is read, what is refused, and what the message says."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tests.build import BITS, Tensor, entry, file_bytes, load, save, tensor
from tpshard import header as header_module
from tpshard.errors import InputError, StorageError
from tpshard.header import DTYPE_BITS, MAX_HEADER, Entry, byte_count, header_bytes, read_header

ONE = {"a": entry("F32", [1], 0, 4)}
GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f3e\nsize 90868376\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.safetensors"


def refusal(path: Path, raw: bytes) -> str:
    """The message about a file of these bytes, without its path."""
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: "), "every message names the file"
    assert "\n" not in message
    assert len(message) < 600
    return message.removeprefix(f"{path}: ")


# ---------------------------------------------------------------------------------------------- what is read


def test_by_hand(path: Path) -> None:
    raw = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(12))
    found = read_header(path)
    assert dict(found.entries) == {"w": Entry("BF16", (2, 3), 8 + len(raw), 12)}
    assert found.metadata == {"format": "pt"}
    assert (found.data_start, found.file_size) == (8 + len(raw), 8 + len(raw) + 12)


def test_every_dtype(path: Path) -> None:
    assert set(DTYPE_BITS) == set(BITS)
    save(path, {dtype: tensor(dtype, (3, 8)) for dtype in BITS})
    assert {name: held.size for name, held in read_header(path).entries.items()} == {
        dtype: 24 * bits // 8 for dtype, bits in BITS.items()
    }


def test_tensors_lie_in_the_order_of_their_data(path: Path) -> None:
    path.write_bytes(file_bytes({"b": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1)}, b"ab"))
    assert list(read_header(path).entries) == ["a", "b"]


def test_tensors_without_cells_share_an_offset(path: Path) -> None:
    save(
        path,
        {
            "a": Tensor("F32", (0, 5), b""),
            "b": tensor("F32", (2,)),
            "c": Tensor("I64", (3, 0), b""),
            "d": Tensor("U8", (0,), b""),
        },
    )
    assert [(name, held.shape, held.size) for name, held in read_header(path).entries.items()] == [
        ("a", (0, 5), 0), ("b", (2,), 8), ("c", (3, 0), 0), ("d", (0,), 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": None},
        {"__metadata__": {}},
        {"__metadata__": {"": ""}},
        {"__metadata__": {"a": "\x1b\u202e"}},
    ],
)
def test_files_without_tensors_and_odd_metadata(path: Path, header: dict[str, Any]) -> None:
    path.write_bytes(file_bytes(header))
    assert dict(read_header(path).entries) == {}


def test_a_scalar(path: Path) -> None:
    path.write_bytes(file_bytes({"a": entry("F64", [], 0, 8)}, bytes(8)))
    assert read_header(path).entries["a"].shape == ()


@pytest.mark.parametrize("length", [640, 0x0280 + 0x10000, 0x8B1F, 0x0480])
def test_a_header_whose_length_looks_like_another_format(path: Path, length: int) -> None:
    """640 is written 80 02, as a pickle begins; 35615 is written 1f 8b, as gzip does."""
    raw = json.dumps(ONE).encode().ljust(length)
    path.write_bytes(file_bytes(raw, b"1234"))
    assert list(read_header(path).entries) == ["a"]


@pytest.mark.parametrize("name", ["w", "a b", "a/b", "a..b", "ünïcode", "层.0", "a" * 1024, "日本/語", "emoji🙂"])
def test_names_that_are_odd_but_honest(path: Path, name: str) -> None:
    path.write_bytes(file_bytes({name: entry("U8", [1], 0, 1)}, b"1"))
    assert list(read_header(path).entries) == [name]


def test_names_that_differ_in_case_are_two(path: Path) -> None:
    path.write_bytes(file_bytes({"w": entry("U8", [1], 0, 1), "W": entry("U8", [1], 1, 2)}, b"12"))
    assert list(read_header(path).entries) == ["w", "W"]


def test_sixteen_dimensions(path: Path) -> None:
    path.write_bytes(file_bytes({"a": entry("U8", [1] * 16, 0, 1)}, b"1"))
    assert read_header(path).entries["a"].shape == (1,) * 16


def test_a_file_of_a_terabyte_is_not_read(path: Path) -> None:
    """Sparse; only the header counts."""
    size = 2**40
    path.write_bytes(file_bytes({"a": entry("U8", [2**20, 2**20], 0, size)}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    assert read_header(path).entries["a"].size == size


# ---------------------------------------------------------------------------------------------- what is refused

TWICE = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"%s":{"dtype":"%s","shape":[1],"data_offsets":[%s]}}'
FIELDS = "has the fields {}, not dtype, shape, data_offsets"
COUNTS = "must be whole numbers from 0, two of them offsets"

REFUSED: dict[str, tuple[bytes, str]] = {
    "0 bytes": (b"", "has 0 bytes, a safetensors file has at least 8 (it is truncated)"),
    "7 bytes": (b"\x01" * 7, "has 7 bytes, a safetensors file has at least 8"),
    "header length 0": (struct.pack("<Q", 0) + bytes(8), "the header does not begin with '{'"),
    "header length 2^64 - 1": (b"\xff" * 16, f"header of {2**64 - 1} bytes, the format allows {MAX_HEADER} (is it safetensors?)"),
    "header length 2^63": (struct.pack("<Q", 2**63) + b"{}", f"header of {2**63} bytes, the format allows"),
    "header of 100,000,001 bytes": (file_bytes(b"{}", length=MAX_HEADER + 1), "header of 100000001 bytes, the format allows 100000000"),
    "header longer than the file": (file_bytes(b"{}", length=50), "header promises 50 bytes, the file has 2 (it is truncated)"),
    "header longer by one": (file_bytes(b"{}", length=3), "header promises 3 bytes, the file has 2"),
    "header not UTF-8": (file_bytes(b'{"a\xff":1}'), "header: is not UTF-8 (byte 3)"),
    "header not JSON": (file_bytes(b"{nope"), "header: is not JSON: Expecting property name"),
    "header cut off": (file_bytes(b'{"a":{"dtype"'), "header: is not JSON: "),
    "header a list": (file_bytes(b"[]"), "the header does not begin with '{'"),
    "header a number": (file_bytes(b"3"), "the header does not begin with '{'"),
    "space before": (file_bytes(b" " + json.dumps(ONE).encode(), b"1234"), "the header does not begin with '{'"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "the header does not begin with '{'"),
    "NUL after": (file_bytes(json.dumps(ONE).encode() + b"\0", b"1234"), "header: is not JSON: Extra data"),
    "junk after": (file_bytes(json.dumps(ONE).encode() + b"{}", b"1234"), "header: is not JSON: Extra data"),
    "100,000 levels": (file_bytes(b'{"a":' * 100_000), "header: is nested too deeply"),
    "integer of 5000 digits": (file_bytes(b'{"a":' + b"9" * 5000 + b"}"), "header: holds an integer of more than 4300 digits"),
    "duplicate tensor": (file_bytes(TWICE % ("a", "F32", "0,4"), b"1234"), "header: key 'a' appears twice"),
    "duplicate tensor, other dtype": (file_bytes(TWICE % ("a", "I32", "0,4"), b"1234"), "header: key 'a' appears twice"),
    "duplicate tensor, escaped": (file_bytes(TWICE % ("\\u0061", "F32", "4,8"), b"12345678"), "header: key 'a' appears twice"),
    "duplicate metadata": (file_bytes('{"__metadata__":{},"__metadata__":{}}'), "header: key '__metadata__' appears twice"),
    "duplicate key in metadata": (file_bytes('{"__metadata__":{"a":"b","a":"c"}}'), "header: key 'a' appears twice"),
    "duplicate field": (file_bytes('{"a":{"dtype":"F32","dtype":"F64","shape":[],"data_offsets":[0,4]}}', b"1234"), "header: key 'dtype' appears twice"),
    "overlap": (file_bytes({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, b"123456"), "b: overlaps a (at byte 2 of the data, expected at 4)"),
    "same place twice": (file_bytes({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"1234"), "b: overlaps a (at byte 0 of the data, expected at 4)"),
    "hole": (file_bytes({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 5, 9)}, b"123456789"), "b: leaves a hole after a (at byte 5 of the data, expected at 4)"),
    "hole at the front": (file_bytes({"a": entry("F32", [1], 4, 8)}, b"12345678"), "a: leaves a hole after the header (at byte 4 of the data, expected at 0)"),
    "hole before no cells": (file_bytes({"a": entry("F32", [0], 4, 4)}, b"1234"), "a: leaves a hole after the header"),
    "bytes behind": (file_bytes(ONE, b"12345"), "1 bytes follow the last tensor, which ends at byte "),
    "bytes behind no tensor": (file_bytes({}, b"12345"), "5 bytes follow the last tensor"),
    "truncated": (file_bytes(ONE, b"123"), "a ends at byte 66, the file at 65 (it is truncated)"),
    "offsets reversed": (file_bytes({"a": entry("F32", [1], 4, 0)}, b"1234"), "a: shape [1] of F32 takes 4 bytes, its offsets are 4 and 0"),
    "offsets negative": (file_bytes({"a": entry("F32", [1], -4, 0)}, b"1234"), f"a: shape [1], data_offsets [-4, 0]: {COUNTS}"),
    "offsets float": (file_bytes({"a": entry("F32", [1], 0.0, 4.0)}, b"1234"), f"a: shape [1], data_offsets [0.0, 4.0]: {COUNTS}"),  # type: ignore[arg-type]
    "offsets text": (file_bytes({"a": entry("F32", [1], "0", "4")}, b"1234"), f"a: shape [1], data_offsets ['0', '4']: {COUNTS}"),  # type: ignore[arg-type]
    "offsets true": (file_bytes({"a": entry("U8", [1], False, True)}, b"1"), f"data_offsets [False, True]: {COUNTS}"),
    "three offsets": (file_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, b"1234"), COUNTS),
    "no offsets": (file_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": None}}, b"1234"), COUNTS),
    "offsets beyond 2^64": (file_bytes({"a": entry("F32", [1], 2**64, 2**64 + 4)}, b"1234"), "a: leaves a hole after the header"),
    "shape product overflows": (file_bytes({"a": entry("F32", [2**40, 2**40], 0, 4)}, b"1234"), "a: shape [1099511627776, 1099511627776] of F32 takes"),
    "0 x 2^62": (file_bytes({"a": entry("F32", [0, 2**62], 0, 0)}), "a: shape [0, 4611686018427387904] is beyond any file"),
    "shape and offsets disagree": (file_bytes({"a": entry("F32", [2], 0, 4)}, b"1234"), "a: shape [2] of F32 takes 8 bytes, its offsets are 0 and 4"),
    "shape float": (file_bytes({"a": entry("F32", [1.0], 0, 4)}, b"1234"), f"a: shape [1.0], data_offsets [0, 4]: {COUNTS}"),  # type: ignore[list-item]
    "shape negative": (file_bytes({"a": entry("F32", [-1], 0, 4)}, b"1234"), COUNTS),
    "shape two negatives": (file_bytes({"a": entry("F32", [-1, -1], 0, 4)}, b"1234"), COUNTS),
    "shape NaN": (file_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"), COUNTS),
    "shape a number": (file_bytes({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"1234"), COUNTS),
    "70 dimensions": (file_bytes({"a": entry("F32", [1] * 70, 0, 4)}, b"1234"), "a: 70 dimensions, at most 16 are read"),
    "unknown dtype": (file_bytes({"a": entry("F128", [1], 0, 16)}, b"1" * 16), "a: dtype F128 is unknown"),
    "lower-case dtype": (file_bytes({"a": entry("f32", [1], 0, 4)}, b"1234"), "a: dtype f32 is unknown"),
    "dtype a number": (file_bytes({"a": entry(3, [1], 0, 4)}, b"1234"), "a: dtype 3 is unknown"),  # type: ignore[arg-type]
    "dtype a list": (file_bytes({"a": entry(["F32"], [1], 0, 4)}, b"1234"), "a: dtype ['F32'] is unknown"),  # type: ignore[arg-type]
    "dtype with an escape": (file_bytes({"a": entry("\x1b[31m", [1], 0, 4)}, b"1234"), "a: dtype \\x1b[31m is unknown"),
    "odd four-bit shape": (file_bytes({"a": entry("F4", [3], 0, 2)}, b"12"), "a: shape [3] of F4 has 12 bits, which is not a whole number of bytes"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}, **ONE}, b"1234"), "__metadata__ is not a table of texts"),
    "metadata a tensor": (file_bytes({"__metadata__": entry("F32", [1], 0, 4)}, b"1234"), "__metadata__ is not a table of texts"),
    "metadata a list": (file_bytes({"__metadata__": ["a"], **ONE}, b"1234"), "__metadata__ is not a table of texts"),
    "extra field": (file_bytes({"a": {**ONE["a"], "x": 1}}, b"1234"), "a: " + FIELDS.format("['data_offsets', 'dtype', 'shape', 'x']")),
    "missing field": (file_bytes({"a": {"dtype": "F32", "shape": [1]}}), "a: " + FIELDS.format("['dtype', 'shape']")),
    "tensor a number": (file_bytes({"a": 3}), "a: " + FIELDS.format("[]")),
    "tensor null": (file_bytes({"a": None}), "a: " + FIELDS.format("[]")),
    "Git LFS pointer": (GIT_LFS, "is a Git LFS pointer, not the weights (run: git lfs pull)"),
    "gzip": (b"\x1f\x8b\x08" + bytes(5) + b"0" * 30, "is a gzip file, not safetensors"),
    "zip": (b"PK\x03\x04" + b"0" * 30, "is a zip or PyTorch file, not safetensors"),
    "pickle": (b"\x80\x02}q\x00." + b"0" * 30, "is a pickle, not safetensors"),
    "pickle 4": (b"\x80\x04\x95" + b"0" * 30, "is a pickle, not safetensors"),
    "HTML": (b"<!DOCTYPE html><html>Not Found</html>", "the format allows 100000000 (is it safetensors?)"),
    "GGUF": (b"GGUF" + struct.pack("<IQ", 3, 291), "the format allows 100000000 (is it safetensors?)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=REFUSED.keys())
def test_refused(path: Path, case: str) -> None:
    raw, message = REFUSED[case]
    assert message in refusal(path, raw)


NAMES = {
    "": "a tensor has an empty name",
    "../../etc/passwd": "tensor name '../../etc/passwd' is a path",
    "/etc/passwd": "tensor name '/etc/passwd' is a path",
    "a/../b": "is a path",
    "..": "is a path",
    "\\\\host\\share": "is a path",
    "a\\..\\b": "is a path",
    "a\0b": "tensor name 'a\\x00b' holds control characters",
    "a\nb": "tensor name 'a\\nb' holds control characters",
    "a\rb": "holds control characters",
    "\x1b[31mred": "tensor name '\\x1b[31mred' holds control characters",
    "a\x9bb": "holds control characters",
    "a\u202eb": "tensor name 'a\\u202eb' holds control characters",
    "a\u061cb": "holds control characters",
    "a\u200bb": "holds control characters",
    "a\u2028b": "holds control characters",
    "a\ufeff": "holds control characters",
    "x" * 1025: "a tensor's name has 1025 characters, at most 1024 are read",
    "x" * 1_000_000: "a tensor's name has 1000000 characters, at most 1024 are read",
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12].encode("unicode_escape").decode() or "empty")
def test_names_that_fool(path: Path, name: str) -> None:
    assert NAMES[name] in refusal(path, file_bytes({name: entry("U8", [1], 0, 1)}, b"1"))


def test_half_a_character_in_a_name(path: Path) -> None:
    raw = b'{"a\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert "tensor name 'a\\ud800' holds control characters" in refusal(path, file_bytes(raw, b"1"))


@pytest.mark.parametrize("pair", [("\u00e9", "e\u0301"), ("K", "\u212a"), ("\u212b.x", "\u00c5.x")])
def test_names_that_look_the_same(path: Path, pair: tuple[str, str]) -> None:
    header = {pair[0]: entry("U8", [1], 0, 1), pair[1]: entry("U8", [1], 1, 2)}
    assert "two tensor names differ only in how " in refusal(path, file_bytes(header, b"12"))


def test_too_many_tensors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "MAX_TENSORS", 100)
    raw = file_bytes({f"t{n}": entry("U8", [1], n, n + 1) for n in range(101)}, bytes(101))
    assert refusal(path, raw) == "101 tensors in one file, at most 100 are read"


@pytest.mark.slow
def test_a_quarter_of_a_million_tensors(path: Path) -> None:
    raw = file_bytes({f"t{n}": entry("U8", [1], n, n + 1) for n in range(250_001)}, bytes(250_001))
    assert refusal(path, raw) == "250001 tensors in one file, at most 250000 are read"


# ---------------------------------------------------------------------------------------------- what is not a file


def test_not_there(path: Path) -> None:
    with pytest.raises(InputError, match="is not there"):
        read_header(path)


def test_a_dangling_link_of_the_cache(path: Path) -> None:
    path.symlink_to("../../blobs/0f3e")
    with pytest.raises(InputError, match=r"is a link to a file that is not there \(download it again\)"):
        read_header(path)


def test_a_link_of_the_cache(path: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    save(tmp_path / "blobs" / "0f3e", {"a": tensor("F32", (3,))})
    path.symlink_to("blobs/0f3e")
    assert list(read_header(path).entries) == ["a"]


def test_a_circle_of_links(path: Path) -> None:
    path.symlink_to(path.name)
    with pytest.raises(StorageError, match="symbolic links"):
        read_header(path)


def test_a_folder(path: Path) -> None:
    path.mkdir()
    with pytest.raises(InputError, match="is not a regular file"):
        read_header(path)


def test_a_pipe_does_not_hang(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(InputError, match="is not a regular file"):
        read_header(path)


def test_a_socket(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
        with pytest.raises(InputError, match="is not a regular file"):
            read_header(path)


def test_a_device() -> None:
    with pytest.raises(InputError, match="/dev/zero: is not a regular file"):
        read_header(Path("/dev/zero"))


def test_unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, {"a": tensor("F32", (3,))})

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        read_header(path)


def test_a_disk_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, {"a": tensor("F32", (3,))})

    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *_: Failing())
    with pytest.raises(StorageError, match="Input/output error"):
        read_header(path)


# ---------------------------------------------------------------------------------------------- writing


def test_headers_are_written_as_safetensors_writes_them(path: Path) -> None:
    arrays = {"b.weight": np.zeros((3, 5), np.float32), "a": np.zeros((), np.float64), "n": np.zeros((0, 2), np.int8)}
    theirs = safetensors.numpy.save(arrays, {"format": "pt"})
    path.write_bytes(theirs)
    found = read_header(path)
    ours = header_bytes(((name, held.dtype, held.shape) for name, held in found.entries.items()), found.metadata)
    assert theirs.startswith(ours)
    assert len(theirs) == len(ours) + sum(array.nbytes for array in arrays.values())


def test_metadata_is_sorted() -> None:
    assert header_bytes([], {"b": "1", "a": "2"}) == header_bytes([], {"a": "2", "b": "1"})
    assert header_bytes([], {}) == struct.pack("<Q", 8) + b"{}      "


def test_a_header_beyond_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "MAX_HEADER", 100)
    with pytest.raises(InputError, match="a header of 104 bytes would be needed, the format allows 100"):
        header_bytes([("a" * 50, "F32", (1,))], {})


def test_byte_count() -> None:
    assert byte_count("F4", (3, 2)) == 3
    assert byte_count("F6_E2M3", (4,)) == 3
    assert byte_count("F64", ()) == 8
    with pytest.raises(InputError, match=r"shape \[3\] of F4 has 12 bits"):
        byte_count("F4", (3,))


names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=12)
tensors = st.dictionaries(
    names.filter(lambda name: not name.startswith(("/", "\\")) and ".." not in name and name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


@given(tensors, st.dictionaries(st.text("abc", min_size=1, max_size=3), st.text('xyz"\\\n', max_size=4), max_size=3))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    held = [(name, dtype, (*shape, 8)) for name, (dtype, shape) in wanted.items()]
    size = sum(byte_count(dtype, shape) for _, dtype, shape in held)
    path.write_bytes(header_bytes(held, metadata) + bytes(size))
    try:
        found = read_header(path)
    except InputError as error:
        assert "differ only in how" in error.message
        return
    assert {(name, entry.dtype, entry.shape) for name, entry in found.entries.items()} == set(held)
    assert found.metadata == metadata
    assert set(load(path)) == set(wanted)


@given(st.binary(max_size=60), st.integers(0, 40), st.integers(0, 255))
def test_no_bytes_make_it_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, byte: int
) -> None:
    """A changed byte, or junk, is read or refused; nothing else happens."""
    path = tmp_path_factory.getbasetemp() / "junk.safetensors"
    good = file_bytes(ONE, b"1234")
    for raw in (junk, file_bytes(junk), good[:at] + bytes([byte]) + good[at + 1 :], good[:at], good + junk):
        path.write_bytes(raw)
        try:
            read_header(path)
        except InputError as error:
            assert "\n" not in str(error)
