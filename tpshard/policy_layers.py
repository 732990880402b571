"""A checkpoint's tensors as layers: those that differ in numbers alone made one, with what is known of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tpshard.layout import Shape
from tpshard.patterns import Pattern
from tpshard.policy_names import is_words


@dataclass(frozen=True, slots=True)
class Layer:
    """Tensors whose names differ in numbers alone; ``path`` has ``*`` for these. ``shapes``: by the last word of a
    name, of the first such layer; empty word for a raw parameter. Where they are known, ``module`` is its
    class's name and ``style`` transformers' word for how it is cut."""

    path: str
    shapes: Mapping[str, Shape]
    module: str = ""
    style: str = ""

    @property
    def weight(self) -> Shape:
        """The shape of what has the most axes."""
        return max(self.shapes.values(), key=len)

    @property
    def is_raw(self) -> bool:
        return "" in self.shapes

    @property
    def is_table(self) -> bool:
        return self.module == "Embedding" or (not self.module and is_words(self.path) and len(self.weight) == 2)

    @property
    def turned(self) -> bool:
        """Whether the weight is [in, out], by its class or by the length of its bias."""
        if self.module:
            return self.module == "Conv1D"
        bias = self.shapes.get("bias", ())
        return len(self.weight) == 2 and len(bias) == 1 and bias[0] == self.weight[1] != self.weight[0]

    @property
    def matrix(self) -> Shape:
        """The weight's axes but for those of length one at its end: a convolution of a single cell is a matrix."""
        shape = self.weight
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        return shape

    @property
    def sizes(self) -> tuple[int, int]:
        """Out and in of a matrix; of a stack of them, the last two axes as they are."""
        rows, columns = self.matrix[-2:]
        return (columns, rows) if self.turned else (rows, columns)


def layers_by_tensor(shapes: Mapping[str, Shape], modules: Mapping[str, str]) -> dict[str, str]:
    """Each tensor's layer, or its own name where it belongs to none; ``*`` for what counts layers."""
    literal = _of_sequences(shapes, modules)
    with_weight = {name.rpartition(".")[0] for name in shapes if name.endswith(".weight")}
    owners = {name: name.rpartition(".")[0] for name in shapes}
    return {name: starred_path(owner if owner in with_weight else name, literal) for name, owner in owners.items()}


def layers_of(
    shapes: Mapping[str, Shape], layer_of: Mapping[str, str], modules: Mapping[str, str], plan: Mapping[str, str]
) -> Iterator[Layer]:
    """All tensors, those that differ in numbers alone made one."""
    found: dict[str, dict[str, Shape]] = {}
    classes: dict[str, str] = {}
    for name, shape in shapes.items():
        path = layer_of[name]
        raw = name.count(".") == path.count(".")
        found.setdefault(path, {}).setdefault("" if raw else name.rpartition(".")[2], shape)
        owner = name if raw else name.rpartition(".")[0]
        if owner in modules:
            classes.setdefault(path, modules[owner])
    for path, tensors in found.items():
        style = next((style for pattern, style in plan.items() if Pattern(tuple(pattern.split("."))).matches(path)), "")
        yield Layer(path, tensors, classes.get(path, ""), style)


def _of_sequences(shapes: Mapping[str, Shape], modules: Mapping[str, str]) -> frozenset[str]:
    """The paths of sequences: lists of plain layers that are not alike (``ffn.0`` up, ``ffn.2`` down), whose numbers
    are names."""
    alike: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        above, _, number = layer.rpartition(".")
        if leaf == "weight" and number.isdigit():
            alike.setdefault(above, {})[number] = shape
    return frozenset(
        above
        for above, found in alike.items()
        if modules.get(above) == "Sequential" or (above not in modules and len(set(found.values())) > 1)
    )


def starred_path(path: str, literal: frozenset[str] = frozenset()) -> str:
    """``*`` for the numbers in a path, but for those of sequences."""
    parts = path.split(".")
    return ".".join(
        "*" if part.isdigit() and ".".join(parts[:place]) not in literal else part for place, part in enumerate(parts)
    )


def place_of(path: str) -> tuple[str, str]:
    """The numbered container of a layer, and the first word below it where more follow."""
    parts = path.split(".")
    last = max((place for place, part in enumerate(parts) if part == "*"), default=-1)
    if last == len(parts) - 1:  # a list of plain layers
        last = max((place for place, part in enumerate(parts[:-1]) if part == "*"), default=-1)
    below = parts[last + 1 :]
    return ".".join(parts[: last + 1]), below[0] if len(below) > 1 else ""
