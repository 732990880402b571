"""What each layer of the model has to do in a sharded run: sum, gather, or nothing; and what each rank's parameters
are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from tpshard.errors import InconclusiveError, printable
from tpshard.layout import Box
from tpshard.verify.block_tensor import BlockTensor, Context
from tpshard.verify.blocks import Block
from tpshard.verify.models import Model, Recipe, Source, one_line, slots
from tpshard.verify.values import TORCH_DTYPES, Place, Weights, added_once, everything, layer_of

Task = Literal["row", "column", "gather", "gather input", "whole"]
REFERENCE = 0  # the reference's place among the runs; rank r is run r + 1
NOBODY = -1  # a run that has no numbers, all parameters zero


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter's cut axis; ``index[r]`` what rank r holds along it, ``first[r]`` what no lower rank holds."""

    axis: int
    index: tuple[torch.Tensor, ...]
    first: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the model: its path in the module, its name on disk, its task, and its weight's cut if it has one.
    ``beside``: where its input is gathered, the cuts of the row layers of the same module."""

    path: str
    name: str
    task: Task
    cut: Cut | None
    beside: tuple[Cut, ...] = ()


class _ReadError(Exception):
    """Numbers were asked for where only places are known."""


class _PlacesOnly:
    """Weights without numbers, for a converter that only moves tensors about."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getattr__(self, name: str) -> object:
        return getattr(self._weights, name)

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        raise _ReadError(name)


