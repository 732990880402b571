"""Where the members of a zip file lie, for reading them in place: only files whose members are stored as they are.

A zip file says everything twice, at the end and before each member, and readers differ in what they believe. Here
both must agree, and everything must have one reading: no name twice, no member in another, no bytes after the end.
Format: PKWARE's APPNOTE, 4.3 to 4.5.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpshard.errors import InputError, StorageError, printable

MOST_MEMBERS = 1_000_000
LARGEST_DIRECTORY = 512 * 2**20  # bytes; bounds memory
UNKNOWN = 0xFFFFFFFF  # what stands in 32 bits where the number is in the extra field
_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_HIDDEN = 0x0001 | 0x0040 | 0x2000  # encrypted in some way
_SIZES_FOLLOW = 0x0008

Read = Callable[[int, int], bytes]  # offset, count


@dataclass(frozen=True, slots=True)
class Member:
    """A member's own bytes: ``offset`` in the file, ``size``."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Said:
    """What the directory says of a member; ``begin``: of its local header."""

    name: bytes
    flags: int
    method: int
    size: int
    begin: int


def read_members(fd: int, size: int, path: Path, first: int = 0) -> Mapping[str, Member]:
    """The members of a zip file of ``size`` bytes, in the order of their bytes; ``first``: where in ``path`` it begins,
    if it is part of another file. Raises InputError, StorageError."""

    def read(offset: int, count: int) -> bytes:
        return read_exactly(fd, first + offset, count, path)

    begin, length, count = _directory(read, size, path)
    raw = read(begin, length)
    said = sorted(_entries(raw, count, path), key=lambda entry: entry.begin)
    members: dict[str, Member] = {}
    end = 0
    for entry in said:
        name = _checked_name(entry, path)
        if name in members:
            raise InputError(f"{path}: member '{printable(name)}' is there twice")
        if entry.begin < end:
            raise InputError(f"{path}: member '{printable(name)}' lies in the one before it")
        offset = _member(read, entry, begin, path, name)
        members[name] = Member(first + offset, entry.size)
        end = offset + entry.size
    return members


def read_exactly(fd: int, offset: int, count: int, path: Path) -> bytes:
    """Bytes of an open file. Raises StorageError where it ends or cannot be read."""
    parts, done = [], 0
    while done < count:
        try:
            part = os.pread(fd, min(count - done, 2**30), offset + done)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from None
        if not part:
            raise StorageError(f"{path}: ends at byte {offset + done}, {count - done} more were expected")
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _directory(read: Read, size: int, path: Path) -> tuple[int, int, int]:
    """Where the directory begins, its bytes and its entries."""
    at = size - _END.size
    raw = read(at, _END.size) if at >= 0 else b""
    if not raw.startswith(b"PK\x05\x06"):
        raise InputError(f"{path}: does not end as a zip file does", hint="it is truncated, or has bytes appended")
    _, disk, first, here, count, length, begin, comment = _END.unpack(raw)
    end = at
    if UNKNOWN in (length, begin) or count == 0xFFFF or _has_locator(read, at):
        end, here, count, length, begin = _directory_64(read, at, path)
    if disk or first or here != count or comment:
        raise InputError(f"{path}: is a zip file in several parts, or with a comment")
    if count > MOST_MEMBERS or length > LARGEST_DIRECTORY:
        raise InputError(
            f"{path}: a zip directory of {count} members and {length} bytes, at most {MOST_MEMBERS} and "
            f"{LARGEST_DIRECTORY} are read"
        )
    if begin + length != end:
        raise InputError(f"{path}: its zip directory ends at byte {begin + length}, expected at {end}")
    return begin, length, count


def _has_locator(read: Read, at: int) -> bool:
    begin = at - _LOCATOR_64.size
    return begin >= 0 and read(begin, 4) == b"PK\x06\x07"


