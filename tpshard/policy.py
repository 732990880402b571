"""A policy: which axis of which layer is cut, in what units. From YAML to rules; from a rule to a layout.

``column`` cuts a layer's out axis, ``row`` its in axis, ``replicate`` nothing; a tensor of the layer that lacks the
axis stays whole. Everything else refines this: ``docs/policy.md`` has every key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpshard.document import Mark
from tpshard.errors import PolicyError, printable
from tpshard.expressions import evaluate
from tpshard.layout import Layout, Shape
from tpshard.mesh import Experts
from tpshard.partition import ANY, Block, Cut, Grain, cut_layout
from tpshard.patterns import Index, Pattern
from tpshard.roles import Gather, Kind, Role
from tpshard.stages import Stages

KINDS: tuple[Kind, ...] = ("column", "row", "replicate")
RULE_KEYS = ("rule", "dims", "stacked", "heads", "unit", "parts", "gather", "uneven", "pad", "experts")
POLICY_KEYS = ("name", "description", "for", "extends", "vars", "default", "rules", "stages")

Expression = str | int
Parts = int | tuple[Expression, ...] | tuple[tuple[Expression, Expression], ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of ``rules``, checked as far as it can be without a config and a tensor.

    ``shared``: of a policy for many models, whose rules need not all meet a tensor.
    """

    key: str
    patterns: tuple[Pattern, ...] = field(repr=False)
    mark: Mark
    kind: Kind
    dims: str = ""
    stacked: Expression | None = None
    heads: Expression | None = None
    unit: Expression | None = None
    parts: Parts | None = None
    gather: Gather = ""
    uneven: bool = False
    pad: Expression | None = None
    experts: Expression | None = None
    shared: bool = False

    @property
    def role(self) -> Role:
        return Role(self.kind, self.gather, self.key)

    @property
    def counts_heads(self) -> bool:
        """Whether the rule says how many units there are, rather than how wide one is."""
        return self.heads is not None or isinstance(self.parts, tuple)

    def axis(self, shape: Shape) -> int | None:
        """The axis that the rule cuts, or None where the tensor lacks it (it then stays whole)."""
        if self.kind == "replicate" or not shape:
            return None
        return self.axis_of("o" if self.kind == "column" else "i", shape)

    def axis_of(self, letter: str, shape: Shape) -> int | None:
        """The axis that a letter of ``dims`` stands for, or None where the tensor lacks it."""
        letters = self._letters(len(shape))
        return letters.index(letter) if letter in letters else None

    def _letters(self, dimensions: int) -> str:
        """One letter for each axis. A tensor of fewer axes than ``dims`` (a bias) keeps the letters that it has:
        it lacks the in axis and the others."""
        if len(self.dims) == dimensions:
            return self.dims
        kept = self.dims.replace("i", "").replace(".", "")
        if self.dims and len(kept) == dimensions:
            return kept
        return "o" if dimensions == 1 else "oi" + "." * (dimensions - 2)

    def fail(self, what: str, *, hint: str | None = None) -> PolicyError:
        return PolicyError(f"{self.mark}: {self.key}: {what}", hint=hint)


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules of one document and, after them, of the documents it extends; the first level that matches decides."""

    name: str
    mark: Mark
    levels: tuple[tuple[Rule, ...], ...]
    variables: Mapping[str, Expression]
    applies_to: Mapping[str, tuple[object, ...]]
    default: Kind | None = None
    extends: str | None = None
    description: str = ""
    stages: Stages | None = None
    documents: tuple[object, ...] = field(default=(), repr=False)
    _indexes: tuple[Index[Rule], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        indexes = tuple(Index((pattern, rule) for rule in level for pattern in rule.patterns) for level in self.levels)
        object.__setattr__(self, "_indexes", indexes)

    def match(self, tensor: str) -> Rule | None:
        """The rule for a tensor. Raises PolicyError where two rules of one document match it."""
        layer = tensor.rpartition(".")[0]
        for index in self._indexes:
            found = list({id(rule): rule for name in (layer, tensor) for rule in index.matching(name)}.values())
            if len(found) > 1:
                places = " and ".join(f"'{rule.key}' at {rule.mark}" for rule in found[:2])
                raise PolicyError(f"{tensor}: {len(found)} rules match: {places}", hint="make one more specific")
            if found:
                return found[0]
        return None

    def applies(self, config: Mapping[str, Any]) -> bool:
        """Whether ``for`` describes this config; a policy without ``for`` is never picked by itself."""
        return bool(self.applies_to) and meets(config, self.applies_to)

    @property
    def says_default(self) -> bool:
        """Whether the policy, or one that it extends, has the key ``default``: ``error`` overrides ``replicate``."""
        return any("default" in document for document in self.documents if isinstance(document, dict))

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(rule for level in self.levels for rule in level)


def rule_cut(
    rule: Rule, policy: Policy, config: Mapping[str, Any], shape: Shape, grain: Grain = ANY
) -> tuple[int, Cut] | None:
    """The axis and how it is dealt; None where the rule leaves the tensor whole. Channels that go together in
    ``grain`` are never replicated: the row layer that takes them is not."""
    axis = rule.axis(shape)
    if axis is None:
        return None
    compute = _calculator(rule, policy, config)
    pad = compute("pad", rule.pad) if rule.pad is not None else 0
    together = 1 if rule.counts_heads else grain.together
    blocks = _blocks(rule, shape[axis], compute, together)
    replicable = rule.kind == "column" and together == 1
    multiple = grain.multiples[axis] if grain.multiples else 1
    return axis, Cut(blocks, replicable=replicable, uneven=rule.uneven, pad=pad, multiple=multiple)


def channels(rule: Rule, policy: Policy, config: Mapping[str, Any], shape: Shape) -> int | None:
    """How many channels the rule's axis has: cells that are dealt one by one, or units of ``unit`` or ``parts``. None
    where the rule cuts nothing or counts heads."""
    axis = rule.axis(shape)
    if axis is None or rule.counts_heads:
        return None
    return _blocks(rule, shape[axis], _calculator(rule, policy, config), 1)[0].count


def units_of(rule: Rule, policy: Policy, config: Mapping[str, Any]) -> int | None:
    """How many units the rule deals, where it says so without a shape: heads. None where it counts cells."""
    counts = units_of_parts(rule, policy, config)
    return sum(counts) if counts else None


def units_of_parts(rule: Rule, policy: Policy, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The same of each part that is dealt for itself; none where it counts cells."""
    compute = _calculator(rule, policy, config)
    if rule.heads is not None:
        return (compute("heads", rule.heads),)
    if isinstance(rule.parts, tuple) and not isinstance(rule.parts[0], tuple):
        return tuple(compute("parts", count) for count in rule.parts if not isinstance(count, tuple))
    return ()


