"""The checks that run the model: forward, backward, and the proof that they would have seen what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from tpshard.checkpoint import Checkpoint
from tpshard.companions import Quantised
from tpshard.errors import InconclusiveError, UsageError
from tpshard.verify.companions import fold_quantised
from tpshard.verify.execution import Outcome, Subject, Way, execute
from tpshard.verify.forward import backward_result, forward_result, generic_result
from tpshard.verify.layers import check_layers
from tpshard.verify.lockstep import Lockstep
from tpshard.verify.logical import logical, with_remark
from tpshard.verify.loss import run_loss
from tpshard.verify.native import native_figures
from tpshard.verify.preparation import Choice, default_dtype, prepare, require_sound_tables
from tpshard.verify.report import CheckResult
from tpshard.verify.sensitivity import SEEN, noise_of, run_generic, self_test, shortened
from tpshard.verify.values import StoredWeights, Weights, numbers_in

FITS = 2 * 10**9  # numbers: up to here the default goes back, too


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """``backward``: None where the model's size decides; ``isolate``: every faulty layer, not only the first;
    ``new_lock``: where the runs are in several processes."""

    factory: str | None = None
    backward: bool | None = None
    isolate: bool = False
    device: str = "cpu"
    seed: int = 0
    new_lock: Callable[[int], Lockstep] | None = None


def check_stored_model(
    shards: Checkpoint, source: Checkpoint | None, quantised: Quantised, request: ModelRequest
) -> Iterator[CheckResult]:
    """``check_model`` of a shard folder: a grid folded, quantised weights as the model has them."""
    folded, layouts = fold_quantised(shards, quantised)
    with StoredWeights(folded, source) as weights:
        yield from with_remark(check_model(logical(weights, quantised, layouts), request), quantised)


def check_model(weights: Weights, request: ModelRequest) -> Iterator[CheckResult]:
    """Forward and, if wanted, backward; where the model cannot be run, the reason, and each layer alone, which proves
    less. Raises UsageError where ``factory`` or ``device`` is no good."""
    require_device(request.device)
    try:
        yield from _checks(weights, request)
    except InconclusiveError as error:
        yield CheckResult("forward", unproven=str(error))
        if request.new_lock is None:  # one process sees all shards
            yield check_layers(weights)


def _checks(weights: Weights, request: ModelRequest) -> Iterator[CheckResult]:
    backward = fits(weights) if request.backward is None else request.backward
    with default_dtype(torch.float64):
        choice = Choice(request.factory, request.seed, request.device)
        if request.new_lock is not None:
            choice = replace(choice, new_lock=request.new_lock)
        subject = prepare(weights, choice)
        way = Way(backward=backward, isolate=request.isolate, sound=True, seed=request.seed)
        require_sound_tables(subject, weights)
        outcome, no_way_back = _run(subject, weights, way)
        short = shortened(subject, weights)
        if not outcome.is_right:
            _refuse_random(short, weights)
        native = native_figures(subject, weights, choice) if fits(weights) else None
        yield forward_result(subject, weights, outcome, request.isolate, native)
        if backward and no_way_back:
            yield CheckResult("backward", unproven=no_way_back)
        elif backward:
            loss = run_loss(subject, weights) if fits(weights) and outcome.is_right else None
            yield backward_result(subject, weights, outcome, loss)
        way = replace(way, backward=backward and not no_way_back)
        yield from _with_generic_weights(short, weights, way)


def _run(subject: Subject, weights: Weights, way: Way) -> tuple[Outcome, str]:
    """Forward, and backward where that is wanted; where the model itself has no backward, why, and forward alone."""
    try:
        return execute(subject, weights, way), ""
    except InconclusiveError as error:
        if not way.backward:
            raise
        return execute(subject, weights, replace(way, backward=False)), str(error)


def _with_generic_weights(subject: Subject, weights: Weights, way: Way) -> Iterator[CheckResult]:
    try:
        outcome = run_generic(subject, weights, way)
    except InconclusiveError as error:
        yield CheckResult("generic", unproven=f"with generic weights: {error}")
        return
    yield generic_result(subject, weights, outcome)
    yield self_test(subject, weights, outcome.record.visited)


def require_device(device: str) -> None:
    """Raises UsageError where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here", hint="leave --device out")


def _refuse_random(subject: Subject, weights: Weights) -> None:
    """Raises InconclusiveError where the unsharded model differs from itself, so that a difference means nothing."""
    noise = noise_of(subject, weights)
    if not noise < SEEN:
        hint = "leave out what is random"
        raise InconclusiveError(f"the unsharded model differs from itself when run again, by {noise:.1e}", hint=hint)


def fits(weights: Weights) -> bool:
    """Whether the model is small enough for the default to do everything."""
    return numbers_in(weights) <= FITS
