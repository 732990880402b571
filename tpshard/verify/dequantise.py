"""The numbers of quantised weights, in float64, a region at a time.

One formula for all formats: ``(number - zero) * scale * multiplier / divisor``. What differs is where each of them
lies (``tpshard.companions``) and how it is packed. Sources:

* FP8 and int8 with scales, ``weight_scale_inv`` included: transformers' ``Fp8Dequantize``, compressed-tensors'
  ``dequantize``: number * scale. Scales stored as bytes or F8_E8M0 are powers of two, 2^(byte - 127).
* GPTQ: AutoGPTQ's ``QuantLinear.forward``: scale * (number - (stored zero + 1)); the zero wraps around within its bits.
* AWQ: scale * (number - zero); AutoAWQ's order of the eight outputs in a word is undone.
* compressed-tensors, packed: ``unpack_from_int32``: numbers and zeros were moved up by half their range.
* FP4 (E2M1): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign bit; the low half of a byte first. NVFP4 divides by
  ``weight_global_scale`` (compressed-tensors) or multiplies by ``weight_scale_2`` (modelopt).
* bitsandbytes int8: number * SCB / 127.

Only weights are looked at: that an engine also rounds what it multiplies them by is no part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tpshard.companions import Companion, Form, Part
from tpshard.layout import Box

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in the word of each of its eight outputs
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
Read = Callable[[Companion, Box], torch.Tensor]


def dequantised(form: Form, box: Box, read: Read) -> torch.Tensor:
    """A region of the weight. ``box`` and what ``read`` is asked for are in one holder's own coordinates."""
    index = _values(_of(form, "group"), form, box, read, None)
    groups = None if index is None else index.long().flatten()

    def values(part: Part) -> torch.Tensor | None:
        return _values(_of(form, part), form, box, read, groups)

    numbers, zero, scale = values("numbers"), values("zero"), values("scale")
    multiplier, divisor = values("multiplier"), values("divisor")
    assert numbers is not None
    if zero is not None:
        numbers = numbers - zero
    if scale is not None:
        numbers = numbers * scale
    if multiplier is not None:
        numbers = numbers * multiplier
    if divisor is not None:
        numbers = numbers / divisor
    return numbers


def _of(form: Form, part: Part) -> Companion | None:
    return next((companion for companion in form.companions if companion.part == part), None)


def _values(
    companion: Companion | None, form: Form, box: Box, read: Read, groups: torch.Tensor | None
) -> torch.Tensor | None:
    """A companion's values for a region of the weight: one axis for each of the weight's, of extent 1 where all cells
    share one value."""
    if companion is None:
        return None
    start, stop, picks = [], [], []
    for stored, axis in enumerate(companion.axes):
        if axis is None:
            start.append(0)
            stop.append(companion.shape[stored])
            picks.append(torch.arange(0))
            continue
        a, b = box.start[axis.of], box.stop[axis.of]
        pick = groups if axis.indexed and groups is not None else torch.arange(a, b) // axis.per
        if stored == companion.packed:
            pick = torch.arange(a, b) - a // axis.per * axis.per
            start.append(a // axis.per)
            stop.append(-(-b // axis.per))
        else:
            start.append(int(pick.min()) if len(pick) else 0)
            stop.append(int(pick.max()) + 1 if len(pick) else 0)
            pick = pick - start[-1]
        picks.append(pick)
    found = _unpacked(read(companion, Box(tuple(start), tuple(stop))), companion)
    for stored in reversed(range(len(companion.axes))):
        if companion.axes[stored] is not None:
            found = found.index_select(stored, picks[stored])
        elif found.ndim > stored:  # not the bytes within a block, which unpacking has joined to their axis
            found = found.select(stored, 0)
    places = [axis.of for axis in companion.axes if axis is not None]
    found = found.permute(sorted(range(len(places)), key=lambda k: places[k]))
    for missing in sorted(set(range(len(form.shape))) - set(places)):
        found = found.unsqueeze(missing)
    return found


def _unpacked(raw: torch.Tensor, companion: Companion) -> torch.Tensor:
    """In float64, with the packed axis at its full length."""
    match companion.packing:
        case "":
            return _plain(raw, companion) / companion.over
        case "nibbles":
            if companion.axes[-1] is None:
                raw = raw.flatten(-2)
            halves = torch.stack((raw & 15, raw >> 4), dim=-1).flatten(-2).long()
            return FP4[halves & 7] * (1 - 2 * (halves >> 3))
    per = 32 // companion.bits
    order = torch.tensor(AWQ_ORDER) if companion.packing == "awq" else torch.arange(per)
    mask = 2**companion.bits - 1
    words = raw.movedim(companion.packed, -1).long()
    numbers = (words.unsqueeze(-1) >> order * companion.bits) & mask
    numbers = (numbers + companion.plus) & mask
    if companion.signed:
        numbers = numbers - 2 ** (companion.bits - 1)
    flat: torch.Tensor = numbers.flatten(-2).movedim(-1, companion.packed)
    return flat.double()


def _plain(raw: torch.Tensor, companion: Companion) -> torch.Tensor:
    if companion.part == "scale" and companion.dtype in ("U8", "F8_E8M0"):
        exponents = raw.view(torch.uint8).double()
        return torch.where(exponents == 255, torch.nan, (exponents - 127).exp2())
    return raw.double()
