"""A policy for a Keras model, derived from its layers: Keras' names say nothing of what a layer is for.

Dense layers and convolutions go in pairs where one leads to the other: the first column, the next row, with nothing
between but what works on each feature alone. A recurrent layer is cut by its units, each gate alike, and meets after
every step; whoever takes its output finds it whole, unless that is the row of a pair. Attention is cut by heads, an
embedding by words. What stands alone is cut by its outputs, which are gathered, or, where it is small, not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tpshard.errors import InputError, printable
from tpshard.keras_graph import Graph, Node, Ref, graph_of, is_model, refs_in
from tpshard.keras_names import MAX_NESTED

SMALL = 64  # output features: to cut so few gains nothing
RECURRENT = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}  # gates
CONVOLUTIONS = {"Conv1D": ".io", "Conv2D": "..io", "Conv3D": "...io"}
# What works on each feature alone, so that a rank may go on with its own.
EACH_ALONE = frozenset({
    "Activation", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "ReLU",
    "LeakyReLU", "ELU", "Identity", "ActivityRegularization", "MaxPooling1D", "MaxPooling2D", "AveragePooling1D",
    "AveragePooling2D", "GlobalMaxPooling1D", "GlobalAveragePooling1D", "GlobalMaxPooling2D", "GlobalAveragePooling2D",
})  # fmt: skip
ELEMENTWISE = frozenset({
    "linear", "relu", "relu6", "sigmoid", "tanh", "gelu", "silu", "swish", "elu", "selu", "softplus", "softsign",
    "exponential", "hard_sigmoid", "hard_silu", "leaky_relu", "mish", None,
})  # fmt: skip

Rule = dict[str, Any] | str


def keras_policy(config: Mapping[str, Any]) -> list[object]:
    """The documents of a policy for a Keras model's configuration, those for layers inside of others first. Raises
    InputError where the configuration is malformed."""
    try:
        rules = dict(_rules(config, ()))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__} {printable(str(error))}"
        raise InputError(f"the Keras model's configuration is malformed: {what}") from None
    depths = sorted({path.count("\0") for path in rules}, reverse=True)
    documents: list[object] = []
    for depth in depths:
        own = {_pattern(path): rule for path, rule in rules.items() if path.count("\0") == depth}
        documents.append({"name": f"keras-{depth + 1}", "rules": own})
    first = {"name": "keras-auto", "description": "derived from the Keras model's layers", "rules": {}}
    return [first, *documents, {"name": "keras-rest", "default": "replicate", "rules": {}}]


def _pattern(path: str) -> str:
    return re.sub(r"[*{},\s]", "*", path.replace("\0", "."))


def _rules(config: Mapping[str, Any], around: tuple[str, ...]) -> Iterator[tuple[str, Rule]]:
    """Rules by the paths of layers, segments apart by NUL."""
    if len(around) > MAX_NESTED:
        return
    graph = graph_of(config)
    rows = _pairs(graph)
    firsts = set(rows.values())
    for node in graph.nodes.values():
        path = (*around, node.name)
        if is_model(node.config):
            yield from _rules(node.config, path)
            continue
        role = "row" if node.name in rows else "column" if node.name in firsts else "alone"
        for inner, rule in _of_layer(node, role):
            yield "\0".join((*path, *inner)), rule


def _of_layer(node: Node, role: str) -> Iterator[tuple[tuple[str, ...], Rule]]:
    """The rules of one layer: paths inside it, none for itself."""
    kind, settings, inside = _plain(node)
    if kind in RECURRENT and _is_cuttable(kind, settings):
        yield inside, _recurrent(kind, gather=role != "column")
    elif kind == "Bidirectional":
        ahead = settings["layer"]
        name = str(ahead["config"]["name"]).removeprefix("forward_")
        back = settings.get("backward_layer")
        names = (f"forward_{name}", str(back["config"]["name"]) if back else f"backward_{name}")
        for own, inner in zip(names, (ahead, back or ahead), strict=True):
            if inner["class_name"] in RECURRENT and _is_cuttable(inner["class_name"], inner["config"]):
                yield (own,), _recurrent(inner["class_name"], gather=True)
    elif kind == "Embedding":
        yield inside, {"rule": "row", "dims": "io"}
    elif kind == "MultiHeadAttention":
        heads = {"rule": "column", "dims": "io.", "heads": settings["num_heads"]}
        yield from (((name,), heads) for name in ("query", "key", "value"))
        yield ("attention_output",), {"rule": "row", "dims": "i.o", "heads": settings["num_heads"]}
    elif dims := _dims(kind, settings):
        if role == "row":
            yield inside, {"rule": "row", "dims": dims}
        elif role == "column":
            yield inside, {"rule": "column", "dims": dims}
        elif _features(settings) >= SMALL:
            yield inside, {"rule": "column", "dims": dims, "gather": True}


def _plain(node: Node) -> tuple[str, Mapping[str, Any], tuple[str, ...]]:
    """A layer's kind, settings and path inside; of a layer at each step, the one that it applies."""
    inner = node.settings.get("layer")
    if node.kind == "TimeDistributed" and isinstance(inner, Mapping) and inner.get("class_name") == "Dense":
        return "Dense", inner["config"], (inner["config"]["name"],)
    return node.kind, node.settings, ()


