"""The manifest: the record of a shard folder, one JSON file with a published schema.

Merge, reshard and verify need it and the files, not the policy that made them. Layouts stand in a table, since
thousands of tensors share a few. Nothing in it depends on the time, the machine or the number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from tpshard.digest import ALGORITHMS
from tpshard.errors import InputError, printable
from tpshard.folder import MANIFEST_NAME, is_bare_name, read_json
from tpshard.header import DTYPE_BITS, check_names
from tpshard.layout import Layout, Shape, Shard, Span
from tpshard.roles import Gather, Kind, Role

FORMAT = "tpshard-manifest"
VERSION = 1
MAX_RANKS = 4096  # bounds memory on a hostile manifest; split refuses more as well
KEYS = frozenset(
    {"format", "version", "ranks", "digest", "policy", "sources", "files", "carried", "layouts", "roles", "tensors"}
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

    ``digest`` is of the whole tensor's bytes in C order; ``shards`` of each rank's own tensor (None where the rank
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

    def shard_digest(self, rank: int) -> str | None:
        """The digest of one rank's own tensor; None where it holds nothing."""
        shard = self.layout.shards[rank]
        if shard is None:
            return None
        return self.digest if shard == Shard.whole(self.layout.shape) else self.shards[rank]


@dataclass(frozen=True, slots=True)
class Manifest:
    ranks: int
    algorithm: str
    policy: str
    policy_documents: Sequence[object]
    sources: tuple[SourceFile, ...]
    tensors: tuple[TensorRecord, ...]
    files: tuple[FileRecord, ...]
    carried: tuple[CarriedRecord, ...]


# ---------------------------------------------------------------------------------------------- to JSON


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
    layouts: dict[Layout, int] = {}
    roles: dict[Role, int] = {}
    tensors = [_tensor_as_data(record, layouts, roles) for record in manifest.tensors]
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "ranks": manifest.ranks,
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
    return _sealed(data)


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
    return data


def _sealed(data: dict[str, Any]) -> bytes:
    """The JSON, top-level fields and list items on lines of their own (so that it can be read and compared)."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value:
            items = ",\n".join(f"  {json.dumps(item, separators=(',', ':'), ensure_ascii=False)}" for item in value)
            lines.append(f"{json.dumps(key)}: [\n{items}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    lines.append(f'"seal": "{_seal(data)}"')
    return ("{\n " + ",\n ".join(lines) + "\n}\n").encode("utf-8")


def _seal(data: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces) of everything but the seal itself."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


# ---------------------------------------------------------------------------------------------- from JSON


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard folder, fully checked. Raises InputError."""
    path = folder / MANIFEST_NAME
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise InputError(f"{path}: is not a tpshard manifest")
    if data.get("version") != VERSION:
        raise InputError(f"{path}: version {printable(repr(data.get('version')), 40)}, this tpshard reads {VERSION}")
    seal = data.pop("seal", None)
    if seal != _seal(data):
        raise InputError(f"{path}: was changed after it was written (its seal does not match)")
    try:
        return _manifest_from(data)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", hint=error.hint) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: is malformed: {type(error).__name__} {printable(str(error))}") from None


def _manifest_from(data: Mapping[str, Any]) -> Manifest:
    ranks = _count(data["ranks"], "ranks")
    if not 1 <= ranks <= MAX_RANKS:
        raise InputError(f"ranks is {ranks}, must be from 1 to {MAX_RANKS}")
    unknown = sorted(set(data) - KEYS)
    if unknown:
        raise InputError(f"unknown field '{printable(unknown[0])}'")
    if data["digest"] not in ALGORITHMS:
        raise InputError(f"digest {printable(repr(data['digest']), 40)} is unknown")
    layouts = [_layout_from(item) for item in data["layouts"]]
    roles = [_role_from(item) for item in data["roles"]]
    if any(layout.ranks != ranks for layout in layouts):
        raise InputError(f"a layout has not {ranks} ranks")
    manifest = Manifest(
        ranks=ranks,
        algorithm=data["digest"],
        policy=str(data["policy"]["name"]),
        policy_documents=tuple(data["policy"]["documents"]),
        sources=tuple(SourceFile(_bare(s["name"]), _texts(s["metadata"])) for s in data["sources"]),
        tensors=tuple(_tensor_from(item, layouts, roles, ranks) for item in data["tensors"]),
        files=tuple(_file_from(item) for item in data["files"]),
        carried=tuple(
            CarriedRecord(_relative(c["name"]), _count(c["size"], "size"), str(c["digest"])) for c in data["carried"]
        ),
    )
    _check_whole(manifest)
    return manifest


