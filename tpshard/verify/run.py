"""The checks in order, cheapest first, and what their results amount to."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from tpshard.checkpoint import Checkpoint, open_full
from tpshard.companions import Quantised
from tpshard.errors import InputError, UsageError
from tpshard.verify.companions import check_quantised_layout, fold_quantised, quantised_in
from tpshard.verify.files import check_files, default_workers
from tpshard.verify.report import CheckResult, Report, timed
from tpshard.verify.request import Request
from tpshard.verify.weights import check_weights, same_tensors


def verify(request: Request) -> Report:
    """Run the checks. Raises InputError where there is nothing to check, StorageError where it cannot be read."""
    if request.launch is None:
        return Report(tuple(timed(_checks(request))))
    if importlib.util.find_spec("torch") is None:
        raise UsageError("several processes meet through torch, which is not installed", hint="pip install torch")
    from tpshard.verify.together import verify_together

    return verify_together(request)


def _checks(request: Request) -> Iterator[CheckResult]:
    workers = request.workers or default_workers()
    _require_device(request)
    source = open_full(request.against) if request.against else None
    files, shards = check_files(request.folder, workers, request.progress)
    yield files
    if shards is None:
        for level in request.after_files:
            yield CheckResult(level, unproven="the files are not as they should be")
        return
    if request.wants("weights"):
        yield check_weights(shards, source, workers, request.progress)
    quantised = quantised_in(shards, source)
    if request.wants("layout"):
        yield check_quantised_layout(shards, quantised)
    if request.wants("forward"):
        yield from _model_checks(shards, source, quantised, request)


def _model_checks(
    shards: Checkpoint, source: Checkpoint | None, quantised: Quantised | InputError, request: Request
) -> Iterator[CheckResult]:
    """Where torch is not installed or the tensors are not the source's, the reason."""
    if importlib.util.find_spec("torch") is None:
        yield CheckResult("forward", unproven="torch is not installed (pip install 'tpshard[hf]')")
        return
    if source and not same_tensors(shards, source):
        yield CheckResult("forward", unproven="the shards' tensors are not those of the source")
        return
    if isinstance(quantised, InputError):
        yield CheckResult("forward", unproven=str(quantised))
        return
    from tpshard.verify.logical import logical, with_remark
    from tpshard.verify.model_checks import ModelRequest, check_model
    from tpshard.verify.values import StoredWeights

    wanted = ModelRequest(request.factory, request.backward, request.isolate, request.device)
    folded, layouts = fold_quantised(shards, quantised)
    with StoredWeights(folded, source) as weights:
        yield from with_remark(check_model(logical(weights, quantised, layouts), wanted), quantised)
    for checkpoint in (shards, source) if source else (shards,):
        checkpoint.check_unchanged()


def _require_device(request: Request) -> None:
    """Raises UsageError where the model is to run on a device that is not there: before hours of other checks."""
    if request.device != "cpu" and request.wants("forward") and importlib.util.find_spec("torch") is not None:
        from tpshard.verify.model_checks import require_device

        require_device(request.device)
