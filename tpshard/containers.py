"""A checkpoint in a container of another kind: tensors in files that hold more than tensors.

Merging makes these files again, byte for byte: what lies around the tensors is kept when they are cut. So nobody has
to write HDF5, zip or a TensorFlow index, and whatever else is in such a file, of whatever version, comes back.
"""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpshard.errors import InputError, StorageError, printable
from tpshard.folder import CONFIG
from tpshard.frames import Fixed, Frame, Tensor
from tpshard.header import Entry, Header, parse_json_object

FRAME_SUFFIX = ".frame"
INSIDE_KEY = "tpshard.config"  # "inside": config.json was taken out of it
FORMAT = "tpshard-frame"
MAX_KEPT = 256 * 2**20  # bytes around a file's tensors: bounds memory
MAX_LISTED = 256 * 2**20  # bytes of the list of a frame file


@dataclass(frozen=True, slots=True)
class Container:
    """A checkpoint that is no safetensors folder. ``files``: by their paths in ``folder``, with their tensors under
    the names used here; ``config``: the model's configuration as it was found, if it was, in the file itself or as
    config.json beside it; ``beside``: other files that belong to it, by their paths in ``folder``; ``named``: the
    file was named, so that the folder's other files are not its own."""

    folder: Path
    files: Mapping[str, Header]
    config: bytes | None = None
    config_is_inside: bool = False
    beside: tuple[str, ...] = ()
    named: bool = False
    warnings: tuple[str, ...] = ()

    def around(self) -> dict[str, bytes]:
        """What goes into a shard folder, by name, so that merging makes the same files again. Raises InputError where
        it is too much, StorageError."""
        made = {f"{name}{FRAME_SUFFIX}": frame_file(self.folder / name, head) for name, head in self.files.items()}
        return made if self.config is None or not self.config_is_inside else {**made, CONFIG: self.config}


@dataclass(frozen=True, slots=True)
class Kept:
    """What a file is without its tensors: ``fixed`` around them, ``starts`` of them by name, ``size`` of all."""

    size: int
    starts: Mapping[str, int]
    fixed: tuple[Fixed, ...] = field(repr=False)

    def frame(self, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> Frame:
        """The file with these tensors, which have to be those that it was cut of. Raises InputError."""
        for tensor in tensors:
            if tensor.name not in self.starts:
                raise InputError(f"{printable(tensor.name)}: the original file has no place for it")
        missing = set(self.starts) - {tensor.name for tensor in tensors}
        if missing:
            raise InputError(f"{printable(min(missing))}: has a place in the original file, and is not there")
        return Frame(self.fixed, tuple(self.starts[tensor.name] for tensor in tensors), self.size)


def checked(path: Path, size: int, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Header:
    """A file's tensors in the order of their data. Raises InputError where they overlap or end beyond the file."""
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)))
    end, before = 0, "the file"
    for name, entry in ordered.items():
        if entry.size and entry.offset < end:
            raise InputError(f"{path}: {printable(name)} begins at {entry.offset}, inside {printable(before)}")
        if entry.offset < 0 or entry.offset + entry.size > size:
            what = f"ends at byte {entry.offset + entry.size}, the file has {size}"
            raise InputError(f"{path}: {printable(name)} {what}", hint="it is truncated")
        if entry.size:
            end, before = entry.offset + entry.size, name
    return Header(ordered, metadata, 0, size)


def gaps(header: Header) -> list[tuple[int, int]]:
    """What lies around the tensors, as offsets and sizes.

    >>> gaps(Header({"a": Entry("U8", (3,), 4, 3)}, {}, 0, 9))
    [(0, 4), (7, 2)]
    """
    found, end = [], 0
    for entry in header.entries.values():
        if entry.size:
            found.append((end, entry.offset - end))
            end = entry.offset + entry.size
    found.append((end, header.file_size - end))
    return [gap for gap in found if gap[1]]


def frame_file(path: Path, header: Header) -> bytes:
    """What is kept of a weight file, as a file: u64 length, JSON, and the bytes around the tensors, deflated.

    Raises InputError where that is too much to hold, StorageError.
    """
    around = gaps(header)
    total = sum(size for _, size in around)
    if total > MAX_KEPT:
        what = f"{total} bytes are no tensors, at most {MAX_KEPT} can be kept"
        raise InputError(f"{path}: {what}", hint="save it again: deleted data may take the space")
    try:
        with path.open("rb") as file:
            parts = []
            for offset, size in around:
                file.seek(offset)
                parts.append(file.read(size))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    if sum(map(len, parts)) != total:
        raise StorageError(f"{path}: was changed while it was being read", hint="run again")
    listed = {
        "format": FORMAT,
        "version": 1,
        "size": header.file_size,
        "around": [list(gap) for gap in around],
        "starts": {name: entry.offset for name, entry in header.entries.items()},
    }
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return struct.pack("<Q", len(text)) + text + zlib.compress(b"".join(parts), 6)


def read_frame(path: Path) -> Kept:
    """The inverse of frame_file. Raises InputError, StorageError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: is not there", hint="without it the original file cannot be made again") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    (length,) = struct.unpack("<Q", raw[:8]) if len(raw) >= 8 else (0,)
    if not 0 < length <= min(MAX_LISTED, len(raw) - 8):
        raise InputError(f"{path}: is not a frame file")
    listed = parse_json_object(raw[8 : 8 + length], str(path))
    try:
        return _kept(listed, raw[8 + length :])
    except (InputError, KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise InputError(f"{path}: is malformed: {printable(str(error))}") from None


def _kept(listed: Mapping[str, Any], deflated: bytes) -> Kept:
    if listed["format"] != FORMAT or listed["version"] != 1:
        raise ValueError("another format or version")
    size, around, starts = _count(listed["size"]), listed["around"], listed["starts"]
    places = [(_count(offset), _count(length)) for offset, length in around]
    total = sum(length for _, length in places)
    if total > MAX_KEPT or any(a + n > b for (a, n), (b, _) in itertools.pairwise([*places, (size, 0)])):
        raise ValueError("the parts around the tensors do not fit")
    stream = zlib.decompressobj()
    content = stream.decompress(deflated, total + 1)
    if len(content) != total or not stream.eof:
        raise ValueError(f"{total} bytes around the tensors, {len(content)} are there")
    fixed, done = [], 0
    for offset, length in places:
        fixed.append((offset, content[done : done + length]))
        done += length
    return Kept(size, {str(name): _count(start) for name, start in starts.items()}, tuple(fixed))


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value
