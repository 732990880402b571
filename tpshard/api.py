"""The Python interface: the commands as functions, in the same words.

>>> import tempfile, pathlib
>>> from tpshard import api
>>> from tpshard.demo import make_checkpoint
>>> with tempfile.TemporaryDirectory() as scratch:
...     model, shards = pathlib.Path(scratch, "model"), pathlib.Path(scratch, "shards")
...     _ = make_checkpoint(model)
...     done = api.split(model, shards, tp=2)
...     report = api.verify(shards, against=model, level="weights")
>>> done.tensors, report.verdict.name
(57, 'PASS')
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

from tpshard import conversion, convert
from tpshard.checkpoint import Checkpoint
from tpshard.conversion import DEFAULT_DIGEST, Done, Options
from tpshard.engines.opening import NATIVE, Source, open_any
from tpshard.errors import UsageError
from tpshard.fetch import plan_fetch, run_fetch
from tpshard.joining import join as join_ranks
from tpshard.manifest import Manifest
from tpshard.mesh import Grid, Mesh
from tpshard.statement import statement as statement_of
from tpshard.stores.path import place
from tpshard.verify.report import Report
from tpshard.verify.request import Level, Request
from tpshard.verify.run import names_on_disk
from tpshard.verify.run import verify as run_checks

Folder = str | PathLike[str]
Progress = Callable[[int], object]


def split(
    source: Folder,
    target: Folder,
    *,
    tp: int,
    ep: int = 1,
    pp: int = 1,
    expert_parallel: bool = False,
    stages: tuple[int, ...] = (),
    policy: str = "auto",
    base: Folder | None = None,
    engine: str = NATIVE,
    source_engine: str | None = None,
    config: Folder | None = None,
    manifest: bool = True,
    max_shard_size: int | None = None,
    digest: str = DEFAULT_DIGEST,
    workers: int = 0,
    resume: bool = False,
    progress: Progress = lambda count: None,
) -> Done:
    """Cut a full checkpoint for ``pp`` stages of ``ep`` groups of ``tp`` ranks into the new folder ``target``.

    ``expert_parallel``: whole experts go to the tensor-parallel ranks, too; ``stages``: layers of each stage.

    ``engine``: whose files are written; ``manifest``: whether one is written beside them; ``source_engine``: whose
    files the source has, where that is not clear; ``config``: its config.json, where it has none.

    ``policy``: ``auto``, a built-in name or a YAML file; ``base``: the model of a LoRA adapter, its folder or its
    config.json. ``max_shard_size`` in bytes; ``progress`` is called with the bytes just read; ``resume``: go on
    where a run was interrupted, and keep what is finished if this one is. Raises TpshardError; the target is then as it
    was before.
    """
    options = Options(max_shard_size, digest, workers, progress, resume)
    grid = Grid(Mesh(tp=tp, ep=ep, pp=pp), expert_parallel, stages)
    if base is not None:
        if engine != NATIVE:
            raise UsageError("an adapter is cut for tpshard's own shards only", hint="leave out engine or base")
        adapter, model = place(source), place(base)
        planned = convert.plan_adapter_split(adapter, place(target), grid, model, policy, options, names_on_disk)
        return conversion.run(planned, options)
    given = _source(source, source_engine, config)
    planned = convert.plan_split(given, place(target), grid, policy, options, engine)
    return conversion.run(planned if manifest else conversion.without_manifest(planned), options)


def merge(
    source: Folder,
    target: Folder,
    *,
    source_engine: str | None = None,
    config: Folder | None = None,
    max_shard_size: int | None = None,
    workers: int = 0,
    resume: bool = False,
    progress: Progress = lambda count: None,
) -> Done:
    """Rebuild the full checkpoint from a folder of ranks, tpshard's or an engine's (as in ``split``); every tensor must
    have its recorded digest."""
    options = Options(max_shard_size=max_shard_size, workers=workers, progress=progress, resume=resume)
    given = _source(source, source_engine, config)
    return conversion.run(convert.plan_merge(given, place(target), options), options)


def reshard(
    source: Folder,
    target: Folder,
    *,
    tp: int,
    ep: int = 1,
    pp: int = 1,
    expert_parallel: bool = False,
    stages: tuple[int, ...] = (),
    policy: str | None = None,
    engine: str = NATIVE,
    source_engine: str | None = None,
    config: Folder | None = None,
    manifest: bool = True,
    max_shard_size: int | None = None,
    workers: int = 0,
    resume: bool = False,
    progress: Progress = lambda count: None,
) -> Done:
    """Recut a folder of ranks for other ranks, or another engine (as in ``split``), by the policy it was cut with
    unless another is given."""
    options = Options(max_shard_size=max_shard_size, workers=workers, progress=progress, resume=resume)
    grid = Grid(Mesh(tp=tp, ep=ep, pp=pp), expert_parallel, stages)
    given = _source(source, source_engine, config)
    planned = convert.plan_reshard(given, place(target), grid, policy, options, engine)
    return conversion.run(planned if manifest else conversion.without_manifest(planned), options)


def fetch(
    source: Folder,
    target: Folder,
    *,
    rank: int,
    tp: int,
    ep: int = 1,
    pp: int = 1,
    expert_parallel: bool = False,
    stages: tuple[int, ...] = (),
    policy: str = "auto",
    config: Folder | None = None,
    max_shard_size: int | None = None,
    digest: str = DEFAULT_DIGEST,
    workers: int = 0,
    progress: Progress = lambda count: None,
) -> Done:
    """Cut one rank alone of what ``split`` cuts, and read no more than it holds; ``join`` makes one folder of all."""
    options = Options(max_shard_size, digest, workers, progress)
    grid = Grid(Mesh(tp=tp, ep=ep, pp=pp), expert_parallel, stages)
    given = _source(source, None, config)
    return run_fetch(plan_fetch(given, place(target), grid, rank, policy, options), options)


def join(folder: Folder, *, progress: Progress = lambda count: None) -> Manifest:
    """Make a shard folder of one that has the files and records of all fetched ranks; its manifest."""
    return join_ranks(place(folder), progress)


def verify(
    folder: Folder,
    *,
    against: Folder | None = None,
    base: Folder | None = None,
    engine: str | None = None,
    config: Folder | None = None,
    level: Level | None = None,
    model: str | None = None,
    isolate: bool = False,
    device: str = "cpu",
    workers: int = 0,
    progress: Progress = lambda count: None,
) -> Report:
    """Check a shard folder; ``report.verdict`` is PASS, FAIL or INCONCLUSIVE.

    ``level``: the deepest check, all that can be run by default; ``model``: ``package.module:function``; ``isolate``:
    every faulty layer, not only the first; ``device``: where the model runs, ``cpu`` or ``cuda``; ``base``: of an
    adapter, its model. ``engine``: whose folder it is, where that is not clear; ``config``: its config.json, where it
    has none.
    """
    source = place(against) if against is not None else None
    of_adapter = place(base) if base is not None else None
    request = Request(
        place(folder), source, level, model, workers, progress, isolate, device, base=of_adapter, engine=engine,
        config=place(config) if config is not None else None,
    )  # fmt: skip
    return run_checks(request)


def inspect(folder: Folder, *, engine: str | None = None, config: Folder | None = None) -> Checkpoint:
    """A checkpoint of any kind with its headers read: names, shapes, dtypes, layouts and places."""
    return open_any(_source(folder, engine, config))


def statement(folder: Folder) -> dict[str, Any]:
    """An in-toto Statement of a shard folder that was split with ``digest="sha256"``: what is signed."""
    return statement_of(place(folder))


def _source(folder: Folder, engine: str | None, config: Folder | None) -> Source:
    return Source.given(place(folder), engine, place(config) if config is not None else None)
