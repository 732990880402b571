"""Files that go along with the weights unchanged."""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.checkpoint import Checkpoint
from tpshard.digest import hasher_factory
from tpshard.errors import InputError, StorageError
from tpshard.folder import CONFIG
from tpshard.manifest import CarriedRecord
from tpshard.staging import Shared, storage_errors


def carry_all(
    source: Checkpoint, beside: Mapping[str, bytes], staging: Shared, algorithm: str
) -> tuple[CarriedRecord, ...]:
    """All that goes along: files of the source's folder, and ``beside``, others by their names."""
    return (
        *(carry(source, name, staging, algorithm) for name in source.carried),
        *(written_beside(name, content, staging, algorithm) for name, content in beside.items()),
    )


def carry(source: Checkpoint, name: str, staging: Shared, algorithm: str) -> CarriedRecord:
    """A file of the source's folder. Raises InputError where it is not as the source's manifest has it."""
    path = source.folder / name
    changed = InputError(f"{path}: was changed since the shards were written", hint="tpshard verify tells more")
    known = {carried.name: carried for carried in source.manifest.carried} if source.manifest else {}
    with storage_errors(path):
        if not path.is_file():
            raise InputError(f"{path}: is not there, or not a regular file", hint="tpshard verify tells more")
        size = path.stat().st_size
        if name in known and size != known[name].size:
            raise changed
        content = path.read_bytes()
    if len(content) != size:
        raise StorageError(f"{path}: was changed while it was being read", hint="run again")
    if name == CONFIG:
        source.check_unchanged()
    if name in known and source.manifest and _record_of(name, content, source.manifest.algorithm) != known[name]:
        raise changed
    return written_beside(name, content, staging, algorithm)


def written_beside(name: str, content: bytes, staging: Shared, algorithm: str) -> CarriedRecord:
    """A file that is not in the source's folder."""
    staging.write(name, content)
    return _record_of(name, content, algorithm)


def _record_of(name: str, content: bytes, algorithm: str) -> CarriedRecord:
    hasher = hasher_factory(algorithm)()
    hasher.update(content)
    return CarriedRecord(name, len(content), hasher.hexdigest())
