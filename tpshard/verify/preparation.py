"""Before the model runs: what is to be called, which layers have something to do, and which blocks are alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError, printable
from tpshard.layout import Box
from tpshard.verify.block_tensor import Context
from tpshard.verify.blocks import Block
from tpshard.verify.execution import Subject, call, first_of, on_device, with_first
from tpshard.verify.factory_model import FactoryModel
from tpshard.verify.keras_model import KerasModel, is_keras
from tpshard.verify.lockstep import AllDouble, Lockstep, no_fault_of_the_model
from tpshard.verify.models import Model, TransformersModel, copy_with, one_line, slots
from tpshard.verify.placement import NOBODY, REFERENCE, Layer, Parameters, find_layers
from tpshard.verify.sections import outermost_blocks
from tpshard.verify.values import WHOLE, Weights, layer_of, shape_of


@dataclass(frozen=True, slots=True)
class Choice:
    """``factory``: package.module:function of a model that transformers does not know; ``seed``: of the inputs."""

    factory: str | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    new_lock: Callable[[int], Lockstep] = lambda ranks: Lockstep(range(ranks + 1))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(was)


def make_model(weights: Weights, choice: Choice) -> Model:
    """Raises InconclusiveError or UsageError where there is no such model or it is not the checkpoint's."""
    if choice.factory:
        shapes = {name: shape_of(weights, name) for name in weights.names}
        return FactoryModel(choice.factory, weights.config, shapes, choice.dtype)
    if is_keras(weights.config):
        return KerasModel(weights.config, {name: shape_of(weights, name) for name in weights.names}, choice.dtype)
    return TransformersModel(weights.folder, weights.config, weights.names, choice.dtype)


def prepare(weights: Weights, choice: Choice) -> Subject:
    """Raises InconclusiveError where the unsharded model does not run."""
    model = make_model(weights, choice)
    parameters = Parameters(model, weights)
    layers = find_layers(weights, model, parameters)
    inputs = model.inputs(weights.ranks, choice.seed)
    blocks = outermost_blocks(model.skeleton)
    device = torch.device(choice.device)
    subject = Subject(model, parameters, layers, blocks, inputs, weights.ranks, device, choice.new_lock)
    called, context = _called(subject, weights)
    return replace(
        subject,
        layers=_settled(subject, layers, set(called), context),
        blocks=[path for path in blocks if path in called],
        stubs={path: form for path, form in called.items() if form is not None},
    )


def _called(subject: Subject, weights: Weights) -> tuple[dict[str, Any], Context]:
    """The modules that a forward calls, and which parameters' numbers it wants: all parameters zero, which costs
    nothing; or, where that does not run, with the reference's own. Of blocks, what they return, if its first tensor is
    like their input's."""
    try:
        return _calls(subject, weights, NOBODY)
    except (Exception, SystemExit):
        try:
            return _calls(subject, weights, REFERENCE)
        except (Exception, SystemExit) as error:
            if (other := no_fault_of_the_model(error)) is not None:
                raise other from None
            raise InconclusiveError(f"the unsharded model itself does not run: {one_line(error)}") from None


def _calls(subject: Subject, weights: Weights, run: int) -> tuple[dict[str, Any], Context]:
    context = Context(weights, torch.get_default_dtype(), subject.device, sound=run == REFERENCE)
    module = copy_with(subject.model.skeleton, subject.parameters.of_run(run, context), subject.device)
    called: dict[str, Any] = {}

    def note(path: str, args: Any, kwargs: Any, output: Any) -> None:
        entered, left = first_of((args, kwargs)), first_of(output)
        alike = path in blocks and entered is not None and left is not None and entered.shape == left.shape
        called[path] = with_first(output, left[:0]) if alike and left is not None else None

    blocks = set(subject.blocks)
    for path, part in module.named_modules():
        part.register_forward_hook(
            lambda _, args, kwargs, out, path=path: note(path, args, kwargs, out), with_kwargs=True
        )
    with torch.no_grad(), AllDouble():
        call(module, on_device(subject.inputs, subject.device))
    return called, context


