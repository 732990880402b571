"""A Keras model as a torch module, built from its configuration, so that verify runs it without Keras.

Sequential and Functional models of known layers. Parameters are made of the tensors as Keras stores them; what the
model computes is what Keras computes when it infers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError, InputError, printable
from tpshard.keras_graph import Call, Graph, Node, Ref, graph_of, is_model, refs_in
from tpshard.keras_names import layers_of
from tpshard.layout import Shape
from tpshard.verify.keras_layers import Attention, Convolution, Dense, Embedding, Function, Making, Normalisation
from tpshard.verify.keras_plain import PLAIN
from tpshard.verify.keras_recurrent import GATES, Bidirectional, Recurrent
from tpshard.verify.models import Recipe, without_parameters

MADE: Mapping[str, Callable[[Making], nn.Module]] = {
    "Dense": Dense,
    "Embedding": Embedding,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), Convolution),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "BatchNormalization"), Normalisation),
    "MultiHeadAttention": Attention,
    "Bidirectional": Bidirectional,
    **dict.fromkeys(GATES, Recurrent),
}
OF_TRAINING = ("training",)
OPEN = 9  # length of an axis that the model leaves open
SEQUENCES = 2


def is_keras(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type", "")).startswith("keras_")


class KerasModel:
    """Raises InconclusiveError where a layer is not known, or the checkpoint is of another model."""

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        if config.get("model_type") == "keras_custom":
            what = f"{printable(str(config.get('class_name')))} has code of its own, which is never run"
            raise InconclusiveError(what, hint="name the model with --model")
        self.name = f"the {config['class_name']} model"
        self._config, self._dtype = config, dtype
        recipes: dict[str, Recipe] = {}
        try:
            self._graph = graph_of(config)
            with without_parameters():
                module = Layers(self._graph, "", shapes, recipes)
        except InputError as error:
            raise InconclusiveError(error.message, hint=error.hint) from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__} {printable(str(error))}"
            raise InconclusiveError(f"the model's configuration cannot be built: {what}") from None
        self.skeleton: nn.Module = module.to(dtype).eval()
        self.recipes = recipes
        used = {name for recipe in recipes.values() for name in recipe.names}
        self.unused = tuple(name for name in shapes if name not in used)
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """An optimizer's variables and seeds are no part of what the model computes; all others have to be."""
        known = ("optimizer.", "copy", "seed_generator", "save_counter")
        others = [name for name in self.unused if not name.startswith(known) and "seed_generator" not in name]
        if others:
            what = f"the model's configuration has no place for {printable(others[0])}"
            raise InconclusiveError(f"{what} ({len(others)} such tensors)", hint="is it of this model?")

    def inputs(self, ranks: int, seed: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(seed)
        return {"": tuple(self._input(ref, ranks, random) for ref in self._graph.inputs)}

    def _input(self, ref: Ref, ranks: int, random: torch.Generator) -> torch.Tensor:
        node = self._graph.nodes[ref.layer]
        given = node.settings.get("batch_shape") or node.settings.get("batch_input_shape")
        if not given or node.settings.get("sparse") or node.settings.get("ragged"):
            what = f"{printable(node.name)} does not say what shape it has"
            raise InconclusiveError(what, hint="save the model built, or name it with --model")
        batch, *rest = given
        words = self._words(ref)
        shape = [batch or SEQUENCES, *(size or OPEN for size in rest)]
        if words:
            shape[0] = batch or max(SEQUENCES, -(-4 * ranks // max(1, math.prod(shape[1:]))))
            count = math.prod(shape)
            strata = torch.arange(count, dtype=torch.float64) + torch.rand(count, generator=random, dtype=torch.float64)
            tokens = (strata * (words / count)).long()[torch.randperm(count, generator=random)]
            return tokens.clamp(1, words - 1).reshape(shape)  # 0 may be a mask
        if "int" in str(node.settings.get("dtype")):
            return torch.randint(0, 2, shape, generator=random)
        return torch.randn(shape, generator=random, dtype=torch.float64).to(self._dtype)

    def _words(self, ref: Ref) -> int:
        """How many words a table has that an input goes to; 0 where it goes to none."""
        nodes = [node for node, _ in self._graph.consumers(ref)]
        sizes = [node.settings["input_dim"] for node in nodes if node.kind == "Embedding"]
        if not sizes and any(is_model(node.config) for node in nodes):
            inner = [layer for layer in layers_of(self._config) if layer.kind == "Embedding"]
            whole = "int" in str(self._graph.nodes[ref.layer].settings.get("dtype"))
            sizes = [layer.settings["input_dim"] for layer in inner if whole]
        return min(sizes, default=0)


class Layers(nn.Module):
    """A model's layers, and in which order each is called with what."""

    def __init__(self, graph: Graph, path: str, shapes: Mapping[str, Shape], recipes: dict[str, Recipe]) -> None:
        super().__init__()
        self.graph = graph
        self.keys: dict[str, str] = {}
        self.steps = nn.ModuleDict()
        for node in graph.nodes.values():
            if node.kind == "InputLayer":
                continue
            key = self.keys[node.name] = f"{len(self.keys)}_{re.sub(r'[^A-Za-z0-9_]', '_', node.name)}"
            own: dict[str, Recipe] = {}
            self.steps[key] = _layer(node, f"{path}{node.name}", shapes, own)
            recipes.update({f"steps.{key}.{leaf}": recipe for leaf, recipe in own.items()})
        self.calls = _in_order(graph)

    def forward(self, *inputs: Any) -> Any:
        flat = list(inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], list | tuple) else list(inputs)
        values: dict[Ref, Any] = dict(zip(self.graph.inputs, flat, strict=True))
        for node, number, call in self.calls:
            args = [_with(values, item) for item in call.inputs]
            out = self.steps[self.keys[node.name]](*args, **_named(node, call, values))
            for place, tensor in enumerate(out if isinstance(out, tuple | list) else [out]):
                values[Ref(node.name, number, place)] = tensor
        out = _with(values, self.graph.outputs)
        return out[0] if isinstance(out, list) and len(out) == 1 else out


def _layer(node: Node, path: str, shapes: Mapping[str, Shape], recipes: dict[str, Recipe]) -> nn.Module:
    if is_model(node.config):
        return Layers(graph_of(node.config), f"{path}.", shapes, recipes)
    making = Making(path, node.kind, node.settings, shapes, recipes)
    inner = node.settings.get("layer")
    if node.kind == "TimeDistributed" and isinstance(inner, Mapping) and inner["class_name"] == "Dense":
        name = inner["config"]["name"]
        making = Making(f"{path}.{name}", "Dense", inner["config"], shapes, recipes)
    if making.kind in PLAIN:
        return Function(PLAIN[making.kind](making))
    if making.kind not in MADE:
        raise making.refuse("")
    return MADE[making.kind](making)


def _in_order(graph: Graph) -> list[tuple[Node, int, Call]]:
    """Every call after those that it takes something from."""
    known = {(ref.layer, ref.call) for ref in graph.inputs}
    waiting = [(node, number, call) for node in graph.nodes.values() for number, call in enumerate(node.calls)]
    waiting = [item for item in waiting if item[0].kind != "InputLayer"]
    found: list[tuple[Node, int, Call]] = []
    while waiting:
        ready, later = [], []
        for item in waiting:
            if all((ref.layer, ref.call) in known for ref in item[2].refs()):
                ready.append(item)
                known.add((item[0].name, item[1]))
            else:
                later.append(item)
        if not ready:
            raise InputError(f"the model's layers wait for one another, {printable(later[0][0].name)} among them")
        found, waiting = found + ready, later
    return found


def _with(values: Mapping[Ref, Any], item: Any) -> Any:
    """The same with tensors for Refs."""
    if isinstance(item, Ref):
        return values[item]
    if isinstance(item, Mapping):
        return {key: _with(values, inner) for key, inner in item.items()}
    return [_with(values, inner) for inner in item] if isinstance(item, list | tuple) else item


def _named(node: Node, call: Call, values: Mapping[Ref, Any]) -> dict[str, Any]:
    """A call's keywords; those that say nothing, or only speak of training, are left out."""
    named = {key: item for key, item in call.named.items() if item not in (None, False) and key not in OF_TRAINING}
    allowed = ("value", "key", "use_causal_mask") if node.kind == "MultiHeadAttention" else ()
    for key, item in named.items():
        if key not in allowed and not (key == "initial_state" and node.kind in GATES):
            masked = " (a mask)" if any(True for _ in refs_in(item)) else ""
            what = f"{printable(node.name)}: {node.kind} called with {printable(key)}{masked} is not known here"
            raise InconclusiveError(what, hint="name the model with --model")
    return {key: _with(values, item) for key, item in named.items()}
