"""The journal of a run: which of its files are complete and on the disk, so that another run can go on from there.

A file beside the staging folder, on each line a digest and a JSON object: first what the run is and which files it
makes, then one for each group of files that was finished. Whoever writes holds a lock on it, so that a target has one
writer.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from tpshard.errors import StorageError, UsageError
from tpshard.folder import is_bare_name
from tpshard.manifest import FileRecord

# What the result of a run depends on, and what is said where another run's is not the same.
OTHER = {
    "version": "another version of tpshard",
    "source": "another source",
    "policy": "another policy",
    "ranks": "other ranks",
    "files": "another set of files",
    "digest": "another digest",
}
FORMAT, VERSION = "tpshard-journal", 1
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class Head:
    """What a run is: a digest of each thing that its result depends on, the keys of OTHER; and all the files that it
    may create."""

    fingerprint: Mapping[str, str]
    files: tuple[str, ...]


def difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first thing that two fingerprints have not in common, in words; empty where they agree."""
    return next((words for key, words in OTHER.items() if mine[key] != theirs.get(key)), "")


@dataclass(frozen=True, slots=True)
class Portion:
    """Complete files of one part, and what else was learned on the way: of the part's items, from number ``first`` on,
    the whole's digest (empty where another portion has it) and those of each rank's own tensor."""

    files: tuple[FileRecord, ...]
    first: int
    digests: tuple[str, ...]
    shards: tuple[tuple[str | None, ...], ...]

    def as_data(self) -> dict[str, Any]:
        return {
            "files": [asdict(file) for file in self.files],
            "first": self.first,
            "digests": self.digests,
            "shards": self.shards,
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Portion:
        return cls(
            tuple(FileRecord(**file) for file in data["files"]),
            data["first"],
            tuple(data["digests"]),
            tuple(tuple(own) for own in data["shards"]),
        )


class Journal:
    """A journal that is open, and locked until ``close``. ``head``: of the run before, None where there was none;
    ``portions``: what it has finished; ``count``: how many there are, new ones too."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._fd = _locked(path, target)
        self.head: Head | None = None
        self.portions: list[Portion] = []
        try:
            self._read()
        except BaseException:
            self.close()
            raise
        self.count = len(self.portions)

    def begin(self, head: Head) -> None:
        """Forget the run before."""
        os.ftruncate(self._fd, 0)
        self.head, self.portions, self.count = head, [], 0
        self._append({"format": FORMAT, "version": VERSION, "run": head.fingerprint, "files": head.files})

    def add(self, portion: Portion) -> None:
        """Record files that are on the disk."""
        self._append(portion.as_data())
        self.count += 1

    def remove(self) -> None:
        self.path.unlink()

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._fd)

    def _append(self, data: Mapping[str, Any]) -> None:
        text = json.dumps(data, separators=(",", ":"))
        line = memoryview(f"{_digest(text)} {text}\n".encode())
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)

    def _read(self) -> None:
        """All lines up to the first that is not as it was written; what comes after is cut off."""
        good = 0
        with open(self._fd, "rb", closefd=False) as file:
            for line in file:
                try:
                    data = _data(line)
                    if self.head is None:
                        self.head = _head(data)
                    else:
                        self.portions.append(Portion.of(data))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    break
                good += len(line)
        if os.fstat(self._fd).st_size > good:
            os.ftruncate(self._fd, good)


def _digest(text: str) -> str:
    return str(xxhash.xxh3_64_hexdigest(text.encode()))


def _data(line: bytes) -> Any:
    """What a line holds. Raises ValueError where it is not whole, or damaged."""
    digest, _, text = line.decode().partition(" ")
    if not text.endswith("\n") or digest != _digest(text[:-1]):
        raise ValueError("damaged")
    return json.loads(text)


def _head(data: Mapping[str, Any]) -> Head:
    if (data["format"], data["version"]) != (FORMAT, VERSION):
        raise ValueError("another format")
    if not all(is_bare_name(part) for name in data["files"] for part in name.split("/")):
        raise ValueError("a file outside the folder")  # files listed here may be removed
    return Head(dict(data["run"]), tuple(data["files"]))


def _locked(path: Path, target: Path) -> int:
    """The file, open and locked. Raises UsageError where another run has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(fd, path):
                return fd
        except OSError as error:
            if error.errno in NO_LOCKS and os.fstat(fd).st_size == 0:
                return fd  # what is created exclusively still keeps two runs apart
            os.close(fd)
            if error.errno in NO_LOCKS:
                hint = "remove it if no run is writing"
                raise StorageError(f"{path}: is there, and this file system has no locks", hint=hint) from None
            if error.errno in (errno.EAGAIN, errno.EACCES):
                hint = "wait for it, or give another folder"
                raise UsageError(f"{target}: another run is writing it", hint=hint) from None
            raise
        os.close(fd)  # whoever had it has just finished


def _is_still(fd: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(fd))
