"""Keras' files: ``.keras``, ``.weights.h5`` (also in parts), ``.h5``. Where each variable's bytes lie; none are read.

A ``.keras`` is a zip whose ``model.weights.h5`` is stored, not deflated, so that a variable lies at the member's
offset plus its own.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpshard.containers import FRAME_SUFFIX, INSIDE_KEY, Container, checked
from tpshard.errors import InputError, StorageError, printable
from tpshard.folder import CONFIG, is_bare_name, natural_order, read_json
from tpshard.header import Entry, Header, check_names, parse_json_object
from tpshard.keras_hdf5 import Tables, read_tables
from tpshard.keras_names import (
    LayerConfig,
    from_layer,
    layers_of,
    logical_name,
    numbered_slots,
    slot_names,
    snake,
    unique,
    variable_names,
)
from tpshard.manifest import FRAME_KEY

WEIGHTS_MEMBER = "model.weights.h5"
MAX_CONFIG = 256 * 2**20


def open_keras(path: Path) -> Container:
    """A Keras checkpoint by its file: ``.keras``, ``.weights.h5``, ``.weights.json`` of one in parts, ``.h5``. The
    configuration is the file's own, or config.json beside it. Raises InputError, UsageError, StorageError."""
    if path.name.endswith(".keras"):
        return _open_zip(path)
    if path.name.endswith(".weights.json"):
        return _open_parts(path)
    tables = read_tables(path, 0, path.stat().st_size if path.is_file() else 0)
    legacy = bool(tables.weights)
    config = tables.config or config_beside(path.parent / CONFIG)
    names = _legacy_names(tables) if legacy else _names([tables], _parsed(config, path))[0]
    inside = tables.config is not None
    return Container(path.parent, {path.name: _header(path, tables.entries, names, inside)}, config, inside)


def _open_zip(path: Path) -> Container:
    offset, size, config = _members(path)
    tables = read_tables(path, offset, size)
    names = _names([tables], _parsed(config, path))[0]
    inside = config is not None
    return Container(path.parent, {path.name: _header(path, tables.entries, names, inside)}, config, inside)


def _open_parts(path: Path) -> Container:
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError(f"{path}: weight_map is missing or empty")
    files: dict[str, None] = {}
    for names in table.values():
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or not is_bare_name(name) or not name.endswith(".weights.h5"):
                raise InputError(f"{path}: '{printable(str(name))}' is not the name of a .weights.h5 file")
            files[name] = None
    paths = [path.parent / name for name in sorted(files, key=natural_order)]
    tables = [read_tables(part, 0, part.stat().st_size if part.is_file() else 0) for part in paths]
    config = config_beside(path.parent / CONFIG)
    named = _names(tables, _parsed(config, path))
    headers = {
        part.name: _header(part, table.entries, names) for part, table, names in zip(paths, tables, named, strict=True)
    }
    return Container(path.parent, headers, config, beside=(path.name,))


def config_beside(path: Path) -> bytes | None:
    """A configuration that was put beside weights without one, as ``model.to_json()`` writes it."""
    return path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_CONFIG else None


def _parsed(config: bytes | None, path: Path) -> Mapping[str, Any]:
    return parse_json_object(config, f"{path}: {CONFIG}") if config else {}


def _header(path: Path, entries: Mapping[str, Entry], names: Mapping[str, str], inside: bool = False) -> Header:
    check_names(names.values(), str(path))
    by_name = {names[key]: entry for key, entry in entries.items()}
    if len(by_name) != len(entries):
        raise InputError(f"{path}: {len(entries) - len(by_name)} tensors have another's name")
    metadata = {FRAME_KEY: f"{path.name}{FRAME_SUFFIX}"} | ({INSIDE_KEY: "inside"} if inside else {})
    return checked(path, path.stat().st_size, by_name, metadata)


# ---------------------------------------------------------------------------------------------- zip


def _members(path: Path) -> tuple[int, int, bytes | None]:
    """Where the weights lie in a ``.keras``, and its configuration."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            known = {info.filename: info for info in archive.infolist()}
            info = known.get(WEIGHTS_MEMBER)
            if info is None:
                raise InputError(f"{path}: holds no {WEIGHTS_MEMBER}", hint="is it a Keras 3 file?")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise InputError(f"{path}: {WEIGHTS_MEMBER} is deflated or encrypted", hint="save it with Keras again")
            file.seek(info.header_offset)
            local = file.read(30)
            if len(local) != 30 or local[:4] != b"PK\x03\x04":
                raise InputError(f"{path}: {WEIGHTS_MEMBER} has no header of its own", hint="it is damaged")
            name_length, extra_length = struct.unpack("<HH", local[26:30])
            offset = info.header_offset + 30 + name_length + extra_length
            config = known.get(CONFIG)
            if config is not None and config.file_size > MAX_CONFIG:
                raise InputError(f"{path}: {CONFIG} has {config.file_size} bytes, at most {MAX_CONFIG} are read")
            return offset, info.file_size, archive.read(config) if config else None
    except FileNotFoundError:
        raise InputError(f"{path}: is not there") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path}: is not a zip file: {printable(str(error))}") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------- names


def _names(parts: Sequence[Tables], config: Mapping[str, Any]) -> list[dict[str, str]]:
    """For each file of a ``.weights.h5``, its variables' names by their paths."""
    shapes = {key: entry.shape for part in parts for key, entry in part.entries.items()}
    known = {group: name for part in parts for group, name in part.names.items()}
    layers, called = _by_name(config), _groups(config)
    names: dict[str, str] = {}
    of_group: dict[str, list[str]] = {}
    for key in sorted(shapes, key=natural_order):
        of_group.setdefault(key.rpartition("/")[0], []).append(key)
    for group in _in_order(of_group, called):
        keys, owner = of_group[group], group.removesuffix("vars").rstrip("/")
        if owner == "optimizer" or owner.startswith("optimizer/"):
            continue
        path = _path(owner, known, called, layers)
        layer = layers.get(path[-1])
        if layer is None and CELLS.search(owner) and len(path) > 1:
            layer = layers.get(path[-2])
        own = variable_names(layer.kind if layer else None, layer.settings if layer else {}, [shapes[k] for k in keys])
        names.update({key: logical_name([*path, name]) for key, name in zip(keys, own, strict=True)})
    trained = {name: shapes[key] for key, name in names.items() if not _is_state(name)}
    slots = [key for group, keys in of_group.items() if group.partition("/")[0] == "optimizer" for key in keys]
    names.update(zip(slots, numbered_slots([shapes[key] for key in slots], trained), strict=True))
    names = dict(zip(names, unique(list(names.values())), strict=True))
    return [{key: names[key] for key in part.entries} for part in parts]


