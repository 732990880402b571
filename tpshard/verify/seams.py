"""Where the ranks of a sharded run meet, and what is compared with the reference there, as it happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tpshard.verify.features import chosen_by, feature_axis, joined_by, only, own_part, own_units, wants_whole_input
from tpshard.verify.lockstep import Lockstep
from tpshard.verify.placement import REFERENCE, Layer
from tpshard.verify.record import OWN_PART, Record
from tpshard.verify.recurrent import (
    check_steps,
    is_recurrent,
    is_sequence,
    run_in_steps,
    states_of,
    steps,
    with_states,
)


class Hooks:
    """Puts the seams into one run's model: run 0 is the reference, run r + 1 rank r. With ``isolate`` the ranks go on
    from the reference's value after each comparison, so that every faulty layer shows, not only the first."""

    def __init__(self, lock: Lockstep, record: Record, ranks: int, isolate: bool = False) -> None:
        self.lock, self.record, self.ranks, self.isolate = lock, record, ranks, isolate
        self._joined: torch.Tensor | None = None
        self._handles: list[Any] = []

    def attach(self, run: int, model: nn.Module, layers: Sequence[Layer]) -> None:
        modules = dict(model.named_modules())
        for layer in layers:
            module = modules[layer.path]
            if is_recurrent(module) and layer.task in ("column", "gather"):
                self._attach_recurrent(run, layer, module)
                continue
            before, after = self._before(run, layer, module), self._after(run, layer, module)
            if before is not None:
                self._handles.append(module.register_forward_pre_hook(before))
            if after is not None:
                self._handles.append(module.register_forward_hook(after))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    # ---------------------------------------------------------------------------------------- before a layer

    def _before(self, run: int, layer: Layer, module: nn.Module) -> Callable[..., Any] | None:
        if layer.task == "gather input":
            return lambda _, args: self._join_input(run, layer, args)
        if wants_whole_input(layer.task, module):
            return lambda _, args: self._compare_input(run, layer, feature_axis(module), args)
        return None

    def _compare_input(self, run: int, layer: Layer, axis: int, args: tuple[Any, ...]) -> None:
        """These layers want all of their input: it has to be the reference's on every rank."""
        if not args or not isinstance(args[0], torch.Tensor):
            return
        want = self.lock.reference(run, f"{layer.path}, input", _kept(run, args[0]))
        if run != REFERENCE:
            self.record.compare(layer.name, "input", run - 1, args[0].movedim(axis, -1), want.movedim(axis, -1))

    def _join_input(self, run: int, layer: Layer, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Each feature from the rank that has its column of the row layer beside; where there is none of as many
        features, from the lowest rank that has something there."""
        joined = []
        for number, value in enumerate(args):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                want = self.lock.reference(run, f"{layer.path}, input {number}", _kept(run, value))
                parts = self.lock.ranks(run, f"{layer.path}, input {number}", value)
                if run != REFERENCE:
                    cut = next((c for c in layer.beside if sum(map(len, c.first)) == value.shape[-1]), None)
                    got = chosen_by(parts, cut) if cut else _first_nonzero(parts)
                    self.record.compare(layer.name, "gathered input", run - 1, got, want)
                    value = self._onwards(got, want)
            joined.append(value)
        if run == self.lock.runs[0]:
            self.record.gathers += 1
        return tuple(joined)

    # ---------------------------------------------------------------------------------------- after a layer

    def _after(self, run: int, layer: Layer, module: nn.Module) -> Callable[..., Any] | None:
        if layer.task in ("row", "gather"):
            return lambda _, args, out: self._meet(run, layer, module, out)
        if layer.task == "column":
            return lambda _, args, out: self._compare_own(run, layer, module, out)
        return lambda _, args, out: self.record.visited.add(layer.path)

    def _meet(self, run: int, layer: Layer, module: nn.Module, out: Any) -> Any:
        """Partial sums are added up; gathered parts are joined. Every rank goes on with the same."""
        value, put_back = first_tensor(out)
        axis, cut = feature_axis(module), layer.cut if layer.task == "gather" else None
        want = self.lock.reference(run, layer.path, _kept(run, value))
        if cut is not None and run != REFERENCE:
            self._compare_part(layer, run, value, want, axis, cut.index[run - 1])
        parts = self.lock.ranks(run, layer.path, value if cut is None else own_part(value, cut, run, axis))
        self.record.visited.add(layer.path)
        if run == self.lock.runs[0]:
            self.record.gathers += layer.task == "gather"
            self._joined = None
        if run == REFERENCE:
            return None
        if self._joined is None:  # the first of the ranks that are here: the others' is the same
            self._joined = sum(parts[1:], parts[0]) if cut is None else joined_by(parts, cut, axis)
            if run == 1:
                self.record.compare(layer.name, "output", 0, *(t.movedim(axis, -1) for t in (self._joined, want)))
        joined = self._joined.clone()
        if run == self.lock.runs[-1]:
            self._joined = None
            self.record.open_cuts.clear()
        return put_back(self._onwards(joined, want))

    def _compare_part(
        self, layer: Layer, run: int, value: torch.Tensor, want: torch.Tensor, axis: int, own: torch.Tensor
    ) -> None:
        index = own.to(value.device)
        mine, theirs = (tensor.index_select(axis, index).movedim(axis, -1) for tensor in (value.detach(), want))
        self.record.compare(layer.name, OWN_PART, run - 1, mine, theirs)

    def _compare_own(self, run: int, layer: Layer, module: nn.Module, out: Any) -> Any:
        """A column layer's output stays local: each rank's own part of it is compared."""
        value, put_back = first_tensor(out)
        reference = self.lock.reference(run, layer.path, _kept(run, value))
        self.record.visited.add(layer.path)
        if run == self.lock.runs[0]:
            self.record.open_cuts.append(layer.name)
        axis, cut = feature_axis(module), layer.cut
        if run == REFERENCE or cut is None or value.shape[axis] != sum(len(own) for own in cut.first):
            return None  # where the layer's features are not its weight's rows, its consumer will tell
        own = cut.index[run - 1].to(value.device)
        self._compare_part(layer, run, value, reference, axis, own)
        if not self.isolate:
            return None
        wanted = reference.index_select(axis, own)
        return put_back(self._onwards(value, value.detach().index_copy(axis % value.ndim, own, wanted)))

    def _onwards(self, value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """What a rank goes on with; gradients are those of its own value either way."""
        return value + (reference - value).detach() if self.isolate else value

    # ---------------------------------------------------------------------------------------- recurrent layers

    def _attach_recurrent(self, run: int, layer: Layer, module: Any) -> None:
        """LSTM, GRU and RNN meet after every step: each rank has its own units of the hidden state. The reference
        runs torch's own code, and then keeps step with the ranks."""
        was = module.forward

        def forward(input: Any, hx: Any = None) -> Any:
            self._compare_input(run, layer, -1, (input,))
            out = self._in_steps(run, layer, module, was, input, hx) if is_sequence(module) else was(input, hx)
            return self._meet_recurrent(run, layer, module, out)

        module.forward = forward
        self._handles.append(_Restored(module, was))

    def _in_steps(self, run: int, layer: Layer, module: Any, was: Callable[..., Any], input: Any, hx: Any) -> Any:
        check_steps(layer.path, module, input)

        def join(step: str, hidden: torch.Tensor) -> torch.Tensor:
            own = None if run == REFERENCE else own_units(layer, module, hidden)
            given = hidden if own is None else own_part(hidden, own, run, -1)
            parts = self.lock.ranks(run, f"{layer.path}, {step}", given)
            if run == self.lock.runs[0]:
                self.record.gathers += 1
            return hidden if own is None else joined_by(parts, own, -1)

        if run != REFERENCE:
            return run_in_steps(module, input, hx, join)
        out = was(input, hx)
        for step in steps(module, input):
            join(step, torch.zeros(()))
        return out

    def _meet_recurrent(self, run: int, layer: Layer, module: Any, out: Any) -> Any:
        """What such a layer returns: joined at gather, else the rank's own units of it."""
        states = list(states_of(out))
        wanted = self.lock.reference(run, layer.path, [_kept(run, state) for state in states])
        cuts = [own_units(layer, module, state) for state in states]
        parts = [
            self.lock.ranks(run, f"{layer.path}, {place}", own_part(state, own, run, -1))
            for place, (state, own) in enumerate(zip(states, cuts, strict=True))
        ]
        self.record.visited.add(layer.path)
        if run == self.lock.runs[0]:
            self.record.gathers += layer.task == "gather" and not is_sequence(module)
            self.record.open_cuts += [layer.name] if layer.task == "column" else []
        if run == REFERENCE:
            return out
        met = []
        for want, state, own, given in zip(wanted, states, cuts, parts, strict=True):
            if layer.task == "gather":
                got, right, what = joined_by(given, own, -1), want, "output"
            else:
                mine = own.index[run - 1]
                got, right, what = only(state, mine), only(want, mine), OWN_PART
            self.record.compare(layer.name, what, run - 1, got, right)
            met.append(self._onwards(got, right))
        return with_states(out, iter(met))


class _Restored:
    """A handle that gives a module its own forward back."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self._module, self._forward = module, forward

    def remove(self) -> None:
        self._module.forward = self._forward


def first_tensor(out: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """A layer's output tensor, and how to put another in its place."""
    if isinstance(out, torch.Tensor):
        return out, lambda tensor: tensor
    if isinstance(out, tuple) and out and isinstance(out[0], torch.Tensor):
        return out[0], lambda tensor: (tensor, *out[1:])
    raise TypeError(f"a layer that is cut returns {type(out).__name__}, not a tensor")


def _kept(run: int, value: torch.Tensor) -> torch.Tensor:
    """The reference's value is copied, since its own code may go on to change it in place."""
    return value.detach().clone() if run == REFERENCE else value.detach()


def _first_nonzero(values: Sequence[torch.Tensor]) -> torch.Tensor:
    joined = values[0]
    empty = (joined == 0).reshape(-1, joined.shape[-1]).all(dim=0)
    for value in values[1:]:
        filled = empty & (value != 0).reshape(-1, value.shape[-1]).any(dim=0)
        joined = torch.where(filled, value, joined)
        empty = empty & ~filled
    return joined