def rule_layout(
    rule: Rule, policy: Policy, config: Mapping[str, Any], shape: Shape, ranks: int, grain: Grain = ANY
) -> Layout:
    """The layout that a rule gives a tensor. Raises PolicyError where it cannot be dealt."""
    found = rule_cut(rule, policy, config, shape, grain)
    if found is None:
        return Layout.replicated(shape, ranks)
    axis, cut = found
    try:
        return cut_layout(shape, axis, cut, ranks)
    except PolicyError as error:
        raise rule.fail(error.message, hint=error.hint) from None


def expert_count(rule: Rule, policy: Policy, config: Mapping[str, Any]) -> int:
    """How many experts a rule's layer stands once for each of; 0 where it has no ``experts``."""
    return 0 if rule.experts is None else _calculator(rule, policy, config)("experts", rule.experts)


def rule_experts(rule: Rule, count: int, tensor: str, shape: Shape) -> Experts | None:
    """Which experts a tensor belongs to, by the letter e of ``dims``, or of ``count`` by the last number of its name;
    None where the rule speaks of none."""
    axis = rule.axis_of("e", shape)
    if axis is not None:
        return Experts(shape[axis], axis=axis)
    if not count:
        return None
    numbers = [int(part) for part in tensor.split(".") if part.isdecimal()]
    if not numbers or numbers[-1] >= count:
        which = f"expert {numbers[-1]}" if numbers else "no expert"
        raise rule.fail(f"{printable(tensor)} is of {which}, there are {count}")
    return Experts(count, number=numbers[-1])


