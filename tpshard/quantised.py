"""Recognising quantised checkpoints: which stored tensors make up which weight.

The settings (block and group sizes, bits) come from config.json, never from a guess by shapes; names, shapes and
dtypes must agree with them. What is not understood is refused with what was found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.companions import Form, Quantised, Weight
from tpshard.errors import InputError, printable
from tpshard.quantised_formats import READERS
from tpshard.quantised_layer import COMPANIONS, NOTES, SCALARS, Forms, Layer, RefusedError
from tpshard.sources import SourceFiles
from tpshard.staging import storage_errors

KINDS: Mapping[str, tuple[str, ...]] = {  # quant_method to the kinds of weights that it writes
    "fp8": ("scaled",),
    "fbgemm_fp8": ("scaled",),
    "gptq": ("gptq",),
    "awq": ("awq",),
    "auto-round": ("gptq", "awq"),
    "compressed-tensors": ("packed integers", "packed FP4", "scaled"),
    "mxfp4": ("MXFP4",),
    "modelopt": ("NVFP4", "scaled"),
    "bitsandbytes": ("int8",),
}
FILES: Mapping[str, str] = {  # where settings stood before they were in config.json
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_LOW = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "F6_E3M2")
_MAX_SETTINGS = 10**6


def read_quantised(checkpoint: Checkpoint) -> Quantised:
    """The quantised weights of a checkpoint, none if it is dense. Raises InputError where something is not known.

    Reads headers, settings, and the few numbers that decide on layouts: group indexes and recorded shapes.
    """
    method, settings = _settings(checkpoint)
    if method is None:
        for name in checkpoint.tensors:
            if _is_companion(name):
                what = f"{checkpoint.folder}: {printable(name)} belongs to a quantised weight, but nothing says how"
                raise InputError(what, hint="put its quantization_config into config.json, or dequantise it first")
        return Quantised("", {})
    _refuse_unknown(checkpoint, method, settings)
    with SourceFiles(checkpoint) as files:
        weights = {weight.name: weight for weight in _weights(checkpoint, method, settings, files)}
    taken = {name for weight in weights.values() for name in weight.stored_names}
    scalars = frozenset(
        name
        for name, stored in checkpoint.tensors.items()
        if name not in taken and _leaf(name) in SCALARS and stored.shape in ((), (1,))
    )
    layers = {name.rpartition(".")[0] for name in weights if _leaf(name) == "weight"}
    for name, stored in checkpoint.tensors.items():
        if name in taken or name in scalars:
            continue
        beside = name.rpartition(".")[0] in layers and _leaf(name) != "bias"
        if beside or _is_companion(name) or (_leaf(name) == "weight" and stored.dtype in _LOW):
            what = f"{printable(name)} ({stored.dtype} {list(stored.shape)}) is not understood"
            _refuse(checkpoint, method, what)
    if not weights:
        what = f"{checkpoint.folder}: config.json says {printable(method, 40)}, but no tensor is quantised"
        raise InputError(what, hint="take its quantization_config away, if the weights are dense")
    if checkpoint.config.get("model_type") in CONV1D:
        _refuse(checkpoint, method, "the layers of this architecture are [in, out], unlike the format's")
    return Quantised(method, weights, scalars)


def _settings(checkpoint: Checkpoint) -> tuple[str | None, Mapping[str, Any]]:
    """The method and what config.json, or an older file beside it, says of it."""
    config = checkpoint.config
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if found is not None and not isinstance(found, dict):
        _refuse(checkpoint, printable(str(found), 40), "quantization_config is not an object")
    if found:
        return str(found.get("quant_method") or _method_of(found)), found
    for name, method in FILES.items():
        path = checkpoint.folder / name
        if path.is_file() and path.stat().st_size <= _MAX_SETTINGS:
            with storage_errors(path):
                content = path.read_bytes()
            try:
                settings = json.loads(content)
            except (ValueError, RecursionError):
                raise InputError(f"{path}: is not JSON") from None
            if not isinstance(settings, dict):
                raise InputError(f"{path}: is not an object")
            inner = settings.get("quantization")
            return method, inner if isinstance(inner, dict) else settings
    return None, {}


def _method_of(settings: Mapping[str, Any]) -> str:
    """Older configs leave the method out."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return "modelopt" if "quant_algo" in settings else "unknown"


def _refuse_unknown(checkpoint: Checkpoint, method: str, settings: Mapping[str, Any]) -> None:
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        why = "4-bit weights are one line of packed numbers without axes, with scales across rows"
        _refuse(checkpoint, "bitsandbytes, 4 bits", why)
    if method not in KINDS:
        _refuse(checkpoint, method, "this method is not known")
    if method == "compressed-tensors":
        sparsity = settings.get("sparsity_config")
        kind = sparsity.get("format") if isinstance(sparsity, dict) else None
        if kind not in (None, "dense"):
            _refuse(checkpoint, method, f"sparse weights ({printable(str(kind), 40)}) are not cut")
        if settings.get("transform_config"):
            _refuse(checkpoint, method, "weights under a transform (transform_config) are not cut")


def _refuse(checkpoint: Checkpoint, method: str, why: str) -> NoReturn:
    raise InputError(f"{checkpoint.folder}: is quantised ({printable(method, 40)}): {why}", hint=_HINT)


def _weights(checkpoint: Checkpoint, method: str, settings: Mapping[str, Any], files: SourceFiles) -> Iterator[Weight]:
    """Every layer's quantised weights. Layers with equal tensors are read once, unless numbers in them decide."""
    layers: dict[str, dict[str, Stored]] = {}
    for name, stored in checkpoint.tensors.items():
        path, _, leaf = name.rpartition(".")
        layers.setdefault(path, {})[leaf] = stored
    known: dict[object, Forms] = {}
    forms: dict[Form, Form] = {}
    read: list[str] = []

    def numbers(stored: Stored) -> list[int]:
        read.append(stored.name)
        return _numbers(checkpoint, stored, files)

    for path, tensors in layers.items():
        key = tuple((leaf, stored.dtype, stored.shape) for leaf, stored in tensors.items())
        found = known.get(key)
        if found is None:
            before = len(read)
            layer = Layer(path, tensors, settings, numbers)
            try:
                found = [
                    (leaf, forms.setdefault(form, form))
                    for kind in KINDS[method]
                    for leaf, form in READERS[kind](layer)
                ]
            except RefusedError as refused:
                _refuse(checkpoint, method, str(refused))
            if len(read) == before:
                known[key] = found
        prefix = f"{path}." if path else ""
        yield from (Weight(prefix + leaf, prefix, form) for leaf, form in found)


def _numbers(checkpoint: Checkpoint, stored: Stored, files: SourceFiles) -> list[int]:
    """All numbers of a small tensor of whole numbers along one axis."""
    width = {"I32": 4, "I64": 8}.get(stored.dtype)
    if width is None or len(stored.shape) != 1:
        raise RefusedError(
            f"{printable(stored.name)} is {stored.dtype} {list(stored.shape)}, not a line of whole numbers"
        )
    whole = np.empty(stored.shape[0] * width, np.uint8)
    for rank, piece in stored.layout.tiles():
        (first,), (last,), (at,) = piece.box.start, piece.box.stop, piece.at
        files.read(stored, rank, at * width, whole[first * width : last * width])
    return [int(n) for n in whole.view(np.dtype(f"<i{width}"))]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_companion(name: str) -> bool:
    leaf = _leaf(name)
    return leaf in COMPANIONS or leaf in NOTES or leaf.endswith(("_blocks", "_scales", "_scale_inv"))


_HINT = "dequantise it first"
