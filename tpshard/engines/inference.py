"""The logical tensors behind an engine's files: their names and whole shapes.

Names are read by the recipes. A whole shape follows from the ranks' own shapes and from the rule that cut it; what the
shapes cannot tell (how many heads, the size of a padded vocabulary) config.json does. Whatever is inferred is then laid
out again and compared with every header, so a wrong guess cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpshard.engines.joints import LAYER
from tpshard.engines.profile import Constant, Engine, Family, Recipe
from tpshard.errors import InputError, printable
from tpshard.expressions import evaluate
from tpshard.header import Entry
from tpshard.layout import Shape
from tpshard.mesh import Mesh
from tpshard.policy import Policy, Rule, units_of, units_of_parts

Entries = Mapping[str, Entry]


@dataclass(slots=True)
class _Found:
    """A logical tensor: its dtype, and the own shape on each rank that has it."""

    dtype: str
    own: dict[int, Shape] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Inferred:
    """Dtypes and whole shapes by logical name, in the order of names; ``layers``: how many each stage has;
    ``rows``: of a padded vocabulary on each rank; ``left``: the engine's tensors that are derived from the
    configuration, and so not kept."""

    tensors: Mapping[str, tuple[str, Shape]]
    layers: tuple[int, ...]
    rows: Mapping[str, int]
    left: tuple[str, ...]


def infer(
    engine: Engine,
    family: Family,
    policy: Policy,
    config: Mapping[str, Any],
    mesh: Mesh,
    ranks: Sequence[Entries],
    was_widened: Callable[[int, str], bool],
) -> Inferred:
    """What is in the files of all ranks; ``was_widened``: whether a rank's tensor of F32 was BF16 before. Raises
    InputError for a tensor that the engine's profile does not know."""
    layers = _layers(engine, family, mesh, ranks)
    found: dict[str, _Found] = {}
    left: dict[str, None] = {}
    for rank, entries in enumerate(ranks):
        first = sum(layers[: mesh.coordinates(rank).pp])
        for name, entry in entries.items():
            match = _look_up(engine, family, name)
            if match is None:
                left[name] = None
                continue
            recipe, values = match
            if LAYER in values and engine.local_layers:
                values = {**values, LAYER: str(int(values[LAYER]) + first)}
            dtype = "BF16" if recipe.order == "widened" and was_widened(rank, name) else entry.dtype
            for logical, shape in _parts(recipe, values, entry.shape, policy, config, mesh.tp, name):
                own = found.setdefault(logical, _Found(dtype))
                if own.dtype != dtype:
                    raise InputError(f"{printable(name)}: is {dtype} on rank {rank}, {own.dtype} on another")
                own.own[rank] = shape
    if not engine.whole_experts:
        _check_on_all(found, mesh)
    tensors = {name: (own.dtype, _whole(name, own, policy, config, mesh)) for name, own in sorted(found.items())}
    padded = {name: rule for name in found if (rule := policy.match(name)) is not None and rule.pad is not None}
    rows = {name: _rows(rule, found[name]) for name, rule in padded.items()}
    return Inferred(tensors, layers if mesh.pp > 1 else (), rows, tuple(left))


def _check_on_all(found: Mapping[str, _Found], mesh: Mesh) -> None:
    """Raises InputError where a rank of a stage lacks what another has."""
    for name, own in found.items():
        stages = {mesh.coordinates(rank).pp for rank in own.own}
        lacking = [r for r in range(mesh.ranks) if mesh.coordinates(r).pp in stages and r not in own.own]
        if lacking:
            what = f"rank {lacking[0]} has nothing of it, rank {min(own.own)} has a part"
            raise InputError(f"{printable(name)}: {what}", hint="is the folder complete?")


def _rows(rule: Rule, found: _Found) -> int:
    shape = next(iter(found.own.values()))
    axis = rule.axis(shape)
    return 0 if axis is None else shape[axis]


def _look_up(engine: Engine, family: Family, name: str) -> tuple[Recipe, dict[str, str]] | None:
    """The recipe of one of the engine's tensors; None where it holds nothing of the model."""
    try:
        match = family.engine_names.find(name)
    except ValueError as error:
        raise InputError(f"{printable(name)}: {error}") from None
    if match is None:
        what = f"{printable(name)}: {engine.title} has no such tensor in a {family.name} model"
        raise InputError(what, hint="tpshard engines shows what it can hold")
    meaning, values = match
    return None if meaning is None or isinstance(meaning, Constant) else (meaning, values)


