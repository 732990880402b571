"""Verify in several processes, one for each rank: each looks at its own shard, the first makes the report."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tpshard.checkpoint import Checkpoint, open_shards
from tpshard.companions import Quantised
from tpshard.engines.opening import Source
from tpshard.engines.whole import open_whole
from tpshard.errors import InputError, UsageError
from tpshard.manifest_parsing import read_manifest
from tpshard.verify.companions import check_quantised_layout, quantised_in
from tpshard.verify.files import check_files, default_workers
from tpshard.verify.model_checks import ModelRequest, check_stored_model
from tpshard.verify.processes import Group, ProcessLockstep, connected
from tpshard.verify.report import CheckResult, Report, timed
from tpshard.verify.request import Request
from tpshard.verify.weights import check_weights, same_tensors


def verify_together(request: Request) -> Report:
    """The same report in every process; the first process's findings count for all that belongs to no rank.

    With the source, a process opens no shard but its own; without, the first reads all of them to rebuild it. Raises
    what any process raises, in all of them; LostContactError where one has died.
    """
    assert request.launch is not None
    with connected(request.launch, request.device, request.timeout) as group:
        return group.from_first(Report(tuple(timed(_checks(request, group)))))


def _checks(request: Request, group: Group) -> Iterator[CheckResult]:
    workers = request.workers or default_workers()
    group.everywhere(lambda: _same_number(request, group))
    opened: dict[str, Checkpoint | None] = {"source": None}

    def look() -> CheckResult:
        opened["source"] = open_whole(Source(request.against)) if request.against else None
        result, opened["shards"] = check_files(request.folder, workers, request.progress, (group.rank,))
        return result

    yield combined(group.everywhere(look))
    shards, source = opened["shards"], opened["source"]
    if not all(group.gathered(shards is not None)) or shards is None:
        for level in request.after_files:
            yield CheckResult(level, unproven="the files are not as they should be")
        return
    if source is None:
        shards = group.everywhere(lambda: open_shards(request.folder))[group.rank]
    if request.wants("weights"):
        yield _weights(shards, source, group, workers, request)
    read: list[Quantised | InputError] = []
    group.everywhere(lambda: read.append(quantised_in(shards, source)))
    (quantised,) = read
    if request.wants("layout"):
        yield check_quantised_layout(shards, quantised)
    if request.wants("forward"):
        yield from _model_checks(shards, source, quantised, group, request)


def _same_number(request: Request, group: Group) -> None:
    mesh = read_manifest(request.folder).mesh
    ranks = mesh.ranks
    if mesh.pp > 1:
        raise UsageError(f"{request.folder}: has {mesh.pp} pipeline stages", hint="verify them in one process")
    if ranks != group.size:
        raise UsageError(f"{group.size} processes for {ranks} ranks", hint=f"start {ranks}, or one alone")


def _weights(
    shards: Checkpoint, source: Checkpoint | None, group: Group, workers: int, request: Request
) -> CheckResult:
    if source is not None:
        only = (group.rank,)
        return combined(group.everywhere(lambda: check_weights(shards, source, workers, request.progress, only)))

    def rebuild() -> CheckResult | None:
        return check_weights(shards, None, workers, request.progress) if group.rank == 0 else None

    (result,) = [found for found in group.everywhere(rebuild) if found is not None]
    return result


def _model_checks(
    shards: Checkpoint, source: Checkpoint | None, quantised: Quantised | InputError, group: Group, request: Request
) -> Iterator[CheckResult]:
    if source and not same_tensors(shards, source):
        yield CheckResult("forward", unproven="the shards' tensors are not those of the source")
        return
    if isinstance(quantised, InputError):
        yield CheckResult("forward", unproven=str(quantised))
        return
    wanted = ModelRequest(
        request.factory, request.backward, request.isolate, request.device, new_lock=lambda _: ProcessLockstep(group)
    )
    yield from check_stored_model(shards, source, quantised, wanted)
    for checkpoint in (shards, source) if source else (shards,):
        group.everywhere(checkpoint.check_unchanged)


def combined(results: Sequence[CheckResult]) -> CheckResult:
    """Of one check, each process's part: findings one after another, the counts added up where they are of ranks."""
    first = results[0]
    covered = {
        kind: sum(result.covered[kind] for result in results) if kind != "tensors" else count
        for kind, count in first.covered.items()
    }
    findings = tuple(itertools.chain.from_iterable(result.findings for result in results))
    return CheckResult(first.name, findings, covered, first.notes, first.unproven, first.figures)
