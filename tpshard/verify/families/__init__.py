"""What each architecture's tensors mean, for the layout check: written down apart from the policies, on purpose.

A policy that is wrong in a way that can be undone merges back bit for bit. So the layout check must not learn from
it: here every cut axis is said again, in other words, as what its cells are: which head, which feed-forward channel,
which word. Sources: the architectures' published modelling code and configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.verify.families import decoders, encoders
from tpshard.verify.slots import Slot

FAMILIES: Mapping[str, Mapping[str, Slot]] = {**decoders.FAMILIES, **encoders.FAMILIES}
TIED_BY_DEFAULT = decoders.TIED_BY_DEFAULT | encoders.TIED_BY_DEFAULT
_HEAD_SIZE_BY_DEFAULT = decoders.HEAD_SIZE_BY_DEFAULT


@dataclass(frozen=True, slots=True)
class Sizes:
    """Counts of heads, channels and words, and the cells of one head, from config.json. None: it does not say."""

    query: int
    key_value: int
    head: int | None = None
    channels: int | None = None
    words: int | None = None

    def of(self, unit: str) -> int | None:
        return self.channels if unit == "channel" else self.words


def sizes_of(config: Mapping[str, Any]) -> Sizes | None:
    """What a config tells of its model's sizes, by the names in use; None where it tells of no heads."""
    query = _first(config, "num_attention_heads", "n_head", "n_heads")
    if query is None:
        return None
    width = _first(config, "hidden_size", "n_embd", "dim", "d_model")
    by_default = _HEAD_SIZE_BY_DEFAULT.get(str(config.get("model_type")))
    return Sizes(
        query=query,
        key_value=_first(config, "num_key_value_heads", "num_kv_heads") or query,
        head=_first(config, "head_dim") or by_default or (width // query if width and width % query == 0 else None),
        channels=_first(config, "intermediate_size", "n_inner", "hidden_dim"),
        words=_first(config, "vocab_size"),
    )


def are_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding, by config.json or else by the architecture's own default."""
    said = config.get("tie_word_embeddings")
    return said if isinstance(said, bool) else config.get("model_type") in TIED_BY_DEFAULT


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
