"""The formats of quantised weights on disk: for each, which tensors a layer has and which axes of the weight theirs
follow. Facts from the formats' own writers (compressed-tensors, AutoGPTQ, AutoAWQ, transformers, bitsandbytes).

A reader gets a layer's tensors and gives its weights, none where the layer is not of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tpshard.checkpoint import Stored
from tpshard.companions import Axis, Part
from tpshard.errors import printable
from tpshard.quantised_layer import FLOATS, WORD, Forms, Layer, RefusedError, is_indexed, words_of
from tpshard.quantised_packed import mxfp4, nvfp4, packed_fp4, packed_integers

# ---------------------------------------------------------------------------------------------- GPTQ and AWQ: [in, out]


def gptq(layer: Layer) -> Forms:
    """``qweight [in/8, out]``, ``qzeros [in/g, out/8]``, ``scales [in/g, out]``, ``g_idx [in]``; 8 numbers of 4 bits
    to a word. The zero point is stored less one, in ``gptq_v2`` as it is."""
    if "qweight" not in layer.tensors or _says(layer, "awq"):
        return []
    bits = layer.whole_number("bits", "w_bit")
    form = str(layer.settings.get("checkpoint_format") or "gptq")
    if form not in ("gptq", "gptq_v2") or layer.settings.get("is_marlin_format"):
        raise RefusedError(f"its checkpoint_format is {printable(form, 40)}: only gptq and gptq_v2 are cut")
    if bits not in (2, 4, 8):
        raise RefusedError(f"numbers of {bits} bits lie across the edges of words: only 2, 4 and 8 bits are cut")
    layer.need_dtype("qweight", "I32")
    per = WORD // bits
    words, out = layer.two_axes("qweight")
    size = words * per
    group = layer.whole_number("group_size", default=-1)
    group = size if group < 1 else group
    groups = -(-size // group)
    indexed = groups > 1 and is_indexed(layer, "g_idx", size, group, bool(layer.settings.get("desc_act")))
    along = Axis(1, group, indexed)
    index: Part = "group" if indexed else "note"
    return layer.form(
        (out, size),
        layer.companion("qweight", "numbers", (Axis(1, per), Axis(0)), (words, out), **words_of(0, bits)),
        layer.companion("scales", "scale", (along, Axis(0)), (groups, out)),
        layer.companion(
            "qzeros",
            "zero",
            (along, Axis(0, per)),
            (groups, -(-out // per)),
            **words_of(1, bits),
            plus=int(form == "gptq"),
        ),
        layer.companion("g_idx", index, (Axis(1),), (size,)) if "g_idx" in layer.tensors else None,
    )


def awq(layer: Layer) -> Forms:
    """``qweight [in, out/8]``, ``qzeros [in/g, out/8]``, ``scales [in/g, out]``; within a word the outputs lie in the
    order 0 2 4 6 1 3 5 7."""
    if "qweight" not in layer.tensors or not _says(layer, "awq"):
        return []
    bits = layer.whole_number("bits", "w_bit", default=4)
    form = str(layer.settings.get("version") or layer.settings.get("format") or "gemm").lower()
    if bits != 4 or form not in ("gemm", "exllama", "auto_round:auto_awq"):
        raise RefusedError(f"AWQ of {bits} bits in the form {printable(form, 40)}: only 4 bits, gemm, are cut")
    layer.need_dtype("qweight", "I32")
    size, words = layer.two_axes("qweight")
    out = words * 8
    group = layer.whole_number("group_size", "q_group_size")
    group = size if group < 1 else group
    groups = -(-size // group)
    packed = {"packing": "awq", "packed": 1, "bits": 4}
    return layer.form(
        (out, size),
        layer.companion("qweight", "numbers", (Axis(1), Axis(0, 8)), (size, words), **packed),
        layer.companion("scales", "scale", (Axis(1, group), Axis(0)), (groups, out)),
        layer.companion("qzeros", "zero", (Axis(1, group), Axis(0, 8)), (groups, words), **packed)
        if layer.settings.get("zero_point", True) or "qzeros" in layer.tensors
        else None,
    )


def _says(layer: Layer, name: str) -> bool:
    """Whether the settings are AWQ's; auto-round says so in its packing."""
    said = layer.settings.get("packing_format") or layer.settings.get("quant_method")
    return name in str(said or ("awq" if "w_bit" in layer.settings else "gptq"))


# ---------------------------------------------------------------------------------------------- unpacked, with scales


