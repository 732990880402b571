"""Tiny quantised models in the formats' own layouts on disk, and a slow reading of each that knows nothing of tpshard.

``pack`` makes a layer's tensors of a weight [out, in]; ``unpack`` gives the weight again, number by number, in float64,
as the format's documentation or its library's code says it. ``unpack`` of a rank's own tensors is what an engine would
make of them that was handed this rank's files and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests import tiny_models

Tensors = dict[str, torch.Tensor]
SIZES = {
    "hidden_size": 96, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160,
    "num_hidden_layers": 2, "vocab_size": 211,
}  # fmt: skip
GROUP, HIGH, WIDE = 16, 16, 32  # a group; a block's rows and columns
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that stands at each place of a word


@dataclass(frozen=True)
class Format:
    """``config``: the quantization_config; ``multiples``: of what boundaries are, along [out, in]; ``together``: how
    many channels go together; ``file``: where the settings stand, if not in config.json."""

    config: Mapping[str, Any]
    pack: Callable[[torch.Tensor, torch.Generator], Tensors]
    unpack: Callable[[Tensors], np.ndarray]
    together: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    file: str = ""


def _codes(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=generator)


def _scales(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return 0.005 + torch.rand(shape, generator=generator) * 0.02


def words(codes: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Whole numbers packed into words of 32 bits, the first in the lowest bits; the last word may be part empty."""
    per = 32 // bits
    lines = codes.movedim(axis, -1).long()
    lines = torch.nn.functional.pad(lines, (0, -lines.shape[-1] % per)).unflatten(-1, (-1, per))
    if order:
        lines = lines[..., list(order)]
    packed = sum(lines[..., place] << place * bits for place in range(per))
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return packed.to(torch.int32).movedim(-1, axis).contiguous()


def one_of(word: int, place: int, bits: int) -> int:
    """The number at one place of a word."""
    return (word % 2**32) // 2 ** (place * bits) % 2**bits


def each(out: int, size: int, number: Callable[[int, int], float]) -> np.ndarray:
    return np.array([[number(o, i) for i in range(size)] for o in range(out)]).reshape(out, size)


# ---------------------------------------------------------------------------------------------- unpacked numbers


