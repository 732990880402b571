"""The manifest: the record of a shard folder, one JSON file with a published schema.

Merge, reshard and verify need it and the files, not the policy that made them. Layouts stand in a table, since
thousands of tensors share a few. Nothing in it depends on the time, the machine or the number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpshard.layout import Layout, Shape, Shard
from tpshard.mesh import Mesh
from tpshard.roles import Role

FORMAT = "tpshard-manifest"
RANK_FORMAT = "tpshard-rank"
VERSION = 1
FRAME_KEY = "tpshard.frame"  # in a source's metadata: the file that has what lay around its tensors
MAX_RANKS = 4096  # bounds memory on a hostile manifest; split refuses more as well
KEYS = frozenset(
    {
        "format",
        "version",
        "ranks",
        "mesh",
        "engine",
        "digest",
        "policy",
        "sources",
        "files",
        "carried",
        "layouts",
        "roles",
        "tensors",
    }
)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A weight file of the shard folder; ``size`` in bytes."""

    name: str
    rank: int
    part: int
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class CarriedRecord:
    """A file that goes along unchanged: a path relative to the folder."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A weight file of the checkpoint that was cut, so that merge can make it again."""

    name: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor: its layout and role, in which part of each rank's files it lies, where it came from, its digests.

    ``copy_of``: the tensor whose copy it is, for an engine that wants it twice; the model has it once. ``digest`` is of
    the whole tensor's bytes in C order; ``shards`` of each rank's own tensor (None where the rank
    holds the whole tensor, whose digest is ``digest``, or nothing).
    """

    name: str
    dtype: str
    layout: Layout
    role: Role
    part: int
    source: int
    digest: str
    shards: tuple[str | None, ...]
    copy_of: str = ""

    def shard_digest(self, rank: int) -> str | None:
        """The digest of one rank's own tensor; None where it holds nothing."""
        shard = self.layout.shards[rank]
        if shard is None:
            return None
        return self.digest if shard == Shard.whole(self.layout.shape) else self.shards[rank]


@dataclass(frozen=True, slots=True)
class Manifest:
    """``engine``: whose files these are; empty for tpshard's own. ``recorded``: False where there is no manifest, and
    this is what it would say; digests are then empty."""

    mesh: Mesh
    algorithm: str
    policy: str
    policy_documents: Sequence[object]
    sources: tuple[SourceFile, ...]
    tensors: tuple[TensorRecord, ...]
    files: tuple[FileRecord, ...]
    carried: tuple[CarriedRecord, ...]
    engine: str = ""
    recorded: bool = True

    @property
    def ranks(self) -> int:
        return self.mesh.ranks


def layout_as_data(layout: Layout) -> dict[str, Any]:
    """A layout as JSON data: of each rank its own shape, and the runs along the axes that are not whole."""
    return {"shape": list(layout.shape), "shards": [_shard_as_data(shard, layout.shape) for shard in layout.shards]}


def _shard_as_data(shard: Shard | None, whole: Shape) -> dict[str, Any] | None:
    return {"shape": list(shard.shape), "spans": shard_spans(shard, whole)} if shard else None


def shard_spans(shard: Shard | None, whole: Shape) -> dict[str, list[list[int]]]:
    """A shard's runs along the axes that are not whole, by the axis's number as text."""
    full = Shard.whole(whole).spans
    spans = shard.spans if shard else ((),) * len(whole)
    return {str(axis): [list(run) for run in runs] for axis, runs in enumerate(spans) if runs != full[axis]}


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest file, its own digest included: the last field, over everything before it."""
    return sealed(_as_data(manifest))


def rank_record_bytes(manifest: Manifest, rank: int) -> bytes:
    """What one rank knows of the manifest, sealed as it is."""
    return sealed({**_as_data(manifest), "format": RANK_FORMAT, "rank": rank})


def rank_record_name(rank: int, ranks: int) -> str:
    return f"tpshard-rank-{rank:05d}-of-{ranks:05d}.json"


def _as_data(manifest: Manifest) -> dict[str, Any]:
    layouts: dict[Layout, int] = {}
    roles: dict[Role, int] = {}
    tensors = [_tensor_as_data(record, layouts, roles) for record in manifest.tensors]
    return {
        "format": FORMAT,
        "version": VERSION,
        "ranks": manifest.ranks,
        "mesh": manifest.mesh.as_data(),
        "engine": manifest.engine,
        "digest": manifest.algorithm,
        "policy": {"name": manifest.policy, "documents": list(manifest.policy_documents)},
        "sources": [{"name": s.name, "metadata": dict(sorted(s.metadata.items()))} for s in manifest.sources],
        "files": [
            {"name": f.name, "rank": f.rank, "part": f.part, "size": f.size, "digest": f.digest} for f in manifest.files
        ],
        "carried": [{"name": c.name, "size": c.size, "digest": c.digest} for c in manifest.carried],
        "layouts": [layout_as_data(layout) for layout in layouts],
        "roles": [{"rule": r.rule, "gather": r.gather, "pattern": r.pattern} for r in roles],
        "tensors": tensors,
    }


def _tensor_as_data(record: TensorRecord, layouts: dict[Layout, int], roles: dict[Role, int]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": record.name,
        "dtype": record.dtype,
        "layout": layouts.setdefault(record.layout, len(layouts)),
        "role": roles.setdefault(record.role, len(roles)),
        "part": record.part,
        "source": record.source,
        "digest": record.digest,
    }
    if any(record.shards):
        data["shards"] = list(record.shards)
    if record.copy_of:
        data["copy_of"] = record.copy_of
    return data


def sealed(data: dict[str, Any]) -> bytes:
    """The JSON, top-level fields and list items on lines of their own (so that it can be read and compared)."""
    lines, encode = [], json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    for key, value in data.items():
        if isinstance(value, list) and value:
            items = ",\n".join(f"  {encode(item)}" for item in value)
            lines.append(f"{json.dumps(key)}: [\n{items}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    lines.append(f'"seal": "{seal_of(data)}"')
    return ("{\n " + ",\n ".join(lines) + "\n}\n").encode("utf-8")


def seal_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces) of everything but the seal itself."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()
