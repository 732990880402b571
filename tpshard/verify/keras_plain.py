"""Keras' layers without parameters, as functions of what they are given; channels and features are last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch.nn import functional

from tpshard.verify.keras_layers import Making, axis_numbers, same_padding

Plain = Callable[..., Any]
IDENTITY = frozenset({
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise", "GaussianDropout",
    "AlphaDropout", "ActivityRegularization", "Identity",
})  # fmt: skip


def _activation(making: Making) -> Plain:
    return making.activation()


def _relu(making: Making) -> Plain:
    making.only(max_value=None, threshold=0.0)
    slope = _number(making.settings.get("negative_slope", making.settings.get("alpha", 0.0)))
    return lambda x: functional.leaky_relu(x, slope)


def _leaky(making: Making) -> Plain:
    slope = _number(making.settings.get("negative_slope", making.settings.get("alpha", 0.3)))
    return lambda x: functional.leaky_relu(x, slope)


def _elu(making: Making) -> Plain:
    return lambda x: functional.elu(x, _number(making.settings.get("alpha", 1.0)))


def _number(value: Any) -> float:
    """Keras 2 wrote some numbers as tables."""
    return float(value["value"] if isinstance(value, Mapping) else value or 0.0)


def _softmax(making: Making) -> Plain:
    making.only(axis=-1)
    return lambda x: functional.softmax(x, dim=-1)


def _flatten(making: Making) -> Plain:
    making.only(data_format="channels_last")
    return lambda x: x.reshape(x.shape[0], -1)


def _reshape(making: Making) -> Plain:
    return lambda x: x.reshape(x.shape[0], *making.settings["target_shape"])


def _permute(making: Making) -> Plain:
    return lambda x: x.permute(0, *making.settings["dims"])


def _repeat(making: Making) -> Plain:
    return lambda x: x.unsqueeze(1).repeat(1, making.settings["n"], 1)


def _rescaling(making: Making) -> Plain:
    scale, offset = making.settings.get("scale", 1.0), making.settings.get("offset", 0.0)
    if not all(isinstance(value, int | float) for value in (scale, offset)):
        raise making.refuse("of each channel")
    return lambda x: x * scale + offset


def _concatenate(making: Making) -> Plain:
    axis = making.settings.get("axis", -1)
    return lambda *inputs: torch.cat(_listed(inputs), dim=axis)


def _merged(function: Callable[[Any, Any], Any]) -> Callable[[Making], Plain]:
    return lambda making: lambda *inputs: reduce(function, _listed(inputs))


def _average(making: Making) -> Plain:
    return lambda *inputs: sum(_listed(inputs)) / len(_listed(inputs))


def _listed(inputs: Any) -> list[torch.Tensor]:
    return list(inputs[0]) if len(inputs) == 1 else list(inputs)


def _global(largest: bool) -> Callable[[Making], Plain]:
    def make(making: Making) -> Plain:
        making.only(data_format="channels_last")
        keep = bool(making.settings.get("keepdims"))

        def pool(x: torch.Tensor) -> torch.Tensor:
            axes = tuple(range(1, x.ndim - 1))
            return x.amax(dim=axes, keepdim=keep) if largest else x.mean(dim=axes, keepdim=keep)

        return pool

    return make


def _pooling(axes: int, largest: bool) -> Callable[[Making], Plain]:
    def make(making: Making) -> Plain:
        making.only(data_format="channels_last")
        sizes = axis_numbers(making.settings["pool_size"], axes)
        strides = axis_numbers(making.settings.get("strides") or sizes, axes)
        same = making.settings.get("padding", "valid") == "same"
        if same and not largest:
            raise making.refuse("with padding=same")
        names = ("max_pool1d", "max_pool2d") if largest else ("avg_pool1d", "avg_pool2d")
        function = getattr(functional, names[axes - 1])

        def pool(x: torch.Tensor) -> torch.Tensor:
            x = x.movedim(-1, 1)
            if same:
                pads = same_padding(x.shape[2:], sizes, strides, [1] * axes)
                x = functional.pad(x, pads, value=float("-inf"))
            out: torch.Tensor = function(x, tuple(sizes), tuple(strides)).movedim(1, -1)
            return out

        return pool

    return make


PLAIN: Mapping[str, Callable[[Making], Plain]] = {
    **dict.fromkeys(IDENTITY, lambda making: lambda x: x),
    "Activation": _activation,
    "ReLU": _relu,
    "LeakyReLU": _leaky,
    "ELU": _elu,
    "Softmax": _softmax,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    "RepeatVector": _repeat,
    "Rescaling": _rescaling,
    "Concatenate": _concatenate,
    "Add": _merged(lambda a, b: a + b),
    "Subtract": _merged(lambda a, b: a - b),
    "Multiply": _merged(lambda a, b: a * b),
    "Maximum": _merged(torch.maximum),
    "Minimum": _merged(torch.minimum),
    "Average": _average,
    "GlobalMaxPooling1D": _global(True),
    "GlobalMaxPooling2D": _global(True),
    "GlobalAveragePooling1D": _global(False),
    "GlobalAveragePooling2D": _global(False),
    "MaxPooling1D": _pooling(1, True),
    "MaxPooling2D": _pooling(2, True),
    "AveragePooling1D": _pooling(1, False),
    "AveragePooling2D": _pooling(2, False),
}