def _directory_64(read: Read, at: int, path: Path) -> tuple[int, int, int, int, int]:
    where = at - _LOCATOR_64.size
    end = where - _END_64.size
    if end < 0 or not _has_locator(read, at):
        raise InputError(f"{path}: has a zip directory of 64 bits that is not there", hint="it is damaged")
    _, disk, said, disks = _LOCATOR_64.unpack(read(where, _LOCATOR_64.size))
    mark, _, _, _, own, first, here, count, length, begin = _END_64.unpack(read(end, _END_64.size))
    if mark != b"PK\x06\x06" or said != end or disk or own or first or disks > 1:
        raise InputError(f"{path}: the two ends of its zip directory differ", hint="it is damaged")
    return end, here, count, length, begin


def _entries(raw: bytes, count: int, path: Path) -> list[_Said]:
    found, at = [], 0
    for _ in range(count):
        if at + _CENTRAL.size > len(raw) or raw[at : at + 4] != b"PK\x01\x02":
            raise InputError(f"{path}: its zip directory holds fewer than {count} members", hint="it is damaged")
        (_, _, _, flags, method, _, _, _, stored, size, names, extras, comment, disk, _, _, begin) = (
            _CENTRAL.unpack_from(raw, at)
        )
        at += _CENTRAL.size
        name, extra = raw[at : at + names], raw[at + names : at + names + extras]
        at += names + extras + comment
        if at > len(raw):
            raise InputError(f"{path}: its zip directory ends in the middle", hint="it is damaged")
        size, stored, begin = _with_64(extra, [size, stored, begin], path)
        if disk or (size != stored and not method):
            raise InputError(f"{path}: member '{_shown(name)}' is said to have {size} and {stored} bytes")
        found.append(_Said(name, flags, method, size, begin))
    if at != len(raw):
        raise InputError(f"{path}: its zip directory holds more than {count} members", hint="it is damaged")
    return found


def _with_64(extra: bytes, numbers: list[int], path: Path) -> list[int]:
    """Size, stored size and place; those that do not fit 32 bits stand in the extra field 1, in this order."""
    if UNKNOWN not in numbers:
        return numbers
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        at += 4
        wanted = numbers.count(UNKNOWN)
        if kind == 1 and length >= 8 * wanted and at + length <= len(extra):
            given = iter(struct.unpack_from(f"<{wanted}Q", extra, at))
            return [next(given) if number == UNKNOWN else number for number in numbers]
        at += length
    raise InputError(f"{path}: a member's size or place is missing in its zip directory", hint="it is damaged")


def _checked_name(entry: _Said, path: Path) -> str:
    try:
        name = entry.name.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: member name '{_shown(entry.name)}' is not UTF-8") from None
    if not name or "\\" in name or "\x00" in name or name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{path}: member name '{_shown(entry.name)}' is a path")
    if entry.flags & _HIDDEN:
        raise InputError(f"{path}: member '{_shown(entry.name)}' is encrypted")
    if entry.method:
        raise InputError(f"{path}: member '{_shown(entry.name)}' is compressed, and cannot be read in place")
    return name


def _member(read: Read, entry: _Said, limit: int, path: Path, name: str) -> int:
    """Where its bytes begin, by its local header, which must agree with the directory."""
    if entry.begin + _LOCAL.size + len(entry.name) + entry.size > limit:
        raise InputError(
            f"{path}: member '{printable(name)}' of {entry.size} bytes reaches beyond the members", hint="truncated?"
        )
    raw = read(entry.begin, _LOCAL.size + len(entry.name))
    mark, _, flags, method, _, _, _, stored, size, names, extras = _LOCAL.unpack_from(raw)
    if mark != b"PK\x03\x04" or names != len(entry.name) or raw[_LOCAL.size :] != entry.name:
        raise InputError(f"{path}: member '{printable(name)}' has another name, or none, where it begins")
    known = (entry.size, UNKNOWN, 0) if flags & _SIZES_FOLLOW else (entry.size, UNKNOWN)
    if method != entry.method or flags & _HIDDEN or stored not in known or size not in known:
        raise InputError(f"{path}: member '{printable(name)}' is described otherwise where it begins")
    offset: int = entry.begin + _LOCAL.size + names + extras
    if offset + entry.size > limit:
        raise InputError(
            f"{path}: member '{printable(name)}' of {entry.size} bytes reaches beyond the members", hint="truncated?"
        )
    return offset


def _shown(name: bytes) -> str:
    return printable(name.decode("utf-8", "backslashreplace"))
