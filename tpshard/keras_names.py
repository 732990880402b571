"""What a variable of a Keras model is called here: Keras' own path, ``lstm/lstm_cell/kernel``, without the model's
name and the cell's, with dots: ``lstm.kernel``.

The three file formats say it in three ways. ``.weights.h5`` has neither variables' names nor, in old files, layers':
there the model's configuration helps, and else what a layer's variables look like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpshard.layout import Shape

CELL = re.compile(r"(lstm|gru|simple_rnn)_cell(_\d+)?")
SEVERAL = re.compile(r"stacked_rnn_cells(_\d+)?")
MAX_NESTED = 64  # models in models, on hostile input

_RECURRENT = ("kernel", "recurrent_kernel", "bias")
_PLAIN = ("kernel", "bias")
# In the order in which Keras saves them: those that are trained, then the others.
_VARIABLES: Mapping[str, tuple[str, ...]] = {
    "Embedding": ("embeddings",),
    "LSTM": _RECURRENT, "GRU": _RECURRENT, "SimpleRNN": _RECURRENT,
    "LSTMCell": _RECURRENT, "GRUCell": _RECURRENT, "SimpleRNNCell": _RECURRENT,
    "Dense": _PLAIN, "EinsumDense": _PLAIN,
    "Conv1D": _PLAIN, "Conv2D": _PLAIN, "Conv3D": _PLAIN,
    "Conv1DTranspose": _PLAIN, "Conv2DTranspose": _PLAIN, "Conv3DTranspose": _PLAIN,
    "DepthwiseConv1D": _PLAIN, "DepthwiseConv2D": _PLAIN,
    "SeparableConv1D": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "SeparableConv2D": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "LayerNormalization": ("gamma", "beta"), "GroupNormalization": ("gamma", "beta"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "PReLU": ("alpha",),
    "Normalization": ("mean", "variance", "count"),
}  # fmt: skip
_SWITCHES = {"gamma": "scale", "beta": "center", "bias": "use_bias"}
FRAMEWORK = ("Sequential", "Functional", "Model")


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One layer of a model's configuration; ``path``: the names of the layers around it, and its own."""

    kind: str
    path: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path[-1]


def model_type(config: Mapping[str, Any]) -> str | None:
    """What kind of Keras model a configuration is of; None where it is of none.

    >>> model_type({"module": "keras", "class_name": "Sequential", "config": {}})
    'keras_sequential'
    """
    kind = config.get("class_name")
    if not isinstance(kind, str) or not isinstance(config.get("config"), Mapping):
        return None
    return f"keras_{'functional' if kind == 'Model' else kind.lower()}" if kind in FRAMEWORK else "keras_custom"


