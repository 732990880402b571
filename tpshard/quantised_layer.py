"""A layer's stored tensors, and what is asked of them by whoever reads a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.checkpoint import Stored
from tpshard.companions import Axis, Companion, Form, Part
from tpshard.errors import printable
from tpshard.layout import Shape

COMPANIONS = frozenset(
    {
        "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2",
        "weight_zero_point", "weight_g_idx", "SCB", "absmax", "quant_map", "weight_shape", "weight_global_scale",
    }
)  # fmt: skip
NOTES = frozenset(  # of a layer, not of its weight's numbers
    {
        "input_scale", "activation_scale", "input_global_scale", "input_scale_ub", "input_zero_point", "output_scale",
        "weight_format", "pre_quant_scale",
    }
)  # fmt: skip
FLOATS = ("F8_E4M3", "F8_E5M2")
WORD = 32  # bits
SCALARS = frozenset({"k_scale", "v_scale", "q_scale", "prob_scale", "output_scale", "k_zero_point", "v_zero_point"})


Forms = list[tuple[str, Form]]  # of a layer's weights, by the last part of their names


class RefusedError(Exception):
    """Why a layer cannot be understood or cut."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's tensors by the last part of their names. ``numbers`` reads a small tensor of whole numbers."""

    path: str
    tensors: Mapping[str, Stored]
    settings: Mapping[str, Any]
    numbers: Callable[[Stored], list[int]]

    def get(self, leaf: str) -> Stored:
        if leaf not in self.tensors:
            raise RefusedError(f"{printable(self.path)} has no {leaf}")
        return self.tensors[leaf]

    def whole_number(self, *keys: str, default: int | None = None) -> int:
        """A setting, by the first of its names that is there."""
        for key in keys:
            value = self.settings.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        if default is None:
            raise RefusedError(f"quantization_config has no {keys[0]}")
        return default

    def companion(self, leaf: str, part: Part, axes: tuple[Axis | None, ...], shape: Shape, **more: Any) -> Companion:
        """The tensor ``leaf``, which must have ``shape``."""
        stored = self.get(leaf)
        if stored.shape != shape:
            raise RefusedError(f"{printable(stored.name)} is {list(stored.shape)}, must be {list(shape)}")
        return Companion(leaf, stored.dtype, part, shape, axes, **more)

    def notes(self) -> tuple[Companion, ...]:
        """Scalars that say something of the layer; on every rank whole."""
        found = []
        for leaf in sorted(NOTES & set(self.tensors)):
            stored = self.tensors[leaf]
            if stored.shape not in ((), (1,)):
                raise RefusedError(f"{printable(stored.name)} is {list(stored.shape)}, must be a single number")
            found.append(Companion(leaf, stored.dtype, "note", stored.shape, (None,) * len(stored.shape)))
        return tuple(found)

    def form(self, shape: Shape, *companions: Companion | None, leaf: str = "weight") -> Forms:
        """The form of the layer's weight ``leaf``, of these tensors and the layer's notes."""
        return [(leaf, Form(shape, (*(c for c in companions if c is not None), *self.notes())))]

    def need_dtype(self, leaf: str, *dtypes: str) -> None:
        stored = self.get(leaf)
        if stored.dtype not in dtypes:
            raise RefusedError(f"{printable(stored.name)} is {stored.dtype}, must be {' or '.join(dtypes)}")

    def two_axes(self, leaf: str) -> tuple[int, int]:
        shape = self.get(leaf).shape
        if len(shape) != 2:
            raise RefusedError(f"{printable(self.get(leaf).name)} is {list(shape)}, must have two axes")
        return shape[0], shape[1]

    def config_groups(self) -> list[Mapping[str, Any]]:
        """What the config's groups say of weights, as compressed-tensors and modelopt write it."""
        groups = self.settings.get("config_groups")
        groups = groups.values() if isinstance(groups, dict) else ()
        found = [group.get("weights") for group in groups if isinstance(group, dict)]
        return [args for args in found if isinstance(args, dict)]


def words_of(axis: int, bits: int, *, signed: bool = False) -> dict[str, Any]:
    """A companion's packing along ``axis``."""
    return {"packing": "words", "packed": axis, "bits": bits, "signed": signed}


def is_indexed(layer: Layer, leaf: str, size: int, group: int, said: bool) -> bool:
    """Whether the inputs' groups are not runs: act-order says so, or the index itself."""
    if leaf not in layer.tensors:
        if said:
            raise RefusedError(f"{printable(layer.path)} has no {leaf}, which desc_act asks for")
        return False
    return said or layer.numbers(layer.get(leaf)) != [i // group for i in range(size)]
