"""A checkpoint as it is stored: each tensor's layout, and where each rank's part of it lies.

A full checkpoint is one with a single rank, so everything that reads has one thing to read. Opening reads headers
only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.errors import InputError, StorageError, printable
from tpshard.folder import MANIFEST_NAME, carried_files, find_weights, read_config
from tpshard.header import Header, read_header
from tpshard.layout import Layout, Shape
from tpshard.manifest import Manifest, TensorRecord, read_manifest
from tpshard.roles import Role


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
    """Where one rank's own tensor begins: index of the file, byte offset in it."""

    file: int
    offset: int


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
    """A full checkpoint (``manifest`` is None, one rank) or a shard folder, with headers read and checked."""

    folder: Path
    ranks: int
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]
    carried: tuple[str, ...]
    manifest: Manifest | None = None
    warnings: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def check_unchanged(self) -> None:
        """Raises StorageError where a weight file was replaced or written to since it was opened."""
        for file in self.files:
            if _identity(file.path) != file.identity:
                raise StorageError(f"{file.path}: was changed while it was being read", hint="run again")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder of either kind. Raises InputError or StorageError."""
    return open_shards(folder) if (folder / MANIFEST_NAME).exists() else open_full(folder)


def open_full(folder: Path) -> Checkpoint:
    """A Hugging Face folder: ``model.safetensors``, or an index and its files."""
    found = find_weights(folder)
    files: list[WeightFile] = []
    tensors: dict[str, Stored] = {}
    for index, name in enumerate(found.names):
        header = read_header(folder / name)
        files.append(_weight_file(folder, name, header))
        for tensor, entry in header.entries.items():
            if tensor in tensors:
                other = files[tensors[tensor].source].name
                raise InputError(f"{folder}: tensor {printable(tensor)} is in both {other} and {name}")
            if found.index is not None and found.index.get(tensor) != name:
                raise InputError(
                    f"{folder}: {name} holds {printable(tensor)}, the index places it in {found.index.get(tensor)}"
                )
            layout = Layout.replicated(entry.shape, 1)
            tensors[tensor] = Stored(tensor, entry.dtype, layout, (Place(index, entry.offset),), index)
    if not tensors:
        raise InputError(f"{folder}: holds no tensors")
    for tensor in found.index or ():
        if tensor not in tensors:
            where = (found.index or {})[tensor]
            raise InputError(f"{folder}: the index places {printable(tensor)} in {where}, which does not hold it")
    return Checkpoint(
        folder=folder,
        ranks=1,
        files=tuple(files),
        tensors=tensors,
        config=read_config(folder),
        carried=tuple(carried_files(folder)),
        warnings=found.warnings,
    )


def open_shards(folder: Path) -> Checkpoint:
    """A folder that tpshard wrote. Its files must hold exactly what the manifest says."""
    manifest = read_manifest(folder)
    files: list[WeightFile] = []
    headers: list[Header] = []
    where: dict[tuple[int, int], int] = {}
    for record in manifest.files:
        header = read_header(folder / record.name)
        if header.file_size != record.size:
            raise InputError(f"{folder / record.name}: has {header.file_size} bytes, the manifest says {record.size}")
        where[record.rank, record.part] = len(files)
        files.append(_weight_file(folder, record.name, header))
        headers.append(header)
        _check_self_description(header, record.rank, manifest.ranks, folder / record.name)
    tensors = {record.name: _stored(record, headers, where, files) for record in manifest.tensors}
    if not tensors:
        raise InputError(f"{folder}: the manifest lists no tensors")
    _nothing_extra(headers, files, tensors)
    return Checkpoint(
        folder=folder,
        ranks=manifest.ranks,
        files=tuple(files),
        tensors=tensors,
        config=read_config(folder),
        carried=tuple(record.name for record in manifest.carried),
        manifest=manifest,
    )


def _weight_file(folder: Path, name: str, header: Header) -> WeightFile:
    path = folder / name
    return WeightFile(name, path, header.file_size, header.metadata, _identity(path))


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        info = os.stat(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    return info.st_size, info.st_mtime_ns, info.st_ino


def _check_self_description(header: Header, rank: int, ranks: int, path: Path) -> None:
    said = (header.metadata.get("tpshard.rank"), header.metadata.get("tpshard.ranks"))
    if said != (str(rank), str(ranks)):
        raise InputError(
            f"{path}: says that it is rank {said[0]} of {said[1]}, the manifest lists it as rank {rank} of {ranks}",
            hint="were files of two runs mixed, or renamed?",
        )


def _stored(
    record: TensorRecord, headers: list[Header], where: Mapping[tuple[int, int], int], files: list[WeightFile]
) -> Stored:
    places: list[Place | None] = []
    for rank, shard in enumerate(record.layout.shards):
        index = where[rank, record.part]
        entry = headers[index].entries.get(record.name)
        path = files[index].path
        if shard is None:
            if entry is not None:
                raise InputError(f"{path}: holds {printable(record.name)}, the manifest gives rank {rank} none")
            places.append(None)
            continue
        if entry is None:
            raise InputError(f"{path}: tensor {printable(record.name)} is missing (rank {rank})")
        if entry.dtype != record.dtype or entry.shape != shard.shape:
            raise InputError(
                f"{path}: {printable(record.name)}: {entry.dtype} {list(entry.shape)} in the file, "
                f"{record.dtype} {list(shard.shape)} in the manifest (rank {rank})"
            )
        places.append(Place(index, entry.offset))
    return Stored(record.name, record.dtype, record.layout, tuple(places), record.source, record)


def _nothing_extra(headers: list[Header], files: list[WeightFile], tensors: Mapping[str, Stored]) -> None:
    held = [0] * len(files)
    for tensor in tensors.values():
        for place in tensor.places:
            if place is not None:
                held[place.file] += 1
    for header, file, count in zip(headers, files, held, strict=True):
        if len(header.entries) != count:
            extra = next(name for name in header.entries if name not in tensors) if count < len(header.entries) else "?"
            raise InputError(f"{file.path}: holds tensor {printable(extra)}, which the manifest does not list there")
