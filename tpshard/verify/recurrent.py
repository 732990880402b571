"""LSTM, GRU and RNN, one step at a time, so that ranks with their own units of the hidden state can meet after each.

Formulas and gate order (LSTM i f g o, GRU r z n) are those of torch.nn's documentation. A rank's weights are zero for
units that it does not hold; ``join`` puts every rank's own units of the hidden state together. The cell state of an
LSTM needs no meeting: a unit's next one depends on its own and on gates of the same unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError, printable

Join = Callable[[str, torch.Tensor], torch.Tensor]


def is_sequence(module: nn.Module) -> bool:
    """Whether a layer goes through the steps itself."""
    return isinstance(module, nn.LSTM | nn.GRU | nn.RNN)


def is_recurrent(module: nn.Module) -> bool:
    """Whether a layer's features are the first gate's rows of its weights: also where the model goes through the
    steps."""
    return is_sequence(module) or isinstance(module, nn.LSTMCell | nn.GRUCell | nn.RNNCell)


def check_steps(path: str, module: nn.RNNBase, input: Any) -> None:
    """Raises InconclusiveError where a layer that is cut cannot be run in steps."""
    kind = next(kind for kind in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, kind))
    what, hint = None, "leave it whole, rule: replicate"
    if module.proj_size:
        what = "with proj_size"
    elif type(module).forward is not kind.forward:
        what = "with a forward of its own"
    elif not isinstance(input, torch.Tensor):
        what, hint = f"on a {type(input).__name__}", f"give it padded sequences, or {hint}"
    if what:
        raise InconclusiveError(f"{printable(path)}: {kind.__name__} {what} cannot be run step by step", hint=hint)


def steps(module: nn.RNNBase, input: torch.Tensor) -> Iterator[str]:
    """The names of the steps of one call, in the order in which they are joined."""
    length = input.shape[1 if module.batch_first and input.ndim == 3 else 0]
    for layer in range(module.num_layers):
        for direction in range(2 if module.bidirectional else 1):
            times = range(length)
            yield from (
                f"layer {layer}, direction {direction}, step {t}" for t in (times[::-1] if direction else times)
            )


def run_in_steps(module: nn.RNNBase, input: torch.Tensor, hx: Any, join: Join) -> Any:
    """What ``module(input, hx)`` returns, its hidden state joined after every step; the cell state is the rank's."""
    batched = input.ndim == 3
    state = (hx if isinstance(hx, tuple) else (hx,)) if hx is not None else (None, None)
    if not batched:
        x, state = input.unsqueeze(1), tuple(s if s is None else s.unsqueeze(1) for s in state)
    else:
        x = input.transpose(0, 1) if module.batch_first else input
    names = steps(module, input)
    directions = 2 if module.bidirectional else 1
    last: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            first = [x.new_zeros(x.shape[1], module.hidden_size) if s is None else s[place] for s in state]
            hidden, h, c = _one_way(module, x, first, layer, direction, lambda h: join(next(names), h))
            outputs.append(hidden)
            last[0].append(h)
            last[1].append(c)
        x = torch.cat(outputs, dim=-1)
    h, c = (torch.stack(states) for states in last)
    if not batched:
        x, h, c = (tensor.squeeze(1) for tensor in (x, h, c))
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, ((h, c) if isinstance(module, nn.LSTM) else h)


def _one_way(
    module: nn.RNNBase,
    x: torch.Tensor,
    first: list[torch.Tensor],
    layer: int,
    direction: int,
    join: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer in one direction, ``x`` [time, batch, in]: all hidden states, the last, and the last cell state."""
    suffix = f"_l{layer}" + ("_reverse" if direction else "")
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    weights = [_dense(getattr(module, name + suffix)) for name in names]
    cell: Any = {"LSTM": torch.lstm_cell, "GRU": torch.gru_cell, "RNN_TANH": torch.rnn_tanh_cell,
                 "RNN_RELU": torch.rnn_relu_cell}[module.mode]  # fmt: skip
    h, c = first[0], first[-1]
    outputs: list[Any] = [None] * len(x)
    for t in reversed(range(len(x))) if direction else range(len(x)):
        if module.mode == "LSTM":
            h, c = cell(x[t], (h, c), *weights)
        else:
            h = cell(x[t], h, *weights)
        h = join(h)
        outputs[t] = h
    return torch.stack(outputs), h, c


def _dense(tensor: Any) -> torch.Tensor:
    dense: torch.Tensor = tensor.dense() if hasattr(tensor, "dense") else tensor
    return dense


def states_of(out: Any) -> list[torch.Tensor]:
    """The tensors that a recurrent layer returns: outputs, hidden state, cell state, as far as it has them."""
    return [out] if isinstance(out, torch.Tensor) else [state for item in out for state in states_of(item)]


def with_states(out: Any, states: Iterator[torch.Tensor]) -> Any:
    """The same, with other tensors."""
    return next(states) if isinstance(out, torch.Tensor) else tuple(with_states(item, states) for item in out)


def units(rows: torch.Tensor, hidden_size: int, features: int) -> torch.Tensor:
    """The features (of one direction or two) that go with rows of a weight [gates * hidden_size, in]: the first
    gate's."""
    own = rows[rows < hidden_size]
    return torch.cat([own + hidden_size * direction for direction in range(features // hidden_size)])
