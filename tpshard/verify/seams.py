"""What happens at which layer of a sharded run, and what is compared there.

A row layer's partial sums are added up, a gathered layer's parts are joined; everywhere else a rank is on its own.
The reference is at the same seam at the same time, so every seam is compared with it as it happens, in the order of
execution: the first that differs is the one at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError
from tpshard.verify.compare import TOLERANCE, Difference, compare
from tpshard.verify.lockstep import Diverged, Lockstep
from tpshard.verify.places import Cut, Layer
from tpshard.verify.report import Finding

Values = list[Any]


@dataclass(frozen=True, slots=True)
class Visit:
    """What a copy of the model brings to the seam after a layer."""

    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor | None


class Seams:
    """The seams of one run: hooks that meet at them, and what was found there."""

    def __init__(self, layers: Mapping[str, Layer], lock: Lockstep) -> None:
        self.findings: list[Finding] = []
        self.compared = 0
        self.rows = 0
        self.reached: set[str] = set()
        self.worst = Difference()
        self.worst_at = ""
        self._layers, self._lock = layers, lock
        self._open: list[Layer] = []  # cut layers since the last sum: who has split what comes next

    # ------------------------------------------------------------------------------------------ hooks

    def attach(self, model: nn.Module, me: int) -> Callable[[], None]:
        """Make a copy of the model stop at every seam; returns what detaches it."""
        modules = dict(model.named_modules())
        handles = []
        for path, layer in self._layers.items():
            module = modules[path]
            if layer.gathers_input:
                handles.append(module.register_forward_pre_hook(self._before(me, path, layer), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(me, path, layer), with_kwargs=True))
        return lambda: [handle.remove() for handle in handles].clear()

    def _before(self, me: int, path: str, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = (args, kwargs)
            brought = floating(given)
            joined = self._lock.exchange(me, f"{path} (input)", brought, lambda values: self._join_inputs(layer, values))
            return _replaced(given, {id(old): new for old, new in zip(brought, joined, strict=True)})

        return hook

    def _after(self, me: int, path: str, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            found = floating(output)
            visit = Visit(floating((args, kwargs)), found[0] if found else None)
            result = self._lock.exchange(me, path, visit, lambda visits: self._settle(layer, visits))
            return None if result is visit.output else _replaced(output, {id(visit.output): result})

        return hook

    # ------------------------------------------------------------------------------------------ at a seam

    def _settle(self, layer: Layer, visits: list[Visit]) -> Values:
        reference = visits[0]
        for rank, visit in enumerate(visits[1:]):
            _require_alike(layer, rank, reference, visit)
        if layer.label not in self.reached and layer.objection:
            self._find(layer, layer.objection)
        self.reached.add(layer.label)
        inputs_whole = self._check_inputs(layer, visits)
        outputs = [visit.output for visit in visits]
        if reference.output is None:
            return outputs
        match layer.kind:
            case "sum":
                return self._sum(layer, outputs)
            case "join":
                return self._join(layer, outputs)
            case "own":
                self._compare_own(layer, outputs)
                self._open.append(layer)
            case "same":
                for rank, output in enumerate(outputs[1:]):
                    if inputs_whole[rank]:
                        what = "is whole on every rank, but gives another output on this one"
                        self._compare(layer, rank, output, outputs[0], what)
        return outputs

    def _sum(self, layer: Layer, outputs: Values) -> Values:
        total = sum(outputs[2:], outputs[1])
        self._compare(layer, None, total, outputs[0], "the ranks' partial sums add up to something else")
        self._open.clear()
        return [outputs[0], total, *(total.clone() for _ in outputs[2:])]

    def _join(self, layer: Layer, outputs: Values) -> Values:
        axis = layer.cut_axis_of(outputs[0])
        if layer.cut is None or axis is None:
            shape = list(outputs[0].shape)
            raise InconclusiveError(f"{layer.label}: nothing tells how its output {shape} is dealt to the ranks")
        joined = _joined(outputs[1:], layer.cut.owners, axis)
        self._compare(layer, None, joined, outputs[0], "the ranks' parts, joined, are something else")
        self._open.clear()
        return [outputs[0], joined, *(joined.clone() for _ in outputs[2:])]

    def _compare_own(self, layer: Layer, outputs: Values) -> None:
        axis = layer.cut_axis_of(outputs[0])
        if layer.cut is None or axis is None:
            return
        for rank, held in enumerate(layer.cut.held):
            own, reference = (value.index_select(axis, held) for value in (outputs[rank + 1], outputs[0]))
            self._compare(layer, rank, own, reference, "this rank's part of the output is something else")

    def _check_inputs(self, layer: Layer, visits: list[Visit]) -> list[bool]:
        """Whether each rank has the layer's whole input; a linear layer that wants it and has not is a finding."""
        whole = []
        for rank, visit in enumerate(visits[1:]):
            pairs = list(zip(visit.inputs, visits[0].inputs, strict=True))
            good = all(compare(have, want).within for have, want in pairs)
            whole.append(good)
            if layer.wants_whole_input and pairs and not good:
                self._check_input(layer, rank, *pairs[0])
        return whole

    def _check_input(self, layer: Layer, rank: int, have: torch.Tensor, want: torch.Tensor) -> None:
        if layer.kind == "same":  # applied to each head, say: those of other ranks are zero here, and not looked at
            present = have.reshape(-1, have.shape[-1]).any(dim=-1)
            have, want = (value.reshape(-1, have.shape[-1])[present] for value in (have, want))
        producer = f" (cut by {self._open[-1].label})" if self._open else ""
        split = _is_split(have, want)
        what = f"its input is split{producer}, but the layer wants all of it" if split else "its input is something else"
        self._compare(layer, rank, have, want, what)

    def _join_inputs(self, layer: Layer, values: list[tuple[torch.Tensor, ...]]) -> Values:
        columns = [list(column) for column in zip(*values, strict=True)]
        joined = [self._join_input(layer, column) for column in columns]
        return [tuple(column[me] for column in joined) for me in range(len(values))]

    def _join_input(self, layer: Layer, column: Values) -> Values:
        """One input, made whole on every rank; what is whole already stays as it is."""
        reference, parts = column[0], column[1:]
        if any(part.shape != reference.shape for part in parts):
            raise Diverged(f"{layer.label}: its inputs have different shapes")
        if all(compare(part, reference).within for part in parts):
            return column
        producers = [cut for open_ in self._open if (cut := open_.cut) and cut.size == reference.shape[-1]]
        owners = producers[-1].owners if producers else _owners_by_value(parts)
        joined = _joined(parts, owners, reference.ndim - 1)
        self._compare(layer, None, joined, reference, "its input, joined from the ranks' parts, is something else")
        return [reference, joined, *(joined.clone() for _ in parts[1:])]

    def finish(self, outputs: list[dict[str, torch.Tensor]]) -> Values:
        """The seam at the end: every floating tensor that the model returns, on every rank."""
        for rank, output in enumerate(outputs[1:]):
            if output.keys() != outputs[0].keys():
                raise Diverged(f"rank {rank} returns {sorted(output)}, the reference {sorted(outputs[0])}")
            for name, value in output.items():
                self._compare_output(name, rank, value, outputs[0][name])
        return outputs

    def _compare_output(self, name: str, rank: int, have: torch.Tensor, want: torch.Tensor) -> None:
        if have.shape != want.shape:
            raise Diverged(f"rank {rank} returns {name} of {list(have.shape)}, the reference of {list(want.shape)}")
        layer, what = Layer(f"output {name}", "same"), "is something else"
        if self._open and _is_split(have, want):
            layer, what = self._open[-1], f"the output {name} itself is not whole: this layer is cut without gather"
        self._compare(layer, rank, have, want, what)

    # ------------------------------------------------------------------------------------------ the record

    def _compare(self, layer: Layer, rank: int | None, have: torch.Tensor, want: torch.Tensor, what: str) -> None:
        if bool(torch.isnan(want).any()):
            raise InconclusiveError(f"{layer.label}: the reference itself computes NaN there")
        if want.numel() == 0:
            return
        difference = compare(have, want, layer.channel_axis)
        self.compared += 1
        self.rows += difference.rows
        if not difference.relative <= self.worst.relative:
            self.worst, self.worst_at = difference, layer.label
        if not difference.within:
            self._find(layer, f"{what}: {difference}", rank)

    def _find(self, layer: Layer, what: str, rank: int | None = None) -> None:
        self.findings.append(Finding(what, layer=layer.label, rank=rank))


