"""Where a layer's features are in what it is given and returns, and how the ranks' own are put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tpshard.verify.placement import Cut, Layer, Task, is_conv1d
from tpshard.verify.recurrent import units


def feature_axis(module: nn.Module) -> int:
    """The axis of a layer's input and output that has its features, counted from the end; convolutions have channels
    before the axes of their kernel, norms of channels in axis 1."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    return 1 if _is_for_channels(module) else -1


def _is_for_channels(module: nn.Module) -> bool:
    """Norms and the like that have a number for each channel."""
    norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    return norm or (isinstance(module, nn.PReLU) and module.num_parameters > 1)


def wants_whole_input(task: Task, module: nn.Module) -> bool:
    """Whether all features of the input have to be there, whichever the rank's own part of the output is."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1:
        return task in ("column", "gather", "whole")
    if isinstance(module, nn.modules.conv._ConvNd) or _is_for_channels(module):
        return task == "whole"
    return task in ("column", "gather", "whole") and (isinstance(module, nn.Linear) or is_conv1d(module))


def own_units(layer: Layer, module: Any, value: torch.Tensor) -> Cut:
    """A recurrent layer's cut as one of the last axis of what it returns."""
    assert layer.cut is not None
    index, first = (
        tuple(units(rows, module.hidden_size, value.shape[-1]) for rows in runs)
        for runs in (layer.cut.index, layer.cut.first)
    )
    return Cut(-1, index, first)


def only(value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Zeros but for some of the features."""
    index = own.to(value.device)
    return torch.zeros_like(value).index_copy(-1, index, value.index_select(-1, index))


def own_part(value: torch.Tensor, cut: Cut, run: int, axis: int) -> torch.Tensor:
    """What rank ``run`` - 1 gives of its cut output: what no lower rank holds, and then the first feature again and
    again, so that all give as many. The reference, run 0, gives anything."""
    own = cut.first[max(run, 1) - 1]
    length = max(map(len, cut.first))
    index = torch.cat([own, own.new_zeros(length - len(own))])
    return value.index_select(axis, index.to(value.device))


def chosen_by(values: Sequence[torch.Tensor], cut: Cut) -> torch.Tensor:
    """Each feature from the rank that holds it. Another's need not be zeros: attention with a key-value head that
    ranks share gives something for query heads that are not there."""
    owner = torch.empty(sum(map(len, cut.first)), dtype=torch.int64)
    for rank, own in enumerate(cut.first):
        owner[own] = rank
    chosen = values[0]
    for rank, value in enumerate(values[1:], start=1):
        chosen = torch.where((owner == rank).to(value.device), value, chosen)
    return chosen


def joined_by(parts: Sequence[torch.Tensor], cut: Cut, axis: int) -> torch.Tensor:
    """The features of all ranks' own parts, in their order."""
    own = [part.narrow(axis, 0, len(first)) for part, first in zip(parts, cut.first, strict=True)]
    joined, order = torch.cat(own, dim=axis), torch.argsort(torch.cat(cut.first))
    in_order = bool((order == torch.arange(len(order))).all())
    return joined if in_order else joined.index_select(axis, order.to(joined.device))