def _settled(subject: Subject, layers: Sequence[Layer], called: set[str], context: Context) -> list[Layer]:
    """A layer whose own forward is never called though its weight is used (its parent reads it, as
    nn.MultiheadAttention does with its output projection) leaves its task to the parent, if that calls nothing else
    that could follow; otherwise where it is to be carried out is not known. What is neither called nor used will be
    told as not reached.
    """
    taken = {layer.path for layer in layers if layer.path in called}
    settled = [layer for layer in layers if layer.path in taken]
    for layer in layers:
        if layer.path in called or _twin_is_called(subject.model.skeleton, layer, taken):
            continue
        parent = layer.path.rpartition(".")[0]
        if not any(layer_of(name) == layer.path for name in context.used):
            settled.append(layer)
        elif layer.task in ("whole", "column"):
            continue  # nothing to do
        elif parent in called and not any(_could_follow(subject, layer, path, context) for path in called):
            settled.append(replace(layer, path=parent))
        else:
            what = f"{printable(layer.name)}: its weight is read, but the layer is not called"
            raise InconclusiveError(what, hint=f"call the layer, so that its task ({layer.task}) has a place")
    return settled


def _could_follow(subject: Subject, layer: Layer, path: str, context: Context) -> bool:
    """Whether a module stands beside a layer and may work on its output. Not so where torch's attention ends in the
    layer and the module knows nothing of its width: WavLM's calls a gate of eight numbers for each head before."""
    if not path or path.rpartition(".")[0] != layer.path.rpartition(".")[0]:
        return False
    tensors = list(subject.model.skeleton.get_submodule(path).parameters())
    width = subject.model.skeleton.get_submodule(layer.path).get_parameter("weight").shape[0]
    apart = bool(tensors) and not any(width in tensor.shape for tensor in tensors)
    return not (apart and f"{layer.path}.weight" in context.attended)


def _twin_is_called(skeleton: nn.Module, layer: Layer, called: set[str]) -> bool:
    """Whether a layer that shares its weight is called."""
    modules = dict(skeleton.named_modules())
    own = {id(parameter) for parameter in modules[layer.path].parameters(recurse=False)}
    others = (modules[path].parameters(recurse=False) for path in called)
    return any(id(parameter) in own for parameters in others for parameter in parameters)


def require_sound_tables(subject: Subject, weights: Weights) -> None:
    """Raises InconclusiveError where a table of the source has numbers that are not finite: the forward reads only
    the rows that its input meets."""
    context = Context(weights, torch.float64, torch.device("cpu"), sound=True)
    for path, module in subject.model.skeleton.named_modules():
        recipe = subject.model.recipes.get(f"{path}.weight") if isinstance(module, nn.Embedding) else None
        for name in recipe.names if recipe else ():
            shape = shape_of(weights, name)
            whole = Box((0,) * len(shape), shape)
            for part in Block(name, WHOLE, whole, tuple(range(len(shape))), whole).chunks():
                context.values(part)


def never_called(subject: Subject, visited: set[str]) -> list[str]:
    """Layers with tensors on disk that the input did not reach."""
    return [layer.name for layer in subject.layers if layer.path not in visited]


def kind_of_block(subject: Subject, weights: Weights, path: str) -> Any:
    """Equal for blocks of one make: the same parameters, of the same shapes, cut alike."""
    module = subject.model.skeleton.get_submodule(path)
    return type(module).__name__, tuple(
        (
            name,
            tuple(tensor.shape),
            tuple((weights.layout(n), weights.role(n).rule, weights.role(n).gather) for n in recipe.names),
        )
        for name, tensor in slots(module).items()
        if (recipe := subject.model.recipes.get(f"{path}.{name}")) is not None
    )
