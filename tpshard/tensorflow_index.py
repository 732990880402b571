"""The index of a TensorFlow checkpoint, read without TensorFlow: which tensor lies where in the data files.

``PREFIX.index`` is a sorted string table as LevelDB writes it: blocks of entries whose keys share a prefix with the
one before, a block that lists the blocks, and a footer of 48 bytes that says where that is. The key "" has a
BundleHeaderProto, every other key a BundleEntryProto. Nothing in the file is believed before it is checked.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tpshard.errors import InputError, printable
from tpshard.header import MAX_DIMENSIONS, MAX_TENSORS
from tpshard.layout import Shape

MAX_INDEX = 256 * 2**20
MAGIC = 0xDB4775248B80FB57
FOOTER, TRAILER = 48, 5
STRING = 7
DTYPES: Mapping[int, str] = {
    1: "F32", 2: "F64", 3: "I32", 4: "U8", 5: "I16", 6: "I8", 9: "I64", 10: "BOOL", 14: "BF16", 17: "U16", 19: "F16",
    22: "U32", 23: "U64", 24: "F8_E5M2", 25: "F8_E4M3",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """``dtype`` is TensorFlow's number; ``sliced``: a partitioned variable, whose parts have entries of their own."""

    dtype: int
    shape: Shape
    shard: int
    offset: int
    size: int
    sliced: bool


@dataclass(frozen=True, slots=True)
class BundleIndex:
    shards: int
    entries: Mapping[str, IndexEntry]


class _BrokenError(Exception):
    """The bytes are not what they have to be."""


def parse_index(raw: bytes, where: str) -> BundleIndex:
    """A whole ``.index``. Raises InputError that begins with ``where``."""
    try:
        return _parse(raw)
    except (_BrokenError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{where}: is not a TensorFlow index: {printable(str(error))}", hint="is it whole?") from None


def _parse(raw: bytes) -> BundleIndex:
    if len(raw) < FOOTER or struct.unpack("<Q", raw[-8:])[0] != MAGIC:
        raise _BrokenError("it does not end as one")
    footer = raw[-FOOTER:-8]
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)
    begin, at = _varint(footer, at)
    size, _ = _varint(footer, at)
    shards, entries = -1, dict[str, IndexEntry]()
    end, last = 0, b""
    for _, handle in _block(raw, begin, size):
        block_begin, at = _varint(handle, 0)
        block_size, _ = _varint(handle, at)
        if block_begin < end:  # a block named again and again would take time without end
            raise _BrokenError(f"a block begins at byte {block_begin}, the one before it ends at {end}")
        end = block_begin + block_size
        for key, value in _block(raw, block_begin, block_size):
            if key <= last and (key or shards >= 0 or entries):
                raise _BrokenError("its keys are not in order")
            last = key
            if not key:
                shards = _header(value)
            elif key.startswith(b"\0"):
                continue  # a part of a partitioned variable, which has an entry of its own
            elif len(entries) >= MAX_TENSORS:
                raise _BrokenError(f"more than {MAX_TENSORS} tensors")
            else:
                entries[key.decode("utf-8")] = _entry(value)
    if shards < 1:
        raise _BrokenError("it has no header")
    return BundleIndex(shards, entries)


def _block(raw: bytes, begin: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """A block's keys and values."""
    if begin + size + TRAILER > len(raw):
        raise _BrokenError(f"a block ends at byte {begin + size + TRAILER}, the file has {len(raw)}")
    if raw[begin + size]:
        raise _BrokenError("a block is compressed")
    block = raw[begin : begin + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    end, at, key = len(block) - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + own + length > end:
            raise _BrokenError("an entry is longer than its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _BrokenError("a number has more than 10 bytes")


def fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer's message: their numbers, and values as numbers or bytes."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, at = _varint(raw, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _BrokenError(f"a field of kind {kind}")
        if at + length > len(raw):
            raise _BrokenError("a field is longer than its message")
        yield tag >> 3, raw[at : at + length]
        at += length


def _header(raw: bytes) -> int:
    shards = 0
    for number, value in fields(raw):
        if number == 1 and isinstance(value, int):
            shards = value
        elif number == 2 and value != 0:
            raise _BrokenError("its numbers are big-endian")
    return shards


def _entry(raw: bytes) -> IndexEntry:
    found = {1: 0, 3: 0, 4: 0, 5: 0}
    shape: Shape = ()
    sliced = False
    for number, value in fields(raw):
        if number in found and isinstance(value, int):
            found[number] = value
        elif number == 2 and isinstance(value, bytes):
            shape = _shape(value)
        elif number == 7:
            sliced = True
    if max(found.values()) >= 2**63:
        raise _BrokenError("a number is beyond any file")
    return IndexEntry(found[1], shape, found[3], found[4], found[5], sliced)


def _shape(raw: bytes) -> Shape:
    sizes = []
    for number, value in fields(raw):
        if number == 2 and isinstance(value, bytes):
            sizes.append(next((n for field, n in fields(value) if field == 1 and isinstance(n, int)), 0))
    if len(sizes) > MAX_DIMENSIONS or any(size >= 2**48 for size in sizes) or math.prod(sizes) >= 2**63:
        raise _BrokenError(f"a shape of {len(sizes)} axes is beyond any model")
    return tuple(sizes)


def object_graph(raw: bytes, where: str) -> dict[str, str]:
    """Variables' full names by their keys, of the tensor ``_CHECKPOINTABLE_OBJECT_GRAPH`` as it is stored: lengths of
    the texts, a checksum of 4 bytes, the texts; here one, a TrackableObjectGraph. Raises InputError."""
    names: dict[str, str] = {}
    try:
        length, at = _varint(raw, 0)
        if at + 4 + length != len(raw):
            raise _BrokenError(f"{length} bytes are said, {len(raw) - at - 4} are there")
        for number, node in fields(raw[at + 4 :]):
            for inner, attribute in fields(node) if number == 1 and isinstance(node, bytes) else ():
                if inner == 2 and isinstance(attribute, bytes):
                    texts = {n: text.decode("utf-8") for n, text in fields(attribute) if isinstance(text, bytes)}
                    if texts.get(3) and texts.get(2):
                        names[texts[3]] = texts[2]
    except (_BrokenError, IndexError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: the graph of its objects cannot be read: {printable(str(error))}") from None
    return names
