"""Check 4, forward: the model itself, unsharded and sharded, in float64, compared seam by seam.

R copies of the unmodified model and the reference run in lock step. Rank r's copy has rank r's own bytes at their
global places among zeros, so that no head count, view or mask of the model's code has to change; partial sums meet
after row layers and parts at gather. A valid cut never lets a position that a rank owns depend on one that it does
not, so zeros elsewhere do no harm; where a cut is not valid, the numbers differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError, printable
from tpshard.header import byte_count
from tpshard.verify.lockstep import AllDouble, Lockstep, OutOfStepError, RunError
from tpshard.verify.models import FactoryMaker, Maker, TransformersMaker, one_line
from tpshard.verify.placement import Layer, find_layers
from tpshard.verify.report import CheckResult, Finding
from tpshard.verify.seams import TOLERANCE, Hooks, Record, Seam
from tpshard.verify.tensors import Weights, rank_states, reference_state

MOST_NAMED = 10


def check_forward(weights: Weights, *, factory: str | None = None, seed: int = 0) -> CheckResult:
    """Run the model sharded and unsharded on the same inputs.

    Raises InconclusiveError where it cannot be run, UsageError where ``factory`` is no good.
    """
    _check_memory(weights)
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        maker: Maker = (
            FactoryMaker(factory, weights.config) if factory else TransformersMaker(weights.folder, weights.config)
        )
        return _Run(weights, maker, seed).result()
    finally:
        torch.set_default_dtype(was)


def _check_memory(weights: Weights) -> None:
    """Everything is held in float64: the reference, and every rank's cut tensors at full size."""
    needed = 0
    for name in weights.names:
        layout = weights.layout(name)
        copies = 3 if layout.is_replicated else 2 + weights.ranks
        needed += copies * byte_count("F64", layout.shape)
    free = _memory_available()
    if free is not None and needed > 0.9 * free:
        what = (
            f"the model on {weights.ranks} ranks takes {needed / 1e9:.1f} GB in float64, {free / 1e9:.1f} GB are free"
        )
        raise InconclusiveError(what, hint="run it where there is more memory, or ask for --level layout")


def _memory_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


@dataclass(slots=True)
class _Outcome:
    record: Record
    failure: RunError | None = None


