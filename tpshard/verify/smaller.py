"""A smaller model of the same architecture: config.json with its widths divided by one number and fewer layers.

What decides how an architecture may be cut stays as it is: heads, key-value heads, groups, the order of unlike layers.
All widths are divided by the same number, so that whatever holds among them (hidden = heads x head size, the parts of
a fused weight) still holds. Plain data in, plain data out: whether a model can be made of it, its class must say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpshard.errors import InputError, printable

MOST_COUNTED = 100_000  # layers, experts, heads, labels: each is made one by one
MOST_LAYERS = 1_000
MOST_TOGETHER = 200_000  # experts, or heads, of all layers
MOST = 2**40
POSITIONS, IMAGE_PATCHES, WORDS, WINDOW = 130, 6, 600, 8
HEAD_SIZES = (8, 16, 32, 64)

_COUNTED = re.compile(r"layer|depth|expert|head|block|stage|label|group|step|loop|level", re.IGNORECASE)
_LARGE = re.compile(r"token|vocab|max|bytes|_id$")
_DEPTH = frozenset(
    {
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
        "num_decoder_layers", "num_encoder_layers", "num_hidden_groups", "encoder_num_hidden_layers",
        "decoder_num_hidden_layers",
    }
)  # fmt: skip
_WORDS = frozenset({"vocab_size", "n_vocab", "vocab_size_per_layer_input", "decoder_vocab_size", "src_vocab_size",
                    "tgt_vocab_size"})  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads",
          "decoder_attention_heads")  # fmt: skip
_EXPERTS = frozenset({"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"})
_EACH = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts", "experts_per_token")
_POSITIONS = re.compile(r"^(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len)$")
_FEED_FORWARD = re.compile(r"intermediate|ffn|inner|mlp|d_ff|hidden_dim$")
_WIDTH = re.compile(
    r"(^|_)(size|dim|dims|rank|width|channels|hidden|n_embd|d_model|d_ff|d_kv|d_inner|n_inner|rotary_dim|n_embed)($|_)"
    r"|headdim|_dim$|_size$|_rank$|^dim$|^d_"
)
_NO_WIDTH = re.compile(
    r"vocab|kernel|patch_size|image_size|window|chunk|conv_size|d_conv|conv_l|block_size|stride|codebook|batch|"
    r"temporal|scale|channels$|^in_|type|tile|buckets|memory|query_length|mem_len|max|cache|grid|spatial|crop|num_"
)
_TOKEN = re.compile(
    r"_token_id$|_token_index$|^(pad|bos|eos|unk|sep|cls|mask|lang|asm|image|video|audio)_\w*(id|index)$"
)
_OF_A_HEAD = frozenset({"mrope_section", "short_factor", "long_factor"})


def require_sane(config: Mapping[str, Any], trail: str = "") -> None:
    """Raises InputError where a number of the config is beyond any model: it must not be allocated, nor counted to."""
    for key, value in config.items():
        name = f"{trail}.{key}" if trail else str(key)
        if isinstance(value, Mapping):
            require_sane(value, name)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, int) and not isinstance(item, bool):
                most = MOST_LAYERS if key in _DEPTH else MOST_COUNTED if _is_counted(str(key)) else MOST
                if abs(item) > most:
                    raise InputError(f"config.json: {printable(name)} is {item}, more than any model has ({most})")
    layers = max((_first(config, key) for key in _DEPTH), default=0)
    for kind, keys in (("experts", _EXPERTS), ("heads", _HEADS)):
        each = max(_first(config, key) for key in keys)
        if layers * each > MOST_TOGETHER:
            raise InputError(f"config.json: {layers} layers of {each} {kind} are more than any model has")


def _is_counted(key: str) -> bool:
    return bool(_COUNTED.search(key)) and not _WIDTH.search(key.replace("num_hidden", "")) and not _LARGE.search(key)


@dataclass(frozen=True, slots=True)
class Scale:
    """``width``: what widths are divided by; ``depth``: layers kept at most; ``ranks``: what widths of feed-forwards
    have to be divisible by where the real ones are; ``short``: positions and images are made small, too;
    ``only_depth``: words and experts stay as many."""

    width: int
    depth: int
    ranks: int = 1
    short: bool = True
    only_depth: bool = False


def head_size(config: Mapping[str, Any]) -> int:
    """Cells of one head, by the first keys that tell; 0 where none do."""
    for table in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        known = _first(table, "head_dim", "d_kv", "attention_head_size", "qk_rope_head_dim", "d_head", "kv_channels")
        heads = _first(table, *_HEADS)
        hidden = _first(table, "hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embed_dim", "hidden_dim")
        if known or (heads and hidden):
            return known or max(1, hidden // heads)
    return 0


def _first(table: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = table.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def divisors(config: Mapping[str, Any]) -> Iterator[int]:
    """Numbers to divide widths by, the best first; at last 1."""
    size = head_size(config)
    found = [size // small for small in HEAD_SIZES if size > small and size % small == 0]
    yield from dict.fromkeys([*found, *(divisor for divisor in (16, 8, 4, 2) if divisor < max([*found, 64])), 1])


def scaled(config: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """The config of a smaller model. Raises ValueError where a number cannot be divided."""
    words = {key: _fewer_words(value) for key, value in config.items() if key in _WORDS and _whole(value)}
    words = {} if scale.only_depth else words
    depths = {value for key, value in config.items() if key in _DEPTH and _whole(value) and value > scale.depth}
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            made[key] = _inside(config, key, value, scale, words)
        elif isinstance(value, list) and key not in _OF_A_HEAD and len(value) in depths:
            made[key] = [_one(key, item, config, scale) for item in value[: scale.depth]]
        elif key in words:
            made[key] = words[key]
        elif _TOKEN.search(key):
            made[key] = _token(value, key, min(words.values(), default=0))
        else:
            made[key] = _one(key, value, config, scale)
    return made


def _inside(
    config: Mapping[str, Any], key: str, value: Mapping[str, Any], scale: Scale, words: Mapping[str, int]
) -> Mapping[str, Any]:
    """A config in a config; other tables (labels, rope) are left as they are, but for what counts a head's cells."""
    if key.endswith("config"):
        return scaled({**({"vocab_size": max(words.values())} if words and "_vocab" in value else {}), **value}, scale)
    return {name: _one(name, item, value, scale) if name in _OF_A_HEAD else item for name, item in value.items()}


