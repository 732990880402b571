"""Faults in the companions of quantised weights: scales, zero points and packed numbers that do not belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from tests.fault_list import BYTES, LAYOUT, MODEL, WEIGHTS, Fault
from tests.planting import Arrays, along, folder_fault, layout_fault, reverse, source_fault, whole
from tests.tampering import Folder

_DOWN, _UP, _Q = (f"layers.0.{layer}" for layer in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"))

# id, what, format, ranks, whose layout, changed how, who must see it. What is named is always the tensor.
LAYOUTS = [
    ("Q01", "scales of a row layer left whole", "gptq", 2, f"{_DOWN}.scales", whole, MODEL),
    ("Q01", "scales of a column layer left whole", "compressed fp8", 4, f"{_UP}.weight_scale", whole, MODEL),
    ("Q01", "block scales left whole", "fp8 blocks", 2, f"{_DOWN}.weight_scale_inv", whole, MODEL),
    ("Q02", "act-order: scales cut, the index global", "gptq, act-order", 2, f"{_DOWN}.scales", along(0, [0, 5, 10]), LAYOUT),
    ("Q02", "act-order: the index left whole", "gptq, act-order", 2, f"{_DOWN}.g_idx", whole, LAYOUT),
    ("Q03", "scales in reverse rank order", "awq", 2, f"{_Q}.scales", reverse, MODEL),
    ("Q03", "zero points in reverse rank order", "gptq", 4, f"{_Q}.qzeros", reverse, MODEL),
    ("Q03", "scales in reverse rank order", "compressed nvfp4", 4, f"{_Q}.weight_scale", reverse, MODEL),
    ("Q03", "scales in reverse rank order", "bitsandbytes int8", 2, f"{_Q}.SCB", reverse, MODEL),
    ("Q04", "numbers cut inside a group", "compressed int4", 2, f"{_DOWN}.weight_packed", along(1, [0, 9, 20]), LAYOUT),
    ("Q11", "zero points cut, numbers whole", "gptq", 2, f"{_DOWN}.qweight", whole, LAYOUT),
]  # fmt: skip


def _one_scale(arrays: Arrays) -> None:
    """Of q, k and v the first's scale for all, the numbers as they were (Q08)."""
    for part in "kv":
        arrays[f"model.layers.0.self_attn.{part}_proj.weight_scale"] = arrays[f"model.{_Q}.weight_scale"].copy()


def _in_order(arrays: Arrays) -> None:
    """AWQ's words with their outputs in ascending order (Q06)."""
    for name in [name for name in arrays if name.endswith(f"{_Q}.qweight")]:
        packed = arrays[name].view(np.uint32)
        nibbles = [(packed >> np.uint32(4 * place)) & np.uint32(15) for place in (0, 4, 1, 5, 2, 6, 3, 7)]
        again = sum(nibble << np.uint32(4 * place) for place, nibble in enumerate(nibbles))
        arrays[name] = np.asarray(again, np.uint32).view(np.int32)


def _requantised(folder: Folder) -> None:
    """Rank 1's scales doubled, as if each rank had found its own (Q14)."""
    folder.rearrange(f"model.{_UP}.scales", 1, lambda scales: scales * 2)


def _exchanged(folder: Folder) -> None:
    """The ranks' scales of one layer exchanged: an own file's scale is another rank's (Q07)."""
    for one, other in pairwise(folder.ranks):
        folder.exchange_ranks(f"model.{_UP}.scales", one, other)


SOURCES: list[tuple[str, str, str, Callable[[Arrays], object], frozenset[str], str]] = [
    ("Q06", "packed again with the outputs of a word in another order", "awq", _in_order, BYTES, f"{_Q}.qweight"),
    ("Q08", "one scale for q, k and v", "fp8 whole", _one_scale, BYTES, "self_attn.k_proj"),
    ("Q10", "scales saved in another dtype", "gptq", lambda a: a.update({n: v.astype(np.float32) for n, v in a.items() if n.endswith("scales")}), WEIGHTS, "dtype F16 became F32"),
    ("Q13", "a scale of the inputs dropped", "fp8 whole", lambda a: a.pop(f"model.{_UP}.input_scale"), WEIGHTS, f"{_UP}.input_scale"),
]  # fmt: skip
FOLDERS = [
    ("Q07", "scales of another rank, resealed", "gptq", _exchanged, BYTES, _UP),
    ("Q07", "scales of another rank, resealed", "awq", _exchanged, BYTES, _UP),
    ("Q14", "quantised again after the cut, resealed", "gptq", _requantised, BYTES, _UP),
]


def quantised() -> Iterator[Fault]:
    """Of a tiny llama in the format named after the slash."""
    for id_, what, form, tp, name, change, seen in LAYOUTS:
        said = name.rpartition(".")[0] if seen != LAYOUT else f"{name.rpartition('.')[0]}."
        yield Fault(id_, what, f"llama/{form}", tp, layout_fault(name, change), seen, said, usual=tp == 2)
    for id_, what, form, source, seen, said in SOURCES:
        yield Fault(id_, what, f"llama/{form}", 2, source_fault(source), seen, said)
    for id_, what, form, folder, seen, said in FOLDERS:
        yield Fault(id_, what, f"llama/{form}", 2, folder_fault(folder, reseal=True), seen, said)
