"""Which pipeline stage holds which tensor: layers in runs, the embedding first, norm and head last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from tpshard.document import Mark
from tpshard.errors import PolicyError, UsageError, printable
from tpshard.patterns import Pattern

STAGE_KEYS = ("layers", "first", "last", "every", "tied")


@dataclass(frozen=True, slots=True)
class Stages:
    """A policy's ``stages``: the path before a layer's number, and what goes with the first, the last, or all stages.

    ``tied``: what the last stage needs as well where no tensor meets ``head``, its twin.
    """

    mark: Mark
    layers: tuple[Pattern, ...]
    first: tuple[Pattern, ...] = ()
    last: tuple[Pattern, ...] = ()
    every: tuple[Pattern, ...] = ()
    tied: tuple[Pattern, ...] = ()
    head: tuple[Pattern, ...] = ()

    def layer(self, tensor: str) -> int | None:
        """The number of the tensor's layer."""
        parts = tensor.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal() and _meets(self.layers, ".".join(parts[:place])):
                return int(part)
        return None


def deal_stages(
    stages: Stages | None, policy: str, sizes: Mapping[str, int], pp: int, given: Sequence[int] = ()
) -> dict[str, tuple[int, ...] | None]:
    """The stages that hold each tensor; None: all of them. ``sizes`` in bytes, ``given``: layers of each stage.

    Raises PolicyError where the policy does not say, or tensors meet no word of it; UsageError where there are fewer
    layers than stages or ``given`` does not add up.
    """
    if given and len(given) != pp:
        raise UsageError(f"--stages gives layers for {len(given)} stages, --pp is {pp}")
    if pp == 1:
        return dict.fromkeys(sizes)
    if stages is None:
        raise PolicyError(
            f"policy {policy} says nothing of pipeline stages", hint="add stages: to it, or leave --pp out"
        )
    layer_of = {name: stages.layer(name) for name in sizes}
    ends = {name: _ends(stages, name, sizes, pp) for name, layer in layer_of.items() if layer is None}
    runs = _runs({n: layer for n, layer in layer_of.items() if layer is not None}, ends, sizes, pp, given)
    return {name: ends[name] if layer is None else (runs[layer],) for name, layer in layer_of.items()}


def _ends(stages: Stages, name: str, names: Iterable[str], pp: int) -> tuple[int, ...] | None:
    found: list[tuple[int, ...] | None] = []
    if _meets(stages.first, name):
        tied = _meets(stages.tied, name) and not any(_meets(stages.head, other) for other in names)
        found.append((0, pp - 1) if tied else (0,))
    if _meets(stages.last, name):
        found.append((pp - 1,))
    if _meets(stages.every, name):
        found.append(None)
    if len(found) != 1:
        what = "does not say where" if not found else "says twice where"
        raise PolicyError(f"{stages.mark}: stages {what} {printable(name)} belongs", hint="first, last or every")
    return found[0]


def _runs(
    layer_of: Mapping[str, int],
    ends: Mapping[str, tuple[int, ...] | None],
    sizes: Mapping[str, int],
    pp: int,
    given: Sequence[int],
) -> dict[int, int]:
    """Each layer's stage."""
    layers = sorted(set(layer_of.values()))
    if len(layers) < pp:
        raise UsageError(f"--pp {pp}: there are {len(layers)} layers")
    if given:
        if sum(given) != len(layers):
            shown = "+".join(map(str, given))
            raise UsageError(f"--stages {shown} is {sum(given)} layers, there are {len(layers)}")
        counts = list(given)
    else:
        weight = dict.fromkeys(layers, 0)
        for name, layer in layer_of.items():
            weight[layer] += sizes[name]
        extra = [sum(sizes[n] for n, held in ends.items() if held and stage in held) for stage in range(pp)]
        counts = balanced([weight[layer] for layer in layers], extra)
    stage_of_place = [stage for stage, count in enumerate(counts) for _ in range(count)]
    return dict(zip(layers, stage_of_place, strict=True))


def balanced(weights: Sequence[int], extra: Sequence[int]) -> list[int]:
    """How many of the items in a row each of ``len(extra)`` stages gets, at least one, so that the heaviest stage,
    its ``extra`` included, is as light as it can be; of equally good ways the one that fills earlier stages more.

    >>> balanced([4, 4, 4, 4], [0, 1])
    [2, 2]
    >>> balanced([4, 4, 4, 4, 4, 4], [0, 8])
    [4, 2]
    """
    total = [0]
    for weight in weights:
        total.append(total[-1] + weight)
    stages, count = len(extra), len(weights)

    @cache
    def best(stage: int, first: int) -> tuple[int, int]:
        """The heaviest stage from ``stage`` on with the items from ``first`` on, and how many this stage takes."""
        if stage == stages - 1:
            return extra[stage] + total[count] - total[first], count - first
        choices = (
            (max(extra[stage] + total[first + own] - total[first], best(stage + 1, first + own)[0]), -own)
            for own in range(1, count - first - (stages - stage - 1) + 1)
        )
        heaviest, own = min(choices)
        return heaviest, -own

    counts, first = [], 0
    for stage in range(stages):
        own = best(stage, first)[1]
        counts.append(own)
        first += own
    return counts


def _meets(patterns: Iterable[Pattern], name: str) -> bool:
    """Whether a pattern is the tail of a name, or of its layer's path."""
    layer = name.rpartition(".")[0]
    return any(pattern.matches(name) or pattern.matches(layer) for pattern in patterns)
