"""PyTorch's distributed checkpoints, opened as any other: each chunk of a tensor is a rank's shard.

Two kinds: ``.metadata`` and ``__{rank}_{n}.distcp`` (see dcp_metadata; each chunk is a whole file of torch.save in a
range of bytes), and safetensors files that say in ``DCP_SHARDING_INFO`` where in the whole each of their tensors
begins. Headers only are read. The chunks must tile each tensor: a hole, or an overlap that is no equal copy, is an
error. Of the second kind the whole shape is not written down: it is where the last chunk ends, so that a missing file
whose chunks would have been the last of all its tensors cannot be seen.

Megatron's torch_dist folders are of the first kind, under Megatron's names and with the layers of a model stacked in
one tensor [layers, ...]. ``read_dcp`` gives names and chunks as they are: a layer is a run of the first axis, its cells
follow one another in each chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tpshard.checkpoint import Checkpoint, Place, Stored, WeightFile, weight_file
from tpshard.chunks import check_tiled, shard_of
from tpshard.dcp_metadata import METADATA_NAME, SAVED_OFFSETS, SHARDING_INFO, DcpMetadata, Extent, read_dcp_metadata
from tpshard.dcp_names import chosen_names
from tpshard.errors import InputError, StorageError, printable
from tpshard.folder import INDEX_SUFFIX, MANIFEST_NAME, carried_files, natural_order, read_config
from tpshard.header import Entry, Header, byte_count, parse_json_object, read_header
from tpshard.layout import Box, Layout, Shape, Shard
from tpshard.sources import SourceFiles
from tpshard.torch_files import read_torch_parts

COMPARED = 4 * 2**20  # bytes of two copies compared at once


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk: a box of the whole tensor, and where its bytes lie."""

    box: Box
    place: Place


@dataclass(frozen=True, slots=True)
class Chunked:
    """A tensor in chunks, none of them empty."""

    dtype: str
    shape: Shape
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Dcp:
    """A folder as it is: every tensor under its full name; ``objects``: names of what is no tensor; ``paths``: the keys
    that led to a name, where they are known."""

    folder: Path
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, Chunked]
    objects: tuple[str, ...]
    paths: Mapping[str, tuple[str, ...]]


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint of either kind, by its files' names and one header."""
    if (folder / METADATA_NAME).is_file():
        return True
    names = _safetensors(folder)
    if not names or (folder / MANIFEST_NAME).exists() or any(folder.glob(f"*{INDEX_SUFFIX}")):
        return False
    try:
        return SHARDING_INFO in read_header(folder / names[0]).metadata
    except (InputError, StorageError):
        return False  # whoever opens it says what is wrong


def open_dcp(folder: Path, key: str | None = None) -> Checkpoint:
    """The weights in a folder. As many ranks as the tensor in most chunks has chunks; the others have None there.
    ``key``: the part of the state dict that is wanted, as ``app.model``; without it docs/dcp.md says which. Raises
    InputError, StorageError."""
    return checkpoint_of(read_dcp(folder), key)


def read_dcp(folder: Path) -> Dcp:
    """Names, shapes and places of all chunks; checked to tile each tensor."""
    found = _native(folder) if (folder / METADATA_NAME).exists() else _of_safetensors(folder)
    checked: set[tuple[Shape, tuple[Box, ...]]] = set()
    for name, tensor in found.tensors.items():
        boxes = tuple(part.box for part in tensor.parts)
        if (tensor.shape, boxes) not in checked:
            check_tiled(tensor.shape, boxes, f"{folder}: {printable(name)}")
            checked.add((tensor.shape, boxes))
    return found