def _one(key: str, value: Any, config: Mapping[str, Any], scale: Scale) -> Any:
    if isinstance(value, list):
        if key in _OF_A_HEAD and all(isinstance(item, float) for item in value):
            return value[: len(value) // scale.width]
        return [_one(key, item, config, scale) for item in value]
    if not _whole(value):
        return value
    if key in _DEPTH:
        return min(value, scale.depth)
    if key in _OF_A_HEAD:
        return _divided(key, value, scale)
    if scale.only_depth:
        return value
    if key in _EXPERTS:
        return _fewer_experts(value, config)
    if scale.short and _POSITIONS.search(key):
        return min(value, POSITIONS)
    if scale.short and key == "attention_window":
        return min(value, WINDOW)
    if scale.short and key == "image_size" and _whole(config.get("patch_size")):
        return min(value, IMAGE_PATCHES * config["patch_size"])
    if _WIDTH.search(key) and not _NO_WIDTH.search(key):
        return _narrower_feed_forward(value, scale) if _FEED_FORWARD.search(key) else _divided(key, value, scale)
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _divided(key: str, value: int, scale: Scale) -> int:
    if value % scale.width == 0:
        return value // scale.width
    if value < scale.width or value <= 64:
        return value  # a small number of something: states, ranks of adapters
    raise ValueError(f"{key} {value} cannot be divided by {scale.width}")


def _narrower_feed_forward(value: int, scale: Scale) -> int:
    """Divisible by the same ranks."""
    if scale.width == 1:
        return value
    multiple = math.gcd(value, scale.ranks)
    small = value // scale.width
    return max(multiple, -(-small // multiple) * multiple)


def _fewer_words(value: int) -> int:
    """Divisible by the same powers of two."""
    if value <= WORDS:
        return value
    power = math.gcd(value, 64)
    return power * (WORDS // power | 1)


def _fewer_experts(value: int, config: Mapping[str, Any]) -> int:
    groups = _first(config, "n_group") or 1
    each = _first(config, *_EACH) or 1
    wanted = max(4, each + 2)
    return min(value, max(2 * groups, -(-wanted // groups) * groups))


def _token(value: Any, key: str, words: int) -> Any:
    """A word of the smaller vocabulary; different ones for different keys."""
    if isinstance(value, list):
        return [_token(item, key, words) for item in value]
    if not _whole(value) or not words or value < words:
        return value
    return words - 1 - sum(key.encode()) % (words // 2)


def depths_to_try(config: Mapping[str, Any]) -> Sequence[int]:
    """Numbers of layers, from two up to all."""
    tables = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    most = max((v for table in tables for key, v in table.items() if key in _DEPTH and _whole(v)), default=1)
    steps = [2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128]
    return [step for step in steps if step < most] + [most]
