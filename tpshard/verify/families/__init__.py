"""What each architecture's tensors mean, for the layout check: written down apart from the policies, on purpose.

A policy that is wrong in a way that can be undone merges back bit for bit. So the layout check must not learn from
it: here every cut axis is said again, in other words, as what its cells are: which head, which feed-forward channel,
which word. Sources: the architectures' published modelling code and configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tpshard.verify.families import (
    decoders,
    encoders,
    experts,
    fused,
    llama_kin,
    recurrent,
    remote_code,
    senses,
    translators,
)
from tpshard.verify.slots import Slot

_MODULES = decoders, encoders, experts, fused, llama_kin, recurrent, remote_code, senses, translators
FAMILIES: Mapping[str, Mapping[str, Slot]] = {kind: slots for file in _MODULES for kind, slots in file.FAMILIES.items()}
TIED_BY_DEFAULT = frozenset(kind for file in _MODULES for kind in file.TIED_BY_DEFAULT)
_HEAD_SIZE_BY_DEFAULT: Mapping[str, int] = {
    kind: size for file in (decoders, experts, llama_kin, recurrent) for kind, size in file.HEAD_SIZE_BY_DEFAULT.items()
}
_CHANNELS = (
    "intermediate_size_mlp", "intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "ffn_hidden_size", "dff",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """Counts of heads, channels, words and experts, and the cells of one head, from config.json. None: it does not say.

    ``widths``: all keys of the config that are whole numbers, for heads that are not of one size.
    """

    query: int
    key_value: int
    head: int | None = None
    channels: int | None = None
    words: int | None = None
    experts: int | None = None
    expert_channels: int | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    mixer: recurrent.Mixer | None = None

    def channels_of(self, slot: Slot) -> int | None:
        """Of a feed-forward, or of one expert; those that every token meets may have any number."""
        match slot.expert:
            case "":
                return self.channels
            case "routed":
                return self.expert_channels
            case "shared":
                return None

    def head_of(self, slot: Slot) -> int | None:
        if not slot.width:
            return self.head
        return sum(self.widths[key] for key in slot.width) if set(slot.width) <= set(self.widths) else None

    def for_block(self, slot: Slot) -> Sizes:
        """With the heads of a mixer, and the groups that they share, for those of attention, in a mixer's block."""
        if slot.meaning != "mixer" or self.mixer is None:
            return self
        return replace(self, query=self.mixer.heads, key_value=self.mixer.groups)


def family_of(config: Mapping[str, Any]) -> Mapping[str, Slot] | None:
    """The slots of a config's architecture; None where nothing is known of it."""
    return fused.variant_of(config) or FAMILIES.get(str(config.get("model_type")))


def sizes_of(config: Mapping[str, Any], tensor: str = "") -> Sizes | None:
    """What a config tells of its model's sizes, by the names in use; None where it tells of no heads. Where encoder
    and decoder differ, those of the stack that ``tensor`` is in."""
    config = translators.config_of(config, translators.stack_of(tensor))
    query = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    mixer = recurrent.mixer_of(config)
    if query is None and (mixer or str(config.get("model_type")) in recurrent.FAMILIES):
        query = 1  # no layer of attention
    if query is None:
        return None
    width = _first(config, "hidden_size", "n_embd", "dim", "d_model")
    by_default = _HEAD_SIZE_BY_DEFAULT.get(str(config.get("model_type")))
    of_experts = config.get("ffn_config")  # DBRX
    inner = of_experts if isinstance(of_experts, Mapping) else {}
    return Sizes(
        query=query,
        key_value=_key_value(config, query),
        head=_first(config, "head_dim", "kv_channels")
        or by_default
        or (width // query if width and width % query == 0 else None),
        channels=_first(config, *_CHANNELS),
        words=_first(config, "vocab_size"),
        experts=_first(inner, "moe_num_experts"),
        expert_channels=_first(inner, "ffn_hidden_size")
        or _first(config, "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
        widths={key: value for key in config if (value := _first(config, key)) is not None},
        mixer=mixer,
    )


def _key_value(config: Mapping[str, Any], query: int) -> int:
    multi_query = config.get("multi_query")
    if isinstance(multi_query, bool) and config.get("new_decoder_architecture") is not True:  # Falcon, GPT-BigCode
        return 1 if multi_query else query
    of_attention = config.get("attn_config")  # DBRX
    inner = of_attention if isinstance(of_attention, Mapping) else {}
    own = _first(config, "num_key_value_heads", "num_kv_heads", "multi_query_group_num")
    return own or _first(inner, "kv_n_heads") or query


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
