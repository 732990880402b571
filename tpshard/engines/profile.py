"""An engine's profile: how it names, joins and orders tensors, as data.

A **recipe** relates one tensor of the engine to the logical tensors (as Hugging Face has them) that make it up. It is
read in both directions, so what is written can be read back, and there is no second description to drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tpshard.engines.names import Dictionary, Template
from tpshard.engines.orders import AxisOrder
from tpshard.expressions import evaluate
from tpshard.policy import Expression, Policy

Format = Literal["safetensors", "torch"]
Order = Literal["", "rotary", "transposed", "widened"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """``name``: of the engine's tensor; ``parts``: of the logical tensors whose rows follow one another in it.

    ``groups``: the rows of all parts are dealt into so many groups in the whole tensor, and follow one another group
    by group (Megatron's grouped QKV); None: one group on each rank. ``order`` of each part's rows: ``rotary``, where
    the engine keeps the two halves of each of ``heads`` heads interleaved; ``transposed``, where its last two axes
    are exchanged; ``widened``, where the engine has BF16 as F32; ``axes``, with the lengths ``sizes``, for any other
    order of a single part. Places that only the parts have are stacked along a first axis: experts. ``shares``: how
    many rows a unit of each part has in proportion to the others' (a head where the policy deals heads, else the whole
    part); none where units are alike.
    """

    name: Template
    parts: tuple[Template, ...]
    groups: Expression | None = None
    order: Order = ""
    heads: Expression | None = None
    axes: AxisOrder | None = None
    sizes: tuple[tuple[str, Expression], ...] = ()
    shares: tuple[Expression, ...] = ()

    def lengths(self, config: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
        """The lengths of ``axes`` that the configuration says."""
        return tuple((name, evaluate(str(expression), config)) for name, expression in self.sizes)

    @property
    def is_reordered(self) -> bool:
        """Whether a part may lie in the engine's tensor otherwise than in one run."""
        return bool(self.groups or self.order or self.axes)

    @property
    def stacked(self) -> str | None:
        """The place that is stacked."""
        return next((place for place in self.parts[0].places if place not in self.name.places), None)

    def dtype(self, own: str) -> str:
        """The engine's, of a logical tensor's."""
        return "F32" if self.order == "widened" else own


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that the engine wants and no checkpoint has: one for each of what ``beside`` reads."""

    name: Template
    beside: Template
    dtype: str
    value: float


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Logical tensors whose vocabulary the engine pads, to a multiple of ``multiple``, on each rank or in all."""

    tensors: tuple[str, ...]
    multiple: int
    each_rank: bool


@dataclass(frozen=True, slots=True)
class Tied:
    """What the engine calls the embedding where the model has no head of its own: in its own place, and (``last``) on
    the last of several stages. ``copied``: it knows no ties, and has a copy of the embedding as head."""

    embedding: str
    head: str
    name: Template | None = None
    last: Template | None = None
    copied: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """The names of one kind of models. ``conditions``: values of keys in its config.json, as in a policy's ``for``;
    ``policy``: rules that come before those of the model's own policy;
    ``variant``: one of several sets of names that the engine has had; ``versions``: of its files, where they differ;
    ``layers``: names of layers, and how many the engine takes: those beyond (of multi-token prediction) it has not;
    ``aliases``: further names under which the engine keeps what a recipe has; ``derived``: what either side may have,
    and the other makes from the configuration."""

    name: str
    conditions: Mapping[str, tuple[object, ...]]
    recipes: tuple[Recipe, ...]
    constants: tuple[Constant, ...] = ()
    derived: tuple[Template, ...] = ()
    vocabulary: Vocabulary | None = None
    tied: Tied | None = None
    layers: tuple[Template, Expression] | None = None
    policy: Policy | None = None
    variant: str = ""
    versions: tuple[str, ...] = ()
    aliases: tuple[Recipe, ...] = ()
    engine_names: Dictionary[Recipe | Constant | None] = field(init=False, repr=False, compare=False)
    logical_names: Dictionary[tuple[Recipe, int] | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        theirs: list[tuple[Template, Recipe | Constant | None]] = [(r.name, r) for r in (*self.recipes, *self.aliases)]
        theirs += [(constant.name, constant) for constant in self.constants]
        ours: list[tuple[Template, tuple[Recipe, int] | None]] = [
            (part, (recipe, number)) for recipe in self.recipes for number, part in enumerate(recipe.parts)
        ]
        known = {template.text for template, _ in (*theirs, *ours)}
        for template in self.derived:
            if template.text not in known:
                theirs.append((template, None))
                ours.append((template, None))
        object.__setattr__(self, "engine_names", Dictionary(theirs))
        object.__setattr__(self, "logical_names", Dictionary(ours))

    @property
    def model_types(self) -> tuple[str, ...]:
        return tuple(map(str, self.conditions.get("model_type", ())))

    def when_tied(self) -> Family:
        """The names where the model has no head of its own."""
        if self.tied is None or self.tied.copied:
            return self
        embedding = next(recipe for recipe in self.recipes if recipe.parts[0].text == self.tied.embedding)
        kept = [recipe for recipe in self.recipes if recipe.parts[0].text not in (self.tied.embedding, self.tied.head)]
        own = replace(embedding, name=self.tied.name) if self.tied.name else embedding
        aliases = (replace(embedding, name=self.tied.last),) if self.tied.last else ()
        return replace(self, recipes=(own, *kept), aliases=aliases)


@dataclass(frozen=True, slots=True)
class Engine:
    """``files``: templates of a weight file's path: places ``rank`` (of a stage), ``global`` (of all), ``tp``, ``pp``,
    ``part``, ``ranks`` (how many).

    ``local_layers``: layers are counted from 0 in each pipeline stage; ``even_stages``: which have equally many, the
    first ones one more where that does not go. ``replicas``: whether ranks may hold copies of
    the same heads. ``inside``: the keys of a PyTorch file under which the tensors are. ``whole_experts``: the ranks
    are dealt whole experts. ``by_name``: a file's tensors are sorted by name, ``metadata``: and it has a format's
    mark, as the engine's own writer does it. ``variants``: sets of names, the first the one that is written unless
    another is asked for, and whether each can be written. ``store``: the
    variant whose names a store of whole tensors has, where the engine keeps such. ``recognised``: False where
    another engine names its files alike, and a folder is taken for that one's. ``source``: the profile's own file;
    ``proof``: what it was held against.
    """

    name: str
    title: str
    format: Format
    files: tuple[Template, ...]
    families: tuple[Family, ...]
    local_layers: bool = False
    even_stages: bool = False
    replicas: bool = True
    inside: tuple[str, ...] = ()
    whole_experts: bool = False
    by_name: bool = False
    metadata: bool = True
    recognised: bool = True
    variants: Mapping[str, bool] = field(default_factory=dict)
    store: str = ""
    description: str = ""
    source: str = ""
    proof: str = ""

    @property
    def model_types(self) -> tuple[str, ...]:
        """All whose names are known."""
        return tuple(sorted({name for family in self.families for name in family.model_types}))
