"""The table of docs/quantised.md: formats, what a cut has to keep to, and what each was held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tests.quantised_models import GROUP, HIGH, WIDE

RANKS = (2, 4)  # at which every format is cut, read rank by rank, verified and merged
SIZES = {"group": GROUP, "block rows": HIGH, "block columns": WIDE}
OWN = "a slow reading of our own"


@dataclass(frozen=True)
class Row:
    """``formats``: keys of ``quantised_models.FORMATS`` (none: a test of its own). ``out`` and ``size``: of what a
    column's and a row's boundaries are multiples; ``against``: whose arithmetic the dequantised numbers were held
    against beside our own; ``refused``: what is."""

    title: str
    formats: tuple[str, ...]
    tensors: str
    out: tuple[str, ...]
    size: tuple[str, ...]
    against: str
    refused: str = ""


ROWS = [
    Row(
        "FP8, blocks (`fp8`: DeepSeek, Qwen)", ("fp8 blocks", "fp8 blocks, the last partial", "fp8 blocks, powers of two"),
        "`weight`, `weight_scale_inv`", ("block rows",), ("block columns",), "transformers 5.23 `Fp8Dequantize`",
        "scales of another grid than `weight_block_size` says",
    ),
    Row(
        "FP8, one scale (`fp8`, `modelopt`)", ("fp8 whole",), "`weight`, `weight_scale`, `input_scale`", (), (), "",
        "an `input_scale` that is no single number",
    ),
    Row("FP8, a scale for each row (`fbgemm_fp8`)", ("fbgemm fp8",), "`weight`, `weight_scale`", (), (), ""),
    Row(
        "compressed-tensors FP8, int8, a scale for each row", ("compressed fp8", "compressed int8"),
        "`weight`, `weight_scale`", (), (), "compressed-tensors 0.20", "sparse weights, `transform_config`",
    ),
    Row("compressed-tensors MXFP8", ("compressed mxfp8",), "`weight`, `weight_scale`", (), ("32",), "compressed-tensors 0.20"),
    Row(
        "compressed-tensors int4, in groups", ("compressed int4",),
        "`weight_packed`, `weight_scale`, `weight_shape`", (), ("group", "8"), "compressed-tensors 0.20",
        "3, 5, 6 and 7 bits: numbers lie across the edges of words",
    ),
    Row(
        "… with zero points", ("compressed int4, zero points",), "and `weight_zero_point`", ("8",), ("group", "8"),
        "compressed-tensors 0.20",
    ),
    Row("… with act-order", ("compressed int4, act-order",), "and `weight_g_idx`", (), ("8",), ""),
    Row(
        "compressed-tensors int8, packed, a scale for each row", ("compressed int8, packed",),
        "`weight_packed`, `weight_scale`, `weight_shape`", (), ("4",), "compressed-tensors 0.20",
    ),
    Row(
        "compressed-tensors NVFP4", ("compressed nvfp4",),
        "`weight_packed`, `weight_scale`, `weight_global_scale`, `input_global_scale`", (), ("16",),
        "compressed-tensors 0.20",
    ),
    Row("compressed-tensors MXFP4", ("compressed mxfp4",), "`weight_packed`, `weight_scale`", (), ("32",), "compressed-tensors 0.20"),
    Row(
        "modelopt NVFP4", ("modelopt nvfp4",), "`weight`, `weight_scale`, `weight_scale_2`, `input_scale`", (), ("16",), "",
        "`pre_quant_scale` (inputs scaled one by one)",
    ),
    Row(
        "MXFP4 experts (`mxfp4`: GPT-OSS)", (), "`*_blocks`, `*_scales`", (), ("32",),
        "transformers 5.23 `convert_moe_packed_tensors`",
    ),
    Row(
        "GPTQ, 4 bits", ("gptq", "gptq, settings beside"), "`qweight`, `qzeros`, `scales`, `g_idx`", ("8",), ("group", "8"),
        "AutoGPTQ 0.7.1, by hand", "3 bits; marlin and bitblas layouts",
    ),
    Row("GPTQ, 2 bits", ("gptq 2 bits",), "the same", ("16",), ("group", "16"), "AutoGPTQ 0.7.1, by hand"),
    Row("GPTQ v2, 8 bits", ("gptq v2, 8 bits",), "the same; the zero point as it is", ("4",), ("group", "4"), ""),
    Row("GPTQ with act-order (`desc_act`)", ("gptq, act-order",), "the same", ("8",), ("8",), "", "`desc_act` without `g_idx`"),
    Row("GPTQ, one group", ("gptq, one group",), "the same", ("8",), ("8",), ""),
    Row("AWQ (`gemm`)", ("awq",), "`qweight`, `qzeros`, `scales`", ("8",), ("group",), "AutoAWQ's `dequantize_gemm`, by hand", "gemv and other layouts"),
    Row("int8 (`bitsandbytes`, 8 bits)", ("bitsandbytes int8",), "`weight`, `SCB`, `weight_format`", (), (), "bitsandbytes 0.50"),
]  # fmt: skip


def multiples(row: Row) -> tuple[int, int]:
    """Those of a row in the sizes of the tests."""
    return tuple(math.lcm(1, *(SIZES.get(word) or int(word) for word in words)) for words in (row.out, row.size))  # type: ignore[return-value]


def lines() -> Iterator[str]:
    yield "| format | on disk | column cut: multiples of | row cut: multiples of | proven at `--tp` | held against | refused |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in ROWS:
        proven = ", ".join(map(str, RANKS if row.formats else RANKS[:1]))
        against = f"{row.against}; {OWN}" if row.against and row.formats else row.against or OWN
        cells = (row.title, row.tensors, _words(row.out), _words(row.size), proven, against, row.refused or "-")
        yield f"| {' | '.join(cells)} |"
    yield (
        "| 4 bits (`bitsandbytes`) | `weight`, `absmax`, `quant_map`, … | - | - | - | - | always: a line of packed numbers "
        "without axes, whose scales run across rows |"
    )


def _words(words: tuple[str, ...]) -> str:
    return " and ".join(words) or "1"
