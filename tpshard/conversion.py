"""A planned conversion, and carrying it out: the target folder is complete afterwards, or as it was before."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tpshard.carrying import carry_all
from tpshard.copies import require_equal_copies
from tpshard.digest import TENSORS, TREE
from tpshard.errors import UsageError
from tpshard.execute import execute
from tpshard.fingerprint import fingerprint
from tpshard.folder import MANIFEST_NAME, safetensors_names
from tpshard.journal import Head
from tpshard.launch import Launch
from tpshard.layout import Layout
from tpshard.library import policy_as_data
from tpshard.manifest import CarriedRecord, Manifest, SourceFile, TensorRecord, manifest_bytes
from tpshard.mesh import Mesh
from tpshard.plan import Item, Plain, Plan, arrange, bytes_of_ranks
from tpshard.policy import Policy
from tpshard.roles import Role
from tpshard.running import Task, leading, take_part
from tpshard.share import Written
from tpshard.staging import Shared, Staging, check_space, check_target, kept_for_later
from tpshard.stores.path import StorePath
from tpshard.stores.writing import StoreStaging

DEFAULT_MAX_SHARD_SIZE = 5 * 10**9
DEFAULT_DIGEST = "xxh3-128"
FROM_STORE = 16  # workers, each of which waits for 8 MiB (docs/stores.md)
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Options:
    """How to write. ``max_shard_size`` in bytes (None: the default); ``progress`` is called with bytes read.
    ``resume``: whether to go on from where another run was interrupted, and to keep what is finished if this one is.
    ``launch``: this process's place among several, which wait for one another for ``timeout`` seconds at the start."""

    max_shard_size: int | None = None
    digest: str = DEFAULT_DIGEST
    workers: int = 0
    progress: Callable[[int], object] = lambda count: None
    resume: bool = False
    launch: Launch | None = None
    timeout: float = 600.0

    @property
    def threads(self) -> int:
        cores = (os.cpu_count() or 1) // (self.launch.local_size if self.launch else 1)
        return self.workers or max(1, min(8, cores))

    def threads_from(self, source: Path) -> int:
        """More where the source is in a store: most of them wait."""
        return self.workers or (FROM_STORE if isinstance(source, StorePath) else self.threads)


@dataclass(frozen=True, slots=True)
class Conversion:
    """A planned conversion, ready to be shown or run. ``policy``, ``roles`` and ``mesh`` are set where shards are
    written; ``engine``: whose files they are, empty for tpshard's own; ``beside``: files to be carried that are not in
    the source's folder; ``manifest``: whether one is written; ``copies``: what is written twice, by its second name."""

    plan: Plan
    target: Path
    policy: Policy | None
    roles: Mapping[str, Role]
    warnings: tuple[str, ...]
    mesh: Mesh | None = None
    beside: Mapping[str, bytes] = field(default_factory=dict)
    engine: str = ""
    copies: Mapping[str, str] = field(default_factory=dict)
    manifest: bool = True

    @property
    def disk_needed(self) -> int:
        """Bytes of all weight files without their headers, which are less than the margin that is asked for."""
        return sum(map(sum, bytes_of_ranks(self.plan.items)))


@dataclass(frozen=True, slots=True)
class Done:
    """What a conversion wrote; seconds are wall time, fsync apart. ``resumed``: files that were finished before."""

    written: Written
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    sync_seconds: float
    resumed: int = 0


def without_manifest(conversion: Conversion) -> Conversion:
    """The engine's files alone. Raises UsageError for tpshard's own, which are nothing without it."""
    if not conversion.engine:
        raise UsageError("tpshard's own shards need their manifest", hint="leave out --no-manifest")
    return replace(conversion, manifest=False)


def run(conversion: Conversion, options: Options = Options()) -> Done:
    """Carry out a planned conversion. The target is complete afterwards, or as it was before."""
    plan, target = conversion.plan, conversion.target
    check_target(target, plan.source.place)
    begin = time.monotonic()
    origin = plan.source.manifest
    if origin is not None and not origin.recorded:
        require_equal_copies(plan.source)
    task = _task(conversion, options, file_digest_of(conversion, options))
    if isinstance(target, StorePath):
        return _to_store(conversion, task, options, target)
    if options.launch is not None and options.launch.rank > 0:
        written = take_part(task, target)
        return _done(conversion, written, begin, time.monotonic())
    staging = Staging(target, task.head, options.resume)
    with kept_for_later(staging), leading(task, staging) as lead:
        finished = [file for portion in lead.kept for file in portion.files]
        check_space(target, conversion.disk_needed - sum(file.size for file in finished))
        written = lead.write()
        _complete(conversion, staging, written, task.algorithm)
    return _done(conversion, written, begin, lead.copied, len(finished))


def _to_store(conversion: Conversion, task: Task, options: Options, target: StorePath) -> Done:
    """By this process, from the start."""
    if options.resume or options.launch is not None:
        what = "a run of several processes" if options.launch else "--resume"
        hint = "write to a folder and copy that" if options.launch else "start it again without"
        raise UsageError(f"{target}: {what} cannot write into a store", hint=hint)
    begin = time.monotonic()
    with StoreStaging(target, conversion.plan.ranks) as staging:
        written = execute(conversion.plan, staging, task.algorithm, task.threads, options.progress)
        copied = time.monotonic()
        _complete(conversion, staging, written, task.algorithm)
    return _done(conversion, written, begin, copied)


