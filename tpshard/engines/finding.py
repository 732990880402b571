"""Whose files a folder has, and of which ranks: by their names, or by what the engine says itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tpshard.document import did_you_mean
from tpshard.engines.profile import Engine
from tpshard.engines.readers.kind import Reader
from tpshard.engines.readers.of import READERS, readers_for
from tpshard.engines.shelf import engine_called, engines
from tpshard.errors import InputError, UsageError, printable
from tpshard.mesh import Mesh
from tpshard.torch_dist import store_in

_HUGGING_FACE = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class RankFile:
    """A weight file found in a folder; ``tp``: its rank in its stage ``pp``, or among all where files are numbered so;
    ``ranks``: how many its name says there are."""

    name: str
    tp: int
    pp: int
    part: int
    ranks: int | None = None


def source_called(name: str) -> Engine | Reader:
    """Whose folders can be read under a name. Raises UsageError where there is none."""
    known: dict[str, Engine | Reader] = {**engines(), **READERS}
    if name.partition(":")[0] in engines():
        return engine_called(name)
    if name not in known:
        hint = did_you_mean(name, known) or f"engines: {', '.join(known)}"
        raise UsageError(f"no engine is called '{printable(name, 40)}'", hint=hint)
    return known[name]


def recognised(folder: Path) -> Engine | Reader | None:
    """Whose files a folder has; None where there are none. A folder that has Hugging Face's weights, too, is taken for
    theirs: trainers write both. Raises UsageError where it is not clear."""
    if not folder.is_dir() or any((folder / name).is_file() for name in _HUGGING_FACE):
        return None  # the usual case, for which no profile need be read
    names = file_names(folder)
    known = [engine for engine in engines().values() if engine.recognised]
    fitting: list[Engine | Reader] = [
        engine for engine in known if rank_files(names, engine) or (engine.store and store_in(folder) is not None)
    ]
    whole = any(folder.glob("*.safetensors"))
    fitting += [reader for reader in readers_for(folder) if reader.by_header or not whole]
    if len(fitting) > 1:
        shown = ", ".join(engine.name for engine in fitting)
        raise UsageError(f"{folder}: could be of several engines: {shown}", hint="say which with --from")
    return fitting[0] if fitting else None


def file_names(folder: Path) -> list[str]:
    """All paths in a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def rank_files(names: Sequence[str], engine: Engine) -> list[RankFile]:
    """Those of an engine's names, sorted by rank and part."""
    found = []
    for name in names:
        for template in engine.files:
            values = template.read(name)
            if values is not None:
                numbers = {place: int(value) for place, value in values.items()}
                tp = next((numbers[place] for place in ("tp", "rank", "global") if place in numbers), 0)
                found.append(RankFile(name, tp, numbers.get("pp", 0), numbers.get("part", 0), numbers.get("ranks")))
    return sorted(found, key=lambda file: (file.pp, file.tp, file.part))


def mesh_of(folder: Path, files: Sequence[RankFile], told: Mesh | None) -> Mesh:
    """The ranks that the files are of; ``told``: what the engine's own settings say. Raises InputError where a file is
    missing, or there is one too many."""
    if not files:
        raise InputError(f"{folder}: holds no weight files of this engine")
    said = sorted({file.ranks for file in files if file.ranks is not None})
    if len(said) > 1:
        raise InputError(f"{folder}: has files of {said[0]} ranks and of {said[1]}", hint="keep those of one run")
    mesh = told or Mesh(tp=said[0] if said else 1 + max(file.tp for file in files), pp=1 + max(f.pp for f in files))
    parts: dict[int, list[int]] = {}
    for file in files:
        parts.setdefault(file.pp * mesh.tp + file.tp, []).append(file.part)
    for rank in range(mesh.ranks):
        if rank not in parts:
            at = mesh.coordinates(rank)
            stage = f" of stage {at.pp}" if mesh.pp > 1 else ""
            what = f"rank {at.tp}{stage} has no file, and there are {mesh.tp} ranks"
            raise InputError(f"{folder}: {what}", hint="is the folder complete?")
    for rank, own in sorted(parts.items()):
        if rank >= mesh.ranks:
            raise InputError(f"{folder}: has a file of rank {rank}, and there are {mesh.ranks} ranks")
        if own != list(range(len(own))):
            raise InputError(f"{folder}: of rank {rank} there are the parts {own}, not 0 to {max(own)}")
    return mesh
