"""LoRA adapters as PEFT writes them: what adapter_config.json says and what each tensor is to its base layer.

``W' = W + s B A``: A is ``[rank, in]``, B ``[out, rank]``, whatever way round the base layer keeps its weight. DoRA
adds a magnitude for each output, ``lora_bias`` a bias. Other tensors (biases, ``modules_to_save``) take the place of
the base's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tpshard.errors import InputError, printable
from tpshard.layout import Shape

Value = TypeVar("Value")

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
# What changes which tensors there are, or what they mean; each would have to be followed by its own rules.
_NOT_CUT = (
    "target_parameters", "trainable_token_indices", "layer_replication", "megatron_config", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "velora_config",
)  # fmt: skip
_LEAVES = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "bias", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora_embedding_A": "a", "lora_embedding_B": "b",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The keys of adapter_config.json that count. The patterns' keys are regular expressions for the tail of a
    layer's path; the first that matches decides."""

    rank: int
    alpha: float
    root: bool = False
    dora: bool = False
    fan_in_fan_out: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, layer: str) -> int:
        return _by_pattern(self.ranks, layer, self.rank)

    def scaling_of(self, layer: str) -> float:
        """The factor s.

        >>> LoraConfig(4, 16, root=True).scaling_of("q_proj")
        8.0
        """
        rank = self.rank_of(layer)
        return _by_pattern(self.alphas, layer, self.alpha) / (math.sqrt(rank) if self.root else rank)


@dataclass(frozen=True, slots=True)
class Target:
    """An adapted layer: its path in the base model, and the names of its tensors. ``magnitude`` and ``bias`` are
    empty where it has none. ``kernel``: the axes that a convolution's weight has after out and in."""

    layer: str
    a: str
    b: str
    magnitude: str
    bias: str
    out_size: int
    in_size: int
    kernel: Shape
    embedding: bool
    scaling: float

    @property
    def weight(self) -> str:
        return f"{self.layer}.weight"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's layers, and by the base's names the tensors that take the place of the base's."""

    config: LoraConfig
    targets: tuple[Target, ...]
    replaced: Mapping[str, str]


def parse_adapter(data: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Adapter:
    """What the tensors of an adapter are. Raises InputError where it is no LoRA adapter, or its tensors do not fit
    one another or the config."""
    config = parse_config(data)
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in shapes:
        layer, kind = _part(name)
        known = replaced if kind == "whole" else parts.setdefault(layer, {})
        key = layer if kind == "whole" else kind
        if key in known:
            raise InputError(f"{printable(known[key])} and {printable(name)} are both the same part of {layer}")
        known[key] = name
    if not parts:
        raise InputError("holds no tensors of LoRA: none is called lora_A, lora_B")
    return Adapter(config, tuple(_target(layer, own, shapes, config) for layer, own in parts.items()), replaced)


def parse_config(data: Mapping[str, Any]) -> LoraConfig:
    """Raises InputError where the adapter is of another kind, or LoRA of a kind that is not cut."""
    kind = data.get("peft_type")
    if kind != "LORA":
        raise InputError(f"peft_type is {printable(str(kind), 40)}, only LORA is cut", hint="merge it into its base")
    for key in _NOT_CUT:
        if data.get(key):
            what = f"{key} is set: such adapters are not cut"
            raise InputError(what, hint="merge it into its base, and split that")
    return LoraConfig(
        rank=_whole(data.get("r"), "r"),
        alpha=_number(data.get("lora_alpha"), "lora_alpha"),
        root=_flag(data, "use_rslora"),
        dora=_flag(data, "use_dora"),
        fan_in_fan_out=_flag(data, "fan_in_fan_out"),
        ranks={key: _whole(value, "rank_pattern") for key, value in _table(data, "rank_pattern").items()},
        alphas={key: _number(value, "alpha_pattern") for key, value in _table(data, "alpha_pattern").items()},
    )


def _part(name: str) -> tuple[str, str]:
    """A tensor's layer and part; of a tensor that takes the place of the base's, that one's name and ``whole``."""
    if not name.startswith(PREFIX):
        raise InputError(f"{printable(name)}: does not begin with {PREFIX}", hint="is it PEFT's own file?")
    path = name.removeprefix(PREFIX)
    for leaf, kind in _LEAVES.items():
        if path.endswith("." + leaf):
            return path.removesuffix("." + leaf), kind
    if re.search(r"\.lora_", path):
        raise InputError(f"{printable(name)}: is no part of LoRA that is known here")
    segments = [part for part in path.split(".") if part not in ("base_layer", "modules_to_save")]
    return ".".join(segments), "whole"


def _target(layer: str, own: Mapping[str, str], shapes: Mapping[str, Shape], config: LoraConfig) -> Target:
    where = printable(layer)
    for kind in ("a", "b"):
        if kind not in own:
            raise InputError(f"{where}: lora_{kind.upper()} is missing", hint="is the adapter complete?")
    if config.dora != ("magnitude" in own):
        there = "a" if "magnitude" in own else "no"
        raise InputError(f"{where}: has {there} lora_magnitude_vector, use_dora is {config.dora}")
    a, b, rank = shapes[own["a"]], shapes[own["b"]], config.rank_of(layer)
    if len(a) < 2 or len(b) != len(a) or set(b[2:]) - {1}:
        raise InputError(f"{where}: A is {list(a)} and B {list(b)}, want [rank, in] and [out, rank]")
    if a[0] != rank or b[1] != rank:
        what = f"{where}: A is {list(a)} and B {list(b)}, {CONFIG_NAME} says rank {rank}"
        raise InputError(what, hint="do the folder's files belong together?")
    for kind in ("magnitude", "bias"):
        if kind in own and math.prod(shapes[own[kind]]) != b[0]:
            raise InputError(f"{printable(own[kind])}: is {list(shapes[own[kind]])}, B has {b[0]} outputs")
    return Target(
        layer=layer,
        a=own["a"],
        b=own["b"],
        magnitude=own.get("magnitude", ""),
        bias=own.get("bias", ""),
        out_size=b[0],
        in_size=a[1],
        kernel=a[2:],
        embedding="lora_embedding" in own["a"],
        scaling=config.scaling_of(layer),
    )


def _by_pattern(table: Mapping[str, Value], layer: str, otherwise: Value) -> Value:
    return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", layer)), otherwise)


def _table(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = data.get(key) or {}
    if not isinstance(table, dict):
        raise InputError(f"{key} is {printable(repr(table), 40)}, not an object")
    for pattern in table:
        try:
            re.compile(pattern)
        except re.error:
            raise InputError(f"{key}: '{printable(pattern, 80)}' is no regular expression") from None
    return table


def _flag(data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key) or False
    if not isinstance(value, bool):
        raise InputError(f"{key} is {printable(repr(value), 40)}, not true or false")
    return value


def _whole(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{key} is {printable(repr(value), 40)}, not a whole number from 1")
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{key} is {printable(repr(value), 40)}, not a number")
    return float(value)
