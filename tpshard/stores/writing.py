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
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

from tpshard.digest import ZEROS, Hasher
from tpshard.errors import UsageError
from tpshard.frames import Frame
from tpshard.outputs import OutputFile, Piece, Sink
from tpshard.slabs import Rooms
from tpshard.staging import Shared
from tpshard.stores.failures import store_errors
from tpshard.stores.path import StorePath
from tpshard.stores.store import Writer
from tpshard.views import View

MARK = ".tpshard-is-writing"
ON_THEIR_WAY = 16  # parts of all files together; bounds memory, with one part that fills for each file
COPY = 2**20


def new_output(staging: Shared, name: str, hasher: Hasher | None, in_order: bool) -> Sink:
    """An output file of a run. ``in_order``: whether its bytes are a head and then its tensors, one after another."""
    if isinstance(staging, StoreStaging):
        return StoreOutput(staging, name, hasher) if in_order else LocalFirst(staging, name, hasher)
    return OutputFile(staging, name, hasher)


class StoreStaging(Shared):
    """The target itself. ``create`` gives a local file, for what cannot be written front to back."""

    def __init__(self, target: StorePath, ranks: int) -> None:
        self.target: Path = target
        self._root, self._ranks = target, ranks
        self._mark = target / MARK
        self._objects: list[StorePath] = []
        self._open: list[Writer] = []
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
            writer = path.store.writer(path.key, size, max(1, ON_THEIR_WAY // max(1, self._ranks)))
        with self._guard:
            self._open.append(writer)
        return writer

    def complete(self, name: str, writer: Writer) -> None:
        """Have an object appear; it goes again after a failure."""
        path = self._root / name
        with self._guard:
            self._open.remove(writer)
            self._objects.append(path)
        with store_errors(path):
            writer.finish()

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
        with self._guard:
            self._objects.append(path)

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
        for writer in self._open:
            with contextlib.suppress(Exception):
                writer.abort()
        for path in [*self._objects, self._mark]:
            with contextlib.suppress(Exception):
                path.store.delete(path.key)
        self._root.forget()

    def _store_create(self, path: StorePath, content: bytes) -> bool:
        return path.store.create(path.key, content)

    def _delete(self, path: StorePath) -> None:
        with store_errors(path):
            path.store.delete(path.key)


class StoreOutput:
    """An object, sent front to back: what comes early is kept until what is before it has come."""

    def __init__(self, staging: StoreStaging, name: str, hasher: Hasher | None) -> None:
        self._staging, self._name, self._hasher = staging, name, hasher
        self._writer: Writer | None = None
        self._size = self._sent = 0
        self._early: dict[int, Piece] = {}
        self._turn = threading.Lock()

    def begin(self, frame: Frame) -> None:
        self._size = frame.size
        self._writer = self._staging.writer(self._name, frame.size)
        self.write([Piece(place, data) for place, data in frame.fixed])

    def write(self, pieces: Sequence[Piece]) -> None:
        with self._turn:
            for piece in pieces:
                if piece.place - piece.lead == self._sent:
                    self._take(piece)
                elif piece.lead or len(piece.data):
                    self._early[piece.place - piece.lead] = Piece(piece.place, bytes(piece.data), piece.lead)
            while self._sent in self._early:
                self._take(self._early.pop(self._sent))

    def _take(self, piece: Piece) -> None:
        for done in range(0, piece.lead, len(ZEROS)):
            self._send(ZEROS[: piece.lead - done])
        self._send(piece.data)

    def _send(self, data: memoryview | bytes) -> None:
        assert self._writer is not None
        if len(data):
            with store_errors(self._staging.target / self._name):
                self._writer.write(data)
            if self._hasher is not None:
                self._hasher.update(data)
            self._sent += len(data)

    def write_strided(self, place: int, view: View, offset: int, data: memoryview, rooms: Rooms) -> None:
        raise ValueError(f"{self._name}: a tensor of a file that is sent front to back does not lie in strides")

    def finish(self) -> tuple[int, str]:
        if self._sent != self._size:
            raise ValueError(f"{self._name}: {self._sent} of {self._size} bytes were sent")
        assert self._writer is not None
        self._staging.complete(self._name, self._writer)
        return self._size, self._hasher.hexdigest() if self._hasher is not None else ""

    def close(self) -> None:
        """The staging gives up what is not complete."""


class LocalFirst(OutputFile):
    """A file whose bytes come in any order: written here, and sent when it is complete."""

    def __init__(self, staging: StoreStaging, name: str, hasher: Hasher | None) -> None:
        super().__init__(staging, name, hasher)
        self._staging, self._name = staging, name

    def finish(self) -> tuple[int, str]:
        told = super().finish()
        writer = self._staging.writer(self._name, told[0])
        with Path(self._file.name).open("rb") as file, store_errors(self._staging.target / self._name):
            while piece := file.read(COPY):
                writer.write(piece)
        Path(self._file.name).unlink()
        self._staging.complete(self._name, writer)
        return told
