"""What PyTorch's distributed checkpoints say of themselves in ``.metadata``, read without PyTorch, none of it run.

The file is a pickle of torch.distributed.checkpoint.metadata.Metadata, whose classes are taken from there: for each
name the dtype and the whole shape, for each chunk (a box of the whole tensor) the file and the range of bytes that
holds it. PyTorch itself reads it with a plain ``pickle.load``, which runs whatever a file asks for; here names are
records that do nothing, and any other name is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.errors import InputError, StorageError, printable
from tpshard.folder import is_bare_name
from tpshard.header import MAX_DIMENSIONS, MAX_TENSORS, check_names
from tpshard.layout import Box, Shape
from tpshard.pickle_machine import Call, Global, Meaning
from tpshard.pickles import LARGEST, PickleReader
from tpshard.torch_tensors import BEYOND, DTYPES, MEANINGS

METADATA_NAME = ".metadata"
SHARDING_INFO, SAVED_OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # of the kind in safetensors
MOST_CHUNKS = 4_000_000  # bounds time and memory: 90,000 tensors on 32 ranks have 2.9 million

_MODULE = "torch.distributed.checkpoint.metadata"
METADATA, TENSOR, BYTES, CHUNK, INDEX, PROPERTIES, MEMORY_FORMAT, STORAGE_META = (
    Global(_MODULE, name)
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
        "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta",
    )
)  # fmt: skip
STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
SIZE = Global("torch", "Size")

# Beside the above: where it was saved to; the plans of the ranks, which Megatron leaves in it; enums of Python 3.11.
_ALSO = (
    *(Global("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    *(
        Global("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    ),
    Global("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    Global("builtins", "getattr"),
    *(METADATA, TENSOR, BYTES, CHUNK, INDEX, PROPERTIES, MEMORY_FORMAT, STORAGE_META, STORAGE_INFO),
)
_MEANINGS: Mapping[Global, Meaning | None] = {**MEANINGS, **dict.fromkeys(_ALSO)}


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file in the checkpoint's folder: a whole file of torch.save."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of the whole tensor, and where it is kept."""

    box: Box
    extent: Extent


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as the metadata has it; dtype and shape are as safetensors has them. No chunk is empty."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """``tensors`` and ``objects`` (what is no tensor) by their full names; ``paths``: the keys that led to each in the
    nested state dict that was saved, joined by dots in its name. Empty where the writer kept none."""

    tensors: Mapping[str, Described]
    objects: Mapping[str, Extent]
    paths: Mapping[str, tuple[str, ...]]


def read_dcp_metadata(path: Path) -> DcpMetadata:
    """Raises InputError, StorageError."""
    return parse_dcp_metadata(_file_bytes(path), str(path))


def parse_dcp_metadata(data: bytes, where: str) -> DcpMetadata:
    """``where`` begins every message."""
    value = PickleReader(where, _MEANINGS).read(data)
    try:
        return _checked(_state(value, METADATA), where)
    except _WrongError as error:
        raise InputError(f"{where}: {error}", hint="is it of torch.distributed.checkpoint?") from None


class _WrongError(Exception):
    """What is not as torch's classes have it."""


def _file_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise InputError(f"{path}: is not there" if not path.exists() else f"{path}: is not a regular file")
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: has {path.stat().st_size} bytes, at most {LARGEST} are read")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def _checked(top: Mapping[str, Any], where: str) -> DcpMetadata:
    described, stored = top.get("state_dict_metadata"), top.get("storage_data")
    if type(described) is not dict or type(stored) is not dict:
        raise _WrongError("has no tables state_dict_metadata and storage_data")
    if len(described) > MAX_TENSORS or len(stored) > MOST_CHUNKS:
        raise _WrongError(
            f"{len(described)} names and {len(stored)} chunks, at most {MAX_TENSORS} and {MOST_CHUNKS} are read"
        )
    if not all(type(name) is str for name in described):
        raise _WrongError("has a name that is no text")
    check_names(described, where)
    extents = _extents(stored)
    tensors, objects = {}, {}
    for name, value in described.items():
        try:
            if type(value) is Call and value.function == BYTES:
                objects[name] = _taken(extents, name, None)
            else:
                tensors[name] = _tensor(_state(value, TENSOR), name, extents)
        except _WrongError as error:
            raise _WrongError(f"{printable(name)}: {error}") from None
    if extents:
        name, offset = next(iter(extents))
        raise _WrongError(f"{printable(name)}: a chunk at {offset} is stored that no tensor has")
    return DcpMetadata(tensors, objects, _paths(top.get("planner_data"), described))


