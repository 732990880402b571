"""A Keras model's layers and what each is called with, from its configuration: Sequential and Functional, as Keras 3
and Keras 2 write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tpshard.errors import InputError, printable
from tpshard.keras_names import MAX_NESTED

MAX_LAYERS = 100_000


class Ref(NamedTuple):
    """A tensor: the ``tensor``-th that a layer's ``call``-th call returns."""

    layer: str
    call: int = 0
    tensor: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """``inputs`` and ``named``: values with Refs in them, in lists and tables."""

    inputs: tuple[Any, ...]
    named: Mapping[str, Any]

    def refs(self) -> list[Ref]:
        return list(refs_in((self.inputs, self.named)))


@dataclass(frozen=True, slots=True)
class Node:
    """A layer, and its calls in this model. ``config``: with its class, as the configuration has it."""

    kind: str
    name: str
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """``outputs``: what the model returns, Refs in lists and tables."""

    nodes: Mapping[str, Node]
    inputs: tuple[Ref, ...]
    outputs: Any

    def consumers(self, ref: Ref) -> list[tuple[Node, Call]]:
        return [(node, call) for node in self.nodes.values() for call in node.calls if ref in call.refs()]


def refs_in(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from refs_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from refs_in(item)


def is_model(config: Mapping[str, Any]) -> bool:
    """Whether a layer is a model with layers of its own."""
    settings = config.get("config")
    return isinstance(settings, Mapping) and isinstance(settings.get("layers"), list)


def graph_of(config: Mapping[str, Any]) -> Graph:
    """The graph of a Sequential or Functional model. Raises InputError where the configuration is malformed."""
    name = printable(str(config.get("class_name")))
    if not is_model(config):
        raise InputError(f"the configuration of {name} lists no layers")
    try:
        if len(config["config"]["layers"]) > MAX_LAYERS:
            raise InputError(f"{name} has more than {MAX_LAYERS} layers")
        sequential = config.get("class_name") == "Sequential"
        graph = _sequential(config) if sequential else _functional(config["config"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__} {printable(str(error))}"
        raise InputError(f"the configuration of {name} is malformed: {what}") from None
    missing = [ref for node in graph.nodes.values() for call in node.calls for ref in call.refs()]
    missing = [ref for ref in (*missing, *refs_in(graph.outputs)) if ref.layer not in graph.nodes]
    if missing:
        raise InputError(f"the configuration of {name} has no layer {printable(missing[0].layer)}, which it uses")
    return graph


def _node(config: Mapping[str, Any], calls: Sequence[Call]) -> Node:
    settings = config["config"]
    name = settings.get("name", config.get("name"))
    if not isinstance(name, str) or not isinstance(config["class_name"], str):
        raise ValueError("a layer has no name or no class")
    return Node(config["class_name"], name, settings, config, tuple(calls))


def _sequential(config: Mapping[str, Any]) -> Graph:
    settings = config["config"]
    layers = list(settings["layers"])
    if not layers or layers[0]["class_name"] != "InputLayer":
        first = layers[0]["config"] if layers else {}
        shape = settings.get("build_input_shape") or first.get("batch_input_shape")
        entry = {"name": "the model's input", "batch_shape": shape, "dtype": "float32"}
        layers.insert(0, {"class_name": "InputLayer", "config": entry})
    nodes: dict[str, Node] = {}
    before: Ref | None = None
    for layer in layers:
        node = _node(layer, [Call((before,), {})] if before else [])
        if node.name in nodes:
            raise ValueError(f"two layers are called {node.name}")
        nodes[node.name] = node
        before = Ref(node.name)
    first_ref = Ref(next(iter(nodes)))
    return Graph(nodes, (first_ref,), before)


def _functional(settings: Mapping[str, Any]) -> Graph:
    nodes: dict[str, Node] = {}
    for layer in settings["layers"]:
        node = _node(layer, [_call(inbound) for inbound in layer.get("inbound_nodes", ())])
        nodes[node.name] = node
    inputs = tuple(refs_in(_refs(settings["input_layers"])))
    return Graph(nodes, inputs, _refs(settings["output_layers"]))


def _refs(value: Any) -> Any:
    """``[name, call, tensor]`` as Refs, wherever they are in lists and tables."""
    if isinstance(value, Mapping):
        return {key: _refs(item) for key, item in value.items()}
    if _is_ref(value):
        return Ref(value[0], int(value[1]), int(value[2]))
    if isinstance(value, list):
        return [_refs(item) for item in value]
    raise ValueError(f"{value!r} names no tensor")


def _is_ref(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 3 and isinstance(value[0], str) and isinstance(value[1], int)


def _call(inbound: Any) -> Call:
    if isinstance(inbound, Mapping):  # Keras 3
        return Call(tuple(_value(item) for item in inbound["args"]), _value(inbound.get("kwargs", {})))
    refs = [Ref(item[0], int(item[1]), int(item[2])) for item in inbound]
    named = {key: value for item in inbound if len(item) > 3 for key, value in item[3].items()}
    named = {key: Ref(*value[:3]) if _is_ref(value) else value for key, value in named.items()}
    return Call((refs if len(refs) > 1 else refs[0],), named)


def _value(value: Any, depth: int = 0) -> Any:
    """A value of a call, its Keras tensors as Refs."""
    if depth > MAX_NESTED:
        raise ValueError("a call's values are nested too deeply")
    if isinstance(value, Mapping):
        if value.get("class_name") == "__keras_tensor__":
            name, call, tensor = value["config"]["keras_history"]
            return Ref(str(name), int(call), int(tensor))
        return {key: _value(item, depth + 1) for key, item in value.items()}
    return [_value(item, depth + 1) for item in value] if isinstance(value, list) else value
