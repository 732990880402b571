"""Keras' recurrent layers as torch's: kernels are transposed, and a GRU's gates z, r, h become r, z, n.

LSTM has the same order in both: i, f, c (torch: g), o. Keras' LSTM and SimpleRNN have one bias, torch's two: the second
is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tpshard.verify.keras_layers import Make, Making

GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}


class Recurrent(nn.Module):
    """LSTM, GRU or SimpleRNN in one direction; returns what the settings say."""

    def __init__(self, making: Making) -> None:
        super().__init__()
        settings, kind = making.settings, making.kind
        making.only(recurrent_activation="sigmoid", stateful=False, reset_after=True)
        nonlinearity = settings.get("activation", "tanh")
        if nonlinearity != "tanh" and (kind != "SimpleRNN" or nonlinearity != "relu"):
            raise making.refuse(f"with activation={nonlinearity}")
        self.sequences, self.state = bool(settings.get("return_sequences")), bool(settings.get("return_state"))
        self.backwards = bool(settings.get("go_backwards"))
        width, columns = making.shape("kernel")
        units, bias = columns // GATES[kind], making.has("bias")
        made: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU, "SimpleRNN": nn.RNN}[kind]
        more = {"nonlinearity": nonlinearity} if kind == "SimpleRNN" else {}
        self.rnn = made(width, units, batch_first=True, bias=bias, **more)
        order: Make = _torch_gates if kind == "GRU" else lambda rows: rows
        making.made("rnn.weight_ih_l0", "kernel", lambda kernel: order(kernel.transpose(0, 1)))
        making.made("rnn.weight_hh_l0", "recurrent_kernel", lambda kernel: order(kernel.transpose(0, 1)))
        if bias and kind == "GRU":
            making.made("rnn.bias_ih_l0", "bias", lambda given: order(given[0]))
            making.made("rnn.bias_hh_l0", "bias", lambda given: order(given[1]))
        elif bias:
            making.made("rnn.bias_ih_l0", "bias")
            zeros = torch.zeros(columns)
            self.rnn._parameters["bias_hh_l0"] = nn.Parameter(zeros, requires_grad=False)

    def forward(self, x: torch.Tensor, *states: torch.Tensor, initial_state: Any = None) -> Any:
        given = states or initial_state
        first = (
            [state.unsqueeze(0) for state in (given if isinstance(given, tuple | list) else [given])] if given else None
        )
        hx = None if first is None else (first[0], first[1]) if isinstance(self.rnn, nn.LSTM) else first[0]
        out, last = self.rnn(x.flip(1) if self.backwards else x, hx)
        result = out if self.sequences else out[:, -1]
        ends = last if isinstance(last, tuple) else (last,)
        return (result, *(state.squeeze(0) for state in ends)) if self.state else result


def _torch_gates(rows: torch.Tensor) -> torch.Tensor:
    """From z, r, h to r, z, n along the first axis."""
    update, reset, new = torch.split(rows, rows.shape[0] // 3)
    return torch.cat([reset, update, new])


class Bidirectional(nn.Module):
    """Two recurrent layers, the second from the end; their outputs are put together."""

    def __init__(self, making: Making) -> None:
        super().__init__()
        ahead = making.settings["layer"]
        back = making.settings.get("backward_layer") or ahead
        name = str(ahead["config"]["name"]).removeprefix("forward_")
        names = {"forward": f"forward_{name}", "backward": f"backward_{name}"}
        if back is not ahead:
            names["backward"] = str(back["config"]["name"])
        making.only(return_state=False)
        for side, inner in (("forward", ahead), ("backward", back)):
            kind, own = inner["class_name"], inner["config"]
            if kind not in GATES or own.get("return_state") or (own.get("go_backwards") and side == "forward"):
                raise making.refuse(f"of {kind}, or with return_state or go_backwards,")
            inside = making.inside(names[side], {**own, "go_backwards": side == "backward"}, kind)
            self.add_module(f"{side}_layer", Recurrent(inside))
            making.take(f"{side}_layer", inside)
        self.sequences = bool(ahead["config"].get("return_sequences"))
        self.mode = making.settings.get("merge_mode", "concat")
        if self.mode not in ("concat", "sum", "mul", "ave", None):
            raise making.refuse(f"with merge_mode={self.mode}")

    def forward(self, x: torch.Tensor) -> Any:
        ahead, back = self.get_submodule("forward_layer")(x), self.get_submodule("backward_layer")(x)
        back = back.flip(1) if self.sequences else back
        if self.mode == "concat":
            return torch.cat([ahead, back], dim=-1)
        if self.mode is None:
            return ahead, back
        both = ahead * back if self.mode == "mul" else ahead + back
        return both / 2 if self.mode == "ave" else both