def _recurrent(kind: str, gather: bool) -> Rule:
    rule: dict[str, Any] = {"rule": "column", "dims": "io", "parts": RECURRENT[kind]}
    return {**rule, "gather": True} if gather else rule


def _is_cuttable(kind: str, settings: Mapping[str, Any]) -> bool:
    """A GRU that resets before its product would have to meet twice in every step."""
    return kind != "GRU" or settings.get("reset_after", True) is True


def _dims(kind: str, settings: Mapping[str, Any]) -> str:
    """The axes of the kernel of a layer that may be a column or a row; empty for others."""
    if kind == "Dense":
        return "io"
    last = settings.get("data_format", "channels_last") != "channels_first" and settings.get("groups", 1) == 1
    return CONVOLUTIONS.get(kind, "") if last else ""


def _features(settings: Mapping[str, Any]) -> int:
    count = settings.get("units", settings.get("filters"))
    return count if isinstance(count, int) else 0


def _pairs(graph: Graph) -> dict[str, str]:
    """The rows of a model, each with its column."""
    found: dict[str, str] = {}
    for node in graph.nodes.values():
        if node.name not in found and _may_be_column(node):
            row = _row_after(graph, node)
            if row is not None:
                found[row] = node.name
    return found


def _may_be_column(node: Node) -> bool:
    kind, settings, _ = _plain(node)
    if kind in RECURRENT:  # the last state is the rank's own units as well
        return _is_cuttable(kind, settings) and not settings.get("return_state") and len(node.calls) == 1
    return bool(_dims(kind, settings)) and _is_elementwise(settings) and len(node.calls) == 1


def _is_elementwise(settings: Mapping[str, Any]) -> bool:
    activation = settings.get("activation")
    return (activation is None or isinstance(activation, str)) and activation in ELEMENTWISE


def _row_after(graph: Graph, column: Node) -> str | None:
    """The layer that takes a column's output, if it is the only one, with what works on each feature between."""
    node = column
    for _ in range(len(graph.nodes)):
        ref = Ref(node.name)
        consumers = graph.consumers(ref)
        if len(consumers) != 1 or ref in refs_in(graph.outputs):
            return None
        node, call = consumers[0]
        if len(node.calls) != 1 or call.refs() != [ref]:
            return None
        kind, settings, _ = _plain(node)
        if _dims(kind, settings):
            return node.name
        if kind not in EACH_ALONE or not _is_elementwise(settings) or "channels_first" in settings.values():
            return None
    return None