def floating(value: Any) -> tuple[torch.Tensor, ...]:
    """The floating tensors in tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return (value,) if value.is_floating_point() else ()
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return tuple(tensor for item in items for tensor in floating(item))


def named_outputs(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The floating tensors that a model returns, by key or number."""
    if isinstance(value, torch.Tensor):
        return {name or "tensor": value} if value.is_floating_point() else {}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: v for key, item in items for k, v in named_outputs(item, f"{name}.{key}" if name else str(key)).items()}


def _replaced(value: Any, new: Mapping[int, Any]) -> Any:
    """The same structure with some tensors, known by identity, exchanged."""
    if isinstance(value, torch.Tensor):
        return new.get(id(value), value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(item, new) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, new) for item in value)
    if isinstance(value, dict):
        return type(value)({key: _replaced(item, new) for key, item in value.items()})
    return value


def _require_alike(layer: Layer, rank: int, reference: Visit, visit: Visit) -> None:
    shapes = [
        [None if tensor is None else list(tensor.shape) for tensor in (one.output, *one.inputs)]
        for one in (reference, visit)
    ]
    if shapes[0] != shapes[1]:
        raise Diverged(f"{layer.label}: rank {rank} has shapes {shapes[1]}, the reference {shapes[0]}")


def _joined(parts: Values, owners: torch.Tensor, axis: int) -> torch.Tensor:
    """Each index along the axis from the rank that owns it."""
    joined = torch.zeros_like(parts[0])
    for rank, part in enumerate(parts):
        own = (owners == rank).nonzero().flatten()
        joined.index_copy_(axis, own, part.index_select(axis, own))
    return joined


def _owners_by_value(parts: Values) -> torch.Tensor:
    """Where no layer tells: what a rank does not hold is zero on it, at every position."""
    present = torch.stack([part.reshape(-1, part.shape[-1]).any(dim=0) for part in parts])
    return present.to(torch.int8).argmax(dim=0)


def _is_split(have: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether what is missing is only missing, not wrong."""
    return bool(((have == 0) | torch.isclose(have, want, rtol=TOLERANCE, atol=TOLERANCE)).all())


__all__ = ["Cut", "Layer", "Seams", "floating", "named_outputs"]
