"""Keras' layers as torch modules: what each computes when it infers, from Keras' documentation.

The products are torch's own modules, so that ranks meet at them as anywhere, and activations stand behind them. Each
layer says how its parameters are made of the tensors as Keras stores them: kernels [in, out], gates of a GRU in another
order. What is not known here raises InconclusiveError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tpshard.errors import InconclusiveError, printable
from tpshard.layout import Shape
from tpshard.verify.models import Recipe, Source, renamed

Activation = Callable[[torch.Tensor], torch.Tensor]
Make = Callable[[torch.Tensor], torch.Tensor]
Recipes = dict[str, Recipe]

ACTIVATIONS: Mapping[str | None, Activation] = {
    None: lambda x: x,
    "linear": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "swish": functional.silu,
    "elu": functional.elu,
    "selu": functional.selu,
    "softplus": functional.softplus,
    "softsign": functional.softsign,
    "exponential": torch.exp,
    "hard_sigmoid": functional.hardsigmoid,
    "hard_silu": functional.hardswish,
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.2),
    "mish": functional.mish,
    "softmax": lambda x: functional.softmax(x, dim=-1),
    "log_softmax": lambda x: functional.log_softmax(x, dim=-1),
}


@dataclass(frozen=True, slots=True)
class Making:
    """A layer to be made: its path on disk, its settings, the shapes of all tensors on disk, and the recipes of its
    parameters, which are filled in."""

    path: str
    kind: str
    settings: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    recipes: Recipes = field(default_factory=dict)

    def refuse(self, what: str) -> InconclusiveError:
        hint = "name the model with --model"
        return InconclusiveError(f"{printable(self.path)}: {self.kind} {what} is not known here", hint=hint)

    def shape(self, leaf: str) -> Shape:
        """Raises InconclusiveError where the tensor is not there."""
        name = f"{self.path}.{leaf}"
        if name not in self.shapes:
            raise InconclusiveError(f"the checkpoint has no {printable(name)}", hint="is it of this model?")
        return self.shapes[name]

    def has(self, leaf: str) -> bool:
        return f"{self.path}.{leaf}" in self.shapes

    def made(self, parameter: str, leaf: str, make: Make | None = None) -> None:
        name = f"{self.path}.{leaf}"
        self.shape(leaf)
        self.recipes[parameter] = renamed(name) if make is None else Recipe((name,), _moved(name, make))

    def only(self, **wanted: Any) -> None:
        """Raises InconclusiveError where a setting is other than the one that is known here."""
        for key, value in wanted.items():
            given = self.settings.get(key, value)
            if given != value and not (value is False and not given):
                raise self.refuse(f"with {key}={printable(str(given), 40)}")

    def activation(self, key: str = "activation") -> Activation:
        given = self.settings.get(key)
        if not (given is None or isinstance(given, str)) or given not in ACTIVATIONS:
            raise self.refuse(f"with {key}={printable(str(given), 40)}")
        return ACTIVATIONS[given]

    def inside(self, leaf: str, settings: Mapping[str, Any], kind: str) -> Making:
        return Making(f"{self.path}.{leaf}", kind, settings, self.shapes)

    def take(self, prefix: str, inner: Making) -> None:
        self.recipes.update({f"{prefix}.{key}": recipe for key, recipe in inner.recipes.items()})


def _moved(name: str, make: Make) -> Callable[[Source], torch.Tensor]:
    """A tensor's numbers elsewhere: the gradient is of the parameter, not of how it was made."""

    def made(source: Source) -> torch.Tensor:
        with torch.no_grad():
            return make(source(name))

    return made