def _check_whole(manifest: Manifest) -> None:
    check_names((record.name for record in manifest.tensors), "tensors")
    if len({record.name for record in manifest.tensors}) != len(manifest.tensors):
        raise InputError("a tensor is listed twice")
    for kind in (manifest.sources, manifest.carried):
        names = [record.name for record in kind]
        if len(set(names)) != len(names):
            raise InputError("a source file or a carried file is listed twice")
    places = {(record.rank, record.part) for record in manifest.files}
    if len(places) != len(manifest.files) or len({record.name for record in manifest.files}) != len(manifest.files):
        raise InputError("a file, or a rank's part, is listed twice")
    parts = {record.part for record in manifest.tensors} | {record.part for record in manifest.files}
    missing = {(rank, part) for rank in range(manifest.ranks) for part in parts} - places
    if missing:
        rank, part = min(missing)
        raise InputError(f"no file is listed for rank {rank}, part {part}")
    if any(rank >= manifest.ranks for rank, _ in places):
        raise InputError(f"a file is listed for a rank that is not among the {manifest.ranks}")
    if any(record.source >= len(manifest.sources) for record in manifest.tensors):
        raise InputError("a tensor names a source file that is not listed")


def _layout_from(item: Mapping[str, Any]) -> Layout:
    shape = _shape(item["shape"])
    return Layout(shape, tuple(_shard_from(shard, shape) for shard in item["shards"]))


def _shard_from(item: Mapping[str, Any] | None, whole: Shape) -> Shard | None:
    if item is None:
        return None
    spans = list(Shard.whole(whole).spans)
    for axis, runs in item["spans"].items():
        spans[int(axis)] = tuple(Span(_count(a, "run"), _count(b, "run")) for a, b in runs)
    return Shard(_shape(item["shape"]), tuple(spans))


def _role_from(item: Mapping[str, Any]) -> Role:
    if item["rule"] not in get_args(Kind) or item["gather"] not in get_args(Gather):
        raise InputError(f"role {printable(str(item))} is unknown")
    return Role(cast(Kind, item["rule"]), cast(Gather, item["gather"]), str(item["pattern"]))


def _tensor_from(item: Mapping[str, Any], layouts: Sequence[Layout], roles: Sequence[Role], ranks: int) -> TensorRecord:
    name = str(item["name"])
    shards = item.get("shards", [None] * ranks)
    if item["dtype"] not in DTYPE_BITS:
        raise InputError(f"{printable(name)}: dtype {printable(str(item['dtype']), 40)} is unknown")
    if len(shards) != ranks or not all(digest is None or isinstance(digest, str) for digest in shards):
        raise InputError(f"{printable(name)}: does not list a digest for each of {ranks} ranks")
    layout, role = layouts[_count(item["layout"], "layout")], roles[_count(item["role"], "role")]
    part, source = _count(item["part"], "part"), _count(item["source"], "source")
    return TensorRecord(name, item["dtype"], layout, role, part, source, str(item["digest"]), tuple(shards))


def _file_from(item: Mapping[str, Any]) -> FileRecord:
    rank, part, size = _count(item["rank"], "rank"), _count(item["part"], "part"), _count(item["size"], "size")
    return FileRecord(_bare(item["name"]), rank, part, size, str(item["digest"]))


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise InputError(f"{what} is {printable(repr(value), 40)}, not a count")
    return value


def _shape(value: object) -> Shape:
    if not isinstance(value, list):
        raise InputError(f"shape is {printable(repr(value), 40)}")
    return tuple(_count(n, "shape") for n in value)


def _texts(value: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(text, str) for text in value.values()):
        raise InputError("metadata of a source file is not text")
    return dict(value)


def _bare(name: object) -> str:
    if not isinstance(name, str) or not is_bare_name(name):
        raise InputError(f"'{printable(str(name))}' is not a file name")
    return name


def _relative(name: object) -> str:
    if not isinstance(name, str) or not all(is_bare_name(part) for part in name.split("/")):
        raise InputError(f"'{printable(str(name))}' is not a path inside the folder")
    return name
