"""PyTorch's own files (.pt, .pth, .bin), read lazily and without PyTorch: where each tensor lies, and what is beside.

Nothing in the file is executed: its pickle is read by our own machine (tpshard/pickles.py). A file is either a zip of
``data.pkl`` and one member for each storage, or, as before PyTorch 1.6, five pickles and then the storages.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.errors import InputError, StorageError, printable
from tpshard.pickle_machine import Global, Meaning
from tpshard.pickles import LARGEST, PickleReader
from tpshard.torch_tensors import MEANINGS, UNTYPED, Storage, itemsize, storage_type
from tpshard.zips import Member, read_exactly, read_members

_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # the first pickle of the old format, a number
_OLD_PROTOCOL = 1001
_OTHER_KINDS: Mapping[bytes, tuple[str, str | None]] = {
    b"version https://git-lfs": ("is a Git LFS pointer, not the weights", "run: git lfs pull"),
    b"\x1f\x8b": ("is a gzip file, not PyTorch's", "unpack it first"),
    b"\x93NUMPY": ("is a NumPy file, not PyTorch's", None),
    b"\x80": ("is a plain pickle, not a file of torch.save", "save it again with safetensors"),
    b"{": ("is a text, not PyTorch's", None),
    b"<": ("is a web page or text, not PyTorch's", "download it again"),
}


@dataclass(frozen=True, slots=True)
class TorchTree:
    """All that a file holds, as plain values, inert records (pickle_machine.Call, Global) and, for each tensor, a
    header.Entry. Lists and dicts in it may be shared, and may even hold themselves: walk it with
    torch_state.leaves."""

    value: Any
    file_size: int


def read_torch_tree(path: Path, inert: Collection[Global] | None = ()) -> TorchTree:
    """Everything in a PyTorch file but the tensors' bytes. ``inert``: further names to be kept as records that do
    nothing; None: any. Raises InputError, StorageError."""
    meanings = {**dict.fromkeys(inert or ()), **MEANINGS}
    with _opened(path) as (fd, size):
        head = read_exactly(fd, 0, min(size, 512), path)
        if head.startswith(b"PK"):
            return TorchTree(_read_zip(fd, size, path, meanings, inert is None), size)
        if head.startswith(_MAGIC):
            return TorchTree(_read_old(fd, size, path, meanings, inert is None), size)
    if head[257:262] == b"ustar":
        what = "is a tar file, as PyTorch wrote before 0.2; it is not read"
        raise InputError(f"{path}: {what}", hint="load and save it again with PyTorch")
    if len(head) < 64:
        raise InputError(f"{path}: has {size} bytes, which is no PyTorch file", hint="it is truncated")
    for start, (what, hint) in _OTHER_KINDS.items():
        if head.startswith(start):
            raise InputError(f"{path}: {what}", hint=hint)
    raise InputError(f"{path}: is not a PyTorch file")


def read_torch_parts(path: Path, parts: Iterable[tuple[int, int]]) -> Iterator[Any]:
    """What each zip file within a file holds, as a TorchTree's value. ``parts``: first byte and size of each. Raises
    InputError, StorageError."""
    with _opened(path) as (fd, size):
        for first, length in parts:
            if first + length > size:
                raise InputError(f"{path}: ends at byte {size}, a part ends at {first + length}", hint="truncated?")
            try:
                yield _read_zip(fd, length, path, MEANINGS, False, first)
            except InputError as error:
                message = f"{error.message} (in the part of {length} bytes at {first})"
                raise InputError(message, hint=error.hint) from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """A regular file's descriptor and size."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path}: is not a regular file")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        broken = path.is_symlink()
        what = "is a link to a file that is not there" if broken else "is not there"
        raise InputError(f"{path}: {what}", hint="download it again" if broken else None) from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    try:
        yield fd, info.st_size
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------------- zip


