"""Whose files a folder has, and of which ranks: by their names alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tpshard.engines.profile import Engine
from tpshard.engines.shelf import engines
from tpshard.errors import InputError, UsageError
from tpshard.mesh import Mesh


@dataclass(frozen=True, slots=True)
class RankFile:
    """A weight file found in a folder."""

    name: str
    tp: int
    pp: int
    part: int


def recognised(folder: Path) -> Engine | None:
    """The engine whose files a folder has; None where there is none. Raises UsageError where it is not clear."""
    if not folder.is_dir():
        return None
    fitting = [engine for engine in engines().values() if rank_files(folder, engine)]
    if len(fitting) > 1:
        names = ", ".join(engine.name for engine in fitting)
        raise UsageError(f"{folder}: could be of several engines: {names}", hint="say which with --from")
    return fitting[0] if fitting else None


def rank_files(folder: Path, engine: Engine) -> list[RankFile]:
    """The files with an engine's names, sorted by rank and part."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        for template in engine.files:
            values = template.read(name)
            if values is not None:
                numbers = {place: int(value) for place, value in values.items()}
                tp = numbers.get("tp", numbers.get("rank", 0))
                found.append(RankFile(name, tp, numbers.get("pp", 0), numbers.get("part", 0)))
    return sorted(found, key=lambda file: (file.pp, file.tp, file.part))


def mesh_of(folder: Path, files: Sequence[RankFile]) -> Mesh:
    """The ranks that the files are of. Raises InputError where one is missing."""
    if not files:
        raise InputError(f"{folder}: holds no weight files of this engine")
    mesh = Mesh(tp=1 + max(file.tp for file in files), pp=1 + max(file.pp for file in files))
    have = {(file.pp, file.tp) for file in files}
    for rank in range(mesh.ranks):
        at = mesh.coordinates(rank)
        if (at.pp, at.tp) not in have:
            stage = f" of stage {at.pp}" if mesh.pp > 1 else ""
            raise InputError(
                f"{folder}: rank {at.tp}{stage} has no file, rank {mesh.tp - 1} has", hint="is the folder complete?"
            )
    for pp, tp in sorted(have):
        parts = [file.part for file in files if (file.pp, file.tp) == (pp, tp)]
        if parts != list(range(len(parts))):
            raise InputError(f"{folder}: of rank {tp} there are the parts {parts}, not 0 to {max(parts)}")
    return mesh