def checkpoint_of(dcp: Dcp, key: str | None = None) -> Checkpoint:
    names = chosen_names(dcp.tensors, dcp.objects, dcp.paths, key, str(dcp.folder))
    ranks = max(1, *(len(dcp.tensors[full].parts) for full in names.full.values()))
    tensors = {name: _stored(name, dcp.tensors[full], ranks) for name, full in names.full.items()}
    return Checkpoint(
        folder=dcp.folder,
        ranks=ranks,
        files=dcp.files,
        tensors=tensors,
        config=read_config(dcp.folder),
        carried=tuple(carried_files(dcp.folder)),
        warnings=names.warnings,
    )


def _stored(name: str, tensor: Chunked, ranks: int) -> Stored:
    none = (None,) * (ranks - max(1, len(tensor.parts)))
    if not tensor.parts:  # an empty tensor
        layout = Layout(tensor.shape, (Shard.whole(tensor.shape), *none))
        return Stored(name, tensor.dtype, layout, (Place(0, 0), *none), 0)
    layout = Layout(tensor.shape, (*(shard_of(part.box) for part in tensor.parts), *none))
    places = (*(part.place for part in tensor.parts), *none)
    return Stored(name, tensor.dtype, layout, places, tensor.parts[0].place.file)


# ---------------------------------------------------------------------------------------------- .metadata


def _native(folder: Path) -> Dcp:
    path = folder / METADATA_NAME
    said = read_dcp_metadata(path)
    names = sorted({c.extent.file for t in said.tensors.values() for c in t.chunks}, key=natural_order)
    number = {name: index for index, name in enumerate(names)}
    files = [_distcp_file(folder, name) for name in names]
    entries = _entries(folder, said)
    tensors = {}
    for name, tensor in said.tensors.items():
        parts = []
        for chunk in tensor.chunks:
            entry = entries[chunk.extent]
            if not isinstance(entry, Entry) or (entry.dtype, entry.shape) != (tensor.dtype, chunk.box.shape):
                has = f"{entry.dtype} {list(entry.shape)}" if isinstance(entry, Entry) else "no tensor"
                raise InputError(
                    f"{folder / chunk.extent.file}: {printable(name)}: holds {has} at byte {chunk.extent.offset}, "
                    f"{METADATA_NAME} says {tensor.dtype} {list(chunk.box.shape)}",
                    hint="were files of two runs mixed?",
                )
            parts.append(Part(chunk.box, Place(number[chunk.extent.file], entry.offset, entry.view)))
        tensors[name] = Chunked(tensor.dtype, tensor.shape, tuple(parts))
    return Dcp(folder, tuple(files), tensors, tuple(said.objects), said.paths)


def _entries(folder: Path, said: DcpMetadata) -> dict[Extent, Any]:
    """What each chunk's file of torch.save holds, read file by file and front to back."""
    of_files: dict[str, list[Extent]] = {}
    for tensor in said.tensors.values():
        for chunk in tensor.chunks:
            of_files.setdefault(chunk.extent.file, []).append(chunk.extent)
    entries: dict[Extent, Any] = {}
    for file, extents in of_files.items():
        extents.sort(key=lambda extent: extent.offset)
        ranges = [(extent.offset, extent.length) for extent in extents]
        entries |= zip(extents, read_torch_parts(folder / file, ranges), strict=True)
    return entries


def _distcp_file(folder: Path, name: str) -> WeightFile:
    path = folder / name
    try:
        return weight_file(folder, name, Header({}, {}, 0, path.stat().st_size))
    except FileNotFoundError:
        raise InputError(f"{path}: is not there", hint=f"{METADATA_NAME} names it") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------- safetensors


def _safetensors(folder: Path) -> list[str]:
    try:
        names = [path.name for path in folder.iterdir() if path.name.endswith(".safetensors")]
    except OSError:
        return []
    return sorted(names, key=natural_order)