def scaled(layer: Layer) -> Forms:
    """FP8 or int8 numbers in the weight's own shape, with ``weight_scale`` or ``weight_scale_inv`` (which is a scale,
    too): one alone, one for each row, for blocks ``[out/128, in/128]`` or for groups ``[out, in/32]``. Raw parameters
    (stacked experts) have it as NAME_scale_inv."""
    found = []
    for leaf, stored in layer.tensors.items():
        names = [name for name in (f"{leaf}_scale_inv", f"{leaf}_scale") if name in layer.tensors]
        if not names or stored.dtype not in ("I8", *FLOATS):
            continue
        if "weight_scale_2" in layer.tensors or "SCB" in layer.tensors:
            continue
        axes = _scale_axes(layer, stored, layer.get(names[0]))
        zero = layer.tensors.get(f"{leaf}_zero_point")
        if len(names) > 1 or (zero is not None and zero.dtype != "I8"):
            raise RefusedError(
                f"{printable(stored.name)} has {', '.join(names)} and {zero.dtype if zero else 'no'} zeros"
            )
        found += layer.form(
            stored.shape,
            layer.companion(leaf, "numbers", tuple(map(Axis, range(len(stored.shape)))), stored.shape),
            layer.companion(names[0], "scale", axes, layer.get(names[0]).shape),
            layer.companion(f"{leaf}_zero_point", "zero", axes, layer.get(names[0]).shape) if zero else None,
            leaf=leaf,
        )
    return found


def _scale_axes(layer: Layer, weight: Stored, scale: Stored) -> tuple[Axis | None, ...]:
    """Which axes of the weight a scale's follow. The last two axes are [out, in], those before are experts."""
    shape, lead = scale.shape, len(weight.shape) - 2
    if lead < 0:
        raise RefusedError(f"{printable(weight.name)} is {list(weight.shape)}, must have two axes or more")
    if scale.dtype not in ("F64", "F32", "F16", "BF16", "F8_E8M0", "U8"):
        raise RefusedError(f"{printable(scale.name)} is {scale.dtype}, which is no scale's")
    out, size = weight.shape[-2:]
    if shape in ((), (1,)):
        return (None,) * len(shape)
    stacked, rest = tuple(map(Axis, range(lead))), shape[lead:]
    if shape[:lead] == weight.shape[:lead]:
        if rest in ((), (1,), (1, 1)):
            return (*stacked, *(None,) * len(rest))
        for high, wide in _block_sizes(layer):
            if rest == (-(-out // high), -(-size // wide)):
                return (*stacked, Axis(lead, high), Axis(lead + 1, wide))
        if rest in ((out,), (out, 1)):
            return (*stacked, Axis(lead), *(None,) * (len(rest) - 1))
    known = " or ".join(f"{high}x{wide}" for high, wide in _block_sizes(layer)) or "none"
    what = f"{printable(scale.name)} is {list(shape)} for a weight of {list(weight.shape)}"
    raise RefusedError(f"{what}; the config's blocks are {known}")


def _block_sizes(layer: Layer) -> list[tuple[int, int]]:
    """Blocks [rows, columns] that the config speaks of."""
    found = [layer.settings.get("weight_block_size")]
    for args in layer.config_groups():
        found.append(args.get("block_structure"))
        if isinstance(args.get("group_size"), int) and args["group_size"] > 0:
            found.append([1, args["group_size"]])
    pairs = [tuple(block) for block in found if isinstance(block, list) and len(block) == 2]
    return [(a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int) and a > 0 and b > 0]


def int8(layer: Layer) -> Forms:
    """bitsandbytes: ``weight [out, in]`` in int8, ``SCB [out]``, each row's largest absolute value, which 127 stands
    for; ``weight_format`` 0, row by row."""
    if "SCB" not in layer.tensors:
        return []
    layer.need_dtype("weight", "I8")
    out, size = layer.two_axes("weight")
    return layer.form(
        (out, size),
        layer.companion("weight", "numbers", (Axis(0), Axis(1)), (out, size)),
        layer.companion("SCB", "scale", (Axis(0),), (out,), over=127),
    )


READERS: Mapping[str, Callable[[Layer], Forms]] = {
    "gptq": gptq,
    "awq": awq,
    "packed integers": packed_integers,
    "packed FP4": packed_fp4,
    "NVFP4": nvfp4,
    "MXFP4": mxfp4,
    "int8": int8,
    "scaled": scaled,
}
