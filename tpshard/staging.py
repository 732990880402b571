"""The output promise: the target folder is absent (or as it was), or complete.

Everything is written to a staging folder beside the target, files opened exclusively and fsynced; one rename makes
it the target. After a failure nothing is left but what was there before, and nothing that this run did not create is
ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from tpshard.errors import StorageError, UsageError
from tpshard.stores.path import StorePath

MARGIN = 16 * 2**20  # file systems need room for their own records


@contextlib.contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Operating system errors as StorageError, one line with the path."""
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: "make room, then run again",
            errno.EDQUOT: "the quota is used up",
            errno.EMFILE: "raise it: ulimit -n",
        }.get(error.errno or 0)
        raise StorageError(f"{path}: {error.strerror or error}", hint=hint) from None


def check_target(target: Path, source: Path) -> None:
    """Refuse a target that is in use or lies inside the source. Raises UsageError."""
    if isinstance(target, StorePath):
        target.require_writable()
    if target.is_symlink():
        raise UsageError(f"{target}: is a symbolic link", hint="give the folder itself")
    if target.exists():
        if not target.is_dir():
            raise UsageError(f"{target}: exists and is not a folder")
        with storage_errors(target):
            if any(target.iterdir()):
                raise UsageError(f"{target}: exists and is not empty", hint="give a new folder")
    resolved, inside = target.resolve(), source.resolve()
    if resolved == inside or inside in resolved.parents:
        raise UsageError(f"{target}: lies inside the source {source}", hint="give a folder elsewhere")
    if not isinstance(target, StorePath) and not target.resolve().parent.is_dir():
        raise UsageError(f"{target.parent}: is not a folder", hint="make it first")


def check_space(target: Path, needed: int) -> None:
    """Refuse where the file system cannot hold ``needed`` bytes. A hint only: quotas and others' writes are unseen."""
    if isinstance(target, StorePath):
        return
    parent = target.resolve().parent
    with storage_errors(parent):
        free = shutil.disk_usage(parent).free
    if free < needed + MARGIN:
        raise StorageError(f"{parent}: {needed + MARGIN} bytes are needed, {free} are free", hint="make room")


class Staging:
    """The folder that becomes the target. Use as a context manager; without ``commit`` it is removed again."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._place = target.resolve()
        self.folder = self._place.parent / f".{self._place.name[:40]}.tpshard-{secrets.token_hex(4)}"
        self._created: list[Path] = []
        self._folders: list[Path] = []
        self._synced = 0
        self._committed = False

    def __enter__(self) -> Staging:
        with storage_errors(self.folder.parent):
            self.folder.mkdir()
        self._folders.append(self.folder)
        return self

    def create(self, name: str, buffering: int = -1) -> BinaryIO:
        """A new file for writing; ``name`` may hold folders. The caller closes it."""
        path = self.folder / name
        with storage_errors(path):
            self._make_folders(path.parent)
            self._created.append(path)  # before it is: an interrupt may come between
            return path.open("x+b", buffering=buffering)

    def write(self, name: str, content: bytes) -> None:
        """A new file with this content."""
        with storage_errors(self.folder / name), self.create(name) as file:  # closing writes, too
            file.write(content)

    def sync(self) -> None:
        """Have every file written so far on the disk."""
        for path in self._created[self._synced :]:
            with storage_errors(path):
                _sync(path, os.O_RDONLY)
        self._synced = len(self._created)

    def commit(self) -> None:
        """Make the staging folder the target."""
        self.sync()
        with storage_errors(self.folder):
            for folder in reversed(self._folders):
                _sync(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.rename(self.folder, self._place)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise UsageError(f"{self.target}: came into use while this ran", hint="give a new folder") from None
                raise
            self._committed = True
            _sync(self.folder.parent, os.O_RDONLY | os.O_DIRECTORY)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._committed:
            return
        for path in self._created:
            with contextlib.suppress(OSError):
                path.unlink()
        for folder in reversed(self._folders):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _make_folders(self, folder: Path) -> None:
        if folder not in self._folders:
            self._make_folders(folder.parent)
            self._folders.append(folder)
            folder.mkdir()


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