class _Run:
    def __init__(self, weights: Weights, maker: Maker, seed: int) -> None:
        self.weights, self.maker, self.seed = weights, maker, seed
        self.reference = maker.make(reference_state(weights))
        self.layers, self.unused = find_layers(weights, maker, self.reference)

    def result(self) -> CheckResult:
        layers = self._settled()
        models = [self.reference, *(self.maker.make(state) for state in rank_states(self.weights))]
        outcome = self._run(models, layers)
        record = outcome.record
        idle = [layer.name for layer in layers if layer.cut is not None and layer.path not in record.visited]
        return CheckResult(
            "forward",
            findings=tuple(self._findings(outcome)),
            covered={
                "tensors": len(self.weights.names) - len(self.unused),
                "ranks": self.weights.ranks,
                "layers": len(record.visited),
                "seams": len(record.seams),
                "positions": record.positions,
            },
            notes=tuple(self._notes(record)),
            unproven=f"the input did not reach {len(idle)} cut layers: {', '.join(idle[:5])}" if idle else None,
            figures={
                "worst_relative_error": max((seam.error for seam in record.seams), default=0.0),
                "tolerance": TOLERANCE,
                "gathers": record.gathers,
                "first_diverging": next((seam.layer for seam in record.seams if seam.wrong), None),
            },
        )

    def _settled(self) -> list[Layer]:
        """A layer whose own forward is never called (its parent reads its weight) leaves its task to the nearest
        ancestor that is called."""
        called: set[str] = set()
        handles = [
            module.register_forward_hook(lambda *_, path=path: called.add(path))
            for path, module in self.reference.named_modules()
        ]
        try:
            with torch.no_grad(), AllDouble():
                self.maker.call(self.reference, self.weights.ranks, self.seed)
        except InconclusiveError:
            raise
        except Exception as error:
            raise InconclusiveError(f"the unsharded model itself does not run: {one_line(error)}") from None
        finally:
            for handle in handles:
                handle.remove()
        taken = {layer.path for layer in self.layers if layer.path in called}
        settled = [layer for layer in self.layers if layer.path in taken]
        for layer in self.layers:
            parent = layer.path.rpartition(".")[0]
            if layer.path in called or layer.cut is None:
                continue
            if layer.task in ("row", "gather") and parent and parent in called and parent not in taken:
                settled.append(Layer(parent, layer.name, layer.task, layer.cut))
            elif not self._twin_is_called(layer, taken):
                settled.append(layer)  # never visited: it will be told as not reached
        return settled

    def _twin_is_called(self, layer: Layer, called: set[str]) -> bool:
        """Whether a layer that shares its weight is called."""
        modules = dict(self.reference.named_modules())
        own = {id(parameter) for parameter in modules[layer.path].parameters(recurse=False)}
        others = (modules[path].parameters(recurse=False) for path in called)
        return any(id(parameter) in own for parameters in others for parameter in parameters)

    def _run(self, models: Sequence[nn.Module], layers: Sequence[Layer]) -> _Outcome:
        lock, record = Lockstep(len(models)), Record()
        hooks = Hooks(lock, record, self.weights.ranks)
        for number, model in enumerate(models):
            hooks.attach(number, model, layers)
        try:
            outputs = lock.run([self._caller(model) for model in models])
        except RunError as failure:
            if failure.run == 0 and not isinstance(failure.cause, OutOfStepError):
                raise InconclusiveError(f"the unsharded model does not run: {one_line(failure.cause)}") from None
            return _Outcome(record, failure)
        finally:
            hooks.remove()
        self._compare_outputs(record, outputs)
        return _Outcome(record)

    def _caller(self, model: nn.Module) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad(), AllDouble():  # both belong to the thread
                return self.maker.call(model, self.weights.ranks, self.seed)

        return call

    def _compare_outputs(self, record: Record, outputs: Sequence[Any]) -> None:
        reference = list(_tensors(outputs[0]))
        for rank, output in enumerate(outputs[1:]):
            for number, (got, want) in enumerate(zip(_tensors(output), reference, strict=True)):
                record.compare("the model's output", f"output {number}", rank, got, want)
        if not reference:
            raise InconclusiveError("the model returns no floating-point tensor to compare")

    def _findings(self, outcome: _Outcome) -> Iterator[Finding]:
        """The first seam that differs, in the order of execution; and a rank whose model broke down."""
        wrong = [seam for seam in outcome.record.seams if seam.wrong]
        for seam in wrong[:1]:
            yield Finding(_sentence(seam), layer=seam.layer, rank=seam.rank)
        if outcome.failure is not None:
            at = outcome.failure.key or "its beginning"
            what = f"the rank's model broke down after {at}: {one_line(outcome.failure.cause)}"
            yield Finding(what, layer=at, rank=max(0, outcome.failure.run - 1))

    def _notes(self, record: Record) -> Iterator[str]:
        worst = max((seam.error for seam in record.seams), default=0.0)
        yield f"largest relative error {worst:.1e}, tolerance {TOLERANCE:.0e}, float64"
        if record.gathers:
            yield f"{record.gathers} gathers hide the layouts of their own layers from this check"
        if self.unused:
            shown = ", ".join(map(printable, self.unused[:3])) + (", ..." if len(self.unused) > 3 else "")
            yield f"not used by the model: {shown}"
        first = next((seam.layer for seam in record.seams if seam.wrong), None)
        later = list(dict.fromkeys(seam.layer for seam in record.seams if seam.wrong and seam.layer != first))
        if later:
            yield f"later: {', '.join(later[:MOST_NAMED])}{', ...' if len(later) > MOST_NAMED else ''}"


def _sentence(seam: Seam) -> str:
    times = f"relative error {seam.error:.1e}, tolerance {TOLERANCE:.0e}"
    if seam.what == "input":
        cut = f" (cut by {', '.join(seam.producers)})" if seam.producers else ""
        return f"its input is not whole{cut}, but the layer wants all of it: {times}"
    if seam.layer == "the model's output":
        cut = f": cut by {', '.join(seam.producers)} and not gathered" if seam.producers else ""
        return f"{seam.what} is not the unsharded model's{cut}: {times}"
    return f"its {seam.what} is not the unsharded model's: {times}"


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of whatever a model returns, in order."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
