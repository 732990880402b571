"""The checks in order, cheapest first, and what their results amount to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Literal

from tpshard.checkpoint import Checkpoint, open_full
from tpshard.verify.files import check_files, default_workers
from tpshard.verify.layout import check_layout
from tpshard.verify.report import CheckResult, Report
from tpshard.verify.weights import check_weights, comparable

Level = Literal["files", "weights", "layout", "forward", "backward"]
LEVELS: tuple[Level, ...] = ("files", "weights", "layout", "forward", "backward")


@dataclass(frozen=True, slots=True)
class Request:
    """What to verify. ``level`` is the deepest check wanted; None: everything that can be run in reasonable time.
    ``factory`` is ``package.module:function`` for a model that transformers does not know; ``isolate`` lists every
    faulty layer rather than the first; ``device`` is where the model runs."""

    folder: Path
    against: Path | None = None
    level: Level | None = None
    factory: str | None = None
    workers: int = 0
    progress: Callable[[int], object] = lambda count: None
    isolate: bool = False
    device: str = "cpu"

    def wants(self, level: Level) -> bool:
        return LEVELS.index(level) <= LEVELS.index(self.level or "backward")


def verify(request: Request) -> Report:
    """Run the checks. Raises InputError where there is nothing to check, StorageError where it cannot be read."""
    return Report(tuple(_timed(_checks(request))))


def _timed(results: Iterator[CheckResult]) -> Iterator[CheckResult]:
    """Each result with the seconds that passed until it came."""
    begin = perf_counter()
    for result in results:
        end = perf_counter()
        yield replace(result, seconds=end - begin)
        begin = end


def _checks(request: Request) -> Iterator[CheckResult]:
    workers = request.workers or default_workers()
    _require_device(request)
    source = open_full(request.against) if request.against else None
    files, shards = check_files(request.folder, workers, request.progress)
    yield files
    if shards is None:
        for level in LEVELS[1:]:
            if request.wants(level):
                yield CheckResult(level, unproven="the files are not as they should be")
        return
    if request.wants("weights"):
        yield check_weights(shards, source, workers, request.progress)
    if request.wants("layout"):
        yield check_layout(shards)
    if request.wants("forward"):
        yield from _model_checks(shards, source, request)


def _model_checks(shards: Checkpoint, source: Checkpoint | None, request: Request) -> Iterator[CheckResult]:
    """Where torch is not installed or the tensors are not the source's, the reason."""
    if importlib.util.find_spec("torch") is None:
        yield CheckResult("forward", unproven="torch is not installed (pip install 'tpshard[hf]')")
        return
    if source and not all(comparable(shards, source, name) for name in {*shards.tensors, *source.tensors}):
        yield CheckResult("forward", unproven="the shards' tensors are not those of the source")
        return
    from tpshard.verify.model_checks import ModelRequest, check_model
    from tpshard.verify.values import StoredWeights

    backward = {"forward": False, "backward": True}.get(request.level or "")
    wanted = ModelRequest(request.factory, backward, request.isolate, request.device)
    with StoredWeights(shards, source) as weights:
        yield from check_model(weights, wanted)
    for checkpoint in (shards, source) if source else (shards,):
        checkpoint.check_unchanged()


def _require_device(request: Request) -> None:
    """Raises UsageError where the model is to run on a device that is not there: before hours of other checks."""
    if request.device != "cpu" and request.wants("forward") and importlib.util.find_spec("torch") is not None:
        from tpshard.verify.model_checks import require_device

        require_device(request.device)
