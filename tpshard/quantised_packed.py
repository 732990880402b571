"""Formats that pack several numbers into a word or byte along the inputs: compressed-tensors, modelopt, GPT-OSS.

A reader gets a layer's tensors and gives its weights, none where the layer is not of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpshard.companions import Axis, Part
from tpshard.errors import printable
from tpshard.layout import Shape
from tpshard.quantised_layer import FLOATS, WORD, Forms, Layer, RefusedError, is_indexed, words_of


def packed_integers(layer: Layer) -> Forms:
    """``weight_packed [out, in/8]`` in int32, ``weight_scale [out, in/g]``, ``weight_zero_point [out/8, in/g]``,
    ``weight_g_idx [in]``, ``weight_shape``: the weight's own shape."""
    if "weight_packed" not in layer.tensors or layer.get("weight_packed").dtype == "U8":
        return []
    layer.need_dtype("weight_packed", "I32")
    out, words = layer.two_axes("weight_packed")
    shape = layer.numbers(layer.get("weight_shape"))
    if len(shape) != 2 or shape[0] != out or shape[1] < 1:
        raise RefusedError(f"{printable(layer.path)}.weight_shape says {shape}, weight_packed has {out} rows")
    size = shape[1]
    groups = layer.config_groups()
    fits = [args for args in groups if -(-size * _bits(args) // WORD) == words]
    if not fits:
        raise RefusedError(f"{printable(layer.path)}: {words} words for {size} numbers are of no config_group's bits")
    bits = _bits(fits[0])
    if bits not in (2, 4, 8):
        raise RefusedError(f"numbers of {bits} bits lie across the edges of words: only 2, 4 and 8 bits are cut")
    per = WORD // bits
    scale = layer.get("weight_scale").shape
    group = _group_of(layer, scale, out, size, fits)
    indexed = "weight_g_idx" in layer.tensors and is_indexed(layer, "weight_g_idx", size, group or size, False)
    along = Axis(1, group, indexed) if group else None
    rows = Axis(0) if scale[:1] == (out,) else None
    zero = layer.tensors.get("weight_zero_point")
    return layer.form(
        (out, size),
        layer.companion(
            "weight_packed", "numbers", (Axis(0), Axis(1, per)), (out, words), **words_of(1, bits, signed=True)
        ),
        layer.companion("weight_scale", "scale", (rows, along)[: len(scale)], scale),
        layer.companion(
            "weight_zero_point",
            "zero",
            (Axis(0, per), along),
            (-(-out // per), scale[-1]),
            **words_of(0, bits, signed=True),
        )
        if zero
        else None,
        layer.companion("weight_g_idx", "group" if indexed else "note", (Axis(1),), (size,))
        if "weight_g_idx" in layer.tensors
        else None,
        layer.companion("weight_shape", "note", (None,), (2,)),
    )


def _bits(args: Mapping[str, Any]) -> int:
    bits = args.get("num_bits")
    return bits if isinstance(bits, int) else 0


def _group_of(layer: Layer, scale: Shape, out: int, size: int, fits: list[Mapping[str, Any]]) -> int:
    """The group's size along the inputs; 0 where there is one scale for a row, or one alone."""
    if scale in ((), (1,), (1, 1), (out,), (out, 1)):
        return 0
    sizes = {args.get("group_size") for args in fits}
    for group in sizes:
        if isinstance(group, int) and group > 0 and scale == (out, -(-size // group)):
            return group
    known = ", ".join(sorted(map(str, sizes)))
    raise RefusedError(f"{printable(layer.path)}.weight_scale is {list(scale)}, which is not of group_size {known}")


def packed_fp4(layer: Layer) -> Forms:
    """``weight_packed [out, in/2]`` in bytes; ``weight_scale [out, in/16]`` in FP8 with ``weight_global_scale`` (NVFP4,
    by which is divided), or ``[out, in/32]`` powers of two (MXFP4)."""
    if "weight_packed" not in layer.tensors or layer.get("weight_packed").dtype != "U8":
        return []
    out, half = layer.two_axes("weight_packed")
    powers = layer.get("weight_scale").dtype in ("U8", "F8_E8M0")
    group = 32 if powers else 16
    if not powers:
        layer.need_dtype("weight_scale", *FLOATS)
        layer.get("weight_global_scale")
    for args in layer.config_groups():
        if args.get("group_size") not in (None, group) and len(layer.config_groups()) == 1:
            raise RefusedError(f"FP4 in groups of {args.get('group_size')}: only NVFP4 (16) and MXFP4 (32) are cut")
    return _nibbles(layer, "weight_packed", out, half, group, "weight_global_scale", "divisor")


def nvfp4(layer: Layer) -> Forms:
    """modelopt: ``weight [out, in/2]`` in bytes, ``weight_scale [out, in/16]`` in FP8, ``weight_scale_2``, by which is
    multiplied. Scales are stored row by row, not swizzled."""
    if "weight_scale_2" not in layer.tensors:
        return []
    layer.need_dtype("weight", "U8")
    layer.need_dtype("weight_scale", *FLOATS)
    if "pre_quant_scale" in layer.tensors:
        raise RefusedError(f"{printable(layer.path)}.pre_quant_scale: weights with scaled inputs are not cut")
    out, half = layer.two_axes("weight")
    group = layer.whole_number("group_size", default=16)
    return _nibbles(layer, "weight", out, half, group, "weight_scale_2", "multiplier")


def _nibbles(layer: Layer, leaf: str, out: int, half: int, group: int, second: str, part: Part) -> Forms:
    size = half * 2
    if size % group:
        raise RefusedError(f"{printable(layer.path)}: groups of {group} do not divide {size} inputs")
    one = layer.tensors.get(second)
    if one is not None and one.shape not in ((), (1,)):
        raise RefusedError(f"{printable(one.name)} is {list(one.shape)}, must be a single number")
    packed = {"packing": "nibbles", "packed": 1, "bits": 4}
    return layer.form(
        (out, size),
        layer.companion(leaf, "numbers", (Axis(0), Axis(1, 2)), (out, half), **packed),
        layer.companion("weight_scale", "scale", (Axis(0), Axis(1, group)), (out, size // group)),
        layer.companion(second, part, (None,) * len(one.shape), one.shape) if one is not None else None,
    )


def mxfp4(layer: Layer) -> Forms:
    """GPT-OSS: ``NAME_blocks [expert, out, in/32, 16]`` in bytes, ``NAME_scales [expert, out, in/32]``, powers of two.
    The weight itself, as the model has it, is [expert, in, out]."""
    found = []
    for leaf, stored in layer.tensors.items():
        name = leaf.removesuffix("_blocks")
        if name == leaf:
            continue
        if stored.dtype != "U8" or len(stored.shape) != 4 or stored.shape[3] != 16:
            raise RefusedError(
                f"{printable(stored.name)} is {stored.dtype} {list(stored.shape)}, must be U8 [.., .., .., 16]"
            )
        layer.need_dtype(f"{name}_scales", "U8", "F8_E8M0")
        experts, out, groups, _ = stored.shape
        axes = (Axis(0), Axis(2), Axis(1, 32))
        packed = {"packing": "nibbles", "packed": 2, "bits": 4}
        found += layer.form(
            (experts, groups * 32, out),
            layer.companion(leaf, "numbers", (*axes, None), stored.shape, **packed),
            layer.companion(f"{name}_scales", "scale", axes, stored.shape[:3]),
            leaf=name,
        )
    return found
