"""One model run sharded and unsharded, in lock step, and what it found."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError
from tpshard.verify.block_tensor import Context, Reached, Tape
from tpshard.verify.gradients import Comparison
from tpshard.verify.lockstep import AllDouble, Lockstep, OutOfStepError, RunError, no_fault_of_the_model
from tpshard.verify.models import Model, copy_with, one_line
from tpshard.verify.placement import REFERENCE, Layer, Parameters
from tpshard.verify.record import EnoughError, Record, together
from tpshard.verify.seams import Hooks
from tpshard.verify.sections import Gradient, RanksBackwardError, Sections, judged, tensors_in
from tpshard.verify.values import Weights


@dataclass(frozen=True, slots=True)
class Subject:
    """What is run: a model without weights, its parameters' places, its layers, and what it is called with.

    ``new_lock``: the lock step for so many ranks, in one process or several; ``stubs``: what a block returned, for
    blocks whose result is like their input; the ``skipped`` ones are not run.
    """

    model: Model
    parameters: Parameters
    layers: Sequence[Layer]
    blocks: Sequence[str]
    inputs: Mapping[str, Any]
    ranks: int
    device: torch.device
    new_lock: Callable[[int], Lockstep]
    stubs: Mapping[str, Any] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()


@dataclass(slots=True)
class Outcome:
    """``failure``: a rank's model that broke down; ``outputs``: by run, where asked for; ``reached``: of parameters
    that are stacks of matrices (experts), those that the reference's tokens came to."""

    record: Record
    gradients: list[Gradient] = field(default_factory=list)
    failure: RunError | None = None
    outputs: list[Any] = field(default_factory=list)
    reached: Mapping[str, Reached] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Whether forward found nothing wrong."""
        return self.failure is None and not any(seam.wrong for seam in self.record.counted)


@dataclass(frozen=True, slots=True)
class Way:
    """How it is run. ``backward``: block by block; ``loss``: of the whole model from its loss (a function of the
    output), all activations alive; ``stop_above``: the error that is enough to end; ``keep``: the outputs
    are wanted."""

    dtype: torch.dtype = torch.float64
    backward: bool = False
    loss: Callable[[Any], torch.Tensor] | None = None
    isolate: bool = False
    sound: bool = False
    stop_above: float | None = None
    doubled: frozenset[str] = frozenset()
    keep: bool = False
    seed: int = 0


def call(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The key "" holds positional arguments."""
    keywords = {key: value for key, value in inputs.items() if key}
    return module(*inputs.get("", ()), **keywords)


def execute(subject: Subject, weights: Weights, way: Way) -> Outcome:
    """Run the reference and every rank's copy side by side on the same inputs.

    Raises InconclusiveError where the reference itself does not run.
    """
    return _Execution(subject, weights, way, subject.new_lock(subject.ranks)).outcome()


def with_stubs(subject: Subject, module: nn.Module) -> None:
    """Blocks that are skipped hand on their input, in the form that their result has."""
    for path in subject.skipped:
        block = module.get_submodule(path)

        def forward(*args: Any, form: Any = subject.stubs[path], **kwargs: Any) -> Any:
            return with_first(form, first_of((args, kwargs)))

        block.forward = forward


def first_of(value: Any) -> torch.Tensor | None:
    return next(tensors_of(value), None)


def with_first(form: Any, tensor: torch.Tensor | None) -> Any:
    """The same, with another first tensor."""
    if isinstance(form, torch.Tensor):
        return tensor
    if isinstance(form, Mapping):
        (key, first), *others = form.items()
        made: Any = type(form)
        return made({key: with_first(first, tensor), **dict(others)})
    return type(form)((with_first(form[0], tensor), *form[1:]))