class Function(nn.Module):
    """A layer without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class Dense(nn.Module):
    def __init__(self, making: Making) -> None:
        super().__init__()
        making.only(lora_rank=None, quantization_config=None)
        rows, columns = making.shape("kernel")
        self.linear = nn.Linear(rows, columns, bias=making.has("bias"))
        self.activation = making.activation()
        making.made("linear.weight", "kernel", lambda kernel: kernel.transpose(0, 1))
        if making.has("bias"):
            making.made("linear.bias", "bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.linear(x))


class Embedding(nn.Module):
    def __init__(self, making: Making) -> None:
        super().__init__()
        words, width = making.shape("embeddings")
        self.table = nn.Embedding(words, width)
        making.made("table.weight", "embeddings")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.table(x.long())
        return out


class Convolution(nn.Module):
    """Kernels [size, …, in, out]; the data's channels are last."""

    def __init__(self, making: Making) -> None:
        super().__init__()
        making.only(data_format="channels_last")
        *sizes, width, channels = making.shape("kernel")
        axes = len(sizes)
        self.sizes = sizes
        self.strides = axis_numbers(making.settings.get("strides", 1), axes)
        self.dilation = axis_numbers(making.settings.get("dilation_rate", 1), axes)
        self.padding = making.settings.get("padding", "valid")
        groups = making.settings.get("groups", 1)
        kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        more = {"stride": tuple(self.strides), "dilation": tuple(self.dilation), "groups": groups}
        self.conv = kind(width * groups, channels, tuple(sizes), bias=making.has("bias"), **more)
        self.activation = making.activation()
        order = (axes + 1, axes, *range(axes))
        making.made("conv.weight", "kernel", lambda kernel: kernel.permute(order))
        if making.has("bias"):
            making.made("conv.bias", "bias")
        if self.padding not in ("valid", "same", "causal"):
            raise making.refuse(f"with padding={printable(str(self.padding), 40)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(-1, 1)
        if self.padding == "causal":
            x = functional.pad(x, ((self.sizes[0] - 1) * self.dilation[0], 0))
        elif self.padding == "same":
            x = functional.pad(x, same_padding(x.shape[2:], self.sizes, self.strides, self.dilation))
        return self.activation(self.conv(x).movedim(1, -1))


def axis_numbers(value: Any, axes: int) -> list[int]:
    return [int(value)] * axes if isinstance(value, int) else [int(n) for n in value]


def same_padding(lengths: Sequence[int], sizes: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> Any:
    """For each axis, the last first, what goes before and after, so that there are ceil(length / stride) results."""
    pads: list[int] = []
    for length, size, stride, apart in reversed(list(zip(lengths, sizes, strides, dilation, strict=True))):
        reach = (-(-length // stride) - 1) * stride + (size - 1) * apart + 1
        total = max(reach - length, 0)
        pads += [total // 2, total - total // 2]
    return pads


class Normalisation(nn.Module):
    """LayerNormalization, RMSNormalization and BatchNormalization, over or along the last axis."""

    def __init__(self, making: Making) -> None:
        super().__init__()
        making.only(rms_scaling=False)
        axis = making.settings.get("axis", -1)
        self.axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
        self.kind, self.refuse = making.kind, making.refuse
        self.epsilon = float(making.settings.get("epsilon", 1e-3 if making.kind != "RMSNormalization" else 1e-6))
        for leaf in ("gamma", "beta", "scale"):
            size = making.shape(leaf)[0] if making.has(leaf) else None
            self.register_parameter(leaf, None if size is None else nn.Parameter(torch.empty(size)))
            if size is not None:
                making.made(leaf, leaf)
        if making.kind == "BatchNormalization":
            for leaf in ("moving_mean", "moving_variance"):
                self.register_buffer(leaf, torch.empty(making.shape(leaf)))
                making.made(leaf, leaf)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.axis, int) or self.axis % x.ndim != x.ndim - 1:
            raise self.refuse(f"over axis {self.axis}")
        if self.kind == "BatchNormalization":
            mean: Any = self.moving_mean
            variance: Any = self.moving_variance
        elif self.kind == "RMSNormalization":
            mean, variance = 0.0, (x * x).mean(dim=-1, keepdim=True)
        else:
            mean = x.mean(dim=-1, keepdim=True)
            variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + self.epsilon)
        scale: Any = self.gamma if self.gamma is not None else self.scale
        shift: Any = self.beta
        x = x if scale is None else x * scale
        return x if shift is None else x + shift


class Attention(nn.Module):
    """MultiHeadAttention: kernels [in, heads, size] and, of the output, [heads, size, out]."""

    def __init__(self, making: Making) -> None:
        super().__init__()
        making.only(flash_attention=None, sliding_window=None, use_gate=False)
        if making.settings.get("attention_axes") not in (None, [1], 1):
            raise making.refuse(f"over axes {making.settings['attention_axes']}")
        self.heads = making.shape("query.kernel")[1]
        for leaf in ("query", "key", "value"):
            width, heads, size = making.shape(f"{leaf}.kernel")
            bias = making.has(f"{leaf}.bias")
            self.add_module(leaf, nn.Linear(width, heads * size, bias=bias))
            making.made(f"{leaf}.weight", f"{leaf}.kernel", _rows_by_head)
            if bias:
                making.made(f"{leaf}.bias", f"{leaf}.bias", lambda given: given.reshape(-1))
        heads, size, *out = making.shape("attention_output.kernel")
        if len(out) != 1:
            raise making.refuse(f"with an output of {len(out)} axes")
        bias = making.has("attention_output.bias")
        self.attention_output = nn.Linear(heads * size, out[0], bias=bias)
        making.made("attention_output.weight", "attention_output.kernel", _columns_by_head)
        if bias:
            making.made("attention_output.bias", "attention_output.bias")

    def forward(self, query: torch.Tensor, value: torch.Tensor, key: Any = None, **named: Any) -> torch.Tensor:
        given = {"query": query, "key": value if key is None else key, "value": value}
        q, k, v = (self.get_submodule(leaf)(x) for leaf, x in given.items())
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if named.get("use_causal_mask"):
            below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~below, float("-inf"))
        mixed = functional.softmax(scores, dim=-1) @ v
        out: torch.Tensor = self.attention_output(mixed.transpose(1, 2).flatten(2))
        return out


def _rows_by_head(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(1, 2, 0).reshape(-1, kernel.shape[0])


def _columns_by_head(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(2, 0, 1).reshape(kernel.shape[2], -1)
