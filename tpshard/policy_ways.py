"""The ways in which the blocks of a model may be cut, the likeliest first: by names, shapes and head counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tpshard.policy_heads import Heads
from tpshard.policy_layers import Layer, place_of
from tpshard.policy_names import Part, in_attention, is_head, is_norm_of_heads, part_of
from tpshard.roles import Kind


@dataclass(frozen=True, slots=True)
class Drafted:
    """A rule to be: ``options`` as they stand in YAML; ``comment`` behind it; ``unsure``: why it is only a guess."""

    kind: Kind
    options: tuple[tuple[str, str], ...] = ()
    comment: str = ""
    unsure: str = ""


Way = Mapping[str, Drafted]  # by layer


@dataclass(frozen=True, slots=True)
class Block:
    """Layers that are cut together or not at all; ``ways``: the likeliest first."""

    name: str
    ways: tuple[Way, ...]


def _matrices(layers: Iterable[Layer]) -> Iterator[tuple[Layer, Part]]:
    for layer in layers:
        if len(layer.matrix) in (2, 3) and not layer.is_table and min(layer.matrix[-2:]) > 1:
            yield layer, _told(layer, part_of(layer.path))


def _told(layer: Layer, part: Part) -> Part:
    """What transformers' own plan says goes before what a name says."""
    attention = in_attention(layer.path)
    if layer.style.startswith("rowwise"):
        return "out" if attention else "down"
    if layer.style.startswith("colwise") and part in ("other", "down", "out", "router"):
        return "q" if attention else "up"
    return part


# ---------------------------------------------------------------------------------------------- attention


def attentions(layers: Sequence[Layer], heads: Heads) -> Iterator[Block]:
    groups: dict[tuple[str, str], list[tuple[Layer, Part]]] = {}
    for layer, part in _matrices(layers):
        if len(layer.matrix) == 2 and (part in ("q", "k", "v", "qkv", "kv", "latent", "out") and _near(layer, part)):
            groups.setdefault(place_of(layer.path), []).append((layer, part))
    for place, members in groups.items():
        parts = {part for _, part in members}
        if "out" in parts and parts & {"qkv", "q", "kv", "v"} and place[0]:
            ways = _with_inner_norms(tuple(_ways_of_attention(members, layers, heads, place)), layers)
            if ways:
                yield Block(f"attention of {'.'.join(filter(None, place))}", ways)


def _with_inner_norms(ways: Sequence[Way], layers: Sequence[Layer]) -> tuple[Way, ...]:
    """The same ways, and then with norms before the row layers that gather what they are over."""
    if not ways:
        return ()
    rows = [layer for layer in layers if layer.path in ways[0] and ways[0][layer.path].kind == "row"]
    sizes, places = {layer.sizes[1] for layer in rows}, {place_of(layer.path) for layer in rows}
    rule = Drafted("replicate", (("gather", "input"),), "over all heads or channels together")
    norms = {
        layer.path: rule
        for layer in layers
        if len(layer.weight) == 1 and layer.weight[0] in sizes and place_of(layer.path) in places
        and "norm" in layer.path.rpartition(".")[2].lower() and not is_norm_of_heads(layer.path)
    }  # fmt: skip
    return (*ways, *({**way, **norms} for way in ways if norms))


def _near(layer: Layer, part: Part) -> bool:
    """Projections outside of what is called an attention are only believed where their own name is clear."""
    return part != "out" or in_attention(layer.path)


def _ways_of_attention(
    members: Sequence[tuple[Layer, Part]], layers: Sequence[Layer], heads: Heads, place: tuple[str, str]
) -> Iterator[Way]:
    query, key_value = heads.of(place[0])
    if not query:
        return
    key_value = _key_value_by_size(members, heads, query, key_value)
    forms = ["parts", "heads"]
    if any("query_key_value" in layer.path or "qkv_proj" in layer.path for layer, part in members if part == "qkv"):
        forms.reverse()
    if not any(part in ("qkv", "kv") for _, part in members):
        forms = ["parts"]
    joined = [False, True] if not _whole_norms(members, layers) else [True, False]
    for gather in joined:
        for form in forms:
            way = {layer.path: _of_attention(layer, part, query, key_value, form, gather) for layer, part in members}
            yield {path: rule for path, rule in way.items() if rule is not None}


def _key_value_by_size(members: Sequence[tuple[Layer, Part]], heads: Heads, query: str, key_value: str) -> str:
    """How many key-value heads there are by the sizes, where they do not agree with config.json's (multi-query)."""
    of_output = [layer.sizes[1] for layer, part in members if part == "out"]
    count, odd = divmod(of_output[0], heads.value(query))
    if odd or not count:
        return key_value
    for layer, part in members:
        units, left = divmod(layer.sizes[0], count)
        own = {"qkv": (units - heads.value(query)) / 2, "kv": units / 2, "v": float(units)}.get(part, 0.0)
        if not left and own >= 1 and own.is_integer() and own < heads.value(query) and own != heads.value(key_value):
            return str(int(own))
    return key_value


def _whole_norms(members: Sequence[tuple[Layer, Part]], layers: Sequence[Layer]) -> bool:
    """Whether a norm beside q or k is as long as all heads together."""
    sizes = {layer.sizes[0] for layer, part in members if part in ("q", "k")}
    places = {place_of(layer.path) for layer, _ in members}
    return any(
        len(norm.weight) == 1
        and norm.weight[0] in sizes
        and place_of(norm.path) in places
        and is_norm_of_heads(norm.path)
        for norm in layers
    )


