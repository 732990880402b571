"""Ranks that were fetched one by one, brought into one folder: their records become the manifest that split writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tpshard.checkpoint import Checkpoint, Opening, Stored
from tpshard.digest import TENSORS, hasher_factory
from tpshard.errors import InputError, UsageError, printable
from tpshard.execute import SLAB
from tpshard.file_digest import file_digest
from tpshard.folder import MANIFEST_NAME, read_json
from tpshard.header import DTYPE_BITS
from tpshard.layout import Layout
from tpshard.manifest import FORMAT, RANK_FORMAT, CarriedRecord, FileRecord, Manifest, seal_of, sealed
from tpshard.manifest_parsing import manifest_from
from tpshard.plan import plan
from tpshard.slabs import Rooms, cut_into_slabs
from tpshard.sources import SourceFiles
from tpshard.staging import storage_errors
from tpshard.stores.path import StorePath

RECORDS = "tpshard-rank-*.json"


def join(folder: Path, progress: Callable[[int], object] = lambda count: None) -> Manifest:
    """Check every file against its record, digest every whole tensor, write the manifest, and remove the records,
    which it replaces. Raises InputError, StorageError."""
    if isinstance(folder, StorePath):
        raise UsageError(f"{folder}: is in a store", hint="join the folder here, then copy it there")
    if (folder / MANIFEST_NAME).exists():
        raise UsageError(f"{folder}: has its manifest already", hint="tpshard verify checks it")
    paths = sorted(folder.glob(RECORDS))
    if not paths:
        raise InputError(f"{folder}: has no record of a rank", hint="give a folder with what tpshard fetch wrote")
    data = _together(folder, [(path, _read(path)) for path in paths])
    manifest = manifest_from(data, str(folder))
    _check_files(folder, manifest, progress)
    checkpoint = _open(folder, manifest)
    with SourceFiles(checkpoint) as files:
        for entry in data["tensors"]:
            if not entry["digest"]:
                tensor = checkpoint.tensors[entry.get("copy_of", "") or entry["name"]]
                entry["digest"] = _digest(tensor, files)
    _write(folder, sealed(data))
    for path in paths:
        path.unlink()
    return manifest


def _read(path: Path) -> dict[str, Any]:
    record = read_json(path)
    seal = record.pop("seal", None)
    if record.get("format") != RANK_FORMAT:
        raise InputError(f"{path}: is not the record of a rank")
    if seal != seal_of(record):
        raise InputError(f"{path}: was changed after it was written (its seal does not match)")
    return record


def _together(folder: Path, records: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """The manifest's data, but for the digests of whole tensors that no rank holds whole."""
    first, data = records[0]
    for path, other in records[1:]:
        if _shared(other) != _shared(data):
            raise InputError(f"{path}: is not of the same run as {first.name}", hint="fetch all ranks in the same way")
    there = {int(record["rank"]) for _, record in records}
    missing = sorted(set(range(data["ranks"])) - there)
    if missing or len(records) != data["ranks"]:
        shown = ", ".join(map(str, missing[:8]))
        raise InputError(f"{folder}: of {data['ranks']} ranks these have no record: {shown}", hint="fetch them, too")
    files = [file for _, record in records for file in record["files"]]
    joined = {**data, "format": FORMAT, "files": sorted(files, key=lambda file: (file["rank"], file["part"]))}
    del joined["rank"]
    tensors = zip(*(record["tensors"] for _, record in records), strict=True)
    joined["tensors"] = [_tensor(entries, data["ranks"]) for entries in tensors]
    return joined


def _shared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the records of all ranks have in common."""
    tensors = [{k: v for k, v in entry.items() if k not in ("digest", "shards")} for entry in record["tensors"]]
    return {**record, "rank": 0, "files": [], "tensors": tensors}


def _tensor(entries: tuple[Mapping[str, Any], ...], ranks: int) -> dict[str, Any]:
    digests = {entry["digest"] for entry in entries} - {""}
    if len(digests) > 1:
        what = f"{printable(entries[0]['name'])}: two ranks have it whole, with different digests"
        raise InputError(what, hint="did the source change between them?")
    own = [entry.get("shards", [None] * ranks) for entry in entries]
    shards = [next((digests[rank] for digests in own if digests[rank]), None) for rank in range(ranks)]
    merged = {**entries[0], "digest": min(digests, default="")}
    merged.pop("shards", None)
    copy = merged.pop("copy_of", None)
    return merged | ({"shards": shards} if any(shards) else {}) | ({"copy_of": copy} if copy else {})


def _check_files(folder: Path, manifest: Manifest, progress: Callable[[int], object]) -> None:
    listed: list[FileRecord | CarriedRecord] = [*manifest.files, *manifest.carried]
    for record in listed:
        path = folder / record.name
        if not path.is_file():
            raise InputError(f"{path}: is not there", hint="copy all that tpshard fetch wrote")
        have = file_digest(path, manifest.algorithm, isinstance(record, FileRecord), progress)
        if have != record.digest:
            what = f"{path}: has digest {have}, its record says {record.digest}"
            raise InputError(what, hint="copy or fetch it again")


def _open(folder: Path, manifest: Manifest) -> Checkpoint:
    opening = Opening(folder, manifest)
    for record in opening.records:
        opening.add_file(record)
    for tensor in manifest.tensors:
        for rank in opening.only:
            opening.add_tensor(tensor, rank)
    return opening.checkpoint()


def _digest(tensor: Stored, files: SourceFiles) -> str:
    hasher, rooms = hasher_factory(TENSORS)(), Rooms()
    transfer = plan(tensor.layout, Layout.replicated(tensor.shape, 1), DTYPE_BITS[tensor.dtype])
    for slab in cut_into_slabs(transfer, SLAB):
        room = rooms.get(0, slab.size)
        files.fill([(tensor, slab, 0)], room)
        hasher.update(room.data)
    return hasher.hexdigest()


def _write(folder: Path, content: bytes) -> None:
    path = folder / MANIFEST_NAME
    with storage_errors(path):
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{MANIFEST_NAME}.", delete=False) as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(file.name, path)
        there = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(there)
        finally:
            os.close(there)