class _Execution:
    def __init__(self, subject: Subject, weights: Weights, way: Way, lock: Lockstep) -> None:
        self.subject, self.way, self.lock = subject, way, lock
        self.record = Record(stop_above=way.stop_above, followed=not way.isolate)
        self.contexts = {run: self._context(weights, run) for run in lock.runs}
        self.sections = Sections(lock, self.contexts, subject.ranks, way.seed)
        self.gradients: list[Gradient] = []

    def _context(self, weights: Weights, run: int) -> Context:
        sound = self.way.sound and run == REFERENCE
        context = Context(weights, self.way.dtype, self.subject.device, sound=sound)
        if self.way.backward or self.way.loss:
            context.tape = Tape.new(self.subject.device)
        return context

    def outcome(self) -> Outcome:
        hooks = Hooks(self.lock, self.record, self.subject.ranks, self.way.isolate)
        modules = {run: self._module(run, hooks) for run in self.lock.runs}
        failure, outputs = None, []
        try:
            outputs = self.lock.run([self._caller(run, module) for run, module in modules.items()])
        except RunError as error:
            failure = self._accepted(error)
            self.record.followed = self.record.followed and failure is None
        finally:
            hooks.remove()
            self.sections.remove()
            _give_back_memory()
        record = together(self.lock.gathered(self.record))
        reached = self.contexts[REFERENCE].reached if REFERENCE in self.contexts else {}
        return Outcome(record, self.sections.gradients + self.gradients, failure, outputs, reached)

    def _module(self, run: int, hooks: Hooks) -> nn.Module:
        subject = self.subject
        tensors = subject.parameters.of_run(run, self.contexts[run], self.way.doubled)
        module = copy_with(subject.model.skeleton, tensors, subject.device)
        with_stubs(subject, module)
        hooks.attach(run, module, subject.layers)
        if self.way.backward:
            self.sections.attach(run, module, subject.blocks)
        return module

    def _accepted(self, error: RunError) -> RunError | None:
        """A rank's failure is an outcome; the reference's is none, nor is a file or memory that failed."""
        if isinstance(error.cause, EnoughError):
            return None
        if (other := no_fault_of_the_model(error.cause)) is not None:
            raise other from error
        if error.run == REFERENCE and not isinstance(error.cause, OutOfStepError | RanksBackwardError):
            raise InconclusiveError(f"the unsharded model does not run: {one_line(error.cause)}") from error.cause
        return error

    def _caller(self, run: int, module: nn.Module) -> Callable[[], Any]:
        with_gradients = self.way.backward or self.way.loss is not None

        def body() -> Any:
            output = call(module, on_device(self.subject.inputs, self.subject.device))
            self._compare_output(run, output)
            if self.way.backward:
                self.sections.finish(run, output)
            if self.way.loss is not None:
                self._go_back_from_loss(run, self.way.loss(output))
            return detached(output) if self.way.keep else None

        def in_mode() -> Any:  # all modes belong to the thread
            with torch.set_grad_enabled(with_gradients):
                if self.way.dtype is not torch.float64:
                    return body()
                with AllDouble():
                    return body()

        return in_mode

    def _compare_output(self, run: int, output: Any) -> None:
        own = [tensor.detach() for tensor in tensors_of(output)]
        if not own:
            raise InconclusiveError("the model returns no floating-point tensor to compare")
        reference = self.lock.reference(run, "the model's output", own)
        if run == REFERENCE:
            return
        for number, (got, want) in enumerate(zip(own, reference, strict=True)):
            self.record.compare("the model's output", f"output {number}", run - 1, got, want)

    def _go_back_from_loss(self, run: int, loss: torch.Tensor) -> None:
        everybody = dict(zip(self.lock.runs, self.lock.here(run, "the loss", loss), strict=True))
        if run != self.lock.runs[0]:
            return
        ranks = [r for r in everybody if r != REFERENCE]
        if REFERENCE in everybody:
            everybody[REFERENCE].backward()
        torch.autograd.backward([everybody[r] / self.subject.ranks for r in ranks])
        tapes = {r: context.tape for r, context in self.contexts.items()}
        own = [tape for r in ranks if (tape := tapes[r]) is not None]
        self.gradients += judged("the loss", list(Comparison(tapes.get(REFERENCE), own, self.lock).differences()))
        for r in ranks if REFERENCE in everybody else ():
            self.record.compare("the loss", "loss", r - 1, everybody[r].reshape(1), everybody[REFERENCE].reshape(1))


def _give_back_memory() -> None:
    """glibc keeps what a thread has freed for that thread, also when it has ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def on_device(value: Any, device: torch.device) -> Any:
    """The same inputs once more, each tensor a copy: a model may change what it is given in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    return type(value)(on_device(item, device) for item in value) if type(value) in (tuple, list) else value


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of whatever a model returns, in order."""
    return (tensor for tensor in tensors_in(output) if tensor.is_floating_point())


def detached(output: Any) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in tensors_of(output)]
