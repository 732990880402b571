"""The checks in order, cheapest first, and what their results amount to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
    workers = request.workers or default_workers()
    source = open_full(request.against) if request.against else None
    files, shards = check_files(request.folder, workers, request.progress)
    checks = [files]
    if shards is None:
        missing = [level for level in LEVELS[1:] if request.wants(level)]
        return Report(
            (files, *(CheckResult(level, unproven="the files are not as they should be") for level in missing))
        )
    if request.wants("weights"):
        checks.append(check_weights(shards, source, workers, request.progress))
    if request.wants("layout"):
        checks.append(check_layout(shards))
    if request.wants("forward"):
        checks += _model_checks(shards, source, request)
    return Report(tuple(checks))


def _model_checks(shards: Checkpoint, source: Checkpoint | None, request: Request) -> list[CheckResult]:
    """Where torch is not installed or the tensors are not the source's, the reason."""
    if importlib.util.find_spec("torch") is None:
        what = "torch is not installed (pip install 'tpshard[hf]')"
        return [CheckResult("forward", unproven=what)]
    if source and not all(comparable(shards, source, name) for name in {*shards.tensors, *source.tensors}):
        return [CheckResult("forward", unproven="the shards' tensors are not those of the source")]
    from tpshard.verify.model_checks import ModelRequest, check_model
    from tpshard.verify.values import StoredWeights

    backward = {"forward": False, "backward": True}.get(request.level or "")
    wanted = ModelRequest(request.factory, backward, request.isolate, request.device)
    with StoredWeights(shards, source) as weights:
        return list(check_model(weights, wanted))
