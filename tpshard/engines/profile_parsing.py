"""From an engine's YAML document to its profile: every key checked, with its place in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from tpshard.document import Node
from tpshard.engines.names import Template
from tpshard.engines.orders import AxisOrder, parse_order
from tpshard.engines.profile import Constant, Engine, Family, Format, Order, Recipe, Tied, Vocabulary
from tpshard.header import DTYPE_BITS
from tpshard.patterns import parse_patterns
from tpshard.policy import Expression, Policy
from tpshard.policy_parsing import parse_policy, values_of

ENGINE_KEYS = (
    "engine", "title", "description", "format", "files", "inside", "layers", "stages", "replicas", "variants",
    "store", "experts", "order", "metadata", "recognised", "families", "proof",
)  # fmt: skip
FAMILY_KEYS = (
    "for", "without", "like", "rename", "variant", "versions", "same", "tensors", "leaves", "constants", "derived",
    "vocabulary", "tied", "beyond", "policy",
)  # fmt: skip
LEAF = "<leaf>"
RECIPE_KEYS = ("rows", "shares", "groups", "rotary", "transposed", "widened", "order", "sizes")


def parse_engine(document: Node) -> Engine:
    """One YAML document as an engine's profile. Raises PolicyError with the place."""
    table = document.known_keys(ENGINE_KEYS)
    for key in ("engine", "title", "format", "files", "families"):
        if key not in table:
            document.fail(f"an engine needs '{key}'")
    families: dict[str, Family] = {}
    for name, node in table["families"].mapping().items():
        families[name] = _family(name, node, families)
    return Engine(
        name=table["engine"].text(),
        title=table["title"].text(),
        description=table["description"].text() if "description" in table else "",
        format=cast(Format, table["format"].one_of(("safetensors", "torch"))),
        files=tuple(map(_template, _list(table["files"]))),
        families=tuple(families.values()),
        local_layers="layers" in table and table["layers"].one_of(("local", "global")) == "local",
        even_stages="stages" in table and table["stages"].one_of(("even", "any")) == "even",
        replicas=table["replicas"].flag() if "replicas" in table else True,
        source=document.mark.file,
        proof=table["proof"].text() if "proof" in table else "",
        whole_experts="experts" in table and table["experts"].one_of(("whole", "cut")) == "whole",
        by_name="order" in table and table["order"].one_of(("names", "source")) == "names",
        variants=_variants(table["variants"]) if "variants" in table else {},
        store=table["store"].one_of(tuple(table["variants"].mapping())) if "store" in table else "",
        metadata=table["metadata"].flag() if "metadata" in table else True,
        recognised=table["recognised"].flag() if "recognised" in table else True,
        inside=tuple(node.text() for node in _list(table["inside"])) if "inside" in table else (),
    )


def _family(name: str, node: Node, known: Mapping[str, Family]) -> Family:
    table = node.known_keys(FAMILY_KEYS)
    base = None
    if "like" in table:
        base = known.get(table["like"].text()) or table["like"].fail("is not a family that stands before this one")
    if base is not None and "rename" in table:
        base = _renamed(base, {old: new.text() for old, new in table["rename"].mapping().items()})
    constants = table["constants"].mapping().items() if "constants" in table else ()
    derived = tuple(map(_template, _list(table["derived"]))) if "derived" in table else ()
    return Family(
        name=name,
        conditions=_conditions(table) if "for" in table else base.conditions if base else {},
        recipes=_recipes(table, base.recipes if base else ()),
        constants=tuple(constant for key, value in constants for constant in _constants(key, value))
        or (base.constants if base else ()),
        derived=derived or (base.derived if base else ()),
        vocabulary=_vocabulary(table["vocabulary"]) if "vocabulary" in table else base and base.vocabulary,
        tied=_tied(table["tied"]) if "tied" in table else base and base.tied,
        layers=_beyond(table["beyond"]) if "beyond" in table else base and base.layers,
        variant=table["variant"].text() if "variant" in table else "",
        versions=_texts(table["versions"]) if "versions" in table else (),
        policy=_policy(name, table["policy"]) if "policy" in table else base and base.policy,
    )


def _conditions(table: Mapping[str, Node]) -> Mapping[str, tuple[object, ...]]:
    """``for``: model types, or any keys of config.json as in a policy; ``without``: keys that it must not have."""
    node = table["for"]
    keys = node.value if isinstance(node.value, Mapping) else {"model_type": node}
    without = _texts(table["without"]) if "without" in table else ()
    return {key: values_of(value) for key, value in keys.items()} | dict.fromkeys(without, (None,))


