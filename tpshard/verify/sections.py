"""Backward, block by block: at every block of a model the graph is cut, and both sides go back from there.

What a block returns is met by a random cotangent, its gradients are compared at once, and the run goes on from the same
numbers without history: no more than one block's activations are alive. Every parameter is in one block, or before,
between or after them, where the same is done. The ranks' copies are one graph (they have exchanged tensors), so that
one backward goes through all of them; each copy returns the whole of the result, and gets its share of the cotangent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError
from tpshard.verify.block_tensor import Context
from tpshard.verify.gradients import Comparison, Difference
from tpshard.verify.lockstep import Lockstep, no_fault_of_the_model
from tpshard.verify.models import one_line
from tpshard.verify.placement import REFERENCE
from tpshard.verify.record import TOLERANCE, difference

ALIKE = 1e-6
MASKED = 1e9  # LongT5 adds -1e10 to a position bias and hands it on
SMALL = 1e-4  # of a section's largest gradient, by root mean square: one that is smaller is measured by that


class RanksBackwardError(Exception):
    """The ranks' graph broke down on the way back, the reference's did not."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """One comparison: of a parameter (by the module's name), or of a section's input (``parameter`` empty)."""

    section: str
    parameter: str
    error: float
    wrong: bool


def outermost_blocks(module: nn.Module) -> list[str]:
    """The paths of the elements of module lists that are not in another's."""
    found: list[str] = []
    for path, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and not any(path.startswith(f"{block}.") for block in found):
            found += [f"{path}.{name}" if path else name for name, _ in part.named_children()]
    return found


@dataclass(slots=True)
class _Side:
    """One run's: ``given``: what was handed on without history, by the id of what it was; ``leaves``: the same, to
    compare their gradients."""

    given: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    handed: dict[int, torch.Tensor] = field(default_factory=dict)
    leaves: list[torch.Tensor] = field(default_factory=list)


class Sections:
    """Puts the cuts into the runs' models and collects ``gradients``."""

    def __init__(self, lock: Lockstep, contexts: Mapping[int, Context], ranks: int, seed: int) -> None:
        self.lock, self.contexts, self.ranks, self.seed = lock, contexts, ranks, seed
        self.gradients: list[Gradient] = []
        self._sides = {run: _Side() for run in contexts}
        self._count = dict.fromkeys(contexts, 0)
        self._handles: list[Any] = []

    def attach(self, run: int, model: nn.Module, blocks: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        for path in blocks:
            before, after = self._before(run, path), self._after(run, path)
            self._handles.append(modules[path].register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(modules[path].register_forward_hook(after))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def finish(self, run: int, output: Any) -> Any:
        """Go back from the model's output."""
        return self._cut(run, "the model's output", output)

    def _before(self, run: int, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return self._cut(run, f"before {path}", (args, kwargs), keep=True)

        return hook

    def _after(self, run: int, path: str) -> Callable[..., Any]:
        return lambda module, args, output: self._cut(run, path, output)

    def _cut(self, run: int, section: str, value: Any, keep: bool = False) -> Any:
        """The same value without history, its history gone back through. ``keep``: it may be met again."""
        side = self._sides[run]
        present = {id(t): t for t in tensors_in(value) if t.grad_fn is not None and id(t) not in side.handed}
        tensors = {number: t for number, t in present.items() if number not in side.given}
        known = {number: side.given[number][1].clone() for number in present if number in side.given}
        if tensors or not keep:
            self._count[run] += 1
            key = f"{section}, cut {self._count[run]}"
            whole = self._whole(run, key, list(tensors.values()))
            everybody = self.lock.here(run, key, [t for n, t in enumerate(tensors.values()) if n in whole])
            if run == self.lock.runs[0]:
                self._go_back(section, key, dict(zip(self.lock.runs, everybody, strict=True)))
            if not keep:  # a section ends: what it was given has been compared
                side.leaves, side.handed = [leaf for _, leaf in side.given.values()], {}
        for place, (number, tensor) in enumerate(tensors.items()):
            if place not in whole:
                known[number] = tensor.detach()
                continue
            leaf = tensor.detach().clone().requires_grad_()
            side.leaves.append(leaf)
            given = leaf.clone()  # which the model may change in place
            if keep:
                side.given[number] = tensor, leaf
            side.handed[id(given)] = given
            known[number] = given
        return _replaced(value, known)

    def _whole(self, run: int, key: str, tensors: list[torch.Tensor]) -> set[int]:
        """Which are the reference's on every rank. Others (a block's attention, each rank's own heads of it) have no
        gradient in common; where they should be whole, forward has found them."""
        reference = self.lock.reference(run, key, [tensor.detach() for tensor in tensors])
        partial = {
            place: True
            for place, (own, want) in enumerate(zip(tensors, reference, strict=True))
            if not _apart(own.detach(), want) <= ALIKE
        }
        return set(range(len(tensors))) - set(self.lock.agree_here(run, key, partial))

    def _go_back(self, section: str, key: str, everybody: Mapping[int, list[torch.Tensor]]) -> None:
        """Both sides' backward, then every gradient compared."""
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {key}".encode()).digest()[:6], "big")
        generator = torch.Generator().manual_seed(seed)
        first = next(iter(everybody.values()))
        cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in first]
        if REFERENCE in everybody:
            self._go_back_alone(section, everybody[REFERENCE], cotangents)
        ranks = [run for run in everybody if run != REFERENCE]
        try:
            outputs = [tensor for run in ranks for tensor in everybody[run]]
            torch.autograd.backward(outputs, [c / self.ranks for c in cotangents] * len(ranks), retain_graph=True)
        except Exception as error:
            if no_fault_of_the_model(error) is not None:
                raise
            raise RanksBackwardError(f"on the way back from {section}: {error}") from error
        self._compare(section, ranks)

    def _go_back_alone(self, section: str, tensors: list[torch.Tensor], cotangents: list[torch.Tensor]) -> None:
        """The reference's backward. Raises InconclusiveError where its own code has none."""
        try:
            torch.autograd.backward(tensors, cotangents, retain_graph=True)
        except Exception as error:
            if no_fault_of_the_model(error) is not None:
                raise
            what = f"the unsharded model has no way back from {section}: {one_line(error)}"
            raise InconclusiveError(what) from error

    def _compare(self, section: str, ranks: Sequence[int]) -> None:
        tapes = {run: context.tape for run, context in self.contexts.items()}
        own = [tape for run in ranks if (tape := tapes[run]) is not None]
        found = list(Comparison(tapes.get(REFERENCE), own, self.lock).differences())
        found += self._input_differences(ranks)
        self.gradients += judged(section.removeprefix("before "), found)
        for tape in tapes.values():
            assert tape is not None
            tape.clear()

    def _input_differences(self, ranks: Sequence[int]) -> list[Difference]:
        sides = self._sides
        found = []
        for number in range(len(sides[ranks[0]].leaves)):
            like = sides[ranks[0]].leaves[number]
            grads = {run: side.leaves[number].grad for run, side in sides.items()}
            summed, want = torch.zeros_like(like, requires_grad=False), torch.zeros_like(like, requires_grad=False)
            for run, grad in grads.items():
                if grad is not None:
                    (want if run == REFERENCE else summed).add_(grad)
            found.append(Difference.between("", self.lock.total(summed), want))
            for side in sides.values():
                side.leaves[number].grad = None
        return found


def _apart(own: torch.Tensor, want: torch.Tensor) -> float:
    """The relative difference, without what stands for no attention at all in a table of scores: beside such numbers
    no other would count."""
    masked = (own.abs() > MASKED) & (want.abs() > MASKED) if want.is_floating_point() else None
    if masked is None or masked.all():
        return difference(own, want)[0]
    return difference(own.masked_fill(masked, 0), want.masked_fill(masked, 0))[0]


def judged(section: str, found: Sequence[Difference]) -> list[Gradient]:
    """Relative to the reference's norm; a gradient that is next to nothing (a key's bias under softmax has none at
    all) is measured by the section's largest. NaN is wrong."""
    largest = max(((d.size / d.count) ** 0.5 for d in found if d.count), default=0.0)
    gradients = []
    for d in found:
        scale = max(d.size**0.5, SMALL * largest * d.count**0.5)
        error = d.apart**0.5 / scale if scale > 0 else (0.0 if d.apart == 0 else float("inf"))
        error = error if error == error else float("inf")
        gradients.append(Gradient(section, d.key, error, not error <= TOLERANCE))
    return gradients


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _replaced(value: Any, by_id: Mapping[int, torch.Tensor]) -> Any:
    """The same structure with other tensors in it."""
    if isinstance(value, torch.Tensor):
        return by_id.get(id(value), value)
    if isinstance(value, Mapping):
        replaced = {key: _replaced(item, by_id) for key, item in value.items()}
        if type(value) is dict:
            return replaced
        for key, item in replaced.items():
            if item is not value[key]:
                value[key] = item  # type: ignore[index]
        return value
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, by_id) for item in value)
    return value
