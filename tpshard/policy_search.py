"""Which of a draft's ways of cutting is right: tried on the model, block by block.

All likeliest ways at once are tried first, and are usually right. Where they are not, each block is tried on top of
what was found right, way by way; a block for which none is right stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tpshard.policy_draft import Draft
from tpshard.policy_ways import Drafted, Way

MOST_TRIALS = 120

Right = Callable[[Mapping[str, Drafted]], bool]


@dataclass(frozen=True, slots=True)
class Found:
    """``chosen``: by block's name, its way; ``tried``: how many policies were; ``rejected``: blocks left whole."""

    chosen: Mapping[str, Way]
    tried: int
    rejected: tuple[str, ...]


def likeliest(draft: Draft) -> dict[str, Way]:
    """The first way of every block: what is drafted where nothing can be tried."""
    return {block.name: block.ways[0] for block in draft.blocks}


def search(draft: Draft, right: Right) -> Found:
    """The ways that ``right`` accepts, together."""
    chosen = likeliest(draft)
    tried = 1
    if right(draft.rules(chosen)):
        return Found(chosen, tried, ())
    if not right(draft.whole):  # it does not run at all, so that nothing can be told
        return Found(chosen, tried, ())
    kept: dict[str, Way] = {}
    rejected: list[str] = []
    for block in draft.blocks:
        for way in block.ways:
            if tried >= MOST_TRIALS:
                break
            tried += 1
            if right(draft.rules(kept | {block.name: way})):
                kept[block.name] = way
                break
        else:
            rejected.append(block.name)
    rejected += [block.name for block in draft.blocks if block.name not in kept and block.name not in rejected]
    return Found(kept, tried, tuple(rejected))
