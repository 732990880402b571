"""Quantised weights as the model has them: their own names and shapes, and numbers made of each holder's own bytes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tpshard.companions import Companion, Quantised, Weight
from tpshard.errors import InconclusiveError, printable
from tpshard.header import DTYPE_BITS
from tpshard.layout import Box, Layout
from tpshard.roles import Role
from tpshard.verify.dequantise import dequantised
from tpshard.verify.report import CheckResult
from tpshard.verify.values import TORCH_DTYPES, WHOLE, Place, StoredWeights, Weights

KEPT = 2**28  # bytes of packed tensors that are kept, for formats that lie across the order in which one reads
KEPT_ONE = 2**26
REMARK = "quantised weights run dequantised; whether an engine rounds what it multiplies them by is not looked at"


def logical(weights: StoredWeights, quantised: Quantised, layouts: Mapping[str, Layout]) -> Weights:
    """The weights as the model has them; the same where nothing is quantised. ``layouts``: of the quantised ones."""
    return LogicalWeights(weights, quantised, layouts) if quantised.weights else weights


def with_remark(results: Iterable[CheckResult], quantised: Quantised) -> Iterator[CheckResult]:
    """What the forward check does not show of a quantised model is said with it."""
    for result in results:
        said = quantised.weights and result.name == "forward"
        yield replace(result, notes=(*result.notes, REMARK)) if said else result


class LogicalWeights:
    """``dtype`` of a quantised weight is the one in which the model computes. A rank's numbers are made of that rank's
    packed bytes and scales alone, so that a wrong scale shows as a wrong weight."""

    def __init__(self, weights: StoredWeights, quantised: Quantised, layouts: Mapping[str, Layout]) -> None:
        self._weights, self._quantised, self._layouts = weights, quantised, layouts
        self.ranks = weights.ranks
        self.names = tuple(quantised.names(weights.names))
        self.config: Mapping[str, Any] = weights.config
        self.folder: Path = weights.folder
        self._dtype = _computed_in(weights.config)
        self._kept: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()
        self._size = 0

    def dtype(self, name: str) -> str:
        return self._dtype if name in self._quantised.weights else self._weights.dtype(name)

    def layout(self, name: str) -> Layout:
        return self._layouts[name] if name in self._layouts else self._weights.layout(name)

    def role(self, name: str) -> Role:
        weight = self._quantised.weights.get(name)
        return self._weights.role(weight.stored(weight.form.numbers) if weight else name)

    def held(self, name: str, rank: int) -> Sequence[Place]:
        if name not in self._quantised.weights:
            return self._weights.held(name, rank)
        shard = self.layout(name).shards[rank]
        return [(rank, piece) for piece in shard.pieces()] if shard else []

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        weight = self._quantised.weights.get(name)
        if weight is None:
            return self._weights.read(name, holder, box)
        if not box.volume:
            return torch.empty(box.shape, dtype=torch.float64)
        return dequantised(weight.form, box, lambda companion, part: self._read(weight, companion, holder, part))

    def _read(self, weight: Weight, companion: Companion, holder: int, box: Box) -> torch.Tensor:
        """Of one companion; small ones are kept, since a region may be a thin strip of all their rows."""
        name = weight.stored(companion)
        layout = self._weights.layout(name)
        shard = layout.shards[holder] if holder != WHOLE else None
        shape = shard.shape if shard else layout.shape
        if any(stop > size for stop, size in zip(box.stop, shape, strict=True)):
            own = f"rank {holder}'s {printable(name)} is {list(shape)}"
            raise InconclusiveError(f"{own}: too short for its part of {printable(weight.name)}")
        size = math.prod(shape) * DTYPE_BITS[companion.dtype] // 8
        if size > KEPT_ONE:
            return self._weights.stored(name, holder, box)
        key = name, holder
        if key not in self._kept:
            self._kept[key] = self._weights.stored(name, holder, Box((0,) * len(shape), shape))
            self._size += size
            while self._size > KEPT and len(self._kept) > 1:
                old = self._kept.popitem(last=False)[1]
                self._size -= old.numel() * old.element_size()
        self._kept.move_to_end(key)
        return self._kept[key][box.slices()]


def _computed_in(config: Mapping[str, Any]) -> str:
    """The dtype in which the model computes; BF16 where config.json does not say."""
    text = config.get("text_config")
    places = (config, text if isinstance(text, dict) else {})
    said = {str(place.get(key)).removeprefix("torch.") for place in places for key in ("dtype", "torch_dtype")}
    return next((name for name, dtype in TORCH_DTYPES.items() if str(dtype).removeprefix("torch.") in said), "BF16")