def _recipes(table: Mapping[str, Node], inherited: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """The family's own, and of those that it inherits the ones whose logical tensors are not in its own."""
    own: dict[str, Recipe] = {}
    for item in _list(table["same"]) if "same" in table else ():
        for template in _alternatives(item, item.text()):
            own[template.text] = Recipe(template, (template,))
    leaves = {key: leaf.text() for key, leaf in table["leaves"].mapping().items()} if "leaves" in table else {}
    for key, value in (table["tensors"].mapping() if "tensors" in table else {}).items():
        own.update((recipe.name.text, recipe) for recipe in _with_leaves(_recipe(key, value), leaves))
    taken = {part.text for recipe in own.values() for part in recipe.parts}
    kept = {r.name.text: r for r in inherited if taken.isdisjoint(part.text for part in r.parts)}
    return tuple((kept | own).values())


def _variants(node: Node) -> dict[str, bool]:
    return {name: how.one_of(("written", "read")) == "written" for name, how in node.mapping().items()}


def _texts(node: Node) -> tuple[str, ...]:
    return tuple(item.text() for item in _list(node))


def _renamed(family: Family, words: Mapping[str, str]) -> Family:
    """The same recipes with other words in the engine's names."""

    def name(template: Template) -> Template:
        text = template.text
        for old, new in words.items():
            text = text.replace(old, new)
        return Template(text)

    recipes = tuple(replace(recipe, name=name(recipe.name)) for recipe in family.recipes)
    tied = family.tied and replace(
        family.tied,
        name=family.tied.name and name(family.tied.name),
        last=family.tied.last and name(family.tied.last),
    )
    return replace(family, recipes=recipes, tied=tied)


def _recipe(key: str, node: Node) -> Recipe:
    name = _made(node, key)
    if not isinstance(node.value, Mapping):
        return _checked(node, Recipe(name, _parts(node)))
    table = node.known_keys(RECIPE_KEYS)
    if "rows" not in table:
        node.fail("needs 'rows': the tensors that it is made of")
    orders: list[Order] = [order for order in ("rotary", "transposed", "widened") if order in table]
    sizes = table["sizes"].mapping() if "sizes" in table else {}
    parts = _parts(table["rows"])
    shares = tuple(map(_expression, _list(table["shares"]))) if "shares" in table else ()
    if shares and len(shares) != len(parts):
        node.fail(f"has {len(shares)} shares, and {len(parts)} tensors")
    if len(orders) > 1:
        node.fail(f"is both {orders[0]} and {orders[1]}")
    return _checked(
        node,
        Recipe(
            name,
            parts,
            groups=_expression(table["groups"]) if "groups" in table else None,
            order=orders[0] if orders else "",
            heads=_expression(table["rotary"]) if "rotary" in table else None,
            axes=_axes(table["order"]) if "order" in table else None,
            sizes=tuple((name, _expression(n)) for name, n in sizes.items()),
            shares=shares,
        ),
    )


def _with_leaves(recipe: Recipe, leaves: Mapping[str, str]) -> tuple[Recipe, ...]:
    """One recipe for each kind of a layer's tensor, where the engine calls them otherwise: ``scale`` what is
    ``weight_scale_inv``."""
    if not leaves or LEAF not in recipe.name.text:
        return (recipe,)
    return tuple(
        replace(
            recipe,
            name=Template(recipe.name.text.replace(LEAF, theirs)),
            parts=tuple(Template(part.text.replace(LEAF, ours)) for part in recipe.parts),
        )
        for theirs, ours in leaves.items()
    )


def _parts(node: Node) -> tuple[Template, ...]:
    return tuple(template for item in _list(node) for template in _alternatives(item, item.text()))


def _alternatives(node: Node, text: str) -> tuple[Template, ...]:
    """All that ``{a,b}`` in a template stand for, in their order."""
    return tuple(_made(node, ".".join(pattern.segments)) for pattern in parse_patterns(text))


def _checked(node: Node, recipe: Recipe) -> Recipe:
    """All parts have the places of the name, and at most one more."""
    for part in recipe.parts:
        more = set(part.places) - set(recipe.name.places)
        if not set(recipe.name.places) <= set(part.places) or len(more) > 1:
            node.fail(f"'{part.text}' has not the places of '{recipe.name.text}', and at most one more")
        if more != set(recipe.parts[0].places) - set(recipe.name.places):
            node.fail(f"'{part.text}' and '{recipe.parts[0].text}' have other places")
    return recipe


def _axes(node: Node) -> AxisOrder:
    try:
        return parse_order(node.text())
    except ValueError as error:
        node.fail(str(error))


def _constants(key: str, node: Node) -> tuple[Constant, ...]:
    table = node.known_keys(("beside", "dtype", "value"))
    beside, dtype = _template(table["beside"]), table["dtype"].one_of(tuple(DTYPE_BITS))
    names = _alternatives(node, key)
    if set(names[0].places) - set(beside.places):
        node.fail(f"'{beside.text}' lacks places of '{key}'")
    return tuple(Constant(name, beside, dtype, float(table["value"].text())) for name in names)


def _vocabulary(node: Node) -> Vocabulary:
    table = node.known_keys(("tensors", "multiple", "each_rank"))
    each_rank = table["each_rank"].flag() if "each_rank" in table else False
    return Vocabulary(tuple(n.text() for n in _list(table["tensors"])), table["multiple"].integer(), each_rank)


def _tied(node: Node) -> Tied:
    table = node.known_keys(("embedding", "head", "name", "last", "copied"))
    return Tied(
        table["embedding"].text(),
        table["head"].text(),
        _template(table["name"]) if "name" in table else None,
        _template(table["last"]) if "last" in table else None,
        table["copied"].flag() if "copied" in table else False,
    )


def _beyond(node: Node) -> tuple[Template, Expression]:
    table = node.known_keys(("tensors", "layers"))
    return _template(table["tensors"]), _expression(table["layers"])


def _policy(name: str, node: Node) -> Policy:
    """Rules as in a policy, without a name of their own."""
    return parse_policy(Node({"name": Node(name, node.mark), **node.mapping()}, node.mark), shared=True)


def _list(node: Node) -> tuple[Node, ...]:
    return node.value if isinstance(node.value, tuple) else (node,)


def _template(node: Node) -> Template:
    return _made(node, node.text())


def _made(node: Node, text: str) -> Template:
    try:
        return Template(text)
    except ValueError as error:
        node.fail(str(error))


def _expression(node: Node) -> Expression:
    return node.integer() if isinstance(node.value, int) else node.text()