def with_model_type(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with a key by which policies are picked, as Hugging Face's have one; others as they are."""
    found = None if "model_type" in config else model_type(config)
    return {"model_type": found, **config} if found else config


def layers_of(config: Mapping[str, Any], around: tuple[str, ...] = ()) -> Iterator[LayerConfig]:
    """Every layer of a model, with those inside of others after them, in the configuration's order."""
    settings = config.get("config")
    if not isinstance(settings, Mapping) or len(around) > MAX_NESTED:
        return
    for layer in _listed(settings.get("layers")):
        yield from _with_inner(layer, around)


def _with_inner(layer: Mapping[str, Any], around: tuple[str, ...]) -> Iterator[LayerConfig]:
    settings, kind = layer.get("config"), layer.get("class_name")
    if not isinstance(settings, Mapping) or not isinstance(kind, str) or len(around) > MAX_NESTED:
        return
    name = settings.get("name", layer.get("name"))
    path = (*around, str(name))
    yield LayerConfig(kind, path, settings)
    if "layers" in settings:
        yield from layers_of(layer, path)
    for key in ("layer", "backward_layer", "cell"):
        if isinstance(settings.get(key), Mapping):
            yield from _with_inner(settings[key], path)
    for cell in _listed(settings.get("cells")):
        yield from _with_inner(cell, path)


def _listed(value: object) -> Sequence[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, Sequence) else []


def snake(kind: str) -> str:
    """A class's name as Keras writes it in paths.

    >>> snake("Conv1D"), snake("LSTM"), snake("LayerNormalization"), snake("TFOpLambda")
    ('conv1d', 'lstm', 'layer_normalization', 'tf_op_lambda')
    """
    name = re.sub(r"\W+", "", kind)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def variable_names(kind: str | None, settings: Mapping[str, Any], shapes: Sequence[Shape]) -> list[str]:
    """The names of a layer's variables, which have these shapes, in the order in which they are saved; numbers where
    nothing is known.

    >>> variable_names("BatchNormalization", {"scale": False}, [(9,), (9,), (9,)])
    ['beta', 'moving_mean', 'moving_variance']
    >>> variable_names(None, {}, [(4, 3), (3,)])
    ['kernel', 'bias']
    """
    wanted = [name for name in _VARIABLES.get(kind or "", ()) if settings.get(_SWITCHES.get(name, ""), True)]
    if len(wanted) == len(shapes):
        return wanted
    lengths = [len(shape) for shape in shapes]
    if lengths == [1, 1, 1, 1]:
        return list(_VARIABLES["BatchNormalization"])
    if lengths == [1, 1]:
        return ["gamma", "beta"]
    if len(lengths) in (2, 3) and lengths[:2] == [2, 2] and shapes[0][1] == shapes[1][1]:
        return list(_RECURRENT[: len(lengths)])
    if lengths and lengths[0] >= 2 and len(lengths) in (1, 2) and lengths[0] > lengths[-1] * (len(lengths) - 1):
        return list(_PLAIN[: len(lengths)])
    return [str(number) for number in range(len(shapes))]


def logical_name(segments: Sequence[str]) -> str:
    """Of the path of a variable, the layer's name first; the cell of a recurrent layer is the layer itself.

    >>> logical_name(["bi", "forward_gru", "gru_cell", "kernel"])
    'bi.forward_gru.kernel'
    >>> logical_name(["rnn", "stacked_rnn_cells", "gru_cell", "bias"])
    'rnn.stacked_rnn_cells.gru_cell.bias'
    """
    kept = [
        segment
        for number, segment in enumerate(segments)
        if not (number and CELL.fullmatch(segment)) or SEVERAL.fullmatch(segments[number - 1])
    ]
    return ".".join(kept)


def from_layer(path: str, layer: str) -> list[str]:
    """The segments of a variable's whole path from its layer on: the model's name before it says nothing.

    >>> from_layer("sequential/lstm/lstm_cell/kernel", "lstm")
    ['lstm', 'lstm_cell', 'kernel']
    """
    segments = path.removesuffix(":0").split("/")
    return segments[segments.index(layer) :] if layer in segments[:-1] else [layer, *segments]


def slot_names(names: Mapping[str, str], paths: Sequence[str]) -> list[str]:
    """What an optimizer's variables are called: those that belong to one of the model's after it, so that they are
    cut as it is. ``names``: of the model's variables, by their paths.

    >>> slot_names({"m/dense/kernel": "dense.kernel"}, ["adam/iteration", "adam/m_dense_kernel_velocity"])
    ['optimizer.iteration', 'optimizer.velocity.dense.kernel']
    """
    flat = {path.removesuffix(":0").replace("/", "_"): name for path, name in names.items()}
    longest = sorted(flat, key=len, reverse=True)
    found = []
    for path in paths:
        own = path.removesuffix(":0").partition("/")[2] or path
        owner = next((known for known in longest if own.startswith(f"{known}_")), None)
        found.append(f"optimizer.{own[len(owner) + 1 :]}.{flat[owner]}" if owner else f"optimizer.{own}")
    return [name.replace("/", ".") for name in found]


def numbered_slots(shapes: Sequence[Shape], trained: Mapping[str, Shape]) -> list[str]:
    """The same where an optimizer's variables have numbers only: after iteration and learning rate come, for each
    trained variable, as many of its shape. Where the shapes do not say so, numbers.

    >>> numbered_slots([(), (), (4, 3), (4, 3)], {"dense.kernel": (4, 3)})
    ['optimizer.0', 'optimizer.1', 'optimizer.slot_0.dense.kernel', 'optimizer.slot_1.dense.kernel']
    """
    plain, rest = shapes[:2], list(shapes[2:])
    count = len(rest) // len(trained) if trained else 0
    if count and rest == [shape for shape in trained.values() for _ in range(count)]:
        slots = [f"optimizer.slot_{slot}.{name}" for name in trained for slot in range(count)]
        return [f"optimizer.{number}" for number in range(len(plain))] + slots
    return [f"optimizer.{number}" for number in range(len(shapes))]


def unique(names: Sequence[str]) -> list[str]:
    """The same names, a second one of a kind after ``copy.``: a pattern of a policy meets it as it meets the first.

    >>> unique(["dense.bias", "dense.bias", "dense.bias"])
    ['dense.bias', 'copy.dense.bias', 'copy_2.dense.bias']
    """
    seen: dict[str, int] = {}
    made = []
    for name in names:
        count = seen[name] = seen.get(name, 0) + 1
        made.append(name if count == 1 else f"copy.{name}" if count == 2 else f"copy_{count - 1}.{name}")
    return made
