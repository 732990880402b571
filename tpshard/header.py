"""The safetensors header: what one file says it holds, with the format's rules enforced in one place.

A file is ``u64 length N | N bytes of JSON | data``. The JSON maps a name to ``{dtype, shape, data_offsets}``, offsets
counted from the end of the JSON; ``__metadata__`` maps strings to strings. Everything is checked here, so that the
message names the tensor and both numbers; the safetensors library is asked last, and must agree. Its reader accepts
some things that are wrong or dangerous: duplicate keys, names that are paths or carry control characters, absurd
shapes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import stat
import struct
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from tpshard.errors import InputError, StorageError, printable
from tpshard.layout import Shape
from tpshard.views import View

# Bits per element, in the order in which safetensors' writer sorts the tensors of a file: wide types first, so that
# every tensor is aligned to its own element.
DTYPE_BITS: Mapping[str, int] = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip
DTYPE_ORDER: Mapping[str, int] = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}

MAX_HEADER = 100_000_000  # the format's own limit
MAX_TENSORS = 250_000  # largest known checkpoint: 223,000 in all its files; bounds time and memory on hostile input
MAX_VALUES = 8_000_000  # of the header's JSON, ten for a tensor; each may take 100 bytes of memory
MAX_NAME = 1_024
MAX_DIMENSIONS = 16

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")
_OTHER_KINDS = {
    b"version https://git-lfs": ("is a Git LFS pointer, not the weights", "run: git lfs pull"),
    b"\x1f\x8b": ("is a gzip file, not safetensors", None),
    b"PK\x03\x04": ("is a zip or PyTorch file, not safetensors", None),
    b"\x80": ("is a pickle, not safetensors", None),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; ``offset`` is absolute, both in bytes. ``view``: where it is not one run."""

    dtype: str
    shape: Shape
    offset: int
    size: int
    view: View | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors in the order of their data, its metadata, and where the data begins."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


@functools.lru_cache(maxsize=1024)  # thousands of tensors share a few shapes
def byte_count(dtype: str, shape: Shape) -> int:
    """Bytes of a tensor. Raises InputError where a sub-byte dtype does not fill its last byte.

    >>> byte_count("BF16", (3, 5))
    30
    """
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise InputError(f"shape {list(shape)} of {dtype} has {bits} bits, which is not a whole number of bytes")
    return bits // 8


