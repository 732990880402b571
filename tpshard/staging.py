"""The output promise: the target folder is absent (or as it was), or complete.

Everything is written to a staging folder beside the target, files opened exclusively and fsynced; one rename makes
it the target. After a failure nothing is left but what was there before, unless the run is to be resumed. A run that
was killed leaves the folder and a journal, which the next run for the same target takes over. Nothing that neither run
created is ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

from tpshard.errors import StorageError, TpshardError, UsageError
from tpshard.journal import Head, Journal, Portion, difference
from tpshard.stores.path import StorePath

ADDRESS = "address"  # suffix of the file by which the processes of a run find each other
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


class Shared:
    """The staging folder as a process sees it that writes into it; another one, or this, owns it."""

    def __init__(self, target: Path, files: Sequence[str]) -> None:
        self.target = target
        self._place = target.resolve()
        mark = hashlib.sha256(os.fsencode(self._place.name)).hexdigest()[:8]
        self.folder = self._place.parent / f".{self._place.name[:40]}.tpshard-{mark}"
        self._files = frozenset(files)
        self._made = {self.folder}
        self._unsynced: list[Path] = []

    def beside(self, suffix: str) -> Path:
        """A file of the run's own, next to the staging folder."""
        return self.folder.with_name(f"{self.folder.name}.{suffix}")

    def create(self, name: str, buffering: int = -1) -> BinaryIO:
        """A new file for writing; ``name`` may hold folders. The caller closes it."""
        if name not in self._files:
            raise ValueError(f"{name} is not one of this run's files")
        path = self.folder / name
        with storage_errors(path):
            if path.parent not in self._made:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._made.add(path.parent)
            self._unsynced.append(path)  # before it is: an interrupt may come between
            return path.open("x+b", buffering=buffering)

    def write(self, name: str, content: bytes) -> None:
        """A new file with this content."""
        with storage_errors(self.folder / name), self.create(name) as file:  # closing writes, too
            file.write(content)

    def sync_files(self, names: Iterable[str]) -> None:
        """Have these files on the disk."""
        for path in (self.folder / name for name in names):
            with storage_errors(path):
                _sync(path, os.O_RDONLY)
            self._unsynced.remove(path)

    def sync(self) -> None:
        """Have every file written so far on the disk."""
        self.sync_files([str(path.relative_to(self.folder)) for path in self._unsynced])


class Staging(Shared):
    """The folder that becomes the target, and its owner. Use as a context manager; without ``commit`` it is removed
    again, or kept for the next run where ``resume`` asks for that and something is finished. What a run before left
    that was killed is taken over, or removed. ``portions``: what is taken over; to be checked.

    Raises UsageError where another run is writing, the run before was another, or strangers' files are there.
    """

    def __init__(self, target: Path, head: Head, resume: bool = False) -> None:
        super().__init__(target, head.files)
        self.kept = False
        self._head, self._resume, self._committed = head, resume, False
        self._journal: Journal | None = None
        self._recording = threading.Lock()

    def __enter__(self) -> Staging:
        with storage_errors(self.folder.parent):
            self._journal = self._locked()
            self.beside(ADDRESS).unlink(missing_ok=True)  # of a run that was killed
        try:
            with storage_errors(self.folder):
                self._take_over(self._journal)
        except BaseException as error:
            if isinstance(error, UsageError):
                self._journal.close()
            else:
                self.__exit__(None, None, None)
            raise
        return self

    def _locked(self) -> Journal:
        path = self.beside("journal")
        try:
            return Journal(path, self.target)
        except UsageError:
            raise
        except BaseException:  # it may have been made, and nobody has it
            with contextlib.suppress(OSError):
                if path.stat().st_size == 0:
                    path.unlink()
            raise

    @property
    def portions(self) -> Sequence[Portion]:
        return self._opened.portions

    def keep(self, portions: Sequence[Portion]) -> None:
        """Remove all files but those of these portions."""
        kept = {file.name for portion in portions for file in portion.files}
        with storage_errors(self.folder):
            for path in self._present():
                if str(path.relative_to(self.folder)) not in kept:
                    path.unlink()

    def record(self, portion: Portion) -> None:
        """Have it in the journal that these files are on the disk."""
        with storage_errors(self._opened.path), self._recording:
            self._opened.add(portion)

    def commit(self) -> None:
        """Make the staging folder the target."""
        self.sync()
        with storage_errors(self.folder):
            for folder in self._folders():
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
        journal = self._opened
        self.kept = not self._committed and self._resume and journal.count > 0
        with contextlib.suppress(OSError):
            if not self._committed and not self.kept:
                self._remove(self._head.files)
            if not self.kept and not self.folder.exists():
                journal.remove()
        journal.close()

    @property
    def _opened(self) -> Journal:
        assert self._journal is not None
        return self._journal

    def _take_over(self, journal: Journal) -> None:
        before = journal.head
        changed = difference(self._head.fingerprint, before.fingerprint) if self._resume and before is not None else ""
        if changed:
            what = f"{self.target}: the run to go on with had {changed}"
            raise UsageError(what, hint="leave out --resume to begin again")
        known = before.files if before is not None else ()
        for path in self._present():
            if str(path.relative_to(self.folder)) not in known:
                raise UsageError(f"{path}: is not from tpshard", hint="move it away: the folder is needed for writing")
        if not self._resume or before is None:
            self._remove(known)
            journal.begin(self._head)
        self.folder.mkdir(exist_ok=True)

    def _present(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_symlink() or not path.is_dir()]

    def _folders(self) -> list[Path]:
        """The staging folder and those in it, innermost first."""
        inside = {self.folder / parent for name in self._files for parent in PurePosixPath(name).parents}
        return sorted((path for path in inside if path.is_dir()), key=lambda path: -len(path.parts))

    def _remove(self, files: Iterable[str]) -> None:
        """Remove these files, and the folders that are empty then."""
        for name in files:
            (self.folder / name).unlink(missing_ok=True)
        folders = {self.folder / parent for name in files for parent in PurePosixPath(name).parents} | {self.folder}
        for folder in sorted(folders, key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def kept_for_later(staging: Staging) -> Iterator[None]:
    """Errors say so where what is finished was kept."""
    said = "what is finished was kept: run again with --resume"
    try:
        yield
    except TpshardError as error:
        if not staging.kept:
            raise
        hint = f"{error.hint}; {said}" if error.hint else said
        raise type(error)(error.message, hint=hint) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*([said] if staging.kept else [])) from None


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
