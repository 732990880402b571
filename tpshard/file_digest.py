"""A file's digest as a manifest has it."""

from __future__ import annotations

from collections.abc import Callable
from io import FileIO
from pathlib import Path

from tpshard.digest import TREE, Hasher, hasher_factory, tree_digest
from tpshard.errors import StorageError
from tpshard.header import read_header

CHUNK = 2**20

Progress = Callable[[int], object]


def file_digest(path: Path, algorithm: str, has_tensors: bool, progress: Progress = lambda count: None) -> str:
    """The digest of a file of the folder, one with tensors or one that is carried; ``progress`` is called with bytes
    read. Raises FileNotFoundError, IsADirectoryError; StorageError; InputError where the header cannot be read that
    tells where its tensors are."""
    new_hasher, buffer = hasher_factory(algorithm), memoryview(bytearray(CHUNK))

    def digest(file: FileIO, size: int | None) -> Hasher:
        """Of the next bytes, or of all that follow."""
        hasher = new_hasher()
        while size != 0:
            count = file.readinto(buffer if size is None else buffer[:size])
            if not count:
                break
            hasher.update(buffer[:count])
            progress(count)
            size = size if size is None else size - count
        return hasher

    try:
        with path.open("rb", buffering=0) as file:
            if not (has_tensors and algorithm == TREE):
                return digest(file, None).hexdigest()
            header = read_header(path)
            head = file.read(header.data_start)
            return tree_digest(head, [digest(file, entry.size).hexdigest() for entry in header.entries.values()])
    except (FileNotFoundError, IsADirectoryError):
        raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