Calculator = Callable[[str, Expression], int]


def _calculator(rule: Rule, policy: Policy, config: Mapping[str, Any]) -> Calculator:
    def compute(key: str, expression: Expression) -> int:
        try:
            value = evaluate(str(expression), config, policy.variables)
        except PolicyError as error:
            hint = error.hint or (None if config else "there is no config.json to take it from")
            raise rule.fail(f"{key}: {error.message}", hint=hint) from None
        if value < 1:
            raise rule.fail(f"{key}: {expression} is {value}, must be at least 1")
        return value

    return compute


def _blocks(rule: Rule, size: int, compute: Calculator, together: int) -> tuple[Block, ...]:
    """Of the whole axis: where it is a stack, those of one thing in it, again and again."""
    if rule.stacked is None:
        return _blocks_of_one(rule, size, compute, together)
    count = compute("stacked", rule.stacked)
    if size % count:
        raise rule.fail(f"{count} stacked do not divide an axis of {size}")
    return _blocks_of_one(rule, size // count, compute, together) * count


def _blocks_of_one(rule: Rule, size: int, compute: Calculator, together: int) -> tuple[Block, ...]:
    if rule.heads is not None:
        heads = compute("heads", rule.heads)
        if size % heads:
            raise rule.fail(f"{heads} heads do not divide an axis of {size}")
        return (Block(heads, size // heads),)
    if rule.unit is not None:
        unit = compute("unit", rule.unit)
        if size % unit:
            raise rule.fail(f"units of {unit} do not divide an axis of {size}")
        return (_joined(size // unit, unit, True, together),)
    if rule.parts is None:
        return (_joined(size, 1, False, together),)
    if isinstance(rule.parts, int):
        if size % rule.parts:
            raise rule.fail(f"{rule.parts} parts do not divide an axis of {size}")
        return (_joined(size // rule.parts, 1, True, together),) * rule.parts
    if isinstance(rule.parts[0], tuple):
        pairs = [part for part in rule.parts if isinstance(part, tuple)]
        blocks = tuple(Block(compute("parts", count), compute("parts", width)) for count, width in pairs)
        if sum(block.count * block.width for block in blocks) != size:
            shown = " + ".join(f"{block.count}x{block.width}" for block in blocks)
            raise rule.fail(f"parts {shown} do not add up to an axis of {size}")
        return blocks
    counts = [compute("parts", count) for count in rule.parts if not isinstance(count, tuple)]
    if size % sum(counts):
        raise rule.fail(f"parts of {'+'.join(map(str, counts))} heads do not divide an axis of {size}")
    return tuple(Block(count, size // sum(counts)) for count in counts)


def _joined(count: int, width: int, named: bool, together: int) -> Block:
    """Units of ``width`` cells, so many together made one; the last may be short of some."""
    units = -(-count // together)
    return Block(units, width * together, named, (units * together - count) * width)


def meets(config: Mapping[str, Any], conditions: Mapping[str, tuple[object, ...]]) -> bool:
    """Whether each of these keys of config.json has one of its values; None: or is absent."""
    return all(any(_same(_look_up(config, key), value) for value in values) for key, values in conditions.items())


def _look_up(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _same(value: object, wanted: object) -> bool:
    return type(value) is type(wanted) and value == wanted
