"""Where the ranks of a sharded run meet, and what is compared with the reference there, as it happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tpshard.verify.lockstep import Lockstep
from tpshard.verify.placement import REFERENCE, Cut, Layer, is_conv1d
from tpshard.verify.recurrent import is_recurrent, run_in_steps, steps

TOLERANCE = 1e-10  # relative L2, of a seam and of each position: clean runs stay below 1e-14, real faults exceed 4e-4
LARGEST = 1e-9  # of the reference's root mean square, for a single number
OWN_PART = "own part of the output"  # of a column layer; everything else that is compared is whole


@dataclass(frozen=True, slots=True)
class Seam:
    """One comparison. ``error`` is relative to the reference, infinite where a number is not finite."""

    layer: str
    what: str
    rank: int
    error: float
    wrong: bool
    producers: tuple[str, ...] = ()


class EnoughError(Exception):
    """An error was found that is large enough to end the run."""


@dataclass(slots=True)
class Record:
    """What a run has compared, in order; ``positions`` counts positions of all comparisons."""

    seams: list[Seam] = field(default_factory=list)
    positions: int = 0
    gathers: int = 0
    visited: set[str] = field(default_factory=set)
    stop_above: float | None = None  # an error that is enough in what is whole: the run ends there
    followed: bool = True  # to what is whole; not where layers are isolated or a rank broke down
    open_cuts: list[str] = field(default_factory=list)  # column layers since the ranks last met

    def compare(self, layer: str, what: str, rank: int, got: torch.Tensor, want: torch.Tensor) -> None:
        """Note how far ``got`` is from ``want``; the last axis is one position's features."""
        error, wrong = difference(got.detach(), want.detach())
        self.positions += want.numel() // max(1, want.shape[-1]) if want.ndim else 1
        self.seams.append(Seam(layer, what, rank, error, wrong, tuple(self.open_cuts[-4:]) if wrong else ()))
        if self.stop_above is not None and error >= self.stop_above and what != OWN_PART:
            raise EnoughError

    @property
    def moved(self) -> tuple[str, ...]:
        """Layers of which ranks hold other numbers than the reference at the same places, while all that is whole is
        the reference's: cells that changed places together, such as channels of up and down. The function is equal
        (that the bytes differ, the weights check says)."""
        wrong = [seam for seam in self.seams if seam.wrong]
        if not self.followed or any(seam.what != OWN_PART for seam in wrong):
            return ()
        return tuple(dict.fromkeys(seam.layer for seam in wrong))

    @property
    def counted(self) -> list[Seam]:
        """The comparisons that decide: where cells only moved, those of what is whole."""
        return [seam for seam in self.seams if seam.what != OWN_PART] if self.moved else self.seams

    @property
    def worst(self) -> float:
        return max((seam.error for seam in self.counted), default=0.0)


def difference(got: torch.Tensor, want: torch.Tensor) -> tuple[float, bool]:
    """The larger of the relative L2 error of the whole and of the worst position; and whether it is too large.

    Every comparison is written so that NaN is too large.
    """
    if got.shape != want.shape:
        return float("inf"), True
    if not want.numel():
        return 0.0, False
    rows, apart = (
        want.reshape(-1, want.shape[-1] if want.ndim else 1),
        (got - want).reshape(-1, got.shape[-1] if got.ndim else 1),
    )
    scale = rows.norm() / len(rows) ** 0.5  # a typical position; a position near zero is measured by it
    if not bool(scale > 0):
        wrong = not bool((apart == 0).all())
        return (float("inf") if wrong else 0.0), wrong
    of_rows = apart.norm(dim=1) / rows.norm(dim=1).clamp(min=1e-6 * float(scale))
    error = float(torch.maximum(of_rows.max(), apart.norm() / rows.norm()))
    root_mean_square = scale / rows.shape[1] ** 0.5
    within = error <= TOLERANCE and bool(apart.abs().max() <= LARGEST * root_mean_square)
    return (error if error == error else float("inf")), not within


