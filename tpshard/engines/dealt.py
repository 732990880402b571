"""What each rank has of an engine's folder, by the engine's names: a file for each rank, or one store of all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.checkpoint import Checkpoint, Place, WeightFile, weight_file
from tpshard.dcp import read_dcp
from tpshard.dcp_metadata import METADATA_NAME
from tpshard.engines.files import read_engine_file
from tpshard.engines.finding import RankFile, file_names, mesh_of, rank_files
from tpshard.engines.profile import Engine
from tpshard.engines.settings.kind import Settings
from tpshard.errors import InputError, printable
from tpshard.header import Header
from tpshard.layout import Shard
from tpshard.mesh import Mesh
from tpshard.pickle_machine import Global
from tpshard.torch_dist import BACKEND_FILE, COMMON, Own, deal, store_in
from tpshard.torch_files import read_torch_tree


@dataclass(frozen=True, slots=True)
class Dealt:
    """``found``: the weight files, ``files``: the same with their sizes; ``objects``: what each rank has beside
    tensors. ``store``: whether it is one store, whatever ranks wrote it; ``own``: files that mean something to the
    engine alone."""

    mesh: Mesh
    found: Sequence[RankFile]
    files: Sequence[WeightFile]
    ranks: Sequence[Own]
    objects: Sequence[Mapping[Any, Any]]
    store: bool = False
    own: Collection[str] = ()
    warnings: tuple[str, ...] = ()


def dealt(folder: Path, engine: Engine, settings: Settings) -> Dealt:
    """Raises InputError, StorageError."""
    found = rank_files(file_names(folder), engine)
    store = store_in(folder) if engine.store and folder.is_dir() else None
    if store is None:
        return _of_files(folder, engine, settings, found)
    if found:
        what = f"holds a store in {store.name}, and files of ranks ({found[0].name})"
        raise InputError(f"{folder}: {what}", hint="give the folder of one of them")
    return _of_store(folder, store, settings)


def _of_files(folder: Path, engine: Engine, settings: Settings, found: Sequence[RankFile]) -> Dealt:
    mesh = mesh_of(folder, found, settings.mesh(folder))
    files: list[WeightFile] = []
    ranks: list[Own] = [{} for _ in range(mesh.ranks)]
    objects: list[Mapping[Any, Any]] = [{} for _ in range(mesh.ranks)]
    for index, file in enumerate(found):
        header, beside = read_engine_file(folder / file.name, engine, settings.inert)
        files.append(weight_file(folder, file.name, header))
        rank = file.pp * mesh.tp + file.tp
        objects[rank] = beside
        for name, entry in header.entries.items():
            if name in ranks[rank]:
                raise InputError(f"{folder}: tensor {printable(name)} is in two files of one rank")
            ranks[rank][name] = index, entry
    return Dealt(mesh, found, files, ranks, objects)


def _of_store(folder: Path, store: Path, settings: Settings) -> Dealt:
    dcp = read_dcp(store)
    ranks, left = deal(dcp)
    mesh, at = Mesh(len(ranks)), store.relative_to(folder)
    names = [(at / file.name).as_posix() for file in dcp.files]
    files = [weight_file(folder, n, Header({}, {}, 0, f.size)) for n, f in zip(names, dcp.files, strict=True)]
    beside: object = {}
    if (store / COMMON).is_file():
        beside = read_torch_tree(store / COMMON, [Global(module, name) for module, name in settings.inert]).value
    objects = [beside if isinstance(beside, dict) else {}] * mesh.ranks
    warnings = (f"{printable(left[0])} and {len(left) - 1} more are not of the model: left out",) if left else ()
    return Dealt(
        mesh,
        [RankFile(name, 0, 0, part) for part, name in enumerate(names)],
        files,
        ranks,
        objects,
        store=True,
        own={(at / name).as_posix() for name in (METADATA_NAME, BACKEND_FILE, COMMON)},
        warnings=warnings,
    )


def check_once(checkpoint: Checkpoint) -> None:
    """A store has each cell once: ranks that have the same cells have them from one place, others from others. Raises
    InputError where the policy cuts what is whole there, or the other way round."""
    for name, tensor in checkpoint.tensors.items():
        shards: dict[Place, Shard] = {}
        places: dict[Shard, Place] = {}
        for shard, place in zip(tensor.layout.shards, tensor.places, strict=True):
            if shard is None or place is None or not shard.covered:
                continue
            if shards.setdefault(place, shard) != shard:
                what = "is cut by the policy, and whole in the store"
            elif places.setdefault(shard, place) != place:
                what = "is whole by the policy, and cut in the store"
            else:
                continue
            raise InputError(f"{checkpoint.folder}: {printable(name)}: {what}", hint="is config.json the model's?")