def _of_safetensors(folder: Path) -> Dcp:
    names = _safetensors(folder)
    if not names:
        raise InputError(f"{folder}: holds neither {METADATA_NAME} nor safetensors files")
    files: list[WeightFile] = []
    dtypes: dict[str, str] = {}
    parts: dict[str, list[Part]] = {}
    for index, file in enumerate(names):
        path = folder / file
        header = read_header(path)
        files.append(weight_file(folder, file, header))
        offsets = _saved_offsets(header.metadata, header.entries, path)
        for name, entry in header.entries.items():
            if dtypes.setdefault(name, entry.dtype) != entry.dtype:
                raise InputError(f"{path}: {printable(name)}: is {entry.dtype} here, {dtypes[name]} in another file")
            stop = tuple(map(int.__add__, offsets[name], entry.shape))
            parts.setdefault(name, []).append(Part(Box(offsets[name], stop), Place(index, entry.offset, entry.view)))
    tensors = {}
    for name, found in parts.items():
        if len({len(part.box.stop) for part in found}) != 1:
            raise InputError(f"{folder}: {printable(name)}: its chunks have different numbers of dimensions")
        shape = tuple(max(stops) for stops in zip(*(part.box.stop for part in found), strict=True))
        kept = tuple(part for part in found if part.box.volume)
        tensors[name] = _without_copies(Chunked(dtypes[name], shape, kept), name, tuple(files), folder)
    return Dcp(folder, tuple(files), tensors, (), {})


def _saved_offsets(metadata: Mapping[str, str], entries: Mapping[str, Entry], path: Path) -> dict[str, Shape]:
    """Where in the whole each tensor of a file begins."""
    if SHARDING_INFO not in metadata:
        raise InputError(f"{path}: has no {SHARDING_INFO} in its metadata", hint="do the files belong together?")
    said = parse_json_object(metadata[SHARDING_INFO].encode("utf-8", "surrogatepass"), f"{path}: {SHARDING_INFO}")
    found = {}
    for name, entry in entries.items():
        own = said.get(name)
        offsets = own.get(SAVED_OFFSETS) if isinstance(own, dict) else None
        if not isinstance(offsets, list) or not all(type(n) is int and 0 <= n < 2**62 for n in offsets):
            raise InputError(f"{path}: {printable(name)}: {SHARDING_INFO} has no {SAVED_OFFSETS} for it")
        if len(offsets) != len(entry.shape):
            raise InputError(
                f"{path}: {printable(name)}: {SHARDING_INFO} has {len(offsets)} offsets, the tensor "
                f"{len(entry.shape)} dimensions"
            )
        found[name] = tuple(offsets)
    return found


def _without_copies(tensor: Chunked, name: str, files: tuple[WeightFile, ...], folder: Path) -> Chunked:
    """One part of each box; copies must be equal, byte for byte."""
    of_boxes: dict[Box, list[Part]] = {}
    for part in tensor.parts:
        of_boxes.setdefault(part.box, []).append(part)
    for box, copies in of_boxes.items():
        for other in copies[1:]:
            _check_equal(tensor, name, (copies[0], other), box, files, folder)
    return replace(tensor, parts=tuple(copies[0] for copies in of_boxes.values()))


def _check_equal(
    tensor: Chunked, name: str, copies: tuple[Part, Part], box: Box, files: tuple[WeightFile, ...], folder: Path
) -> None:
    size = byte_count(tensor.dtype, box.shape)
    layout = Layout.replicated(box.shape, 2)
    stored = Stored(name, tensor.dtype, layout, (copies[0].place, copies[1].place), 0)
    checkpoint = Checkpoint(folder, 2, files, {name: stored}, {}, ())
    with SourceFiles(checkpoint) as sources:
        for begin in range(0, size, COMPARED):
            rooms = [np.empty(min(COMPARED, size - begin), np.uint8) for _ in range(2)]
            for rank, room in enumerate(rooms):
                sources.read(stored, rank, begin, room)
            if not np.array_equal(rooms[0], rooms[1]):
                first, second = (files[part.place.file].name for part in copies)
                raise InputError(
                    f"{folder}: {printable(name)}: the chunk at {list(box.start)} differs between {first} and {second}",
                    hint="were files of two runs mixed?",
                )
