"""The layout check of quantised checkpoints: weights as if they were dense, and that companions follow their weight.

What each stored cell stands for is worked out cell by cell here, in the other direction than split does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.companions import Companion, Quantised, Weight, multiplied
from tpshard.errors import InputError
from tpshard.layout import Layout
from tpshard.quantised import read_quantised
from tpshard.verify.axes import held
from tpshard.verify.folding import fold, fold_stages
from tpshard.verify.grid_layout import check_layout_of_grid
from tpshard.verify.report import CheckResult, Finding
from tpshard.verify.weights import same_tensors


def quantised_in(shards: Checkpoint, source: Checkpoint | None) -> Quantised | InputError:
    """What is quantised, as the source has it, or the shards where they have other tensors; or why that is not known.

    Of several processes each has only its own rank's shard: what decides on layouts is read from the source.
    """
    try:
        return read_quantised(source if source and same_tensors(shards, source) else shards)
    except InputError as error:
        return error


def check_quantised_layout(shards: Checkpoint, quantised: Quantised | InputError) -> CheckResult:
    """The layout check, of weights and of their companions; of a dense checkpoint what it always is."""
    if isinstance(quantised, InputError):
        return CheckResult("layout", unproven=str(quantised))
    if not quantised.weights:
        return check_layout_of_grid(shards)
    astray: list[Finding] = []
    for weight in quantised.weights.values():
        astray += _astray(weight, shards)
    dense = _as_dense(shards, quantised)
    result = check_layout_of_grid(dense, sorted({*quantised.together().values()} - {1}))
    note = f"{len(quantised.weights)} quantised weights ({quantised.method}), each with its companions"
    return replace(result, findings=(*astray, *result.findings), notes=(*result.notes, note))


def fold_quantised(shards: Checkpoint, quantised: Quantised) -> tuple[Checkpoint, Mapping[str, Layout]]:
    """A grid as the model checks run it, and the layouts of quantised weights in it: which copies count is decided by
    weights; their companions are all kept."""
    if not quantised.weights:
        return fold(shards), {}
    dense, stored = fold(_as_dense(shards, quantised)), fold_stages(shards)
    layouts = {name: dense.tensors[name].layout for name in quantised.weights}
    return replace(stored, tensors={**stored.tensors, **_others(dense, layouts)}), layouts


def _others(dense: Checkpoint, weights: Mapping[str, Layout]) -> dict[str, Stored]:
    return {name: tensor for name, tensor in dense.tensors.items() if name not in weights}


def _as_dense(shards: Checkpoint, quantised: Quantised) -> Checkpoint:
    """The same shards with weights in place of their companions."""
    tensors: dict[str, Stored] = {}
    for name in quantised.names(name for name in shards.tensors if name not in quantised.scalars):
        weight = quantised.weights.get(name)
        if weight is None:
            tensors[name] = shards.tensors[name]
            continue
        numbers = shards.tensors[weight.stored(weight.form.numbers)]
        tensors[name] = replace(numbers, name=name, layout=multiplied(numbers.layout, weight.form))
    return replace(shards, tensors=tensors)


def _astray(weight: Weight, shards: Checkpoint) -> Iterator[Finding]:
    """Companions that do not hold what their weight's rank needs, in that order."""
    numbers = shards.tensors[weight.stored(weight.form.numbers)]
    dense = replace(numbers, layout=multiplied(numbers.layout, weight.form))
    for companion in weight.form.companions:
        stored = shards.tensors[weight.stored(companion)]
        for rank in range(shards.ranks):
            what = _difference(weight, companion, dense, stored, rank)
            if what:
                yield Finding(what, tensor=stored.name, rank=rank)
                break


def _difference(weight: Weight, companion: Companion, dense: Stored, stored: Stored, rank: int) -> str:
    theirs, own = dense.layout.shards[rank], stored.layout.shards[rank]
    if theirs is None or own is None:
        return "" if theirs is own else f"is {'not ' if own is None else ''}held, other than {weight.name}"
    for place, axis in enumerate(companion.axes):
        have = held(stored, place, rank)
        need = np.arange(companion.shape[place])
        if axis is not None and not axis.indexed:
            cells = held(dense, axis.of, rank)
            alone = axis.per >= weight.shape[axis.of] > 1 and place != companion.packed  # one cell, for all ranks
            if not alone:
                need = np.unique(cells // axis.per)
                covered = np.minimum((need + 1) * axis.per, weight.shape[axis.of]) - need * axis.per
                if len(cells) != covered.sum():
                    return f"is cut inside a block of {axis.per} along axis {axis.of} of {weight.name}"
        if not np.array_equal(have, need):
            shown = f"{len(have)} cells along axis {place}, its part of {weight.name} needs {len(need)}"
            return f"has {shown}" if len(have) != len(need) else f"has other cells than its part of {weight.name} needs"
    return ""