CELLS = re.compile(r"/cell$")


_ATTENTION = {"query": "query", "key": "key", "value": "value", "output": "attention_output"}


def _path(
    owner: str, known: Mapping[str, str], called: Mapping[str, str], layers: Mapping[str, LayerConfig]
) -> list[str]:
    """The names of a group's layers: as the file says, or the configuration; else as the group is called."""
    path: list[str] = []
    for end in [match.start() for match in re.finditer("/", owner)] + [len(owner)]:
        step = owner[:end]
        leaf = step.rpartition("/")[2]
        around = layers.get(path[-1]) if path else None
        name = known.get(step) or called.get(step)
        if name is None and leaf in ("layers", "cells", "cell"):
            continue
        path.append(name or _attribute(leaf, around))
    return path or owner.split("/")


def _attribute(leaf: str, around: LayerConfig | None) -> str:
    """What a layer is called that is ``leaf`` of another, as Keras names it."""
    inner = around.settings.get("layer") if around else None
    if around is not None and isinstance(inner, Mapping) and isinstance(inner.get("config"), Mapping):
        name = str(inner["config"].get("name"))
        side = leaf.removesuffix("_layer")
        return name if leaf == "layer" else f"{side}_{name.removeprefix('forward_')}"
    return _ATTENTION.get(leaf.removesuffix("_dense"), leaf) if leaf.endswith("_dense") else leaf


def _is_state(name: str) -> bool:
    return name.rpartition(".")[2] in ("moving_mean", "moving_variance", "seed_generator_state", "mean", "variance")


def _by_name(config: Mapping[str, Any]) -> dict[str, LayerConfig]:
    """A model's layers by their names; of a recurrent layer's cell, the layer's."""
    found: dict[str, LayerConfig] = {}
    for layer in layers_of(config):
        found.setdefault(layer.name, layer)
        if layer.kind == "Bidirectional" and isinstance(layer.settings.get("layer"), Mapping):
            inner = layer.settings["layer"]
            settings = inner.get("config", {})
            for side in ("forward", "backward"):
                name = f"{side}_{str(settings.get('name')).removeprefix('forward_')}"
                found.setdefault(name, LayerConfig(str(inner.get("class_name")), (*layer.path, name), settings))
    return found


def _groups(config: Mapping[str, Any], around: str = "") -> dict[str, str]:
    """The layers' names by the paths of their groups, which are named by their classes; in the layers' order."""
    found: dict[str, str] = {}
    seen: dict[str, int] = {}
    settings = config.get("config")
    layers = settings.get("layers") if isinstance(settings, Mapping) else None
    for layer in layers if isinstance(layers, list) and around.count("/") < 64 else []:
        own = layer.get("config") if isinstance(layer, Mapping) else None
        if not isinstance(own, Mapping) or not isinstance(layer.get("class_name"), str):
            continue
        kind = snake(layer["class_name"])
        count = seen[kind] = seen.get(kind, -1) + 1
        group = f"{around}layers/{kind}" + (f"_{count}" if count else "")
        found[group] = str(own.get("name"))
        found.update(_groups(layer, f"{group}/"))
    return found


def _in_order(groups: Mapping[str, object], called: Mapping[str, str]) -> list[str]:
    """Groups in the order of the model's layers, as far as it is known: an optimizer's variables go by it."""
    places = {group: place for place, group in enumerate(called)}

    def place(group: str) -> int:
        steps = [group[: match.start()] for match in re.finditer("/", group)]
        return max((places[step] for step in steps if step in places), default=len(places))

    return sorted(groups, key=place)


def _legacy_names(tables: Tables) -> dict[str, str]:
    """Of an ``.h5`` as Keras 2 wrote it: layers and variables by the user's names."""
    names: dict[str, str] = {}
    paths: dict[str, str] = {}
    inside = "model_weights/" if any(key.startswith("model_weights/") for key in tables.weights) else ""
    layers = [layer for layer in tables.order if f"{inside}{layer}" in tables.weights]
    for layer in layers or [key.removeprefix(inside) for key in tables.weights]:
        for path in tables.weights.get(f"{inside}{layer}", ()):
            key = f"{inside}{layer}/{path}"
            if key in tables.entries:
                names[key] = paths[path] = logical_name(from_layer(path, layer))
    slots = tables.weights.get("optimizer_weights", ())
    named = zip(slots, slot_names(paths, slots), strict=True)
    names.update({f"optimizer_weights/{path}": name for path, name in named})
    for key in tables.entries:
        names.setdefault(key, key.replace("/", "."))
    return dict(zip(names, unique(list(names.values())), strict=True))
