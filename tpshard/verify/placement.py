"""What each layer of the model has to do in a sharded run: sum, gather, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tpshard.verify.models import Maker
from tpshard.verify.tensors import BITS_A_PASS, Weights, layer_of, ownership_states

Task = Literal["row", "column", "gather", "gather input", "whole"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter's cut axis; ``index[r]`` what rank r holds along it, ``first[r]`` what no lower rank holds."""

    axis: int
    index: tuple[torch.Tensor, ...]
    first: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the model: its path in the module, its name on disk, its task, and its weight's cut if it has one."""

    path: str
    name: str
    task: Task
    cut: Cut | None


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


def find_layers(weights: Weights, maker: Maker, model: nn.Module) -> tuple[list[Layer], list[str]]:
    """The layers with tensors from disk, in the module's order; and the tensors on disk that the model lacks."""
    cuts = _cuts_of_parameters(weights, maker, model)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    found: dict[str, Layer] = {}
    unused: list[str] = []
    sources: dict[int, str] = {}
    for name in sorted(weights.names, key=lambda name: -len(weights.layout(name).shape)):  # weights before biases
        parameter = maker.parameter_of(name, model)
        if parameter is None or parameter not in parameters:
            unused.append(name)
            continue
        sources[id(parameters[parameter])] = name
        _add(found, modules, _layer(weights, name, parameter, cuts.get(parameter)))
    for parameter, tensor in parameters.items():  # tied twins, which are not on disk
        if layer_of(parameter) not in found and id(tensor) in sources:
            cut = cuts.get(parameter)
            task = _task_of_twin(modules[layer_of(parameter)], cut)
            _add(found, modules, Layer(layer_of(parameter), layer_of(parameter), task, cut))
    order = {path: place for place, path in enumerate(modules)}
    return sorted(found.values(), key=lambda layer: order[layer.path]), unused


def _layer(weights: Weights, name: str, parameter: str, cut: Cut | None) -> Layer:
    role = weights.role(name)
    task: Task = "whole"
    if role.gather == "input":
        task = "gather input"
    elif cut is not None and role.rule == "row":
        task = "row"
    elif cut is not None and role.rule == "column":
        task = "gather" if role.gather else "column"
    return Layer(layer_of(parameter), layer_of(name), task, cut)


def _task_of_twin(module: nn.Module, cut: Cut | None) -> Task:
    """A twin that is only tied to a tensor on disk: which side of its own layer is cut tells what to do."""
    if cut is None:
        return "whole"
    in_axis = 0 if isinstance(module, nn.Embedding) or is_conv1d(module) else 1
    return "row" if cut.axis == in_axis else "gather"


def _add(found: dict[str, Layer], modules: dict[str, nn.Module], layer: Layer) -> None:
    """One layer for each module: the row rule of its weight before what its bias says. A raw parameter of a block
    tells nothing of the block's output."""
    if layer.task in ("column", "gather") and modules[layer.path]._modules:
        layer = Layer(layer.path, layer.name, "whole", None)
    known = found.get(layer.path)
    if known is None or (known.task == "whole" and layer.task != "whole") or layer.task == "row":
        found[layer.path] = layer


def _cuts_of_parameters(weights: Weights, maker: Maker, model: nn.Module) -> dict[str, Cut]:
    """Every parameter that is cut along one axis."""
    held: dict[str, list[torch.Tensor]] = {}
    for number, state in enumerate(ownership_states(weights)):
        owned = maker.make(state)
        ranks = min(BITS_A_PASS, weights.ranks - number * BITS_A_PASS)
        for name, tensor in {
            **dict(owned.named_parameters(remove_duplicate=False)),
            **dict(owned.named_buffers()),
        }.items():
            if tensor.is_floating_point():
                bits = tensor.detach().to(torch.int64)
                held.setdefault(name, []).extend(((bits >> rank) & 1).bool() for rank in range(ranks))
    cuts = {name: _cut(masks) for name, masks in held.items() if len(masks) == weights.ranks}
    return {name: cut for name, cut in cuts.items() if cut is not None}


def _cut(masks: list[torch.Tensor]) -> Cut | None:
    """The axis along which the ranks' cells differ, if there is one."""
    if all(bool(mask.all()) for mask in masks):
        return None
    for axis in range(masks[0].ndim):
        lines = [mask.transpose(0, axis).reshape(mask.shape[axis], -1) for mask in masks]
        if all(bool((line == line[:, :1]).all()) for line in lines):
            rows = [line[:, 0] for line in lines]
            taken = torch.zeros_like(rows[0])
            first = []
            for row in rows:
                first.append((row & ~taken).nonzero().flatten())
                taken |= row
            return Cut(axis, tuple(row.nonzero().flatten() for row in rows), tuple(first))
    return None
