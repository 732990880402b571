"""Writing into a store: nothing there can be renamed, so the manifest, written last, is what makes a folder complete.

An object appears when all its parts are there. Until the end a mark in the folder keeps others from writing into it;
after a failure what this run has written is deleted.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

from tpshard.digest import Hasher
from tpshard.errors import UsageError
from tpshard.frames import Frame
from tpshard.outputs import ZEROS, OutputFile
from tpshard.staging import Staging
from tpshard.stores.failures import store_errors
from tpshard.stores.path import StorePath
from tpshard.stores.store import Writer

MARK = ".tpshard-is-writing"
ON_THEIR_WAY = 16  # parts of all files together; bounds memory, with one part that fills for each file
COPY = 2**20


def staging_of(target: Path, ranks: int) -> Staging:
    """Where a run writes. ``ranks``: how many files are written at the same time."""
    return StoreStaging(target, ranks) if isinstance(target, StorePath) else Staging(target)


def new_output(staging: Staging, name: str, hasher: Hasher) -> OutputFile:
    """An output file of a run."""
    return (
        StoreOutput(staging, name, hasher) if isinstance(staging, StoreStaging) else OutputFile(staging, name, hasher)
    )


class StoreStaging(Staging):
    """The target itself. ``create`` gives a local file, for what cannot be written front to back."""

    def __init__(self, target: StorePath, ranks: int) -> None:
        self.target: Path = target
        self._root, self._ranks = target, ranks
        self._mark = target / MARK
        self._objects: list[StorePath] = []
        self._complete = False
        self._local: Path | None = None
        self._guard = threading.Lock()

    def __enter__(self) -> StoreStaging:
        whose = secrets.token_hex(8).encode()
        with store_errors(self._root):
            marked = self._store_create(self._mark, whose)
        if not marked:
            hint = f"if none is running, delete {self._mark}"
            raise UsageError(f"{self.target}: another run is writing there", hint=hint)
        self._root.forget()
        others = [path for path in self._root.rglob("*") if path != self._mark]
        if others:
            self._delete(self._mark)
            raise UsageError(f"{self.target}: came into use while this ran", hint="give a new folder")
        return self

    def writer(self, name: str, size: int) -> Writer:
        """An object written front to back."""
        path = self._root / name
        with store_errors(path):
            return path.store.writer(path.key, size, max(1, ON_THEIR_WAY // max(1, self._ranks)))

    def wrote(self, name: str) -> None:
        """An object is there, and goes again after a failure."""
        with self._guard:
            self._objects.append(self._root / name)

    def create(self, name: str, buffering: int = -1) -> BinaryIO:
        with self._guard:
            if self._local is None:
                self._local = Path(tempfile.mkdtemp(prefix="tpshard-"))
        opened = tempfile.NamedTemporaryFile(dir=self._local, delete=False, buffering=buffering)  # noqa: SIM115
        return cast(BinaryIO, opened)

    def write(self, name: str, content: bytes) -> None:
        path = self._root / name
        with store_errors(path):
            created = self._store_create(path, content)
        if not created:
            raise UsageError(f"{path}: came into use while this ran", hint="give a new folder")
        self.wrote(name)

    def sync(self) -> None:
        """All but the manifest is there: whoever comes now finds the folder in use."""
        self._delete(self._mark)

    def commit(self) -> None:
        self._complete = True
        self._root.forget()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._local is not None:
            shutil.rmtree(self._local, ignore_errors=True)
        if self._complete:
            return
        for path in [*self._objects, self._mark]:
            with contextlib.suppress(Exception):
                path.store.delete(path.key)
        self._root.forget()

    def _store_create(self, path: StorePath, content: bytes) -> bool:
        return path.store.create(path.key, content)

    def _delete(self, path: StorePath) -> None:
        with store_errors(path):
            path.store.delete(path.key)


class StoreOutput(OutputFile):
    """An object: what the digest takes front to back is what is sent. What comes in another order waits in a local
    file for its end."""

    def __init__(self, staging: StoreStaging, name: str, hasher: Hasher) -> None:
        super().__init__(staging, name, hasher)
        self._staging, self._name = staging, name
        self._writer: Writer | None = None

    def begin(self, frame: Frame, in_order: bool) -> None:
        if in_order:
            self._writer = self._staging.writer(self._name, frame.size)
        super().begin(frame, in_order)

    def digest(self, zeros: int, data: memoryview | bytes, also: Hasher | None) -> None:
        if self._writer is not None:  # first: when the digest has moved on, another worker's turn has come
            for done in range(0, zeros, len(ZEROS)):
                self._send(ZEROS[: zeros - done])
            self._send(data)
        super().digest(zeros, data, also)

    def _send(self, data: memoryview | bytes) -> None:
        assert self._writer is not None
        with store_errors(self._staging.target / self._name):
            self._writer.write(data)

    def _write(self, place: int, pieces: list[memoryview | bytes]) -> None:
        if self._writer is None:
            super()._write(place, pieces)

    def finish(self) -> tuple[int, str]:
        local = Path(self._file.name)
        if self._writer is None:
            told = super().finish()
            self._send_file(local, told[0])
        else:
            self._file.close()
            told = self.digested, self._hasher.hexdigest()
        local.unlink()
        writer, self._writer = self._writer, None
        assert writer is not None
        self._staging.wrote(self._name)
        with store_errors(self._staging.target / self._name):
            writer.finish()
        return told

    def _send_file(self, local: Path, size: int) -> None:
        self._writer = self._staging.writer(self._name, size)
        with local.open("rb") as file:
            while piece := file.read(COPY):
                self._send(piece)

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(Exception):
                writer.abort()
        super().close()
