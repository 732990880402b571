"""A checkpoint as it is stored: each tensor's layout, and where each rank's part of it lies.

A full checkpoint is one with a single rank, so everything that reads has one thing to read. Opening reads headers
only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tpshard.container_files import find_container
from tpshard.containers import Container
from tpshard.errors import InputError, StorageError, printable
from tpshard.folder import CONFIG, MANIFEST_NAME, WeightFiles, carried_files, find_weights, is_pickled, read_config
from tpshard.header import Header, byte_count, parse_json_object, read_header
from tpshard.keras_names import with_model_type
from tpshard.layout import Layout, Shape
from tpshard.manifest import FileRecord, Manifest, TensorRecord
from tpshard.manifest_parsing import read_manifest
from tpshard.roles import Role
from tpshard.stores.path import StorePath
from tpshard.torch_state import read_torch_file
from tpshard.views import View


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file with tensors; ``identity`` changes when the file is replaced or written to."""

    name: str
    path: Path
    size: int
    metadata: Mapping[str, str]
    identity: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank's own tensor begins: index of the file, byte offset in it. ``view``: where it is not one run."""

    file: int
    offset: int
    view: View | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor. ``source`` is the index of the original checkpoint's file; ``record`` the manifest's, if any."""

    name: str
    dtype: str
    layout: Layout
    places: tuple[Place | None, ...]
    source: int
    record: TensorRecord | None = None

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def role(self) -> Role:
        return self.record.role if self.record else Role("replicate")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A full checkpoint (``manifest`` is None, one rank) or a shard folder, with headers read and checked.
    ``beside``: files that go along and are not in the folder under these names; ``config_identity``: as of a weight
    file, where config.json is the folder's own."""

    folder: Path
    ranks: int
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]
    carried: tuple[str, ...]
    manifest: Manifest | None = None
    warnings: tuple[str, ...] = ()
    beside: Mapping[str, bytes] = field(default_factory=dict)
    container: Container | None = None
    config_identity: tuple[int, int, int] | None = None

    @property
    def place(self) -> Path:
        """What must not be written into: the folder, or the file where that is all that was named."""
        named = self.container is not None and self.container.named
        return self.files[0].path if named else self.folder

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def check_unchanged(self) -> None:
        """Raises StorageError where a weight file or config.json was replaced or written to since it was opened."""
        if isinstance(self.folder, StorePath):
            self.folder.forget()
        identities = {file.path: file.identity for file in self.files}
        if self.config_identity is not None:
            identities[self.folder / CONFIG] = self.config_identity
        for path, identity in identities.items():
            if _identity(path) != identity:
                raise StorageError(f"{path}: was changed while it was being read", hint="run again")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder of either kind. Raises InputError or StorageError."""
    return open_shards(folder) if (folder / MANIFEST_NAME).exists() else open_full(folder)


def open_full(folder: Path, found: WeightFiles | None = None) -> Checkpoint:
    """A Hugging Face folder: ``model.safetensors``, or an index and its files, or PyTorch's files where there are none
    of safetensors; ``found``: other files than those. Or a container of another kind, or the folder that holds it."""
    if found is None and (container := find_container(folder)) is not None:
        return _open_container(container, folder)
    found = found or find_weights(folder)
    files: list[WeightFile] = []
    tensors: dict[str, Stored] = {}
    warnings = list(found.warnings)
    for index, name in enumerate(found.names):
        header, told = _read_weights(folder / name)
        warnings += (f"{name}: {warning}" for warning in told)
        files.append(weight_file(folder, name, header))
        for tensor, entry in header.entries.items():
            if tensor in tensors:
                other = files[tensors[tensor].source].name
                raise InputError(f"{folder}: tensor {printable(tensor)} is in both {other} and {name}")
            if found.index is not None and found.index.get(tensor) != name:
                raise InputError(
                    f"{folder}: {name} holds {printable(tensor)}, the index places it in {found.index.get(tensor)}"
                )
            layout = Layout.replicated(entry.shape, 1)
            tensors[tensor] = Stored(tensor, entry.dtype, layout, (Place(index, entry.offset, entry.view),), index)
    if not tensors:
        raise InputError(f"{folder}: holds no tensors")
    identity = _config_identity(folder)
    for tensor in found.index or ():
        if tensor not in tensors:
            where = (found.index or {})[tensor]
            raise InputError(f"{folder}: the index places {printable(tensor)} in {where}, which does not hold it")
    return Checkpoint(
        folder=folder,
        ranks=1,
        files=tuple(files),
        tensors=tensors,
        config=with_model_type(read_config(folder)),
        carried=tuple(carried_files(folder)),
        warnings=(*warnings, *_wrong_total(found, tensors)),
        config_identity=identity,
    )


def _read_weights(path: Path) -> tuple[Header, tuple[str, ...]]:
    """A file's header, and what to tell of it."""
    if not is_pickled(path.name):
        return read_header(path), ()
    file = read_torch_file(path)
    return file.header, file.warnings