def _state(value: object, kind: Global) -> Mapping[str, Any]:
    """A record's fields."""
    if type(value) is not Call or value.function != kind or value.arguments or value.items:
        raise _WrongError(f"has no {kind.name} where one was expected")
    state = {} if value.state is None else value.state
    if type(state) is not dict:
        raise _WrongError(f"has a {kind.name} without fields")
    return state


_Key = tuple[str, Shape | None]


def _extents(stored: Mapping[Any, Any]) -> dict[_Key, Extent]:
    found: dict[_Key, Extent] = {}
    for key, value in stored.items():
        index, info = _state(key, INDEX), _state(value, STORAGE_INFO)
        name, offset = index.get("fqn"), index.get("offset")
        if type(name) is not str:
            raise _WrongError("has a chunk without a name")
        place = None if offset is None else _counts(offset, "offset")
        if (name, place) in found:
            raise _WrongError(f"{printable(name)}: the chunk at {offset} is stored twice")
        file, begin, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if type(file) is not str or not is_bare_name(file):
            raise _WrongError(f"{printable(name)}: '{printable(str(file))}' is not a file name")
        if info.get("transform_descriptors"):
            raise _WrongError(f"{printable(name)}: is stored compressed or otherwise transformed, which is not read")
        begin, length = _counts((begin, length), "range of bytes")
        found[name, place] = Extent(file, begin, length)
    return found


def _taken(extents: dict[_Key, Extent], name: str, offset: Shape | None) -> Extent:
    extent = extents.pop((name, offset), None)
    if extent is None:
        at = "is" if offset is None else f"its chunk at {list(offset)} is"
        raise _WrongError(f"{at} stored in no file")
    return extent


def _tensor(state: Mapping[str, Any], name: str, extents: dict[_Key, Extent]) -> Described:
    properties, chunks = state.get("properties"), state.get("chunks")
    fields = properties.state if type(properties) is Call and properties.function == PROPERTIES else None
    dtype = fields[0] if type(fields) is tuple and fields else None
    if type(dtype) is not Global or dtype.module != "torch" or dtype.name not in DTYPES:
        raise _WrongError(f"is of {dtype if type(dtype) is Global else 'no dtype'}, which is not read")
    if type(chunks) is not list:
        raise _WrongError("has no chunks")
    own, shape = DTYPES[dtype.name][0], _counts(state.get("size"), "shape")
    if len(shape) > MAX_DIMENSIONS:
        raise _WrongError(f"has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    found = []
    for chunk in chunks:
        part = _state(chunk, CHUNK)
        offsets, sizes = _counts(part.get("offsets"), "offsets"), _counts(part.get("sizes"), "sizes")
        if 0 in sizes:  # where there are more ranks than rows
            extents.pop((name, offsets), None)
            continue
        extent = _taken(extents, name, offsets)
        if not len(offsets) == len(sizes) == len(shape):
            raise _WrongError(f"has {len(shape)} dimensions, its chunk {len(offsets)} and {len(sizes)}")
        stop = tuple(map(int.__add__, offsets, sizes))
        if any(end > size for end, size in zip(stop, shape, strict=True)):
            raise _WrongError(f"its chunk at {list(offsets)} of {list(sizes)} reaches beyond the shape {list(shape)}")
        found.append(Chunk(Box(in_elements(own, offsets), in_elements(own, stop)), extent))
    return Described(own, in_elements(own, shape), tuple(found))


def in_elements(dtype: str, shape: Shape) -> Shape:
    """A shape of torch's as safetensors has it: of F4 torch counts bytes along the last axis, of two elements."""
    return (*shape[:-1], 2 * shape[-1]) if dtype == "F4" and shape else shape


def _counts(value: object, what: str) -> Shape:
    if type(value) is not tuple or not all(type(n) is int and 0 <= n < BEYOND for n in value):
        raise _WrongError(f"has a {what} that is none")
    return value


def _paths(planner_data: object, names: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The keys that led to each name, where they are what the planner of PyTorch keeps."""
    if type(planner_data) is not dict:
        return {}
    found = {}
    for name in names:
        path = planner_data.get(name)
        if type(path) is not tuple or not all(type(step) in (str, int) for step in path):
            continue
        steps = tuple(map(str, path))
        if ".".join(steps) == name:
            found[name] = steps
    return found
