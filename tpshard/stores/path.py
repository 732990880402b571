"""A folder or file in a store, with the face of a Path: who reads checkpoints need not know where they lie.

What is below a folder is listed once, when it is first asked for, and remembered until the folder is named again. No
such path is ever given to the operating system: whoever tries learns in one line that this kind of file is not read
from a store.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import threading
import time
from collections.abc import Generator, Mapping
from pathlib import Path, PosixPath, PurePosixPath
from typing import IO, Any

from tpshard.errors import StorageError, UsageError, printable
from tpshard.stores.failures import store_errors
from tpshard.stores.store import SCHEMES, Known, Store, store_of
from tpshard.windows import Window

AHEAD = 2**18  # bytes of a file that are asked for at least: most headers are smaller
AT_ONCE = 8 * 2**20  # bytes of a file that is read to its end
TRIES = 4  # for bytes that did not come whole; what the library itself tries again is not counted
PAUSE = 0.1  # seconds after the first try, then twice as long each time
_named: set[str] = set()  # the folders that were named
_listed: dict[str, Mapping[str, Known]] = {}  # what is below each of them
_listing = threading.RLock()


def place(text: str | os.PathLike[str]) -> Path:
    """A folder or file as the user names it: a path, or the URL of a store. Raises UsageError."""
    if isinstance(text, StorePath):
        named = str(text)
    elif isinstance(text, Path):
        return text
    else:
        named = os.fspath(text)
    scheme, mark, rest = named.partition("://")
    if not mark:
        return Path(text)
    if scheme not in SCHEMES:
        raise UsageError(
            f"{printable(named)}: no store is called '{printable(scheme, 20)}'", hint=f"stores: {', '.join(SCHEMES)}"
        )
    if not rest.strip("/") or ".." in rest.split("/"):
        raise UsageError(f"{printable(named)}: is no place in a store", hint=f"give {scheme}://bucket/folder")
    path = StorePath(named)
    path.forget()
    _named.add(str(path))
    return path


class StorePath(PosixPath):
    """``s3://bucket/key`` and the like. Equal URLs are equal paths; there is no other state."""

    def __str__(self) -> str:
        text = super().__str__()
        return text.replace(":/", "://", 1) if self.parts and self.parts[0].removesuffix(":") in SCHEMES else text

    def __fspath__(self) -> str:
        raise UsageError(f"{self}: is in a store, where files of this kind are not read", hint="copy it here first")

    @property
    def key(self) -> str:
        return "/".join(self.parts[1:] if self._scheme == "hf" else self.parts[2:])

    @property
    def _scheme(self) -> str:
        return self.parts[0].removesuffix(":")

    @property
    def store(self) -> Store:
        return store_of(self._scheme, "" if self._scheme == "hf" else self.parts[1])

    # ------------------------------------------------------------------------------------------ what is there

    def forget(self) -> None:
        """Have what is below this folder, or beside this file, listed again when it is next asked for."""
        with _listing:
            for name in [name for name in _listed if StorePath(name).is_relative_to(self)]:
                del _listed[name]
            for folder in self._ancestors():
                _listed.pop(str(folder), None)

    def _ancestors(self) -> list[StorePath]:
        least = 3 if self._scheme == "hf" else 2
        own = [self, *self.parents]
        return [folder for folder in own if len(folder.parts) >= min(least, len(self.parts))]

    def _below(self) -> Mapping[str, Known]:
        """All objects of the folder in which this is, by key."""
        with _listing:
            for folder in self._ancestors():
                if str(folder) in _listed:
                    return _listed[str(folder)]
            top = next((folder for folder in self._ancestors() if str(folder) in _named), self)
            found = top._list()
            if set(found) == {top.key} and len(top._ancestors()) > 1:  # a file: its siblings will be asked for
                top = top.parent
                found = top._list()
            _listed[str(top)] = found
            return found

    def _list(self) -> Mapping[str, Known]:
        with store_errors(self):
            return self.store.list(self.key)

    def known(self) -> Known | None:
        """What the store says of the object of this name."""
        return self._below().get(self.key)

    def _require(self) -> Known:
        known = self.known()
        if known is None:
            kind = IsADirectoryError if self.is_dir() else FileNotFoundError
            number = errno.EISDIR if kind is IsADirectoryError else errno.ENOENT
            raise kind(number, os.strerror(number), str(self))
        return known

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Of an object its size, and as inode what changes with its bytes."""
        if self.is_dir():
            return os.stat_result((stat.S_IFDIR, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        known = self._require()
        inode = int.from_bytes(hashlib.blake2b(known.version.encode(), digest_size=8).digest())
        return os.stat_result((stat.S_IFREG, inode, 0, 1, 0, 0, known.size, 0, 0, 0))

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        return self.known() is not None

    def is_dir(self, **_: Any) -> bool:
        prefix = f"{self.key}/" if self.key else ""
        return any(key.startswith(prefix) for key in self._below())

    def is_symlink(self) -> bool:
        return False

    def resolve(self, strict: bool = False) -> StorePath:
        return self

    def iterdir(self) -> Generator[StorePath, None, None]:
        prefix = f"{self.key}/" if self.key else ""
        names = {key[len(prefix) :].partition("/")[0] for key in self._below() if key.startswith(prefix)}
        if not names:
            number = errno.ENOTDIR if self.is_file() else errno.ENOENT
            raise OSError(number, os.strerror(number), str(self))
        yield from (self / name for name in sorted(names))

    def rglob(self, pattern: str, **_: Any) -> Generator[StorePath, None, None]:
        """Objects only: a store has no folders of its own."""
        prefix = f"{self.key}/" if self.key else ""
        for key in sorted(self._below()):
            if key.startswith(prefix) and PurePosixPath(key).match(pattern):
                yield self / key[len(prefix) :]

    def glob(self, pattern: str, **_: Any) -> Generator[StorePath, None, None]:
        deep = len(PurePosixPath(pattern).parts)
        yield from (path for path in self.rglob(pattern) if len(path.relative_to(self).parts) == deep)

    # ------------------------------------------------------------------------------------------ what is in it

    def fill(self, offset: int, into: memoryview) -> None:
        """Fill ``into`` from byte ``offset`` of the object. Raises StorageError."""
        version = self._require().version
        if not len(into):
            return
        for trial in range(TRIES):
            with store_errors(self):
                done = self.store.read(self.key, offset, into, version)
            if done == len(into):
                return
            time.sleep(PAUSE * 2**trial)
        what = f"{self}: the store gave {done} of {len(into)} bytes from {offset}"
        raise StorageError(f"{what}, {TRIES} times", hint="run again")

    def require_writable(self) -> None:
        """Raises UsageError where a store is only read."""
        if self._scheme == "hf":
            raise UsageError(f"{self}: the Hub is read, not written", hint="write a folder here, then: hf upload")

    def open(self, mode: str = "r", buffering: int = -1, *_: Any, **__: Any) -> IO[Any]:  # type: ignore[override]
        if mode != "rb":
            raise UsageError(f"{self}: is in a store, and cannot be opened to write", hint="give a local file")
        raw = Window(self._require().size, self._filled)
        return io.BufferedReader(raw, AHEAD if buffering else AT_ONCE)

    def read_bytes(self) -> bytes:
        data = bytearray(self._require().size)
        self.fill(0, memoryview(data))
        return bytes(data)

    def _filled(self, offset: int, room: memoryview) -> int:
        self.fill(offset, room)
        return len(room)
