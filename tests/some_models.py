"""Small models of the usual kinds of layers, with their policies, for ``--model tests.some_models:build``.

``config.json`` says which one (``{"of": NAME}``). No two sizes of a model are equal, where its layers let them differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

BATCH, TIME = 2, 5


class Recurrent(nn.Module):
    """Words, a recurrent layer, a layer on the last outputs; with ``states`` it returns the last states, too."""

    def __init__(self, layer: nn.RNNBase, states: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(37, layer.input_size)
        self.rec = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 9)
        self.states = states

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.words(tokens if self.rec.batch_first else tokens.T)
        y, last = self.rec(input=x)
        return (self.head(y), last) if self.states else self.head(y)


class Stateful(nn.Module):
    """One recurrent layer hands its last states on to another, on sequences without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(7, 12, num_layers=2)
        self.decoder = nn.LSTM(5, 12, num_layers=2)
        self.down = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        _, (h, c) = self.encoder(x)
        y, _ = self.decoder(y, (h.tanh(), c))
        return self.down(y)  # type: ignore[no-any-return]


class Cells(nn.Module):
    """Cells that the model itself calls step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.LSTMCell(7, 12), nn.GRUCell(12, 13), nn.RNNCell(13, 11)
        self.head = nn.Linear(11, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state, h, g = None, None, None
        for step in x:
            state = self.one(step, state)
            h = self.two(state[0], h)
            g = self.three(h, g)
        return self.head(g), state[1]


class Images(nn.Module):
    """Stem, norm, depthwise, pointwise, norm, grouped, transposed, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depth, self.rectify = nn.Conv2d(12, 12, (3, 5), padding=(1, 2), groups=12), nn.PReLU(12)
        self.point, self.whole = nn.Conv2d(12, 10, 1), nn.BatchNorm2d(10)
        self.wide, self.groups = nn.Conv2d(10, 24, 3), nn.Conv2d(24, 48, 1, groups=12)
        self.back = nn.ConvTranspose2d(48, 5, (2, 1))
        self.line = nn.Sequential(nn.Conv1d(5, 14, 3), nn.ReLU(), nn.GroupNorm(7, 14))
        self.flat = nn.Linear(14 * 28, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.whole(self.point(self.rectify(self.depth(x)))))
        x = self.back(torch.relu(self.groups(self.wide(x))))
        return self.flat(self.line(x.flatten(2)).flatten(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """nn.MultiheadAttention (which reads ``out_proj`` itself) between norms, and a transformer's layers."""

    def __init__(self, batch_first: bool = True, kdim: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.mha = nn.MultiheadAttention(24, 12, batch_first=batch_first, kdim=kdim, vdim=kdim)
        self.memory = nn.Linear(24, kdim) if kdim else nn.Identity()
        layer = nn.TransformerEncoderLayer(24, 12, 36, batch_first=batch_first, norm_first=kdim is not None)
        self.layers = nn.ModuleList([layer, nn.TransformerEncoderLayer(24, 12, 36, batch_first=batch_first)])
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        memory = self.memory(y)
        x = x + self.mha(y, memory, memory, need_weights=False)[0]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def tokens() -> torch.Tensor:
    return torch.arange(BATCH * TIME).reshape(BATCH, TIME) * 7 % 37


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def recurrent(kind: type[nn.RNNBase], *sizes: Any, states: bool = False, **options: Any) -> Any:
    return lambda: (Recurrent(kind(*sizes, **options), states), (tokens(),))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "lstm": recurrent(nn.LSTM, 11, 12, 2, batch_first=True),
    "lstm both ways": recurrent(nn.LSTM, 11, 13, 2, bidirectional=True, states=True),
    "gru": recurrent(nn.GRU, 11, 12, 2, bias=False),
    "gru both ways": recurrent(nn.GRU, 11, 13, bidirectional=True, batch_first=True, states=True),
    "rnn": recurrent(nn.RNN, 11, 12, 2, nonlinearity="relu", bidirectional=True),
    "tanh": recurrent(nn.RNN, 11, 13, bias=False, batch_first=True),
    "both ways, row": recurrent(nn.GRU, 11, 13, bidirectional=True),
    "stateful": lambda: (Stateful(), (numbers(TIME, 7), numbers(4, 5))),
    "cells": lambda: (Cells(), (numbers(TIME, BATCH, 7),)),
    "images": lambda: (Images(), {"x": numbers(BATCH, 3, 6, 8)}),
    "attention": lambda: (Attention(), (numbers(BATCH, TIME, 24),)),
    "cross-attention": lambda: (Attention(batch_first=False, kdim=17), (numbers(TIME, BATCH, 24),)),
}

_RECURRENT = """
  words: {{rule: row, dims: io, uneven: true}}
  rec: {{rule: column, parts: {gates}, uneven: true, gather: true}}
  head: {{rule: column, uneven: true, gather: true}}
"""
_ATTENTION = """
  norm: replicate
  memory: {rule: column, gather: true, uneven: true}
  mha.{in_proj_weight,in_proj_bias}: {rule: column, parts: [12, 12, 12]}
  mha.{q_proj_weight,k_proj_weight,v_proj_weight}: {rule: column, heads: 12}
  layers.*.self_attn: {rule: column, parts: [12, 12, 12]}
  out_proj: {rule: row, heads: 12}
  linear1: column
  linear2: row
  "{norm1,norm2}": replicate
  head: {rule: column, gather: true, uneven: true}
"""
POLICIES: dict[str, str] = {
    "lstm": _RECURRENT.format(gates=4),
    "lstm both ways": _RECURRENT.format(gates=4),
    "gru": _RECURRENT.format(gates=3),
    "gru both ways": _RECURRENT.format(gates=3),
    "rnn": _RECURRENT.format(gates=1),
    "tanh": _RECURRENT.format(gates=1),
    "both ways, row": """
  words: {rule: row, dims: io, uneven: true}
  rec: {rule: column, parts: 3, uneven: true}
  head: {rule: row, parts: 2, uneven: true}
""",
    "stateful": """
  encoder: {rule: column, parts: 4, gather: true}
  decoder: {rule: column, parts: 4}
  down: row
""",
    "cells": """
  one: {rule: column, parts: 4, gather: true}
  two: {rule: column, parts: 3, uneven: true, gather: true}
  three: {rule: column, uneven: true, gather: true}
  head: {rule: row, uneven: true}
""",
    "images": """
  "{stem,norm,depth,rectify}": column
  point: row
  whole: replicate
  wide: {rule: column, heads: 12}
  groups: {rule: column, heads: 12}
  back: {rule: row, dims: io.., heads: 12}
  line.{0,2}: {rule: column, heads: 7, uneven: true}
  flat: {rule: row, heads: 7, uneven: true}
""",
    "attention": _ATTENTION,
    "cross-attention": _ATTENTION,
}


def build(config: dict[str, Any]) -> tuple[nn.Module, Any]:
    return MODELS[config["of"]]()


def save(name: str, folder: Path) -> None:
    """The model on disk, random everywhere: biases, norms and what norms have measured, too. Matrices keep the size of
    what they multiply: larger ones drive softmax and gates into their flat parts, where gradients are next to nothing.
    """
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    state = MODELS[name]()[0].state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            spread = torch.rand if key.endswith("running_var") else torch.randn
            state[key] = (spread(value.shape, generator=generator) + 0.01) / max(1, value[:1].numel()) ** 0.5
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"of": name}))


def save_policy(name: str, path: Path, changed: str = "") -> Path:
    """The model's policy; for what rules in ``changed`` meet, they decide."""
    text = f"name: right\nrules:\n{POLICIES[name].strip(chr(10))}\n"
    if changed:
        text += f"---\nname: wrong\nextends: right\nfor: {{of: '{name}'}}\nrules:\n  {changed}\n"
    path.write_text(text)
    return path