def _float8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def _fp8_blocks(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    out, size = weight.shape
    scale = _scales((-(-out // HIGH), -(-size // WIDE)), generator)
    spread = scale.repeat_interleave(HIGH, 0)[:out].repeat_interleave(WIDE, 1)[:, :size]
    return {"weight": _float8(weight, spread), "weight_scale_inv": scale}


def _from_blocks(tensors: Tensors) -> np.ndarray:
    weight, scale = tensors["weight"].double().numpy(), tensors["weight_scale_inv"].double().numpy()
    return each(*weight.shape, lambda o, i: weight[o, i] * scale[o // HIGH, i // WIDE])


def _powers(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    tensors = _fp8_blocks(weight, generator)
    exponents = torch.randint(118, 123, tensors["weight_scale_inv"].shape, generator=generator)
    return tensors | {"weight_scale_inv": exponents.to(torch.uint8).view(torch.float8_e8m0fnu)}


def _from_powers(tensors: Tensors) -> np.ndarray:
    exponents = tensors["weight_scale_inv"].view(torch.uint8).double()
    return _from_blocks(tensors | {"weight_scale_inv": 2 ** (exponents - 127)})


def _fp8_rows(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    scale = _scales((weight.shape[0], 1), generator)
    return {"weight": _float8(weight, scale), "weight_scale": scale}


def _from_rows(tensors: Tensors) -> np.ndarray:
    weight, scale = tensors["weight"].double().numpy(), tensors["weight_scale"].double().numpy()
    return each(*weight.shape, lambda o, i: weight[o, i] * scale[o, 0])


def _fp8_whole(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    scale, other = _scales((), generator), _scales((), generator)
    return {"weight": _float8(weight, scale), "weight_scale": scale, "input_scale": other}


def _from_whole(tensors: Tensors) -> np.ndarray:
    weight, scale = tensors["weight"].double().numpy(), float(tensors["weight_scale"])
    return each(*weight.shape, lambda o, i: weight[o, i] * scale)


def _int8_rows(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    scale = _scales((weight.shape[0], 1), generator)
    codes = _codes(tuple(weight.shape), 8, generator) - 128
    return {"weight": codes.to(torch.int8), "weight_scale": scale.bfloat16()}


def _scb(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    largest = weight.abs().amax(dim=1)
    codes = (weight * (127 / largest[:, None])).round().to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}


def _from_scb(tensors: Tensors) -> np.ndarray:
    weight, largest = tensors["weight"].double().numpy(), tensors["SCB"].double().numpy()
    return each(*weight.shape, lambda o, i: weight[o, i] * largest[o] / 127)


def _mxfp8(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    exponents = torch.randint(118, 123, (weight.shape[0], weight.shape[1] // 32), generator=generator)
    spread = (exponents.float() - 127).exp2().repeat_interleave(32, 1)
    return {"weight": _float8(weight, spread), "weight_scale": exponents.to(torch.uint8)}


def _from_mxfp8(tensors: Tensors) -> np.ndarray:
    weight, exponent = tensors["weight"].double().numpy(), tensors["weight_scale"].double().numpy()
    return each(*weight.shape, lambda o, i: weight[o, i] * 2.0 ** (exponent[o, i // 32] - 127))


# ---------------------------------------------------------------------------------------------- packed numbers


def _gptq(bits: int, order: bool, sized: int = GROUP) -> Callable[[torch.Tensor, torch.Generator], Tensors]:
    def pack(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
        out, size = weight.shape
        group = sized if sized > 0 else size
        groups = -(-size // group)
        index = torch.arange(size) // group
        if order:
            index = index[torch.randperm(size, generator=generator)]
        return {
            "qweight": words(_codes((size, out), bits, generator), bits, 0),
            "qzeros": words(_codes((groups, out), bits, generator), bits, 1),
            "scales": _scales((groups, out), generator).half(),
            "g_idx": index.to(torch.int32),
        }

    return pack


def _from_gptq(bits: int, plus: int = 1, order: bool = False, sized: int = GROUP) -> Callable[[Tensors], np.ndarray]:
    per = 32 // bits

    def unpack(tensors: Tensors) -> np.ndarray:
        words_, zeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
        scales, index = tensors["scales"].double().numpy(), tensors["g_idx"].numpy()
        size, out = words_.shape[0] * per, words_.shape[1]
        group = sized if sized > 0 else size

        def number(o: int, i: int) -> float:
            g = int(index[i]) if order else i // group
            zero = (one_of(int(zeros[g, o // per]), o % per, bits) + plus) % 2**bits
            return float(scales[g, o] * (one_of(int(words_[i // per, o]), i % per, bits) - zero))

        return each(out, size, number)

    return unpack


def _awq(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    out, size = weight.shape
    return {
        "qweight": words(_codes((size, out), 4, generator), 4, 1, AWQ),
        "qzeros": words(_codes((size // GROUP, out), 4, generator), 4, 1, AWQ),
        "scales": _scales((size // GROUP, out), generator).half(),
    }


def _from_awq(tensors: Tensors) -> np.ndarray:
    words_, zeros, scales = (tensors[leaf].numpy() for leaf in ("qweight", "qzeros", "scales"))

    def number(o: int, i: int) -> float:
        place, g = AWQ.index(o % 8), i // GROUP
        code = one_of(int(words_[i, o // 8]), place, 4) - one_of(int(zeros[g, o // 8]), place, 4)
        return float(scales[g, o].astype(np.float64) * code)

    return each(words_.shape[1] * 8, words_.shape[0], number)


def _integers(bits: int, zeros: bool, grouped: bool, order: bool = False) -> Callable[..., Tensors]:
    def pack(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
        out, size = weight.shape
        groups = size // GROUP if grouped else 1
        found = {
            "weight_packed": words(_codes((out, size), bits, generator), bits, 1),
            "weight_scale": _scales((out, groups), generator).bfloat16(),
            "weight_shape": torch.tensor([out, size]),
        }
        if zeros:
            found["weight_zero_point"] = words(_codes((out, groups), bits, generator), bits, 0)
        if order:
            index = (torch.arange(size) // GROUP)[torch.randperm(size, generator=generator)]
            found["weight_g_idx"] = index.to(torch.int32)
        return found

    return pack


def _from_integers(bits: int, grouped: bool) -> Callable[[Tensors], np.ndarray]:
    per, half = 32 // bits, 2 ** (bits - 1)

    def unpack(tensors: Tensors) -> np.ndarray:
        words_, scales = tensors["weight_packed"].numpy(), tensors["weight_scale"].double().numpy()
        zeros = tensors["weight_zero_point"].numpy() if "weight_zero_point" in tensors else None
        index = tensors.get("weight_g_idx")

        def number(o: int, i: int) -> float:
            g = (int(index[i]) if index is not None else i // GROUP) if grouped else 0
            code = one_of(int(words_[o, i // per]), i % per, bits) - half
            zero = one_of(int(zeros[o // per, g]), o % per, bits) - half if zeros is not None else 0
            return float((code - zero) * scales[o, g])

        return each(words_.shape[0], words_.shape[1] * per, number)

    return unpack


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pairs along the last axis, the first in the low half of the byte."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).contiguous()


def fp4(code: int) -> float:
    return -FP4[code - 8] if code >= 8 else FP4[code]


def _nvfp4(leaf: str, second: str, value: float) -> Callable[[torch.Tensor, torch.Generator], Tensors]:
    def pack(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
        out, size = weight.shape
        return {
            leaf: nibbles(_codes((out, size), 4, generator)),
            "weight_scale": (1 + torch.rand(out, size // 16, generator=generator) * 5).to(torch.float8_e4m3fn),
            second: torch.full((1,) if second == "weight_global_scale" else (), value),
            "input_global_scale" if second == "weight_global_scale" else "input_scale": torch.full((1,), 3.5),
        }

    return pack


def _from_nvfp4(leaf: str, second: str, divides: bool) -> Callable[[Tensors], np.ndarray]:
    def unpack(tensors: Tensors) -> np.ndarray:
        packed, scales = tensors[leaf].numpy(), tensors["weight_scale"].double().numpy()
        one = float(tensors[second])

        def number(o: int, i: int) -> float:
            value = fp4(int(packed[o, i // 2]) // 16 if i % 2 else int(packed[o, i // 2]) % 16) * scales[o, i // 16]
            return value / one if divides else value * one

        return each(packed.shape[0], packed.shape[1] * 2, number)

    return unpack


def _mxfp4(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    out, size = weight.shape
    exponents = torch.randint(118, 123, (out, size // 32), generator=generator)
    return {"weight_packed": nibbles(_codes((out, size), 4, generator)), "weight_scale": exponents.to(torch.uint8)}


def _from_mxfp4(tensors: Tensors) -> np.ndarray:
    packed, exponents = tensors["weight_packed"].numpy(), tensors["weight_scale"].double().numpy()

    def number(o: int, i: int) -> float:
        code = int(packed[o, i // 2]) // 16 if i % 2 else int(packed[o, i // 2]) % 16
        return float(fp4(code) * 2.0 ** (exponents[o, i // 32] - 127))

    return each(packed.shape[0], packed.shape[1] * 2, number)


def _compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"weights": {"symmetric": True, "dynamic": False, **weights}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
FORMATS: dict[str, Format] = {
    "fp8 blocks": Format(
        {"quant_method": "fp8", "weight_block_size": [HIGH, WIDE], "activation_scheme": "dynamic"},
        _fp8_blocks, _from_blocks, 32,
    ),
    "fp8 blocks, the last partial": Format(
        {"quant_method": "fp8", "weight_block_size": [HIGH, WIDE], "activation_scheme": "dynamic"},
        _fp8_blocks, _from_blocks, 32, {"intermediate_size": 150, "hidden_size": 92},
    ),
    "fp8 blocks, powers of two": Format(
        {"quant_method": "fp8", "weight_block_size": [HIGH, WIDE], "scale_fmt": "ue8m0"}, _powers, _from_powers, 32
    ),
    "fp8 whole": Format({"quant_method": "fp8", "activation_scheme": "static"}, _fp8_whole, _from_whole, 1),
    "fbgemm fp8": Format({"quant_method": "fbgemm_fp8"}, _fp8_rows, _from_rows, 1),
    "compressed fp8": Format(
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"), _fp8_rows, _from_rows, 1
    ),
    "compressed int8": Format(
        _compressed("int-quantized", num_bits=8, type="int", strategy="channel"), _int8_rows, _from_rows, 1
    ),
    "compressed mxfp8": Format(
        _compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32),
        _mxfp8, _from_mxfp8, 32,
    ),
    "compressed int4": Format(
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
        _integers(4, False, True), _from_integers(4, True), 16,
    ),
    "compressed int4, zero points": Format(
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False),
        _integers(4, True, True), _from_integers(4, True), 16,
    ),
    "compressed int4, act-order": Format(
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, actorder="group"),
        _integers(4, False, True, True), _from_integers(4, True), 8,
    ),
    "compressed int8, packed": Format(
        _compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
        _integers(8, False, False), _from_integers(8, False), 4,
    ),
    "compressed nvfp4": Format(
        _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        _nvfp4("weight_packed", "weight_global_scale", 131.0),
        _from_nvfp4("weight_packed", "weight_global_scale", True), 16,
    ),
    "compressed mxfp4": Format(
        _compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        _mxfp4, _from_mxfp4, 32,
    ),
    "modelopt nvfp4": Format(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        _nvfp4("weight", "weight_scale_2", 0.0123), _from_nvfp4("weight", "weight_scale_2", False), 16,
    ),
    "gptq": Format(_GPTQ, _gptq(4, False), _from_gptq(4), 16),
    "gptq v2, 8 bits": Format(
        _GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, _gptq(8, False), _from_gptq(8, plus=0), 16
    ),
    "gptq 2 bits": Format(_GPTQ | {"bits": 2}, _gptq(2, False), _from_gptq(2), 16),
    "gptq, act-order": Format(_GPTQ | {"desc_act": True}, _gptq(4, True), _from_gptq(4, order=True), 8),
    "gptq, one group": Format(
        _GPTQ | {"group_size": -1}, _gptq(4, False, -1), _from_gptq(4, sized=-1), 8
    ),
    "gptq, settings beside": Format(
        {"bits": 4, "group_size": GROUP, "desc_act": False}, _gptq(4, False), _from_gptq(4), 16,
        file="quantize_config.json",
    ),
    "awq": Format(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
        _awq, _from_awq, 16,
    ),
    "bitsandbytes int8": Format(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, _scb, _from_scb, 1
    ),
}  # fmt: skip


def save(name: str, folder: Path, **changes: Any) -> None:
    """A tiny llama with all weights of its blocks in a format; embedding, head and norms stay as they are."""
    tiny_models.save_model("llama", folder, **(SIZES | dict(FORMATS[name].sizes) | changes))
    quantise(name, folder)


def quantise(name: str, folder: Path) -> None:
    """A dense checkpoint's projections and experts, in place."""
    form = FORMATS[name]
    generator = torch.Generator().manual_seed(7)
    tensors: Tensors = {}
    for key, value in load_file(folder / "model.safetensors").items():
        if re.search(r"(proj|experts\.\d+\.w\d)\.weight$", key):
            packed = form.pack(value.float(), generator)
            tensors |= {f"{key.removesuffix('weight')}{leaf}": tensor for leaf, tensor in packed.items()}
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / (form.file or "config.json")
    config = json.loads((folder / "config.json").read_text())
    path.write_text(json.dumps(dict(form.config) if form.file else config | {"quantization_config": form.config}))


def layers_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
    """The tensors of each layer by the last part of their names."""
    found: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        found.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
    return found
