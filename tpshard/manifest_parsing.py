"""From the manifest's JSON to records: nothing in it is believed before it is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from tpshard.digest import RECORDED
from tpshard.errors import InputError, printable
from tpshard.folder import MANIFEST_NAME, is_bare_name, read_json
from tpshard.header import DTYPE_BITS, check_names
from tpshard.layout import Layout, Shape, Shard, Span
from tpshard.manifest import (
    FORMAT,
    FRAME_KEY,
    KEYS,
    MAX_RANKS,
    VERSION,
    CarriedRecord,
    FileRecord,
    Manifest,
    SourceFile,
    TensorRecord,
    seal_of,
)
from tpshard.mesh import AXES, Mesh
from tpshard.roles import Gather, Kind, Role


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard folder, fully checked. Raises InputError."""
    path = folder / MANIFEST_NAME
    if folder.is_dir() and not path.exists():
        raise InputError(f"{folder}: has no {MANIFEST_NAME}", hint="give a folder that split or reshard wrote")
    return parse_manifest(read_json(path), str(path))


def parse_manifest(data: dict[str, Any], where: str) -> Manifest:
    """A manifest's JSON, fully checked. Raises InputError that begins with ``where``."""
    if data.get("format") != FORMAT:
        raise InputError(f"{where}: is not a tpshard manifest")
    if data.get("version") != VERSION:
        raise InputError(f"{where}: version {printable(repr(data.get('version')), 40)}, this tpshard reads {VERSION}")
    seal = data.pop("seal", None)
    try:
        wanted = seal_of(data)
    except UnicodeEncodeError:
        raise InputError(f"{where}: holds half a character, which is no text") from None
    if seal != wanted:
        raise InputError(f"{where}: was changed after it was written (its seal does not match)")
    return manifest_from(data, where)


def manifest_from(data: Mapping[str, Any], where: str) -> Manifest:
    """A manifest's data, fully checked. Raises InputError that begins with ``where``."""
    try:
        return _manifest_from(data)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", hint=error.hint) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{where}: is malformed: {type(error).__name__} {printable(str(error))}") from None


def _manifest_from(data: Mapping[str, Any]) -> Manifest:
    ranks = _count(data["ranks"], "ranks")
    if not 1 <= ranks <= MAX_RANKS:
        raise InputError(f"ranks is {ranks}, must be from 1 to {MAX_RANKS}")
    mesh = _mesh_from(data["mesh"])
    if mesh.ranks != ranks:
        raise InputError(f"the mesh has {mesh.ranks} ranks, ranks is {ranks}")
    unknown = sorted(set(data) - KEYS)
    if unknown:
        raise InputError(f"unknown field '{printable(unknown[0])}'")
    if data["digest"] not in RECORDED:
        raise InputError(f"digest {printable(repr(data['digest']), 40)} is unknown")
    layouts = [_layout_from(item) for item in data["layouts"]]
    roles = [_role_from(item) for item in data["roles"]]
    if any(layout.ranks != ranks for layout in layouts):
        raise InputError(f"a layout has not {ranks} ranks")
    manifest = Manifest(
        mesh=mesh,
        engine=str(data["engine"]),
        algorithm=data["digest"],
        policy=str(data["policy"]["name"]),
        policy_documents=tuple(data["policy"]["documents"]),
        sources=tuple(_source_from(s) for s in data["sources"]),
        tensors=tuple(_tensor_from(item, layouts, roles, ranks) for item in data["tensors"]),
        files=tuple(_file_from(item, str(data["engine"])) for item in data["files"]),
        carried=tuple(
            CarriedRecord(_relative(c["name"]), _count(c["size"], "size"), str(c["digest"])) for c in data["carried"]
        ),
    )
    _check_whole(manifest)
    return manifest


def _mesh_from(item: Mapping[str, Any]) -> Mesh:
    if set(item) != set(AXES):
        raise InputError(f"mesh {printable(str(item))} has not the axes {', '.join(AXES)}")
    sizes = {axis: _count(item[axis], axis) for axis in AXES}
    return Mesh(**sizes)


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
    by_name = {record.name: record for record in manifest.tensors}
    for record in manifest.tensors:
        twin = by_name.get(record.copy_of) if record.copy_of else record
        if twin is None or (twin.dtype, twin.layout.shape, twin.digest) != (
            record.dtype,
            record.layout.shape,
            record.digest,
        ):
            raise InputError(f"{printable(record.name)}: is no copy of '{printable(record.copy_of)}'")
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
    copy_of = str(item.get("copy_of", ""))
    return TensorRecord(name, item["dtype"], layout, role, part, source, str(item["digest"]), tuple(shards), copy_of)


def _source_from(item: Mapping[str, Any]) -> SourceFile:
    metadata = _texts(item["metadata"])
    return SourceFile(_relative(item["name"]) if FRAME_KEY in metadata else _bare(item["name"]), metadata)


def _file_from(item: Mapping[str, Any], engine: str) -> FileRecord:
    rank, part, size = _count(item["rank"], "rank"), _count(item["part"], "part"), _count(item["size"], "size")
    name = _relative(item["name"]) if engine else _bare(item["name"])
    return FileRecord(name, rank, part, size, str(item["digest"]))


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
