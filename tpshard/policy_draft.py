"""A first policy for an unknown architecture, from names, shapes and config.json: data, not yet text.

Layers that do the same work together (an attention, a feed-forward, the words) are a block. For each block there are
several ways in which it may be cut, the likeliest first; who can run the model tries them. What no way is known for is
replicated, and said to be unsure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.layout import Shape
from tpshard.policy_heads import Heads
from tpshard.policy_layers import Layer, layers_by_tensor, layers_of
from tpshard.policy_names import is_words, part_of
from tpshard.policy_ways import Block, Drafted, Way, attentions, feed_forwards, tables


@dataclass(frozen=True, slots=True)
class Draft:
    """``whole``: what every layer is where no block is cut: replicated; ``blocks`` in the order of the names;
    ``layer_of``: each tensor's layer."""

    layers: tuple[Layer, ...]
    heads: Heads
    whole: Way
    blocks: tuple[Block, ...]
    layer_of: Mapping[str, str]

    def rules(self, chosen: Mapping[str, Way]) -> dict[str, Drafted]:
        """A rule for every layer, ``chosen`` by the names of blocks."""
        made = dict(self.whole)
        for block in self.blocks:
            made |= chosen.get(block.name, {})
        return made


def draft(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    full: Mapping[str, Any],
    modules: Mapping[str, str],
    plan: Mapping[str, str],
) -> Draft:
    """``full``: config.json with defaults filled in, ``modules``: classes of modules by path, ``plan``: styles of
    transformers' own by pattern: as far as they are known."""
    layer_of = layers_by_tensor(shapes, modules)
    layers = tuple(layers_of(shapes, layer_of, modules, plan))
    heads = Heads(config, full)
    blocks = [*attentions(layers, heads), *feed_forwards(layers, heads), *tables(layers, heads)]
    order = {layer.path: place for place, layer in enumerate(layers)}
    blocks.sort(key=lambda block: min(order[path] for path in block.ways[0]))
    known = {path for block in blocks for path in block.ways[0]}
    whole = {layer.path: _whole(layer, layer.path in known) for layer in layers}
    return Draft(layers, heads, whole, tuple(blocks), layer_of)


def _whole(layer: Layer, known: bool) -> Drafted:
    if max(map(len, layer.shapes.values())) <= 1 or "norm" in layer.path.lower().rpartition(".")[2]:
        return Drafted("replicate")
    if part_of(layer.path) == "router":
        return Drafted("replicate", comment="router: every rank chooses the experts")
    shown = " x ".join(map(str, layer.weight))
    if layer.is_table and not is_words(layer.path):
        return Drafted("replicate", comment="positions, types")
    if known:
        return Drafted("replicate", unsure=f"no way of cutting it was found right ({shown})")
    return Drafted("replicate", unsure=f"what it does is not known ({shown})")