def _read_zip(
    fd: int, size: int, path: Path, meanings: Mapping[Global, Meaning | None], others: bool, first: int = 0
) -> Any:
    members = read_members(fd, size, path, first)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        what = f"{len(pickles)} members data.pkl" if pickles else "no data.pkl"
        raise InputError(f"{path}: is a zip file with {what}, not one of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    for name in members:
        if name == f"{prefix}constants.pkl" or name.startswith(f"{prefix}code/"):
            raise InputError(f"{path}: is a TorchScript program, not weights", hint="save its state_dict instead")
    order = members.get(f"{prefix}byteorder")
    if order is not None and read_exactly(fd, order.offset, min(order.size, 16), path) != b"little":
        raise InputError(f"{path}: is not in little-endian byte order, and is not read")
    member = members[pickles[0]]
    if member.size > LARGEST:
        raise InputError(f"{path}: data.pkl has {member.size} bytes, at most {LARGEST} are read")
    data = read_exactly(fd, member.offset, member.size, path)
    reader = PickleReader(f"{path}: data.pkl", meanings, _InMembers(members, prefix).find, others)
    return reader.read(data)


@dataclass(frozen=True, slots=True)
class _InMembers:
    """Storages by their persistent ids: ("storage", class, key, device, elements)."""

    members: Mapping[str, Member]
    prefix: str

    def find(self, key: object) -> Storage:
        kind, own, elements, _ = _storage_id(key, 5)
        member = self.members.get(f"{self.prefix}data/{own}")
        if member is None:
            raise InputError(f"wants the storage '{printable(own, 40)}', which is not there")
        size = elements * itemsize(kind)
        if size > member.size:
            raise InputError(f"has a storage of {size} bytes in member data/{printable(own, 40)} of {member.size}")
        return Storage(member.offset, size, kind)


def _storage_id(key: object, length: int) -> tuple[str, str, int, Any]:
    """dtype, key, elements and what follows."""
    if type(key) is not tuple or len(key) != length or key[0] != "storage":
        raise InputError("has a persistent id that is no storage's")
    _, kind, own, _, elements = key[:5]
    if type(own) is not str or type(elements) is not int or not 0 <= elements < 2**48:
        raise InputError("has a storage without a key, or whose size is no count")
    return storage_type(kind), own, elements, key[5:]


# ---------------------------------------------------------------------------------------------- before 1.6


def _read_old(fd: int, size: int, path: Path, meanings: Mapping[Global, Meaning | None], others: bool) -> Any:
    """Where the pickles end is known when they are read: more of the file is taken until they do."""
    limit = 2**20
    while True:
        data = read_exactly(fd, 0, min(limit, size), path)
        try:
            return _old_pickles(data, fd, size, path, meanings, others)
        except InputError:
            if limit >= min(size, LARGEST):
                raise
        limit = min(limit * 16, LARGEST)


def _old_pickles(
    data: bytes, fd: int, size: int, path: Path, meanings: Mapping[Global, Meaning | None], others: bool
) -> Any:
    """Twice: storages say where they are only after the tree, so it is read once for what they hold."""
    plain = PickleReader(str(path), {})
    protocol, at = plain.read_at(data, len(_MAGIC) + 1)
    system, tree_at = plain.read_at(data, at)
    if protocol != _OLD_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InputError(f"{path}: is of another protocol than {_OLD_PROTOCOL}, or not little-endian")
    wanted = _Wanted({})
    _, at = PickleReader(str(path), meanings, wanted.find, others).read_at(data, tree_at)
    keys, at = plain.read_at(data, at)
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(wanted.sizes):
        raise InputError(f"{path}: lists other storages than its tensors use", hint="it is damaged")
    starts = {}
    for key in keys:
        elements, item = wanted.sizes[key]
        if key in starts or at + 8 + elements * item > size:
            raise InputError(f"{path}: storage '{printable(key, 40)}' of {elements * item} bytes ends after the file")
        if int.from_bytes(read_exactly(fd, at, 8, path), "little") != elements:
            raise InputError(f"{path}: storage '{printable(key, 40)}' has another size where it lies")
        starts[key] = at + 8
        at += 8 + elements * item
    if at != size:
        raise InputError(f"{path}: {size - at} bytes follow the last storage")
    value, _ = PickleReader(str(path), meanings, _InFile(starts).find, others).read_at(data, tree_at)
    return value


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Elements and bytes of an element of each storage, by its key, as the tensors are met."""

    sizes: dict[str, tuple[int, int]]

    def find(self, key: object) -> Storage:
        kind, own, elements, view = _storage_id(key, 6)
        if kind == UNTYPED:
            raise InputError("has a storage without a type in the old format, which PyTorch does not read either")
        if self.sizes.setdefault(own, (elements, itemsize(kind))) != (elements, itemsize(kind)):
            raise InputError(f"has the storage '{printable(own, 40)}' in two sizes")
        return _part(Storage(0, elements * itemsize(kind), kind), view[0])


@dataclass(frozen=True, slots=True)
class _InFile:
    starts: Mapping[str, int]

    def find(self, key: object) -> Storage:
        kind, own, elements, view = _storage_id(key, 6)
        return _part(Storage(self.starts[own], elements * itemsize(kind), kind), view[0])


def _part(storage: Storage, view: object) -> Storage:
    """A storage, or a part of it: (key, first element, elements)."""
    if view is None:
        return storage
    if type(view) is not tuple or len(view) != 3 or not all(type(n) is int and 0 <= n < 2**48 for n in view[1:]):
        raise InputError("has a storage that is part of another, without saying which")
    item = itemsize(storage.dtype)
    first, size = view[1] * item, view[2] * item
    if first + size > storage.size:
        raise InputError(f"has bytes {first} to {first + size} of a storage of {storage.size}")
    return Storage(storage.offset + first, size, storage.dtype)
