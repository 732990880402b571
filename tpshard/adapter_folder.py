"""Folders of adapters, and the base model that goes with one.

The base's config.json is carried along under a name of its own: what was cut can then be recut, merged and checked
without the base, and whoever has that file in his shard folder has an adapter's shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tpshard.adapter import CONFIG_NAME, Adapter, parse_adapter
from tpshard.adapter_layout import Names, assign_adapter, missing_in_base
from tpshard.assignment import Assigned
from tpshard.checkpoint import Checkpoint, open_checkpoint, open_full
from tpshard.errors import InputError, StorageError, UsageError
from tpshard.folder import WeightFiles, read_json
from tpshard.layout import Shape
from tpshard.mesh import Grid
from tpshard.policy import Policy

WEIGHTS_NAME = "adapter_model.safetensors"
BASE_CONFIG_NAME = "tpshard-base-config.json"
BASE_NAMES_NAME = "tpshard-base-names.json"  # where the module's names of some targets are not those on disk
OF_THE_BASE = (BASE_CONFIG_NAME, BASE_NAMES_NAME)


@dataclass(frozen=True, slots=True)
class Base:
    """A base model: its config.json, and its headers where more than that was given. ``place`` is what was given;
    ``renamed``: by the module's names, those on disk where they are others."""

    place: Path
    config: Mapping[str, Any]
    config_bytes: bytes
    checkpoint: Checkpoint | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> Names:
        return Names(self.shapes or (), self.renamed)

    @property
    def shapes(self) -> Mapping[str, Shape] | None:
        """The shapes of its tensors; None where they are not known, or are those of packed words."""
        if self.checkpoint is None or "quantization_config" in self.config:
            return None
        return self.checkpoint.shapes

    @property
    def files(self) -> dict[str, bytes]:
        """What is carried along of it, by the names in a shard folder."""
        names = json.dumps(dict(sorted(self.renamed.items())), indent=1, ensure_ascii=False) + "\n"
        return {BASE_CONFIG_NAME: self.config_bytes} | ({BASE_NAMES_NAME: names.encode()} if self.renamed else {})


AskNames = Callable[[Base], Mapping[str, str]]


def read_base(place: Path) -> Base:
    """A base model by its folder (a checkpoint or shards), or by its config.json alone; a folder may have none. Raises
    InputError."""
    path = place / "config.json" if place.is_dir() else place
    if place.is_dir() and not path.exists():
        return Base(place, {}, b"{}\n", open_checkpoint(place))
    config = read_json(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    return Base(place, config, content, open_checkpoint(place) if place.is_dir() else None)


def open_adapter(folder: Path) -> Checkpoint:
    """An adapter's folder as a full checkpoint without a config. Raises InputError where it is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder" if folder.exists() else f"{folder}: is not there")
    if not (folder / WEIGHTS_NAME).exists():
        if (folder / "adapter_model.bin").exists():
            hint = "save it again with safetensors"
            raise InputError(f"{folder}: holds adapter_model.bin; pickles are not read", hint=hint)
        hint = "--base is for adapters; leave it out for a model"
        raise InputError(f"{folder}: holds no {WEIGHTS_NAME}", hint=hint)
    if not (folder / CONFIG_NAME).exists():
        raise InputError(f"{folder}: holds no {CONFIG_NAME}", hint="it tells rank and alpha: get it from the adapter")
    for name in OF_THE_BASE:
        if (folder / name).exists():
            raise InputError(f"{folder}: holds a file called {name}", hint="remove or rename it")
    return replace(open_full(folder, WeightFiles((WEIGHTS_NAME,), None)), config={})


def adapter_of(checkpoint: Checkpoint) -> Adapter:
    """What the tensors of an adapter's folder or shards are. Raises InputError."""
    path = checkpoint.folder / CONFIG_NAME
    try:
        return parse_adapter(read_json(path), checkpoint.shapes)
    except InputError as error:
        where = "" if error.message.startswith(str(path)) else f"{checkpoint.folder}: "
        raise InputError(f"{where}{error.message}", hint=error.hint) from None


def recorded_base(shards: Checkpoint) -> Base | None:
    """The base that the shards of an adapter were cut by, as far as it was carried along; None for a model's."""
    return _recorded(shards.folder) if BASE_CONFIG_NAME in shards.carried else None


def _recorded(folder: Path) -> Base:
    base, path = read_base(folder / BASE_CONFIG_NAME), folder / BASE_NAMES_NAME
    names = read_json(path) if path.exists() else {}
    if not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{path}: holds what is no name")
    return replace(base, renamed=names)


def open_with_base(folder: Path, base: Path, ask_names: AskNames) -> tuple[Checkpoint, Base]:
    """An adapter's folder and its base."""
    checkpoint = open_adapter(folder)
    return checkpoint, with_names(read_base(base), adapter_of(checkpoint), ask_names)


def assign_by_base(policy: Policy, base: Base, checkpoint: Checkpoint, grid: Grid) -> tuple[Assigned, list[str]]:
    """The layouts of an adapter's tensors, and warnings. Raises UsageError where more than tensor parallelism is asked
    for."""
    if grid.mesh.is_grid or grid.whole_experts:
        raise UsageError("an adapter is cut for tensor parallelism alone", hint="use --tp without --ep and --pp")
    adapter, disk = adapter_of(checkpoint), base.names
    assigned = assign_adapter(policy, base.config, adapter, checkpoint.shapes, grid.mesh.tp, base.shapes, disk)
    return assigned, missing_in_base(adapter, base.shapes, disk)


def with_names(base: Base, adapter: Adapter, ask: AskNames) -> Base:
    """The base with the names on disk of those targets that it has under other names, as far as ``ask`` knows."""
    wanted = [target.weight for target in adapter.targets] + list(adapter.replaced)
    if base.shapes is None or all(base.names.find(name) for name in wanted):
        return base
    known = ask(base)
    return replace(base, renamed={name: known[name] for name in wanted if name in known})


def adapter_base(folder: Path, given: Path | None) -> Base | None:
    """The base of an adapter's shards: the one that is given, which must be the recorded one; None for a model's.

    Raises UsageError where a base is given for a model."""
    path = folder / BASE_CONFIG_NAME
    if not path.exists():
        if given is not None:
            hint = "leave it out"
            raise UsageError(f"{folder}: holds no adapter's shards, --base is for those", hint=hint)
        return None
    recorded = _recorded(folder)
    if given is None:
        return recorded
    base = read_base(given)
    _require_same(recorded, base)
    return replace(base, renamed=recorded.renamed)


def _require_same(recorded: Base, given: Base) -> None:
    """Raises InputError where another base than the recorded one is given."""
    for key in sorted({*recorded.config, *given.config} - {"_name_or_path", "transformers_version"}):
        was, now = recorded.config.get(key), given.config.get(key)
        if was != now:
            what = f"{given.place}: is not the base that the adapter was cut by: {key} is {now!r}, was {was!r}"
            raise InputError(what, hint="give the one that split was given")