def _open_container(container: Container, path: Path) -> Checkpoint:
    folder, files, tensors = container.folder, list[WeightFile](), dict[str, Stored]()
    for index, (name, header) in enumerate(container.files.items()):
        files.append(weight_file(folder, name, header))
        for tensor, entry in header.entries.items():
            if tensor in tensors:
                other = files[tensors[tensor].source].name
                raise InputError(f"{folder}: tensor {printable(tensor)} is in both {other} and {name}")
            layout = Layout.replicated(entry.shape, 1)
            tensors[tensor] = Stored(tensor, entry.dtype, layout, (Place(index, entry.offset),), index)
    others = [name for name in carried_files(folder) if name not in container.files] if path == folder else []
    if CONFIG in others and container.config_is_inside:
        what = f"{CONFIG} is not the model's, whose configuration is in {files[0].name}"
        raise InputError(f"{folder}: {what}", hint=f"give {folder / files[0].name}")
    beside = () if container.config is None or container.config_is_inside else (CONFIG,)
    config = parse_json_object(container.config, f"{path}: configuration") if container.config else {}
    return Checkpoint(
        folder=folder,
        ranks=1,
        files=tuple(files),
        tensors=tensors,
        config=with_model_type(config),
        carried=tuple(dict.fromkeys([*others, *container.beside, *beside])),
        warnings=container.warnings,
        container=replace(container, named=path != folder),
    )


def _wrong_total(found: WeightFiles, tensors: Mapping[str, Stored]) -> list[str]:
    """A warning only: writers disagree on what to count (tied tensors, padding)."""
    total = sum(byte_count(tensor.dtype, tensor.shape) for tensor in tensors.values())
    if found.total_size is None or found.total_size == total:
        return []
    return [f"the index says {found.total_size} bytes of tensors (total_size), there are {total}"]


def open_shards(folder: Path) -> Checkpoint:
    """A folder that tpshard wrote. Its files must hold exactly what the manifest says."""
    opening = Opening(folder, read_manifest(folder))
    for record in opening.records:
        opening.add_file(record)
    for tensor in opening.manifest.tensors:
        for rank in opening.only:
            opening.add_tensor(tensor, rank)
    for index in range(len(opening.files)):
        opening.nothing_extra(index)
    return opening.checkpoint()


class Opening:
    """A shard folder being opened step by step; each step raises InputError for what it finds.

    Opening for use stops at the first error; verify goes on and collects them. ``only``: the ranks whose files are
    opened, where another process sees to the others.
    """

    def __init__(self, folder: Path, manifest: Manifest, only: Collection[int] | None = None) -> None:
        self.folder, self.manifest = folder, manifest
        self.only = range(manifest.ranks) if only is None else only
        self.records = [record for record in manifest.files if record.rank in self.only]
        self.files: list[WeightFile] = []
        self._headers: list[Header] = []
        self._where: dict[tuple[int, int], int] = {}
        self._places: dict[str, list[Place | None]] = {}
        self._claimed: list[set[str]] = []
        if not manifest.tensors:
            raise InputError(f"{folder}: the manifest lists no tensors: there is nothing to read")

    def add_file(self, record: FileRecord) -> None:
        path = self.folder / record.name
        header = read_header(path)
        if header.file_size != record.size:
            raise InputError(f"{path}: has {header.file_size} bytes, the manifest says {record.size}")
        said = (header.metadata.get("tpshard.rank"), header.metadata.get("tpshard.ranks"))
        if said != (str(record.rank), str(self.manifest.ranks)):
            raise InputError(
                f"{path}: says that it is rank {said[0]} of {said[1]}, the manifest lists it as rank {record.rank} "
                f"of {self.manifest.ranks}",
                hint="were files of two runs mixed, or renamed?",
            )
        self._where[record.rank, record.part] = len(self.files)
        self.files.append(weight_file(self.folder, record.name, header))
        self._headers.append(header)
        self._claimed.append(set())

    def add_tensor(self, record: TensorRecord, rank: int) -> None:
        """Find one rank's own tensor; its file must have been added."""
        places = self._places.setdefault(record.name, [None] * self.manifest.ranks)
        index, shard = self._where[rank, record.part], record.layout.shards[rank]
        if shard is None:
            return
        entry = self._headers[index].entries.get(record.name)
        path = self.files[index].path
        if entry is None:
            raise InputError(f"{path}: tensor {printable(record.name)} is missing (rank {rank})")
        self._claimed[index].add(record.name)
        if entry.dtype != record.dtype or entry.shape != shard.shape:
            raise InputError(
                f"{path}: {printable(record.name)}: {entry.dtype} {list(entry.shape)} in the file, "
                f"{record.dtype} {list(shard.shape)} in the manifest (rank {rank})"
            )
        places[rank] = Place(index, entry.offset, entry.view)

    def nothing_extra(self, index: int) -> None:
        """Raises InputError where a file holds a tensor that the manifest does not place there."""
        extra = [name for name in self._headers[index].entries if name not in self._claimed[index]]
        if extra:
            path = self.files[index].path
            raise InputError(f"{path}: holds tensor {printable(extra[0])}, which the manifest does not place there")

    def checkpoint(self) -> Checkpoint:
        records, identity = self.manifest.tensors, _config_identity(self.folder)
        return Checkpoint(
            folder=self.folder,
            ranks=self.manifest.ranks,
            files=tuple(self.files),
            tensors={
                r.name: Stored(r.name, r.dtype, r.layout, tuple(self._places[r.name]), r.source, r) for r in records
            },
            config=with_model_type(read_config(self.folder)),
            carried=tuple(record.name for record in self.manifest.carried),
            manifest=self.manifest,
            config_identity=identity,
        )


def weight_file(folder: Path, name: str, header: Header) -> WeightFile:
    """A file whose header was read."""
    path = folder / name
    return WeightFile(name, path, header.file_size, header.metadata, _identity(path))


def _config_identity(folder: Path) -> tuple[int, int, int] | None:
    return _identity(folder / CONFIG) if (folder / CONFIG).is_file() else None


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        info = path.stat()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    return info.st_size, info.st_mtime_ns, info.st_ino
