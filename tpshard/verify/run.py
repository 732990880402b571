"""The checks in order, cheapest first, and what their results amount to."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping

from tpshard.adapter_folder import Base, adapter_base, adapter_of, open_adapter
from tpshard.checkpoint import Checkpoint
from tpshard.companions import Quantised
from tpshard.engines.opening import Source
from tpshard.engines.readers.of import READERS
from tpshard.engines.whole import open_whole
from tpshard.errors import InconclusiveError, InputError, UsageError
from tpshard.verify.adapter_layout_check import check_adapter_layout
from tpshard.verify.companions import check_quantised_layout, quantised_in
from tpshard.verify.engine_files import check_engine_files
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
    if adapter_base(request.folder, request.base) is not None:
        raise UsageError("adapters are verified in one process", hint="start it without torchrun")
    if not request.ranks.is_native:
        raise UsageError("an engine's folder is verified in one process", hint="start it without torchrun")
    from tpshard.verify.together import verify_together

    return verify_together(request)


def names_on_disk(base: Base) -> Mapping[str, str]:
    """What transformers, if it is there, knows of a base's names on disk, by those of the module's parameters."""
    if importlib.util.find_spec("torch") is None:
        return {}
    from tpshard.verify.disk_names import disk_names

    try:
        return disk_names(base)
    except InconclusiveError:
        return {}


def _checks(request: Request) -> Iterator[CheckResult]:
    workers = request.workers or default_workers()
    _require_device(request)
    if not request.ranks.is_native:
        yield from _checks_of_engine(request, workers)
        return
    try:
        base = adapter_base(request.folder, request.base)
    except InputError:
        files, _ = check_files(request.folder, workers, request.progress)
        if not files.findings:
            raise
        yield files  # what is recorded of the base was damaged
        yield from _unproven(request.after_files)
        return
    source = None
    if request.against:
        source = open_whole(Source(request.against)) if base is None else open_adapter(request.against)
    files, shards = check_files(request.folder, workers, request.progress)
    yield files
    if shards is None:
        yield from _unproven(request.after_files)
        return
    yield from _checks_of_weights(shards, source, base, request, workers)


def _checks_of_engine(request: Request, workers: int) -> Iterator[CheckResult]:
    source = open_whole(Source(request.against)) if request.against else None
    files, shards = check_engine_files(request.ranks, workers, request.progress)
    yield files
    if shards is None:
        yield from _unproven(request.after_files)
        return
    reader = READERS.get(shards.manifest.engine) if shards.manifest else None
    if reader is not None and reader.whole:  # dealt to no ranks: there is no layout, and nothing to run on them
        if request.wants("weights"):
            yield check_weights(shards, source, workers, request.progress)
        return
    yield from _checks_of_weights(shards, source, None, request, workers)


def _checks_of_weights(
    shards: Checkpoint, source: Checkpoint | None, base: Base | None, request: Request, workers: int
) -> Iterator[CheckResult]:
    """What can be checked once the files are as they should be."""
    if request.wants("weights"):
        yield check_weights(shards, source, workers, request.progress)
    quantised = quantised_in(shards, source)
    if request.wants("layout"):
        yield _layout(shards, base, quantised)
    if request.wants("forward"):
        yield from _model_checks(shards, source, base, quantised, request)


def _unproven(levels: Iterable[str]) -> Iterator[CheckResult]:
    for level in levels:
        yield CheckResult(level, unproven="the files are not as they should be")


def _layout(shards: Checkpoint, base: Base | None, quantised: Quantised | InputError) -> CheckResult:
    reader = READERS.get(shards.manifest.engine) if shards.manifest else None
    if reader is not None and reader.own_cuts:
        what = f"{reader.title} cuts by sizes of its own, which config.json does not tell; level forward runs them"
        return CheckResult("layout", unproven=what)
    if base is None:
        return check_quantised_layout(shards, quantised)
    try:
        return check_adapter_layout(shards, adapter_of(shards), base.config)
    except InputError as error:
        return CheckResult("layout", unproven=str(error))


def _model_checks(
    shards: Checkpoint,
    source: Checkpoint | None,
    base: Base | None,
    quantised: Quantised | InputError,
    request: Request,
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
    from tpshard.verify.model_checks import ModelRequest, check_stored_model

    wanted = ModelRequest(request.factory, request.backward, request.isolate, request.device)
    if base is not None:
        from tpshard.verify.adapter_checks import check_adapter_model

        yield from check_adapter_model(shards, source, base, wanted)
    else:
        yield from check_stored_model(shards, source, quantised, wanted)
    for checkpoint in (shards, source) if source else (shards,):
        checkpoint.check_unchanged()


def _require_device(request: Request) -> None:
    """Raises UsageError where the model is to run on a device that is not there: before hours of other checks."""
    if request.device != "cpu" and request.wants("forward") and importlib.util.find_spec("torch") is not None:
        from tpshard.verify.model_checks import require_device

        require_device(request.device)
