"""TensorFlow checkpoints (``ckpt-1.index`` and its data files) and SavedModels, without TensorFlow.

A data file is tensors' bytes one after another, little-endian; the index says where each begins. With the index, the
graph and whatever else belongs to it carried along as they are, merging gives the same checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpshard.containers import FRAME_SUFFIX, Container, checked
from tpshard.errors import InputError, StorageError, printable
from tpshard.folder import CONFIG
from tpshard.header import Entry, byte_count, check_names, parse_json_object
from tpshard.keras_files import config_beside
from tpshard.keras_names import CELL, layers_of, logical_name, slot_names, unique
from tpshard.manifest import FRAME_KEY
from tpshard.tensorflow_index import DTYPES, MAX_INDEX, STRING, BundleIndex, IndexEntry, object_graph, parse_index

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
MAX_GRAPH = 256 * 2**20
MAX_SHARDS = 100_000
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_OF_OPTIMIZER = re.compile(r"(^|/)optimizer/_(variables/\d+|iterations|learning_rate)$")


def open_tensorflow(path: Path) -> Container:
    """A checkpoint by its ``.index``, or a SavedModel by its folder. Raises InputError, StorageError."""
    saved = path.is_dir()
    index_path = path / "variables" / "variables.index" if saved else path
    folder = path if saved else path.parent
    within = "variables/" if saved else ""
    prefix = index_path.name.removesuffix(".index")
    index = parse_index(_bytes(index_path, MAX_INDEX), str(index_path))
    if index.shards > MAX_SHARDS:
        raise InputError(f"{index_path}: says that there are {index.shards} data files")
    files = [f"{within}{prefix}.data-{n:05d}-of-{index.shards:05d}" for n in range(index.shards)]
    config = config_beside(folder / CONFIG)
    tensors = {key: entry for key, entry in index.entries.items() if entry.dtype != STRING}
    _check(tensors, index, index_path)
    full = _full_names(index, [folder / name for name in files])
    names = _names(tensors, full, parse_json_object(config, f"{folder}: config.json") if config else {})
    check_names(names.values(), str(index_path))
    if len(set(names.values())) != len(names):
        raise InputError(f"{index_path}: {len(names) - len(set(names.values()))} tensors have another's name")
    headers = {}
    for shard, name in enumerate(files):
        own = {names[key]: _entry(entry, key, index_path) for key, entry in tensors.items() if entry.shard == shard}
        headers[name] = checked(folder / name, _size(folder / name), own, {FRAME_KEY: f"{name}{FRAME_SUFFIX}"})
    headers = {name: header for name, header in headers.items() if header.entries}
    if not headers:
        raise InputError(f"{index_path}: holds no tensors")
    beside = [f"{within}{prefix}.index", *(name for name in files if name not in headers)]
    return Container(folder, headers, config, beside=tuple(beside))


def _check(tensors: Mapping[str, IndexEntry], index: BundleIndex, path: Path) -> None:
    for key, entry in tensors.items():
        where = f"{path}: {printable(key)}"
        if entry.sliced:
            hint = "save it again without a partitioner"
            raise InputError(f"{where}: is a partitioned variable; its parts are not put together here", hint=hint)
        if entry.dtype not in DTYPES:
            raise InputError(f"{where}: TensorFlow's dtype {entry.dtype} has no name in safetensors")
        if entry.shard >= index.shards:
            raise InputError(f"{where}: lies in data file {entry.shard}, there are {index.shards}")


def _entry(entry: IndexEntry, key: str, path: Path) -> Entry:
    dtype = DTYPES[entry.dtype]
    size = byte_count(dtype, entry.shape)
    if size != entry.size:
        what = f"shape {list(entry.shape)} of {dtype} takes {size} bytes, the index says {entry.size}"
        raise InputError(f"{path}: {printable(key)}: {what}")
    return Entry(dtype, entry.shape, entry.offset, size)


def _bytes(path: Path, most: int) -> bytes:
    try:
        if not path.is_file():
            raise InputError(f"{path}: is not there" if not path.exists() else f"{path}: is not a regular file")
        if path.stat().st_size > most:
            raise InputError(f"{path}: has {path.stat().st_size} bytes, at most {most} are read")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"{path}: is not there", hint="the index names it") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def _full_names(index: BundleIndex, files: Sequence[Path]) -> Mapping[str, str]:
    """Variables' full names by their keys; none in checkpoints of TensorFlow 1, whose keys are the names."""
    entry = index.entries.get(GRAPH_KEY)
    if entry is None:
        return {}
    if entry.shard >= len(files) or entry.size > MAX_GRAPH:
        raise InputError(f"{files[0]}: the graph of its objects has {entry.size} bytes, at most {MAX_GRAPH} are read")
    path = files[entry.shard]
    if entry.offset + entry.size > _size(path):
        raise InputError(f"{path}: ends before byte {entry.offset + entry.size}", hint="it is truncated")
    with path.open("rb") as file:
        file.seek(entry.offset)
        return object_graph(file.read(entry.size), str(path))


def _names(keys: Mapping[str, Any], full: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """What each tensor is called here, by its key."""
    paths = {key: full.get(key) or key.removesuffix(_VALUE) for key in keys}
    plain = {key: key.removesuffix(_VALUE) for key in keys}
    slots = [key for key in keys if _OF_OPTIMIZER.search(plain[key])]
    own = [key for key in sorted(keys, key=lambda key: (key.startswith("_all_variables/"), key)) if key not in slots]
    layers = {layer.path[0] for layer in layers_of(config)}
    cut = _segments_of_the_model([paths[key] for key in own], layers)
    names = {key: logical_name(_from_layer(paths[key].split("/"), layers, cut)) for key in own}
    by_path = {paths[key]: names[key] for key in own}
    names.update(zip(slots, slot_names(by_path, [paths[key] for key in slots]), strict=True))
    return dict(zip(names, unique(list(names.values())), strict=True))


def _from_layer(segments: list[str], layers: set[str], cut: int) -> list[str]:
    known = next((place for place, segment in enumerate(segments[:-1]) if segment in layers), None)
    if known is not None:
        return segments[known:]
    return segments[cut:] if len(segments) > cut + 1 else segments


def _segments_of_the_model(paths: Sequence[str], layers: set[str]) -> int:
    """How many segments at the begin of all paths are the model's name: one, where a Sequential model gave it."""
    split = [path.split("/") for path in paths if "/" in path and not path.startswith("seed_generator")]
    shared = {segments[0] for segments in split}
    is_cell = any(CELL.fullmatch(segments[1]) for segments in split)
    deep = all(len(segments) > 2 for segments in split)
    return 1 if not layers and len(shared) == 1 and deep and not is_cell else 0