def _of_attention(layer: Layer, part: Part, query: str, key_value: str, form: str, gather: bool) -> Drafted | None:
    dims = (("dims", "io"),) if layer.turned else ()
    joined = (("gather", "true"),) if gather else ()
    match part:
        case "q":
            return Drafted("column", (*dims, ("heads", query), *joined))
        case "k":
            return Drafted("column", (*dims, ("heads", key_value), *joined))
        case "v":
            return Drafted("column", (*dims, ("heads", key_value)))
        case "qkv" if form == "parts":
            blocks = f"[{query}, {key_value}, {key_value}]"
            return Drafted("column", (*dims, ("parts", blocks)), "q | k | v, each by whole heads")
        case "qkv":
            what = "fused by head" if query == key_value else "fused by group of heads"
            return Drafted("column", (*dims, ("heads", key_value)), what)
        case "kv" if form == "parts":
            return Drafted("column", (*dims, ("parts", f"[{key_value}, {key_value}]")), "k | v, each by whole heads")
        case "kv":
            return Drafted("column", (*dims, ("heads", key_value)), "fused by head")
        case "latent":
            return None
        case _:
            fused = form == "heads" and query != key_value
            return Drafted("row", (*dims, ("heads", key_value if fused else query)))


# ---------------------------------------------------------------------------------------------- feed-forward


def feed_forwards(layers: Sequence[Layer], heads: Heads) -> Iterator[Block]:
    groups: dict[tuple[str, str], list[tuple[Layer, Part]]] = {}
    for layer, part in _matrices(layers):
        container, below = place_of(layer.path)
        if container and not in_attention(layer.path) and part not in ("q", "k", "v", "qkv", "kv", "latent", "router"):
            direction = _direction(layer, part, heads.hidden(container))
            groups.setdefault((container, below), []).append((layer, direction))
    for (container, below), members in _with_partners(groups).items():
        ways = _with_inner_norms(tuple(_ways_of_feed_forward(members, heads.hidden(container))), layers)
        if ways:
            yield Block(f"feed-forward of {'.'.join(filter(None, (container, below)))}", ways)


def _with_partners(
    groups: Mapping[tuple[str, str], Sequence[tuple[Layer, Part]]],
) -> dict[tuple[str, str], list[tuple[Layer, Part]]]:
    """Halves that stand beside one another (intermediate, output) made one."""
    made: dict[tuple[str, str], list[tuple[Layer, Part]]] = {}
    for (container, below), members in groups.items():
        both = {"up", "down"} <= {direction for _, direction in members}
        made.setdefault((container, below if both else ""), []).extend(members)
    return made


def _direction(layer: Layer, part: Part, hidden: int) -> Part:
    """By shape where the two sizes tell, else by name."""
    out, into = layer.sizes
    if len(layer.matrix) == 2 and hidden and (out == hidden) != (into == hidden):
        return "down" if out == hidden else "up"
    return part if part in ("up", "down") else "other"


def _ways_of_feed_forward(members: Sequence[tuple[Layer, Part]], hidden: int) -> Iterator[Way]:
    ups = [layer for layer, direction in members if direction == "up"]
    downs = [layer for layer, direction in members if direction == "down"]
    if not ups or not downs:
        return
    inner = {_inner(layer, hidden, down=True) for layer in downs}
    fused = {layer.path for layer in ups if _inner(layer, hidden, down=False) in {2 * size for size in inner}}
    for form in ("parts", "unit") if fused else ("plain",):
        way = {up.path: _up(up, hidden, form if up.path in fused else "plain") for up in ups}
        yield way | {down.path: Drafted("row", _stacked(down, hidden, down=True)) for down in downs}


def _inner(layer: Layer, hidden: int, *, down: bool) -> int:
    """The axis of a matrix that is not the hidden size."""
    first, last = layer.matrix[-2:]
    if hidden in (first, last):
        return last if first == hidden else first
    return layer.sizes[1 if down else 0]


def _up(layer: Layer, hidden: int, form: str) -> Drafted:
    options = _stacked(layer, hidden, down=False)
    if form == "parts":
        return Drafted("column", (*options, ("parts", "2")), "two halves: a rank has the same channels of both")
    if form == "unit":
        return Drafted("column", (*options, ("unit", "2")), "interleaved, two by two")
    return Drafted("column", options)


def _stacked(layer: Layer, hidden: int, *, down: bool) -> tuple[tuple[str, str], ...]:
    """``dims`` where they are not [out, in]."""
    if len(layer.matrix) == 2:
        return (("dims", "io"),) if layer.turned else ()
    first_is_hidden = layer.matrix[-2] == hidden
    return (("dims", "eoi" if first_is_hidden == down else "eio"),)


# ---------------------------------------------------------------------------------------------- words


def tables(layers: Sequence[Layer], heads: Heads) -> Iterator[Block]:
    words = heads.words
    for layer in layers:
        if not words & set(layer.weight[:1]) and not (layer.turned and words & set(layer.weight)):
            continue
        if layer.is_table and len(layer.weight) == 2 and "*" not in layer.path:
            rule = Drafted("row", (("dims", "io"),), "by vocabulary: a look-up is one-hot times [in, out]")
            yield Block(f"words of {layer.path}", ({layer.path: rule},))
    found = [layer for layer in layers if not layer.is_table and _predicts(layer, words)]
    if found:
        rule = Drafted("column", (("gather", "true"),), "by vocabulary, as the words")
        yield Block("head", ({layer.path: rule for layer in found},))


def _predicts(layer: Layer, words: set[int]) -> bool:
    """Whether a layer has an output for each word, or is the loose bias of one that has."""
    if "*" in layer.path or len(layer.weight) > 2 or not words & set(layer.weight[:1]):
        return False
    return is_head(layer.path) or len(layer.weight) == 2