class Parameters:
    """A model's parameters as the runs have them: whole for the reference, each rank's blocks among zeros.

    A row layer's bias is whole on every rank and is added once: rank 0 has it, the others zeros.
    """

    def __init__(self, model: Model, weights: Weights) -> None:
        self._model, self._weights = model, weights
        self._shapes = {name: tuple(tensor.shape) for name, tensor in slots(model.skeleton).items()}
        self._learning = {name for name, _ in model.skeleton.named_parameters(remove_duplicate=False)}
        self._once = added_once(weights)
        self._dense = {name for name, recipe in model.recipes.items() if not self._is_places(name, recipe)}

    def of_run(self, run: int, context: Context, doubled: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        """One run's parameters by the module's names. ``doubled``: tensors that every rank adds, to see it found."""

        def places(tensor: str) -> Sequence[Place]:
            if run == NOBODY:
                return []
            if run == REFERENCE:
                return everything(self._weights, tensor)
            once = tensor in self._once and tensor not in doubled
            return [] if once and run > 1 else self._weights.held(tensor, run - 1)

        return {name: self._parameter(name, recipe, places, context) for name, recipe in self._model.recipes.items()}

    def held(self, name: str, rank: int) -> list[torch.Tensor]:
        """For each axis of a parameter, which of its indices a rank holds; biases of row layers included."""
        ones = Context(_Ones(self._weights), torch.float64, torch.device("cpu"))  # type: ignore[arg-type]
        made = self._model.recipes[name].make(self._source(ones, lambda tensor: self._weights.held(tensor, rank)))
        held = [torch.zeros(n, dtype=torch.bool) for n in self._shapes[name]]
        if isinstance(made, BlockTensor):
            for block in made.blocks:
                for axis, run in enumerate(block.box.slices()):
                    held[axis][run] = True
            return held
        lines = ((made != 0).movedim(axis, 0).reshape(len(known), -1) for axis, known in enumerate(held))
        return [line.any(dim=1) for line in lines]

    def _parameter(
        self, name: str, recipe: Recipe, places: Callable[[str], Sequence[Place]], context: Context
    ) -> torch.Tensor:
        source = self._source(context, places)
        dtypes = {TORCH_DTYPES[self._weights.dtype(tensor)] for tensor in recipe.names}
        dtype = context.dtype if any(d.is_floating_point for d in dtypes) else dtypes.pop()
        parameter = BlockTensor.make(self._shapes[name], dtype, context, name)
        parameter.learns = name in self._learning

        def blocks() -> tuple[Block, ...]:
            made = recipe.make(source)
            assert isinstance(made, BlockTensor)
            return made.blocks

        def dense(source: Source = source) -> torch.Tensor:
            made = recipe.make(source)
            return made.dense() if isinstance(made, BlockTensor) else made

        def own() -> torch.Tensor:
            ones = Context(_Ones(self._weights), context.dtype, context.device)  # type: ignore[arg-type]
            return (dense(self._source(ones, places)) != 0).to(context.dtype)

        return parameter.with_dense(dense, own) if name in self._dense else parameter.with_factory(blocks)

    def _source(self, context: Context, places: Callable[[str], Sequence[Place]]) -> Source:
        def source(tensor: str) -> torch.Tensor:
            shape = self._weights.layout(tensor).shape
            stored = self._weights.dtype(tensor)
            if stored not in TORCH_DTYPES:
                raise InconclusiveError(f"{printable(tensor)}: dtype {stored} has no arithmetic here")
            dtype = context.dtype if TORCH_DTYPES[stored].is_floating_point else TORCH_DTYPES[stored]
            axes = tuple(range(len(shape)))
            blocks = [Block(tensor, holder, piece.local, axes, piece.box) for holder, piece in places(tensor)]
            return BlockTensor.make(shape, dtype, context, tensor).with_blocks(blocks)

        return source

    def _is_places(self, name: str, recipe: Recipe) -> bool:
        """Whether a parameter can be told as blocks. Raises InconclusiveError where it has not the module's shape."""
        context = Context(_PlacesOnly(self._weights), torch.float64, torch.device("cpu"))  # type: ignore[arg-type]
        try:
            made: torch.Tensor | None = recipe.make(
                self._source(context, lambda tensor: everything(self._weights, tensor))
            )
        except _ReadError:
            return False
        except InconclusiveError:
            raise
        except Exception as error:
            what = f"{self._model.name}: {name} cannot be made of {printable(recipe.names[0])}: {one_line(error)}"
            raise InconclusiveError(what, hint="is config.json of this model?") from None
        if made is not None and tuple(made.shape) != self._shapes[name]:
            what = (
                f"{self._model.name} wants {name} {list(self._shapes[name])}, the checkpoint gives {list(made.shape)}"
            )
            raise InconclusiveError(what, hint="is config.json of this model?")
        return isinstance(made, BlockTensor)


class _Ones(_PlacesOnly):
    """Ones for numbers: what a converter makes of them shows where a rank's own go."""

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        return torch.ones(box.shape, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- layers and their tasks


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


def find_layers(weights: Weights, model: Model, parameters: Parameters) -> list[Layer]:
    """The layers with tensors from disk, in the module's order."""
    modules = dict(model.skeleton.named_modules())
    tensors = slots(model.skeleton)
    cuts = _cuts(weights, model, parameters)
    found: dict[str, Layer] = {}
    sources: dict[int, str] = {}
    for name in sorted(cuts, key=lambda name: -len(tensors[name].shape)):  # weights before biases
        sources[id(tensors[name])] = name
        _add(found, modules, _layer(weights, name, model.recipes[name], cuts[name]))
    for name, tensor in tensors.items():  # tied twins, which are not on disk
        if layer_of(name) not in found and id(tensor) in sources:
            cut = cuts[sources[id(tensor)]]
            task = _task_of_twin(modules[layer_of(name)], cut)
            _add(found, modules, Layer(layer_of(name), layer_of(name), task, cut))
    order = {path: place for place, path in enumerate(modules)}
    layers = sorted(found.values(), key=lambda layer: order[layer.path])
    return [_with_cuts_beside(layer, layers) if layer.task == "gather input" else layer for layer in layers]


def _with_cuts_beside(layer: Layer, layers: Sequence[Layer]) -> Layer:
    block = layer_of(layer.path)
    rows = (other.cut for other in layers if other.task == "row" and layer_of(other.path) == block)
    return replace(layer, beside=tuple(cut for cut in rows if cut))


def _layer(weights: Weights, parameter: str, recipe: Recipe, cut: Cut | None) -> Layer:
    role = weights.role(recipe.names[0])
    task: Task = "whole"
    if role.gather == "input":
        task = "gather input"
    elif cut is not None and role.rule == "row":
        task = "row"
    elif cut is not None and role.rule == "column":
        task = "gather" if role.gather else "column"
    return Layer(layer_of(parameter), layer_of(recipe.names[0]), task, cut)


def _task_of_twin(module: nn.Module, cut: Cut | None) -> Task:
    """A twin that is only tied to a tensor on disk: which side of its own layer is cut tells what to do."""
    if cut is None:
        return "whole"
    in_axis = 0 if isinstance(module, nn.Embedding) or is_conv1d(module) else 1
    return "row" if cut.axis == in_axis else "gather"


def _add(found: dict[str, Layer], modules: Mapping[str, nn.Module], layer: Layer) -> None:
    """One layer for each module: the row rule of its weight before what its bias says. A raw parameter of a block
    tells nothing of the block's output."""
    if layer.task in ("column", "gather") and modules[layer.path]._modules:
        layer = Layer(layer.path, layer.name, "whole", None)
    known = found.get(layer.path)
    if known is None or (known.task == "whole" and layer.task != "whole") or layer.task == "row":
        found[layer.path] = layer


def _cuts(weights: Weights, model: Model, parameters: Parameters) -> dict[str, Cut | None]:
    """Every parameter's cut; parameters of one name, but for their layer's number, and of equal layouts share it."""
    known: dict[object, Cut | None] = {}
    found = {}
    for name, recipe in model.recipes.items():
        key = re.sub(r"\d+", "*", name), tuple(weights.layout(tensor) for tensor in recipe.names)
        if key not in known:
            known[key] = _cut_of(weights, name, recipe, parameters)
        found[name] = known[key]
    return found


def _cut_of(weights: Weights, name: str, recipe: Recipe, parameters: Parameters) -> Cut | None:
    """The axis along which the ranks hold different parts of a parameter, if there is one."""
    if all(weights.layout(tensor).is_replicated for tensor in recipe.names):
        return None
    held = [parameters.held(name, rank) for rank in range(weights.ranks)]
    for axis in range(len(held[0])):
        if all(bool(rows[axis].all()) for rows in held):
            continue
        taken = torch.zeros_like(held[0][axis])
        first = []
        for rows in held:
            first.append((rows[axis] & ~taken).nonzero().flatten())
            taken |= rows[axis]
        return Cut(axis, tuple(rows[axis].nonzero().flatten() for rows in held), tuple(first))
    return None