def feature_axis(module: nn.Module) -> int:
    """The axis of a layer's output that its weight's out axis becomes, counted from the end; convolutions and their
    norms have channels in axis 1."""
    channels = isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm)
    return 1 if channels else -1


class Hooks:
    """Puts the seams into one run's model: run 0 is the reference, run r + 1 rank r. With ``isolate`` the ranks go on
    from the reference's value after each comparison, so that every faulty layer shows, not only the first."""

    def __init__(self, lock: Lockstep, record: Record, ranks: int, isolate: bool = False) -> None:
        self.lock, self.record, self.ranks, self.isolate = lock, record, ranks, isolate
        self._handles: list[Any] = []

    def attach(self, run: int, model: nn.Module, layers: Sequence[Layer]) -> None:
        modules = dict(model.named_modules())
        for layer in layers:
            module = modules[layer.path]
            if is_recurrent(module) and layer.cut is not None:
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
        if layer.task in ("column", "gather", "whole") and (isinstance(module, nn.Linear) or is_conv1d(module)):
            return lambda _, args: self._compare_input(run, layer, args)
        return None

    def _compare_input(self, run: int, layer: Layer, args: tuple[Any, ...]) -> None:
        """These layers want all of their input: it has to be the reference's on every rank."""
        if not args or not isinstance(args[0], torch.Tensor):
            return
        want = self.lock.reference(run, f"{layer.path}, input", args[0].detach().clone())
        if run != REFERENCE:
            self.record.compare(layer.name, "input", run - 1, args[0], want)

    def _join_input(self, run: int, layer: Layer, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Each feature from the lowest rank that has something there: the others hold zeros, or the same."""
        joined = []
        for number, value in enumerate(args):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                values = self.lock.exchange(run, f"{layer.path}, input {number}", value)
                if run != REFERENCE:
                    value = self._onwards(_first_nonzero(values[1:]), values[REFERENCE])
                    self.record.compare(layer.name, "gathered input", run - 1, value, values[REFERENCE])
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
        # The reference's value is copied, since its own code may go on to change it in place.
        values = self.lock.exchange(run, layer.path, value.detach().clone() if run == REFERENCE else value)
        self.record.visited.add(layer.path)
        if run == self.lock.runs[0]:
            self.record.gathers += layer.task == "gather"
        if run == REFERENCE:
            return None
        if layer.task == "row":
            joined = torch.stack(values[1:]).sum(dim=0)
        else:
            assert layer.cut is not None
            joined = _join(values[1:], layer.cut, feature_axis(module))
        self.record.compare(layer.name, "output", run - 1, joined, values[REFERENCE])
        if run == self.lock.runs[-1]:
            self.record.open_cuts.clear()
        return put_back(self._onwards(joined, values[REFERENCE]))

    def _compare_own(self, run: int, layer: Layer, module: nn.Module, out: Any) -> Any:
        """A column layer's output stays local: each rank's own part of it is compared."""
        value, put_back = first_tensor(out)
        reference = self.lock.reference(run, layer.path, value.detach().clone())
        self.record.visited.add(layer.path)
        if run == self.lock.runs[0]:
            self.record.open_cuts.append(layer.name)
        axis, cut = feature_axis(module), layer.cut
        if run == REFERENCE or cut is None or value.shape[axis] != sum(len(own) for own in cut.first):
            return None  # where the layer's features are not its weight's rows, its consumer will tell
        own = cut.index[run - 1].to(value.device)
        mine, theirs = (tensor.index_select(axis, own).movedim(axis, -1) for tensor in (value, reference))
        self.record.compare(layer.name, OWN_PART, run - 1, mine, theirs)
        if not self.isolate:
            return None
        wanted = reference.index_select(axis, own)
        return put_back(self._onwards(value, value.detach().index_copy(axis % value.ndim, own, wanted)))

    def _onwards(self, value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """What a rank goes on with; gradients are those of its own value either way."""
        return value + (reference - value).detach() if self.isolate else value

    # ---------------------------------------------------------------------------------------- recurrent layers

    def _attach_recurrent(self, run: int, layer: Layer, module: nn.Module) -> None:
        """LSTM, GRU and RNN meet after every step: each rank has its own units of the hidden state."""
        assert isinstance(module, nn.RNNBase)
        assert layer.cut is not None
        if run == REFERENCE:  # torch's own code, which then keeps step with the ranks
            self._handles.append(module.register_forward_pre_hook(lambda module, _: _set_flat_weights(module)))
            keep_step = lambda module, args, out: self._keep_step(layer, module, args, out)  # noqa: E731
            self._handles.append(module.register_forward_hook(keep_step))
            return
        first = [own[own < module.hidden_size] for own in layer.cut.first]

        def join(key: str, hidden: torch.Tensor) -> torch.Tensor:
            values = self.lock.exchange(run, f"{layer.path}, {key}", hidden)
            joined = torch.zeros_like(hidden)
            for value, own in zip(values[1:], first, strict=True):
                joined = joined.index_copy(-1, own, value.index_select(-1, own))
            return joined

        def forward(input: torch.Tensor, hx: Any = None) -> Any:
            out = run_in_steps(module, input, hx, join)
            return self._compare_recurrent(run, layer, out)

        was = module.forward
        module.forward = forward
        self._handles.append(_Restored(module, was))

    def _keep_step(self, layer: Layer, module: nn.RNNBase, args: tuple[Any, ...], out: Any) -> Any:
        for step in steps(module, args[0].shape[1 if module.batch_first else 0]):
            self.lock.exchange(REFERENCE, f"{layer.path}, {step}", torch.zeros(()))
        return self._compare_recurrent(REFERENCE, layer, out)

    def _compare_recurrent(self, run: int, layer: Layer, out: Any) -> Any:
        value, put_back = first_tensor(out)
        reference = self.lock.reference(run, layer.path, value.detach().clone())
        self.record.visited.add(layer.path)
        if run == self.lock.runs[0]:
            self.record.gathers += 1
        if run == REFERENCE:
            return None
        self.record.compare(layer.name, "output", run - 1, value, reference)
        return put_back(self._onwards(value, reference))


class _Restored:
    """A handle that gives a module its own forward back."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self._module, self._forward = module, forward

    def remove(self) -> None:
        self._module.forward = self._forward


def _set_flat_weights(module: nn.RNNBase) -> None:
    """torch keeps a list of the weights beside the parameters."""
    module._flat_weights = [getattr(module, name).dense() for name in module._flat_weights_names]


def first_tensor(out: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """A layer's output tensor, and how to put another in its place."""
    if isinstance(out, torch.Tensor):
        return out, lambda tensor: tensor
    if isinstance(out, tuple) and out and isinstance(out[0], torch.Tensor):
        return out[0], lambda tensor: (tensor, *out[1:])
    raise TypeError(f"a layer that is cut returns {type(out).__name__}, not a tensor")


def _join(values: Sequence[torch.Tensor], cut: Cut, axis: int) -> torch.Tensor:
    """Each feature from the lowest rank that holds it."""
    joined = torch.zeros_like(values[0])
    for value, own in zip(values, cut.first, strict=True):
        index = own.to(value.device)
        joined = joined.index_copy(axis % joined.ndim, index, value.index_select(axis, index))
    return joined


def _first_nonzero(values: Sequence[torch.Tensor]) -> torch.Tensor:
    joined = values[0]
    empty = (joined == 0).reshape(-1, joined.shape[-1]).all(dim=0)
    for value in values[1:]:
        filled = empty & (value != 0).reshape(-1, value.shape[-1]).any(dim=0)
        joined = torch.where(filled, value, joined)
        empty = empty & ~filled
    return joined
