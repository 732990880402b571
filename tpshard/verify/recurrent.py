"""LSTM, GRU and RNN, one step at a time, so that ranks with their own units of the hidden state can meet after each.

Formulas and gate order (LSTM i f g o, GRU r z n) are those of torch.nn's documentation. A rank's weights are zero for
units that it does not hold; ``join`` puts every rank's own units of the hidden state together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError

Join = Callable[[str, torch.Tensor], torch.Tensor]


def is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, nn.LSTM | nn.GRU | nn.RNN)


def steps(module: nn.RNNBase, length: int) -> Iterator[str]:
    """The names of the steps of one call, in the order in which they are joined."""
    for layer in range(module.num_layers):
        for direction in range(2 if module.bidirectional else 1):
            times = range(length)
            yield from (
                f"layer {layer}, direction {direction}, step {t}" for t in (times[::-1] if direction else times)
            )


def run_in_steps(module: nn.RNNBase, input: torch.Tensor, hx: Any, join: Join) -> Any:
    """What ``module(input, hx)`` returns, its hidden state joined after every step."""
    if module.proj_size:
        raise InconclusiveError("an LSTM with proj_size is not run in steps")
    if not isinstance(input, torch.Tensor) or input.ndim != 3:
        raise InconclusiveError("a recurrent layer that is cut takes a batch of sequences, not packed and not single")
    x = input.transpose(0, 1) if module.batch_first else input
    names = steps(module, len(x))
    directions = 2 if module.bidirectional else 1
    state = (hx if isinstance(hx, tuple) else (hx,)) if hx is not None else (None, None)
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
    y = x.transpose(0, 1) if module.batch_first else x
    h, c = (torch.stack(states) for states in last)
    return y, ((h, c) if isinstance(module, nn.LSTM) else h)


def _one_way(
    module: nn.RNNBase,
    x: torch.Tensor,
    first: list[torch.Tensor],
    layer: int,
    direction: int,
    join: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