def _layers(engine: Engine, family: Family, mesh: Mesh, ranks: Sequence[Entries]) -> tuple[int, ...]:
    """How many layers each stage has, by its first rank."""
    if not engine.local_layers or mesh.pp == 1:
        return (0,) * mesh.pp
    counts = []
    for stage in range(mesh.pp):
        found = (family.engine_names.find(name) for name in ranks[stage * mesh.tp * mesh.ep])
        numbers = {int(match[1][LAYER]) for match in found if match and LAYER in match[1]}
        if numbers != set(range(len(numbers))):
            raise InputError(f"stage {stage}: its layers are {sorted(numbers)[:8]}, not counted from 0 without a gap")
        counts.append(len(numbers))
    return tuple(counts)


def _parts(
    recipe: Recipe, values: dict[str, str], shape: Shape, policy: Policy, config: Mapping[str, Any], tp: int, name: str
) -> list[tuple[str, Shape]]:
    """Each logical tensor in one of the engine's, with its own shape."""
    entries = [{}] if recipe.stacked is None else [{recipe.stacked: str(n)} for n in range(shape[0] if shape else 0)]
    inner = shape if recipe.stacked is None else shape[1:]
    if recipe.order == "transposed":
        inner = (*inner[:-2], inner[-1], inner[-2])
    if recipe.axes is not None:
        try:
            inner = recipe.axes.back(inner, dict(recipe.lengths(config)))
        except ValueError as error:
            raise InputError(f"{printable(name)}: {error}", hint="is config.json the model's?") from None
    names = [[part.fill({**values, **entry}) for part in recipe.parts] for entry in entries]
    if len(recipe.parts) == 1:
        return [(own[0], inner) for own in names]
    axis = len(inner) - 2 if recipe.order == "transposed" else 0
    widths = [evaluate(str(share), config) for share in recipe.shares] or [1] * len(recipe.parts)
    shares = [_share(policy.match(part), policy, config, tp) for part in names[0]] if names else widths
    shares = [share * width for share, width in zip(shares, widths, strict=True)]
    if inner[axis] % sum(shares):
        raise InputError(f"{printable(name)}: {inner[axis]} rows are not {'+'.join(map(str, shares))} equal shares")
    unit = inner[axis] // sum(shares)
    shapes = [(*inner[:axis], unit * share, *inner[axis + 1 :]) for share in shares]
    return [pair for own in names for pair in zip(own, shapes, strict=True)]


def _share(rule: Rule | None, policy: Policy, config: Mapping[str, Any], tp: int) -> int:
    """How many units of a part are on a rank; parts without units are equal."""
    count = units_of(rule, policy, config) if rule else None
    if count is None:
        return 1
    return count // tp if count % tp == 0 else 1


def _whole(name: str, found: _Found, policy: Policy, config: Mapping[str, Any], mesh: Mesh) -> Shape:
    rule = policy.match(name)
    first_rank = min(found.own)
    stage = mesh.coordinates(first_rank).pp
    own = [shape for rank, shape in sorted(found.own.items()) if mesh.coordinates(rank).pp == stage]
    axis = rule.axis(own[0]) if rule else None
    if rule is None or axis is None:
        if any(shape != own[0] for shape in own):
            raise InputError(f"{printable(name)}: is whole on every rank, but of shapes {_listed(own)}")
        return own[0]
    if rule.pad is not None:
        size = evaluate("vocab_size | text_config.vocab_size", config)
    else:
        counts = units_of_parts(rule, policy, config)
        held = sum(max(count, mesh.tp) for count in counts)  # by all ranks: of fewer units each has one
        size = sum(shape[axis] for shape in own)
        if held and size * sum(counts) % held:
            raise InputError(f"{printable(name)}: {size} rows on all ranks are not those of {held} heads")
        size = size * sum(counts) // held if held else size
    return (*own[0][:axis], size, *own[0][axis + 1 :])


def _listed(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