def _complete(conversion: Conversion, staging: Staging | StoreStaging, written: Written, algorithm: str) -> None:
    """All that is not weights, the manifest last."""
    plan = conversion.plan
    carried = carry_all(plan.source, conversion.beside, staging, algorithm)
    staging.sync()
    if conversion.policy is None:
        _write_index(plan, staging)
    elif conversion.manifest:
        staging.write(MANIFEST_NAME, manifest_bytes(manifest_of(conversion, written, carried, algorithm)))
    staging.commit()


def _task(conversion: Conversion, options: Options, algorithm: str) -> Task:
    plan = conversion.plan
    prints = fingerprint(
        plan, conversion.policy, conversion.roles, conversion.mesh, conversion.beside, conversion.engine, algorithm
    )
    names = [*(output.name for output in plan.outputs), *plan.source.carried, *conversion.beside]
    head = Head(prints, (*names, MANIFEST_NAME, INDEX_NAME))
    threads = options.threads_from(plan.source.folder)
    return Task(plan, head, algorithm, threads, options.progress, options.launch, options.timeout)


def _done(conversion: Conversion, written: Written, begin: float, copied: float, resumed: int = 0) -> Done:
    return Done(
        written=written,
        tensors=len(conversion.plan.items),
        bytes_read=sum(file.size for file in conversion.plan.source.files),
        bytes_written=sum(record.size for record in written.files),
        seconds=copied - begin,
        sync_seconds=time.monotonic() - copied,
        resumed=resumed,
    )


def file_digest_of(conversion: Conversion, options: Options) -> str:
    """The algorithm of the files' digests: the source's where it has one. Where no manifest keeps them, or they only
    have to find faults, they are put together from the tensors' digests, if the files are nothing but tensors."""
    origin, plan = conversion.plan.source.manifest, conversion.plan
    wanted = origin.algorithm if origin and origin.recorded else options.digest
    if isinstance(plan.arrangement, Plain) and (wanted in (TENSORS, TREE) or conversion.policy is None):
        return TREE
    return TENSORS if wanted == TREE else wanted


def manifest_of(
    conversion: Conversion, written: Written, carried: tuple[CarriedRecord, ...], algorithm: str
) -> Manifest:
    """What is said of what a conversion wrote."""
    plan, policy = conversion.plan, conversion.policy
    assert policy is not None
    assert conversion.mesh is not None
    sources, source_of = _sources(plan)
    part_of = {index: part[0].part for part in plan.parts() for index in range(part[0].first, part[0].last)}
    records = {
        item.stored.name: TensorRecord(
            item.stored.name,
            item.stored.dtype,
            item.want,
            conversion.roles[item.stored.name],
            part_of[index],
            source_of.get(item.stored.name, item.stored.source),
            written.digests[index],
            written.shards[index],
            conversion.copies.get(item.stored.name, ""),
        )
        for index, item in enumerate(plan.items)
    }
    return Manifest(
        mesh=conversion.mesh,
        algorithm=algorithm,
        policy=policy.name,
        policy_documents=policy_as_data(policy),
        sources=sources,
        tensors=tuple(
            records[name] for name in (*plan.source.tensors, *conversion.copies) if name in records
        ),  # the source's own order, for merge
        files=tuple(sorted(written.files, key=lambda file: (file.rank, file.part))),
        carried=carried,
        engine=conversion.engine,
    )


def _sources(plan: Plan) -> tuple[tuple[SourceFile, ...], dict[str, int]]:
    """The files that merge will make, and which tensors of a source that has none go into which of them."""
    source, origin = plan.source, plan.source.manifest
    if origin is not None and origin.sources:
        return origin.sources, {}
    if origin is None:
        names = [file.name for file in source.files]
        if source.container is None:
            names = safetensors_names(names)  # so that merge writes what everyone reads
        return tuple(SourceFile(n, file.metadata) for n, file in zip(names, source.files, strict=True)), {}
    whole = [Item(item.stored, Layout.replicated(item.stored.shape, 1)) for item in plan.items]
    groups = arrange(whole, 1, DEFAULT_MAX_SHARD_SIZE)
    source_of = {item.stored.name: number for number, group in enumerate(groups) for item in group}
    return tuple(SourceFile(name, {"format": "pt"}) for name in hf_names(len(groups))), source_of


def hf_names(count: int) -> list[str]:
    """Hugging Face's names for so many files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(plan: Plan, staging: Shared) -> None:
    """Hugging Face's index, where there is more than one safetensors file."""
    if len(plan.outputs) == 1 or not isinstance(plan.arrangement, Plain):
        return
    weight_map = {
        item.stored.name: output.name for output in plan.outputs for item in plan.items[output.first : output.last]
    }
    total = sum(map(sum, bytes_of_ranks(plan.items)))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    content = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    staging.write(INDEX_NAME, content.encode("utf-8"))
