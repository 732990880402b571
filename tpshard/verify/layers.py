"""The layer check: where the model itself cannot be run, each cut layer alone, full against its shards.

Random x and cotangent g: y, dx and dW of the full layer against those of the shards, joined or added as the rule
says. It finds shards that are corrupt or cut inside out, and knows nothing of how layers fit together.
"""

from __future__ import annotations

import torch

from tpshard.errors import InconclusiveError
from tpshard.layout import Box, Layout
from tpshard.verify.record import TOLERANCE, difference
from tpshard.verify.report import CheckResult, Finding
from tpshard.verify.values import WHOLE, Weights

COLUMNS = 5  # of x and g


def check_layers(weights: Weights) -> CheckResult:
    """Check every cut tensor of two or more axes; the first axis is rows, the others together columns."""
    findings: list[Finding] = []
    layers = 0
    for name in weights.names:
        layout = weights.layout(name)
        if len(layout.shape) < 2 or len(layout.cut_axes) != 1:
            continue
        try:
            whole = weights.read(name, WHOLE, Box((0,) * len(layout.shape), layout.shape)).double()
            owns = [_own(weights, name, rank) for rank in range(layout.ranks)]
        except InconclusiveError:
            continue
        if whole.is_floating_point() and bool(torch.isfinite(whole).all()):
            layers += 1
            findings += _check(name, layout, whole, owns)
    note = "each layer was checked alone; how the layers fit together was not"
    return CheckResult("layers", tuple(findings), {"layers": layers, "ranks": weights.ranks}, notes=(note,))


def _own(weights: Weights, name: str, rank: int) -> torch.Tensor | None:
    shard = weights.layout(name).shards[rank]
    if shard is None:
        return None
    return weights.read(name, rank, Box((0,) * len(shard.shape), shard.shape)).double()


def _check(name: str, layout: Layout, whole: torch.Tensor, owns: list[torch.Tensor | None]) -> list[Finding]:
    (axis,) = layout.cut_axes
    matrix = whole.movedim(axis, 0).reshape(layout.shape[axis], -1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(matrix.shape[1], COLUMNS, generator=generator, dtype=torch.float64)
    g = torch.randn(matrix.shape[0], COLUMNS, generator=generator, dtype=torch.float64)
    y, dx, dw = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(matrix)
    taken = torch.zeros(matrix.shape[0], dtype=torch.bool)
    for shard, own in zip(layout.shards, owns, strict=True):
        if shard is None or own is None:
            continue
        index = torch.cat([torch.arange(0), *(torch.arange(*run) for run in shard.spans[axis])])
        rows = own.movedim(axis, 0).reshape(own.shape[axis], -1)[: len(index)]
        fresh = ~taken[index]  # replicated rows count once
        taken[index] = True
        index, rows = index[fresh], rows[fresh]
        y[index] = rows @ x
        dx += rows.T @ g[index]
        dw[index] = g[index] @ x.T
    for what, got, want in (("y", y, matrix @ x), ("dx", dx, matrix.T @ g), ("dW", dw, g @ x.T)):
        error, wrong = difference(got, want)
        if wrong:
            return [
                Finding(
                    f"{what} of the layer alone differs: relative error {error:.1e}, tolerance {TOLERANCE:.0e}",
                    tensor=name,
                )
            ]
    return []