def read_header(path: Path) -> Header:
    """Read and check one file's header; no tensor is read.

    Raises InputError (what is wrong with the file) or StorageError (it could not be read).
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            raw, data_start = _header_bytes(file, info.st_size, path)
    except FileNotFoundError:
        broken = path.is_symlink()
        what = "is a link to a file that is not there" if broken else "is not there"
        raise InputError(f"{path}: {what}", hint="download it again" if broken else None) from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    header = _parse(raw, data_start, info.st_size, path)
    _ask_the_library(path, raw, data_start, info.st_size)
    return header


def _header_bytes(file: BinaryIO, size: int, path: Path) -> tuple[bytes, int]:
    head = file.read(64)
    if size < 8:
        raise InputError(f"{path}: has {size} bytes, a safetensors file has at least 8", hint="it is truncated")
    if len(head) < 8:
        raise StorageError(f"{path}: ends at byte {len(head)}, it had {size}", hint="was it changed just now?")
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER or 8 + length > size:  # only then: a header of 640 bytes begins like a pickle
        for start, (what, hint) in _OTHER_KINDS.items():
            if head.startswith(start):
                raise InputError(f"{path}: {what}", hint=hint)
    if length > MAX_HEADER:
        raise InputError(f"{path}: header of {length} bytes, the format allows {MAX_HEADER}", hint="is it safetensors?")
    if 8 + length > size:
        raise InputError(f"{path}: header promises {length} bytes, the file has {size - 8}", hint="it is truncated")
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        raise StorageError(f"{path}: ends at byte {8 + len(raw)}, it had {size} bytes", hint="was it changed just now?")
    return raw, 8 + length


def _ask_the_library(path: Path, raw: bytes, data_start: int, size: int) -> None:
    try:
        with _apart(raw, data_start, size) as there, safe_open(there, framework="numpy"):
            pass
    except SafetensorError as error:
        raise InputError(f"{path}: {printable(str(error))}") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None


@contextlib.contextmanager
def _apart(raw: bytes, data_start: int, size: int) -> Iterator[str]:
    """A file with the same header and size, of which the rest is a hole. The library maps what it opens: of a file that
    somebody cuts short at this moment, that would end the process."""
    in_memory = hasattr(os, "memfd_create")
    with open(os.memfd_create("header"), "wb") if in_memory else tempfile.NamedTemporaryFile() as file:
        file.write(struct.pack("<Q", data_start - 8) + raw)
        file.truncate(size)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}" if in_memory else file.name


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, anywhere in it. Raises InputError that begins with ``what``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise InputError(f"{what}: key '{printable(twice)}' appears twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{what}: is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise InputError(f"{what}: is nested too deeply") from None
    except ValueError:  # Python's own limit on the digits of an integer
        raise InputError(f"{what}: holds an integer of more than 4300 digits") from None
    if not isinstance(value, dict):
        raise InputError(f"{what}: is a JSON {type(value).__name__}, not an object")
    return value


def _parse(raw: bytes, data_start: int, file_size: int, path: Path) -> Header:
    if not raw.startswith(b"{"):
        raise InputError(f"{path}: the header does not begin with '{{'")
    values = sum(map(raw.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise InputError(f"{path}: header of up to {values} values, at most {MAX_VALUES} are read")
    table = parse_json_object(raw, f"{path}: header")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError(f"{path}: __metadata__ is not a table of texts")
    if len(table) > MAX_TENSORS:
        raise InputError(f"{path}: {len(table)} tensors in one file, at most {MAX_TENSORS} are read")
    check_names(table, str(path))
    entries: dict[str, Entry] = {}
    for name, value in table.items():
        try:
            entries[name] = _entry(value, data_start)
        except InputError as error:
            raise InputError(f"{path}: {printable(name)}: {error.message}") from None
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)))
    _check_covered(ordered, data_start, file_size, path)
    return Header(ordered, metadata, data_start, file_size)


def _entry(value: object, data_start: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        fields = sorted(value) if isinstance(value, dict) else []
        raise InputError(f"has the fields {printable(str(fields))}, not dtype, shape, data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(f"dtype {printable(str(dtype), 40)} is unknown")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        shown = printable(f"shape {shape}, data_offsets {offsets}")
        raise InputError(f"{shown}: must be whole numbers from 0, two of them offsets")
    if len(shape) > MAX_DIMENSIONS:
        raise InputError(f"{len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    if any(n >= 2**48 for n in shape):
        raise InputError(f"shape {shape} is beyond any file")
    begin, end = offsets
    size = byte_count(dtype, tuple(shape))
    if size != end - begin:
        raise InputError(f"shape {shape} of {dtype} takes {size} bytes, its offsets are {begin} and {end}")
    return Entry(dtype, tuple(shape), data_start + begin, size)


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _check_covered(entries: Mapping[str, Entry], data_start: int, file_size: int, path: Path) -> None:
    """Tensors must follow one another without hole or overlap, to the end of the file."""
    end, before = data_start, "the header"
    for name, entry in entries.items():
        if entry.offset != end:
            what = "overlaps" if entry.offset < end else "leaves a hole after"
            at = f"byte {entry.offset - data_start} of the data, expected at {end - data_start}"
            raise InputError(f"{path}: {printable(name)}: {what} {printable(before)} (at {at})")
        end, before = entry.offset + entry.size, name
    if end > file_size:
        raise InputError(
            f"{path}: {printable(before)} ends at byte {end}, the file at {file_size}", hint="it is truncated"
        )
    if end < file_size:
        raise InputError(f"{path}: {file_size - end} bytes follow the last tensor, which ends at byte {end}")


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse tensor names that no model has and that could fool a terminal, a path or a look-up."""
    seen: dict[str, str] = {}
    for name in names:
        if not name:
            raise InputError(f"{where}: a tensor has an empty name")
        if len(name) > MAX_NAME:
            raise InputError(f"{where}: a tensor's name has {len(name)} characters, at most {MAX_NAME} are read")
        if _CONTROL.search(name):
            raise InputError(f"{where}: tensor name '{printable(name)}' holds control characters")
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
            raise InputError(f"{where}: tensor name '{printable(name)}' is a path")
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            raise InputError(f"{where}: two tensor names differ only in how '{printable(name)}' is encoded")


def header_bytes(entries: Iterable[tuple[str, str, Shape]], metadata: Mapping[str, str]) -> bytes:
    """A header for tensors ``(name, dtype, shape)`` that follow one another in this order, length field included.

    Written as safetensors' own writer does, except that metadata keys are sorted: same input, same bytes.
    """
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        size = byte_count(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise InputError(f"a header of {len(raw)} bytes would be needed, the format allows {MAX_HEADER}")
    return struct.pack("<Q", len(raw)) + raw
